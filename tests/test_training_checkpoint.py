"""Drafters and training states on disk: whole or not there, and refused with a reason."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_training import METHODS, VOCAB, TinyModel, TinyTarget, tiny_model

from s4c.drafters.checkpoint import (
    load_drafter,
    load_model,
    read_checkpoint,
    replace_folder,
    save_checkpoint,
    standing,
)
from s4c.errors import CorruptCheckpoint, WrongTarget
from s4c.training.checkpoint import exclusive, latest, load_state, read_facts, save_state

IDS = torch.tensor([0, 2, 3, 11, 22])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    target = TinyTarget()
    provenance = {"metrics": {"mal": 2.5}, "command": "s4c train"}
    save_checkpoint(
        tmp_path / "drafter", tiny_model(target, token_ids=IDS), "tiny", target.spec, provenance, default_tree="comb:3"
    )
    return tmp_path / "drafter"


def test_round_trip(saved: Path) -> None:
    target = TinyTarget()
    model = load_model(saved, target, METHODS)
    wanted = tiny_model(target, token_ids=IDS).state_dict()
    assert model.state_dict().keys() == wanted.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-4)
        assert value.dtype == wanted[name].dtype
    assert load_drafter(saved, target, METHODS).default_tree == "comb:3"


def test_it_holds_the_trained_weights_alone_in_half_precision(saved: Path) -> None:
    assert {p.name for p in saved.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    trained = sum(p.numel() for p in tiny_model(TinyTarget()).parameters())
    assert (saved / "model.safetensors").stat().st_size < 2 * trained + 8 * len(IDS) + 1000
    assert "embedding" not in (saved / "model.safetensors").read_bytes()[:1000].decode(errors="ignore")
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in saved.iterdir())


def test_the_card_says_where_it_comes_from(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    for fact in ("tiny drafter for tiny", "hash-of-0", "| mal | 2.5 |", "s4c train", "| width | 32 |"):
        assert fact in card


def test_another_target_is_refused_by_name(saved: Path) -> None:
    with pytest.raises(WrongTarget, match=r"trained for tiny \(hash-of-0\).* the target is other \(hash-of-1\)"):
        load_model(saved, TinyTarget(1, "other"), METHODS)


def edit(saved: Path, **changes: object) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no drafter checkpoint"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda d: (d / "config.json").write_text("{}"), r"config\.json is damaged"),
        (lambda d: edit(d, format=2), "format 2; this version reads format 1"),
        (lambda d: edit(d, config={"heads": 2, "color": 1}), "color is no setting of tiny; it has heads, width"),
        (lambda d: edit(d, config={"heads": 3, "width": 32}), r"tensor heads\.2.* is missing"),
        (lambda d: edit(d, config={"heads": 1, "width": 32}), r"tensor heads\.1.* not wanted"),
        (lambda d: edit(d, config={"heads": 2, "width": 16}), r"is \(32,\), .* should be \(16,\)"),
        (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda d: truncate(d / "model.safetensors", 0), r"model\.safetensors is truncated or damaged"),
        (lambda d: truncate(d / "model.safetensors", 5), r"model\.safetensors is truncated or damaged"),
        (lambda d: truncate(d / "model.safetensors", 2000), r"model\.safetensors is truncated or damaged"),
        (lambda d: save_ids(d, torch.tensor([3, 2])), "token_ids must be ascending token ids from 0 to 22"),
        (lambda d: save_ids(d, torch.tensor([3, VOCAB])), "token_ids must be ascending"),
    ],
)
def test_damage_is_named(saved: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(saved)
    with pytest.raises(CorruptCheckpoint, match=message):
        load_model(saved, TinyTarget(), METHODS)


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size)


def save_ids(directory: Path, ids: torch.Tensor) -> None:
    target = TinyTarget()
    model = tiny_model(target)
    model.register_buffer("token_ids", ids)
    save_checkpoint(directory, model, "tiny", target.spec, {})


def test_unknown_method_lists_those_that_can_be_loaded(saved: Path) -> None:
    edit(saved, method="medusa")
    with pytest.raises(ValueError, match=r"'medusa'; known are tiny$"):
        load_model(saved, TinyTarget(), METHODS)


def test_weights_that_half_precision_cannot_hold(saved: Path) -> None:
    model = tiny_model(TinyTarget())
    with torch.no_grad():
        model.heads[0][0].bias[0] = 1e6
    with pytest.raises(ValueError, match=r"heads\.0\.0\.bias holds values that torch\.float16 cannot"):
        save_checkpoint(saved, model, "tiny", TinyTarget().spec, {})
    save_checkpoint(saved, model, "tiny", TinyTarget().spec, {}, dtype=torch.bfloat16)


def killed(work: Callable[[], None]) -> None:
    """Run work in a process of its own that kills itself in the midst of it."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("step", ["writing", "first rename", "second rename", "clean-up"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "best"
    replace_folder(place, lambda folder: write(folder, "old"))

    def replace() -> None:
        if step == "writing":
            replace_folder(place, lambda folder: (write(folder, "half"), kill()))
        renames = []
        rename = os.rename

        def rename_or_die(source: Path, destination: Path) -> None:
            renames.append(source)
            if len(renames) == ["first rename", "second rename", "clean-up"].index(step) + 1:
                kill()
            rename(source, destination)

        monkeypatch.setattr(os, "rename", rename_or_die)
        monkeypatch.setattr("shutil.rmtree", lambda *_, **__: kill() if len(renames) == 2 else None)
        replace_folder(place, lambda folder: write(folder, "new"))

    killed(replace)
    left = sorted(tmp_path.iterdir())
    with pytest.raises(CorruptCheckpoint, match=r"config\.json is damaged"):
        read_checkpoint(place)
    assert (standing(place) / "config.json").read_text() == ("new" if step == "clean-up" else "old")
    assert sorted(tmp_path.iterdir()) == left  # readers move nothing
    replace_folder(place, lambda folder: write(folder, "newer"))
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert (place / "config.json").read_text() == "newer"


