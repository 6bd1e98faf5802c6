"""Tests run on one thread: tiny tensors are not worth a second one, and machines are shared.

What passes of tiny models cost stays out of the user's cache. GPUs are hidden, for most tests compare bits of the CPU;
S4C_TEST_GPU=1 shows them to those that are for one (tests/test_fused.py, tests/test_gpu.py).
"""

import os
from pathlib import Path

import pytest

if os.environ.get("S4C_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported


@pytest.fixture(autouse=True, scope="session")
def costs_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = str(tmp_path_factory.mktemp("costs"))
    patch = pytest.MonkeyPatch()
    patch.setattr("s4c.engine.measure.home", lambda: Path(os.environ.get("S4C_HOME", elsewhere)))
