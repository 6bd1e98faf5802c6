"""Who has the CPU's threads: the native runtime or torch, never both, for two pools would fight for the cores."""

from __future__ import annotations

import os

import torch

from s4c.models.base import Target

PER_PROCESSOR = 4
"""More threads than so many to a processor are refused: waiting for one another, they would bring the machine down."""


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that cannot be meant.

    Raises:
        ValueError: it is below 1 or far above the number of processors.
    """
    most = PER_PROCESSOR * (os.cpu_count() or 1)
    if threads is not None and not 1 <= threads <= most:
        raise ValueError(
            f"threads is {threads}; it must be from 1 to {most}, and the number of processors ({os.cpu_count()}) is "
            "mostly best"
        )


def share_threads(threads: int | None, target: Target) -> int:
    """Give the threads to what computes, the native runtime or torch, and say how many it has."""
    if target.runtime != "native":
        if threads is not None:
            torch.set_num_threads(threads)
        return torch.get_num_threads()
    from s4c.models.native import library

    if threads is not None:
        library.set_threads(threads)
    torch.set_num_threads(1)
    return library.threads()
