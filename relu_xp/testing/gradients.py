"""A backward pass against finite differences of its forward pass, with care at the kinks."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from relu_xp.testing._subject import Host, Operand, Subject, is_ours

__all__ = ["check_gradient"]

_ROUNDINGS = 8  # of half a unit in the last place each, that an element of y may have undergone

Index = tuple[int, ...]


def check_gradient(
    function: Any,
    x: Any,
    /,
    *arguments: Any,
    dy: Any = None,
    tolerance: float | None = None,
    **options: Any,
) -> None:
    """Compare a gradient with central finite differences, and at a kink with its definition.

    Every element of `x` is moved up and down by itself, so that any function will do, a whole
    network too; it is called some 2 times for each, with copies, and on a copy of a layer
    (`copy.deepcopy`): nothing of the caller's is written, and random numbers repeat.

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
        compared, because all of `x` lies on kinks.

    Notes
    -----
    A step that reaches a kink is made shorter, down to 1/256, and for an x near 0 to a quarter of
    it. Where the slopes on either side still differ, x lies on a kink. There a layer with the four
    parameters of `relu_xp.ReLU`, or of `relu_xp.BiasReLU`, must give what is defined: the negative
    slope at the threshold, 0 at the ceiling. Any other function must give at x = 0, where only one
    element of y depends on that of x, the slope on the left (rule G1) or the smaller one; elsewhere
    nothing is checked.

    Examples
    --------
    >>> import numpy as np
    >>> import relu_xp
    >>> check_gradient(relu_xp.ReLU6(), np.array([-1.0, 0.0, 2.0, 6.0, 7.0]))
    """
    subject = Subject(function, x, arguments, options)
    checked = 0
    for operand, gradient in zip(subject.operands, subject.gradients(dy), strict=True):
        for index, slope in np.ndenumerate(gradient):
            checked += _check(subject, operand, index, slope, tolerance)
    if not checked:
        raise ValueError("check_gradient: all of x lies on kinks; give other numbers too")


class _Difference(NamedTuple):
    """The difference quotients of one element for one step."""

    left: Host  # one-sided slopes for each element of y, times dy
    right: Host
    slope: float  # the central one
    gap: float  # how far the one-sided slopes are apart, over all of y
    allowed: float  # how wrong `slope` may be
    rounding: float  # the part of that which is due to the rounding of y


def _check(
    subject: Subject, operand: Operand, index: Index, got: float, tolerance: float | None
) -> bool:
    """Check one element; return False on a kink where no gradient is defined."""
    if tolerance is None:
        tolerance = 20 * subject.epsilon ** (2 / 3)
    tolerance += 4 * subject.narrow_epsilon  # of the parameters, of dy, and of their product
    value = float(operand.host[index])
    steps = _steps(subject, value, operand.narrow)
    first: _Difference | None = None
    wrong: list[float] = []
    for step in steps:
        one = _difference(subject, operand, index, step, tolerance)
        # The slopes on both sides of a smooth function differ too, but less at a shorter step.
        smooth = 0.0 if first is None else 4 * first.gap * step / steps[0]
        first = first or one
        if one.gap > max(2 * one.allowed, smooth):
            wrong.clear()
            continue
        if abs(got - one.slope) <= one.allowed + one.gap / 2:
            return True
        wrong.append(one.slope)
        if len(wrong) == 2:  # the first step may have reached a kink unnoticed
            break
    if wrong:
        raise _wrong(subject, operand, index, got, wrong[-1], "by differences")
    defined = _defined(subject, operand, index, one)
    if not defined:
        return False
    allowed = one.rounding + tolerance * max(float(abs(terms).sum()) for terms in defined)
    slopes = [float(terms.sum()) for terms in defined]
    if not any(abs(got - slope) <= allowed for slope in slopes):
        raise _wrong(subject, operand, index, got, slopes[0], "at the kink")
    return True


def _defined(subject: Subject, operand: Operand, index: Index, last: _Difference) -> list[Host]:
    """Return the gradients that are right on a kink, as terms of a sum; none if undefined."""
    if subject.parameters is not None:
        return [subject.defined(operand, index)]
    alone = np.count_nonzero(last.right != last.left) == 1
    if operand.host[index] != 0 or not (alone or is_ours(subject.differentiable)):
        return []
    smaller = np.where(abs(last.left) <= abs(last.right), last.left, last.right)
    return [smaller, last.left]


def _steps(subject: Subject, value: float, narrow: bool) -> list[float]:
    """Return how far to move a value: what balances truncation with rounding, and less."""
    size = abs(value)
    # A kink is rounded otherwise in y.
    shortest = 8 * subject.narrow_epsilon * max(size, subject.last_kink) * narrow
    step: float = max(subject.epsilon ** (1 / 3) * max(1.0, size), shortest)
    steps = [step, step / 16, step / 256]
    if 0 < size / 4 < steps[-1]:
        steps.append(size / 4)
    return [step for step in steps if step >= shortest]


def _difference(
    subject: Subject, operand: Operand, index: Index, step: float, tolerance: float
) -> _Difference:
    up, down = operand.host.copy(), operand.host.copy()
    up[index] += step
    down[index] -= step
    value, high, low = float(operand.host[index]), float(up[index]), float(down[index])
    y, y_up, y_down = subject.y, subject.moved(operand, up), subject.moved(operand, down)
    with np.errstate(all="ignore"):  # a y that is not finite agrees with nothing
        right: Host = (y_up - y) * subject.dy / (high - value)
        left: Host = (y - y_down) * subject.dy / (value - low)
        central = (y_up - y_down) * subject.dy / (high - low)
        sizes = np.maximum(abs(y_up), abs(y_down)) * abs(subject.dy)
        moved = y_up != y_down
        largest = float(np.max(sizes[moved] if moved.any() else sizes, initial=0.0))
        rounding = _ROUNDINGS * subject.epsilon * largest / (high - low)
        scale = float(abs(central).sum())
        if subject.parameters is None:  # it may be curved, however small its slope is here
            scale += float(np.max(abs(subject.dy[moved]), initial=0.0))
        gap = float(abs(right - left).sum())
    slope, allowed = float(central.sum()), tolerance * scale + rounding
    return _Difference(left, right, slope, gap, allowed, rounding)


def _wrong(
    subject: Subject, operand: Operand, index: Index, got: float, expected: float, where: str
) -> AssertionError:
    element = f"[{', '.join(map(str, index))}]" if index else ""
    seen = ""
    if index and subject.dy.size == operand.host.size:  # else it may be any of them
        dy = subject.dy.reshape(operand.host.shape)[index]
        seen = f" (for dy = {dy:.6g} there)"
    return AssertionError(
        f"check_gradient: the gradient of {subject.name} with respect to {operand.label}"
        f"{element} = {float(operand.host[index]):.9g} is {got:.6g}, expected {expected:.6g} "
        f"{where}{seen}"
    )
