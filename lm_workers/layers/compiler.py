"""Compile the C++ sources beside this file, once for each machine and source."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from lm_workers.models.source import default_cache

log = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
_HERE = Path(__file__).parent
_LIMIT_S = 120


class CompileError(Exception):
    """There are no compiled kernels on this machine; the message says why."""


@cache
def compile_library(source: str, macro: str) -> ctypes.CDLL:
    """The library of `source`, a file beside this one, compiled with `macro` defined.

    It is kept in the user's cache under a name that changes with the sources, the compiler and the
    CPU, so only the first start on a machine compiles (seconds).

    Raises:
        CompileError: no compiler is found, or it refuses the source.
    """
    command = [_find_compiler(), *FLAGS, f"-D{macro}", str(_HERE / source)]
    try:
        library = _cached_path(command)
        if not library.exists():
            log.info("compiling %s into %s", command[-1], library)
            _compile(command, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"{source} cannot be compiled and loaded: {error}") from error


def _find_compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        if found := shutil.which(name):
            return found
    raise CompileError(f"no C++ compiler found (looked for {wanted or ', '.join(COMPILERS)})")


def _cached_path(command: list[str]) -> Path:
    files = sorted([*_HERE.glob("*.h"), Path(command[-1])])
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, check=True, timeout=_LIMIT_S
    ).stdout
    key = repr([[file.read_text() for file in files], command, version, _cpu()])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return default_cache() / "kernels" / f"{Path(command[-1]).stem}-{digest}.so"


def _cpu() -> str:
    """What the CPU can do: a cache may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = (line for line in lines if line.startswith(("flags", "Features")))
    return next(flags, platform.processor())


def _compile(command: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        target = Path(folder) / library.name
        done = subprocess.run(
            [*command, *_openmp(), "-o", str(target)],
            capture_output=True, text=True, check=False, timeout=_LIMIT_S,
        )  # fmt: skip
        if done.returncode:
            raise CompileError(f"{command[0]} refuses {command[-1]}: {done.stderr.strip()[-500:]}")
        target.replace(library)


def _openmp() -> list[str]:
    """Torch's own OpenMP runtime: a second one beside it would fight for the cores."""
    root = Path(torch.__file__).parent
    found = [*(root / "lib").glob("libgomp*.so*"), *(root.parent / "torch.libs").glob("libgomp*")]
    return [str(path) for path in found[:1]]
