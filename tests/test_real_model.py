"""The built-in model, fetched once as a user would: the same text as transformers, faster or not, always equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from s4c import LLM, SamplingParams
from s4c.engine.llm import choose_drafter, shipped_for
from s4c.models.loading import resolve
from s4c.models.native import library

pytestmark = pytest.mark.real_model

QUESTIONS = [
    "Name three rivers of Europe and say where each of them ends.",
    "Tom has 12 marbles, loses 5 and wins twice as many as he lost. How many has he now?",
    "Write a Python function that reverses the words of a sentence.",
    "Translate into English: Der Zug kommt heute eine Stunde später.",
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("smollm2-135m", "auto", max_batch=4)


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    return [llm.token_ids([{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.fixture(scope="module")
def plain(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return write(llm, "none", prompts, SamplingParams(max_new_tokens=40))


def write(llm: LLM, drafter: str, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    llm.use(drafter)
    return [generation.token_ids for generation in llm.generate(prompts, params)]


def same(llm: LLM, prompt: list[int], left: list[int], right: list[int]) -> bool:
    """Equal, or equal up to a tie: two tokens whose logits lie within 1e-4, which the order of a sum may swap."""
    if left == right:
        return True
    at = next(i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1])
    llm.target.reserve(1, len(prompt) + at + 1)
    feature = llm.target.prefill(0, torch.tensor(prompt + left[:at]))[-1]
    logits: Any = llm.target.head_weight()[[left[at], right[at]]] @ feature
    return abs(float(logits[0] - logits[1])) < 1e-4


def test_plain_decoding_is_that_of_transformers(llm: LLM, prompts: list[list[int]], plain: list[list[int]]) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(resolve("smollm2-135m"), dtype=torch.float32)
    for prompt, mine in zip(prompts, plain, strict=True):
        tokens = torch.tensor([prompt])
        output = oracle.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=40, do_sample=False)
        assert same(llm, prompt, mine, output[0, len(prompt) :].tolist())


@pytest.mark.parametrize("drafter", ["auto", "shipped", "ngram"])
def test_speculative_is_plain(llm: LLM, prompts: list[list[int]], plain: list[list[int]], drafter: str) -> None:
    written = write(llm, drafter, prompts, SamplingParams(max_new_tokens=40))
    if llm.target.runtime == "native":
        assert written == plain
    assert all(same(llm, *texts) for texts in zip(prompts, plain, written, strict=True))


def test_speculative_is_plain_at_temperature_one(llm: LLM, prompts: list[list[int]]) -> None:
    params = SamplingParams(max_new_tokens=32, temperature=1.0, top_p=0.95, seed=7)
    assert write(llm, "auto", prompts, params) == write(llm, "none", prompts, params)


@pytest.mark.skipif(library.problem() is not None, reason=str(library.problem()))
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculative_is_plain_in_low_precision(prompts: list[list[int]], dtype: str, temperature: float) -> None:
    """Without a clause for ties: the kernels of the native runtime know no other row."""
    llm = LLM("smollm2-135m", "none", dtype=dtype, max_batch=4)
    params = SamplingParams(max_new_tokens=32, temperature=temperature, seed=7)
    plain = [llm.generate(prompt, params).token_ids for prompt in prompts]
    for drafter in ("none", "auto", "ngram"):
        assert write(llm, drafter, prompts, params) == plain


def test_the_shipped_drafter_is_for_this_target_and_accepts(llm: LLM, prompts: list[list[int]]) -> None:
    assert shipped_for(llm.target) is not None
    assert choose_drafter("auto", llm.target).name != "ngram"
    llm.use("auto", "best:10x3")
    generations = llm.generate(prompts, SamplingParams(max_new_tokens=40))
    rounds = sum(generation.stats.rounds for generation in generations)
    assert sum(len(generation.token_ids) for generation in generations) > 1.5 * rounds
