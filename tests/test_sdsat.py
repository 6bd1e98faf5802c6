"""SDSAT: what it drafts, what its probes see, and that the base model never notices them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from test_engine import PROMPTS as REQUESTS
from test_engine import SETTINGS
from test_native import SETS as INSTRUCTION_SETS
from test_native import computing
from test_planner import WildCosts
from test_rules import COOL, HOT, PROMPT, check_lossless
from test_s4c_drafter import PROMPTS, Run
from verify_oracles import Text, deterministic_tree, distance, plain_law, processed_by, sampled_trees, tiny_model

from s4c import LLM, SamplingParams
from s4c.drafters import METHODS
from s4c.drafters.base import TrainingBatch
from s4c.drafters.checkpoint import load_drafter, save_checkpoint
from s4c.drafters.combined import CombinedDrafter
from s4c.drafters.ngram import NgramDrafter
from s4c.drafters.sdsat import SDSATConfig, SDSATDrafter, SDSATModel, ends, hang, visible
from s4c.engine.planner import CostPlanner
from s4c.errors import UnsupportedModel, WrongTarget
from s4c.models.loading import load_target
from s4c.training.checkpoint import latest
from s4c.training.data import Row, collate
from s4c.training.losses import CompositeLoss, LossWeights
from s4c.training.simulate import simulate
from s4c.training.trainer import TrainConfig, Trainer
from s4c.types import DraftTree
from s4c.verify.tree import TreePlan, from_paths, root_only

VOCAB, SIZE = tiny_models.VOCAB, 3
TWO_STEP, FUSED = 0, 4
RUNTIMES = ["torch", *(["native"] if INSTRUCTION_SETS else [])]


@pytest.fixture(scope="module", params=RUNTIMES)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory = tiny_models.save(tmp_path_factory.mktemp("model"), "llama", seed=3)
    return LLM(str(directory), "none", max_batch=4, runtime=request.param)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_target(str(tiny_models.save(tmp_path_factory.mktemp("model"), "llama")), runtime="torch")


def model_of(target: Any, **config: Any) -> SDSATModel:
    """A model whose low-rank terms matter."""
    torch.manual_seed(0)
    model = SDSATModel(target, SDSATConfig(**{"tokens": SIZE, "rank": 4, **config}), torch.arange(VOCAB))
    with torch.no_grad():
        for parameter in model.up.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def drafter_of(target: Any, fused: int = TWO_STEP, **config: Any) -> SDSATDrafter:
    return model_of(target, fused=fused, **config).drafter(target)


def text_batch(lines: list[list[int]], answer_start: int = 1) -> TrainingBatch:
    longest = max(len(line) for line in lines)
    tokens = torch.tensor([line + [0] * (longest - len(line)) for line in lines])
    length = torch.tensor([len(line) for line in lines])
    start = torch.full_like(length, answer_start)
    return TrainingBatch(tokens, torch.zeros(*tokens.shape, tiny_models.HIDDEN), length, start)


def random_text(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# --- the base model never notices ---


@pytest.mark.parametrize("rank", [0, 4])
def test_standard_rows_are_bit_for_bit_those_of_the_base_model(llm: LLM, rank: int) -> None:
    """Against the same tree with ordinary tokens in the place of the adaptive ones, and without an adapter."""
    target = llm.target
    target.reserve(2, 64)
    for slot, prompt in enumerate(REQUESTS[:2]):
        target.prefill(slot, torch.tensor(prompt[:-1]))
    plan = TreePlan.parse("comb:2x2")
    builder = plan.grow(torch.tensor([prompt[-1] for prompt in REQUESTS[:2]]))
    while builder.open:
        builder.extend(torch.randn(2, 1, VOCAB))
    candidates = builder.finish()
    probed = hang(candidates, torch.tensor([[0, 2], [4, -1]]), VOCAB, SIZE)
    target.adapt(None)
    ordinary = replace(probed, tokens=probed.tokens.where(probed.tokens < VOCAB, 7))
    base = target.verify(ordinary)
    drafter = drafter_of(target, rank=rank)
    with_adapter = target.verify(probed)
    standard = probed.tokens < VOCAB
    assert torch.equal(with_adapter.logits[standard], base.logits[standard])
    assert torch.equal(with_adapter.features[standard], base.features[standard])
    assert not torch.isclose(with_adapter.logits[~standard], base.logits[~standard]).all(-1).any()
    assert torch.equal(target.verify(ordinary).logits, base.logits)
    assert drafter.adapter.embeddings.shape == (SIZE, tiny_models.HIDDEN)


def test_low_rank_terms_act_on_every_product(llm: LLM) -> None:
    """Each of the four, alone, changes what a probe says."""
    model = model_of(llm.target)
    llm.target.reserve(1, 64)
    llm.target.prefill(0, torch.tensor(REQUESTS[0][:-1]))
    probed = hang(root_only(REQUESTS[0][-1:]), torch.tensor([[0]]), VOCAB, SIZE)

    def said(*names: str) -> torch.Tensor:
        adapter = model.adapter()
        layers = [
            {n: term if n in names else replace(term, up=torch.zeros_like(term.up)) for n, term in layer.items()}
            for layer in adapter.layers
        ]
        llm.target.adapt(replace(adapter, layers=layers))
        return llm.target.verify(probed).logits[0, 1:]

    none = said()
    llm.target.adapt(replace(model.adapter(), layers=()))
    assert torch.equal(none, llm.target.verify(probed).logits[0, 1:])
    for name in ("qkv", "out", "gate_up", "down"):
        assert not torch.allclose(said(name), none)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_native_probes_know_no_neighbours_and_are_those_of_torch(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    directory = str(tiny_models.save(tmp_path, "qwen2", intermediate_size=44))
    target = load_target(directory, runtime="native", dtype=dtype)
    adapter = model_of(target).adapter()
    text = torch.tensor(REQUESTS[0])
    tree = from_paths(REQUESTS[0][-1:], [[[5, 6], [5, 7], [8]]], 9)
    whole = hang(tree, torch.tensor([[0, 2, 4]]), VOCAB, SIZE)
    alone = hang(root_only(REQUESTS[0][-1:]), torch.tensor([[0]]), VOCAB, SIZE)

    def said(target: Any, tree: DraftTree) -> torch.Tensor:
        target.adapt(adapter)
        target.reserve(1, 64)
        target.prefill(0, text[:-1])
        return target.verify(tree).logits[0]

    with computing(name):
        features = said(target, whole)
        assert torch.equal(features[tree.size : tree.size + SIZE], said(target, alone)[1:])
        if dtype == torch.float32:
            assert torch.allclose(features, said(load_target(directory, runtime="torch"), whole), atol=1e-4)


# --- what the groups of a training pass see ---


def test_the_mask_of_a_training_pass() -> None:
    seen = visible(torch.tensor([[1, 0]]), size=2, count=3)
    assert seen[0].int().tolist() == [
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 1, 1],
    ]


def test_a_group_sees_the_true_prefix_and_its_own_tokens_alone(target: Any) -> None:
    model, text = model_of(target), torch.tensor([random_text(20)])
    at = torch.tensor([[8, 3, 9]])

    def features(tokens: torch.Tensor, places: torch.Tensor = at) -> torch.Tensor:
        with torch.no_grad():
            return model._run(tokens, places)[1]

    whole = features(text)
    other = text.clone()
    other[0, 9:] = (other[0, 9:] + 1) % VOCAB
    changed = features(other)
    assert torch.equal(changed[:, :2], whole[:, :2]), "what it must predict, and what follows, is not seen"
    assert not torch.allclose(changed[:, 2], whole[:, 2]), "the token that it follows is"
    earlier = text.clone()
    earlier[0, 2] = (earlier[0, 2] + 1) % VOCAB
    assert not any(torch.allclose(features(earlier)[0, g, j], whole[0, g, j]) for g in range(3) for j in range(SIZE))
    for group in range(3):
        alone = features(text, at[:, group : group + 1])
        assert torch.allclose(alone[:, 0], whole[:, group], atol=1e-5), "groups do not see each other"
    with torch.no_grad():
        model.embeddings[1] += 1
    assert torch.equal(features(text)[:, :, 0], whole[:, :, 0])
    assert not torch.allclose(features(text)[:, :, 1:], whole[:, :, 1:])


def test_groups_stand_where_they_have_something_to_guess(target: Any) -> None:
    model = model_of(target, groups=50)
    batch = text_batch([random_text(12), random_text(7, 1)], answer_start=4)
    heads = model.predictions(batch)
    assert [head.offset for head in heads] == [2, 3, 4]
    for head in heads:
        assert head.made is not None
        assert [row.nonzero()[:, 0].tolist() for row in head.made] == [list(range(3, 10)), [3, 4]]
    few = model_of(target, groups=2).train()
    drawn = {tuple(few.predictions(batch)[0].made[0].nonzero()[:, 0].tolist()) for _ in range(20)}
    assert len(drawn) > 5
    assert all(len(places) == 2 for places in drawn)
    few.eval()
    assert torch.equal(few.predictions(batch)[0].made, few.predictions(batch)[0].made)


# --- drafting ---


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("fused", [TWO_STEP, 3])
def test_probes_say_what_the_training_pass_predicts(target: Any, rank: int, fused: int) -> None:
    """The laws of round after round, against a training pass with a group at the node that carried the probes."""
    model = model_of(target, rank=rank, groups=100, fused=fused)
    run = Run(target, model.drafter(target), PROMPTS, "best:12x3")
    compared = 0
    for _ in range(7):
        run.finish(*run.propose())
        for slot, line in enumerate(run.tokens):
            laws = run.drafter._laws.get(slot, ())
            behind = SIZE - len(laws)
            carrier = len(line) - 2 - behind
            with torch.no_grad():
                heads = model.predictions(text_batch([line[: carrier + 1] + [5] * 4]))
            for law, head in zip(laws, heads[behind:], strict=True):
                assert torch.allclose(law, head.logits(head.hidden[0, carrier]), atol=1e-4)
                compared += 1
    assert compared > 20


@pytest.mark.skipif(not INSTRUCTION_SETS, reason="no native kernels were built here")
def test_only_trees_with_adaptive_tokens_leave_the_whole_pass(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that rests costs nothing: its target decodes by the same kernel call as without an adapter."""
    native = load_target(str(tiny_models.save(tmp_path, "llama")), runtime="native")
    drafter_of(native)
    native.reserve(1, 16)
    native.prefill(0, torch.tensor([3, 1, 4]))
    candidates = from_paths([1], [[[5, 9]]], VOCAB)
    probed = hang(candidates, torch.tensor([[0]]), VOCAB, SIZE)
    slowly = {tree.size: native._verify(tree, ()).logits for tree in (root_only([1], native.device), candidates)}
    monkeypatch.setattr(native, "_verify", None)
    for tree in (root_only([1], native.device), candidates):
        assert torch.equal(native.verify(tree).logits, slowly[tree.size])
    with pytest.raises(TypeError):
        native.verify(probed)


