"""Medusa: heads that look further ahead from one feature (arXiv 2401.10774).

    head k at position t:   z = f_t;  z = z + SiLU(W z + b), `layers` times;  its logits predict token t + 1 + k

The published heads read the feature of the last position that a pass has seen. In a round of this engine the last
committed token, the root r, has not been passed yet, so that is f_{r-1}: the target's own LM head has already made the
root of it, and head k drafts level k of the tree below, token r + k. A level costs one small call: no cache, no layers
of attention. In return no head knows what the tree says above its level, and the children of all nodes
of a level are the same; best-first by path probability makes what can be made of that.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4c.drafters.base import (
    Drafter,
    DraftModel,
    Method,
    Prediction,
    Sequences,
    TrainingBatch,
    check_least,
    drafting_dtype,
    extend,
    finish,
)
from s4c.models.base import Target
from s4c.models.layers import Linear, pack
from s4c.models.native.rows import native_top_and_total
from s4c.types import DraftTree, TargetOutput, Verdict
from s4c.verify.tree import root_only

LM_HEADS = ("tied", "own")


@dataclass(frozen=True)
class MedusaConfig:
    """Sizes and options of Medusa heads.

    Attributes:
        heads: K, the number of heads and of levels that a tree can have.
        layers: residual blocks of each head (the paper: 1).
        draft_vocab: number of tokens that the drafter can propose, the most frequent ones; 0: all.
        lm_head: `own` trains a copy of the target's LM head for each head (the paper), `tied` trains a square matrix
            before the target's: with that alone a head could not take anything back of its feature, for SiLU only adds.
    """

    heads: int = 4
    layers: int = 1
    draft_vocab: int = 8192
    lm_head: str = "tied"

    def __post_init__(self) -> None:
        check_least(self, heads=1, layers=1, draft_vocab=0)
        if self.lm_head not in LM_HEADS:
            raise ValueError(f"lm_head is {self.lm_head!r}; it must be one of {', '.join(LM_HEADS)}")


class ResidualBlock(nn.Module):
    """z + SiLU(W z + b); it starts as the identity."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = Linear(hidden, hidden, bias=True)
        nn.init.zeros_(self.linear.weight)

    def forward(self, z: Tensor) -> Tensor:
        return z + F.silu(self.linear(z).float())


class MedusaHead(nn.Module):
    """One head: residual blocks, and an LM head or what comes before a shared one.

    Args:
        hidden: size of a feature.
        layers: number of blocks.
        rows: [V', d], where the head's own LM head starts; None where the heads share one.
    """

    def __init__(self, hidden: int, layers: int, rows: Tensor | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualBlock(hidden) for _ in range(layers)))
        self.last = Linear.of(torch.eye(hidden) if rows is None else rows.clone())
        self._shares = rows is None

    def logits(self, hidden: Tensor, shared: Linear) -> Tensor:
        """[..., V'] of what the blocks give."""
        logits: Tensor = shared(self.last(hidden)) if self._shares else self.last(hidden)
        return logits

    def halves(self, feature: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [..., d] of features [..., d], and the LM head [V', d] that reads them."""
        hidden = self.blocks(feature)
        return (self.last(hidden), shared) if self._shares else (hidden, self.last.weight)


class MedusaModel(DraftModel):
    """The heads.

    Args:
        target: gives the LM head and the size of a feature.
        config: sizes and options.
        token_ids: [V'] int64, the draft vocabulary.
    """

    token_ids: Tensor
    head_rows: Tensor

    def __init__(self, target: Target, config: MedusaConfig, token_ids: Tensor) -> None:
        super().__init__()
        self.config = config
        rows = target.head_weight(token_ids).float()
        self.register_buffer("token_ids", token_ids)
        self.register_buffer("head_rows", rows, persistent=False)
        own = rows if config.lm_head == "own" else None
        hidden = target.spec.hidden_size
        self.heads = nn.ModuleList(MedusaHead(hidden, config.layers, own) for _ in range(config.heads))
        self.requires_grad_(True)

    def each_head(self) -> list[MedusaHead]:
        """The heads, the one that looks least far first."""
        return [head for head in self.heads if isinstance(head, MedusaHead)]

    def predictions(self, batch: TrainingBatch) -> list[Prediction]:
        return [
            Prediction(*head.halves(batch.features, self.head_rows), None, offset=k + 1)
            for k, head in enumerate(self.each_head(), 1)
        ]

    def drafter(self, target: Target, dtype: torch.dtype | None = None) -> MedusaDrafter:
        return MedusaDrafter(self, target, dtype or drafting_dtype(target))


class MedusaDrafter(Drafter):
    """Medusa at inference: packed heads, and the last feature of each sequence.

    Args:
        model: the trained heads; a copy of its weights is taken.
        target: the model that is drafted for.
        dtype: of the weights.
    """

    name = "medusa"
    planned = True

    def __init__(self, model: MedusaModel, target: Target, dtype: torch.dtype) -> None:
        native = target.runtime == "native"
        self.token_ids = model.token_ids.to(target.device)
        self.default_tree = f"best:16x{model.config.heads}"
        self._heads = [copy.deepcopy(head).to(target.device).eval() for head in model.each_head()]
        self._shared = Linear.of(model.head_rows.to(target.device).clone())
        for part in (*self._heads, self._shared):
            pack(part, dtype, native)
        self._select = native_top_and_total if native else None
        self._last: dict[int, tuple[Tensor, int, int]] = {}
        """By slot: the features of a pass, and where among them its last one is."""

    def prefill(self, slot: int, tokens: Tensor, features: Tensor) -> None:
        self._last[slot] = F.pad(features[-1:], (0, 0, 1, 0))[None], 0, -1

    @torch.no_grad()
    def propose(self, sequences: Sequences) -> DraftTree:
        if sequences.plan.nodes == 1:
            return root_only(sequences.roots, sequences.device)
        builder = sequences.plan.deepened(len(self._heads)).grow(sequences.root_tokens, self._select)
        last = [self._last[slot] for slot in range(len(sequences.tokens))]
        feature = torch.stack([features[row, node].float() for features, row, node in last])[:, None]
        while builder.open and builder.level < len(self._heads):
            head = self._heads[builder.level]
            logits = head.logits(head.blocks(feature), self._shared).float()
            extend(sequences, builder, logits, self.token_ids)
        return finish(sequences, builder)

    def commit(self, tree: DraftTree, verdict: Verdict, output: TargetOutput) -> None:
        for slot, (path, _) in enumerate(verdict.lines):
            self._last[slot] = output.features, slot, path[-1]

    def move(self, source: int, destination: int) -> None:
        self._last[destination] = self._last.pop(source)


METHOD = Method(name=MedusaDrafter.name, config=MedusaConfig, model=MedusaModel)
