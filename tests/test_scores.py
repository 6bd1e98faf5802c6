"""Processors and decisions, against slow per-node references and transformers."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from verify_oracles import path_to, random_parents, random_request, scores_of, slow_process

from s4c.types import DraftTree, SamplingParams
from s4c.verify.scores import (
    Scores,
    choose,
    keep_top_k,
    keep_top_p,
    why_lawless,
)
from s4c.verify.tree import ancestors

VOCAB = 11
FALSE_ALARM = 1e-6
"""Chance of a failure of each statistical test, were its seeds not fixed, if the law is as claimed."""

ONE_AT_A_TIME: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_k": VOCAB + 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 0.9},
    {"frequency_penalty": -0.4},
    {"logit_bias": {3: 2.5, 4: -math.inf}},
    {"bad_words": [[2], [3, 4], [1, 2, 3], [4, 4, 4, 4]]},
    {
        "temperature": 0.8,
        "top_k": 6,
        "top_p": 0.8,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {1: 1.0},
        "bad_words": [[3, 4], [5]],
    },
]


def random_tree(size: int, batch: int, rng: random.Random, vocab: int = VOCAB) -> DraftTree:
    """Few distinct tokens, so that penalties, duplicates and bad words matter."""
    return DraftTree(
        tokens=torch.tensor([[rng.randrange(vocab // 2) for _ in range(size)] for _ in range(batch)]),
        parents=torch.tensor([random_parents(size, rng) for _ in range(batch)]),
        candidate=torch.arange(size).expand(batch, -1) > 0,
        sampled=torch.zeros(batch, dtype=torch.bool),
    )


def check_against_slow(requests: list[SamplingParams], seed: int, size: int) -> None:
    """Every node of a random tree, against the reference that decodes its text plainly."""
    rng = random.Random(seed)
    texts = [[rng.randrange(VOCAB // 2) for _ in range(rng.randrange(1, 9))] for _ in requests]
    prompts = [rng.randrange(1, len(text) + 1) for text in texts]
    tree = random_tree(size, len(requests), rng)
    for row, text in enumerate(texts):
        tree.tokens[row, 0] = text[-1]
    logits = torch.randn(len(requests), size, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    processed = scores_of(requests, texts, prompts, VOCAB).process_tree(logits.clone(), tree)
    for row, (request, text, prompt) in enumerate(zip(requests, texts, prompts, strict=True)):
        for node in range(size):
            path = [int(tree.tokens[row, step]) for step in path_to(tree.parents[row].tolist(), node)]
            expected = slow_process(request, text + path, prompt, logits[row, node].tolist())
            assert processed[row, node].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("options", ONE_AT_A_TIME, ids=lambda options: "+".join(options) or "greedy")
def test_each_processor_at_each_node(options: dict[str, Any]) -> None:
    for seed in range(4):
        check_against_slow([SamplingParams(**options)], seed, size=1 + 3 * seed)


def test_requests_of_a_batch_keep_to_themselves() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        check_against_slow([random_request(rng, VOCAB) for _ in range(4)], seed, size=1 + seed % 8)


def test_bad_word_across_history_and_drafted_path() -> None:
    tree = DraftTree(
        torch.tensor([[2, 3, 5]]),
        torch.tensor([[-1, 0, 0]]),
        torch.tensor([[False, True, True]]),
        torch.tensor([False]),
    )
    scores = scores_of([SamplingParams(bad_words=[[1, 2, 3, 4]])], [[1, 2]], [1], VOCAB)
    banned = scores.process_tree(torch.zeros(1, 3, VOCAB), tree)[0].isinf().nonzero().tolist()
    assert banned == [[1, 4]]


def test_probes_are_no_text() -> None:
    """Their tokens may lie outside the vocabulary, and neither penalties nor bad words see them."""
    tree = DraftTree(
        torch.tensor([[2, VOCAB + 3, 3]]),
        torch.tensor([[-1, 0, 0]]),
        torch.tensor([[False, False, True]]),
        torch.tensor([False]),
    )
    request = SamplingParams(frequency_penalty=1.0, bad_words=[[0, 1]])
    processed = scores_of([request], [[2]], [1], VOCAB).process_tree(torch.zeros(1, 3, VOCAB), tree)
    assert processed[0, :2].eq(0).all()
    assert processed[0, 2].nonzero().tolist() == [[3]]


# --- against transformers ---


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
        ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
        ({"temperature": 1.0, "top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"repetition_penalty": 1.4}, [RepetitionPenaltyLogitsProcessor(1.4)]),
        ({"logit_bias": {3: 1.5, 7: -4.0}}, [SequenceBiasLogitsProcessor([[[3], 1.5], [[7], -4.0]])]),
        ({"bad_words": [[2], [1, 3], [0, 1, 4]]}, [NoBadWordsLogitsProcessor([[2], [1, 3], [0, 1, 4]])]),
        (
            {"repetition_penalty": 1.4, "bad_words": [[1, 3]], "temperature": 1.5, "top_k": 9, "top_p": 0.9},
            [
                RepetitionPenaltyLogitsProcessor(1.4),
                NoBadWordsLogitsProcessor([[1, 3]]),
                TemperatureLogitsWarper(1.5),
                TopKLogitsWarper(9),
                TopPLogitsWarper(0.9),
            ],
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_equal_to_transformers(options: dict[str, Any], theirs: list[Any]) -> None:
    for seed in range(20):
        noise = torch.Generator().manual_seed(seed)
        text = torch.randint(0, 5, (1, 8), generator=noise)
        logits = torch.randn(1, VOCAB, generator=noise) * 2
        expected = LogitsProcessorList(theirs)(text, logits.clone())
        processed = scores_of([SamplingParams(**options)], text.tolist(), [3], VOCAB).process(logits[:, None].clone())
        torch.testing.assert_close(processed[:, 0], expected, atol=1e-5, rtol=0)


# --- a reduced vocabulary ---


def test_reduced_vocabulary_is_a_gather_before_warping() -> None:
    token_ids = torch.tensor([0, 2, 3, 7, 9])
    for seed in range(20):
        rng = random.Random(seed)
        requests = [random_request(rng, VOCAB, temperature=0.0) for _ in range(3)]
        texts = [[rng.randrange(VOCAB) for _ in range(5)] for _ in requests]
        tree = random_tree(6, 3, rng)
        path = tree.tokens[:, 1:], ancestors(tree.parents)[:, :, 1:]
        logits = torch.randn(3, 6, VOCAB, generator=torch.Generator().manual_seed(seed))
        scores = scores_of(requests, texts, [2, 3, 5], VOCAB)
        reduced = scores.process(logits[..., token_ids], *path, token_ids=token_ids)
        assert torch.equal(reduced, scores.process(logits, *path)[..., token_ids])


def test_reduced_vocabulary_shares_the_noise() -> None:
    token_ids = torch.tensor([1, 4, 8])
    scores = scores_of([SamplingParams(temperature=1.0, seed=3)], [[0]], [1], VOCAB)
    positions = torch.tensor([[4, 6, 4]])
    whole, reduced = scores.noise(positions), scores.noise(positions, token_ids=token_ids)
    assert whole is not None
    assert reduced is not None
    assert torch.equal(reduced, whole[..., token_ids])


# --- top-k and top-p ---


def test_top_k_keeps_ties_of_the_kth() -> None:
    logits = torch.tensor([[[2.0, 1.0, 1.0, 0.0]]])
    assert keep_top_k(logits, [2]).isfinite().tolist() == [[[True, True, True, False]]]
    assert torch.equal(keep_top_k(logits, [0]), logits)
    assert keep_top_k(logits.repeat(2, 1, 1), [0, 1]).isfinite().sum((1, 2)).tolist() == [4, 1]


def test_top_p_keeps_ties_together_and_at_least_one() -> None:
    logits = torch.tensor([[[0.4, 0.25, 0.25, 0.1]]]).log()
    kept = [int(keep_top_p(logits, torch.tensor([[p]])).isfinite().sum()) for p in (1e-6, 0.39, 0.41, 0.6, 0.95, 1.0)]
    assert kept == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 8.0])
def test_top_p_of_large_vocabularies(scale: float) -> None:
    """Laws whose mass lies in the first 64, in the first 1024, or beyond."""
    logits = torch.randn(3, 2, 3000, generator=torch.Generator().manual_seed(1)) * scale
    top_p = torch.tensor([0.05, 0.5, 0.97])
    kept = keep_top_p(logits, top_p[:, None])
    for row, node in np.ndindex(3, 2):
        law = logits[row, node].double().softmax(-1)
        above = torch.stack([law[law > p].sum() for p in law])
        clear = (above - top_p[row]).abs() > 1e-5
        assert torch.equal(kept[row, node].isfinite()[clear], (above < top_p[row].double())[clear])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_top_p_of_a_node_is_that_of_the_node_alone() -> None:
    """At the very border, on rows whose `logsumexp` depends on the number of rows (where threads share a row)."""
    logits = torch.randn(100, 1, 33_000, generator=torch.Generator().manual_seed(2)) * 3
    alone = torch.stack([row.logsumexp(-1) for row in logits])
    delicate = [row for row, same in enumerate((alone == logits.logsumexp(-1)).tolist()) if not all(same)][:5]
    steps = 1 + torch.arange(-24, 25) * 2.0**-24
    for row in delicate or [0]:
        mass = (logits[row, 0] - alone[row]).topk(40).values.exp().cumsum(-1)[30]
        together = keep_top_p(logits[row, None].expand(1, len(steps), -1), mass * steps)
        for node, top_p in enumerate(mass * steps):
            assert torch.equal(keep_top_p(logits[row, None], top_p)[0, 0], together[0, node])


# --- decisions ---


@pytest.mark.parametrize(
    ("poison", "words"),
    [
        ([math.nan, 0.0, 1.0], "NaN or infinity"),
        ([math.inf, 0.0, 1.0], "NaN or infinity"),
        ([-math.inf] * 3, "exclude every token"),
    ],
)
@pytest.mark.parametrize("noisy", [False, True])
def test_the_choice_says_why_there_is_none(poison: list[float], words: str, noisy: bool) -> None:
    logits = torch.zeros(3, 2, 3)
    logits[1, 1] = torch.tensor(poison)
    chosen = choose(logits, torch.zeros_like(logits) if noisy else None)
    assert words in why_lawless(int(chosen[1, 1]))
    assert (chosen < 0).sum() == 1


def test_choose_marks_nodes_without_a_law_and_spares_the_others() -> None:
    logits = torch.tensor([[[0.0, 1.0], [math.nan, 1.0], [-math.inf, -math.inf]]])
    assert choose(logits, None).tolist() == [[1, -1, -2]]


def test_warpers_pass_bad_logits_on_to_the_decision() -> None:
    """Nothing turns NaN into a law on the way."""
    request = SamplingParams(temperature=0.5, top_k=2, top_p=0.5, min_p=0.1, repetition_penalty=1.2, bad_words=[[1, 2]])
    scores: Scores = scores_of([request], [[0]], [1], 4)
    for poison in ([math.nan, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, math.nan], [math.inf, 1.0, 0.0, 0.0], [-math.inf] * 4):
        assert choose(scores.process(torch.tensor([[poison]])), None).item() < 0


# --- parameters ---


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("max_new_tokens", [0, -1, 1.5, True, "3", None, math.nan], "an integer of at least 1"),
        ("temperature", [-0.1, math.nan, math.inf, 1e-9, 1e7, "1", True, None, 10**400], "0 .greedy., or a number"),
        ("top_k", [-1, 2.0, True, math.nan], "an integer: 0 .off. or above"),
        ("top_p", [0, -0.5, 1.01, math.nan, math.inf, "1", None], "above 0 and at most 1"),
        ("min_p", [-0.1, 1.1, math.nan, True], "from 0 .off. to 1"),
        ("repetition_penalty", [0, -1, math.nan, math.inf, 1e300], "1 is off"),
        ("presence_penalty", [math.nan, math.inf, -1e300, "0"], "0 is off"),
        ("frequency_penalty", [math.nan, -math.inf, 1e300, None], "0 is off"),
        ("logit_bias", [{1: math.nan}, {1: math.inf}, {-1: 0.0}, {1.5: 0.0}, {"1": 0.0}, [1], {1: "x"}], "a mapping"),
        ("bad_words", [[[]], [1], [["a"]], [[-1]], "word", ["word"], [[1.0]], 5], "non-empty lists of token ids"),
        ("stop", ["", [""], [1], 5], "none of them empty"),
        ("stop_token_ids", [[-1], [1.5], "1", 5, [True]], "a list of token ids"),
        ("ignore_eos", [1, None], "True or False"),
        ("logprobs", [2], "True or False"),
        ("seed", [-1, 2**64, 1.0, "x", True], "an integer from 0 to 2.*, or None"),
    ],
)  # fmt: skip
def test_parameters_outside_their_range_are_refused(name: str, values: list[Any], allowed: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name} is .*; it must be .*{allowed}"):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": np.float32(0.7)},
        {"top_p": 1},
        {"top_k": np.int64(4)},
        {"seed": 2**64 - 1},
        {"seed": None},
        {"logit_bias": {0: -math.inf, 3: 2}},
        {"bad_words": ((1, 2), [3])},
        {"stop": ["a", "b"]},
        {"stop_token_ids": (0,)},
        {"max_new_tokens": 1},
    ],
)
def test_parameters_inside_their_range_are_taken(options: dict[str, Any]) -> None:
    SamplingParams(**options)


def test_a_single_stop_string() -> None:
    assert SamplingParams(stop="end").stop == ("end",)


def test_only_history_dependent_processors_need_history() -> None:
    assert not SamplingParams(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1, logit_bias={1: 1.0}).needs_history
    for options in ONE_AT_A_TIME[8:12] + ONE_AT_A_TIME[13:14]:
        assert SamplingParams(**options).needs_history
