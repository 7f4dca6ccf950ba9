"""``relu-xp info`` and `show_versions`: versions, backends, kernels, threads and GPU."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import platform
import warnings

from relu_xp import __version__, dispatch, get_num_threads
from relu_xp.cli._shared import print_table

__all__ = ["show_versions"]

SUMMARY = "show versions, backends, kernels, threads and GPU"

_DISTRIBUTIONS = (
    *("numpy", "array-api-compat", "array-api-strict", "ml-dtypes"),
    *("cupy", "cupy-cuda12x", "cupy-cuda13x", "cupy-rocm-7-0", "torch", "jax"),
    *("dask", "distributed", "matplotlib", "scikit-learn", "tqdm"),
)


def add_options(_: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no options."""


def run(_: argparse.Namespace) -> None:
    """Print the tables."""
    show_versions()


def show_versions() -> None:
    """Print versions, backends, kernels, threads and GPU, for example for a bug report.

    What is missing or broken is printed with its reason; nothing is raised.
    """
    entry_points = importlib.metadata.entry_points(group=dispatch.ENTRY_POINTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries may warn when they are imported
        reasons = {name: dispatch.availability(name) for name in dispatch.LIBRARIES}
        sections = {
            "Versions": versions(),
            "Backends": {name: reason or _backend(name) for name, reason in reasons.items()},
            "Third-party backends": {one.name: one.value for one in entry_points} or {"none": ""},
            "GPU": {"none": f"CuPy: {reasons['cupy']}"} if reasons["cupy"] else gpus(),
        }
    for title, rows in sections.items():
        print(title if title == "Versions" else f"\n{title}")
        print_table(rows, indent="  ")


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and the libraries that are installed."""
    found = {"relu_xp": __version__, "Python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(Exception):  # not installed, or its metadata are broken
            found[name] = str(importlib.metadata.version(name))
    return found


def processor() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()  # not Linux, or not x86


def gpus() -> dict[str, str]:
    """Return what CuPy says about the devices."""
    found = {}
    try:
        from cupy.cuda import runtime

        for number in range(runtime.getDeviceCount()):
            properties = runtime.getDeviceProperties(number)
            found[f"device {number}"] = (
                f"{properties['name'].decode()}, {properties['totalGlobalMem'] / 2**30:.1f} GiB, "
                f"compute capability {properties['major']}.{properties['minor']}"
            )
        api, major, minor = ("HIP", 10**7, 10**5) if runtime.is_hip else ("CUDA", 1000, 10)
        for name in ("driver", "runtime"):
            version = getattr(runtime, f"{name}GetVersion")()
            found[name] = f"{api} {version // major}.{version % major // minor}"
    except Exception as error:
        found["unknown"] = f"{type(error).__name__}: {error}"
    return found


def _backend(library: str) -> str:
    """Return the backend of a library, and for NumPy its kernels or why there are none."""
    try:
        backend = dispatch.backend_class(library)
        name = f"{backend.__module__}.{backend.__qualname__}"
        if library != "numpy":
            return name
        from relu_xp import kernels

        if kernels.cpu is None:
            return f"{name} ({kernels.reason})"
        return f"{name} ({kernels.cpu.instruction_set}, {get_num_threads()} threads)"
    except (Exception, SystemExit) as error:  # of a variable, the library or another package
        return " ".join(str(error).split()) or type(error).__name__
