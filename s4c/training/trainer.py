"""Training a drafter: batches in, gradients, and now and then the question that counts - how long is its MAL?

    result = Trainer(target, method, model, train, held, config, out).fit()

What stands in the folder `out`:

    steps/         the last saved steps, for a run that goes on (see checkpoint.py)
    best/          the drafter with the highest simulated MAL on held-out text, ready to use; in best/model the target,
                   where the method trains that along
    metrics.jsonl  losses, learning rate, tokens per second, MAL
    tensorboard/   the same for TensorBoard

The order of the data and the learning rate are functions of the step alone, so a run that is killed and
resumed repeats the losses of an unbroken one bit for bit. (With a limit in seconds the rate follows the clock.)
Under `accelerate launch` or `torchrun` each process takes its share of the batches and gradients are averaged.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast
from torch import Tensor

from s4c.drafters.base import DraftModel, Served, TrainingBatch
from s4c.drafters.checkpoint import TARGET, finish_swap, save_checkpoint
from s4c.errors import UnsupportedModel
from s4c.models.base import Target
from s4c.training.checkpoint import exclusive, latest, load_state, read_facts, save_state
from s4c.training.data import Row, batch_order, collate, summary
from s4c.training.features import FeatureSource, open_features
from s4c.training.log import TrainingLog, stop_signals
from s4c.training.losses import CompositeLoss, LossWeights
from s4c.training.perplexity import perplexity
from s4c.training.simulate import HeadAcceptance, simulate
from s4c.verify.tree import TreePlan

AUTOCAST = {"none": None, "bfloat16": torch.bfloat16}
"""float16 would lose gradients: they are means over thousands of positions, and nothing scales them."""
LONGEST_WAIT = timedelta(hours=12)
"""Of the other processes, while the first one computes the features of all the text."""
ENOUGH_GREEDY = 8
"""With fewer held-out rows at temperature 0 than this, validation takes rows of any temperature."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. It ends at the first of the limits that is not 0.

    Attributes:
        steps: optimizer steps.
        epochs: visits of every row.
        max_seconds: wall-clock time, validation included.
        learning_rate: at the peak; AdamW.
        warmup_steps: steps of linear warm-up.
        final_rate: where the cosine ends, as a share of the peak.
        weight_decay: of matrices; vectors have none.
        beta1: of AdamW.
        beta2: of AdamW.
        clip: most norm of the gradient.
        batch_tokens: most tokens of a batch, padding included, for each process.
        max_length: rows are cut to so many tokens.
        step_vocab: so many tokens of the draft vocabulary are looked at in a step, those that the target finds most
            probable anywhere in the batch; 0 for all.
        echo_loss: whether the loss is of the law that a drafter has with its echo, not of its heads' own.
        weights: of the loss.
        autocast: `none` or `bfloat16`: precision of the drafter's matrix products.
        features: `cache` or `fly`, see features.py.
        held_out: share of the prompts kept for validation, 0 for none.
        validation_rows: most rows of a validation.
        tree: of the simulated drafting; None for the method's own.
        eval_every: steps between validations.
        save_every: steps between saved states.
        log_every: steps between lines of the log.
        seed: of the order of the data.
    """

    steps: int = 0
    epochs: int = 0
    max_seconds: float = 0.0
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    final_rate: float = 0.05
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    batch_tokens: int = 4096
    max_length: int = 512
    step_vocab: int = 0
    echo_loss: bool = False
    weights: LossWeights = field(default_factory=LossWeights)
    autocast: str = "none"
    features: str = "cache"
    held_out: float = 0.03
    validation_rows: int = 64
    tree: str | None = None
    eval_every: int = 200
    save_every: int = 200
    log_every: int = 10
    seed: int = 0

    MAY_CHANGE = ("steps", "epochs", "max_seconds", "features", "eval_every", "save_every", "log_every")
    """Settings that a resumed run may be given anew."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.max_seconds):
            raise ValueError(f"max_seconds is {self.max_seconds}; it must be a number of seconds")
        if min(self.steps, self.epochs, self.max_seconds) < 0 or not (self.steps or self.epochs or self.max_seconds):
            raise ValueError("steps, epochs and max_seconds must not be negative, and one of them must be given")
        for name in ("batch_tokens", "max_length", "eval_every", "save_every", "log_every", "validation_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.step_vocab < 0:
            raise ValueError(f"step_vocab is {self.step_vocab}; it must be 0 (the whole draft vocabulary) or more")
        for name in ("learning_rate", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be a share from 0 to below 1")
        if self.autocast not in AUTOCAST:
            raise ValueError(f"autocast is {self.autocast!r}; it must be one of {', '.join(AUTOCAST)}")
        if self.tree is not None:
            TreePlan.parse(self.tree)


@dataclass
class Standing:
    """How far a run has come; part of every saved state.

    Attributes:
        step: optimizer steps made.
        epoch: of the next batch.
        position: of the next batch within its epoch, in steps.
        tokens: seen so far, by all processes.
        seconds: spent so far.
        best_mal: highest simulated mean acceptance length.
        best_step: when that was.
        base_perplexity: of the target on the answers of the validation, where the method trains a copy of it along;
            0 until it is measured.
        best_perplexity: of that copy, at the best step.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_mal: float = 0.0
    best_step: int = 0
    base_perplexity: float = 0.0
    best_perplexity: float = 0.0


@dataclass(frozen=True)
class TrainResult:
    """What came out.

    Attributes:
        standing: where the run ended.
        interrupted: whether a signal ended it before its limit.
        best: folder of the best drafter; None when none has been saved yet.
        tuned: folder of the target that goes with it; None where that is the one that the training began with.
    """

    standing: Standing
    interrupted: bool
    best: Path | None
    tuned: Path | None


class Trainer:
    """One training run.

    Args:
        target: the model that the drafter will draft for, on this process's own device.
        method: the drafter's name in the table.
        model: the draft model; its weights are where training starts.
        train: rows to learn from.
        held: rows to validate on; may be empty.
        config: the settings.
        out: folder of the run.
        resume: go on from the last saved step in `out`.
        cache: folder of the feature cache; `out`/features unless given.
        provenance: more facts for the model card (command, data files).

    Raises:
        UnsupportedModel: the target's law cannot be had from its features.
        ValueError: no rows; the folder holds a run already, or none to resume, or one with other settings.
    """

    def __init__(
        self,
        target: Target,
        method: str,
        model: DraftModel,
        train: Sequence[Row],
        held: Sequence[Row],
        config: TrainConfig,
        out: Path,
        *,
        resume: bool = False,
        cache: Path | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        if not train:
            raise ValueError("there are no rows to train on; every prompt is held out or longer than max_length")
        if not target.readable:
            raise UnsupportedModel(
                f"{target.spec.name} comes to its logits by more than its LM head, a scale and a cap (it adds a bias, "
                "say), so a drafter would learn another law than it has; use one that needs no training (ngram)"
            )
        if config.echo_loss and not model.echo:
            raise ValueError(f"echo_loss is of a drafter with an echo, and this {method} has none; leave it away")
        patient = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
        self.accelerator = Accelerator(cpu=target.device.type == "cpu", kwargs_handlers=[patient])
        self.main = self.accelerator.is_main_process
        self.target = target
        self.method = method
        self.train = train
        self.config = config
        self.out = out
        self.resume = resume
        self.cache = cache or out / "features"
        self.provenance = provenance or {}
        self.model = model.to(target.device).train()
        self.loss = CompositeLoss(
            model,
            target.head_weight(model.token_ids.to(target.device)).detach().float(),
            config.weights,
            AUTOCAST[config.autocast],
            config.step_vocab,
            target.head_weight if model.beyond else None,
            model.echo if config.echo_loss else 0.0,
            target.softcap,
        )
        self.optimizer = _optimizer(model, config)
        greedy = [row for row in held if row.temperature == 0]
        self.validation = (greedy if len(greedy) >= ENOUGH_GREEDY else list(held))[: config.validation_rows]
        self.standing = Standing()
        self.identity = {
            "target": target.spec.fingerprint,
            "data": summary(train)["sha256"],
            "model": asdict(model.config),
            "processes": self.accelerator.num_processes,
            "settings": {k: v for k, v in asdict(config).items() if k not in TrainConfig.MAY_CHANGE},
        }

    def fit(self) -> TrainResult:
        """Train until a limit or a signal (SIGINT, SIGTERM), which saves the present step and ends.

        Raises:
            ValueError: see the class; or the loss is no number, with the step.
            OSError: the disk is full, say; what was saved before is whole.
        """
        with exclusive(self.out / "lock") if self.main else contextlib.nullcontext():
            self._open()
            interrupted = False
            with stop_signals() as stop, TrainingLog(self.out, self.standing, silent=not self.main) as log:
                while not interrupted and self._done() < 1:
                    batch, tokens = self._next_batch()
                    log.step(self._step(batch))
                    interrupted = self._advance(tokens, stop.is_set())
                    self._milestones(log, interrupted)
                if interrupted:
                    log.say(f"stopped by a signal; step {self.standing.step} is saved in {self.out}, resume to go on")
        best, tuned = (path if path.exists() else None for path in (self.out / "best", self.out / "best" / TARGET))
        return TrainResult(self.standing, interrupted, best, tuned)

    def _open(self) -> None:
        """Take up the last saved step, or see that there is none; get the features."""
        if self.main:
            finish_swap(self.out / "best")
        place = latest(self.out / "steps")
        if self.resume:
            if place is None:
                raise ValueError(f"{self.out} holds no saved step to resume; start without resume")
            facts = read_facts(place)
            self._same(facts["identity"])
            load_state(place, self.model, self.optimizer)
            self.standing = Standing(**facts["standing"])
        elif place is not None:
            raise ValueError(f"{self.out} holds a training run ({place.name}); resume it or choose another folder")
        elif (self.out / "best").exists():
            raise ValueError(f"{self.out}/best would be replaced; choose another folder, or move it away")
        rows = [*self.train, *self.validation]
        if self.main:
            self.features = self._features(rows)
        self.accelerator.wait_for_everyone()
        if not self.main:
            self.features = self._features(rows)
        held = range(len(self.train), len(rows))
        self.held_features = [self.features(r).clone() for r in held] if self.main else []
        self.order: tuple[int, list[list[int]]] = (-1, [])
        self.total_steps = self._total_steps()
        if self.accelerator.num_processes > 1:
            for parameter in self.model.parameters():
                parameter.data = broadcast(parameter.data)
        self.started = time.monotonic() - self.standing.seconds

    def _features(self, rows: Sequence[Row]) -> FeatureSource:
        return open_features(self.config.features, self.cache, rows, self.target, self.model.taps)

    def _same(self, saved: dict[str, Any]) -> None:
        present = json.loads(json.dumps(self.identity))
        for name in present:
            if present[name] != saved[name]:
                raise ValueError(
                    f"{self.out} was trained with another {name}: {_difference(saved[name], present[name])}; "
                    "resume with the same or choose another folder"
                )

    def _epoch(self, epoch: int) -> list[list[int]]:
        if self.order[0] != epoch:
            lengths = [len(row) for row in self.train]
            self.order = (epoch, batch_order(lengths, self.config.batch_tokens, self.config.seed, epoch))
        return self.order[1]

    def _steps_in(self, epoch: int) -> int:
        """Steps of an epoch; batches that do not go round all processes are left out."""
        return max(1, len(self._epoch(epoch)) // int(self.accelerator.num_processes))

    def _total_steps(self) -> int:
        """Steps until the first limit that is not a time; 0 where there is none."""
        limits = [self.config.steps] if self.config.steps else []
        if self.config.epochs:
            limits.append(sum(self._steps_in(epoch) for epoch in range(self.config.epochs)))
        return min(limits, default=0)

    def _done(self) -> float:
        """How much of the run is behind it, from 0; at 1 it ends."""
        done = self.standing.step / self.total_steps if self.total_steps else 0.0
        return max(done, self.standing.seconds / self.config.max_seconds) if self.config.max_seconds else done

    def _rate(self) -> float:
        """Learning rate of the next step: linear warm-up, then a cosine."""
        config = self.config
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self._done())))
        warm = min(1.0, (self.standing.step + 1) / max(1, config.warmup_steps))
        return config.learning_rate * warm * (config.final_rate + (1 - config.final_rate) * cosine)

    def _next_batch(self) -> tuple[TrainingBatch, int]:
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        batches = self._epoch(self.standing.epoch)
        rows = batches[(self.standing.position * processes + rank) % len(batches)]
        batch = collate([self.train[r] for r in rows], [self.features(r) for r in rows], self.target.device)
        return batch, sum(len(self.train[r]) for r in rows)

    def _step(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """One step of the optimizer: the losses by name, and the norm of the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss, parts = self.loss(batch)
        loss.backward()
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        return {"loss": loss.detach(), "gradient": norm, **parts}

    def _average_gradients(self) -> None:
        """The mean over all processes, in one message."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        mean = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _milestones(self, log: TrainingLog, interrupted: bool) -> None:
        """After a step: log, validate and save when it is time to, or when the run ends."""
        step, config = self.standing.step, self.config
        ends = self._done() >= 1
        if step % config.log_every == 0 or step % config.save_every == 0 or interrupted or ends:
            log.flush(self.optimizer.param_groups[0]["lr"], min(1.0, self._done()))
        if step % config.eval_every == 0 or ends:
            log.validated(self._validate())
        if step % config.save_every == 0 or interrupted or ends:
            self._save()

    def _advance(self, tokens: int, stopped: bool) -> bool:
        """Move on by a step; whether any process was told to stop. All processes come to the same standing."""
        now = torch.tensor([float(tokens), float(stopped), time.monotonic() - self.started], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            now = self.accelerator.reduce(now.float().to(self.target.device)).double().cpu()
        standing = self.standing
        standing.step += 1
        standing.position += 1
        standing.tokens += int(now[0])
        standing.seconds = float(now[2]) / self.accelerator.num_processes
        if standing.position == self._steps_in(standing.epoch):
            standing.epoch, standing.position = standing.epoch + 1, 0
        return bool(now[1] > 0)

    def _validate(self) -> dict[str, Any]:
        """Simulated MAL and acceptance on held-out rows; the best drafter so far is saved."""
        metrics: dict[str, Any] = {}
        if self.main:
            served = self.model.served(self.target)
            if self.validation:
                metrics = self._measure(served)
            mal = metrics.get("mal", 0.0)
            if mal > self.standing.best_mal or not self.validation:
                self.standing.best_mal, self.standing.best_step = mal, self.standing.step
                self.standing.best_perplexity = metrics.get("perplexity/tuned", 0.0)
                self._save_best(metrics, served)
        self.accelerator.wait_for_everyone()
        return metrics

    def _measure(self, served: Served) -> dict[str, Any]:
        self.model.eval()
        with torch.no_grad():
            drafter = served.model.drafter(served.target)
            plan = TreePlan.parse(self.config.tree or drafter.default_tree)
            spec, device = self.target.spec, self.target.device
            simulation = simulate(
                drafter,
                self.validation,
                self.held_features.__getitem__,
                plan,
                spec.vocab_size,
                device=device,
                target=served.target,
            )
            heads = HeadAcceptance()
            for rows in batch_order([len(row) for row in self.validation], self.config.batch_tokens, 0, 0):
                batch = collate([self.validation[r] for r in rows], [self.held_features[r] for r in rows], device)
                heads.add(served.model, batch)
        self.model.train()
        return {
            "mal": simulation.mean_acceptance_length,
            "histogram": simulation.histogram,
            "acceptance": [round(shares[0], 4) for shares in heads.conditional],
            **self._perplexities(served),
        }

    def _perplexities(self, served: Served) -> dict[str, float]:
        """Of the target and of what it is by now, on the answers of the validation; none where it is fixed."""
        if served.target is self.target:
            return {}
        standing = self.standing
        standing.base_perplexity = standing.base_perplexity or perplexity(self.target, self.validation)
        base, tuned = standing.base_perplexity, perplexity(served.target, self.validation)
        return {"perplexity/base": base, "perplexity/tuned": tuned, "perplexity/change": tuned / base - 1}

    def _save_best(self, metrics: dict[str, Any], served: Served) -> None:
        spec = self.target.spec
        facts = {
            "metrics": {"step": self.standing.step, "tokens seen": self.standing.tokens, **metrics},
            "data": summary(self.train),
            "training": asdict(self.config),
            **self.provenance,
        }
        if served.save_target is not None:
            facts["target"] = f"The model in `{TARGET}`, tuned from `{spec.name}` (fingerprint `{spec.fingerprint}`)."
        save_checkpoint(
            self.out / "best",
            served.model,
            self.method,
            spec,
            facts,
            default_tree=self.config.tree,
            save_target=served.save_target,
        )

    def _save(self) -> None:
        if self.main:
            facts = {"standing": asdict(self.standing), "identity": self.identity}
            save_state(self.out / "steps", self.standing.step, self.model, self.optimizer, facts)
        self.accelerator.wait_for_everyone()


def _optimizer(model: DraftModel, config: TrainConfig) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )


def _difference(saved: Any, present: Any) -> str:
    if not isinstance(saved, dict) or not isinstance(present, dict):
        return f"{saved} then, {present} now"
    names = [name for name in {**saved, **present} if present.get(name) != saved.get(name)]
    return ", ".join(f"{name} {saved.get(name)} then, {present.get(name)} now" for name in names)