def test_two_steps_take_turns_and_fused_rounds_do_both(target: Any) -> None:
    kinds = {}
    for fused in (TWO_STEP, FUSED):
        run = Run(target, drafter_of(target, fused), PROMPTS[:1], "chain:3")
        kinds[fused] = []
        for _ in range(4):
            scores, tree = run.propose()
            kinds[fused].append((bool(tree.candidate.any()), int((tree.tokens == VOCAB).sum())))
            run.finish(scores, tree)
    assert kinds[TWO_STEP] == [(False, 1), (True, 0)] * 2
    assert kinds[FUSED] == [(False, 1)] + [(True, 4)] * 3


def test_sequences_of_a_batch_may_be_in_different_steps(target: Any) -> None:
    run = Run(target, drafter_of(target), PROMPTS, "best:8x3")
    run.finish(*run.propose())
    del run.drafter._laws[1]
    _, tree = run.propose()
    assert tree.candidate.any(1).tolist() == [True, False, True]
    assert (tree.tokens == VOCAB).sum(1).tolist() == [0, 1, 0]
    alone = Run(target, drafter_of(target), PROMPTS[2:], "best:8x3")
    alone.finish(*alone.propose())
    _, single = alone.propose()
    assert torch.equal(tree.tokens[2, tree.candidate[2]], single.tokens[0, single.candidate[0]])


