"""What followed in the text before: the law it joins, by its definition, and on the native kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4c.drafters import echo as module
from s4c.drafters.echo import WEIGHTS, Echo
from s4c.verify.tree import TreePlan

TOKENS = 6
TEXT = st.lists(st.integers(0, TOKENS - 1), min_size=1, max_size=40)


def heard_of(text: list[int], path: list[int], strength: float) -> list[float]:
    """What the text says for each token behind the tokens `path` below the root, its last token, word by word."""
    whole, heard = text + path, [0.0] * TOKENS
    for place in range(len(text) - 1):
        same = 0
        while same < len(WEIGHTS) and same <= place and text[place - same] == whole[len(whole) - 1 - same]:
            same += 1
        near = place >= len(text) - module.NEAR
        if same and (near or same >= module.TELLING):
            heard[text[place + 1]] += strength * WEIGHTS[same - 1]
    return heard


def law_of(text: list[int], path: list[int], law: list[float], ids: list[int], strength: float) -> list[float]:
    """q' of a node behind these tokens."""
    heard = heard_of(text, path, strength)
    joined = [q + heard[token] for q, token in zip(law, ids, strict=True)]
    return [q / sum(joined) for q in joined]


@given(st.lists(TEXT, min_size=1, max_size=3), st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_the_law_is_that_of_its_definition(
    texts: list[list[int]], strength: float, levels: int, data: st.DataObject
) -> None:
    ids = sorted(data.draw(st.sets(st.integers(0, TOKENS - 1), min_size=2)))
    echo = Echo(strength, TOKENS, torch.device("cpu"))
    for slot, text in enumerate(texts):
        echo.start(slot, text[:3])
        echo.add(slot, text[3:])
    generator = torch.Generator().manual_seed(len(texts[0]))
    builder = TreePlan.parse("best:20x9").grow(torch.tensor([text[-1] for text in texts]))
    for _ in range(levels):
        shape = (len(texts), builder.frontier.shape[1], len(ids))
        builder.extend(torch.randn(shape, generator=generator), torch.tensor(ids))
    logits = torch.randn(len(texts), builder.frontier.shape[1], len(ids), generator=generator)
    joined = echo.joined(logits, torch.tensor(ids), builder)
    for b, text in enumerate(texts):
        for w, node in enumerate(builder.frontier[b].tolist()):
            path: list[int] = []
            while node:
                path.insert(0, int(builder.tokens[b, node]))
                node = int(builder.parents[b, node])
            expected = law_of(text, path, logits[b, w].softmax(-1).tolist(), ids, strength)
            assert joined[b, w].softmax(-1).tolist() == pytest.approx(expected, abs=1e-5)


def test_far_places_speak_where_much_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEAR", 4)
    ids, logits = torch.arange(TOKENS), torch.zeros(1, 1, TOKENS)
    for text, heard in [([0, 1, 2, 3, 4, 4, 4, 4, 5, 2], False), ([0, 1, 2, 3, 4, 4, 4, 4, 0, 1, 2], True)]:
        echo = Echo(1.0, TOKENS, torch.device("cpu"))
        echo.start(0, text)
        joined = echo.joined(logits, ids, TreePlan.parse("chain:1").grow(torch.tensor([text[-1]])))
        assert (joined[0, 0, 3] > joined[0, 0, 0]) == heard


@given(TEXT, st.sampled_from([1.0, 3.0]), st.sampled_from([2, 5, module.NEAR]))
@settings(max_examples=60, deadline=None)
def test_in_training_each_position_hears_what_a_draft_there_would(text: list[int], strength: float, near: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NEAR", near)
        places = module.heard(torch.tensor(text), strength)
        for position in range(len(text)):
            said = [0.0] * TOKENS
            for token, weight in zip(text[1:], places[position].tolist(), strict=False):
                said[token] += weight
            assert said == pytest.approx(heard_of(text[: position + 1], [], strength))


def test_what_has_no_logit_stays_without() -> None:
    echo = Echo(1.0, TOKENS, torch.device("cpu"))
    echo.start(0, [1, 2, 1])
    logits = torch.tensor([[[0.0, -math.inf, 1.0]]])
    joined = echo.joined(logits, torch.tensor([1, 2, 3]), TreePlan.parse("chain:1").grow(torch.tensor([1])))
    assert joined.tolist() == [[[0.0, -math.inf, 1.0]]]


def test_a_text_moves_with_its_sequence() -> None:
    echo = Echo(1.0, TOKENS, torch.device("cpu"))
    for slot, text in enumerate([[1, 2], list(range(300))]):
        echo.start(slot, text)
    echo.move(1, 0)
    echo.add(0, [7])
    assert echo.kernels(1).tokens[0].tolist() == [*range(300), 7]
