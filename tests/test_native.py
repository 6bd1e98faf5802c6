"""The native runtime: what a row gets is right, and not a bit of it depends on anything but the row's own path.

The kernels are compiled for several instruction sets; a test that takes `name` runs on each that this machine has.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import PROMPTS, SETTINGS, Prophet, s4c_drafter, write
from test_llama_target import PROMPT, plain
from torch import Tensor
from transformers import AutoModelForCausalLM
from verify_oracles import case_of_odd_rows, case_of_trees

from s4c import LLM, SamplingParams
from s4c.models.layers import DecoderLayer, LayerShape, RMSNorm
from s4c.models.loading import choose_runtime, load_config, load_target
from s4c.models.native import library
from s4c.models.native.linear import NativeLinear, quantise
from s4c.models.native.rows import native_judge, native_top_and_total
from s4c.models.stack import Rope, Stack, stack_class

SETS = library.instruction_sets() if library.problem() is None else []
SIZES = (1, 7, 16, 17, 33, 80, 576)
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
ONE = torch.tensor([[-1]])

pytestmark = pytest.mark.skipif(not SETS, reason="the C++ core is not built")
each_set = pytest.mark.parametrize("name", SETS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@contextmanager
def computing(name: str, threads: int = 1) -> Iterator[None]:
    """Use an instruction set and a number of threads for a while."""
    before = library.threads()
    assert library.core().s4c_choose(name.encode()) == 0
    library.set_threads(threads)
    try:
        yield
    finally:
        library.set_threads(before)
        assert library.core().s4c_choose(library.instruction_set().encode()) == 0


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stack_of(
    shape: LayerShape, dtype: torch.dtype, native: bool = True, norm: bool = True, scaling: float = 1.0, seed: int = 0
) -> Stack:
    """Two random layers; the same weights whatever the runtime."""
    generator = torch.Generator().manual_seed(seed)
    final = RMSNorm(shape.hidden, shape.eps).requires_grad_(False)
    rope = Rope(100.0 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim), scaling)
    stack = stack_class(native)(2, shape, rope, dtype, torch.device("cpu"), final if norm else None)
    final.weight.add_(0.2 * torch.randn(final.weight.shape, generator=generator))
    for index in range(2):
        layer = DecoderLayer(shape).requires_grad_(False)
        for weight in layer.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise / weight.shape[1] ** 0.5 if weight.ndim > 1 else weight + 0.2 * noise)
        stack.place(index, layer)
    return stack


def shape_of(hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, **options: bool) -> LayerShape:
    return LayerShape(hidden, intermediate, heads, kv_heads, head_dim, 1e-5, **options)


SMALL = shape_of(36, 150, 6, 2, 20)
BIASED = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}


def steps(stack: Stack, slot: int, x: Tensor) -> Tensor:
    """[n, d] of [n, d]: plain decoding, a pass for each row."""
    rows = [x[:0]]
    for row in x:
        rows.append(stack.run(row[None, None], ONE, slot)[0])
        stack.keep(slot, [0])
    return torch.cat(rows)


def prefill(stack: Stack, slot: int, x: Tensor, chunks: list[int]) -> Tensor:
    """[n, d] of [n, d]: whole chunks a pass, their sizes taken in turn."""
    rows, start = [x[:0]], 0
    while start < len(x):
        chunk = x[start : start + chunks[len(rows) % len(chunks)]]
        rows.append(stack.run(chunk[None], causal(len(chunk)), slot)[0])
        stack.keep(slot, list(range(len(chunk))))
        start += len(chunk)
    return torch.cat(rows)


def fresh(stack: Stack, slot: int, x: Tensor) -> Tensor:
    """Plain decoding of a sequence from its start, in a slot that held something else."""
    stack.reserve(slot + 1, len(x))
    stack.lengths[slot] = 0
    return steps(stack, slot, x)


def causal(count: int) -> Tensor:
    """[1, count]: the parents of a chain behind the committed rows."""
    return torch.arange(-1, count - 1)[None]


def path_to(parents: list[int], node: int) -> list[int]:
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


# ------------------------------------------------------------------------------------------------------- products


@each_set
def test_a_product_in_float32_and_bfloat16_is_the_exact_one_but_for_rounding(name: str) -> None:
    with computing(name):
        for dtype in (torch.float32, torch.bfloat16):
            for index, (inputs, outputs) in enumerate((i, o) for i in SIZES for o in SIZES):
                weight, bias = random(outputs, inputs, seed=index).to(dtype), random(outputs, seed=1)
                x = random((1, 2, 5, 6, 7, 13, 40)[index % 7], inputs, seed=2)
                rounded, wide = x.to(dtype).double(), weight.double()
                product = NativeLinear(weight, bias if index % 2 else None, dtype)
                error = product(x).double() - (rounded @ wide.T + (bias.double() if index % 2 else 0))
                assert (error.abs() <= 1e-5 * (1 + rounded.abs() @ wide.abs().T)).all(), (inputs, outputs, dtype)
                assert torch.equal(product.dense(), weight)


@each_set
def test_a_product_in_int8_is_its_formula_bit_by_bit(name: str) -> None:
    with computing(name):
        for index, (inputs, outputs) in enumerate((i, o) for i in SIZES for o in SIZES):
            weight, bias = random(outputs, inputs, seed=index), random(outputs, seed=1)
            x = random((1, 2, 5, 6, 7, 13, 40)[index % 7], inputs, seed=2)
            x[0] *= 1e3 * (index % 3)
            product = NativeLinear(weight, bias if index % 2 else None, torch.int8)
            values, scale = quantise(weight)
            expected = int8_product(values, scale, x) + (bias.numpy() if index % 2 else np.float32(0))
            assert np.array_equal(product(x).numpy(), expected), (inputs, outputs)
            # Each weight that was spread is off by half a step at most, and spreading back keeps their length.
            error, most = (product.dense() - weight).norm(dim=1), 0.5 * scale * values.shape[1] ** 0.5
            assert (error <= 1.001 * 8 * most).all()
            some = torch.tensor([outputs - 1, 0])
            torch.testing.assert_close(product.rows(some), product.dense()[some])


def int8_product(values: Tensor, scale: Tensor, x: Tensor) -> np.ndarray:
    """Spread weights and inputs with a scale for each output and each row, an integer product, a factor."""
    rows, limit = spread(x.numpy()), np.float32(127)
    top = np.abs(rows).max(1)
    inverse = np.divide(limit, top, out=np.zeros_like(top), where=top > 0)
    integers = np.rint(rows * inverse[:, None]).astype(np.int64)
    product = (integers @ values.numpy().astype(np.int64).T).astype(np.float32)
    whole: np.ndarray = product * ((top / limit)[:, None] * scale.numpy())
    return whole


def spread(x: np.ndarray) -> np.ndarray:
    """[n, m'] of [n, m]: zeros to whole blocks of 64, and each times the Hadamard matrix, in the kernel's order."""
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % 64)))
    blocks = x.reshape(len(x), -1, 64)
    for stride in (1, 2, 4, 8, 16, 32):
        pairs = blocks.reshape(len(x), -1, 64 // (2 * stride), 2, stride)
        blocks = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2)
    return blocks.reshape(len(x), -1)


@each_set
@each_dtype
def test_a_product_of_a_row_knows_no_other_row(name: str, dtype: torch.dtype) -> None:
    product = NativeLinear(random(83, 300), None, dtype)
    x = random(64, 300, seed=1)
    x[5], x[11, 3], x[17] = torch.nan, torch.inf, 1e30
    with computing(name):
        alone = torch.cat([product(row[None]) for row in x])
        for count in range(1, 65):
            assert alike(product(x[:count]), alone[:count])
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        assert alike(product(x[order]), alone[order])
    with computing(name, threads=3):
        assert alike(product(x), alone)


def alike(a: Tensor, b: Tensor) -> bool:
    """The same bits, where NaN is NaN."""
    return bool((a.isnan() == b.isnan()).all()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@each_set
@each_dtype
def test_nan_is_not_lost(name: str, dtype: torch.dtype) -> None:
    """A broken weight or activation must reach the logits, where it is reported."""
    product = NativeLinear(random(20, 50), None, dtype)
    with computing(name):
        for where in (0, 15, 16, 47, 48, 49):
            x = random(1, 50, seed=1)
            x[0, where] = torch.nan
            assert product(x).isnan().all()


@each_dtype
def test_empty_products_and_leading_dimensions(dtype: torch.dtype) -> None:
    product = NativeLinear(random(5, 9), None, dtype)
    x = random(2, 3, 9, seed=1)
    assert product(x[:0]).shape == (0, 3, 5)
    assert torch.equal(product(x).flatten(0, 1), product(x.flatten(0, 1)))
    assert torch.equal(product(x.transpose(0, 1)), product(x).transpose(0, 1))


# ---------------------------------------------------------------------------------------- the layers, against torch


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (shape_of(64, 96, 4, 2, 16), {}),
        (shape_of(33, 47, 3, 3, 80), {}),
        (shape_of(30, 17, 8, 1, 128, **BIASED), {"scaling": 1.3}),
        (shape_of(1, 1, 1, 1, 2), {"norm": False}),
        (shape_of(70, 100, 7, 1, 20, head_norms=True), {}),
        (shape_of(48, 8, 10, 2, 34, head_norms=True, qkv_bias=True), {"norm": False, "scaling": 0.7}),
        (shape_of(17, 24, 6, 1, 6, mlp_bias=True), {}),
    ],
    ids=str,
)
def test_the_layers_are_those_of_torch(shape: LayerShape, options: dict[str, Any]) -> None:
    oracle = stack_of(shape, torch.float32, native=False, **options)
    parents = [-1, 0, 0, 1, 1, 2, 5, 5, 6]
    x, tree = random(75, shape.hidden), torch.tensor([parents])
    nodes = random(1, len(parents), shape.hidden, seed=1)
    oracle.reserve(1, 100)
    expected = torch.cat([prefill(oracle, 0, x, [70, 5]), oracle.run(nodes, tree)[0]])
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 0.01), (torch.int8, 0.04)):
        for name in SETS:
            stack = stack_of(shape, dtype, **options)
            stack.reserve(1, 100)
            with computing(name):
                features = torch.cat([prefill(stack, 0, x, [75]), stack.run(nodes, tree)[0]])
            error = (features - expected).norm() / expected.norm()
            # A single number averages no rounding away.
            assert error < (2 * bound if shape.hidden == 1 else bound), (dtype, name)


def test_tapped_layers_are_given_as_well() -> None:
    oracle = stack_of(SMALL, torch.float32, native=False)
    x, tree = random(3, 7, SMALL.hidden), torch.tensor([[-1, 0, 0, 1, 2, 2, 5]]).expand(3, -1)
    oracle.reserve(3, 32)
    expected = oracle.run(x, tree, taps=[1, 2])
    assert expected.shape == (3, 7, 3 * SMALL.hidden)
    for name in SETS:
        for threads in (1, 2):
            stack = stack_of(SMALL, torch.float32)
            stack.reserve(3, 32)
            with computing(name, threads):
                plain, wide, first = stack.run(x, tree), stack.run(x, tree, taps=[1, 2]), stack.run(x, tree, taps=[1])
            torch.testing.assert_close(wide, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(wide[..., : SMALL.hidden], plain)
            assert torch.equal(first, wide[..., : 2 * SMALL.hidden])


# ------------------------------------------------------------------------------ the layers, against themselves, bitwise


@st.composite
def shapes(draw: st.DrawFn) -> LayerShape:
    kv_heads = draw(st.integers(1, 3))
    return LayerShape(
        hidden=draw(st.one_of(st.integers(1, 40), st.integers(60, 150))),
        intermediate=draw(st.one_of(st.integers(1, 40), st.integers(60, 300))),
        heads=kv_heads * draw(st.integers(1, 8)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 6, 16, 20, 34, 80, 128])),
        eps=1e-5,
        **{name: draw(st.booleans()) for name in ("qkv_bias", "out_bias", "mlp_bias", "head_norms")},
    )


@st.composite
def trees(draw: st.DrawFn, nodes: int) -> list[int]:
    return [-1] + [draw(st.integers(0, node - 1)) for node in range(1, nodes)]


@each_set
@each_dtype
@given(data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_speculative_is_plain_bitwise(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """Random models, prompts, chunks, batches, trees and accepted paths, against steps of one row, one sequence."""
    shape = data.draw(shapes())
    stack = stack_of(shape, dtype, norm=data.draw(st.booleans()))
    prompts = data.draw(st.lists(st.integers(0, 75), min_size=1, max_size=3))
    batch, nodes, spare = len(prompts), data.draw(st.integers(1, 20)), len(prompts)
    threads = data.draw(st.sampled_from([1, 1, 1, 2, 3]))
    texts = [random(count, shape.hidden, seed=slot) for slot, count in enumerate(prompts)]
    stack.reserve(batch + 1, 8)
    with computing(name, threads):
        for slot, text in enumerate(texts):
            prefill(stack, slot, text, data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
        for turn in range(2):
            parents = [data.draw(trees(nodes)) for _ in range(batch)]
            x = random(batch, nodes, shape.hidden, seed=10 + turn)
            features = stack.run(x, torch.tensor(parents))
            for slot in range(batch):
                path = path_to(parents[slot], data.draw(st.integers(0, nodes - 1)))
                texts[slot] = torch.cat([texts[slot], x[slot, path]])
                library.set_threads(1)
                expected = fresh(stack, spare, texts[slot])[-len(path) :]
                library.set_threads(threads)
                assert torch.equal(features[slot, path], expected)
                stack.keep(slot, path)
                assert stack.lengths[slot] == len(texts[slot])
        stack.move(batch - 1, 0)
        after = random(3, shape.hidden, seed=20)
        assert torch.equal(steps(stack, 0, after), fresh(stack, spare, torch.cat([texts[-1], after]))[-3:])


@each_set
@each_dtype
def test_a_pass_over_some_rows_knows_no_other_row(name: str, dtype: torch.dtype) -> None:
    stack = stack_of(SMALL, dtype)
    x = random(64, SMALL.hidden)
    stack.reserve(65, 70)
    with computing(name):
        whole = stack.run(x[None], causal(64))[0]
        for count in range(1, 65):
            assert torch.equal(stack.run(x[None, :count], causal(count))[0], whole[:count])
        assert torch.equal(steps(stack, 64, x), whole)
        alone = torch.cat([stack.run(row[None, None], ONE, 2) for row in x])
        for count in (1, 2, 7, 33, 64):
            assert torch.equal(stack.run(x[:count, None], ONE.expand(count, 1)), alone[:count])


@each_dtype
@given(chunks=st.lists(st.integers(1, 90), min_size=1, max_size=8))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_chunks_are_one_prefill_bitwise(dtype: torch.dtype, chunks: list[int]) -> None:
    stack = stack_of(SMALL, dtype)
    x = random(290, SMALL.hidden)
    stack.reserve(2, 1)
    assert torch.equal(prefill(stack, 0, x, chunks), prefill(stack, 1, x, [290]))


@each_set
@each_dtype
def test_pending_rows_are_rows_of_one_pass_bitwise(name: str, dtype: torch.dtype) -> None:
    """What drafting does: levels of a tree in passes of their own, nothing committed between them."""
    stack = stack_of(SMALL, dtype)
    parents = torch.tensor([[-1, 0, 1, 1, 2, 3, 2, 5, 5, 7], [-1, *range(9)]])
    x = random(2, 10, SMALL.hidden)
    stack.reserve(2, 40)
    with computing(name):
        prefill(stack, 0, random(21, SMALL.hidden, seed=1), [21])
        whole = stack.run(x, parents)
        parts = [
            stack.run(x[:, begin:end], parents[:, :end], pending=begin)
            for begin, end in ((0, 1), (1, 4), (4, 7), (7, 10))
        ]
    assert torch.equal(torch.cat(parts, 1), whole)


@each_set
@each_dtype
def test_threads_change_no_bit(name: str, dtype: torch.dtype) -> None:
    shape = shape_of(70, 100, 7, 1, 20)
    results = []
    for threads in (1, 2, 3):
        stack = stack_of(shape, dtype)
        stack.reserve(3, 40)
        with computing(name, threads):
            assert library.threads() == threads
            rows = [stack.run(random(3, count, 70), causal(count).expand(3, -1)) for count in (1, 5, 17)]
            rows.append(NativeLinear(random(90, 70), None, dtype)(random(11, 70)))
        results.append(rows)
    for rows in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rows, results[0], strict=True))


@each_set
@each_dtype
def test_a_broken_sequence_breaks_no_other(name: str, dtype: torch.dtype) -> None:
    """NaN and infinity in one sequence, in a rejected node, and in cache rows that were left behind."""
    stack = stack_of(SMALL, dtype)
    x = random(3, 9, SMALL.hidden)
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2, 5, 5, 6]]).expand(3, -1)
    stack.reserve(3, 40)
    with computing(name):
        whole = stack.run(x, parents)
        broken = x.clone()
        broken[1], broken[0, 3:5], broken[2, 8] = torch.nan, torch.inf, torch.nan
        features = stack.run(broken, parents)
        assert torch.equal(features[0, [0, 1, 2, 5, 6, 7, 8]], whole[0, [0, 1, 2, 5, 6, 7, 8]])
        assert torch.equal(features[2, :8], whole[2, :8])
        assert features[1].isnan().all()
        stack.keep(0, [0, 2])
        text = torch.cat([x[0, [0, 2]], random(3, SMALL.hidden, seed=1)])
        assert torch.equal(steps(stack, 0, text[2:]), fresh(stack, 1, text)[2:])


@each_dtype
def test_room_grows_without_losing_what_is_cached(dtype: torch.dtype) -> None:
    stack = stack_of(SMALL, dtype)
    x = random(40, SMALL.hidden)
    stack.reserve(2, 1)
    prefill(stack, 1, x, [40])
    tree, parents = random(1, 3, SMALL.hidden, seed=1), torch.tensor([[-1, 0, 0]])
    before = stack.run(tree, parents, 1)
    stack.reserve(5, 1000)
    assert torch.equal(stack.run(tree, parents, 1), before)
    assert stack.lengths == [0, 40, 0, 0, 0]


@each_dtype
def test_python_threads_may_run_at_once(dtype: torch.dtype) -> None:
    """Each its own layers; the core lets one pass after the other in."""
    jobs = [(stack_of(SMALL, dtype, seed=seed), random(1, 11, SMALL.hidden, seed=seed)) for seed in range(2)]
    for stack, _ in jobs:
        stack.reserve(1, 20)
    expected = [stack.run(x, causal(11)) for stack, x in jobs]
    wrong: list[int] = []

    def work(index: int) -> None:
        stack, x = jobs[index]
        for turn in range(30):
            library.set_threads(1 + turn % 2)
            if not torch.equal(stack.run(x, causal(11)), expected[index]):
                wrong.append(index)

    with computing(library.instruction_set()):
        workers = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


# ------------------------------------------------------------------------------------------------- the whole engine


@pytest.mark.parametrize("family", tiny_models.LLAMA_LIKE)
def test_float32_decoding_is_that_of_transformers(tmp_path: Path, family: str) -> None:
    directory = tiny_models.save(tmp_path, family, tied=False)
    target = load_target(str(directory), runtime="native")
    assert target.runtime == "native"
    oracle = AutoModelForCausalLM.from_pretrained(directory)
    assert plain(target, PROMPT, 40) == tiny_models.greedy(oracle, PROMPT, 40)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory = tiny_models.save(tmp_path_factory.mktemp("model"), "llama3", seed=3, intermediate_size=50)
    return LLM(str(directory), "none", dtype=request.param, runtime="native", max_batch=4)


@pytest.mark.parametrize("setting", ["greedy", "sampled", "penalised"])
def test_speculative_is_plain_is_single(llm: LLM, setting: str) -> None:
    params = SETTINGS[setting]
    written = write(llm, "none", params)
    assert [llm.generate(prompt, params).token_ids for prompt in PROMPTS] == written
    prophet = Prophet([prompt + text for prompt, text in zip(PROMPTS, written, strict=True)])
    for drafter, tree in (("ngram", "auto"), (s4c_drafter(llm), "best:20x4"), (prophet, "auto")):
        assert write(llm, drafter, params, tree) == written


def test_broken_weights_fail_the_request_that_reads_them(llm: LLM, tmp_path: Path) -> None:
    model = tiny_models.tiny("llama", tied=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = torch.nan
    model.save_pretrained(tmp_path)
    broken = LLM(str(tmp_path), "none", dtype=llm.target.dtype, runtime="native")
    params = SamplingParams(max_new_tokens=4, ignore_eos=True, logit_bias={63: float("-inf")})
    alone = broken.generate(PROMPTS[0], params).token_ids
    failed, fine = broken.generate([[5, 63, 7], PROMPTS[0]], params)
    assert failed.finish_reason == "error"
    assert fine.token_ids == alone


# ---------------------------------------------------------------------------------------------------- the environment


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the switch as if it had been set before the process began."""

    def force(value: str) -> None:
        monkeypatch.setenv(library.SWITCH, value)
        library._load.cache_clear()

    yield force
    monkeypatch.undo()
    library._load.cache_clear()
    library.core()


def test_off_leaves_the_work_to_torch(tmp_path: Path, forced: Any) -> None:
    directory = tiny_models.save(tmp_path, "llama")
    forced("off")
    assert load_target(str(directory)).runtime == "torch"
    config, cpu = load_config(directory), torch.device("cpu")
    assert choose_runtime("auto", config, torch.float32, cpu) == ("torch", "S4C_NATIVE=off")
    for wanted, dtype in (("native", torch.float32), ("auto", torch.int8)):
        with pytest.raises(ValueError, match="S4C_NATIVE=off"):
            choose_runtime(wanted, config, dtype, cpu)


def test_an_unknown_instruction_set_is_refused(forced: Any) -> None:
    forced("nonsense")
    with pytest.raises(ValueError, match=r"nonsense.*one of .*portable, off"):
        library.core()


def test_the_switch_forces_an_instruction_set() -> None:
    code = (
        "import torch; from s4c.models.native import library; from s4c.models.native.linear import NativeLinear\n"
        "g = torch.Generator().manual_seed(0)\n"
        "y = NativeLinear(torch.randn(9, 30, generator=g), None, torch.float32)(torch.randn(3, 30, generator=g))\n"
        "print(library.instruction_set(), y.numpy().tobytes().hex())"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env={**os.environ, library.SWITCH: SETS[-1]}, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(9, 30, generator=generator), torch.randn(3, 30, generator=generator)
    with computing(SETS[-1]):
        expected = NativeLinear(weight, None, torch.float32)(x)
    assert found.stdout.split() == [SETS[-1], expected.numpy().tobytes().hex()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_computes_with_threads_of_its_own() -> None:
    x, product = random(3, 64), NativeLinear(random(48, 64), None, torch.float32)
    with computing(SETS[0], threads=2):
        expected = product(x)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(product(x), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0


@each_set
@pytest.mark.parametrize("columns", [1, 7, 16, 40, 127, 128, 129, 1000])
def test_the_top_of_rows_is_that_of_torch(name: str, columns: int) -> None:
    scores = random(5, columns, seed=columns)
    scores[1] = scores[1].round()
    scores[2, columns // 2 :] = -torch.inf
    scores[3] = -torch.inf
    for count in {1, min(3, columns), min(8, columns)}:
        with computing(name, threads=2):
            top, index, total = native_top_and_total(scores, count)
        expected = scores.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(top, expected.values[:, :count])
        finite = top.isfinite()
        assert torch.equal(index[finite], expected.indices[:, :count][finite])
        assert bool(((index >= 0) & (index < columns)).all())
        assert torch.allclose(total[:3], scores[:3].logsumexp(-1, keepdim=True), atol=2e-6, rtol=2e-6)
        assert not bool(total[3].isfinite())


@each_set
@pytest.mark.parametrize("columns", [1, 15, 16, 255, 257, 1000, 49152])
def test_the_kernel_of_the_coupled_rule_chooses_as_torch_does(name: str, columns: int) -> None:
    case = case_of_odd_rows(columns)
    with computing(name, threads=2):
        verdict = native_judge(case.tree, case.logits, case.temperatures, case.noise)
    assert torch.equal(verdict.tokens, case.verdict.tokens)


@each_set
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_kernel_of_the_coupled_rule_walks_as_the_slow_one_does(name: str, batch: int, seed: int) -> None:
    case = case_of_trees(seed, batch)
    with computing(name, threads=2):
        verdict = native_judge(case.tree, case.logits, case.temperatures, case.noise)
    for part in ("path", "accepted", "bonus", "tokens"):
        assert torch.equal(getattr(verdict, part), getattr(case.verdict, part)), part
