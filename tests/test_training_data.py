import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4c.training.data import Row, batch_order, collate, frequent_tokens, read_prompts, read_rows, split, truncate

GOOD = {"prompt_ids": [1, 2], "answer_ids": [3], "temperature": 0.8, "source": "a"}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def row(prompt: tuple[int, ...], answer: tuple[int, ...] = (1,)) -> Row:
    return Row(prompt, answer, 0.0, "test")


def test_rows_of_several_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", GOOD, "", GOOD)
    second = write(tmp_path / "b.jsonl", {"prompt_ids": [4], "answer_ids": [5, 6]})
    assert read_rows([first, second], 7) == [
        *[Row((1, 2), (3,), 0.8, "a")] * 2,
        Row((4,), (5, 6), 0.0, "unknown"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt_ids": [1', "line 2: not JSON"),
        ("[1, 2]", "line 2: list where a JSON object is wanted"),
        ({"prompt_ids": [1]}, "line 2: answer_ids is missing"),
        ({**GOOD, "answer_ids": []}, r"line 2: answer_ids is \[\]"),
        ({**GOOD, "prompt_ids": [1, "x"]}, "line 2: prompt_ids is"),
        ({**GOOD, "prompt_ids": [1, True]}, "line 2: prompt_ids is"),
        ({**GOOD, "answer_ids": [1, 7]}, "line 2: answer_ids holds 7, but this target's tokens go from 0 to 6"),
        ({**GOOD, "answer_ids": [-1]}, "line 2: answer_ids holds -1"),
        ({**GOOD, "temperature": "hot"}, "line 2: temperature is 'hot'"),
        ({**GOOD, "temperature": float("nan")}, "line 2: temperature is nan"),
    ],
)
def test_bad_row_names_file_and_line(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, line)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, {message}"):
        read_rows([path], 7)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt"])
def test_empty_or_missing_file(tmp_path: Path, name: str) -> None:
    read = read_prompts if name.endswith("txt") else lambda path: read_rows([path], 7)
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / name)
    with pytest.raises(ValueError, match=r"empty|no prompt"):
        read(write(tmp_path / name, "", "  "))


def test_prompts_in_every_form(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    lines = write(
        tmp_path / "p.jsonl", {"prompt": "one", "source": "x"}, {"turns": ["two", "later"]}, {"messages": chat}
    )
    prompts = read_prompts(lines)
    assert [p.messages for p in prompts] == [
        ({"role": "user", "content": "one"},),
        ({"role": "user", "content": "two"},),
        tuple(chat),
    ]
    assert [p.source for p in prompts] == ["x", "prompt", "prompt"]
    plain = read_prompts(write(tmp_path / "p.txt", "one", "", " two "))
    assert [p.messages[0]["content"] for p in plain] == ["one", "two"]


@pytest.mark.parametrize(
    "line",
    [
        {"text": "x"},
        {"prompt": "a", "turns": ["b"]},
        {"prompt": " "},
        {"prompt": 3},
        {"turns": []},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
    ],
)
def test_bad_prompt_names_file_and_line(tmp_path: Path, line: object) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2: "):
        read_prompts(path)


def test_truncate_cuts_answers_and_drops_full_prompts() -> None:
    rows = [row((1, 2), (3, 4, 5)), row((1, 2, 3, 4), (5,)), row((1, 2, 3), (4,))]
    assert truncate(rows, 4) == [row((1, 2), (3, 4)), row((1, 2, 3), (4,))]


def test_a_prompt_is_on_one_side_only() -> None:
    rows = [row((i % 300, 7), (j,)) for j in range(2) for i in range(300)]
    train, held = split(rows, 0.2)
    assert not {r.prompt_ids for r in train} & {r.prompt_ids for r in held}
    assert len(train) + len(held) == 600
    # 300 prompts, each held out with chance 0.2: 60 within five standard deviations of 6.9 each.
    assert 25 <= len(held) / 2 <= 95
    assert split(rows[::-1], 0.2)[1] == held[::-1]
    assert split(rows, 0.0) == (rows, [])


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 200), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_batches_hold_each_row_once_within_the_budget(lengths: list[int], budget: int, seed: int) -> None:
    batches = batch_order(lengths, budget, seed, epoch=1)
    assert sorted(r for batch in batches for r in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[r] for r in batch) <= budget
    assert batches == batch_order(lengths, budget, seed, epoch=1)


def test_order_changes_with_seed_and_epoch_and_wastes_little() -> None:
    lengths = torch.randint(20, 500, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    orders = [batch_order(lengths, 4096, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    padded = sum(len(batch) * max(lengths[r] for r in batch) for batch in orders[0])
    assert padded < 1.15 * sum(lengths)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1, max_size=10), st.integers(2, 10))
@settings(max_examples=60, deadline=None)
def test_frequent_tokens(answers: list[list[int]], size: int) -> None:
    found = frequent_tokens([row((0,), tuple(a)) for a in answers], size, 10, always=(9, 4)).tolist()
    counts = Counter(token for answer in answers for token in answer)
    ranked = sorted(set(range(10)) - {9, 4}, key=lambda token: (-counts[token], token))
    assert found == sorted([9, 4, *ranked[: size - 2]])


def test_an_end_that_the_vocabulary_lacks_takes_no_place() -> None:
    assert frequent_tokens([row((0,), (7, 7, 3))], 2, 10, always=(5, 10, -1)).tolist() == [5, 7]


@pytest.mark.parametrize("size", [0, 1, 11])
def test_frequent_tokens_of_impossible_size(size: int) -> None:
    with pytest.raises(ValueError, match="must have 2 to 10"):
        frequent_tokens([row((0,))], size, 10, always=(1, 2))


def test_collate_pads_at_the_end() -> None:
    rows = [row((1, 2), (3,)), row((4,), (5,))]
    features = [torch.ones(3, 2, dtype=torch.bfloat16), 2 * torch.ones(2, 2)]
    batch = collate(rows, features, torch.device("cpu"))
    assert batch.tokens.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch.features.dtype == torch.float32
    assert batch.features[..., 0].tolist() == [[1, 1, 1], [2, 2, 0]]
    assert batch.length.tolist() == [3, 2]
    assert batch.answer_start.tolist() == [2, 1]
