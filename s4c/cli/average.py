"""`s4c average`: the mean of drafters, for text that none of them was trained on.

s4c average runs/second/best runs/first/best --out runs/mean
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def average(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(help="Drafters that trainings made of one start; one with all heads first.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.", show_default=False)],
) -> None:
    """Write the mean of drafters, of a further training and where it began, say; measure whether it is better."""
    from s4c.training.average import average as mean

    mean(checkpoints, out)
    typer.echo(f"the mean of {len(checkpoints)} drafters: {out}", err=True)
