"""The bench: a fair choice of questions, and an equality check that can fail."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from typer.testing import CliRunner

from s4c import LLM, SamplingParams
from s4c.bench.questions import Question, read_questions, sample
from s4c.bench.run import PEER, TIE, Answer, Bench, summarise
from s4c.cli.main import app

QUESTIONS = [
    {"question_id": number, "category": category, "turns": [f"Say {number}.", "And again?"]}
    for number, category in enumerate(["writing", "coding", "qa", "qa", "qa", "rag", "rag", "rag"])
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.save(tmp_path, "llama", tokenizer=True)


def test_the_eight_chat_categories_count_as_one(file: Path) -> None:
    assert Counter(q.category for q in read_questions(file)) == {"mt_bench": 2, "qa": 3, "rag": 3}


@pytest.mark.parametrize(
    "line", ["no json", '{"category": "qa", "turns": ["x"]}', '{"question_id": 1, "category": "qa"}']
)
def test_a_bad_line_is_named(file: Path, line: str) -> None:
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ValueError, match="line 9"):
        read_questions(file)


def test_a_sample_is_spread_over_the_categories(file: Path) -> None:
    questions = read_questions(file)
    chosen = sample(questions, 6, seed=0)
    assert Counter(q.category for q in chosen) == {"mt_bench": 2, "qa": 2, "rag": 2}
    assert chosen == sample(questions, 6, seed=0)
    assert any(sample(questions, 6, seed=seed) != chosen for seed in range(1, 5))
    assert len(sample(questions, 100, seed=0)) == 8


def test_methods_answer_alike_one_by_one_and_in_batches(model: Path, file: Path) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=1.0)
    bench = Bench(LLM(str(model), "none", max_batch=4), ["ngram@chain:3"], params)
    questions = read_questions(file)
    answers = list(bench.run(questions[:4]))
    assert Counter(a.method for a in answers) == {"none": 4, "ngram@chain:3": 4}
    assert {a.equal for a in answers if a.method != "none"} == {"identical"}
    together = bench.batch(questions[:4], "ngram@chain:3")
    alone = {a.question: a.token_ids for a in answers if a.method == "none"}
    assert {a.question: a.token_ids for a in together} == alone


def test_another_token_is_told_from_a_tie(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(model), "none")
    bench = Bench(llm, [], SamplingParams(max_new_tokens=8))
    prompt = bench.prompt(Question("1", "qa", "Say it."))
    plain = llm.generate(prompt, replace(bench.params, ignore_eos=True)).token_ids
    assert bench.compare(prompt, plain, plain, PEER) == "identical"
    wrong = [*plain[:3], (plain[3] + 1) % 256, *plain[4:]]
    assert bench.compare(prompt, plain, wrong, PEER).startswith("different: token 3")
    assert bench.compare(prompt, plain, plain[:5], PEER) == "different: 5 tokens instead of 8"
    scores = bench.scores_after(prompt, plain[:3], [plain[3], wrong[3]])
    assert scores[0] > scores[1] + TIE[torch.float32]
    monkeypatch.setattr(bench, "scores_after", lambda *_: [scores[0], scores[0] - 5e-5])
    assert bench.compare(prompt, plain, wrong, PEER).startswith("tie: token 3")
    own = "tie" if llm.target.runtime == "torch" else "different"
    assert bench.compare(prompt, plain, wrong, "ngram").startswith(f"{own}: token 3")


def test_the_summary_pools_tokens_and_seconds() -> None:
    def answer(question: str, method: str, tokens: int, seconds: float, rounds: int) -> Answer:
        equal = "" if method == "none" else "identical"
        return Answer(question, "qa", method, [0] * tokens, seconds + 1, seconds, rounds, equal)

    rows = summarise(
        [
            answer("1", "none", 10, 1.0, 10),
            answer("2", "none", 30, 5.0, 30),
            answer("1", "fast", 10, 1.0, 5),
            answer("2", "fast", 30, 1.0, 11),
        ]
    )
    assert [row["method"] for row in rows] == ["none", "fast"]
    assert rows[1]["speedup"] == pytest.approx(3.0)
    assert rows[1]["mean_acceptance_length"] == pytest.approx(2.5)
    assert rows[1]["tokens_per_second"] == pytest.approx(20.0)


@pytest.mark.parametrize("batch", [[], ["--batch", "3", "--singly"]])
def test_the_command(model: Path, file: Path, tmp_path: Path, batch: list[str]) -> None:
    out = tmp_path / "answers.jsonl"
    common = ["bench", "--questions", str(file), "--sample", "3", "--target", str(model), "--methods", "ngram"]
    more = ["--max-new-tokens", "6", "--threads", "1", "--out", str(out), "--json"]
    result = CliRunner().invoke(app, [*common, *more, *batch])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert all(row["identical"] == 3 for row in summary)
    assert len(out.read_text().splitlines()) == 3 * len(summary)
