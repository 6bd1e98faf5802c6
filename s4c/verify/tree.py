"""Draft trees: their geometry, and how they are grown.

A tree is its parents, [B, N]. Depths and the ancestor mask follow from them without a loop over nodes.

A drafter grows a tree level by level. `TreePlan` says which shape is wanted, and `grow` gives the builder
that the drafter drives:

    builder = plan.grow(roots)
    while builder.open:
        scores = ...                        # [B, W, V'] of the children of builder.frontier
        builder.extend(scores, token_ids)   # picks children and the next frontier
    tree = builder.finish()

`comb` is the tree of S4C (arXiv 2506.14158): down along the most probable child, sideways by the k most
probable ones. `best` expands the most probable nodes of each level and keeps the N nodes of highest path
probability. `chain` is a comb with one child.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from s4c.types import DraftTree, placed
from s4c.verify.noise import CPU

MOST_NODES = 1024
"""No tree is larger: a pass over so many nodes costs many times what it can win."""

EXPANDED_PER_LEVEL = 4
"""Most nodes of a level that `best` expands."""


def ancestors(parents: Tensor) -> Tensor:
    """[B, N, N] bool: whether node j is node i or an ancestor of it.

    Doubling: if A holds the ancestors up to distance m, then A A holds those up to 2m.
    """
    size = parents.shape[1]
    columns = torch.arange(size, device=parents.device)
    reach = (columns == parents[..., None]) | torch.eye(size, dtype=torch.bool, device=parents.device)
    distance = 1
    while distance < size - 1:
        reach = (reach.float() @ reach.float()) > 0
        distance *= 2
    return reach


def depths(parents: Tensor) -> Tensor:
    """[B, N] int64: the number of edges between a node and the root."""
    return ancestors(parents).sum(-1) - 1


def listed_depths(parents: Sequence[int]) -> list[int]:
    """`depths` of one tree, whose parents are given as numbers."""
    found = [0]
    for parent in parents[1:]:
        found.append(found[parent] + 1)
    return found


Line = tuple[list[int], list[int], list[bool], list[list[float]]]
"""Of one sequence's tree the tokens, parents and candidates by node, and the beliefs by drafter and node."""

_PARTS = ("tokens", "parents", "candidate", "belief")


def root_only(roots: Sequence[int], device: torch.device = CPU) -> DraftTree:
    """The tree of plain decoding: no candidates."""
    return from_paths(roots, [[]] * len(roots), 1, device=device)


def from_paths(
    roots: Sequence[int],
    paths: Sequence[Sequence[Sequence[int]]],
    budget: int,
    chances: Sequence[Sequence[float]] | None = None,
    device: torch.device = CPU,
) -> DraftTree:
    """Merge continuations into one tree for each sequence: shared beginnings become shared nodes.

    Args:
        roots: of the sequences, B tokens.
        paths: for each sequence its continuations, the best first.
        budget: most nodes of a tree, the root included; later nodes are dropped.
        chances: for each continuation how probable each of its tokens is, given those before; 1/2 where not given.
        device: of the tensors of the tree.
    """
    rows = []
    for b, (root, continuations) in enumerate(zip(roots, paths, strict=True)):
        row = _Row([root], [-1], [False], [[0.0]])
        for c, path in enumerate(continuations):
            step = math.log(chances[b][c] if chances is not None else 0.5)
            node: int | None = 0
            for token in path:
                if node is not None:
                    belief = row.belief[0][node] + step
                    node = row.add(node, token, budget)
                    if node is not None and math.isnan(row.belief[0][node]):
                        row.belief[0][node] = belief
        rows.append(row.line)
    return ListedTree(rows, device)


class _Row:
    """The nodes of one row of a tree under construction, found by parent and token."""

    def __init__(self, tokens: list[int], parents: list[int], candidate: list[bool], belief: list[list[float]]) -> None:
        self.tokens, self.parents, self.candidate, self.belief = tokens, parents, candidate, belief
        self._child: dict[tuple[int, int], int] = {}
        for column, key in enumerate(zip(parents, tokens, strict=True)):
            if candidate[column]:
                self._child.setdefault(key, column)

    @property
    def line(self) -> Line:
        """Its nodes."""
        return self.tokens, self.parents, self.candidate, self.belief

    def add(self, parent: int, token: int, budget: int) -> int | None:
        """The column of that child, a new candidate where there is none; None where the budget allows no more."""
        key = (parent, token)
        if key not in self._child:
            if len(self.tokens) >= budget:
                return None
            self._child[key] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self.candidate.append(True)
            for line in self.belief:
                line.append(math.nan)
        return self._child[key]


