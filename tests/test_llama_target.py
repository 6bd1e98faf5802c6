"""The fast target against transformers: the same logits, the same text, whatever the tree, the batch, the chunk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from s4c.errors import CorruptCheckpoint, UnsupportedModel
from s4c.models import layers, llama
from s4c.models.llama import LlamaTarget, unsupported
from s4c.models.loading import load_config, load_target
from s4c.models.native import library
from s4c.models.weights import tensors
from s4c.types import DraftTree, Verdict
from s4c.verify.tree import root_only

RUNTIMES = ["torch", "hf", *(["native"] if library.problem() is None else [])]
PROMPT = [3, 14, 15, 9, 26, 5]


def tree_of(parents: list[int], tokens: list[int]) -> DraftTree:
    candidate = torch.ones(1, len(tokens), dtype=torch.bool)
    return DraftTree(torch.tensor([tokens]), torch.tensor([parents]), candidate, torch.zeros(1, dtype=torch.bool))


def verdict_of(path: list[int]) -> Verdict:
    columns = torch.tensor([path])
    return Verdict(columns, torch.tensor([len(path) - 1]), torch.tensor([0]), torch.zeros_like(columns))


def plain(target: Any, prompt: list[int], count: int) -> list[int]:
    target.reserve(1, len(prompt) + count)
    target.prefill(0, torch.tensor(prompt[:-1]))
    root, written = prompt[-1], []
    for _ in range(count):
        root = int(target.verify(root_only([root])).logits[0, 0].argmax())
        target.commit(verdict_of([0]))
        written.append(root)
    return written


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", tiny_models.LLAMA_LIKE)
def test_plain_decoding_is_that_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    directory = tiny_models.save(tmp_path, family, tied=tied)
    target = load_target(str(directory), runtime="torch")
    oracle = AutoModelForCausalLM.from_pretrained(directory)
    assert plain(target, PROMPT, 40) == tiny_models.greedy(oracle, PROMPT, 40)


@pytest.mark.parametrize("family", tiny_models.LLAMA_LIKE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_prefill_features_and_logits_are_those_of_transformers(tmp_path: Path, family: str, dtype: str) -> None:
    directory = tiny_models.save(tmp_path, family)
    target = load_target(str(directory), runtime="torch", dtype=dtype)
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.randint(0, tiny_models.VOCAB, (70,), generator=torch.Generator().manual_seed(1))
    target.reserve(1, 80)
    features = target.prefill(0, tokens)
    expected = oracle(tokens[None], output_hidden_states=True)
    bound = {"float32": 1e-4, "bfloat16": 0.3, "float16": 0.03}[dtype]
    assert (features - expected.hidden_states[-1][0]).abs().max() < bound
    feature, tapped = target.prefill(0, tokens, [1]).chunk(2, -1)
    assert torch.equal(feature, features)
    hidden = expected.hidden_states[1][0]
    assert (tapped - hidden).abs().max() < bound * hidden.abs().max().clamp(min=1)
    logits = target.head(features).float()
    assert (logits - expected.logits[0]).abs().max() < bound * 4


@pytest.mark.parametrize("family", tiny_models.LLAMA_LIKE)
def test_a_node_sees_its_own_path_alone(tmp_path: Path, family: str) -> None:
    target = load_target(str(tiny_models.save(tmp_path, family)), runtime="torch")
    target.reserve(1, 64)
    target.prefill(0, torch.tensor(PROMPT))
    parents, tokens = [-1, 0, 0, 1, 1, 2, 4], [7, 8, 9, 10, 11, 12, 13]
    logits = target.verify(tree_of(parents, tokens)).logits[0]
    for node in range(len(tokens)):
        path: list[int] = []
        above = node
        while above >= 0:
            path.insert(0, tokens[above])
            above = parents[above]
        target.prefill(0, torch.tensor(PROMPT + path[:-1]))
        alone = target.verify(root_only(path[-1:])).logits[0, 0]
        assert torch.allclose(logits[node], alone, atol=1e-4)
        target.prefill(0, torch.tensor(PROMPT))


def test_committing_a_path_is_decoding_it(tmp_path: Path) -> None:
    target = load_target(str(tiny_models.save(tmp_path, "qwen3")), runtime="torch")
    target.reserve(1, 64)
    target.prefill(0, torch.tensor(PROMPT))
    target.verify(tree_of([-1, 0, 0, 2, 2, 4], [7, 8, 9, 10, 11, 12]))
    target.commit(verdict_of([0, 2, 4, 5]))
    assert target.length(0) == len(PROMPT) + 4
    after = target.verify(root_only([20])).logits
    target.prefill(0, torch.tensor([*PROMPT, 7, 9, 11, 12]))
    assert torch.allclose(after, target.verify(root_only([20])).logits, atol=1e-4)


def test_batched_is_single(tmp_path: Path) -> None:
    target = load_target(str(tiny_models.save(tmp_path, "mistral")), runtime="torch")
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 64, (n,), generator=generator) for n in (3, 17, 9, 0)]
    tree = tree_of([-1, 0, 0, 1], [7, 8, 9, 10])
    rows = DraftTree(
        *(x.repeat(4, *[1] * (x.ndim - 1)) for x in (tree.tokens, tree.parents, tree.candidate)), tree.sampled
    )
    target.reserve(4, 32)
    alone = []
    for prompt in prompts:
        target.prefill(0, prompt)
        alone.append(target.verify(tree).logits[0])
    for slot, prompt in enumerate(prompts):
        target.prefill(slot, prompt)
    assert torch.allclose(target.verify(rows).logits, torch.stack(alone), atol=1e-4)
    target.move(3, 1)
    assert target.length(1) == 0


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_finite_spoils_what_sees_it_alone(tmp_path: Path, runtime: str, dtype: str) -> None:
    target = load_target(str(tiny_models.save(tmp_path, "llama", tied=False)), runtime=runtime, dtype=dtype)
    bad, prompts = 6, [torch.tensor([3]), torch.arange(7, 40)]
    one = tree_of([-1, 0, 0, 1, 2, 4], [7, 8, bad, 10, 11, 12])
    tree = DraftTree(*(x.repeat(2, *[1] * (x.ndim - 1)) for x in (one.tokens, one.parents, one.candidate, one.sampled)))
    target.reserve(2, 64)

    def logits() -> Tensor:
        for slot, prompt in enumerate(prompts):
            target.prefill(slot, prompt)
        return target.verify(tree).logits

    before = logits()
    target.embedding_weight()[bad] = torch.nan
    target.prefill(0, torch.full((30,), bad))  # leaves rows behind the short prompt that comes after
    after = logits()
    spoilt = torch.tensor([False, False, True, False, True, True])
    assert after[:, spoilt].isnan().all()
    assert torch.allclose(after[:, ~spoilt], before[:, ~spoilt], atol=1e-4 if dtype == "float32" else 0.1)


def test_rows_that_are_left_over_and_not_finite_are_held_off_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = load_target(str(tiny_models.save(tmp_path, "llama")), runtime="torch")
    target.reserve(2, 64)
    target.prefill(1, torch.arange(40))
    clean = target.embedding_weight()[9].clone()
    target.embedding_weight()[9] = torch.nan
    target.prefill(0, torch.full((30,), 9))
    target.embedding_weight()[9] = clean
    target.prefill(0, torch.tensor(PROMPT))
    apart: list[int] = []
    attend_apart = layers._attend_apart
    monkeypatch.setattr(layers, "_attend_apart", lambda *inputs: apart.append(1) or attend_apart(*inputs))
    assert target.verify(root_only([7, 7])).logits.isfinite().all()
    assert len(apart) == target.layers
    assert target.verify(root_only([7, 7])).logits.isfinite().all()
    assert len(apart) == target.layers


def test_a_prompt_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = load_target(str(tiny_models.save(tmp_path, "llama")), runtime="torch")
    tokens = torch.randint(0, 64, (50,), generator=torch.Generator().manual_seed(3))
    target.reserve(1, 64)
    whole = target.prefill(0, tokens)
    monkeypatch.setattr(llama, "PREFILL_CHUNK", 7)
    assert torch.allclose(target.prefill(0, tokens), whole, atol=1e-4)


def test_room_grows_without_losing_what_is_cached(tmp_path: Path) -> None:
    target = load_target(str(tiny_models.save(tmp_path, "llama")), runtime="torch")
    target.reserve(1, 8)
    target.prefill(0, torch.tensor(PROMPT))
    before = target.verify(root_only([7])).logits
    target.reserve(3, 1000)
    assert torch.equal(target.verify(root_only([7])).logits, before)


def test_heads_and_embeddings_are_the_models(tmp_path: Path) -> None:
    directory = tiny_models.save(tmp_path, "qwen2", tied=False)
    target = load_target(str(directory), runtime="torch")
    weights = dict(tensors(directory))
    rows = torch.tensor([5, 1, 63])
    assert torch.equal(target.embedding_weight(), weights["model.embed_tokens.weight"])
    assert torch.equal(target.head_weight(), weights["lm_head.weight"])
    assert torch.equal(target.head_weight(rows), weights["lm_head.weight"][rows])


def damaged(directory: Path, **changes: Any) -> list[tuple[str, Tensor]]:
    weights = dict(tensors(directory))
    for name, tensor in changes.items():
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    return list(weights.items())


@pytest.mark.parametrize("change", [None, torch.zeros(3, 3)], ids=["missing", "misshaped"])
def test_damaged_weights_are_refused_by_name(tmp_path: Path, change: Tensor | None) -> None:
    directory = tiny_models.save(tmp_path, "llama")
    spec = load_target(str(directory), runtime="torch").spec
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(CorruptCheckpoint, match=r"layers\.1\.self_attn\.k_proj"):
        LlamaTarget(
            load_config(directory), damaged(directory, **{name: change}), spec, torch.float32, torch.device("cpu")
        )


def test_what_the_runtime_cannot_do_is_refused(tmp_path: Path) -> None:
    gpt2 = tiny_models.save(tmp_path, "gpt2")
    assert "gpt2" in str(unsupported(load_config(gpt2)))
    with pytest.raises(UnsupportedModel, match="hf"):
        load_target(str(gpt2), runtime="torch")
    config = load_config(tiny_models.save(tmp_path, "llama"))
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "dynamic" in str(unsupported(config))
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    assert unsupported(config) is None
    for uneven in ({"num_key_value_heads": 3}, {"head_dim": 7}):
        changed = copy.deepcopy(config)
        changed.update(uneven)
        assert "do not go up evenly" in str(unsupported(changed))
