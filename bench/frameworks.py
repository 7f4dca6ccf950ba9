"""PyTorch and JAX: relu_xp on their arrays beside their own operations, interleaved in one process.

``python -m bench.frameworks [--quick] [--json FILE]``. ``PAIRS`` has what is timed, `LIMIT` what is
wanted of each ratio. A library that is not installed is reported as such. Theirs does not always
compute the same: ``leaky_relu`` gives the negative slope at NaN, ``hardtanh`` no gradient there.
"""

from __future__ import annotations

import argparse
import itertools
from operator import truediv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import relu_xp
from bench import measure
from bench.measure import Names, Row, module, progress, verdict

RESULTS = Path(__file__).with_name("results") / "frameworks.json"
LIMIT = 1.3
SHAPES = ((64, 100), (2000, 2000))
COLUMNS = ("operation", "shape", "dtype", "ours_us", "theirs_us", "ratio", "wanted", "reached")


class Pair(NamedTuple):
    """An operation as it is written with relu_xp and without."""

    operation: str
    ours: str
    theirs: str
    dtypes: tuple[str, ...] = ("float32",)


BOTH = ("float32", "bfloat16")
_CLEAR = "leaf.grad = None; "

PAIRS = {
    "PyTorch, forward": (
        Pair("relu", "relu_xp.relu(x)", "torch.relu(x)", BOTH),
        Pair("relu beside threshold", "relu_xp.relu(x)", "torch.threshold(x, 0.0, 0.0)"),
        Pair("leaky_relu", "relu_xp.leaky_relu(x)", "F.leaky_relu(x)", BOTH),
        Pair("relu6", "relu_xp.relu6(x)", "F.relu6(x)"),
        Pair("clipped_relu", "relu_xp.clipped_relu(x)", "F.hardtanh(x, 0.0, 20.0)"),
        Pair("thresholded_relu", "relu_xp.thresholded_relu(x)", "F.threshold(x, 1.0, 0.0)"),
    ),
    "PyTorch, autograd": tuple(
        Pair(
            name,
            f"{_CLEAR}relu_xp.{name}(leaf).backward(dy)",
            f"{_CLEAR}{theirs}(leaf).backward(dy)",
            BOTH if name == "relu" else ("float32",),
        )
        for name, theirs in (
            ("relu", "torch.relu"),
            ("leaky_relu", "F.leaky_relu"),
            ("relu6", "F.relu6"),
        )
    ),
    "PyTorch, a layer beside autograd": tuple(
        Pair(
            layer,
            f"{layer}.forward(x); {layer}.backward(dy)",
            f"{_CLEAR}{theirs}(leaf).backward(dy)",
            BOTH if layer == "ReLU" else ("float32",),
        )
        for layer, theirs in (
            ("ReLU", "torch.relu"),
            ("LeakyReLU", "F.leaky_relu"),
            ("ReLU6", "F.relu6"),
        )
    ),
    "JAX, an operation at a time": tuple(
        Pair(name, f"ready(relu_xp.{name}(x))", f"ready(jax.nn.{name}(x))", dtypes)
        for name, dtypes in (("relu", BOTH), ("leaky_relu", ("float32",)), ("relu6", ("float32",)))
    ),
    "JAX, jit": tuple(
        Pair(name, f"ready(jit_{name}(x))", f"ready(jit_nn_{name}(x))")
        for name in ("relu", "leaky_relu", "relu6")
    ),
    "JAX, jit of forward and gradient": tuple(
        Pair(name, f"ready(vjp_{name}(x, dy))", f"ready(vjp_nn_{name}(x, dy))")
        for name in ("relu", "leaky_relu", "relu6")
    ),
    "JAX, a layer beside jax.vjp": (
        Pair(
            "ReLU", "ready((ReLU.forward(x), ReLU.backward(dy)))", "ready(back(jax.nn.relu, x, dy))"
        ),
    ),
}


def _names(library: str, x: Any, dy: Any, dtype: str) -> Names | None:
    """Return what the code of a library's pairs finds; None where it is not installed."""
    names: Names = {"relu_xp": relu_xp}
    names |= {name: getattr(relu_xp, name)() for name in ("ReLU", "LeakyReLU", "ReLU6")}
    if library == "PyTorch":
        if (torch := module("torch")) is None:
            return None
        torch.set_num_threads(measure.cpus())
        x, dy = (torch.from_numpy(array).to(getattr(torch, dtype)) for array in (x, dy))
        leaf = x.detach().clone().requires_grad_()
        return names | {"torch": torch, "F": torch.nn.functional, "x": x, "dy": dy, "leaf": leaf}
    if (jax := module("jax")) is None:
        return None
    x, dy = (jax.numpy.asarray(array, dtype) for array in (x, dy))

    def back(function: Any, x: Any, dy: Any) -> tuple[Any, Any]:
        y, pullback = jax.vjp(function, x)
        return y, pullback(dy)[0]

    for (of, prefix), name in itertools.product(
        ((relu_xp, ""), (jax.nn, "nn_")), ("relu", "leaky_relu", "relu6")
    ):
        function = getattr(of, name)
        names[f"jit_{prefix}{name}"] = jax.jit(lambda x, f=function: f(x))
        names[f"vjp_{prefix}{name}"] = jax.jit(lambda x, dy, f=function: back(f, x, dy))
    return names | {"jax": jax, "x": x, "dy": dy, "back": back, "ready": jax.block_until_ready}


def _measured(seconds: float) -> list[Row]:
    rows: list[Row] = []
    for group, pairs in PAIRS.items():
        library = group.partition(",")[0]
        for pair, shape in itertools.product(pairs, SHAPES):
            for dtype in pair.dtypes:
                row: Row = {"group": group, "operation": pair.operation, "dtype": dtype}
                row["shape"] = "x".join(map(str, shape))
                rows.append(row)
                x, dy = (measure.normal(shape, np.float32, seed) for seed in (1, 2))
                names = _names(library, x, dy, dtype)
                if names is None:
                    row["note"] = f"{library} is not installed"
                    continue
                progress(f"{group}: {pair.operation}, {row['shape']} {dtype}")
                codes = {"ours": pair.ours, "theirs": pair.theirs}
                timed = measure.alternating(
                    {name: measure.compiled(code, names) for name, code in codes.items()},
                    seconds=seconds,
                )
                row |= {f"{name}_code": code for name, code in codes.items()}
                row |= {f"{name}_us": 1e6 * timed.median(name) for name in codes}
                spread = timed.spread(truediv, "ours", "theirs")
                row |= spread.cells("ratio") | verdict(spread.median, at_most=LIMIT)
    return rows


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.frameworks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="shorter; writes nothing without --json"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where to; default: bench/results/frameworks.json",
    )
    options = parser.parse_args()

    rows = _measured(0.4 if options.quick else 2.0)
    measure.print_table(rows, COLUMNS)
    conditions = measure.conditions("torch", "jax", "ml_dtypes")
    result = {
        "conditions": conditions | {"quick": options.quick},
        "rows": measure.rounded(rows),
    }
    measure.save(options.json or (None if options.quick else RESULTS), result)


if __name__ == "__main__":
    main()
