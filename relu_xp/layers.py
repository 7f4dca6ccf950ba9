"""The layers: a shell over the functions that remembers one forward pass."""

from __future__ import annotations

import abc
import copy
import math
from typing import Any, ClassVar, TypeVar

import array_api_compat
import numpy as np

from relu_xp.activation import Activation, activation_of, real
from relu_xp.arrays import to_numpy
from relu_xp.checks import serving, whole
from relu_xp.functional import forward, forward_saving
from relu_xp.variants import (
    LOWER,
    UPPER,
    checked_bounds,
    crelu_forward,
    crelu_saving,
    prelu_forward,
    prelu_saving,
    rrelu_saving,
    squared_relu_forward,
    squared_relu_saving,
)

__all__ = [
    "CReLU",
    "ClippedReLU",
    "LeakyReLU",
    "PReLU",
    "RReLU",
    "ReLU",
    "ReLU6",
    "Relu",
    "SquaredReLU",
    "ThresholdedReLU",
]

ArrayT = TypeVar("ArrayT")


class Layer(abc.ABC):
    """What all layers are: a forward pass, and the gradient of the latest one."""

    _pullback: Any = None  # of the class, so that a layer just unpickled has it too
    _inplace = False
    _keeps_shape = True

    @property
    def params(self) -> list[Any]:
        """The arrays that are learned."""
        return []

    @property
    def grads(self) -> list[Any]:
        """The gradient of each of them, as the latest `backward` left it."""
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
        """Bytes held between `forward` and `backward`; 0 if there is nothing to go back from.

        Raises
        ------
        ValueError
            If Dask does not know the size of x before it is computed.
        """
        nbytes: int = 0 if self._pullback is None else self._pullback.saved_nbytes
        return nbytes

    @abc.abstractmethod
    def forward(self, x: ArrayT, /, *, training: bool = True, out: ArrayT | None = None) -> ArrayT:
        """Apply the activation and remember what `backward` needs."""

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
            If there was no `forward`, or a `backward` since then has consumed it.
        TypeError, ValueError
            If `dy` or `out` does not fit what `forward` saw; what is saved is then still there.
        """
        if self._pullback is None:
            raise RuntimeError(
                "backward: nothing is saved; call forward(x) first (with training=True), once for "
                "each backward. backward(dy, retain=True) keeps it for another call; "
                "relu_xp.relu_vjp serves a layer that is used twice in one pass"
            )
        if self._inplace:
            out = self._itself("backward", dy, out)
        dx: ArrayT = self._gradient(dy, out)
        if not retain:
            self._pullback = None
        return dx

    def _gradient(self, dy: Any, out: Any) -> Any:
        return self._pullback.backward("backward", dy, out)

    @staticmethod
    def _itself(function: str, array: ArrayT, out: ArrayT | None) -> ArrayT:
        if out is not None and out is not array:
            raise ValueError(
                f"{function}: out was given, but a layer with inplace=True writes into its "
                "argument; leave out= away, or make the layer without inplace"
            )
        return array

    def _shown(self, *arguments: str) -> str:
        """Return what `repr` does, of a layer that was made with some arguments."""
        inplace = ["inplace=True"] * self._inplace
        return f"{type(self).__name__}({', '.join([*arguments, *inplace])})"

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_pullback", None)  # an array on a device, and of one pass only
        return state


class ReLU(Layer):
    """`relu_xp.relu` with a backward pass, for arrays of any library (Nair and Hinton, 2010).

    The layer holds the mask of its latest `forward` (what `relu_xp.relu_vjp` keeps, mostly one bit
    an element; never the input or output, so both may be overwritten), and `backward` consumes it.
    For a layer that is used twice in one pass, and inside functions that JAX or PyTorch trace, use
    `relu_xp.relu_vjp`.

    Parameters
    ----------
    negative_slope, threshold, positive_slope, max_value : float, optional
        As for `relu_xp.relu`.
    inplace : bool, optional
        Whether `forward` overwrites x and `backward` overwrites dy. False by default: nothing of
        the caller's is ever written.

    Raises
    ------
    TypeError, ValueError
        As `relu_xp.relu`, for the numbers.

    Examples
    --------
    >>> import numpy as np
    >>> layer = ReLU()
    >>> layer.forward(np.array([[1.0, -0.5], [0.0, 3.0]]))
    array([[1., 0.],
           [0., 3.]])
    >>> layer.backward(np.ones((2, 2)))
    array([[1., 0.],
           [0., 1.]])
    """

    # What `repr` leaves out, being the default, and what it gives first, by position.
    _defaults: ClassVar[dict[str, Any]] = {
        "negative_slope": 0.0,
        "threshold": 0.0,
        "positive_slope": 1.0,
        "max_value": None,
    }
    _positional: ClassVar[str | None] = None

    def __init__(
        self,
        *,
        negative_slope: float = 0.0,
        threshold: float = 0.0,
        positive_slope: float = 1.0,
        max_value: float | None = None,
        inplace: bool = False,
    ) -> None:
        self._set(negative_slope, threshold, positive_slope, max_value, inplace)

    def _set(
        self,
        negative_slope: float,
        threshold: float,
        positive_slope: float,
        max_value: float | None,
        inplace: bool,
    ) -> None:
        self._activation = activation_of(negative_slope, threshold, positive_slope, max_value)
        self.inplace = inplace

    @property
    def activation(self) -> Activation:
        """The layer's four numbers."""
        return self._activation

    def forward(
        self,
        x: ArrayT,
        /,
        *,
        training: bool = True,
        out: ArrayT | None = None,
        mask: ArrayT | None = None,
    ) -> ArrayT:
        """Apply the activation and remember what `backward` needs.

        Parameters
        ----------
        x : array, any shape
            float16, bfloat16, float32 or float64; with ``training=False`` also integers.
        training : bool, optional
            False saves nothing, and leaves alone what an earlier call saved.
        out : array, like `x`, optional
            Where to write the result. Not for a layer that works in place.
        mask : array of uint8, optional
            Where to keep the mask, as for `relu_xp.relu_vjp`. Not used with ``training=False``.

        Returns
        -------
        array, shape and dtype of `x`

        Raises
        ------
        TypeError, ValueError
            As `relu_xp.relu`; also TypeError for integers while training. What an earlier call
            saved is then still there.
        """
        if self._inplace:
            out = self._itself("forward", x, out)
        if not training:
            return forward("forward", self._activation, x, out)
        y, self._pullback = forward_saving("forward", self._activation, x, out, mask)
        return y

    def __repr__(self) -> str:
        given: list[str] = []
        for name, default in self._defaults.items():
            value = getattr(self._activation, name)
            if name == self._positional:
                given.insert(0, repr(value))
            elif value != default:
                given.append(f"{name}={value!r}")
        return self._shown(*given)


