"""`s4c info`: what is here, and what a pass costs on this machine.

s4c info --target smollm2-135m --threads 2
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import s4c
from s4c.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from s4c.engine.llm import LLM
    from s4c.models.base import Target

PASSES = 7
READ_BYTES = 256 * 2**20
ROUNDED = 32
"""Tokens that are generated to measure a round."""

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")
"""CPU features that decide how fast a pass can be, as the kernel calls them."""


@options.asking_how
def info(
    target: Annotated[
        str | None,
        typer.Option(help="Target to measure, as for `s4c generate`.", show_default="the built-in one, if cached"),
    ] = None,
    drafter: options.Drafter = "auto",
    tree: options.Tree = "auto",
    *,
    how: options.How,
    measure: Annotated[bool, typer.Option(help="Load the target and measure it.")] = True,
    as_json: options.Json = False,
) -> None:
    """Versions, devices, cache, models, drafters, and the measured cost of a pass."""
    options.start()
    import torch

    models = _models()
    if target is None and models[options.DEFAULT_TARGET]["cached"]:
        target = options.DEFAULT_TARGET
    measured, used = None, torch.get_num_threads()
    if measure and target is not None:
        llm = options.load(target, drafter, how, tree=tree)
        with options.spinner("measuring"):
            measured, used = _measure(llm, how.runtime), llm.threads
    report = {
        "versions": _versions(),
        "machine": _machine(used),
        "cache": _cache(),
        "models": models,
        **_drafters(),
        "target": measured,
    }
    if as_json:
        typer.echo(json.dumps(report))
    else:
        _print(report)


def _versions() -> dict[str, str]:
    parts = {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    return {"s4c": s4c.__version__, "python": platform.python_version(), **parts}


def _machine(threads: int) -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "devices": ["cpu", *gpus],
        "cores": os.cpu_count(),
        "threads": threads,
        "cpu": _cpu_features(),
        "torch kernels": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_features() -> list[str]:
    """Those of `FEATURES` that the kernel reports; empty where it reports none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    flags = set(lines[0].split()) if lines else set()
    return [name for name in FEATURES if name in flags]


def _cache() -> dict[str, Any]:
    from s4c.models.builtin import home

    sizes = [path.stat().st_size for path in home().rglob("*") if path.is_file()]
    return {"folder": str(home()), "megabytes": round(sum(sizes) / 1e6, 1)}


def _models() -> dict[str, dict[str, Any]]:
    """The built-in models, and whether they are in the cache."""
    from s4c.models.builtin import BUILTIN, is_cached

    return {alias: {"package": model.package, "cached": is_cached(alias)} for alias, model in BUILTIN.items()}


def _drafters() -> dict[str, dict[str, Any]]:
    """The methods with their settings, and the drafters that come with the package."""
    from s4c.drafters import FULL, METHODS
    from s4c.drafters.checkpoint import read_checkpoint
    from s4c.engine.llm import SHIPPED

    shipped = {path.parent.name: read_checkpoint(path.parent) for path in sorted(SHIPPED.glob("*/config.json"))}
    return {
        "methods": {
            name: {
                "trained": method.model is not None,
                "trained with its target": name in FULL,
                "drafter": (method.form or name) if method.create is not None else None,
                "settings": {f.name: f.default for f in fields(method.config)} if method.config else {},
            }
            for name, method in METHODS.items()
        },
        "shipped": {
            name: {"method": drafter.method, "target": drafter.target_name, "tree": drafter.default_tree}
            for name, drafter in shipped.items()
        },
    }


def _measure(llm: LLM, asked: str) -> dict[str, Any]:
    """What runs the target, and what passes and rounds cost, in milliseconds."""
    target = llm.target
    return {
        "name": target.spec.name,
        "fingerprint": target.spec.fingerprint,
        "runtime": target.runtime,
        "reason": _reason(target, asked),
        "device": str(target.device),
        "dtype": str(target.dtype).removeprefix("torch."),
        "context_length": target.spec.context_length,
        "pass_ms": pass_costs(target),
        "floor_ms": round(1e3 * target.weight_bytes / read_bandwidth(llm), 3),
        "round": round_cost(llm),
        "planner": planner_costs(llm),
    }


def _reason(target: Target, asked: str) -> str:
    """Why this runtime runs the target."""
    from s4c.models.loading import choose_runtime, load_config, resolve

    return choose_runtime(asked, load_config(resolve(target.spec.name)), target.dtype, target.device)[1]