class ListedTree(DraftTree):
    """A draft tree made of lists, none of its rows sampled.

    A tensor of it is made when it is first asked for: on its way between drafters and planner it needs none.

    Args:
        rows: of the sequences; the shorter ones are padded by nodes that are no candidates.
        device: of the tensors.
    """

    def __init__(self, rows: Sequence[Line], device: torch.device) -> None:
        self.log_q = None
        self._device = device
        self._size = max(len(tokens) for tokens, *_ in rows)
        self._rows = [_padded(row, self._size) for row in rows]
        if not rows[0][3]:
            self.belief = None

    def __getattr__(self, name: str) -> Any:
        if name == "sampled":
            made = torch.zeros(len(self._rows), dtype=torch.bool, device=self._device)
        elif name in _PARTS:
            made = placed([row[_PARTS.index(name)] for row in self._rows], self._device)
        else:
            raise AttributeError(f"a draft tree has no {name}")
        setattr(self, name, made)
        return made

    @property
    def size(self) -> int:
        return self._size

    @property
    def device(self) -> torch.device:
        return self._device

    def lines(self) -> list[Line]:
        """See `lines`."""
        return self._rows


def _padded(row: Line, size: int) -> Line:
    tokens, parents, candidate, beliefs = row
    more = size - len(tokens)
    if not more:
        return row
    return (
        tokens + [0] * more,
        parents + [0] * more,
        candidate + [False] * more,
        [b + [math.nan] * more for b in beliefs],
    )


def merge(tree: DraftTree, other: DraftTree) -> DraftTree:
    """Add the candidates of another tree with the same roots; nodes that both have are shared.

    Args:
        tree: comes whole into the outcome, its columns unchanged; none of its rows is sampled.
        other: its nodes come as long as there is room for `MOST_NODES`, with their ancestors or not at all.
    """
    rows = []
    ours, theirs = lines(tree), lines(other)
    known = bool(ours[0][3] and theirs[0][3])
    for (tokens, parents, candidate, belief), (*beside, beliefs) in zip(ours, theirs, strict=True):
        unknown = [[0.0] + [math.nan] * (tree.size - 1) for _ in beliefs]
        row = _Row(tokens[:], parents[:], candidate[:], [line[:] for line in belief] + unknown if known else [])
        place: dict[int, int | None] = {0: 0}
        for column, (token, parent, is_candidate) in enumerate(zip(*beside, strict=True)):
            above = place.get(parent)
            if is_candidate and above is not None:
                place[column] = node = row.add(above, token, MOST_NODES)
                for line, believed in zip(row.belief[len(belief) :], beliefs, strict=False):
                    if node is not None:
                        line[node] = believed[column]
        rows.append(row.line)
    return ListedTree(rows, tree.device)


def pruned(tree: DraftTree, kept: Sequence[Sequence[int]]) -> DraftTree:
    """The tree of some of the nodes.

    Args:
        tree: none of its rows is sampled.
        kept: for each sequence as many columns, ascending, the root first; a node comes with its ancestors.
    """
    rows = []
    for columns, (tokens, parents, candidate, belief) in zip(kept, lines(tree), strict=True):
        place = {column: index for index, column in enumerate(columns)}
        above = [-1, *(place[parents[column]] for column in columns[1:])]
        thoughts = [[line[column] for column in columns] for line in belief]
        rows.append(([tokens[c] for c in columns], above, [candidate[c] for c in columns], thoughts))
    return ListedTree(rows, tree.device)


def most_believed(tree: DraftTree, nodes: int) -> DraftTree:
    """The candidates of a tree whose paths some drafter believes to be the most probable.

    Args:
        tree: none of its rows is sampled. Where its drafters do not say what they believe, its first nodes stay.
        nodes: most nodes of the outcome, the root included.
    """
    if tree.size <= nodes:
        return tree
    kept = []
    for _, _, candidate, belief in lines(tree):
        drafted = [column for column, may in enumerate(candidate) if may]
        if belief:
            best = [
                max(x for x in thoughts if not math.isnan(x)) if may else 0.0
                for may, *thoughts in zip(candidate, *belief, strict=True)
            ]
            drafted.sort(key=best.__getitem__, reverse=True)  # of equals the first, so parents stay
        kept.append([0, *sorted(drafted[: nodes - 1])])
    return pruned(tree, kept)


def lines(tree: DraftTree) -> list[Line]:
    """Tokens, parents, candidates and beliefs of each row, as lists that are not to be changed."""
    if isinstance(tree, ListedTree):
        return tree.lines()
    beliefs = [[]] * tree.tokens.shape[0] if tree.belief is None else tree.belief.tolist()
    return list(zip(tree.tokens.tolist(), tree.parents.tolist(), tree.candidate.tolist(), beliefs, strict=True))


