"""Simulated drafting, against what can be counted by hand or slowly."""

from collections.abc import Sequence

import pytest
import torch
from tiny_training import HIDDEN, VOCAB, TinyTarget, tiny_model, tiny_rows
from torch import Tensor

from s4c.drafters.base import Drafter, Sequences, TrainingBatch
from s4c.training.data import Row, collate
from s4c.training.simulate import RANKS, HeadAcceptance, Simulation, simulate
from s4c.types import DraftTree, TargetOutput, Verdict
from s4c.verify.tree import TreePlan, from_paths


class KnowsTheRecord(Drafter):
    """Drafts the next `right` recorded tokens and a wrong one, beside a wrong branch, and checks what it is told."""

    name = "oracle"
    default_tree = "comb:2"

    def __init__(self, rows: Sequence[Row], features: Sequence[Tensor], right: int) -> None:
        self.rows = {row.prompt_ids: (row, f) for row, f in zip(rows, features, strict=True)}
        self.right = right
        self.slots: dict[int, tuple[Row, Tensor]] = {}
        self.seen: dict[int, int] = {}
        self.widest = 0

    def prefill(self, slot: int, tokens: Tensor, features: Tensor) -> None:
        """The prompt without its last token: the first of them is unique in this test."""
        row, known = next(pair for prompt, pair in self.rows.items() if prompt[0] == int(tokens[0]))
        assert tokens.tolist() == list(row.prompt_ids[:-1])
        assert torch.equal(features, known[: len(tokens)])
        self.slots[slot] = (row, known)
        self.seen[slot] = len(tokens)

    def propose(self, sequences: Sequences) -> DraftTree:
        self.widest = max(self.widest, len(sequences.tokens))
        paths = []
        for slot, tokens in enumerate(sequences.tokens):
            row, _ = self.slots[slot]
            assert tokens == list(row.tokens[: len(tokens)])
            assert (sequences.roots[slot], int(sequences.positions[slot])) == (tokens[-1], len(tokens) - 1)
            assert self.seen[slot] == len(tokens) - 1
            coming = [*row.tokens[len(tokens) :], 0, 0, 0, 0][: self.right + 1]
            wrong = [(coming[0] + 1) % VOCAB]
            paths.append([wrong, [*coming[: self.right], (coming[self.right] + 1) % VOCAB]])
        return from_paths(sequences.roots, paths, 8)

    def commit(self, tree: DraftTree, verdict: Verdict, output: TargetOutput) -> None:
        for slot, accepted in enumerate(verdict.accepted.tolist()):
            _, known = self.slots[slot]
            got = output.features[slot, verdict.path[slot, : accepted + 1]]
            assert torch.equal(got, known[self.seen[slot] : self.seen[slot] + accepted + 1])
            self.seen[slot] += accepted + 1

    def move(self, source: int, destination: int) -> None:
        self.slots[destination] = self.slots.pop(source)
        self.seen[destination] = self.seen.pop(source)


def run(right: int, slots: int) -> tuple[Simulation, KnowsTheRecord]:
    rows = [Row((i, 5, 6), tuple(range(1, 4 + i)), 0.0, "test") for i in range(7)]
    features = [torch.randn(len(row), HIDDEN) for row in rows]
    drafter = KnowsTheRecord(rows, features, right)
    plan = TreePlan.parse("comb:2")
    result = simulate(drafter, rows, features.__getitem__, plan, VOCAB, device=torch.device("cpu"), slots=slots)
    return result, drafter


@pytest.mark.parametrize("right", [0, 1, 3])
@pytest.mark.parametrize("slots", [1, 3, 7, 32])
def test_rounds_and_tokens_are_those_of_the_record(right: int, slots: int) -> None:
    result, drafter = run(right, slots)
    lengths = [3 + i for i in range(7)]
    assert result.tokens == sum(lengths)
    assert result.rounds == sum(-(-length // (right + 1)) for length in lengths)
    assert sum(result.histogram) == result.rounds
    assert len(result.histogram) == right + 1
    assert result.mean_acceptance_length == result.tokens / result.rounds
    assert drafter.widest == min(slots, 7)


def test_a_trained_kind_of_drafter_meets_the_same_acceptance_alone_and_in_a_batch() -> None:
    target = TinyTarget()
    rows = tiny_rows(target, 9)
    model = tiny_model(target)
    features = [target.prefill(0, torch.tensor(row.tokens)) for row in rows]
    outcomes = [
        simulate(
            model.drafter(target),
            rows,
            features.__getitem__,
            TreePlan.parse("comb:3"),
            VOCAB,
            device=torch.device("cpu"),
            slots=slots,
        )
        for slots in (1, 4)
    ]
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0].histogram) > 1


def slow_acceptance(model: torch.nn.Module, batch: TrainingBatch) -> tuple[list[list[float]], list[list[float]]]:
    """Root by root: head i drafts token root + i, and is reached when the heads before it were first."""
    predictions = model.predictions(batch)  # type: ignore[operator]
    heads = len(predictions)
    free = [[] for _ in range(heads)]  # type: list[list[int]]
    reached = [[] for _ in range(heads)]  # type: list[list[int]]
    ids = model.token_ids.tolist()
    for b in range(batch.tokens.shape[0]):
        for root in range(batch.tokens.shape[1]):
            alive = True
            for i, prediction in enumerate(predictions):
                token = root + i + 1
                made_at = token - prediction.offset
                if not int(batch.answer_start[b]) <= token < int(batch.length[b]) or made_at < 0:
                    continue
                logits = prediction.logits(prediction.hidden[b, made_at][None])[0]
                order = logits.argsort(descending=True).tolist()
                true = int(batch.tokens[b, token])
                rank = order.index(ids.index(true)) if true in ids else RANKS
                free[i].append(rank)
                if alive and root >= int(batch.answer_start[b]) - 1:
                    reached[i].append(rank)
                alive = alive and rank == 0
    return tuple(  # type: ignore[return-value]
        [[sum(r < k for r in ranks) / max(1, len(ranks)) for k in range(1, RANKS + 1)] for ranks in kind]
        for kind in (free, reached)
    )


def test_head_acceptance_equals_the_slow_one() -> None:
    target = TinyTarget()
    ids = torch.tensor([t for t in range(VOCAB) if t % 4])
    model = tiny_model(target, token_ids=ids, heads=3)
    rows = tiny_rows(target, 12)
    batch = collate(rows, [target.prefill(0, torch.tensor(row.tokens)) for row in rows], torch.device("cpu"))
    acceptance = HeadAcceptance()
    acceptance.add(model, batch)
    free, reached = slow_acceptance(model, batch)
    torch.testing.assert_close(torch.tensor(acceptance.unconditional), torch.tensor(free))
    torch.testing.assert_close(torch.tensor(acceptance.conditional), torch.tensor(reached))
    assert acceptance.conditional[0] == acceptance.unconditional[0]
    assert acceptance.conditional[1] != acceptance.unconditional[1]
