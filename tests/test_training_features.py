from pathlib import Path

import pytest
import torch
from tiny_training import HIDDEN, TinyTarget, tiny_rows

from s4c.training.features import cache_path, open_features


@pytest.mark.parametrize("taps", [(), (2, 5)], ids=str)
def test_cached_equals_computed(tmp_path: Path, taps: tuple[int, ...]) -> None:
    target = TinyTarget()
    rows = tiny_rows(target, 9)
    fly, cache = (open_features(kind, tmp_path, rows, target, taps) for kind in ("fly", "cache"))
    for number in (3, 0, 8):
        assert torch.equal(cache(number), fly(number).bfloat16())
        assert cache(number).shape == (len(rows[number]), HIDDEN * (1 + len(taps)))


def test_the_second_training_computes_nothing(tmp_path: Path) -> None:
    target = TinyTarget()
    rows = tiny_rows(target, 5)
    open_features("cache", tmp_path, rows, target)
    target.prefills = 0
    open_features("cache", tmp_path, rows, target)(0)
    assert target.prefills == 0


def test_the_file_is_one_of_its_rows_and_target(tmp_path: Path) -> None:
    target = TinyTarget()
    rows = tiny_rows(target, 5)
    other = TinyTarget()
    other.dtype = torch.bfloat16
    taps = ((), (1,), (1, 2), (12,))
    paths = {
        cache_path(tmp_path, *of) for of in ((rows, target), (rows[1:], target), (rows, TinyTarget(1)), (rows, other))
    }
    paths |= {cache_path(tmp_path, rows, target, tapped) for tapped in taps}
    assert len(paths) == 4 + len(taps) - 1


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TinyTarget()
    rows = tiny_rows(target, 5)
    prefill = target.prefill

    def break_down(slot: int, tokens: torch.Tensor, taps: object) -> torch.Tensor:
        if target.prefills == 3:
            raise OSError(28, "No space left on device")
        return prefill(slot, tokens)

    target.prefills = 0
    monkeypatch.setattr(target, "prefill", break_down)
    with pytest.raises(OSError, match="No space left"):
        open_features("cache", tmp_path, rows, target)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    target = TinyTarget()
    rows = tiny_rows(target, 5)
    open_features("cache", tmp_path, rows, target)
    path = cache_path(tmp_path, rows, target)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="delete it"):
        open_features("cache", tmp_path, rows, target)


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be cache or fly"):
        open_features("disk", tmp_path, [], TinyTarget())
