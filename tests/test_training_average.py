"""The mean of drafters: each weight that of those that have it, and a reason where there is none."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from s4c import LLM
from s4c.cli.main import app
from s4c.drafters.checkpoint import load_model, save_checkpoint
from s4c.drafters.s4c import METHOD, S4CConfig, S4CModel
from s4c.engine.llm import METHODS
from s4c.models.base import Target
from s4c.models.loading import load_target
from s4c.training.average import average

SHIPPED = Path(__file__).parent.parent / "s4c/shipped/smollm2-135m"


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return load_target(str(tiny_models.save(tmp_path / "target", "llama")))


@pytest.fixture
def saved(target: Target, tmp_path: Path) -> list[Path]:
    """A drafter of two heads and one of three, for the same tiny target."""
    places = []
    for heads in (2, 3):
        torch.manual_seed(heads)
        model = S4CModel(target, S4CConfig(heads=heads, draft_vocab=8), torch.arange(0, 16, 2))
        places.append(tmp_path / f"of-{heads}")
        save_checkpoint(places[-1], model, METHOD.name, target.spec, {})
    return places


def test_each_weight_is_the_mean_of_those_that_have_it(saved: list[Path], target: Target, tmp_path: Path) -> None:
    two, three = saved
    average([three, two], tmp_path / "mean")
    parts = [load_file(place / "model.safetensors") for place in saved]
    mean = load_file(tmp_path / "mean/model.safetensors")
    assert mean.keys() == parts[1].keys()
    for name, value in mean.items():
        have = torch.stack([part[name].float() for part in parts if name in part])
        assert torch.equal(value, have.mean(0).to(value.dtype)), name
    assert load_model(tmp_path / "mean", target, METHODS).config.heads == 3
    assert "the mean of" in (tmp_path / "mean/README.md").read_text().lower()


def test_a_folder_of_something_else_is_not_replaced(saved: list[Path], tmp_path: Path) -> None:
    average(saved[::-1], tmp_path / "mean")
    average(saved[::-1], tmp_path / "mean")
    with pytest.raises(ValueError, match="holds something else than a drafter"):
        average(saved[::-1], tmp_path)
    assert all((place / "model.safetensors").exists() for place in saved)


def test_the_mean_of_one_thing_is_that(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["average", str(SHIPPED), str(SHIPPED), "--out", str(tmp_path / "mean")])
    assert result.exit_code == 0, result.output
    ours, theirs = (load_file(place / "model.safetensors") for place in (tmp_path / "mean", SHIPPED))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_it_drafts_and_changes_nothing(saved: list[Path], target: Target, tmp_path: Path) -> None:
    average(saved[::-1], tmp_path / "mean")
    plain, drafting = (LLM(target.spec.name, drafter) for drafter in ("none", str(tmp_path / "mean")))
    prompt = [1, 2, 3, 4]
    assert drafting.generate(prompt).token_ids == plain.generate(prompt).token_ids


def edit(place: Path, **changes: object) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | changes))


def test_what_has_no_mean_is_refused_with_the_reason(saved: list[Path], tmp_path: Path) -> None:
    two, three = saved
    other = tmp_path / "other"

    def refused(places: list[Path], reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            average(places, tmp_path / "mean")
        assert not (tmp_path / "mean").exists()
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(two, other)

    refused([two], "at least two")
    refused([two, three], "heads.2.*name the one that has all weights first")
    edit(other, method="medusa")
    refused([two, other], "differ in method .s4c, medusa.")
    edit(other, target={"name": "another", "fingerprint": "0"})
    refused([two, other], "differ in fingerprint")
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"token_ids": tensors["token_ids"] + 1}, other / "model.safetensors")
    refused([two, other], "draft vocabularies")
    (other / "model").mkdir()
    refused([two, other], "a target of its own")
