"""Verdicts made of lists: a round goes on with numbers, and a tensor of a few of them costs it tens of microseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from s4c.types import Verdict, placed


class ListedVerdict(Verdict):
    """A verdict made of lists. A tensor of it is made when it is first asked for.

    Args:
        lines: see `Verdict.lines`.
        device: of the tensors.
    """

    def __init__(self, lines: Sequence[tuple[list[int], list[int]]], device: torch.device) -> None:
        self.lines = list(lines)
        self._device = device

    def __getattr__(self, name: str) -> Any:
        if name not in ("path", "accepted", "bonus", "tokens"):
            raise AttributeError(f"a verdict has no {name}")
        longest = max(len(path) for path, _ in self.lines)
        numbers = {
            "path": [path + path[-1:] * (longest - len(path)) for path, _ in self.lines],
            "accepted": [len(path) - 1 for path, _ in self.lines],
            "bonus": [tokens[-1] for _, tokens in self.lines],
            "tokens": [tokens + tokens[-1:] * (longest - len(tokens)) for _, tokens in self.lines],
        }
        made = placed(numbers[name], self._device)
        setattr(self, name, made)
        return made


def settled(verdict: Verdict) -> Verdict:
    """The verdict with token 0 for each bonus that marks a missing law: for whoever takes nothing but tokens."""
    if all(tokens[-1] >= 0 for _, tokens in verdict.lines):
        return verdict
    lines = [(path, [max(token, 0) for token in tokens]) for path, tokens in verdict.lines]
    return ListedVerdict(lines, verdict.path.device)
