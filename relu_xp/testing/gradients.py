"""A backward pass against finite differences of its forward pass, with an eye for the knee."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import array_api_compat
import numpy as np
import numpy.typing as npt

import relu_xp
from relu_xp.activation import FLOATING, Activation
from relu_xp.arrays import from_numpy, to_numpy
from relu_xp.dispatch import backend_for
from relu_xp.testing.oracle import Format, Member

__all__ = ["check_gradient"]

_Host = npt.NDArray[np.float64]
_Gradients = Callable[[Any], Sequence[Any]]  # dy -> one array for each operand

_EPSILON = {name: 2.0 ** -Format(name).fraction for name in FLOATING}
_NARROW = ("float16", "bfloat16")
_NOISE = 8  # roundings, of half a unit in the last place each, that an element of y may have seen


def check_gradient(
    function: Any,
    x: Any,
    /,
    *arguments: Any,
    dy: Any = None,
    tolerance: float | None = None,
    **options: Any,
) -> None:
    """Compare a gradient with central finite differences, and with what is written at the knee.

    Every element of `x` is moved up and down by itself, so that any function will do, a whole
    network too; the function is called some 2 times for each. It is given copies, a layer is itself
    copied (`copy.deepcopy`) for each call: nothing of the caller's is written, and random numbers
    repeat.

    Parameters
    ----------
    function : layer, or function
        An object with ``forward(x)`` and ``backward(dy)``; or a function that returns ``y`` and its
        pullback, as `relu_xp.relu_vjp` does; or one of this package's own, such as
        `relu_xp.leaky_relu`.
    x : array, any library
        float32 or float64; float16 or bfloat16 for a function that takes float32 too, in which the
        differences are then taken. Finite.
    *arguments, **options
        Passed on. The arrays among `arguments` are differentiated too, and ``pullback(dy)`` then
        returns a gradient for each, after that of `x`; so are the arrays in a layer's ``params``,
        whose gradients ``backward`` is to leave in its ``grads``.
    dy : array like y, optional
        Gradient with respect to the output; random by default.
    tolerance : float, optional
        Relative, to dy too where `function` may be curved; by default 20 times the dtype's epsilon
        to the power of 2/3: 5e-4 in float32, 7e-10 in float64.

    Raises
    ------
    AssertionError
        At the first wrong element, which it names.
    TypeError
        If `function` is none of the three, or an array has no gradient.
    ValueError
        If `x` is empty or not finite, if `dy` has another shape than y, or if nothing could be
        compared, because all of `x` lies on knees.

    Notes
    -----
    A step that meets a knee is made shorter, down to 1/256, and for an x near 0 to a quarter of it.
    Where the slopes on either side still differ, x lies on a knee. There a layer with the four
    numbers of `relu_xp.ReLU` must give what is written: the negative slope at the threshold, 0 at
    the ceiling. Any other function must give at x = 0, where only one element of y depends on that
    of x, the slope on the left (rule G1) or the smaller one; elsewhere it has no gradient to check.

    Examples
    --------
    >>> import numpy as np
    >>> import relu_xp
    >>> check_gradient(relu_xp.ReLU6(), np.array([-1.0, 0.0, 2.0, 6.0, 7.0]))
    """
    subject = _Subject(function, x, arguments, options)
    checked = 0
    for operand, gradient in enumerate(subject.gradients(dy)):
        for index, slope in np.ndenumerate(gradient):
            checked += subject.check(operand, index, slope, tolerance)
    if not checked:
        raise ValueError("check_gradient: all of x lies on knees; give other numbers too")


class _Operand:
    """An array to differentiate by.

    Attributes
    ----------
    label : str
        For messages.
    dtype_name : str
    host : ndarray of float32 or float64
        Its values, in the dtype in which it is moved.
    """

    def __init__(self, label: str, array: Any) -> None:
        backend = backend_for("check_gradient", label, array)
        name = backend.dtype_name(array.dtype)
        if name not in _EPSILON:
            raise TypeError(
                f"check_gradient: {label} has dtype {name}, which has no gradient; "
                "convert it to a floating dtype first"
            )
        self.label = label
        self.dtype_name = name
        self.narrow = name in _NARROW
        self.host = to_numpy(_widened(array, name)).copy()
        self._array = array
        if not np.isfinite(self.host).all():
            raise ValueError(f"check_gradient: {label} must be finite")

    def fresh(self) -> Any:
        """Return a copy, with the dtype it came with."""
        array = self.wide(self.host)
        if not self.narrow:
            return array
        return array_api_compat.array_namespace(array).astype(array, self._array.dtype)

    def wide(self, host: npt.NDArray[Any]) -> Any:
        """Return an array of its library with a host's values, in float32 at least."""
        return from_numpy(host, self._array)


