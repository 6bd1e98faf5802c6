"""Each loss against a slow one, by value and gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import HIDDEN, VOCAB, TinyModel, TinyTarget, tiny_model
from torch import Tensor

from s4c.drafters.base import Prediction, TrainingBatch
from s4c.drafters.echo import heard
from s4c.training.losses import CompositeLoss, Lesson, LossWeights, columns_of, head_loss, law_losses

IDS = torch.tensor([1, 2, 3, 5, 8, 13, 21])


def random_batch(seed: int = 0) -> TrainingBatch:
    """Three rows: a long prompt, a prompt of one token, and an answer of one token."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (3, 9), generator=random)
    features = torch.randn(3, 9, HIDDEN, generator=random)
    return TrainingBatch(tokens, features, torch.tensor([9, 7, 4]), torch.tensor([5, 1, 3]))


TERMS = ["lm", "teacher", "smooth", "acceptance"]


def slow_terms(
    prediction: Prediction, batch: TrainingBatch, head: Tensor, weight: dict[tuple[int, int], float] | None = None
) -> tuple[Tensor, ...]:
    """The definition, position by position: the terms in the order of `TERMS`.

    `weight` is that of the token at (row, index), 1 unless given.
    """
    terms: list[list[tuple[float, Tensor]]] = [[], [], [], []]
    lm, teacher, smooth, acceptance = terms
    for b in range(batch.tokens.shape[0]):
        for t in range(batch.tokens.shape[1]):
            about = t + prediction.offset
            if not int(batch.answer_start[b]) <= about < int(batch.length[b]):
                continue
            q = prediction.logits(prediction.hidden[b, t][None])[0].softmax(-1)
            p = (head @ batch.features[b, about - 1]).softmax(-1)
            w = 1.0 if weight is None else weight[b, about]
            teacher.append((w, -(p * q.log()).sum()))
            acceptance.append((w, -(1 - 0.5 * (p - q).abs().sum()).log()))
            if int(batch.tokens[b, about]) in IDS.tolist():
                lm.append((w, -q[IDS.tolist().index(int(batch.tokens[b, about]))].log()))
            if prediction.features is not None:
                error = (prediction.features[b, t] - batch.features[b, about - 1]).abs()
                smooth.append((w, torch.where(error < 1, 0.5 * error**2, error - 0.5).mean()))
    return tuple(torch.as_tensor(sum(w * x for w, x in term) / max(1e-30, sum(w for w, _ in term))) for term in terms)


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("term", TERMS)
def test_each_term_equals_the_slow_one(offset: int, term: str) -> None:
    torch.manual_seed(0)
    batch = random_batch()
    target = TinyTarget()
    head = target.head_weight(IDS) / 3
    hidden = torch.randn(3, 9, HIDDEN, requires_grad=True)
    rows = torch.randn(len(IDS), HIDDEN, requires_grad=True)
    prediction = Prediction(hidden, rows, hidden, offset)
    fast = head_loss(prediction, Lesson.of(batch, IDS, head)).terms()[term]
    slow = slow_terms(prediction, batch, head)[TERMS.index(term)]
    assert fast.item() == pytest.approx(slow.item(), rel=1e-5)
    inputs = (hidden,) if term == "smooth" else (hidden, rows)
    for got, wanted in zip(torch.autograd.grad(fast, inputs), torch.autograd.grad(slow, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
        assert wanted.abs().max() > 1e-4


@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_losses_of_laws_by_finite_differences(count: int, size: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, size, generator=random, dtype=torch.float64, requires_grad=True)
    law = torch.randn(count, size, generator=random, dtype=torch.float64).softmax(-1)
    column = torch.randint(-1, size, (count,), generator=random)
    weight = torch.rand(count, generator=random, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: law_losses(z, column, law, weight)[:3], (logits,))


def test_acceptance_is_learnt_where_no_token_of_the_law_is_in_reach() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 0.0]], requires_grad=True)
    law = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    (gradient,) = torch.autograd.grad(law_losses(logits, torch.tensor([-1, -1]), law)[2], logits)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() <= 1
    torch.testing.assert_close(gradient[1], torch.zeros(2))


