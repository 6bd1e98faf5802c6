"""The fast target: the Llama family by configuration flags.

Llama (with the rope scaling of Llama 3), Mistral, Qwen2 (biases), Qwen3 (norms on query and key heads), and
what is built like them, SmolLM2 for one. `HFTarget` is the oracle that this file is tested against.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from s4c.errors import CorruptCheckpoint, UnsupportedModel
from s4c.models.base import Target, TargetSpec
from s4c.models.cache import CacheView, KVCache
from s4c.models.layers import DecoderLayer, LayerShape, Linear, RMSNorm, Rotary, grouped_mask, pack
from s4c.types import DraftTree, TargetOutput, Verdict
from s4c.verify import tree as trees

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
PREFILL_CHUNK = 512


def unsupported(config: Any) -> str | None:
    """Why this runtime cannot run a model of that configuration; None where it can."""
    if config.model_type not in FAMILIES:
        return f"model type {config.model_type!r} is not one of {', '.join(FAMILIES)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"activation {config.hidden_act!r} is not silu"
    if _rope_type(config) not in ROPE_TYPES:
        return f"rope type {_rope_type(config)!r} is not one of {', '.join(ROPE_TYPES)}"
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "rotary embeddings cover only a part of each head"
    return None


def _rope_type(config: Any) -> str:
    return str(config.rope_parameters.get("rope_type", "default"))


def layer_shape(config: Any) -> LayerShape:
    """The decoder layer that a configuration of the family describes."""
    qwen2 = config.model_type == "qwen2"
    bias = bool(getattr(config, "attention_bias", False))
    return LayerShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        eps=config.rms_norm_eps,
        qkv_bias=qwen2 or bias,
        out_bias=bias and not qwen2,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        head_norms=config.model_type == "qwen3",
    )


def inverse_frequencies(config: Any) -> tuple[Tensor, float]:
    """[head_dim / 2] float32 and the factor on cosines and sines, by the model's rope parameters."""
    if _rope_type(config) == "default":
        size = layer_shape(config).head_dim
        exponent = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[_rope_type(config)](config, torch.device("cpu"))
    return frequencies, float(factor)


class LlamaTarget(Target):
    """A Llama-family model with a static cache and packed weights.

    Args:
        config: the transformers configuration.
        tensors: the weights under their Hugging Face names, in any order; read once.
        spec: what the other rooms may know.
        dtype: of the weights and of the inputs of matrix products.
        device: where the model runs.

    Raises:
        UnsupportedModel: this runtime would compute the model wrongly.
        CorruptCheckpoint: a weight is missing or has another shape.
    """

    def __init__(
        self,
        config: Any,
        tensors: Iterable[tuple[str, Tensor]],
        spec: TargetSpec,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        reason = unsupported(config)
        if reason is not None:
            raise UnsupportedModel(f"the llama runtime cannot run {spec.name}: {reason}; use runtime 'hf'")
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.shape = layer_shape(config)
        frequencies, self._rope_scaling = inverse_frequencies(config)
        self._frequencies = frequencies.to(device)
        with torch.device("meta"):
            self.layers = nn.ModuleList(DecoderLayer(self.shape) for _ in range(config.num_hidden_layers))
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.head = Linear.of(self._embedding if config.tie_word_embeddings else torch.empty_like(self._embedding))
        self._load(tensors)
        self._cache = KVCache(len(self.layers), self.shape.kv_heads, self.shape.head_dim, dtype, device)

    def reserve(self, slots: int, length: int) -> None:
        self._cache.reserve(slots, length)

    def length(self, slot: int) -> int:
        return self._cache.lengths[slot]

    @torch.no_grad()
    def prefill(self, slot: int, tokens: Tensor) -> Tensor:
        self._cache.lengths[slot] = 0
        features = [torch.empty(0, self.spec.hidden_size, device=self.device)]
        for chunk in tokens.to(self.device)[None].split(PREFILL_CHUNK, dim=1) if tokens.shape[0] else ():
            count = chunk.shape[1]
            view = self._cache.view(slice(slot, slot + 1), count)
            offsets = torch.arange(count, device=self.device)[None]
            causal = torch.ones(1, count, count, dtype=torch.bool, device=self.device).tril()
            features.append(self._forward(chunk, offsets, causal, view)[0])
            self._cache.lengths[slot] += count
        return torch.cat(features)

    @torch.no_grad()
    def verify(self, tree: DraftTree) -> TargetOutput:
        batch, count = tree.tokens.shape
        ancestors = trees.ancestors(tree.parents)
        view = self._cache.view(slice(0, batch), count)
        features = self._forward(tree.tokens, ancestors.sum(-1) - 1, ancestors, view)
        return TargetOutput(logits=self.head(features).float(), features=features)

    def commit(self, verdict: Verdict) -> None:
        for slot, (path, accepted) in enumerate(zip(verdict.path, verdict.accepted.tolist(), strict=True)):
            self._cache.keep(slot, path[: accepted + 1])

    def move(self, source: int, destination: int) -> None:
        self._cache.move(source, destination)

    def embedding_weight(self) -> Tensor:
        return self._embedding

    def head_weight(self, rows: Tensor | None = None) -> Tensor:
        weight = self.head.dense()
        return weight if rows is None else weight[rows]

    def final_norm_weight(self) -> Tensor | None:
        return self.norm.weight

    def _forward(self, tokens: Tensor, depths: Tensor, visible: Tensor, view: CacheView) -> Tensor:
        """[B, N, d] features of new tokens at the given depths behind the committed rows."""
        positions = (view.lengths[:, None] + depths).clamp(max=self.spec.context_length - 1)
        rotary = Rotary(positions, self._frequencies, self._rope_scaling)
        mask = grouped_mask(view.mask(visible), self.shape, self.dtype)
        x = self._embedding[tokens].float()
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, view, index)
        features: Tensor = self.norm(x)
        return features

    def _load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put each weight into its place as it is read; a layer is packed once it is whole, so the peak stays low."""
        self.layers.to_empty(device=self.device)
        self.norm.to_empty(device=self.device)
        for parameter in self.layers.parameters():
            parameter.requires_grad_(False)
            if parameter.ndim > 1:
                parameter.data = torch.empty_like(parameter, dtype=self.dtype)
        layers = [self._layer_places(index) for index in range(len(self.layers))]
        waiting = [len(places) for places in layers]
        home = {name: (index, place) for index, places in enumerate(layers) for name, place in places.items()}
        home |= {name: (-1, place) for name, place in self._outer_places().items()}
        layers.clear()
        for name, tensor in tensors:
            if name not in home:
                continue
            index, place = home.pop(name)
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
                    pack(self.layers[index])
        if home:
            raise CorruptCheckpoint(
                f"the weights of {self.spec.name} lack {', '.join(sorted(home)[:3])} ({len(home)} in all)"
            )
        self.head.pack()

    def _outer_places(self) -> dict[str, Tensor]:
        """Where the weights outside the layers go, by their Hugging Face names."""
        places = {"model.embed_tokens.weight": self._embedding, "model.norm.weight": self.norm.weight.data}
        if self.head.weight.data_ptr() != self._embedding.data_ptr():
            places["lm_head.weight"] = self.head.weight.data
        return places

    def _layer_places(self, index: int) -> dict[str, Tensor]:
        """Where the weights of a layer go, by their Hugging Face names: parameters, or rows of fused ones."""
        shape = self.shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        layer = self.layers[index]
        assert isinstance(layer, DecoderLayer)
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
