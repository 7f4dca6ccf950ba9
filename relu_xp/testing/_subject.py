"""The function that `check_gradient` checks: its operands, its results, its gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat
import numpy as np
import numpy.typing as npt

import relu_xp
from relu_xp.arrays import from_numpy, to_numpy
from relu_xp.dispatch import backend_for
from relu_xp.parameters import FLOATING, Parameters
from relu_xp.testing.reference import Format, Preset

Host = npt.NDArray[Any]


class Operand:
    """An array to differentiate by; `host` has its values in float32 or float64."""

    def __init__(self, label: str, array: Any) -> None:
        name = backend_for("check_gradient", label, array).dtype_name(array.dtype)
        if name not in FLOATING:
            raise TypeError(
                f"check_gradient: {label} has dtype {name}, which has no gradient; "
                "convert it to a floating dtype first"
            )
        self.label = label
        self.form = Format(name)
        self.epsilon = 2.0**-self.form.fraction
        self.narrow = self.form.width == 16  # then the differences are taken in float32
        self.host = _to_host(array).copy()
        self._like = array
        if not np.isfinite(self.host).all():
            raise ValueError(f"check_gradient: {label} must be finite")

    def round_to(self, other: Operand) -> None:
        """Round the values to the dtype of another operand."""
        form = other.form
        rounded = [form.value(form.round(value)) for value in self.host.ravel().tolist()]
        values = [value / 2**form.unit_shift for value in rounded if value is not None]
        self.host = np.array(values, other.host.dtype).reshape(self.host.shape)
        self.narrow = other.narrow

    def wide(self, host: Host) -> Any:
        """Return an array of its library with a host's values, in float32 at least."""
        return from_numpy(host, self._like)

    def fresh(self) -> Any:
        """Return a copy, in its own dtype."""
        array = self.wide(self.host)
        xp = array_api_compat.array_namespace(array)
        return xp.astype(array, self._like.dtype, copy=False)


