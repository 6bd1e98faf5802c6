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
from s4c.engine.stats import StepTimer
from s4c.errors import BadLogits
from s4c.models.base import Target
from s4c.models.sampling import noise_kernel
from s4c.types import DraftTree, SamplingParams, TargetOutput, Verdict
from s4c.verify.noise import NoiseTable
from s4c.verify.rules import Rule
from s4c.verify.scores import Scores
from s4c.verify.typical import any_rule, title


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
    def step(self) -> list[Sequence]:
        """One round for all running sequences.

        Returns:
            The sequences that took part, the ones that it ended among them; empty when there is nothing to do.
        """
        for sequence in self.scheduler.admit():
            self._prefill(sequence)
        running = list(self.scheduler.running)
        if not running:
            return []
        started = time.perf_counter()
        timer = StepTimer()
        with timer.step("schedule"):
            sequences = self._sequences(running)
        with timer.step("draft"):
            tree = self.planner.prune(self.drafter.propose(sequences))
        with timer.step("verify"):
            output = self.target.verify(tree, self.drafter.taps)
        with timer.step("judge"):
            verdict = self._judge(tree, output, sequences.scores, running)
            logprobs = self._logprobs(tree, output, verdict, sequences.scores)
        with timer.step("commit"):
            self.target.commit(verdict)
            self.drafter.commit(tree, verdict, output)
        with timer.step("schedule"):
            self._append(running, verdict, logprobs)
        self.planner.record(verdict, timer.seconds)
        self._account(running, tree, timer, time.perf_counter() - started)
        self.scheduler.retire()
        return running

    def _sequences(self, running: list[Sequence]) -> Sequences:
        """The running sequences as the drafter sees them."""
        tokens = [sequence.tokens for sequence in running]
        params = [sequence.params for sequence in running]
        self.noise.keep(_first_positions(running))
        return Sequences(
            tokens=tokens,
            scores=Scores(params, tokens, [len(s.prompt) for s in running], self.noise, self.target.judge),
            sampled=self.sampled,
            plan=self.planner.plan([len(line) - 1 for line in tokens]),
            device=self.target.device,
        )

    def _prefill(self, sequence: Sequence) -> None:
        """Cache the prompt but its last token, which is the first root."""
        started = time.perf_counter()
        sequence.stats.rule = self.rule_title
        limit = min(len(sequence.prompt) + sequence.params.max_new_tokens, self.target.spec.context_length)
        slots = min(self.scheduler.max_batch, len(self.scheduler.running) + len(self.scheduler.waiting))
        self.target.reserve(slots, limit + self.planner.pool)
        self.drafter.reserve(slots, limit + self.planner.pool)
        tokens = torch.tensor(sequence.prompt[:-1], dtype=torch.int64, device=self.target.device)
        features = self.target.prefill(sequence.slot, tokens, self.drafter.taps)
        self.drafter.prefill(sequence.slot, tokens, features)
        sequence.stats.prefill_seconds = time.perf_counter() - started

    def _judge(self, tree: DraftTree, output: TargetOutput, scores: Scores, running: list[Sequence]) -> Verdict:
        """The verdict; a sequence of which no token can be chosen fails alone, and takes any token in its place."""
        try:
            return self.rule(tree, output, scores)
        except BadLogits as error:
            params = list(scores.params)
            for row in error.rows:
                running[row].fail(str(error))
                output.logits[row] = 0.0
                params[row] = SamplingParams()
            prompts = [len(sequence.prompt) for sequence in running]
            return self.rule(tree, output, Scores(params, scores.tokens, prompts, self.noise))

    def _logprobs(
        self, tree: DraftTree, output: TargetOutput, verdict: Verdict, scores: Scores
    ) -> list[list[float]] | None:
        if not any(request.logprobs for request in scores.params):
            return None
        law = scores.process_tree(output.logits, tree).log_softmax(-1)
        on_path = law.gather(1, verdict.path[..., None].expand(-1, -1, law.shape[-1]))
        values: list[list[float]] = on_path.gather(2, verdict.tokens[..., None])[..., 0].tolist()
        return values

    def _append(self, running: list[Sequence], verdict: Verdict, logprobs: list[list[float]] | None) -> None:
        for row, (sequence, (_, tokens)) in enumerate(zip(running, verdict.lines, strict=True)):
            if not sequence.finished:
                sequence.append(tokens, logprobs[row] if logprobs else None)

    def _account(self, running: list[Sequence], tree: DraftTree, timer: StepTimer, seconds: float) -> None:
        for sequence in running:
            sequence.stats.decode_seconds += seconds
            sequence.stats.tree_sizes[tree.size] = sequence.stats.tree_sizes.get(tree.size, 0) + 1
            for name, value in timer.seconds.items():
                sequence.stats.steps[name] += value

    def _move(self, source: int, destination: int) -> None:
        self.target.move(source, destination)
        self.drafter.move(source, destination)


def _first_positions(running: list[Sequence]) -> dict[int, int]:
    """The first position that each seed may still ask noise for."""
    first: dict[int, int] = {}
    for sequence in running:
        assert sequence.params.seed is not None
        position = len(sequence.tokens)
        first[sequence.params.seed] = min(position, first.get(sequence.params.seed, position))
    return first
