"""The engine: rounds over the running sequences.

sequences = admit()                           # free slots go to waiting requests, which are prefilled
tree      = drafter.propose(sequences)        # candidates and probes, as many as are worth their pass
output    = target.verify(tree)               # logits and features, one forward pass
verdict   = rule(tree, output, scores)        # accepted path and bonus
target.commit(verdict); drafter.commit(...)   # keep the accepted path
commit(verdict)                               # append, detokenise, stop
"""

from __future__ import annotations

import time

import torch

from s4c.drafters.base import Drafter, Sequences
from s4c.engine.planner import Planner
from s4c.engine.scheduler import Scheduler
from s4c.engine.sequence import Sequence
from s4c.engine.stats import StepTimer, clock
from s4c.models.base import Target
from s4c.models.sampling import noise_kernel
from s4c.types import DraftTree, TargetOutput, Verdict, placed
from s4c.verify.noise import NoiseTable
from s4c.verify.rules import Rule
from s4c.verify.scores import Scores, seed_of
from s4c.verify.typical import any_rule, title
from s4c.verify.verdict import settled


class Engine:
    """Decodes sequences by drafting and verifying; plain decoding is the drafter that guesses nothing.

    Args:
        target: the model whose output it is.
        drafter: what guesses.
        planner: says which trees are drafted.
        rule: `coupled` or `rejection`; `typical` is lossy.
        max_batch: most sequences to run at once.
    """

    def __init__(self, target: Target, drafter: Drafter, planner: Planner, rule: str, max_batch: int) -> None:
        self.target = target
        self.drafter = drafter
        self.planner = planner
        self.rule: Rule = any_rule(rule)
        self.rule_title = title(rule)
        self.sampled = rule == "rejection"
        self.scheduler = Scheduler(max_batch, self._move)
        self.noise = NoiseTable(target.spec.vocab_size, target.device, noise_kernel(target.device))

    @torch.no_grad()
    def step(self) -> None:
        """One round for all running sequences."""
        try:
            self.scheduler.retire()
            self._admit()
            if self.scheduler.running:
                self._round(list(self.scheduler.running))
        except BaseException:
            self.scheduler.requeue()
            raise

    def _admit(self) -> None:
        """Prefill what there is room for; a sequence with which that fails ends alone."""
        while (sequence := self.scheduler.admit()) is not None:
            try:
                self._prefill(sequence)
            except Exception as failure:
                sequence.failure = failure
                self.scheduler.cancel(sequence)
                self.scheduler.retire()

    def _round(self, running: list[Sequence]) -> None:
        started = time.perf_counter()
        timer = StepTimer()
        with timer.step("schedule"):
            sequences = self._sequences(running)
        with timer.step("draft"):
            tree = self.planner.prune(self.drafter.propose(sequences))
        with timer.step("verify"):
            output = self.target.verify(tree, self.drafter.taps)
        with timer.step("judge"):
            judged = self.rule(tree, output, sequences.scores)
            verdict = settled(judged)
            logprobs = self._logprobs(tree, output, verdict, sequences.scores)
        with timer.step("commit"):
            self.target.commit(verdict)
            self.drafter.commit(tree, verdict, output)
        with timer.step("schedule"):
            for row, (sequence, (_, tokens)) in enumerate(zip(running, judged.lines, strict=True)):
                if not sequence.finished:  # cancelled meanwhile
                    sequence.append(tokens, logprobs[row] if logprobs else None)
        self.planner.record(verdict, timer.seconds)
        self._account(running, tree, timer, time.perf_counter() - started)

    def _sequences(self, running: list[Sequence]) -> Sequences:
        """The running sequences as the drafter sees them."""
        tokens = [sequence.tokens for sequence in running]
        params = [sequence.params for sequence in running]
        self.noise.keep([(seed_of(sequence.params), len(sequence.tokens)) for sequence in running])
        return Sequences(
            tokens=tokens,
            scores=Scores(params, tokens, [len(s.prompt) for s in running], self.noise, self.target.judge),
            sampled=self.sampled,
            plan=self.planner.plan([len(line) - 1 for line in tokens]),
            device=self.target.device,
        )

    def _prefill(self, sequence: Sequence) -> None:
        """Cache the text but its last token, which is the first root."""
        started = clock(self.target.device)
        sequence.stats.rule = self.rule_title
        limit = min(len(sequence.prompt) + sequence.params.max_new_tokens, self.target.spec.context_length)
        slots = min(self.scheduler.max_batch, len(self.scheduler.running) + len(self.scheduler.waiting))
        self.target.reserve(slots, limit + self.planner.pool)
        self.drafter.reserve(slots, limit + self.planner.pool)
        tokens = placed(sequence.tokens[:-1], self.target.device, torch.int64)
        features = self.target.prefill(sequence.slot, tokens, self.drafter.taps)
        self.drafter.prefill(sequence.slot, tokens, features)
        sequence.stats.prefill_seconds += clock(self.target.device) - started

    def _logprobs(
        self, tree: DraftTree, output: TargetOutput, verdict: Verdict, scores: Scores
    ) -> list[list[float]] | None:
        if not any(request.logprobs for request in scores.params):
            return None
        law = scores.process_tree(output.logits, tree).log_softmax(-1)
        on_path = law.gather(1, verdict.path[..., None].expand(-1, -1, law.shape[-1]))
        values: list[list[float]] = on_path.gather(2, verdict.tokens[..., None])[..., 0].tolist()
        return values

    def _account(self, running: list[Sequence], tree: DraftTree, timer: StepTimer, seconds: float) -> None:
        for sequence in running:
            sequence.stats.decode_seconds += seconds
            sequence.stats.tree_sizes[tree.size] = sequence.stats.tree_sizes.get(tree.size, 0) + 1
            for name, value in timer.seconds.items():
                sequence.stats.steps[name] += value

    def _move(self, source: int, destination: int) -> None:
        self.target.move(source, destination)
        self.drafter.move(source, destination)
