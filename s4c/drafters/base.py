"""What a drafter does: guess a tree of continuations, and learn from the verdict.

A drafter is one file of this room and one line of its table. It keeps its state per slot, as the target
does. The engine calls, for each round,

    tree = drafter.propose(sequences)          # candidates and probes
    drafter.commit(tree, verdict, output)      # the accepted path and its features
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4c.models.base import Target
from s4c.models.layers import packs
from s4c.types import DraftTree, TargetOutput, Verdict, placed
from s4c.verify.noise import CPU, DRAFT_STREAM, TARGET_STREAM
from s4c.verify.scores import Scores
from s4c.verify.tree import TreeBuilder, TreePlan, ancestors, root_only


@dataclass
class Sequences:
    """The running sequences as a drafter sees them; row b stands in slot b.

    Attributes:
        tokens: B lists of the committed tokens, prompt and output; the last one is the root.
        scores: the processors and the noise of the requests.
        sampled: whether children are to be drawn from the drafter's law with noise of their own (the
            rejection rule) and not with the target's noise (the coupled rule). Requests at temperature 0
            take the most probable children either way.
        plan: shape and size of the tree.
        device: of the tensors, which are made when they are first asked for.
    """

    tokens: list[list[int]]
    scores: Scores
    sampled: bool
    plan: TreePlan
    device: torch.device = CPU

    @property
    def roots(self) -> list[int]:
        """The last committed tokens."""
        return [line[-1] for line in self.tokens]

    @cached_property
    def root_tokens(self) -> Tensor:
        """[B] int64, the same."""
        return placed(self.roots, self.device)

    @cached_property
    def positions(self) -> Tensor:
        """[B] int64, where they stand (= the number of tokens that the target has cached)."""
        return placed([len(line) - 1 for line in self.tokens], self.device)


class Drafter(ABC):
    """A method that guesses what the target will write."""

    name: str
    default_tree: str
    """The tree to draft where none is asked for and none is planned, as `TreePlan.parse` reads it."""

    settings: str = ""
    """What sets it apart from others of its name, and so what its drafts cost."""

    planned: bool = False
    """Whether the engine plans its trees where none is asked for. Its trees then follow the plan of each round and say
    what it believes of their nodes; probes it adds to the candidates that the plan finds worth checking, where the plan
    has room for more than the root."""

    probes: int = 0
    """Most rows of probes in its trees, for each sequence; with probes only passes of the target tell what it would
    draft."""

    taps: tuple[int, ...] = ()
    """Layers of the target, ascending, whose hidden states it reads beside the feature. The features that it is given
    are [.., d (1 + taps)]: the feature itself, then these."""

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `slots` sequences of `length` tokens each; what is held stays."""

    def prefill(self, slot: int, tokens: Tensor, features: Tensor) -> None:
        """Start a sequence in a slot: [n] tokens of its text but the last, and their features [n, d (1 + taps)]."""

    @abstractmethod
    def propose(self, sequences: Sequences) -> DraftTree:
        """Guess a tree of continuations for each sequence."""

    def commit(self, tree: DraftTree, verdict: Verdict, output: TargetOutput) -> None:
        """Take in what the round accepted, and the target's features on the way."""

    def move(self, source: int, destination: int) -> None:
        """Move the state of slot `source` to slot `destination`, whose sequence has ended."""


@dataclass
class TrainingBatch:
    """Text that a target wrote, with what it thought on the way.

    Attributes:
        tokens: [B, T] int64, prompt and answer, padded at the end.
        features: [B, T, d (1 + taps)] float32, the target's feature at each token, and what the model taps.
        length: [B] int64, the number of tokens without padding.
        answer_start: [B] int64, the index of the first token that the target wrote itself.
    """

    tokens: Tensor
    features: Tensor
    length: Tensor
    answer_start: Tensor