Relu = ReLU  # the name that the textbook's class has


class LeakyReLU(ReLU):
    """`ReLU` with a negative slope, 0.01 by default (Maas et al., 2013).

    All other parameters and methods are those of `ReLU`.
    """

    _positional = "negative_slope"

    def __init__(
        self,
        negative_slope: float = 0.01,
        *,
        threshold: float = 0.0,
        positive_slope: float = 1.0,
        max_value: float | None = None,
        inplace: bool = False,
    ) -> None:
        self._set(negative_slope, threshold, positive_slope, max_value, inplace)


class ReLU6(ReLU):
    """`ReLU` with a ceiling of 6, where its gradient is 0 (Krizhevsky, 2010)."""

    _defaults: ClassVar[dict[str, Any]] = {**ReLU._defaults, "max_value": 6.0}

    def __init__(
        self,
        *,
        negative_slope: float = 0.0,
        threshold: float = 0.0,
        positive_slope: float = 1.0,
        inplace: bool = False,
    ) -> None:
        self._set(negative_slope, threshold, positive_slope, 6.0, inplace)


class ClippedReLU(ReLU):
    """`ReLU` with a ceiling, 20 by default (Hannun et al., 2014), where its gradient is 0."""

    _positional = "max_value"

    def __init__(
        self,
        max_value: float = 20.0,
        *,
        negative_slope: float = 0.0,
        threshold: float = 0.0,
        positive_slope: float = 1.0,
        inplace: bool = False,
    ) -> None:
        self._set(negative_slope, threshold, positive_slope, max_value, inplace)


class ThresholdedReLU(ReLU):
    """`ReLU` with its knee at a threshold, 1 by default (Konda et al., 2014)."""

    _positional = "threshold"

    def __init__(
        self,
        threshold: float = 1.0,
        *,
        negative_slope: float = 0.0,
        positive_slope: float = 1.0,
        max_value: float | None = None,
        inplace: bool = False,
    ) -> None:
        self._set(negative_slope, threshold, positive_slope, max_value, inplace)


