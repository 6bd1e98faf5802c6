"""SDSAT by full fine-tuning, the paper's own way (arXiv 2403.18647): `s4c train --method sdsat --full`.

A copy of the whole target is trained together with the embeddings of the adaptive tokens. One pass reads a text and its
groups of adaptive tokens under the mask of the frozen training, gradients go through the rows of both, and

    loss = mean over the k positions of the loss of the groups' guesses
         + standard * cross-entropy of the standard tokens of the answers with the true tokens

where the second term holds the copy to what the target was. What comes of it is another model, with a text of its own:
it is saved beside the drafter, which is an ordinary one of rank 0 and drafts for that model alone.

The groups learn the law of the target that the training began with, from the features recorded with the text. The copy
would be a teacher that moves: its law would have to be computed anew in each step, and it could please its groups by
becoming easier to guess. The fixed law is another pull back to the target instead, and it is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s4c.drafters.base import DraftModel, Method, Prediction, Served, TrainingBatch, check_least
from s4c.drafters.sdsat import SDSATConfig, SDSATDrafter, SDSATModel
from s4c.models.base import Target
from s4c.models.llama import OpenModel
from s4c.models.tuned import TunedModel


@dataclass(frozen=True)
class FullConfig(SDSATConfig):
    """Sizes and options of a full fine-tuning.

    Attributes:
        rank: 0, since every weight is trained itself.
        standard: weight of the standard tokens' loss; at 0 nothing holds the model to its own text.
    """

    rank: int = 0
    standard: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank:
            raise ValueError(f"rank is {self.rank}; full fine-tuning has no low-rank terms: leave rank out, or give 0")
        check_least(self, standard=0)


class FullModel(SDSATModel):
    """The embeddings of the adaptive tokens and a copy of the target, trained together.

    Args:
        target: what the copy starts from; it is not changed.
        config: sizes and options.
        token_ids: [V] int64, the whole vocabulary.

    Raises:
        UnsupportedModel: the target's runtime is not torch.
    """

    config: FullConfig

    def __init__(self, target: Target, config: FullConfig, token_ids: Tensor) -> None:
        super().__init__(target, config, token_ids)
        self.tuned = TunedModel(self._target)

    def opened(self) -> OpenModel:
        return self.tuned.open()

    def predictions(self, batch: TrainingBatch) -> list[Prediction]:
        text, guesses = self.read(batch)
        return [*guesses, Prediction(text, self.opened().head, None, offset=1, weight=self.config.standard)]

    def start_from(self, other: DraftModel) -> None:
        """Go on with the adaptive tokens of a drafter of rank 0; the copy starts from the target all the same.

        Raises:
            ValueError: it is no such drafter, or has another number of tokens.
        """
        if not isinstance(other, SDSATModel) or other.config.rank or other.config.tokens != self.config.tokens:
            raise ValueError(
                f"full fine-tuning can start from the adaptive tokens of a drafter of {SDSATDrafter.name} with rank=0 "
                f"and tokens={self.config.tokens}; the given one has other settings: {other.config}"
            )
        with torch.no_grad():
            self.embeddings.copy_(other.embeddings)

    def served(self, target: Target) -> Served:
        """An ordinary drafter of rank 0, and a target of the present weights. No random number is drawn."""
        tuned = self.tuned.target()
        config = SDSATConfig(self.config.tokens, rank=0, groups=self.config.groups, fused=self.config.fused)
        with torch.random.fork_rng():
            model = SDSATModel(tuned, config, self.token_ids)
        model.start_from(self)
        return Served(model.eval(), tuned, self.tuned.save)


METHOD = Method(name=SDSATDrafter.name, config=FullConfig, model=FullModel)