def test_probes_hang_in_chains_and_padding_stands_for_none() -> None:
    tree = from_paths([9, 8], [[[1, 2]], [[3]]], 9)
    probed = hang(tree, torch.tensor([[2, 0], [1, -1]]), 10, 2)
    assert probed.tokens.tolist() == [[9, 1, 2, 10, 11, 10, 11], [8, 3, 0, 10, 11, 0, 0]]
    assert probed.parents.tolist() == [[-1, 0, 1, 2, 3, 0, 5], [-1, 0, 0, 1, 3, 0, 0]]
    assert not probed.candidate[:, 3:].any()
    assert hang(tree, torch.empty(2, 0, dtype=torch.int64), 10, 2) is tree


def test_the_nodes_that_carry_probes_are_the_likely_ends() -> None:
    tree = from_paths([9], [[[1, 2], [3]]], 9)
    tree.belief = torch.tensor([[[1.0, 0.5, 0.4, 0.3]]]).log()
    assert torch.allclose(ends(tree), torch.tensor([[0.2, 0.1, 0.4, 0.3]]))


def test_what_was_drawn_does_not_say_which_nodes_carry_probes(target: Any) -> None:
    """Else a later law depends on draws that no rule has judged, and that are made again with the same noise."""
    drafter = drafter_of(target, fused=2)
    carriers = []
    for likely in (0.9, 0.1):
        tree = from_paths([9], [[[1, 2], [3]]], 9)
        tree.belief = torch.tensor([[[1.0, likely, likely, 1 - likely]]]).log()
        tree.log_q = torch.zeros(1, tree.size, VOCAB)
        for sampled in (True, False):
            tree.sampled[:] = sampled
            carriers.append(drafter._carriers(tree, []).tolist())
    drawn, guessed, drawn_otherwise, guessed_otherwise = carriers
    assert drawn == drawn_otherwise == [[0, 1]]
    assert guessed != guessed_otherwise


