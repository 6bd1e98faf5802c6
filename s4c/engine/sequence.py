"""One request on its way: its tokens, its text, and where it stops.

Tokens are taken in one by one, whatever a round committed, so a request ends at exactly the token at which
plain decoding would have ended it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

from s4c.engine.stats import Stats
from s4c.errors import BadLogits
from s4c.types import SamplingParams
from s4c.verify.scores import why_lawless

Decode = Callable[[list[int]], str]
"""Token ids to text, special tokens left out."""


@dataclass
class Generation:
    """The outcome of a request.

    Attributes:
        text: the output without special tokens and without the stop string.
        token_ids: the generated tokens, a closing end-of-sequence token included.
        finish_reason: `eos`, `stop` (a stop string or token), `length` (max_new_tokens or the end of the
            context) or `error`.
        origins: for each token 0 for a bonus, else the level of the draft tree that guessed it.
        logprobs: log-probability of each token under the processed law, if asked for.
        prompt_tokens: number of tokens of the prompt.
        seed: the seed used.
        stats: figures.
        error: what went wrong, with finish reason `error`.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    origins: list[int]
    logprobs: list[float] | None
    prompt_tokens: int
    seed: int
    stats: Stats
    error: str | None = None


class Detokenizer:
    """Text that grows token by token; characters cut in two wait for their other half."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._context = 0
        self._done = 0

    def add(self, *tokens: int) -> str:
        """The text that further tokens complete."""
        self._tokens += tokens
        before, text = self._pair()
        if text.endswith("\ufffd"):
            return ""
        return self._emit(before, text)

    def flush(self) -> str:
        """What is left, a torn character included."""
        return self._emit(*self._pair())

    def _pair(self) -> tuple[str, str]:
        # The last finished token is decoded along, for a tokenizer may glue tokens by what stands before them.
        return self._decode(self._tokens[self._context : self._done]), self._decode(self._tokens[self._context :])

    def _emit(self, before: str, text: str) -> str:
        self._context, self._done = max(self._done - 1, 0), len(self._tokens)
        return text[len(before) :]


@dataclass(eq=False)
class Sequence:
    """A request in the engine.

    Attributes:
        tokens: prompt and output; the last one is the root of the next round.
        params: with the seed set.
        slot: where it stands in the caches while it runs; -1 while it waits.
        failure: what ended it before its time: `BadLogits` where the target had no law, anything where its text was to
            be cached.
        text: of the output, as far as somebody has asked for it.
    """

    prompt: list[int]
    params: SamplingParams
    decode: Decode | None
    eos_token_ids: tuple[int, ...]
    context_length: int
    slot: int = -1
    finish_reason: str | None = None
    failure: Exception | None = None
    text: str = ""
    origins: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    tokens: list[int] = field(init=False)
    _released: int = 0
    _unread: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self._detokenizer = Detokenizer(self.decode) if self.decode else None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def succeeded(self) -> bool:
        """Whether it has ended as it should."""
        return self.finished and self.failure is None

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    def append(self, tokens: Ordered[int], logprobs: Ordered[float] | None = None) -> None:
        """Take in what a round committed, up to where the request ends: with an error where the target had no law."""
        kept = 0
        for index, token in enumerate(tokens):
            if token < 0:
                self.finish_reason, self.failure = "error", BadLogits(why_lawless(token))
                break
            kept += 1
            self.tokens.append(token)
            self.origins.append(index + 1 if index < len(tokens) - 1 else 0)
            if logprobs is not None:
                self.logprobs.append(logprobs[index])
            self.finish_reason = self._end_at(token)
            if self.finished:
                break
        if kept:
            self.stats.record_round(kept)
        if self.finished:
            self._close()

    def released_text(self) -> str:
        """Text that came since the last call, without what might still become a stop string."""
        self._read()
        end = len(self.text)
        if not self.finished:
            end -= max((_overlap(self.text, stop) for stop in self.params.stop), default=0)
        text = self.text[self._released : end]
        self._released = max(self._released, end)
        return text

    def generation(self) -> Generation:
        """The outcome of a finished request."""
        assert self.finish_reason is not None
        assert self.params.seed is not None
        return Generation(
            text=self.text,
            token_ids=self.output,
            finish_reason=self.finish_reason,
            origins=self.origins,
            logprobs=self.logprobs if self.params.logprobs else None,
            prompt_tokens=len(self.prompt),
            seed=self.params.seed,
            stats=self.stats,
            error=None if self.failure is None else str(self.failure),
        )

    def _end_at(self, token: int) -> str | None:
        """The finish reason, if the request ends with this token."""
        if token in self.eos_token_ids and not self.params.ignore_eos:
            return "eos"
        if token in self.params.stop_token_ids:
            return "stop"
        self._unread.append(token)
        if self.params.stop and self._read():
            return "stop"
        if len(self.tokens) - len(self.prompt) >= self.params.max_new_tokens:
            return "length"
        return "length" if len(self.tokens) >= self.context_length else None

    def _read(self) -> bool:
        """Append the text of the tokens that are not part of it yet, up to a stop string; whether there is one."""
        tokens, self._unread = self._unread, []
        return self._detokenizer is not None and bool(tokens) and self._cut_at_stop(self._detokenizer.add(*tokens))

    def _cut_at_stop(self, new: str) -> bool:
        """Append new text; cut it before the first stop string in it."""
        searched = len(self.text)
        self.text += new
        found = [self.text.find(stop, max(0, searched - len(stop) + 1)) for stop in self.params.stop]
        first = min((at for at in found if at >= 0), default=-1)
        if first >= 0:
            self.text = self.text[:first]
        return first >= 0

    def _close(self) -> None:
        self._read()
        if self._detokenizer is not None:
            self._cut_at_stop(self._detokenizer.flush())


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
