"""bench.gpu without a device: all but the device's own work, over NumPy and PyTorch's CPU."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import unavailable

import relu_xp

ROOT = Path(__file__).parents[1]
NO_DEVICE = r"bench\.gpu: nothing is measured, there is no CUDA device: .+\n"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    bench = importlib.import_module("bench.gpu")
    assert bench.relu_xp is relu_xp  # the one that is installed: it was imported first
    return bench


@pytest.fixture
def torch(require):
    return require("torch")


@pytest.fixture
def compile_for(require, request):
    cupy = require("cupy")
    pathfinder = require("cuda.pathfinder")
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        unavailable(request.config, f"NVRTC is not installed: {error}")
    if pathfinder.find_nvidia_header_directory("cudart") is None:
        unavailable(request.config, "the CUDA headers are not installed")
    return require("cupy_host").compile_for


class Card:
    """What the bench takes for a device; a call's seconds are what `times` says for its code."""

    xp = np
    l2 = 1 << 12
    full = (MemoryError,)
    memory = 1 << 40

    def __init__(self, torch=None, times=lambda code: 1e-3):
        self.torch, self.times, self.timed = torch, times, []

    def conditions(self):
        return {"device": "NumPy"}

    def free(self):
        return self.memory

    def copy(self, target, source):
        np.copyto(target, source)

    def poison(self, array):
        array.view(np.uint8)[...] = 0xFF

    def numpy(self, array):
        return array.copy()

    def synchronize(self):
        pass

    def seconds(self, run, calls):
        code = getattr(run, "code", None) or run.__code__.co_filename
        run(1)
        self.timed.append((code, calls))
        return self.times(code)

    host_seconds = seconds
    side_stream = contextlib.nullcontext

    def captured(self, library, run):
        replay = functools.partial(run)
        replay.code = f"replay: {run.__code__.co_filename}"
        return replay

    def compiled_relu(self):
        def refused(x):
            raise RuntimeError("no compiler\nand more lines")

        return refused

    def kernels(self, dtype):
        def forward(x, y):
            np.maximum(x, 0, out=y)

        def backward(x, dy, dx):
            dx[...] = np.where(x > 0, dy, 0)

        def unsupported(*arrays):
            raise TypeError("of float32 only")

        return {
            "chainer_forward": forward,
            "chainer_backward": backward,
            "thinc_forward": unsupported,
            "thinc_backward": backward,
        }


def effort(gpu, *, dtypes=("float32",), sizes=(1 << 10,), rounds=2):
    return gpu.Effort(dtypes, sizes, rounds, sample=1e-3, host_calls=1)


def rows_of(section):
    return [row for more in section for row in more]


def only(rows, **wanted):
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    return row


