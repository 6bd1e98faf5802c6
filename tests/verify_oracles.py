"""Slow and readable twins of `s4c.verify`, and the enumeration of all that chance may do to a rule."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from s4c.models.sampling import noise_kernel
from s4c.types import DraftTree, SamplingParams, TargetOutput, Verdict
from s4c.verify.noise import TARGET_STREAM, NoiseTable, gumbel
from s4c.verify.rules import Chance, Rule, follow, rejection
from s4c.verify.scores import ALL_EXCLUDED, NOT_FINITE, Scores, choose, seed_of
from s4c.verify.tree import TreePlan, listed_depths, root_only

CPU = torch.device("cpu")
kernel = noise_kernel(CPU) or gumbel
"""Makes noise."""

Text = tuple[int, ...]
Model = Callable[[Text], Tensor]
"""From a text to the logits [V] of its next token."""


def tiny_model(seed: int, vocab: int, scale: float = 1.5, excluded: float = 0.0) -> Model:
    """A model whose logits are a function of the whole text; a share of them, never all, is -inf."""
    noise = torch.Generator().manual_seed(seed)
    table = torch.randn(61, vocab, generator=noise) * scale
    holes = torch.rand(table.shape, generator=noise) < excluded
    holes[torch.arange(61), torch.randint(vocab, (61,), generator=noise)] = False
    table = table.masked_fill(holes, -math.inf)

    def logits(text: Text) -> Tensor:
        state = 7
        for token in text:
            state = (state * 1_000_003 + token + 1) % 2_147_483_647
        return table[state % 61]

    return logits


# --- trees ---


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """Columns from the root's child down to the node."""
    path: list[int] = []
    while node != 0:
        path.insert(0, node)
        node = parents[node]
    return path


def random_parents(size: int, rng: random.Random) -> list[int]:
    reach = rng.choice([1, 2, 4, size])
    return [-1] + [rng.randrange(max(0, node - reach), node) for node in range(1, size)]


def output_of(tree: DraftTree, texts: Sequence[Text], models: Sequence[Model]) -> TargetOutput:
    """What a target would give: each node's logits follow from the text and the node's own path."""
    rows = []
    for tokens, parents, text, model in zip(tree.tokens.tolist(), tree.parents.tolist(), texts, models, strict=True):
        paths = [tuple(tokens[step] for step in path_to(parents, node)) for node in range(len(tokens))]
        rows.append(torch.stack([model(tuple(text) + path) for path in paths]))
    return TargetOutput(torch.stack(rows), torch.zeros(len(rows), tree.size, 1))


def naive_walk(tree: DraftTree, choice: list[int], row: int) -> tuple[list[int], list[int]]:
    """The walked columns and the committed tokens."""
    path, committed = [0], [choice[0]]
    while True:
        for child in range(1, tree.size):
            is_child = int(tree.parents[row, child]) == path[-1] and bool(tree.candidate[row, child])
            if is_child and int(tree.tokens[row, child]) == committed[-1]:
                path.append(child)
                committed.append(choice[child])
                break
        else:
            return path, committed


# --- scores ---


def slow_process(request: SamplingParams, history: Sequence[int], prompt: int, logits: Sequence[float]) -> list[float]:
    """The processors for one next token, in double precision and in the words of `SamplingParams`."""
    text, output = list(history), list(history)[prompt:]
    scores = []
    for token, score in enumerate(logits):
        if token in text:
            score = score / request.repetition_penalty if score > 0 else score * request.repetition_penalty
        if token in output:
            score -= request.presence_penalty
        score -= request.frequency_penalty * output.count(token)
        score += request.logit_bias.get(token, 0.0)
        for word in request.bad_words:
            if word[-1] == token and text[len(text) - len(word) + 1 :] == list(word[:-1]):
                score = -math.inf
        scores.append(score)
    if request.temperature == 0:
        return scores
    scores = [score / request.temperature for score in scores]
    if request.top_k:
        kept = sorted(scores, reverse=True)[: request.top_k]
        scores = [score if score >= kept[-1] else -math.inf for score in scores]
    if request.top_p < 1:
        law = softmax(scores)
        above = [sum(q for q in law if q > p) for p in law]
        scores = [s if mass < request.top_p else -math.inf for s, mass in zip(scores, above, strict=True)]
    law = softmax(scores)
    return [s if p >= request.min_p * max(law) else -math.inf for s, p in zip(scores, law, strict=True)]


