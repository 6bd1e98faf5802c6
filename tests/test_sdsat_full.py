"""Full fine-tuning: a copy of the target learns with the adaptive tokens, and the target itself stays as it is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from test_engine import PROMPTS, SETTINGS
from test_sdsat import CONFIG, RUNTIMES, VOCAB, answers, metrics, random_text, strike, text_batch
from tiny_training import TinyTarget, tiny_rows
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from s4c import LLM
from s4c.cli.main import app
from s4c.cli.train import parse_settings, trained_method
from s4c.drafters import METHODS
from s4c.drafters.checkpoint import load_model
from s4c.drafters.sdsat import SDSATConfig, SDSATModel
from s4c.drafters.sdsat_full import FullConfig, FullModel
from s4c.errors import UnsupportedModel, WrongTarget
from s4c.models.llama import LlamaTarget
from s4c.models.loading import load_target
from s4c.training.checkpoint import latest
from s4c.training.data import Row, collate
from s4c.training.losses import CompositeLoss, LossWeights
from s4c.training.perplexity import perplexity
from s4c.training.trainer import TrainConfig, Trainer

SIZE = 3
TREE = "chain:3"


def tiny_target(folder: Path, family: str = "llama", tied: bool | None = None, dtype: str = "float32") -> LlamaTarget:
    target = load_target(str(tiny_models.save(folder, family, tied=tied)), runtime="torch", dtype=dtype)
    assert isinstance(target, LlamaTarget)
    return target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LlamaTarget:
    return tiny_target(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(target: LlamaTarget) -> list[Row]:
    return answers(target, 3)


def model_of(target: Any, **config: Any) -> FullModel:
    torch.manual_seed(0)
    return FullModel(target, FullConfig(**{"tokens": SIZE, **config}), torch.arange(VOCAB))


def state_of(target: LlamaTarget) -> list[torch.Tensor]:
    """Everything that a target computes with."""
    opened = target.open()
    weights = [p for layer in opened.stack.layers for p in layer.parameters()]
    return [w.detach().clone() for w in (opened.embedding, opened.head, opened.stack.norm.weight, *weights)]


def hugging_face_logits(directory: Path, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([tokens])).logits[0]
    return logits


@pytest.fixture(scope="module")
def overfitted(target: LlamaTarget, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """A run to the end on three answers, and its trainer."""
    out = tmp_path_factory.mktemp("run")
    model = model_of(target, groups=20)
    config = replace(CONFIG, steps=150, batch_tokens=400, learning_rate=3e-3, eval_every=150, save_every=150, tree=TREE)
    trainer = Trainer(target, "sdsat", model, rows, rows, config, out)
    trainer.fit()
    return out, trainer


# --- one pass over text and groups ---


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", True)])
def test_it_starts_as_the_target_and_the_text_sees_no_group(tmp_path: Path, family: str, tied: bool) -> None:
    target = tiny_target(tmp_path, family, tied)
    model = model_of(target).eval()
    batch = text_batch([random_text(20)], answer_start=4)
    with torch.no_grad():
        *groups, own = model.predictions(batch)
        logits = own.logits(own.hidden[0])
    assert [(p.offset, p.weight) for p in groups] == [(2, None), (3, None), (4, None)]
    assert (own.offset, own.weight) == (1, 1.0)
    directory = Path(target.spec.name)
    assert torch.allclose(logits, hugging_face_logits(directory, batch.tokens[0].tolist()), atol=1e-4)
    frozen = SDSATModel(target, SDSATConfig(tokens=SIZE, rank=0), torch.arange(VOCAB))
    frozen.start_from(model)
    with torch.no_grad():
        for ours, theirs in zip(groups, frozen.eval().predictions(batch), strict=True):
            assert torch.equal(ours.made, theirs.made)
            assert torch.allclose(ours.hidden, theirs.hidden, atol=1e-5)


def test_the_loss_is_that_of_the_groups_and_of_the_standard_tokens_of_the_answers(
    target: LlamaTarget, rows: list[Row]
) -> None:
    """The second against transformers, token by token; and gradients reach every weight."""
    features = [target.prefill(0, torch.tensor(row.tokens)) for row in rows]
    batch = collate(rows, features, target.device)
    parts = {}
    for standard in (0.0, 0.5):
        model = model_of(target, groups=4, standard=standard).eval()
        loss, parts[standard] = CompositeLoss(model, target.head_weight(), LossWeights())(batch)
        heads = [0.1 * parts[standard][f"lm/{i}"] + parts[standard][f"teacher/{i}"] for i in range(1, SIZE + 1)]
        expected = torch.stack(heads).mean() + standard * parts[standard]["standard"]
        assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert parts[0.0].keys() == parts[0.5].keys()
    losses = []
    for row in rows:
        log_p = hugging_face_logits(Path(target.spec.name), list(row.tokens)).log_softmax(-1)
        losses += [-float(log_p[at - 1, row.tokens[at]]) for at in range(len(row.prompt_ids), len(row))]
    assert float(parts[0.5]["standard"]) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_gradients_reach_the_text_through_its_keys_and_values(target: LlamaTarget) -> None:
    """Even where the standard tokens have no loss of their own, the groups' guesses move the layers of the text."""
    batch = text_batch([random_text(12)], answer_start=4)
    model = model_of(target, groups=1)
    tokens = batch.tokens[0].tolist()
    *heads, _ = model.predictions(batch)
    (at,) = heads[0].made[0].nonzero()[:, 0].tolist()
    heads[0].hidden[0, at].sum().backward()
    gradient = model.tuned.embedding.grad
    assert gradient is not None
    seen = {token for token in range(VOCAB) if float(gradient[token].abs().sum()) > 0}
    assert seen == set(tokens[: at + 1])


