"""Whether an answer is that of plain decoding: identical, identical up to a tie of the dtype, or different.

A tie is two tokens whose scores, processed logit plus noise, lie within `TIE` of each other where another order of the
same sums may have been taken. The native runtime knows one order alone, so its methods have no ties.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from s4c.models.base import Target
from s4c.models.sampling import noise_kernel
from s4c.types import SamplingParams
from s4c.verify.noise import NoiseTable
from s4c.verify.scores import Scores
from s4c.verify.tree import root_only

TIE = {torch.float32: 1e-4, torch.bfloat16: 1.0, torch.float16: 0.1, torch.int8: 1.0}
"""Two scores no further apart than this may change places with the order of a sum, where that order may change."""


class Judge:
    """Compares answers of one target.

    Args:
        target: between passes it must hold no running sequence in slot 0, where the judge asks for scores.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def compare(self, prompt: list[int], plain: list[int], other: list[int], params: SamplingParams, own: bool) -> str:
        """`identical`, `tie: ...` or `different: ...`, with the first two tokens that differ and their scores.

        Args:
            own: whether this engine wrote the other answer; on the native runtime it then has no ties.
        """
        if other == plain:
            return "identical"
        at = next((i for i, (a, b) in enumerate(zip(plain, other, strict=False)) if a != b), None)
        if at is None:
            return f"different: {len(other)} tokens instead of {len(plain)}"
        left, right = self.scores_after(prompt, plain[:at], [plain[at], other[at]], params)
        exact = own and self.target.runtime == "native"
        kind = "tie" if not exact and abs(left - right) <= TIE[self.target.dtype] else "different"
        return f"{kind}: token {at} is {other[at]} ({right:.5f}) instead of {plain[at]} ({left:.5f})"

    def scores_after(
        self, prompt: list[int], written: list[int], tokens: Sequence[int], params: SamplingParams
    ) -> list[float]:
        """What decides between tokens after a text: processed logit plus noise, by a pass over one token."""
        target, line = self.target, prompt + written
        target.reserve(1, len(line) + 1)
        target.prefill(0, torch.tensor(line[:-1], dtype=torch.int64, device=target.device))
        logits = target.verify(root_only(line[-1:], target.device)).logits
        table = NoiseTable(target.spec.vocab_size, target.device, noise_kernel(target.device))
        scores = Scores([params], [line], [len(prompt)], table)
        processed = scores.process(logits)
        noise = scores.noise(torch.tensor([[len(line)]], device=target.device))
        total = processed if noise is None else processed + noise
        values: list[float] = total[0, 0, list(tokens)].tolist()
        return values
