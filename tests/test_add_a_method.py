"""The drafter of docs/ADD_A_METHOD.md, run from the page: put into the table by its one line, it works everywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from s4c import LLM, SamplingParams
from s4c.bench.contestants import PLAIN, Method
from s4c.bench.questions import Question
from s4c.bench.run import Bench
from s4c.drafters import METHODS
from s4c.drafters.base import Sequences
from s4c.verify.tree import TreePlan

PAGE = Path(__file__).parent.parent / "docs" / "ADD_A_METHOD.md"
PROMPTS = [[5, 6, 7, 5, 6, 7, 5], [9], [1, 2, 3, 4, 1]]


@pytest.fixture(autouse=True)
def method(monkeypatch: pytest.MonkeyPatch) -> Any:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 36
    module: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), module)
    monkeypatch.setitem(METHODS, "successor", module["METHOD"])
    return module["METHOD"]


def test_it_drafts_what_followed_last_time(method: Any) -> None:
    drafter = method.create(None, "")
    drafter.prefill(0, torch.tensor([1, 2, 3, 9, 2, 4, 5]), torch.zeros(7, 8))
    line = [1, 2, 3, 9, 2, 4, 5, 2]
    sequences = Sequences([line], None, False, TreePlan.parse("chain:4"))  # type: ignore[arg-type]
    assert drafter.propose(sequences).tokens.tolist() == [[2, 4, 5]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafter", ["successor", "successor+ngram"])
def test_it_is_lossless_by_name(tmp_path: Path, drafter: str, temperature: float) -> None:
    params = SamplingParams(max_new_tokens=25, ignore_eos=True, temperature=temperature)
    llm = LLM(str(tiny_models.save(tmp_path, "llama")), "none", max_batch=2, threads=1)
    plain = [g.token_ids for g in llm.generate(PROMPTS, params)]
    llm.use(drafter)
    assert [g.token_ids for g in llm.generate(PROMPTS, params)] == plain
    assert [llm.generate(prompt, params).token_ids for prompt in PROMPTS] == plain
    with pytest.raises(ValueError, match="must be written successor"):
        llm.use("successor=something")


def test_the_bench_and_the_messages_know_it(tmp_path: Path) -> None:
    llm = LLM(str(tiny_models.save(tmp_path, "llama", tokenizer=True)), "none", threads=1)
    contestants = [Method(llm, PLAIN), Method(llm, "successor@chain:2")]
    bench = Bench(llm, contestants, SamplingParams(max_new_tokens=8, ignore_eos=True))
    answers = list(bench.run([Question("1", "writing", ("abcabc",))]))
    assert {(a.method, a.equal) for a in answers} == {(PLAIN, ""), ("successor@chain:2", "identical")}
    with pytest.raises(ValueError, match="successor"):
        llm.use("nobody")
