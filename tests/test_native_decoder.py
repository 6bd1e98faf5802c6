"""A whole pass in one call is its parts, bit by bit: embeddings, layers, LM head."""

from __future__ import annotations

import pytest
import torch
from test_native import SETS, SMALL, computing, each_dtype, each_set, random, stack_of

from s4c.models.native.decoder import NativeDecoder
from s4c.models.native.linear import NativeLinear
from s4c.models.native.stack import NativeStack
from s4c.verify.noise import CPU
from s4c.verify.tree import ListedTree

VOCABULARY = 50
TREES = ([7, 3, 49, 3, 0], [-1, 0, 0, 1, 3]), ([1, 1, 2, 3, 4], [-1, 0, 1, 2, 3])

pytestmark = pytest.mark.skipif(not SETS, reason="the C++ core is not built")


@each_set
@each_dtype
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("taps", [(), (1,)])
@pytest.mark.parametrize("half", [False, True])
def test_a_whole_pass_is_its_parts(
    name: str, dtype: torch.dtype, threads: int, taps: tuple[int, ...], half: bool
) -> None:
    embedding = random(VOCABULARY, SMALL.hidden).to(torch.bfloat16 if half else torch.float32)
    head = NativeLinear(random(VOCABULARY, SMALL.hidden, seed=1), None, dtype)
    tree = ListedTree([(tokens, parents, [False] * 5, []) for tokens, parents in TREES], CPU)
    with computing(name, threads):
        stack = stack_of(SMALL, dtype)
        assert isinstance(stack, NativeStack)
        for slot, length in enumerate((4, 17)):
            stack.run(random(1, length, SMALL.hidden, seed=slot), torch.arange(-1, length - 1)[None], slot)
            stack.keep(slot, list(range(length)))
        features = stack.run(embedding[tree.tokens], tree.parents, taps=taps)
        output = NativeDecoder(embedding, stack, head).verify(tree, taps)
        assert torch.equal(output.features, features)
        assert torch.equal(output.logits, head(features[..., : SMALL.hidden]))


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    stack = stack_of(SMALL, torch.float32)
    assert isinstance(stack, NativeStack)
    stack.reserve(1, 16)
    weight = random(VOCABULARY, SMALL.hidden)
    decoder = NativeDecoder(weight, stack, NativeLinear(weight, None, torch.float32))
    with pytest.raises(IndexError, match="the vocabulary has 50"):
        decoder.verify(ListedTree([([1, token], [-1, 0], [False, True], [])], CPU), ())