@dataclass(frozen=True)
class TreePlan:
    """The shape and size of the trees to draft.

    Attributes:
        kind: `comb`, `best` or `chain`.
        width: children of an expanded node.
        depth: levels below the root; 0 means as deep as the drafter goes by itself.
        nodes: most nodes of a tree, the root included; with 1 there is nothing to guess.
        floor: a `best` tree gets no further level where the paths of the nodes that it would expand have a lower
            log-probability, all together.
    """

    kind: str
    width: int
    depth: int
    nodes: int
    floor: float = -math.inf

    FORMS = "comb:K or comb:KxD, best:N or best:NxD, chain:D (K children, D levels, N nodes with the root)"

    @classmethod
    def parse(cls, text: str) -> TreePlan:
        """Read a tree as users write it: `comb:4`, `comb:3x5`, `best:16`, `best:16x6`, `chain:4`."""
        match = re.fullmatch(r"(comb|best|chain):(\d+)(?:x(\d+))?", text.strip())
        kind, number, levels = (match[1], int(match[2]), int(match[3] or 0)) if match else ("", 0, 0)
        if match is None or number < 1 or (match[3] is not None and (levels < 1 or kind == "chain")):
            raise ValueError(f"tree {text!r} is not known; it must be {cls.FORMS}")
        if (max(number - 1, levels) if kind == "best" else number * max(levels, 1)) >= MOST_NODES:
            raise ValueError(f"tree {text!r} is too large; a tree has at most {MOST_NODES} nodes")
        if kind == "chain":
            return cls(kind, width=1, depth=number, nodes=number + 1)
        if kind == "comb":
            return cls(kind, width=number, depth=levels, nodes=number * levels + 1 if levels else 0)
        if number < 2:
            raise ValueError(f"tree {text!r} has no room for a candidate; best:N needs N of at least 2")
        return cls(kind, width=min(number - 1, 8), depth=levels, nodes=number)

    def __str__(self) -> str:
        """The tree as users write it."""
        number = {"comb": self.width, "best": self.nodes, "chain": self.depth}[self.kind]
        return f"{self.kind}:{number}" + (f"x{self.depth}" if self.depth and self.kind != "chain" else "")

    def deepened(self, depth: int) -> TreePlan:
        """The same plan, with the drafter's own depth where none was given."""
        if self.depth:
            return self
        return replace(self, depth=depth, nodes=self.width * depth + 1 if self.kind == "comb" else self.nodes)

    def beside(self, other: DraftTree) -> TreePlan:
        """The plan for a drafter whose tree another one is to be merged into."""
        return self

    def cut(self, tree: DraftTree) -> DraftTree:
        """What there is room for of a tree that others have added to: of a `best` tree the most believed nodes.

        Trees of fixed shape may be added to freely.
        """
        return most_believed(tree, self.nodes) if self.kind == "best" else tree

    def with_probes(self, depth: int) -> TreePlan:
        """The plan for a drafter whose levels, `depth` of them, cost no more than rows in the target's pass."""
        return self.deepened(depth)

    def worth_checking(self, tree: DraftTree) -> DraftTree:
        """The part of a tree of candidates that is worth its place in the pass, before a drafter adds probes to it."""
        return tree

    def grow(self, roots: Tensor, select: Select | None = None) -> TreeBuilder:
        """Start a tree below each root, [B] int64; `select` does what `top_and_total` does."""
        assert self.depth > 0, "a plan without a depth is deepened by the drafter first"
        return TreeBuilder(self, roots, select or top_and_total)


Select = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]


