"""The face of the library: a target, a drafter, and text.

llm = LLM("smollm2-135m")
print(llm.generate("Once upon a time").text)
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from itertools import takewhile
from numbers import Integral
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jinja2 import TemplateError

from s4c.drafters import METHODS
from s4c.drafters.base import Drafter, NoDrafter
from s4c.drafters.checkpoint import load_drafter, read_checkpoint, standing
from s4c.drafters.combined import CombinedDrafter
from s4c.engine.measure import measured_costs
from s4c.engine.planner import NAME, CostPlanner, FixedPlanner, plans_by_levels
from s4c.engine.round import Engine
from s4c.engine.sequence import Generation, Sequence
from s4c.engine.threads import check_threads, share_threads
from s4c.errors import BadLogits
from s4c.models.base import Target
from s4c.models.loading import has_tokenizer, load_target, load_tokenizer, resolve
from s4c.types import SamplingParams
from s4c.verify.tree import TreePlan
from s4c.verify.typical import any_rule

SHIPPED = Path(__file__).parent.parent / "shipped"
"""Drafters that come with the package, one folder each."""

Chat = Ordered[Mapping[str, str]]
Prompt = str | Chat | Ordered[int]
"""A text, a chat (messages with `role` and `content`) or token ids."""


@dataclass(frozen=True)
class Chunk:
    """What was added to a streamed request since the last one, by a round or, where others decode beside it, a few.

    Attributes:
        text: new text; it never holds a part of a stop string.
        token_ids: new tokens.
        origins: for each of them 0 for a bonus, else the level of the draft tree that guessed it.
        generation: the whole outcome, with the last chunk.
    """

    text: str
    token_ids: list[int]
    origins: list[int]
    generation: Generation | None


class LLM:
    """A language model that generates faster than it could by itself, and writes exactly the same.

    Args:
        target: a built-in alias (`smollm2-135m`), a local Hugging Face directory, a GGUF file or a hub id;
            or a loaded target.
        drafter: `auto` (`shipped+ngram` where a drafter for this target comes with s4c, else `ngram`), `none`
            (plain decoding), `shipped`, the name of a method without training, perhaps with `=` and what it wants to
            know (`ngram=corpus.txt`), a checkpoint directory, two of these joined by `+` (one tree of both), or a
            drafter.
        rule: `coupled` (the tokens of plain decoding) or `rejection` (their law); or `typical`, which is lossy.
        tree: `comb:K`, `best:N`, `chain:D`, `plan` for the one that makes the most tokens per second, anew each round
            (what passes cost is measured once and kept in the cache folder), or `auto`: `plan` under the coupled rule,
            and what the drafter recommends under others, and where it cannot be planned (SDSAT in two steps).
        dtype: `auto` (float32 on a CPU, bfloat16 on a GPU), `float32`, `bfloat16`, `float16` or `int8`.
        device: `auto`, `cpu` or `cuda`.
        runtime: `auto`, `native`, `torch` or `hf`.
        context_length: most tokens of a sequence; None takes the model's own limit.
        max_batch: most sequences to decode at once.
        threads: CPU threads for the whole process, at most four for each processor; None leaves them as they are.
            On the native runtime they are its own, and torch, which has little left to do, keeps one, for two pools
            would fight for the cores.

    Raises:
        ValueError: an argument is outside its range; the message says what is allowed.
    """

    def __init__(
        self,
        target: str | Path | Target = "smollm2-135m",
        drafter: str | Path | Drafter = "auto",
        *,
        rule: str = "coupled",
        tree: str = "auto",
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        runtime: str = "auto",
        context_length: int | None = None,
        max_batch: int = 8,
        threads: int | None = None,
    ) -> None:
        check_threads(threads)
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be at least 1")
        any_rule(rule)
        if tree not in ("auto", NAME):
            TreePlan.parse(tree)
        self.tokenizer: Any = None
        if not isinstance(target, Target):
            directory = resolve(target)
            self.tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
            target = load_target(target, runtime=runtime, dtype=dtype, device=device, context_length=context_length)
        self.target = target
        self.threads = share_threads(threads, target)
        self.rule = rule
        self.max_batch = max_batch
        self._built: Engine | None = None
        self._planners: WeakKeyDictionary[Drafter, CostPlanner] = WeakKeyDictionary()
        self.use(drafter, tree)

    def use(self, drafter: str | Path | Drafter, tree: str = "auto") -> None:
        """Go on with another drafter or tree; the target stays loaded.

        Args:
            drafter: as for the class.
            tree: as for the class.

        Raises:
            ValueError: there is no such drafter or tree, or a request is still open; all stays as it was.
        """
        if self._built is not None and not self._built.scheduler.idle:
            raise ValueError(
                "a request is still being decoded; read its stream to the end or close it before using another drafter "
                "(LLM.twin() gives one that decodes beside it)"
            )
        any_rule(self.rule)
        if not isinstance(drafter, Drafter):
            drafter = choose_drafter(drafter, self.target)
        if tree == "auto":
            tree = NAME if self.rule == "coupled" and drafter.planned else drafter.default_tree
        self._fixed = None if tree == NAME else FixedPlanner(TreePlan.parse(tree))
        self.drafter, self.tree, self._built = drafter, tree, None

    def twin(self) -> LLM:
        """Another one on the same weights, to decode beside this one; it drafts nothing until it is told to."""
        twin = LLM(self.target.twin(), "none", rule=self.rule, max_batch=self.max_batch)
        twin.tokenizer = self.tokenizer
        return twin

    def generate(
        self,
        prompts: Prompt | Ordered[Prompt],
        params: SamplingParams | Ordered[SamplingParams] | None = None,
    ) -> Any:
        """Decode one prompt or a list of them; a list is decoded in batches.

        Args:
            prompts: a text (taken as it is), a chat (put through the model's chat template), token ids, or a
                list of such.
            params: for all prompts, or one for each; None decodes greedily.

        Returns:
            A `Generation` for one prompt; a list of them, in order, for a list.

        Raises:
            ValueError: a prompt or a parameter is outside its range; nothing was generated.
            BadLogits: the target's logits were unusable, for a single prompt. In a list the others are
                decoded to their end, and the failed one has the finish reason `error`.
        """
        if hasattr(prompts, "tolist"):
            prompts = prompts.tolist()
        if _is_prompt(prompts):
            generation = self._run([prompts], params)[0]
            if generation.error is not None:
                raise BadLogits(generation.error)
            return generation
        return self._run(list(prompts), params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Decode one prompt and yield what is added, round by round; closing the iterator stops the request.

        Raises:
            BadLogits: the target's logits were unusable; what came before them was yielded.
        """
        sequence = self._sequence(prompt, params or SamplingParams())
        engine = self._engine
        engine.scheduler.add(sequence)
        told = 0
        try:
            while told < len(sequence.origins) or not sequence.finished:
                new = sequence.origins[told:]
                if not new:  # others that decode on this engine take steps for this one, too
                    engine.step()
                    continue
                told += len(new)
                yield Chunk(
                    text=sequence.released_text(),
                    token_ids=sequence.tokens[-len(new) :],
                    origins=new,
                    generation=sequence.generation() if sequence.succeeded else None,
                )
            if rest := sequence.released_text():
                yield Chunk(rest, [], [], None)
            if sequence.failure is not None:
                raise sequence.failure
        finally:
            engine.scheduler.cancel(sequence)

    def complete(self, prompts: Ordered[Prompt], params: Ordered[SamplingParams]) -> Iterator[tuple[int, Generation]]:
        """Decode many prompts and yield each outcome with its index as soon as it is there."""
        sequences = [self._sequence(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        engine = self._engine
        for sequence in sequences:
            engine.scheduler.add(sequence)
        index = {sequence: number for number, sequence in enumerate(sequences)}
        try:
            while index:
                engine.step()
                for sequence in list(takewhile(lambda sequence: sequence.slot >= 0, index)):
                    if sequence.failure is not None and not isinstance(sequence.failure, BadLogits):
                        raise sequence.failure
                    if sequence.finished:
                        yield index.pop(sequence), sequence.generation()
        finally:
            for sequence in index:
                engine.scheduler.cancel(sequence)

    def token_ids(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt as the target reads them.

        Raises:
            ValueError: the prompt is empty, of another kind, or needs a tokenizer that is not there.
        """
        given = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if isinstance(given, bytes) or not isinstance(given, Ordered):
            raise ValueError(f"the prompt is {given!r}; give a text, a list of messages, or token ids")
        if isinstance(given, str):
            ids = self._need_tokenizer("a text").encode(_encodable(given))
        elif len(given) and isinstance(given[0], Mapping):
            ids = self._chat_ids(given)
        else:
            wrong = [token for token in given if not isinstance(token, Integral)]
            if wrong:
                raise ValueError(f"the prompt holds {wrong[0]!r}; give a text, a list of messages, or token ids")
            ids = [int(token) for token in given]  # type: ignore[arg-type]
        if not ids:
            raise ValueError("the prompt is empty; give a text, a chat or token ids with at least one token")
        return list(ids)

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, special ones left out."""
        text: str = self._need_tokenizer("the text of tokens").decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    @property
    def _engine(self) -> Engine:
        """Built when it is first asked for, since a planner may have to measure before."""
        if self._built is None:
            self._built = Engine(self.target, self.drafter, self._fixed or self._planner(), self.rule, self.max_batch)
        return self._built

    def _planner(self) -> CostPlanner:
        """The planner of the drafter: what it has learnt is kept while others are used."""
        if self.drafter not in self._planners:
            costs = measured_costs(self.target, self.drafter, plans_by_levels(), self.threads)
            self._planners[self.drafter] = CostPlanner(costs, self.drafter.probes)
        return self._planners[self.drafter]

    def _chat_ids(self, messages: Any) -> list[int]:
        tokenizer = self._need_tokenizer("a chat")
        if not tokenizer.chat_template:
            raise ValueError(f"{self.target.spec.name} has no chat template; give a text instead of a chat")
        for message in messages:
            parts = [message.get(part) for part in ("role", "content")] if isinstance(message, Mapping) else [None]
            if not all(isinstance(part, str) for part in parts):
                raise ValueError(f"message {message!r} of the chat must have a string `role` and a string `content`")
            _encodable(message["content"])
        try:
            ids: list[int] = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise ValueError(f"the chat template of {self.target.spec.name} refuses this chat: {error}") from error
        return ids

    def _need_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise ValueError(f"{self.target.spec.name} has no tokenizer, so {what} cannot be read; give token ids")
        return self.tokenizer

    def _run(self, prompts: list[Any], params: Any) -> list[Generation]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} sampling parameters for {len(prompts)} prompts; give one, or one for each")
        done = dict(self.complete(prompts, params))
        return [done[index] for index in range(len(prompts))]

    def _sequence(self, prompt: Prompt, params: SamplingParams) -> Sequence:
        ids = self.token_ids(prompt)
        spec = self.target.spec
        if len(ids) >= spec.context_length:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; the context of {spec.name} holds {spec.context_length}, "
                "and at least one must be left for the answer"
            )
        named = {"the prompt": ids, "logit_bias": params.logit_bias, "stop_token_ids": params.stop_token_ids}
        named |= {"bad_words": [token for word in params.bad_words for token in word]}
        for where, tokens in named.items():
            wrong = [token for token in tokens if not 0 <= token < spec.vocab_size]
            if wrong:
                raise ValueError(
                    f"token {wrong[0]} in {where} is out of range; it must be from 0 to {spec.vocab_size - 1}"
                )
        if params.stop:
            self._need_tokenizer("a stop string")
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        decode = self.decode if self.tokenizer is not None else None
        return Sequence(ids, params, decode, spec.eos_token_ids, spec.context_length)


def choose_drafter(name: str | Path, target: Target) -> Drafter:
    """The drafter that a user asked for by name or checkpoint, or two of them joined by `+`.

    Raises:
        ValueError: there is no such drafter; the message lists what there is.
    """
    if name == "none":
        return NoDrafter()
    if name == "auto":
        return choose_drafter("shipped+ngram" if shipped_for(target) else "ngram", target)
    if name == "shipped":
        shipped = shipped_for(target)
        if shipped is None:
            raise ValueError(f"no drafter for {target.spec.name} comes with s4c; train one (s4c train), or give ngram")
        return load_drafter(shipped, target, METHODS)
    created = create_drafter(str(name), target)
    if created is not None:
        return created
    if standing(Path(name)).is_dir():
        return load_drafter(Path(name), target, METHODS)
    first, plus, second = str(name).rpartition("+")
    if plus and first and second and "none" not in (first, second):
        return CombinedDrafter(choose_drafter(first, target), choose_drafter(second, target))
    forms = [method.form or method.name for method in METHODS.values() if method.create is not None]
    raise ValueError(
        f"drafter {str(name)!r} is not known; it must be auto, none, shipped, {', '.join(forms)}, "
        "the directory of a checkpoint, or two of them joined by +"
    )


def create_drafter(spec: str, target: Target) -> Drafter | None:
    """The drafter of `NAME`, or of `NAME=ARGUMENT`, where the method says what its argument is; None if it is no such.

    A `+` in the argument joins a second drafter, unless it belongs to the name of something that exists.

    Raises:
        ValueError: the method wants an argument, or wants none, or cannot use this one.
    """
    name, equals, argument = spec.partition("=")
    method = METHODS.get(name)
    if method is None or method.create is None or ("+" in argument and not Path(argument).exists()):
        return None
    form = method.form or method.name
    if (equals and "=" not in form) or (not argument and "=" in form.partition("[")[0]) or (equals and not argument):
        raise ValueError(f"drafter {spec!r} must be written {form}")
    return method.create(target, argument)


def shipped_for(target: Target) -> Path | None:
    """The folder of the shipped drafter that was trained for this target."""
    folders = sorted(path.parent for path in SHIPPED.glob("*/config.json"))
    return next((f for f in folders if read_checkpoint(f).fingerprint == target.spec.fingerprint), None)


def _encodable(text: str) -> str:
    """The text, if it can be written in UTF-8: tokenizers take no other."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text cannot be read as UTF-8: {error.reason} at character {error.start}") from error
    return text


def _is_prompt(prompts: Any) -> bool:
    """Whether it is one prompt (or nothing that could be several)."""
    if isinstance(prompts, str) or not isinstance(prompts, Ordered):
        return True
    return len(prompts) > 0 and isinstance(prompts[0], Integral | Mapping)
