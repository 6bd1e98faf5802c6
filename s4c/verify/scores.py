"""Logits to laws, and laws to decisions: one implementation for target and drafter alike.

`Scores` holds the processors of the running requests and their noise (verify/noise.py). A token at position t of a
request with seed s is `argmax(log p + g(s, t))`; at temperature 0 there is no noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from s4c.types import DraftTree, SamplingParams, Verdict, placed
from s4c.verify import tree as trees
from s4c.verify.noise import TARGET_STREAM, NoiseTable

NOT_FINITE, ALL_EXCLUDED = -1, -2
"""What stands for the token of a node without a law: no child bears it."""

Judge = Callable[[DraftTree, Tensor, Sequence[float], Sequence[Tensor | None]], Verdict]
"""What a runtime may have a kernel for: the coupled rule (rules.py) where requests only cool. It is given a tree, its
logits [B, N, V], B temperatures, and B times L rows [V] of noise, of the tokens after nodes of depth 0 to L - 1; no
rows at all where all requests are greedy."""

MAXIMUM_BLOCK = 256
"""Tokens among which an index is looked for at once."""


class Scores:
    """The processors and the noise of a batch of requests, row b for the sequence in slot b.

    Args:
        params: B sampling parameters, their seeds set.
        tokens: B lists of the committed tokens, the root last.
        prompt_lengths: B numbers: how many of the tokens are the prompt's.
        noise: the noise rows, kept from round to round.
        judge: the runtime's kernel for the coupled rule; None where it has none.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        tokens: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        noise: NoiseTable,
        judge: Judge | None = None,
    ) -> None:
        self._judge = judge
        self.params = params
        self.tokens = tokens
        self.noise_table = noise
        self.vocab_size = noise.size
        self.device = noise.device
        self.greedy = all(p.temperature == 0 for p in params)
        self._prompt_lengths = prompt_lengths
        self.uses_history = any(p.needs_history for p in params)
        self._bias = self._bias_rows()

    def process(
        self,
        logits: Tensor,
        path_tokens: Tensor | None = None,
        path_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> Tensor:
        """Apply the processors; the softmax of the outcome is the law of the next token.

        Args:
            logits: [B, N, V'] float32.
            path_tokens: [B, M] int64, drafted tokens that the nodes may have above them, parents first.
            path_mask: [B, N, M] bool, which of them are on a node's own path (itself included).
            token_ids: [V'] int64, the target's token of each column of a reduced vocabulary; None for the
                whole vocabulary.

        Returns:
            [B, N, V'] float32, -inf where a token is excluded.
        """
        if self.uses_history:
            logits = self._penalise(logits, path_tokens, path_mask, token_ids)
        if self._bias is not None:
            logits = logits + (self._bias if token_ids is None else self._bias[..., token_ids])
        if self.uses_history:
            logits = self._ban(logits, path_tokens, path_mask, token_ids)
        return logits if self.greedy else self._warp(logits)

    def process_tree(self, logits: Tensor, tree: DraftTree) -> Tensor:
        """`process` for the logits [B, N, V] at the nodes of a tree, each node seeing its own path."""
        if not self.uses_history or tree.size == 1:
            return self.process(logits)
        # Probes are no text: their tokens may lie outside the vocabulary, and count for nothing.
        drafted = trees.ancestors(tree.parents)[:, :, 1:] & tree.candidate[:, None, 1:]
        return self.process(logits, tree.tokens[:, 1:].where(tree.candidate[:, 1:], 0), drafted)

    def choice(self, logits: Tensor, tree: DraftTree) -> Tensor:
        """[B, N] int64: the target's token after each node of a tree, as `choose` marks it; logits are [B, N, V]."""
        noise = None if self.greedy else self.noise(self.positions_after(tree))
        return choose(self.process_tree(logits, tree), noise)

    def judged(self, tree: DraftTree, logits: Tensor) -> Verdict | None:
        """The coupled rule's verdict by the runtime's kernel; None where it has none for these requests."""
        if self._judge is None or not self.only_cools:
            return None
        noise: list[Tensor | None] = []
        if not self.greedy:
            levels = 1 + max(max(trees.listed_depths(parents)) for _, parents, *_ in trees.lines(tree))
            noise = [self.noise_row(b, len(line) + d) for b, line in enumerate(self.tokens) for d in range(levels)]
        return self._judge(tree, logits, [request.temperature for request in self.params], noise)

    def positions_after(self, tree: DraftTree) -> Tensor:
        """[B, N] int64: the position of the token that follows each node."""
        lengths = placed([[len(tokens)] for tokens in self.tokens], tree.tokens.device)
        return lengths if tree.size == 1 else lengths + trees.depths(tree.parents)

    def noise(self, positions: Tensor, stream: int = TARGET_STREAM, token_ids: Tensor | None = None) -> Tensor | None:
        """[B, N, V'] float32: the noise of the tokens at [B, N] positions; None when all are greedy.

        The positions of a row lie within the depth of a tree of each other: all between them are looked up.
        """
        if self.greedy:
            return None
        first = positions.amin(1, keepdim=True)
        levels = int((positions - first).max()) + 1
        zero = torch.zeros(self.vocab_size, device=self.device)
        rows = []
        for request, start in zip(self.params, first[:, 0].tolist(), strict=True):
            for position in range(start, start + levels):
                greedy = request.temperature == 0
                row = zero if greedy else self.noise_table.row(seed_of(request), stream, position)
                rows.append(row if token_ids is None else row[token_ids])
        offsets = levels * torch.arange(len(self.params), device=positions.device)[:, None]
        return F.embedding(positions - first + offsets, torch.stack(rows))

    def noise_row(self, row: int, position: int) -> Tensor | None:
        """[V] float32: the noise of the target's tokens at one position of one request; None at temperature 0."""
        request = self.params[row]
        return self.noise_table.row(seed_of(request), TARGET_STREAM, position) if request.temperature > 0 else None

    @property
    def only_cools(self) -> bool:
        """Whether `process` does no more than divide by the temperature."""
        warps = any(p.temperature > 0 and (p.top_k or p.top_p < 1 or p.min_p > 0) for p in self.params)
        return not (warps or self.uses_history or self._bias is not None)

    def _warp(self, logits: Tensor) -> Tensor:
        """Temperature, top-k, top-p, min-p; rows at temperature 0 are left as they are."""
        column = placed([p.temperature or 1.0 for p in self.params], logits.device, logits.dtype)
        logits = logits / column[:, None, None]
        sampled = [p if p.temperature > 0 else SamplingParams() for p in self.params]
        if any(p.top_k for p in sampled):
            logits = keep_top_k(logits, [p.top_k for p in sampled])
        if any(p.top_p < 1 for p in sampled):
            logits = keep_top_p(logits, placed([p.top_p for p in sampled], logits.device, logits.dtype)[:, None])
        if any(p.min_p > 0 for p in sampled):
            floor = placed([p.min_p for p in sampled], logits.device, logits.dtype).log()[:, None, None]
            logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + floor, -torch.inf)
        return logits

    def _bias_rows(self) -> Tensor | None:
        if not any(p.logit_bias for p in self.params):
            return None
        bias = torch.zeros(len(self.params), 1, self.vocab_size, device=self.device)
        for row, request in enumerate(self.params):
            for token, value in request.logit_bias.items():
                bias[row, 0, token] = float(value)
        return bias

    def _penalise(
        self, logits: Tensor, path_tokens: Tensor | None, path_mask: Tensor | None, token_ids: Tensor | None
    ) -> Tensor:
        """Repetition, presence and frequency penalties, each node counting its own path."""
        batch, nodes, _ = logits.shape
        everything = torch.zeros(batch, self.vocab_size, device=self.device)
        generated = torch.zeros_like(everything)
        for row, (tokens, start) in enumerate(zip(self.tokens, self._prompt_lengths, strict=True)):
            history = placed(tokens, self.device)
            everything[row] = torch.bincount(history, minlength=self.vocab_size)
            generated[row] = torch.bincount(history[start:], minlength=self.vocab_size)
        everything = everything[:, None].repeat(1, nodes, 1)
        generated = generated[:, None].repeat(1, nodes, 1)
        if path_tokens is not None and path_mask is not None:
            where = path_tokens[:, None].expand(-1, nodes, -1)
            everything.scatter_add_(2, where, path_mask.float())
            generated.scatter_add_(2, where, path_mask.float())
        if token_ids is not None:
            everything, generated = everything[..., token_ids], generated[..., token_ids]

        def per_request(name: str) -> Tensor:
            return placed([getattr(p, name) for p in self.params], logits.device, logits.dtype)[:, None, None]

        repetition = per_request("repetition_penalty")
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(everything > 0, repeated, logits)
        logits = logits - per_request("presence_penalty") * (generated > 0)
        return logits - per_request("frequency_penalty") * generated

    def _ban(
        self, logits: Tensor, path_tokens: Tensor | None, path_mask: Tensor | None, token_ids: Tensor | None
    ) -> Tensor:
        """Forbid the last token of a bad word where the node's path ends with the tokens before it."""
        longest = max((len(word) for p in self.params for word in p.bad_words), default=1) - 1
        batch, nodes, _ = logits.shape
        suffix = self._suffixes(nodes, longest, path_tokens, path_mask)
        banned = torch.zeros(batch, nodes, self.vocab_size, dtype=torch.bool, device=self.device)
        for row, request in enumerate(self.params):
            for word in request.bad_words:
                before = placed(word[:-1], self.device, torch.int64)
                ends = (suffix[row, :, longest - len(before) :] == before).all(-1)
                banned[row, :, word[-1]] |= ends
        if token_ids is not None:
            banned = banned[..., token_ids]
        return logits.masked_fill(banned, -torch.inf)

    def _suffixes(self, nodes: int, length: int, path_tokens: Tensor | None, path_mask: Tensor | None) -> Tensor:
        """[B, N, length] int64: the last tokens up to and including each node; -1 before the beginning."""
        pad = [-1] * length
        history = placed([(pad + list(t))[len(t) :] for t in self.tokens], self.device, torch.int64)
        suffix = history[:, None].repeat(1, nodes, 1)
        if path_tokens is None or path_mask is None or length == 0:
            return suffix
        drafted = torch.where(path_mask, path_tokens[:, None], -1)
        line = torch.cat([suffix, drafted], -1)
        # A stable sort moves what is not on the path to the front and keeps the order of the rest.
        on_path = torch.cat([torch.ones_like(suffix, dtype=torch.bool), path_mask], -1)
        order = on_path.long().argsort(stable=True, dim=-1)
        return line.gather(-1, order)[..., -length:]


