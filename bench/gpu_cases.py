"""What `bench.gpu` times, as Python text: what is shown is what ran.

In all of these x and dy are inputs, y and dx outputs; y is relu(x) from the start. tx is x's memory
as a tensor of PyTorch, and so on; the pullbacks keep their mask in `mask`. rows_x is x as rows of
`CHANNELS` numbers, along which the bias goes; the cases with a bias come last, and find the y and
the mask of the sum.
"""

from __future__ import annotations

from typing import NamedTuple

from bench.harness import numpy_dtype

DTYPES = ("float16", "bfloat16", "float32", "float64")
SLOPE = 0.01
CHANNELS = 1024


class Case(NamedTuple):
    """One way to compute a pass."""

    name: str  # of the pass
    library: str
    code: str
    outputs: str = ""  # the arrays that it writes, which are checked
    arrays: int = 2  # that must be read or written; temporaries are not counted
    masks: int = 0  # likewise, of one bit per element

    def nbytes(self, dtype: str, elements: int) -> float:
        """Return the bytes that must be moved."""
        return elements * (self.arrays * numpy_dtype(dtype).itemsize + self.masks / 8)


STEP = "relu_xp.relu_vjp(x, out=y, mask=mask)[1](dy, out=dx)"
LAYER = "layer.forward(x); layer.backward(dy)"
AUTOGRAD = "leaf.grad = None; out = torch.relu(leaf); out.backward(tdy)"
BACK = "aten.threshold_backward.grad_input(tdy, ty, 0, grad_input=tdx)"
LEAKY_BACK = f"aten.leaky_relu_backward.grad_input(tdy, tx, {SLOPE}, False, grad_input=tdx)"
FORWARD = (  # all of PyTorch's that take an output; the fastest counts
    "torch.clamp_min(tx, 0, out=ty)",
    "aten.relu.out(tx, out=ty)",
    "aten.threshold.out(tx, 0, 0, out=ty)",
)
BIAS_FORWARD = "relu_xp.bias_relu_vjp(rows_x, bias, out=rows_y, mask=mask)"
BIAS_BACK = "bias_pullback(rows_dy, out=rows_dx)"
TORCH_BIAS_BACK = (
    "aten.threshold_backward.grad_input(rows_tdy, rows_ty, 0, grad_input=rows_tdx); rows_tdx.sum(0)"
)
TORCH = ("PyTorch", "autograd", "compiled")
OTHERS = (*TORCH, "CuPy", "Chainer")

