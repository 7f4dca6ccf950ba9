"""The harness of the benchmarks: which candidate is timed when, and what is made of the times."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import relu_xp


@pytest.fixture
def bench(monkeypatch):
    """Make ``bench`` importable beside the package that is installed, which is imported first."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    names = ("baselines", "harness", "report")
    return Namespace(**{name: importlib.import_module(f"bench.{name}") for name in names})


def test_candidates_take_turns_and_a_ratio_is_of_one_round(bench):
    clock = iter(range(1, 100))
    timings = bench.harness.interleave(dict.fromkeys("abc", lambda: next(clock)), rounds=3)
    assert timings == {"a": [6, 7, 12], "b": [5, 8, 11], "c": [4, 9, 10]}  # not the first round
    ratio = timings.ratio("a", "c")
    assert ratio.median == 12 / 10
    assert ratio.quartiles == pytest.approx(((7 / 9 + 1.2) / 2, (1.2 + 1.5) / 2))


def test_a_warm_timing_is_of_the_calls_after_the_first(bench, monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(bench.harness.time, "perf_counter", lambda: clock[0])
    busy = iter([0.0, 0.02, 0.02, 0.03, 0.03, 0.04])  # of the process: another thread runs once
    monkeypatch.setattr(bench.harness.time, "process_time", lambda: next(busy))
    rests = []

    def rest(copying):
        rests.append(copying)
        clock[0] += 0.01

    monkeypatch.setattr(bench.harness, "_rest", rest)

    def run(count):
        calls.append(count)
        clock[0] += 2.0 * count

    assert bench.harness.warm_seconds(run, 5) == pytest.approx(2.0)
    assert calls == [1, 5]
    assert rests == [False, False]


def test_sets_take_turns(bench):
    seen = []
    sets = [{"x": number, "unused": None} for number in range(3)]
    run = bench.harness.looped("seen.append(x)", {"seen": seen}, sets)
    run(1)
    run(4)
    assert seen == [0, 1, 2, 0, 1]


def test_code_runs_only_where_its_names_are(bench):
    codes = "y, back = f(x); back(y)", "torch.relu(x)"
    assert bench.harness.free_names(codes[0]) == {"f", "x"}
    assert list(bench.harness.runnable(codes, {"f": None, "x": None})) == [codes[0]]


def test_a_comparison_has_target_times_and_quartiles(bench):
    timings = bench.harness.Timings({"ours": [2e-6, 2e-6], "theirs": [3e-6, 3e-6]})
    row = bench.report.compared(timings, "theirs", "ours", ">=1.6")
    assert row.pop("us") == pytest.approx({"ours": 2.0, "theirs": 3.0})
    assert row == {"value": 1.5, "value_quartiles": [1.5, 1.5], "wanted": ">=1.6", "reached": False}
    assert bench.report.compared(timings, "theirs", "ours", "<=1.6")["reached"]
    assert bench.report.compared(timings, "theirs", "absent") == {"value": "not measured"}


def test_each_batch_is_saved_and_other_sections_stay(bench, tmp_path):
    path = tmp_path / "results" / "cpu.json"
    options = Namespace(json=path, quick=True, pictures=False, section=["new"], name="cpu")
    bench.report.save(path, {"old": 1})
    _, result = bench.report.opened(options)

    def section():
        yield [{"value": 1.23456}]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.report.measure("new", section(), {"quick": True}, result, path)
    rows = {"conditions": {"quick": True}, "rows": [{"value": 1.235}]}
    assert json.loads(path.read_text()) == {"old": 1, "new": rows}
    assert [file.name for file in path.parent.iterdir()] == ["cpu.json"]
    options.json = None
    assert bench.report.opened(options) == (None, {})  # a quick run writes what is asked for only


def test_an_earlier_package_is_imported_beside_ours(bench, tmp_path):
    (tmp_path / "relu_xp").mkdir()
    (tmp_path / "relu_xp/__init__.py").write_text("def relu():\n    from relu_xp import late")
    (tmp_path / "relu_xp/late.py").write_text("")
    path, ours = list(sys.path), sys.modules["relu_xp"]
    earlier, commit = bench.baselines.earlier(tmp_path, lambda package: package.relu())
    assert Path(earlier.__file__).parents[1] == tmp_path
    assert commit == tmp_path.name
    assert sys.modules["relu_xp"] is ours is relu_xp
    assert "relu_xp.late" not in sys.modules
    assert sys.path == path
