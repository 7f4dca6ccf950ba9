"""PyTorch and JAX: relu_xp on their arrays beside their own operations.

Theirs does not always compute the same: ``leaky_relu`` gives the negative slope at NaN,
``hardtanh`` no gradient there. README.md, beside this file, has more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import relu_xp
from bench import report
from bench.harness import Names, looped, module, normal, time_runs
from bench.report import Row, compared, progress

TARGET = "<=1.3"  # times what theirs takes
SHAPES = ((64, 100), (2000, 2000))
COLUMNS = ("operation", "shape", "dtype", "us", "ratio", "wanted", "reached")
PRESETS = ("relu", "leaky_relu", "relu6")
LAYERS = ("ReLU", "LeakyReLU", "ReLU6")
BOTH = ("float32", "bfloat16")
ONE = BOTH[:1]
Pair = tuple[str, str, str, Sequence[str]]  # operation, ours, theirs, dtypes


def _presets(ours: str, theirs: str, in_both: tuple[str, ...] = ()) -> tuple[Pair, ...]:
    """Return a pair for each preset, of which {} is the name, and [] that of its layer."""
    pairs = []
    for preset, layer in zip(PRESETS, LAYERS, strict=True):
        name = layer if "[]" in ours else preset
        codes = [code.replace("{}", preset).replace("[]", layer) for code in (ours, theirs)]
        codes[1] = codes[1].replace("F.relu(", "torch.relu(")  # which takes less time to call
        pairs.append((name, codes[0], codes[1], BOTH if preset in in_both else ONE))
    return tuple(pairs)


_BACKWARD = "leaf.grad = None; F.{}(leaf).backward(dy)"
_VJP = "ready((ReLU.forward(x), ReLU.backward(dy)))", "ready(back(jax.nn.relu, x, dy))"
PAIRS: dict[str, tuple[Pair, ...]] = {
    "PyTorch, forward": (
        *_presets("relu_xp.{}(x)", "F.{}(x)", ("relu", "leaky_relu")),
        ("relu beside threshold", "relu_xp.relu(x)", "torch.threshold(x, 0.0, 0.0)", ONE),
        ("clipped_relu", "relu_xp.clipped_relu(x)", "F.hardtanh(x, 0.0, 20.0)", ONE),
        ("thresholded_relu", "relu_xp.thresholded_relu(x)", "F.threshold(x, 1.0, 0.0)", ONE),
    ),
    "PyTorch, autograd": _presets(_BACKWARD.replace("F.", "relu_xp."), _BACKWARD, ("relu",)),
    "PyTorch, a layer beside autograd": _presets(
        "[].forward(x); [].backward(dy)", _BACKWARD, ("relu",)
    ),
    "JAX, an operation at a time": _presets(
        "ready(relu_xp.{}(x))", "ready(jax.nn.{}(x))", ("relu",)
    ),
    "JAX, jit": _presets("ready(jit_{}(x))", "ready(jit_nn_{}(x))"),
    "JAX, jit of forward and gradient": _presets("ready(vjp_{}(x, dy))", "ready(vjp_nn_{}(x, dy))"),
    "JAX, a layer beside jax.vjp": (("ReLU", *_VJP, ONE),),
}


def _names(library: str, x: Any, dy: Any, dtype: str) -> Names | None:
    """Return what the code of a library's pairs finds; None where it is not installed."""
    names: Names = {"relu_xp": relu_xp} | {name: getattr(relu_xp, name)() for name in LAYERS}
    if library == "PyTorch":
        if (torch := module("torch")) is None:
            return None
        torch.set_num_threads(report.cpus())
        x, dy = (torch.from_numpy(array).to(getattr(torch, dtype)) for array in (x, dy))
        leaf = x.detach().clone().requires_grad_()
        return names | {"torch": torch, "F": torch.nn.functional, "x": x, "dy": dy, "leaf": leaf}
    if (jax := module("jax")) is None:
        return None
    x, dy = (jax.numpy.asarray(array, dtype) for array in (x, dy))

    def back(function: Any, x: Any, dy: Any) -> tuple[Any, Any]:
        y, pullback = jax.vjp(function, x)
        return y, pullback(dy)[0]

    for (package, prefix), name in itertools.product(((relu_xp, ""), (jax.nn, "nn_")), PRESETS):
        function = getattr(package, name)
        names[f"jit_{prefix}{name}"] = jax.jit(lambda x, f=function: f(x))
        names[f"vjp_{prefix}{name}"] = jax.jit(lambda x, dy, f=function: back(f, x, dy))
    return names | {"jax": jax, "x": x, "dy": dy, "back": back, "ready": jax.block_until_ready}


def measure(seconds: float) -> Iterator[Row]:
    """Time every pair, shape and dtype."""
    for group, pairs in PAIRS.items():
        library = group.partition(",")[0]
        for (operation, ours, theirs, dtypes), shape in itertools.product(pairs, SHAPES):
            for dtype in dtypes:
                row: Row = {"group": group, "operation": operation, "dtype": dtype}
                row["shape"] = "x".join(map(str, shape))
                x, dy = (normal(shape, np.float32, seed) for seed in (1, 2))
                names = _names(library, x, dy, dtype)
                if names is None:
                    yield row | {"note": f"{library} is not installed"}
                    continue
                progress(f"{group}: {operation}, {row['shape']} {dtype}")
                timings = time_runs({code: looped(code, names) for code in (ours, theirs)}, seconds)
                yield row | compared(timings, ours, theirs, TARGET, name="ratio")


def main() -> None:
    """Measure, print and save."""
    options = report.command_line("frameworks", __doc__).parse_args()
    path, _ = report.opened(options)
    rows = report.rounded(list(measure(0.4 if options.quick else 2.0)))
    report.print_table(rows, COLUMNS)
    conditions = report.conditions("torch", "jax", "ml_dtypes", quick=options.quick)
    report.save(path, {"conditions": conditions, "rows": rows})


if __name__ == "__main__":
    main()
