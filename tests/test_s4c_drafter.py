"""The S4C drafter: what it drafts is what its unrolled training pass predicts, round after round."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from s4c.drafters import s4c as module
from s4c.drafters.base import Sequences, TrainingBatch
from s4c.drafters.s4c import S4CConfig, S4CDrafter, S4CModel
from s4c.models.loading import load_target
from s4c.models.native import library
from s4c.types import SamplingParams
from s4c.verify.noise import NoiseTable
from s4c.verify.rules import coupled
from s4c.verify.scores import Scores
from s4c.verify.tree import TreePlan, depths

PROMPTS = [[3, 14, 15, 9, 26, 5], [8, 2], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50]]


@pytest.fixture
def target(tmp_path: Path) -> Any:
    return load_target(str(tiny_models.save(tmp_path, "llama")))


def drafter_of(target: Any, echo: float = 0.0, **config: Any) -> tuple[S4CModel, S4CDrafter]:
    torch.manual_seed(0)
    token_ids = torch.arange(0, 64, 2) if config else torch.arange(64)
    model = S4CModel(target, S4CConfig(head_dim=8, echo=echo, **config), token_ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("heads.", "blend.")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, model.drafter(target, torch.float32)


class Run:
    """Sequences decoded by hand, with the target's features of every committed token but the root."""

    def __init__(self, target: Any, drafter: S4CDrafter, prompts: list[list[int]], plan: str | TreePlan) -> None:
        self.target, self.drafter = target, drafter
        self.plan = TreePlan.parse(plan) if isinstance(plan, str) else plan
        self.tokens = [list(prompt) for prompt in prompts]
        self.lengths = [len(prompt) for prompt in prompts]
        self.noise = NoiseTable(target.spec.vocab_size, target.device)
        target.reserve(len(prompts), 64)
        self.features = []
        for slot, prompt in enumerate(prompts):
            tokens = torch.tensor(prompt[:-1], dtype=torch.int64)
            self.features.append(target.prefill(slot, tokens, drafter.taps))
            drafter.prefill(slot, tokens, self.features[-1])

    def propose(self, temperature: float = 0.0) -> Any:
        params = [SamplingParams(temperature=temperature, seed=seed) for seed in range(len(self.tokens))]
        scores = Scores(params, self.tokens, self.lengths, self.noise)
        return scores, self.drafter.propose(Sequences(self.tokens, scores, False, self.plan))

    def finish(self, scores: Any, tree: Any) -> list[int]:
        output = self.target.verify(tree, self.drafter.taps)
        verdict = coupled(tree, output, scores)
        self.target.commit(verdict)
        self.drafter.commit(tree, verdict, output)
        accepted = verdict.accepted.tolist()
        for slot, count in enumerate(accepted):
            self.tokens[slot] += verdict.tokens[slot, : count + 1].tolist()
            new = output.features[slot, verdict.path[slot, : count + 1]]
            self.features[slot] = torch.cat([self.features[slot], new])
        return accepted


def predicted(model: S4CModel, target: Any, line: list[int], features: torch.Tensor, drafted: list[int]) -> list[int]:
    """What the heads predict of each drafted token by the training pass over the whole text, whose tokens they know."""
    text = line + drafted
    padded = torch.cat([features, torch.zeros(len(text) - len(features), features.shape[1])])
    batch = TrainingBatch(torch.tensor([text]), padded[None], torch.tensor([len(text)]), torch.tensor([0]))
    root = len(line) - 1
    tied = model.config.lm_head == "tied"
    more = torch.tensor(sorted(set(line) - set(model.token_ids.tolist())) if tied else [], dtype=torch.int64)
    ids, rows = torch.cat([model.token_ids, more]), target.head_weight(more).float()
    with torch.no_grad():
        heads = model.predictions(batch)[: len(drafted)]
        logits = []
        for at, head in enumerate(heads, root):
            assert head.features is not None
            logits.append(torch.cat([head.logits(head.hidden[0, at]), rows @ head.features[0, at]]))
        return [int(ids[row.argmax()]) for row in logits]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"heads": 2, "layers": 2},
        {"heads": 4, "normed_output": True},
        {"lm_head": "own"},
        {"lm_head": "low-rank", "rank": 8},
        {"heads": 2, "taps": "1"},
    ],
    ids=str,
)
@pytest.mark.parametrize("plan", ["chain:4", "chain:2", "chain:1"])
def test_drafting_is_the_unrolled_training_pass(target: Any, config: dict[str, Any], plan: str) -> None:
    model, drafter = drafter_of(target, **config)
    run = Run(target, drafter, PROMPTS, plan)
    for _ in range(4):
        scores, tree = run.propose()
        for slot, line in enumerate(run.tokens):
            drafted = tree.tokens[slot, 1:].tolist()
            expected = predicted(model, target, line, run.features[slot], drafted)
            assert drafted[: len(expected)] == expected
        run.finish(scores, tree)


