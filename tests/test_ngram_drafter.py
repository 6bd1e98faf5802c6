"""The lookup drafter: what it finds is what a slow search finds, whatever came in which round, slot or file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4c import LLM, SamplingParams
from s4c.drafters.base import Sequences
from s4c.drafters.ngram import LONGEST, OCCURRENCES, SHORTEST, Corpus, GrowingText, NgramDrafter, continuations
from s4c.types import DraftTree
from s4c.verify.tree import TreePlan

TEXTS = st.lists(st.integers(0, 2), min_size=0, max_size=OCCURRENCES)


def slow(text: list[int], corpus: list[int], depth: int, branches: int) -> list[tuple[list[int], int]]:
    """By the definition: every suffix, every place, the copy extended token by token."""
    found: list[tuple[list[int], int]] = []
    for length in range(min(LONGEST, len(text)), SHORTEST - 1, -1):
        places = [end for end in range(len(text) - 1, length - 1, -1) if text[end - length : end] == text[-length:]]
        paths = []
        for end in places:
            copied = list(text)
            for step in range(depth):
                copied.append(copied[end + step])
            paths.append(copied[len(text) :])
        known = range(LONGEST, len(corpus))
        matches = [end for end in known if corpus[end - length : end] == text[-length:]]
        matches.sort(key=lambda end: corpus[end - LONGEST : end][::-1])
        paths += [corpus[end : end + depth] for end in matches[:OCCURRENCES]]
        known_paths = [path for path, _ in found]
        new = [path for index, path in enumerate(paths) if path not in known_paths and path not in paths[:index]]
        found += [(path, length) for path in new]
    return found[:branches]


@given(TEXTS, TEXTS, TEXTS, st.integers(1, 5), st.integers(1, 4))
@settings(deadline=None, max_examples=300)
def test_what_is_found_is_what_a_slow_search_finds(
    first: list[int], second: list[int], corpus: list[int], depth: int, branches: int
) -> None:
    text = GrowingText(first)
    text.extend(second)
    expected = slow(first + second, corpus, depth, branches)
    assert continuations(text, Corpus(corpus), depth, branches) == expected
    if not corpus:
        assert continuations(text, None, depth, branches) == expected


def proposed(drafter: NgramDrafter, lines: list[list[int]], plan: str) -> DraftTree:
    return drafter.propose(Sequences(lines, None, False, TreePlan.parse(plan)))  # type: ignore[arg-type]


def started(lines: list[list[int]]) -> NgramDrafter:
    drafter = NgramDrafter()
    for slot, line in enumerate(lines):
        drafter.prefill(slot, torch.tensor(line[:-1], dtype=torch.int64), torch.zeros(0))
    return drafter


def test_going_on_is_starting_anew_and_slots_can_move() -> None:
    rng = random.Random(0)
    lines = [[rng.randrange(4) for _ in range(20)] for _ in range(3)]
    drafter = started(lines)
    for _ in range(10):
        assert torch.equal(proposed(drafter, lines, "best:9").tokens, proposed(started(lines), lines, "best:9").tokens)
        for line in lines:
            line += [rng.randrange(4) for _ in range(rng.randrange(1, 4))]
    expected = proposed(drafter, lines, "chain:6").tokens
    drafter.move(2, 0)
    assert torch.equal(proposed(drafter, [lines[2], lines[1]], "chain:6").tokens, expected[[2, 1]])
    drafter.prefill(0, torch.tensor([1, 2, 3, 1]), torch.zeros(0))
    assert proposed(drafter, [[1, 2, 3, 1, 2]], "chain:3").tokens.tolist() == [[2, 3, 1, 2]]


def test_each_token_is_taken_in_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    extend = GrowingText.extend
    monkeypatch.setattr(GrowingText, "extend", lambda text, tokens: (taken.extend(tokens), extend(text, tokens)))
    line = list(range(50))
    drafter = started([line])
    for token in range(50, 60):
        proposed(drafter, [line], "chain:4")
        line.append(token)
    assert taken == line[:-1]


def test_the_tree_merges_the_longest_match_first() -> None:
    line = [9, 5, 6, 1, 2, 7, 5, 6, 3, 8, 5, 6, 1, 4, 9, 5, 6]
    tree = proposed(started([line]), [line], "best:6x2")
    assert tree.tokens.tolist() == [[6, 1, 2, 4, 3, 8]]
    assert tree.parents.tolist() == [[-1, 0, 1, 1, 0, 4]]
    assert proposed(started([line]), [line], "chain:2").tokens.tolist() == [[6, 1, 2]]


def test_a_corpus_is_looked_up_and_changes_no_text(tmp_path: Path) -> None:
    target = str(tiny_models.save(tmp_path, "llama", tokenizer=True))
    llm = LLM(target, "none", threads=1)
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    plain = llm.generate([4, 5, 6], params)
    corpus = tmp_path / "what it writes+more.txt"
    corpus.write_text("nothing")
    llm.use(f"ngram={corpus}")
    assert llm.generate([4, 5, 6], params).token_ids == plain.token_ids
    llm.use(NgramDrafter(Corpus([4, 5, 6, *plain.token_ids])), "chain:8")
    found = llm.generate([4, 5, 6], params)
    assert found.token_ids == plain.token_ids
    assert found.stats.rounds < 8


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ngram=", r"must be written ngram\[=CORPUS.txt\]"),
        ("ngram=missing.txt", "corpus missing.txt must be a text file"),
        ("ngram=missing.txt+ngram", "corpus missing.txt must be a text file"),
        ("gram=corpus.txt", r"auto, none, shipped, ngram\[=CORPUS.txt\]"),
    ],
)
def test_a_wrong_spec_says_how_it_is_written(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(str(tiny_models.save(tmp_path, "llama")), spec, threads=1)


def test_a_corpus_needs_a_tokenizer(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("text")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        LLM(str(tiny_models.save(tmp_path, "llama")), f"ngram={corpus}", threads=1)
