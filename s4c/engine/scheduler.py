"""Which requests run: first come, first served, as many at once as there are slots.

The running sequences of a batch of B always stand in slots 0 .. B - 1; when one ends, the last one moves
into its slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from s4c.engine.sequence import Sequence


class Scheduler:
    """The waiting and the running requests.

    Args:
        max_batch: most sequences to run at once.
        move: called as move(source, destination) when a sequence changes its slot.
    """

    def __init__(self, max_batch: int, move: Callable[[int, int], None]) -> None:
        assert max_batch >= 1
        self.max_batch = max_batch
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._move = move

    @property
    def idle(self) -> bool:
        return not self.waiting and all(sequence.finished for sequence in self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        self.waiting.append(sequence)

    def admit(self) -> Sequence | None:
        """Give a free slot to the next waiting request, which is to be prefilled; None if there is no such pair."""
        if not self.waiting or len(self.running) == self.max_batch:
            return None
        sequence = self.waiting.popleft()
        sequence.slot = len(self.running)
        self.running.append(sequence)
        return sequence

    def requeue(self) -> None:
        """Let all that run wait, before the others: what their slots hold is not to be relied on."""
        unfinished = dict.fromkeys(sequence for sequence in self.running if not sequence.finished)
        for sequence in unfinished:
            sequence.slot = -1
        self.waiting.extendleft(reversed(unfinished))
        self.running.clear()

    def retire(self) -> None:
        """Take out the finished sequences and close the gaps."""
        for sequence in [sequence for sequence in self.running if sequence.finished]:
            last = self.running[-1]
            if last is not sequence:
                self._move(last.slot, sequence.slot)
                last.slot = sequence.slot
                self.running[last.slot] = last
            self.running.pop()

    def cancel(self, sequence: Sequence) -> None:
        """Drop a request: at once where it waits; where it runs, its slot is free when the next round begins."""
        sequence.finish_reason = sequence.finish_reason or "cancelled"
        if sequence in self.waiting:
            self.waiting.remove(sequence)
