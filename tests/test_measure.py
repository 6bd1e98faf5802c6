"""What passes and drafts cost here: how it is measured, kept and trusted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from test_engine import PROMPTS, s4c_drafter
from typer.testing import CliRunner

from s4c import LLM, SamplingParams
from s4c.cli.main import app
from s4c.drafters.combined import CombinedDrafter
from s4c.drafters.ngram import NgramDrafter
from s4c.drafters.sdsat import SDSATConfig, SDSATDrafter, SDSATModel
from s4c.engine import measure
from s4c.engine.costs import CONTEXT
from s4c.engine.measure import known_costs, measured_costs
from s4c.engine.planner import DEEPEST, plans_by_levels
from s4c.models.loading import load_target
from s4c.types import DraftTree


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory = tiny_models.save(tmp_path_factory.mktemp("model"), "llama", seed=3)
    return LLM(str(directory), "none", max_batch=4)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """A cache folder of its own, and a clock that goes on by `clock[1]` at each look; `clock[2]` counts them."""
    monkeypatch.setenv("S4C_HOME", str(tmp_path / "home"))
    state = [0.0, 1.0, 0]

    def tick(device: torch.device) -> float:
        state[0] += state[1]
        state[2] += 1
        return state[0]

    monkeypatch.setattr(measure, "clock", tick)
    return state


def sdsat_drafter(llm: LLM) -> SDSATDrafter:
    drafter = SDSATModel(
        llm.target, SDSATConfig(tokens=3, rank=2, fused=1), torch.arange(llm.target.spec.vocab_size)
    ).drafter(llm.target)
    assert isinstance(drafter, SDSATDrafter)
    return drafter


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home" / "costs").iterdir())


@pytest.mark.parametrize("busy", [1.0, 3.0])
def test_the_cost_of_attention_is_that_of_a_quiet_machine(
    busy: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T(n) was measured in peace; passes behind a long context may be timed while something else runs."""
    near = {1: 0.016, 16: 0.024}

    def timed(target: Any, work: Any, sizes: Any, context: int = CONTEXT, **_: Any) -> dict[int, float]:
        return {n: busy * (near[n] + (context - CONTEXT) * (1e-6 + 2e-7 * n)) for n in sizes}

    monkeypatch.setattr(measure, "pass_seconds", timed)
    target = load_target(str(tiny_models.save(tmp_path, "llama")))
    target.spec = replace(target.spec, context_length=4096)
    assert measure.attention_seconds(target, near) == pytest.approx((1e-6, 2e-7))


def test_costs_are_measured_once_and_kept(llm: LLM, clock: list[float], tmp_path: Path) -> None:
    drafter, plans = s4c_drafter(llm), plans_by_levels()
    assert known_costs(llm.target, drafter, 2) is None
    costs = measured_costs(llm.target, drafter, plans, 2)
    assert set(costs.passes.values()) == set(costs.drafts.values()) == {1.0}
    assert set(costs.drafts) == set(range(DEEPEST + 1))
    looks, clock[2] = clock[2], 0
    again = measured_costs(llm.target, drafter, plans, 2)
    assert (again.passes, again.drafts) == (costs.passes, costs.drafts)
    assert clock[2] < looks / 3, "only a few passes, to see that nothing has changed"
    assert len(files(tmp_path)) == 1
    measured_costs(llm.target, drafter, plans, 1)
    measured_costs(llm.target, NgramDrafter(), plans, 2)
    assert len(files(tmp_path)) == 3


def test_what_probes_add_to_a_pass_and_a_tree_of_what_they_said_is_measured(llm: LLM, clock: list[float]) -> None:
    """By a clock that goes on by another half for a pass with probes and by 3 for a tree of what they said."""
    drafter = sdsat_drafter(llm)
    costs = measured_costs(llm.target, drafter, plans_by_levels(), 2)
    assert costs.probing == 0.0
    verify, candidates = llm.target.verify, drafter._candidates

    def slow_verify(tree: DraftTree, taps: Any = ()) -> Any:
        clock[0] += 0.5 * bool((tree.tokens >= llm.target.spec.vocab_size).any())
        return verify(tree, taps)

    def slow_candidates(sequences: Any, plan: Any, laws: Any) -> DraftTree:
        clock[0] += 3.0 * bool(len(laws[0]))
        return candidates(sequences, plan, laws)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.target, "verify", slow_verify)
        patch.setattr(drafter, "_candidates", slow_candidates)
        drafts, probing = measure.draft_seconds(llm.target, drafter, plans_by_levels(), costs.passes)
    assert probing == pytest.approx(0.5)
    assert drafts[0] == pytest.approx(1.0)
    assert [drafts[level] for level in range(1, DEEPEST + 1)] == pytest.approx([4.0] * DEEPEST)


