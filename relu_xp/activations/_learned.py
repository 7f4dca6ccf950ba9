"""What the layers that learn an array share: the array, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from relu_xp.activations._base import Layer
from relu_xp.activations._pullback import Pullback
from relu_xp.dispatch import backend_for
from relu_xp.parameters import RELU
from relu_xp.validation import resolve

__all__ = ["LEARNED", "LearnedLayer"]

LEARNED = "layer.params[0]"  # the array in messages


class LearnedLayer(Layer):
    """A layer that learns one array, ``params[0]``, whose gradient is ``grads[0]``.

    Its pullback returns that gradient second.
    """

    _role: ClassVar[str]  # of the array, in messages

    _has_gradient = False  # whether `backward` has been called

    def _learn(self, shape: tuple[int, ...], first: float, xp: Any, dtype: Any) -> Any:
        """Set `params` and `grads`, and return the array, of which every element is `first`."""
        if not hasattr(xp, "full"):
            raise TypeError(
                f"xp must be an array library, such as the module cupy, got {type(xp).__name__}"
            )
        dtype = xp.float32 if dtype is None else dtype
        with np.errstate(all="ignore"):
            learned = xp.full(shape, first, dtype=dtype)
        try:
            resolve(type(self).__name__, "the array", learned, RELU, floating=True)
        except TypeError as error:
            raise TypeError(f"dtype must be a floating dtype, got {dtype}") from error
        # Not by assignment: a subclass may have a property of that name, which cannot be set.
        vars(self).update(params=[learned], grads=[xp.zeros(shape, dtype=dtype)])
        return learned

    @property
    def grads(self) -> list[Any]:
        """The gradient of the array, in its library, shape and dtype; 0 before `backward`."""
        grads: list[Any] = vars(self)["grads"]
        if self._has_gradient or (self.params and grads and _are_alike(grads[0], self.params[0])):
            return grads
        try:  # the array has been replaced
            learned, backend, _ = resolve("grads", LEARNED, self.params[0], RELU, floating=True)
        except (IndexError, TypeError):  # `forward` says so
            return grads
        grads[:1] = [backend.namespace(learned).zeros_like(learned)]
        return grads

    @grads.setter
    def grads(self, grads: Sequence[Any]) -> None:
        vars(self)["grads"] = grads if isinstance(grads, list) else list(grads)

    def _learned(self) -> Any:
        """Return the array for a forward pass."""
        if not self.params:
            raise ValueError(f"forward: layer.params is empty; its first array is {self._role}")
        return self.params[0]

    def _backward(self, pullback: Pullback[Any], dy: Any, out: Any) -> Any:
        dx, gradient = pullback.backward("backward", dy, out)
        grads = self.grads
        grads[:1] = [_store(grads[0] if grads else None, gradient, (dy, dx))]
        self._has_gradient = True
        return dx


def _store(array: Any, gradient: Any, others: tuple[Any, Any]) -> Any:
    """Return an array with the gradient, or that itself if the array cannot be written.

    Nor is it written if it is of another kind, or shares memory with the others.
    """
    if any(array is other for other in others):
        return gradient
    backend = backend_for("backward", "dy", gradient)
    if not all(backend.is_valid_out(array, gradient, other) for other in others):
        if not _are_alike(array, gradient):
            return gradient
        try:
            backend.check_out(array, others)
        except (TypeError, ValueError):
            return gradient
    return backend.store(gradient, array)


def _are_alike(array: Any, other: Any) -> bool:
    """Return whether two arrays have one library, shape, dtype and device."""
    try:
        left, right = (
            (backend_for("backward", "array", a).device(a), a.shape, a.dtype)
            for a in (array, other)
        )
    except TypeError:  # one is no array
        return False
    return left == right
