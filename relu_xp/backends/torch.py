"""PyTorch tensors: those in this machine's memory by NumPy's backend, the others by the base class.

On a CPU ``torch.where`` takes 5 to 10 times as long as a kernel that selects. So a tensor in this
machine's memory goes to the backend for NumPy, without a copy, and the residuals are a packed mask
(`relu_xp.mask`). In autograd's graph it is one node, which keeps the residuals.

What is traced (``torch.compile``, ``torch.jit.trace``, ``make_fx``, ``torch.func``, forward-mode
derivatives), lies on another device, or is of a subclass goes through the base class, whose
operations PyTorch differentiates and compiles; or through ``torch.threshold``, which obeys the
rules to the bit in float32 and float64, for a preset that only selects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat.torch
import numpy as np
import torch
import torch.masked
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from relu_xp.backends.base import Backend
from relu_xp.backends.overlap import address_view
from relu_xp.dispatch import backend_for
from relu_xp.mask import Mask, unpack
from relu_xp.parameters import CastParameters

try:
    import ml_dtypes
except ImportError:  # the base class serves bfloat16
    ml_dtypes = None

__all__ = ["TorchBackend"]

_CLASSES = (torch.Tensor, torch.nn.Parameter)


def _by_numpy(name: str) -> Callable[..., Any]:
    """Return a pass as a method: of NumPy's backend where there are views, else the base's."""

    def method(self: TorchBackend, *arguments: Any) -> Any:
        views = None if _is_tracked(*arguments) else self._views(*arguments)
        if views is None:
            return getattr(Backend, name)(self, *arguments)
        return _as_tensor(getattr(self._numpy, name)(*views), views[-1], arguments[-1])

    return method


class TorchBackend(Backend):
    """PyTorch tensors; by public names of PyTorch only."""

    checks_arrays = True

    def __init__(self) -> None:
        self._numpy = backend_for("torch", "x", np.empty(0))

    def forward(self, params: CastParameters, x: Any, out: Any) -> Any:
        """Return f(x)."""
        if out is None and _is_threshold(params):
            return torch.threshold(x, params.threshold, 0.0)
        if out is None and _is_tracked(x) and _are_plain(x):
            return _Node.apply(x, params, self)[0]
        return self._forward(params, x, out)

    def forward_with_mask(
        self, params: CastParameters, x: Any, out: Any, mask: Any
    ) -> tuple[Any, Any]:
        """Return f(x) and the packed mask, or the branch codes where there are no views."""
        views = self._views(x, out)
        if views is None:
            return super().forward_with_mask(params, x, out, mask)
        array, target = views
        if _is_tracked(x, out):  # autograd must record y, but not the mask
            _, residuals = self._numpy.forward_with_mask(params, array, None, None)
            return self.forward(params, x, out), residuals
        y, residuals = self._numpy.forward_with_mask(params, array, target, None)
        return _as_tensor(y, target, out), residuals

    def backward(self, grad_params: CastParameters, dy: Any, residuals: Any, out: Any) -> Any:
        """Return f'(x) * dy from the residuals."""
        if isinstance(residuals, Mask):
            views = None if _is_tracked(dy, out) else self._views(grad_params, dy, residuals, out)
            if views is not None:
                return _as_tensor(self._numpy.backward(*views), views[-1], out)
            codes = unpack(residuals, dy.shape, grad_params.num_branches)
            residuals = torch.from_numpy(codes)
        return super().backward(grad_params, dy, residuals, out)

    def backward_from_input(
        self, params: CastParameters, grad_params: CastParameters, dy: Any, x: Any, out: Any
    ) -> Any:
        """Return f'(x) * dy, for autograd a function of `dy` alone."""
        if dy is not None and out is None and grad_params is params and _is_threshold(params):
            return torch.ops.aten.threshold_backward(dy, x, params.threshold)
        return self._backward_from_input(params, grad_params, dy, x.detach(), out)

    bias_relu = _by_numpy("bias_relu")

    def bias_relu_with_mask(
        self, params: CastParameters, x: Any, bias: Any, axis: int, out: Any, mask: Any
    ) -> tuple[Any, Any]:
        """Return f(x + bias) and the packed mask of the sum, or the branch codes."""
        views = None if _is_tracked(x, bias, out) else self._views(x, bias, out)
        if views is None:
            return super().bias_relu_with_mask(params, x, bias, axis, out, mask)
        array, vector, target = views
        y, residuals = self._numpy.bias_relu_with_mask(params, array, vector, axis, target, None)
        return _as_tensor(y, target, out), residuals

    def bias_relu_backward(
        self, grad_params: CastParameters, dy: Any, residuals: Any, axis: int, dtype: Any, out: Any
    ) -> tuple[Any, Any]:
        """Return f'(x + bias) * dy, and the bias's gradient, which holds no graph of autograd."""
        # In NumPy's dtype: PyTorch rounds float64 to float32 on the way to 16 bits.
        sample = torch.empty(0, dtype=dtype, device="cpu")
        is_packed = isinstance(residuals, Mask) and not _is_tracked(dy, out)
        views = self._views(dy, out, sample) if is_packed else None
        if views is not None:
            array, target, like = views
            dx, total = self._numpy.bias_relu_backward(
                grad_params, array, residuals, axis, like.dtype, target
            )
            return _as_tensor(dx, target, out), _as_tensor(total, None, None)
        dx, total = super().bias_relu_backward(grad_params, dy, residuals, axis, dtype, out)
        is_traced = _is_recorded() or _is_transformed(total)
        return dx, total if is_traced else total.detach()

    def prelu_weight_grad(self, dy: Any, x: Any, weight: Any) -> Any:
        """Return the gradient with respect to the weight, which holds no graph of autograd."""
        if not _is_recorded() and not any(map(_is_transformed, (dy, x, weight))):
            dy, x, weight = dy.detach(), x.detach(), weight.detach()
        return self._prelu_weight_grad(dy, x, weight)

    _forward = _by_numpy("forward")
    _backward_from_input = _by_numpy("backward_from_input")
    _prelu_weight_grad = _by_numpy("prelu_weight_grad")
    prelu = _by_numpy("prelu")
    crelu = _by_numpy("crelu")
    crelu_mask = _by_numpy("crelu_mask")
    crelu_backward = _by_numpy("crelu_backward")
    squared_relu = _by_numpy("squared_relu")
    squared_relu_backward = _by_numpy("squared_relu_backward")

    def namespace(self, x: Any) -> Any:
        """Return PyTorch in the array API standard."""
        return array_api_compat.torch

    def why_unsupported(self, x: Any) -> tuple[str, str] | None:
        """Return a reason for a layout other than PyTorch's usual one."""
        if type(x) in _CLASSES and x.layout is torch.strided and not x.is_nested:
            return None
        if isinstance(x, torch.masked.MaskedTensor):
            return "is a MaskedTensor, whose mask would be lost", "by its method get_data()"
        if x.is_nested:
            return "is a nested tensor, which has no shape", "by its method to_padded_tensor(0.0)"
        if x.layout is not torch.strided:
            layout = f"has the layout {x.layout}, which is not supported"
            return layout, "by its method to_dense()"
        return None

    def device(self, x: Any) -> tuple[str, torch.device]:
        """Return the library and the device."""
        return "torch", x.device

    def copy(self, x: Any) -> Any:
        """Return a copy, detached from autograd's graph unless x is traced."""
        is_traced = _is_recorded() or _is_transformed(x)
        return x.clone() if is_traced else x.detach().clone()

    def check_out(self, out: Any, inputs: Sequence[Any]) -> None:
        """Refuse an `out` that overlaps an input without being it, or is a leaf of autograd."""
        if torch.compiler.is_compiling():  # there is no memory yet
            return
        if out.requires_grad and out.is_leaf and torch.is_grad_enabled():
            raise ValueError(
                "cannot be written: it is a leaf that requires a gradient; give another tensor, or "
                "call within torch.no_grad()"
            )
        super().check_out(out, inputs)

    def memory_view(self, x: Any) -> Any:
        """Return a NumPy array with the addresses of x, on any device; None if it has none."""
        try:
            address, size = x.data_ptr(), x.element_size()
            return address_view(address, x.shape, [size * s for s in x.stride()], size)
        except RuntimeError:  # traced, or sparse
            return None

    def _views(self, *arguments: Any) -> list[Any] | None:
        """Return the arguments with the memory of each tensor as an array in its place, or None."""
        if _is_recorded():
            return None
        views = []
        for argument in arguments:
            view = _view(argument) if isinstance(argument, torch.Tensor) else argument
            if view is None and argument is not None:
                return None
            views.append(view)
        return views


