"""A model as a directory: `config.json` beside safetensors, read and written without building the model.

Tensors are streamed shard by shard, so that loading never holds a second copy of the model. The fingerprint
names the function that a directory computes, whatever the shards, the dtype it was saved in and the
version of transformers that saved it; a drafter carries the fingerprint of its target.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from s4c.errors import CorruptCheckpoint

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

COMPANIONS = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken")
"""What belongs to a model beside its weights: configuration, tokenizer, chat template. No code, no pickle."""

FUNCTION_KEYS = """
    model_type vocab_size tie_word_embeddings
    hidden_size n_embd d_model word_embed_proj_dim intermediate_size n_inner ffn_dim
    num_hidden_layers n_layer num_layers num_attention_heads n_head num_heads
    hidden_act hidden_activation activation_function rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon
    rotary_pct rotary_dim partial_rotary_factor alibi use_parallel_residual parallel_attn
    scale_attn_weights scale_attn_by_inverse_layer_idx query_pre_attn_scalar attention_multiplier
    attn_logit_softcapping final_logit_softcapping logit_scale logits_scaling residual_multiplier embedding_multiplier
    num_experts_per_tok num_local_experts num_experts norm_topk_prob
    """
"""What in a config.json decides the function beside the weights. Named one by one, because a later version of
transformers may write more keys for the same model. Sliding windows are not here: a context that exceeds one
is refused, so they never act."""

SAMPLED_VALUES = 16
"""Values of each tensor that enter the fingerprint."""


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model directory.

    Raises:
        CorruptCheckpoint: there is none, or it is no JSON object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{directory} holds no config.json, so it is not a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise CorruptCheckpoint(f"{path} holds no JSON object")
    return config


def shards(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in the order of their names.

    A whole file goes before shards, as in transformers.

    Raises:
        CorruptCheckpoint: there are none, or one that the index names is missing.
    """
    index, single = directory / INDEX, directory / WEIGHTS
    if single.exists():
        return [single]
    if not index.exists():
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        found = f"only {pickles[0]}, a pickle, which can run code when it is read" if pickles else "none"
        raise CorruptCheckpoint(
            f"{directory} must hold {WEIGHTS} (or {INDEX} and its shards), but holds {found}. Save the model again "
            "with save_pretrained of transformers, which writes safetensors"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [directory / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{index} is not an index of shards ({error!r})") from error
    missing = [name for name, path in zip(names, paths, strict=True) if not path.exists()]
    if missing:
        raise CorruptCheckpoint(f"{directory} lacks {', '.join(missing)}, which {INDEX} names; fetch it again")
    return paths


def tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model directory, as saved, shard by shard.

    Each is a view of the mapped file: copy what you keep, since a view keeps its whole shard in memory.

    Raises:
        CorruptCheckpoint: a file is missing, truncated or no safetensors.
    """
    for shard in shards(directory):
        with _opened(shard) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)


def write_model(directory: Path, like: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a model directory: the configuration and the tokenizer of another one, and weights of its own.

    Args:
        directory: made here.
        like: a model directory, from which everything but the weights is copied.
        tensors: the weights under their Hugging Face names, all of one dtype, each with memory of its own.

    Raises:
        OSError: it cannot be written.
    """
    directory.mkdir()
    for path in sorted({path for pattern in COMPANIONS for path in like.glob(pattern)}):
        if path.name != INDEX:
            shutil.copyfile(path, directory / path.name)
    config = {key: value for key, value in read_config(like).items() if key != "torch_dtype"}
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / WEIGHTS).write_bytes(save(dict(tensors), {"format": "pt"}))


def fingerprint(directory: Path) -> str:
    """Hash of what a model computes: 32 hexadecimal digits.

    It covers the keys of config.json that change the function, and the name, the shape and the first values,
    rounded to bfloat16, of every floating-point tensor.

    Raises:
        CorruptCheckpoint: as `tensors`.
    """
    lines = [json.dumps(_function(read_config(directory)), sort_keys=True)]
    for shard in shards(directory):
        with _opened(shard) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                shape = part.get_shape()
                first = part[:1] if shape else file.get_tensor(name)
                if first.is_floating_point():
                    values = first.flatten()[:SAMPLED_VALUES].to(torch.bfloat16).float().tolist()
                    lines.append(f"{name} {shape} {values}")
    return hashlib.sha256("\n".join([lines[0], *sorted(lines[1:])]).encode()).hexdigest()[:32]


@contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    """A safetensors file open for reading; a fault of it becomes a `CorruptCheckpoint` that names it."""
    try:
        handle: Any = safe_open(str(shard), framework="pt", device="cpu")
        with handle as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpoint(
            f"{shard} is truncated or no safetensors file ({error}); fetch or save it again"
        ) from error


def _function(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that changes what the model computes, written in one way only."""
    text = config.get("text_config") or config
    kept = {key: _rounded(text[key]) for key in FUNCTION_KEYS.split() if text.get(key) is not None}
    heads, size = text.get("num_attention_heads"), text.get("hidden_size")
    if heads and text.get("num_key_value_heads", heads) not in (None, heads):
        kept["num_key_value_heads"] = text["num_key_value_heads"]
    if heads and size and text.get("head_dim", size // heads) not in (None, size // heads):
        kept["head_dim"] = text["head_dim"]
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", text.get("rope_theta"))
    return {**kept, "rope": {key: _rounded(value) for key, value in rope.items() if value is not None}}


def _rounded(value: Any) -> Any:
    """Numbers to six digits, since a float32 epsilon reads 9.99999974e-06 after a detour through GGUF."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return f"{value:.6g}"
