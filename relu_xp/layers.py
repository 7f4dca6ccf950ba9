"""The layers: a shell over `relu_xp.functional` that remembers one forward pass."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from relu_xp.activation import Activation, activation_of
from relu_xp.functional import Pullback, forward, forward_saving

__all__ = ["ClippedReLU", "LeakyReLU", "ReLU", "ReLU6", "Relu", "ThresholdedReLU"]

ArrayT = TypeVar("ArrayT")


class ReLU:
    """A rectified linear unit with a backward pass, for arrays of any library.

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

    _pullback: Pullback | None = None  # of the class, so that a layer just unpickled has it too

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

    @property
    def inplace(self) -> bool:
        """Whether `forward` overwrites x and `backward` overwrites dy."""
        return self._inplace

    @inplace.setter
    def inplace(self, inplace: bool) -> None:
        if not isinstance(inplace, bool):
            raise TypeError(f"inplace must be True or False, got {type(inplace).__name__}")
        self._inplace = inplace

    @property
    def saved_nbytes(self) -> int:
        """Bytes held between `forward` and `backward`; 0 if there is nothing to go back from."""
        return 0 if self._pullback is None else self._pullback.saved_nbytes

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

    def __call__(
        self,
        x: ArrayT,
        /,
        *,
        training: bool = True,
        out: ArrayT | None = None,
        mask: ArrayT | None = None,
    ) -> ArrayT:
        """Return ``self.forward(x, training=training, out=out, mask=mask)``."""
        return self.forward(x, training=training, out=out, mask=mask)

    def backward(self, dy: ArrayT, /, *, out: ArrayT | None = None, retain: bool = False) -> ArrayT:
        """Return the gradient with respect to the input of the latest `forward`.

        Parameters
        ----------
        dy : array, shape of that input
            Gradient with respect to the output; any floating dtype, any layout.
        out : array, like `dy`, optional
            Where to write the result. Not for a layer that works in place.
        retain : bool, optional
            Whether to keep the mask for another call.

        Returns
        -------
        array, shape and dtype of `dy`

        Raises
        ------
        RuntimeError
            If there was no `forward`, or a `backward` since then has consumed its mask.
        TypeError, ValueError
            If `dy` or `out` does not fit what `forward` saw; the mask is then still there.
        """
        if self._pullback is None:
            raise RuntimeError(
                "backward: nothing is saved; call forward(x) first (with training=True), once for "
                "each backward. backward(dy, retain=True) keeps the mask for another call; "
                "relu_xp.relu_vjp serves a layer that is used twice in one pass"
            )
        if self._inplace:
            out = self._itself("backward", dy, out)
        dx = self._pullback.backward("backward", dy, out)
        if not retain:
            self._pullback = None
        return dx

    @staticmethod
    def _itself(function: str, array: ArrayT, out: ArrayT | None) -> ArrayT:
        if out is not None and out is not array:
            raise ValueError(
                f"{function}: out was given, but a layer with inplace=True writes into its "
                "argument; leave out= away, or make the layer without inplace"
            )
        return array

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_pullback", None)  # an array on a device, and of one pass only
        return state

    def __repr__(self) -> str:
        given: list[str] = []
        for name, default in self._defaults.items():
            value = getattr(self._activation, name)
            if name == self._positional:
                given.insert(0, repr(value))
            elif value != default:
                given.append(f"{name}={value!r}")
        if self.inplace:
            given.append("inplace=True")
        return f"{type(self).__name__}({', '.join(given)})"


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
