"""The folder of a run: a row a line as they come, so that a run which was killed goes on where it stood.

run.json         the settings, which a resumed run must share, and where each part of the run was made
results.jsonl    every answer
summary.json  report.md  report.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from filelock import FileLock, Timeout

from s4c.bench.run import Row

RUN, RESULTS, SUMMARY, REPORT, PAGE = "run.json", "results.jsonl", "summary.json", "report.md", "report.html"
FILES = (RUN, RESULTS, SUMMARY, REPORT, PAGE)
LOCK = ".lock"


class Store:
    """Rows of a run, on disk where there is a folder.

    Args:
        folder: None keeps the rows in memory alone.
        settings: what the rows depend on, plain values.
        part: where the rows of this process come from: command, commit, machine.
        resume: go on with the run that stands there.
        force: remove the run that stands there.

    Raises:
        ValueError: the folder holds a run and neither was said, or one of other settings; or it is no folder, or
            another process writes into it.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: Mapping[str, Any],
        part: Mapping[str, Any],
        resume: bool = False,
        force: bool = False,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.parts = [dict(part)]
        self.rows: list[Row] = []
        self._file: IO[str] | None = None
        if folder is None and (resume or force):
            raise ValueError("--resume and --force are about the folder of a run; name it by --out")
        if resume and force:
            raise ValueError("--resume goes on with a run and --force removes it; give one of them")
        if folder is not None:
            self._open(folder, resume, force)

    def _open(self, folder: Path, resume: bool, force: bool) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; --out names a folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"another process writes into {folder}; wait for it or choose another folder") from error
        if (folder / RUN).exists() and not (resume or force):
            raise ValueError(f"{folder} holds another run; --resume goes on with it, --force removes it")
        held = [name for name in FILES if (folder / name).exists()]
        if held and RUN not in held and not force:
            raise ValueError(f"{folder} holds {', '.join(held)}, but no run; choose another folder, or --force")
        if force:
            for name in FILES:
                (folder / name).unlink(missing_ok=True)
        if (folder / RUN).exists():
            before = read_run(folder)
            self._check_settings(folder, before["settings"])
            self.parts = [*before["parts"], *self.parts]
            self.rows = read_rows(folder / RESULTS)
        write(folder / RUN, json.dumps({"settings": self.settings, "parts": self.parts}, indent=1) + "\n")
        write(folder / RESULTS, "".join(_line(row) for row in self.rows))
        self._file = (folder / RESULTS).open("a", encoding="utf-8")

    def _check_settings(self, folder: Path, before: Mapping[str, Any]) -> None:
        after = json.loads(json.dumps(self.settings))
        unlike = [key for key in after if before.get(key) != after[key]]
        if unlike:
            changes = "; ".join(f"{key} was {before.get(key)!r} and is {after[key]!r}" for key in unlike)
            raise ValueError(
                f"{folder} holds a run with other settings: {changes}. Resume with those it had, or --force"
            )

    def add(self, row: Row) -> None:
        """Keep a row; on disk before it returns."""
        self.rows.append(row)
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()

    def write(self, name: str, text: str) -> None:
        """Put a file into the folder, if there is one."""
        if self.folder is not None:
            write(self.folder / name, text)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._lock.release()


def write(path: Path, text: str) -> None:
    """Write a file beside its place and rename it."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _line(row: Row) -> str:
    return json.dumps(asdict(row)) + "\n"


def read_rows(path: Path) -> list[Row]:
    """The rows of a run; a last line that a kill cut short is left out.

    Raises:
        ValueError: another line is no row.
    """
    if not path.exists():
        return []
    names = {field.name for field in fields(Row)}
    rows = []
    *lines, _cut = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            rows.append(Row(**{name: values[name] for name in names}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no row of a run ({error!r})") from error
    return rows


def read_run(folder: Path) -> dict[str, Any]:
    """`settings` and `parts` of the run in a folder.

    Raises:
        ValueError: there is none.
    """
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no run of s4c bench: {RUN} cannot be read ({error})") from error
    if not isinstance(run, dict) or not isinstance(run.get("settings"), dict) or not isinstance(run.get("parts"), list):
        raise ValueError(f"{folder / RUN} is not what s4c bench writes: it lacks settings or parts")
    return run
