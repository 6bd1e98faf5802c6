"""Text for training: rows that a target wrote, prompts that it is to answer, batches of similar length.

A row is one line of JSON, `{"prompt_ids": [...], "answer_ids": [...], "temperature": 0.0, "source": "..."}`.
Which rows are held out is a function of their prompt alone, so that a prompt never stands on both sides,
whatever files are read and in which order.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s4c.drafters.base import TrainingBatch

LENGTH_JITTER = 32
"""Rows whose lengths differ by less than this (in tokens) may change places from epoch to epoch."""


@dataclass(frozen=True)
class Row:
    """A prompt and what the target answered.

    Attributes:
        prompt_ids: at least one token.
        answer_ids: at least one token.
        temperature: at which the answer was drawn.
        source: where the prompt came from.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    temperature: float
    source: str

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt_ids + self.answer_ids

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class Prompt:
    """A chat that waits for its answer: messages with `role` and `content`, and where they came from."""

    messages: tuple[dict[str, str], ...]
    source: str


def read_rows(paths: Sequence[Path], vocab_size: int) -> list[Row]:
    """Read distilled rows from one or several files.

    Raises:
        ValueError: a file is missing or empty, or a line is not such a row; names file and line.
    """
    return [_row(value, where, vocab_size) for path in paths for where, value in _json_lines(path)]


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts to be answered.

    A file named `.jsonl` holds an object a line with `prompt` (a string), `messages` (a chat that ends with
    the user) or `turns` (strings, of which the first is asked) and perhaps `source`; any other file holds a
    prompt a line, empty lines aside.

    Raises:
        ValueError: the file is missing or empty, or a line is not such a prompt; names file and line.
    """
    if path.suffix == ".jsonl":
        return [_prompt(value, where) for where, value in _json_lines(path)]
    lines = [line.strip() for line in _text(path).splitlines()]
    prompts = [Prompt(({"role": "user", "content": line},), "prompt") for line in lines if line]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def truncate(rows: Iterable[Row], max_length: int) -> list[Row]:
    """Cut answers so that no row is longer than max_length tokens; rows without room for one are dropped."""
    return [
        Row(row.prompt_ids, row.answer_ids[: max_length - len(row.prompt_ids)], row.temperature, row.source)
        for row in rows
        if len(row.prompt_ids) < max_length
    ]


def split(rows: Iterable[Row], held_out: float) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows; about `held_out` (a share from 0 to 1) of the prompts are held out."""
    train: list[Row] = []
    held: list[Row] = []
    for row in rows:
        digest = hashlib.sha256(np.array(row.prompt_ids, dtype="<i8").tobytes()).digest()
        (held if int.from_bytes(digest[:8], "big") < held_out * 2**64 else train).append(row)
    return train, held


def frequent_tokens(rows: Iterable[Row], size: int, vocab_size: int, always: Sequence[int] = ()) -> Tensor:
    """[V'] int64, ascending: the tokens that answers use most; equal counts go by id, the lowest first.

    Args:
        rows: whose answers are counted.
        size: V', from 1 to vocab_size.
        vocab_size: V.
        always: tokens that are in whatever their count, the end-of-sequence tokens for instance; those past the
            vocabulary, which a model may name and can never write, are not.
    """
    always = [token for token in always if 0 <= token < vocab_size]
    least = max(1, len(set(always)))
    if not least <= size <= vocab_size:
        raise ValueError(f"a draft vocabulary of {size} tokens was asked for; it must have {least} to {vocab_size}")
    counts = np.zeros(vocab_size, dtype=np.int64)
    for row in rows:
        np.add.at(counts, np.array(row.answer_ids), 1)
    counts[list(always)] = np.iinfo(np.int64).max
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


