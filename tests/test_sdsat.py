"""SDSAT: what it drafts, what its probes see, and that the base model never notices them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from test_s4c_drafter import PROMPTS, Run

from s4c.drafters.base import TrainingBatch
from s4c.drafters.sdsat import SDSATConfig, SDSATDrafter, SDSATModel
from s4c.models.loading import load_target

VOCAB = tiny_models.VOCAB


@pytest.fixture
def target(tmp_path: Path) -> Any:
    return load_target(str(tiny_models.save(tmp_path, "llama")), runtime="torch")


def model_of(target: Any, **config: Any) -> SDSATModel:
    """A model whose adapters matter."""
    torch.manual_seed(0)
    model = SDSATModel(target, SDSATConfig(**{"tokens": 3, "rank": 4, **config}), torch.arange(VOCAB))
    with torch.no_grad():
        for parameter in model.up.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text_batch(lines: list[list[int]], answer_start: int = 1) -> TrainingBatch:
    longest = max(len(line) for line in lines)
    tokens = torch.tensor([line + [0] * (longest - len(line)) for line in lines])
    length = torch.tensor([len(line) for line in lines])
    return TrainingBatch(
        tokens, torch.zeros(*tokens.shape, tiny_models.HIDDEN), length, torch.full_like(length, answer_start)
    )


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("fused", [0, 3])
def test_probes_say_what_the_training_pass_predicts(target: Any, rank: int, fused: int) -> None:
    """The laws of round after round, against one training pass over the whole text, with the root at its last token."""
    model = model_of(target, rank=rank, groups=100)
    run = Run(target, SDSATDrafter(replace(model.config, fused=fused), model.adapter(), target), PROMPTS, "best:12x3")
    compared = 0
    for _ in range(7):
        scores, tree = run.propose()
        before = [list(line) for line in run.tokens]
        accepted = run.finish(scores, tree)
        for slot, line in enumerate(run.tokens):
            laws = run.drafter._laws[slot]
            if not len(laws):
                continue
            behind = 3 - len(laws)
            carrier = len(line) - 2 - behind
            assert carrier >= len(before[slot]) - 1
            with torch.no_grad():
                heads = model.predictions(text_batch([line[: carrier + 1] + [5] * 4]))
            for law, head in zip(laws, heads[behind:], strict=True):
                assert torch.allclose(law, head.logits(head.hidden[0, carrier]), atol=1e-4)
                compared += 1
    assert compared > 20
