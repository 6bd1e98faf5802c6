"""S4C: a multi-head autoregressive drafter (arXiv 2506.14158).

    f_t    the target's feature at position t, which predicts token t + 1
    h1_t = head 1 of (embedding of x_t, f_{t-1})         guesses f_t, so its logits predict x_{t+1}
    hi_t = head i of (embedding of x_t, h(i-1)_{t-1})    the same one step further from the truth

Each head joins the pair by a linear layer (2d -> d) and passes it through decoder layers with a key-value
cache of their own over past positions. At the root r, the last committed token, f_r is not known yet: head 1
reads (x_r, f_{r-1}) and drafts level 1 of the tree, head 2 reads a level-1 token with h1_r and drafts level 2,
and so on; past level H the last head goes on from its own output.

The last layer's feature is made to say the next token. What else the target knows stands clearer in the layers before
it, so head 1 may read `taps` of them as well: in place of f it then reads f + W [norm(tap 1); norm(tap 2); ...],
where W starts as zero.

The drafting is continuous: the features that the verification pass computed on the accepted path are the
inputs of the heads at those positions. Each head takes them in with the same call that drafts, so a round
costs one call per level, and nothing is computed twice.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

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
    noise_by_level,
)
from s4c.drafters.echo import Echo
from s4c.drafters.rows import Rows
from s4c.drafters.vocabulary import ContextVocabulary
from s4c.models.base import Target
from s4c.models.growing import GrowingRows
from s4c.models.layers import DecoderLayer, Join, LayerShape, Linear, RMSNorm, Rotary, grouped_mask, pack
from s4c.models.native.draft import NativeDraft
from s4c.models.native.growing import NativeGrowingRows
from s4c.models.native.rows import native_top_and_total
from s4c.models.stack import Rope, Stack, stack_class
from s4c.types import DraftTree, TargetOutput, Verdict, placed
from s4c.verify.tree import TreePlan, root_only

LM_HEADS = ("tied", "own", "low-rank")
PREFILL_CHUNK = 512
SILENCED = ("attention.out.weight", "mlp.down.weight")
"""What a layer adds to its input comes through these; with zeros it adds nothing."""

Part = TypeVar("Part", bound=nn.Module)


@dataclass(frozen=True)
class S4CConfig:
    """Sizes and options of an S4C drafter.

    Attributes:
        heads: H, the number of heads (the paper: 3).
        layers: decoder layers of each head.
        draft_vocab: number of tokens that the drafter can propose, the most frequent ones; 0: all.
        context_vocab: most tokens of its own text that a sequence may draft besides, with a tied LM head.
        echo: how loud the text itself is beside the heads, see echo.py; 0: silent.
        sharpness: what the log-probabilities of a draft are multiplied by: above 1 it is surer of what it finds
            probable, and `best` trees are narrower and deeper.
        lm_head: `tied` reads the target's own LM head, `own` trains a copy of it, `low-rank` trains a
            factorisation that starts from its best approximation of that rank.
        rank: of a low-rank LM head.
        normed_output: whether a head's output passes an RMS norm, as the target's features do.
        head_dim, intermediate: of the decoder layers; intermediate 0 means 8/3 of the hidden size.
        rope_theta: base of the rotary angles.
        taps: layers of the target that head 1 reads beside the feature, numbers from 1 with commas between them.
        window: how far back the heads look. They take in so many tokens of a prompt, and when twice as many are
            in their caches, the latest of them anew: rows further apart than in training tell them nothing.
        depth: levels that a tree has where none are asked for; 0 means H.
    """

    heads: int = 3
    layers: int = 1
    draft_vocab: int = 8192
    context_vocab: int = 256
    echo: float = 1.0
    sharpness: float = 1.0
    lm_head: str = "tied"
    rank: int = 128
    normed_output: bool = False
    head_dim: int = 64
    intermediate: int = 0
    rope_theta: float = 10000.0
    depth: int = 0
    taps: str = ""
    window: int = 256

    def __post_init__(self) -> None:
        check_least(self, heads=1, layers=1, rank=1, head_dim=2, window=1, rope_theta=1)
        check_least(self, draft_vocab=0, context_vocab=0, echo=0, sharpness=0.01, intermediate=0, depth=0)
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; it must be even, for rotary angles turn pairs of numbers")
        if self.lm_head not in LM_HEADS:
            raise ValueError(f"lm_head is {self.lm_head!r}; it must be one of {', '.join(LM_HEADS)}")
        try:
            fine = list(self.tapped) == sorted(set(self.tapped)) and min(self.tapped, default=1) > 0
        except ValueError:
            fine = False
        if not fine:
            raise ValueError(f"taps is {self.taps!r}; it must be ascending numbers from 1, such as 8,16,24")

    @property
    def tapped(self) -> tuple[int, ...]:
        """`taps` as numbers."""
        return tuple(int(number) for number in self.taps.split(",")) if self.taps else ()

    def layer_shape(self, hidden: int) -> LayerShape:
        """The decoder layers of a drafter for features of the given size: one key head for three query heads."""
        query_heads = max(1, hidden // self.head_dim)
        kv_heads = max(k for k in range(1, max(1, query_heads // 3) + 1) if query_heads % k == 0)
        intermediate = self.intermediate or -(-hidden * 8 // 3 // 32) * 32
        return LayerShape(hidden, intermediate, query_heads, kv_heads, self.head_dim, eps=1e-5)


class S4CHead(nn.Module):
    """One head: the join of embedding and feature, and decoder layers."""

    def __init__(self, config: S4CConfig, shape: LayerShape) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(shape.hidden, shape.eps)
        self.join = Linear(2 * shape.hidden, shape.hidden)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(config.layers))
        self.norm = RMSNorm(shape.hidden, shape.eps) if config.normed_output else None

    def entrance(self) -> Join:
        """What makes the layers' input of the pair (embedding, feature)."""
        return Join(self.embedding_norm, self.join)

    def output(self, x: Tensor) -> Tensor:
        """The feature that goes to the LM head and to the next head."""
        if self.norm is None:
            return x
        normed: Tensor = self.norm(x)
        return normed


