"""What users would run otherwise, on the same questions. A peer is a line of this table: name to what makes it.

A peer may take an argument, `NAME=ARGUMENT`, and runs in a process of its own (`child.py`). One that cannot run here
raises `Unavailable`, with what to do.
"""

from __future__ import annotations

from collections.abc import Callable

from s4c.bench.contestants import Contestant
from s4c.bench.peers import huggingface, llama_cpp, openai
from s4c.bench.peers.setting import Setting

Peer = Callable[[Setting, str], Contestant]

SECOND_BASELINE = "hf"
"""Beside the speedup over plain decoding of this engine, the report gives the one over this peer."""

PEERS: dict[str, Peer] = {
    SECOND_BASELINE: huggingface.plain,
    "hf-lookup": huggingface.lookup,
    "hf-assisted": huggingface.assisted,
    "llama.cpp": llama_cpp.peer,
    "openai": openai.peer,
}


def split(spec: str) -> tuple[str, str]:
    """Name and argument of a peer as users write it, `NAME` or `NAME=ARGUMENT`.

    Raises:
        ValueError: there is no such peer; the message lists what there is.
    """
    name, _, argument = spec.partition("=")
    if name not in PEERS:
        raise ValueError(f"peer {name!r} is not known; it must be one of {', '.join(PEERS)}")
    return name, argument


def peer_named(spec: str, setting: Setting) -> Contestant:
    """The peer that a user asked for.

    Raises:
        ValueError: there is no such peer, or its argument is wrong.
        Unavailable: it cannot run here.
    """
    name, argument = split(spec)
    return PEERS[name](setting, argument)
