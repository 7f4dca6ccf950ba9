"""The compiled CPU kernels, or why there are none.

See the README.md of this folder for how they are built.
"""

from __future__ import annotations

import atexit
import math
import os
from pathlib import Path
from typing import Any

__all__ = ["NATIVE", "NUM_THREADS", "cpu", "reason"]

NATIVE = "RELU_XP_NATIVE"  # environment variable: 0 leaves the compiled kernels unused
NUM_THREADS = "RELU_XP_NUM_THREADS"  # environment variable

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU, and of a period

cpu: Any = None  # the compiled module, if it was loaded
reason = ""  # why it was not

if os.environ.get(NATIVE) == "0":
    reason = f"switched off by {NATIVE}=0"
else:
    try:
        import relu_xp.kernels._cpu as cpu
    except ModuleNotFoundError:
        reason = (
            "not compiled: no C++ compiler when relu_xp was installed, a big-endian processor, "
            "or not built at all"
        )
    except ImportError as error:
        reason = f"not loaded: {error}"


def _default_num_threads() -> int:
    """Return the number of CPUs of this process, or the lower one of a container or the user."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        cpus = min(cpus, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no such limit ("max"), or no such file
    text = os.environ.get(NUM_THREADS)
    if not text:
        return cpus
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{NUM_THREADS} must be an integer, 1 or greater, got {text!r}")
    return min(cpus, int(text))


if cpu is not None:
    cpu.set_num_threads(min(_default_num_threads(), cpu.max_threads))
    atexit.register(cpu.shut_down)