def test_the_composite_is_the_weighted_mean_over_heads() -> None:
    target, batch = TinyTarget(), random_batch()
    model = tiny_model(target, token_ids=IDS, heads=3)
    weights = LossWeights(lm=0.3, teacher=0.7, smooth=2.0, acceptance=0.4, depth=0.5)
    loss, parts = CompositeLoss(model, target.head_weight(IDS), weights)(batch)
    heads = [slow_terms(prediction, batch, target.head_weight(IDS)) for prediction in model.predictions(batch)]
    each = [0.3 * lm + 0.7 * teacher + 2.0 * smooth + 0.4 * taken for lm, teacher, smooth, taken in heads]
    wanted = (each[0] + 0.5 * each[1] + 0.25 * each[2]) / 1.75
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert parts["teacher/2"].item() == pytest.approx(heads[1][1].item(), rel=1e-5)
    for got, expected in zip(gradients(loss, model), gradients(wanted, model), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_position_weighs_as_much_as_rounds_come_to_it(power: float) -> None:
    target, batch = TinyTarget(), random_batch()
    head = target.head_weight(IDS)
    model = tiny_model(target, token_ids=IDS, heads=3)
    loss, parts = CompositeLoss(model, head, LossWeights(lm=0.3, teacher=0.7, acceptance=0.4, reach=power))(batch)
    chance = {(b, i): 1.0 for b in range(3) for i in range(9)}
    heads = []
    for prediction in model.predictions(batch):
        weight = {at: value**power for at, value in chance.items()}
        heads.append(slow_terms(prediction, batch, head, weight))
        accepted = {}
        for b, i in chance:
            generated = int(batch.answer_start[b]) <= i < int(batch.length[b]) and i >= prediction.offset
            alone = TrainingBatch(
                batch.tokens, batch.features, torch.zeros(3, dtype=torch.int64), torch.ones(3).long() * i
            )
            alone.answer_start[b], alone.length[b] = i, i + 1
            taken = slow_terms(prediction, alone, head)[3] if generated else torch.tensor(torch.inf)
            accepted[b, i] = float((-taken.detach()).exp())
        chance = {(b, i): chance[b, i - 1] * accepted[b, i - 1] if i else 0.0 for b, i in chance}
    assert any(0 < value < 1 for value in chance.values())
    each = [0.3 * lm + 0.7 * teacher + 0.1 * smooth + 0.4 * taken for lm, teacher, smooth, taken in heads]
    torch.testing.assert_close(loss, torch.stack(each).mean(), rtol=1e-4, atol=1e-5)
    assert parts["teacher/3"].item() == pytest.approx(heads[2][1].item(), rel=1e-4)


@pytest.mark.parametrize("wrong", [{"lm": -0.1}, {"acceptance": float("nan")}, {"depth": 0.0}])
def test_weights_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}_weight is"):
        LossWeights(**wrong)


def gradients(loss: Tensor, model: TinyModel) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("offset", [1, 3])
def test_only_generated_tokens_within_the_row_count(offset: int) -> None:
    batch = random_batch()
    hidden = torch.randn(3, 9, HIDDEN, requires_grad=True)
    rows = torch.randn(len(IDS), HIDDEN)
    terms = head_loss(Prediction(hidden, rows, hidden, offset), Lesson.of(batch, IDS, rows))
    (terms.teacher + terms.smooth).backward()
    assert hidden.grad is not None
    touched = hidden.grad.abs().sum(-1) > 0
    about = torch.arange(9) + offset
    generated = (about >= batch.answer_start[:, None]) & (about < batch.length[:, None])
    assert torch.equal(touched, generated)


