"""A peer in a process of its own: its threads, its memory and its crashes stay there.

Parent and child speak in lines of JSON over the child's stdin and stdout. The child says first who it is, or why it
cannot run; then it answers one request after the other, timed by its own clock, so that the pipe costs nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import s4c
from s4c.bench.contestants import Contestant, Reply, Unavailable
from s4c.bench.machine import Footprint
from s4c.bench.peers import peer_named
from s4c.bench.peers.setting import Setting
from s4c.types import SamplingParams

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed")


class Child(Contestant):
    """A peer that runs in a child process.

    Args:
        spec: `NAME` or `NAME=ARGUMENT`.
        setting: the target and how it runs.

    Raises:
        ValueError: there is no such peer, or its argument is wrong.
        Unavailable: it cannot run here.
    """

    def __init__(self, spec: str, setting: Setting) -> None:
        self.name = spec
        root = str(Path(s4c.__file__).parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "s4c.bench.peers.child", spec, json.dumps(asdict(setting))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            text=True,
            start_new_session=True,  # an interrupt is for the parent, which closes its children
        )
        try:
            hello = self._read()
        except BaseException:
            self.close()
            raise
        self.name, self.here, self._comparable = hello["name"], hello["here"], hello["comparable"]
        self.pid = self._process.pid

    def answer(self, prompt: list[int], params: SamplingParams) -> Reply:
        assert self._process.stdin is not None
        request = {"prompt": prompt, "params": {name: getattr(params, name) for name in SAMPLING}}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildProcessError(f"the process of {self.name} {self._end()}") from None
        return Reply(**self._read()["reply"])

    def comparable(self, temperature: float) -> bool:
        return bool(self._comparable) and temperature == 0

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(f"the process of {self.name} {self._end()}")
        message: dict[str, Any] = json.loads(line)
        for kind, error in (("unavailable", Unavailable), ("wrong", ValueError), ("failed", RuntimeError)):
            if kind in message:
                raise error(message[kind])
        return message

    def _end(self) -> str:
        code = self._process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def serve(spec: str, setting: Setting, requests: IO[str], replies: IO[str]) -> None:
    """The child's side."""

    def say(message: Mapping[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    footprint = Footprint()
    try:
        with footprint.watch():
            peer = peer_named(spec, setting)
    except Unavailable as error:
        return say({"unavailable": str(error)})
    except ValueError as error:
        return say({"wrong": str(error)})
    except Exception as error:  # of any class: peers are other people's code
        return say({"unavailable": f"{type(error).__name__}: {error}"})
    say({"name": peer.name, "here": peer.here, "comparable": peer.comparable(0)})
    for line in requests:
        request = json.loads(line)
        try:
            with footprint.watch():
                reply = peer.answer(request["prompt"], SamplingParams(**request["params"]))
        except Exception as error:
            say({"failed": f"{type(error).__name__}: {error}"})
            continue
        memory = footprint.peak if peer.here else None
        say({"reply": {**asdict(reply), "memory": memory}})


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    values = json.loads(sys.argv[2])
    serve(sys.argv[1], Setting(**{**values, "eos_token_ids": tuple(values["eos_token_ids"])}), sys.stdin, answers)
