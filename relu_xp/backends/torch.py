"""PyTorch tensors: its own kernel where that obeys the table, else NumPy's backend on their memory.

``torch.threshold`` and its backward obey the table to the bit in float32 and float64, on their own
terms: a member that only selects. In 16 bits they lose the payload of a NaN. Of the others,
``leaky_relu`` gives the negative slope at NaN, ``hardtanh`` no gradient there, and a -0.0 below its
lower end. ``torch.where`` is right but branches: on a CPU it takes 5 to 10 times as long as any of
these. So whatever is in this machine's memory goes to the backend for NumPy, without a copy, and
what that saves is a packed mask (`relu_xp.mask`); autograd learns of it as one node.

What is being traced (``torch.compile``, ``torch.func``, forward-mode derivatives), or lies on
another device, goes through `relu_xp.backends.generic`, which differentiates and compiles.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import array_api_compat.torch
import numpy as np
import torch
from torch import is_grad_enabled
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from relu_xp.activation import Rounded
from relu_xp.backends import generic
from relu_xp.backends.generic import dtype_name, fits, mask_nbytes, uniform
from relu_xp.dispatch import backend_for
from relu_xp.mask import Mask, unpack

try:
    import ml_dtypes
except ImportError:
    _BFLOAT16 = None  # generic serves
else:
    _BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

__all__ = [
    "backward",
    "backward_both",
    "backward_from_input",
    "backward_squared",
    "both",
    "check_out",
    "copy",
    "dtype_name",
    "fits",
    "forward",
    "forward_saving",
    "gradient",
    "mask_nbytes",
    "pieces_of_both",
    "place",
    "saved_nbytes",
    "sloped",
    "slopes_gradient",
    "squared",
    "uniform",
]

_CLASSES = (torch.Tensor, torch.nn.Parameter)

generic.NAMESPACES.update(dict.fromkeys(_CLASSES, array_api_compat.torch))
_numpy = backend_for("torch", "x", np.empty(0))


def forward(numbers: Rounded, x: Any, out: Any) -> Any:
    """Return f(x). See `relu_xp.backends.Backend`."""
    if out is None and _threshold_obeys(numbers):
        return torch.threshold(x, numbers.threshold, 0.0)
    if _tracked(x, out):
        if out is None and not _traced():
            return _Activated.apply(numbers, x)
    elif views := _views(x, out):
        return _tensor(_numpy.forward(numbers, *views), out)
    return generic.forward(numbers, x, out)


def forward_saving(numbers: Rounded, x: Any, out: Any, mask: Any) -> tuple[Any, Any]:
    """Return f(x) and the packed mask, or what `generic` saves."""
    if _tracked(x, out):
        with torch.no_grad():
            _, saved = forward_saving(numbers, x, None, None)  # first: out may be x
        return forward(numbers, x, out), saved
    if views := _views(x, out):
        y, saved = _numpy.forward_saving(numbers, *views, None)
        return _tensor(y, out), saved
    return generic.forward_saving(numbers, x, out, mask)


def backward(numbers: Rounded, dy: Any, saved: Any, out: Any) -> Any:
    """Return f'(x) * dy from what was saved. See `relu_xp.backends.Backend`."""
    if isinstance(saved, Mask):
        if not _tracked(dy, out) and (views := _views(dy, out)):
            return _tensor(_numpy.backward(numbers, views[0], saved, views[1]), out)
        saved = torch.from_numpy(unpack(saved, tuple(dy.shape), numbers.pieces))
        if numbers.pieces == 2:
            saved = saved.view(torch.bool)
    return generic.backward(numbers, dy, saved, out)


def backward_from_input(numbers: Rounded, slopes: Rounded, dy: Any, x: Any, out: Any) -> Any:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    if out is None and slopes is numbers and _threshold_obeys(numbers):
        return torch.ops.aten.threshold_backward(dy, x, numbers.threshold)
    if not _tracked(dy, out) and (views := _views(dy, out)) and (array := _array(x)) is not None:
        dx = _numpy.backward_from_input(numbers, slopes, views[0], array, views[1])
        return _tensor(dx, out)
    return generic.backward_from_input(numbers, slopes, dy, x, out)


def gradient(numbers: Rounded, x: Any, out: Any) -> Any:
    """Return f'(x), of which there is no derivative. See `relu_xp.backends.Backend`."""
    if (out is None or not _tracked(out, None)) and (views := _views(x, out)):
        return _tensor(_numpy.gradient(numbers, *views), out)
    return generic.gradient(numbers, x, out)


def sloped(values: Any, x: Any, slopes: Any, out: Any) -> Any:
    """Return f(x) or f'(x) * dy. See `relu_xp.backends.Backend`."""
    return _variant("sloped", values, x, slopes, out)


def slopes_gradient(dy: Any, x: Any, slopes: Any, out: Any) -> Any:
    """Return the gradient by the slopes. See `relu_xp.backends.Backend`."""
    if _traced():
        return generic.slopes_gradient(dy, x, slopes, out)
    with torch.no_grad():  # else a layer's `grads` would keep every graph there was
        return _variant("slopes_gradient", dy, x, slopes, out)


