"""The command line: ``relu-xp`` and ``python -m relu_xp``.

A subcommand is a function that takes the parsed arguments and returns an exit code; `_parser` lists
them. What is wrong with a request is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from relu_xp import __version__, dispatch, files, formulas, layers, plotting, threads, training
from relu_xp.activation import FLOATING

__all__ = ["main"]

# Modules whose versions `info` tells; array libraries come from dispatch.
_OPTIONAL = ("distributed", "ml_dtypes", "sklearn", "tqdm", "matplotlib")

_NUMBERS = {
    "negative_slope": "slope at and below the threshold",
    "threshold": "where the pieces meet",
    "positive_slope": "slope above the threshold",
    "max_value": "ceiling",
    "init": "PReLU's slope",
    "lower": "RReLU's smallest slope",
    "upper": "RReLU's largest slope",
}

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_LABEL, _WIDE, _NARROW = 20, 79, 60  # characters: a label's column, a line at most, a small window


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process by default.

    Returns
    -------
    int
        Exit code: 0, or 130 after Ctrl-C.

    Raises
    ------
    SystemExit
        With code 2 after a bad request, with 0 after ``--help`` and ``--version``.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "run"):
        parser.error("give a command: info, plot, train or formulas (relu-xp --help tells more)")
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        code = run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{arguments.parser.prog}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader, `head` say, has enough
        # Python flushes once more when it ends: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="relu-xp", description="One ReLU layer for every array library.")
    parser.add_argument("--version", action="version", version=f"relu-xp {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> _Parser:
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        command.set_defaults(run=run, parser=command)
        return command

    add("info", _info, "show versions, backends, kernels, GPU and threads")
    command = add("plot", _plot, "draw a layer: forward, gradient and both")
    command.add_argument(
        "layer",
        nargs="?",
        type=lambda name: {one.lower(): one for one in layers.__all__}.get(name.lower(), name),
        choices=layers.__all__,
        default="ReLU",
        metavar="LAYER",
        help=f"{', '.join(layers.__all__)} (default: %(default)s)",
    )
    for name, meaning in _NUMBERS.items():
        option = "--" + name.replace("_", "-")
        command.add_argument(option, type=float, metavar="X", help=meaning)
    command.add_argument(
        "--curves",
        choices=(*plotting.CURVES, "all"),
        default="all",
        metavar="CURVES",
        help=f"{', '.join(plotting.CURVES)}, or all of the textbook's three figures "
        "(default: %(default)s)",
    )
    _add_backend(command)
    command.add_argument(
        "-o", "--output", metavar="FILE", help=".png or .svg (default: LAYER.png, here)"
    )
    command = add("train", _train, "train a small classifier of digits")
    _add_backend(command)
    command.add_argument(
        "--epochs",
        type=_whole_number(1),
        default=training.EPOCHS,
        metavar="N",
        help="passes over the training images (default: %(default)s)",
    )
    command.add_argument(
        "--seed",
        type=_whole_number(0),
        default=0,
        metavar="N",
        help="seed for all random numbers (default: %(default)s)",
    )
    command.add_argument(
        "--scheduler",
        metavar="URL",
        help="with --backend dask: of the scheduler whose workers are to compute, for example "
        "tcp://127.0.0.1:8786 (default: threads of this process)",
    )
    command.add_argument(
        "--plot", metavar="FILE", help="draw the learning curve into a .png or .svg file"
    )
    command = add(
        "formulas", _formulas, "time what people write for ReLU, and tell where it is wrong"
    )
    _add_backend(command)
    command.add_argument(
        "--shape",
        type=_shape,
        default=formulas.SHAPE,
        metavar="MxN",
        help=f"of the array (default: {formulas.shape_text(formulas.SHAPE)})",
    )
    command.add_argument(
        "--dtype",
        choices=FLOATING,
        metavar="NAME",
        help=f"{', '.join(FLOATING)} (default: float64, or float32 where the library has no other)",
    )
    command.add_argument(
        "--repeats",
        type=_whole_number(1),
        default=formulas.REPEATS,
        metavar="N",
        help="how often to time each formula (default: %(default)s)",
    )
    command.add_argument(
        "--seed",
        type=_whole_number(0),
        default=0,
        metavar="N",
        help="seed for the numbers in the array (default: %(default)s)",
    )
    command.add_argument(
        "--json", metavar="FILE", help="write machine, versions, all times and findings to a file"
    )
    command.add_argument(
        "--plot", metavar="FILE", help="draw times and findings into a .png or .svg file"
    )
    return parser


def _add_backend(command: _Parser) -> None:
    command.add_argument(
        "--backend",
        metavar="NAME",
        help="array library: numpy, cupy, torch, jax or another (default: cupy if it has a device, "
        "else numpy)",
    )


def _whole_number(least: int) -> Callable[[str], int]:
    """Return a function that reads a whole number of at least `least` from an argument."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} or greater")
        return number

    return read


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch("[1-9][0-9]*(x[1-9][0-9]*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape, such as 5000x5000 or 1000")
    return tuple(map(int, text.split("x")))


