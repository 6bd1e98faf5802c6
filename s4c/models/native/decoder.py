"""A whole pass of a model in one call of the native kernels: embeddings, layers, LM head."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from s4c.models.native import library
from s4c.models.native.library import CDecoder, CEmbedding, numbers
from s4c.models.native.linear import NativeLinear
from s4c.models.native.stack import NativeStack
from s4c.types import DraftTree, TargetOutput
from s4c.verify.tree import lines


def c_embedding(weight: Tensor) -> CEmbedding:
    """Embeddings [V, d], float32 or bfloat16, which are to be kept alive."""
    assert weight.dtype in (torch.float32, torch.bfloat16)
    assert weight.is_contiguous()
    return CEmbedding(weight.data_ptr(), int(weight.dtype == torch.bfloat16))


class NativeDecoder:
    """Verifies draft trees.

    Args:
        embedding: [V, d], float32 or bfloat16.
        stack: the layers.
        head: the LM head.
    """

    def __init__(self, embedding: Tensor, stack: NativeStack, head: NativeLinear) -> None:
        self._kept = (embedding, stack, head)
        self._stack, self._width, self._outputs = stack, embedding.shape[1], head.shape[0]
        places = (ctypes.pointer(stack.c_stack), ctypes.pointer(stack.c_cache), ctypes.pointer(head.c))
        self._c = CDecoder(*places, c_embedding(embedding))

    def verify(self, tree: DraftTree, taps: Sequence[int]) -> TargetOutput:
        """See `Target.verify`.

        Raises:
            IndexError: a drafter guessed a token that is not in the vocabulary.
        """
        rows = lines(tree)
        batch, count = len(rows), tree.size
        lengths = self._stack.lengths[:batch]
        self._stack.reserve(batch, max(lengths) + count)
        features = torch.empty(batch, count, self._width * (1 + len(taps)))
        logits = torch.empty(batch, count, self._outputs)
        status = library.core().s4c_verify(
            ctypes.byref(self._c),
            numbers(*(tokens for tokens, *_ in rows)),
            batch,
            count,
            (ctypes.c_int32 * batch)(*lengths),
            numbers(*(parents for _, parents, *_ in rows)),
            (ctypes.c_int32 * len(taps))(*taps),
            len(taps),
            features.data_ptr(),
            logits.data_ptr(),
        )
        if status == -2:
            raise IndexError(
                f"a draft tree holds tokens from {min(min(row[0]) for row in rows)} to "
                f"{max(max(row[0]) for row in rows)}; the vocabulary has {self._outputs}, from 0 on"
            )
        library.check(status)
        return TargetOutput(logits, features)
