"""The Triton kernels, interpreted on the CPU where there is no GPU."""

from __future__ import annotations

from random import Random

import pytest
import torch

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

from s4c.models.fused import fused_gumbel, fused_judge  # noqa: E402
from s4c.types import DraftTree  # noqa: E402
from s4c.verify.noise import gumbel  # noqa: E402
from s4c.verify.rules import follow  # noqa: E402
from s4c.verify.scores import ALL_EXCLUDED, NOT_FINITE, choose  # noqa: E402
from s4c.verify.tree import listed_depths, root_only  # noqa: E402


@pytest.mark.parametrize("size", [1, 63, 64, 65, 5000])
@pytest.mark.parametrize(("seed", "stream", "position"), [(0, 0, 0), (7, 1, 300), (2**64 - 1, 3, 2**33 + 5)])
def test_the_noise_is_that_of_every_machine(size: int, seed: int, stream: int, position: int) -> None:
    got = fused_gumbel(seed, stream, position, size, DEVICE)
    assert torch.equal(got.cpu(), gumbel(seed, stream, position, size))


@pytest.mark.parametrize("columns", [1, 255, 4096, 9000])
def test_the_tokens_are_those_of_the_eager_operations(columns: int) -> None:
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
    tree = root_only(torch.zeros(9, dtype=torch.int64, device=DEVICE))
    given = [None if row is None else row.to(DEVICE) for row in noise]
    verdict = fused_judge(tree, logits.to(DEVICE), temperatures, given)
    assert torch.equal(verdict.tokens.cpu(), choose(cooled, None))
    assert verdict.tokens[1:4, 0].tolist() == [ALL_EXCLUDED, NOT_FINITE, NOT_FINITE]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_walk_is_that_of_the_coupled_rule(batch: int, seed: int) -> None:
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    nodes, columns = 12, 40
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
    tokens = choice.gather(1, parents.clamp(min=0))
    tokens = torch.where(torch.rand(batch, nodes, generator=generator) < 0.8, tokens, 1)
    candidate = torch.rand(batch, nodes, generator=generator) < 0.9
    candidate[:, 0] = False
    tree = DraftTree(tokens, parents, candidate, torch.zeros(batch, dtype=torch.bool))
    cold = all(t == 0 for t in temperatures)
    rows = [None if t == 0 else row.to(DEVICE) for t, each in zip(temperatures, noise, strict=True) for row in each]
    there = DraftTree(*(x.to(DEVICE) for x in (tokens, parents, candidate, tree.sampled)))
    got, wanted = fused_judge(there, logits.to(DEVICE), temperatures, [] if cold else rows), follow(tree, choice)
    longest = wanted.path.shape[1]
    for part in ("path", "tokens"):
        assert torch.equal(getattr(got, part)[:, :longest].cpu(), getattr(wanted, part)), part
        assert (getattr(got, part)[:, longest:] == getattr(got, part)[:, longest - 1 : longest]).all()
    assert torch.equal(got.accepted.cpu(), wanted.accepted)
    assert torch.equal(got.bonus.cpu(), wanted.bonus)