def _plot(arguments: argparse.Namespace) -> int:
    given = {name: getattr(arguments, name) for name in _NUMBERS}
    numbers = {name: value for name, value in given.items() if value is not None}
    kind = getattr(layers, arguments.layer)
    file = arguments.output or f"{kind.__name__}.png"
    taken = [name for name in _NUMBERS if name in inspect.signature(kind).parameters]
    for name in numbers.keys() - set(taken):
        option, *others = ("--" + one.replace("_", "-") for one in (name, *taken))
        but = f", but {', '.join(others)}" * bool(others)
        arguments.parser.error(f"argument {option}: {kind.__name__} does not take it{but}")
    try:
        layer = kind(**numbers)
        setting = training.choose(arguments.backend)
        curves = plotting.CURVES if arguments.curves == "all" else (arguments.curves,)
        plotting.layer_figures(layer, file, curves, xp=setting.namespace)
    except (TypeError, ValueError, OSError, training.MissingExtraError) as error:
        arguments.parser.error(str(error))
    _print_table({"layer": repr(layer), "backend": setting.backend, "figure": file})
    return 0


def _train(arguments: argparse.Namespace) -> int:
    if arguments.scheduler is not None and arguments.backend != "dask":
        arguments.parser.error("argument --scheduler: only with --backend dask")
    with contextlib.ExitStack() as stack:
        try:
            if arguments.plot is not None:
                try:
                    plotting.check_file(arguments.plot)
                except (ValueError, OSError) as error:
                    arguments.parser.error(f"argument --plot: {error}")
            training.require_extra()
            if arguments.scheduler is not None:
                stack.enter_context(training.connected(arguments.scheduler))
            setting = training.choose(arguments.backend)
            dispatch.kernels()
        except (ValueError, training.MissingExtraError) as error:  # of the library or RELU_XP_CPU
            arguments.parser.error(str(error))

        _print_table(
            {"backend": setting.backend, "device": setting.device, "seed": str(arguments.seed)}
        )
        sys.stdout.flush()  # ahead of the progress bar, also where stdout is a file
        result = training.train(
            setting.backend, epochs=arguments.epochs, seed=arguments.seed, progress=True
        )
    _print_table(
        {
            "loss": f"{result.losses[-1]:.4f}",
            "test accuracy": f"{result.accuracies[-1]:.2%}".replace("%", " %"),
            "images a second": f"{result.images_per_second:,.0f}",
        }
    )
    if arguments.plot is not None:
        try:
            plotting.learning_curve(result, arguments.plot)
        except OSError as error:  # the disk has changed its mind meanwhile
            arguments.parser.error(f"argument --plot: {error}")
        _print_table({"learning curve": arguments.plot})
    return 0


