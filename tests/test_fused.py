"""The Triton kernels, interpreted on the CPU where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from verify_oracles import Case, case_of_odd_rows, case_of_trees

pytest.importorskip("triton")

from s4c.models.fused import fused_gumbel, fused_judge
from s4c.types import DraftTree, Verdict
from s4c.verify.noise import gumbel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("size", [1, 63, 64, 65, 5000])
@pytest.mark.parametrize(("seed", "stream", "position"), [(0, 0, 0), (7, 1, 300), (2**64 - 1, 3, 2**33 + 5)])
def test_the_noise_is_that_of_every_machine(size: int, seed: int, stream: int, position: int) -> None:
    got = fused_gumbel(seed, stream, position, size, DEVICE)
    assert torch.equal(got.cpu(), gumbel(seed, stream, position, size))


def judged(case: Case) -> Verdict:
    """What the kernels say, on the CPU."""
    tree = case.tree
    there = DraftTree(*(x.to(DEVICE) for x in (tree.tokens, tree.parents, tree.candidate, tree.sampled)))
    noise = [None if row is None else row.to(DEVICE) for row in case.noise]
    verdict = fused_judge(there, case.logits.to(DEVICE), case.temperatures, noise)
    return Verdict(verdict.path.cpu(), verdict.accepted.cpu(), verdict.bonus.cpu(), verdict.tokens.cpu())


@pytest.mark.parametrize("columns", [1, 255, 4096, 9000])
def test_the_tokens_are_those_of_the_eager_operations(columns: int) -> None:
    case = case_of_odd_rows(columns)
    assert torch.equal(judged(case).tokens, case.verdict.tokens)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_walk_is_that_of_the_coupled_rule(batch: int, seed: int) -> None:
    case = case_of_trees(seed, batch)
    got, wanted = judged(case), case.verdict
    longest = wanted.path.shape[1]
    for part in ("path", "tokens"):
        found = getattr(got, part)
        assert torch.equal(found[:, :longest], getattr(wanted, part)), part
        assert (found[:, longest:] == found[:, longest - 1 : longest]).all()
    assert torch.equal(got.accepted, wanted.accepted)
    assert torch.equal(got.bonus, wanted.bonus)
