"""Small arrays, where a call's own cost is all of it.

``python -m bench.small [--json FILE]``: `relu_xp.relu` on 10 elements against ``np.maximum``, and a
layer's forward and backward on 64 x 100 float32 against PyTorch's autograd, interleaved.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np

import relu_xp
from bench.measure import conditions, interleaved, median_ratio, save


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(prog="python -m bench.small", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures and their conditions")
    parser.add_argument("--rounds", type=int, default=300, metavar="N", help="default: %(default)s")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    ten = rng.standard_normal(10, dtype=np.float32)
    ten_times = interleaved(
        {
            "np.maximum(x, 0)": lambda: np.maximum(ten, 0),
            "relu_xp.relu(x)": lambda: relu_xp.relu(ten),
        },
        calls=500,
        rounds=options.rounds,
    )

    x = rng.standard_normal((64, 100), dtype=np.float32)
    dy = rng.standard_normal((64, 100), dtype=np.float32)
    layer = relu_xp.ReLU()

    def ours() -> None:
        layer.forward(x)
        layer.backward(dy)

    def textbook() -> None:
        mask = x <= 0
        y = x.copy()
        y[mask] = 0
        dx = dy.copy()  # the textbook overwrites dy
        dx[mask] = 0

    layers = {"relu_xp.ReLU": ours, "textbook Relu": textbook}
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: its round trip is not measured")
    else:
        tensor = torch.from_numpy(x.copy()).requires_grad_()
        gradient = torch.from_numpy(dy)

        def autograd() -> None:
            torch.relu(tensor).backward(gradient)
            tensor.grad = None

        layers["torch.relu + autograd"] = autograd
    layer_times = interleaved(layers, calls=500, rounds=options.rounds)

    medians = {
        title: {name: 1e6 * statistics.median(seconds) for name, seconds in times.items()}
        for title, times in (("10 float32", ten_times), ("64 x 100 float32", layer_times))
    }
    for title, median in medians.items():
        print(title)
        for name, microseconds in median.items():
            print(f"  {name:24} {microseconds:7.2f} us")

    result: dict[str, Any] = {"conditions": conditions("torch"), "microseconds": medians}
    median = medians["10 float32"]
    limit = 1.3 * median["np.maximum(x, 0)"] + 0.5
    result["relu_over_its_limit"] = median["relu_xp.relu(x)"] / limit
    print(
        f"relu(x), 10 elements: {median['relu_xp.relu(x)']:.2f} us; limit 1.3 np.maximum + 0.5 us"
    )
    print(f"  = {limit:.2f} us")
    if "torch.relu + autograd" in layer_times:
        ratio = median_ratio(layer_times, "relu_xp.ReLU", "torch.relu + autograd")
        result["layer_over_autograd"] = ratio
        print(
            f"layer forward + backward over PyTorch's autograd round trip: {ratio:.2f}; limit 0.55"
        )
    save(options.json, result)


if __name__ == "__main__":
    main()