class Variant(Layer):
    """A layer of `relu_xp.variants`."""

    @abc.abstractmethod
    def _evaluate(self, x: Any, out: Any) -> Any:
        """Return y."""

    @abc.abstractmethod
    def _save(self, x: Any, out: Any) -> tuple[Any, Any]:
        """Return y and its pullback."""

    def forward(self, x: ArrayT, /, *, training: bool = True, out: ArrayT | None = None) -> ArrayT:
        """Apply the activation and remember what `backward` needs.

        Parameters
        ----------
        x : array, any shape
            float16, bfloat16, float32 or float64.
        training : bool, optional
            False saves nothing, and leaves alone what an earlier call saved.
        out : array, like the result, optional
            Where to write the result. Not for a layer that works in place.

        Returns
        -------
        array, dtype of `x`

        Raises
        ------
        TypeError, ValueError
            As the layer's function. What an earlier call saved is then still there.
        """
        if self._inplace:
            out = self._itself("forward", x, out)
        y: ArrayT
        if training:
            y, self._pullback = self._save(x, out)
        else:
            y = self._evaluate(x, out)
        return y


class PReLU(Variant):
    """`relu_xp.prelu` as a layer, whose negative slope is learned (He et al., 2015).

    `params` is the list ``[weight]`` and `grads` the list of its gradient, as the layers of "Deep
    Learning from Scratch 2" have them: an optimiser written for those updates `params` in place,
    and finds the gradient in the array that was there before (in another one where the library's
    arrays cannot be written).

    The weight lies in one library. For another one make the layer with `xp`, or move it:
    ``layer.params[0] = cupy.asarray(layer.params[0])``. In a pickle it is a NumPy array; `repr`
    tells neither its values nor its library.

    Parameters
    ----------
    num_parameters : int, optional
        1 for one slope, or the number of channels.
    init : float, optional
        The first value of every slope.
    axis : int, optional
        Where the channels are; the second axis by default.
    xp : module, optional
        Array API namespace of the weight; NumPy by default.
    dtype : dtype of that library, optional
        The weight's; float32 by default.
    inplace : bool, optional
        Whether `forward` overwrites x and `backward` overwrites dy.

    Raises
    ------
    TypeError, ValueError
        If a number is of the wrong kind, `num_parameters` below 1, or `init` not finite in `dtype`;
        TypeError also if `xp` is no array library, or `dtype` not a floating one.

    Examples
    --------
    >>> import numpy as np
    >>> layer = PReLU()
    >>> layer.forward(np.array([[-2.0, 4.0]]))
    array([[-0.5,  4. ]])
    >>> layer.backward(np.ones((1, 2)))
    array([[0.25, 1.  ]])
    >>> layer.grads
    [array([-2.], dtype=float32)]
    """

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.25,
        axis: int = 1,
        *,
        xp: Any = np,
        dtype: Any = None,
        inplace: bool = False,
    ) -> None:
        self._count = whole("num_parameters", num_parameters)
        if self._count < 1:
            raise ValueError(f"num_parameters must be at least 1, got {num_parameters}")
        self._init = real("init", init)
        self._axis = whole("axis", axis)
        self.inplace = inplace
        if not hasattr(xp, "full"):
            raise TypeError(
                f"xp must be an array library, such as the module cupy, got {type(xp).__name__}"
            )
        dtype = xp.float32 if dtype is None else dtype
        with np.errstate(all="ignore"):
            weight = xp.full((self._count,), self._init, dtype=dtype)
        serving("PReLU", "the weight", weight, Activation(), floating=True)  # or refuses
        if not math.isfinite(float(weight[0])):
            raise ValueError(f"init must be finite in {weight.dtype}, got {init}")
        self._params = [weight]
        self._grads = [xp.zeros((self._count,), dtype=dtype)]

    @property
    def params(self) -> list[Any]:
        """``[weight]``, shape (num_parameters,)."""
        return self._params

    @property
    def grads(self) -> list[Any]:
        """``[gradient]``, likewise; 0 before the first `backward`."""
        return self._grads

    def _evaluate(self, x: Any, out: Any) -> Any:
        return prelu_forward("forward", x, self._params[0], self._axis, out, _WEIGHT)

    def _save(self, x: Any, out: Any) -> tuple[Any, Any]:
        return prelu_saving("forward", x, self._params[0], self._axis, out, _WEIGHT)

    def _gradient(self, dy: Any, out: Any) -> Any:
        dx, self._grads[0] = self._pullback.backward("backward", dy, out, self._grads[0])
        return dx

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_params", "_grads"):  # a machine that loads it may have no GPU
            state[name] = [_on_the_host(array) for array in state[name]]
        return state

    def __copy__(self) -> PReLU:
        again = type(self).__new__(type(self))
        again.__dict__.update(super().__getstate__())
        again._params, again._grads = list(self._params), list(self._grads)
        return again

    def __deepcopy__(self, memo: dict[int, Any]) -> PReLU:
        again = type(self).__new__(type(self))
        again.__dict__.update(copy.deepcopy(super().__getstate__(), memo))
        return again

    def __repr__(self) -> str:
        return self._shown(str(self._count), f"init={self._init}", f"axis={self._axis}")


