"""Speculative sampling with a draft model: a smaller language model of its own (arXiv 2302.01318).

    --drafter draft-model=DIRECTORY      any causal LM of the Llama family with the target's vocabulary
    s4c train --method draft-model       or a small Llama, distilled from the target

The draft model reads the text as any language model does, with a key-value cache of its own, and knows nothing of the
target's thoughts. A tree is grown level by level, and a level costs a pass over the nodes that are expanded there. What
the target accepts of them stays in the cache; accepted tokens that were not expanded (the last one of a full path, what
another drafter guessed) are read with the next root. So every token is read once.

With `stop=P` drafting ends where no path is more probable than P: the paper's draft length is fixed, but the chance
that a longer one is of use is known. Whether a level is drafted depends on the levels above it alone, so that what is
drawn there is still a draw from the drafter's law, and either rule stays lossless. Each sequence of a batch stops for
itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4c.drafters.base import (
    Drafter,
    DraftModel,
    Method,
    Prediction,
    Sequences,
    TrainingBatch,
    check_least,
    drafting_dtype,
    extend,
    finish,
)
from s4c.drafters.rows import Rows
from s4c.errors import UnsupportedModel
from s4c.models.base import Target
from s4c.models.layers import DecoderLayer, LayerShape, Linear, RMSNorm, Rotary, grouped_mask
from s4c.models.llama import LlamaTarget, unsupported
from s4c.models.loading import load_config, load_target, resolve
from s4c.models.native.rows import native_top_and_total
from s4c.models.stack import Rope, Stack, stack_class
from s4c.types import DraftTree, TargetOutput, Verdict
from s4c.verify.tree import root_only

DEPTH = 5
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class DraftModelConfig:
    """Sizes of a small Llama, and how it drafts.

    Attributes:
        layers: decoder layers.
        width: size of its hidden states.
        heads: attention heads; each has width / heads numbers, and keys and values of its own.
        intermediate: of the MLP; 0 means 8/3 of the width.
        draft_vocab: number of tokens that it can propose, the most frequent ones; 0: all. It reads all.
        rope_theta: base of the rotary angles.
        depth: levels that a tree has where none are asked for.
        stop: path probability below which it stops drafting; 0 drafts every level.
    """

    layers: int = 4
    width: int = 256
    heads: int = 4
    intermediate: int = 0
    draft_vocab: int = 8192
    rope_theta: float = 10000.0
    depth: int = DEPTH
    stop: float = 0.0

    def __post_init__(self) -> None:
        check_least(self, layers=1, width=1, heads=1, depth=1, rope_theta=1, draft_vocab=0, intermediate=0)
        if self.width % (2 * self.heads):
            raise ValueError(f"width is {self.width}; it must be a multiple of twice the {self.heads} heads")
        _check_stop(self.stop)

    @property
    def layer_shape(self) -> LayerShape:
        """The decoder layers."""
        intermediate = self.intermediate or -(-self.width * 8 // 3 // 32) * 32
        return LayerShape(self.width, intermediate, self.heads, self.heads, self.width // self.heads, eps=1e-5)


def _check_stop(stop: float) -> None:
    if not 0 <= stop < 1:
        raise ValueError(f"stop is {stop}; it must be a probability from 0 (never) to below 1")


class SmallLlama(DraftModel):
    """A small Llama that reads the target's embeddings through a linear layer and writes a reduced vocabulary.

    It starts with the principal axes of the target's embeddings, so that its own are as like them as they can be.

    Args:
        target: gives embeddings and the start of the LM head.
        config: sizes.
        token_ids: [V'] int64, the draft vocabulary.
    """

    token_ids: Tensor
    embedding: Tensor

    def __init__(self, target: Target, config: DraftModelConfig, token_ids: Tensor) -> None:
        super().__init__()
        self.config = config
        self.shape = config.layer_shape
        self.register_buffer("token_ids", token_ids)
        self.register_buffer("embedding", target.embedding_weight(), persistent=False)
        axes = principal_axes(target.embedding_weight(), config.width)
        self.entrance = Linear.of(axes / (_each_row(target.embedding_weight(), axes).square().mean().sqrt() + 1e-6))
        self.layers = nn.ModuleList(DecoderLayer(self.shape) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, self.shape.eps)
        rows = target.head_weight(token_ids).float() @ axes.T
        self.head = Linear.of(0.25 * rows / (rows.norm(dim=1).mean() + 1e-6))
        for name, weight in self.layers.named_parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.01 if name.endswith(("out.weight", "down.weight")) else 0.02)
        self.requires_grad_(True)

    def predictions(self, batch: TrainingBatch) -> list[Prediction]:
        count, device = batch.tokens.shape[1], batch.tokens.device
        x = self.entrance(self.embedding[batch.tokens].float()).float()
        rotary = Rotary(torch.arange(count, device=device)[None], self.frequencies(device))
        causal = torch.ones(1, count, count, dtype=torch.bool, device=device).tril()
        half = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x.dtype
        mask = grouped_mask(causal, self.shape, half)
        for layer in self.layers:
            x = layer(x, rotary, mask)
        return [Prediction(self.norm(x), self.head.weight, None, offset=1)]

    def frequencies(self, device: torch.device) -> Tensor:
        """[head_dim / 2]: rotary angles per position."""
        exponent = torch.arange(0, self.shape.head_dim, 2, device=device) / self.shape.head_dim
        return torch.full_like(exponent, self.config.rope_theta).pow(-exponent)

    def drafter(self, target: Target, dtype: torch.dtype | None = None) -> DraftModelDrafter:
        native, dtype, device = target.runtime == "native", dtype or drafting_dtype(target), target.device
        norm = copy.deepcopy(self.norm).to(device).requires_grad_(False)
        rope = Rope(self.frequencies(device))
        stack = stack_class(native)(self.config.layers, self.shape, rope, dtype, device, norm)
        for index, layer in enumerate(copy.deepcopy(self.layers).to(device)):
            assert isinstance(layer, DecoderLayer)
            stack.place(index, layer)
        head = copy.deepcopy(self.head).to(device)
        head.pack(dtype, native)
        embedding = _each_row(self.embedding, self.entrance.weight.detach()).to(device)
        token_ids = self.token_ids.to(device)
        return DraftModelDrafter(stack, embedding, head, token_ids, native, self.config.depth, self.config.stop)


def principal_axes(rows: Tensor, count: int) -> Tensor:
    """[count, d] float32: orthonormal axes along which rows [V, d] reach furthest; zeros past the d-th."""
    rows = rows.float()
    axes = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1).T[:count]
    return F.pad(axes, (0, 0, 0, count - len(axes))).contiguous()


def _each_row(rows: Tensor, weight: Tensor) -> Tensor:
    """[V, w] float32 of [V, d] of any dtype and [w, d], without a copy of all rows in float32."""
    return torch.cat([part.float() @ weight.float().T for part in rows.split(4096)])


def accepted(rows: Rows, slot: int, path: list[int]) -> tuple[list[int], list[int]]:
    """The rows of a slot that are of committed text now, and the tokens of an accepted path that have none."""
    tokens, parents = rows.tokens[slot].tolist(), rows.parents[slot].tolist()
    row_of = {(parents[row], tokens[row]): row for row in range(rows.text, len(tokens))}
    found = list(range(rows.counts[slot]))
    for read, token in enumerate(path):
        if (found[-1], token) not in row_of:
            return found, path[read:]
        found.append(row_of[found[-1], token])
    return found, []


class DraftModelDrafter(Drafter):
    """A language model that drafts.

    Args:
        stack: its layers.
        embedding: [V, w], its input embeddings.
        head: its LM head.
        token_ids: [V'] int64, the target's token of each row of the head; None for the whole vocabulary.
        native: whether the stack is that of the native kernels.
        depth: levels of a tree where none are asked for.
        stop: path probability below which drafting stops.

    For each slot it keeps the accepted tokens that the model has not read yet; the root follows them.
    """

    name = "draft-model"
    planned = True

    def __init__(
        self,
        stack: Stack,
        embedding: Tensor,
        head: Linear,
        token_ids: Tensor | None,
        native: bool,
        depth: int = DEPTH,
        stop: float = 0.0,
    ) -> None:
        self.default_tree = f"best:16x{depth}"
        self._stack, self._embedding, self._head, self._token_ids = stack, embedding, head, token_ids
        self._depth, self._stop = depth, stop
        self._select = native_top_and_total if native else None
        self._unread: dict[int, list[int]] = {}
        self._rows: Rows | None = None

    def reserve(self, slots: int, length: int) -> None:
        self._stack.reserve(slots, length)

    @torch.no_grad()
    def prefill(self, slot: int, tokens: Tensor, features: Tensor) -> None:
        self._stack.reserve(slot + 1, tokens.shape[0])
        self._stack.start(slot)
        for chunk in tokens.to(self._embedding.device).split(PREFILL_CHUNK) if tokens.shape[0] else ():
            chain = torch.arange(-1, chunk.shape[0] - 1, device=chunk.device)[None]
            self._stack.run(self._embedding[chunk][None], chain, slot)
            self._stack.keep(slot, list(range(chunk.shape[0])))
        self._unread[slot] = []

    @torch.no_grad()
    def propose(self, sequences: Sequences) -> DraftTree:
        plan, roots = sequences.plan.deepened(self._depth), sequences.roots
        if plan.nodes < 2:  # the model reads what is committed when it is asked again
            self._rows = None
            for slot, root in enumerate(roots):
                self._unread[slot] = [*self._unread[slot], root]
            return root_only(sequences.roots, sequences.device)
        rows = Rows.of([[*self._unread[slot], root] for slot, root in enumerate(roots)], sequences.device)
        builder = plan.grow(sequences.root_tokens, self._select)
        hidden = self._stack.run(self._embedding[rows.tokens], rows.parents)
        hidden = hidden.gather(1, rows.frontier[..., None].expand(-1, -1, hidden.shape[-1]))
        extend(sequences, builder, self._head(hidden).float(), self._token_ids)
        while builder.open and any(sure := (builder.confidence >= self._stop).tolist()):
            pending = rows.count
            rows.expand(builder)
            hidden = self._stack.run(self._embedding[rows.tokens[:, pending:]], rows.parents, pending=pending)
            logits = self._head(hidden).float()
            if not all(sure):
                logits[[row for row, goes_on in enumerate(sure) if not goes_on]] = -torch.inf
            extend(sequences, builder, logits, self._token_ids)
        self._rows = rows
        return finish(sequences, builder)

    def commit(self, tree: DraftTree, verdict: Verdict, output: TargetOutput) -> None:
        for slot, (_, tokens) in enumerate(verdict.lines):
            if self._rows is None:
                self._unread[slot] = self._unread[slot] + tokens[:-1]
                continue
            rows, self._unread[slot] = accepted(self._rows, slot, tokens[:-1])
            self._stack.keep(slot, rows)

    def move(self, source: int, destination: int) -> None:
        self._stack.move(source, destination)
        self._unread[destination] = self._unread.pop(source)


def create(target: Target, argument: str) -> DraftModelDrafter:
    """A language model as the drafter of another: `MODEL` or `MODEL,stop=P`.

    Raises:
        ValueError: the model leads nowhere, has another vocabulary than the target, or P is no probability.
        UnsupportedModel: it is not of the Llama family.
    """
    name, _, stop = argument.partition(",stop=")
    config: Any = load_config(resolve(name)).get_text_config()
    reason = unsupported(config)
    if reason is not None:
        raise UnsupportedModel(f"{name} cannot draft: {reason}; a draft model must be of the Llama family")
    if config.vocab_size != target.spec.vocab_size:
        raise ValueError(
            f"{name} has a vocabulary of {config.vocab_size} tokens and {target.spec.name} one of "
            f"{target.spec.vocab_size}; a draft model must have the target's"
        )
    native = target.runtime == "native"
    model = load_target(
        name, runtime="native" if native else "torch", dtype=drafting_dtype(target), device=str(target.device)
    )
    assert isinstance(model, LlamaTarget)
    stop_at = _probability(stop)
    drafter = DraftModelDrafter(model.stack, model.embedding_weight(), model.head, None, native, stop=stop_at)
    drafter.settings = f"{model.spec.fingerprint} {argument}"
    return drafter


def _probability(text: str) -> float:
    try:
        value = float(text or 0)
    except ValueError:
        raise ValueError(f"stop is {text!r}; it must be a probability from 0 (never) to below 1") from None
    _check_stop(value)
    return value


METHOD = Method(
    name=DraftModelDrafter.name,
    create=create,
    form="draft-model=MODEL[,stop=P]",
    config=DraftModelConfig,
    model=SmallLlama,
)
