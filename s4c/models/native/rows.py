"""What drafting and judging ask of rows of scores and of noise, on the native runtime.

A round touches no tensor operation where it can do without: after a pass over all weights the code of each has to come
from memory again, some tens of microseconds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from s4c.models.native import library
from s4c.types import DraftTree, Verdict
from s4c.verify.noise import CPU
from s4c.verify.tree import lines, top_and_total
from s4c.verify.verdict import ListedVerdict

MOST_TOP = 64
"""What core.h allows."""


def native_top_and_total(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`top_and_total` in one pass; its total adds up in another order."""
    if count > MOST_TOP:
        return top_and_total(scores, count)
    scores = scores.contiguous()
    shape, columns = scores.shape[:-1], scores.shape[-1]
    top, index = torch.empty(*shape, count), torch.empty(*shape, count, dtype=torch.int64)
    total = torch.empty(*shape, 1)
    pointers = (top.data_ptr(), index.data_ptr(), total.data_ptr())
    library.check(library.core().s4c_top(scores.data_ptr(), total.numel(), columns, count, *pointers))
    return top, index, total


def native_judge(
    tree: DraftTree, logits: Tensor, temperatures: Sequence[float], noise: Sequence[Tensor | None]
) -> Verdict:
    """The coupled rule in one call that looks at no row off the accepted path; see `s4c.verify.scores.Judge`."""
    assert logits.dtype == torch.float32
    assert logits.is_contiguous()
    batch, nodes, columns = logits.shape
    rows = lines(tree)
    assert (batch, nodes) == (len(rows), tree.size)
    tokens, parents = library.numbers(*(row[0] for row in rows)), library.numbers(*(row[1] for row in rows))
    candidate = (ctypes.c_bool * (batch * nodes))(*(flag for row in rows for flag in row[2]))
    cooling = (ctypes.c_float * batch)(*temperatures)
    noisy = library.pointers([None if row is None else row.data_ptr() for row in noise])
    addresses = [ctypes.addressof(part) for part in (tokens, parents, candidate)]
    held = (ctypes.addressof(cooling), ctypes.addressof(noisy) if noise else None)
    trees = library.CTrees(batch, nodes, len(noise) // batch, *addresses, *held)
    room = ctypes.c_int64 * (batch * nodes)
    paths, chosen, accepted = room(), room(), (ctypes.c_int64 * batch)()
    library.check(library.core().s4c_judge(ctypes.byref(trees), logits.data_ptr(), columns, paths, chosen, accepted))
    parts = [slice(b * nodes, b * nodes + count + 1) for b, count in enumerate(accepted)]
    return ListedVerdict([(paths[part], chosen[part]) for part in parts], CPU)


def native_gumbel(seed: int, stream: int, position: int, size: int, device: torch.device = CPU) -> Tensor:
    """`s4c.verify.noise.gumbel`, the same bit by bit."""
    row = torch.empty(size)
    library.check(library.core().s4c_noise(seed, stream, position, size, row.data_ptr()))
    return row.to(device)
