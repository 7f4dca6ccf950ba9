"""How many threads a call on large NumPy arrays uses."""

from __future__ import annotations

import operator

__all__ = ["get_num_threads", "set_num_threads"]

_MOST = 1024


def get_num_threads() -> int:
    """Return how many threads a call on large NumPy arrays uses, at most.

    Returns
    -------
    int
        The CPUs that this process may use, or what `set_num_threads` or the environment variable
        RELU_XP_NUM_THREADS says; 1 without compiled kernels.
    """
    from relu_xp import kernels  # loaded when it is needed

    return 1 if kernels.cpu is None else int(kernels.cpu.get_num_threads())


def set_num_threads(n: int, /) -> None:
    """Set how many threads a call on large NumPy arrays uses, at most.

    It concerns calls of this process that begin later, and has no effect without compiled kernels.

    Parameters
    ----------
    n : int
        From 1 to 1024, the calling thread included.

    Raises
    ------
    TypeError
        If it is not an integer.
    ValueError
        If it is out of range.
    """
    from relu_xp import kernels

    try:
        number = operator.index(n)
    except TypeError:
        number = None
    if number is None or isinstance(n, bool):
        raise TypeError(f"set_num_threads: n must be an integer, got {type(n).__name__}")
    if not 1 <= number <= _MOST:
        raise ValueError(f"set_num_threads: n must be from 1 to {_MOST}, got {n}")
    if kernels.cpu is not None:
        kernels.cpu.set_num_threads(number)
