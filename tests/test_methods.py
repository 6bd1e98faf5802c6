"""What every trained method must hold, whatever its drafts are worth: a line of `METHODS_UNDER_TEST` for each.

That a round is lossless is proved for any tree in test_rules.py. Here: that each drafter gives such trees, keeps its
state right through batches and moves, trains, goes on where it was stopped, and refuses another target.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from test_s4c_drafter import Run
from tiny_training import VOCAB, TinyTarget, tiny_rows
from typer.testing import CliRunner

from s4c import LLM, SamplingParams
from s4c.cli.main import app
from s4c.drafters import METHODS
from s4c.drafters.base import Drafter, DraftModel, Sequences, TrainingBatch
from s4c.drafters.checkpoint import load_drafter, load_model, save_checkpoint
from s4c.errors import WrongTarget
from s4c.models.base import Target
from s4c.training.trainer import TrainConfig, Trainer
from s4c.verify.noise import DRAFT_STREAM, NoiseTable
from s4c.verify.scores import Scores
from s4c.verify.tree import TreePlan

METHODS_UNDER_TEST: dict[str, tuple[dict[str, Any], str]] = {
    "s4c": ({"head_dim": 4, "heads": 2}, "chain:2"),
    "medusa": ({"heads": 2, "layers": 2, "lm_head": "own"}, "chain:2"),
    "medusa tied": ({"heads": 2, "layers": 3, "lm_head": "tied"}, "chain:2"),
    "draft-model": ({"layers": 2, "width": 32, "heads": 2}, "chain:4"),
}
"""Name and perhaps a variant: settings, and the tree of the drafter that is overfit."""

PROMPTS = [[3, 14, 15, 9, 26, 5], [8, 2], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [7]]
HOT = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=1.2, seed=1)
SETTINGS = {
    "greedy": SamplingParams(max_new_tokens=20, ignore_eos=True),
    "hot": HOT,
    "penalised": replace(HOT, top_p=0.9, repetition_penalty=1.4, frequency_penalty=0.3, bad_words=[[7], [3, 4]]),
}


@pytest.fixture(params=METHODS_UNDER_TEST)
def method(request: Any) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory = tiny_models.save(tmp_path_factory.mktemp("model"), "llama", seed=3)
    return LLM(str(directory), "none", max_batch=4, threads=1)


def named(method: str) -> str:
    """The name in the table."""
    return method.partition(" ")[0]


def model_of(method: str, target: Target, token_ids: torch.Tensor | None = None) -> DraftModel:
    """An untrained model with weights that matter."""
    line = METHODS[named(method)]
    assert line.config is not None
    assert line.model is not None
    torch.manual_seed(0)
    token_ids = torch.arange(target.spec.vocab_size) if token_ids is None else token_ids
    model = line.model(target, line.config(**METHODS_UNDER_TEST[method][0]), token_ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write(llm: LLM, drafter: str | Drafter, params: SamplingParams, tree: str = "auto", rule: str = "coupled") -> Any:
    llm.rule = rule
    llm.use(drafter, tree)
    return [generation.token_ids for generation in llm.generate(PROMPTS, params)]


def test_drafting_is_the_training_pass(llm: LLM, method: str) -> None:
    """Round after round, whatever was accepted: each drafted token is the first of the head that drafts its level."""
    model = model_of(method, llm.target, torch.arange(0, 64, 2)).eval()
    model.beyond = False  # what that adds has tests of its own
    run = Run(llm.target, model.drafter(llm.target, torch.float32), PROMPTS, "chain:2")
    for _ in range(4):
        scores, tree = run.propose()
        for slot, line in enumerate(run.tokens):
            text, features = line + tree.tokens[slot, 1:].tolist(), run.features[slot]
            padded = torch.cat([features, torch.zeros(len(text) - len(features), features.shape[1])])
            batch = TrainingBatch(torch.tensor([text]), padded[None], torch.tensor([len(text)]), torch.tensor([0]))
            with torch.no_grad():
                heads = model.predictions(batch)
                for level, token in enumerate(text[len(line) :]):
                    head, at = heads[min(level, len(heads) - 1)], len(line) + level
                    if at >= head.offset:
                        logits = head.logits(head.hidden[0, at - head.offset])
                        assert token == int(model.token_ids[logits.argmax()])
        run.finish(scores, tree)


@pytest.mark.parametrize("rests", [False, True])
def test_going_on_is_starting_anew(llm: LLM, method: str, rests: bool) -> None:
    """With trees wide enough to accept something, the next tree is that of a drafter that reads the text at once.

    It is so after rounds in which no draft was asked for, too.
    """
    drafter = model_of(method, llm.target).drafter(llm.target, torch.float32)
    run = Run(llm.target, drafter, PROMPTS, "comb:40x3")
    assert sum(sum(run.finish(*run.propose())) for _ in range(6)) > 12
    if rests:
        plan, run.plan = run.plan, TreePlan("best", 8, 1, 1)
        for _ in range(3):
            run.finish(*run.propose())
        run.plan = plan
    lines = [list(line) for line in run.tokens]
    _, going_on = run.propose()
    _, anew = Run(
        llm.target, model_of(method, llm.target).drafter(llm.target, torch.float32), lines, "comb:40x3"
    ).propose()
    assert torch.equal(going_on.tokens, anew.tokens)
    assert torch.equal(going_on.parents, anew.parents)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("tree", ["auto", "comb:3", "comb:3x4", "chain:3"])
def test_speculative_is_plain_and_batched_is_single(llm: LLM, method: str, setting: str, tree: str) -> None:
    plain = write(llm, "none", SETTINGS[setting])
    drafter = model_of(method, llm.target, torch.arange(0, 64, 2)).drafter(llm.target)
    assert write(llm, drafter, SETTINGS[setting], tree) == plain
    assert [llm.generate(prompt, SETTINGS[setting]).token_ids for prompt in PROMPTS] == plain
    assert write(llm, drafter, SETTINGS["greedy"], tree, "rejection") == write(llm, "none", SETTINGS["greedy"])


def test_a_tree_without_a_depth_is_as_deep_as_the_method_goes(llm: LLM, method: str) -> None:
    llm.use(model_of(method, llm.target).drafter(llm.target), "comb:3")
    assert max(llm.generate(PROMPTS[0], HOT).stats.tree_sizes) > 4


def test_drafts_are_accepted_and_requests_end_where_plain_decoding_ends_them(llm: LLM, method: str) -> None:
    """With a tree of nearly all tokens something is accepted in many rounds; moves and new slots come with the ends."""
    plain = write(llm, "none", HOT)
    params = [
        replace(HOT, max_new_tokens=at, stop_token_ids=[text[15]])
        for at, text in zip((3, 9, 20, 14), plain, strict=True)
    ]
    llm.use("none")
    expected = llm.generate(PROMPTS, params)
    llm.use(model_of(method, llm.target).drafter(llm.target), "best:60x2")
    found = llm.generate(PROMPTS * 2, params * 2)
    for one, other in zip(expected * 2, found, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
    assert sum(g.stats.rounds for g in found) < 0.8 * sum(len(g.token_ids) for g in found)


@pytest.mark.parametrize("tree", ["comb:3x4", "chain:3"])
def test_sampled_children_are_draws_from_the_law_that_is_reported(llm: LLM, method: str, tree: str) -> None:
    """Then test_rules.py has the proof: any tree of draws without replacement from its `log_q` is lossless."""
    target, vocab = llm.target, llm.target.spec.vocab_size
    drafter = model_of(method, target).drafter(target)
    requests = [replace(HOT, seed=seed, top_k=20) for seed in range(3)]
    noise = NoiseTable(vocab, target.device)
    target.reserve(3, 64)
    for slot, prompt in enumerate(PROMPTS[:3]):
        tokens = torch.tensor(prompt[:-1], dtype=torch.int64)
        drafter.prefill(slot, tokens, target.prefill(slot, tokens))
    scores = Scores(requests, PROMPTS[:3], [len(prompt) for prompt in PROMPTS[:3]], noise)
    drafted = drafter.propose(Sequences(PROMPTS[:3], scores, True, TreePlan.parse(tree)))
    assert drafted.sampled.all()
    assert drafted.log_q is not None
    for row, node, children, depth in families(drafted.parents):
        law = drafted.log_q[row, node]
        assert float(law.exp().sum()) == pytest.approx(1)
        g = noise.row(requests[row].seed or 0, DRAFT_STREAM, len(PROMPTS[row]) + depth)
        drawn = (law + g).topk(len(children)).indices.tolist()
        assert drafted.tokens[row, children].tolist() == drawn


def families(parents: torch.Tensor) -> Iterator[tuple[int, int, list[int], int]]:
    """Row, node, the columns of its children and its depth, for each node that has some."""
    for row, line in enumerate(parents.tolist()):
        depth = [0] * len(line)
        for column in range(1, len(line)):
            depth[column] = depth[line[column]] + 1
        for node in sorted(set(line[1:])):
            yield row, node, [column for column in range(1, len(line)) if line[column] == node], depth[node]


def test_a_checkpoint_comes_back_and_refuses_another_target(llm: LLM, method: str, tmp_path: Path) -> None:
    model = model_of(method, llm.target, torch.arange(0, 64, 2))
    folder = tmp_path / "drafter"
    save_checkpoint(folder, model, named(method), llm.target.spec, {}, dtype=torch.float32)
    for name, value in load_model(folder, llm.target, METHODS).state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert load_drafter(folder, llm.target, METHODS).default_tree == model.drafter(llm.target).default_tree
    assert write(llm, str(folder), HOT) == write(llm, "none", HOT)
    other = LLM(str(tiny_models.save(tmp_path, "llama", seed=4)), "none", threads=1)
    with pytest.raises(WrongTarget, match="was trained for"):
        other.use(str(folder))


def trainer(method: str, out: Path, steps: int, overfit: bool = False, resume: bool = False) -> Trainer:
    settings, tree = METHODS_UNDER_TEST[method]
    line, target = METHODS[named(method)], TinyTarget()
    assert line.config is not None
    assert line.model is not None
    rows = tiny_rows(target, 4, answer=24) if overfit else tiny_rows(target, 24)
    torch.manual_seed(1 if resume else 0)
    model = line.model(
        target, line.config(**{**settings, **({"head_dim": 4} if "head_dim" in settings else {})}), torch.arange(VOCAB)
    )
    config = TrainConfig(
        steps=steps,
        batch_tokens=400 if overfit else 60,
        warmup_steps=3,
        learning_rate=1e-2,
        eval_every=steps if overfit else 4,
        save_every=steps if overfit else 3,
        log_every=1,
        features="fly",
        tree=tree,
    )
    return Trainer(target, named(method), model, rows, rows if overfit else rows[:6], config, out, resume=resume)


def test_it_overfits_a_tiny_corpus_to_the_most_that_its_tree_can_give(method: str, tmp_path: Path) -> None:
    """With D levels a row of n tokens takes at least n / (D + 1) rounds, rounded up; one round more is forgiven."""
    run = trainer(method, tmp_path, 250, overfit=True)
    levels = TreePlan.parse(METHODS_UNDER_TEST[method][1]).depth
    lengths = [len(row.answer_ids) for row in run.validation]
    rounds = sum(-(-length // (levels + 1)) for length in lengths)
    best = run.fit().standing.best_mal
    assert sum(lengths) / (rounds + 1) <= best <= sum(lengths) / rounds


def test_a_resumed_training_ends_where_an_unbroken_one_does(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(method, tmp_path / "whole", 8).fit()
    broken = trainer(method, tmp_path / "halves", 8)
    batches = iter([True] * 5)
    next_batch = broken._next_batch
    monkeypatch.setattr(broken, "_next_batch", lambda: next(batches) and next_batch())
    with pytest.raises(StopIteration):
        broken.fit()
    assert trainer(method, tmp_path / "halves", 8, resume=True).fit().standing.step == 8
    last = Path("steps/step-00000008/model.safetensors")
    assert (tmp_path / "whole" / last).read_bytes() == (tmp_path / "halves" / last).read_bytes()


def test_the_commands_train_and_use_it(method: str, tmp_path: Path) -> None:
    target = ["--target", str(tiny_models.save(tmp_path, "llama", tokenizer=True)), "--threads", "1"]
    rows = [{"prompt_ids": [n, 5, 6], "answer_ids": [7, 8, 9, 7, 8, 9], "temperature": 0.0} for n in range(12)]
    text, questions = tmp_path / "text.jsonl", tmp_path / "questions.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions.write_text('{"question_id": 1, "category": "qa", "turns": ["hello"]}\n')
    settings = {"draft_vocab": 100, **METHODS_UNDER_TEST[method][0]}
    chosen = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    drafter = str(tmp_path / "run" / "best")
    run = ["train", "--method", named(method), "--data", str(text), "--out", str(tmp_path / "run"), "--held-out", "0.3"]
    for command in (
        [*run, "--steps", "3", "--cache", str(tmp_path / "features"), *chosen, *target],
        ["generate", "hello", "--drafter", drafter, "--compare", "--max-new-tokens", "8", *target],
        ["eval", "--data", str(text), "--drafter", drafter, "--held-out", "1", "--max-new-tokens", "8", *target],
        ["bench", "--questions", str(questions), "--methods", drafter, "--max-new-tokens", "8", *target],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    assert not (tmp_path / "run" / "features").exists()
