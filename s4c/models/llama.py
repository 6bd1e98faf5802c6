"""The fast target: the Llama family by configuration flags.

Llama (with the rope scaling of Llama 3), Mistral, Qwen2 (biases), Qwen3 (norms on query and key heads), and
what is built like them, SmolLM2 for one. `HFTarget` is the oracle that this file is tested against.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s4c.errors import CorruptCheckpoint, UnsupportedModel
from s4c.models.adapter import AdaptedRows, Adapter
from s4c.models.base import Target, TargetSpec
from s4c.models.layers import DecoderLayer, LayerShape, Linear, RMSNorm
from s4c.models.native.decoder import NativeDecoder
from s4c.models.native.linear import NativeLinear
from s4c.models.native.stack import NativeStack
from s4c.models.sampling import judge_kernel
from s4c.models.stack import OpenLayers, Rope, Stack, TorchStack, stack_class
from s4c.types import DraftTree, TargetOutput, Verdict
from s4c.verify.tree import lines

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
HEAD = "lm_head.weight"
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
PREFILL_CHUNK = 512


def unsupported(config: Any) -> str | None:
    """Why this runtime cannot run a model of that configuration; None where it can."""
    if config.model_type not in FAMILIES:
        return f"model type {config.model_type!r} is not one of {', '.join(FAMILIES)}"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised, and what they are to be scaled by is not read"
    if config.hidden_act not in ("silu", "swish"):
        return f"activation {config.hidden_act!r} is not silu"
    if _rope_type(config) not in ROPE_TYPES:
        return f"rope type {_rope_type(config)!r} is not one of {', '.join(ROPE_TYPES)}"
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "rotary embeddings cover only a part of each head"
    shape = layer_shape(config)
    if shape.head_dim % 2 or shape.heads % shape.kv_heads:
        return f"{shape.heads} query heads of size {shape.head_dim} on {shape.kv_heads} key heads do not go up evenly"
    try:
        frequencies, scaling = inverse_frequencies(config)
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        return f"its rope parameters {config.rope_parameters} cannot be computed with ({error})"
    if not (frequencies.isfinite().all() and math.isfinite(scaling)):
        return f"its rope parameters {config.rope_parameters} give angles that are not finite"
    return None


def _rope_type(config: Any) -> str:
    return str(config.rope_parameters.get("rope_type", "default"))


def layer_shape(config: Any) -> LayerShape:
    """The decoder layer that a configuration of the family describes."""
    family = config.model_type
    bias = family in ("llama", "qwen3") and bool(config.attention_bias)
    return LayerShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        eps=config.rms_norm_eps,
        qkv_bias=family == "qwen2" or bias,
        out_bias=bias,
        mlp_bias=family == "llama" and bool(config.mlp_bias),
        head_norms=family == "qwen3",
    )


def count_weights(config: Any) -> int:
    """Numbers in the matrices that a pass reads: those of the layers and of the LM head."""
    weights: int = config.num_hidden_layers * layer_shape(config).weights + config.vocab_size * config.hidden_size
    return weights


def inverse_frequencies(config: Any) -> tuple[Tensor, float]:
    """[head_dim / 2] float32 and the factor on cosines and sines, by the model's rope parameters."""
    if _rope_type(config) == "default":
        size = layer_shape(config).head_dim
        exponent = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[_rope_type(config)](config, torch.device("cpu"))
    return frequencies, float(factor)


@dataclass(frozen=True)
class OpenModel:
    """A model that gradients pass through.

    Attributes:
        embedding: [V, d].
        stack: its layers, and the norm after them.
        head: [V, d]; the very tensor of the embedding where the two are tied.
    """

    embedding: Tensor
    stack: OpenLayers
    head: Tensor


def layer_places(index: int, layer: DecoderLayer) -> dict[str, Tensor]:
    """Where the weights of a layer stand, by their Hugging Face names: parameters, or rows of fused ones."""
    shape = layer.attention.shape
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention, mlp = layer.attention, layer.mlp
    places: dict[str, Tensor] = {
        "input_layernorm.weight": layer.attention_norm.weight.data,
        "post_attention_layernorm.weight": layer.mlp_norm.weight.data,
    }
    if shape.head_norms:
        places["self_attn.q_norm.weight"] = attention.q_norm.weight.data
        places["self_attn.k_norm.weight"] = attention.k_norm.weight.data
    fused = {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): (attention.qkv, [queries, keys, keys]),
        ("self_attn.o_proj",): (attention.out, [shape.hidden]),
        ("mlp.gate_proj", "mlp.up_proj"): (mlp.gate_up, [shape.intermediate] * 2),
        ("mlp.down_proj",): (mlp.down, [shape.hidden]),
    }
    for names, (linear, rows) in fused.items():
        places |= {f"{n}.weight": t for n, t in zip(names, linear.weight.data.split(rows), strict=True)}
        if linear.bias is not None:
            places |= {f"{n}.bias": t for n, t in zip(names, linear.bias.data.split(rows), strict=True)}
    return {f"model.layers.{index}.{name}": place for name, place in places.items()}


