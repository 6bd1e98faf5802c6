"""Recorded passes: fixed shapes and buffers change nothing. (The recording itself is a GPU's affair.)"""

from __future__ import annotations

import gc
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from s4c import LLM, SamplingParams
from s4c.drafters.s4c import S4CConfig, S4CDrafter, S4CModel
from s4c.models import recorded
from s4c.models import stack as module
from s4c.models.layers import DecoderLayer, LayerShape, RMSNorm
from s4c.models.recorded import Recorded
from s4c.models.stack import Rope, TorchStack

SHAPE = LayerShape(32, 48, 4, 2, 8, 1e-5)
CPU = torch.device("cpu")
PARENTS = [-1, 0, 0, 1, 1, 2, 5, 5, 6, -1, 9, 3, 11]


def stack_of() -> TorchStack:
    torch.manual_seed(0)
    stack = TorchStack(3, SHAPE, Rope(100.0 ** -(torch.arange(0, 8, 2) / 8)), torch.float32, CPU, RMSNorm(32, 1e-5))
    for index in range(3):
        layer = DecoderLayer(SHAPE).requires_grad_(False)
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape) / weight.shape[-1] ** 0.5)
        stack.place(index, layer)
    return stack


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(run: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What a course of passes gives by free shapes and by recorded ones."""
    free, fixed = stack_of(), stack_of()
    assert not free.records
    fixed.records = True
    with torch.no_grad():
        return run(free), run(fixed)


def test_a_call_leaves_the_outputs_of_others_alone() -> None:
    inputs = [(random(2, 3, seed=seed), random(3, 2, seed=seed + 1)) for seed in (2, 4, 6)]
    one = Recorded(inputs[0])
    outputs = [one(torch.matmul, pair) for pair in inputs]
    for output, (x, y) in zip(outputs, inputs, strict=True):
        assert torch.equal(output, x @ y)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 13])
@pytest.mark.parametrize("taps", [(), (1, 2)], ids=str)
def test_trees_of_any_size_behind_texts_of_any_length(count: int, taps: tuple[int, ...]) -> None:
    parents = torch.tensor(PARENTS[:count]).expand(3, -1)

    def course(stack: TorchStack) -> list[Tensor]:
        stack.reserve(3, 40)
        outputs = []
        for round_ in range(4):
            outputs.append(stack.run(random(3, count, 32, seed=round_), parents, taps=taps))
            for slot in range(3):
                stack.keep(slot, [0, *[node for node in (1, 3, 11) if node < count][: slot + round_]])
        assert stack.lengths[0] < stack.lengths[2] or count == 1
        return outputs

    for expected, found in zip(*both(course), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_that_wait_and_slots_further_on() -> None:
    parents = torch.tensor([PARENTS, PARENTS])

    def course(stack: TorchStack) -> list[Tensor]:
        stack.reserve(4, 64)
        for slot, length in ((2, 7), (3, 12)):
            stack.run(random(1, length, 32, seed=slot), torch.arange(-1, length - 1)[None], slot)
            stack.keep(slot, list(range(length)))
        x = random(2, len(PARENTS), 32, seed=9)
        cuts = [0, 1, 4, 9, 13]
        return [
            stack.run(x[:, begin:end], parents[:, :end], 2, pending=begin) for begin, end in itertools.pairwise(cuts)
        ]

    for expected, found in zip(*both(course), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_cache_that_grows_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_RECORDINGS", 2)
    kept = []

    def course(stack: TorchStack) -> list[Tensor]:
        stack.reserve(1, 1)
        outputs = []
        for step in range(300):
            count = 1 + step % 5
            outputs.append(stack.run(random(1, count, 32, seed=step), torch.tensor([PARENTS[:count]])))
            stack.keep(0, [0, 1][:count])
        kept.append(len(stack._recordings))
        return outputs

    expected, found = both(course)
    assert kept[0] == 0 < kept[1] <= 3
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(expected, 1), rtol=1e-3, atol=1e-4)


def test_what_is_recorded_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_RECORDINGS", 2)
    made = []
    monkeypatch.setattr(recorded, "Recorded", lambda *args: made.append(args) or Recorded(*args))
    stack = stack_of()
    stack.records = True
    stack.reserve(1, 64)
    for step in range(20):
        count = 1 + step % 2
        stack.run(random(1, count, 32, seed=step), torch.tensor([PARENTS[:count]]))
        stack.keep(0, [0])
    assert len(made) == 2


def test_recordings_go_with_their_stack() -> None:
    """At once, not when somebody collects: a graph that goes while another is recorded spoils it."""
    stack = stack_of()
    stack.records = True
    stack.reserve(1, 8)
    stack.run(random(1, 2, 32, seed=0), torch.tensor([PARENTS[:2]]))
    assert len(stack._recordings)
    gone = weakref.ref(stack._recordings)
    gc.disable()
    try:
        del stack
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("moved", [False, True])
def test_a_slot_keeps_nothing_of_an_ended_sequence_that_was_not_finite(moved: bool) -> None:
    stack = stack_of()
    stack.records = True
    stack.reserve(2, 64)
    for slot, spoilt in enumerate((True, False)):
        for step in range(20):
            x = random(1, 1, 32, seed=step)
            stack.run(x * torch.nan if spoilt else x, torch.tensor([[-1]]), first_slot=slot)
            stack.keep(slot, [0])
    if moved:
        stack.lengths[1] = 5
        stack.move(1, 0)
    else:
        stack.start(0)
    assert stack.run(random(1, 1, 32, seed=0), torch.tensor([[-1]])).isfinite().all()


def test_generation_is_what_it_was(tmp_path: Path) -> None:
    llm = LLM(str(tiny_models.save(tmp_path, "llama")), "none", runtime="torch", max_batch=2)
    prompts = [[3, 14, 15, 9, 26, 5], [8, 2], [40, 41, 42, 43]]
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, temperature=0.8)
    plain = [g.token_ids for g in llm.generate(prompts, params)]
    stack = llm.target.stack
    assert isinstance(stack, TorchStack)
    stack.records = True
    torch.manual_seed(0)
    drafter = S4CModel(llm.target, S4CConfig(head_dim=8), torch.arange(64)).drafter(llm.target)
    assert isinstance(drafter, S4CDrafter)
    for part in drafter._stacks:
        assert isinstance(part, TorchStack)
        part.records = True
    llm.use(drafter, "best:12x3")
    assert [g.token_ids for g in llm.generate(prompts, params)] == plain
    assert len(stack._recordings)
    assert all(len(part._recordings) for part in drafter._stacks if isinstance(part, TorchStack))
