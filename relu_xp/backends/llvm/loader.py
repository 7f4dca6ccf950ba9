"""Decides when kernels are made, and holds what is ready."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from relu_xp.backends.llvm import kernels
from relu_xp.backends.llvm.crew import Crew, new_board
from relu_xp.backends.llvm.engine import Engine, cache_folder

__all__ = ["Loader", "loader"]

_Array = npt.NDArray[Any]


class Loader:
    """Makes the kernels of one structure after another, on a thread that ends with its work.

    Attributes
    ----------
    addresses : dict of Structure to dict of str to int
        What is ready: where the function of each name lies.
    failure : Exception or None
        Why nothing ever will be.
    board : array
        What callers and helpers share (`runtime.BOARD`), once there is a kernel.
    """

    board: npt.NDArray[np.int64]

    def __init__(self) -> None:
        self.addresses: dict[kernels.Structure, dict[str, int]] = {}
        self.failure: Exception | None = None
        self._engine: Engine | None = None
        self._asked: list[kernels.Structure] = []
        self._thread: threading.Thread | None = None
        self._queue = threading.Lock()
        self._making = threading.Lock()
        if hasattr(os, "register_at_fork"):  # which waits, for the sake of the locks within LLVM
            os.register_at_fork(
                before=self._making.acquire,
                after_in_parent=self._making.release,
                after_in_child=self._forget_thread,
            )

    def call(
        self, record: _Array, size: int, out: _Array | None, x: _Array, other: _Array | None = None
    ) -> _Array | None:
        """Run a kernel, if there is one (`runtime.source`, which takes the place of this)."""
        return None

    def fits(self, out: _Array, like: _Array, other: _Array, nbytes: int) -> bool:
        """Tell whether `out` surely may take a result (likewise)."""
        return False

    def muster(self) -> None:
        """See to it that there are helpers, for large arrays (`Crew.muster`, likewise)."""

    def request(self, structure: kernels.Structure) -> None:
        """See to it that a structure's kernels will be there some time soon."""
        with self._queue:
            if self.failure is not None:
                return
            if structure not in self._asked:
                self._asked.append(structure)
            # One that is not alive was not started: Ctrl-C came first.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="relu_xp-compiler")
                try:
                    self._thread.start()
                except RuntimeError:  # no more threads, or the interpreter is shutting down
                    self._thread = None
                    self._asked.clear()

    def make(self, structure: kernels.Structure) -> None:
        """Make a structure's kernels now, if they are not there."""
        with self._making:
            if structure in self.addresses or self.failure is not None:
                return
            try:
                engine = self.engine()
                if engine.serves(structure):
                    self.addresses[structure] = engine.addresses(
                        kernels.source(structure), kernels.NAMES
                    )
            except Exception as error:  # NumPy serves on, and `relu-xp info` tells why
                self.failure = error

    def make_all(self) -> None:
        """Make every kernel there is, now."""
        for structure in kernels.structures():
            self.make(structure)

    def describe(self) -> str:
        """Tell, in a line, what is compiled, or why nothing ever will be."""
        try:
            with self._making:
                engine = self.engine()
        except Exception as error:
            return f"not compiled: {error}"
        self.make(kernels.structures()[0])  # to see whether that works
        if self.failure is not None:
            return f"not compiled: {self.failure}"
        every = kernels.structures()
        kept = sum(engine.is_kept(kernels.source(structure)) for structure in every)
        folder = cache_folder() or "no folder, for want of a home"
        return f"{engine.name}; {kept} of {len(every)} kinds of kernels in {folder}"

    def engine(self) -> Engine:
        """Return the compiler; make it, and the function that calls kernels, if it is the first."""
        if self._engine is None:
            engine = Engine()
            self.board = new_board(engine.c_api)
            call, fits, *others = engine.runtime(self.board)
            self.muster = Crew(self.board, *others).muster  # type: ignore[method-assign]
            self.call, self.fits = call, fits  # type: ignore[method-assign]
            self._engine = engine
        return self._engine

    def _run(self) -> None:
        while True:
            with self._queue:
                if not self._asked or not threading.main_thread().is_alive():
                    self._thread = None
                    return
                structure = self._asked[0]
            self.make(structure)
            with self._queue:
                self._asked.remove(structure)
            time.sleep(0.001)  # for a fork that waits: a lock goes to who asks at once

    def _forget_thread(self) -> None:
        """Be ready to go on: this process was forked, and has only the thread that forked it."""
        self._queue = threading.Lock()
        self._asked = []
        self._thread = None
        self._making.release()


loader = Loader()