# --- lossless ---


def write(llm: LLM, drafter: Any, params: Any, tree: str = "auto", rule: str = "coupled") -> list[list[int]]:
    llm.rule = rule
    llm.use(drafter, tree)
    return [generation.token_ids for generation in llm.generate(REQUESTS, params)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("fused", "tree"), [(TWO_STEP, "best:12x3"), (TWO_STEP, "comb:3x3"), (FUSED, "best:8x3")])
def test_speculative_is_plain_batched_and_single(llm: LLM, setting: str, fused: int, tree: str) -> None:
    plain = write(llm, "none", SETTINGS[setting])
    drafter = drafter_of(llm.target, fused)
    assert write(llm, drafter, SETTINGS[setting], tree) == plain
    assert llm.generate(REQUESTS[2], SETTINGS[setting]).token_ids == plain[2]


@pytest.mark.parametrize("setting", SETTINGS)
def test_planned_is_plain(llm: LLM, setting: str) -> None:
    """With costs that are what chance says, so that rounds with and without candidates and probes come in any order."""
    plain = write(llm, "none", SETTINGS[setting])
    drafter = drafter_of(llm.target, FUSED)
    llm._planners[drafter] = CostPlanner(WildCosts(), drafter.probes)
    llm.use(drafter)
    generations = llm.generate(REQUESTS, SETTINGS[setting])
    assert [g.token_ids for g in generations] == plain
    assert len({size for g in generations for size in g.stats.tree_sizes}) > 2