def test_what_was_committed_while_nothing_was_drafted_is_taken_in(target: Any) -> None:
    model, drafter = drafter_of(target)
    run = Run(target, drafter, PROMPTS, "chain:3")
    for rounds in (0, 1, 3):
        run.plan = replace(run.plan, nodes=1)
        for _ in range(rounds):
            scores, tree = run.propose()
            assert tree.size == 1
            run.finish(scores, tree)
        run.plan = replace(run.plan, nodes=4)
        scores, tree = run.propose()
        for slot, line in enumerate(run.tokens):
            drafted = tree.tokens[slot, 1:].tolist()
            assert drafted == predicted(model, target, line, run.features[slot], drafted)
        run.finish(scores, tree)


def test_a_text_that_outgrew_the_window_undrafted_is_remembered_whole(target: Any) -> None:
    _, drafter = drafter_of(target, window=8, echo=1.0)
    run = Run(target, drafter, PROMPTS, "chain:3")
    run.plan = replace(run.plan, nodes=1)
    for _ in range(20):
        run.finish(*run.propose())
    run.plan = replace(run.plan, nodes=4)
    run.propose()
    for slot, line in enumerate(run.tokens):
        assert drafter._echo._texts[slot].tolist() == line


def test_the_spine_of_a_comb_is_the_chain(target: Any) -> None:
    _, drafter = drafter_of(target)
    _, chain = Run(target, drafter, PROMPTS, "chain:5").propose()
    _, comb = Run(target, drafter, PROMPTS, "comb:3x5").propose()
    assert torch.equal(comb.tokens[:, 1::3], chain.tokens[:, 1:])
    assert comb.parents[0].tolist() == [-1] + [parent for level in range(5) for parent in [max(0, 3 * level - 2)] * 3]


def test_accepted_features_feed_the_next_draft(target: Any) -> None:
    """With trees wide enough to accept something, drafting on equals drafting from a fresh prefill."""
    _, drafter = drafter_of(target)
    run = Run(target, drafter, PROMPTS, "best:60x3")
    accepted = 0
    for _ in range(6):
        accepted += sum(run.finish(*run.propose()))
    assert accepted > 0
    lines = [list(line) for line in run.tokens]
    _, going_on = run.propose()
    _, fresh = Run(target, drafter_of(target)[1], lines, "best:60x3").propose()
    assert torch.equal(going_on.tokens, fresh.tokens)
    assert torch.equal(going_on.parents, fresh.parents)


def test_a_sequence_may_draft_the_tokens_of_its_own_text_and_no_others(target: Any) -> None:
    _, drafter = drafter_of(target, heads=2)
    run = Run(target, drafter, PROMPTS, "best:64x1")
    for _ in range(4):
        scores, tree = run.propose()
        for slot, line in enumerate(run.tokens):
            drafted = set(tree.tokens[slot, 1:][tree.candidate[slot, 1:]].tolist())
            assert drafted <= set(range(0, 64, 2)) | set(line)
        run.finish(scores, tree)
    assert (run.propose()[1].tokens[:, 1:] % 2).any(), "odd tokens come from the text alone"