def top_and_total(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """[..., count] highest scores of [..., V] and their columns, and [..., 1] the log of the sum of exponentials."""
    top, index = scores.topk(count, dim=-1)
    return top, index, scores.logsumexp(-1, keepdim=True)


class TreeBuilder:
    """A tree under construction: a pool of nodes, and the frontier whose children are wanted next.

    Attributes:
        frontier: [B, W] int64, pool columns of the nodes to expand; W = 1 at the root and for combs, 0 at the end.
        level: depth of the frontier.
        tokens: [B, M] int64, the tokens of the pool, the root first.
        parents: [B, M] int64, the pool columns of the parents.
        path: [B, M] float32, the log of the probability that the drafter gives to the path down to each node.
        waits: whether to look which nodes of a `best` tree are worth an expansion. The tree is the same without, unless
            the plan has a floor; on a GPU a few more rows take no time, and the look waits for all before it.
    """

    def __init__(self, plan: TreePlan, roots: Tensor, select: Select) -> None:
        self.plan = plan
        self._select = select
        self.waits = roots.device.type == "cpu" or plan.floor > -math.inf
        self.level = 0
        self.tokens = roots[:, None]
        self.parents = torch.full_like(self.tokens, -1)
        self.frontier = torch.zeros_like(self.tokens)
        self.path = torch.zeros(self.tokens.shape, dtype=torch.float32, device=roots.device)
        self._laws: list[tuple[Tensor, Tensor]] = []

    @property
    def open(self) -> bool:
        """Whether another level is wanted."""
        return self.level < self.plan.depth and self.plan.nodes > 1 and self.frontier.shape[1] > 0

    @property
    def confidence(self) -> Tensor:
        """[B] float32: the highest path probability of a node on the frontier, with the noise that it was drawn by."""
        return self.path.gather(1, self.frontier).amax(1).exp()

    def extend(self, scores: Tensor, token_ids: Tensor | None = None, law: Tensor | None = None) -> None:
        """Add children to every node of the frontier and choose the next frontier.

        Args:
            scores: [B, W, V'] float32, log-probabilities plus noise, or [B, 1, V'] for all nodes; the highest become
                children.
            token_ids: [V'] int64, the target's token of each column; None for the identity.
            law: [B, W, V] float32, the drafter's law over the target's vocabulary, kept for the rejection
                rule; None under the coupled rule.
        """
        batch, _, columns = scores.shape
        expanded, width = self.frontier.shape[1], min(self.plan.width, columns)
        top, index, total = self._select(scores, width)
        # The clamp: a row of nothing but -inf gives children of probability 0, not NaN.
        total = total.clamp(min=torch.finfo(scores.dtype).min)
        path = self.path.gather(1, self.frontier)[..., None] + (top - total)
        path = path.masked_fill(path.isnan(), -torch.inf)  # NaN would be taken for the highest, before the root
        tokens = (index if token_ids is None else token_ids[index]).expand(-1, expanded, -1)
        first = self.tokens.shape[1]
        self.tokens = torch.cat([self.tokens, tokens.flatten(1)], 1)
        self.parents = torch.cat([self.parents, self.frontier.repeat_interleave(width, 1)], 1)
        self.path = torch.cat([self.path, path.flatten(1)], 1)
        if law is not None:
            self._laws.append((self.frontier, law))
        self.level += 1
        if self.plan.kind == "best":
            likely = path.flatten(1).topk(min(EXPANDED_PER_LEVEL, expanded * width), dim=1)
            self.frontier = first + likely.indices
            if self.waits:
                self.frontier = self.frontier[:, : int(self._hopeful(likely.values).sum(1).max())]
        else:
            self.frontier = torch.full((batch, 1), first, device=tokens.device)

    def _hopeful(self, path: Tensor) -> Tensor:
        """[B, K] bool: which of these paths, the most probable of a level, are to be gone on with.

        A child is never more probable than its parent, so none of those is kept whose path does not beat the last one
        kept.
        """
        hopeful = (path.logsumexp(1, keepdim=True) >= self.plan.floor).expand_as(path)
        if self.path.shape[1] >= self.plan.nodes:
            hopeful = hopeful & (path > self.path.topk(self.plan.nodes, dim=1).values[:, -1:])
        return hopeful

    def finish(self, sampled: Tensor | None = None) -> DraftTree:
        """The tree, parents before their children, siblings in the order of their scores; the pool becomes it.

        Children without a probability (fewer tokens in the drafter's law than children) are no candidates.

        Args:
            sampled: [B] bool, for the tree of that name; None where no row is.
        """
        if self.plan.kind == "best":
            assert sampled is None, "the shape of a best tree depends on its draws"
            assert not self._laws, "the laws of a best tree are not kept"
            # Stable: of equals the earlier one, so no node is kept without its parent.
            order = self.path.argsort(stable=True, dim=1, descending=True)
            kept = order[:, : self.plan.nodes].sort(dim=1).values
            self.tokens, self.path = self.tokens.gather(1, kept), self.path.gather(1, kept)
            self.parents = torch.searchsorted(kept, self.parents.gather(1, kept))
            self.parents[:, 0] = -1
        if sampled is None:
            sampled = torch.zeros(self.tokens.shape[0], dtype=torch.bool, device=self.tokens.device)
        candidate = self.path.isfinite()
        candidate[:, 0] = False
        log_q = self._log_q(self.tokens.shape[1])
        return DraftTree(self.tokens, self.parents, candidate, sampled, log_q, self.path[:, None])

    def _log_q(self, size: int) -> Tensor | None:
        if not self._laws:
            return None
        first = self._laws[0][1]
        log_q = first.new_full((first.shape[0], size, first.shape[-1]), -torch.inf)
        for nodes, law in self._laws:
            log_q.scatter_(1, nodes[..., None].expand_as(law), law)
        return log_q