def pass_costs(target: Target) -> dict[int, float]:
    """Milliseconds of a verification pass by number of tokens."""
    from s4c.engine.measure import SIZES, pass_seconds

    return _milliseconds(pass_seconds(target, target.verify, SIZES))


def planner_costs(llm: LLM) -> dict[str, dict[int, float]] | None:
    """What `--tree plan` goes by, in milliseconds: None before it was asked for."""
    from s4c.engine.measure import known_costs

    costs = known_costs(llm.target, llm.drafter, llm.threads)
    if costs is None:
        return None
    return {"pass_ms": _milliseconds(costs.passes), "draft_ms_by_levels": _milliseconds(costs.drafts)}


def _milliseconds(seconds: dict[int, float]) -> dict[int, float]:
    return {n: round(1e3 * value, 3) for n, value in seconds.items()}


def read_bandwidth(llm: LLM) -> float:
    """Bytes per second at which weights are read here: by the fastest of a few products with a matrix of 256 MB."""
    import torch

    from s4c.engine.stats import clock
    from s4c.models.layers import Linear

    linear = Linear.of(torch.ones(READ_BYTES // 4 // 1024, 1024, device=llm.target.device))
    linear.pack(torch.float32, llm.target.runtime == "native")
    row = torch.ones(1, 1024, device=llm.target.device)
    seconds = []
    for _ in range(1 + PASSES):
        started = clock(llm.target.device)
        linear(row)
        seconds.append(clock(llm.target.device) - started)
    return READ_BYTES / min(seconds)


def round_cost(llm: LLM) -> dict[str, Any]:
    """Mean milliseconds of the steps of a round of this drafter and tree."""
    from s4c.engine.costs import CONTEXT
    from s4c.engine.measure import some_tokens
    from s4c.types import SamplingParams

    spec = llm.target.spec
    room = min(ROUNDED, spec.context_length // 2)
    prompt = some_tokens(llm.target, min(CONTEXT, spec.context_length - room)).tolist()
    params = SamplingParams(max_new_tokens=room, ignore_eos=True)
    llm.generate(prompt, replace(params, max_new_tokens=min(8, room)))
    stats = llm.generate(prompt, params).stats
    steps = {name: round(1e3 * seconds / stats.rounds, 3) for name, seconds in stats.steps.items()}
    return {"drafter": llm.drafter.name, "tree": llm.tree, "steps_ms": steps}


def _print(report: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = options.console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    for name, value in report["machine"].items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    table.add_row("cache", f"{report['cache']['folder']} ({report['cache']['megabytes']} MB)")
    for alias, model in report["models"].items():
        table.add_row("built-in model", f"{alias} ({model['package']}), {'' if model['cached'] else 'not yet '}cached")
    for name, method in report["methods"].items():
        settings = " ".join(f"{key}={value}" for key, value in method["settings"].items())
        ways = [f"--drafter {method['drafter']}"] if method["drafter"] else []
        ways += ["s4c train"] if method["trained"] else []
        ways += ["s4c train --full"] if method["trained with its target"] else []
        table.add_row("method", escape(f"{name} ({' or '.join(ways)}) {settings}"))
    for name, drafter in report["shipped"].items():
        table.add_row("shipped drafter", f"{name}: {drafter['method']} for {drafter['target']}")
    console.print(table, soft_wrap=True)
    if report["target"] is not None:
        _print_target(report["target"], console)


def _print_target(target: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    console.print(
        f"\ntarget {target['name']}: {target['runtime']} ({target['reason']}), {target['dtype']} on "
        f"{target['device']}, context {target['context_length']}",
        soft_wrap=True,
    )
    table = Table()
    for heading in ("tokens of a pass", "ms", "of it, reading the weights"):
        table.add_column(heading, justify="right")
    for n, cost in target["pass_ms"].items():
        table.add_row(str(n), f"{cost:.1f}", f"{target['floor_ms'] / cost:.0%}")
    console.print(table)
    console.print(f"reading all weights once takes {target['floor_ms']:.1f} ms at the memory's measured speed")
    steps = ", ".join(f"{name} {cost:.1f}" for name, cost in target["round"]["steps_ms"].items())
    measured = target["round"]
    console.print(f"a round of {measured['drafter']} with {measured['tree']}, ms: {steps}", soft_wrap=True)
    if target["planner"] is not None:
        drafts = ", ".join(f"{levels}: {cost:.1f}" for levels, cost in target["planner"]["draft_ms_by_levels"].items())
        console.print(f"--tree plan goes by a draft of so many levels, ms: {drafts}", soft_wrap=True)
