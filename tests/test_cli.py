"""The command line, on a tiny random model: what it prints where, how it fails, how it is interrupted."""

from __future__ import annotations

import inspect
import json
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save
from typer.testing import CliRunner

from s4c.cli import options
from s4c.cli.compare import Comparison
from s4c.cli.main import app
from s4c.cli.stream import Painter
from s4c.cli.train import own_gpu, parse_settings, train, trained_method
from s4c.engine.llm import LLM, Chunk
from s4c.engine.measure import SIZES
from s4c.engine.sequence import Generation
from s4c.engine.stats import Stats
from s4c.training.losses import LossWeights
from s4c.training.trainer import TrainConfig, Trainer
from s4c.types import SamplingParams
from s4c.verify.tree import TreePlan

HELLO = [{"role": "user", "content": "hello hello hello"}]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("target"), tokenizer=True))


@pytest.fixture(scope="module")
def plain(target: str) -> LLM:
    return LLM(target, "none", threads=1)


def run(*args: object, stdin: str | None = None, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


def generate(target: str, *args: object, **more: Any) -> Any:
    return run("generate", *args, "--target", target, "--drafter", "ngram", "--threads", 1, **more)


# The program


def test_help_names_the_commands_without_waiting_for_torch() -> None:
    code = (
        "import sys, s4c\nfrom s4c.cli.main import app\n"
        "try: app(['--help'])\n"
        "finally: assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("generate", "chat", "info", "distill", "train", "eval"):
        assert f" {command} " in done.stdout


def test_the_package_gives_its_face_when_asked() -> None:
    import s4c

    assert s4c.LLM is LLM
    assert s4c.SamplingParams is SamplingParams
    with pytest.raises(AttributeError, match="nonsense"):
        s4c.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["generate", ""], 2, "the prompt is empty"),
        (["generate", "x", "--temperature", "nan"], 2, "temperature is nan; it must be"),
        (["generate", "x", "--temperature", "-1"], 2, "temperature is -1.0; it must be"),
        (["generate", "x", "--top-p", "0"], 2, "top_p is 0.0; it must be"),
        (["generate", "x", "--max-new-tokens", "0"], 2, "max_new_tokens is 0; it must be"),
        (["generate", "x", "--threads", "0"], 2, "threads is 0; it must be from 1 to"),
        (["generate", "x", "--tree", "bush:3"], 2, "tree 'bush:3' is not known; it must be comb:K"),
        (["generate", "x", "--rule", "luck"], 2, "must be one of coupled, rejection"),
        (["generate", "x", "--drafter", "nobody"], 2, "it must be auto, none, shipped, ngram"),
        (["generate", "x", "--dtype", "int3"], 2, "must be one of auto, float32"),
        (["generate", "x", "--raw", "--system", "y"], 2, "--system is for chats"),
        (["generate", "x" * 200], 2, "the context of"),
        (["chat", "--temperature", "nan"], 2, "temperature is nan"),
        (["distill", "--out", "no.jsonl"], 2, "say with --count"),
        (["distill", "--out", "no.jsonl", "--count", "0"], 2, "--count is 0"),
        (["distill", "--out", "no.jsonl", "--count", "1", "--temperatures", "0;1"], 2, "numbers with commas"),
        (["distill", "--out", "no.jsonl", "--prompts", "nowhere.txt"], 2, "nowhere.txt cannot be read"),
        (["train", "--data", "x", "--out", "y", "--steps", "1", "--method", "luck"], 2, "must be one of s4c"),
        (["train", "--data", "x", "--out", "y"], 2, "one of them must be given"),
        (["train", "--data", "nowhere.jsonl", "--out", "y", "--steps", "1"], 2, "nowhere.jsonl cannot be read"),
        (["train", "--data", "x", "--out", "y", "--steps", "1", "--context-length", "7"], 2, "context_length is 7"),
        (["info", "--context-length", "7"], 2, "context_length is 7"),
        (["eval", "--data", "x", "--context-length", "7"], 2, "context_length is 7"),
        (["eval", "--data", "nowhere.jsonl"], 2, "nowhere.jsonl cannot be read"),
        (["eval", "--data", "nowhere.jsonl", "--held-out", "2"], 2, "--held-out is 2.0"),
    ],
)
def test_bad_input_ends_as_one_line(target: str, args: list[str], code: int, message: str) -> None:
    result = run(*args, "--target", target, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("s4c: ")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_gpu_that_is_full_ends_as_one_line(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(LLM, "stream", full)
    monkeypatch.setattr(LLM, "generate", full)
    result = run("generate", "x", "--target", target, code=1)
    assert result.stderr.splitlines()[-1].startswith("s4c: the GPU has too little memory left for this (CUDA out of")
    with pytest.raises(torch.OutOfMemoryError):
        CliRunner().invoke(app, ["--debug", "generate", "x", "--target", target], catch_exceptions=False)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_of_a_training_takes_its_own_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_gpu(device) == device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_gpu(device) == "cuda:3"
    assert own_gpu("cpu") == "cpu"


def test_help_tells_the_forms_of_trees_as_errors_do() -> None:
    for tree in (options.Tree, options.RecommendedTree):
        assert TreePlan.FORMS in tree.__metadata__[0].help


def test_an_unknown_target_is_named() -> None:
    assert "target '/nowhere' does not exist" in run("generate", "x", "--target", "/nowhere", code=2).stderr


def test_damaged_files_end_with_code_1(target: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "is damaged" in run("generate", "x", "--target", target, "--drafter", tmp_path, code=1).stderr


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(CliRunner().invoke(app, ["--debug", "generate", ""]).exception, ValueError)
    monkeypatch.setenv("S4C_DEBUG", "1")
    assert isinstance(CliRunner().invoke(app, ["generate", ""]).exception, ValueError)


# s4c generate


def test_json_is_one_object_and_what_the_library_gives(target: str, plain: LLM) -> None:
    expected = plain.generate(HELLO, SamplingParams(max_new_tokens=20))
    outcome = json.loads(generate(target, HELLO[0]["content"], "--max-new-tokens", 20, "--json").stdout)
    assert list(outcome) == ["text", "token_ids", "finish_reason", "stats"]
    assert (outcome["text"], outcome["token_ids"]) == (expected.text, expected.token_ids)
    assert outcome["finish_reason"] == expected.finish_reason
    assert outcome["stats"].keys() == expected.stats.as_dict().keys()
    assert outcome["stats"]["new_tokens"] == len(expected.token_ids)


def test_the_prompt_may_come_from_stdin(target: str) -> None:
    args = ("--max-new-tokens", 5, "--json")
    given = json.loads(generate(target, "some words", *args).stdout)["token_ids"]
    assert json.loads(generate(target, *args, stdin="some words\n").stdout)["token_ids"] == given
    assert json.loads(generate(target, "-", *args, stdin="some words").stdout)["token_ids"] == given
    assert "the prompt is empty" in generate(target, "-", stdin="\n", code=2).stderr


def test_every_sampling_option_reaches_the_engine(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = SamplingParams(
        max_new_tokens=7,
        temperature=0.8,
        top_p=0.9,
        top_k=40,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        stop=["zz", "yy"],
        seed=5,
    )
    seen = []
    whole = LLM.generate

    def spy(self: LLM, prompts: Any, params: Any = None) -> Any:
        seen.append((prompts, params))
        return whole(self, prompts, params)

    monkeypatch.setattr(LLM, "generate", spy)
    args: list[object] = ["--stop", "zz", "--stop", "yy"]
    for field in fields(SamplingParams):
        value = getattr(wanted, field.name)
        if value != field.default and isinstance(value, int | float):
            args += [f"--{field.name.replace('_', '-')}", value]
    generate(target, "words", *args, "--raw", "--json")
    generate(target, "words", "--chat", "--system", "be", "--json")
    assert seen[0] == ("words", wanted)
    assert seen[1][0] == [{"role": "system", "content": "be"}, {"role": "user", "content": "words"}]


def test_streamed_and_whole_text_are_the_same_and_plain_in_a_pipe(target: str, plain: LLM) -> None:
    expected = plain.generate("abcabc", SamplingParams(max_new_tokens=25)).text
    for how in ("--stream", "--no-stream"):
        result = generate(target, "abcabc", "--raw", "--max-new-tokens", 25, how)
        assert result.stdout == expected + "\n"
        assert "25 tokens" in result.stderr


def test_compare_says_that_the_tokens_are_equal(target: str) -> None:
    outcome = json.loads(generate(target, "hello", "--max-new-tokens", 12, "--compare", "--json").stdout)
    assert outcome["compare"]["equal"] is True
    assert outcome["compare"]["first_difference"] is None
    assert outcome["compare"]["plain"]["mean_acceptance_length"] == 1
    assert outcome["compare"]["speedup"] > 0
    shown = generate(target, "hello", "--max-new-tokens", 12, "--compare").stdout
    assert "all 12 tokens are equal" in shown
    assert "speedup" in shown


def test_compare_fails_where_the_tokens_differ(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LLM.generate

    def wrong(self: LLM, prompts: Any, params: Any = None) -> Any:
        generation = whole(self, prompts, params)
        if self.drafter.name == "none":
            generation.token_ids[3] += 1
        return generation

    monkeypatch.setattr(LLM, "generate", wrong)
    result = generate(target, "hello", "--max-new-tokens", 8, "--compare", "--json", code=1)
    outcome = json.loads(result.stdout)
    drafted = outcome["token_ids"][3]
    assert outcome["compare"]["first_difference"] == {
        "index": 3,
        "plain": drafted + 1,
        "drafted": drafted,
        "possible_tie": False,
    }
    assert "the tokens DIFFER: token 3" in generate(target, "hello", "--compare", code=1).stdout


def test_an_interrupt_ends_with_code_130(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", interrupted)
    assert generate(target, "hello", code=130).stderr == "s4c: interrupted\n"


def comparison(first: list[int], second: list[int], **more: bool) -> Comparison:
    made = [Generation("", ids, "length", [0] * len(ids), None, 1, 0, Stats()) for ids in (first, second)]
    return Comparison(*made, "some", **{"half": False, "same_law_only": False, **more})


def test_a_difference_is_a_tie_only_in_half_precision() -> None:
    assert comparison([1, 2], [1, 2]).equal
    assert comparison([1, 2], [1, 2, 3]).first_difference == {
        "index": 2,
        "plain": None,
        "drafted": 3,
        "possible_tie": False,
    }
    assert "tie" not in comparison([1], [2]).verdict
    assert "possibly a tie" in comparison([1], [2], half=True).verdict
    assert comparison([1], [2], half=True).failed
    assert not comparison([1], [2], same_law_only=True).failed


def test_a_pipe_does_not_bound_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    named = replace(comparison([1], [1]), drafter="a name that leaves no room for the figures in eighty columns")
    named.report()
    assert f" {named.drafter} " in capsys.readouterr().out


# Colours


def test_each_character_has_the_colour_of_its_token() -> None:
    letters = {1: "a", 2: "bc", 3: "STOP", 4: "d", 5: "", 6: "\ufffd", 7: "é"}
    torn = {(6, 6): "é", (6,): "\ufffd"}

    def decode(tokens: list[int]) -> str:
        text = "".join(letters[t] for t in tokens)
        return text.replace("\ufffd\ufffd", torn[6, 6])

    painter = Painter(decode)
    assert painter.paint(Chunk("abc", [1, 2], [1, 0], None)) == [("a", 1), ("bc", 0)]
    assert painter.paint(Chunk("", [3], [1], None)) == []  # held back: it may begin a stop string
    assert painter.paint(Chunk("STOPd", [4, 5], [2, 0], None)) == [("STOP", 1), ("d", 2)]
    assert painter.paint(Chunk("a", [1, 6], [1, 2], None)) == [("a", 1)]
    assert painter.paint(Chunk("éa", [6, 1], [1, 0], None)) == [("é", 1), ("a", 0)]
    assert painter.paint(Chunk("\ufffd", [6], [3], None)) == [("\ufffd", 3)]  # flushed at the end


def test_a_chunk_that_its_tokens_do_not_make_up_is_coloured_as_one() -> None:
    painter = Painter(lambda tokens: "x" * len(tokens))
    assert painter.paint(Chunk("abc", [1, 2], [1, 0], None)) == [("abc", 0)]


def test_a_terminal_gets_the_same_text_in_colour(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(LLM, "stream", _printable_stream)
    shown = generate(target, "x", "--raw").stdout
    assert "\x1b[32mo\x1b[0m\x1b[36mn\x1b[0m" in shown
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == "one two \u241b\n"


def _printable_stream(self: LLM, prompt: Any, params: Any = None) -> Any:
    outcome = Generation("one two \x1b", [], "length", [0], None, 1, 0, Stats())
    for text, origins, last in (("one ", [1, 2, 3, 0], None), ("two \x1b", [1, 2, 3, 4, 0], outcome)):
        yield Chunk(text, self.tokenizer.encode(text), origins, last)


# s4c chat


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `LLM.stream` was asked, in order."""
    seen: list[Any] = []
    whole = LLM.stream

    def spy(self: LLM, prompt: Any, params: Any = None) -> Any:
        seen.append(prompt)
        return whole(self, prompt, params)

    monkeypatch.setattr(LLM, "stream", spy)
    return seen


def chat(target: str, stdin: str, *args: object, code: int = 0) -> Any:
    return run("chat", "--target", target, "--drafter", "ngram", "--threads", 1, *args, stdin=stdin, code=code)


def test_a_chat_remembers_its_answers(target: str, plain: LLM, asked: list[Any]) -> None:
    result = chat(target, "one\n\n/help\n/nonsense\ntwo\n/reset\nthree", "--max-new-tokens", 6, "--system", "be")
    system, first = {"role": "system", "content": "be"}, {"role": "user", "content": "one"}
    answer = plain.generate([system, first], SamplingParams(max_new_tokens=6)).text
    said = {"role": "assistant", "content": answer}
    assert asked == [
        [system, first],
        [system, first, said, {"role": "user", "content": "two"}],
        [system, {"role": "user", "content": "three"}],
    ]
    assert result.stdout.startswith(answer + "\n")
    assert "/nonsense is no command" in result.stderr
    assert "cut at --max-new-tokens" in result.stderr


def test_exit_ends_a_chat(target: str, asked: list[Any]) -> None:
    chat(target, "/exit\nnever asked\n")
    assert asked == []


def test_a_full_context_is_said_and_the_chat_lives_on(target: str, asked: list[Any]) -> None:
    result = chat(target, f"{'x' * 150}\nhi\n", "--max-new-tokens", 200)
    assert "the context of" in result.stderr
    assert "The question was not taken; /reset" in result.stderr
    assert asked[1] == [{"role": "user", "content": "hi"}]
    assert "the context is full, /reset" in result.stderr


def test_an_interrupt_stops_the_answer_and_keeps_what_was_written(
    target: str, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    spied = LLM.stream

    def interrupted(self: LLM, prompt: Any, params: Any = None) -> Any:
        for number, chunk in enumerate(spied(self, prompt, params)):
            if number == 3 and len(asked) == 1:
                signal.raise_signal(signal.SIGINT)
            yield chunk

    monkeypatch.setattr(LLM, "stream", interrupted)
    before = signal.getsignal(signal.SIGINT)
    result = chat(target, "one\ntwo\n", "--max-new-tokens", 12)
    assert "stopped; what was written stays" in result.stderr
    written = asked[1][1]["content"]
    assert written
    assert result.stdout.startswith(written + "\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_from_outside_stops_the_answer_not_the_program(tmp_path: Path) -> None:
    long = save(tmp_path, tokenizer=True, max_position_embeddings=100_000)
    command = [sys.executable, "-m", "s4c", "chat", "--target", str(long), "--drafter", "none", "--threads", "1"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "90000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(b"/exit\n", timeout=60)
    assert process.returncode == 0, errors
    assert b"stopped; what was written stays" in errors


# s4c info


def test_info_tells_what_is_here_and_what_passes_cost(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s4c.cli.info.PASSES", 1)
    report = json.loads(run("info", "--target", target, "--threads", 1, "--json").stdout)
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == 1
    assert report["methods"]["s4c"]["settings"]["heads"] == 3
    assert report["models"][options.DEFAULT_TARGET]["package"]
    assert list(report["target"]["pass_ms"]) == [str(size) for size in SIZES]
    assert all(cost > 0 for cost in report["target"]["pass_ms"].values())
    assert report["target"]["runtime"] in ("native", "torch")
    assert report["target"]["floor_ms"] > 0
    assert report["target"]["round"]["drafter"] == "ngram"


def test_info_says_why_the_slow_runtime_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s4c.cli.info.PASSES", 1)
    shown = run("info", "--target", save(tmp_path, "gpt2"), "--drafter", "none", "--threads", 1).stdout
    assert ": hf (" in shown
    assert "model type 'gpt2' is not one of" in shown


def test_info_cuts_no_figure_in_a_narrow_terminal(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s4c.cli.info.PASSES", 1)
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("info", "--target", target, "--threads", 1).stdout
    assert "of it, reading the weights" in shown
    assert "…" not in shown


def test_info_measures_nothing_it_would_have_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S4C_HOME", str(tmp_path))
    report = json.loads(run("info", "--json").stdout)
    assert report["target"] is None
    assert report["cache"] == {"folder": str(tmp_path), "megabytes": 0.0}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["comb:3x5", "best:16x6", "chain:4"])
def test_trees_are_named_as_users_write_them(name: str) -> None:
    assert str(TreePlan.parse(name)) == name


# s4c distill, train, eval

SMALL = ("--set", "heads=2", "--set", "head_dim=8", "--set", "draft_vocab=200", "--held-out", 0.3, "--threads", 1)


@pytest.fixture(scope="module")
def text(target: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows that the tiny model wrote."""
    folder = tmp_path_factory.mktemp("text")
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"question {number}\n" for number in range(10)))
    out = folder / "text.jsonl"
    args = ("--prompts", prompts, "--out", out, "--max-new-tokens", 20, "--temperatures", "0,1", "--threads", 1)
    assert "holds 10 rows, 10 of them new" in run("distill", "--target", target, *args).stderr
    before = out.read_bytes()
    assert "holds 10 rows, 0 of them new" in run("distill", "--target", target, *args).stderr
    assert out.read_bytes() == before
    return out


def test_distilled_rows_are_what_the_target_writes(text: Path, plain: LLM) -> None:
    rows = [json.loads(line) for line in text.read_text().splitlines()]
    greedy = [row for row in rows if row["temperature"] == 0]
    assert 0 < len(greedy) < 10
    for row in greedy:
        assert plain.generate(row["prompt_ids"], SamplingParams(max_new_tokens=20)).token_ids == row["answer_ids"]


def test_the_target_writes_its_own_prompts(target: str, tmp_path: Path) -> None:
    out = tmp_path / "own.jsonl"
    args = ("--count", 2, "--max-new-tokens", 4, "--max-prompt-tokens", 40, "--batch", 64, "--threads", 1)
    run("distill", "--target", target, "--out", out, *args)
    assert [json.loads(line)["source"] for line in out.read_text().splitlines()] == ["self", "self"]


def test_training_finds_what_the_target_thought_while_it_wrote(target: str, tmp_path: Path) -> None:
    prompts, out, store = tmp_path / "prompts.txt", tmp_path / "text.jsonl", tmp_path / "features"
    prompts.write_text("".join(f"question {number}\n" for number in range(7)))
    written = ("--prompts", prompts, "--out", out, "--max-new-tokens", 9, "--batch", 3, "--features", store)
    assert "holds 7 rows" in run("distill", "--target", target, *written, "--threads", 1).stderr
    (index,) = store.glob("*/rows.jsonl")
    before = index.read_bytes()
    assert len(before.splitlines()) == 7
    args = ("--data", out, "--out", tmp_path / "run", "--cache", store, *SMALL, "--steps", 2, "--step-vocab", 50)
    run("train", "--target", target, *args)
    assert index.read_bytes() == before
    refused = run("distill", "--target", target, *written, "--drafter", "ngram", code=2).stderr
    assert "leave --drafter ngram out" in refused


def test_a_distillation_whose_requests_fail_says_why(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LLM.complete

    def failing(self: LLM, prompts: Any, params: Any) -> Any:
        for index, generation in whole(self, prompts, params):
            yield index, replace(generation, error=None if index else "the logits are NaN")

    monkeypatch.setattr(LLM, "complete", failing)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "text.jsonl"
    prompts.write_text("one\ntwo\n")
    args = ("--prompts", prompts, "--out", out, "--max-new-tokens", 4, "--threads", 1)
    said = run("distill", "--target", target, *args, code=1).stderr
    assert "holds 1 rows, 1 of them new" in said
    assert "1 requests failed and gave no row, such as: the logits are NaN" in said


def test_a_distillation_that_is_interrupted_says_how_to_go_on(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "complete", interrupted)
    result = run("distill", "--target", target, "--out", tmp_path / "x.jsonl", "--count", 1, code=130)
    assert "the same command goes on" in result.stderr


def test_train_evaluate_and_generate_with_the_drafter(target: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = ("train", "--target", target, "--data", text, "--out", out, *SMALL)
    assert f"use it with --drafter {out}/best" in run(*args, "--steps", 4).stderr
    assert "resume it or choose another folder" in run(*args, "--steps", 6, code=2).stderr
    run(*args, "--steps", 6, "--resume")
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
    config = json.loads((out / "best" / "config.json").read_text())
    assert (config["method"], config["config"]["heads"], config["config"]["draft_vocab"]) == ("s4c", 2, 200)

    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text().splitlines(keepends=True)[0])
    more = ("--data", other, "--init", out / "best", *SMALL, "--held-out", 0, "--steps", 1)
    kept, anew = tmp_path / "kept", tmp_path / "anew"
    run("train", "--target", target, "--out", kept, *more)
    run("train", "--target", target, "--out", anew, *more, "--set", "draft_vocab=199")
    before, same, counted = (load_file(run / "best/model.safetensors")["token_ids"] for run in (out, kept, anew))
    assert torch.equal(before, same)
    assert len(counted) == 199

    shared = ("--target", target, "--data", text, "--drafter", out / "best", "--threads", 1, "--max-new-tokens", 8)
    report = json.loads(run("eval", *shared, "--held-out", 1, "--json").stdout)
    assert [len(head) for head in report["heads"]["conditional"]] == [8, 8]
    assert report["rows"] == report["engine"]["0"]["prompts"] == 10
    assert report["simulated"]["mean_acceptance_length"] >= 1
    assert report["engine"]["1"]["new_tokens"] >= report["engine"]["1"]["rounds"]
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    both = (*shared[:5], f"ngram+{out / 'best'}", *shared[6:], "--held-out", 1, "--rows", 2, "--json")
    assert len(json.loads(run("eval", *both).stdout)["heads"]["conditional"]) == 2
    shown = run("eval", *shared, "--held-out", 1, "--rows", 4, "--prompts", tmp_path / "prompts.txt").stdout
    assert "head 2 given" in shown
    assert "engine, temperature 1" in shown

    result = run("generate", "hi", "--target", target, "--drafter", out / "best", "--compare", "--json", "--threads", 1)
    assert json.loads(result.stdout)["compare"]["equal"]


def test_eval_takes_a_method_without_training(target: str, text: Path) -> None:
    args = ("--target", target, "--data", text, "--drafter", "ngram", "--held-out", 1, "--rows", 3, "--threads", 1)
    report = json.loads(run("eval", *args, "--max-new-tokens", 4, "--json").stdout)
    assert report["heads"] is None
    assert report["engine"]["0"]["rounds"] > 0
    shown = run("eval", *args, "--max-new-tokens", 4, "--tree", "plan").stdout
    assert "ngram with plan on 3 rows\nnothing in it was trained" in shown
    assert "not told with --tree plan" in shown
    assert "every row has a prompt of 3 tokens or more" in run("eval", *args, "--max-length", 3, code=2).stderr


def test_eval_says_that_the_target_failed(target: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LLM.generate

    def failing(self: LLM, prompts: Any, params: Any = None) -> Any:
        return [replace(generation, error="the logits are NaN") for generation in whole(self, prompts, params)]

    monkeypatch.setattr(LLM, "generate", failing)
    args = ("--target", target, "--data", text, "--drafter", "ngram", "--held-out", 1, "--rows", 3, "--threads", 1)
    assert "3 of 3 prompts failed, such as: the logits are NaN" in run("eval", *args, code=1).stderr


def test_a_training_that_is_interrupted_says_how_to_go_on(
    target: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer._step

    def interrupted(self: Trainer, *args: Any) -> Any:
        if self.standing.step == 2:
            signal.raise_signal(signal.SIGINT)
        return whole(self, *args)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    args = ("train", "--target", target, "--data", text, "--out", tmp_path / "run", *SMALL, "--steps", 5)
    stopped = run(*args, code=130).stderr
    assert "step 3 is saved" in stopped
    assert "--resume" in stopped
    run(*args, "--resume")


def test_every_setting_of_a_training_is_an_option_with_its_default() -> None:
    offered = inspect.signature(train, eval_str=True).parameters
    wanted = {field.name: field.default for field in fields(TrainConfig) if field.name != "weights"}
    wanted |= {f"{field.name}_weight": field.default for field in fields(LossWeights)}
    special = {"steps": "no limit", "epochs": "no limit", "max_seconds": "no limit", "tree": "the method's"}
    for name, default in wanted.items():
        (option,) = offered[name].annotation.__metadata__
        assert option.show_default == special.get(name, str(default)), name


def test_settings_of_a_method_are_checked_by_type() -> None:
    method = trained_method("s4c")
    config = parse_settings(method, ["heads=2", "normed_output=true", "rope_theta=5e3", "lm_head=own"])
    assert (config.heads, config.normed_output, config.rope_theta, config.lm_head) == (2, True, 5000.0, "own")
    for wrong, message in {
        "heads=two": "'two' must be a whole number",
        "rope_theta=x": "'x' must be a number",
        "normed_output=maybe": "'maybe' must be true or false",
        "tails=1": "is no setting of s4c; give KEY=VALUE, of: heads=3",
        "heads": "give KEY=VALUE",
        "heads=0": "it must be at least 1",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_settings(method, [wrong])


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("s4c", "head_dim=7", "head_dim is 7; it must be even"),
        ("s4c", "head_dim=0", "head_dim is 0; it must be at least 2"),
        ("s4c", "intermediate=-1", "intermediate is -1; it must be at least 0"),
        ("s4c", "draft_vocab=-1", "draft_vocab is -1"),
        ("s4c", "depth=-1", "depth is -1"),
        ("s4c", "rope_theta=nan", "rope_theta is nan; it must be at least 1"),
        ("medusa", "draft_vocab=-1", "draft_vocab is -1"),
        ("draft-model", "intermediate=-1", "intermediate is -1"),
        ("draft-model", "draft_vocab=-1", "draft_vocab is -1"),
        ("draft-model", "rope_theta=0", "rope_theta is 0.0"),
    ],
)
def test_sizes_that_no_drafter_has_are_refused(method: str, setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_settings(trained_method(method), [setting])
