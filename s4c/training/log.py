"""What a training run says while it runs: progress bar, metrics.jsonl, TensorBoard; and how it is told to stop."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

if TYPE_CHECKING:
    from s4c.training.trainer import Standing


class TrainingLog:
    """The log of one run; a context manager.

    Args:
        out: folder of the run.
        standing: of the run, read whenever something is written.
        silent: say and write nothing (the processes beside the main one).
    """

    def __init__(self, out: Path, standing: Standing, silent: bool) -> None:
        self.standing = standing
        self.path = out / "metrics.jsonl"
        self.board_path = out / "tensorboard"
        self.silent = silent
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.mark = (time.monotonic(), standing.tokens)
        self.console = Console(stderr=True, quiet=silent)
        self.bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]} | {task.fields[speed]} tokens/s | MAL {task.fields[mal]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=600,
        )
        mal = f"{standing.best_mal:.3f}" if standing.best_mal else "-"
        self.task = self.bar.add_task("training", total=1.0, step=standing.step, loss="-", speed="-", mal=mal)

    def __enter__(self) -> TrainingLog:
        if not self.silent:
            from torch.utils.tensorboard import SummaryWriter

            _keep_until(self.path, self.standing.step)
            self.board = SummaryWriter(str(self.board_path), purge_step=self.standing.step + 1)
        self.bar.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.bar.stop()
        if self.silent:
            return
        try:
            self.board.close()
        except OSError:
            if error is None:  # else it is of the same full disk, and says less
                raise

    def step(self, losses: dict[str, Tensor]) -> None:
        """Take in the losses of a step."""
        self.sums = {name: self.sums[name] + value if self.count else value for name, value in losses.items()}
        self.count += 1

    def flush(self, rate: float, done: float) -> None:
        """Write the means since the last flush, if there is anything.

        Args:
            rate: the learning rate.
            done: how much of the run is behind it, from 0 to 1.

        Raises:
            ValueError: the loss is no number.
        """
        if not self.count:
            return
        standing = self.standing
        means = {name: float(value) / self.count for name, value in self.sums.items()}
        self.count = 0
        if not math.isfinite(means["loss"]):
            raise ValueError(
                f"the loss is {means['loss']} at step {standing.step}; lower the learning rate or turn autocast off. "
                "The last saved step is whole"
            )
        now = time.monotonic()
        speed = (standing.tokens - self.mark[1]) / max(1e-9, now - self.mark[0])
        self.mark = (now, standing.tokens)
        self._write({**means, "learning_rate": rate, "tokens_per_second": speed})
        self.bar.update(
            self.task, completed=done, step=standing.step, loss=f"{means['loss']:.3f}", speed=f"{speed:.0f}"
        )

    def validated(self, metrics: dict[str, Any]) -> None:
        """Write the outcome of a validation; its time does not count in the speed."""
        standing = self.standing
        if metrics:
            self._write(metrics)
            self.bar.update(self.task, mal=f"{metrics['mal']:.3f}")
            shares = " ".join(f"{share:.3f}" for share in metrics["acceptance"])
            self.say(
                f"step {standing.step}, {standing.tokens:,} tokens, {standing.seconds:.0f} s: "
                f"MAL {metrics['mal']:.3f} (best {standing.best_mal:.3f}), acceptance by head {shares}"
            )
            if "perplexity/tuned" in metrics:
                self.say(change_of_perplexity(metrics["perplexity/base"], metrics["perplexity/tuned"]))
        self.mark = (time.monotonic(), standing.tokens)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.console.print(message, soft_wrap=True, highlight=False, markup=False)

    def _write(self, values: dict[str, Any]) -> None:
        if self.silent:
            return
        standing = self.standing
        facts = {"step": standing.step, "tokens": standing.tokens, "seconds": round(standing.seconds, 3), **values}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(facts) + "\n")
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, standing.step)
        except OSError as error:
            raise OSError(error.errno, f"{self.path} cannot be written ({error}); saved steps are whole") from error


def change_of_perplexity(base: float, tuned: float) -> str:
    """A sentence on a target that was trained along, from its perplexities on the answers that were held out."""
    return f"perplexity of held-out answers {tuned:.4f}, that of the target before {base:.4f} ({tuned / base - 1:+.2%})"


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal acts as it did before."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of a metrics file that tell of later steps: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    beside = path.with_suffix(".partial")
    beside.write_text("".join(kept))
    beside.rename(path)
