"""`s4c info`: what is here, and what a pass costs on this machine.

    s4c info --target smollm2-135m --threads 2
"""

from __future__ import annotations

import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s4c.cli import options

if TYPE_CHECKING:
    from s4c.engine.llm import LLM
    from s4c.models.base import Target

SIZES = (1, 2, 4, 8, 16, 32)
"""Tokens of the passes that are measured."""

CONTEXT = 200
"""Tokens that stand before them."""

PASSES = 7
DRAFTED = 32
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")
"""CPU features that decide how fast a pass can be, as the kernel calls them."""


def info(
    target: Annotated[
        str | None,
        typer.Option(help="Target to measure, as for `s4c generate`.", show_default="the built-in one, if cached"),
    ] = None,
    drafter: options.Drafter = "auto",
    tree: options.Tree = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    runtime: options.Runtime = "auto",
    measure: Annotated[bool, typer.Option(help="Load the target and measure it.")] = True,
    as_json: options.Json = False,
) -> None:
    """Versions, devices, cache, models, drafters, and the measured cost of a pass."""
    with options.spinner("starting torch"):
        import torch  # noqa: F401
    if threads is not None:
        options.set_threads(threads)
    report = {
        "versions": _versions(),
        "machine": _machine(),
        "cache": _cache(),
        "models": _models(),
        "drafters": _drafters(),
        "target": None,
    }
    if target is None and report["models"][options.DEFAULT_TARGET]["cached"]:
        target = options.DEFAULT_TARGET
    if measure and target is not None:
        llm = options.load(target, drafter, tree=tree, dtype=dtype, device=device, runtime=runtime)
        with options.spinner("measuring"):
            report["target"] = _target(llm, runtime)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        _print(report, measure)


def _versions() -> dict[str, str]:
    return {
        "s4c": metadata.version("s4c") if _installed("s4c") else _source_version(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "safetensors")},
    }


def _machine() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "devices": ["cpu", *gpus],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_features(),
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
    }
