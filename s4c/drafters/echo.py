"""What followed the last tokens where they stood in the text before: a cache language model beside a drafter's law.

A text repeats itself, and a drafter of a few layers is slow to notice. Of a node, each earlier place s of the text
whose last n tokens are those of the node's path speaks for the token that followed it, with a weight w(n) that grows
with n, and the drafter says

    q'(x) = (q(x) + sum of w(n_s) over the places s that were followed by x) / (1 + sum of all w(n_s))

The cache model is that of Kuhn and De Mori (1990), its place beside a neural law that of Grave et al.
(arXiv 1612.04426). The weights were chosen so that answers of the built-in model became probable, none of those that
drafters are measured on; temperature and level of the tree ask for hardly different ones (docs/ABLATIONS.md).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from s4c.models.native.draft import Texts
from s4c.types import placed
from s4c.verify.tree import TreeBuilder

WEIGHTS = (0.015, 0.18, 0.41, 1.5)
"""Of a place whose last 1, 2, 3, and 4 or more tokens are those of the path."""

NEAR, TELLING = 512, 3
"""Places further back speak only where so many tokens are the same: of frequent words there is no end."""


class Echo:
    """What the texts of the slots say of the children of nodes.

    Args:
        strength: what the weights are multiplied by.
        vocab_size: of the target.
        device: of the texts.
    """

    def __init__(self, strength: float, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._weights = torch.tensor([strength * weight for weight in WEIGHTS], dtype=torch.float32, device=device)
        self._texts: dict[int, array[int]] = {}

    def start(self, slot: int, tokens: Sequence[int]) -> None:
        """A sequence begins with these tokens."""
        self._texts[slot] = array("q", tokens)

    def add(self, slot: int, tokens: Sequence[int]) -> None:
        """It goes on with these."""
        self._texts[slot].extend(tokens)

    def move(self, source: int, destination: int) -> None:
        """The state of slot `source` becomes that of slot `destination`."""
        self._texts[destination] = self._texts.pop(source)

    def kernels(self, batch: int) -> Texts:
        """For native drafting in the first slots."""
        return Texts([self._texts[slot] for slot in range(batch)], self._weights, NEAR, TELLING)

    def joined(self, logits: Tensor, token_ids: Tensor, builder: TreeBuilder) -> Tensor:
        """Logits of q' from those of q; a token that has none gets none.

        Args:
            logits: [B, W, V'] float32, of the children of the builder's frontier, the roots the last tokens of the
                texts of the first B slots.
            token_ids: [V'] int64, the tokens of the columns.
            builder: the tree.
        """
        texts = [placed(np.array(self._texts[slot]), logits.device) for slot in range(logits.shape[0])]
        counts = placed([len(text) for text in texts], logits.device)[:, None]
        text = pad_sequence(texts, batch_first=True, padding_value=-1)
        places = torch.arange(text.shape[1] - 1, device=logits.device)
        same = (places < counts - 1)[:, None]
        length = torch.zeros(*logits.shape[:2], len(places), dtype=torch.int64, device=logits.device)
        for back, token in enumerate(_last_tokens(builder, text, counts)):
            shifted = F.pad(text, (back, 0), value=-1)[:, : len(places)]
            same = same & (shifted[:, None] == token[..., None]) & (token[..., None] >= 0)
            length += same
        heard = (length >= TELLING) | (places >= counts - NEAR)[:, None]
        weight = F.pad(self._weights, (1, 0))[length] * heard
        column = token_ids.new_full((self._vocab_size,), len(token_ids))
        column[token_ids] = torch.arange(len(token_ids), device=logits.device)
        total = logits.new_zeros(*logits.shape[:2], len(token_ids) + 1)
        following = column[text[:, 1:].clamp(min=0)][:, None].expand_as(length)
        total.scatter_add_(2, torch.where(length > 0, following, len(token_ids)), weight)
        said = logits.logsumexp(-1, keepdim=True) + total[..., :-1].log()
        return torch.where(logits.isneginf(), logits, torch.logaddexp(logits, said))


def heard(text: Tensor, strength: float) -> Tensor:
    """[n, n] of a text [n]: how loudly each place speaks, at each position, for the token that follows the place.

    It is what `Echo` adds to a law after so much of the text; places that a position has not left behind say nothing.
    """
    n = len(text)
    equal = text[:, None] == text
    same = equal & torch.ones_like(equal).tril(-1)
    length = same.long()
    for back in range(1, len(WEIGHTS)):
        same = same & F.pad(equal, (back, 0, back, 0))[:n, :n]
        length += same
    distance = torch.arange(1, n + 1, device=text.device)[:, None] - torch.arange(n, device=text.device)
    weights = torch.tensor([0.0, *WEIGHTS], device=text.device)[length] * strength
    return weights * ((length >= TELLING) | (distance <= NEAR))


def _last_tokens(builder: TreeBuilder, text: Tensor, counts: Tensor) -> list[Tensor]:
    """The tokens [B, W] of the frontier, those one before them, and so on up into the text; -1 where it begins."""
    found = []
    node, back = builder.frontier, torch.zeros_like(builder.frontier)
    for _ in WEIGHTS:
        place = counts - 1 - back
        before = torch.where(place >= 0, text.gather(1, place.clamp(min=0)), -1)
        found.append(torch.where(node > 0, builder.tokens.gather(1, node.clamp(min=0)), before))
        back = back + (node <= 0)
        node = torch.where(node > 0, builder.parents.gather(1, node.clamp(min=0)), -1)
    return found
