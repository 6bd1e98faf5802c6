"""Two drafters in one tree: merged node by node, within the budget, and as lossless as each alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s4c import LLM, SamplingParams
from s4c.drafters.base import Drafter, Sequences
from s4c.drafters.combined import CombinedDrafter
from s4c.types import DraftTree, TargetOutput, Verdict
from s4c.verify.tree import TreePlan, from_paths, merge, root_only

PATHS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=4)


def texts(tree: DraftTree, row: int) -> Iterator[tuple[int, ...]]:
    """The text from the root to each candidate of a row."""
    for column in tree.candidate[row].nonzero()[:, 0].tolist():
        text = []
        while column > 0:
            text.append(int(tree.tokens[row, column]))
            column = int(tree.parents[row, column])
        yield tuple(reversed(text))


@given(st.lists(st.tuples(PATHS, PATHS), min_size=1, max_size=3))
@settings(deadline=None)
def test_merged_trees_hold_what_either_holds(pairs: list[tuple[list[list[int]], list[list[int]]]]) -> None:
    roots = range(len(pairs))
    first = from_paths(roots, [a for a, _ in pairs], 32)
    second = from_paths(roots, [b for _, b in pairs], 32)
    whole = merge(first, second)
    for row in range(len(pairs)):
        found = list(texts(whole, row))
        assert len(found) == len(set(found))
        assert set(found) == set(texts(first, row)) | set(texts(second, row))
    assert torch.equal(whole.tokens[:, : first.size], first.tokens)
    assert torch.equal(whole.parents[:, : first.size], first.parents)


class Fixed(Drafter):
    """Proposes a given continuation whatever the text."""

    name = "fixed"
    default_tree = "chain:4"

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.plans: list[TreePlan] = []

    def propose(self, sequences: Sequences) -> DraftTree:
        self.plans.append(sequences.plan)
        paths = [[self.tokens]] * len(sequences.roots)
        return from_paths(sequences.roots, paths, sequences.plan.nodes) if self.tokens else root_only(sequences.roots)


@pytest.fixture
def target(tmp_path: Path) -> str:
    return str(tiny_models.save(tmp_path, "llama"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_best_of_both_is_accepted(target: str, temperature: float) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=temperature, seed=3, ignore_eos=True)
    prompt = [5, 6, 7, 8]
    plain = LLM(target, "none", threads=1).generate(prompt, params)
    wrong, right = Fixed([1, 2, 3]), Fixed(plain.token_ids[:4])
    for pair in ((wrong, right), (right, wrong)):
        llm = LLM(target, CombinedDrafter(*pair), tree="best:16", threads=1)
        found = llm.generate(prompt, params)
        assert found.token_ids == plain.token_ids
        assert found.stats.acceptance_histogram[4] >= 1


def believed(paths: list[list[list[int]]], chances: list[list[float]]) -> DraftTree:
    return from_paths(range(len(paths)), paths, 32, chances)


def test_of_a_best_tree_the_nodes_stay_that_either_believes_most() -> None:
    first = believed([[[1, 2, 3], [4]], [[5]]], [[0.8, 0.1], [0.9]])
    second = believed([[[1, 6], [7]], [[8, 9]]], [[0.5, 0.6], [0.3]])
    whole = merge(first, second)
    cut = TreePlan.parse("best:5").cut(whole)
    assert set(texts(cut, 0)) == {(1,), (1, 2), (7,), (1, 2, 3)}, "0.8, 0.64, 0.6, 0.51"
    assert set(texts(cut, 1)) == {(5,), (8,), (8, 9)}
    assert cut.belief is not None
    assert cut.belief.shape == (2, 2, 5)
    for plan in ("best:16", "comb:2x1", "chain:1"):
        assert TreePlan.parse(plan).cut(whole) is whole


def test_where_nothing_is_believed_the_first_nodes_stay() -> None:
    whole = believed([[[1, 2], [3]]], [[0.1, 0.9]])
    mute = DraftTree(whole.tokens, whole.parents, whole.candidate, whole.sampled)
    assert TreePlan.parse("best:3").cut(mute).tokens.tolist() == whole.tokens[:, :3].tolist()


@pytest.mark.parametrize("tree", ["comb:2", "comb:2x3", "chain:3"])
def test_trees_of_fixed_shape_are_added_to(target: str, tree: str) -> None:
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    plain = LLM(target, "none", threads=1).generate([5, 6, 7, 8], params)
    right = Fixed(plain.token_ids[:4])
    found = LLM(target, CombinedDrafter(Fixed([]), right), tree=tree, threads=1).generate([5, 6, 7, 8], params)
    assert found.token_ids == plain.token_ids
    assert found.stats.acceptance_histogram[4] >= 1


def test_nothing_is_added_to_a_sampled_tree(target: str) -> None:
    class Sampled(Fixed):
        def propose(self, sequences: Sequences) -> DraftTree:
            tree = super().propose(sequences)
            return DraftTree(tree.tokens, tree.parents, tree.candidate, torch.ones(1, dtype=torch.bool))

    drafter = CombinedDrafter(Sampled([1]), Fixed([2, 3]))
    sequences = Sequences([[5, 6]], None, True, TreePlan.parse("chain:3"))  # type: ignore[arg-type]
    assert drafter.propose(sequences).tokens.tolist() == [[6, 1]]


def test_a_name_with_a_plus_is_two_drafters(target: str) -> None:
    assert LLM(target, "ngram+ngram", threads=1).drafter.name == "ngram+ngram"
    with pytest.raises(ValueError, match="'none\\+ngram' is not known"):
        LLM(target, "none+ngram")
    with pytest.raises(ValueError, match="'medium' is not known"):
        LLM(target, "ngram+medium")


def test_one_with_probes_comes_first() -> None:
    probing = Fixed([1])
    probing.probes = 3
    assert CombinedDrafter(probing, Fixed([1])).probes == 3
    with pytest.raises(ValueError, match="must be the first of two"):
        CombinedDrafter(Fixed([1]), probing)


class Reading(Fixed):
    """Keeps the features that it is given."""

    def __init__(self, taps: tuple[int, ...]) -> None:
        super().__init__([1])
        self.taps = taps
        self.seen: list[Tensor] = []

    def prefill(self, slot: int, tokens: Tensor, features: Tensor) -> None:
        self.seen.append(features)

    def commit(self, tree: DraftTree, verdict: Verdict, output: TargetOutput) -> None:
        self.seen.append(output.features)


@pytest.mark.parametrize(
    ("first", "second"), [((), ()), ((2, 5), ()), ((), (5,)), ((2, 5), (3, 5)), ((4,), (4,))], ids=str
)
def test_each_drafter_is_given_the_layers_that_it_taps(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    parts = Reading(first), Reading(second)
    combined = CombinedDrafter(*parts)
    assert combined.taps == tuple(sorted({*first, *second}))
    features = torch.tensor([0, *combined.taps]).float().repeat_interleave(3)[None]
    tree = root_only([1])
    combined.prefill(0, torch.tensor([1]), features)
    combined.commit(tree, rooted(tree), TargetOutput(torch.zeros(1, 1, 4), features[None]))
    for part in parts:
        wanted = torch.tensor([0, *part.taps]).float().repeat_interleave(3)
        assert [torch.equal(seen.flatten(), wanted) for seen in part.seen] == [True, True]


def rooted(tree: DraftTree) -> Verdict:
    """The verdict on a tree of the root alone."""
    none = torch.zeros(1, 1, dtype=torch.int64)
    return Verdict(none, none[0], none[0], tree.tokens)
