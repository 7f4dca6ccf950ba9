"""The threads that help a call with large arrays.

What they do, and how they wait for it, is compiled code without the GIL (`runtime.source`):
to hand that over between two threads takes longer than most jobs.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from relu_xp.backends import threads
from relu_xp.backends.llvm.runtime import BOARD, THREAD_BYTES

__all__ = ["THREADED_BYTES", "Crew", "new_board"]

_Board = npt.NDArray[np.int64]

# Bytes of `out`, measured on two cores with AVX-512.
_RELEASE = 1 << 15  # the kernel takes a microsecond: to give the GIL away pays
THREADED_BYTES = 1 << 19  # two threads that are awake are faster
_STREAM = 1 << 25  # y would not be in the cache anyway when it is read next
_PATIENCE = 10_000  # some 0.5 ms: a helper sleeps when its next job is further away than that


def new_board(addresses: Mapping[str, int]) -> _Board:
    """Return a board (`runtime.BOARD`) without a job, given what it has addresses of."""
    board = np.zeros(_word(threads.count(), "taken"), np.int64)
    for name, address in addresses.items():
        board[BOARD[name]] = address
    board[BOARD["release_bytes"]] = _RELEASE
    board[BOARD["threaded_bytes"]] = THREADED_BYTES
    board[BOARD["stream_bytes"]] = _STREAM
    board[BOARD["patience"]] = _PATIENCE
    board[BOARD["threads"]] = threads.count()
    return board


class Crew:
    """The helpers at one board.

    Parameters
    ----------
    board : array
    help : function
        Takes part in jobs as the thread of a number, until it is to stop.
    ring : function
        Wakes the helpers that sleep.
    """

    def __init__(
        self, board: _Board, help: Callable[[int], object], ring: Callable[[], object]
    ) -> None:
        self._board = board
        self._help = help
        self._ring = ring
        self._hiring = threading.Lock()
        self._helpers: list[threading.Thread] | None = None
        atexit.register(self.dismiss)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def muster(self) -> None:
        """Start the helpers, if they have not been started."""
        if self._helpers is None:
            with self._hiring:
                self._hire()

    def _hire(self) -> None:
        if self._helpers is not None:  # by another thread, meanwhile
            return
        helpers = self._helpers = []
        for number in range(1, int(self._board[BOARD["threads"]])):
            self._board[_word(number, "asleep")] = 0
            self._board[_word(number, "bell")] = _new_lock()
            # Daemons, or Python would wait for them before it calls `dismiss`.
            helper = threading.Thread(
                target=self._help, args=(number,), name=f"relu_xp-{number}", daemon=True
            )
            try:
                helper.start()
            except RuntimeError:  # no more threads, or the interpreter is shutting down
                return
            helpers.append(helper)

    def dismiss(self) -> None:
        """End the helpers; calls from now on do without."""
        with self._hiring:
            helpers, self._helpers = self._helpers or [], []
        self._board[BOARD["stop"]] = 1
        self._ring()
        for helper in helpers:
            helper.join()

    def _forget(self) -> None:
        """Be as new: this process was forked, and has none of the threads."""
        for word in ("busy", "open", "active"):
            self._board[BOARD[word]] = 0
        for number in range(1, int(self._board[BOARD["threads"]])):
            self._board[_word(number, "asleep")] = 0
        self._hiring = threading.Lock()
        self._helpers = None


def _word(number: int, name: str) -> int:
    """Return where a thread's own word lies."""
    return BOARD[name] + number * THREAD_BYTES // 8


def _new_lock() -> int:
    """Return the address of a lock, taken, as Python's C API has them; it is never freed."""
    allocate = ctypes.pythonapi.PyThread_allocate_lock
    allocate.restype = ctypes.c_void_p
    lock: int | None = allocate()
    if lock is None:
        raise MemoryError("no memory for a lock")
    acquire = ctypes.pythonapi.PyThread_acquire_lock
    acquire.argtypes = (ctypes.c_void_p, ctypes.c_int)
    acquire(lock, 0)
    return lock
