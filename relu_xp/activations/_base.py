"""What all activations share: the class of their layers, and the class of their gradients."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, Protocol, Self, SupportsIndex, TypeVar

import numpy as np

from relu_xp.arrays import portable
from relu_xp.backends.base import Backend
from relu_xp.parameters import RELU, CastParameters, Parameters
from relu_xp.validation import check_grad_output, check_mask, check_out, resolve

__all__ = ["Layer", "Pullback", "Rule", "forward", "forward_with_pullback", "resolve_floating"]

ArrayT = TypeVar("ArrayT")
GradientT = TypeVar("GradientT", covariant=True)


class Gradient(Protocol):
    """The gradient of one activation; the parameters are cast to the dtype of `dy`."""

    def __call__(self, params: CastParameters, dy: Any, residuals: Any, out: Any, /) -> Any: ...


class Rule(NamedTuple):
    """A `Gradient` made of a function and its first arguments.

    Unlike `functools.partial` two of them compare by value, on which JAX depends: two pullbacks
    with equal rules have one structure, for which nothing is compiled again.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self, params: CastParameters, dy: Any, residuals: Any, out: Any, /) -> Any:
        """Return the gradient."""
        return self.function(*self.arguments, dy, residuals, out)


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
            For `prelu_vjp` two: with the gradient with respect to the weight.

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


def resolve_floating(function: str, x: Any, out: Any) -> tuple[Any, Backend]:
    """Return a floating x and its backend, if an `out` like it is valid."""
    x, backend, _ = resolve(function, "x", x, RELU, floating=True)
    if out is not None and not backend.is_valid_out(out, x, x):
        check_out(function, out, x, "x", (x,), backend)
    return x, backend


def forward(
    function: str, parameters: Parameters, x: ArrayT, out: ArrayT | None, floating: bool = False
) -> ArrayT:
    """Return ``f(x)`` of the ReLU family; an error names `function`.

    Integers are refused if `floating`.
    """
    x, backend, params = resolve(function, "x", x, parameters, floating)
    if out is not None and not backend.is_valid_out(out, x, x):
        check_out(function, out, x, "x", (x,), backend)
    y: ArrayT = backend.forward(params, x, out)
    return y


def forward_with_pullback(
    function: str, parameters: Parameters, x: ArrayT, out: ArrayT | None, mask: Any
) -> tuple[ArrayT, Pullback[ArrayT]]:
    """Return ``f(x)`` of the ReLU family and its pullback; an error names `function`."""
    x, backend, params = resolve(function, "x", x, parameters, floating=True)
    if out is not None and not backend.is_valid_out(out, x, x):
        check_out(function, out, x, "x", (x,), backend)
    if mask is not None:
        check_mask(function, mask, x, out, params, backend)
    y, residuals = backend.forward_with_mask(params, x, out, mask)
    if mask is not None:
        mask = residuals.data  # what of it is in use
    return y, Pullback(backend.backward, backend, parameters, x, residuals, None, mask)


_PICKLED: Literal["pickled"] = "pickled"  # in place of the pullback, which a pickle leaves out


