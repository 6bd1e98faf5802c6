"""The training run: it learns, it goes on where it was stopped, and it fails with a reason."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import VOCAB, TinyConfig, TinyModel, TinyTarget, tiny_model, tiny_rows

from s4c.drafters.base import Prediction, TrainingBatch
from s4c.drafters.checkpoint import fill, read_tensors
from s4c.drafters.s4c import S4CConfig, S4CModel
from s4c.errors import UnsupportedModel
from s4c.training.checkpoint import exclusive, latest
from s4c.training.data import Row, batch_order, collate, split
from s4c.training.losses import CompositeLoss
from s4c.training.simulate import simulate
from s4c.training.trainer import TrainConfig, Trainer, TrainResult
from s4c.verify.tree import TreePlan

CONFIG = TrainConfig(
    steps=10, batch_tokens=60, warmup_steps=3, eval_every=4, save_every=3, log_every=1, features="fly", seed=5
)


def rows_and_target() -> tuple[TinyTarget, list[Row], list[Row]]:
    target = TinyTarget()
    return target, *split(tiny_rows(target, 24), 0.3)


def run(out: Path, config: TrainConfig = CONFIG, model: TinyModel | None = None, resume: bool = False) -> TrainResult:
    target, train, held = rows_and_target()
    # A resumed model starts from other weights: those of the saved step must replace them.
    model = model or tiny_model(target, seed=9 if resume else 0)
    return Trainer(target, "tiny", model, train, held, config, out, resume=resume).fit()


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def told(out: Path) -> list[dict[str, Any]]:
    """What must not depend on interruptions: everything but times."""
    return [{k: v for k, v in m.items() if k not in ("seconds", "tokens_per_second")} for m in metrics(out)]


class Breaks(TinyModel):
    """A model in whose n-th batch something happens."""

    at = 8

    def predictions(self, batch: TrainingBatch) -> list[Prediction]:
        if self.training:
            self.at -= 1
            if self.at == 0:
                self.strike()
        return super().predictions(batch)

    def strike(self) -> None:
        raise MemoryError("struck")


class Interrupted(Breaks):
    def strike(self) -> None:
        signal.raise_signal(signal.SIGINT)


def breaking(kind: type[Breaks]) -> Breaks:
    torch.manual_seed(0)
    return kind(TinyTarget(), TinyConfig(), torch.arange(VOCAB))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    run(out)
    return out


def test_a_crash_and_a_resume_give_the_losses_of_an_unbroken_run(tmp_path: Path, unbroken: Path) -> None:
    with pytest.raises(MemoryError):
        run(tmp_path, model=breaking(Breaks))
    assert latest(tmp_path / "steps") == tmp_path / "steps" / "step-00000006"
    assert max(m["step"] for m in metrics(tmp_path)) == 7
    result = run(tmp_path, resume=True)
    assert result.standing.step == 10
    assert told(tmp_path) == told(unbroken)
    assert len([m for m in told(unbroken) if "loss" in m]) == 10
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = Path("steps") / "step-00000010" / name
        assert (tmp_path / last).read_bytes() == (unbroken / last).read_bytes()
    assert (tmp_path / "best/model.safetensors").read_bytes() == (unbroken / "best/model.safetensors").read_bytes()


def test_an_interrupt_saves_the_step_and_says_so(
    tmp_path: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    result = run(tmp_path, model=breaking(Interrupted))
    assert result.interrupted
    assert result.standing.step == 8
    assert latest(tmp_path / "steps") == tmp_path / "steps" / "step-00000008"
    assert "stopped by a signal; step 8 is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    run(tmp_path, resume=True)
    assert told(tmp_path) == told(unbroken)


APART = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_training_trainer import CONFIG, run
run(Path(sys.argv[1]), replace(CONFIG, steps=int(sys.argv[2])))
"""


