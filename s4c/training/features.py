"""What the target thought of every row: its features, from a store on disk or computed on the fly.

A pass of the target over all the data costs as much as a few epochs of a small drafter, and every epoch wants the
same features. So they are kept, row by row:

    features-TARGET/       one folder for a target in its dtype and the layers that are tapped
        rows.bf16          [tokens, d (1 + taps)] bfloat16, the rows one after the other
        rows.jsonl         a line for each row: a hash of its tokens, where it begins, how many they are

Training maps the first file into memory and adds the rows that are not there yet. A target that writes the text has
had these thoughts already: `Recording` keeps them. Both files only grow, the line after its row, so a run that was
killed loses no more than the row at hand.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from s4c.drafters.base import NoDrafter
from s4c.models.base import Target
from s4c.training.data import Row
from s4c.types import DraftTree, TargetOutput, Verdict


class FeatureSource(Protocol):
    """Gives the features of a row."""

    def __call__(self, row: int) -> Tensor:
        """[n, d (1 + taps)] of any float dtype: the target's feature at each token of a row, by its number."""


class ComputedFeatures:
    """Features computed whenever they are asked for, with slot 0 of the target."""

    def __init__(self, target: Target, rows: Sequence[Row], taps: Sequence[int] = ()) -> None:
        self.target = target
        self.rows = rows
        self.taps = taps
        target.reserve(1, max(len(row) for row in rows))

    def __call__(self, row: int) -> Tensor:
        with torch.no_grad():
            tokens = torch.tensor(self.rows[row].tokens, device=self.target.device)
            return self.target.prefill(0, tokens, self.taps)


class FeatureStore:
    """The features of many rows in one folder, for several processes at a time.

    Args:
        folder: of the stores.
        target: whose features they are.
        taps: layers whose hidden states stand behind them.
    """

    def __init__(self, folder: Path, target: Target, taps: Sequence[int] = ()) -> None:
        key = f"{target.spec.fingerprint} {target.dtype}{''.join(f' {tap}' for tap in taps)}"
        self.folder = folder / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.width = target.spec.hidden_size * (1 + len(taps))
        self._data, self._index = self.folder / "rows.bf16", self.folder / "rows.jsonl"
        self._places: dict[str, slice] = {}
        self._read = 0
        self._flat = np.empty((0, self.width), np.int16)

    def missing(self, rows: Sequence[Row]) -> list[int]:
        """The numbers of the rows that are not there."""
        self._catch_up()
        nowhere = slice(0, len(self._flat) + 1)
        places = [self._places.get(_hash(row.tokens), nowhere) for row in rows]
        return [number for number, place in enumerate(places) if place.stop > len(self._flat)]

    def get(self, row: Row) -> Tensor:
        """[n, d (1 + taps)] bfloat16 of a row that is there."""
        return torch.from_numpy(np.array(self._flat[self._places[_hash(row.tokens)]])).view(torch.bfloat16)

    def add(self, tokens: Sequence[int], features: Tensor) -> None:
        """Append a row: n tokens, and their features [n, d (1 + taps)].

        Raises:
            OSError: it cannot be written; what was there stays whole.
        """
        values = features.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
        assert values.shape == (len(tokens), self.width)
        with self._alone():
            # What a killed process left of a row or a line is overwritten, or ended.
            start = self._data.stat().st_size // (2 * self.width)
            os.truncate(self._data, start * 2 * self.width)
            with self._data.open("ab") as data:
                data.write(values.tobytes())
            line = json.dumps({"row": _hash(tokens), "start": start, "tokens": len(tokens)})
            with self._index.open("a+b") as index:
                index.seek(max(0, index.tell() - 1))
                index.write(b"" if index.read(1) in (b"", b"\n") else b"\n")
                index.write(line.encode() + b"\n")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._data.open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _catch_up(self) -> None:
        """Take in the lines that came since the last time, and map the rows."""
        if not self._index.exists():
            return
        held = self._data.stat().st_size // (2 * self.width)
        with self._index.open("rb") as index:
            index.seek(self._read)
            lines = index.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                about = json.loads(line)
                name, place = str(about["row"]), slice(about["start"], about["start"] + about["tokens"])
            except (ValueError, KeyError, TypeError):
                continue
            # Rows lie one behind the other: where one begins, those with lines before it end, or were lost.
            while self._places and next(reversed(self._places.values())).stop > place.start:
                self._places.popitem()
            self._places.pop(name, None)
            self._places[name] = place
        if held:
            self._flat = np.memmap(self._data, dtype=np.int16, mode="r", shape=(held, self.width))


def _hash(tokens: Sequence[int]) -> str:
    return hashlib.sha256(np.array(tokens, dtype="<i8").tobytes()).hexdigest()[:32]


class StoredFeatures:
    """Features read from a store that holds all rows."""

    def __init__(self, store: FeatureStore, rows: Sequence[Row]) -> None:
        self.store = store
        self.rows = rows

    def __call__(self, row: int) -> Tensor:
        return self.store.get(self.rows[row])


def open_features(
    kind: str, folder: Path, rows: Sequence[Row], target: Target, taps: Sequence[int] = ()
) -> FeatureSource:
    """Features of rows, tapped layers behind them; `cache` (from the store, what it lacks added first) or `fly`.

    Raises:
        OSError: the store cannot be written; the rows in it are whole.
    """
    if kind == "fly":
        return ComputedFeatures(target, rows, taps)
    if kind != "cache":
        raise ValueError(f"features is {kind!r}; it must be cache or fly")
    store = FeatureStore(folder, target, taps)
    missing = sorted(store.missing(rows), key=lambda number: len(rows[number]))
    if missing:
        compute = ComputedFeatures(target, rows, taps)
        with Progress(transient=True, console=Console(stderr=True)) as progress:
            task = progress.add_task("features of the target", total=sum(len(rows[number]) for number in missing))
            for number in missing:
                store.add(rows[number].tokens, compute(number))
                progress.advance(task, len(rows[number]))
        assert not store.missing(rows)
    return StoredFeatures(store, rows)


class Recording(NoDrafter):
    """Plain decoding that keeps the target's features of all that it reads and writes.

    A sequence is stored when its slot goes to another one, or by `close`. The last token of a row is never passed, and
    no prediction asks for its feature: zeros stand there.

    Args:
        store: where they go.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self._slots: dict[int, _Thoughts] = {}

    def prefill(self, slot: int, tokens: Tensor, features: Tensor) -> None:
        self._keep(slot)
        self._slots[slot] = _Thoughts(tokens.tolist(), [features])

    def commit(self, tree: DraftTree, verdict: Verdict, output: TargetOutput) -> None:
        for slot, (root, (_, tokens)) in enumerate(zip(tree.tokens[:, 0].tolist(), verdict.lines, strict=True)):
            thoughts = self._slots[slot]
            thoughts.tokens.append(root)
            thoughts.features.append(output.features[slot, :1].clone())
            thoughts.last = tokens[-1]

    def move(self, source: int, destination: int) -> None:
        self._keep(destination)
        self._slots[destination] = self._slots.pop(source)

    def close(self) -> None:
        """Store what is left."""
        for slot in list(self._slots):
            self._keep(slot)

    def _keep(self, slot: int) -> None:
        thoughts = self._slots.pop(slot, None)
        if thoughts is not None and thoughts.last is not None:
            features = F.pad(torch.cat(thoughts.features), (0, 0, 0, 1))
            self.store.add([*thoughts.tokens, thoughts.last], features)


@dataclass
class _Thoughts:
    """The features of a sequence's tokens, and the token behind them."""

    tokens: list[int]
    features: list[Tensor]
    last: int | None = None
