"""What ``torch.compile`` is told, without importing PyTorch.

It traces Python, but neither an import, nor a cache, nor the exact arithmetic that rounds a number:
such a function it is to call, and to take the result for a constant of what it compiles.
"""

from __future__ import annotations

import sys
from typing import TypeVar

__all__ = ["compiles", "compiling", "constant"]

FunctionT = TypeVar("FunctionT")


def constant(function: FunctionT) -> FunctionT:
    """Let ``torch.compile`` call a function while it traces, and take its result for a constant.

    As ``torch.compiler.assume_constant_result`` does. What is given must be types, dtypes, strings
    and numbers, and of an object that is returned only such attributes may be read.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def compiles() -> bool:
    """Tell, in 30 ns, whether ``torch.compile`` may be at work in this process."""
    return "torch._dynamo" in sys.modules


def compiling() -> bool:
    """Tell whether ``torch.compile`` is tracing the caller."""
    if not compiles():
        return False
    import torch

    return torch.compiler.is_compiling()  # type: ignore[no-any-return]
