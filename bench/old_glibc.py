"""Lets a library built against glibc 2.38 load on an older one, where it needs nothing newer than C23's strtol family.

llama.cpp's wheels are built on such a system: gcc there redirects strtol and friends to new names with version
GLIBC_2.38, and an older loader refuses the whole library for it. A copy whose version need is marked weak loads, and
a three-line library answers for the names. Nothing that is timed changes: only number parsing is redirected.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import struct
import subprocess
from pathlib import Path

SHIM = """
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
long __isoc23_strtol(const char *s, char **end, int base) { return strtol(s, end, base); }
long long __isoc23_strtoll(const char *s, char **end, int base) { return strtoll(s, end, base); }
unsigned long __isoc23_strtoul(const char *s, char **end, int base) { return strtoul(s, end, base); }
unsigned long long __isoc23_strtoull(const char *s, char **end, int base) { return strtoull(s, end, base); }
int __isoc23_sscanf(const char *s, const char *format, ...) {
    va_list list;
    va_start(list, format);
    int n = vsscanf(s, format, list);
    va_end(list);
    return n;
}
"""
WEAK = 0x2  # VER_FLG_WEAK of vna_flags: a missing version is then no error (ELF gABI, symbol versioning)


def needed() -> bool:
    """Whether this system's glibc is older than 2.38."""
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) < (2, 38)


def copy_loadable(folder: Path, out: Path) -> None:
    """Copy folder's shared libraries to `out` with the need for GLIBC_2.38 made weak, and load the shim globally."""
    source = out / "isoc23.c"
    source.write_text(SHIM)
    shim = out / "libisoc23.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(shim), str(source)], check=True)
    ctypes.CDLL(str(shim), mode=ctypes.RTLD_GLOBAL)
    need = struct.pack("<IH", _elf_hash("GLIBC_2.38"), 0)  # start of an Elf64_Vernaux: vna_hash, vna_flags
    weak = struct.pack("<IH", _elf_hash("GLIBC_2.38"), WEAK)
    for library in folder.glob("*.so*"):
        copy = out / library.name
        shutil.copy(library, copy)
        copy.write_bytes(copy.read_bytes().replace(need, weak))


def _elf_hash(name: str) -> int:
    """The System V ELF hash of a version name (ELF gABI, chapter 5)."""
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ (high >> 24)) & ~high & 0xFFFFFFFF
    return value