class _Subject:
    """What is checked, and the difference quotients that it is compared with."""

    def __init__(
        self, function: Any, x: Any, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self.activation: Activation | None = None
        self._function = self._differentiable = function
        self._arguments, self._options = arguments, options
        own = getattr(function, "__name__", "")
        if getattr(relu_xp, own, None) is function:
            self._name = own
            if refused := sorted(options.keys() & {"mask", "out"}):
                raise TypeError(
                    f"check_gradient: {own} is called without {refused[0]}=; leave it away"
                )
            self._know(own)
        elif _is_layer(function) and (arguments or options):
            raise TypeError(
                "check_gradient: a layer takes x alone; give its numbers when it is made, or a "
                "function that returns (y, pullback)"
            )
        elif callable(function) or _is_layer(function):
            self._name = getattr(function, "__qualname__", None) or type(function).__name__
            if isinstance(function, relu_xp.ReLU) and _is_ours(function):
                self.activation = function.activation
        else:
            raise _no_function(function)
        self._given = [_Operand("x", x)]
        self._given += [
            _Operand(f"argument {number}", argument)
            for number, argument in enumerate(arguments, 2)
            if array_api_compat.is_array_api_obj(argument)
        ]
        if self._given[0].host.size == 0:
            raise ValueError("check_gradient: x is empty; give it elements to check")
        self._operands = list(self._given)
        if _is_layer(self._differentiable):
            params = getattr(self._differentiable, "params", ())
            self._operands += [_Operand(f"params[{i}]", p) for i, p in enumerate(params)]
        self._wide_epsilon = max(map(float, (np.finfo(o.host.dtype).eps for o in self._operands)))
        self._narrow_epsilon = max(_EPSILON[operand.dtype_name] for operand in self._operands)

    def _know(self, name: str) -> None:
        """Find the pullback of one of our own functions, and its four numbers if it has them."""
        plain = name.removesuffix("_vjp")
        pullback = getattr(relu_xp, f"{plain}_vjp", None)
        public = [getattr(relu_xp, one) for one in relu_xp.__all__]
        layers = {one.__name__.lower(): one for one in public if isinstance(one, type)}
        layer = layers.get(plain.replace("_", ""))
        if layer is not None and issubclass(layer, relu_xp.ReLU):
            self.activation = layer(*self._arguments, **self._options).activation
        if pullback is not None:
            self._differentiable = pullback
        elif layer is not None:
            self._differentiable = layer(*self._arguments, **self._options)
        else:
            raise _no_function(self._function)

    def gradients(self, dy: Any) -> Iterator[_Host]:
        """Return what is to be checked, for each operand, and remember y and `dy`."""
        y, gradients = self._run(self._differentiable, [o.fresh() for o in self._operands])
        shape = tuple(y.shape)
        if dy is None:
            rng = np.random.default_rng(0)
            drawn = rng.uniform(0.5, 1.5, shape) * rng.choice([-1.0, 1.0], shape)
            xp = array_api_compat.array_namespace(y)
            dy = xp.astype(from_numpy(drawn.astype(np.float32), y), y.dtype)
        given = _Operand("dy", dy)
        if given.host.shape != shape:
            raise ValueError(f"check_gradient: dy has shape {given.host.shape}, y has {shape}")
        self._narrow_epsilon = max(self._narrow_epsilon, _EPSILON[given.dtype_name])
        self._dy = given.host.astype(np.float64).ravel()
        found = gradients(given.fresh())
        if len(found) != len(self._operands):
            labels = ", ".join(operand.label for operand in self._operands)
            raise AssertionError(
                f"check_gradient: {self._name} has {len(found)} gradients, expected one for each "
                f"of {labels}"
            )
        for operand, gradient in zip(self._operands, found, strict=True):
            if tuple(gradient.shape) != operand.host.shape:
                raise AssertionError(
                    f"check_gradient: the gradient of {self._name} with respect to "
                    f"{operand.label} has shape {tuple(gradient.shape)}, "
                    f"expected {operand.host.shape}"
                )
        self._y = self._moved(0, self._operands[0].host)
        return iter([_on_host(gradient) for gradient in found])

    def check(
        self, number: int, index: tuple[int, ...], got: float, tolerance: float | None
    ) -> bool:
        """Check one element; return False on a knee at which nothing is written."""
        operand = self._operands[number]
        value = float(operand.host[index])
        if tolerance is None:
            tolerance = 20 * self._wide_epsilon ** (2 / 3)
        tolerance += 4 * self._narrow_epsilon  # of the numbers, of dy, and of their product
        steps = self._steps(value, operand.narrow)
        first = _Difference(self, number, index, steps[0], tolerance)
        wrong: list[float] = []
        for step in steps:
            one = first if step is steps[0] else _Difference(self, number, index, step, tolerance)
            # The slopes on both sides of a smooth function differ too, but less at a shorter step.
            smooth = 0.0 if one is first else 4 * first.gap * step / steps[0]
            if one.gap > max(2 * one.allowed, smooth):
                wrong.clear()
                continue
            if abs(got - one.slope) <= one.allowed + one.gap / 2:
                return True
            wrong.append(one.slope)
            if len(wrong) == 2:  # the first step may just have reached a knee
                break
        if wrong:
            raise self._wrong(operand, index, value, got, wrong[-1], "by differences")
        written = self._written(number, index, value, one)
        if written is None:
            return False
        allowed = one.rounding + tolerance * max(map(abs, written))
        if not any(abs(got - slope) <= allowed for slope in written):
            raise self._wrong(operand, index, value, got, written[0], "on the knee")
        return True

    def _written(
        self, number: int, index: tuple[int, ...], value: float, last: _Difference
    ) -> list[float] | None:
        """Return what may come out on a knee, or None if nothing is written."""
        a = self.activation
        if number == 0 and a is not None:
            member = Member(
                Format(self._operands[0].dtype_name),
                a.threshold,
                a.negative_slope,
                a.positive_slope,
                a.max_value,
            )
            slopes = (a.negative_slope, a.positive_slope, 0.0)
            place = np.ravel_multi_index(index, self._operands[0].host.shape) if index else 0
            return [float(slopes[member.piece(member.form.round(value))] * self._dy[place])]
        alone = np.count_nonzero(last.right != last.left) == 1
        if value != 0 or not (alone or _is_ours(self._differentiable)):
            return None
        smaller = np.where(abs(last.left) <= abs(last.right), last.left, last.right)
        return [float(smaller.sum()), float(last.left.sum())]

    def _steps(self, value: float, narrow: bool) -> list[float]:
        """Return how far to move a value: what balances truncation with rounding, and less."""
        size = abs(value)
        rim = 8 * self._narrow_epsilon * size * narrow  # of a knee that is rounded otherwise
        whole: float = max(self._wide_epsilon ** (1 / 3) * max(1.0, size), rim)
        steps = [whole, whole / 16, whole / 256]
        if 0 < size / 4 < steps[-1]:
            steps.append(size / 4)
        return [step for step in steps if step >= rim]

    def _moved(self, number: int, host: npt.NDArray[Any]) -> _Host:
        """Return y, flat, with another value of one operand."""
        values = [o.wide(host if i == number else o.host) for i, o in enumerate(self._operands)]
        try:
            y, _ = self._run(self._function, values)
        except Exception as error:
            narrow = next((o for o in self._operands if o.narrow), None)
            if narrow is None:
                raise
            raise TypeError(
                f"check_gradient: {narrow.label} is {narrow.dtype_name}, so that the differences "
                f"are taken in float32, which {self._name} refuses; check it in float32"
            ) from error
        return _on_host(y).ravel()

    def _run(self, function: Any, values: list[Any]) -> tuple[Any, _Gradients]:
        """Call a function or a copy of a layer with operands of its own; return y and pullback."""
        if _is_layer(function):
            layer = copy.deepcopy(function)
            for i, value in enumerate(values[len(self._given) :]):
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
        if function is not self._differentiable:  # then it has no pullback, and needs none
            return result, list
        if not (isinstance(result, tuple) and len(result) == 2 and callable(result[1])):
            raise _no_function(function)
        y, pullback = result

        def pull(dy: Any) -> Sequence[Any]:
            gradients = pullback(dy)
            return gradients if isinstance(gradients, tuple) else (gradients,)

        return y, pull

    def _wrong(
        self,
        operand: _Operand,
        index: tuple[int, ...],
        value: float,
        got: float,
        expected: float,
        where: str,
    ) -> AssertionError:
        place = f"[{', '.join(map(str, index))}]" if index else ""
        seen = ""
        if index and self._dy.size == operand.host.size:  # else which of them it was, who knows
            at = np.ravel_multi_index(index, operand.host.shape)
            seen = f" (for dy = {self._dy[at]:.6g} there)"
        return AssertionError(
            f"check_gradient: the gradient of {self._name} with respect to {operand.label}{place} "
            f"= {value:.9g} is {got:.6g}, expected {expected:.6g} {where}{seen}"
        )


class _Difference:
    """The difference quotients of one element for one step.

    Attributes
    ----------
    left, right : ndarray, one for each element of y
        One-sided slopes, times dy.
    slope, gap : float
        Central slope, and how far the one-sided ones are apart, over all of y.
    allowed, rounding : float
        By how much `slope` may be wrong, and the part of that which is due to the rounding of y.
    """

    def __init__(
        self,
        subject: _Subject,
        number: int,
        index: tuple[int, ...],
        step: float,
        tolerance: float,
    ) -> None:
        host, dy, y = subject._operands[number].host, subject._dy, subject._y
        up, down = host.copy(), host.copy()
        up[index] += step
        down[index] -= step
        value, high, low = float(host[index]), float(up[index]), float(down[index])
        y_up, y_down = subject._moved(number, up), subject._moved(number, down)
        with np.errstate(all="ignore"):  # a y that is not finite agrees with nothing
            self.right: _Host = (y_up - y) * dy / (high - value)
            self.left: _Host = (y - y_down) * dy / (value - low)
            central = (y_up - y_down) * dy / (high - low)
            self.slope = float(central.sum())
            self.gap = float(abs(self.right - self.left).sum())
            sizes = np.maximum(abs(y_up), abs(y_down)) * abs(dy)
            moved = y_up != y_down
            largest = float(np.max(sizes[moved] if moved.any() else sizes, initial=0.0))
            self.rounding = _NOISE * subject._wide_epsilon * largest / (high - low)
            scale = float(abs(central).sum())
            if subject.activation is None:  # it may be curved, however small its slope is here
                scale += float(np.max(abs(dy[moved]), initial=0.0))
            self.allowed = tolerance * scale + self.rounding


def _is_ours(function: Any) -> bool:
    return str(getattr(function, "__module__", None)).startswith("relu_xp.")


def _is_layer(function: Any) -> bool:
    return all(callable(getattr(function, name, None)) for name in ("forward", "backward"))


def _no_function(function: Any) -> TypeError:
    name = getattr(function, "__name__", None) or type(function).__name__
    return TypeError(
        f"check_gradient: {name} is neither a layer with forward and backward, nor a function that "
        "returns (y, pullback), nor one of relu_xp's with a gradient"
    )


def _assign(params: Any, number: int, value: Any) -> None:
    """Write a parameter, so that whoever else holds the array sees it; or put another in place."""
    if array_api_compat.is_writeable_array(params[number]):
        params[number][...] = value
    else:
        params[number] = value


def _on_host(array: Any) -> _Host:
    name = str(array.dtype).rpartition(".")[2]
    host: _Host = to_numpy(_widened(array, name)).astype(np.float64)
    return host


def _widened(array: Any, dtype_name: str) -> Any:
    """Return an array of 16 bits in float32, which every library can hand over."""
    if dtype_name not in _NARROW:
        return array
    xp = array_api_compat.array_namespace(array)
    return xp.astype(array, xp.float32)
