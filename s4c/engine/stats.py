"""What a request cost and how its rounds went."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

STEPS = ("draft", "verify", "judge", "commit", "schedule")
"""The steps of a round, in order."""


def clock(device: torch.device) -> float:
    """Seconds, with all work on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class Stats:
    """Figures of one request. Times are wall seconds; rounds of a batch count fully for each of its requests.

    Attributes:
        rule: that decided what stands; a lossy one is marked.
        rounds: target passes after the prefill.
        new_tokens: tokens generated, a closing end-of-sequence token included.
        acceptance_histogram: entry a is the number of rounds that committed a + 1 tokens.
        tree_sizes: rounds by the nodes of their trees, the root included.
        prefill_seconds: of prefills: one, unless rounds of the engine were broken off.
        decode_seconds: from the first round to the last.
        steps: seconds by step of the round.
    """

    rule: str = "coupled"
    rounds: int = 0
    new_tokens: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)
    tree_sizes: dict[int, int] = field(default_factory=dict)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))

    @property
    def mean_acceptance_length(self) -> float:
        """MAL: tokens committed per round, the bonus included; 1 for plain decoding."""
        return self.new_tokens / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens over decode seconds."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def record_round(self, tokens: int) -> None:
        """Count a round that committed `tokens` tokens."""
        self.rounds += 1
        self.new_tokens += tokens
        self.acceptance_histogram += [0] * (tokens - len(self.acceptance_histogram))
        self.acceptance_histogram[tokens - 1] += 1

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "rule": self.rule,
            "rounds": self.rounds,
            "new_tokens": self.new_tokens,
            "mean_acceptance_length": self.mean_acceptance_length,
            "acceptance_histogram": self.acceptance_histogram,
            "tree_sizes": dict(sorted(self.tree_sizes.items())),
            "tokens_per_second": self.tokens_per_second,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "steps": self.steps,
        }


class StepTimer:
    """Wall seconds of the steps of one round, one after the other."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STEPS, 0.0)
        self._step, self._started = "", 0.0

    def step(self, name: str) -> StepTimer:
        """Add the time of a block to a step."""
        self._step = name
        return self

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._step] += time.perf_counter() - self._started
