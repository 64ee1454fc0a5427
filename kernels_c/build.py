"""Builds kernels_c._kernels. `python -m kernels_c.build [--force]` builds in place; pip uses `ffibuilder`.

setuptools executes this file by path, so it imports nothing of the package.
"""

from __future__ import annotations

import importlib.machinery
import os
import platform
import re
import sys
import tempfile
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
SRC = Path("kernels_c/src")
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = ("scalar", "avx2", "avx512") if X86 else ("scalar",)
# No contraction: packing must round every operation as the reference does; kernels ask for fma where they want it.
FLAGS = ["-std=gnu11", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi"]


def declarations() -> str:
    """common.h's shared part and every operation of api.h once per instruction set, as C that cffi can parse."""
    shared = (ROOT / SRC / "common.h").read_text().split("/* cffi: begin */")[1].split("/* cffi: end */")[0]
    return shared + prototypes()


def prototypes() -> str:
    api = (ROOT / SRC / "api.h").read_text()
    return "".join(re.sub(r"\bFN\((\w+)\)", rf"\1_{isa}", api) for isa in ISAS)


def make_builder(src: Path = SRC) -> FFI:
    """src: where the compiler finds the sources; setuptools wants it relative to the project's root."""
    builder = FFI()
    builder.cdef(declarations())
    builder.set_source(
        "kernels_c._kernels",
        '#include "common.h"\n' + prototypes(),
        sources=[str(src / name) for name in ("pool.c", *(f"isa_{isa}.c" for isa in ISAS))],
        include_dirs=[str(src)],
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread"],
        libraries=["m"],
    )
    return builder


def build(force: bool = False) -> Path:
    """Compile in a temporary folder and move the result beside this file; nothing to do if it is newer than src."""
    target = next(
        (path for s in importlib.machinery.EXTENSION_SUFFIXES if (path := ROOT / f"kernels_c/_kernels{s}").exists()),
        None,
    )
    newest = max(path.stat().st_mtime for path in (Path(__file__), *(ROOT / SRC).iterdir()))
    if target and target.stat().st_mtime > newest and not force:
        return target
    with tempfile.TemporaryDirectory() as folder:
        built = Path(make_builder(ROOT / SRC).compile(tmpdir=folder))
        target = ROOT / "kernels_c" / built.name
        staged = target.with_name(f"_kernels.{os.getpid()}.tmp")
        staged.write_bytes(built.read_bytes())
        staged.replace(target)  # a process that has the old one mapped keeps it
    return target


ffibuilder = make_builder()

if __name__ == "__main__":
    print(build(force="--force" in sys.argv[1:]))