class Blend(nn.Module):
    """What head 1 reads of the target, [..., d] of [..., d (1 + taps)]; it starts as the feature alone."""

    def __init__(self, hidden: int, taps: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(hidden, eps=1e-5) for _ in range(taps))
        self.mix = Linear(taps * hidden, hidden)
        nn.init.zeros_(self.mix.weight)

    def forward(self, features: Tensor) -> Tensor:
        feature, *taps = features.float().chunk(1 + len(self.norms), -1)
        blended: Tensor = feature + self.mix(torch.cat([norm(x) for norm, x in zip(self.norms, taps, strict=True)], -1))
        return blended


class S4CModel(DraftModel):
    """The heads, and the LM head that they share.

    Args:
        target: gives the embeddings, the LM head and the sizes.
        config: sizes and options.
        token_ids: [V'] int64, the draft vocabulary.
    """

    token_ids: Tensor
    embedding: Tensor
    head_rows: Tensor
    down: Linear
    up: Linear

    def __init__(self, target: Target, config: S4CConfig, token_ids: Tensor) -> None:
        super().__init__()
        if max(config.tapped, default=0) >= target.layers:
            raise ValueError(f"taps is {config.taps!r}; they must be below {target.layers}, the layers of the target")
        self.config = config
        self.taps = config.tapped
        self.beyond = bool(config.context_vocab) and config.lm_head == "tied"
        self.echo = config.echo
        self.shape = config.layer_shape(target.spec.hidden_size)
        self.heads = nn.ModuleList(S4CHead(config, self.shape) for _ in range(config.heads))
        self.register_buffer("token_ids", token_ids)
        self.register_buffer("embedding", target.embedding_weight(), persistent=False)
        head_rows = target.head_weight(token_ids).float()
        if config.lm_head == "low-rank":
            left, values, right = torch.svd_lowrank(head_rows, q=min(config.rank, *head_rows.shape), niter=4)
            self.down = Linear.of((values.sqrt() * right).T.contiguous())
            self.up = Linear.of((left * values.sqrt()).contiguous())
        elif config.lm_head == "own":
            self.up = Linear.of(head_rows.clone())
        else:
            self.register_buffer("head_rows", head_rows, persistent=False)
        for head in self.each_head():
            _initialise(head, target.final_norm_weight())
        if self.taps:
            self.blend = Blend(self.shape.hidden, len(self.taps))
        self.requires_grad_(True)

    def completed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Taps start as nothing, and further layers of a head as its first one, whose outputs nobody hears yet."""
        for name, weight in self.state_dict().items():
            layer = re.fullmatch(r"(heads\.\d+\.layers\.)[1-9]\d*(\..+)", name)
            if name.startswith("blend."):
                state.setdefault(name, weight)
            elif layer and (first := state.get(f"{layer[1]}0{layer[2]}")) is not None:
                silent = name.endswith(SILENCED)
                state.setdefault(name, torch.zeros_like(first) if silent else first.clone())
        return state

    def each_head(self) -> Iterator[S4CHead]:
        """The heads in drafting order."""
        for head in self.heads:
            assert isinstance(head, S4CHead)
            yield head

    def predictions(self, batch: TrainingBatch) -> list[Prediction]:
        embedding = self.embedding[batch.tokens].float()
        count = batch.tokens.shape[1]
        device = batch.tokens.device
        rotary = Rotary(torch.arange(count, device=device)[None], self.frequencies(device))
        causal = torch.ones(1, count, count, dtype=torch.bool, device=device).tril()
        feature = self.read(batch.features)
        predictions = []
        for head in self.each_head():
            x = head.entrance()(torch.cat([embedding, F.pad(feature.float(), (0, 0, 1, 0))[:, :-1]], -1))
            mask = grouped_mask(causal, self.shape, _product_dtype(x))
            for layer in head.layers:
                x = layer(x, rotary, mask)
            feature = head.output(x)
            predictions.append(Prediction(self.narrowed(feature), self.head(), feature, offset=1))
        return predictions

    def read(self, features: Tensor) -> Tensor:
        """[..., d] of the target's features [..., d (1 + taps)]: what head 1 reads."""
        blended: Tensor = self.blend(features) if self.taps else features
        return blended

    def narrowed(self, hidden: Tensor) -> Tensor:
        """[..., h] of [..., d]: what `head` reads."""
        narrow: Tensor = self.down(hidden) if self.config.lm_head == "low-rank" else hidden
        return narrow

    def head(self) -> Tensor:
        """[V', h]: the LM head, or the second factor of it."""
        return self.head_rows if self.config.lm_head == "tied" else self.up.weight

    def lm_head(self) -> nn.Module:
        """The LM head as layers that can be packed."""
        if self.config.lm_head == "tied":
            return Linear.of(self.head_rows.clone())
        parts = [self.down, self.up] if self.config.lm_head == "low-rank" else [self.up]
        return nn.Sequential(*copy.deepcopy(parts))

    def frequencies(self, device: torch.device) -> Tensor:
        """[head_dim / 2]: rotary angles per position."""
        exponent = torch.arange(0, self.config.head_dim, 2, device=device) / self.config.head_dim
        return torch.full_like(exponent, self.config.rope_theta).pow(-exponent)

    def drafter(self, target: Target, dtype: torch.dtype | None = None) -> S4CDrafter:
        return S4CDrafter(self, target, dtype or drafting_dtype(target))


