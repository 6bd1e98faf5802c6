"""N-gram lookup: what followed the last tokens when they stood in the text before.

It needs no training and no model. The longest suffix of the text that occurred earlier (up to `LONGEST` tokens) is
looked up, in the sequence itself and then in a corpus where one was given, the most recent occurrence first; then the
shorter suffixes. What followed, merged, is the draft tree.

    --drafter ngram                  prompt and output
    --drafter ngram=handbook.txt     and a text file

The index of a sequence grows with its text and that of the corpus is sorted once, so a round costs a few look-ups,
however long they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from s4c.drafters.base import Drafter, Method, Sequences
from s4c.models.base import Target
from s4c.models.loading import load_tokenizer, resolve
from s4c.types import DraftTree
from s4c.verify.tree import from_paths

LONGEST, SHORTEST = 4, 2
CONTINUATIONS = 4
DEPTH = 8
OCCURRENCES = 16
"""Most places of one suffix that are looked at."""


class GrowingText:
    """A text with an index of its n-grams that takes in each token once.

    Attributes:
        tokens: the text so far.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        for token in tokens:
            end = len(self.tokens)
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._places.setdefault(tuple(self.tokens[-length:]), []).append(end)
            self.tokens.append(token)

    def after(self, suffix: Sequence[int], depth: int) -> Iterator[list[int]]:
        """What followed an n-gram, the most recent place first; a copy that reaches the end goes on in a circle."""
        for place in reversed(self._places.get(tuple(suffix), [])[-OCCURRENCES:]):
            path = self.tokens[place : place + depth]
            yield (path * depth)[:depth]


class Corpus:
    """A fixed text, its n-grams sorted.

    Args:
        tokens: the text.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = np.asarray(tokens, dtype=np.int32)
        ends = np.arange(LONGEST, max(LONGEST, len(tokens)))
        before = [self._tokens[ends - back] for back in range(1, LONGEST + 1)]
        order = np.lexsort(before[::-1])
        self._ends = ends[order]
        self._before = [column[order] for column in before]

    def after(self, suffix: Sequence[int], depth: int) -> Iterator[list[int]]:
        """What followed an n-gram of up to `LONGEST` tokens."""
        low, high = 0, len(self._ends)
        for column, token in zip(self._before, reversed(suffix), strict=False):
            inside = column[low:high]
            low, high = low + np.searchsorted(inside, token), low + np.searchsorted(inside, token, side="right")
        for end in self._ends[low:high][:OCCURRENCES]:
            yield self._tokens[end : end + depth].tolist()


class NgramDrafter(Drafter):
    """Continuations of earlier occurrences of the present suffix.

    Args:
        corpus: where to look beside the sequence itself.
    """

    name = "ngram"
    planned = True
    default_tree = f"chain:{DEPTH}"

    def __init__(self, corpus: Corpus | None = None) -> None:
        self._corpus = corpus
        self._texts: dict[int, GrowingText] = {}

    def prefill(self, slot: int, tokens: Tensor, features: Tensor) -> None:
        self._texts[slot] = GrowingText(tokens.tolist())

    def propose(self, sequences: Sequences) -> DraftTree:
        plan = sequences.plan.deepened(DEPTH)
        branches = 1 if plan.kind == "chain" else CONTINUATIONS
        paths, chances = [], []
        for slot, tokens in enumerate(sequences.tokens):
            text = self._texts[slot]
            text.extend(tokens[len(text.tokens) :])
            found = continuations(text, self._corpus, plan.depth, branches)
            paths.append([path for path, _ in found])
            chances.append([(1 - 0.5 ** (length - 1)) / (1 + rank) for rank, (_, length) in enumerate(found)])
        return from_paths(sequences.roots, paths, plan.nodes, chances, sequences.device)

    def move(self, source: int, destination: int) -> None:
        self._texts[destination] = self._texts.pop(source)


def continuations(text: GrowingText, corpus: Corpus | None, depth: int, branches: int) -> list[tuple[list[int], int]]:
    """Up to `branches` continuations of up to `depth` tokens, each with the length of its match, the longest first."""
    found: list[tuple[list[int], int]] = []
    for length in range(min(LONGEST, len(text.tokens)), SHORTEST - 1, -1):
        for source in (text, corpus) if corpus else (text,):
            for path in source.after(text.tokens[-length:], depth):
                if path not in (other for other, _ in found):
                    found.append((path, length))
                if len(found) == branches:
                    return found
    return found


def read_corpus(path: Path, target: Target) -> Corpus:
    """A text file as the target reads it.

    Raises:
        ValueError: it cannot be read, or the target has no tokenizer.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the corpus {path} must be a text file in UTF-8 ({error})") from error
    return Corpus(load_tokenizer(resolve(target.spec.name)).encode(text, add_special_tokens=False))


def create(target: Target, corpus: str) -> NgramDrafter:
    """The drafter; a corpus of the name "" is none."""
    return NgramDrafter(read_corpus(Path(corpus), target) if corpus else None)


METHOD = Method(name=NgramDrafter.name, create=create, form="ngram[=CORPUS.txt]")
