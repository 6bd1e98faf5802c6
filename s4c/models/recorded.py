"""Passes of fixed shapes, recorded once and replayed.

On a GPU the few hundred small kernels of a pass take longer to launch than to run. A CUDA graph launches them all at
once, but it knows no other shapes, addresses or numbers of the host than those that it was recorded with. So a
recorded pass reads its inputs from buffers of its own, and leaves its output in another.

Elsewhere the pass is computed from these buffers each time, which is what the tests hold against a pass of free shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3
"""Runs before a recording, in which libraries choose their kernels and take the memory that they want."""


class Recorded:
    """A function of tensors, for inputs of one shape.

    Args:
        function: reads nothing but its inputs and tensors that stay where they are, and never waits for the device.
        inputs: the first ones; their shapes, dtypes and device are those of all later ones.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self._function = function
        self._inputs = tuple(x.clone() for x in inputs)
        self._graph: Any = None
        if inputs[0].device.type == "cuda":
            self._record()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the function gives, in a tensor that no later call changes."""
        for held, new in zip(self._inputs, inputs, strict=True):
            held.copy_(new)
        if self._graph is None:
            return self._function(*self._inputs)
        self._graph.replay()
        return self._output.clone()

    def _record(self) -> None:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                self._function(*self._inputs)
        torch.cuda.current_stream().wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self._function(*self._inputs)