@pytest.mark.parametrize("arguments", [(), ("--quick",), ("--tune",)])
def test_without_a_device_it_says_so_and_writes_nothing(tmp_path, arguments):
    files = tmp_path / "gpu.json", tmp_path / "gpu.png"
    command = [sys.executable, "-W", "error", "-m", "bench.gpu", *arguments]
    ran = subprocess.run(
        [*command, "--json", files[0], "--plot", files[1]],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.fullmatch(NO_DEVICE, ran.stdout)
    assert list(tmp_path.iterdir()) == []


def test_without_cupy_it_says_so(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "module", lambda name: None)
    assert gpu.missing() == "CuPy is not installed"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_way_of_ours_and_of_pytorch_is_right(gpu, torch, require, dtype):
    require("ml_dtypes")
    rows = rows_of(gpu.passes(Card(torch), effort(gpu, dtypes=(dtype,))))
    refused = {row["library"] for row in rows if "note" in row}
    assert refused == {"compiled", "thinc"}
    assert len(rows) == sum(len(passed.ways) for passed in gpu.PASSES.values())
    both = only(rows, library="compiled", elements=1024)
    assert both["note"] == "not measured: RuntimeError: no compiler"
    assert {r["note"] for r in rows if r["library"] == "thinc" and "note" in r} == {
        "not supported: TypeError: of float32 only"
    }


def test_a_wrong_result_is_not_timed(gpu):
    card = Card()
    card.kernels = lambda dtype: {
        "chainer_forward": lambda x, y: None,  # leaves what was there
        "chainer_backward": lambda y, dy, dx: np.copyto(dx, dy),
    }
    rows = rows_of(gpu.passes(card, effort(gpu)))
    for passed, name in (("forward", "y"), ("backward", "dx")):
        note = only(rows, library="Chainer", **{"pass": passed})["note"]
        assert note == f"not measured: ArithmeticError: {name} is not what NumPy makes of it"
    assert not [code for code, _ in card.timed if "chainer" in code]


def test_figures(gpu, torch):
    seconds = {
        gpu.COPY.code: 2.0,
        "relu_xp.relu(x, out=y)": 1.0,
        "relu_xp.relu_vjp(x, out=y, mask=mask)": 3.0,
        "cupy.maximum(x, 0, out=y)": 5.0,
        "torch.clamp_min(tx, 0, out=ty)": 6.0,
        "aten.relu.out(tx, out=ty)": 4.0,
    }
    card = Card(torch, lambda code: seconds.get(code, 7.0))
    rows = rows_of(gpu.passes(card, effort(gpu)))
    forward = only(rows, code="relu_xp.relu(x, out=y)")
    assert forward["us"] == pytest.approx(1e6)
    assert forward["GB/s"] == pytest.approx(1e-9 * 2 * 4 * 1024)
    assert forward["share"] == pytest.approx(2.0)
    assert forward["over_PyTorch"] == pytest.approx(4.0)  # over its fastest
    assert forward["over_CuPy"] == pytest.approx(5.0)
    masked = only(rows, code="relu_xp.relu_vjp(x, out=y, mask=mask)")
    assert masked["GB/s"] == pytest.approx(1e-9 * (2 * 4 + 1 / 8) * 1024 / 3)
    assert masked["share"] == pytest.approx((2 * 4 + 1 / 8) / (2 * 4) * 2 / 3)


def test_ratios_are_those_of_a_round_and_candidates_take_turns(gpu):
    clock = iter(range(1, 10_000))
    card = Card(times=lambda code: next(clock))
    runs = {name: gpu.looped(name, [{"x": 1}], {}) for name in ("+x", "-x", "~x")}
    rounds = gpu._rounds(card, runs, effort(gpu, rounds=3))
    timed = [code for code, _ in card.timed]
    assert timed[:6] == ["+x", "-x", "~x"] * 2  # how many calls it takes
    assert timed[6:] == ["+x", "-x", "~x", "~x", "-x", "+x"] * 2
    # The first round is dropped; in the others +x was timed at 12, 13 and 18.
    assert rounds.median("+x") == 13
    assert rounds.spread(lambda a, b: a - b, "+x", "~x").median == 2


def test_a_timing_is_long_enough(gpu):
    card = Card(times=lambda code: 0.3e-3)
    gpu._rounds(card, {"x": gpu.looped("x", [{"x": 1}], {})}, effort(gpu))
    assert [calls for _, calls in card.timed] == [3, 4, 4, 4, 4]


def test_sets_take_turns(gpu):
    seen = []
    sets = [{"x": number, "unused": None} for number in range(3)]
    run = gpu.looped("seen.append(x)", sets, {"seen": seen})
    run(1)
    run(4)
    assert seen == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("elements", [1, 100, 1 << 12])
def test_more_than_the_l2_passes_before_a_set_is_used_again(gpu, elements):
    sets = gpu._sets(Card(), "float32", (elements,), gpu._count(Card(), "float32", elements))
    arrays = [one[name] for one in sets for name in ("x", "dy", "y", "dx")]
    assert sum(array.nbytes for array in arrays) >= 4 * Card.l2
    assert all(array.any() for one in sets for array in (one["x"], one["dy"]))
    starts = {array.ctypes.data for array in arrays}
    assert len(starts) == len(arrays)


def test_what_does_not_fit_is_left_out(gpu):
    card = Card()
    card.memory = 1 << 16
    rows = rows_of(gpu.passes(card, effort(gpu, sizes=(1 << 20, 1 << 8))))
    large = [row for row in rows if row["elements"] == 1 << 20]
    assert {row["note"] for row in large} == {"not measured: needs 0.0463 GB, 6.55e-05 GB are free"}
    assert "us" in only(rows, code="relu_xp.relu(x, out=y)", elements=1 << 8)


def test_memory_that_runs_out_is_no_end(gpu):
    def times(code):
        raise MemoryError("out of it")

    rows = rows_of(gpu.passes(Card(times=times), effort(gpu)))
    ours = [row["note"] for row in rows if row["library"] == "relu_xp"]
    assert set(ours) == {"not measured: MemoryError: out of it"}


def test_without_pytorch_the_rest_is_measured(gpu):
    rows = rows_of(gpu.passes(Card(), effort(gpu)))
    assert "note" in only(rows, library="autograd")
    forward = only(rows, code="relu_xp.relu(x, out=y)")
    assert "over_PyTorch" not in forward
    assert "over_CuPy" in forward


def test_the_host(gpu, torch):
    times = {"relu_xp.relu(x)": 1e-6, "cupy.maximum(x, 0)": 2e-6}
    card = Card(torch, lambda code: times.get(code, 3e-6))
    rows = rows_of(gpu.host(card, effort(gpu)))
    assert len(rows) == len(gpu.HOST) * len(gpu.SMALL_SHAPES)
    assert not [row for row in rows if "note" in row]
    row = only(rows, code="relu_xp.relu(x)", shape="64 x 64")
    assert (row["against"], row["ratio"], row["reached"]) == ("cupy.maximum(x, 0)", 0.5, True)


def test_graphs(gpu, torch, monkeypatch):
    monkeypatch.setattr(gpu, "GRAPH_SIZES", (1 << 6,))
    card = Card(torch, lambda code: 1e-6 if code.startswith("replay") else 4e-6)
    rows = rows_of(gpu.graphs(card, effort(gpu)))
    assert [row["library"] for row in rows] == ["relu_xp", "PyTorch"]
    assert {row["faster"] for row in rows} == {4.0}


def test_a_graph_that_does_not_work_is_noted(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "GRAPH_SIZES", (1 << 6,))
    card = Card()
    card.captured = lambda library, run: lambda calls: None  # computes nothing
    ours, theirs = rows_of(gpu.graphs(card, effort(gpu)))
    assert ours["note"] == "not measured: ArithmeticError: y is not what NumPy makes of it"
    assert theirs["note"] == "not measured: there is no PyTorch with CUDA"


def made_rows(gpu, sizes=(1 << 12, 1 << 27), **cells):
    """Return rows as `passes` would, all alike but for `cells` of ours."""
    rows = []
    for dtype in gpu.DTYPES:
        for elements in sizes:
            for name, passed in gpu.PASSES.items():
                for way in passed.ways:
                    row = {"dtype": dtype, "elements": elements, "pass": name}
                    row |= {"library": way.library, "code": way.code, "us": 1.0, "GB/s": 4000.0}
                    row |= {"share": 0.96, "over_PyTorch": 1.3, "over_CuPy": 2.0}
                    rows.append(row | (cells if way.library == "relu_xp" else {}))
    return rows


def test_targets(gpu):
    judged = gpu.targets(made_rows(gpu))
    reached = {
        (row["target"].partition(":")[0], row["wanted"], row["dtype"]): row["reached"]
        for row in judged
    }
    assert {row["elements"] for row in judged} == {1 << 27}
    for dtype in gpu.DTYPES:
        assert reached["forward", ">=0.95", dtype]
        assert not reached["backward", ">=1.4", dtype]
        assert reached["both", ">=1.2", dtype]
    assert reached["both", ">=1.6", "float32"]
    assert not reached["both", ">=2.5", "float16"]
    assert not reached["both", ">=2.5", "bfloat16"]
    assert ("both", ">=2.5", "float64") not in reached


def test_a_target_that_is_not_measured_is_not_reached(gpu, capsys):
    judged = gpu.targets(made_rows(gpu, over_PyTorch=None))
    assert not [row for row in judged if row["wanted"] == ">=1.2" and row["reached"]]
    gpu.report({"targets": {"rows": judged}})
    assert "not measured" in capsys.readouterr().out


def test_a_run_is_saved_and_printed_and_drawn(gpu, torch, require, monkeypatch, tmp_path, capsys):
    require("matplotlib")
    require("ml_dtypes")
    path = tmp_path / "results" / "gpu.json"
    quick = effort(gpu, dtypes=("float32", "bfloat16"), sizes=(1 << 10, 1 << 8))
    monkeypatch.setattr(gpu, "QUICK", quick)
    monkeypatch.setattr(gpu, "GRAPH_SIZES", (1 << 6,))
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "Card", lambda: Card(torch))
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick", "--json", str(path)])
    gpu.main()
    result = json.loads(path.read_text())
    assert set(result) == {"passes", "targets", "host", "graphs"}
    for section in result.values():
        assert section["rows"]
        conditions = section["conditions"]
        assert conditions["quick"]
        assert conditions["settings"]["rounds"] == quick.rounds
        assert {"cupy", "torch", "numpy", "relu_xp"} <= set(conditions["versions"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) < 60
    assert max(map(len, printed)) <= 140
    assert any("not reached" in line for line in printed)
    assert any("times not measured: RuntimeError: no compiler" in line for line in printed)
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "gpu-bandwidth.png",
        "gpu.json",
    ]

    monkeypatch.setattr(gpu, "missing", lambda: pytest.fail("needs no device"))
    picture = tmp_path / "other.png"
    again = ["gpu", "--pictures", "--json", str(path), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", again)
    gpu.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines() == printed


def test_all_tables_are_short(gpu, capsys):
    rows = made_rows(gpu, sizes=gpu.FULL.sizes)
    result = {"passes": rows, "targets": gpu.targets(rows)}
    gpu.report({name: {"rows": rows} for name, rows in result.items()})
    assert len(capsys.readouterr().out.splitlines()) <= 45


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_kernels_compile(gpu, compile_for, require, monkeypatch, dtype):
    require("ml_dtypes")
    import cupy
    import cupy_host
    from cupy._core import core

    card = object.__new__(gpu.Card)
    card.xp, sources = cupy, []
    card.raw = lambda source, blocks, threads=0: sources.append(source)
    elementwise = [kernel for kernel in card.kernels(dtype).values() if kernel]
    assert (len(elementwise), len(sources)) == (2, 2)
    for kernel in elementwise:
        types, layouts = [gpu._number(dtype)] * kernel.nargs, [(1, True)] * (kernel.nargs + 1)
        compile_for(cupy_host.source(kernel, types, layouts)[0], 90)
    monkeypatch.setattr(core, "_cupy_header_list", [])  # a RawKernel has what it includes
    for source in [*sources, *(gpu.raw_source(name, dtype) for name in gpu.TUNED)]:
        compile_for(source, 90)


def test_a_launcher_is_made_for_so_many_chunks(gpu, require):
    require("cupy")
    backend = require("relu_xp.backends.cupy")
    before = backend._CHUNKS
    launchers = {chunks: gpu._launcher("forward", "float32", chunks) for chunks in (1, 4)}
    assert launchers[4]._tile == 4 * launchers[1]._tile
    for chunks, launcher in launchers.items():
        assert f"vectorized<{chunks}>" in launcher._vectorized.operation
    assert before == backend._CHUNKS
    assert f"vectorized<{before}>" in backend.kernel("forward", "", True).operation
