"""Twins of a target decode side by side: one set of weights, caches and adapters of their own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from test_native import SETS

from s4c import LLM, SamplingParams
from s4c.drafters.sdsat import SDSATConfig, SDSATModel
from s4c.engine.sequence import Generation

RUNTIMES = ["torch", "hf", *(["native"] if SETS else [])]
PARAMS = SamplingParams(max_new_tokens=24, temperature=0.8, seed=1, ignore_eos=True)
PROMPTS = [[3, 14, 15, 9, 26, 5], [3, 14, 15], [40, 41, 40, 41, 40, 41, 40]]


def by_turns(llms: Sequence[LLM], prompts: Sequence[list[int]]) -> list[Generation]:
    """Each answers one of the prompts, a round of each in turn."""
    ended: dict[int, Generation] = {}
    streams = {i: llm.stream(prompt, PARAMS) for i, (llm, prompt) in enumerate(zip(llms, prompts, strict=True))}
    while len(ended) < len(streams):
        for i, stream in streams.items():
            chunk = next(stream, None)
            if chunk is not None and chunk.generation is not None:
                ended[i] = chunk.generation
    return [ended[i] for i in streams]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_rounds_in_turn_leave_each_its_own_text(tmp_path: Path, runtime: str) -> None:
    llm = LLM(str(tiny_models.save(tmp_path, "llama")), "none", runtime=runtime)
    alone = [llm.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]
    first, second = llm.twin(), llm.twin()
    first.use("ngram", "chain:3")
    assert [g.token_ids for g in by_turns([llm, first, second], PROMPTS)] == alone
    assert first.target.embedding_weight().data_ptr() == llm.target.embedding_weight().data_ptr()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_twin_is_freed(tmp_path: Path, runtime: str) -> None:
    llm = LLM(str(tiny_models.save(tmp_path, "llama")), "none", runtime=runtime)
    twin = llm.twin()
    twin.generate(PROMPTS[0], PARAMS)
    gone = weakref.ref(twin.target)
    del twin
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_threads_leave_each_its_own_text(tmp_path: Path, runtime: str) -> None:
    llm = LLM(str(tiny_models.save(tmp_path, "llama")), "none", runtime=runtime)
    alone = [llm.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(llm.twin().generate, prompt, PARAMS) for prompt in PROMPTS for _ in range(2)]
    assert [answer.result().token_ids for answer in answers] == [text for text in alone for _ in range(2)]


@pytest.mark.parametrize("runtime", [runtime for runtime in RUNTIMES if runtime != "hf"])
def test_adapters_stay_apart(tmp_path: Path, runtime: str) -> None:
    llm = LLM(str(tiny_models.save(tmp_path, "llama", seed=3)), "none", runtime=runtime)

    def adapted(seed: int) -> LLM:
        twin = llm.twin()
        torch.manual_seed(seed)
        config = SDSATConfig(tokens=3, rank=4, fused=4)
        model = SDSATModel(twin.target, config, torch.arange(llm.target.spec.vocab_size))
        with torch.no_grad():
            for parameter in model.up.values():
                parameter.add_(torch.randn_like(parameter))
        twin.use(model.drafter(twin.target), "best:8x3")
        return twin

    def rounds(generation: Generation) -> list[Any]:
        return [generation.token_ids, generation.origins]

    alone = [rounds(adapted(seed).generate(PROMPTS[0], PARAMS)) for seed in (0, 1)]
    assert alone[0][0] == alone[1][0] == llm.generate(PROMPTS[0], PARAMS).token_ids
    assert alone[0][1] != alone[1][1]
    llm.use(adapted(2).drafter, "best:8x3")
    twins = [adapted(0), adapted(1)]
    assert [rounds(g) for g in by_turns(twins, [PROMPTS[0]] * 2)] == alone