# --- what comes of it ---


def test_it_overfits_a_tiny_corpus_and_leaves_the_target_alone(
    overfitted: tuple[Path, Trainer], target: LlamaTarget, rows: list[Row], tmp_path: Path
) -> None:
    out, trainer = overfitted
    last = [line for line in metrics(out) if "mal" in line][-1]
    assert last["acceptance"] == [1.0, 1.0, 1.0]
    assert last["mal"] == 20 / 8
    assert trainer.standing.best_mal == 20 / 8
    fresh = load_target(target.spec.name, runtime="torch")
    assert isinstance(fresh, LlamaTarget)
    for ours, theirs in zip(state_of(target), state_of(fresh), strict=True):
        assert torch.equal(ours, theirs)
    for row in rows:
        tokens = torch.tensor(row.tokens)
        assert torch.equal(target.prefill(0, tokens), fresh.prefill(0, tokens))
    assert not torch.equal(trainer.model.tuned.embedding, target.embedding_weight())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_saved_model_is_the_trained_one_in_transformers(tmp_path: Path, tied: bool, dtype: str) -> None:
    """Trained for some steps, so that every weight differs from where it began."""
    target = tiny_target(tmp_path, "qwen2", tied, dtype)
    rows = answers(target, 3)
    model = model_of(target)
    config = replace(CONFIG, steps=3, eval_every=3, save_every=3, learning_rate=1e-2)
    result = Trainer(target, "sdsat", model, rows, rows, config, tmp_path / "run").fit()
    assert result.tuned == tmp_path / "run/best/model"
    saved = AutoModelForCausalLM.from_pretrained(result.tuned)
    assert saved.dtype == getattr(torch, dtype)
    assert saved.config.tie_word_embeddings == tied
    base = dict(AutoModelForCausalLM.from_pretrained(target.spec.name, dtype=dtype).named_parameters())
    for name, weight in saved.named_parameters():
        assert not torch.equal(weight, base[name]), name
    tokens = random_text(20)
    with torch.no_grad():
        own = model.predictions(text_batch([tokens]))[-1]
        logits = own.logits(own.hidden[0])
    difference = (hugging_face_logits(result.tuned, tokens).float() - logits).abs().max()
    assert difference < (1e-4 if dtype == "float32" else 0.3)
    served = model.served(target)
    loaded = load_target(str(result.tuned), runtime="torch", dtype=dtype)
    assert torch.equal(served.target.prefill(0, torch.tensor(tokens)), loaded.prefill(0, torch.tensor(tokens)))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_pair_writes_what_the_tuned_model_writes_plainly(
    overfitted: tuple[Path, Trainer], target: LlamaTarget, rows: list[Row], runtime: str, setting: str
) -> None:
    out, _ = overfitted
    llm = LLM(str(out / "best/model"), "none", max_batch=4, runtime=runtime)
    prompts = [*PROMPTS, *(list(row.prompt_ids) for row in rows)]
    plain = [generation.token_ids for generation in llm.generate(prompts, SETTINGS[setting])]
    llm.use(str(out / "best"), f"best:16x{SIZE}")
    drafted = llm.generate(prompts, SETTINGS[setting])
    assert [generation.token_ids for generation in drafted] == plain
    if setting == "greedy":
        learnt = drafted[len(PROMPTS) :]
        assert sum(len(g.token_ids) for g in learnt) > 1.5 * sum(g.stats.rounds for g in learnt)


