"""How well a target foretells recorded answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from s4c.models.base import Target
from s4c.training.data import Row


@torch.no_grad()
def perplexity(target: Target, rows: Sequence[Row]) -> float:
    """exp of the mean of -log p over the tokens of all answers, each given its prompt and the tokens before it.

    Args:
        target: its slot 0 is used.
        rows: at least one; an answer of n tokens counts n times as much as one of a single token.
    """
    target.reserve(1, max(len(row) for row in rows))
    head = target.head_weight()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        tokens = torch.tensor(row.tokens, device=target.device)
        features = target.prefill(0, tokens[:-1])[len(row.prompt_ids) - 1 :]
        logits = F.linear(features.to(head.dtype), head).float()
        total += F.cross_entropy(logits, tokens[len(row.prompt_ids) :], reduction="sum").cpu()
    return float((total / sum(len(row.answer_ids) for row in rows)).exp())
