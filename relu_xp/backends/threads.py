"""How many threads the CPU backends may use, and NumPy's calls spread over them."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import math
import os
import threading
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
    job = _Job(function, parts)
    try:
        # Without more threads, or while the interpreter is shutting down, this one works alone.
        with contextlib.suppress(RuntimeError):
            for _ in range(min(count(), len(job.left)) - 1):
                _pool().submit(job.work)
        job.work()
    except BaseException as error:  # Ctrl-C, before the work began
        job.fail(error)
    job.wait()
    if job.error is not None:
        try:
            raise job.error
        finally:
            job.error = None  # it knows this frame, and so would keep itself, and the arrays


class _Job:
    """Parts that are left to do, and who is at work on one."""

    def __init__(self, function: Callable[..., object], parts: Iterable[tuple[Any, ...]]) -> None:
        self.left = collections.deque(parts)
        self.error: BaseException | None = None
        self._function = function
        self._workers = 0
        self._change = threading.Condition()

    def work(self) -> None:
        """Do parts until there are none; after an error nobody begins another."""
        with self._change:
            self._workers += 1
        try:
            while True:
                try:
                    part = self.left.popleft()
                except IndexError:
                    return
                self._function(*part)
        except BaseException as error:  # Ctrl-C above all: it is for whoever called
            self.fail(error)
        finally:
            with self._change:
                self._workers -= 1
                self._change.notify_all()

    def wait(self) -> None:
        """Wait until nobody is at work, even if that is interrupted."""
        while True:
            try:
                with self._change:
                    self._change.wait_for(lambda: not self._workers)
                break
            except KeyboardInterrupt as error:
                self.fail(error)
        del self._function  # the pool may keep this; the arrays it need not

    def fail(self, error: BaseException) -> None:
        """Leave the rest undone."""
        self.left.clear()
        if self.error is None:
            self.error = error


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(count(), "relu_xp")


if hasattr(os, "register_at_fork"):  # the child has the pool, but none of its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
