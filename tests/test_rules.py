"""Both rules are lossless: coupled by equality of texts, rejection by equality of laws.

The laws are exact. `outcomes` replays the real `rejection` for every way in which its coins and draws can fall,
`sampled_trees` lists every tree that a drafter may draw, and the products of their probabilities are summed.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from verify_oracles import (
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

from s4c.types import DraftTree, SamplingParams, TargetOutput
from s4c.verify.noise import DRAFT_STREAM
from s4c.verify.rules import RULES, coupled, follow, rejection, rule_named
from s4c.verify.scores import NOT_FINITE, Scores
from s4c.verify.tree import TreePlan, depths, from_paths, root_only

COUNT = 9
EXACT = 1e-9
FALSE_ALARM = 1e-6
PROMPT: Text = (0,)


# --- the walk ---


@given(st.integers(0, 100_000), st.integers(1, 10), st.integers(1, 3))
@settings(max_examples=150, deadline=None, derandomize=True)
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
    assert scores.positions_after(tree).tolist() == [[3, 4, 5], [1, 2, 2]]
    assert scores.positions_after(root_only([0, 0])).tolist() == [[3], [1]]


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


def informed_tree(
    texts: list[list[int]], scores: Scores, *, futures: list[Text], vocab: int, rng: random.Random
) -> DraftTree:
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
        draft = partial(informed_tree, futures=futures, vocab=vocab, rng=rng)
        outputs, nodes = speculate(coupled, models, requests, prompts, COUNT, draft, vocab)
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
            logits = torch.stack([model(tuple(text) + path) for text, path in zip(texts, drafted, strict=True)])[
                :, None
            ]
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
        verdict = rejection(tree, output_of(tree, [PROMPT], [p]), scores_of([HOT], [PROMPT], [1], 3), chance)
        path, bonus = committed(verdict)[:2], int(verdict.bonus)
        never_refused = float(p(PROMPT + path).softmax(-1)[bonus])
        assert chance.probability == pytest.approx(never_refused, rel=1e-5)


def test_rejection_where_the_processors_of_p_and_q_differ() -> None:
    """The rule takes q as it finds it: here q is flat, and p is sharp with a history."""
    request = SamplingParams(
        temperature=0.7, top_k=3, repetition_penalty=1.5, frequency_penalty=0.7, bad_words=[[1, 2]]
    )
    flat = processed_by(SamplingParams(temperature=3.0), tiny_model(7, 4), 4)
    check_lossless(tiny_model(6, 4), request, 2, 4, sampled_trees(TreePlan.parse("comb:2x1"), flat))


@pytest.mark.parametrize("request_", [HOT, COOL], ids=["T=1", "T=0.6,top_p=0.8"])
@pytest.mark.parametrize(
    ("form", "vocab", "length"),
    [
        ("chain:1", 4, 2),
        ("chain:3", 2, 4),
        ("comb:2x2", 3, 3),
        ("comb:3x1", 3, 3),
        ("best:5x3", 3, 4),
        ("best:9x2", 4, 3),
    ],
)
@pytest.mark.parametrize("zeros", [0.0, 0.3])
def test_rejection_of_deterministic_children_is_lossless(
    request_: SamplingParams, form: str, vocab: int, length: int, zeros: float
) -> None:
    plan, q = TreePlan.parse(form), tiny_model(8, vocab, excluded=zeros)
    law_of = processed_by(request_, q, vocab)
    p = tiny_model(9, vocab, excluded=zeros)
    check_lossless(p, request_, length, vocab, top_trees(plan, law_of))


def top_trees(plan: TreePlan, law_of: Model) -> Trees:
    return lambda text: iter([(1.0, deterministic_tree(plan, law_of, text))])


def test_rejection_of_any_tree_is_lossless() -> None:
    """Deterministic children need no law: random shapes, duplicates among siblings and probes included."""
    p = tiny_model(10, 3)

    def trees(text: Text) -> Any:
        rng = random.Random(hash(text))
        yield 1.0, random_tree([list(text)], rng.randrange(1, 9), 3, rng)

    check_lossless(p, HOT, 4, 3, trees)


def check_lossless(p: Model, request: SamplingParams, length: int, vocab: int, trees: Trees) -> None:
    law = rejection_law(p, request, PROMPT, length, vocab, trees)
    assert math.isclose(sum(law.values()), 1.0, abs_tol=EXACT)
    assert distance(law, plain_law(p, request, PROMPT, length, vocab)) < EXACT


# --- what the check of laws must catch ---


def test_deterministic_children_treated_as_sampled_are_caught() -> None:
    plan, p, q = TreePlan.parse("chain:1"), tiny_model(1, 3), tiny_model(2, 3)

    def trees(text: Text) -> Any:
        tree = deterministic_tree(plan, q, text)
        log_q = torch.stack([q(text), q(text)]).log_softmax(-1)[None]
        yield 1.0, DraftTree(tree.tokens, tree.parents, tree.candidate, torch.tensor([True]), log_q)

    assert distance(rejection_law(p, HOT, PROMPT, 1, 3, trees), plain_law(p, HOT, PROMPT, 1, 3)) > 0.01


class ResamplesFromTarget(ScriptedChance):
    """After a miss it draws from p itself, not from the residual."""

    def draw(self, law: Tensor, row: int, position: int) -> int:
        return super().draw(tiny_model(1, 4)(PROMPT).double().softmax(-1), row, position)


class ResamplesUniformly(ScriptedChance):
    """After a miss it draws from the support of the residual."""

    def draw(self, law: Tensor, row: int, position: int) -> int:
        return super().draw((law > 0).double() / (law > 0).sum(), row, position)


@pytest.mark.parametrize("broken", [ResamplesFromTarget, ResamplesUniformly])
@pytest.mark.parametrize("sampled", [True, False])
def test_a_miss_that_resamples_from_another_law_is_caught(broken: type[ScriptedChance], sampled: bool) -> None:
    p, q = tiny_model(1, 4), tiny_model(3, 4)
    trees = sampled_trees(TreePlan.parse("chain:1"), q) if sampled else top_trees(TreePlan.parse("comb:2x1"), q)
    assert distance(rejection_law(p, HOT, PROMPT, 1, 4, trees), plain_law(p, HOT, PROMPT, 1, 4)) < EXACT
    assert distance(rejection_law(p, HOT, PROMPT, 1, 4, trees, broken), plain_law(p, HOT, PROMPT, 1, 4)) > 0.01


def test_a_law_of_the_drafter_that_is_not_the_one_drawn_from_is_caught() -> None:
    p, q = tiny_model(1, 3), tiny_model(2, 3)

    def trees(text: Text) -> Any:
        for probability, tree in sampled_trees(TreePlan.parse("comb:2x1"), q)(text):
            assert tree.log_q is not None
            yield probability, DraftTree(tree.tokens, tree.parents, tree.candidate, tree.sampled, tree.log_q * 0.5)

    assert distance(rejection_law(p, HOT, PROMPT, 1, 3, trees), plain_law(p, HOT, PROMPT, 1, 3)) > 0.01


# --- rejection with its own randomness ---


def drafted(texts: list[list[int]], scores: Scores, plan: TreePlan, q: Model) -> DraftTree:
    """Children drawn as drafters draw them: the top k of log q + noise of a stream of their own, in that order."""
    builder = plan.grow(torch.tensor([text[-1] for text in texts]))
    while builder.open:
        spines = [tuple(row[1 :: plan.width]) for row in builder.tokens.tolist()]
        logits = torch.stack([q(tuple(text) + spine) for text, spine in zip(texts, spines, strict=True)])[:, None]
        law = scores.process(logits).log_softmax(-1)
        noise = scores.noise(torch.tensor([[len(text) + builder.level] for text in texts]), DRAFT_STREAM)
        builder.extend(law if noise is None else law + noise, law=law)
    return builder.finish(sampled=torch.tensor([request.temperature > 0 for request in scores.params]))


def test_top_k_of_noisy_scores_are_draws_without_replacement() -> None:
    law, seeds = [0.5, 0.3, 0.15, 0.05], 6000
    requests = [SamplingParams(temperature=1.0, seed=seed) for seed in range(seeds)]
    scores = scores_of(requests, [[0]] * seeds, [1] * seeds, 4)
    tree = drafted([[0]] * seeds, scores, TreePlan.parse("comb:2x1"), lambda text: torch.tensor(law).log())
    pairs = list(permutations(range(4), 2))
    counts = [int((tree.tokens[:, 1:] == torch.tensor(pair)).all(1).sum()) for pair in pairs]
    assert chi_square(counts, [law[a] * law[b] / (1 - law[a]) for a, b in pairs]) > FALSE_ALARM


@pytest.mark.parametrize("request_", [HOT, COOL], ids=["T=1", "T=0.6,top_p=0.8"])
@pytest.mark.parametrize("children", ["sampled", "deterministic", "none"])
def test_rejection_with_seeded_chance_has_the_law(request_: SamplingParams, children: str) -> None:
    """Seeds, streams, coins and draws together: the first two tokens of 1500 seeds, over one to two rounds."""
    p, q, seeds = tiny_model(21, 4, 1.0), tiny_model(22, 4, 1.0), 1500

    def draft(texts: list[list[int]], scores: Scores) -> DraftTree:
        if children == "none":
            return root_only([text[-1] for text in texts])
        if children == "sampled":
            return drafted(texts, scores, TreePlan.parse("comb:2x2"), q)
        top = q(PROMPT).argsort(descending=True).tolist()
        return from_paths([text[-1] for text in texts], [[[token] for token in top]] * seeds, 4)

    requests = [replace(request_, seed=seed) for seed in range(seeds)]
    outputs, _ = speculate(rejection, [p] * seeds, requests, [PROMPT] * seeds, 2, draft, 4)
    law = plain_law(p, requests[0], PROMPT, 2, 4)
    assert chi_square([outputs.count(list(text)) for text in law], list(law.values())) > FALSE_ALARM


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_batched_equals_single(rule: Any) -> None:
    """Sequences of one batch, with parameters and seeds of their own, each as if alone."""
    rng = random.Random(4)
    models = [tiny_model(seed, 6) for seed in range(10)]
    requests = [r if solvable(r, 6) else SamplingParams() for r in (random_request(rng, 6) for _ in models)]
    prompts = [tuple(rng.randrange(6) for _ in range(rng.randrange(1, 5))) for _ in models]
    plan, q = TreePlan.parse("comb:3x2"), tiny_model(50, 6)

    def run(rows: list[int]) -> list[list[int]]:
        return speculate(
            rule,
            [models[row] for row in rows],
            [requests[row] for row in rows],
            [prompts[row] for row in rows],
            8,
            lambda texts, scores: drafted(texts, scores, plan, q),
            6,
        )[0]

    assert {request.temperature > 0 for request in requests} == {True, False}
    assert run(list(range(10))) == [run([row])[0] for row in range(10)]


def test_rejection_at_temperature_zero_is_greedy() -> None:
    rng = random.Random(5)
    models = [tiny_model(seed, 6) for seed in range(20)]
    requests = [random_request(rng, 6, temperature=0.0) for _ in models]
    requests = [r if solvable(r, 6) else SamplingParams() for r in requests]
    plain = [slow_plain(model, request, PROMPT, COUNT) for model, request in zip(models, requests, strict=True)]
    futures = [PROMPT + tuple(output) for output in plain]
    draft = partial(informed_tree, futures=futures, vocab=6, rng=rng)
    outputs, accepted = speculate(rejection, models, requests, [PROMPT] * 20, COUNT, draft, 6)
    assert outputs == plain
    assert accepted > 20


def test_rejection_at_the_lowest_temperatures() -> None:
    """The second child is then too improbable for a float beside the first, and its law must not vanish."""
    p, q, plan = tiny_model(31, 6), tiny_model(32, 6), TreePlan.parse("comb:4x2")
    requests = [SamplingParams(temperature=t, seed=seed) for t in (1e-6, 1e-3, 1e-2) for seed in range(4)]
    outputs, _ = speculate(
        rejection, [p] * 12, requests, [PROMPT] * 12, 6, lambda texts, scores: drafted(texts, scores, plan, q), 6
    )
    assert outputs == [slow_plain(p, SamplingParams(), PROMPT, 6)] * 12


# --- faults ---


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_matter_only_where_a_token_is_taken(rule: Any, temperature: float) -> None:
    tree = DraftTree(
        torch.tensor([[0, 1, 2], [0, 1, 2]]),
        torch.tensor([[-1, 0, 0], [-1, 0, 0]]),
        torch.tensor([[False, True, True]] * 2),
        torch.zeros(2, dtype=torch.bool),
    )
    logits = torch.full((2, 3, 4), -math.inf)
    logits[:, 0, 1] = 0.0
    logits[:, 1, 3] = 0.0
    logits[:, 2] = math.nan
    requests = [SamplingParams(temperature=temperature, top_p=0.9)] * 2

    def judge() -> list[Text]:
        scores = scores_of(requests, [[0], [0]], [1, 1], 4)
        verdict = rule(tree, TargetOutput(logits, torch.zeros(2, 3, 1)), scores)
        return [committed(verdict, row) for row in range(2)]

    assert judge() == [(1, 3), (1, 3)], "the NaN below the second child is never read"
    logits[1, 1, 0] = math.nan
    assert judge() == [(1, 3), (1, NOT_FINITE)], "what was accepted before stands"


def test_rules_by_name() -> None:
    assert rule_named("coupled") is coupled
    assert rule_named("rejection") is rejection
    with pytest.raises(ValueError, match="'greedy' is not known; it must be one of coupled, rejection"):
        rule_named("greedy")