def test_requests_of_their_own_and_ends_inside_a_round(llm: LLM) -> None:
    params = [replace(SETTINGS["sampled"], max_new_tokens=5 + 4 * n, seed=n) for n in range(4)]
    plain = write(llm, "none", params)
    params = [replace(p, stop_token_ids=[text[-2]]) for p, text in zip(params, plain, strict=True)]
    ended = write(llm, "none", params)
    for fused in (TWO_STEP, FUSED):
        assert write(llm, drafter_of(llm.target, fused), params, "best:8x3") == ended
        llm.max_batch = 2
        assert write(llm, drafter_of(llm.target, fused), params, "best:8x3") == ended
        llm.max_batch = 4


def test_two_drafters_on_one_target_each_find_their_own_adapter(llm: LLM) -> None:
    plain = write(llm, "none", SETTINGS["greedy"])
    one, other = drafter_of(llm.target), drafter_of(llm.target, rank=0, tokens=4)
    for drafter in (one, other, one):
        run = Run(llm.target, drafter, PROMPTS, "best:8x3")
        run.finish(*run.propose())
        assert len(run.drafter._laws[0]) == drafter.config.tokens
        assert write(llm, drafter, SETTINGS["greedy"]) == plain


@pytest.mark.parametrize("fused", [TWO_STEP, FUSED])
def test_beside_lookup(llm: LLM, fused: int) -> None:
    for setting in ("greedy", "sampled"):
        plain = write(llm, "none", SETTINGS[setting])
        drafter = CombinedDrafter(drafter_of(llm.target, fused), NgramDrafter())
        assert write(llm, drafter, SETTINGS[setting], "best:10x3") == plain
    assert drafter.probes


@pytest.mark.parametrize("fused", [TWO_STEP, FUSED])
def test_rejection_at_temperature_zero_is_greedy(llm: LLM, fused: int) -> None:
    plain = write(llm, "none", SETTINGS["greedy"])
    for tree in ("comb:3x3", "best:8x3"):
        assert write(llm, drafter_of(llm.target, fused), SETTINGS["greedy"], tree, "rejection") == plain


@pytest.mark.parametrize(("fused", "tree"), [(TWO_STEP, "comb:2x2"), (FUSED, "best:6x2")])
def test_rejection_samples_the_same_law(llm: LLM, fused: int, tree: str) -> None:
    """Tokens two and three over 400 seeds, plain and by rejection; by chance alone it would fail once in 10,000."""
    from scipy.stats import chi2_contingency

    params = [SamplingParams(max_new_tokens=3, temperature=0.7, top_k=4, seed=seed) for seed in range(400)]
    counts = []
    llm.max_batch = 100
    for drafter, rule in (("none", "coupled"), (drafter_of(llm.target, fused), "rejection")):
        llm.rule = rule
        llm.use(drafter, tree)
        counts.append([tuple(g.token_ids[1:]) for g in llm.generate([REQUESTS[0]] * len(params), params)])
    llm.max_batch = 4
    pairs = sorted(set(counts[0]) | set(counts[1]))
    table = [[drawn.count(pair) for pair in pairs] for drawn in counts]
    frequent = [i for i in range(len(pairs)) if table[0][i] + table[1][i] >= 10]
    assert len(frequent) >= 4
    assert chi2_contingency([[row[i] for i in frequent] for row in table]).pvalue > 1e-4


def marginals(text: Text, seed: int, vocab: int) -> Any:
    """The law of each position behind a text, whatever stands on the path; in turns with rounds of probes alone."""
    return lambda longer: tiny_model(seed, vocab)(text + (vocab,) * (len(longer) - len(text)))


