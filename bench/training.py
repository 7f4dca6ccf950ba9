"""A training step of a multilayer perceptron: relu_xp, PyTorch, JAX, and NumPy's textbook layers.

Every candidate has two threads, or the device. The matrix products of relu_xp's and of PyTorch's
step are also timed alone: what remains of a step is all that is not a matrix product. README.md,
beside this file, has more.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import relu_xp
from bench import report
from bench.cpu import instruction_set
from bench.gpu_device import Device, missing
from bench.harness import Run, Timings, interleave, module, normal, warm_seconds
from bench.report import Row, judged, progress
from bench.training_steps import THREADS, ArrayStep, JaxStep, Textbook, TorchStep

SMALL, WIDE = (64, 128, 128, 10), (784, 1024, 1024, 10)
OURS, TEXTBOOK, TORCH, COMPILED = "relu_xp", "textbook's layers", "PyTorch", "torch.compile"
OPTIMIZERS: dict[str, dict[str, bool]] = {  # of PyTorch eager, where the fastest counts
    TORCH: {},
    "PyTorch, SGD(foreach=True)": {"foreach": True},
    "PyTorch, SGD(fused=True)": {"fused": True},
}
MULTIPLIED_BY = {OURS: OURS, TEXTBOOK: OURS, **dict.fromkeys(OPTIMIZERS, TORCH)}
PRODUCTS, REST = "matrix products of ", ", without its matrix products"
COLUMNS = ("candidate", "us", "value", "share", "wanted", "reached", "note")
STEPS = 3  # after which the candidates' losses and parameters are compared


class Case(NamedTuple):
    """A network and a batch, and the targets: relu_xp's speed over that of another."""

    sizes: tuple[int, ...]
    batch: int
    eager: str = ""
    compiled: str = ""
    rest: str = ""  # PyTorch eager, all that is not a matrix product

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.sizes))}, batch of {self.batch}"

    def problem(self) -> tuple[list[Any], Any, Any]:
        """Return weights (He et al., 2015), images and labels."""
        weights = [
            normal(shape, np.float32, seed) * np.float32(math.sqrt(2 / shape[0]))
            for seed, shape in enumerate(itertools.pairwise(self.sizes))
        ]
        x = normal((self.batch, self.sizes[0]), np.float32, 7)
        return weights, x, np.random.default_rng(8).integers(0, self.sizes[-1], self.batch)


class Effort(NamedTuple):
    """How much to measure."""

    cases: tuple[Case, ...]
    sample: float  # seconds that a timing takes, about
    seconds: float  # for each candidate
    rounds: int  # at least


CASES = (
    Case(SMALL, 32, eager=">=1.5", compiled=">=1.2"),
    Case(WIDE, 64),
    Case(WIDE, 256, rest=">=1.3"),
    Case(WIDE, 4096),
)
FULL = Effort(CASES, 0.05, 4.0, 15)
QUICK = Effort((CASES[0]._replace(eager="", compiled=""), Case((20, 30, 10), 8)), 0.002, 0.0, 2)


class Processor:
    """Two threads of the processor."""

    def __init__(self) -> None:
        relu_xp.set_num_threads(THREADS)
        if threadpoolctl := module("threadpoolctl"):  # without it, OpenBLAS uses every processor
            threadpoolctl.threadpool_limits(THREADS, "blas")

    def candidates(self) -> dict[str, Callable[..., Any]]:
        """Return what makes each candidate of a problem."""
        torch: Any = TorchStep
        return {
            OURS: ArrayStep,
            TEXTBOOK: partial(ArrayStep, layer=Textbook),
            **{name: partial(torch, **options) for name, options in OPTIMIZERS.items()},
            COMPILED: partial(torch, compiled=True, fused=True),
            "JAX, jit": JaxStep,
        }

    seconds = staticmethod(warm_seconds)
    stream = staticmethod(contextlib.nullcontext)
    graphs = ()  # the candidates that are also run as a CUDA graph

    def conditions(self) -> Row:
        """Return what figures depend on."""
        return {"threads": THREADS, "instruction_set": instruction_set()}


class Accelerator(Device):
    """A CUDA device."""

    stream = Device.side_stream  # on which a graph can be captured
    graphs = (OURS, "PyTorch, SGD(fused=True)")

    def candidates(self) -> dict[str, Callable[..., Any]]:
        """Return what makes each candidate of a problem."""
        torch: Any = partial(TorchStep, device="cuda")
        return {
            OURS: partial(ArrayStep, xp=self.xp),
            TEXTBOOK: partial(ArrayStep, layer=Textbook, xp=self.xp),
            **{name: partial(torch, **options) for name, options in OPTIMIZERS.items()},
            COMPILED: partial(torch, compiled=True, fused=True),
        }


class Expected(NamedTuple):
    """What relu_xp computes on NumPy: losses, and parameters before the first step and at last."""

    losses: list[float]
    before: list[Any]
    after: list[Any]

    @classmethod
    def of(cls, case: Case, steps: int) -> Expected:
        """Make some steps."""
        it = ArrayStep(*case.problem())
        before = [array.copy() for array in it.parameters()]
        return cls([float(it.step()) for _ in range(steps)], before, it.parameters())

    def check(self, losses: list[float], parameters: list[Any]) -> None:
        """Raise an error unless a candidate has these losses and has learned the same.

        Single parameters may differ: rounding decides on which side of 0 a sum is.
        """
        same = np.allclose(losses, self.losses[: len(losses)], rtol=1e-3)
        for found, before, after in zip(parameters, self.before, self.after, strict=True):
            same &= bool(np.linalg.norm(found - after) < 0.01 * np.linalg.norm(after - before))
        if not same:
            raise ArithmeticError("losses and parameters are not those of relu_xp on NumPy")


