"""The bench: a fair choice of questions, an equality check that can fail, figures that are right, runs that go on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from typer.testing import CliRunner

from s4c import LLM, SamplingParams
from s4c.bench import questions as asking
from s4c.bench.contestants import PLAIN, Contestant, Method, Reply, canonical, counted, split_methods
from s4c.bench.equality import TIE, Judge
from s4c.bench.questions import Question, of_categories, read_questions, sample
from s4c.bench.run import NOT_ASKED, SINGLY, Bench, Row
from s4c.bench.summary import summarise
from s4c.cli.bench import build_methods
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("model"), "llama", tokenizer=True)


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(str(model), "none", max_batch=4, threads=1)


class Fake(Contestant):
    """Answers as plain decoding does, in a time of its own choice."""

    def __init__(self, name: str, plain: Contestant, seconds_a_token: float, tokens_a_round: int = 1) -> None:
        self.name, self.own = name, True
        self.plain, self.delay, self.stride = plain, seconds_a_token, tokens_a_round
        self.asked: list[list[int]] = []

    def answer(self, prompt: list[int], params: SamplingParams) -> Reply:
        self.asked.append(prompt)
        reply = self.plain.answer(prompt, params)
        count = len(reply.token_ids)
        rounds, rest = divmod(count, self.stride)
        histogram = [0] * self.stride
        histogram[-1] = rounds
        if rest:
            histogram[rest - 1] += 1
        return replace(reply, prefill_seconds=1.0, decode_seconds=self.delay * count, histogram=histogram)


class Dying(Fake):
    def answer(self, prompt: list[int], params: SamplingParams) -> Reply:
        if len(self.asked) == 3:
            raise OSError("the plug was pulled")
        return super().answer(prompt, params)


class Wrong(Fake):
    def answer(self, prompt: list[int], params: SamplingParams) -> Reply:
        reply = super().answer(prompt, params)
        return replace(reply, token_ids=[*reply.token_ids[:2], 7, *reply.token_ids[3:]])


def contest(llm: LLM, *others: Contestant, **more: Any) -> Bench:
    plain = Fake(PLAIN, Method(llm, PLAIN), 0.5)
    return Bench(llm, [plain, *others], SamplingParams(max_new_tokens=6, ignore_eos=True), **more)


def fake(llm: LLM, name: str = "fast", delay: float = 0.2, kind: type[Fake] = Fake, stride: int = 3) -> Fake:
    return kind(name, Method(llm, PLAIN), delay, stride)


# Questions


def test_the_eight_chat_categories_count_as_one(file: Path) -> None:
    assert Counter(q.category for q in read_questions(file)) == {"mt_bench": 2, "qa": 3, "rag": 3}


def test_prompts_and_chats_are_questions_too(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    rows: list[dict[str, Any]] = [{"prompt": "Why? \u2028 So."}, {"messages": chat, "reference": "me"}]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    first, second = read_questions(tmp_path / "q.jsonl")
    assert (first.name, first.turns, first.category) == ("1", ("Why? \u2028 So.",), "all")
    assert (second.turns, second.before, second.references) == (("Who?",), (chat[0],), ("me",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 9"),
        ("[1]", "no JSON object"),
        ('{"category": "qa"}', "neither turns nor prompt nor messages"),
        ('{"prompt": "x", "turns": ["x"]}', "turns and prompt"),
        ('{"turns": []}', "line 9"),
        ('{"turns": ["x", 3]}', "line 9"),
        ('{"prompt": " "}', "line 9"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "ends with the user"),
        ('{"question_id": 3, "prompt": "x"}', "line 9: question_id 3 stands there a second time"),
    ],
)
def test_a_bad_line_is_named(file: Path, line: str, message: str) -> None:
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ValueError, match="line 9") as caught:
        read_questions(file)
    assert message in str(caught.value)


def test_a_sample_is_spread_over_the_categories(file: Path) -> None:
    questions = read_questions(file)
    chosen = sample(questions, 6, seed=0)
    assert Counter(q.category for q in chosen) == {"mt_bench": 2, "qa": 2, "rag": 2}
    assert chosen == sample(questions, 6, seed=0)
    assert any(sample(questions, 6, seed=seed) != chosen for seed in range(1, 5))
    assert len(sample(questions, 100, seed=0)) == 8


def test_the_shipped_questions_are_of_spec_benchs_kinds() -> None:
    questions = read_questions(asking.SHIPPED)
    kinds = Counter(q.category for q in questions)
    assert set(kinds) == {"chat", "translation", "summarization", "qa", "math_reasoning", "rag", "code"}
    assert min(kinds.values()) >= 5
    assert any(len(q.turns) == 2 for q in questions)
    assert all(len(q.references) in (0, len(q.turns)) for q in questions)
    assert len(of_categories(questions, ["qa", "rag"])) == kinds["qa"] + kinds["rag"]


# Contestants


def test_options_of_a_method_stand_behind_at_signs(llm: LLM) -> None:
    method = Method(llm, "ngram@rule=rejection@chain:3@temperature=0.5")
    assert (method.tree, method.rule, method.temperature, method.nodes) == ("chain:3", "rejection", 0.5, 4)
    assert not method.comparable(0.5)
    assert method.comparable(0.0)
    assert canonical(" none ") == Method(llm, "none").name == PLAIN
    assert Method(llm, "ngram", "rejection").name == canonical("ngram", "rejection") == "ngram@rule=rejection"
    for spec, message in {
        "ngram@bush:2": "tree 'bush:2'",
        "ngram@luck=1": "'luck=1' is not known; after an @ may stand",
        "ngram@rule=luck": "rule 'luck'",
        "ngram@temperature=warm": "method 'ngram@temperature=warm'",
        "nobody": "drafter 'nobody' is not known",
    }.items():
        with pytest.raises(ValueError, match=message):
            Method(llm, spec)


def test_a_method_that_is_named_twice_takes_part_once(llm: LLM) -> None:
    found = build_methods(llm, "none,ngram,ngram@rule=rejection,plain, ngram", rule="rejection")
    assert [contestant.name for contestant in found] == [PLAIN, "ngram@rule=rejection"]


def test_the_comma_of_a_drafter_splits_no_list() -> None:
    first, second = "draft-model=a,stop=0.2", "ngram+draft-model=b,stop=0.2@chain:4"
    assert split_methods(f" auto, {first},{second},,lr=1/best,ngram") == ["auto", first, second, "lr=1/best", "ngram"]


def test_tokens_count_up_to_and_including_the_first_end() -> None:
    reply = Reply([5, 9, 5, 9, 5], 1.0, 1.0, decode_tokens=4)
    assert counted(reply, [9], 10).token_ids == [5, 9]
    assert counted(reply, [9], 10).decode_tokens == 1
    assert counted(reply, [7], 3).token_ids == [5, 9, 5]
    assert counted(reply, [7], 10) == reply


# The run


def test_methods_answer_alike_one_by_one_and_in_batches(llm: LLM, file: Path) -> None:
    contestants = [Method(llm, PLAIN), Method(llm, "ngram@chain:3"), Method(llm, "ngram@chain:2@temperature=0.7")]
    questions = read_questions(file)[:4]

    def bench() -> Bench:
        return Bench(llm, contestants, SamplingParams(max_new_tokens=12), [0.0, 1.0], turns=2)

    alone = list(bench().run(questions))
    assert Counter((row.method, row.temperature) for row in alone) == {
        (PLAIN, 0.0): 8,
        (PLAIN, 1.0): 8,
        (PLAIN, 0.7): 8,
        ("ngram@chain:3", 0.0): 8,
        ("ngram@chain:3", 1.0): 8,
        ("ngram@chain:2@temperature=0.7", 0.7): 8,
    }
    assert {row.equal for row in alone if row.method != PLAIN} == {"identical"}
    assert len(alone) == bench().answers(questions)
    together = list(bench().run_batched(questions, singly=True))
    assert len(together) == bench().answers(questions, singly=True)
    assert {row.equal for row in together if row.method != PLAIN} == {"identical"}
    tokens = {row.key: list(row.token_ids) for row in alone}
    assert {row.key: list(row.token_ids) for row in together if row.method != SINGLY} == tokens


def test_a_round_of_each_in_turn_gives_the_same_answers(llm: LLM, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    whole = Method.rounds

    def noted(self: Method, prompt: list[int], params: SamplingParams) -> Iterator[Reply | None]:
        for reply in whole(self, prompt, params):
            order.append(self.name)
            yield reply

    monkeypatch.setattr(Method, "rounds", noted)
    names = [PLAIN, "ngram@chain:3", "ngram@chain:2"]
    contestants = [*(Method(llm, name) for name in names), fake(llm), Dying("dying", Method(llm, PLAIN), 0.1)]
    params, questions = SamplingParams(max_new_tokens=12, ignore_eos=True), read_questions(file)[:4]

    def rows(by_round: bool) -> list[Row]:
        return list(Bench(llm, contestants, params, [0.0, 1.0], by_round=by_round).run(questions))

    by_answer = {row.key: row for row in rows(False) if row.method != "dying"}
    assert not order
    contestants[-1] = Dying("dying", Method(llm, PLAIN), 0.1)
    by_round = rows(True)
    for row in by_round:
        if row.method != "dying":
            assert (row.token_ids, row.histogram) == (by_answer[row.key].token_ids, by_answer[row.key].histogram)
    assert {row.equal for row in by_round if row.method in names[1:]} == {"identical"}
    assert [row.error for row in by_round if row.method == "dying"] == [None, None, "OSError: the plug was pulled"]
    assert {row.memory is None for row in by_round if row.method in names} == {True}
    assert order[: len(names) * 3].count(PLAIN) == 3  # as long as all answer, each has one of so many rounds
    assert len({tuple(order[at : at + 3]) for at in range(0, 9, 3)}) > 1


def test_a_second_turn_stands_behind_plain_decodings_own_answer(llm: LLM, file: Path) -> None:
    question = read_questions(file)[0]
    runner, seen = contest(llm, other := fake(llm), turns=2), []
    seen = [row for row in runner.run([question]) if row.method == PLAIN]
    chat = [{"role": "user", "content": question.turns[0]}]
    chat += [{"role": "assistant", "content": llm.decode(list(seen[0].token_ids))}]
    chat += [{"role": "user", "content": question.turns[1]}]
    assert other.asked[-1] == llm.token_ids(chat)
    assert [row.turn for row in seen] == [0, 1]


def test_every_question_goes_to_all_in_changing_order_after_a_warm_up(llm: LLM, file: Path) -> None:
    order: list[str] = []

    class Noting(Fake):
        def answer(self, prompt: list[int], params: SamplingParams) -> Reply:
            order.append(self.name)
            return super().answer(prompt, params)

    others = [fake(llm, name, kind=Noting) for name in ("a", "b", "c")]
    rows = list(contest(llm, *others, repeats=2).run(read_questions(file)))
    assert len(rows) == 8 * 4 * 2
    turns = [tuple(order[at : at + 3]) for at in range(3, len(order), 3)]
    assert tuple(order[:3]) == ("a", "b", "c")
    assert {tuple(sorted(turn)) for turn in turns} == {("a", "b", "c")}
    assert len(turns) == 16
    assert len(set(turns)) > 2


def test_known_delays_give_the_known_speedup(llm: LLM, file: Path) -> None:
    rows = list(
        contest(llm, fake(llm, "fast", 0.2, stride=3), fake(llm, "slow", 1.0, stride=1)).run(read_questions(file))
    )
    entries = {entry["method"]: entry for entry in summarise(rows, timed=True)}
    for name, speedup, mal in ((PLAIN, 1.0, 1.0), ("fast", 2.5, 3.0), ("slow", 0.5, 1.0)):
        entry = entries[name]
        assert entry["speedup"] == pytest.approx({"value": speedup, "low": speedup, "high": speedup})
        assert set(entry["speedup_by_category"]) == {"mt_bench", "qa", "rag"}
        assert entry["quartiles"] == pytest.approx([speedup] * 3)
        assert entry["mal"]["value"] == pytest.approx(mal)
    assert entries["fast"]["tokens_per_second"] == pytest.approx(5.0)
    assert entries["fast"]["speedup_with_prefill"]["value"] == pytest.approx((1 + 3.0) / (1 + 1.2))


def test_who_dies_midway_says_so_and_the_others_finish(llm: LLM, file: Path) -> None:
    dying = fake(llm, "dying", kind=Dying)
    rows = list(contest(llm, dying, fake(llm)).run(read_questions(file)))
    assert Counter(row.method for row in rows) == {PLAIN: 8, "fast": 8, "dying": 3}
    assert [row.error for row in rows if row.method == "dying"] == [None, None, "OSError: the plug was pulled"]
    entry = next(entry for entry in summarise(rows, timed=True) if entry["method"] == "dying")
    assert entry["speedup"]["value"] == pytest.approx(2.5)
    assert entry["errors"] == ["question 2: OSError: the plug was pulled"]


def test_a_run_goes_on_where_it_stood(llm: LLM, file: Path) -> None:
    questions = read_questions(file)
    whole = list(contest(llm, fake(llm), turns=2).run(questions))
    part, other = whole[:9], fake(llm)
    again = contest(llm, other, turns=2, done=part)
    assert {row.key for row in again.run(questions)} == {row.key for row in whole[9:]}
    assert len(other.asked) == 16 - sum(row.method == "fast" for row in part) + 1
    batched = Bench(llm, [Method(llm, PLAIN), Method(llm, "ngram")], SamplingParams(max_new_tokens=4), turns=2)
    rows = list(batched.run_batched(questions))
    resumed = Bench(llm, batched.contestants, batched.params, turns=2, done=rows[:11])
    assert [row.key for row in resumed.run_batched(questions)] == [row.key for row in rows[11:]]


def test_a_turn_without_room_in_the_context_is_left_out(llm: LLM) -> None:
    long = Question("1", "qa", ("a" * 60, "b" * 60, "c"))
    rows = list(contest(llm, turns=3).run([long]))
    assert [row.turn for row in rows] == [0]
    with pytest.raises(ValueError, match=r"question 1 has \d+ tokens; the context"):
        contest(llm).check([Question("1", "qa", ("a" * 200,))])


# Equality


def test_another_token_is_told_from_a_tie(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    judge = Judge(llm.target)
    prompt = llm.token_ids([{"role": "user", "content": "Say it."}])
    plain = llm.generate(prompt, params).token_ids
    assert judge.compare(prompt, plain, plain, params, own=False) == "identical"
    wrong = [*plain[:3], (plain[3] + 1) % 256, *plain[4:]]
    assert judge.compare(prompt, plain, wrong, params, own=False).startswith("different: token 3")
    assert judge.compare(prompt, plain, plain[:5], params, own=False) == "different: 5 tokens instead of 8"
    scores = judge.scores_after(prompt, plain[:3], [plain[3], wrong[3]], params)
    assert scores[0] > scores[1] + TIE[torch.float32]
    monkeypatch.setattr(judge, "scores_after", lambda *_: [scores[0], scores[0] - 5e-5])
    assert judge.compare(prompt, plain, wrong, params, own=False).startswith("tie: token 3")
    own = "tie" if llm.target.runtime == "torch" else "different"
    assert judge.compare(prompt, plain, wrong, params, own=True).startswith(f"{own}: token 3")


def test_a_wrong_answer_is_found_and_a_peers_sampled_one_not_asked(llm: LLM, file: Path) -> None:
    wrong = fake(llm, "wrong", kind=Wrong)
    peer = fake(llm, "peer", kind=Wrong)
    peer.own = False
    runner = contest(llm, wrong, peer, temperatures=[0.0, 1.0])
    wrong.comparable = lambda temperature: True  # type: ignore[method-assign]
    verdicts = {(row.method, row.temperature): row.equal for row in runner.run(read_questions(file)[:1])}
    assert verdicts["wrong", 0.0].startswith("different: token 2 is 7")
    assert verdicts["wrong", 1.0].startswith("different: token 2 is 7")
    assert verdicts["peer", 0.0].startswith("different: token 2 is 7")
    assert verdicts["peer", 1.0] == NOT_ASKED


# The command


def command(model: Path, file: Path, *more: object, code: int = 0) -> Any:
    args = [
        "bench",
        "--questions",
        file,
        "--target",
        model,
        "--methods",
        "ngram",
        "--max-new-tokens",
        6,
        "--threads",
        1,
    ]
    result = CliRunner().invoke(app, [str(arg) for arg in [*args, *more]])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("how", [[], ["--by-round"], ["--batch", 3, "--singly"], ["--equality-only"]])
def test_the_command(model: Path, file: Path, tmp_path: Path, how: Sequence[object]) -> None:
    out = tmp_path / "run"
    result = command(model, file, "--sample", 3, "--temperatures", "0,1", "--out", out, "--json", *how)
    summary = json.loads(result.stdout)
    assert summary["complete"]
    assert not summary["failed"]
    assert all(e["identical"] == 3 for e in summary["entries"] if e["method"] != PLAIN)
    assert len(lines(out)) == 3 * len(summary["entries"]) == summary["expected"]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert ("speedup" in summary["entries"][0]) == (how in ([], ["--by-round"]))
    report = (out / "report.md").read_text()
    assert "## Equality" in report
    assert ("a round of each method in turn" in report) == (how == ["--by-round"])
    assert "ngram" in command(model, file, "--sample", 3, *how).stdout


def test_an_answer_unlike_plain_decodings_fails_the_run(
    model: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Method.answer

    def wrong(self: Method, prompt: list[int], params: SamplingParams) -> Reply:
        reply = whole(self, prompt, params)
        return reply if self.name == PLAIN else replace(reply, token_ids=[7, *reply.token_ids[1:]])

    monkeypatch.setattr(Method, "answer", wrong)
    shown = command(model, file, "--limit", 2, "--out", tmp_path / "run", code=1).stdout
    assert "NOT EQUAL: ngram at temperature 0" in shown
    assert "question 0: different: token 0 is 7 (" in shown
    assert "NOT EQUAL" in (tmp_path / "run" / "report.md").read_text()


def test_an_interrupted_run_leaves_a_report_and_goes_on(
    model: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    whole = Method.answer

    def interrupted(self: Method, prompt: list[int], params: SamplingParams) -> Reply:
        if (out / "results.jsonl").read_text().count("\n") >= 6:
            raise KeyboardInterrupt
        return whole(self, prompt, params)

    monkeypatch.setattr(Method, "answer", interrupted)
    command(model, file, "--out", out, code=130)
    assert "Partial: 6 of 16 answers" in (out / "report.md").read_text()
    monkeypatch.undo()
    (out / "results.jsonl").write_text((out / "results.jsonl").read_text()[:-20])  # a kill cuts a line short
    assert "holds another run; --resume" in command(model, file, "--out", out, code=2).stderr
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "report.md").write_text("of somebody else")
    assert "holds report.md, but no run" in command(model, file, "--out", tmp_path / "notes", code=2).stderr
    assert (tmp_path / "notes" / "report.md").read_text() == "of somebody else"
    unlike = command(model, file, "--out", out, "--resume", "--seed", 1, code=2).stderr
    assert "other settings: seed was 0 and is 1" in unlike
    command(model, file, "--out", out, "--resume")
    assert json.loads((out / "summary.json").read_text())["complete"]
    assert len(json.loads((out / "run.json").read_text())["parts"]) == 2
    keys = [(row["question"], row["method"]) for row in lines(out)]
    assert len(keys) == len(set(keys)) == 16
    command(model, file, "--out", out, "--force", "--limit", 1)
    assert len(lines(out)) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--categories", "qa,sports"], "category 'sports' is not among the questions; there are mt_bench, qa, rag"),
        (["--methods", "ngram,nobody"], "it must be auto, none, shipped, ngram"),
        (["--methods", ","], "--methods is ','; name at least one, or plain"),
        (["--peers", "hf,nobody"], "it must be one of hf, hf-lookup"),
        (["--context-length", "7"], "context_length is 7; it must be an integer from 8 to"),
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--temperatures", "0;1"], "numbers with commas"),
        (["--temperatures", "-1"], "temperature is -1.0; it must be"),
        (["--resume"], "name it by --out"),
        (["--batch", "4", "--peers", "hf"], "--peers are timed one by one"),
        (["--batch", "4", "--by-round"], "--by-round is for timing"),
        (["--singly"], "--singly is for --equality-only"),
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--out", "{file}"], "is a file; --out names a folder"),
    ],
)
def test_bad_input_ends_as_one_line(model: Path, file: Path, args: list[str], message: str) -> None:
    result = command(model, file, *(arg.format(file=file) for arg in args), code=2)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


def test_rows_are_rows() -> None:
    row = Row("1", "qa", 1, 0.6, 2, "ngram")
    assert row.key == ("1", 1, 0.6, 2, "ngram")
