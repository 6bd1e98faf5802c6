"""A Hugging Face directory of the Llama architecture as a GGUF file without a tokenizer, for token ids go in and out.

GGUF keeps the rows of the query and key matrices in another order: its rope turns neighbours (2i, 2i + 1) where Hugging
Face's turns (i, i + half), so the halves of each head are interleaved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from s4c.bench.contestants import Unavailable
from s4c.models import weights
from s4c.models.loading import load_config

FLOATS = {
    "float32": (gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
    "bfloat16": (gguf.LlamaFileType.MOSTLY_BF16, gguf.GGMLQuantizationType.BF16),
    "float16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
}
QUANTISED = {
    "q4_0": (gguf.LlamaFileType.MOSTLY_Q4_0, gguf.GGMLQuantizationType.Q4_0),
    "q4_1": (gguf.LlamaFileType.MOSTLY_Q4_1, gguf.GGMLQuantizationType.Q4_1),
    "q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0),
}
"""Blocks of 32 weights each; all matrices take them, the embeddings too."""


def quantisation(file: Path) -> str:
    """What a GGUF file calls its weights, such as `q4_1`.

    Raises:
        Unavailable: it is no GGUF file.
    """
    try:
        field = gguf.GGUFReader(file).get_field("general.file_type")
        number = None if field is None else int(field.contents())
    except ValueError as error:
        raise Unavailable(f"{file} cannot be read: {error}") from error
    return "unknown" if number is None else gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").lower()


def write_gguf(directory: Path, file: Path, dtype: str) -> None:
    """Write the weights of a model directory as a GGUF file; vectors stay float32.

    Args:
        dtype: a key of `FLOATS` or `QUANTISED`.

    Raises:
        Unavailable: the model or the dtype is one that this file does not write.
    """
    config = load_config(directory)
    _check(config, dtype)
    file_type, kind = (FLOATS | QUANTISED)[dtype]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type(file_type)
    _add_sizes(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in weights.tensors(directory):
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        tensor = _interleaved(name, tensor.float(), config)
        if tensor.ndim == 1:
            writer.add_tensor(place, tensor.numpy())
        else:
            writer.add_tensor(place, _raw(tensor, dtype), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(config: Any, dtype: str) -> None:
    if dtype not in FLOATS and dtype not in QUANTISED:
        raise Unavailable(
            f"no GGUF file is written in {dtype}; give --dtype float32 or bfloat16, or llama.cpp=FORMAT "
            f"({', '.join(QUANTISED)}) or llama.cpp=FILE.gguf"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type != "llama" or rope != "default":
        raise Unavailable(
            f"a GGUF file is written here for Llama models with plain rope alone, not for {config.model_type} with "
            f"{rope} rope; convert the model with llama.cpp's own script and give llama.cpp=FILE.gguf"
        )


def _add_sizes(writer: Any, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("no_vocab")


def _interleaved(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Rows of query and key as GGUF orders them; others as they are."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _raw(matrix: Tensor, dtype: str) -> np.ndarray[Any, Any]:
    """The bytes of a matrix, row by row.

    Raises:
        Unavailable: its rows are not of whole blocks.
    """
    if dtype in FLOATS:
        return matrix.to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy()
    try:
        blocks: np.ndarray[Any, Any] = gguf.quants.quantize(matrix.numpy(), QUANTISED[dtype][1])
    except gguf.quants.QuantError as error:
        raise Unavailable(f"a matrix {tuple(matrix.shape)} cannot be quantised to {dtype}: {error}") from error
    return blocks
