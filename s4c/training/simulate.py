"""How much a drafter would gain, told from recorded text: without a pass of the target where it has no probes.

At temperature 0 the target's choice at every node of the accepted path is what it wrote when the text was
recorded, and its features there are those of the text. So the real drafter can be driven round by round over held-out
answers, and what it commits per round is the mean acceptance length (MAL) that it would reach. What a probe gives
no record tells: drafters that have probes are driven with passes of the target, and judged by the record all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s4c.drafters.base import Drafter, DraftModel, Prediction, Sequences, TrainingBatch
from s4c.models.base import Target
from s4c.models.sampling import noise_kernel
from s4c.training.data import Row
from s4c.training.losses import columns_of
from s4c.types import DraftTree, SamplingParams, TargetOutput, Verdict
from s4c.verify import rules
from s4c.verify import tree as trees
from s4c.verify.noise import NoiseTable
from s4c.verify.scores import Scores
from s4c.verify.tree import TreePlan
from s4c.verify.verdict import settled

RANKS = 8
"""Acceptance is reported for the top 1 .. RANKS tokens of a head."""


@dataclass
class Simulation:
    """What drafting over recorded answers gave.

    Attributes:
        rounds: passes that the target would have made.
        tokens: tokens committed by them, cut where the records end.
        histogram: how many rounds accepted 0, 1, 2, ... drafted tokens.
    """

    rounds: int
    tokens: int
    histogram: list[int]

    @property
    def mean_acceptance_length(self) -> float:
        """Committed tokens per round, the target's own token included."""
        return self.tokens / max(1, self.rounds)


@dataclass
class _Running:
    """A row on its way: the tokens of its record, its features, how many tokens are committed."""

    tokens: list[int]
    features: Tensor
    prompt_length: int
    committed: int