@pytest.mark.parametrize("request_", [HOT, COOL], ids=["T=1", "T=0.6,top_p=0.8"])
@pytest.mark.parametrize(("form", "sampled"), [("comb:2x2", True), ("chain:2", True), ("best:6x2", False)])
@pytest.mark.parametrize("fused", [False, True])
def test_the_law_by_enumeration(request_: SamplingParams, form: str, sampled: bool, fused: bool) -> None:
    vocab, plan = 3, TreePlan.parse(form)

    def trees(text: Text) -> Iterator[tuple[float, DraftTree]]:
        below = torch.tensor([[0, 1, 2]])
        if not fused and len(text) % 2:
            yield 1.0, hang(root_only(text[-1:]), below[:, :1], vocab, 2)
            return
        law_of = marginals(text, 4, vocab)
        drafts = sampled_trees(plan, law_of)(text) if sampled else [(1.0, deterministic_tree(plan, law_of, text))]
        for probability, tree in drafts:
            yield probability, hang(tree, below, vocab, 2) if fused else tree

    check_lossless(tiny_model(3, vocab), request_, 3, vocab, trees)


def test_one_sample_per_path_is_not_lossless() -> None:
    """The published nucleus code draws the target's tokens anew for each path and keeps the luckiest one.

    With children a and b of the root it commits a with chance p(a), and b with (1 - p(a)) p(b) besides what else
    draws them: the more paths, the more the drafted tokens gain. One draw per node gives p.
    """
    vocab, model, plan = 3, tiny_model(3, 3), TreePlan.parse("comb:2x1")
    law_of = marginals(PROMPT, 4, vocab)
    tree = deterministic_tree(plan, law_of, PROMPT)
    p = processed_by(HOT, model, vocab)(PROMPT).double().softmax(-1).tolist()
    children = tree.tokens[0, 1:].tolist()
    law: dict[Text, float] = defaultdict(float)
    for draws in product(range(vocab), repeat=len(children)):
        lucky = next((draw for draw, child in zip(draws, children, strict=True) if draw == child), draws[0])
        law[(lucky,)] += p[draws[0]] * p[draws[1]]
    assert distance(law, plain_law(model, HOT, PROMPT, 1, vocab)) > 0.05
    check_lossless(model, HOT, 1, vocab, lambda text: iter([(1.0, tree)]))


# --- training ---

CONFIG = TrainConfig(
    steps=6, batch_tokens=80, warmup_steps=3, eval_every=3, save_every=3, log_every=1, features="fly", seed=5
)


def answers(target: Any, count: int, length: int = 20) -> list[Row]:
    """What a target writes greedily after random prompts."""
    llm = LLM(target, "none")
    prompts = [random_text(3 + n, n) for n in range(count)]
    params = SamplingParams(max_new_tokens=length, ignore_eos=True)
    return [Row(tuple(p), tuple(llm.generate(p, params).token_ids), 0.0, "test") for p in prompts]


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def test_the_loss_is_over_the_guesses_of_the_groups_alone(target: Any) -> None:
    """Against the plain definition, token by token."""
    model = model_of(target, groups=4).eval()
    rows = answers(target, 2)
    features = [target.prefill(0, torch.tensor(row.tokens)) for row in rows]
    batch = collate(rows, features, target.device)
    _, parts = CompositeLoss(model, target.head_weight(), LossWeights())(batch)
    for number, head in enumerate(model.predictions(batch), 1):
        truth, teacher = [], []
        for b, row in enumerate(rows):
            for at in head.made[b].nonzero()[:, 0].tolist():
                about = at + head.offset
                assert at >= len(row.prompt_ids) - 1
                if about < len(row):
                    log_q = head.logits(head.hidden[b, at]).log_softmax(-1).detach()
                    p = (features[b][about - 1] @ target.head_weight().T).softmax(-1)
                    truth.append(-float(log_q[row.tokens[about]]))
                    teacher.append(-float(p @ log_q))
        assert 4 < len(truth) <= 8
        assert float(parts[f"lm/{number}"]) == pytest.approx(sum(truth) / len(truth), rel=1e-4)
        assert float(parts[f"teacher/{number}"]) == pytest.approx(sum(teacher) / len(teacher), rel=1e-4)