_WEIGHT = "layer.params[0]"  # in messages


def _on_the_host(array: Any) -> Any:
    """Return an array as a NumPy array; where NumPy has no such dtype, of float32."""
    try:
        return to_numpy(array)
    except TypeError:
        xp = array_api_compat.array_namespace(array)
        return to_numpy(xp.astype(array, xp.float32))


class RReLU(Variant):
    """`relu_xp.rrelu` as a layer (Xu et al., 2015).

    ``forward(x)`` draws a slope for each element, ``forward(x, training=False)`` takes the mean.
    `repr` does not tell the generator.

    Parameters
    ----------
    lower, upper : float, optional
        Bounds of the slopes.
    rng : numpy.random.Generator, cupy.random.Generator, or function, optional
        As for `relu_xp.rrelu`; by default NumPy's, freshly seeded.
    inplace : bool, optional
        Whether `forward` overwrites x and `backward` overwrites dy.

    Raises
    ------
    TypeError, ValueError
        If a bound is not a finite real number, or `lower` is above `upper`.
    """

    def __init__(
        self,
        lower: float = LOWER,
        upper: float = UPPER,
        *,
        rng: Any = None,
        inplace: bool = False,
    ) -> None:
        self._bounds, self._activation = checked_bounds(lower, upper)
        self.rng = np.random.default_rng() if rng is None else rng
        self.inplace = inplace

    @property
    def bounds(self) -> tuple[float, float]:
        """The bounds of the slopes."""
        return self._bounds

    @property
    def activation(self) -> Activation:
        """The four numbers of the layer in evaluation."""
        return self._activation

    def _evaluate(self, x: Any, out: Any) -> Any:
        return forward("forward", self._activation, x, out, floating=True)

    def _save(self, x: Any, out: Any) -> tuple[Any, Any]:
        return rrelu_saving("forward", x, *self._bounds, self.rng, out)

    def __repr__(self) -> str:
        return self._shown(*map(repr, self._bounds))


class CReLU(Variant):
    """`relu_xp.crelu` as a layer (Shang et al., 2016): y is twice as long as x along an axis.

    Parameters
    ----------
    axis : int, optional
        Along which relu(x) and relu(-x) are concatenated; the second axis by default.

    Raises
    ------
    TypeError
        If it is no whole number.
    """

    _keeps_shape = False

    def __init__(self, axis: int = 1) -> None:
        self._axis = whole("axis", axis)

    def _evaluate(self, x: Any, out: Any) -> Any:
        return crelu_forward("forward", x, self._axis, out)

    def _save(self, x: Any, out: Any) -> tuple[Any, Any]:
        return crelu_saving("forward", x, self._axis, out)

    def __repr__(self) -> str:
        return self._shown(f"axis={self._axis}")


class SquaredReLU(Variant):
    """`relu_xp.squared_relu` as a layer (So et al., 2021).

    Parameters
    ----------
    inplace : bool, optional
        Whether `forward` overwrites x and `backward` overwrites dy.
    """

    def __init__(self, *, inplace: bool = False) -> None:
        self.inplace = inplace

    def _evaluate(self, x: Any, out: Any) -> Any:
        return squared_relu_forward("forward", x, out)

    def _save(self, x: Any, out: Any) -> tuple[Any, Any]:
        return squared_relu_saving("forward", x, out)

    def __repr__(self) -> str:
        return self._shown()