class Subject:
    """The function that is checked, its operands, and the difference quotients to compare with.

    Attributes
    ----------
    parameters : Parameters or None
        If they say what f(x) is, or f(x + bias); then the operands are x, and perhaps the bias.
    last_kink : float
        With a bias, a magnitude that x + bias has at the kinks, at most; else 0.
    """

    def __init__(
        self, function: Any, x: Any, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self.parameters: Parameters | None = None
        self.last_kink = 0.0
        self._axis: int | None = None  # along which a bias goes
        self._function = self.differentiable = function
        self._arguments, self._options = arguments, options
        name = getattr(function, "__name__", "")
        if getattr(relu_xp, name, None) is function:
            self.name = name
            self.differentiable = self._with_pullback(name)
        elif _is_layer(function) and (arguments or options):
            raise TypeError(
                "check_gradient: a layer takes x alone; give its parameters when it is made, or a "
                "function that returns (y, pullback)"
            )
        elif callable(function) or _is_layer(function):
            self.name = getattr(function, "__qualname__", None) or type(function).__name__
            if isinstance(function, relu_xp.ReLU | relu_xp.BiasReLU) and is_ours(function):
                self.parameters = function.activation
                self._axis = getattr(function, "_axis", None)
        else:
            raise _not_a_function(function)
        arrays = [("x", x), *((f"argument {i}", one) for i, one in enumerate(arguments, 2))]
        self.operands = [
            Operand(label, array)
            for label, array in arrays
            if label == "x" or array_api_compat.is_array_api_obj(array)
        ]
        if self.operands[0].host.size == 0:
            raise ValueError("check_gradient: x is empty; give it elements to check")
        self._num_arguments = len(self.operands)
        if _is_layer(self.differentiable):
            params = getattr(self.differentiable, "params", ())
            self.operands += [Operand(f"params[{i}]", p) for i, p in enumerate(params)]
        if self._axis is not None and self.parameters is not None:
            p = self.parameters
            self.last_kink = max(abs(p.threshold), abs((p.max_value or 0.0) / p.positive_slope))
            for bias in self.operands[1:2]:
                bias.round_to(self.operands[0])  # as the function does
        self.epsilon = max(float(np.finfo(o.host.dtype).eps) for o in self.operands)
        self.narrow_epsilon = max(operand.epsilon for operand in self.operands)

    def _with_pullback(self, name: str) -> Any:
        """Return the function with a pullback, or the layer, of one of this package's functions."""
        if refused := sorted(self._options.keys() & {"mask", "out"}):
            raise TypeError(f"check_gradient: {name} is called without {refused[0]}=; omit it")
        plain = name.removesuffix("_vjp")
        public = [getattr(relu_xp, one) for one in relu_xp.__all__]
        layers = {one.__name__.lower(): one for one in public if _is_layer(one)}
        kind = layers.get(plain.replace("_", ""))
        if kind is not None and issubclass(kind, relu_xp.ReLU):
            layer = kind(*self._arguments, **self._options)
            self.parameters = layer.activation
        elif kind is relu_xp.BiasReLU:
            given = {n: self._options[n] for n in Parameters._fields if n in self._options}
            self.parameters = relu_xp.ReLU(**given).activation
            self._axis = self._options.get("axis", -1)
        pullback = getattr(relu_xp, f"{plain}_vjp", None)
        if pullback is None and self.parameters is None:
            raise _not_a_function(self._function)
        return pullback or layer

    def defined(self, operand: Operand, index: tuple[int, ...]) -> Host:
        """Return f'(x) * dy, as the parameters define it, where y depends on an element."""
        x, p = self.operands[0], self.parameters
        assert p is not None
        a, b = p.negative_slope, p.positive_slope
        preset = Preset(x.form, p.threshold, a, b, p.max_value)
        values = x.host.astype(np.float64)
        where: tuple[int | slice, ...] = index
        if self._axis is not None:
            axis = self._axis % values.ndim
            bias = self.operands[1].host
            values = values + bias.reshape(-1, *[1] * (values.ndim - 1 - axis))
            if operand is not x:
                where = (*[slice(None)] * axis, *index)
        sums, dy = (np.ravel(array[where]) for array in (values, self.dy.reshape(values.shape)))
        branches = [preset.branch(x.form.round(value)) for value in sums.tolist()]
        slopes: Host = np.array([a, b, 0.0])[branches]
        return slopes * dy

    def gradients(self, dy: Any) -> list[Host]:
        """Return the gradients that are checked, one for each operand; note y and `dy`."""
        y, pullback = self._run(self.differentiable, [o.fresh() for o in self.operands])
        shape = tuple(y.shape)
        if dy is None:
            rng = np.random.default_rng(0)
            random = rng.uniform(0.5, 1.5, shape) * rng.choice([-1.0, 1.0], shape)
            xp = array_api_compat.array_namespace(y)
            dy = xp.astype(from_numpy(random.astype(np.float32), y), y.dtype)
        given = Operand("dy", dy)
        if given.host.shape != shape:
            raise ValueError(f"check_gradient: dy has shape {given.host.shape}, y has {shape}")
        self.narrow_epsilon = max(self.narrow_epsilon, given.epsilon)
        self.dy = given.host.astype(np.float64).ravel()
        found = pullback(given.fresh())
        if len(found) != len(self.operands):
            raise AssertionError(
                f"check_gradient: {self.name} has {len(found)} gradients, expected one for each of "
                f"{', '.join(operand.label for operand in self.operands)}"
            )
        for operand, gradient in zip(self.operands, found, strict=True):
            if tuple(gradient.shape) != operand.host.shape:
                raise AssertionError(
                    f"check_gradient: the gradient of {self.name} with respect to {operand.label} "
                    f"has shape {tuple(gradient.shape)}, expected {operand.host.shape}"
                )
        self.y = self.moved(self.operands[0], self.operands[0].host)
        return [_to_host(gradient) for gradient in found]

    def moved(self, operand: Operand, host: Host) -> Host:
        """Return y, flat, with another value of one operand."""
        values = [one.wide(host if one is operand else one.host) for one in self.operands]
        try:
            y, _ = self._run(self._function, values)
        except Exception as error:
            narrow = next((one for one in self.operands if one.narrow), None)
            if narrow is None:
                raise
            raise TypeError(
                f"check_gradient: {narrow.label} is {narrow.form.name}, so that the differences "
                f"are taken in float32, which {self.name} refuses; check it in float32"
            ) from error
        return _to_host(y).astype(np.float64).ravel()

    def _run(self, function: Any, values: list[Any]) -> tuple[Any, Callable[[Any], Sequence[Any]]]:
        """Return y and the pullback of a function, or of a copy of a layer, for new operands."""
        if _is_layer(function):
            layer = copy.deepcopy(function)
            for i, value in enumerate(values[self._num_arguments :]):
                _assign(layer.params, i, value)

            def backward(dy: Any) -> list[Any]:
                dx = layer.backward(dy)
                return [dx, *(getattr(layer, "grads", ()) if hasattr(layer, "params") else ())]

            return layer.forward(values[0]), backward
        rest = iter(values[1:])
        arguments = [
            next(rest) if array_api_compat.is_array_api_obj(argument) else argument
            for argument in self._arguments
        ]
        result = function(values[0], *arguments, **copy.deepcopy(self._options))
        if function is not self.differentiable:  # then it has no pullback, and needs none
            return result, list
        if not (isinstance(result, tuple) and len(result) == 2 and callable(result[1])):
            raise _not_a_function(function)
        y, pullback = result

        def gradients(dy: Any) -> Sequence[Any]:
            found = pullback(dy)
            return found if isinstance(found, tuple) else (found,)

        return y, gradients


def is_ours(function: Any) -> bool:
    return str(getattr(function, "__module__", None)).startswith("relu_xp.")


def _is_layer(function: Any) -> bool:
    return all(callable(getattr(function, name, None)) for name in ("forward", "backward"))


def _not_a_function(function: Any) -> TypeError:
    name = getattr(function, "__name__", None) or type(function).__name__
    return TypeError(
        f"check_gradient: {name} is neither a layer with forward and backward, nor a function that "
        "returns (y, pullback), nor one of relu_xp's with a gradient"
    )


def _assign(params: Any, number: int, value: Any) -> None:
    """Write a parameter, so that every reference to it sees the value; or replace it."""
    before = params[number]
    if array_api_compat.is_writeable_array(before) and before.dtype == value.dtype:
        params[number][...] = value
    else:
        params[number] = value


def _to_host(array: Any) -> Host:
    """Return a NumPy array; in float32 for 16 bits, which not every library exchanges."""
    if str(array.dtype).endswith("float16"):
        xp = array_api_compat.array_namespace(array)
        array = xp.astype(array, xp.float32)
    return to_numpy(array)