def batch_order(lengths: Sequence[int], budget: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: row numbers, each row once, rows of similar length together.

    Args:
        lengths: tokens of each row.
        budget: most tokens of a batch, padding counted; a longer row is a batch of its own.
        seed: with the epoch it decides the order.
        epoch: from 0.
    """
    random = np.random.default_rng([seed, epoch])
    order = np.argsort(np.array(lengths) + random.uniform(0, LENGTH_JITTER, len(lengths)), kind="stable")
    batches: list[list[int]] = []
    longest = 0
    for row in order.tolist():
        longest = max(longest, lengths[row])
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = lengths[row]
        batches[-1].append(row)
    return [batches[i] for i in random.permutation(len(batches))]


def collate(rows: Sequence[Row], features: Sequence[Tensor], device: torch.device) -> TrainingBatch:
    """Pad rows and their features, B tensors [n, d] of any dtype, to one batch."""
    length = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(length.max()), dtype=torch.int64)
    padded = torch.zeros(*tokens.shape, features[0].shape[-1], device=device)
    for b, (row, feature) in enumerate(zip(rows, features, strict=True)):
        tokens[b, : len(row)] = torch.tensor(row.tokens)
        padded[b, : len(row)] = feature
    start = torch.tensor([len(row.prompt_ids) for row in rows])
    return TrainingBatch(tokens.to(device), padded, length.to(device), start.to(device))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What a model card says of the data: rows, tokens, rows by source and temperature, hash."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.array([len(row.prompt_ids), *row.tokens], dtype="<i8").tobytes())
    return {
        "rows": len(rows),
        "answer_tokens": sum(len(row.answer_ids) for row in rows),
        "sources": dict(sorted(Counter(row.source for row in rows).items())),
        "temperatures": {str(t): n for t, n in sorted(Counter(row.temperature for row in rows).items())},
        "sha256": digest.hexdigest(),
    }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a JSONL file with its place, `file, line n`."""
    found = False
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        found = True
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg}); each line must be one JSON object") from error
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {type(value).__name__} where a JSON object is wanted")
        yield where, value
    if not found:
        raise ValueError(f"{path} is empty; it must hold one JSON object a line")


def _row(value: dict[str, Any], where: str, vocab_size: int) -> Row:
    temperature = value.get("temperature", 0.0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature >= 0:
        raise ValueError(f"{where}: temperature is {temperature!r}; it must be a number of at least 0")
    return Row(
        prompt_ids=_ids(value, "prompt_ids", where, vocab_size),
        answer_ids=_ids(value, "answer_ids", where, vocab_size),
        temperature=float(temperature),
        source=str(value.get("source", "unknown")),
    )


def _ids(value: dict[str, Any], name: str, where: str, vocab_size: int) -> tuple[int, ...]:
    ids = value.get(name)
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise ValueError(f"{where}: {name} is {_short(ids)}; it must be a non-empty list of token ids")
    if min(ids) < 0 or max(ids) >= vocab_size:
        worst = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(
            f"{where}: {name} holds {worst}, but this target's tokens go from 0 to {vocab_size - 1}; "
            "was the file distilled from another target?"
        )
    return tuple(ids)


def _prompt(value: dict[str, Any], where: str) -> Prompt:
    source = str(value.get("source", "prompt"))
    present = [name for name in ("prompt", "messages", "turns") if name in value]
    if len(present) != 1:
        raise ValueError(f"{where}: has {present or 'none'} of prompt, messages, turns; it must have exactly one")
    content = value[present[0]]
    if present[0] == "messages":
        return Prompt(_messages(content, where), source)
    text = content[0] if present[0] == "turns" and isinstance(content, list) and content else content
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {present[0]} is {_short(content)}; it must be text")
    return Prompt(({"role": "user", "content": text},), source)


def _messages(content: Any, where: str) -> tuple[dict[str, str], ...]:
    fine = isinstance(content, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in content
    )
    if not fine or not content or content[-1]["role"] != "user":
        raise ValueError(
            f"{where}: messages is {_short(content)}; it must be a list of objects with role and content, the last "
            "one the user's"
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in content)


def _short(value: Any) -> str:
    text = repr(value)
    return "missing" if value is None else text if len(text) <= 60 else text[:57] + "..."
