"""Any server that speaks OpenAI's completions protocol: vLLM, SGLang, llama-server.

The prompt goes as token ids, so that the server reads what all others read. The answer comes as text, streamed; its
tokens are counted by our tokenizer. Start the server with the same weights and as many threads.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from s4c.bench.contestants import Contestant, Reply, Unavailable
from s4c.bench.peers.setting import Setting
from s4c.models.loading import load_tokenizer
from s4c.types import SamplingParams

TIMEOUT = 600
"""Seconds to wait for the next piece of an answer."""


class Server(Contestant):
    """A server at a URL such as `http://localhost:8000/v1`.

    Raises:
        Unavailable: nothing answers there.
    """

    here = False

    def __init__(self, url: str, setting: Setting) -> None:
        self.name = f"openai={url}"
        self.url = url.rstrip("/")
        self.setting = setting
        self.tokenizer = load_tokenizer(setting.folder)
        try:
            with urllib.request.urlopen(f"{self.url}/models", timeout=10) as response:
                self.model = json.load(response)["data"][0]["id"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise Unavailable(
                f"no server answers at {url}/models ({error}); start one, such as `vllm serve {setting.name}`, and "
                "give its URL up to /v1"
            ) from error

    def answer(self, prompt: list[int], params: SamplingParams) -> Reply:
        started = time.perf_counter()
        times: list[float] = []
        text, finish, first_piece = "", None, ""
        for choice in self._choices(prompt, params):
            if piece := choice.get("text"):
                times.append(time.perf_counter())
                first_piece = first_piece or piece
                text += piece
            finish = choice.get("finish_reason") or finish
        ended = time.perf_counter()
        tokens = self._count(text)
        if finish == "stop":
            tokens = [*tokens, *self.setting.eos_token_ids[:1]]
        first = times[0] if times else ended
        early = len(self._count(first_piece))
        return Reply(tokens, first - started, ended - first, max(0, len(tokens) - early))

    def _count(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def _choices(self, prompt: list[int], params: SamplingParams) -> Iterator[dict[str, Any]]:
        """The pieces of an answer, as the server sends them."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": min(params.max_new_tokens, self.setting.context_length - len(prompt)),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
            "stream": True,
        }
        request = urllib.request.Request(
            f"{self.url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        known = False
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                for line in response:
                    content = line.decode().strip().removeprefix("data:").strip()
                    if content.startswith("{"):
                        choices = json.loads(content).get("choices", [])
                        known = known or bool(choices)
                        yield from choices
        except urllib.error.HTTPError as error:
            raise OSError(f"{self.url} answers {error.code}: {error.read().decode(errors='replace')[:300]}") from error
        if not known:
            raise OSError(f"{self.url}/completions answers without `choices`; give the server's URL up to /v1")


def peer(setting: Setting, argument: str) -> Contestant:
    """A server; the argument is its URL."""
    if not argument.startswith(("http://", "https://")):
        raise Unavailable("it needs a server's URL: --peers openai=http://localhost:8000/v1")
    return Server(argument, setting)
