"""A language model as drafter: what it reads, when it stops, and which models it can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from test_rules import HOT as REQUEST
from test_rules import check_lossless
from test_s4c_drafter import Run
from verify_oracles import Text, sampled_trees, tiny_model

from s4c import LLM, SamplingParams
from s4c.drafters import draft_model
from s4c.drafters.draft_model import DraftModelConfig, DraftModelDrafter
from s4c.engine.llm import choose_drafter
from s4c.errors import UnsupportedModel
from s4c.types import DraftTree
from s4c.verify.tree import TreePlan

GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)
HOT = replace(GREEDY, temperature=1.0, seed=2)
PROMPTS = [[3, 14, 15, 9, 26, 5], [8, 2], [7]]


@pytest.fixture
def target(tmp_path: Path) -> str:
    return str(tiny_models.save(tmp_path, "llama", seed=3))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft models compute as exactly as targets, so that a model agrees with itself."""
    monkeypatch.setattr(draft_model, "drafting_dtype", lambda target: target.dtype)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("runtime", ["native", "torch"])
@pytest.mark.parametrize("params", [GREEDY, HOT], ids=["greedy", "hot"])
def test_a_model_that_drafts_for_itself_is_always_right_and_reads_each_token_once(
    target: str, runtime: str, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(target, "none", runtime=runtime, threads=1)
    plain = [g.token_ids for g in llm.generate(PROMPTS, params)]
    llm.use(f"draft-model={target}", "chain:3")
    assert isinstance(llm.drafter, DraftModelDrafter)
    read: list[int] = []
    run = llm.drafter._stack.run

    def counted(x: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        read.append(x.shape[0] * x.shape[1])
        return run(x, *args, **more)

    monkeypatch.setattr(llm.drafter._stack, "run", counted)
    found = llm.generate(PROMPTS, params)
    assert [g.token_ids for g in found] == plain
    assert [g.stats.rounds for g in found] == [6] * 3
    committed = sum(len(prompt) + 24 for prompt in PROMPTS)
    # Of the last round nobody reads the bonus, nor the last drafted token, for no later round asks for them.
    assert sum(read) == committed - 2 * 3


@pytest.mark.usefixtures("exact")
def test_with_lookup_beside_it_tokens_that_it_did_not_guess_are_read_too(target: str) -> None:
    llm = LLM(target, "none", threads=1)
    prompt = [5, 6, 7, 8] * 5
    plain = llm.generate(prompt, GREEDY)
    llm.use(f"draft-model={target}+ngram", "chain:2")
    assert llm.drafter.name == "draft-model+ngram"
    found = llm.generate(prompt, GREEDY)
    assert found.token_ids == plain.token_ids
    assert found.stats.rounds <= 8


@pytest.mark.usefixtures("exact")
def test_it_stops_where_it_is_not_sure(target: str) -> None:
    llm = LLM(target, "none", threads=1)
    plain = llm.generate(PROMPTS, HOT)
    nodes = []
    for stop in ("", ",stop=0.3", ",stop=0.9999"):
        llm.use(f"draft-model={target}{stop}", "chain:6")
        sizes: list[int] = []
        propose = llm.drafter.propose

        def sized(sequences: Any, propose: Any = propose, sizes: list[int] = sizes) -> DraftTree:
            sizes.append((tree := propose(sequences)).size)
            return tree

        llm.drafter.propose = sized  # type: ignore[method-assign]
        assert [g.token_ids for g in llm.generate(PROMPTS, HOT)] == [g.token_ids for g in plain]
        nodes.append(sum(sizes) / len(sizes))
    assert nodes[0] == 7
    assert nodes[0] > nodes[1] > nodes[2] >= 2


def test_each_sequence_of_a_batch_stops_for_itself(target: str) -> None:
    llm = LLM(target, f"draft-model={target},stop=0.2", threads=1)
    alone = [int(Run(llm.target, llm.drafter, [p], "chain:6").propose()[1].candidate.sum()) for p in PROMPTS]
    together = Run(llm.target, llm.drafter, PROMPTS, "chain:6").propose()[1].candidate.sum(1).tolist()
    assert together == alone
    assert len(set(alone)) > 1


def test_what_it_costs_is_kept_for_each_model(target: str, tmp_path: Path) -> None:
    other = tiny_models.save(tmp_path / "other", "llama", seed=9)
    llm = LLM(target, "none", threads=1)
    names = [target, other, f"{target},stop=0.5"]
    assert len({choose_drafter(f"draft-model={name}", llm.target).settings for name in names}) == 3


@pytest.mark.parametrize("stop", [0.2, 0.4, 0.7])
def test_rejection_stays_lossless_where_drafting_stops_by_confidence(stop: float) -> None:
    """A chain that goes on only where its first token was likely: its shape depends on draws, but not on later ones."""
    q = tiny_model(2, 3)

    def trees(text: Text) -> Iterator[tuple[float, DraftTree]]:
        for probability, tree in sampled_trees(TreePlan.parse("chain:2"), q)(text):
            assert tree.log_q is not None
            sure = float(tree.log_q[0, 0, tree.tokens[0, 1]].exp()) >= stop
            kept = slice(None) if sure else slice(2)
            cut = DraftTree(
                tree.tokens[:, kept], tree.parents[:, kept], tree.candidate[:, kept], tree.sampled, tree.log_q[:, kept]
            )
            yield probability, cut

    check_lossless(tiny_model(1, 3), REQUEST, 3, 3, trees)


def test_another_vocabulary_is_refused_with_the_sizes(target: str, tmp_path: Path) -> None:
    other = tiny_models.save(tmp_path / "other", "llama", vocab_size=80)
    with pytest.raises(ValueError, match=r"vocabulary of 80 tokens and .* one of 64"):
        LLM(target, f"draft-model={other}", threads=1)


def test_another_architecture_is_refused(target: str, tmp_path: Path) -> None:
    other = tiny_models.save(tmp_path / "other", "gpt2")
    with pytest.raises(UnsupportedModel, match="cannot draft: model type 'gpt2'"):
        LLM(target, f"draft-model={other}", threads=1)


@pytest.mark.parametrize("family", tiny_models.LLAMA_LIKE)
def test_every_family_drafts(target: str, tmp_path: Path, family: str) -> None:
    llm = LLM(target, "none", threads=1)
    plain = [g.token_ids for g in llm.generate(PROMPTS, HOT)]
    llm.use(f"draft-model={tiny_models.save(tmp_path / 'small', family, num_hidden_layers=1)}")
    assert [g.token_ids for g in llm.generate(PROMPTS, HOT)] == plain


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("draft-model", "must be written draft-model=MODEL"),
        ("draft-model=", "must be written draft-model=MODEL"),
        ("draft-model=nowhere/at all", "'nowhere/at all' does not exist"),
        ("draft-model={target},stop=2", "stop is 2.0; it must be a probability"),
        ("draft-model={target},stop=often", "stop is 'often'"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(target: str, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(target, spec.format(target=target), threads=1)


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"width": 30, "heads": 4}, {"stop": 1.0}, {"depth": 0}])
def test_a_wrong_configuration_names_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DraftModelConfig(**wrong)
