"""Which drafted tokens stand: two rules, both lossless.

**coupled** (default). The target's token at every node is `c = argmax(log p + g)`, with the noise g of the
position. The walk starts at the root and follows the child that bears c; where there is none, c is the bonus.

    Theorem. The committed tokens are those of plain decoding with the same noise, whatever the tree.
    Proof. At each step the walk commits the c of the node it stands on, and the context of that node is the
    text committed so far: this is what plain decoding commits there. The tree only decides how far a walk
    gets before it needs another pass.

**rejection** (speculative sampling: Leviathan et al. 2023; arXiv 2302.01318; over siblings drawn without
replacement: Jeon et al. 2024). At a node with law p, children x_1, x_2, ... and drafter law q:

    sampled children         r < min(1, p(x_i) / q(x_i)) accepts x_i; a miss replaces p by the residual
                             (p - q)+, normalised, and q by q without x_i, normalised
    deterministic children   the same with q = 1 at x_i: r < p(x_i) accepts; a miss removes x_i from p

    and after the last miss the bonus is drawn from what p has become.

    Theorem. The token has the law p. Proof. For one child, min(p, q) + P(miss) (p - q)+ / sum (p - q)+ = p,
    since P(miss) = 1 - sum min(p, q) = sum (p - q)+. Given a miss, the next sibling is a draw from the new q,
    and the wanted law is the new p: induction.
    It needs x_i to be a draw from q given everything before it, so a tree whose shape depends on its own
    draws may not be `sampled`.

A node without a law has a mark for its token (scores.py), which no child bears: the walk ends there, and the mark is
the bonus.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from s4c.types import DraftTree, TargetOutput, Verdict
from s4c.verify.noise import RESIDUAL_STREAM, coins
from s4c.verify.scores import Scores, choose, seed_of
from s4c.verify.verdict import ListedVerdict

Rule = Callable[[DraftTree, TargetOutput, Scores], Verdict]


def coupled(tree: DraftTree, output: TargetOutput, scores: Scores) -> Verdict:
    """The coupled rule; see the head of this file. The runtime's kernel computes it where it has one."""
    verdict = scores.judged(tree, output.logits)
    return follow(tree, scores.choice(output.logits, tree)) if verdict is None else verdict


def follow(tree: DraftTree, choice: Tensor) -> Verdict:
    """Walk from the root along the candidates that bear the chosen tokens.

    Args:
        tree: the tree; of siblings with equal tokens the first counts.
        choice: [B, N] int64, the target's token after each node.
    """
    if tree.size == 1:
        return ListedVerdict([([0], chosen) for chosen in choice.tolist()], choice.device)
    # As lists: a device is waited for once, and a walk over a few nodes is shorter than the launch of its first kernel.
    numbers = torch.stack([tree.tokens, tree.parents, tree.candidate.long(), choice]).tolist()
    return ListedVerdict([_walk(*row) for row in zip(*numbers, strict=True)], choice.device)


def _walk(
    tokens: list[int], parents: list[int], candidate: list[int], choice: list[int]
) -> tuple[list[int], list[int]]:
    """The columns of the accepted path of one sequence, the root first, and the tokens chosen there."""
    child: dict[tuple[int, int], int] = {}
    for column, may in enumerate(candidate):
        if may:
            child.setdefault((parents[column], tokens[column]), column)
    path = [0]
    while (following := child.get((path[-1], choice[path[-1]]))) is not None:
        path.append(following)
    return path, [choice[column] for column in path]


class Chance(Protocol):
    """The randomness of the rejection rule; tests enumerate it."""

    def accept(self, probability: float, row: int, position: int, sibling: int) -> bool:
        """True with the given probability: the coin of one sibling of one position."""

    def draw(self, law: Tensor, row: int, position: int) -> int:
        """A token drawn from a law [V]."""


class SeededChance:
    """Coins and draws that are functions of the request's seed and the position, for any batch."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def accept(self, probability: float, row: int, position: int, sibling: int) -> bool:
        return bool(coins(seed_of(self.scores.params[row]), position, sibling + 1)[sibling] < probability)

    def draw(self, law: Tensor, row: int, position: int) -> int:
        noise = self.scores.noise_table.row(seed_of(self.scores.params[row]), RESIDUAL_STREAM, position)
        return int((law.log() + noise.double()).argmax())


def rejection(tree: DraftTree, output: TargetOutput, scores: Scores, chance: Chance | None = None) -> Verdict:
    """The rejection rule; see the head of this file."""
    processed = scores.process_tree(output.logits, tree)
    choice = choose(processed, None)
    positions = scores.positions_after(tree)
    chance = chance or SeededChance(scores)
    for row, request in enumerate(scores.params):
        children = _children(tree, row)
        node: int | None = 0 if request.temperature > 0 else None
        while node is not None and choice[row, node] >= 0:
            siblings = children.get(node, [])
            law = processed[row, node].double().softmax(-1)
            chosen = _judge(tree, row, node, siblings, law, chance, int(positions[row, node]))
            choice[row, node] = chosen
            node = next((child for child in siblings if int(tree.tokens[row, child]) == chosen), None)
    return follow(tree, choice)


def _children(tree: DraftTree, row: int) -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    pairs = zip(tree.parents[row].tolist(), tree.candidate[row].tolist(), strict=True)
    for column, (parent, candidate) in enumerate(pairs):
        if candidate:
            children.setdefault(parent, []).append(column)
    return children


def _judge(
    tree: DraftTree, row: int, node: int, siblings: list[int], law: Tensor, chance: Chance, position: int
) -> int:
    """The token after a node: that of the first sibling to be accepted, or a draw from what p has become.

    Args:
        siblings: columns of the node's children, in the order in which they were drawn.
        law: [V] float64, p at the node.
        position: of the token.
    """
    log_q = None
    if siblings and bool(tree.sampled[row]):
        assert tree.log_q is not None, "a sampled tree carries its drafter's law"
        log_q = tree.log_q[row, node].double()
    for sibling, column in enumerate(siblings):
        token = int(tree.tokens[row, column])
        q = None if log_q is None else log_q.softmax(-1)
        proposed = 1.0 if q is None else float(q[token])
        assert proposed > 0, "a sampled child has a probability, and is drawn once"
        if chance.accept(min(1.0, float(law[token]) / proposed), row, position, sibling):
            return token
        rest = law.index_fill(0, tree.tokens[row, column], 0) if q is None else (law - q).clamp(min=0)
        # Nothing is left where q = p: a miss then has no probability, but rounding may leave it open.
        law = rest / rest.sum() if rest.sum() > 0 else law
        if log_q is not None:
            # In log space, for what remains may be too improbable for a float beside the token.
            log_q = log_q.index_fill(0, tree.tokens[row, column], -torch.inf)
    return chance.draw(law, row, position)


RULES: dict[str, Rule] = {"coupled": coupled, "rejection": rejection}


def rule_named(name: str) -> Rule:
    """The rule of that name.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    if name not in RULES:
        raise ValueError(f"rule {name!r} is not known; it must be one of {', '.join(RULES)}")
    return RULES[name]
