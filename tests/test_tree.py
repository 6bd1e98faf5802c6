"""Geometry of draft trees and the builders, against loops and brute force."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from verify_oracles import Text, deterministic_tree, path_to, tiny_model

from s4c.types import DraftTree
from s4c.verify.tree import TreePlan, ancestors, depths, from_paths, listed_depths, merge, pruned, root_only


@st.composite
def batches_of_parents(draw: st.DrawFn) -> list[list[int]]:
    size = draw(st.integers(1, 12))
    return [[-1] + [draw(st.integers(0, node - 1)) for node in range(1, size)] for _ in range(draw(st.integers(1, 3)))]


def paths_of(tree: DraftTree, row: int = 0) -> list[Text]:
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    return [tuple(tokens[step] for step in path_to(parents, node)) for node in range(tree.size)]


def check_contract(tree: DraftTree) -> None:
    """Parents before children, the root first and no candidate, no candidate below one that is none."""
    columns = torch.arange(tree.size)
    assert (tree.parents[:, 0] == -1).all()
    assert ((tree.parents[:, 1:] >= 0) & (tree.parents[:, 1:] < columns[1:])).all()
    assert not tree.candidate[:, 0].any()
    above = tree.candidate.gather(1, tree.parents.clamp(min=0)) | (tree.parents <= 0)
    assert (above | ~tree.candidate).all()


@given(batches_of_parents())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_ancestors_and_depths_equal_a_loop(batch: list[list[int]]) -> None:
    reach, depth = ancestors(torch.tensor(batch)), depths(torch.tensor(batch))
    for row, parents in enumerate(batch):
        for node in range(len(parents)):
            path = [0, *path_to(parents, node)]
            assert reach[row, node].nonzero()[:, 0].tolist() == path
            assert int(depth[row, node]) == listed_depths(parents)[node] == len(path) - 1


def test_ancestors_of_a_long_chain() -> None:
    parents = torch.arange(-1, 69)[None]
    assert torch.equal(ancestors(parents)[0], torch.ones(70, 70).tril().bool())


@pytest.mark.parametrize(
    ("text", "kind", "width", "depth", "nodes"),
    [
        ("comb:4", "comb", 4, 0, 0),
        ("comb:3x5", "comb", 3, 5, 16),
        ("best:16", "best", 8, 0, 16),
        ("best:4x6", "best", 3, 6, 4),
        ("best:128x9", "best", 8, 9, 128),
        ("chain:4", "chain", 1, 4, 5),
        (" chain:1 ", "chain", 1, 1, 2),
    ],
)
def test_plan_parses(text: str, kind: str, width: int, depth: int, nodes: int) -> None:
    plan = TreePlan.parse(text)
    assert plan == TreePlan(kind, width, depth, nodes)
    assert str(plan) == text.strip()


@pytest.mark.parametrize(
    "text", ["", "comb", "comb:0", "comb:-1", "comb:2x0", "chain:3x2", "chain:0", "best:0", "tree:4", "comb:2x", "16"]
)
def test_plan_refuses_and_lists_the_forms(text: str) -> None:
    with pytest.raises(ValueError, match="comb:K or comb:KxD, best:N or best:NxD, chain:D"):
        TreePlan.parse(text)


def test_plan_refuses_a_tree_without_candidates() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        TreePlan.parse("best:1")


def test_plan_deepened() -> None:
    assert TreePlan.parse("comb:4").deepened(3) == TreePlan("comb", 4, 3, 13)
    assert TreePlan.parse("best:16").deepened(3) == TreePlan("best", 8, 3, 16)
    assert TreePlan.parse("comb:3x5").deepened(3) == TreePlan.parse("comb:3x5")


def grow(plan: TreePlan, scores: list[Tensor], token_ids: Tensor | None = None) -> DraftTree:
    builder = plan.grow(torch.tensor([7]))
    for level in scores:
        assert builder.open
        builder.extend(level[None, None], token_ids)
    return builder.finish()


def test_comb_goes_down_by_the_best_and_sideways_by_k() -> None:
    levels = [torch.tensor([0.1, 2.0, 1.0]), torch.tensor([3.0, 0.0, 1.0])]
    tree = grow(TreePlan.parse("comb:2x2"), levels)
    assert tree.tokens.tolist() == [[7, 1, 2, 0, 2]]
    assert tree.parents.tolist() == [[-1, 0, 0, 1, 1]]
    assert tree.candidate.tolist() == [[False, True, True, True, True]]
    assert tree.sampled.tolist() == [False]
    assert tree.log_q is None
    check_contract(tree)


def test_chain_is_a_comb_of_one() -> None:
    tree = grow(TreePlan.parse("chain:2"), [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])])
    assert tree.tokens.tolist() == [[7, 1, 0]]
    assert tree.parents.tolist() == [[-1, 0, 1]]


def test_reduced_vocabulary_and_fewer_tokens_than_children() -> None:
    tree = grow(TreePlan.parse("comb:4x1"), [torch.tensor([1.0, 2.0])], torch.tensor([10, 30]))
    assert tree.tokens.tolist() == [[7, 30, 10]]


@pytest.mark.parametrize("form", ["comb:3x2", "best:6x2"])
def test_children_without_a_probability_are_no_candidates(form: str) -> None:
    only = torch.tensor([-math.inf, 1.0, -math.inf, -math.inf])
    tree = grow(TreePlan.parse(form), [only])
    assert tree.tokens[tree.candidate].tolist() == [1]
    check_contract(tree)


@pytest.mark.parametrize("form", ["comb:2x3", "best:9x3"])
def test_a_drafter_without_any_law_has_no_candidates(form: str) -> None:
    builder = TreePlan.parse(form).grow(torch.tensor([7]))
    while builder.open:
        builder.extend(torch.full((1, builder.frontier.shape[1], 5), -math.inf))
    tree = builder.finish()
    assert not tree.candidate.any()
    check_contract(tree)


def test_a_node_without_a_law_takes_no_room_from_others() -> None:
    builder = TreePlan.parse("best:7x2").grow(torch.tensor([7]))
    builder.extend(torch.tensor([[[3.0, 2.0, 1.0]]]))
    second = torch.zeros(1, 3, 3)
    second[0, 0] = -math.inf
    builder.extend(second)
    tree = builder.finish()
    assert tree.candidate.sum() == 6
    assert (tree.parents[0, 1:] != 1).all()
    check_contract(tree)


def test_a_drafter_whose_law_is_no_number_leaves_the_root_where_it_is() -> None:
    builder = TreePlan("best", width=3, depth=3, nodes=3).grow(torch.tensor([1, 2]))
    laws = torch.randn(2, 1, 9)
    laws[0] = torch.nan
    while builder.open:
        builder.extend(laws.expand(-1, builder.frontier.shape[1], -1))
    tree = builder.finish()
    assert tree.tokens[:, 0].tolist() == [1, 2]
    assert not tree.candidate[0].any()


def test_laws_stand_at_the_nodes_whose_children_they_are() -> None:
    laws = torch.tensor([[0.2, 0.8], [0.5, 0.5]]).log()
    builder = TreePlan.parse("comb:2x2").grow(torch.tensor([7, 8]))
    for law in laws:
        builder.extend(law.expand(2, 1, 2), law=law.expand(2, 1, 2))
    tree = builder.finish(sampled=torch.tensor([True, False]))
    assert tree.sampled.tolist() == [True, False]
    assert tree.log_q is not None
    for row in range(2):
        assert torch.equal(tree.log_q[row, :2], laws)
        assert (tree.log_q[row, 2:] == -math.inf).all()


def test_a_best_tree_may_not_be_sampled() -> None:
    builder = TreePlan.parse("best:4x1").grow(torch.tensor([7]))
    builder.extend(torch.zeros(1, 1, 3))
    with pytest.raises(AssertionError, match="depends on its draws"):
        builder.finish(sampled=torch.tensor([True]))


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 3), st.sampled_from([0.3, 1.5, 4.0]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_best_keeps_the_nodes_of_highest_path_probability(seed: int, nodes: int, depth: int, scale: float) -> None:
    """Up to 9 nodes, 4 expanded nodes per level and 8 children lose nothing, so brute force must agree."""
    vocab = 4
    model = tiny_model(seed, vocab, scale)
    every: dict[Text, float] = {(): 0.0}
    for length in range(1, depth + 1):
        for path in product(range(vocab), repeat=length):
            every[path] = every[path[:-1]] + float(model((7, *path[:-1])).log_softmax(-1)[path[-1]])
    tree = deterministic_tree(TreePlan.parse(f"best:{nodes}x{depth}"), model, (7,))
    check_contract(tree)
    paths = paths_of(tree)
    assert len(set(paths)) == len(paths) == min(nodes, len(every))
    kept = [every[path] for path in paths]
    expected = sorted(every.values(), reverse=True)[: len(paths)]
    assert sorted(kept, reverse=True) == pytest.approx(expected, abs=1e-4)
    for one, other in product(range(1, tree.size), repeat=2):
        if one < other and tree.parents[0, one] == tree.parents[0, other]:
            assert kept[one] >= kept[other]


def test_best_keeps_parents_whatever_the_probabilities() -> None:
    """Laws so sharp that children tie with their parents, far below the resolution of float32 sums."""
    rng = random.Random(0)
    for seed in range(40):
        models = [tiny_model(seed + 100 * row, 12, rng.choice([1.0, 1e3, 1e6]), excluded=0.5) for row in range(2)]
        builder = TreePlan.parse("best:16x4").grow(torch.tensor([7, 8]))
        while builder.open:
            width = builder.frontier.shape[1]
            builder.extend(torch.stack([torch.stack([m((builder.level, w)) for w in range(width)]) for m in models]))
        tree = builder.finish()
        assert tree.size == 16
        check_contract(tree)


def test_best_stops_early_only_when_nothing_better_can_come() -> None:
    """A flat first level fills the tree: all its children beat any grandchild. A sharp one does not."""
    plan = TreePlan.parse("best:5x4")
    flat, sharp = plan.grow(torch.tensor([7])), plan.grow(torch.tensor([7]))
    flat.extend(torch.zeros(1, 1, 4))
    sharp.extend(torch.tensor([[[5.0, 0.0, 0.0, 0.0]]]))
    assert not flat.open
    assert sharp.open
    barely = TreePlan.parse("best:3x2").grow(torch.tensor([7]))
    barely.extend(torch.tensor([[[0.6, 0.4]]]).log())
    assert barely.open, "0.6 * 0.9 > 0.4"


def test_nodes_whose_children_could_not_be_kept_are_not_expanded() -> None:
    law = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    free, full = (TreePlan.parse(form).grow(torch.tensor([7])) for form in ("best:9x4", "best:4x4"))
    for builder in (free, full):
        builder.extend(law.expand(1, 1, 4))
    assert free.frontier.tolist() == [[1, 2, 3, 4]], "there is room for all"
    assert full.frontier.tolist() == [[1, 2]], "the third is the last that is kept"
    full.extend(law.expand(1, 2, 4))
    assert not full.open, "0.5 * 0.5 is the last that is kept"
    check_contract(full.finish())


@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 4), st.sampled_from([0.3, 1.5, 4.0, 1e3]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_tree_is_the_same_where_nobody_looks(seed: int, nodes: int, depth: int, scale: float) -> None:
    plan = TreePlan.parse(f"best:{nodes}x{depth}")
    model, widths, trees = tiny_model(seed, 6, scale), [], []
    for waits in (True, False):
        builder = plan.grow(torch.tensor([7]))
        assert builder.waits, "on a CPU"
        builder.waits = waits
        while builder.open:
            tokens, parents = builder.tokens[0].tolist(), builder.parents[0].tolist()
            paths = [tuple(tokens[s] for s in path_to(parents, node)) for node in builder.frontier[0].tolist()]
            builder.extend(torch.stack([model((7, *path)) for path in paths])[None])
            widths.append(builder.frontier.shape[1])
        trees.append(builder.finish())
    assert widths[-depth:] == [min(4, min(plan.width, 6) ** (level + 1)) for level in range(depth)]
    assert paths_of(trees[0]) == paths_of(trees[1])
    assert torch.equal(trees[0].candidate, trees[1].candidate)


def test_a_frontier_is_as_wide_as_the_tree_of_a_batch_that_wants_most() -> None:
    """Of the flat law no child beats the last one that is kept; of the sharp one a single child does."""
    sharp, flat = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]]).log()
    for laws, width in (([flat], 0), ([sharp], 1), ([sharp, flat], 1)):
        builder = TreePlan.parse("best:4x3").grow(torch.arange(len(laws)))
        builder.extend(torch.stack(laws)[:, None])
        assert builder.frontier.shape == (len(laws), width)
        assert builder.open == (width > 0)


def test_trees_of_a_batch_grow_apart() -> None:
    models = [tiny_model(seed, 6) for seed in (1, 2)]
    plan = TreePlan.parse("best:8x3")
    builder = plan.grow(torch.tensor([3, 4]))
    while builder.open:
        rows = []
        for row, model in enumerate(models):
            tokens, parents = builder.tokens[row].tolist(), builder.parents[row].tolist()
            paths = [tuple(tokens[s] for s in path_to(parents, node)) for node in builder.frontier[row].tolist()]
            rows.append(torch.stack([model((3 + row, *path)) for path in paths]))
        builder.extend(torch.stack(rows))
    tree = builder.finish()
    for row, model in enumerate(models):
        assert paths_of(tree, row) == paths_of(deterministic_tree(plan, model, (3 + row,)))


def test_from_paths_merges_shared_beginnings_and_pads() -> None:
    tree = from_paths([7, 8], [[[1, 2, 3], [1, 4], [5]], [[6]]], budget=10)
    assert tree.tokens.tolist() == [[7, 1, 2, 3, 4, 5], [8, 6, 0, 0, 0, 0]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2, 1, 0], [-1, 0, 0, 0, 0, 0]]
    assert tree.candidate.tolist() == [[False] + [True] * 5, [False, True] + [False] * 4]
    assert not tree.sampled.any()
    check_contract(tree)


@given(
    st.lists(st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=4), min_size=1, max_size=3), st.integers(1, 8)
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_from_paths_holds_the_first_distinct_beginnings(paths: list[list[list[int]]], budget: int) -> None:
    tree = from_paths([9] * len(paths), paths, budget)
    check_contract(tree)
    for row, continuations in enumerate(paths):
        prefixes = [tuple(path[:end]) for path in continuations for end in range(1, len(path) + 1)]
        wanted = list(dict.fromkeys(prefixes))[: budget - 1]
        candidates = [path for path, on in zip(paths_of(tree, row), tree.candidate[row].tolist(), strict=True) if on]
        assert candidates == wanted


def test_root_only() -> None:
    tree = root_only([4, 5])
    assert tree.tokens.tolist() == [[4], [5]]
    check_contract(tree)


@pytest.mark.parametrize("text", ["comb:100000", "best:5000", "best:16x5000", "chain:1024", "comb:64x64"])
def test_a_plan_that_no_machine_wants_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="at most 1024 nodes"):
        TreePlan.parse(text)


def test_a_floor_ends_the_levels() -> None:
    for floor, levels in ((-0.5, 1), (-1.0, 2), (-1.5, 3)):
        builder = TreePlan("best", 2, 3, 9, floor).grow(torch.tensor([7]))
        while builder.open:
            builder.extend(torch.zeros(1, builder.frontier.shape[1], 4))
        assert builder.level == levels, "two of four like children halve the chance: -0.69, then -1.39"
        check_contract(builder.finish())


def test_without_nodes_nothing_is_guessed() -> None:
    assert not TreePlan("best", 8, 3, 1).grow(torch.tensor([7])).open


def test_beliefs_are_the_log_probabilities_of_paths() -> None:
    builder = TreePlan.parse("best:3x2").grow(torch.tensor([7]))
    builder.extend(torch.tensor([[[0.9, 0.1]]]).log())
    builder.extend(torch.tensor([[[0.8, 0.2]]]).log())
    tree = builder.finish()
    assert tree.belief is not None
    assert tree.belief.exp().tolist() == [[pytest.approx([1.0, 0.9, 0.72])]]
    looked_up = from_paths([7], [[[1, 2], [1, 3]]], 9, [[0.5, 0.1]])
    assert looked_up.belief is not None
    assert looked_up.belief.exp().tolist() == [[pytest.approx([1.0, 0.5, 0.25, 0.05])]], "shared nodes keep the first's"


@pytest.mark.parametrize("plan", ["best:12x4", "comb:3x3", "chain:3"])
def test_one_row_for_all_nodes_is_a_row_for_each(plan: str) -> None:
    laws = torch.randn(4, 2, 1, 6, generator=torch.Generator().manual_seed(3))
    shared, apart = (TreePlan.parse(plan).grow(torch.tensor([7, 8])) for _ in range(2))
    while shared.open:
        law = laws[shared.level]
        apart.extend(law.expand(-1, apart.frontier.shape[1], -1))
        shared.extend(law)
    one, other = shared.finish(), apart.finish()
    assert one.size > 3
    for part in ("tokens", "parents", "candidate", "belief"):
        assert torch.equal(getattr(one, part), getattr(other, part))


@given(
    st.lists(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=3), min_size=2, max_size=2),
    st.lists(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=3), min_size=2, max_size=2),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_merged_beliefs_say_who_guessed_what(one: list[list[list[int]]], other: list[list[list[int]]]) -> None:
    roots = [7, 8]
    first, second = from_paths(roots, one, 32), from_paths(roots, other, 32)
    whole = merge(first, second)
    assert whole.belief is not None
    assert whole.belief.shape == (2, 2, whole.size)
    for row in range(2):
        columns = zip(paths_of(whole, row), whole.belief[row].T.tolist(), whole.candidate[row].tolist(), strict=True)
        found = {path: belief for path, belief, on in columns if on or not path}
        for member, tree in enumerate((first, second)):
            mine = {p for p, on in zip(paths_of(tree, row), tree.candidate[row].tolist(), strict=True) if on}
            for path, belief in found.items():
                expected = len(path) * math.log(0.5) if path in mine or not path else math.nan
                assert belief[member] == pytest.approx(expected, nan_ok=True)
    kept = [sorted({0, *path_to(whole.parents[row].tolist(), whole.size - 1)}) for row in range(2)]
    size = min(map(len, kept))
    small = pruned(whole, [row[:size] for row in kept])
    check_contract(small)
    for row in range(2):
        assert paths_of(small, row) == [paths_of(whole, row)[column] for column in kept[row][:size]]
