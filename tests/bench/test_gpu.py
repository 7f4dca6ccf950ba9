"""bench.gpu without a device: all but the device's own work, over NumPy and PyTorch's CPU."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import relu_xp


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    bench = importlib.import_module("bench.gpu")
    assert bench.relu_xp is relu_xp  # the one that is installed: it was imported first
    monkeypatch.setattr(bench, "GRAPH_SIZES", (1 << 6,))
    return bench


@pytest.fixture
def torch(require):
    require("ml_dtypes")
    return require("torch")


class Device:
    """What stands in for a device; a call's seconds are what `times` says for its code."""

    xp = np
    l2 = 1 << 12
    full = (MemoryError,)
    side_stream = contextlib.nullcontext
    numpy = staticmethod(np.copy)
    free = synchronize = staticmethod(lambda: None)
    conditions = staticmethod(lambda: {"device": "NumPy"})

    def __init__(self, torch=None, times=lambda code: 1e-3, **kernels):
        self.torch, self.times, self.timed, self.kernels = torch, times, [], kernels

    def seconds(self, run, calls):
        code = run.__code__.co_filename
        run(1)
        self.timed.append((code, calls))
        return self.times(code)

    host_seconds = seconds

    def captured(self, library, run):
        return eval(compile("lambda calls: run(calls)", "replay", "eval"), {"run": run})

    def names(self):
        names = {"cupy": np, "copy": np.copyto}
        names["chainer_forward"] = lambda x, y: np.maximum(x, 0, out=y)
        names["chainer_backward"] = lambda y, dy, dx: np.copyto(dx, np.where(y > 0, dy, 0))
        if self.torch:
            names |= {"torch": self.torch, "aten": self.torch.ops.aten, "compiled_relu": None}
            names |= {"compiled_bias_relu": None, "compiled_bias_back": None}
        return names | self.kernels


def rows_of(gpu, name, device, dtypes=("float32",), sizes=(1 << 10,)):
    """Return the rows of a section."""
    effort = gpu.Effort(dtypes, sizes, rounds=2, sample=1e-3)
    return [row for batch in gpu.SECTIONS[name](device, effort) for row in batch]


def only(rows, **wanted):
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    return row


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_case_is_right(gpu, torch, dtype):
    rows = rows_of(gpu, "passes", Device(torch), dtypes=(dtype,))
    assert len(rows) == len(gpu.PASSES)
    refused = [row for row in rows if row["library"] == "compiled"]
    note = "not measured: TypeError: 'NoneType' object is not callable"
    assert [row["note"] for row in refused] == [note] * 3
    assert [row for row in rows if "note" in row] == refused


def test_a_wrong_result_is_not_timed(gpu):
    device = Device(
        chainer_forward=lambda x, y: None,  # leaves what was there
        chainer_backward=lambda y, dy, dx: np.copyto(dx, dy),
    )
    rows = rows_of(gpu, "passes", device)
    for name, array in (("forward", "y"), ("backward", "dx")):
        note = only(rows, library="Chainer", **{"pass": name})["note"]
        assert note == f"not measured: ArithmeticError: {array} is not what NumPy computes"
    assert not [code for code, _ in device.timed if "chainer" in code]


@pytest.mark.parametrize("wrong", ["rows_y[0, 0] += 1", "mask[0] ^= 1", "rows_y[-1, -1] = -1"])
def test_a_wrong_sum_is_not_timed(gpu, wrong, monkeypatch):
    case = gpu.Case("bias forward", "relu_xp", f"{gpu.gpu_cases.BIAS_FORWARD}; {wrong}", "y mask")
    monkeypatch.setattr(gpu, "PASSES", (gpu.COPY, case))
    note = only(rows_of(gpu, "passes", Device()), library="relu_xp")["note"]
    array = "mask" if "mask" in wrong else "y"
    assert note == f"not measured: ArithmeticError: {array} is not what NumPy computes"


