"""PReLU, and a bias with ReLU, against PyTorch: two sections of cpu.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

import relu_xp
from bench.harness import Names, module, normal, numpy_dtype, runnable, time_runs
from bench.report import Row, compared, progress

PRELU = (16, 64, 56, 56)
PRELU_CASES = {
    "forward": ("relu_xp.prelu(x, weight)", "functional.prelu(tx, tweight)"),
    "forward and backward": (
        "out, back = relu_xp.prelu_vjp(x, weight); back(dy)",
        "leaf.grad = tslopes.grad = None; functional.prelu(leaf, tslopes).backward(tdy)",
    ),
}

# Shape, axis, dtype, and the targets of both passes. `tbias` has the axes behind it, `others` are
# the axes that are summed.
BIAS = (
    ((4096, 4096), 1, "float32", ">=1.25", ">=1.8"),
    ((256, 1024), 1, "float32", ">=1.0", ">=1.4"),
    ((4096, 4096), 1, "float16", ">=1.5", ">=1.5"),
    ((4096, 4096), 1, "bfloat16", ">=1.5", ">=1.5"),
    ((32, 64, 56, 56), 1, "float32", ">=1.2", ">=1.5"),
    ((32, 128), 1, "float32", "", ""),
)
BIAS_CASES = {
    "forward with mask": (
        "relu_xp.bias_relu_vjp(x, bias, axis=axis, out=y)",
        "torch.add(tx, tbias, out=ty).relu_()",
    ),
    "backward": (
        "pullback(dy, out=dx)",
        "aten.threshold_backward.grad_input(tdy, ty, 0, grad_input=tdx).sum(others)",
    ),
}


def names_of(arrays: Names) -> Names:
    """Return what code finds: arrays, the same memory as tensors, and libraries."""
    names: Names = {"np": np, "relu_xp": relu_xp, **arrays}
    torch = module("torch")
    if torch:
        torch.set_num_threads(relu_xp.get_num_threads())
        names |= {f"t{name}": _tensor(array) for name, array in arrays.items()}
        names |= {"torch": torch, "aten": torch.ops.aten, "functional": torch.nn.functional}
        names["leaf"] = names["tx"].detach().requires_grad_()
    return names


def _tensor(array: Any) -> Any:
    torch = module("torch")
    if array.dtype.name != "bfloat16":  # which `from_numpy` refuses
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def prelu(seconds: float) -> Iterator[list[Row]]:
    """Compare PReLU, and its gradients by both arguments, with PyTorch."""
    x, dy = (normal(PRELU, np.float32, seed) for seed in (0, 1))
    weight = np.full(PRELU[1], 0.25, np.float32)
    names = names_of({"x": x, "dy": dy, "weight": weight, "slopes": weight.copy()})
    if "torch" in names:
        names["tslopes"].requires_grad_()
    group = f"PReLU, {'x'.join(map(str, PRELU))}: times faster than PyTorch"
    for case, (ours, theirs) in PRELU_CASES.items():
        progress(f"prelu: {case}")
        timings = time_runs(runnable((ours, theirs), names), 2 * seconds)
        row: Row = {"group": group, "case": case, "dtype": "float32"}
        yield [row | compared(timings, theirs, ours, ">=1.1")]


def bias(seconds: float) -> Iterator[list[Row]]:
    """Compare a bias with ReLU in one pass, and its gradients in one, with PyTorch's operations."""
    for shape, axis, dtype, *targets in BIAS:
        x, dy = (normal(shape, numpy_dtype(dtype), seed) for seed in (0, 1))
        arrays = {"x": x, "dy": dy, "y": np.zeros_like(x), "dx": np.zeros_like(x)}
        names = names_of(arrays | {"bias": normal(shape[axis : axis + 1], x.dtype, 2)})
        _, pullback = relu_xp.bias_relu_vjp(x, names["bias"], axis=axis, out=names["y"])
        names |= {"axis": axis, "pullback": pullback}
        if "torch" in names:
            names["tbias"] = names["tbias"].view(-1, *itertools.repeat(1, x.ndim - 1 - axis))
            names["others"] = [other for other in range(x.ndim) if other != axis]
        group = f"bias and ReLU, {'x'.join(map(str, shape))}: times faster than PyTorch"
        for (case, (ours, theirs)), target in zip(BIAS_CASES.items(), targets, strict=True):
            progress(f"bias: {shape}, {dtype}, {case}")
            timings = time_runs(runnable((ours, theirs), names), 2 * seconds)
            row: Row = {"group": group, "case": case, "dtype": dtype}
            yield [row | compared(timings, theirs, ours, target)]
