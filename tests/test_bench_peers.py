"""Peers on a tiny model: the same tokens as plain decoding, and an end that says what happened."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
import torch

from s4c import LLM, SamplingParams
from s4c.bench.contestants import Contestant, Unavailable
from s4c.bench.peers import PEERS, llama_cpp, peer_named, split
from s4c.bench.peers.child import Child, serve
from s4c.bench.peers.gguf_file import quantisation, write_gguf
from s4c.bench.peers.setting import Setting

GREEDY = SamplingParams(max_new_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("model"), "llama", tokenizer=True, max_position_embeddings=256)


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(str(model), "none", threads=1)


@pytest.fixture
def setting(model: Path, llm: LLM) -> Setting:
    spec = llm.target.spec
    numbers = {"threads": 1, "eos_token_ids": spec.eos_token_ids, "context_length": spec.context_length}
    return Setting(str(model), spec.name, spec.fingerprint, "float32", "cpu", **numbers)


def prompt(llm: LLM) -> list[int]:
    return llm.token_ids([{"role": "user", "content": "abc abc abc"}])


def check_greedy(peer: Contestant, llm: LLM) -> None:
    """The peer writes what plain decoding writes, to the end-of-sequence token too, and its times add up."""
    asked = prompt(llm)
    for params in (GREEDY, SamplingParams(max_new_tokens=1)):
        expected = llm.generate(asked, params).token_ids
        reply = peer.answer(asked, params)
        assert reply.token_ids == expected
        assert reply.prefill_seconds > 0 or reply.decode_seconds > 0
        assert len(expected) - 4 <= reply.decode_tokens <= len(expected)
    sampled = SamplingParams(max_new_tokens=6, temperature=1.0, top_p=0.9)
    assert 1 <= len(peer.answer(asked, sampled).token_ids) <= 6


def test_hugging_face_writes_the_same_and_tells_its_rounds(llm: LLM, setting: Setting, model: Path) -> None:
    for name in ("hf", "hf-lookup=3", f"hf-assisted={model}"):
        peer = peer_named(name, setting)
        assert peer.name == name.partition("=")[0]
        check_greedy(peer, llm)
        reply = peer.answer(prompt(llm), GREEDY)
        assert reply.histogram is not None
        assert sum((a + 1) * count for a, count in enumerate(reply.histogram)) == len(reply.token_ids)
    with pytest.raises(Unavailable, match="needs a draft model"):
        peer_named("hf-assisted", setting)
    with pytest.raises(Unavailable, match="runs no int8"):
        peer_named("hf", Setting(**{**asdict(setting), "dtype": "int8"}))
    with pytest.raises(ValueError, match="takes a number of tokens"):
        peer_named("hf-lookup=many", setting)


def test_a_peer_stops_at_the_end_of_sequence(llm: LLM, setting: Setting) -> None:
    written = llm.generate(prompt(llm), GREEDY).token_ids
    ending = Setting(**{**asdict(setting), "eos_token_ids": (written[4],)})
    assert peer_named("hf", ending).answer(prompt(llm), GREEDY).token_ids == written[: written.index(written[4]) + 1]


def test_unknown_peers_are_named() -> None:
    with pytest.raises(ValueError, match="it must be one of hf, hf-lookup"):
        split("nobody=3")
    assert {split(name) for name in PEERS} == {(name, "") for name in PEERS}
    assert split("openai=http://x?a=b") == ("openai", "http://x?a=b")


# llama.cpp


def test_a_gguf_file_holds_the_weights(model: Path, llm: LLM, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        write_gguf(model, tmp_path / "m.gguf", dtype)
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
        state = {name: t.float() for name, t in tiny_models.tiny("llama", vocab_size=258).state_dict().items()}
        assert len(tensors) == len(state)
        down = tensors["blk.1.ffn_down.weight"]
        values = gguf.dequantize(down.data, down.tensor_type).reshape(32, 48)
        expected = state["model.layers.1.mlp.down_proj.weight"].to(getattr(torch, dtype)).float()
        assert np.array_equal(values, expected.numpy())
        key = gguf.dequantize(tensors["blk.0.attn_k.weight"].data, tensors["blk.0.attn_k.weight"].tensor_type)
        rows = state["model.layers.0.self_attn.k_proj.weight"].to(getattr(torch, dtype)).float().numpy()
        order = [0, 4, 1, 5, 2, 6, 3, 7]  # of a head of 8: neighbours turn together in GGUF, halves in Hugging Face
        assert np.array_equal(key.reshape(16, 32), np.concatenate([rows[:8][order], rows[8:][order]]))
    assert quantisation(tmp_path / "m.gguf") == "bf16"
    with pytest.raises(Unavailable, match="for Llama models with plain rope alone, not for gpt2"):
        write_gguf(tiny_models.save(tmp_path, "gpt2"), tmp_path / "n.gguf", "float32")


@pytest.mark.parametrize(("dtype", "levels"), [("q8_0", 127), ("q4_0", 8), ("q4_1", 7.5)])
def test_a_quantised_gguf_file_is_near_the_weights(tmp_path: Path, dtype: str, levels: float) -> None:
    folder = tiny_models.save(tmp_path, "llama", intermediate_size=64)
    write_gguf(folder, tmp_path / "m.gguf", dtype)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    down = tiny_models.tiny("llama", intermediate_size=64).state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    found = tensors["blk.1.ffn_down.weight"]
    values = gguf.dequantize(found.data, found.tensor_type).reshape(down.shape)
    assert 0 < np.abs(values - down).max() <= np.abs(down).max() / levels
    assert quantisation(tmp_path / "m.gguf") == dtype
    with pytest.raises(Unavailable, match=rf"cannot be quantised to {dtype}"):
        write_gguf(tiny_models.save(tmp_path, "llama", seed=1), tmp_path / "n.gguf", dtype)


def test_llama_cpp_runs_where_the_others_do(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Model:
        ctx = None

        def n_vocab(self) -> int:
            return 258

    def load(*args: Any, **how: Any) -> Model:
        asked.append(how["n_gpu_layers"])
        return Model()

    library = SimpleNamespace(Llama=load, llama_get_logits=None, llama_supports_gpu_offload=lambda: False)
    monkeypatch.setattr(llama_cpp, "_library", lambda: library)
    there = Setting(**{**asdict(setting), "device": "cuda:0"})
    with pytest.raises(Unavailable, match="built without CUDA"):
        llama_cpp.LlamaCpp("llama.cpp", Path("m.gguf"), there, True)
    library.llama_supports_gpu_offload = lambda: True
    for case in (setting, there):
        llama_cpp.LlamaCpp("llama.cpp", Path("m.gguf"), case, True)
    assert asked == [0, -1]


def test_llama_cpp_writes_the_same(llm: LLM, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install llama-cpp-python")
    monkeypatch.setenv("S4C_HOME", str(tmp_path))
    check_greedy(peer_named("llama.cpp", setting), llm)
    file = next(tmp_path.rglob("model.gguf"))
    named = peer_named(f"llama.cpp={file}", setting)
    assert (named.name, named.comparable(0)) == ("llama.cpp-all_f32", False)
    with pytest.raises(Unavailable, match="there is no file"):
        peer_named("llama.cpp=nowhere.gguf", setting)
    with pytest.raises(Unavailable, match="only a built-in target"):
        peer_named("llama.cpp=original", setting)


# Servers


@pytest.fixture
def server(llm: LLM) -> Iterator[str]:
    """A server that speaks the completions protocol, and answers with plain decoding."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(b'{"data": [{"id": "tiny"}]}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/completions":  # llama-server's own protocol
                return self._send(b'data: {"content": "a", "stop": true}\n\n')
            assert (body["model"], body["stream"]) == ("tiny", True)
            params = SamplingParams(max_new_tokens=body["max_tokens"], temperature=body["temperature"])
            events = []
            for chunk in llm.stream(body["prompt"], params):
                reason = (
                    {"eos": "stop", "length": "length"}[chunk.generation.finish_reason] if chunk.generation else None
                )
                events.append({"choices": [{"text": chunk.text, "finish_reason": reason}]})
            lines = [f"data: {json.dumps(event)}\n\n" for event in events]
            self._send("".join([*lines, "data: [DONE]\n\n"]).encode())

        def _send(self, content: bytes) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/v1"
        httpd.shutdown()
        thread.join()