@torch.no_grad()
def simulate(
    drafter: Drafter,
    rows: Sequence[Row],
    features: Callable[[int], Tensor],
    plan: TreePlan,
    vocab_size: int,
    *,
    device: torch.device,
    target: Target | None = None,
    slots: int = 32,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Simulation:
    """Draft over recorded answers, `slots` rows at a time.

    Args:
        drafter: a fresh one; its slots are used.
        rows: records at temperature 0 (others are what a sampling target wrote: the result is then too low).
        features: gives the features [n, d] of a row by its place in `rows`.
        plan: the tree.
        vocab_size: V.
        device: where the drafter works.
        target: what a drafter with probes drafts for; its slots are used.
        slots: most rows at once.
        advance: told how many tokens each round committed.
    """
    passes = target if drafter.probes else None
    assert passes is not None or not drafter.probes, "probes need passes of the target"
    waiting = [r for r in range(len(rows) - 1, -1, -1) if rows[r].answer_ids]
    running: list[_Running] = []
    noise = NoiseTable(vocab_size, device, noise_kernel(device))
    result = Simulation(0, 0, [])
    room = min(slots, len(waiting)), max((len(row) for row in rows), default=0) + 1
    drafter.reserve(*room)
    if passes is not None:
        passes.reserve(*room)
    while waiting or running:
        while waiting and len(running) < slots:
            row, slot = waiting.pop(), len(running)
            running.append(_start(drafter, slot, rows[row], features(row).to(device).float()))
            if passes is not None:
                passes.prefill(slot, torch.tensor(rows[row].prompt_ids[:-1], dtype=torch.int64, device=device))
        sequences = _sequences(running, plan, noise)
        tree = drafter.propose(sequences)
        verdict, output = _judge(tree, running, sequences.positions)
        if passes is not None:
            output = passes.verify(tree, drafter.taps)
            passes.commit(verdict)
        drafter.commit(tree, verdict, output)
        committed = _count(result, running, verdict)
        advance(committed)
        for slot in range(len(running) - 1, -1, -1):
            if running[slot].committed == len(running[slot].tokens):
                last = running.pop()
                if slot < len(running):
                    drafter.move(len(running), slot)
                    if passes is not None:
                        passes.move(len(running), slot)
                    running[slot] = last
    return result


def _start(drafter: Drafter, slot: int, row: Row, features: Tensor) -> _Running:
    prompt = torch.tensor(row.prompt_ids[:-1], dtype=torch.int64, device=features.device)
    drafter.prefill(slot, prompt, features[: len(prompt)])
    return _Running(list(row.tokens), features, len(row.prompt_ids), len(row.prompt_ids))


def _sequences(running: Sequence[_Running], plan: TreePlan, noise: NoiseTable) -> Sequences:
    tokens = [r.tokens[: r.committed] for r in running]
    params = [SamplingParams()] * len(running)
    return Sequences(
        tokens=tokens,
        scores=Scores(params, tokens, [r.prompt_length for r in running], noise),
        sampled=False,
        plan=plan,
        device=noise.device,
    )


def _judge(tree: DraftTree, running: Sequence[_Running], roots_at: Tensor) -> tuple[Verdict, TargetOutput]:
    """The verdict of the record, and its features on the accepted path (zero elsewhere, as none may read them)."""
    depth = trees.depths(tree.parents)
    at = (roots_at[:, None] + depth).tolist()
    choice = torch.tensor(
        [[r.tokens[p + 1] if p + 1 < len(r.tokens) else -1 for p in row] for r, row in zip(running, at, strict=True)],
        device=tree.tokens.device,
    )
    verdict = settled(rules.follow(tree, choice))
    features = running[0].features.new_zeros(*tree.tokens.shape, running[0].features.shape[-1])
    for b, (r, (path, _)) in enumerate(zip(running, verdict.lines, strict=True)):
        start = int(roots_at[b])
        features[b, path] = r.features[start : start + len(path)]
    return verdict, TargetOutput(logits=features.new_zeros(*tree.tokens.shape, 0), features=features)


def _count(result: Simulation, running: Sequence[_Running], verdict: Verdict) -> int:
    committed = 0
    for r, (path, _) in zip(running, verdict.lines, strict=True):
        accepted = len(path) - 1
        gained = min(accepted + 1, len(r.tokens) - r.committed)
        r.committed += gained
        committed += gained
        result.histogram.extend([0] * (accepted + 1 - len(result.histogram)))
        result.histogram[accepted] += 1
    result.rounds += len(running)
    result.tokens += committed
    return committed


class HeadAcceptance:
    """How often the recorded token is among the first k of each head, teacher-forced.

    Head i drafts the i-th token below the root. Feed it batches with `add`. `unconditional[i - 1][k - 1]` is the
    share for head i over all tokens of the answers, and `conditional[i - 1][k - 1]` that over those where, from the
    same root, every head before it had its token first: this is what a comb tree meets.
    """

    def __init__(self) -> None:
        self._hits: list[Tensor] = []
        self._conditional_hits: list[Tensor] = []
        self._counts: list[tuple[int, int]] = []

    @torch.no_grad()
    def add(self, model: DraftModel, batch: TrainingBatch) -> None:
        """Count one batch; predictions whose token lies outside the answer do not count."""
        right = torch.ones_like(batch.tokens, dtype=torch.bool)
        for i, prediction in enumerate(model.predictions(batch)):
            counts, rank = _ranks(prediction, batch, model.token_ids)
            reached = counts & right
            if len(self._hits) == i:
                self._hits.append(torch.zeros(RANKS, dtype=torch.int64))
                self._conditional_hits.append(torch.zeros(RANKS, dtype=torch.int64))
                self._counts.append((0, 0))
            self._hits[i] += _within(rank[counts])
            self._conditional_hits[i] += _within(rank[reached])
            self._counts[i] = (self._counts[i][0] + int(counts.sum()), self._counts[i][1] + int(reached.sum()))
            right = F.pad(reached & (rank == 0), (1, 0))[:, :-1]

    @property
    def unconditional(self) -> list[list[float]]:
        """[heads][RANKS] shares from 0 to 1."""
        return [(h / max(1, n)).tolist() for h, (n, _) in zip(self._hits, self._counts, strict=True)]

    @property
    def conditional(self) -> list[list[float]]:
        """[heads][RANKS] shares from 0 to 1."""
        return [(h / max(1, n)).tolist() for h, (_, n) in zip(self._conditional_hits, self._counts, strict=True)]


def _within(rank: Tensor) -> Tensor:
    """[RANKS] int64: how many of the ranks are below 1, 2, ..."""
    return torch.bincount(rank, minlength=RANKS + 1)[:RANKS].cumsum(0).cpu()


def _ranks(prediction: Prediction, batch: TrainingBatch, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each token of a batch whether its prediction counts, [B, T] bool, and its rank, [B, T] int64 up to RANKS."""
    index = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    counts = (index >= batch.answer_start[:, None]) & (index < batch.length[:, None]) & (index >= prediction.offset)
    if prediction.made is not None:
        counts &= F.pad(prediction.made, (prediction.offset, 0))[:, : len(index)]
    row, about = counts.nonzero(as_tuple=True)
    logits = prediction.logits(prediction.hidden[row, about - prediction.offset])
    column = columns_of(batch.tokens[row, about], token_ids)
    better = (logits > logits.gather(1, column.clamp(min=0)[:, None])).sum(-1)
    rank = torch.full_like(batch.tokens, RANKS)
    rank[row, about] = torch.where(column >= 0, better.clamp(max=RANKS), RANKS)
    return counts, rank
