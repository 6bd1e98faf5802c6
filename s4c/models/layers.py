"""The pieces of a Llama-family decoder, shared by the fast target and by drafters that learn such layers.

One code serves training and inference. `Linear.pack` turns the weights, once, into the layout that is
multiplied fastest: a pass over a few rows then costs little more than reading the weights.

The residual stream, norms, softmax and rotary angles are float32 whatever the weights are; only the weights
and the inputs of matrix products are of the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4c.models.adapter import RowTerm
from s4c.types import placed


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies packed weights of that dtype here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class Product(Protocol):
    """A packed weight."""

    def __call__(self, x: Tensor) -> Tensor:
        """[..., outputs] of [..., inputs]."""

    def dense(self) -> Tensor:
        """[outputs, inputs], the weight."""

    def rows(self, rows: Tensor) -> Tensor:
        """[R, inputs], some of its rows."""


class OneDNNProduct:
    """A weight packed for oneDNN, whose results depend on the number of rows in their last bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._dtype = weight.dtype
        # The second argument is the number of rows to optimise for: the size of a tree.
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(self._dtype), self._weight, self._bias, "none", [], ""
        )
        return product

    def dense(self) -> Tensor:
        return self._weight.to_dense()

    def rows(self, rows: Tensor) -> Tensor:
        return self.dense()[rows]


class Linear(nn.Module):
    """y = x W^T + b, the input cast to the dtype of W; `pack` makes it fast and final."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.packed: Product | None = None

    @classmethod
    def of(cls, weight: Tensor) -> Linear:
        """A linear layer around a given weight [outputs, inputs], not trained."""
        with torch.device("meta"):
            layer = cls(weight.shape[1], weight.shape[0])
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    def dense(self) -> Tensor:
        """[outputs, inputs], the weight, packed or not."""
        return self.weight.detach() if self.packed is None else self.packed.dense()

    def rows(self, rows: Tensor) -> Tensor:
        """[R, inputs], some rows of the weight."""
        return self.weight.detach()[rows] if self.packed is None else self.packed.rows(rows)

    def pack(self, dtype: torch.dtype, native: bool = False) -> None:
        """Cast to a dtype, and pack where that is faster; a packed weight can neither be trained nor saved.

        Args:
            dtype: of the weight and of the inputs of the product.
            native: whether the kernels of our own multiply.
        """
        self.requires_grad_(False)
        if native:
            from s4c.models.native.linear import NativeLinear

            self.packed = NativeLinear(self.weight, self.bias, dtype)
        else:
            self.to(dtype)
            if not packs(dtype, self.weight.device):
                return
            self.packed = OneDNNProduct(self.weight.detach(), self.bias)
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x: Tensor, term: RowTerm | None = None) -> Tensor:
        if self.packed is None:
            cast = x if torch.is_autocast_enabled(x.device.type) else x.to(self.weight.dtype)
            y = F.linear(cast, self.weight, self.bias)
        else:
            y = self.packed(x)
        return y if term is None else term(x, y)


class GrowingLinear:
    """y = x W^T in float32, where W gets its rows one after the other.

    Args:
        inputs: of x.
        most: rows of W.
        device: where it is.
    """

    def __init__(self, inputs: int, most: int, device: torch.device) -> None:
        self._weight = torch.zeros(most, inputs, device=device)
        self._count = 0

    def place(self, places: Sequence[int], rows: Tensor) -> None:
        """Put rows [R, inputs] at R places; no place before the highest stays empty."""
        self._weight[placed(places, self._weight.device)] = rows.float()
        self._count = max(self._count, max(places) + 1)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., rows so far] float32 of [..., inputs]."""
        return F.linear(x.float(), self._weight[: self._count])


class RMSNorm(nn.Module):
    """x / rms(x) * w, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


@dataclass(frozen=True)
class Join:
    """Makes one input of a pair, [..., 2d] -> [..., d] float32: its first half is normed.

    Attributes:
        norm: of the first half.
        linear: 2d -> d.
    """

    norm: RMSNorm
    linear: Linear

    def __call__(self, pair: Tensor) -> Tensor:
        first, second = pair.chunk(2, -1)
        joined: Tensor = self.linear(torch.cat([self.norm(first), second.float()], -1))
        return joined.float()


@dataclass(frozen=True)
class LayerShape:
    """Sizes and options of a decoder layer.

    Attributes:
        hidden: d. intermediate: size of the MLP. heads, kv_heads, head_dim: of the attention.
        eps: of the norms.
        qkv_bias: biases on queries, keys and values (Qwen2). out_bias, mlp_bias: on the other products.
        head_norms: RMS norms on the heads of queries and keys (Qwen3).
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers, by their names."""
        wide = self.heads * self.head_dim
        return {
            "qkv": (self.hidden, wide + 2 * self.kv_heads * self.head_dim),
            "out": (wide, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
        }

    @property
    def weights(self) -> int:
        """Numbers in the matrices of a layer."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        return self.hidden * (attention + 3 * self.intermediate)


class KeysValues(Protocol):
    """Where the keys and values of a pass go, and those that its rows attend to come from."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take [B, N, heads, head_dim] keys and values of a layer; give all, [B, heads, L, head_dim]."""


Terms = Mapping[str, RowTerm]
"""What an adapter adds to the products of a layer, by their names."""

NO_TERMS: Terms = {}


