"""transformers' own `generate`: plainly, with prompt lookup, and assisted by a draft model."""

from __future__ import annotations

import time
from typing import Any

import torch

from s4c.bench.contestants import Contestant, Reply, Unavailable
from s4c.bench.peers.setting import Setting
from s4c.models.builtin import quiet_transformers
from s4c.types import SamplingParams

LOOKUP_TOKENS = 10
"""The number of tokens in the examples of transformers' documentation."""

FLOATING = ("float32", "bfloat16", "float16")


class Clock:
    """A streamer that notes when tokens come and how many: the first delivery ends the prefill."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.deliveries: list[int] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            self.deliveries.append(value.numel())
        self._prompt_seen = True

    def end(self) -> None:
        pass


class HuggingFace(Contestant):
    """`generate` with some arguments.

    Args:
        more: arguments of the generation configuration.
        assistant: draft model.
    """

    def __init__(self, name: str, setting: Setting, assistant: str = "", **more: Any) -> None:
        from transformers import GenerationConfig

        if setting.dtype not in FLOATING:
            raise Unavailable(f"transformers runs no {setting.dtype}; give --dtype float32 or bfloat16")
        torch.set_num_threads(setting.threads)
        self.name = name
        self.setting = setting
        self.more = more
        self.model = self._load(setting.directory)
        self.model.generation_config = GenerationConfig()
        self.assistant = {"assistant_model": self._load(assistant)} if assistant else {}

    def _load(self, directory: str) -> Any:
        from transformers import AutoModelForCausalLM

        with quiet_transformers():
            loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=self.setting.torch_dtype)
        return loaded.to(self.setting.device).eval()

    def answer(self, prompt: list[int], params: SamplingParams) -> Reply:
        tokens = torch.tensor([prompt], device=self.setting.device)
        config = self._config(len(prompt), params)
        clock = Clock()
        with torch.no_grad():
            torch.manual_seed(params.seed or 0)
            started = time.perf_counter()
            output = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=config,
                streamer=clock,
                **self.assistant,
            )
            ended = time.perf_counter()
        first = clock.times[0]
        written: list[int] = output[0, len(prompt) :].tolist()
        return Reply(
            token_ids=written,
            prefill_seconds=first - started,
            decode_seconds=ended - first,
            decode_tokens=len(written) - clock.deliveries[0],
            histogram=self._histogram(clock.deliveries),
        )

    def _config(self, prompt_tokens: int, params: SamplingParams) -> Any:
        """The same stop rules and the same law as ours."""
        from transformers import GenerationConfig

        sampling = {}
        if params.temperature > 0:
            sampling = {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
        return GenerationConfig(
            max_new_tokens=min(params.max_new_tokens, self.setting.context_length - prompt_tokens),
            eos_token_id=list(self.setting.eos_token_ids) or None,
            pad_token_id=0,
            do_sample=params.temperature > 0,
            **sampling,
            **self.more,
        )

    def _histogram(self, deliveries: list[int]) -> list[int]:
        """A delivery is what a round committed."""
        histogram = [0] * max(deliveries)
        for tokens in deliveries:
            histogram[tokens - 1] += 1
        return histogram


def plain(setting: Setting, argument: str) -> Contestant:
    """`generate` as it is."""
    if argument:
        raise ValueError(f"peer hf takes no argument, and {argument!r} was given")
    return HuggingFace("hf", setting)


def lookup(setting: Setting, argument: str) -> Contestant:
    """`generate` with prompt lookup; the argument is its number of tokens."""
    try:
        tokens = int(argument or LOOKUP_TOKENS)
    except ValueError as error:
        raise ValueError(f"peer hf-lookup={argument}: it takes a number of tokens") from error
    return HuggingFace("hf-lookup", setting, prompt_lookup_num_tokens=tokens)


def assisted(setting: Setting, argument: str) -> Contestant:
    """`generate` assisted by a draft model; the argument is its directory or hub id."""
    if not argument:
        raise Unavailable("it needs a draft model with the same tokenizer: --peers hf-assisted=DIRECTORY")
    try:
        return HuggingFace("hf-assisted", setting, assistant=argument)
    except OSError as error:
        raise Unavailable(f"the draft model {argument} cannot be loaded: {str(error).splitlines()[0]}") from error
