"""The planner: its optimum is brute force's, it stops where drafting does not pay and returns, and changes no token."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import combinations
from typing import Any
from unittest.mock import patch

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_costs import LEVELS, seconds_of
from test_engine import PROMPTS, SETTINGS, Prophet, s4c_drafter

from s4c import LLM, SamplingParams
from s4c.drafters.combined import CombinedDrafter
from s4c.drafters.ngram import NgramDrafter
from s4c.engine.acceptance import Row
from s4c.engine.costs import CONTEXT, Costs, Prices
from s4c.engine.planner import CLEARLY, DEEPEST, MARGIN, POOL, REPRICED, CostPlanner
from s4c.types import DraftTree, Verdict
from s4c.verify.tree import from_paths, merge

FLAT = {1: 0.016, 8: 0.019, 16: 0.023, 32: 0.045}
"""Seconds of passes that cost little more for more tokens."""


# The size of a tree


@st.composite
def drafted(draw: st.DrawFn) -> tuple[list[list[list[int]]], list[list[float]]]:
    paths = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=3)
    rows = draw(st.lists(paths, min_size=1, max_size=2))
    return rows, [[draw(st.floats(0.05, 0.95)) for _ in row] for row in rows]


def subtrees(parents: list[int], size: int) -> Iterator[tuple[int, ...]]:
    for nodes in combinations(range(1, len(parents)), size - 1):
        if all(parents[v] == 0 or parents[v] in nodes for v in nodes):
            yield nodes


@given(drafted(), st.lists(st.floats(0.01, 1.0), min_size=9, max_size=9), st.floats(0.0, 2.0))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_tree_is_the_best_of_all_subtrees(
    rows: tuple[list[list[list[int]]], list[list[float]]], steps: list[float], draft: float
) -> None:
    tree = from_paths(range(len(rows[0])), rows[0], 10, rows[1])
    passes = {n: 1.0 + sum(steps[: n - 1]) for n in range(1, 10)}
    planner = CostPlanner(Costs(passes, dict.fromkeys(LEVELS, draft)))
    planner.plan([CONTEXT] * len(rows[0]))
    chances = [row.chances for row in planner.acceptance.read(tree)]
    best = 0.0
    for size in range(1, tree.size + 1):
        choices = [
            max((sum(chances[b][v] for v in nodes) for nodes in subtrees(tree.parents[b].tolist(), size)), default=0.0)
            for b in range(len(rows[0]))
        ]
        best = max(best, (len(choices) + sum(choices)) / planner.costs.round(len(choices), size, 1))
    kept = planner.prune(tree)
    expected = sum(sum(row.chances) for row in planner.acceptance.read(kept))
    rate = expected / planner.costs.round(len(rows[0]), kept.size, 1)
    assert best / (1 + MARGIN) <= rate * (1 + 1e-9)
    assert rate <= best * (1 + 1e-9)


def test_a_node_enters_only_while_it_brings_more_than_it_costs() -> None:
    tree = from_paths([7], [[[1], [2], [3], [4]]], 9, [[0.5, 0.25, 0.12, 0.06]])
    for step, size in ((0.0, 5), (0.05, 4), (0.1, 3), (0.21, 2), (0.6, 1)):
        planner = CostPlanner(Costs({n: 1 + step * (n - 1) for n in range(1, 9)}, dict.fromkeys(LEVELS, 0.0)))
        planner.plan([CONTEXT])
        assert planner.prune(tree).size == size


def test_a_tree_of_unknown_belief_is_taken_as_it_is() -> None:
    guessed = from_paths([7], [[[1, 2]]], 9)
    tree = DraftTree(guessed.tokens, guessed.parents, guessed.candidate, guessed.sampled)
    planner = CostPlanner(Costs({1: 1.0, 32: 100.0}, LEVELS))
    planner.plan([CONTEXT])
    assert planner.prune(tree) is tree
    planner.record(verdict_of([1, 2], [1, 5]), seconds_of(planner.costs, 3, 0))


def test_more_nodes_than_are_planned_do_no_harm() -> None:
    """A drafter beside another one may guess more, and one that does not say what it believes is not pruned."""
    many = from_paths([7], [[[n, *range(9)] for n in range(9)]], 99, [[0.9] * 9])
    planner = CostPlanner(Costs({1: 1.0, 32: 1.0}, LEVELS))
    planner.plan([CONTEXT])
    assert planner.beside(many).nodes >= 2
    assert planner.prune(many).size <= POOL
    planner.plan([CONTEXT])
    mute = DraftTree(many.tokens, many.parents, many.candidate, many.sampled)
    assert planner.prune(mute) is mute
    planner.record(verdict_of([], [1, 5]), seconds_of(planner.costs, many.size, 0))


def test_a_draft_deeper_than_was_measured_costs_what_it_took() -> None:
    costs = Costs({1: 1.0, 32: 2.0}, {0: 0.0, 1: 0.1})
    assert costs.round(1, 1, 3) == 1.0
    taken = {"draft": 0.5, "verify": 1.0, "judge": 0.0, "commit": 0.0, "schedule": 0.0}
    costs.observe(1, 1, 3, taken)
    assert costs.round(1, 1, 3) == pytest.approx(1.5)
    assert costs.round(1, 1, 1) == pytest.approx(1.1)


# The number of levels


@given(
    st.lists(st.floats(0.02, 0.98), min_size=DEEPEST, max_size=DEEPEST),
    st.floats(0.0, 0.4),
    st.floats(0.0, 0.3),
    st.floats(0.0, 0.3),
    st.integers(1, 32),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_depth_is_the_best_of_all_depths(
    right: list[float], first: float, level: float, node: float, size: int
) -> None:
    drafts = {n: first * (n > 0) + level * n for n in range(DEEPEST + 1)}
    planner = CostPlanner(Costs({1: 1.0, 32: 1 + 31 * node}, drafts))
    for known, chance in zip(planner.levels[1:], right, strict=True):
        known.hits, known.weight = 1e6 * chance, 1e6
    planner._sizes = dict.fromkeys(range(1, DEEPEST + 1), size)
    planner._credit = 0.0
    rates = []
    for depth in range(DEEPEST + 1):
        tokens = 1.0
        for n in range(depth):
            tokens += torch.tensor(right[: n + 1], dtype=torch.float64).prod().item()
        # A thousandth of rounding: means of a million ones lie a hair above one.
        rates.append(tokens / (1 + node * (size - 1) * (depth > 0) + drafts[depth]))
    plan = planner.plan([CONTEXT])
    asked = plan.depth if plan.nodes > 1 else 0
    if asked:
        assert rates[asked] >= max(rates) * 0.999
    else:
        assert max(rates) <= rates[0] * (1 + CLEARLY) * 1.001, "what promises less is a try, and there is no credit"


def verdict_of(tokens: list[int], committed: list[int]) -> Verdict:
    """The verdict of a round that committed these tokens."""
    count = len(committed) - 1
    path = torch.arange(count + 1)[None]
    return Verdict(path, torch.tensor([count]), torch.tensor([committed[-1]]), torch.tensor([committed]))


class Text:
    """A text that a drafter guesses right, token by token, with a given chance, and a planner that drafts for it.

    The drafter's first child is 1 and its second 2; the text goes on by as many ones as are right, then by a 9. Rounds
    cost what is measured, or what is `true`.
    """

    def __init__(self, planner: CostPlanner, seed: int = 0, true: Costs | None = None) -> None:
        self.planner, self.random = planner, random.Random(seed)
        self.costs = true or planner.costs
        self.levels: list[int] = []
        self.seconds = self.tokens = 0.0

    def run(self, rounds: int, right: float, beside: float | None = None) -> Text:
        for _ in range(rounds):
            self.round(right, beside)
        return self

    def round(self, right: float, beside: float | None) -> None:
        planner, root = self.planner, [7]
        plan = planner.plan([CONTEXT])
        found = None
        if beside is not None:
            found = from_paths(root, [[[1] * 8]], 9, [[0.8]])
            plan = plan.beside(found)
        levels = plan.depth if plan.nodes > 1 else 0
        tree = from_paths(root, [[[2], [1] * levels] if levels else []], plan.nodes, [[0.2, 0.7]])
        tree = planner.prune(tree if found is None else merge(tree, found))
        ahead = 0
        while ahead < 9 and self.random.random() < (right if beside is None else beside):
            ahead += 1
        depth = tree.tokens[0].tolist().count(1)
        accepted = min(ahead, depth)
        committed = [1] * accepted + [1 if ahead > accepted else 9]
        seconds = seconds_of(self.costs, tree.size, levels)
        planner.record(verdict_of([], committed), seconds)
        self.levels.append(levels)
        self.seconds += sum(seconds.values())
        self.tokens += len(committed)

    @property
    def regret(self) -> float:
        """Seconds more than plain decoding takes for these tokens, as a share of that."""
        return self.seconds / (self.tokens * (FLAT[1] + LEVELS[0])) - 1


@pytest.mark.parametrize("draft", [0.3, 1.0, 3.0, 30.0])
def test_where_drafting_never_pays_it_stops_and_loses_less_than_two_percent(draft: float) -> None:
    drafts = {n: LEVELS[0] + draft * (LEVELS[n] - LEVELS[0]) for n in LEVELS}
    text = Text(CostPlanner(Costs(FLAT, drafts))).run(600, 0.0)
    tries = text.levels[30:]
    assert sum(map(bool, tries)) * (LEVELS[1] * draft) < 0.02 * len(tries) * FLAT[1], "it has stopped"
    assert any(tries), "and tries again"
    assert text.regret < 0.02


def test_levels_that_were_never_drafted_are_believed_to_be_like_the_one_before() -> None:
    """A weak drafter is not asked for eight levels because nobody knows that the last seven are as bad."""
    planner = CostPlanner(Costs(FLAT, LEVELS))
    for _ in range(100):
        planner.levels[1].observe(False, 0.1)
    likely = planner._chances_of_levels()
    assert likely[1] < 0.1
    assert likely[2:] == pytest.approx([likely[1]] * (DEEPEST - 1))


def test_a_text_that_fits_the_drafter_less_than_believed_costs_little() -> None:
    """It drafts worse than it should for what was seen of another text: what is believed is put to the test."""
    drafts = {n: LEVELS[0] + 3 * (LEVELS[n] - LEVELS[0]) for n in LEVELS}
    lost = []
    for seed in range(12):
        planner = CostPlanner(Costs(FLAT, drafts))
        Text(planner, seed).run(600, 0.3)
        lost.append(Text(planner, seed + 100).run(60, 0.05).regret)
    assert sum(lost) / len(lost) < 0.02


def test_what_tries_lose_is_counted_by_what_they_took() -> None:
    """Here drafting takes longer than costs say, and never pays."""
    planner = CostPlanner(Costs(FLAT, LEVELS))
    true = Costs(FLAT, {n: LEVELS[0] + 8 * (LEVELS[n] - LEVELS[0]) for n in LEVELS})
    with patch.object(planner.costs, "_observe_draft"):
        Text(planner, true=true).run(200, 0.0)
        text = Text(planner, seed=1, true=true).run(2000, 0.0)
    assert text.regret < 0.02


@pytest.mark.parametrize("right", [0.05, 0.1, 0.2, 0.3, 0.5, 0.8])
def test_it_is_nearly_as_fast_as_the_best_fixed_depth(right: float) -> None:
    """Of a chain of the best depth, known beforehand, it loses no more than 3% on a text that is new to it."""
    costs = Costs(FLAT, LEVELS)
    best = min(costs.round(1, 1 + d, d) / sum(right**i for i in range(d + 1)) for d in range(DEEPEST + 1))
    planner = CostPlanner(costs)
    Text(planner).run(300, 0.9 if right < 0.5 else 0.0)
    Text(planner).run(60, right)
    texts = [Text(planner, seed).run(400, right) for seed in range(1, 6)]
    seconds, tokens = (sum(getattr(text, name) for text in texts) for name in ("seconds", "tokens"))
    assert seconds / tokens < 1.03 * best


def test_it_finds_out_that_passes_were_measured_in_a_bad_moment() -> None:
    """The memory was slow then, and passes over 12 tokens seemed to cost no more than over one."""
    true = Costs({n: 1.0 + 0.12 * max(0, n - 4) for n in range(1, 33)}, LEVELS)
    slow = Costs({n: max(2.0, seconds) for n, seconds in true.passes.items()}, LEVELS)
    knowing, planner = CostPlanner(Costs(true.passes, LEVELS)), CostPlanner(slow)
    lost = []
    for seed in range(6):
        best, text = (Text(p, seed, true).run(100, 0.8) for p in (knowing, planner))
        lost.append(text.seconds / text.tokens / (best.seconds / best.tokens) - 1)
    assert sum(lost[2:]) / 4 < 0.03


@pytest.mark.parametrize("rounds", [60, 200])
@pytest.mark.parametrize("cores", [1.5, 2.0, 3.0])
def test_cores_that_are_slow_at_once_are_not_taken_for_slow_memory(cores: float, rounds: int) -> None:
    """If they are, nodes cost nothing, and trees grow beyond what passes tell of the memory: with cores of a third of
    the speed that took three times as long as the best size. Then they are as fast as before.
    """
    reading = {n: 1.0 + 0.01 * n for n in range(1, 33)}
    multiplying = {n: 0.11 * n for n in range(1, 33)}

    def true(slower: float) -> Costs:
        return Costs({n: (reading[n] ** 8 + (slower * multiplying[n]) ** 8) ** (1 / 8) for n in reading}, LEVELS)

    def brought(nodes: int) -> float:
        return 1 + 0.7 * math.log(nodes)

    planner, chance = CostPlanner(Costs(true(1.0).passes, LEVELS)), random.Random(0)
    chances = [brought(n) - brought(n - 1) for n in range(2, POOL + 1)]
    row = Row([], [], [], [], [], [0.0, *chances])
    spent = least = 0.0
    for slower, count in ((1.0, 60), (cores, rounds), (1.0, 100)):
        machine = true(slower)
        best = max(brought(n) / machine.round(1, n, 4) for n in range(2, POOL + 1))
        for _ in range(count):
            planner.plan([CONTEXT])
            planner._round.told = 4
            size = planner._size([row])
            seconds = seconds_of(machine, size, 4)
            seconds["verify"] *= math.exp(chance.gauss(0, 0.05))
            planner.costs.observe(1, size, 4, seconds)
            spent += sum(seconds.values())
            least += brought(size) / best
    assert spent < 1.25 * least


def test_prices_are_asked_seldom_while_drafting_and_before_each_try() -> None:
    """A rest may be long, and the machine another one after it."""
    planner = CostPlanner(Costs(FLAT, LEVELS))
    with patch.object(planner.costs, "prices", wraps=planner.costs.prices) as asked:
        Text(planner).run(40, 0.95)
        assert asked.call_count <= 40 / REPRICED + 1
        Text(planner, seed=1).run(200, 0.0)
        for _ in range(400):
            before, resting = asked.call_count, planner._rest is not None
            tried = Text(planner, seed=2).run(1, 0.0).levels == [1]
            assert asked.call_count > before or not (resting and tried)


def test_it_adapts_when_the_text_changes() -> None:
    planner = CostPlanner(Costs(FLAT, LEVELS))
    Text(planner).run(400, 0.0)
    good = Text(planner, seed=1).run(400, 0.85)
    assert all(level >= 3 for level in good.levels[150:])
    assert good.regret < -0.4
    bad = Text(planner, seed=2).run(40, 0.0)
    assert not any(bad.levels[30:])
    assert Text(planner, seed=3).run(400, 0.0).regret < 0.02


def test_depth_comes_back_when_the_text_becomes_easy() -> None:
    planner = CostPlanner(Costs(FLAT, LEVELS))
    shallow = Text(planner).run(400, 0.45)
    deep = Text(planner, seed=1).run(400, 0.95)
    assert max(shallow.levels[-50:]) < 4
    assert min(deep.levels[-50:]) >= 6


def test_each_drafter_is_planned_by_what_it_adds() -> None:
    """The same lookup, always right: a cheap pass needs no levels beside it, and the formula finds that out."""
    drafts = {n: 0.0002 + 0.004 * n for n in LEVELS}
    text = Text(CostPlanner(Costs({1: 0.005, 32: 0.007}, drafts))).run(400, 0.0, beside=0.9)
    assert sum(text.levels[20:]) < 20
    assert text.tokens > 4 * 400
    unsure = Text(CostPlanner(Costs({1: 0.005, 32: 0.007}, dict.fromkeys(LEVELS, 0.0002)))).run(200, 0.8)
    assert all(unsure.levels)


class Probed(Text):
    """The same with a drafter whose probes, four rows of a pass, draft three levels for the round after it."""

    drafted = False

    def round(self, right: float, beside: float | None) -> None:
        planner = self.planner
        plan = planner.plan([CONTEXT])
        probing = plan.nodes > 1
        tree = from_paths([7], [[[1] * 3, [2]] if self.drafted else []], POOL, [[0.7, 0.2]])
        tree = plan.worth_checking(tree)
        assert planner.prune(tree) is tree
        ahead = 0
        while ahead < 9 and self.random.random() < right:
            ahead += 1
        accepted = min(ahead, tree.tokens[0].tolist().count(1))
        committed = [1] * accepted + [1 if ahead > accepted else 9]
        seconds = seconds_of(planner.costs, tree.size + 4 * probing, 3 if self.drafted else 0)
        planner.record(verdict_of([], committed), seconds)
        self.levels.append(int(probing))
        self.drafted = probing
        self.seconds += sum(seconds.values())
        self.tokens += len(committed)


@pytest.mark.parametrize(("node", "right", "drafts"), [(0.1, 0.3, False), (0.02, 0.8, True), (0.05, 0.8, True)])
def test_probes_are_hung_where_what_they_draft_pays_for_their_rows(node: float, right: float, drafts: bool) -> None:
    passes = {n: FLAT[1] * (1 + node * (n - 1)) for n in (1, 16, 40)}
    planner = CostPlanner(Costs(passes, dict.fromkeys(LEVELS, LEVELS[0])), probes=4)
    text = Probed(planner).run(600, right)
    assert all(text.levels[50:]) if drafts else sum(text.levels[50:]) < 30
    assert text.regret < (-0.3 if drafts else 0.02)
    if drafts:
        Probed(planner, seed=1).run(100, 0.0)
        assert Probed(planner, seed=2).run(400, 0.0).regret < 0.02
    else:
        assert all(Probed(planner, seed=1).run(600, 0.9).levels[-100:])


@pytest.mark.parametrize("draft", [0.05, 0.2, 0.5])
def test_what_probes_said_is_paid_for_in_the_round_that_reads_it(draft: float) -> None:
    """In parts of a pass: it may cost more than the probes themselves, and is no reason to lose more than 2%."""
    drafts = {n: LEVELS[0] + FLAT[1] * draft * (n > 0) for n in LEVELS}
    passes = {n: FLAT[1] * (1 + 0.01 * (n - 1)) for n in (1, 16, 40)}
    text = Probed(CostPlanner(Costs(passes, drafts), probes=4)).run(800, 0.04)
    assert sum(text.levels[50:]) * (0.04 + draft) < 0.02 * 750, "it has stopped"
    assert text.regret < 0.02


def test_a_round_with_probes_alone_says_nothing_of_their_drafts() -> None:
    planner = CostPlanner(Costs({1: 1.0, 32: 1.0}, LEVELS), probes=4)
    before = [(level.hits, level.weight) for level in planner.levels]
    text = Probed(planner).run(1, 0.5)
    assert text.levels == [1]
    assert [(level.hits, level.weight) for level in planner.levels] == before
    text.run(1, 0.5)
    assert [(level.hits, level.weight) for level in planner.levels] != before


def test_chances_are_what_is_accepted_not_what_is_claimed() -> None:
    planner = CostPlanner(Costs({1: 1.0, 32: 1.0}, dict.fromkeys(LEVELS, 0.0)))
    Text(planner).run(1500, 0.35)
    tree = from_paths([7], [[[1, 1], [2]]], 9, [[0.7, 0.2]])
    chances = planner.acceptance.read(tree)[0].chances
    assert chances[1] == pytest.approx(0.35, abs=0.08)
    assert chances[2] == pytest.approx(0.35**2, abs=0.06)
    assert chances[3] < 0.02


def test_what_two_drafters_guess_alike_is_counted_apart() -> None:
    planner = CostPlanner(Costs(FLAT, LEVELS))
    roots = [7]
    both = merge(from_paths(roots, [[[1], [2]]], 9), from_paths(roots, [[[1], [3]]], 9))
    assert [cell[0] for cell in planner.acceptance.read(both)[0].cells[1:]] == [3, 2, 1]
    found = from_paths(roots, [[[1]]], 9)
    assert (
        planner.acceptance.read(found)[0].cells[1]
        == planner.acceptance.read(merge(from_paths(roots, [[]], 9), found))[0].cells[1]
    )


# Nothing changes


class WildCosts(Costs):
    """Rounds cost what chance says: the planner decides anything."""

    def __init__(self) -> None:
        super().__init__({1: 1.0, 32: 2.0}, {0: 0.0})
        self.random = random.Random(0)

    def prices(self, batch: int, most: int, further: int = 0) -> Prices:
        def some(count: int) -> list[float]:
            return [self.random.uniform(0.1, 1.0) for _ in range(count)]

        return Prices(some(most + 1), some(DEEPEST + 1), 0.0, self.random.random())

    @property
    def astray(self) -> bool:
        return self.random.random() < 0.1


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory = tiny_models.save(tmp_path_factory.mktemp("model"), "llama", seed=3)
    return LLM(str(directory), "none", max_batch=4)


def wildly(llm: LLM, drafter: Any, rule: str = "coupled") -> CostPlanner:
    llm.rule = rule
    planner = llm._planners[drafter] = CostPlanner(WildCosts())
    llm.use(drafter, "plan")
    return planner


@pytest.mark.parametrize("setting", SETTINGS)
def test_planned_is_plain(llm: LLM, setting: str) -> None:
    params = SETTINGS[setting]
    llm.rule = "coupled"
    llm.use("none")
    plain = [g.token_ids for g in llm.generate(PROMPTS, params)]
    prophet = Prophet([prompt + text for prompt, text in zip(PROMPTS, plain, strict=True)])
    for drafter in (s4c_drafter(llm), CombinedDrafter(s4c_drafter(llm), NgramDrafter()), NgramDrafter(), prophet):
        wildly(llm, drafter)
        generations = llm.generate(PROMPTS, params)
        assert [g.token_ids for g in generations] == plain
        sizes = [g.stats.tree_sizes for g in generations]
        assert len({size for histogram in sizes for size in histogram}) > 1
        assert all(sum(h.values()) == g.stats.rounds for h, g in zip(sizes, generations, strict=True))


def test_planned_rejection_samples_the_same_law(llm: LLM) -> None:
    """As `test_rejection_samples_the_same_law`, with trees of all sizes: a chance of 1 in 10,000 to fail."""
    from scipy.stats import chi2_contingency

    params = [SamplingParams(max_new_tokens=3, temperature=0.7, top_k=3, seed=seed) for seed in range(1200)]
    counts = []
    for drafter, rule in ((None, "coupled"), (s4c_drafter(llm), "rejection")):
        llm.rule, llm.max_batch = rule, 64
        llm.use("none") if drafter is None else wildly(llm, drafter, rule)
        counts.append([tuple(g.token_ids) for g in llm.generate([PROMPTS[0]] * len(params), params)])
    llm.max_batch = 4
    triples = sorted(set(counts[0]) | set(counts[1]))
    table = [[drawn.count(triple) for triple in triples] for drawn in counts]
    frequent = [i for i in range(len(triples)) if table[0][i] + table[1][i] >= 10]
    assert len(frequent) >= 6
    assert chi2_contingency([[row[i] for i in frequent] for row in table]).pvalue > 1e-4