class _Node(torch.autograd.Function):  # type: ignore[misc]  # torch is not type-checked here
    """f as one node of autograd's graph, which keeps the residuals and neither x nor y."""

    generate_vmap_rule = True  # else `torch.func.vmap` over another tensor refuses the node

    @staticmethod
    def forward(x: Any, params: CastParameters, backend: TorchBackend) -> tuple[Any, Any]:
        return backend.forward_with_mask(params, x, None, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
        _, ctx.params, ctx.backend = inputs
        _, ctx.residuals = output

    @staticmethod
    def backward(ctx: Any, dy: Any, _: None) -> tuple[Any, None, None]:
        return ctx.backend.backward(ctx.params, dy, ctx.residuals, None), None, None


def _is_threshold(params: CastParameters) -> bool:
    """Return whether ``torch.threshold`` is f, to the bit; in 16 bits it changes a NaN."""
    only_selects = params.zero_below and params.identity_above and params.max_value is None
    return only_selects and params.is_floating and params.width > 16


def _is_tracked(*arguments: Any) -> bool:
    """Return whether autograd records operations on the tensors among the arguments."""
    tensors = (argument for argument in arguments if isinstance(argument, torch.Tensor))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _is_recorded() -> bool:
    """Return whether a tracer records operations on any tensor; `make_fx` has a proxy mode."""
    is_tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return is_tracing or get_proxy_mode() is not None


def _are_plain(*tensors: Any) -> bool:
    """Return whether tensors have memory, and nothing but autograd records operations on them."""
    return not _is_recorded() and all(map(_has_memory, tensors))


def _is_transformed(tensor: Any) -> bool:
    """Return whether `torch.func` or forward-mode differentiation follows a tensor."""
    is_strided = tensor.layout is torch.strided and not tensor.is_meta
    return type(tensor) in _CLASSES and is_strided and not _has_memory(tensor)


def _has_memory(tensor: Any) -> bool:
    if type(tensor) not in _CLASSES:
        return False
    try:
        has_memory = tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:  # one of `torch.func`; those of its `functionalize` have an address of 0
        return False
    return has_memory and forward_ad.unpack_dual(tensor).tangent is None


def _view(tensor: Any) -> Any:
    """Return a tensor's memory as an array; None if NumPy cannot or must not read it."""
    if not _has_memory(tensor):
        return None
    if tensor.requires_grad:
        tensor = tensor.detach()
    try:
        if tensor.dtype is not torch.bfloat16:
            return tensor.numpy()
        return ml_dtypes and tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    except (RuntimeError, TypeError):  # another device, or a lazily negated tensor
        return None


def _as_tensor(array: Any, target: Any, out: Any) -> Any:
    """Return a result as a tensor: `out` with a new version for autograd, if it was written."""
    if array is target:
        torch.autograd.graph.increment_version(out)
        return out
    if ml_dtypes and array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
