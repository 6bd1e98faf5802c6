"""The state of a training run on disk, so that a killed run goes on with the losses of an unbroken one.

    <out>/steps/step-00000400/
        state.json              step, place in the data, seconds, best result, settings
        model.safetensors       the weights in their own precision
        optimizer.safetensors   Adam's moments by parameter name, and the state of the random generators

A step is written beside and renamed, so a folder with that name is whole. The last two are kept.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s4c.drafters.checkpoint import fill, read_tensors, replace_folder, write_tensors
from s4c.errors import CorruptCheckpoint

KEPT = 2
STATE, MODEL, OPTIMIZER = "state.json", "model.safetensors", "optimizer.safetensors"


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock file against other processes; the lock goes with the process, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"{holder} is at work here ({lock} is locked); wait for it or choose another place"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


def save_state(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> None:
    """Write the state after a step, then drop all but the last two.

    Raises:
        OSError: it cannot be written; the earlier ones are whole.
    """

    def write(place: Path) -> None:
        write_tensors(place / MODEL, model.state_dict())
        write_tensors(place / OPTIMIZER, _optimizer_tensors(model, optimizer) | _random_state())
        (place / STATE).write_text(json.dumps({"step": step, **facts}, indent=2) + "\n")

    replace_folder(folder / f"step-{step:08d}", write)
    for old in _steps(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The last saved step; None where there is none."""
    steps = _steps(folder)
    return steps[-1] if steps else None


def read_facts(place: Path) -> dict[str, Any]:
    """The facts that `save_state` was given, and `step`.

    Raises:
        CorruptCheckpoint: the file is damaged.
    """
    try:
        facts = json.loads((place / STATE).read_text())
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(
            f"{place / STATE} cannot be read ({error}); delete {place} to go on from an older step"
        ) from error
    assert isinstance(facts, dict)
    return facts


def load_state(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a saved step into a model and an optimizer made with the same settings, and into the random generators.

    Raises:
        CorruptCheckpoint: a file is damaged or belongs to other settings.
    """
    fill(model, read_tensors(place / MODEL), place / MODEL)
    tensors = read_tensors(place / OPTIMIZER)
    state: dict[int, dict[str, Tensor]] = {}
    for number, name in enumerate(_trained(model, optimizer)):
        state[number] = {key: tensors[f"{name}|{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random|cpu"])
    if "random|cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random|cuda"])


def _steps(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(place for place in folder.iterdir() if re.fullmatch(r"step-\d{8}", place.name))


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters in the optimizer's order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{name}|{key}": value
        for number, name in enumerate(_trained(model, optimizer))
        for key, value in state[number].items()
    }


def _random_state() -> dict[str, Tensor]:
    states = {"random|cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random|cuda"] = torch.cuda.get_rng_state()
    return states