def squared(x: Any, out: Any) -> Any:
    """Return relu(x)**2. See `relu_xp.backends.Backend`."""
    return _variant("squared", x, out)


def backward_squared(dy: Any, x: Any, out: Any) -> Any:
    """Return f'(x) * dy. See `relu_xp.backends.Backend`."""
    return _variant("backward_squared", dy, x, out)


def both(x: Any, axis: int, out: Any) -> Any:
    """Return relu(x) and relu(-x). See `relu_xp.backends.Backend`."""
    return _variant("both", x, axis, out)


def pieces_of_both(x: Any) -> Any:
    """Return which of both is above 0. See `relu_xp.backends.Backend`."""
    return _variant("pieces_of_both", x)


def backward_both(dy: Any, pieces: Any, axis: int, out: Any) -> Any:
    """Return the gradient of `both`. See `relu_xp.backends.Backend`."""
    return _variant("backward_both", dy, pieces, axis, out)


def copy(x: Any) -> Any:
    """Return x in memory that nobody else writes, apart from autograd's graph."""
    return x.clone() if _traced() else x.detach().clone()


def place(x: Any) -> tuple[str, Hashable]:
    """Return the library and device."""
    return "torch", x.device


def check_out(out: Any, inputs: Sequence[Any]) -> None:
    """Refuse what overlaps an input without being it, or a leaf of autograd's graph."""
    if is_compiling():  # where there is no memory yet
        return
    if out.requires_grad and out.is_leaf and is_grad_enabled():
        raise ValueError(
            "cannot be written: it is a leaf that requires a gradient; give another tensor, or "
            "call within torch.no_grad()"
        )
    generic.check_out(out, inputs)


def saved_nbytes(saved: Any) -> int:
    """Return the bytes of the packed mask, or of the pieces, one an element."""
    return saved.data.nbytes if isinstance(saved, Mask) else generic.saved_nbytes(saved)


def _variant(name: str, *arguments: Any) -> Any:
    """Let NumPy's backend serve tensors in memory that nobody follows, else the generic one."""
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    if _traced() or any(_tracked(tensor, None) for tensor in tensors):
        return getattr(generic, name)(*arguments)
    arrays = {id(tensor): _array(tensor) for tensor in tensors}
    if any(array is None for array in arrays.values()):
        return getattr(generic, name)(*arguments)
    result = getattr(_numpy, name)(*(arrays.get(id(value), value) for value in arguments))
    out = arguments[-1] if result is arrays.get(id(arguments[-1])) else None
    return _tensor(result, out)


class _Activated(torch.autograd.Function):  # type: ignore[misc]  # torch is not type-checked here
    """f as one node of autograd's graph, which keeps the packed mask and neither x nor y."""

    @staticmethod
    def forward(ctx: Any, numbers: Rounded, x: Any) -> Any:
        ctx.numbers = numbers
        y, ctx.saved = forward_saving(numbers, x, None, None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[None, Any]:
        return None, backward(ctx.numbers, dy, ctx.saved, None)


def _threshold_obeys(numbers: Rounded) -> bool:
    """Tell whether ``torch.threshold`` is the member, to the bit."""
    selects = numbers.zero_below and numbers.self_above and numbers.max_value is None
    return selects and numbers.floating and numbers.width > 16


def _tracked(tensor: Any, out: Any) -> bool:
    """Tell whether autograd is to know how a result is made; `out` may be None."""
    requires_grad = tensor.requires_grad or (out is not None and out.requires_grad)
    return requires_grad and is_grad_enabled()


def _traced() -> bool:
    """Tell whether somebody follows what is done to tensors, so that operations are to be seen."""
    return (
        is_compiling()
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _views(tensor: Any, out: Any) -> tuple[Any, Any] | None:
    """Return a tensor and `out`, which may be None, as NumPy arrays; None where they cannot be."""
    if _traced() or (array := _array(tensor)) is None:
        return None
    if out is None:
        return array, None
    return None if (target := _array(out)) is None else (array, target)


def _array(tensor: Any) -> Any:
    """Return a tensor's memory; None if NumPy cannot see that, or a subclass is to."""
    if type(tensor) not in _CLASSES:
        return None
    if tensor.requires_grad:
        tensor = tensor.detach()
    try:
        if tensor.dtype is not torch.bfloat16:
            return tensor.numpy()
        return None if _BFLOAT16 is None else tensor.view(torch.int16).numpy().view(_BFLOAT16)
    except (RuntimeError, TypeError):  # a GPU's, a sparse one, one that is negated when it is read
        return None


def _tensor(array: Any, out: Any) -> Any:
    """Return a result as a tensor; `out`, which autograd is told of, if it was written there."""
    if out is not None:
        torch.autograd.graph.increment_version(out)
        return out
    if _BFLOAT16 is not None and array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
