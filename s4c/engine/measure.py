"""What passes and drafts cost on this machine: measured once, kept on disk.

The least of several drafts is taken, and of passes the lesser of the medians of two moments: other work on the machine
makes them longer, never shorter, and what counts is how these times stand to each other. A file holds them for each
machine, target and drafter, below the folder `costs` of the cache. A few passes at each start say how fast the machine
is now (engine/pace.py), and whether it is still the one that was measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from s4c.drafters.base import Drafter, Sequences
from s4c.engine.costs import CONTEXT, Costs, interpolated
from s4c.engine.stats import clock
from s4c.models.base import Target
from s4c.models.builtin import home, status
from s4c.models.sampling import noise_kernel
from s4c.types import DraftTree, SamplingParams
from s4c.verify.noise import NoiseTable
from s4c.verify.rules import coupled
from s4c.verify.scores import Scores
from s4c.verify.tree import TreePlan, from_paths, root_only
from s4c.verify.verdict import settled

FORMAT = 11
"""Raised when a file comes to hold something else, or when what is measured changes."""

SIZES = (1, 2, 4, 5, 6, 8, 10, 12, 15, 16, 17, 20, 24, 32)
"""Tokens of the passes that are measured: densely where trees are, for what a pass costs grows in steps."""

LONG_CONTEXT = 700
"""Tokens that stand before the passes that tell what the context costs."""

FEW, MANY = 1, 16
"""Tokens of the passes by which that, and whether a file still holds, is told."""

REPEATS = 9
"""Times that each is measured."""

TRUSTED = 1.6
"""A file is measured anew where T(16) / T(1) is so many times what it says, or the inverse of it: memory that is
slower for a while, or cores that others share, explain less."""

LOOKS = 4
"""Passes of each size by which that is told."""


def measured_costs(target: Target, drafter: Drafter, plans: Mapping[int, TreePlan], threads: int) -> Costs:
    """The costs of this target and drafter on this machine, from the cache folder or measured now.

    Args:
        plans: the tree of each number of levels.
        threads: CPU threads of the process.
    """
    file = _file(target, drafter, threads)
    costs = _read(file)
    if costs is not None and _holds(costs, target):
        return costs
    with status("measuring what a pass costs here, once"):
        first = pass_seconds(target, judged(target), SIZES)
        drafts, probing = draft_seconds(target, drafter, plans, first)
        attention = attention_seconds(target, first)
        again = pass_seconds(target, judged(target), SIZES)
        costs = Costs({n: min(seconds, again[n]) for n, seconds in first.items()}, drafts, attention, probing)
    _write(file, costs)
    return costs


def known_costs(target: Target, drafter: Drafter, threads: int) -> Costs | None:
    """What the cache folder holds of them."""
    return _read(_file(target, drafter, threads))


def _file(target: Target, drafter: Drafter, threads: int) -> Path:
    device = torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else platform.processor()
    identity: list[Any] = [FORMAT, platform.node(), platform.machine(), device, os.cpu_count(), threads]
    identity += [target.spec.fingerprint, target.runtime, str(target.dtype), drafter.name, drafter.settings]
    return home() / "costs" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}.json"


def _read(file: Path) -> Costs | None:
    """None where there is no such file, or one that does not hold what it should."""
    try:
        tables = json.loads(file.read_text())
        passes, drafts = ({int(n): float(s) for n, s in tables[name].items()} for name in ("passes", "drafts"))
        each, by_node = (float(s) for s in tables["attention"])
        probing = float(tables["probing"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    times = (*passes.values(), *drafts.values(), each, by_node, probing)
    sound = all(0 <= s < float("inf") for s in times) and all(passes.values())
    whole = sound and len(passes) > 1 and 0 in drafts and min(passes) == 1
    return Costs(passes, drafts, (each, by_node), probing) if whole else None


def _write(file: Path, costs: Costs) -> None:
    """Write beside and rename, so that a reader finds a whole file."""
    tables = {name: getattr(costs, name) for name in ("passes", "drafts", "attention", "probing")}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.part-", delete=False) as part:
            json.dump(tables, part)
        os.chmod(part.name, 0o644)
        os.replace(part.name, file)
    except OSError as error:
        warnings.warn(
            f"cannot write {file}: {error}. What a pass costs is measured again at the next start; give the cache "
            "folder room and rights, or name another one by the environment variable S4C_HOME",
            stacklevel=2,
        )


def _holds(costs: Costs, target: Target) -> bool:
    """Whether this is still the machine that was measured; if so, the costs are told how fast it is now."""
    sizes = [n for n in (FEW, MANY) if n in costs.passes]
    now = pass_seconds(target, judged(target), sizes, LOOKS)
    paces = [now[n] / costs.passes[n] for n in now]
    if max(paces) > TRUSTED * min(paces):
        return False
    for n in now:
        costs.look(n, now[n], LOOKS)
    return True


def judged(target: Target) -> Callable[[DraftTree], object]:
    """A pass and its judgement at temperature 0, as a round has them."""
    noise = NoiseTable(target.spec.vocab_size, target.device)
    scores = Scores([SamplingParams()], [[0]], [1], noise, target.judge)
    return lambda tree: coupled(tree, target.verify(tree), scores)


def attention_seconds(target: Target, near: Mapping[int, float]) -> tuple[float, float]:
    """a and b, from how many times as long passes of few and of many tokens take behind a long context as those, T(n).

    Both are timed in one go for that: a machine that is busy for a while makes both longer and leaves their quotient.
    """
    further = min(LONG_CONTEXT, target.spec.context_length - MANY) - CONTEXT
    if further < 1:
        return 0.0, 0.0
    work, sizes = judged(target), (FEW, MANY)
    far, close = (pass_seconds(target, work, sizes, context=CONTEXT + more, of=min) for more in (further, 0))
    few, many = (near[n] * max(0.0, far[n] / close[n] - 1) / further for n in sizes)
    by_node = max(0.0, many - few) / (MANY - FEW)
    return max(0.0, few - by_node * FEW), by_node


def pass_seconds(
    target: Target,
    work: Callable[[DraftTree], object],
    sizes: Sequence[int],
    repeats: int = REPEATS,
    context: int = CONTEXT,
    of: Callable[[Sequence[float]], float] = median,
) -> dict[int, float]:
    """Seconds of `work` on a chain of 1, 2, 4, ... tokens behind `context` others in slot 0.

    The sizes take turns, so that whatever else the machine does falls on all of them.

    Args:
        work: what is timed.
        sizes: numbers of tokens.
        repeats: times that each is measured.
        context: tokens before them.
        of: what is told of these times.
    """
    sizes = [n for n in sizes if n < target.spec.context_length]
    context = max(1, min(context, target.spec.context_length - sizes[-1]))
    times: dict[int, list[float]] = {n: [] for n in sizes}
    target.reserve(1, context + sizes[-1])
    target.prefill(0, some_tokens(target, context))
    for _ in range(1 + repeats):
        for n in sizes:
            root, *path = some_tokens(target, n).tolist()
            tree = from_paths([root], [[path]], n, device=target.device)
            started = clock(target.device)
            work(tree)
            times[n].append(clock(target.device) - started)
    return {n: of(values[1:]) for n, values in times.items()}


def draft_seconds(
    target: Target, drafter: Drafter, plans: Mapping[int, TreePlan], passes: Mapping[int, float]
) -> tuple[dict[int, float], float]:
    """D(l) and P, behind a text of random tokens in slot 0: the least seconds of several times."""
    order = [*plans, max(plans)]  # each number of levels is followed by a draft, whose tree is of what probes said
    spec, rounds = target.spec, (1 + REPEATS) * len(order)
    room = rounds + max(plan.nodes for plan in plans.values())
    line = some_tokens(target, max(2, min(CONTEXT, spec.context_length - room))).tolist()
    for part in (target, drafter):
        part.reserve(1, len(line) + room)
    prompt = torch.tensor(line[:-1], device=target.device)
    drafter.prefill(0, prompt, target.prefill(0, prompt, drafter.taps))
    params, noise = [SamplingParams()], NoiseTable(spec.vocab_size, target.device, noise_kernel(target.device))
    table, surplus, told = interpolated(passes), [], 0
    times: dict[int, list[float]] = {levels: [] for levels in plans}
    for _ in range(1 + REPEATS):
        for levels in order:
            plan = plans[levels]
            if len(line) + max(plan.nodes, 1) + drafter.probes > spec.context_length:
                break
            scores = Scores(params, [line], [len(line)], noise, target.judge)
            started = clock(target.device)
            drafted = drafter.propose(Sequences([line], scores, False, plan, target.device))
            taken = clock(target.device) - started
            if not told or drafted.candidate.any():
                times[told if drafter.probes else levels].append(taken)
            tree = drafted if drafter.probes else root_only(line[-1:], target.device)
            started = clock(target.device)
            output = target.verify(tree, drafter.taps)
            verdict = settled(coupled(tree, output, scores))
            if drafter.probes and levels and tree.size < len(table):
                surplus.append(clock(target.device) - started - table[tree.size])
            target.commit(verdict)
            drafter.commit(tree, verdict, output)
            line += verdict.lines[0][1]
            told = levels if drafter.probes else 0
    drafts = {levels: min(values[1:] or values) for levels, values in times.items() if values}
    return drafts, max(0.0, min(surplus, default=0.0))


def some_tokens(target: Target, count: int) -> Tensor:
    """[count] int64, random but always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(target.spec.vocab_size, (count,), generator=generator).to(target.device)
