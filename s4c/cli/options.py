"""Options that several commands share, and what they load."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console

if TYPE_CHECKING:
    from s4c.engine.llm import LLM

MODEL, SAMPLING = "Model", "Sampling"
DEFAULT_TARGET = "smollm2-135m"
WIDE = 200
"""Columns of tables in a pipe, where no terminal bounds them."""

Target = Annotated[
    str,
    typer.Option(
        help="A built-in model, a local Hugging Face directory, a .gguf file or a hub id.", rich_help_panel=MODEL
    ),
]
Drafter = Annotated[
    str,
    typer.Option(
        help="auto (shipped+ngram, or ngram where no drafter for the target is shipped), none (plain decoding), "
        "shipped, a method without training, perhaps with what it wants to know (ngram, ngram=corpus.txt; see "
        "`s4c info`), the directory of a checkpoint, or two joined by +.",
        rich_help_panel=MODEL,
    ),
]


def _tree(auto: str) -> Any:
    forms = "comb:K or comb:KxD, best:N or best:NxD, chain:D (K children, D levels, N nodes with the root)"
    return typer.Option(
        help=f"Shape of the draft trees: {forms}, plan (what is fastest here, decided anew each round), or auto "
        f"({auto}).",
        rich_help_panel=MODEL,
    )


Tree = Annotated[
    str, _tree("plan under the coupled rule where the drafter can be planned, else what the drafter recommends")
]
RecommendedTree = Annotated[str, _tree("what the drafter recommends")]
Rule = Annotated[
    str,
    typer.Option(
        help="Acceptance rule: coupled (the same tokens as plain decoding), rejection (the same law), or typical "
        "(LOSSY: faster above temperature 0, and another law).",
        rich_help_panel=MODEL,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16, int8 (CPU), or auto: float32 on a CPU, bfloat16 on a GPU.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.", rich_help_panel=MODEL)]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads.", show_default="as torch finds them", rich_help_panel=MODEL)
]
Runtime = Annotated[
    str,
    typer.Option(help="native (C++, CPU), torch, hf (any model), or auto: the fastest.", rich_help_panel=MODEL),
]
ContextLength = Annotated[
    int | None,
    typer.Option(help="Most tokens of prompt and answer.", show_default="the model's own", rich_help_panel=MODEL),
]

MaxNewTokens = Annotated[int, typer.Option(help="Most tokens to generate.", rich_help_panel=SAMPLING)]
Temperature = Annotated[float, typer.Option(help="0 takes the most probable token.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float,
    typer.Option(help="Keep the fewest tokens whose probabilities sum to this; 1 is off.", rich_help_panel=SAMPLING),
]
TopK = Annotated[int, typer.Option(help="Keep the K most probable tokens; 0 is off.", rich_help_panel=SAMPLING)]
MinP = Annotated[
    float,
    typer.Option(
        help="Keep tokens at least this many times as probable as the first; 0 is off.", rich_help_panel=SAMPLING
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(help="Divides the scores of tokens of prompt and answer; 1 is off.", rich_help_panel=SAMPLING),
]
PresencePenalty = Annotated[
    float, typer.Option(help="Taken off the scores of tokens of the answer; 0 is off.", rich_help_panel=SAMPLING)
]
FrequencyPenalty = Annotated[
    float, typer.Option(help="Taken off once for each time that the token stands there.", rich_help_panel=SAMPLING)
]
Stop = Annotated[
    list[str] | None, typer.Option(help="A string that ends the answer; may be repeated.", rich_help_panel=SAMPLING)
]
Seed = Annotated[
    int, typer.Option(help="The same seed writes the same text, whatever the drafter.", rich_help_panel=SAMPLING)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Data = Annotated[list[Path], typer.Option(help="JSONL that `s4c distill` wrote; may be repeated.", show_default=False)]


@dataclass(frozen=True)
class How:
    """How a target runs, which every command that loads one asks alike; see `asking_how`."""

    dtype: Dtype = "auto"
    device: Device = "auto"
    threads: Threads = None
    runtime: Runtime = "auto"
    context_length: ContextLength = None


def asking_how(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes `how: How`, as typer takes it: with the options of `How` in its place."""
    hints = get_type_hints(How, include_extras=True)
    asked = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(How)
    ]
    signature = inspect.signature(command, eval_str=True)
    parameters = [p for own in signature.parameters.values() for p in (asked if own.name == "how" else [own])]

    @wraps(command)
    def run(**given: Any) -> None:
        command(how=How(**{p.name: given.pop(p.name) for p in asked}), **given)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def console() -> Console:
    """Where results are printed: as wide as the terminal or COLUMNS says, else as wide as they need."""
    made = Console(highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDE
    return made


def start() -> None:
    """Import what takes seconds to import, with a sign of life."""
    if "s4c.engine.llm" not in sys.modules:
        with spinner("starting torch"):
            import_module("s4c.engine.llm")
            for name in ("AutoConfig", "AutoTokenizer"):
                getattr(import_module("transformers"), name)


@contextmanager
def spinner(message: str) -> Iterator[None]:
    """Show on a terminal's stderr that something takes its time."""
    with Console(stderr=True).status(message):
        yield


def load(
    target: str,
    drafter: str,
    how: How,
    *,
    tree: str = "auto",
    rule: str = "coupled",
    max_batch: int = 1,
) -> LLM:
    """The model that the options ask for.

    Raises:
        ValueError: as `s4c.LLM`.
    """
    start()
    from s4c.engine.llm import LLM

    return LLM(target, drafter, tree=tree, rule=rule, max_batch=max_batch, **vars(how))