def test_it_overfits_a_tiny_corpus(tmp_path: Path, target: Any) -> None:
    """To the theoretical MAL: 20 tokens in rounds of 1 and 1 + k in turns, or of 1 and then 1 + k each."""
    rows = answers(target, 3)
    model = model_of(target, rank=16, groups=20)
    config = replace(
        CONFIG, steps=150, batch_tokens=400, learning_rate=1e-2, eval_every=150, save_every=150, tree="chain:3"
    )
    Trainer(target, "sdsat", model, rows, rows, config, tmp_path).fit()
    last = [line for line in metrics(tmp_path) if "mal" in line][-1]
    assert last["acceptance"] == [1.0, 1.0, 1.0]
    assert last["mal"] == 20 / 8
    features = [target.prefill(0, torch.tensor(row.tokens)) for row in rows]
    fused = SDSATDrafter(replace(model.config, fused=4), model.adapter(), target)
    plan = TreePlan.parse("chain:3")
    simulation = simulate(fused, rows, features.__getitem__, plan, VOCAB, device=target.device, target=target)
    assert simulation.mean_acceptance_length == 20 / 6


def strike(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Training ends by an error in that step."""
    left, drawn = step, SDSATModel._places

    def places(model: SDSATModel, batch: TrainingBatch) -> Any:
        nonlocal left
        left -= model.training
        if left == 0:
            raise MemoryError("struck")
        return drawn(model, batch)

    monkeypatch.setattr(SDSATModel, "_places", places)


def test_a_crash_and_a_resume_give_the_losses_of_an_unbroken_run(
    tmp_path: Path, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = answers(target, 6)

    def fit(out: str, resume: bool = False) -> Path:
        torch.manual_seed(2 if resume else 1)
        Trainer(target, "sdsat", model_of(target, groups=3), rows, rows, CONFIG, tmp_path / out, resume=resume).fit()
        return tmp_path / out

    whole = fit("whole")
    strike(monkeypatch, step=5)
    with pytest.raises(MemoryError):
        fit("broken")
    monkeypatch.undo()
    assert latest(tmp_path / "broken/steps") == tmp_path / "broken/steps/step-00000003"
    assert metrics(fit("broken", resume=True)) == metrics(whole)
    model = Path("steps/step-00000006/model.safetensors")
    assert (whole / model).read_bytes() == (tmp_path / "broken" / model).read_bytes()


def test_its_checkpoint_is_for_its_target_alone(tmp_path: Path, target: Any) -> None:
    model = model_of(target, fused=2)
    save_checkpoint(tmp_path / "drafter", model, "sdsat", target.spec, {})
    loaded = load_drafter(tmp_path / "drafter", target, METHODS)
    assert isinstance(loaded, SDSATDrafter)
    assert loaded.config == model.config
    torch.testing.assert_close(loaded.adapter.embeddings, model.adapter().embeddings, rtol=1e-3, atol=1e-3)
    other = load_target(str(tiny_models.save(tmp_path, "llama", seed=1)), runtime="torch")
    with pytest.raises(WrongTarget, match="was trained for"):
        load_drafter(tmp_path / "drafter", other, METHODS)


def test_a_runtime_that_cannot_is_refused(tmp_path: Path) -> None:
    directory = str(tiny_models.save(tmp_path, "llama"))
    eager = load_target(directory, runtime="hf")
    with pytest.raises(UnsupportedModel, match="runs on hf; SDSAT needs the runtime native or torch"):
        model_of(eager)
    with pytest.raises(UnsupportedModel, match="the runtime hf cannot adapt single rows"):
        eager.adapt(None)
    if INSTRUCTION_SETS:
        with pytest.raises(UnsupportedModel, match="load it with runtime torch"):
            model_of(load_target(directory, runtime="native")).train()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"tokens": 2}, "from 3 to 13"), ({"tokens": 14}, "from 3 to 13"), ({"rank": -1}, "rank is -1")],
)
def test_a_wrong_configuration_names_the_field(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SDSATConfig(**wrong)
