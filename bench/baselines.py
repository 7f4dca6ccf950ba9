"""What the CPU kernels are compared with: the loops of limit.cpp, and an earlier package."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.report import processor

SOURCE = Path(__file__).with_name("limit.cpp")


@functools.cache
def limit() -> Any:
    """Return ``limit.cpp`` as a library; None without AVX-512 or a compiler that can use it."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler or "avx512bw" not in processor("flags"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/limit.so"
        options = f"-O2 -std=c++17 -march=x86-64-v4 -shared -fPIC -fopenmp -o {library}"
        command = [*compiler.split(), *options.split(), str(SOURCE)]
        if subprocess.run(command, check=False).returncode:
            return None
        return ctypes.CDLL(library)


def earlier(folder: Path, use: Callable[[Any], object]) -> tuple[Any, str]:
    """Return the package of another folder, beside the one that has its name, and its commit.

    `use` calls it: what it imports at first use must be there before the name is ours again.
    """

    def take_modules() -> dict[str, Any]:
        names = [name for name in sys.modules if name.partition(".")[0] == "relu_xp"]
        return {name: sys.modules.pop(name) for name in names}

    folder = folder.resolve()
    command = ["git", "-C", str(folder), "rev-parse", "--short=7", "HEAD"]
    commit = subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
    ours = take_modules()
    sys.path.insert(0, str(folder))
    try:
        package = importlib.import_module("relu_xp")
        if Path(package.__file__ or "").parents[1] != folder:
            raise ImportError(f"relu_xp came from {package.__file__}, not from {folder}")
        if hasattr(package, "warmup"):  # its kernels are LLVM IR
            importlib.import_module("llvmlite")
            package.warmup()
        use(package)
    finally:
        sys.path.remove(str(folder))
        take_modules()
        sys.modules.update(ours)
    return package, commit or folder.name