def seed_of(request: SamplingParams) -> int:
    """The seed of a request whose seed has been set."""
    assert request.seed is not None, "the engine sets the seed of a request before it is scheduled"
    return request.seed


def keep_top_k(logits: Tensor, top_k: Sequence[int]) -> Tensor:
    """Exclude what is below the k-th highest logit of its row; k = 0 excludes nothing.

    Args:
        logits: [B, N, V].
        top_k: B numbers.
    """
    size = logits.shape[-1]
    limits = [min(k, size) if k else size for k in top_k]
    largest = max((k for k in limits if k < size), default=0)
    if largest == 0:
        return logits
    highest = logits.topk(largest, dim=-1).values
    index = placed([min(k, largest) - 1 for k in limits], logits.device)
    floor = highest.gather(-1, index[:, None, None].expand(-1, logits.shape[1], 1))
    off = placed([k == size for k in limits], logits.device)[:, None, None]
    return logits.masked_fill((logits < floor) & ~off, -torch.inf)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Keep the smallest set of most probable tokens whose mass reaches top_p.

    A token stays when the mass of the tokens that are more probable is below top_p; tokens of equal
    probability stay or go together. Few tokens carry most of the mass, so the highest 64 are looked at
    first, and longer sorts serve the rows for which they are not enough. `log_softmax` computes each row by
    itself; `logsumexp` of a single row adds in another order, and plain decoding has single rows.

    Args:
        logits: [B, N, V].
        top_p: broadcastable to [B, N], in (0, 1]; 1 excludes nothing.
    """
    size = logits.shape[-1]
    log_p = logits.log_softmax(-1).flatten(0, -2)
    limits = top_p.expand(logits.shape[:-1]).flatten()
    floor = torch.full_like(log_p[:, :1], -torch.inf)
    pending = (limits < 1).nonzero()[:, 0]
    for count in sorted({min(count, size) for count in (64, 1024, size)}):
        if not len(pending):
            break
        highest = log_p[pending].topk(count, dim=-1).values
        before = F.pad(highest.exp().cumsum(-1)[:, :-1], (1, 0))
        inside = (before < limits[pending, None]).sum(-1, keepdim=True)
        floor[pending] = highest.gather(-1, inside.clamp(min=1) - 1)
        pending = pending[inside[:, 0] == count]
    return logits.masked_fill((log_p < floor).view_as(logits), -torch.inf)


def choose(processed: Tensor, noise: Tensor | None) -> Tensor:
    """[B, N] int64: the token of each node, `argmax(log p + g)`.

    A node without a law gets NOT_FINITE (NaN or +inf) or ALL_EXCLUDED (nothing but -inf). That is an error
    only where a token is taken from it: drafted text that is never committed may be absurd.
    """
    best, token = highest(processed if noise is None else processed + noise)
    return torch.where(best.isfinite(), token, torch.where(best == -torch.inf, ALL_EXCLUDED, NOT_FINITE))


def highest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and first index of the maximum of the last dimension, as `x.max(-1)`; NaN is the highest.

    Maxima of blocks first: a maximum alone is four times as fast as one with its index.
    """
    size = x.shape[-1]
    if size % MAXIMUM_BLOCK:
        value, index = x.max(-1)
        return value, index
    blocks = x.unflatten(-1, (-1, MAXIMUM_BLOCK))
    best, block = blocks.amax(-1).max(-1)
    inside = blocks.gather(-2, block[..., None, None].expand(*block.shape, 1, MAXIMUM_BLOCK))[..., 0, :].max(-1).indices
    return best, block * MAXIMUM_BLOCK + inside


def why_lawless(mark: int) -> str:
    """What to tell whose request ends because of NOT_FINITE or ALL_EXCLUDED."""
    what = "hold NaN or infinity: weights or activations overflow; try dtype float32"
    if mark == ALL_EXCLUDED:
        what = "exclude every token: let logit_bias and bad_words leave one"
    return f"nothing was sampled: the target's logits {what}"
