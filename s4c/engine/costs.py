"""What passes and drafts cost on this machine: measured once, kept on disk, followed while generating.

    T(n)     seconds of a pass over n tokens behind CONTEXT others, its judgement included
    a + b n  seconds that each further token of the context adds to it, for attention
    D(l)     seconds of a draft of l levels; D(0) where the drafter is asked for none; where probes draft, of making a
             tree of the l levels that they drafted in the round before
    P        seconds that probes add to a pass over as many other rows

The least of several drafts is taken, and of passes the lesser of the medians of two moments: other work on the machine
makes them longer, never shorter, and what counts is how these times stand to each other. A file holds them for each
machine, target and drafter, below the folder `costs` of the cache. While generating, what the rounds take corrects
them: the paces of memory and cores, by which passes take longer now than when they were measured (`Pace`), and that of
the drafts of each batch size. So a file stays good on a machine that has become slower or faster since.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median, median_high
from typing import Any

import torch
from torch import Tensor

from s4c.drafters.base import Drafter, Sequences
from s4c.models.base import Target
from s4c.models.builtin import home, status
from s4c.models.sampling import noise_kernel
from s4c.types import DraftTree, SamplingParams
from s4c.verify.noise import NoiseTable
from s4c.verify.rules import coupled, walked
from s4c.verify.scores import Scores
from s4c.verify.tree import TreePlan, from_paths, root_only

FORMAT = 10
"""Raised when a file comes to hold something else, or when what is measured changes."""

SIZES = (1, 2, 4, 5, 6, 8, 10, 12, 15, 16, 17, 20, 24, 32)
"""Tokens of the passes that are measured: densely where trees are, for what a pass costs grows in steps."""

CONTEXT, LONG_CONTEXT = 200, 700
"""Tokens that stand before them, and before those that tell what the context costs."""

FEW, MANY = 1, 16
"""Tokens of the passes by which that, and whether a file still holds, is told."""

REPEATS = 9
RECENT, NOW = 31, 7
"""Rounds whose medians count: of what lasts, and of how fast drafts are just now."""

TRUSTED = 1.25
"""A file is measured anew where T(16) / T(1) is so many times what it says, or the inverse of it."""

LOOKS = 4
"""Passes of each size by which that is told."""

BELIEVED = 3
"""Passes for which the measured share of plain ones stands when the first one is seen."""

SHARPNESS = 8.0
"""K: how soon a pass takes as long as the slower of reading and multiplying."""

MEMORY_SPREAD, CORES_SPREAD = 0.3, 0.15
MEMORY_DRIFT, CORES_DRIFT = 0.02, 0.012
NOISE, STRAY = 0.06, 0.25
"""Of logarithms of times: how far the paces of memory and cores may be from what was measured, how far they go in a
round, how far a pass is from what they say, and how much farther than that it is believed."""


class Recent:
    """The median of the last values.

    Args:
        start: a first value.
        times: that it counts.
        most: values that count.
    """

    def __init__(self, start: float, times: int = 1, most: int = RECENT) -> None:
        self._values = deque([start] * times, maxlen=most)
        self.middle = start

    def add(self, value: float) -> None:
        self._values.append(value)
        self.middle = median_high(self._values)


class Pace:
    """How passes go now, beside what was measured.

    A pass reads the weights and multiplies by them at the same time, and takes about as long as the slower of the two.
    A machine's memory may be slower for some seconds by half, and its cores where others share them. So a pass over x
    tokens takes

        (m^K f + c^K (1 - f))^(1/K)    times what was measured,    f = 1 / (1 + (x / knee)^K)

    with a pace m of the memory and c of the cores: the sum of the K-th powers of both times, in place of the larger
    one. The logarithms of m and c are followed by an extended Kalman filter, so passes over few tokens tell of the
    memory and those over many of the cores. Passes of rounds without a tree go other ways, and have a share of their
    own beside that.

    Args:
        knee: tokens by which multiplying takes as long as reading.
    """

    def __init__(self, knee: float) -> None:
        self._part = cache(lambda tokens: 1 / (1 + (tokens / knee) ** SHARPNESS))
        self._plain = Recent(1.0, BELIEVED)
        self._memory = self._cores = 0.0
        self._memory_variance, self._covariance, self._cores_variance = MEMORY_SPREAD**2, 0.0, CORES_SPREAD**2
        self._powers = 1.0, 1.0

    @property
    def now(self) -> float:
        """The pace of the memory."""
        return math.exp(self._memory)

    def of(self, tokens: int, plain: bool) -> float:
        """How many times as long as it was measured such a pass takes."""
        part, (memory, cores) = self._part(tokens), self._powers
        expected: float = (part * memory + (1 - part) * cores) ** (1 / SHARPNESS)
        return expected * self._plain.middle if plain else expected

    def add(self, tokens: int, plain: bool, quotient: float) -> None:
        """Count a pass that took so many times as long as when it was measured."""
        if plain:
            self._plain.add(quotient / self.of(tokens, False))
        error = min(max(math.log(max(quotient, 1e-6) / self.of(tokens, plain)), -STRAY), STRAY)
        part, (memory, cores) = self._part(tokens), self._powers
        waiting = part * memory / (part * memory + (1 - part) * cores)
        self._memory_variance = min(self._memory_variance + MEMORY_DRIFT**2, MEMORY_SPREAD**2)
        self._cores_variance = min(self._cores_variance + CORES_DRIFT**2, CORES_SPREAD**2)
        of_memory = self._memory_variance * waiting + self._covariance * (1 - waiting)
        of_cores = self._covariance * waiting + self._cores_variance * (1 - waiting)
        variance = of_memory * waiting + of_cores * (1 - waiting) + NOISE**2
        self._memory += of_memory / variance * error
        self._cores += of_cores / variance * error
        self._memory_variance -= of_memory * of_memory / variance
        self._covariance -= of_memory * of_cores / variance
        self._cores_variance -= of_cores * of_cores / variance
        self._powers = math.exp(SHARPNESS * self._memory), math.exp(SHARPNESS * self._cores)


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds of rounds of one batch behind contexts of one length, as the machine is now.

    Attributes:
        passes: by nodes of each tree.
        drafts: by levels.
        rest: of a round.
        probing: P.
    """

    passes: list[float]
    drafts: list[float]
    rest: float
    probing: float

    def round(self, nodes: int, levels: int, probing: bool = False) -> float:
        """Of a round with trees of that many nodes, probes among them or not, after a draft of that many levels."""
        return self.passes[nodes] + self.beside(levels, probing)

    def beside(self, levels: int, probing: bool = False) -> float:
        """The same without the pass."""
        draft = self.drafts[levels] if levels < len(self.drafts) else 0.0
        return probing * self.probing + draft + self.rest


