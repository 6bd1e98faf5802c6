"""The kernels that a device has for sampling; the eager operations do without."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import torch

from s4c.models.native import library
from s4c.models.native.rows import native_gumbel, native_judge
from s4c.verify.noise import Gumbel
from s4c.verify.scores import Judge


def noise_kernel(device: torch.device) -> Gumbel | None:
    """What makes noise fast there; None where nothing does."""
    if _fuses(device):
        from s4c.models.fused import fused_gumbel

        return fused_gumbel
    return native_gumbel if library.problem() is None else None


def judge_kernel(device: torch.device, native: bool = False) -> Judge | None:
    """What judges trees fast there; None where nothing does. On a CPU that is for the native runtime."""
    if _fuses(device):
        from s4c.models.fused import fused_judge

        return fused_judge
    return native_judge if native else None


@cache
def _fuses(device: torch.device) -> bool:
    """Whether Triton is there and can compile; it needs a C compiler, and says so when the first kernel runs."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    from s4c.models.fused import fused_gumbel

    try:
        fused_gumbel(0, 0, 0, 1, device)
    except Exception as failure:
        warnings.warn(f"Triton cannot be used here, so sampling is slower: {failure}", stacklevel=2)
        return False
    return True
