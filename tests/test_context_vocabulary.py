"""The tokens of a text that a draft vocabulary lacks: which they are, and that their logits are the LM head's."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4c.drafters.vocabulary import ContextVocabulary
from s4c.models.loading import load_target
from s4c.models.native import library

EVEN = torch.arange(0, 64, 2)
RUNTIMES = ["torch", "hf", *(["native"] if library.problem() is None else [])]


@pytest.fixture(scope="module", params=RUNTIMES)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tiny_models.save(tmp_path_factory.mktemp("model"), "llama", tied=False)
    return load_target(str(directory), runtime=request.param)


@given(st.lists(st.lists(st.integers(0, 63), max_size=30), min_size=1, max_size=8), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_the_latest_tokens_are_known(target: Any, parts: list[list[int]], most: int) -> None:
    """A token counts from when it came in, and anew when it comes again after it was forgotten."""
    vocabulary = ContextVocabulary(target, EVEN, most)
    hidden = torch.randn(1, 3, target.spec.hidden_size)
    latest: list[int] = []
    for number, part in enumerate(parts):
        (vocabulary.add if number else vocabulary.start)(0, part)
        new = [token for token in dict.fromkeys(part) if token % 2 and token not in latest]
        latest = [*latest, *new][-most:]
        logits, ids = vocabulary.logits(hidden)
        assert ids.tolist() == sorted(latest)
        torch.testing.assert_close(logits, hidden @ target.head_weight(ids).float().T)


def test_each_sequence_knows_its_own(target: Any) -> None:
    vocabulary = ContextVocabulary(target, EVEN, 8)
    for slot, text in enumerate([[1, 2, 3], [], [3, 5, 7, 9]]):
        vocabulary.start(slot, text)
    hidden = torch.randn(3, 2, target.spec.hidden_size)
    logits, ids = vocabulary.logits(hidden)
    assert ids.tolist() == [1, 3, 5, 7, 9]
    known = logits[:, 0].isfinite()
    assert [ids[row].tolist() for row in known] == [[1, 3], [], [3, 5, 7, 9]]
    whole = hidden @ target.head_weight(ids).float().T
    torch.testing.assert_close(logits[logits.isfinite()], whole[logits.isfinite()])
    vocabulary.move(2, 0)
    _, ids = vocabulary.logits(hidden[:1])
    assert ids.tolist() == [3, 5, 7, 9]
    vocabulary.start(0, [11])
    assert vocabulary.logits(hidden[:1])[1].tolist() == [11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.skipif(library.problem() is not None, reason="needs the native runtime")
def test_rows_of_a_packed_matrix(dtype: torch.dtype) -> None:
    from s4c.models.native.linear import NativeLinear

    product = NativeLinear(torch.randn(37, 21), None, dtype)
    rows = torch.tensor([36, 0, 15, 16, 0])
    assert torch.equal(product.rows(rows), product.dense()[rows])