def softmax(scores: Sequence[float]) -> list[float]:
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def random_request(rng: random.Random, vocab: int, temperature: float | None = None) -> SamplingParams:
    """A request with each processor on or off by chance."""

    def maybe(value: float, off: float) -> float:
        return value if rng.random() < 0.4 else off

    words = [[rng.randrange(vocab) for _ in range(rng.choice([1, 2, 2, 3]))] for _ in range(3)]
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 0.8, 1.0, 2.5]) if temperature is None else temperature,
        top_k=int(maybe(rng.randrange(1, vocab + 3), 0)),
        top_p=maybe(rng.uniform(0.2, 0.99), 1.0),
        min_p=maybe(rng.uniform(0.01, 0.4), 0.0),
        repetition_penalty=maybe(rng.uniform(0.7, 1.8), 1.0),
        presence_penalty=maybe(rng.uniform(-1, 1), 0.0),
        frequency_penalty=maybe(rng.uniform(-1, 1), 0.0),
        logit_bias={rng.randrange(vocab): rng.choice([-math.inf, 1.5, -2.0])} if rng.random() < 0.4 else {},
        bad_words=words if rng.random() < 0.4 else (),
        seed=rng.choice([rng.randrange(2**64), rng.randrange(100)]),
    )


@dataclass
class Case:
    """What a kernel of the coupled rule is given, and what it has to say."""

    tree: DraftTree
    logits: Tensor
    temperatures: list[float]
    noise: list[Tensor | None]
    verdict: Verdict