def test_a_server_answers_by_tokens_and_is_counted_by_ours(llm: LLM, setting: Setting, server: str) -> None:
    peer = peer_named(f"openai={server}", setting)
    text = llm.generate(prompt(llm), GREEDY).text
    reply = peer.answer(prompt(llm), GREEDY)
    assert reply.token_ids == llm.tokenizer.encode(text)
    assert reply.memory is None
    with pytest.raises(OSError, match="without `choices`; give the server's URL up to /v1"):
        peer_named(f"openai={server.removesuffix('/v1')}", setting).answer(prompt(llm), GREEDY)
    with pytest.raises(Unavailable, match="no server answers at"):
        peer_named("openai=http://127.0.0.1:9/v1", setting)
    with pytest.raises(Unavailable, match="needs a server's URL"):
        peer_named("openai", setting)


# Processes


def test_a_child_answers_and_its_death_is_told(llm: LLM, setting: Setting) -> None:
    child = Child("hf", setting)
    try:
        check_greedy(child, llm)
        reply = child.answer(prompt(llm), GREEDY)
        assert reply.memory is None or reply.memory > 1 << 20
        os.kill(child._process.pid, signal.SIGKILL)
        child._process.wait()
        with pytest.raises(ChildProcessError, match="the process of hf was ended by SIGKILL"):
            child.answer(prompt(llm), GREEDY)
    finally:
        child.close()


def test_a_child_says_why_it_cannot_run_or_failed(llm: LLM, setting: Setting) -> None:
    def said(spec: str, *requests: object) -> list[dict[str, Any]]:
        replies = io.StringIO()
        serve(spec, setting, io.StringIO("".join(json.dumps(r) + "\n" for r in requests)), replies)
        return [json.loads(line) for line in replies.getvalue().splitlines()]

    assert "needs a draft model" in said("hf-assisted")[0]["unavailable"]
    assert "takes no argument" in said("hf=3")[0]["wrong"]
    hello, failed, fine = said(
        "hf", {"prompt": [10**6], "params": {}}, {"prompt": prompt(llm), "params": {"max_new_tokens": 3}}
    )
    assert hello == {"name": "hf", "here": True, "comparable": True}
    assert failed["failed"].startswith("IndexError")
    assert len(fine["reply"]["token_ids"]) == 3
