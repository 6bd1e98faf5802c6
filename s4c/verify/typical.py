"""Typical acceptance (Medusa, arXiv 2401.10774, section 2.3.1): a rule that is LOSSY.

A drafted token x stands where the target finds it not improbable for as uncertain as it is:

    p(x) > min(epsilon, delta * exp(-H(p)))        H: entropy in nats

and of the paths that stand the longest is kept, of equals the most probable. So more is accepted the less certain the
target is, and the output has another law than the target's: what the drafter says often, the text says too often. At
temperature 0 only the most probable token stands, which is plain greedy decoding, and the bonus is drawn as by the
coupled rule. This file is the whole of it: the lossless rules of rules.py know nothing of it, and whatever shows its
name shows the word.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from s4c.types import DraftTree, TargetOutput, Verdict, placed
from s4c.verify import tree as trees
from s4c.verify.rules import RULES, Rule, follow, rule_named
from s4c.verify.scores import Scores

EPSILON, DELTA = 0.09, 0.3
"""The published threshold, and its factor on the exponential of the entropy."""


def typical(tree: DraftTree, output: TargetOutput, scores: Scores) -> Verdict:
    """Typical acceptance; see the head of this file."""
    processed = scores.process_tree(output.logits, tree)
    choice = scores.choice(output.logits, tree)
    stands, log_p = typical_nodes(processed.log_softmax(-1), tree)
    warm = placed([request.temperature > 0 for request in scores.params], choice.device)
    return follow(tree, force(choice, tree, longest_path(stands & warm[:, None], log_p, tree)))


def typical_nodes(law: Tensor, tree: DraftTree) -> tuple[Tensor, Tensor]:
    """[B, N] bool and float32: whether a candidate is typical after its parent, and its log-probability there.

    Args:
        law: [B, N, V] float32, log-probabilities after each node.
    """
    entropy = -(law.exp() * law.clamp(min=torch.finfo(law.dtype).min)).sum(-1)
    threshold = (math.log(DELTA) - entropy).clamp(max=math.log(EPSILON))
    parents = tree.parents.clamp(min=0)
    tokens = tree.tokens.where(tree.candidate, 0)
    log_p = law.flatten(1).gather(1, parents * law.shape[-1] + tokens)
    return tree.candidate & (log_p > threshold.gather(1, parents)), log_p


def longest_path(stands: Tensor, log_p: Tensor, tree: DraftTree) -> Tensor:
    """[B, N] bool: the nodes of the longest path from the root on which all stand, of equals the most probable."""
    above = trees.ancestors(tree.parents)
    root = torch.arange(tree.size, device=stands.device) == 0
    whole = ~(above & ~(stands | root)[:, None]).any(-1)
    depth = torch.where(whole, above.sum(-1) - 1, -1)
    likelihood = (above & ~root).float() @ log_p.where(stands, 0)[..., None]
    best = torch.where(depth == depth.amax(1, keepdim=True), likelihood[..., 0], -torch.inf).argmax(1)
    return above[torch.arange(len(best), device=best.device), best] & ~root


def force(choice: Tensor, tree: DraftTree, path: Tensor) -> Tensor:
    """The tokens [B, N] after the nodes of a tree, changed so that a walk goes along a path [B, N]."""
    beyond = choice.shape[1]
    room = torch.cat([choice, choice[:, :1]], 1)
    return room.scatter(1, tree.parents.where(path, beyond), tree.tokens)[:, :beyond]


LOSSY_RULES: dict[str, Rule] = {"typical": typical}


def any_rule(name: str) -> Rule:
    """The rule of that name, a lossy one too.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    if name in LOSSY_RULES:
        return LOSSY_RULES[name]
    if name not in RULES:
        known = [*RULES, *map(title, LOSSY_RULES)]
        raise ValueError(f"rule {name!r} is not known; it must be one of {', '.join(known)}")
    return rule_named(name)


def title(name: str) -> str:
    """The name of a rule as it is shown."""
    return f"{name} (lossy)" if name in LOSSY_RULES else name
