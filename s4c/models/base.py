"""What a target does: take a prompt in, check a draft tree in one pass, keep the accepted path.

A target holds a key-value cache with a row of slots. The running sequences of a batch of B always stand in
slots 0 .. B - 1, so a pass reads the cache without gathering it. The cache of a slot holds every committed
token but the last one: that one is the root of the next draft tree, and its own pass is the round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s4c.errors import UnsupportedModel
from s4c.models.adapter import Adapter
from s4c.types import DraftTree, TargetOutput, Verdict
from s4c.verify.scores import Judge


@dataclass(frozen=True)
class TargetSpec:
    """What the other rooms may know of a target.

    Attributes:
        name: as the user gave it.
        fingerprint: hash of the configuration and of a sample of the weights; a drafter names it.
        vocab_size: V, the number of rows of the LM head.
        hidden_size: d, the size of a feature.
        context_length: most tokens of one sequence, prompt and output together.
        eos_token_ids: the tokens with which the model ends a text.
    """

    name: str
    fingerprint: str
    vocab_size: int
    hidden_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """Logits of any shape bent into the range from -cap to cap; 0 leaves them as they are."""
    return cap * torch.tanh(logits / cap) if cap else logits


class Target(ABC):
    """A causal language model that verifies draft trees."""

    spec: TargetSpec
    device: torch.device
    dtype: torch.dtype
    runtime: str
    """What computes it: `native` (its drafters then run on the C++ kernels too), `torch` or `hf`."""

    judge: Judge | None = None
    """The runtime's kernel for the coupled rule; None where it has none."""

    weight_bytes: int
    """Bytes of weights that every pass reads."""

    layers: int
    """Its decoder layers."""

    softcap: float = 0.0
    """Its logits are what `head_weight` makes of its features, `soft_capped` by this; 0 leaves them as they are."""

    readable: bool = True
    """Whether that is all that it does to come to its logits, so that training can have its law from its features."""

    @abstractmethod
    def reserve(self, slots: int, length: int) -> None:
        """Make room for `slots` sequences of `length` cache rows each; what is cached stays."""

    @abstractmethod
    def prefill(self, slot: int, tokens: Tensor, taps: Sequence[int] = ()) -> Tensor:
        """Put a text into a slot, whatever the slot held before.

        Args:
            slot: index of the slot.
            tokens: [n] int64, n >= 0: the prompt, and what was written already if the engine was interrupted, without
                the last token, which is the next root.
            taps: numbers of layers, ascending, from 1 to `layers` - 1.

        Returns:
            [n, d (1 + taps)]: the feature at each of the tokens, then the hidden states behind so many layers.
        """

    @abstractmethod
    def verify(self, tree: DraftTree, taps: Sequence[int] = ()) -> TargetOutput:
        """One forward pass over a draft tree for the sequences in slots 0 .. B - 1.

        Each node sees the committed tokens of its sequence, its ancestors and itself. The cached length of
        no slot changes. With `taps`, as for `prefill`, the features are as wide as there. A node whose numbers
        are not finite spoils those alone that see it (on a GPU the other nodes of its tree as well).
        """

    @abstractmethod
    def commit(self, verdict: Verdict) -> None:
        """Append the root and the accepted path of the tree verified last to the cache of each slot."""

    @abstractmethod
    def move(self, source: int, destination: int) -> None:
        """Move the sequence in slot `source` to slot `destination`, whose sequence has ended."""

    @abstractmethod
    def length(self, slot: int) -> int:
        """Number of tokens cached in a slot."""

    @abstractmethod
    def twin(self) -> Target:
        """The same weights with an empty cache of their own, and without an adapter."""

    def adapt(self, adapter: Adapter | None) -> None:
        """Take an adapter, for the tokens from V on in draft trees, in place of the one before; None takes it away.

        The rows of all other tokens stay exactly what they are without it.

        Raises:
            UnsupportedModel: this runtime cannot.
        """
        raise UnsupportedModel(
            f"{self.spec.name} on the runtime {self.runtime} cannot adapt single rows of a pass, which the tokens of "
            "this drafter need; use the runtime native or torch, or another drafter"
        )

    @abstractmethod
    def embedding_weight(self) -> Tensor:
        """[V, d], the input embeddings, in the target's dtype."""

    @abstractmethod
    def head_weight(self, rows: Tensor | None = None) -> Tensor:
        """[R, d], the rows (all of them: None) of the LM head, in the target's dtype.

        Where the model scales what its head says, the rows are scaled.
        """

    @abstractmethod
    def final_norm_weight(self) -> Tensor | None:
        """[d], the weight of the final norm; None where that is no RMS norm."""
