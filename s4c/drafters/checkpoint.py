"""A trained drafter on disk: a folder that says what it is and for which target.

    config.json         method, format, target (name and fingerprint), configuration, default tree
    model.safetensors   the trained weights in half precision, and the token ids of the draft vocabulary
    README.md           model card: target, data, command, metrics
    model/              the target itself, a Hugging Face directory, where it was trained along with the drafter

What belongs to the target (embeddings, LM head) is not in it: draft models hold that in buffers that are not
persistent. A folder is written beside and swapped into place, so a reader or a crash finds the old one or the new one.
Between the two renames of a swap the old one stands beside its place: readers read it there, and leave it to writers,
who may be in the midst of theirs, to move it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from s4c.drafters.base import Drafter, DraftModel, Method
from s4c.errors import CorruptCheckpoint, WrongTarget
from s4c.models.base import Target, TargetSpec

FORMAT = 1
CONFIG, WEIGHTS, CARD, TARGET = "config.json", "model.safetensors", "README.md", "model"


@dataclass(frozen=True)
class Checkpoint:
    """The contents of config.json.

    Attributes:
        method: name of the drafter's line in the table.
        target_name: of the target that it was trained for, as its user gave it.
        fingerprint: of that target.
        config: fields of the method's configuration.
        default_tree: of the drafter; None for the method's own.
    """

    method: str
    target_name: str
    fingerprint: str
    config: dict[str, Any]
    default_tree: str | None


def save_checkpoint(
    directory: Path,
    model: DraftModel,
    method: str,
    target: TargetSpec,
    provenance: Mapping[str, Any],
    *,
    default_tree: str | None = None,
    dtype: torch.dtype = torch.float16,
    save_target: Callable[[Path], str] | None = None,
) -> None:
    """Write a drafter, in place of the one that the folder may hold.

    Args:
        directory: the checkpoint folder.
        model: its persistent state is stored, floats as `dtype`.
        method: its name in the table of drafters.
        target: the target that it was trained for.
        provenance: facts for the model card (data, command, metrics); nested mappings become tables.
        default_tree: of the drafter; None for the method's own.
        dtype: of the stored weights.
        save_target: writes a target that was trained along into a folder and gives its fingerprint; the drafter is
            then for that one, and `target` says what it is in all else.

    Raises:
        OSError: it cannot be written; the folder is as it was.
        ValueError: a weight does not fit into the dtype.
    """
    tensors = {name: _stored(name, value, dtype) for name, value in model.state_dict().items()}

    def write(folder: Path) -> None:
        spec = target
        if save_target is not None:
            spec = replace(target, name=str(directory / TARGET), fingerprint=save_target(folder / TARGET))
        config = {
            "method": method,
            "format": FORMAT,
            "target": {"name": spec.name, "fingerprint": spec.fingerprint},
            "config": asdict(model.config),
            "default_tree": default_tree,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_tensors(folder / WEIGHTS, tensors)
        (folder / CARD).write_text(model_card(config, provenance))

    replace_folder(directory, write)


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read config.json alone.

    Raises:
        CorruptCheckpoint: the folder or the file is missing, or does not hold what it should.
    """
    directory = standing(directory)
    path = directory / CONFIG
    if not path.is_file():
        raise CorruptCheckpoint(f"{directory} is no drafter checkpoint: it has no {CONFIG}")
    try:
        value = json.loads(path.read_text())
        checkpoint = Checkpoint(
            method=value["method"],
            target_name=value["target"]["name"],
            fingerprint=value["target"]["fingerprint"],
            config=dict(value["config"]),
            default_tree=value.get("default_tree"),
        )
        version = value["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{path} is damaged ({error!r}); get the drafter again") from error
    if version != FORMAT:
        raise CorruptCheckpoint(f"{path} has format {version!r}; this version reads format {FORMAT}")
    return checkpoint


def load_model(directory: Path, target: Target, methods: Mapping[str, Method]) -> DraftModel:
    """Load the trained model of a checkpoint onto its target.

    Raises:
        CorruptCheckpoint: a file is missing, truncated or holds other tensors than the configuration asks for.
        WrongTarget: it was trained for another target.
        ValueError: its method is not in the table.
    """
    place = standing(directory)
    return _load(place, read_checkpoint(place), target, methods)


def load_drafter(
    directory: Path, target: Target, methods: Mapping[str, Method], dtype: torch.dtype | None = None
) -> Drafter:
    """`load_model`, made ready to draft in the target's dtype or the given one, with the checkpoint's tree."""
    place = standing(directory)
    checkpoint = read_checkpoint(place)
    drafter = _load(place, checkpoint, target, methods).drafter(target, dtype)
    drafter.settings = json.dumps(checkpoint.config, sort_keys=True)
    if checkpoint.default_tree is not None:
        drafter.default_tree = checkpoint.default_tree
    return drafter