COPY = Case("copy", "copy", "copy(dx, x)")
PASSES = (  # of each pass, ours comes first
    COPY,
    Case("forward", "relu_xp", "relu_xp.relu(x, out=y)", "y"),
    Case("forward", "CuPy", "cupy.maximum(x, 0, out=y)", "y"),
    Case("forward", "Chainer", "chainer_forward(x, y)", "y"),
    *(Case("forward", "PyTorch", code, "y") for code in FORWARD),
    Case("forward + mask", "relu_xp", "relu_xp.relu_vjp(x, out=y, mask=mask)", "y mask", 2, 1),
    *(Case("forward + mask", "PyTorch", code, "y") for code in FORWARD),  # it keeps y instead
    Case("backward", "relu_xp", "pullback(dy, out=dx)", "dx", 2, 1),
    Case("backward", "CuPy", "dy * (x > 0)", "", 3),
    Case("backward", "CuPy", "cupy.multiply(dy, x > 0, out=dx)", "dx", 3),
    Case("backward", "CuPy", "cupy.where(x > 0, dy, 0)", "", 3),
    Case("backward", "PyTorch", BACK, "dx", 3),
    Case("backward", "Chainer", "chainer_backward(y, dy, dx)", "dx", 3),
    Case("both", "relu_xp", STEP, "y mask dx", 4, 2),
    Case("both", "relu_xp", LAYER, "", 4, 2),
    Case("both", "CuPy", "cupy.maximum(x, 0, out=y); dy * (x > 0)", "y", 5),
    *(Case("both", "PyTorch", f"{code}; {BACK}", "y dx", 5) for code in FORWARD),
    Case("both", "autograd", AUTOGRAD, "", 5),
    Case("both", "compiled", AUTOGRAD.replace("torch.relu", "compiled_relu"), "", 5),
    Case("both", "Chainer", "chainer_forward(x, y); chainer_backward(y, dy, dx)", "y dx", 5),
    Case("backward from x", "relu_xp", "relu_xp.relu_backward(dy, x, out=dx)", "dx", 3),
    Case("backward from x", "PyTorch", BACK.replace("ty", "tx"), "dx", 3),
    Case("leaky forward", "relu_xp", f"relu_xp.leaky_relu(x, {SLOPE}, out=y)", "y"),
    Case("leaky forward", "CuPy", f"cupy.where(x > 0, x, {SLOPE} * x)"),
    Case("leaky forward", "PyTorch", f"aten.leaky_relu.out(tx, {SLOPE}, out=ty)", "y"),
    Case("leaky backward", "relu_xp", "leaky_pullback(dy, out=dx)", "dx", 2, 1),
    Case("leaky backward", "CuPy", f"cupy.where(x > 0, dy, {SLOPE} * dy)", "", 3),
    Case("leaky backward", "PyTorch", LEAKY_BACK, "dx", 3),
    Case("bias forward", "relu_xp", BIAS_FORWARD, "y mask", 2, 1),
    Case(
        "bias forward", "CuPy", "cupy.add(rows_x, bias, out=rows_y); cupy.maximum(y, 0, out=y)", "y"
    ),
    Case("bias forward", "PyTorch", "torch.add(rows_tx, tbias, out=rows_ty); ty.relu_()", "y"),
    Case("bias forward", "compiled", "compiled_bias_relu(rows_tx, tbias)"),
    Case("bias backward", "relu_xp", BIAS_BACK, "dx", 2, 1),
    Case("bias backward", "CuPy", "cupy.multiply(dy, y > 0, out=dx); rows_dx.sum(0)", "dx", 3),
    Case("bias backward", "PyTorch", TORCH_BIAS_BACK, "dx", 3),
    Case("bias backward", "compiled", "compiled_bias_back(rows_tdy, rows_ty)", "", 3),
)
OURS = {case.name: case.code for case in reversed(PASSES)}
GRAPHS = (
    Case("both", "relu_xp", STEP, "y mask dx"),
    Case("both", "PyTorch", f"{FORWARD[0]}; {BACK}", "y dx"),
)
HOST = (
    Case("host", "relu_xp", "relu_xp.relu(x)"),
    Case("host", "relu_xp", "relu_xp.relu(x, out=y)"),
    Case("host", "relu_xp", "relu_xp.relu_vjp(x)"),
    Case("host", "relu_xp", "relu_xp.relu_vjp(x, out=y, mask=mask)"),
    Case("host", "relu_xp", "pullback(dy)"),
    Case("host", "relu_xp", "pullback(dy, out=dx)"),
    Case("host", "relu_xp", LAYER),
    Case("host", "relu_xp", BIAS_FORWARD),
    Case("host", "relu_xp", BIAS_BACK),
    Case("host", "CuPy", "cupy.maximum(x, 0)"),
    Case("host", "CuPy", "cupy.maximum(x, 0, out=y)"),
    Case("host", "CuPy", "dy * (x > 0)"),
    Case("host", "PyTorch", "torch.relu(tx)"),
    Case("host", "autograd", AUTOGRAD),
)
HOST_PAIRS = {  # the first is to take no longer than the second
    "relu_xp.relu(x)": "cupy.maximum(x, 0)",
    "relu_xp.relu(x, out=y)": "cupy.maximum(x, 0, out=y)",
}
TARGET_SIZE = 1 << 27
TARGETS = (  # of the pass, the ratio, what is wanted, for which dtypes
    ("forward", "share", ">=0.95", DTYPES),
    ("backward", "over_PyTorch", ">=1.4", DTYPES),
    ("both", "over_PyTorch", ">=1.2", DTYPES),
    ("both", "over_CuPy", ">=2.5", DTYPES[:2]),
    ("both", "over_CuPy", ">=1.6", DTYPES[2:3]),
)
