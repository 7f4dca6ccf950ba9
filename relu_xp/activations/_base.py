"""What all activations share: the passes of the ReLU family, and the class of the layers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Literal, Self, SupportsIndex, TypeVar

from relu_xp.activations._pullback import Pullback
from relu_xp.arrays import portable
from relu_xp.backends.base import Backend
from relu_xp.parameters import RELU, Parameters
from relu_xp.validation import check_mask, check_out, is_scalar, resolve

__all__ = ["Layer", "forward", "forward_with_pullback", "resolve_floating"]

ArrayT = TypeVar("ArrayT")


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
        check_mask(function, mask, (x, out), params, backend)
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

    @functools.cached_property
    def params(self) -> list[Any]:
        """The arrays that are learned. A subclass may assign another list."""
        return []

    @functools.cached_property
    def grads(self) -> list[Any]:
        """The gradient of each of them, from the latest `backward`; may be assigned too."""
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
                "another call; for a layer that is used twice in one pass use the function of its "
                "kind whose name ends in _vjp, such as relu_xp.relu_vjp"
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
        if is_scalar(array):
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

    def __getstate__(self) -> Any:
        return _map_attributes(dict, super().__getstate__())  # a subclass may change it

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str) or len(reduced) < 3:
            return reduced
        return *reduced[:2], _map_attributes(_pickled, reduced[2]), *reduced[3:]

    def __copy__(self) -> Self:
        reduced = super().__reduce_ex__(4)
        if isinstance(reduced, str):
            return self
        again: Any = copy.copy(_Reduced(reduced))
        for name in ("params", "grads"):  # the lists are the copy's own, the arrays are shared
            if name in vars(again):
                setattr(again, name, copy.copy(getattr(again, name)))
        return again  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        reduced = super().__reduce_ex__(4)
        if isinstance(reduced, str):
            return self
        try:
            copy.deepcopy(self._pullback, memo)
        except Exception:  # of an array that cannot be copied, such as a tracer: it is shared
            memo[id(self._pullback)] = self._pullback

        def make(*arguments: Any) -> Any:
            memo[id(self)] = again = reduced[0](*arguments)  # an attribute may lead back to it
            return again

        return copy.deepcopy(_Reduced((make, *reduced[1:])), memo)  # type: ignore[return-value]


class _Reduced:
    """What is copied as the object whose reduced form it has: of its own state, not a pickle's."""

    def __init__(self, reduced: tuple[Any, ...]) -> None:
        self._reduced = reduced

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return self._reduced


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