FLOORED = TreePlan("best", 8, 6, 60, floor=-1.0)


@pytest.mark.skipif(library.problem() is not None, reason="needs the native runtime")
def test_a_floor_ends_a_draft_in_one_call(target: Any) -> None:
    _, drafter = drafter_of(target)
    levels = []
    for floor in (-torch.inf, FLOORED.floor, -0.1):
        run = Run(target, drafter, PROMPTS[:1], replace(FLOORED, floor=floor))
        _, tree = run.propose()
        levels.append(int(depths(tree.parents).max()))
    assert levels[0] == 6
    assert 6 > levels[1] > levels[2] >= 1


def test_without_a_context_vocabulary_the_draft_vocabulary_is_all(target: Any) -> None:
    _, drafter = drafter_of(target, heads=2, context_vocab=0)
    _, tree = Run(target, drafter, PROMPTS, "best:64x1").propose()
    assert not (tree.tokens[:, 1:] % 2).any()


@pytest.mark.skipif(library.problem() is not None, reason="needs the native runtime")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    "plan", ["best:12x3", "best:30x6", "best:5x2", "best:4x1", "comb:3x5", "comb:2x1", "chain:4", FLOORED]
)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"heads": 1},
        {"heads": 3, "context_vocab": 3},
        {"heads": 4, "lm_head": "low-rank", "rank": 8},
        {"taps": "1"},
        {"echo": 1.0},
        {"echo": 0.3, "heads": 2, "context_vocab": 3},
        {"echo": 0.3, "heads": 2, "sharpness": 1.5},
    ],
    ids=str,
)
def test_a_draft_in_one_call_is_the_draft_level_by_level(
    target: Any, config: dict[str, Any], plan: str | TreePlan, temperature: float
) -> None:
    at_once, by_level = (Run(target, drafter_of(target, **config)[1], PROMPTS, plan) for _ in range(2))
    by_level.drafter._native = None
    assert at_once.drafter._native is not None
    for _ in range(5):
        (scores, tree), (_, expected) = at_once.propose(temperature), by_level.propose(temperature)
        assert torch.equal(tree.tokens, expected.tokens)
        assert torch.equal(tree.parents, expected.parents)
        assert torch.equal(tree.candidate, expected.candidate)
        for run in (at_once, by_level):
            for slot in range(len(PROMPTS)):
                assert run.drafter._slots[slot].tokens == []
        for slot, state in at_once.drafter._slots.items():
            assert torch.equal(state.carry, by_level.drafter._slots[slot].carry)
        output = target.verify(tree, at_once.drafter.taps)
        verdict = coupled(tree, output, scores)
        target.commit(verdict)
        for run in (at_once, by_level):
            run.drafter.commit(tree, verdict, output)
            for slot, count in enumerate(verdict.accepted.tolist()):
                run.tokens[slot] += verdict.tokens[slot, : count + 1].tolist()


def test_a_sharp_draft_is_surer_of_the_same_tokens(target: Any) -> None:
    (_, blunt), (_, sharp) = (
        Run(target, drafter_of(target, sharpness=sharpness)[1], PROMPTS, "comb:4x1").propose()
        for sharpness in (1.0, 2.0)
    )
    assert torch.equal(sharp.tokens, blunt.tokens)
    apart = [tree.belief[:, 0, 1:2] - tree.belief[:, 0, 2:] for tree in (blunt, sharp)]
    torch.testing.assert_close(apart[1], 2 * apart[0])


@pytest.mark.parametrize("native", [True, False])
def test_a_loud_echo_says_what_followed_in_the_text(target: Any, native: bool) -> None:
    prompt = [4, 5, 6, 8, 4, 7, 4, 5]
    _, drafter = drafter_of(target, echo=1e6)
    if not native:
        drafter._native = None
    run = Run(target, drafter, [prompt], "chain:3")
    scores, tree = run.propose()
    assert tree.tokens.tolist() == [[5, 6, 8, 4]]
    run.finish(scores, tree)
    run.propose()
    assert drafter._echo is not None
    assert drafter._echo.kernels(1).tokens[0].tolist() == run.tokens[0]


