"""The threads that help a call with large arrays.

Between two jobs a helper looks for the next one for a while, outside the GIL (`ir.runtime`), since
to wake a thread takes longer than most jobs; then it sleeps.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from relu_xp.backends import threads
from relu_xp.backends.llvm.ir import BOARD

__all__ = ["THREADED", "Crew", "new_board"]

_WORDS_A_LINE = 8

# Bytes of `out`, measured on two cores with AVX-512.
_RELEASE = 1 << 15  # the kernel takes a microsecond: to give the GIL away pays
THREADED = 1 << 19  # two threads that are awake are faster
_STREAM = 1 << 25  # y would not be in the cache anyway when it is read next
_PATIENCE = 2000  # some 0.1 ms: a helper sleeps when its next job is further away than that


def new_board(addresses: Mapping[str, int]) -> np.ndarray[Any, Any]:
    """Return a board (`ir.BOARD`) without a job, given what it has addresses of."""
    board = np.zeros(BOARD["taken"] + _WORDS_A_LINE * threads.count(), np.int64)
    for name, address in addresses.items():
        board[BOARD[name]] = address
    board[BOARD["release_bytes"]] = _RELEASE
    board[BOARD["threaded_bytes"]] = THREADED
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
        Takes part in jobs as a thread of the given number; returns when there was none for a while.
    """

    def __init__(self, board: np.ndarray[Any, Any], help: Callable[[int], object]) -> None:
        self._board = board
        self._help = help
        self._start = threading.Lock()
        self._helpers: list[threading.Thread] | None = None
        self._sleepers: list[threading.Lock] = []
        atexit.register(self.dismiss)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def wake(self) -> None:
        """See to it that every helper looks for the job that is to come."""
        if self._helpers is None:
            self._hire()
        sleepers = self._sleepers
        while sleepers:
            try:
                sleepers.pop().release()
            except IndexError:  # another caller woke the last
                return

    def dismiss(self) -> None:
        """End the helpers; calls from now on do without."""
        self._board[BOARD["stop"]] = 1
        with self._start:
            helpers, self._helpers = self._helpers or [], []
        for helper in helpers:
            while helper.is_alive():
                self.wake()
                helper.join(0.01)

    def _hire(self) -> None:
        with self._start:
            if self._helpers is not None:
                return
            self._helpers = []
            for number in range(1, int(self._board[BOARD["threads"]])):
                # Daemons, or Python would wait for them before it calls `dismiss`.
                helper = threading.Thread(
                    target=self._serve, args=(number,), name=f"relu_xp-{number}", daemon=True
                )
                try:
                    helper.start()
                except RuntimeError:  # no more threads, or the interpreter is shutting down
                    return
                self._helpers.append(helper)

    def _serve(self, number: int) -> None:
        bell = threading.Lock()
        bell.acquire()
        while not self._board[BOARD["stop"]]:
            self._help(number)
            self._sleepers.append(bell)
            bell.acquire()

    def _forget(self) -> None:
        """Be as new: this process was forked, and has none of the threads."""
        for word in ("busy", "open", "active"):
            self._board[BOARD[word]] = 0
        self._start = threading.Lock()
        self._helpers = None
        self._sleepers = []
