"""``relu-xp plot``: a layer's forward pass and gradient in a picture."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import relu_xp
from relu_xp import plotting
from relu_xp.cli import _shared

SUMMARY = "draw a layer: forward, gradient and both"

_CLASSES = (getattr(relu_xp, name) for name in relu_xp.__all__)
_LAYERS: dict[str, Any] = {kind.__name__: kind for kind in _CLASSES if hasattr(kind, "forward")}
_PARAMETERS = {
    "negative_slope": "slope at and below the threshold",
    "threshold": "where the branches meet",
    "positive_slope": "slope above the threshold",
    "max_value": "ceiling",
    "init": "PReLU's slope",
    "lower": "RReLU's smallest slope",
    "upper": "RReLU's largest slope",
}


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the layer, its parameters and the file."""
    command.add_argument(
        "layer",
        nargs="?",
        type=lambda name: {key.lower(): key for key in _LAYERS}.get(name.lower(), name),
        choices=_LAYERS,
        default="ReLU",
        metavar="LAYER",
        help=f"{', '.join(_LAYERS)} (default: %(default)s)",
    )
    for name, meaning in _PARAMETERS.items():
        command.add_argument(_option(name), type=float, metavar="X", help=meaning)
    text = f"{', '.join(plotting.CURVES)}, or all three side by side (default: %(default)s)"
    curves = (*plotting.CURVES, "all")
    command.add_argument("--curves", choices=curves, default="all", metavar="CURVES", help=text)
    _shared.add_backend_option(command)
    text = ".png or .svg (default: LAYER.png, here)"
    command.add_argument("-o", "--output", type=_shared.picture_file, metavar="FILE", help=text)


def run(arguments: argparse.Namespace) -> None:
    """Draw the picture."""
    kind = _LAYERS[arguments.layer]
    given = vars(arguments)
    parameters = {name: given[name] for name in _PARAMETERS if given[name] is not None}
    for name in parameters.keys() - inspect.signature(kind).parameters.keys():
        arguments.parser.error(f"argument {_option(name)}: {kind.__name__} does not take it")
    if kind is relu_xp.BiasReLU:
        parameters["num_features"] = 1
    layer = kind(**parameters)
    library = _shared.choose_library(arguments.backend)
    file = arguments.output or _shared.picture_file(f"{kind.__name__}.png")
    curves = plotting.CURVES if arguments.curves == "all" else (arguments.curves,)
    _shared.save_picture(plotting.layer_figure(layer, curves, xp=library.xp), file)
    _shared.print_table({"layer": repr(layer), "backend": library.name, "figure": file})


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