def case_of_odd_rows(columns: int) -> Case:
    """Roots alone, with logits that are equal, excluded, or no numbers."""
    generator = torch.Generator().manual_seed(columns)
    logits = 4 * torch.randn(9, 1, columns, generator=generator)
    logits[1] = -torch.inf
    logits[2, 0, columns // 2] = torch.nan
    logits[3, 0, -1] = torch.inf
    logits[4] = 1.5  # of equals the first
    logits[5, 0, : columns // 2] = -torch.inf
    temperatures = [0.0, 0.7, 0.0, 1.3, 0.0, 1e-6, 0.0, 1.0, 3.0]
    noise = [None if t == 0 else torch.randn(columns, generator=generator) for t in temperatures]
    cooled = torch.stack(
        [row if g is None else row / t + g for row, t, g in zip(logits, temperatures, noise, strict=True)]
    )
    verdict = follow(tree := root_only([0] * 9), choose(cooled, None))
    assert verdict.tokens[1:4, 0].tolist() == [ALL_EXCLUDED, NOT_FINITE, NOT_FINITE]
    return Case(tree, logits, temperatures, noise, verdict)


def case_of_trees(seed: int, batch: int, nodes: int = 12, columns: int = 40) -> Case:
    """Trees of which much is right, some nodes twice and some no candidates; all greedy with seed 0."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(batch, nodes, columns, generator=generator)
    logits[0, nodes // 2 + seed % 3] = torch.nan
    parents = torch.tensor([[-1, *(rng.randrange(max(0, i - 4), i) for i in range(1, nodes))] for _ in range(batch)])
    temperatures = [0.0 if seed == 0 else rng.choice([0.0, 0.7, 1.5]) for _ in range(batch)]
    noise = torch.randn(batch, nodes, columns, generator=generator)
    depths = [listed_depths(line) for line in parents.tolist()]
    scores = torch.stack(
        [logits[b] if t == 0 else logits[b] / t + noise[b, depths[b]] for b, t in enumerate(temperatures)]
    )
    choice = choose(scores, None)
    right = torch.rand(batch, nodes, generator=generator) < 0.8
    tokens = torch.where(right, choice.gather(1, parents.clamp(min=0)), 1)
    candidate = torch.rand(batch, nodes, generator=generator) < 0.9
    candidate[:, 0] = False
    tree = DraftTree(tokens, parents, candidate, torch.zeros(batch, dtype=torch.bool))
    rows = [None if t == 0 else row for t, each in zip(temperatures, noise, strict=True) for row in each]
    return Case(tree, logits, temperatures, rows if any(temperatures) else [], follow(tree, choice))


def scores_of(
    requests: Sequence[SamplingParams], texts: Sequence[Sequence[int]], prompts: Sequence[int], vocab: int
) -> Scores:
    return Scores(requests, texts, prompts, NoiseTable(vocab, CPU, kernel))


# --- decoding ---


def slow_plain(model: Model, request: SamplingParams, prompt: Text, count: int) -> list[int]:
    """Plain decoding from the definition: one token after the other, argmax(log p + g)."""
    text = list(prompt)
    while len(text) < len(prompt) + count:
        scores = slow_process(request, text, len(prompt), model(tuple(text)).tolist())
        if request.temperature > 0:
            assert request.seed is not None
            noise = kernel(request.seed, TARGET_STREAM, len(text), len(scores), CPU).tolist()
            scores = [score + g for score, g in zip(scores, noise, strict=True)]
        text.append(max(range(len(scores)), key=lambda token: scores[token]))
    return text[len(prompt) :]


def speculate(
    rule: Rule,
    models: Sequence[Model],
    requests: Sequence[SamplingParams],
    prompts: Sequence[Text],
    count: int,
    draft: Callable[[list[list[int]], Scores], DraftTree],
    vocab: int,
) -> tuple[list[list[int]], int]:
    """Decode a batch round by round; the outputs and the number of accepted nodes."""
    texts, noise, accepted = [list(prompt) for prompt in prompts], NoiseTable(vocab, CPU, kernel), 0
    while any(len(text) < len(prompt) + count for text, prompt in zip(texts, prompts, strict=True)):
        noise.keep([(seed_of(request), len(text)) for request, text in zip(requests, texts, strict=True)])
        scores = Scores(requests, texts, [len(prompt) for prompt in prompts], noise)
        tree = draft(texts, scores)
        verdict = rule(tree, output_of(tree, [tuple(text) for text in texts], models), scores)
        for row, text in enumerate(texts):
            text.extend(committed(verdict, row))
        accepted += int(verdict.accepted.sum())
    return [text[len(prompt) : len(prompt) + count] for text, prompt in zip(texts, prompts, strict=True)], accepted


def committed(verdict: Verdict, row: int = 0) -> Text:
    return tuple(verdict.tokens[row, : int(verdict.accepted[row]) + 1].tolist())


# --- exact laws of the rejection rule ---


class ScriptedChance:
    """Replays decisions, then takes the first possible one; remembers what else could have happened."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script = script
        self.probability = 1.0
        self.taken: list[int] = []
        self.options: list[int] = []

    def _decide(self, options: list[tuple[int, float]]) -> int:
        step = len(self.taken)
        taken = self.script[step] if step < len(self.script) else 0
        value, probability = options[taken]
        self.taken.append(taken)
        self.options.append(len(options))
        self.probability *= probability
        return value

    def accept(self, probability: float, row: int, position: int, sibling: int) -> bool:
        return bool(self._decide([(v, p) for v, p in ((1, probability), (0, 1 - probability)) if p > 0]))

    def draw(self, law: Tensor, row: int, position: int) -> int:
        return self._decide([(token, p) for token, p in enumerate(law.tolist()) if p > 0])


def outcomes(run: Callable[[Chance], Text], chance: type[ScriptedChance]) -> Iterator[tuple[float, Text]]:
    """Every outcome of a random computation with its probability, depth first."""
    scripts: list[list[int]] = [[]]
    while scripts:
        script = scripts.pop()
        source = chance(script)
        text = run(source)
        yield source.probability, text
        for step in range(len(script), len(source.taken)):
            scripts += [[*source.taken[:step], other] for other in range(1, source.options[step])]


Trees = Callable[[Text], Iterator[tuple[float, DraftTree]]]
"""From a text to every tree that a drafter may make below it, with its probability."""


def sampled_trees(plan: TreePlan, law_of: Model) -> Trees:
    """Combs whose children are drawn without replacement from the drafter's law, in every order."""

    def build(text: Text, drawn: Sequence[Text]) -> DraftTree:
        builder = plan.grow(torch.tensor(text[-1:]))
        for level, children in enumerate(drawn):
            law = law_of(text + tuple(earlier[0] for earlier in drawn[:level]))
            scores = torch.full_like(law, -math.inf)
            scores[list(children)] = -torch.arange(len(children), dtype=torch.float32)
            builder.extend(scores[None, None], law=law.log_softmax(-1)[None, None])
        return builder.finish(sampled=torch.tensor([True]))

    def draws(text: Text, drawn: list[Text]) -> Iterator[tuple[float, DraftTree]]:
        if len(drawn) == plan.depth:
            yield 1.0, build(text, drawn)
            return
        # The law as the tree carries it, rounded to float32.
        reported = law_of(text + tuple(earlier[0] for earlier in drawn)).log_softmax(-1)
        q = reported.double().softmax(-1).tolist()
        support = [token for token, p in enumerate(q) if p > 0]
        for children in permutations(support, min(plan.width, len(support))):
            probability, left = 1.0, 1.0
            for token in children:
                probability *= q[token] / left
                left -= q[token]
            for rest, tree in draws(text, [*drawn, children]):
                yield probability * rest, tree

    return lambda text: draws(text, [])


def deterministic_tree(plan: TreePlan, law_of: Model, text: Text) -> DraftTree:
    """The most probable children."""
    builder = plan.grow(torch.tensor(text[-1:]))
    while builder.open:
        tokens, parents = builder.tokens[0].tolist(), builder.parents[0].tolist()
        paths = [tuple(tokens[step] for step in path_to(parents, node)) for node in builder.frontier[0].tolist()]
        builder.extend(torch.stack([law_of(text + path) for path in paths])[None])
    return builder.finish()


def processed_by(request: SamplingParams, model: Model, vocab: int) -> Model:
    """The model's logits after the processors of a request."""
    return lambda text: scores_of([request], [text], [1], vocab).process(model(text)[None, None])[0, 0]


def plain_law(model: Model, request: SamplingParams, prompt: Text, length: int, vocab: int) -> dict[Text, float]:
    """The law of the next `length` tokens under plain decoding."""
    law: dict[Text, float] = {(): 1.0}
    for _ in range(length):
        longer: dict[Text, float] = {}
        for text, probability in law.items():
            following = processed_by(request, model, vocab)(prompt + text).double().softmax(-1).tolist()
            longer.update({(*text, token): probability * p for token, p in enumerate(following)})
        law = longer
    return law


def rejection_law(
    model: Model,
    request: SamplingParams,
    prompt: Text,
    length: int,
    vocab: int,
    trees: Trees,
    chance: type[ScriptedChance] = ScriptedChance,
) -> dict[Text, float]:
    """The law of the next `length` tokens under rounds of `rejection`, by exact enumeration.

    Rounds follow each other until there are enough tokens; what lies beyond is marginalised.
    """
    if length <= 0:
        return {(): 1.0}
    firsts: dict[Text, float] = defaultdict(float)
    for drawn, tree in trees(prompt):
        output = output_of(tree, [prompt], [model])

        def run(source: Chance, tree: DraftTree = tree, output: TargetOutput = output) -> Text:
            return committed(rejection(tree, output, scores_of([request], [prompt], [1], vocab), source))[:length]

        for probability, text in outcomes(run, chance):
            firsts[text] += drawn * probability
    law: dict[Text, float] = defaultdict(float)
    for text, probability in firsts.items():
        rest = rejection_law(model, request, prompt + text, length - len(text), vocab, trees, chance)
        for more, p in rest.items():
            law[text + more] += probability * p
    return law


def distance(one: dict[Text, float], other: dict[Text, float]) -> float:
    """The largest difference of two laws at a text."""
    return max(abs(one.get(text, 0.0) - other.get(text, 0.0)) for text in {*one, *other})


# --- statistics ---


def chi_square(counts: Sequence[int], law: Sequence[float]) -> float:
    """The p-value of Pearson's test; cells of probability zero must be empty."""
    total = sum(counts)
    assert all(count == 0 for count, p in zip(counts, law, strict=True) if p == 0)
    cells = [(count, total * p) for count, p in zip(counts, law, strict=True) if p > 0]
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