def start(out: Path, steps: int, **environment: str) -> subprocess.Popen[bytes]:
    """The run of this file in a process of its own."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    return subprocess.Popen(
        [sys.executable, "-c", APART, str(out), str(steps)], env={**os.environ, "PYTHONPATH": paths, **environment}
    )


def test_a_killed_process_leaves_a_whole_step(tmp_path: Path) -> None:
    process = start(tmp_path, 100_000)
    try:
        deadline = time.monotonic() + 120
        while (latest(tmp_path / "steps") or Path("step-0")).name < "step-00000030":
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    step = int(str(latest(tmp_path / "steps"))[-8:])
    result = run(tmp_path, replace(CONFIG, steps=step + 3), resume=True)
    assert result.standing.step == step + 3
    assert [m["step"] for m in metrics(tmp_path) if "loss" in m] == list(range(1, step + 4))


def test_two_processes_make_the_step_of_their_mean_gradient(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    both = [start(tmp_path, 2, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]
    try:
        assert [process.wait(120) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    target, train, _ = rows_and_target()
    model = tiny_model(target)
    loss = CompositeLoss(model, target.head_weight(), CONFIG.weights)
    features = [target.prefill(0, torch.tensor(row.tokens)) for row in train]
    batches = batch_order([len(row) for row in train], CONFIG.batch_tokens, CONFIG.seed, 0)[:2]
    losses = [loss(collate([train[r] for r in b], [features[r] for r in b], target.device))[0] for b in batches]
    mean = torch.autograd.grad(sum(losses, torch.zeros(())) / 2, list(model.parameters()))
    first = metrics(tmp_path)[0]
    assert first["gradient"] == pytest.approx(torch.cat([g.flatten() for g in mean]).norm().item(), rel=1e-5)
    assert first["loss"] == pytest.approx(losses[0].item(), rel=1e-5)
    assert first["tokens"] == sum(len(train[r]) for b in batches for r in b)
    assert [m["step"] for m in metrics(tmp_path) if "loss" in m] == [1, 2]


def test_a_full_disk_leaves_the_last_step_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Path.write_bytes

    def until_full(path: Path, data: bytes) -> int:
        if "step-00000006" in str(path) and path.name == "optimizer.safetensors":
            write_bytes(path, data[:100])
            raise OSError(28, "No space left on device")
        return write_bytes(path, data)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", until_full)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", full)
    with pytest.raises(OSError, match=r"step-00000006 could not be written .*No space left"):
        run(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert [p.name for p in (tmp_path / "steps").iterdir()] == ["step-00000003"]
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written .*No space left.*; saved steps are whole"):
        run(tmp_path, resume=True)
    monkeypatch.undo()
    assert run(tmp_path, resume=True).standing.step == 10


def test_a_training_finishes_the_swap_that_a_crash_cut(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "best").rename(tmp_path / ".best.old")
    assert run(tmp_path, resume=True).best == tmp_path / "best"
    assert not (tmp_path / ".best.old").exists()


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock"), pytest.raises(ValueError, match=f"process {os.getpid()} is at work here"):
        run(tmp_path)


def test_a_folder_with_a_run_is_not_overwritten(unbroken: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a training run \(step-00000010\); resume it"):
        run(unbroken)


def test_a_drafter_without_the_steps_that_led_to_it_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    with pytest.raises(ValueError, match="best would be replaced"):
        run(tmp_path)


def test_a_training_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="max_seconds is nan"):
        replace(CONFIG, max_seconds=float("nan"))


def test_resume_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no saved step to resume"):
        run(tmp_path, resume=True)


def test_resume_with_other_settings(unbroken: Path) -> None:
    with pytest.raises(ValueError, match=r"another settings: learning_rate 0\.001 then, 0\.1 now"):
        run(unbroken, replace(CONFIG, learning_rate=0.1), resume=True)
    with pytest.raises(ValueError, match="another model: heads 2 then, 3 now"):
        run(unbroken, model=tiny_model(TinyTarget(), heads=3), resume=True)


def test_a_loss_that_is_no_number_is_named_and_not_saved(tmp_path: Path) -> None:
    class Explodes(Breaks):
        def strike(self) -> None:
            with torch.no_grad():
                self.heads[0][0].weight.fill_(torch.nan)

    with pytest.raises(ValueError, match=r"loss is nan at step 8; lower the learning rate"):
        run(tmp_path, model=breaking(Explodes))
    assert latest(tmp_path / "steps") == tmp_path / "steps" / "step-00000006"


def test_epochs_and_seconds_end_a_run(tmp_path: Path) -> None:
    _, train, _ = rows_and_target()
    result = run(tmp_path / "a", replace(CONFIG, steps=0, epochs=2))
    assert (result.standing.epoch, result.standing.position) == (2, 0)
    assert result.standing.tokens == 2 * sum(len(row) for row in train)
    result = run(tmp_path / "b", replace(CONFIG, steps=0, max_seconds=0.05))
    assert result.standing.seconds >= 0.05
    assert latest(tmp_path / "b" / "steps") is not None


def test_the_rate_warms_up_and_falls(unbroken: Path) -> None:
    rates = [m["learning_rate"] for m in metrics(unbroken) if "loss" in m]
    assert rates[0] == pytest.approx(1e-3 / 3)
    assert max(rates) == rates[2]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 5e-5 < rates[-1] < 1.5e-4


def test_the_best_is_the_one_of_the_highest_mal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mals = iter([1.5, 3.0, 2.0])
    monkeypatch.setattr(Trainer, "_measure", lambda self, served: {"mal": next(mals), "acceptance": []})
    result = run(tmp_path)
    assert (result.standing.best_mal, result.standing.best_step) == (3.0, 8)
    card = (tmp_path / "best/README.md").read_text()
    assert "| step | 8 |" in card
    assert "| mal | 3 |" in card


def test_validation_is_the_simulated_mal_of_the_drafter_on_held_out_rows(unbroken: Path) -> None:
    target, _, held = rows_and_target()
    last = [m for m in metrics(unbroken) if "mal" in m][-1]
    model = tiny_model(target, seed=1)
    fill(model, read_tensors(unbroken / "steps/step-00000010/model.safetensors"), unbroken)
    features = [target.prefill(0, torch.tensor(row.tokens)) for row in held]
    drafter = model.drafter(target)
    again = simulate(
        drafter, held, features.__getitem__, TreePlan.parse(drafter.default_tree), VOCAB, device=target.device
    )
    assert again.mean_acceptance_length == last["mal"]
    assert again.histogram == last["histogram"]


def test_tensorboard_has_the_scalars(unbroken: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(unbroken / "tensorboard"))
    events.Reload()
    assert {"loss", "lm/1", "teacher/2", "smooth/1", "learning_rate", "mal"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 11))


@pytest.mark.parametrize(("taps", "echo_loss"), [("", False), ("3,7", False), ("", True)])
def test_a_tiny_s4c_overfits_a_tiny_corpus(tmp_path: Path, taps: str, echo_loss: bool) -> None:
    target = TinyTarget()
    rows = tiny_rows(target, 4, answer=24)
    torch.manual_seed(0)
    model = S4CModel(target, S4CConfig(heads=2, draft_vocab=0, head_dim=4, taps=taps), torch.arange(23))
    config = replace(
        CONFIG,
        echo_loss=echo_loss,
        steps=250,
        batch_tokens=400,
        learning_rate=1e-2,
        eval_every=250,
        save_every=250,
        tree="comb:1",
    )
    Trainer(target, "s4c", model, rows, rows, config, tmp_path).fit()
    last = [m for m in metrics(tmp_path) if "mal" in m][-1]
    # Two heads and the bonus: 3 at most. The last round of a row is cut short, by less than 0.15 on average.
    assert last["mal"] > 2.6
    alone = min(last["acceptance"])
    assert 0.6 < alone < 0.95 if echo_loss else alone > 0.95, "what is heard anyway is not learnt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "one of them must be given"),
        ({"steps": -1}, "must not be negative"),
        ({"batch_tokens": 0}, "batch_tokens is 0; it must be at least 1"),
        ({"step_vocab": -1}, "step_vocab is -1; it must be 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"autocast": "float16"}, "autocast is 'float16'; it must be one of none, bfloat16"),
        ({"tree": "oak"}, "tree 'oak' is not known"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **settings)


def test_a_method_without_an_echo_cannot_be_taught_with_one(tmp_path: Path) -> None:
    target = TinyTarget()
    rows = tiny_rows(target, 4)
    with pytest.raises(ValueError, match="this tiny has none; leave it away"):
        Trainer(target, "tiny", tiny_model(target), rows, rows, replace(CONFIG, echo_loss=True), tmp_path)


def test_the_law_that_is_taught_is_the_targets_or_none(tmp_path: Path) -> None:
    target, train, held = rows_and_target()
    target.softcap = 2.0
    model = tiny_model(target)
    trainer = Trainer(target, "tiny", model, train, held, CONFIG, tmp_path)
    batch = collate([train[0]], [target.prefill(0, torch.tensor(train[0].tokens))], target.device)
    loss = CompositeLoss(model, target.head_weight(), CONFIG.weights, softcap=2.0)
    assert trainer.loss(batch)[0].item() == loss(batch)[0].item()
    target.readable = False
    with pytest.raises(UnsupportedModel, match="would learn another law"):
        Trainer(target, "tiny", model, train, held, CONFIG, tmp_path)


def test_no_rows(tmp_path: Path) -> None:
    target = TinyTarget()
    with pytest.raises(ValueError, match="no rows to train on"):
        Trainer(target, "tiny", tiny_model(target), [], [], CONFIG, tmp_path)
