"""SDSAT: drafting with semantic adaptive tokens (arXiv 2403.18647).

The target's vocabulary is extended by k adaptive tokens that mean "the first, second, ... token yet unknown". They
stand as probes behind a token at position t: probe j at position t + j sees the text up to t and the probes before
it, and its output is a guess of token t + j + 1 (that of t + 1 is the target's own). So one pass of the target
drafts k tokens at once; each is guessed without knowing the ones before it, by a law of its own position.

A round hangs probes below the root, and the next round drafts a tree from their k laws (the paper's two steps); with
`fused`, the nodes of that tree that are most likely to be the last accepted ones (of drawn trees: that have the most
nodes below them) carry probes as well, and every round drafts. Whatever the last accepted node, the deepest node above
it with probes tells what to draft next.

The target's own weights stay as they are. The adaptive tokens have embeddings and low-rank terms (models/adapter.py)
that act at their rows alone, so the outputs of all other tokens are those of the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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
    extend,
    finish,
)
from s4c.errors import UnsupportedModel
from s4c.models.adapter import PRODUCTS, Adapter, LowRank, RowTerm
from s4c.models.base import Target
from s4c.models.layers import Rotary, grouped_mask
from s4c.models.llama import LlamaTarget, OpenModel
from s4c.models.native.rows import native_top_and_total
from s4c.types import DraftTree, TargetOutput, Verdict, placed
from s4c.verify.tree import TreePlan, ancestors, lines, root_only

if TYPE_CHECKING:
    from typing_extensions import Self

FEWEST_TOKENS, MOST_TOKENS = 3, 13


@dataclass(frozen=True)
class SDSATConfig:
    """Sizes and options of an SDSAT drafter.

    Attributes:
        tokens: k, the number of adaptive tokens.
        rank: of the low-rank terms; 0 trains the embeddings of the adaptive tokens alone.
        groups: most groups of adaptive tokens that training places in a row of text.
        fused: most nodes of a tree of candidates that carry probes; 0 drafts and verifies in two steps.
    """

    tokens: int = 5
    rank: int = 16
    groups: int = 32
    fused: int = 1

    def __post_init__(self) -> None:
        if not FEWEST_TOKENS <= self.tokens <= MOST_TOKENS:
            raise ValueError(f"tokens is {self.tokens}; it must be from {FEWEST_TOKENS} to {MOST_TOKENS}")
        check_least(self, rank=0, groups=1, fused=0)


class SDSATModel(DraftModel):
    """The embeddings and low-rank terms of the adaptive tokens.

    Args:
        target: its layers are what is trained through and drafted with.
        config: sizes and options.
        token_ids: [V] int64, the whole vocabulary.

    Raises:
        UnsupportedModel: the target's runtime is not one of the fast ones.
    """

    token_ids: Tensor

    def __init__(self, target: Target, config: SDSATConfig, token_ids: Tensor) -> None:
        super().__init__()
        if not isinstance(target, LlamaTarget):
            raise UnsupportedModel(
                f"{target.spec.name} runs on {target.runtime}; SDSAT needs the runtime native or torch"
            )
        assert len(token_ids) == target.spec.vocab_size, "probes speak the whole vocabulary"
        self.config = config
        self.shape = target.shape
        self.register_buffer("token_ids", token_ids)
        embedding = target.embedding_weight().float()
        scatter = 0.2 * embedding.std(0) * torch.randn(config.tokens, embedding.shape[1], device=embedding.device)
        self.embeddings = nn.Parameter(embedding.mean(0) + scatter)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, (inputs, outputs) in self.shape.products.items() if config.rank else ():
            self.down[name] = nn.Parameter(torch.randn(target.layers, config.rank, inputs) / inputs**0.5)
            self.up[name] = nn.Parameter(torch.zeros(target.layers, outputs, config.rank))
        self._target = target
        self._opened: OpenModel | None = None

    def train(self, mode: bool = True) -> Self:
        """Training needs the target's layers: a runtime that cannot give them says so before it begins."""
        if mode:
            self.opened()
        return super().train(mode)

    def opened(self) -> OpenModel:
        """The model whose pass is trained through."""
        if self._opened is None:
            self._opened = self._target.open()
        return self._opened

    def predictions(self, batch: TrainingBatch) -> list[Prediction]:
        return self.read(batch)[1]

    def read(self, batch: TrainingBatch) -> tuple[Tensor, list[Prediction]]:
        """The features of the text, [B, T, d], and what the groups that follow some of its tokens guess."""
        at, exists = self._places(batch)
        text, hidden = self._run(batch.tokens, at)
        row = torch.arange(len(at), device=at.device)[:, None].expand_as(at)[exists]
        made = torch.zeros_like(batch.tokens, dtype=torch.bool)
        made[row, at[exists]] = True
        predictions = []
        for number in range(self.config.tokens):
            spread = hidden.new_zeros(*batch.tokens.shape, hidden.shape[-1])
            spread = spread.index_put((row, at[exists]), hidden[:, :, number][exists])
            predictions.append(Prediction(spread, self.opened().head, None, offset=number + 2, made=made))
        return text, predictions

    def adapter(self) -> Adapter:
        """A copy of the present weights, as a target takes them."""

        def taken(weight: Tensor) -> Tensor:
            return weight.detach().to(self._target.device, torch.float32, copy=True)

        layers = [
            {name: LowRank(taken(self.down[name][i]), taken(self.up[name][i])) for name in PRODUCTS}
            for i in range(self._target.layers if self.config.rank else 0)
        ]
        return Adapter(taken(self.embeddings), layers)

    def drafter(self, target: Target, dtype: torch.dtype | None = None) -> SDSATDrafter:
        return SDSATDrafter(self.config, self.adapter(), target)

    def _places(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Where the groups stand: [B, G] int64, the tokens that they follow, and [B, G] bool, whether they exist.

        A group follows the last token of the prompt or a later one, and has a token to guess. In training the places
        are drawn anew for each batch; in validation they are always the same.
        """
        index = torch.arange(batch.tokens.shape[1])
        answer_start, length = batch.answer_start.cpu()[:, None], batch.length.cpu()[:, None]
        allowed = (index >= answer_start - 1) & (index + 2 < length)
        generator = None if self.training else torch.Generator().manual_seed(0)
        drawn = torch.rand(allowed.shape, generator=generator).where(allowed, -1.0)
        count = max(1, min(self.config.groups, int(allowed.sum(1).max())))
        at = drawn.topk(count, dim=1).indices
        device = batch.tokens.device
        return at.to(device), allowed.gather(1, at).to(device)

    def _run(self, tokens: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """The features of a text [B, T] and of the groups that follow its tokens at [B, G]: [B, T, d], [B, G, k, d].

        The text takes the same pass as without groups. Where the opened model is fixed its rows are constants, and only
        those of the groups are differentiated.
        """
        opened, shape, size = self.opened(), self.shape, self.config.tokens
        batch, count, device = *tokens.shape, tokens.device
        rope, index = opened.stack.rope, torch.arange(count, device=device)
        x = F.embedding(tokens, opened.embedding).float()
        groups = self.embeddings.repeat(at.shape[1], 1).expand(batch, -1, -1)
        places = (at[..., None] + torch.arange(1, size + 1, device=device)).flatten(1)
        text, probes = (Rotary(p, rope.frequencies, rope.scaling) for p in (index[None], places))
        dtype = _product_dtype(opened.head)
        causal = grouped_mask((index <= index[:, None])[None], shape, dtype)
        mask = grouped_mask(visible(at, size, count), shape, dtype)
        for number, layer in enumerate(opened.stack.layers):
            seen = _Seen()
            x = layer(x, text, causal, seen)
            groups = layer(groups, probes, mask, _Behind(seen), terms=self._terms(number))
        return opened.stack.norm(x), opened.stack.norm(groups).unflatten(1, (-1, size))

    def _terms(self, layer: int) -> dict[str, RowTerm]:
        return {name: RowTerm(LowRank(self.down[name][layer], self.up[name][layer])) for name in self.down}


def visible(at: Tensor, size: int, count: int) -> Tensor:
    """What the groups of a training pass see: the text up to the token that they follow, and themselves up to here.

    Args:
        at: [B, G] int64, the tokens that the groups follow.
        size: k, rows of a group.
        count: T, tokens of the text.

    Returns:
        [B, G k, T + G k] bool.
    """
    batch, groups = at.shape
    text = torch.arange(count, device=at.device) <= at.repeat_interleave(size, 1)[..., None]
    inside = torch.ones(size, size, dtype=torch.bool, device=at.device).tril()
    own = torch.block_diag(*[inside] * groups).bool()
    return torch.cat([text, own.expand(batch, -1, -1)], 2)


class _Seen:
    """Takes in the keys and values of a pass, which attends to nothing else."""

    keys: Tensor
    values: Tensor

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys.transpose(1, 2), values.transpose(1, 2)
        return self.keys, self.values


class _Behind:
    """Puts the keys and values of a pass behind those of another."""

    def __init__(self, seen: _Seen) -> None:
        self.seen = seen

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        new = keys.transpose(1, 2), values.transpose(1, 2)
        return torch.cat([self.seen.keys, new[0]], 2), torch.cat([self.seen.values, new[1]], 2)


def _product_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class SDSATDrafter(Drafter):
    """SDSAT at inference: probes in the target's own pass, and trees from what they said.

    Args:
        config: sizes and options.
        adapter: what the target takes for the adaptive tokens.
        target: the model that is drafted for.

    Raises:
        UnsupportedModel: the target's runtime cannot adapt single rows.
    """

    name = "sdsat"

    def __init__(self, config: SDSATConfig, adapter: Adapter, target: Target) -> None:
        target.adapt(adapter)
        self.config = config
        self.adapter = adapter
        self.target = target
        self.default_tree = f"best:16x{config.tokens}"
        self.planned = config.fused > 0
        self.probes = max(config.fused, 1) * config.tokens
        self._first = target.spec.vocab_size
        self._select = native_top_and_total if target.runtime == "native" else None
        self._silence = torch.empty(0, self._first, device=target.device)
        self._laws: dict[int, Tensor] = {}
        """By slot, where probes said something: [L, V], of the L tokens after the root, L from 1 to k."""

    def prefill(self, slot: int, tokens: Tensor, features: Tensor) -> None:
        self._laws.pop(slot, None)

    def propose(self, sequences: Sequences) -> DraftTree:
        if sequences.plan.nodes == 1 and not self._laws:
            return root_only(sequences.roots, sequences.device)
        laws = [self._laws.get(slot, self._silence) for slot in range(len(sequences.tokens))]
        self.target.adapt(self.adapter)
        tree = self._candidates(sequences, sequences.plan.with_probes(self.config.tokens), laws)
        tree = sequences.plan.worth_checking(tree)
        if sequences.plan.deepened(self.config.tokens).nodes < 2:
            return tree
        return hang(tree, self._carriers(tree, laws), self._first, self.config.tokens)

    def commit(self, tree: DraftTree, verdict: Verdict, output: TargetOutput) -> None:
        self._laws = {}
        if tree.size == 1:
            return
        for slot, ((tokens, parents, *_), (path, _)) in enumerate(zip(lines(tree), verdict.lines, strict=True)):
            groups = {parents[column]: column for column, token in enumerate(tokens) if token == self._first}
            if said := self._said(groups, path):
                self._laws[slot] = output.logits[slot, said].clone()

    def move(self, source: int, destination: int) -> None:
        self._laws.pop(destination, None)
        if source in self._laws:
            self._laws[destination] = self._laws.pop(source)

    def _candidates(self, sequences: Sequences, plan: TreePlan, laws: Sequence[Tensor]) -> DraftTree:
        """A tree from the laws of the positions.

        Where a sequence has no law, as for the levels that only others reach, its children have probability 0.
        """
        deepest = max(len(law) for law in laws)
        if deepest == 0:
            return root_only(sequences.roots, sequences.device)
        levels = torch.stack([F.pad(law, (0, 0, 0, deepest - len(law)), value=-torch.inf) for law in laws])
        builder = replace(plan, depth=min(plan.depth, deepest)).grow(sequences.root_tokens, self._select)
        while builder.open:
            extend(sequences, builder, levels[:, builder.level, None])
        return finish(sequences, builder)

    def _carriers(self, tree: DraftTree, laws: Sequence[Tensor]) -> Tensor:
        """[B, G] int64, the columns of the nodes that are to carry probes; -1 for none."""
        if self.config.fused:
            chance = ends(tree)
            if tree.log_q is not None:
                # What is drawn below a carrier's probes may not depend on them: a law that is a function of the draws
                # is not one that they were drawn from. So the nodes with the most below them, whatever was drawn.
                below = ancestors(tree.parents).sum(1)
                chance = below.to(chance.dtype).where(tree.sampled[:, None], chance)
            chance, nodes = chance.topk(min(self.config.fused, tree.size), dim=1)
            return nodes.where(chance > 0, -1)
        undrafted = [len(law) == 0 for law in laws]
        return placed([[0 if none else -1] for none in undrafted], tree.tokens.device)[:, : any(undrafted)]

    def _said(self, groups: dict[int, int], path: list[int]) -> list[int]:
        """Columns of the probes that speak of what follows the token behind a path, nearest first.

        Those of a node some steps before the end of the path have spoken of as many committed tokens already.
        """
        size = self.config.tokens
        for behind, node in enumerate(reversed(path)):
            if node in groups:
                return list(range(groups[node] + min(behind, size), groups[node] + size))
        return []


def ends(tree: DraftTree) -> Tensor:
    """[B, N]: how likely each node is the last accepted one, by the laws of the drafter that the tree is of."""
    assert tree.belief is not None
    reached = tree.belief[:, 0].exp().where(tree.candidate | (tree.parents < 0), 0.0)
    onwards = torch.zeros_like(reached).scatter_add(1, tree.parents[:, 1:], reached[:, 1:])
    return reached - onwards


def hang(tree: DraftTree, below: Tensor, first: int, count: int) -> DraftTree:
    """Hang a chain of probes below some nodes of a tree.

    Args:
        below: [B, G] int64, their columns; -1 adds padding in place of a chain.
        first: token of the first probe; those after it count on.
        count: probes of a chain.
    """
    chains = below.shape[1]
    if chains == 0:
        return tree
    number = torch.arange(count, device=below.device).repeat(chains)
    above = tree.size - 1 + torch.arange(chains * count, device=below.device)
    carrier = below.repeat_interleave(count, 1)
    tokens = (first + number).where(carrier >= 0, 0)
    parents = carrier.where(number == 0, above).where(carrier >= 0, 0)
    return DraftTree(
        tokens=torch.cat([tree.tokens, tokens], 1),
        parents=torch.cat([tree.parents, parents], 1),
        candidate=F.pad(tree.candidate, (0, chains * count)),
        sampled=tree.sampled,
        log_q=None if tree.log_q is None else F.pad(tree.log_q, (0, 0, 0, chains * count)),
    )


METHOD = Method(name=SDSATDrafter.name, config=SDSATConfig, model=SDSATModel)
