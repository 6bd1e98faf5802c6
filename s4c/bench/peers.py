"""What users would run otherwise: transformers' own `generate`, on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from s4c.engine.threads import torch_threads


def transformers_generate(
    directory: Path, dtype: torch.dtype, device: torch.device, threads: int
) -> Callable[[list[int], int], list[int]]:
    """Greedy `generate` of a model directory: prompt and most new tokens to output tokens.

    Args:
        threads: CPU threads of torch while it runs; the engine's own runtime leaves torch but one.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()

    def generate(prompt: list[int], max_new_tokens: int) -> list[int]:
        tokens = torch.tensor([prompt], device=device)
        with torch.no_grad(), torch_threads(threads):
            output = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        written: list[int] = output[0, len(prompt) :].tolist()
        return written

    return generate