class Layer:
    """A forward pass, and the gradient of the latest one.

    A copy has what is saved between the passes; a pickle does not.
    """

    _pullback: Pullback[Any] | Literal["pickled"] | None = None
    _inplace = False
    _keeps_shape = True  # whether y has the shape of x

    # A subclass may assign other lists.

    @functools.cached_property
    def params(self) -> list[Any]:
        """The arrays that are learned."""
        return []

    @functools.cached_property
    def grads(self) -> list[Any]:
        """The gradient of each of them, from the latest `backward`."""
        return []

    @property
    def inplace(self) -> bool:
        """Whether `forward` overwrites x and `backward` overwrites dy."""
        return self._inplace

    @inplace.setter
    def inplace(self, inplace: bool) -> None:
        if not isinstance(inplace, bool):
            raise TypeError(f"inplace must be True or False, got {type(inplace).__name__}")
        if inplace and not self._keeps_shape:
            raise ValueError(f"{type(self).__name__} cannot work in place: y is longer than x")
        self._inplace = inplace

    @property
    def saved_nbytes(self) -> int:
        """Bytes held between `forward` and `backward`; 0 if nothing is saved.

        Raises
        ------
        ValueError
            If Dask does not know the size of x before it is computed.
        """
        pullback = self._pullback
        return pullback.saved_nbytes if isinstance(pullback, Pullback) else 0

    # A subclass defines both, or `forward` itself. They return y, in training with its pullback.
    _forward: Callable[[Any, Any], Any]
    _forward_with_pullback: Callable[[Any, Any], tuple[Any, Pullback[Any]]]

    def forward(self, x: ArrayT, /, *, training: bool = True, out: ArrayT | None = None) -> ArrayT:
        """Return y, and save what `backward` needs.

        Parameters
        ----------
        x : array, any shape
            float16, bfloat16, float32 or float64.
        training : bool, optional
            False saves nothing, and keeps what an earlier call saved.
        out : array, like the result, optional
            Where to write the result. Not for a layer that works in place.

        Returns
        -------
        array, dtype of `x`

        Raises
        ------
        TypeError, ValueError
            As the layer's function. What an earlier call saved is then kept.
        """
        if self._inplace:
            out = self._out_in_place("forward", x, out)
        y: ArrayT
        if training:
            y, self._pullback = self._forward_with_pullback(x, out)
        else:
            y = self._forward(x, out)
        return y

    def __call__(self, x: ArrayT, /, **options: Any) -> ArrayT:
        """Return ``self.forward(x, **options)``."""
        y: ArrayT = self.forward(x, **options)
        return y

    def backward(self, dy: ArrayT, /, *, out: ArrayT | None = None, retain: bool = False) -> ArrayT:
        """Return the gradient with respect to the input of the latest `forward`.

        Parameters
        ----------
        dy : array, shape of that output
            Gradient with respect to the output; any floating dtype, any layout.
        out : array, shape of that input, dtype of `dy`, optional
            Where to write the result. Not for a layer that works in place.
        retain : bool, optional
            Whether to keep what is saved for another call.

        Returns
        -------
        array, shape of that input, dtype of `dy`

        Raises
        ------
        RuntimeError
            If there was no `forward`, or a `backward` since then has consumed what it saved.
        TypeError, ValueError
            If `dy` or `out` does not match the latest `forward`. What is saved is then kept.
        """
        pullback = self._pullback
        if not isinstance(pullback, Pullback):
            was_pickled = "; a pickle of a layer leaves that out" * (pullback == _PICKLED)
            raise RuntimeError(
                f"backward: nothing is saved{was_pickled}; call forward(x) first (with "
                "training=True), once for each backward. backward(dy, retain=True) keeps it for "
                "another call; use relu_xp.relu_vjp for a layer that is used twice in one pass"
            )
        if self._inplace:
            out = self._out_in_place("backward", dy, out)
        dx: ArrayT = self._backward(pullback, dy, out)
        if not retain:
            self._pullback = None
        return dx

    def _backward(self, pullback: Pullback[Any], dy: Any, out: Any) -> Any:
        return pullback.backward("backward", dy, out)

    @staticmethod
    def _out_in_place(function: str, array: ArrayT, out: ArrayT | None) -> ArrayT:
        if issubclass(type(array), np.generic):
            raise TypeError(
                f"{function}: a NumPy scalar cannot be overwritten, got {type(array).__name__}; "
                "make the layer without inplace, or give a 0-d array"
            )
        if out is not None and out is not array:
            raise ValueError(
                f"{function}: out was given, but a layer with inplace=True writes into its "
                "argument; omit out=, or make the layer without inplace"
            )
        return array

    def _repr(self, *arguments: str) -> str:
        """Return what `repr` does for a layer that was made with some arguments."""
        inplace = ["inplace=True"] * self._inplace
        return f"{type(self).__name__}({', '.join([*arguments, *inplace])})"

    # A copy and a pickle both ask a subclass for its state, but a pickle gets less of it.

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        if rest:
            rest[0] = _map_attributes(_pickled, rest[0])
        return function, arguments, *rest

    def __copy__(self) -> Self:
        again = self._copy(lambda state: state, {})
        for name in ("params", "grads"):  # the lists are the copy's own, the arrays are shared
            if name in vars(again):
                setattr(again, name, copy.copy(getattr(again, name)))
        return again

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        try:
            copy.deepcopy(self._pullback, memo)
        except Exception:  # of a tracer, which a compiled function has left: it is of no use
            memo[id(self._pullback)] = None
        return self._copy(lambda state: copy.deepcopy(state, memo), memo)

    def _copy(self, copy_of: Callable[[Any], Any], memo: dict[int, Any]) -> Self:
        reduced: Any = super().__reduce_ex__(4)
        function, arguments, state, *_ = reduced
        again: Self = function(*arguments)
        memo[id(self)] = again  # an attribute may lead back to the layer
        state = copy_of(state)
        if hasattr(again, "__setstate__"):
            again.__setstate__(state)
            return again

        def assign(attributes: dict[str, Any]) -> None:
            for name, value in attributes.items():
                setattr(again, name, value)

        _map_attributes(assign, state)
        return again


def _map_attributes(function: Callable[[dict[str, Any]], Any], state: Any) -> Any:
    """Return a state in which each dictionary is replaced: a class with slots has two."""
    if isinstance(state, dict):
        return function(state)
    if isinstance(state, tuple):
        return tuple([_map_attributes(function, each) for each in state])
    return state


def _pickled(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes without what is saved, and with arrays that any machine can load."""
    attributes = attributes.copy()
    if attributes.get("_pullback") is not None:  # as large as a batch, and maybe on a device
        attributes["_pullback"] = _PICKLED
    for name in ("params", "grads"):
        if name in attributes:
            attributes[name] = portable(attributes[name])
    return attributes
