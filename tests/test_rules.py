"""Both rules are lossless: coupled by equality of texts, rejection by equality of laws.

The laws are exact. `outcomes` replays the real `rejection` for every way in which its coins and draws can fall,
`sampled_trees` lists every tree that a drafter may draw, and the products of their probabilities are summed.
"""

from __future__ import annotations

import math
import random
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from verify_oracles import (
    CPU,
    Model,
    ScriptedChance,
    Text,
    Trees,
    chi_square,
    committed,
    deterministic_tree,
    distance,
    naive_walk,
    output_of,
    plain_law,
    processed_by,
    random_parents,
    random_request,
    rejection_law,
    sampled_trees,
    scores_of,
    slow_plain,
    speculate,
    tiny_model,
)

from s4c.errors import BadLogits
from s4c.types import DraftTree, SamplingParams, TargetOutput
from s4c.verify.rules import RULES, coupled, follow, rejection, rule_named, token_positions
from s4c.verify.scores import DRAFT_STREAM, NoiseTable, Scores
from s4c.verify.tree import TreePlan, depths, root_only

COUNT = 9
EXACT = 1e-9
FALSE_ALARM = 1e-6
PROMPT: Text = (0,)


# --- the walk ---


@given(st.integers(0, 100_000), st.integers(1, 10), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_follow_equals_a_naive_walk(seed: int, size: int, batch: int) -> None:
    rng = random.Random(seed)
    tree = random_tree([[rng.randrange(3)] for _ in range(batch)], size, 3, rng)
    choice = torch.tensor([[rng.randrange(3) for _ in range(size)] for _ in range(batch)])
    verdict = follow(tree, choice)
    assert verdict.path.shape == verdict.tokens.shape == (batch, int(verdict.accepted.max()) + 1)
    for row in range(batch):
        path, tokens = naive_walk(tree, choice[row].tolist(), row)
        padding = verdict.path.shape[1] - len(path)
        assert verdict.path[row].tolist() == path + path[-1:] * padding
        assert verdict.tokens[row].tolist() == tokens + tokens[-1:] * padding
        assert int(verdict.accepted[row]) == len(path) - 1
        assert int(verdict.bonus[row]) == tokens[-1]


def test_positions_follow_the_committed_text() -> None:
    tree = DraftTree(
        torch.zeros(2, 3, dtype=torch.int64),
        torch.tensor([[-1, 0, 1], [-1, 0, 0]]),
        torch.ones(2, 3, dtype=torch.bool),
        torch.zeros(2, dtype=torch.bool),
    )
    scores = scores_of([SamplingParams()] * 2, [[1, 2, 3], [1]], [1, 1], 4)
    assert token_positions(tree, scores).tolist() == [[3, 4, 5], [1, 2, 2]]
    assert token_positions(root_only(torch.tensor([0, 0])), scores).tolist() == [[3], [1]]


def random_tree(texts: list[list[int]], size: int, vocab: int, rng: random.Random) -> DraftTree:
    """Any shape, any tokens, siblings with equal tokens, probes."""
    batch = len(texts)
    tokens = [[text[-1]] + [rng.randrange(vocab) for _ in range(size - 1)] for text in texts]
    return DraftTree(
        tokens=torch.tensor(tokens),
        parents=torch.tensor([random_parents(size, rng) for _ in range(batch)]),
        candidate=torch.tensor([[False] + [rng.random() < 0.9 for _ in range(size - 1)] for _ in range(batch)]),
        sampled=torch.zeros(batch, dtype=torch.bool),
    )


def informed_tree(texts: list[list[int]], futures: list[Text], vocab: int, rng: random.Random) -> DraftTree:
    """A random tree some of whose nodes bear the token of their depth in a text to come."""
    tree = random_tree(texts, rng.randrange(1, 10), vocab, rng)
    depth = depths(tree.parents)
    for row, (text, future) in enumerate(zip(texts, futures, strict=True)):
        for node in range(1, tree.size):
            place = len(text) - 1 + int(depth[row, node])
            if place < len(future) and rng.random() < 0.6:
                tree.tokens[row, node] = future[place]
    return tree


# --- coupled: speculative = plain, token for token ---


@pytest.mark.parametrize("block", range(8))
def test_coupled_output_equals_plain_output(block: int) -> None:
    """8 x 25 batches of 12 sequences: 2400 (seed, model, processors) cases, about five random trees each."""
    accepted = 0
    for case in range(25):
        rng = random.Random(1000 * block + case)
        vocab = rng.choice([4, 7, 12])
        models = [tiny_model(rng.randrange(10**6), vocab, rng.choice([0.5, 2.0])) for _ in range(12)]
        temperature = rng.choice([None, None, 0.0])
        requests = [random_request(rng, vocab, temperature) for _ in range(12)]
        requests = [r if solvable(r, vocab) else SamplingParams(temperature=1.0, seed=r.seed) for r in requests]
        prompts = [tuple(rng.randrange(vocab) for _ in range(rng.randrange(1, 6))) for _ in range(12)]
        plain = [slow_plain(*each, COUNT) for each in zip(models, requests, prompts, strict=True)]
        futures = [prompt + tuple(output) for prompt, output in zip(prompts, plain, strict=True)]
        outputs, nodes = speculate(
            coupled,
            models,
            requests,
            prompts,
            COUNT,
            lambda texts, _, futures=futures, vocab=vocab, rng=rng: informed_tree(texts, futures, vocab, rng),
            vocab,
        )
        assert outputs == plain
        accepted += nodes
    assert accepted > 25 * 12 * COUNT / 4, "the trees were hardly ever right, so little was tested"


def solvable(request: SamplingParams, vocab: int) -> bool:
    """Whether some token is never forbidden."""
    forbidden = {word[-1] for word in request.bad_words} | {t for t, b in request.logit_bias.items() if b == -math.inf}
    return len(forbidden) < vocab


def test_coupled_drafts_with_the_same_noise_are_accepted_whole() -> None:
    """A drafter that is the target itself, with the target's noise, is never wrong, at any temperature."""
    model, plan = tiny_model(5, 8), TreePlan.parse("chain:4")
    requests = [SamplingParams(temperature=t, top_p=0.9, seed=seed) for t in (0.0, 0.7, 2.0) for seed in range(5)]

    def draft(texts: list[list[int]], scores: Scores) -> DraftTree:
        builder = plan.grow(torch.tensor([text[-1] for text in texts]))
        while builder.open:
            drafted = [tuple(row[1:]) for row in builder.tokens.tolist()]
            logits = torch.stack([model(tuple(text) + path) for text, path in zip(texts, drafted, strict=True)])[:, None]
            processed = scores.process(logits)
            noise = scores.noise(torch.tensor([[len(text) + builder.level] for text in texts]))
            builder.extend(processed if noise is None else processed + noise)
        return builder.finish()

    outputs, accepted = speculate(coupled, [model] * 15, requests, [PROMPT] * 15, 10, draft, 8)
    assert outputs == [slow_plain(model, request, PROMPT, 10) for request in requests]
    assert accepted == 15 * 8, "two rounds of four accepted nodes and a bonus"


# --- rejection: the law of speculative decoding = the law of plain decoding ---

HOT = SamplingParams(temperature=1.0)
COOL = SamplingParams(temperature=0.6, top_p=0.8)


@pytest.mark.parametrize("request_", [HOT, COOL], ids=["T=1", "T=0.6,top_p=0.8"])
@pytest.mark.parametrize(
    ("form", "vocab", "p_zeros", "q_zeros"),
    [
        ("chain:1", 3, 0.0, 0.0),
        ("chain:1", 4, 0.4, 0.0),
        ("chain:1", 4, 0.0, 0.4),
        ("chain:2", 3, 0.3, 0.3),
        ("chain:3", 2, 0.0, 0.0),
        ("comb:2x1", 3, 0.0, 0.0),
        ("comb:2x1", 4, 0.4, 0.4),
        ("comb:2x2", 3, 0.3, 0.3),
        ("comb:3x1", 4, 0.0, 0.0),
        ("comb:3x1", 4, 0.0, 0.5),
        ("comb:3x2", 3, 0.2, 0.0),
    ],
)
def test_rejection_of_sampled_children_is_lossless(
    request_: SamplingParams, form: str, vocab: int, p_zeros: float, q_zeros: float
) -> None:
    """The joint law of as many tokens as a round may commit; p and q have the same processors."""
    plan = TreePlan.parse(form)
    p, q = tiny_model(1, vocab, excluded=p_zeros), tiny_model(2, vocab, excluded=q_zeros)
    trees = sampled_trees(plan, processed_by(request_, q, vocab))
    check_lossless(p, request_, plan.depth + 1, vocab, trees)


def test_rejection_is_lossless_over_several_rounds() -> None:
    p, q = tiny_model(3, 3), tiny_model(4, 3)
    check_lossless(p, HOT, 4, 3, sampled_trees(TreePlan.parse("comb:2x1"), q))


def test_rejection_where_the_drafter_is_the_target() -> None:
    p = tiny_model(5, 3)
    trees = sampled_trees(TreePlan.parse("comb:2x2"), p)
    check_lossless(p, HOT, 3, 3, trees)
    for _, tree in trees(PROMPT):
        chance = ScriptedChance([])
        rejection(tree, output_of(tree, [PROMPT], [p]), scores_of([HOT], [PROMPT], [1], 3), chance)
        assert chance.options[:2] == [1, 1], "its first child is never refused"


def test_rejection_where_the_processors_of_p_and_q_differ() -> None:
    """The rule takes q as it finds it: here q is flat, and p is sharp with a history."""
    request = SamplingParams(temperature=0.7, top_k=3, repetition_penalty=1.5, frequency_penalty=0.7, bad_words=[[1, 2]])
    flat = processed_by(SamplingParams(temperature=3.0), tiny_model(7, 4), 4)
    check_lossless(tiny_model(6, 4), request, 2, 4, sampled_trees(TreePlan.parse("comb:2x1"), flat), markov=False)


@pytest.mark.parametrize("request_", [HOT, COOL], ids=["T=1", "T=0.6,top_p=0.8"])
@pytest.mark.parametrize(
    ("form", "vocab", "length"),
    [("chain:1", 4, 2), ("chain:3", 2, 4), ("comb:2x2", 3, 3), ("comb:3x1", 3, 3), ("best:5x3", 3, 4), ("best:9x2", 4, 3)],
)  # fmt: skip
@pytest.mark.parametrize("zeros", [0.0, 0.3])
def test_rejection_of_deterministic_children_is_lossless(
    request_: SamplingParams, form: str, vocab: int, length: int, zeros: float
) -> None:
    plan, q = TreePlan.parse(form), tiny_model(8, vocab, excluded=zeros)
    law_of = processed_by(request_, q, vocab)
    p = tiny_model(9, vocab, excluded=zeros)
    check_lossless(p, request_, length, vocab, lambda text: iter([(1.0, deterministic_tree(plan, law_of, text))]))


def test_rejection_of_any_tree_is_lossless() -> None:
    """Deterministic children need no law: random shapes, duplicates among siblings and probes included."""
    p = tiny_model(10, 3)

    def trees(text: Text) -> Any:
        rng = random.Random(hash(text))
        yield 1.0, random_tree([list(text)], rng.randrange(1, 9), 3, rng)

    check_lossless(p, HOT, 4, 3, trees)


def check_lossless(
    p: Model, request: SamplingParams, length: int, vocab: int, trees: Trees, markov: bool = True
) -> None:
    law = rejection_law(p, request, PROMPT, length, vocab, trees)
    assert math.isclose(sum(law.values()), 1.0, abs_tol=EXACT)
    assert distance(law, plain_law(p, request, PROMPT, length, vocab)) < EXACT
