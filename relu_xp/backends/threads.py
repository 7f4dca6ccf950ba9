"""How many threads the CPU backends may use, and NumPy's calls spread over them."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["VARIABLE", "count", "run"]

VARIABLE = "RELU_XP_NUM_THREADS"

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU in a period
_SMALLEST_NORMAL = 2.0**-1022


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

    Where this thread's processor takes subnormals for zero it works alone: others do not know.
    """
    job = _Job(function, parts)
    try:
        if _SMALLEST_NORMAL / 2:
            job.seek_help(min(count(), len(job.left)) - 1)
        job.work()
        job.wait()
    except BaseException:  # Ctrl-C above all, which may come at any point
        job.abandon()
        raise
    finally:
        del job.function  # the pool may keep the job; the arrays it need not
    if job.error is not None:
        try:
            raise job.error
        finally:
            job.error = None  # it knows this frame, and so would keep itself, and the arrays


class _Job:
    """Parts that are left to do, and how many helpers are at work on one.

    Locks are for helpers alone: Ctrl-C comes to the caller only, which then may hold none.
    """

    def __init__(self, function: Callable[..., object], parts: Iterable[tuple[Any, ...]]) -> None:
        self.function = function
        self.left = collections.deque(parts)
        self.error: BaseException | None = None  # of a helper
        self._helpers = 0
        self._counting = threading.Lock()
        self._gone: queue.SimpleQueue[None] = queue.SimpleQueue()

    def seek_help(self, helpers: int) -> None:
        """Ask for helpers; as many come as the pool has threads for, and time."""
        # There may be no more threads, or the interpreter is shutting down.
        with contextlib.suppress(RuntimeError):
            for _ in range(helpers):
                _pool().submit(self.help)

    def work(self) -> None:
        """Do parts until there are none."""
        while True:
            try:
                part = self.left.popleft()
            except IndexError:
                return
            self.function(*part)

    def help(self) -> None:
        """Work on a thread of the pool; after an error nobody begins another part."""
        with self._counting:
            self._helpers += 1
        try:
            self.work()
        except BaseException as error:
            self.left.clear()
            self.error = error
        finally:
            with self._counting:
                self._helpers -= 1
            self._gone.put(None)

    def wait(self) -> None:
        """Wait until no helper is at work: each that is will tell when it goes."""
        while self._helpers:
            self._gone.get()

    def abandon(self) -> None:
        """Leave the rest undone, and wait, even if that is interrupted."""
        while True:
            try:
                self.left.clear()
                return self.wait()
            except KeyboardInterrupt:
                pass  # once more: the first is on its way


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(count(), "relu_xp")


if hasattr(os, "register_at_fork"):  # the child has the pool, but none of its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