def test_a_checkpoint_is_read_in_the_midst_of_a_swap(saved: Path) -> None:
    wanted = load_model(saved, TinyTarget(), METHODS).state_dict()
    saved.rename(saved.with_name(f".{saved.name}.old"))
    found = load_model(saved, TinyTarget(), METHODS).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert load_drafter(saved, TinyTarget(), METHODS).default_tree == "comb:3"


def write(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)


def test_disk_full_leaves_the_checkpoint_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(OSError, match=r"drafter could not be written .*No space left.*; what it held before is whole"):
        save_checkpoint(saved, tiny_model(TinyTarget(), seed=1), "tiny", TinyTarget().spec, {})
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert list(saved.parent.iterdir()) == [saved]


def no_space(path: Path, data: bytes) -> int:
    raise OSError(28, "No space left on device")


def trained(steps: int, seed: int = 0) -> tuple[TinyModel, torch.optim.Optimizer]:
    model = tiny_model(TinyTarget(), seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        loss = sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, optimizer


def test_a_training_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    save_state(tmp_path, 3, model, optimizer, {"a": 1})
    drawn = torch.rand(2)
    other, fresh = trained(0, seed=1)
    place = latest(tmp_path)
    assert place is not None
    load_state(place, other, fresh)
    assert read_facts(place) == {"step": 3, "a": 1}
    assert torch.equal(torch.rand(2), drawn)
    for one, two in zip(optimizer.state_dict()["state"].values(), fresh.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), other.parameters(), strict=True))


def test_the_last_two_states_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    for step in (1, 2, 30, 200):
        save_state(tmp_path, step, model, optimizer, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000030", "step-00000200"]


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    save_state(tmp_path, 1, model, optimizer, {})
    place = latest(tmp_path)
    assert place is not None
    os.truncate(place / "optimizer.safetensors", 100)
    with pytest.raises(CorruptCheckpoint, match=r"optimizer\.safetensors"):
        load_state(place, model, optimizer)
    (place / "state.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match="delete"):
        read_facts(place)


def test_a_lock_excludes_and_ends_with_its_holder(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock"):
        with pytest.raises(ValueError, match=f"process {os.getpid()} is at work here"), exclusive(tmp_path / "lock"):
            pass
        killed(lambda: kill())
    with exclusive(tmp_path / "lock"):
        pass
