"""On a GPU, where there is one (S4C_TEST_GPU=1 pytest tests/test_gpu.py): its passes, recordings and kernels together.

Elsewhere the same runs on the CPU, so that the tests themselves are tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from s4c import LLM, SamplingParams
from s4c.drafters.s4c import S4CConfig, S4CModel
from s4c.models.stack import TorchStack
from s4c.verify.noise import gumbel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[3, 14, 15, 9, 26, 5], [8, 2], [40, 41, 40, 41, 40, 41]]
TOKENS = 60


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    return LLM(
        str(tiny_models.save(tmp_path, "llama")), "none", runtime="torch", dtype="float32", device=DEVICE, max_batch=3
    )


def s4c_drafter(llm: LLM) -> Any:
    torch.manual_seed(0)
    return S4CModel(llm.target, S4CConfig(head_dim=8, draft_vocab=48), torch.arange(48)).drafter(llm.target)


def answers(llm: LLM, temperature: float) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True, temperature=temperature, seed=7)
    return [g.token_ids for g in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("tree", ["best:8x3", "comb:2x2", "plan"])
def test_drafting_changes_nothing(llm: LLM, tree: str, temperature: int) -> None:
    """Two drafters in turns, so that recordings go while others stay."""
    plain = answers(llm, temperature)
    drafters = [s4c_drafter(llm), s4c_drafter(llm)]
    for drafter in [*drafters, *drafters]:
        llm.use(drafter, tree)
        assert answers(llm, temperature) == plain


def test_passes_are_recorded_there(llm: LLM) -> None:
    answers(llm, 0)
    assert isinstance(llm.target.stack, TorchStack)
    assert bool(len(llm.target.stack._recordings)) == (DEVICE == "cuda")


def test_the_text_of_a_seed_is_that_of_the_cpu(llm: LLM, tmp_path: Path) -> None:
    """The noise is, bit by bit; the logits are near enough for a tiny model."""
    row = llm._engine.noise.row(7, 0, 5)
    assert torch.equal(row.cpu(), gumbel(7, 0, 5, llm.target.spec.vocab_size))
    here = LLM(str(tiny_models.save(tmp_path, "llama")), "none", runtime="torch", dtype="float32", device="cpu")
    assert answers(here, 1) == answers(llm, 1)
