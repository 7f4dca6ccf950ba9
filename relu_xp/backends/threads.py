"""How many threads the CPU backends may use, and NumPy's calls spread over them."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["VARIABLE", "count", "run"]

VARIABLE = "RELU_XP_NUM_THREADS"

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU in a period


@functools.cache
def count() -> int:
    """Return how many threads may work at once: the CPUs of this process, or fewer.

    Fewer where the environment variable RELU_XP_NUM_THREADS or a container's quota says so. Read
    once.

    Raises
    ------
    ValueError
        If the variable is no whole number, 1 or greater.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        cpus = min(cpus, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no such limit ("max"), or no such file
    text = os.environ.get(VARIABLE)
    if not text:
        return cpus
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{VARIABLE} must be a whole number, 1 or greater, got {text!r}")
    return min(cpus, int(text))


def run(function: Callable[..., object], parts: Iterable[tuple[Any, ...]]) -> None:
    """Call ``function(*part)`` for every part, on this thread and on idle ones of a pool.

    Each takes the next part when it has done one, so a thread that loses its CPU delays only its
    own. Returns, or raises what a call raised, when nothing is at work any more.
    """
    left = collections.deque(parts)

    def work() -> None:
        while True:
            try:
                part = left.popleft()
            except IndexError:
                return
            function(*part)

    helpers = []
    try:
        for _ in range(min(count(), len(left)) - 1):
            helpers.append(_pool().submit(work))  # noqa: PERF401 - those before one that fails
    except RuntimeError:
        pass  # the interpreter is shutting down, or can have no more threads: work alone
    try:
        work()
    finally:
        left.clear()  # after an error, or Ctrl-C, nobody begins another part
        for helper in helpers:
            if not helper.cancel():
                helper.result()


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(count(), "relu_xp")


if hasattr(os, "register_at_fork"):  # the child has the pool, but none of its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