@pytest.mark.parametrize("term", TERMS)
def test_a_step_that_looks_at_some_tokens_has_the_laws_given_these(term: str) -> None:
    batch = random_batch()
    head = TinyTarget().head_weight(IDS) / 3
    hidden = torch.randn(3, 9, HIDDEN, requires_grad=True)
    rows = torch.randn(len(IDS), HIDDEN, requires_grad=True)
    lesson = Lesson.of(batch, IDS, head, most=len(IDS) // 2)
    assert lesson.columns is not None
    assert torch.equal(lesson.columns, lesson.columns.unique(sorted=True))
    fewer = head_loss(Prediction(hidden, rows, hidden, 1), lesson).terms()[term]
    kept = IDS[lesson.columns]
    small = Lesson.of(batch, kept, head[lesson.columns])
    whole = head_loss(Prediction(hidden, rows[lesson.columns], hidden, 1), small).terms()[term]
    torch.testing.assert_close(fewer, whole)
    inputs = (hidden,) if term == "smooth" else (hidden, rows)
    for got, wanted in zip(torch.autograd.grad(fewer, inputs), torch.autograd.grad(whole, inputs), strict=True):
        torch.testing.assert_close(got, wanted)
        assert wanted.abs().max() > 1e-4
    law = torch.stack([batch.features[b, t] @ head.T for b, t in zip(lesson.row, lesson.position, strict=True)])
    peak = law.softmax(-1).amax(0)
    left_out = torch.ones(len(IDS), dtype=torch.bool).index_fill_(0, lesson.columns, False)
    assert peak[lesson.columns].min() >= peak[left_out].max()


@pytest.mark.parametrize("most", [0, 4])
def test_tokens_of_the_text_beyond_the_draft_vocabulary_are_looked_at_too(most: int) -> None:
    batch = random_batch()
    target = TinyTarget()
    head = target.head_weight(IDS)
    hidden = torch.randn(3, 9, HIDDEN, requires_grad=True)
    lesson = Lesson.of(batch, IDS, head, most=most, beyond=target.head_weight)
    text = {int(t) for row, n in zip(batch.tokens, batch.length, strict=True) for t in row[:n]}
    unknown = sorted(text - set(IDS.tolist()))
    looked_at = [*(IDS if lesson.columns is None else IDS[lesson.columns]).tolist(), *unknown]
    assert len(unknown) > 1
    rows = target.head_weight(torch.tensor(looked_at))
    law = (batch.features[lesson.row, lesson.position] @ rows.T).softmax(-1)
    torch.testing.assert_close(lesson.law, law)
    for row, position, column in zip(lesson.row, lesson.position, lesson.column.tolist(), strict=True):
        token = int(batch.tokens[row, position + 1])
        assert column == (looked_at.index(token) if token in looked_at else -1)
    log_q = (hidden[lesson.row, lesson.position] @ rows.T).log_softmax(-1)
    teacher = head_loss(Prediction(hidden, head, hidden, 1), lesson).teacher
    torch.testing.assert_close(teacher, -(law * log_q).sum(-1).mean())
    expected = torch.autograd.grad(-(law * log_q).sum(-1).mean(), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(teacher, hidden)[0], expected)


@pytest.mark.parametrize("most", [0, 4])
def test_the_law_with_an_echo_is_that_of_heads_and_text(most: int) -> None:
    batch, target = random_batch(), TinyTarget()
    batch.tokens[:, 5:] = batch.tokens[:, :4]
    head = target.head_weight(IDS)
    hidden = torch.randn(3, 9, HIDDEN, requires_grad=True)
    lesson = Lesson.of(batch, IDS, head, most=most, beyond=target.head_weight, echo=0.5)
    silent = Lesson.of(batch, IDS, head, most=most, beyond=target.head_weight)
    assert silent.heard is None
    assert lesson.heard is not None
    assert torch.equal(lesson.law, silent.law)
    text = {int(t) for row, n in zip(batch.tokens, batch.length, strict=True) for t in row[:n]}
    unknown = sorted(text - set(IDS.tolist()))
    looked_at = torch.tensor([*(IDS if lesson.columns is None else IDS[lesson.columns]).tolist(), *unknown])
    said = torch.zeros_like(lesson.law)
    for i, (row, position) in enumerate(zip(lesson.row.tolist(), lesson.position.tolist(), strict=True)):
        line = batch.tokens[row, : position + 1]
        for token, weight in zip(line[1:], heard(line, 0.5)[position], strict=False):
            said[i] += weight * (looked_at == token)
    assert said.max() > 0
    torch.testing.assert_close(lesson.heard, said)
    q = (hidden[lesson.row, lesson.position] @ target.head_weight(looked_at).T).softmax(-1)
    log_q = ((q + said) / (1 + said.sum(-1, keepdim=True))).log()
    teacher = head_loss(Prediction(hidden, head, hidden, 1), lesson).teacher
    torch.testing.assert_close(teacher, -(lesson.law * log_q).sum(-1).mean())
    expected = torch.autograd.grad(-(lesson.law * log_q).sum(-1).mean(), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(teacher, hidden)[0], expected)


def test_true_tokens_outside_the_draft_vocabulary_are_masked() -> None:
    batch = random_batch()
    batch.tokens.fill_(4)
    hidden = torch.randn(3, 9, HIDDEN, requires_grad=True)
    rows = torch.randn(len(IDS), HIDDEN)
    prediction = Prediction(hidden, rows, None, 1)
    terms = head_loss(prediction, Lesson.of(batch, IDS, rows))
    assert (terms.lm.item(), terms.smooth.item()) == (0.0, 0.0)
    assert torch.autograd.grad(terms.lm, hidden, retain_graph=True)[0].abs().max() == 0
    assert terms.teacher.item() > 0
    batch.tokens[0, 6] = 5
    lm = head_loss(prediction, Lesson.of(batch, IDS, rows)).lm
    assert lm.item() == pytest.approx(-(rows @ hidden[0, 5]).log_softmax(-1)[IDS.tolist().index(5)].item(), rel=1e-5)


def test_a_head_that_looks_past_every_row_costs_nothing() -> None:
    batch = TrainingBatch(
        torch.ones(1, 2, dtype=torch.int64), torch.randn(1, 2, HIDDEN), torch.tensor([2]), torch.tensor([1])
    )
    hidden = torch.randn(1, 2, HIDDEN, requires_grad=True)
    rows = torch.randn(len(IDS), HIDDEN)
    terms = head_loss(Prediction(hidden, rows, hidden, 3), Lesson.of(batch, IDS, rows))
    assert (terms.lm.item(), terms.teacher.item(), terms.smooth.item()) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_the_law_is_the_targets_given_the_draft_vocabulary(cap: float) -> None:
    target, batch = TinyTarget(), random_batch()
    lesson = Lesson.of(batch, IDS, target.head_weight(IDS), softcap=cap)
    logits = lesson.feature @ target.head_weight().T
    whole = (cap * (logits / cap).tanh() if cap else logits).softmax(-1)[:, IDS]
    torch.testing.assert_close(lesson.law, whole / whole.sum(-1, keepdim=True))


def test_autocast_reaches_the_drafter_and_leaves_the_loss_in_float32() -> None:
    target, batch = TinyTarget(), random_batch()
    model = tiny_model(target, token_ids=IDS)
    seen: list[torch.dtype] = []
    model.heads[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    full, _ = CompositeLoss(model, target.head_weight(IDS), LossWeights())(batch)
    half, _ = CompositeLoss(model, target.head_weight(IDS), LossWeights(), torch.bfloat16)(batch)
    assert seen == [torch.float32, torch.bfloat16]
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.05)
    assert half.item() != full.item()


def test_columns_of() -> None:
    assert columns_of(torch.tensor([[0, 1], [21, 22]]), IDS).tolist() == [[-1, 0], [6, -1]]
