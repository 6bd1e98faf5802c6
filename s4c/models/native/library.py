"""The compiled core: where it lies, which instruction set it uses, what it is called with.

S4C_NATIVE=off keeps it out; S4C_NATIVE=avx2 (or any of `instruction_sets`) forces an instruction set.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from itertools import chain
from pathlib import Path

import torch

SWITCH = "S4C_NATIVE"


class CLowRank(Structure):
    """`LowRank` of core.h."""

    _fields_ = [("rank", c_int32), ("down", c_void_p), ("up", c_void_p)]


class CLinear(Structure):
    """`Linear` of core.h."""

    _fields_ = [
        ("kind", c_int32),
        ("inputs", c_int32),
        ("padded", c_int32),
        ("outputs", c_int32),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("sums", c_void_p),
        ("bias", c_void_p),
        ("low_rank", POINTER(CLowRank)),
    ]


class CLayer(Structure):
    """`Layer` of core.h."""

    _fields_ = [
        ("attention_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", CLinear),
        ("out", CLinear),
        ("gate_up", CLinear),
        ("down", CLinear),
    ]


class CStack(Structure):
    """`Stack` of core.h."""

    _fields_ = [
        *((name, c_int32) for name in ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "layers")),
        ("eps", c_float),
        ("rope_scale", c_float),
        ("frequencies", c_void_p),
        ("final_norm", c_void_p),
        ("join_norm", c_void_p),
        ("join", CLinear),
        ("layer", POINTER(CLayer)),
    ]


class CCache(Structure):
    """`Cache` of core.h."""

    _fields_ = [("keys", c_void_p), ("values", c_void_p), ("slots", c_int32), ("rows", c_int32), ("half", c_int32)]


class CEmbedding(Structure):
    """`Embedding` of core.h."""

    _fields_ = [("weight", c_void_p), ("half", c_int32)]


class CDecoder(Structure):
    """`Decoder` of core.h."""

    _fields_ = [
        ("stack", POINTER(CStack)),
        ("cache", POINTER(CCache)),
        ("lm_head", POINTER(CLinear)),
        ("embedding", CEmbedding),
    ]


class CHeads(Structure):
    """`Heads` of core.h."""

    _fields_ = [
        ("count", c_int32),
        ("products", c_int32),
        ("stack", POINTER(c_void_p)),
        ("cache", POINTER(c_void_p)),
        ("lm_head", POINTER(c_void_p)),
        ("token_ids", c_void_p),
        ("embedding", CEmbedding),
    ]


class CPlan(Structure):
    """`Plan` of core.h."""

    _fields_ = [*((name, c_int32) for name in ("best", "width", "depth", "nodes", "expanded")), ("floor", c_float)]


class CRound(Structure):
    """`Round` of core.h."""

    _fields_ = [
        ("batch", c_int32),
        ("longest", c_int32),
        *((name, c_void_p) for name in ("tokens", "counts", "lengths", "features", "carry", "temperatures", "noise")),
        *((name, c_void_p) for name in ("further", "further_ids", "texts", "text_lengths", "echo")),
        *((name, c_int32) for name in ("echo_longest", "echo_near", "echo_telling")),
    ]


class CTrees(Structure):
    """`Trees` of core.h."""

    _fields_ = [
        *((name, c_int32) for name in ("batch", "nodes", "levels")),
        *((name, c_void_p) for name in ("tokens", "parents", "candidate", "temperatures", "noise")),
    ]


def pointers(addresses: Sequence[int | None]) -> ctypes.Array[c_void_p]:
    """An array of addresses."""
    return (c_void_p * len(addresses))(*addresses)


def numbers(*rows: Sequence[int]) -> ctypes.Array[c_int64]:
    """An array of the numbers of all rows."""
    return (c_int64 * sum(map(len, rows)))(*chain.from_iterable(rows))


@cache
def _load() -> ctypes.CDLL | str:
    """The core, ready to run; or the reason why it is not."""
    wanted = os.environ.get(SWITCH, "")
    if wanted == "off":
        return f"{SWITCH}=off"
    file = Path(__file__).parent / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not file.exists():
        return "the C++ core is not built (installing the package builds it where there is a C++17 compiler)"
    try:
        core = ctypes.CDLL(str(file))
    except OSError as error:
        return f"the C++ core cannot be loaded ({error})"
    core.s4c_variants.argtypes = [c_char_p, c_int]
    core.s4c_choose.argtypes = [c_char_p]
    core.s4c_set_threads.argtypes = [c_int]
    core.s4c_linear.argtypes = [POINTER(CLinear), c_void_p, c_int, c_void_p]
    core.s4c_top.argtypes = [c_void_p, *[c_int] * 3, *[c_void_p] * 3]
    core.s4c_judge.argtypes = [POINTER(CTrees), c_void_p, c_int, *[c_void_p] * 3]
    core.s4c_noise.argtypes = [c_uint64, c_uint32, c_uint64, c_int, c_void_p]
    core.s4c_pass.argtypes = [POINTER(CStack), POINTER(CCache), *[c_void_p] * 2, *[c_int] * 4, *[c_void_p] * 4, c_int]
    core.s4c_verify.argtypes = [POINTER(CDecoder), c_void_p, *[c_int] * 2, *[c_void_p] * 3, c_int, *[c_void_p] * 2]
    core.s4c_keep.argtypes = [POINTER(CCache), *[c_int] * 5, c_void_p, c_int]
    core.s4c_draft.argtypes = [POINTER(CHeads), POINTER(CPlan), POINTER(CRound), c_int, *[c_void_p] * 4]
    names = _names(core)
    if wanted and wanted not in names:
        raise ValueError(f"{SWITCH} is {wanted!r}; on this machine it must be one of {', '.join(names)}, off")
    core.s4c_choose((wanted or names[0]).encode())
    core.s4c_set_threads(torch.get_num_threads())
    return core


def _names(core: ctypes.CDLL) -> list[str]:
    buffer = ctypes.create_string_buffer(256)
    core.s4c_variants(buffer, len(buffer))
    return buffer.value.decode().split(",")


def core() -> ctypes.CDLL:
    """The compiled core; only where `problem` is None."""
    loaded = _load()
    assert not isinstance(loaded, str), loaded
    return loaded


def problem() -> str | None:
    """Why the native runtime cannot run here; None where it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def instruction_sets() -> list[str]:
    """Those that this machine can run, best first."""
    return _names(core())


def instruction_set() -> str:
    """The one in use."""
    return os.environ.get(SWITCH) or instruction_sets()[0]


def set_threads(threads: int) -> None:
    """Use that many threads from now on, the calling one included."""
    core().s4c_set_threads(threads)


def threads() -> int:
    """The threads in use."""
    return int(core().s4c_threads())


def check(status: int) -> int:
    """Raise what a call of the core reported, or give it back."""
    if status < 0:
        raise MemoryError("the native runtime is out of memory")
    return status