@contextlib.contextmanager
def _noted(notes: dict[str, str], name: str) -> Iterator[None]:
    """Note why a candidate is not measured."""
    try:
        yield
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        notes[name] = textwrap.shorten(f"{type(error).__name__}: {line}", 200)


def _ready(device: Any, case: Case) -> tuple[dict[str, Run], dict[str, str]]:
    """Return the candidates, and their products, as functions; and why others do not work."""
    runs: dict[str, Run] = {}
    notes: dict[str, str] = {}
    expected = [Expected.of(case, steps) for steps in (STEPS, 2 * STEPS)]
    candidates = device.candidates()
    for name, make in candidates.items():
        progress(f"{case}: {name}")
        with _noted(notes, name):
            it = make(*case.problem())
            losses = [float(it.step()) for _ in range(STEPS)]
            expected[0].check(losses, it.parameters())
            if name in (OURS, TORCH):
                runs[f"{PRODUCTS}{name}"] = _repeated(it.products)
            runs[name] = _repeated(it.step)
    for name in device.graphs:  # last: they write into memory that is free once they are captured
        with _noted(notes, label := f"{name}, CUDA graph"):
            it = candidates[name](*case.problem())
            run = _repeated(it.step)
            run(STEPS)
            replay = device.captured(name.partition(",")[0], run)
            replay(STEPS)
            device.synchronize()
            expected[1].check([], it.parameters())
            runs[label] = partial(_replayed, replay, it)
    return runs, notes


def _replayed(replay: Run, it: Any, calls: int) -> None:
    """Replay a graph that works on the arrays of `it`, which are kept for it."""
    replay(calls)


def _repeated(step: Callable[[], Any]) -> Run:
    def run(calls: int) -> None:
        loss: Any = None
        for _ in range(calls):
            loss = step()
        if hasattr(loss, "block_until_ready"):  # JAX returns before it has computed
            loss.block_until_ready()

    return run


def _timings(device: Any, runs: Mapping[str, Run], effort: Effort) -> Timings:
    """Return the times of all steps and products, and of what remains of a step without them."""
    calls = {name: math.ceil(effort.sample / device.seconds(run, 1)) for name, run in runs.items()}
    timers = {name: partial(device.seconds, run, calls[name]) for name, run in runs.items()}
    timings = interleave(timers, seconds=effort.seconds * len(runs), rounds=effort.rounds)
    for name in [name for name in timings if name in MULTIPLIED_BY]:
        pairs = zip(timings[name], timings[f"{PRODUCTS}{MULTIPLIED_BY[name]}"], strict=True)
        timings[f"{name}{REST}"] = [step - products for step, products in pairs]
    return timings


def _rows(case: Case, timings: Timings, notes: Mapping[str, str]) -> list[Row]:
    """Return a row for each candidate's step, and one for its part that is no matrix product."""
    steps: list[Row] = [{"candidate": name, "note": note} for name, note in notes.items()]
    rests: list[Row] = []
    for name in [name for name in timings if not name.endswith(REST)]:
        row: Row = {"candidate": name, **timings.microseconds(name).cells("us")}
        if name.startswith(PRODUCTS):
            rests.append(row | {"share": timings.ratio(name, name.removeprefix(PRODUCTS)).median})
            continue
        row |= timings.ratio(name, OURS).cells("value")
        wanted = case.eager if name in OPTIMIZERS else case.compiled * (name == COMPILED)
        steps.append(row | judged(row["value"], wanted))
        if (rest := f"{name}{REST}") in timings:
            row = {"candidate": rest, **timings.microseconds(rest).cells("us")}
            row |= timings.ratio(rest, f"{OURS}{REST}").cells("value")
            row["share"] = timings.ratio(rest, name).median
            rests.append(row | judged(row["value"], case.rest * (name in OPTIMIZERS)))
    groups = {f"{case}: a step": steps, f"{case}: without its matrix products": rests}
    return [{"group": group, **row} for group, rows in groups.items() for row in rows]


def measure(device: Any, effort: Effort) -> Iterator[list[Row]]:
    """Time every candidate of every case."""
    for case in effort.cases:
        with device.stream():
            runs, notes = _ready(device, case)
            yield _rows(case, _timings(device, runs, effort), notes)


def main() -> None:
    """Measure, print and save."""
    parser = report.command_line("training", __doc__)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="default: cpu")
    options = parser.parse_args()
    if options.device == "gpu" and (reason := missing()):
        print(f"bench.training: nothing is measured, there is no CUDA device: {reason}")
        return
    options.section = [options.device]  # the file keeps the figures of the other device
    path, result = report.opened(options)
    device: Any = Accelerator() if options.device == "gpu" else Processor()
    conditions = report.conditions("torch", "jax", quick=options.quick) | device.conditions()
    effort = QUICK if options.quick else FULL
    rows = report.measure(options.device, measure(device, effort), conditions, result, path)
    report.print_table(rows, COLUMNS)


if __name__ == "__main__":
    main()