def test_a_slot_can_move(target: Any) -> None:
    _, drafter = drafter_of(target)
    run = Run(target, drafter, PROMPTS, "comb:2")
    run.finish(*run.propose())
    _, expected = run.propose()
    other = Run(target, drafter_of(target)[1], PROMPTS, "comb:2")
    other.finish(*other.propose())
    other.target.move(2, 0)
    other.drafter.move(2, 0)
    other.tokens, other.lengths = [other.tokens[2], other.tokens[1]], [other.lengths[2], other.lengths[1]]
    _, moved = other.propose()
    assert torch.equal(moved.tokens[0], expected.tokens[2])
    assert torch.equal(moved.tokens[1], expected.tokens[1])


def test_a_long_prompt_is_taken_in_by_chunks(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = torch.randint(0, 64, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    _, whole = Run(target, drafter_of(target)[1], [prompt], "best:20x4").propose()
    monkeypatch.setattr(module, "PREFILL_CHUNK", 7)
    _, chunked = Run(target, drafter_of(target)[1], [prompt], "best:20x4").propose()
    assert torch.equal(whole.tokens, chunked.tokens)


def test_a_long_prompt_is_read_as_far_back_as_the_window(target: Any) -> None:
    prompt = torch.randint(0, 64, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    run = Run(target, drafter_of(target, heads=3, window=12)[1], [prompt], "best:20x4")
    _, tree = run.propose()
    _, of_all = Run(target, drafter_of(target, heads=3)[1], [prompt], "best:20x4").propose()
    assert not torch.equal(tree.tokens, of_all.tokens)
    end = Run(target, drafter_of(target, heads=3)[1], [prompt], "best:20x4")
    end.drafter._take_in(0, torch.tensor(prompt[-13:-1]), run.features[0][-13:])
    _, of_the_end = end.propose()
    assert torch.equal(tree.tokens, of_the_end.tokens)
    assert torch.equal(tree.parents, of_the_end.parents)


def test_what_lies_further_back_than_the_window_is_dropped_in_time(target: Any) -> None:
    _, drafter = drafter_of(target, heads=3, window=8)
    run = Run(target, drafter, PROMPTS, "best:12x3")
    anew = 0
    for round_ in range(30):
        run.plan = replace(run.plan, nodes=1 if round_ % 5 == 4 else 12)
        before = list(drafter._stacks[0].lengths)
        scores, tree = run.propose()
        for slot, length in enumerate(drafter._stacks[0].lengths[: len(PROMPTS)]):
            assert length <= 2 * 8
            if length < before[slot]:
                anew += 1
                fresh = drafter_of(target, heads=3, window=8)[1]
                fresh.prefill(0, torch.tensor(run.tokens[slot][:-1]), run.features[slot])
                assert len(fresh._slots[0].features) == 8 + 1
                alone = copy.copy(run)
                alone.drafter, alone.tokens, alone.lengths = fresh, [run.tokens[slot]], [run.lengths[slot]]
                _, expected = alone.propose()
                assert torch.equal(tree.tokens[slot], expected.tokens[0])
                assert torch.equal(drafter._slots[slot].carry, fresh._slots[0].carry)
        run.finish(scores, tree)
    assert anew > len(PROMPTS)


def test_a_prompt_of_one_token(target: Any) -> None:
    _, drafter = drafter_of(target)
    _, tree = Run(target, drafter, [[7]], "comb:2").propose()
    assert tree.size == 7


def test_a_low_rank_head_starts_as_the_best_approximation(target: Any) -> None:
    full = target.head_weight()
    rank = min(full.shape)
    model = S4CModel(target, S4CConfig(head_dim=8, lm_head="low-rank", rank=rank), torch.arange(64))
    hidden = torch.randn(5, full.shape[1])
    assert torch.allclose(model.narrowed(hidden) @ model.head().T, hidden @ full.T, atol=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": 0},
        {"lm_head": "borrowed"},
        {"rank": 0},
        {"context_vocab": -1},
        {"echo": -0.5},
        {"echo": float("nan")},
        {"window": 0},
        {"taps": "8,4"},
        {"taps": "0,4"},
        {"taps": "4,4"},
        {"taps": "4,last"},
    ],
)
def test_a_wrong_configuration_names_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        S4CConfig(**wrong)


def test_taps_are_layers_before_the_last(target: Any) -> None:
    with pytest.raises(ValueError, match="taps is '2'; they must be below 2, the layers of the target"):
        S4CModel(target, S4CConfig(head_dim=8, taps="2"), torch.arange(64))


def test_taps_change_nothing_until_they_are_trained(target: Any) -> None:
    plain, _ = drafter_of(target, heads=2)
    tapped = S4CModel(target, S4CConfig(head_dim=8, heads=2, taps="1"), plain.token_ids)
    tapped.start_from(plain)
    tokens = torch.tensor(PROMPTS[2])
    target.reserve(1, 64)
    features = target.prefill(0, tokens, tapped.taps)
    assert features.shape == (11, 2 * tiny_models.HIDDEN)
    assert torch.equal(features[:, : tiny_models.HIDDEN], target.prefill(0, tokens))
    wide = TrainingBatch(tokens[None], features[None], torch.tensor([11]), torch.tensor([0]))
    narrow = replace(wide, features=wide.features[..., : tiny_models.HIDDEN])
    for ours, theirs in zip(tapped.predictions(wide), plain.predictions(narrow), strict=True):
        assert torch.equal(ours.hidden, theirs.hidden)
    with torch.no_grad():
        tapped.blend.mix.weight.add_(1.0)
    assert not torch.equal(tapped.predictions(wide)[0].hidden, plain.predictions(narrow)[0].hidden)


def test_further_layers_change_nothing_until_they_are_trained(target: Any) -> None:
    shallow, _ = drafter_of(target, heads=2)
    deep = S4CModel(target, S4CConfig(head_dim=8, heads=2, layers=3), shallow.token_ids)
    deep.start_from(shallow)
    tokens = torch.tensor(PROMPTS[2])
    target.reserve(1, 64)
    batch = TrainingBatch(tokens[None], target.prefill(0, tokens)[None], torch.tensor([11]), torch.tensor([0]))
    for ours, theirs in zip(deep.predictions(batch), shallow.predictions(batch), strict=True):
        assert torch.equal(ours.hidden, theirs.hidden)
    deep.predictions(batch)[1].hidden.square().sum().backward()
    for head in deep.each_head():
        for layer in head.layers:
            assert layer.mlp.down.weight.grad.abs().max() > 0, "they learn from the first step on"
    with pytest.raises(ValueError, match="is not in the drafter to start from"):
        S4CModel(target, S4CConfig(head_dim=8, heads=3, layers=2), shallow.token_ids).start_from(shallow)


def test_training_starts_from_another_drafter(target: Any) -> None:
    old, _ = drafter_of(target, heads=2)
    new = S4CModel(target, S4CConfig(head_dim=8, heads=2), torch.arange(1, 41))
    new.start_from(old)
    assert new.token_ids.tolist() == list(range(1, 41))
    for name, weight in old.named_parameters():
        assert torch.equal(weight, new.get_parameter(name))
    with pytest.raises(ValueError, match="has another size"):
        S4CModel(target, S4CConfig(head_dim=8, heads=3), torch.arange(40)).start_from(old)
    own = [S4CModel(target, S4CConfig(head_dim=8, lm_head="own"), torch.arange(n, n + 30)) for n in (0, 1)]
    own[0].start_from(own[0])
    with pytest.raises(ValueError, match="another draft vocabulary"):
        own[1].start_from(own[0])
