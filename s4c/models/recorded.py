"""Passes of fixed shapes, recorded when they come again, and replayed.

On a GPU the few hundred small kernels of a pass take longer to launch than to run. A CUDA graph launches them all at
once, but it knows no other shapes, addresses or numbers of the host than those that it was recorded with. So a
recorded pass reads its inputs from buffers of its own, and leaves its output in another.

Recordings that are dropped together share a stream and a pool of memory with no others: when a graph goes, what cuBLAS
works in on its stream goes with it, and other graphs of that stream would still write there.

Elsewhere the pass is computed from these buffers each time, which is what the tests hold against a pass of free shapes.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Pass = Callable[..., Tensor]

_idle: list[Any] = []
"""Streams of recordings that are gone: torch has no more than 32 of them for a device, and hands them out again."""


class Recordings:
    """Passes of one owner by what tells them apart.

    Args:
        device: of all their tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._passes: dict[Hashable, Recorded] = {}
        self._place: Any = None

    def __len__(self) -> int:
        return len(self._passes)

    def run(self, key: Hashable, function: Pass, inputs: tuple[Tensor, ...]) -> Tensor:
        """What a function gives, in a tensor that no later call changes.

        Args:
            key: stands for the function, and for the shapes and dtypes of its inputs.
            function: reads nothing but its inputs and tensors that stay where they are, and never waits for the device.
            inputs: of this call.
        """
        if key not in self._passes:
            if self._place is None and self._device.type == "cuda":
                self._place = _Place(self._device)
            self._passes[key] = Recorded(inputs, self._place)
        return self._passes[key](function, inputs)

    def forget(self) -> None:
        """Drop them all."""
        self._passes.clear()


class _Place:
    """The stream and the memory that graphs are recorded in."""

    def __init__(self, device: torch.device) -> None:
        beside = [stream for stream in _idle if stream.device == device]
        self.stream = beside[0] if beside else torch.cuda.Stream(device)
        if beside:
            _idle.remove(self.stream)
        self.pool = torch.cuda.graph_pool_handle()
        weakref.finalize(self, _idle.append, self.stream)


class Recorded:
    """A pass for inputs of one shape. The first call only runs it, the second records it.

    Args:
        inputs: their shapes, dtypes and device are those of all calls.
        place: what it is recorded in; None to compute it each time.
    """

    def __init__(self, inputs: tuple[Tensor, ...], place: _Place | None = None) -> None:
        self._inputs = tuple(torch.empty_like(x) for x in inputs)
        self._place = place
        self._graph: Any = None
        self._seen = False

    def __call__(self, function: Pass, inputs: tuple[Tensor, ...]) -> Tensor:
        """See `Recordings.run`; the function is the same in all calls."""
        for held, new in zip(self._inputs, inputs, strict=True):
            held.copy_(new)
        if self._place is None or not self._seen:
            self._seen = True
            return function(*self._inputs)
        with torch.cuda.device(self._place.stream.device):
            if self._graph is None:
                self._record(function, self._place)
            self._graph.replay()
            return self._output.clone()

    def _record(self, function: Pass, place: _Place) -> None:
        """Run it on the stream of the recording, where libraries take what they work in, and then record it."""
        place.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(place.stream):
            function(*self._inputs)
        torch.cuda.current_stream().wait_stream(place.stream)
        graph = torch.cuda.CUDAGraph()
        with (
            _uncollected(),
            torch.cuda.graph(graph, pool=place.pool, stream=place.stream, capture_error_mode="thread_local"),
        ):
            self._output = function(*self._inputs)
        self._graph = graph


@contextmanager
def _uncollected() -> Iterator[None]:
    """Nothing is collected meanwhile: a graph that went away during a recording would spoil it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