def _load(directory: Path, checkpoint: Checkpoint, target: Target, methods: Mapping[str, Method]) -> DraftModel:
    trained = {name: method for name, method in methods.items() if method.model is not None}
    if checkpoint.method not in trained:
        raise ValueError(
            f"{directory} holds a drafter of the method {checkpoint.method!r}; known are {', '.join(sorted(trained))}"
        )
    if checkpoint.fingerprint != target.spec.fingerprint:
        raise WrongTarget(
            f"{directory} was trained for {checkpoint.target_name} ({checkpoint.fingerprint}), but the target is "
            f"{target.spec.name} ({target.spec.fingerprint}); use a drafter of this target or train one"
        )
    method = trained[checkpoint.method]
    assert method.model is not None
    tensors = read_tensors(directory / WEIGHTS)
    config = _config(method, checkpoint.config, directory / CONFIG)
    model = method.model(target, config, _token_ids(tensors, target.spec.vocab_size, directory / WEIGHTS))
    fill(model, tensors, directory / WEIGHTS)
    return model.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CorruptCheckpoint: it is missing or truncated or no such file.
    """
    if not path.is_file():
        raise CorruptCheckpoint(f"{path} is missing; get the checkpoint again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CorruptCheckpoint(f"{path} is truncated or damaged ({error}); get the checkpoint again") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with the permissions of any other file (the library's own are private)."""
    contiguous = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    path.write_bytes(save(contiguous))


def fill(model: torch.nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put stored tensors into a model of the same names and shapes.

    Raises:
        CorruptCheckpoint: names or shapes differ.
    """
    state = model.state_dict()
    for name in sorted(state.keys() | tensors.keys()):
        stored = tuple(tensors[name].shape) if name in tensors else "missing"
        wanted = tuple(state[name].shape) if name in state else "not wanted"
        if stored != wanted:
            raise CorruptCheckpoint(f"{path}: tensor {name} is {stored}, by the configuration it should be {wanted}")
    model.load_state_dict(dict(tensors))


def replace_folder(directory: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside its place and swap it in; after a failure or a crash the old one still stands.

    Raises:
        OSError: it could not be written, with the place and what still stands.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    finish_swap(directory)
    beside, old = _partial(directory), _old(directory)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        write(beside)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        stands = "what it held before is whole" if directory.exists() else "nothing of it is left"
        raise OSError(error.errno or errno.EIO, f"{directory} could not be written ({error}); {stands}") from error
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if directory.exists():
        os.rename(directory, old)
    os.rename(beside, directory)
    shutil.rmtree(old, ignore_errors=True)


def standing(directory: Path) -> Path:
    """Where the whole version of a folder is, for readers: in its place, or beside it in the midst of a swap."""
    old = _old(directory)
    return old if old.exists() and not directory.exists() else directory


def finish_swap(directory: Path) -> None:
    """For its only writer: what a crash between the two renames of a swap left beside the place is put back."""
    old = _old(directory)
    if old.exists() and not directory.exists():
        os.rename(old, directory)
    elif old.exists():
        shutil.rmtree(old, ignore_errors=True)


def model_card(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """README.md of a checkpoint: what it is, for which target, and where it comes from."""
    target = config["target"]
    lines = [
        f"# {config['method']} drafter for {target['name']}",
        "",
        f"It drafts for `{target['name']}` (fingerprint `{target['fingerprint']}`) in s4c, and for no other target. It "
        "changes the speed of generation, never the text.",
    ]
    for title, value in {"configuration": config["config"], **provenance}.items():
        lines += ["", f"## {title.capitalize()}", ""]
        if isinstance(value, Mapping):
            lines += ["| | |", "|---|---|", *(f"| {name} | {_cell(entry)} |" for name, entry in value.items())]
        else:
            lines.append(str(value))
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_cell(entry)}" for name, entry in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    half = value.detach().to(dtype)
    if not torch.isfinite(half).all():
        raise ValueError(f"weight {name} holds values that {dtype} cannot; store it as bfloat16 or float32")
    return half


def _config(method: Method, values: dict[str, Any], path: Path) -> Any:
    assert method.config is not None
    known = {field.name for field in fields(method.config)}
    if not values.keys() <= known:
        raise CorruptCheckpoint(
            f"{path}: {', '.join(sorted(values.keys() - known))} is no setting of {method.name}; it has "
            f"{', '.join(sorted(known))}"
        )
    try:
        return method.config(**values)
    except TypeError as error:
        raise CorruptCheckpoint(f"{path} lacks a setting of {method.name} ({error})") from error


def _token_ids(tensors: Mapping[str, Tensor], vocab_size: int, path: Path) -> Tensor:
    token_ids = tensors.get("token_ids")
    fine = (
        token_ids is not None
        and token_ids.dtype == torch.int64
        and token_ids.dim() == 1
        and len(token_ids) > 0
        and bool((token_ids.diff() > 0).all())
        and int(token_ids[0]) >= 0
        and int(token_ids[-1]) < vocab_size
    )
    if not fine or token_ids is None:
        raise CorruptCheckpoint(f"{path}: token_ids must be ascending token ids from 0 to {vocab_size - 1}")
    return token_ids


def _partial(directory: Path) -> Path:
    return directory.absolute().with_name(f".{directory.absolute().name}.partial")


def _old(directory: Path) -> Path:
    return directory.absolute().with_name(f".{directory.absolute().name}.old")
