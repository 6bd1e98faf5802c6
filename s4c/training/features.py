"""What the target thought of every row: its features, from a cache on disk or computed on the fly.

A pass of the target over all the data costs as much as a few epochs of a small drafter, and every epoch
wants the same features. So they are computed once and kept in one flat file of [tokens, d (1 + taps)] bfloat16, the
rows one after the other, which training maps into memory. The name of the file is a hash of the rows and of
the target. It is written beside and renamed, so a file of that name is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from s4c.models.base import Target
from s4c.training.data import Row, summary


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


class CachedFeatures:
    """Features read from a file that `compute_features` wrote."""

    def __init__(self, path: Path, rows: Sequence[Row], width: int) -> None:
        self.offsets = list(accumulate((len(row) for row in rows), initial=0))
        expected = self.offsets[-1] * width * 2
        if path.stat().st_size != expected:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes where these rows need {expected}; delete it and start again"
            )
        self.flat = np.memmap(path, dtype=np.int16, mode="r", shape=(self.offsets[-1], width))

    def __call__(self, row: int) -> Tensor:
        values = np.array(self.flat[self.offsets[row] : self.offsets[row + 1]])
        return torch.from_numpy(values).view(torch.bfloat16)


def cache_path(folder: Path, rows: Sequence[Row], target: Target, taps: Sequence[int] = ()) -> Path:
    """The file that holds, or will hold, the features of these rows by this target in its present dtype."""
    key = f"{summary(rows)['sha256']} {target.spec.fingerprint} {target.dtype}{''.join(f' {tap}' for tap in taps)}"
    return folder / f"features-{hashlib.sha256(key.encode()).hexdigest()[:16]}.bf16"


def compute_features(path: Path, rows: Sequence[Row], target: Target, taps: Sequence[int] = ()) -> None:
    """Write the features of all rows to a file, and what they are of to a JSON file beside it.

    Raises:
        OSError: the file cannot be written; nothing of it is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    compute = ComputedFeatures(target, rows, taps)
    offsets = list(accumulate((len(row) for row in rows), initial=0))
    beside = path.with_suffix(".partial")
    shape = (offsets[-1], target.spec.hidden_size * (1 + len(taps)))
    try:
        with beside.open("wb") as file, Progress(transient=True, console=Console(stderr=True)) as progress:
            task = progress.add_task("features of the target", total=offsets[-1])
            for row in sorted(range(len(rows)), key=lambda r: len(rows[r])):
                values = compute(row).to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
                file.seek(offsets[row] * shape[1] * 2)
                file.write(values.tobytes())
                progress.advance(task, len(rows[row]))
        about = {"fingerprint": target.spec.fingerprint, "dtype": str(target.dtype), "shape": shape, **summary(rows)}
        path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
        beside.rename(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def open_features(
    kind: str, folder: Path, rows: Sequence[Row], target: Target, taps: Sequence[int] = ()
) -> FeatureSource:
    """Features of rows, tapped layers behind them; `cache` (computed at the first call, then read) or `fly`."""
    if kind == "fly":
        return ComputedFeatures(target, rows, taps)
    if kind != "cache":
        raise ValueError(f"features is {kind!r}; it must be cache or fly")
    path = cache_path(folder, rows, target, taps)
    if not path.exists():
        compute_features(path, rows, target, taps)
    return CachedFeatures(path, rows, target.spec.hidden_size * (1 + len(taps)))
