"""HFTarget against transformers itself: plain passes, `generate`, and the families that must be refused."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from transformers import AutoModelForCausalLM

from s4c.errors import UnsupportedModel
from s4c.models import hf
from s4c.models.base import TargetSpec, soft_capped
from s4c.models.hf import HFTarget
from s4c.types import DraftTree, Verdict
from s4c.verify import tree as trees

FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma", "gemma2", "cohere", "granite"]
PROMPT = [5, 9, 33, 2, 17, 60]
PARENTS = [-1, 0, 0, 1, 2, 1, 3, 3, 4]
SPEC = TargetSpec("tiny", "0" * 32, tiny_models.VOCAB, tiny_models.HIDDEN, tiny_models.CONTEXT, (1,))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[HFTarget, Any]:
    """A target and, loaded apart with transformers' own choice of attention, its oracle."""
    directory = tiny_models.save(tmp_path_factory.mktemp("models"), request.param)
    target = HFTarget.from_directory(directory, SPEC, torch.float32, torch.device("cpu"))
    return target, AutoModelForCausalLM.from_pretrained(directory)


def tree_of(parents: list[int], batch: int = 1, seed: int = 0) -> DraftTree:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(tiny_models.VOCAB, (batch, len(parents)), generator=generator)
    candidate = torch.ones(batch, len(parents), dtype=torch.bool)
    candidate[:, 0] = False
    return DraftTree(tokens, torch.tensor([parents] * batch), candidate, torch.zeros(batch, dtype=torch.bool))


def verdict_of(tree: DraftTree, path: list[int], bonus: int) -> Verdict:
    columns = torch.tensor([path])
    tokens = torch.cat([tree.tokens[0, columns[:, 1:]], torch.tensor([[bonus]])], 1)
    return Verdict(columns, torch.tensor([len(path) - 1]), torch.tensor([bonus]), tokens)


def plain_logits(model: Any, text: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([text])).logits[0, -1]


def path_tokens(tree: DraftTree, node: int, row: int = 0) -> list[int]:
    return tree.tokens[row, trees.ancestors(tree.parents)[row, node]].tolist()


def greedy(target: HFTarget, prompt: list[int], count: int) -> list[int]:
    """Plain decoding: a tree of the root alone in each round."""
    target.reserve(1, tiny_models.CONTEXT)
    target.prefill(0, torch.tensor(prompt[:-1], dtype=torch.int64))
    written, root = [], prompt[-1]
    for _ in range(count):
        tree = trees.root_only([root])
        bonus = int(target.verify(tree).logits[0, 0].argmax())
        target.commit(verdict_of(tree, [0], bonus))
        written.append(bonus)
        root = bonus
    return written


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-4, atol=1e-4)


def test_plain_decoding_equals_generate(pair: tuple[HFTarget, Any]) -> None:
    target, oracle = pair
    for prompt in (PROMPT, [7]):
        assert greedy(target, prompt, 40) == tiny_models.greedy(oracle, prompt, 40)


def test_a_tree_equals_passes_along_each_path(pair: tuple[HFTarget, Any]) -> None:
    target, oracle = pair
    tree = tree_of(PARENTS)
    target.reserve(1, tiny_models.CONTEXT)
    target.prefill(0, torch.tensor(PROMPT))
    for _ in range(2):  # a pass changes no length, so it can be run again
        output = target.verify(tree)
        assert target.length(0) == len(PROMPT)
        for node in range(tree.size):
            assert close(output.logits[0, node], plain_logits(oracle, PROMPT + path_tokens(tree, node))), node


def test_decoding_goes_on_from_a_committed_path(pair: tuple[HFTarget, Any]) -> None:
    target, oracle = pair
    text = list(PROMPT)
    target.reserve(1, tiny_models.CONTEXT)
    target.prefill(0, torch.tensor(text))
    for seed, path in enumerate(([0, 1, 3, 7], [0], [0, 2, 4, 8])):
        tree = tree_of(PARENTS, seed=seed)
        target.verify(tree)
        target.commit(verdict_of(tree, path, bonus=11))
        text += tree.tokens[0, path].tolist()
        assert target.length(0) == len(text)
        after = target.verify(trees.root_only([11])).logits[0, 0]
        assert close(after, plain_logits(oracle, [*text, 11]))


def test_features_are_what_the_head_reads(pair: tuple[HFTarget, Any]) -> None:
    target, oracle = pair
    target.reserve(1, tiny_models.CONTEXT)
    features = target.prefill(0, torch.tensor(PROMPT))
    with torch.no_grad():
        logits = oracle(torch.tensor([PROMPT])).logits[0]
    assert target.softcap == pytest.approx(getattr(oracle.config, "final_logit_softcapping", 0.0))
    assert close(soft_capped(features @ target.head_weight().T, target.softcap), logits)
    assert target.readable
    assert torch.equal(target.head_weight(torch.tensor([3, 1])), target.head_weight()[[3, 1]])
    root = target.verify(trees.root_only([4])).features
    assert root.shape == (1, 1, tiny_models.HIDDEN)
    with torch.no_grad():
        hidden = oracle(torch.tensor([[*PROMPT, 4]]), output_hidden_states=True).hidden_states[1][0]
    tapped = target.prefill(0, torch.tensor(PROMPT), [1])
    assert close(tapped, torch.cat([features, hidden[:-1]], -1))
    root = target.verify(trees.root_only([4]), [1]).features
    assert close(root[0, 0, tiny_models.HIDDEN :], hidden[-1])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[HFTarget, Any]:
    directory = tiny_models.save(tmp_path_factory.mktemp("models"), "llama", tied=True)
    target = HFTarget.from_directory(directory, SPEC, torch.float32, torch.device("cpu"))
    return target, AutoModelForCausalLM.from_pretrained(directory)