class LlamaTarget(Target):
    """A Llama-family model with a static cache and packed weights.

    Args:
        config: the transformers configuration; one that `unsupported` has nothing against.
        tensors: the weights under their Hugging Face names, in any order; read once.
        spec: what the other rooms may know.
        dtype: of the weights and of the inputs of matrix products; int8 on the native kernels alone.
        device: where the model runs.
        native: whether the C++ kernels run it; else torch does.

    Raises:
        CorruptCheckpoint: a weight is missing or has another shape.
    """

    def __init__(
        self,
        config: Any,
        tensors: Iterable[tuple[str, Tensor]],
        spec: TargetSpec,
        dtype: torch.dtype,
        device: torch.device,
        native: bool = False,
    ) -> None:
        assert unsupported(config) is None
        self.config = config
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.runtime = "native" if native else "torch"
        self.judge = judge_kernel(device, native)
        self.shape = layer_shape(config)
        self.layers: int = config.num_hidden_layers
        self._adapter: Adapter | None = None
        loaded = torch.bfloat16 if dtype == torch.int8 else dtype
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps).to(device).requires_grad_(False)
        self._final_norm = norm.weight
        rope = Rope(*inverse_frequencies(config))
        self._stack = stack_class(native)(config.num_hidden_layers, self.shape, rope, dtype, device, norm)
        self._embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=loaded, device=device)
        # A quantised head is no longer the embedding, tied or not.
        self._tied = bool(config.tie_word_embeddings) and dtype != torch.int8
        self.head = Linear.of(self._embedding if config.tie_word_embeddings else torch.empty_like(self._embedding))
        self._load(tensors, config.num_hidden_layers, loaded)
        self._native = self._decoder()
        self.weight_bytes = count_weights(config) * dtype.itemsize

    @property
    def stack(self) -> Stack:
        """Its layers and their cache, for what runs the model otherwise than as a target."""
        return self._stack

    def reserve(self, slots: int, length: int) -> None:
        self._stack.reserve(slots, length)

    def length(self, slot: int) -> int:
        return self._stack.lengths[slot]

    @torch.no_grad()
    def prefill(self, slot: int, tokens: Tensor, taps: Sequence[int] = ()) -> Tensor:
        self._stack.reserve(slot + 1, tokens.shape[0])
        self._stack.start(slot)
        features = [torch.empty(0, self.spec.hidden_size * (1 + len(taps)), device=self.device)]
        for chunk in tokens.to(self.device).split(PREFILL_CHUNK) if tokens.shape[0] else ():
            count = chunk.shape[0]
            chain = torch.arange(-1, count - 1, device=self.device)[None]
            features.append(self._stack.run(self._embedding[chunk][None], chain, slot, taps=taps)[0])
            self._stack.keep(slot, list(range(count)))
        return torch.cat(features)

    def verify(self, tree: DraftTree, taps: Sequence[int] = ()) -> TargetOutput:
        if self._native is not None and not self._adapts(tree):
            return self._native.verify(tree, taps)
        return self._verify(tree, taps)

    def _adapts(self, tree: DraftTree) -> bool:
        """Whether adaptive tokens stand in a tree."""
        if self._adapter is None or tree.size == 1:
            return False
        return any(max(tokens) >= self.spec.vocab_size for tokens, *_ in lines(tree))

    @torch.no_grad()
    def _verify(self, tree: DraftTree, taps: Sequence[int]) -> TargetOutput:
        """`verify` part by part."""
        x, adapted = self._embed(tree.tokens)
        features = self._stack.run(x, tree.parents, adapted=adapted, taps=taps)
        logits = self.head(features[..., : self.spec.hidden_size]).float()
        return TargetOutput(logits, features)

    def _embed(self, tokens: Tensor) -> tuple[Tensor, AdaptedRows | None]:
        """[B, N, d] of a tree's tokens, and which of its rows are adaptive; None where no row is."""
        adapter = self._adapter
        if adapter is None:
            return self._embedding[tokens], None
        rows = tokens >= self.spec.vocab_size
        if not rows.any():
            return self._embedding[tokens], None
        x = self._embedding[tokens.masked_fill(rows, 0)].float()
        x[rows] = adapter.embeddings[tokens[rows] - self.spec.vocab_size]
        return x, AdaptedRows(adapter, rows)

    def commit(self, verdict: Verdict) -> None:
        for slot, (path, _) in enumerate(verdict.lines):
            self._stack.keep(slot, path)

    def move(self, source: int, destination: int) -> None:
        self._stack.move(source, destination)

    def twin(self) -> LlamaTarget:
        twin = copy.copy(self)
        twin._stack, twin._adapter = self._stack.twin(), None
        twin._native = twin._decoder()
        return twin

    def adapt(self, adapter: Adapter | None) -> None:
        self._adapter = adapter

    def open(self) -> OpenModel:
        """The model for training through it: its own weights stay fixed.

        Raises:
            UnsupportedModel: the runtime is not torch.
        """
        if not isinstance(self._stack, TorchStack):
            raise UnsupportedModel(
                f"training passes through the layers of {self.spec.name}, which the runtime {self.runtime} cannot "
                "differentiate; load it with runtime torch (--runtime torch)"
            )
        return OpenModel(self._embedding, self._stack.open(), self.head_weight())

    def embedding_weight(self) -> Tensor:
        return self._embedding

    def head_weight(self, rows: Tensor | None = None) -> Tensor:
        if self._tied:
            return self._embedding if rows is None else self._embedding[rows]
        return self.head.dense() if rows is None else self.head.rows(rows)

    def final_norm_weight(self) -> Tensor | None:
        return self._final_norm

    def _decoder(self) -> NativeDecoder | None:
        """A pass in one call, where the kernels run it."""
        if not isinstance(self._stack, NativeStack):
            return None
        assert isinstance(self.head.packed, NativeLinear)
        return NativeDecoder(self._embedding, self._stack, self.head.packed)

    def _load(self, tensors: Iterable[tuple[str, Tensor]], count: int, dtype: torch.dtype) -> None:
        """Put each weight into its place as it is read; a layer is unpacked only from its first weight to its last."""
        places = self._outer_places()
        unseen = set(range(count))
        layers: dict[int, DecoderLayer] = {}
        waiting: dict[int, int] = {}
        beside: Tensor | None = None
        for name, tensor in tensors:
            found = re.match(r"model\.layers\.(\d+)\.", name)
            index = int(found[1]) if found else -1
            if index in unseen:
                unseen.remove(index)
                layers[index] = self._empty_layer(dtype)
                names = layer_places(index, layers[index])
                waiting[index] = len(names)
                places |= names
            place = places.pop(name, None)
            if place is None:
                beside = tensor if name == HEAD else beside
                continue
            if tensor.shape != place.shape:
                raise CorruptCheckpoint(
                    f"weight {name} of {self.spec.name} is {list(tensor.shape)}; "
                    f"its configuration wants {list(place.shape)}"
                )
            place.copy_(tensor)
            del place
            if index >= 0:
                waiting[index] -= 1
                if not waiting[index]:
                    self._stack.place(index, layers.pop(index))
        missing = [*places, *(f"model.layers.{index}" for index in unseen)]
        if missing:
            raise CorruptCheckpoint(
                f"the weights of {self.spec.name} lack {', '.join(sorted(missing)[:3])} ({len(missing)} in all)"
            )
        if beside is not None and not torch.equal(beside.to(self._embedding), self._embedding):
            raise CorruptCheckpoint(
                f"{self.spec.name} ties its LM head to the embedding, but {HEAD} is another matrix; "
                'say "tie_word_embeddings": false in its config.json if it is to be used'
            )
        self.head.pack(self.dtype, self.runtime == "native")

    def _empty_layer(self, dtype: torch.dtype) -> DecoderLayer:
        with torch.device("meta"):
            layer = DecoderLayer(self.shape).requires_grad_(False)
        layer.to_empty(device=self.device)
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                parameter.data = torch.empty_like(parameter, dtype=dtype)
        return layer

    def _outer_places(self) -> dict[str, Tensor]:
        """Where the weights outside the layers go, by their Hugging Face names."""
        places = {"model.embed_tokens.weight": self._embedding, "model.norm.weight": self._final_norm.data}
        if self.head.weight.data_ptr() != self._embedding.data_ptr():
            places[HEAD] = self.head.weight.data
        return places
