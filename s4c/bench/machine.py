"""The machine under the measurement: what it is, who else works on it, and how much memory a method takes."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import s4c

BUSY = 0.1
"""More than so many cores taken by other processes, on average: then the machine is called busy."""

PACKAGES = ("torch", "transformers", "numpy", "llama_cpp_python")


class OtherWork:
    """How many cores other processes keep busy, from one look to the next.

    The CPU time of all processes of the machine less that of this one and its helpers, over the wall time. Time that a
    hypervisor took away counts as others' work. Ticks are 10 ms, so a span of a second is told to a few hundredths of a
    core, and one of a millisecond hardly: never more than all cores are told.

    Args:
        helpers: ids of processes that work for this one.
    """

    def __init__(self, helpers: Iterable[int] = ()) -> None:
        self._helpers = list(helpers)
        self._at, self._others = time.perf_counter(), self._seconds()

    def look(self) -> float:
        """Mean number of cores since the last look."""
        at, others = time.perf_counter(), self._seconds()
        cores = max(0.0, others - self._others) / max(at - self._at, 1e-9)
        self._at, self._others = at, others
        return float(min(cores, psutil.cpu_count()))

    def _seconds(self) -> float:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user and nice already
        mine = sum(os.times()[:4]) + sum(map(_cpu_seconds, self._helpers))
        return float(sum(times) - idle - guest - mine)


def _cpu_seconds(pid: int) -> float:
    """Of a process; 0 of one that has ended, whose time is among this one's children's."""
    try:
        return float(sum(psutil.Process(pid).cpu_times()[:2]))
    except psutil.NoSuchProcess:
        return 0.0


class Footprint:
    """Resident memory that one contestant takes in a process that it may share with others.

    Attributes:
        held: bytes that it has and keeps.
        peak: bytes that it took at most in the block watched last, those held included; None where the system does
            not tell.
    """

    _RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def __init__(self, held: int = 0) -> None:
        self.held = held
        self.peak: int | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what a block of its work takes."""
        if not self._RESET.exists():
            yield
            return
        self._RESET.write_text("5")  # forgets the peak so far
        base = self._status("VmRSS")
        yield
        self.peak = self.held + max(0, self._status("VmHWM") - base)
        self.held += max(0, self._status("VmRSS") - base)

    def _status(self, name: str) -> int:
        line = next(line for line in self._STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes."""
    return [round(load, 2) for load in psutil.getloadavg()]


def provenance() -> dict[str, Any]:
    """Where figures come from: command, commit, versions, machine."""
    return {
        "command": shlex.join(["s4c", *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {"s4c": s4c.__version__, "python": platform.python_version(), **_versions()},
        "machine": {
            "cpu": _cpu(),
            **_gpu(),
            "cores": psutil.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "system": f"{platform.system()} {platform.release()}",
        },
    }


def _gpu() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda or "unknown"}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the checkout that the package runs from, `+` behind it where files differ; None outside one."""
    root = Path(s4c.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
