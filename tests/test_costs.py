"""What rounds cost: the tables, and what corrects them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from s4c.engine.costs import CONTEXT, Costs
from s4c.engine.measure import SIZES
from s4c.engine.pace import RECENT
from s4c.engine.planner import DEEPEST, CostPlanner
from s4c.engine.stats import STEPS
from s4c.verify.tree import from_paths

LEVELS = {level: 0.0002 + 0.0006 * level for level in range(DEEPEST + 1)}


def seconds_of(costs: Costs, tokens: int, levels: int) -> dict[str, float]:
    """The steps of a round that takes exactly what the tables say."""
    passed = Costs(costs.passes, {}).round(1, tokens, 0)
    return {"draft": costs.drafts[levels], "verify": passed, "judge": 0.0, "commit": 0.0, "schedule": 0.0}


def test_costs_lie_on_straight_lines_that_never_fall() -> None:
    costs = Costs({1: 2.0, 2: 4.0, 4: 3.0, 8: 8.0}, {0: 0.0, 3: 1.0})
    assert [costs.round(1, n, 0) for n in range(1, 9)] == [2, 3, 3, 3, 4.25, 5.5, 6.75, 8]
    assert costs.round(1, 12, 0) == 13
    assert costs.round(2, 4, 3) == 9
    assert costs.round(2, 4, 3) == costs.round(4, 2, 3)


def test_costs_follow_the_rounds_but_not_a_slow_one() -> None:
    costs = Costs({1: 1.0, 32: 2.0}, {0: 0.0, 2: 0.5})
    slow = {"draft": 1.0, "verify": 1.5, "judge": 0.5, "commit": 0.25, "schedule": 0.25}
    before = costs.round(1, 1, 2)
    for number in range(40):
        usual = seconds_of(costs, 1, 2)
        costs.observe(1, 1, 2, {step: (100 if number == 30 else 1) * value for step, value in usual.items()})
    assert costs.round(1, 1, 2) == pytest.approx(before, rel=0.02)
    for _ in range(2 * RECENT):
        costs.observe(1, 1, 2, slow)
    assert costs.round(1, 1, 2) == pytest.approx(3.5, rel=0.001)
    assert costs.round(1, 32, 0) < 2 * 2, "a pass over one token waits for memory, and tells little of the cores"
    assert costs.round(4, 1, 2) > costs.round(1, 1, 2) - 1, "a batch that has not been seen goes by the table"


def test_what_a_wide_pass_costs_is_corrected_by_rounds() -> None:
    """Measured in a bad moment a pass of 8 passed for twice a plain one, and is a quarter more."""
    costs, true = Costs({1: 1.0, 8: 2.0, 32: 8.0}, LEVELS), Costs({1: 1.0, 8: 1.25, 32: 5.0}, LEVELS)
    for _ in range(2 * RECENT):
        costs.observe(1, 1, 0, seconds_of(true, 1, 0))
        costs.observe(1, 8, 2, seconds_of(true, 8, 2))
    assert costs.round(1, 8, 2) == pytest.approx(true.round(1, 8, 2), rel=0.05)
    assert costs.round(1, 1, 0) == pytest.approx(true.round(1, 1, 0), rel=0.01)


def drafts_of(costs: Costs, times: int, level: int, quotient: float) -> list[float]:
    for _ in range(times):
        costs.observe(1, 8, level, seconds_of(costs, 8, level) | {"draft": quotient * LEVELS[level]})
    return costs.prices(1, 8).drafts


def test_drafts_have_a_pace_and_each_depth_a_share() -> None:
    """Drafts of many levels are no cheaper than those of few because they were seen at another moment."""
    costs = Costs({1: 1.0, 32: 2.0}, LEVELS)
    drafts_of(costs, 40, 2, 3.0)
    drafts = drafts_of(costs, 40, 7, 0.5)
    assert drafts == pytest.approx([0.5 * LEVELS[level] for level in range(DEEPEST + 1)])
    for _ in range(40):  # of seven levels three are not drafted, for too little hope
        drafts_of(costs, 1, 2, 1.0)
        drafts = drafts_of(costs, 1, 7, 0.6)
    assert drafts[7] == pytest.approx(0.6 * LEVELS[7])
    assert drafts[2] == pytest.approx(LEVELS[2])


def rounds(costs: Costs, seconds: Callable[[int, int], float], sizes: Sequence[int]) -> None:
    """Rounds with trees of these sizes, whose passes take `seconds(number, size)`."""
    for number, size in enumerate(sizes):
        costs.observe(1, size, 2, dict.fromkeys(STEPS, 0.0) | {"verify": seconds(number, size)})


READING, KNEE = 8.5, 11
"""Of a machine on which a pass takes the longer one of reading and multiplying, which is as long for 11 tokens."""


def machine(tokens: int, memory: float = 1.0, cores: float = 1.0) -> float:
    return max(memory * READING, cores * READING * tokens / KNEE)


@pytest.mark.parametrize(("memory", "cores"), [(0.75, 1.0), (0.75, 1.2), (1.0, 1.2), (1.3, 1.0), (1.0, 1.0)])
def test_the_knee_moves_with_the_paces_of_memory_and_cores(memory: float, cores: float) -> None:
    """Trees were of 5 to 10 nodes before and after, and each pass is off by up to a tenth."""
    costs = Costs({n: machine(n) for n in SIZES}, dict.fromkeys(LEVELS, 0.0))
    chance = random.Random(0)
    sizes = [chance.randint(5, 10) for _ in range(200)]

    def seconds(number: int, size: int) -> float:
        exact = machine(size, memory, cores) if number >= 100 else machine(size)
        return exact * chance.uniform(0.9, 1.1)

    rounds(costs, seconds, sizes)
    passes = costs.prices(1, 16).passes
    for size in range(2, 13):
        assert passes[size] == pytest.approx(machine(size, memory, cores), rel=0.1), size
    assert passes[6] / passes[4] == pytest.approx(1.0, abs=0.06), "below the knee a node is free"


def test_cores_that_are_shared_for_a_while_are_noticed_within_rounds() -> None:
    """Another program multiplies: passes over few tokens take as long as before, those over many half as long again."""
    costs = Costs({n: machine(n) for n in SIZES}, dict.fromkeys(LEVELS, 0.0))
    rounds(costs, lambda number, size: machine(size, 1.0, 1.0 if number < 300 else 1.5), [8, 10, 4, 12] * 80)
    passes = costs.prices(1, 16).passes
    assert passes[12] == pytest.approx(machine(12, 1.0, 1.5), rel=0.1)
    assert passes[4] == pytest.approx(machine(4), rel=0.1)


def test_what_no_pass_tells_of_goes_back_to_what_was_measured() -> None:
    """The cores were slow, and are seen no more."""
    costs = Costs({n: machine(n) for n in SIZES}, dict.fromkeys(LEVELS, 0.0))
    rounds(costs, lambda _, size: machine(size, 1.0, 1.5), [16] * 100)
    assert costs.prices(1, 16).passes[16] == pytest.approx(machine(16, 1.0, 1.5), rel=0.05)
    rounds(costs, lambda _, size: machine(size), [2] * 300)
    assert costs.prices(1, 16).passes[16] == pytest.approx(machine(16), rel=0.05)


def test_a_pass_far_from_its_price_is_told_from_one_that_varies() -> None:
    costs = Costs({n: machine(n) for n in SIZES}, dict.fromkeys(LEVELS, 0.0))
    for quotient, astray in ((1.0, False), (1.2, False), (1.6, True), (1.0, False), (0.6, True)):
        costs.observe(1, 8, 2, dict.fromkeys(STEPS, 0.0) | {"verify": quotient * machine(8)})
        assert costs.astray == astray


def test_a_busy_machine_is_slower_for_all_passes() -> None:
    """Sizes and seconds change at the same moment."""
    costs = Costs({n: machine(n) for n in SIZES}, dict.fromkeys(LEVELS, 0.0))
    before = costs.prices(1, 16).passes
    rounds(costs, lambda number, size: (2.0 if number >= 40 else 1.0) * costs._table[size], [6] * 40 + [7, 14] * 40)
    after = costs.prices(1, 16).passes
    assert after[7] == pytest.approx(2 * before[7], rel=0.02)
    assert after[14] == pytest.approx(2 * before[14], rel=0.05)


def test_looks_at_the_start_tell_how_fast_memory_and_cores_are() -> None:
    costs = Costs({n: machine(n) for n in SIZES}, dict.fromkeys(LEVELS, 0.0))
    for tokens in (1, 16):
        costs.look(tokens, machine(tokens, 0.75, 1.0), 4)
    passes = costs.prices(1, 16).passes
    assert passes[1] == pytest.approx(machine(1, 0.75), rel=0.05)
    assert passes[6] == pytest.approx(machine(6, 0.75), rel=0.05)
    assert passes[14] == pytest.approx(machine(14, 0.75), rel=0.05)


def test_plain_rounds_have_a_pace_of_their_own() -> None:
    costs = Costs({1: 1.0, 8: 1.2, 32: 6.0}, dict.fromkeys(LEVELS, 0.0))
    rounds(costs, lambda _, size: 0.7 if size == 1 else costs._table[size], [8, 1, 8, 9, 1, 7, 8] * 10)
    passes = costs.prices(1, 16).passes
    assert passes[1] == pytest.approx(0.7, rel=0.02)
    assert passes[8] == pytest.approx(1.2, rel=0.01)


def test_probes_are_dearer_than_other_rows_and_no_slower_machine() -> None:
    costs = Costs({1: 1.0, 32: 2.0}, LEVELS, probing=0.5)
    before, seconds = costs.prices(1, 8), seconds_of(costs, 5, 2)
    assert before.round(5, 2, probing=True) == pytest.approx(before.round(5, 2) + 0.5)
    seconds["verify"] += 0.5
    for _ in range(RECENT):
        costs.observe(1, 5, 2, seconds, probing=True)
    after = costs.prices(1, 8)
    assert after.passes == pytest.approx(before.passes)
    assert after.round(5, 2, probing=True) == pytest.approx(sum(seconds.values()))


def test_what_probes_add_is_corrected_by_rounds_with_and_without_them() -> None:
    costs = Costs({1: 1.0, 32: 2.0}, LEVELS, probing=0.25)
    for _ in range(RECENT):
        costs.observe(1, 1, 0, seconds_of(costs, 1, 0))
        costs.observe(1, 5, 2, seconds_of(costs, 5, 2) | {"judge": 0.5}, probing=True)
        costs.observe(1, 5, 2, seconds_of(costs, 5, 2))
    prices, true = costs.prices(1, 8), seconds_of(costs, 5, 2)
    assert prices.round(5, 2, probing=True) == pytest.approx(sum(true.values()) + 0.5, rel=0.05)
    assert prices.round(5, 2) == pytest.approx(sum(true.values()), rel=0.1)
    assert prices.passes[1] == pytest.approx(1.0, rel=0.05)


def test_where_nothing_is_drafted_a_change_is_the_memorys() -> None:
    costs = Costs({n: machine(n) for n in SIZES}, dict.fromkeys(LEVELS, 0.0))
    rounds(costs, lambda _, size: (0.95 if size == 1 else 1.0) * machine(size), [1, 6, 1, 5, 8] * 20)
    rounds(costs, lambda _, size: 0.95 * machine(size, 0.7), [1] * 60)
    passes = costs.prices(1, 16).passes
    assert passes[1] == pytest.approx(0.95 * machine(1, 0.7), rel=0.02)
    assert passes[4] == pytest.approx(machine(4, 0.7), rel=0.08)


def test_a_longer_context_makes_each_node_dearer() -> None:
    costs = Costs({1: 1.0, 2: 1.25, 32: 8.75}, {0: 0.0}, (0.001, 0.0005))
    assert costs.round(1, 2, 0, 100) == pytest.approx(1.25 + 100 * 0.002)
    assert costs.round(2, 2, 0, 100) == pytest.approx(1.75 + 100 * 0.002)
    assert costs.round(1, 1, 0, -10 * CONTEXT) == pytest.approx(1.0 - CONTEXT * 0.0015), "there is nothing to read"
    far = {"draft": 0.0, "verify": costs.round(1, 4, 0, 1000), "judge": 0.0, "commit": 0.0, "schedule": 0.0}
    for _ in range(RECENT):
        costs.observe(1, 4, 0, far, 1000)
    assert costs.round(1, 1, 0) == pytest.approx(1.0), "that is not the machine's pace"


def test_no_context_makes_a_pass_free() -> None:
    costs = Costs({1: 1.0, 32: 1.0}, {0: 0.0}, (1.0, 1.0))
    assert costs.round(1, 8, 0, -CONTEXT) == pytest.approx(0.5)


def test_trees_are_smaller_behind_a_long_context() -> None:
    tree = from_paths([7], [[[1], [2], [3], [4]]], 9, [[0.4, 0.2, 0.1, 0.05]])
    sizes = []
    for context in (CONTEXT, 10 * CONTEXT, 100 * CONTEXT):
        planner = CostPlanner(Costs({1: 1.0, 32: 1.31}, dict.fromkeys(LEVELS, 0.0), (0.0, 0.0001)))
        planner.plan([context])
        sizes.append(planner.prune(tree).size)
    assert sizes[0] > sizes[1] > sizes[2]