@dataclass
class Prediction:
    """What one head says of every position of a training batch.

    It holds what the logits are made of, so that the loss pays for the positions and the tokens that count alone.

    Attributes:
        hidden: [B, T, h], what the drafter's LM head reads at each position (h is its own affair).
        head: [V', h], that LM head; with position t of `hidden` it gives the logits of token t + offset.
        features: [B, T, d], the head's guess of the target's feature at position t + offset - 1, or None
            where the method guesses none.
        offset: how far ahead of its position a prediction looks.
        made: [B, T] bool, the positions at which there is a prediction; None for all of them.
        weight: None for a head. What the target itself says where it is trained along (offset 1) is taught the true
            tokens of the answers alone, and this is the weight of that loss beside the heads'.
    """

    hidden: Tensor
    head: Tensor
    features: Tensor | None
    offset: int
    made: Tensor | None = None
    weight: float | None = None

    def logits(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """[M, V'] float32 of rows [M, h] of `hidden`, or [M, S] of the columns [S] of the drafter's vocabulary."""
        head = self.head if columns is None else self.head[columns]
        return F.linear(rows.to(head.dtype), head).float()


@dataclass(frozen=True)
class Served:
    """What a draft model in training is used as.

    Attributes:
        model: what drafts, and what is saved of it.
        target: what it drafts for.
        save_target: writes that target as a Hugging Face directory and gives its fingerprint; None where it is the
            one that the training began with.
    """

    model: DraftModel
    target: Target
    save_target: Callable[[Path], str] | None = None


class DraftModel(nn.Module, ABC):
    """The trained part of a drafter: its weights, its training forward pass, its way into the engine.

    Attributes:
        config: a dataclass of plain values; it becomes the config.json of the checkpoint.
        token_ids: [V'] int64 buffer, ascending: the target's token of each column of the drafter's logits.
        taps: layers of the target, ascending, whose hidden states it reads beside the feature.
        beyond: whether it may draft tokens of a sequence's text beyond its vocabulary, by the target's own rows.
        echo: how loud the text is beside its law, see echo.py.
    """

    config: Any
    token_ids: Tensor
    taps: tuple[int, ...] = ()
    beyond: bool = False
    echo: float = 0.0

    @abstractmethod
    def predictions(self, batch: TrainingBatch) -> list[Prediction]:
        """One prediction per head, in drafting order, the heads unrolled as in drafting."""

    def start_from(self, other: DraftModel) -> None:
        """Go on with the weights of another model of this method, whose draft vocabulary may be another one.

        Raises:
            ValueError: its sizes are others, or it has weights for each token of another vocabulary.
        """
        state = self.completed({name: value for name, value in other.state_dict().items() if name != "token_ids"})
        same_tokens = torch.equal(self.token_ids, other.token_ids)
        for name, weight in self.named_parameters():
            if name not in state or state[name].shape != weight.shape:
                raise ValueError(
                    f"{name} is not in the drafter to start from, or has another size; its settings differ"
                )
            if not same_tokens and len(weight) == len(self.token_ids):
                raise ValueError(f"{name} belongs to the tokens of another draft vocabulary; start from a tied LM head")
        self.load_state_dict(state, strict=False)

    def completed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights to start from, with those that they lack of parts that change nothing until they are trained."""
        return state

    def served(self, target: Target) -> Served:
        """With the target that it was made for, unless training changes that one: then with what it is by now."""
        return Served(self, target)

    @abstractmethod
    def drafter(self, target: Target, dtype: torch.dtype | None = None) -> Drafter:
        """A drafter that runs on a copy of the present weights, in the target's dtype unless one is given."""


def check_least(config: Any, **least: float) -> None:
    """See that settings of a configuration are finite and no smaller than the numbers given by their names.

    Raises:
        ValueError: one is.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if not bound <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be at least {bound}, and finite")


def drafting_dtype(target: Target) -> torch.dtype:
    """The fastest: the drafter's precision changes how much is accepted, never what is written."""
    if target.runtime == "native":
        return torch.int8
    return torch.bfloat16 if packs(torch.bfloat16, target.device) else target.dtype


@dataclass(frozen=True)
class Method:
    """A line of the table of drafters.

    Attributes:
        name: what users call it.
        create: makes a drafter that is not trained here, from a target and what the user wrote after `NAME=` ("" where
            there was no more than the name); None for methods that are always trained.
        form: how users write that, `NAME`, `NAME=THIS` or `NAME[=THIS]`; the name alone unless given.
        config: the configuration dataclass of a trained method; None where there is nothing to train.
        model: makes the draft model from a target, a configuration and the draft vocabulary's token ids
            [V']; its weights are those that training starts from. None where there is nothing to train.
    """

    name: str
    create: Callable[[Target, str], Drafter] | None = None
    form: str = ""
    config: type | None = None
    model: Callable[[Target, Any, Tensor], DraftModel] | None = None


def extend(sequences: Sequences, builder: TreeBuilder, logits: Tensor, token_ids: Tensor | None = None) -> None:
    """Grow a tree by the children of its frontier, as the rule of the round wants them drawn.

    Under the coupled rule the children are the top k of log q plus the target's own noise. Under the
    rejection rule they are draws without replacement from q, with noise of the drafter's own, in trees whose
    shape does not depend on the draws, and the most probable tokens in `best` trees, whose shape would.

    Args:
        logits: [B, W, V'] float32, of the children of `builder.frontier`; [B, 1, V'] where those of all its nodes are
            the same.
        token_ids: [V'] int64, the target's token of each column; None for the whole vocabulary.
    """
    scores = sequences.scores
    draws = _draws(sequences, builder.plan)
    if draws or scores.uses_history:  # so that each node has a law of its own
        logits = logits.expand(-1, builder.frontier.shape[1], -1)
    if scores.uses_history and builder.level:
        on_path = ancestors(builder.parents)[:, :, 1:]
        frontier = builder.frontier[..., None].expand(-1, -1, on_path.shape[-1])
        processed = scores.process(logits, builder.tokens[:, 1:], on_path.gather(1, frontier), token_ids)
    else:
        processed = scores.process(logits, token_ids=token_ids)
    noise = None
    if draws or not sequences.sampled:
        positions = (sequences.positions + builder.level + 1)[:, None].expand(-1, logits.shape[1])
        noise = scores.noise(positions, DRAFT_STREAM if draws else TARGET_STREAM, token_ids)
    law = None
    if draws:
        law = processed.log_softmax(-1)
        if token_ids is not None:
            law = law.new_full((*law.shape[:2], scores.vocab_size), -torch.inf).index_copy_(2, token_ids, law)
    builder.extend(processed if noise is None else processed + noise, token_ids, law)


def _draws(sequences: Sequences, plan: TreePlan) -> bool:
    """Whether children are drawn from the drafter's law with noise of their own."""
    return sequences.sampled and plan.kind != "best" and not sequences.scores.greedy


def noise_by_level(sequences: Sequences, plan: TreePlan) -> list[Tensor | None] | None:
    """What `extend` adds to log q at the requests' temperatures, where it does nothing else: for native drafting.

    Returns:
        B times D rows [V] of noise, of the levels of each sequence, None where there is none; None in place of the
        list where more is asked of `extend` than temperature and noise.
    """
    if _draws(sequences, plan) or not sequences.scores.only_cools:
        return None
    lines, levels = sequences.tokens, range(plan.depth)
    if sequences.sampled or sequences.scores.greedy:
        return [None] * (len(lines) * plan.depth)
    return [sequences.scores.noise_row(b, len(line) + level) for b, line in enumerate(lines) for level in levels]


def finish(sequences: Sequences, builder: TreeBuilder) -> DraftTree:
    """The grown tree, marked with how its children were drawn."""
    if not sequences.sampled or builder.plan.kind == "best":
        return builder.finish()
    temperatures = [request.temperature for request in sequences.scores.params]
    return builder.finish(placed(temperatures, sequences.device) > 0)


class NoDrafter(Drafter):
    """Plain decoding: a tree of the root alone."""

    name = "none"
    default_tree = "chain:1"

    def propose(self, sequences: Sequences) -> DraftTree:
        return root_only(sequences.roots, sequences.device)
