"""The gradient of a forward pass, as a function."""

from __future__ import annotations

import functools
from typing import Any, Generic, Protocol, TypeVar

from relu_xp.backends.base import Backend
from relu_xp.parameters import CastParameters, Parameters
from relu_xp.validation import check_grad_output, check_out

__all__ = ["Pullback", "Rule"]

GradientT = TypeVar("GradientT", covariant=True)


class Gradient(Protocol):
    """The gradient of one activation; the parameters are cast to the dtype of `dy`."""

    def __call__(self, params: CastParameters, dy: Any, residuals: Any, out: Any, /) -> Any: ...


class Rule(functools.partial[Any]):
    """A `Gradient` made of a function and its first arguments.

    Two of them compare by value, on which JAX depends: two pullbacks with equal rules have one
    structure, for which nothing is compiled again.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and (self.func, self.args) == (other.func, other.args)

    def __hash__(self) -> int:
        return hash((self.func, self.args))


class Pullback(Generic[GradientT]):
    """The gradient of one forward pass, as a function; it may be called any number of times.

    Made by the functions whose name ends in ``_vjp``. It can be pickled and copied; for JAX it is a
    pytree, whose leaves are what is kept for the gradient.
    """

    def __init__(
        self,
        rule: Gradient,
        backend: Backend,
        parameters: Parameters,
        x: Any,
        residuals: Any,
        shape: tuple[int, ...] | None = None,
        mask: Any = None,
    ) -> None:
        self._rule = rule
        self._backend = backend
        self._parameters = parameters
        self._residuals = residuals
        self._device = backend.device(x)
        self._x_shape = x_shape = x.shape
        self._shape = x_shape if shape is None else shape  # of y
        self._mask = mask  # if it is the caller's

    def __call__(self, dy: Any, /, *, out: Any = None) -> GradientT:
        """Return the gradient with respect to the input.

        Parameters
        ----------
        dy : array, shape of y
            Gradient with respect to the output; any floating dtype, any layout, x's library and
            device.
        out : array, library, device and dtype of `dy`, shape of x, optional
            Where to write the gradient with respect to x: `dy` itself, if y has the shape of x, or
            an array that shares no memory with it, or with a ``mask`` of the caller's.

        Returns
        -------
        array, shape of x, dtype of `dy`
            For `prelu_vjp` and `bias_relu_vjp` two: with the gradient with respect to the weight
            or the bias.

        Raises
        ------
        TypeError
            If `dy` is not floating, or of another library.
        ValueError
            If `dy` has another shape or device, or `out` is not valid.
        """
        return self.backward("pullback", dy, out)

    def backward(self, function: str, dy: Any, out: Any) -> GradientT:
        """Return the gradient; an error names `function`."""
        dy, grad_params = check_grad_output(
            function, dy, self._parameters, self._device, self._shape, "forward saw"
        )
        if out is not None:
            mask = self._mask
            shape = None if self._shape == self._x_shape else self._x_shape
            other = dy if mask is None else mask
            if shape is not None or not self._backend.is_valid_out(out, dy, other):
                check_out(function, out, dy, "dy", (dy, other), self._backend, shape)
        gradient: GradientT = self._rule(grad_params, dy, self._residuals, out)
        return gradient

    @property
    def saved_nbytes(self) -> int:
        """Bytes held for the gradient.

        Raises
        ------
        ValueError
            If Dask does not know the size of x before it is computed.
        """
        return self._backend.residuals_nbytes(self._residuals)
