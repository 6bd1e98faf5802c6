"""Builds the C++ core of the native runtime; where that fails, the package installs without it and runs on torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("s4c/models/native/src")
FLAGS = [
    os.environ.get("S4C_OPTIMISE", "-O3"),
    "-std=c++17",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-pthread",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
INSTRUCTION_SETS = {
    "amx": [*BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-DS4C_AMX"],
    "avx512bf16": BF16,
    "avx512": AVX512,
    "avx2": AVX2,
    "portable": [],
}
"""What kernels.cpp is compiled for, once each, where the compiler can; the core picks one when it is loaded."""


class BuildCore(build_ext):
    """Compiles kernels.cpp once for each instruction set, and links all into one library."""

    def build_extension(self, ext: Extension) -> None:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        objects, built = [], []
        for name, flags in INSTRUCTION_SETS.items():
            if x86 or not flags:
                try:
                    objects += self._compile("kernels.cpp", name, [*flags, f"-DS4C_VARIANT={name}"])
                except CompileError:
                    if not flags:
                        raise
                    continue
                built.append(f"-DS4C_WITH_{name.upper()}")
        objects += self._compile("core.cpp", "core", built) + self._compile("draft.cpp", "draft", [])
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=["-pthread"], target_lang="c++"
        )

    def _compile(self, source: str, name: str, flags: list[str]) -> list[str]:
        return self.compiler.compile(
            [str(SOURCES / source)],
            output_dir=str(Path(self.build_temp) / name),
            extra_postargs=[*FLAGS, *flags],
            depends=[str(path) for path in SOURCES.iterdir()],
        )


setup(
    ext_modules=[Extension("s4c.models.native._core", [str(SOURCES / "core.cpp")], optional=True)],
    cmdclass={"build_ext": BuildCore},
)
