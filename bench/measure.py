"""What every benchmark shares: interleaved timing, and the conditions a figure holds under."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, calls: int, rounds: int
) -> dict[str, list[float]]:
    """Time candidates in turn, so that a busy moment of a shared machine hits all of them.

    Parameters
    ----------
    candidates : mapping of name to function
    calls : int
        Calls in one timing.
    rounds : int
        Timings of each candidate.

    Returns
    -------
    dict of name to list of float
        Seconds a call, one figure a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for function in candidates.values():
        for _ in range(calls):
            function()
    for _ in range(rounds):
        for name, function in candidates.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], name: str, reference: str) -> float:
    """Return the median, over the rounds, of one candidate's time over another's."""
    return statistics.median(
        mine / its for mine, its in zip(seconds[name], seconds[reference], strict=True)
    )


def conditions(*packages: str) -> dict[str, Any]:
    """Return machine, versions and date."""
    processor = platform.processor()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    versions = {}
    for package in ("numpy", "array-api-compat", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor,
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def save(path: str | None, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, if a path was given."""
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
