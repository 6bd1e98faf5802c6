"""The mean of drafters that one training after the other has made of the same start.

A further training learns its own text and unlearns a little of what others need. The mean of its weights and of those
that it began with, number by number, is often at least as good as the better of both on text that neither has seen
(Wortsman et al. 2022, "Model soups", arXiv 2203.05482; docs/TRAINING.md). It costs nothing, neither in training nor in
drafting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s4c.drafters.checkpoint import (
    CARD,
    CONFIG,
    TARGET,
    WEIGHTS,
    Checkpoint,
    model_card,
    read_checkpoint,
    read_tensors,
    replace_folder,
    standing,
    write_tensors,
)


def average(checkpoints: Sequence[Path], out: Path) -> None:
    """Write the mean of checkpoints, in place of the one that the folder may hold.

    It has the configuration of the first. Weights that another one lacks (a head that was left out of its training)
    are the mean of those that have them.

    Raises:
        CorruptCheckpoint: one of them is none.
        ValueError: there are fewer than two, or they are not of one kind.
        OSError: it cannot be written; the folder is as it was.
    """
    if len(checkpoints) < 2:
        raise ValueError("there is one checkpoint to average; name at least two")
    if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= {CONFIG, WEIGHTS, CARD}):
        raise ValueError(f"{out} holds something else than a drafter, which would be lost; name a new folder")
    parts = [
        _Part(place, read_checkpoint(place), read_tensors(place / WEIGHTS)) for place in map(standing, checkpoints)
    ]
    first = parts[0]
    for part in parts:
        _check(first, part)
    mean = {name: _mean([part.weights[name] for part in parts if name in part.weights]) for name in first.weights}
    about = {"name": first.about.target_name, "fingerprint": first.about.fingerprint}

    def write(folder: Path) -> None:
        (folder / CONFIG).write_bytes((first.directory / CONFIG).read_bytes())
        write_tensors(folder / WEIGHTS, mean)
        config = {"method": first.about.method, "target": about, "config": first.about.config}
        origin = {"the mean of": "\n".join(f"- {part.directory}" for part in parts)}
        (folder / CARD).write_text(model_card(config, origin))

    replace_folder(out, write)


@dataclass(frozen=True)
class _Part:
    directory: Path
    about: Checkpoint
    weights: dict[str, Tensor]


def _mean(values: Sequence[Tensor]) -> Tensor:
    if not values[0].is_floating_point():
        return values[0]
    return torch.stack([value.float() for value in values]).mean(0).to(values[0].dtype)


def _check(first: _Part, other: _Part) -> None:
    """Refuse a checkpoint that is of another kind than the first, and say in what."""
    both = f"{first.directory} and {other.directory}"
    for name in ("method", "fingerprint"):
        one, two = getattr(first.about, name), getattr(other.about, name)
        if one != two:
            raise ValueError(
                f"{both} differ in {name} ({one}, {two}): only drafters of one target and method have a mean"
            )
    for name, weight in other.weights.items():
        if name not in first.weights or first.weights[name].shape != weight.shape:
            raise ValueError(
                f"{other.directory} has {name} of {list(weight.shape)}, and {first.directory} has not; name the one "
                "that has all weights first"
            )
        if not weight.is_floating_point() and not torch.equal(weight, first.weights[name]):
            raise ValueError(f"{both} differ in {name}: their draft vocabularies are not the same")
    if (other.directory / TARGET).exists():
        raise ValueError(f"{other.directory} comes with a target of its own; a mean would fit to none")
