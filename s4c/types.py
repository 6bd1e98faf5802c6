"""What the rooms hand to each other, and the legend of shapes.

    B  sequences of the batch, one slot each          N  nodes of a draft tree, the root in column 0
    V  vocabulary of the target                       W  nodes that a drafter expands at one level
    d  hidden size of the target                      D  depth of a tree (the root has depth 0)

The words (round, root, node, probe, verdict, feature) are those of the README.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

LARGEST = 1e6
"""Bound on temperature, penalties and biases: float32 sums of logits stay finite below it."""

_PENALTY = f"a number from {-LARGEST:g} to {LARGEST:g} (0 is off)"


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. The defaults are greedy decoding.

    The processors act in this order, each on the outcome of the one before: repetition, presence and
    frequency penalty, logit bias, bad words, temperature, top-k, top-p, min-p.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: 0 takes the most probable token; from 1e-6 up it divides the logits.
        top_k: keep the k most probable tokens (and ties of the k-th); 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose mass reaches top_p, in (0, 1].
        min_p: keep tokens at least min_p times as probable as the most probable one, in [0, 1].
        repetition_penalty: from 1e-6 up; divides positive and multiplies negative logits of the tokens that
            stand in the prompt or the output.
        presence_penalty: subtracted from the logits of tokens that stand in the output.
        frequency_penalty: subtracted once for each time that the token stands in the output.
        logit_bias: token id to a number added to its logit; -inf forbids the token.
        bad_words: sequences of token ids that may not appear in the output.
        stop: strings at which the output ends; the string itself is not part of the text.
        stop_token_ids: tokens that end the output; the token is part of the token ids.
        ignore_eos: go on after the model's own end-of-sequence token.
        logprobs: report the log-probability of each generated token under the processed law.
        seed: the noise of the request is a function of it alone; None draws a fresh one.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[Sequence[int]] = ()
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    seed: int | None = 0

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, holds, allowed in (
            ("max_new_tokens", _integer(self.max_new_tokens, 1), "an integer of at least 1"),
            (
                "temperature",
                _number(self.temperature, 0, 0) or _number(self.temperature, 1e-6, LARGEST),
                f"0 (greedy), or a number from 1e-6 to {LARGEST:g}",
            ),
            ("top_k", _integer(self.top_k, 0), "an integer: 0 (off) or above"),
            ("top_p", _number(self.top_p, 0, 1) and self.top_p > 0, "a number above 0 and at most 1 (off)"),
            ("min_p", _number(self.min_p, 0, 1), "a number from 0 (off) to 1"),
            (
                "repetition_penalty",
                _number(self.repetition_penalty, 1e-6, LARGEST),
                f"a number from 1e-6 to {LARGEST:g} (1 is off)",
            ),
            ("presence_penalty", _number(self.presence_penalty, -LARGEST, LARGEST), _PENALTY),
            ("frequency_penalty", _number(self.frequency_penalty, -LARGEST, LARGEST), _PENALTY),
            (
                "logit_bias",
                isinstance(self.logit_bias, Mapping)
                and all(_integer(t, 0) and _number(b, -math.inf, LARGEST) for t, b in self.logit_bias.items()),
                f"a mapping of token ids to numbers of at most {LARGEST:g} (-inf forbids the token)",
            ),
            (
                "bad_words",
                _list(self.bad_words) and all(_token_ids(word) and len(word) > 0 for word in self.bad_words),
                "a list of non-empty lists of token ids",
            ),
            (
                "stop",
                _list(self.stop) and all(isinstance(text, str) and text for text in self.stop),
                "a string or a list of strings, none of them empty",
            ),
            ("stop_token_ids", _token_ids(self.stop_token_ids), "a list of token ids"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "True or False"),
            ("logprobs", isinstance(self.logprobs, bool), "True or False"),
            ("seed", self.seed is None or _integer(self.seed, 0, 2**64 - 1), "an integer from 0 to 2**64 - 1, or None"),
        ):
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")

    @property
    def needs_history(self) -> bool:
        """Whether the law of a token depends on more than its logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or bool(self.bad_words)
        )


def _number(value: object, low: float, high: float) -> bool:
    """Whether a value is a number in [low, high]; NaN and bool are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(value <= high and not value < low)


def _integer(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def _list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _token_ids(value: Sequence[int]) -> bool:
    return _list(value) and all(_integer(token, 0) for token in value)


def placed(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of numbers in lists, on a device; nobody waits for what a GPU still has to do."""
    made = torch.tensor(numbers, dtype=dtype)
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)


@dataclass
class DraftTree:
    """The nodes of one round, for each sequence of the batch.

    Attributes:
        tokens: [B, N] int64, the token of each node; column 0 is the root.
        parents: [B, N] int64, the column of each node's parent, smaller than its own; -1 for the root.
            Siblings stand in the order in which they were drawn.
        candidate: [B, N] bool, whether the node may be accepted. False for the root, for probes (whose
            outputs go back to the drafter) and for padding.
        sampled: [B] bool, whether the children of a node are draws without replacement from the drafter's
            law, independent of everything else (True), or a function of it (False). It decides which form
            of the rejection rule is exact.
        log_q: [B, N, V] float32, the drafter's law of the children of each node; None when no row is
            sampled. Rows of nodes without children are not read.
        belief: [B, M, N] float32, what each of the M drafters that made the tree thinks of it: the log-probability of
            the path to each node, NaN at nodes that this one did not guess. None where they do not say; the planner
            then takes the tree as it is.
    """

    tokens: Tensor
    parents: Tensor
    candidate: Tensor
    sampled: Tensor
    log_q: Tensor | None = None
    belief: Tensor | None = field(default_factory=lambda: None)  # of instances alone: a ListedTree makes it late

    @property
    def size(self) -> int:
        return self.tokens.shape[1]

    @property
    def device(self) -> torch.device:
        """Where its tensors are, or will be made."""
        return self.tokens.device


@dataclass
class TargetOutput:
    """What a pass of the target over a draft tree gives.

    Attributes:
        logits: [B, N, V] float32, of the token after each node.
        features: [B, N, d], the target's hidden state after its final norm at each node; behind it those of the
            layers that were tapped, d each.
    """

    logits: Tensor
    features: Tensor


@dataclass
class Verdict:
    """The accepted path of each sequence, and the token that the target adds itself.

    Attributes:
        path: [B, D + 1] int64, columns of the accepted nodes, the root first; entries after
            `accepted` repeat the last accepted one.
        accepted: [B] int64, the number of accepted nodes, the root not counted.
        bonus: [B] int64, the token after the path; negative where the target has no law there (verify/scores.py).
        tokens: [B, D + 1] int64, the tokens that the round commits: those of the accepted nodes, then
            the bonus; entries after it repeat the bonus.
    """

    path: Tensor
    accepted: Tensor
    bonus: Tensor
    tokens: Tensor

    @cached_property
    def lines(self) -> list[tuple[list[int], list[int]]]:
        """Of each sequence the columns of the root and the accepted nodes, and the tokens that it commits, as many."""
        width = self.path.shape[1]
        rows = torch.cat([self.path, self.tokens, self.accepted[:, None]], 1).tolist()  # a device is waited for once
        return [(row[: row[-1] + 1], row[width : width + row[-1] + 1]) for row in rows]
