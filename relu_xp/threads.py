"""How many threads a call on large NumPy arrays uses."""

from __future__ import annotations

from relu_xp.validation import as_integer

__all__ = ["get_num_threads", "set_num_threads"]

_MOST = 1024


def get_num_threads() -> int:
    """Return how many threads a call on large NumPy arrays uses, at most.

    Returns
    -------
    int
        The number that `set_num_threads` or the environment variable RELU_XP_NUM_THREADS has set,
        else that of the CPUs that this process may use; 1 without compiled kernels.
    """
    from relu_xp import kernels  # loaded by the first use

    return 1 if kernels.cpu is None else int(kernels.cpu.get_num_threads())


def set_num_threads(n: int, /) -> None:
    """Set how many threads a call on large NumPy arrays uses, at most.

    This applies to later calls in this process, and has no effect without compiled kernels.

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

    number = as_integer("set_num_threads: n", n)
    if not 1 <= number <= _MOST:
        raise ValueError(f"set_num_threads: n must be from 1 to {_MOST}, got {n}")
    if kernels.cpu is not None:
        kernels.cpu.set_num_threads(number)
