import json
from pathlib import Path

import pytest
import tiny_models
import torch
from test_engine import PROMPTS
from tiny_training import HIDDEN, TinyTarget, tiny_rows

from s4c import LLM, SamplingParams
from s4c.training.data import Row
from s4c.training.features import FeatureStore, Recording, open_features


@pytest.mark.parametrize("taps", [(), (2, 5)], ids=str)
def test_cached_equals_computed(tmp_path: Path, taps: tuple[int, ...]) -> None:
    target = TinyTarget()
    rows = tiny_rows(target, 9)
    fly, cache = (open_features(kind, tmp_path, rows, target, taps) for kind in ("fly", "cache"))
    for number in (3, 0, 8):
        assert torch.equal(cache(number), fly(number).bfloat16())
        assert cache(number).shape == (len(rows[number]), HIDDEN * (1 + len(taps)))


def test_a_second_training_computes_what_is_new_to_it(tmp_path: Path) -> None:
    target = TinyTarget()
    rows = tiny_rows(target, 7)
    open_features("cache", tmp_path, rows[:5], target)
    target.prefills = 0
    open_features("cache", tmp_path, rows[1:4], target)(0)
    assert target.prefills == 0
    both = open_features("cache", tmp_path, rows[::-1], target)
    assert target.prefills == 2
    assert torch.equal(both(6), open_features("fly", tmp_path, rows, target)(0).bfloat16())


def test_each_target_dtype_and_choice_of_layers_has_a_store(tmp_path: Path) -> None:
    other = TinyTarget()
    other.dtype = torch.bfloat16
    kinds = [(TinyTarget(), taps) for taps in ((), (1,), (1, 2), (12,))] + [(TinyTarget(1), ()), (other, ())]
    assert len({FeatureStore(tmp_path, *kind).folder for kind in kinds}) == len(kinds)
    assert FeatureStore(tmp_path, TinyTarget()).folder == FeatureStore(tmp_path, TinyTarget()).folder


def test_a_failure_keeps_the_rows_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TinyTarget()
    rows = tiny_rows(target, 5)
    prefill = target.prefill

    def break_down(slot: int, tokens: torch.Tensor, taps: object) -> torch.Tensor:
        if target.prefills == 3:
            raise OSError(28, "No space left on device")
        return prefill(slot, tokens)

    target.prefills = 0
    with monkeypatch.context() as patch:
        patch.setattr(target, "prefill", break_down)
        with pytest.raises(OSError, match="No space left"):
            open_features("cache", tmp_path, rows, target)
    assert len(FeatureStore(tmp_path, target).missing(rows)) == 2


@pytest.mark.parametrize("torn", ["a row", "a line", "a row without its line", "a line without its row"])
def test_what_a_killed_process_left_is_made_good(tmp_path: Path, torn: str) -> None:
    target = TinyTarget()
    rows = tiny_rows(target, 6)
    open_features("cache", tmp_path, rows[:4], target)
    store = FeatureStore(tmp_path, target)
    data, index = store.folder / "rows.bf16", store.folder / "rows.jsonl"
    if torn == "a row":
        data.write_bytes(data.read_bytes() + b"\1\2\3")
    elif torn == "a line":
        index.write_bytes(index.read_bytes()[:-9])
    elif torn == "a row without its line":
        index.write_bytes(index.read_bytes()[: index.read_bytes()[:-1].rfind(b"\n") + 1])
    else:
        data.write_bytes(data.read_bytes()[:-2])
    assert len(store.missing(rows)) == (2 if torn == "a row" else 3)
    cache, fly = (open_features(kind, tmp_path, rows, target) for kind in ("cache", "fly"))
    for number in range(6):
        assert torch.equal(cache(number), fly(number).bfloat16())


def test_stores_of_two_processes_see_each_other(tmp_path: Path) -> None:
    target = TinyTarget()
    rows = tiny_rows(target, 4)
    one, other = FeatureStore(tmp_path, target), FeatureStore(tmp_path, target)
    features = torch.arange(len(rows[1]) * HIDDEN).view(-1, HIDDEN).float()
    one.add(rows[0].tokens, features.new_zeros(len(rows[0]), HIDDEN))
    assert other.missing(rows) == [1, 2, 3]
    other.add(rows[1].tokens, features)
    assert one.missing(rows) == [2, 3]
    assert torch.equal(one.get(rows[1]), features.bfloat16())
    assert [json.loads(line)["start"] for line in (one.folder / "rows.jsonl").open()] == [0, len(rows[0])]


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be cache or fly"):
        open_features("disk", tmp_path, [], TinyTarget())


@pytest.mark.parametrize("batch", [1, 3])
def test_what_a_target_thought_while_it_wrote_is_what_it_thinks_of_the_text(tmp_path: Path, batch: int) -> None:
    path = str(tiny_models.save(tmp_path))
    llm = LLM(path, "none", runtime="torch", threads=1, max_batch=batch)
    recording = Recording(FeatureStore(tmp_path, llm.target))
    llm.use(recording)
    params = [SamplingParams(max_new_tokens=n, temperature=t) for n, t in ((9, 0.0), (1, 0.8), (4, 1.0), (12, 0.0))]
    prompts = [*PROMPTS, PROMPTS[0]][:4]
    written = llm.generate(prompts, params)
    recording.close()
    rows = [Row(tuple(p), tuple(g.token_ids), 0.0, "test") for p, g in zip(prompts, written, strict=True)]
    fly, stored = open_features("fly", tmp_path, rows, llm.target), open_features("cache", tmp_path, rows, llm.target)
    assert recording.store.missing(rows) == []
    for number, row in enumerate(rows):
        assert torch.allclose(stored(number)[:-1].float(), fly(number)[:-1], atol=0.05, rtol=0.02)
        assert not stored(number)[-1].any()
        assert len(stored(number)) == len(row)