def _product_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _initialise(head: S4CHead, final_norm: Tensor | None) -> None:
    """Start as the identity on the feature: the join passes it on and the layers add little."""
    hidden = head.join.weight.shape[0]
    for name, weight in head.named_parameters():
        if weight.ndim > 1:
            scale = 0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
            nn.init.normal_(weight, std=0.02 * scale)
    with torch.no_grad():
        head.join.weight[:, hidden:] += torch.eye(hidden)
        if head.norm is not None and final_norm is not None:
            head.norm.weight.fill_(float(final_norm.float().square().mean().sqrt()))


@dataclass
class _Slot:
    """What is known of a sequence.

    Attributes:
        tokens: accepted since the heads last ran; the root follows them, and only the next round names it.
        features: what head 1 reads, one position before each token that the heads may have to take in anew, and before
            the root.
        carry: [H - 1, d], the outputs of heads 1 .. H - 1 at the last position in their caches.
    """

    tokens: list[int]
    features: GrowingRows
    carry: Tensor


class S4CDrafter(Drafter):
    """S4C at inference: the heads on packed weights, their caches, the trees.

    Args:
        model: the trained heads; a copy of its weights is taken.
        target: the model that is drafted for.
        dtype: of the weights.
    """

    name = "s4c"
    planned = True

    def __init__(self, model: S4CModel, target: Target, dtype: torch.dtype) -> None:
        self.device = target.device
        self.config = model.config
        self.default_depth = model.config.depth or model.config.heads
        self.default_tree = f"best:16x{self.default_depth + 2}"
        self.token_ids = model.token_ids.to(self.device)
        self._embedding = target.embedding_weight()
        self.taps = model.taps
        self._blend = _frozen(model.blend, self.device) if self.taps else nn.Identity()
        self.lm_head = model.lm_head().to(self.device).requires_grad_(False)
        native = target.runtime == "native"
        self._rows = NativeGrowingRows if native else GrowingRows
        rope = Rope(model.frequencies(self.device))
        self._stacks: list[Stack] = []
        for trained in model.each_head():
            head = _frozen(trained, self.device)
            stack = stack_class(native)(
                len(head.layers), model.shape, rope, dtype, self.device, head.norm, head.entrance()
            )
            for index, layer in enumerate(head.layers):
                assert isinstance(layer, DecoderLayer)
                stack.place(index, layer)
            self._stacks.append(stack)
        for part in (self.lm_head, self._blend):
            pack(part, dtype, native)
        self._native = NativeDraft(self._stacks, self.lm_head, self._embedding, self.token_ids) if native else None
        self._select = native_top_and_total if native else None
        self._context: ContextVocabulary | None = None
        if model.beyond and self.token_ids.shape[0] < target.spec.vocab_size:
            self._context = ContextVocabulary(target, self.token_ids, self.config.context_vocab)
        self._echo = Echo(self.config.echo, target.spec.vocab_size, self.device) if self.config.echo else None
        self._slots: dict[int, _Slot] = {}

    def reserve(self, slots: int, length: int) -> None:
        for stack in self._stacks:
            stack.reserve(slots, min(length, 2 * self.config.window))

    @torch.no_grad()
    def prefill(self, slot: int, tokens: Tensor, features: Tensor) -> None:
        before = F.pad(features.float(), (0, 0, 1, 0))[-self.config.window - 1 :]
        self._take_in(slot, tokens.to(self.device), self._blend(before))
        for memory in self._memories():
            memory.start(slot, tokens.tolist())

    def _memories(self) -> list[ContextVocabulary | Echo]:
        """What is kept of the text of each slot beside the caches of the heads."""
        return [memory for memory in (self._context, self._echo) if memory is not None]

    def _remember(self, slot: int) -> None:
        for memory in self._memories():
            memory.add(slot, self._slots[slot].tokens)

    @torch.no_grad()
    def _take_in(self, slot: int, tokens: Tensor, features: Tensor) -> None:
        """Fill the caches of a slot with the last `window` of tokens [n].

        Args:
            features: [n + 1, d], what head 1 reads one position before each of them and before the root.
        """
        window = self.config.window
        tokens, features = tokens[-window:], features[-window - 1 :]
        self.reserve(slot + 1, tokens.shape[0])
        for stack in self._stacks:
            stack.start(slot)
        state = _Slot([], self._rows(features), features.new_zeros(len(self._stacks) - 1, features.shape[1]))
        for start in range(0, tokens.shape[0], PREFILL_CHUNK):
            chunk = tokens[None, start : start + PREFILL_CHUNK]
            rows = Rows(chunk, [chunk.shape[1]])
            inputs = features[None, start : start + chunk.shape[1]]
            outputs = self._run_remaining([], rows, inputs, state.carry[None], slot)
            (state.carry,) = self._carry(rows, outputs)
            self._settle([state], rows.counts, slot)
        self._slots[slot] = state

    def propose(self, sequences: Sequences) -> DraftTree:
        plan = sequences.plan.deepened(self.default_depth)
        for slot, line in enumerate(sequences.tokens if plan.nodes > 1 else ()):
            if self._stacks[0].lengths[slot] + len(self._slots[slot].tokens) >= 2 * self.config.window:
                self._remember(slot)
                text = placed(line[-1 - self.config.window : -1], self.device, torch.int64)
                features = self._slots[slot].features
                self._take_in(slot, text, features.last(len(features)))
        states = [self._slots[slot] for slot in range(len(sequences.tokens))]
        for state, line in zip(states, sequences.tokens, strict=True):
            state.tokens.append(line[-1])
        if plan.nodes < 2:  # the heads take in what is committed when they are asked again
            return root_only(sequences.roots, sequences.device)
        unread = [state.tokens for state in states]
        for slot in range(len(states)):
            self._remember(slot)
        noise = noise_by_level(sequences, plan) if self._native is not None else None
        if self._native is not None and self._native.grows(plan) and noise is not None:
            temperatures = [request.temperature for request in sequences.scores.params]
            if self.config.sharpness != 1:
                temperatures = [(temperature or 1.0) / self.config.sharpness for temperature in temperatures]
            further = self._context.kernels(len(states)) if self._context else [None] * len(states)
            texts = self._echo.kernels(len(states)) if self._echo else None
            inputs = [state.features for state in states if isinstance(state.features, NativeGrowingRows)]
            carry = [state.carry for state in states]
            tree = self._native.grow(plan, unread, inputs, carry, temperatures, noise, further, texts)
        else:
            tree = self._grow(sequences, plan, Rows.of(unread, self.device), states)
        self._settle(states, [len(line) for line in unread], 0)
        return tree

    @torch.no_grad()
    def _grow(self, sequences: Sequences, plan: TreePlan, rows: Rows, states: Sequence[_Slot]) -> DraftTree:
        """The tree of a round, level by level; what `NativeDraft.grow` is tested against."""
        lines = [state.features.last(len(state.tokens)) for state in states]
        features, carry = pad_sequence(lines, batch_first=True), torch.stack([state.carry for state in states])
        builder = plan.grow(sequences.root_tokens, self._select)
        outputs: list[Tensor] = []
        while builder.open:
            if builder.level:
                rows.expand(builder)
            if len(outputs) < len(self._stacks):
                inputs = self._inputs(rows, outputs, features, carry)
                outputs.append(self._run(len(outputs), rows, inputs))
            else:
                width = rows.frontier.shape[1]
                inputs = _gather_rows(outputs[-1], rows.parents[:, -width:])
                outputs[-1] = torch.cat([outputs[-1], self._run(-1, rows, inputs)], 1)
            logits, ids = self._logits(_gather_rows(outputs[-1], rows.frontier))
            logits = self._echo.joined(logits, ids, builder) if self._echo else logits
            extend(sequences, builder, self.config.sharpness * logits, ids)
        outputs = self._run_remaining(outputs, rows, features, carry)
        for state, brought in zip(states, self._carry(rows, outputs), strict=True):
            state.carry = brought
        return finish(sequences, builder)

    def _logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[B, W, V''] float32 of outputs [B, W, d], and [V''] int64, the tokens of its columns."""
        logits = self.lm_head(hidden).float()
        if self._context is None:
            return logits, self.token_ids
        further, ids = self._context.logits(hidden)
        return torch.cat([logits, further], -1), torch.cat([self.token_ids, ids])

    def commit(self, tree: DraftTree, verdict: Verdict, output: TargetOutput) -> None:
        for slot, (path, tokens) in enumerate(verdict.lines):
            state = self._slots[slot]
            state.tokens += tokens[:-1]
            if self.taps:
                state.features.append(self._blend(output.features[slot, path]))
            else:
                state.features.take(output.features, slot, path)

    def move(self, source: int, destination: int) -> None:
        for stack in self._stacks:
            stack.move(source, destination)
        self._slots[destination] = self._slots.pop(source)
        for memory in self._memories():
            memory.move(source, destination)

    def _inputs(self, rows: Rows, outputs: list[Tensor], features: Tensor, carry: Tensor) -> Tensor:
        """[B, R, d]: what the next head reads beside the embeddings, one position before each row.

        Head 1 reads the target's features. The others read the head before them, whose output at the last
        position of the round before was carried over.
        """
        if not outputs:
            return features
        before = torch.cat([carry[:, len(outputs) - 1 : len(outputs)], outputs[-1]], 1)
        return _gather_rows(before, rows.parents + 1)

    def _run(self, index: int, rows: Rows, inputs: Tensor, first_slot: int = 0) -> Tensor:
        """[B, R', d]: one head over the last R' rows of a round, as many as there are inputs."""
        pending = rows.count - inputs.shape[1]
        pairs = torch.cat([self._embedding[rows.tokens[:, pending:]].to(inputs.dtype), inputs], -1)
        return self._stacks[index].run(pairs, rows.parents, first_slot, pending)

    def _run_remaining(
        self, outputs: list[Tensor], rows: Rows, features: Tensor, carry: Tensor, first_slot: int = 0
    ) -> list[Tensor]:
        """Run the heads that have not run yet, so that the caches of all heads stay level."""
        while len(outputs) < len(self._stacks):
            outputs.append(self._run(len(outputs), rows, self._inputs(rows, outputs, features, carry), first_slot))
        return outputs

    def _carry(self, rows: Rows, outputs: list[Tensor]) -> Tensor:
        """[B, H - 1, d]: what all heads but the last gave at the last committed row."""
        last = [torch.stack([out[b, n - 1] for b, n in enumerate(rows.counts)]) for out in outputs[:-1]]
        return torch.stack(last, 1) if last else outputs[0][:, :0]

    def _settle(self, states: Sequence[_Slot], counts: Sequence[int], first_slot: int) -> None:
        """Keep the committed rows in the caches."""
        for offset, (state, count) in enumerate(zip(states, counts, strict=True)):
            for stack in self._stacks:
                stack.keep(first_slot + offset, list(range(count)))
            state.tokens = []


def _frozen(part: Part, device: torch.device) -> Part:
    """A copy for inference."""
    return copy.deepcopy(part).to(device).eval().requires_grad_(False)


def _gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """[B, W, d]: rows [B, W] of x [B, R, d]."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


METHOD = Method(name=S4CDrafter.name, config=S4CConfig, model=S4CModel)