class Rotary:
    """Cosines and signed sines of the positions of a pass, [B, N, 1, head_dim] each."""

    def __init__(self, positions: Tensor, inverse_frequencies: Tensor, scaling: float = 1.0) -> None:
        angles = positions[..., None].float() * inverse_frequencies
        sine = angles.sin() * scaling
        self.cosine = (torch.cat([angles, angles], -1).cos() * scaling)[:, :, None]
        self.sine = torch.cat([-sine, sine], -1)[:, :, None]

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate heads [B, N, heads, head_dim]; pairs are (i, i + head_dim / 2)."""
        half = x.shape[-1] // 2
        return torch.addcmul(x * self.cosine, x.roll(half, -1), self.sine)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention: the query heads of a group become further rows of its key head.

    Args:
        query: [B, N, H, head_dim].
        key, value: [B, K, L, head_dim], K key heads.
        mask: [B, 1, H / K * N, L] as `grouped_mask` gives it, or None. With one of bool, keys and values that are
            not finite spoil the rows that see them alone.

    Returns:
        [B, N, H * head_dim].
    """
    batch, nodes, heads, size = query.shape
    kv_heads = key.shape[1]
    rows = query.view(batch, nodes, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, -1, size)
    if mask is not None and mask.dtype == torch.bool:
        out = _attend_apart(rows, key, value, mask)
    else:
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask)
    out = out.view(batch, kv_heads, heads // kv_heads, nodes, size).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, nodes, heads * size)


def _attend_apart(rows: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention in which a weight of 0 takes nothing of a value, while 0 times NaN is NaN."""
    scores = rows.float() @ key.float().transpose(-1, -2) * rows.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    unusable = ~value.isfinite()
    spoilt = mask.float() @ unusable.float() > 0
    out: Tensor = weights @ value.float().masked_fill(unusable, 0)
    return out.masked_fill(spoilt, torch.nan).to(value.dtype)


def grouped_mask(mask: Tensor | None, shape: LayerShape, dtype: torch.dtype) -> Tensor | None:
    """[B, N, L] bool -> [B, 1, H / K * N, L], what `attend` adds to the scores; bool as it is, where dtype is bool."""
    if mask is None:
        return None
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.repeat(1, shape.heads // shape.kv_heads, 1)[:, None]


class Attention(nn.Module):
    """Self-attention with fused query, key and value products."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.heads * shape.head_dim
        self.qkv = Linear(shape.hidden, width + 2 * shape.kv_heads * shape.head_dim, shape.qkv_bias)
        self.out = Linear(width, shape.hidden, shape.out_bias)
        if shape.head_norms:
            self.q_norm = RMSNorm(shape.head_dim, shape.eps)
            self.k_norm = RMSNorm(shape.head_dim, shape.eps)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: KeysValues | None, layer: int, terms: Terms
    ) -> Tensor:
        shape = self.shape
        fused = self.qkv(x, terms.get("qkv")).unflatten(-1, (shape.heads + 2 * shape.kv_heads, shape.head_dim))
        value = fused[:, :, shape.heads + shape.kv_heads :]
        query_key = fused[:, :, : shape.heads + shape.kv_heads]
        if shape.head_norms:
            query, key = query_key.split([shape.heads, shape.kv_heads], 2)
            query_key = torch.cat([self.q_norm(query), self.k_norm(key)], 2)
        query_key = rotary(query_key).to(value.dtype)
        query, key = query_key.split([shape.heads, shape.kv_heads], 2)
        if cache is None:
            keys, values = key.transpose(1, 2), value.transpose(1, 2)
        else:
            keys, values = cache.append(layer, key, value)
        product: Tensor = self.out(attend(query, keys, values, mask), terms.get("out"))
        return product


class MLP(nn.Module):
    """SwiGLU with fused gate and up products."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.gate_up = Linear(shape.hidden, 2 * shape.intermediate, shape.mlp_bias)
        self.down = Linear(shape.intermediate, shape.hidden, shape.mlp_bias)

    def forward(self, x: Tensor, terms: Terms) -> Tensor:
        gate, up = self.gate_up(x, terms.get("gate_up")).chunk(2, -1)
        product: Tensor = self.down(F.silu(gate) * up, terms.get("down"))
        return product


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.hidden, shape.eps)
        self.attention = Attention(shape)
        self.mlp_norm = RMSNorm(shape.hidden, shape.eps)
        self.mlp = MLP(shape)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        mask: Tensor | None,
        cache: KeysValues | None = None,
        layer: int = 0,
        terms: Terms = NO_TERMS,
    ) -> Tensor:
        """[B, N, d] float32 in and out.

        Args:
            mask: as `grouped_mask` gives it.
            cache: where keys and values go and come from; None attends within x.
            layer: which layer of the cache is this one's.
            terms: of an adapter.
        """
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache, layer, terms)
        mixed: Tensor = x + self.mlp(self.mlp_norm(x), terms)
        return mixed


def opened(layer: DecoderLayer) -> DecoderLayer:
    """A copy of a layer, packed or not, that gradients pass through; its own weights stay fixed."""
    with torch.device("meta"):
        copy = DecoderLayer(layer.attention.shape)
    for mine, its in zip(copy.modules(), layer.modules(), strict=True):
        if isinstance(mine, Linear):
            assert isinstance(its, Linear)
            mine.weight, mine.bias = nn.Parameter(its.dense()), its.bias
        elif isinstance(mine, RMSNorm):
            assert isinstance(its, RMSNorm)
            mine.weight = its.weight
    return copy.requires_grad_(False)


def pack(module: nn.Module, dtype: torch.dtype, native: bool = False) -> None:
    """Cast every linear layer of a module to a dtype and pack it; norms stay in float32."""
    for part in module.modules():
        if isinstance(part, Linear):
            part.pack(dtype, native)