def _formulas(arguments: argparse.Namespace) -> int:
    checks: dict[str, Callable[[str], None]] = {
        "json": lambda file: files.write(file, None),
        "plot": plotting.check_file,
    }
    for option, check in checks.items():
        file = getattr(arguments, option)
        try:
            if file is not None:
                check(file)
        except (ValueError, OSError, training.MissingExtraError) as error:
            arguments.parser.error(f"argument --{option}: {error}")
    try:
        setting = training.choose(arguments.backend)
    except dispatch.LibraryError as error:
        arguments.parser.error(str(error))
    try:
        dtype = formulas.choose_dtype(setting, arguments.dtype)
    except ValueError as error:
        arguments.parser.error(f"argument --dtype: {error}")
    _print_table(
        {
            "backend": setting.backend,
            "device": setting.device,
            "array": f"{formulas.shape_text(arguments.shape)}, {dtype}",
        }
    )
    sys.stdout.flush()  # ahead of the progress bar, also where stdout is a file
    try:
        measured = formulas.measure(
            setting.backend,
            shape=arguments.shape,
            dtype=dtype,
            repeats=arguments.repeats,
            seed=arguments.seed,
            progress=True,
        )
    except (ValueError, MemoryError) as error:
        arguments.parser.error(str(error))
    _print_formulas(measured)
    written = {}
    try:
        if arguments.json is not None:
            option = "json"
            record = {"date": _now(), "machine": _machine(setting), "versions": _versions()}
            text = json.dumps(record | measured.record(), indent=2, allow_nan=False)
            files.write(arguments.json, f"{text}\n".encode())
            written["times and findings"] = arguments.json
        if arguments.plot is not None:
            option = "plot"
            plotting.formulas_chart(measured, arguments.plot)
            written["figure"] = arguments.plot
    except OSError as error:  # the disk has changed its mind meanwhile
        arguments.parser.error(f"argument --{option}: {error}")
    if written:
        print()
        _print_table(written)
    return 0


def _print_formulas(measured: formulas.Measured) -> None:
    """Print each formula with its time before it, and what is wrong with it below."""
    factor, unit = formulas.unit([row.median for row in measured.rows if row.median])
    start = f"{unit:>7}  x ours  "
    further = " " * len(start)
    print(f"\n{start}formula\n{further}  where it is wrong\n")
    for row in measured.rows:
        times = measured.times_ours(row)
        if row.median is None or times is None:
            start = f"{'-':>7}  {'-':>6}  "
        else:
            start = f"{_three_digits(factor * row.median):>7}  {times:>6.2f}  "
        for text, first in ((row.formula.text, start), (row.verdict, f"{further}  ")):
            print("\n".join(_wrapped(text, first, f"{further}  ")))