class Costs:
    """Seconds of rounds.

    Args:
        passes: T(n) by number of tokens.
        drafts: D(l) for one sequence, by levels from 0 on.
        attention: a and b, of one sequence; not negative.
        probing: P.
    """

    def __init__(
        self,
        passes: Mapping[int, float],
        drafts: Mapping[int, float],
        attention: tuple[float, float] = (0.0, 0.0),
        probing: float = 0.0,
    ) -> None:
        self.passes, self.drafts = dict(sorted(passes.items())), dict(sorted(drafts.items()))
        self.attention = attention
        self.probing = probing
        self._table = _between(self.passes)
        last = len(self._table) - 1
        self._slope = (self._table[last] - self._table[max(1, last // 2)]) / max(1, last - last // 2)
        self._pace = Pace(last * self._table[1] / self._table[last])
        self._rest = Recent(0.0)
        self._drafting: dict[int, Recent] = {}
        self._drafts: dict[tuple[int, int], Recent] = {}
        self._passes = lru_cache(maxsize=8)(self._measured)

    def round(self, batch: int, nodes: int, levels: int, further: int = 0) -> float:
        """Seconds of a round with trees of that many nodes after a draft of that many levels.

        Args:
            batch: sequences.
            nodes: of each tree.
            levels: of the draft.
            further: tokens of their contexts, all together, beyond `CONTEXT` for each; below 0 where they are shorter.
        """
        return self.prices(batch, nodes, further).round(nodes, levels)

    def prices(self, batch: int, most: int, further: int = 0) -> Prices:
        """The same for all trees of up to `most` nodes and drafts of any depth."""
        drafting = self._drafting[batch].middle if batch in self._drafting else 1.0
        shares = {level: share.middle for (size, level), share in self._drafts.items() if size == batch}
        paces = [self._pace.of(batch, True)] * 2
        paces += [self._pace.of(batch * nodes, False) for nodes in range(2, most + 1)]
        passes = [pace * seconds for pace, seconds in zip(paces, self._passes(batch, most, further), strict=True)]
        passes[2:] = accumulate(passes[2:], max)  # more tokens never take less
        return Prices(
            passes,
            [
                drafting * shares.get(level, 1.0) * self.drafts.get(level, 0.0)
                for level in range(1 + max(self.drafts, default=0))
            ],
            self._rest.middle,
            self._pace.now * self.probing,
        )

    def observe(
        self,
        batch: int,
        nodes: int,
        levels: int,
        seconds: Mapping[str, float],
        further: int = 0,
        probing: bool = False,
    ) -> None:
        """Take in a round: seconds by step, as `StepTimer` names them; the rest as `Prices.round` has it."""
        passed = seconds["verify"] + seconds["judge"]
        expected = self._pass(batch, nodes, further) + probing * self.probing
        self._pace.add(batch * nodes, nodes < 2, passed / expected)
        self._rest.add(sum(seconds.values()) - passed - seconds["draft"])
        self._observe_draft(batch, levels, seconds["draft"])

    def _observe_draft(self, batch: int, levels: int, seconds: float) -> None:
        """A draft goes by the pace of all drafts, and one of so many levels has a share of its own: many end before."""
        pace = self._drafting.setdefault(batch, Recent(1.0, most=NOW))
        share = self._drafts.setdefault((batch, levels), Recent(1.0, 2 * NOW))
        measured = self.drafts.setdefault(levels, seconds / pace.middle)
        if measured:
            quotient = seconds / measured
            share.add(quotient / pace.middle)
            if levels:
                pace.add(quotient / share.middle)

    def _measured(self, batch: int, most: int, further: int) -> list[float]:
        """Seconds of passes over 0 to `most` nodes of each sequence, as they were measured."""
        return [self._pass(batch, nodes, further) for nodes in range(most + 1)]

    def _pass(self, batch: int, nodes: int, further: int) -> float:
        """The same of a pass over so many."""
        beyond = batch * nodes - len(self._table) + 1
        near = self._table[-1] + beyond * self._slope if beyond > 0 else self._table[batch * nodes]
        each, by_node = self.attention
        most = near / (2 * CONTEXT * batch)  # no more than half of a pass was attention
        return near + max(further, -CONTEXT * batch) * min(each + by_node * nodes, most)


def _between(passes: Mapping[int, float]) -> list[float]:
    """T(n) for n = 0 .. the largest measured: straight lines between what was measured, never falling.

    More tokens never take less: a pass that took longer than a wider one was measured in a bad moment, and takes no
    longer than that one.
    """
    least = list(accumulate([*passes.values()][::-1], min))[::-1]
    sizes = list(passes)
    table = [least[0]] * (sizes[0] + 1)
    for (low, start), (high, end) in pairwise(zip(sizes, least, strict=True)):
        table += [start + (end - start) * step / (high - low) for step in range(1, high - low + 1)]
    return table


def measured_costs(target: Target, drafter: Drafter, plans: Mapping[int, TreePlan], threads: int) -> Costs:
    """The costs of this target and drafter on this machine, from the cache folder or measured now.

    Args:
        plans: the tree of each number of levels.
        threads: CPU threads of the process.
    """
    file = _file(target, drafter, threads)
    costs = _read(file)
    if costs is not None and not _outdated(costs, target):
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


def _outdated(costs: Costs, target: Target) -> bool:
    sizes = [n for n in (FEW, MANY) if n in costs.passes]
    now = pass_seconds(target, judged(target), sizes, LOOKS)
    paces = [now[n] / costs.passes[n] for n in now]
    return max(paces) > TRUSTED * min(paces)


def judged(target: Target) -> Callable[[DraftTree], object]:
    """A pass and its judgement at temperature 0, as a round has them."""
    noise = NoiseTable(target.spec.vocab_size, target.device)
    scores = Scores([SamplingParams()], [[0]], [1], noise, target.judge)
    return lambda tree: walked(tree, target.verify(tree), scores)


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
            started = now(target)
            work(tree)
            times[n].append(now(target) - started)
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
    table, surplus, told = _between(passes), [], 0
    times: dict[int, list[float]] = {levels: [] for levels in plans}
    for _ in range(1 + REPEATS):
        for levels in order:
            plan = plans[levels]
            if len(line) + max(plan.nodes, 1) + drafter.probes > spec.context_length:
                break
            scores = Scores(params, [line], [len(line)], noise, target.judge)
            started = now(target)
            drafted = drafter.propose(Sequences([line], scores, False, plan, target.device))
            taken = now(target) - started
            if not told or drafted.candidate.any():
                times[told if drafter.probes else levels].append(taken)
            tree = drafted if drafter.probes else root_only(line[-1:], target.device)
            started = now(target)
            output = target.verify(tree, drafter.taps)
            verdict = coupled(tree, output, scores)
            if drafter.probes and levels and tree.size < len(table):
                surplus.append(now(target) - started - table[tree.size])
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


def now(target: Target) -> float:
    """Seconds, with all work on the device done."""
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    return time.perf_counter()