def test_ratios(gpu, torch):
    seconds = {
        gpu.COPY.code: 2.0,
        "relu_xp.relu_vjp(x, out=y, mask=mask)": 3.0,
        "torch.clamp_min(tx, 0, out=ty)": 6.0,
        "aten.relu.out(tx, out=ty)": 4.0,
    }
    device = Device(torch, lambda code: seconds.get(code, 7.0))
    rows = rows_of(gpu, "passes", device)
    row = only(rows, code="relu_xp.relu_vjp(x, out=y, mask=mask)")
    nbytes = (2 * 4 + 1 / 8) * 1024
    assert (row["us"], row["GB/s"]) == pytest.approx((3e6, 1e-9 * nbytes / 3))
    assert row["share"] == pytest.approx(nbytes / (2 * 4 * 1024) * 2 / 3)
    assert row["over_PyTorch"] == pytest.approx(4 / 3)  # over its fastest


def test_what_does_not_fit_is_omitted_and_the_rest_is_measured(gpu):
    rows = rows_of(gpu, "passes", Device(), sizes=(1 << 60, 1 << 8))
    (note,) = {row["note"] for row in rows if row["elements"] == 1 << 60}
    assert "MemoryError" in note
    forward = only(rows, code="relu_xp.relu(x, out=y)", elements=1 << 8)
    assert "over_CuPy" in forward
    assert "over_PyTorch" not in forward  # it is not there
    absent = "not measured: ImportError: there is no PyTorch with CUDA"
    assert only(rows, library="autograd", elements=1 << 8)["note"] == absent


def test_the_host(gpu):
    times = {"relu_xp.relu(x)": 1e-6, "cupy.maximum(x, 0)": 2e-6}
    rows = rows_of(gpu, "host", Device(times=lambda code: times.get(code, 3e-6)))
    row = only(rows, code="relu_xp.relu(x)", shape="64x64")
    assert (row["against"], row["ratio"], row["reached"]) == ("cupy.maximum(x, 0)", 0.5, True)


def test_graphs(gpu, torch):
    device = Device(torch, lambda code: 1e-6 if code == "replay" else 4e-6)
    rows = rows_of(gpu, "graphs", device)
    assert [row["library"] for row in rows] == ["relu_xp", "PyTorch"]
    assert {row["faster"] for row in rows} == {4.0}
    device.captured = lambda library, run: lambda calls: None  # computes nothing
    ours, _ = rows_of(gpu, "graphs", device)
    assert ours["note"] == "not measured: ArithmeticError: y is not what NumPy computes"


def test_targets(gpu):
    ratios = {"share": 0.96, "over_PyTorch": 1.3, "over_CuPy": None}
    rows = [
        {"dtype": dtype, "elements": size, "pass": name, "code": code, **ratios}
        for dtype in gpu.DTYPES
        for size in (1 << 12, 1 << 27)
        for name, code in gpu.OURS.items()
    ]
    judged = gpu.targets(rows)
    assert {row["elements"] for row in judged} == {1 << 27}
    reached = {(row["pass"], row["wanted"], row["dtype"]): row["reached"] for row in judged}
    assert reached["forward", ">=0.95", "float64"]
    assert not reached["backward", ">=1.4", "float32"]
    assert not reached["both", ">=1.6", "float32"]  # not measured
    assert ("both", ">=2.5", "float64") not in reached


def test_a_run_is_saved_and_printed(gpu, torch, monkeypatch, tmp_path, capsys):
    path = tmp_path / "results" / "gpu.json"
    monkeypatch.setattr(gpu, "QUICK", gpu.Effort(("float32",), (1 << 10, 1 << 8), 2, 1e-3))
    monkeypatch.setattr(gpu, "missing", lambda: "")
    monkeypatch.setattr(gpu, "Device", lambda: Device(torch))
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick", "--json", str(path)])
    gpu.main()
    result = json.loads(path.read_text())
    assert set(result) == {"passes", "targets", "host", "graphs"}
    assert all(section["rows"] for section in result.values())
    conditions = result["passes"]["conditions"]
    assert conditions["quick"]
    assert {"cupy", "torch", "numpy", "relu_xp"} <= set(conditions["versions"])
    assert "times not measured: TypeError" in capsys.readouterr().out