def test_the_drafter_is_an_ordinary_one_for_the_tuned_model_alone(
    overfitted: tuple[Path, Trainer], target: LlamaTarget
) -> None:
    out, trainer = overfitted
    with pytest.raises(WrongTarget, match=re.escape(f"was trained for {out}/best/model")):
        load_model(out / "best", target, METHODS)
    config = json.loads((out / "best/config.json").read_text())
    assert config["config"] == {"tokens": SIZE, "rank": 0, "groups": 20, "fused": 1}
    tuned = load_target(str(out / "best/model"), runtime="torch")
    assert config["target"]["fingerprint"] == tuned.spec.fingerprint != target.spec.fingerprint
    loaded = load_model(out / "best", tuned, METHODS)
    assert set(loaded.state_dict()) == {"embeddings", "token_ids"}
    torch.testing.assert_close(loaded.embeddings, trainer.model.embeddings, rtol=1e-3, atol=1e-3)


def test_validation_drives_the_drafter_with_passes_of_the_tuned_model(
    target: LlamaTarget, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    verify = LlamaTarget.verify
    monkeypatch.setattr(LlamaTarget, "verify", lambda self, tree, taps: asked.append(self) or verify(self, tree, taps))
    Trainer(target, "sdsat", model_of(target), rows, rows, replace(CONFIG, steps=3), tmp_path).fit()
    assert asked
    assert target not in asked


# --- perplexity ---


def test_perplexity_by_hand() -> None:
    """Uniform over 23 tokens it is 23; a law of two tokens at 3 to 1 gives (4/3 * 4/3 * 4) ** (1/3)."""
    target = TinyTarget()
    target.head = torch.zeros_like(target.head)
    assert perplexity(target, tiny_rows(TinyTarget(), 3)) == pytest.approx(23)
    target.embedding = torch.ones_like(target.embedding)
    target.mix = torch.zeros_like(target.mix)
    target.head.fill_(-1e4)
    scale = 8 * math.tanh(1)
    target.head[5], target.head[7] = math.log(3) / scale, 0.0
    assert perplexity(target, [Row((1, 2), (5, 5, 7), 0.0, "x")]) == pytest.approx((4 / 3 * 4 / 3 * 4) ** (1 / 3))
    mixed = [Row((1, 2), (5, 5, 7), 0.0, "x"), Row((9,), (5,), 0.0, "x")]
    assert perplexity(target, mixed) == pytest.approx((4 / 3 * 4 / 3 * 4 * 4 / 3) ** (1 / 4))


def test_a_run_reports_both_perplexities_and_their_change(overfitted: tuple[Path, Trainer], rows: list[Row]) -> None:
    """In metrics.jsonl, on the model card, in the standing; against transformers."""
    out, trainer = overfitted
    last = [line for line in metrics(out) if "mal" in line][-1]
    for name, directory in (("base", trainer.target.spec.name), ("tuned", out / "best/model")):
        losses = []
        for row in rows:
            start, tokens = len(row.prompt_ids), torch.tensor(row.tokens)
            logits = hugging_face_logits(Path(directory), list(row.tokens))[start - 1 : -1]
            losses.append(F.cross_entropy(logits, tokens[start:], reduction="none"))
        assert last[f"perplexity/{name}"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    base, tuned = last["perplexity/base"], last["perplexity/tuned"]
    assert last["perplexity/change"] == tuned / base - 1 < 0
    assert (trainer.standing.base_perplexity, trainer.standing.best_perplexity) == (base, tuned)
    card = (out / "best/README.md").read_text()
    for name in ("base", "tuned", "change"):
        assert f"| perplexity/{name} | {last[f'perplexity/{name}']:.4g} |" in card
    assert f"The model in `model`, tuned from `{trainer.target.spec.name}`" in card


# --- going on, and what is refused ---


def test_a_crash_and_a_resume_give_the_losses_of_an_unbroken_run(
    tmp_path: Path, target: LlamaTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = answers(target, 6)

    def fit(out: str, resume: bool = False, config: TrainConfig = CONFIG) -> Path:
        model = model_of(target, groups=3)
        torch.manual_seed(2 if resume else 1)
        Trainer(target, "sdsat", model, rows, rows, config, tmp_path / out, resume=resume).fit()
        return tmp_path / out

    def losses(out: Path) -> list[float]:
        return [line["loss"] for line in metrics(out) if "loss" in line]

    whole = fit("whole")
    assert losses(fit("seldom", config=replace(CONFIG, eval_every=6))) == losses(whole), "validation draws nothing"
    strike(monkeypatch, step=5)
    with pytest.raises(MemoryError):
        fit("broken")
    monkeypatch.undo()
    assert latest(tmp_path / "broken/steps") == tmp_path / "broken/steps/step-00000003"
    assert metrics(fit("broken", resume=True)) == metrics(whole)
    for name in ("steps/step-00000006/model.safetensors", "best/model.safetensors", "best/model/model.safetensors"):
        assert (whole / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    frozen = SDSATModel(target, SDSATConfig(tokens=SIZE, rank=0, groups=3), torch.arange(VOCAB))
    with pytest.raises(ValueError, match=r"another model: standard 1\.0 then, None now"):
        Trainer(target, "sdsat", frozen, rows, rows, CONFIG, whole, resume=True).fit()


def test_a_full_disk_leaves_the_best_pair_whole(
    tmp_path: Path, target: LlamaTarget, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Callable[[Path], Any] = lambda out: Trainer(  # noqa: E731
        target, "sdsat", model_of(target), rows, [], replace(CONFIG, steps=6), out
    ).fit()
    write_bytes, written = Path.write_bytes, 0

    def until_full(path: Path, data: bytes) -> int:
        nonlocal written
        written += path.parent.name == "model"
        if written == 2:
            raise OSError(28, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", until_full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    monkeypatch.undo()
    tuned = load_target(str(tmp_path / "best/model"), runtime="torch")
    assert isinstance(load_model(tmp_path / "best", tuned, METHODS), SDSATModel)
    assert not (tmp_path / ".best.partial").exists()


def test_it_goes_on_from_adaptive_tokens(target: LlamaTarget) -> None:
    other = SDSATModel(target, SDSATConfig(tokens=SIZE, rank=0), torch.arange(VOCAB))
    model = model_of(target)
    assert not torch.equal(model.embeddings, other.embeddings)
    model.start_from(other)
    assert torch.equal(model.embeddings, other.embeddings)
    for wrong in ({"tokens": SIZE, "rank": 4}, {"tokens": 4, "rank": 0}):
        with pytest.raises(ValueError, match=f"with rank=0 and tokens={SIZE}; the given one has other settings"):
            model.start_from(SDSATModel(target, SDSATConfig(**wrong), torch.arange(VOCAB)))


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="'s4c' leaves the target as it is; --full must go with one of sdsat"):
        trained_method("s4c", full=True)
    line = trained_method("sdsat", full=True)
    assert parse_settings(line, ["rank=0", "standard=0.5"]) == FullConfig(standard=0.5)
    for setting, message in {
        "rank=4": "rank is 4; full fine-tuning has no low-rank terms: leave rank out, or give 0",
        "standard=-1": "standard is -1.0; it must be at least 0",
        "standard=inf": "standard is inf",
        "tokens=2": "from 3 to 13",
        "heads=2": "is no setting of sdsat; give KEY=VALUE, of: tokens=5, rank=0, groups=32, fused=1, standard=1.0",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_settings(line, [setting])


@pytest.mark.parametrize("runtime", ["hf", *(r for r in RUNTIMES if r == "native")])
def test_a_runtime_that_cannot_is_refused(tmp_path: Path, runtime: str) -> None:
    other = load_target(str(tiny_models.save(tmp_path, "llama")), runtime=runtime)
    with pytest.raises(UnsupportedModel, match=r"runtime torch|runtime native or torch"):
        model_of(other)


def test_the_commands_train_and_use_the_pair(tmp_path: Path) -> None:
    base = str(tiny_models.save(tmp_path, "llama", tokenizer=True))
    lines = [{"prompt_ids": [n, 5, 6], "answer_ids": [7, 8, 9, 7, 8, 9], "temperature": 0.0} for n in range(12)]
    text, out = tmp_path / "text.jsonl", tmp_path / "run"
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train = ["train", "--full", "--method", "sdsat", "--data", str(text), "--out", str(out), "--steps", "3"]
    train += ["--target", base, "--runtime", "torch", "--threads", "1", "--held-out", "0.3"]
    pair = ["--target", str(out / "best/model"), "--drafter", str(out / "best"), "--threads", "1"]
    said = {}
    for name, command, code in (
        ("train", train, 0),
        ("generate", ["generate", "hello", "--compare", "--json", "--max-new-tokens", "8", *pair], 0),
        ("eval", ["eval", "--data", str(text), "--held-out", "1", "--runtime", "torch", "--json", *pair], 0),
        ("base", ["generate", "hello", "--target", base, "--drafter", str(out / "best")], 2),
        ("rank", [*train, "--set", "rank=2"], 2),
        ("medusa", [*train, "--method", "medusa"], 2),
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == code, (name, done.output)
        said[name] = done
    assert f"use them with --target {out}/best/model --drafter {out}/best" in said["train"].stderr
    assert re.search(
        r"perplexity of held-out answers [\d.]+, that of the target before [\d.]+ \([+-]", said["train"].stderr
    )
    assert json.loads(said["generate"].stdout)["compare"]["equal"]
    assert json.loads(said["eval"].stdout)["heads"] is not None
    assert "was trained for" in said["base"].stderr