def _three_digits(number: float) -> str:
    """Return a positive number with three digits, or all of those before the point."""
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _machine(setting: training.Setting) -> dict[str, Any]:
    """Return what a figure holds for."""
    processor = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = (line.partition(":")[2].strip() for line in lines if "model name" in line)
            processor = next(names, processor)
    except OSError:  # not Linux
        pass
    machine: dict[str, Any] = {
        "processor": processor,
        "cpus": os.cpu_count(),
        "threads": _threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if setting.backend == "cupy":
        machine["gpu"] = dict(_gpus(None))
    return machine


def _info(_: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries being imported: here they are only counted
        reasons = {name: dispatch.availability(name) for name in dispatch.LIBRARIES}
        sections = {
            "Versions": _versions(),
            "Backends": {
                name: "available" if reason is None else reason for name, reason in reasons.items()
            },
            "Kernels": {name: _kernels(name) for name in dispatch.LIBRARIES},
            "Third-party backends": _third_party(),
            "GPU": dict(_gpus(reasons["cupy"])),
            "CPU": {"threads": _threads()},
        }
    for number, (title, rows) in enumerate(sections.items()):
        print(f"{chr(10) if number else ''}{title}")
        _print_table(rows, indent="  ")
    return 0


def _versions() -> dict[str, str]:
    """Return the versions of this package, Python and what it works with, importing nothing."""
    versions = {"relu_xp": __version__, "Python": platform.python_version()}
    try:
        distributions: Mapping[str, list[str]] = importlib.metadata.packages_distributions()
    except Exception:  # the metadata of any package whatever may be broken
        distributions = {}
    for module in dict.fromkeys(("numpy", "array_api_compat", *dispatch.LIBRARIES, *_OPTIONAL)):
        found = dict.fromkeys(distributions.get(module, ()))  # CuPy has several; a name may recur
        texts = [_version(module, distribution) for distribution in found]
        versions[module] = ", ".join(texts) or "not installed"
    return versions


def _version(module: str, distribution: str) -> str:
    """Return a distribution's version, and its name where that is another than the module's."""
    try:
        version = importlib.metadata.version(distribution)
    except Exception:
        version = "unknown"
    same = distribution.lower().replace("-", "_") == module
    return version if same else f"{version} ({distribution})"


def _kernels(library: str) -> str:
    """Tell what serves a library's arrays: the backend's module, and its kernels if any."""
    try:
        module = dispatch.module_of(library)
        if library == "numpy":
            kernels = dispatch.kernels()
            return f"{module} ({kernels.cpu.instruction_set if kernels.cpu else kernels.reason})"
    except ValueError as error:  # of RELU_XP_CPU or RELU_XP_NUM_THREADS
        return str(error)
    try:
        passes = importlib.import_module(module.partition(":")[0]).PASSES
    except (Exception, SystemExit):  # it has none, or its library is not there
        return module
    return f"{module} (ElementwiseKernels of {len(passes)} passes)"


def _third_party() -> dict[str, str]:
    """Return the backends that other packages bring, by the library that they serve."""
    entry_points = importlib.metadata.entry_points(group=dispatch.ENTRY_POINTS)
    return {entry_point.name: entry_point.value for entry_point in entry_points} or {"none": ""}


def _gpus(reason: str | None) -> Iterator[tuple[str, str]]:
    """Yield what CuPy knows of the devices, or why (`reason`) it knows of none."""
    if reason is not None:
        yield "none", f"CuPy: {reason}"
        return
    try:
        import cupy

        runtime = cupy.cuda.runtime
        for number in range(runtime.getDeviceCount()):
            properties: dict[str, Any] = runtime.getDeviceProperties(number)
            memory = properties["totalGlobalMem"] / 2**30
            capability = f"{properties['major']}.{properties['minor']}"
            yield (
                f"device {number}",
                f"{properties['name'].decode()}, {memory:.1f} GiB, compute capability {capability}",
            )
        yield "driver", f"CUDA {_cuda_version(runtime.driverGetVersion())}"
        yield "runtime", f"CUDA {_cuda_version(runtime.runtimeGetVersion())}"
    except Exception as error:
        yield "unknown", f"{type(error).__name__}: {error}"


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _threads() -> str:
    """Return how many threads serve NumPy arrays, or what is wrong with the setting."""
    try:
        count, kernels = threads.get_num_threads(), dispatch.kernels()
        variable = kernels.NUM_THREADS
        return f"{count} (CPUs that this process may use, or {variable})" if kernels.cpu else "1"
    except ValueError as error:
        return str(error)


def _print_table(rows: Mapping[str, str], indent: str = "") -> None:
    """Print labelled values, aligned; in a narrow window a long one stands under its label."""
    for label, value in rows.items():
        start = f"{indent}{label:<{_LABEL - len(indent)}}"
        further = " " * _LABEL
        if _width() < _NARROW and len(start) + len(value) > _width():
            print(start.rstrip())
            start = further = f"{indent}    "
        print("\n".join(_wrapped(value, start, further)) or start.rstrip())


def _wrapped(text: str, first: str, further: str) -> list[str]:
    """Wrap a text to the window, between words only: a file's name can then be copied."""
    return textwrap.wrap(
        text,
        _width(),
        initial_indent=first,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _width() -> int:
    """Return how many characters a line may have."""
    return min(_WIDE, shutil.get_terminal_size().columns - 1)


if __name__ == "__main__":
    sys.exit(main())
