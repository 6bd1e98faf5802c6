"""What a peer must know to run like us, as plain values, for it runs in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from s4c.models.loading import DTYPES


@dataclass(frozen=True)
class Setting:
    """The target and how it runs.

    Attributes:
        directory: the model as a Hugging Face directory.
        name: the target as the user named it.
        fingerprint: of its weights.
        dtype: such as `float32`.
        device: such as `cpu`.
        threads: CPU threads.
        eos_token_ids: the tokens that end an answer.
        context_length: most tokens of a sequence.
    """

    directory: str
    name: str
    fingerprint: str
    dtype: str
    device: str
    threads: int
    eos_token_ids: tuple[int, ...]
    context_length: int

    @property
    def folder(self) -> Path:
        return Path(self.directory)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]