def test_a_drafter_of_other_settings_has_costs_of_its_own(llm: LLM, clock: list[float]) -> None:
    drafter, plans = s4c_drafter(llm), plans_by_levels()
    measured_costs(llm.target, drafter, plans, 2)
    assert known_costs(llm.target, drafter, 2) is not None
    drafter.settings = "twice as many layers"
    assert known_costs(llm.target, drafter, 2) is None
    assert known_costs(llm.target, CombinedDrafter(drafter, NgramDrafter()), 2) is None


def test_a_machine_that_is_slower_is_the_same_machine(llm: LLM, clock: list[float]) -> None:
    drafter, plans = NgramDrafter(), plans_by_levels()
    measured_costs(llm.target, drafter, plans, 2)
    clock[1] = 2.0
    costs = measured_costs(llm.target, drafter, plans, 2)
    assert costs.passes[1] == 1.0
    assert costs.prices(1, 16).passes == pytest.approx([2.0] * 17, rel=0.05), "what it looked at is not forgotten"


def test_a_machine_whose_passes_changed_apart_is_measured_anew(llm: LLM, clock: list[float], tmp_path: Path) -> None:
    drafter, plans = NgramDrafter(), plans_by_levels()
    costs = measured_costs(llm.target, drafter, plans, 2)
    clock[1] = 2.0
    (file,) = files(tmp_path)
    tables = json.loads(file.read_text())
    file.write_text(json.dumps(tables | {"passes": costs.passes | {16: 0.5}}))
    assert measured_costs(llm.target, drafter, plans, 2).passes[1] == pytest.approx(2.0)
    known = known_costs(llm.target, drafter, 2)
    assert known is not None
    assert known.passes[1] == pytest.approx(2.0)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        '{"passes": {}, "drafts": {"0": 1}, "attention": [0, 0], "probing": 0}',
        '{"passes": {"1": -1, "2": 1}, "drafts": {"0": 1}, "attention": [0, 0], "probing": 0}',
        '{"passes": {"1": 1, "2": 1}, "drafts": {"0": 1}, "attention": [0], "probing": 0}',
    ],
)
def test_a_damaged_file_is_measured_anew(llm: LLM, clock: list[float], tmp_path: Path, damage: str) -> None:
    drafter = NgramDrafter()
    costs = measured_costs(llm.target, drafter, plans_by_levels(), 2)
    (file,) = files(tmp_path)
    file.write_text(damage)
    assert known_costs(llm.target, drafter, 2) is None
    assert measured_costs(llm.target, drafter, plans_by_levels(), 2).passes == costs.passes
    assert json.loads(file.read_text())["passes"]["1"] == 1.0
    assert files(tmp_path) == [file]


def test_a_cache_that_cannot_be_written_is_named_and_no_hindrance(
    llm: LLM, clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("S4C_HOME", str(tmp_path / "file"))
    with pytest.warns(match="S4C_HOME"):
        assert measured_costs(llm.target, NgramDrafter(), plans_by_levels(), 2).passes[1] == 1.0


def test_a_plan_is_asked_for_by_name(llm: LLM, clock: list[float]) -> None:
    llm.rule = "coupled"
    llm.use("none")
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    plain = llm.generate(PROMPTS[3], params).token_ids
    drafter = CombinedDrafter(s4c_drafter(llm), NgramDrafter())
    llm.use(drafter, "plan")
    assert llm.generate(PROMPTS[3], params).token_ids == plain
    planner = llm._planners[drafter]
    llm.use("none")
    llm.use(drafter, "plan")
    assert llm._engine.planner is planner, "what it has learnt is kept"


def test_the_command_line_plans(clock: list[float], tmp_path: Path) -> None:
    directory = tiny_models.save(tmp_path / "model", "llama", tokenizer=True)
    command = ["generate", "abcabcabc", "--raw", "--target", str(directory), "--max-new-tokens", "12", "--json"]
    answers = [json.loads(CliRunner().invoke(app, [*command, *more]).stdout) for more in ([], ["--tree", "plan"])]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert answers[1]["stats"]["tree_sizes"]