def test_slots_are_apart_and_can_be_moved(llama: tuple[HFTarget, Any]) -> None:
    target, oracle = llama
    texts = [[1, 2, 3, 4], [9], [30, 31, 32, 33, 34, 35, 36]]
    target.reserve(3, tiny_models.CONTEXT)
    for slot, text in enumerate(texts):
        target.prefill(slot, torch.tensor(text))
    target.move(2, 0)
    texts[0] = texts[2]
    tree = tree_of(PARENTS, batch=2)
    logits = target.verify(tree).logits
    for row in range(2):
        assert target.length(row) == len(texts[row])
        for node in range(tree.size):
            assert close(logits[row, node], plain_logits(oracle, texts[row] + path_tokens(tree, node, row)))


def test_a_prefill_in_chunks_is_the_same(llama: tuple[HFTarget, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target, oracle = llama
    prompt = torch.arange(30)
    target.reserve(1, tiny_models.CONTEXT)
    whole = target.prefill(0, prompt)
    monkeypatch.setattr(hf, "PREFILL_CHUNK", 7)
    assert close(target.prefill(0, prompt), whole)
    assert target.length(0) == 30
    after = target.verify(trees.root_only([50])).logits[0, 0]
    assert close(after, plain_logits(oracle, [*prompt.tolist(), 50]))
    assert target.prefill(0, prompt[:0]).shape == (0, tiny_models.HIDDEN)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nodes_past_the_context_leave_the_others_alone(family: str) -> None:
    model = tiny_models.tiny(family)
    target = HFTarget(model, SPEC)
    prompt = [token % tiny_models.VOCAB for token in range(tiny_models.CONTEXT - 2)]
    target.reserve(1, tiny_models.CONTEXT)
    target.prefill(0, torch.tensor(prompt))
    tree = tree_of([-1, 0, 1, 2, 0])
    logits = target.verify(tree).logits[0]
    for node in (0, 1, 4):
        assert close(logits[node], plain_logits(tiny_models.tiny(family), prompt + path_tokens(tree, node)))


def test_the_final_norm_is_what_it_multiplies_by() -> None:
    for family, offset in (("llama", 0), ("gemma", 1)):
        target = HFTarget(tiny_models.tiny(family), SPEC)
        weight = target.final_norm_weight()
        assert weight is not None
        assert close(weight, target._model.model.norm.weight + offset)
    assert HFTarget(tiny_models.tiny("gpt2"), SPEC).final_norm_weight() is None


def test_what_is_more_than_the_rows_of_a_head_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not HFTarget(tiny_models.tiny("phi"), SPEC).readable  # a bias
    model = tiny_models.tiny("llama")
    forward = type(model).forward

    @wraps(forward)
    def silences_a_token(self: Any, *arguments: Any, **more: Any) -> Any:
        output = forward(self, *arguments, **more)
        output.logits[..., 0] = -1e4
        return output

    monkeypatch.setattr(type(model), "forward", silences_a_token)
    target = HFTarget(model, SPEC)
    assert not target.readable
    assert torch.equal(target.head_weight(), model.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = tiny_models.save(tmp_path, "llama")
    target = HFTarget.from_directory(directory, SPEC, dtype, torch.device("cpu"))
    assert target.dtype == target.embedding_weight().dtype == dtype
    assert target.readable
    target.reserve(1, 16)
    assert target.prefill(0, torch.tensor(PROMPT)).dtype == dtype
    logits = target.verify(tree_of([-1, 0, 0])).logits[0]
    expected = plain_logits(tiny_models.tiny("llama"), PROMPT + path_tokens(tree_of([-1, 0, 0]), 2))
    assert logits.dtype == torch.float32
    assert (logits[2] - expected).abs().mean() < 0.1 * expected.std()


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
REFUSED = {
    "Bloom": ({**SIZES, "n_head": 4}, "position_ids"),
    "Mamba": ({**SIZES, "state_size": 4}, "position_ids|past_key_values"),
    "Bart": ({"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}, "position_ids"),
    "Falcon": ({**SIZES, "num_attention_heads": 4, "alibi": True}, "cannot verify a tree"),
    "XLM": ({"vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 4}, "cannot verify a tree|no LM head"),
}


@pytest.mark.parametrize("prefix", REFUSED)
def test_a_family_that_cannot_is_refused(prefix: str) -> None:
    arguments, reason = REFUSED[prefix]
    config = getattr(transformers, f"{prefix}Config")(**arguments)
    model = tiny_models.randomised(AutoModelForCausalLM.from_config(config))
    with pytest.raises(UnsupportedModel, match=reason):
        HFTarget(model, SPEC)


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids", "past_key_values"])
def test_the_check_notices_a_model_that_ignores(ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.tiny("llama")
    forward = type(model).forward

    def deaf(
        self: Any, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any, **more: Any
    ) -> Any:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        return forward(self, input_ids, **{**given, ignored: None}, **more)

    monkeypatch.setattr(type(model), "forward", deaf)
    with pytest.raises(UnsupportedModel, match="cannot verify a tree"):
        HFTarget(model, SPEC)


def test_inside_its_window_a_sliding_model_is_computed_rightly(tmp_path: Path) -> None:
    directory = tiny_models.save(tmp_path, "mistral", sliding_window=24)
    spec = TargetSpec("tiny", "0" * 32, tiny_models.VOCAB, tiny_models.HIDDEN, 24, (1,))
    target = HFTarget.from_directory(directory, spec, torch.float32, torch.device("cpu"))
    oracle = AutoModelForCausalLM.from_pretrained(directory)
    assert oracle.config.sliding_window == 24
    assert greedy(target, PROMPT, 24 - len(PROMPT)) == tiny_models.greedy(oracle, PROMPT, 24 - len(PROMPT))
