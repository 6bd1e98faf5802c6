"""The command line: a table of contents, and what all commands share.

    s4c generate "Why is the sky blue?"

The commands import torch when they run, so that help is quick. Text and results go to stdout, everything else
to stderr. A fault of the user's ends as one line and code 2, one of the files or of the machine as one line and
code 1, an interrupt as code 130; `--debug` (or S4C_DEBUG=1) before the command shows where an error came from.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import s4c
from s4c.cli.average import average
from s4c.cli.bench import app as bench
from s4c.cli.chat import chat
from s4c.cli.distill import distill
from s4c.cli.evaluate import evaluate
from s4c.cli.generate import generate
from s4c.cli.info import info
from s4c.cli.train import train
from s4c.errors import BadLogits, CorruptCheckpoint


class Commands(TyperGroup):
    """The commands, their errors turned into one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"s4c: {error}", err=True)
            raise typer.Exit(1 if isinstance(error, (OSError, BadLogits, CorruptCheckpoint)) else 2) from None
        except RuntimeError as error:
            if ctx.params["debug"] or type(error).__name__ != "OutOfMemoryError":
                raise
            typer.echo(f"s4c: the GPU has too little memory left for this ({error})", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("s4c: interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"s4c {s4c.__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", envvar="S4C_DEBUG", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Makes a causal language model generate faster, with exactly the same output."""


app.command()(generate)
app.command()(chat)
app.command()(info)
app.command()(distill)
app.command()(train)
app.command()(average)
app.command("eval")(evaluate)
app.add_typer(bench, name="bench")
