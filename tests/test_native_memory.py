"""Memory in large pages."""

from __future__ import annotations

import pytest
import torch

from s4c.models.native import memory


@pytest.mark.parametrize("rows", [3, 3000])
def test_zeros_lie_in_large_pages_where_they_fill_one(rows: int) -> None:
    first, second = (memory.zeros([2, rows, 200], torch.bfloat16) for _ in range(2))
    assert first.shape == (2, rows, 200)
    assert first.dtype == torch.bfloat16
    assert first.is_contiguous()
    first += 1
    assert not second.any()
    if first.nbytes >= memory.PAGE:
        assert first.data_ptr() % memory.PAGE == 0
