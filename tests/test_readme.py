"""The README tells the truth: its blocks run, and its table is what comes out."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import unavailable
from libraries import LIBRARIES

import relu_xp
from relu_xp import functional, layers, variants

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def blocks():
    for number, block in enumerate(BLOCKS):
        marks = [pytest.mark.gpu] if "cupy" in block else []
        yield pytest.param(number, marks=marks, id=f"block{number}")


@pytest.mark.parametrize("number", list(blocks()))
def test_blocks_run(number, request, require):
    if "cupy" in BLOCKS[number]:
        reason = LIBRARIES["cupy"].load()
        if reason:
            unavailable(request.config, reason, gpu=True)
    if "import dask" in BLOCKS[number]:
        require("dask.array")
    names = {}
    for block in BLOCKS[: number + 1]:
        if not re.search("cupy|import dask", block) or block is BLOCKS[number]:
            exec(compile(block, README.name, "exec"), names)


def test_there_are_blocks():
    assert len(BLOCKS) == 9


@pytest.mark.parametrize("module", [functional, layers, variants])
def test_docstring_examples(module):
    failed, tried = doctest.testmod(module)
    assert tried > 0
    assert failed == 0


def test_the_truth_table_is_computed():
    assert table() in README.read_text(), f"the README should have\n{table()}"


def table():
    """Return the README's table, with what is wrong of others' formulas in bold."""
    titles = ["-inf", "-1", "-0.0", "0.0", "1e-40", "3", "inf", "nan"]
    x = np.array([float(title) for title in titles], np.float32)

    def dy(value):
        return np.full_like(x, value)

    relu, tenth = relu_xp.relu(x), np.array([0.1], np.float32)
    gradients = {v: relu_xp.relu_backward(dy(v), x) for v in (np.nan, -1.0)}
    with np.errstate(invalid="ignore"):
        rows = [
            ("relu(x)", relu, relu),
            ("relu_grad(x)", relu_xp.relu_grad(x), None),
            ("relu_backward(nan, x)", gradients[np.nan], None),
            ("relu_backward(-1, x)", gradients[-1], None),
            ("relu6(x)", relu_xp.relu6(x), None),
            ("leaky_relu(x, 0.1)", relu_xp.leaky_relu(x, 0.1), None),
            ("prelu(x, [0.1])", relu_xp.prelu(x, tenth), None),
            ("prelu(x, [0.0])", relu_xp.prelu(x, 0 * tenth), None),
            ("rrelu(x, 0.0, 0.2)", relu_xp.rrelu(x, 0.0, 0.2), None),
            ("crelu(x), first half", *np.split(relu_xp.crelu(x, axis=0), 2)[:1], None),
            ("crelu(x), second half", *np.split(relu_xp.crelu(x, axis=0), 2)[1:], None),
            ("squared_relu(x)", relu_xp.squared_relu(x), None),
            ("x * (x > 0)", x * (x > 0), relu),
            ("(abs(x) + x) / 2", (abs(x) + x) / 2, relu),
            ("np.where(x > 0, x, 0)", np.where(x > 0, x, np.float32(0)), relu),
            ("-1 * (x > 0)", dy(-1) * (x > 0), gradients[-1]),
            ("nan * (x > 0)", dy(np.nan) * (x > 0), gradients[np.nan]),
        ]
    lines = [f"| x | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for title, values, right in rows:
        cells = [f"{float(f'{value:.3g}')}" for value in values]
        if right is not None:
            same = [str(value) == str(other) for value, other in zip(values, right, strict=True)]
            cells = [c if ok else f"**{c}**" for c, ok in zip(cells, same, strict=True)]
        lines.append(f"| `{title}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed(result):
    """Return the tables of the speed section, from what bench.cpu saved."""
    conditions = result["limit"]["conditions"]
    versions = conditions["versions"]
    lines = [
        f"Measured on {conditions['date']}, {conditions['cpus']} CPUs ({conditions['processor']}, "
        f"{conditions['instruction_set']}), Python {conditions['python']}, "
        f"NumPy {versions['numpy']}, PyTorch {versions['torch']}, {conditions['threads']} threads.",
    ]
    for section in ("limit", "layouts", "prelu", "versions", "import"):
        rows = result[section]["rows"]
        for group in dict.fromkeys(row["group"] for row in rows):
            lines += ["", f"| {group} | dtype | measured | wanted |", "|---|---|---|---|"]
            for row in rows:
                if row["group"] == group:
                    value = row["value"]
                    shown = f"{value:.2f}" if isinstance(value, float) else value
                    wanted = row.get("wanted", "")
                    lines.append(f"| {row['case']} | {row.get('dtype', '')} | {shown} | {wanted} |")
    lines += ["", "Small arrays of float32, microseconds:", ""]
    sweep = [row for row in result["sweep"]["rows"] if row["elements"] in (10, 6400)]
    libraries = ("relu_xp", "NumPy", "PyTorch", "autograd")
    lines += [f"| | elements | {' | '.join(libraries)} |", "|---" * (2 + len(libraries)) + "|"]
    for row in sweep:
        cells = [f"{row[name]:.2f}" if name in row else "" for name in libraries]
        lines.append(f"| {row['operation']} | {row['elements']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_its_figures_are_those_of_the_results():
    result = json.loads((README.parent / "bench/results/cpu.json").read_text())
    assert not any(section["conditions"]["quick"] for section in result.values())
    text = speed(result)
    assert text in README.read_text(), f"the README should have\n{text}"


def frameworks(result):
    """Return the table of PyTorch and JAX, from what bench.frameworks saved."""
    shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    lines = [f"| | dtype | {' | '.join(shapes)} |", "|---" * (len(shapes) + 2) + "|"]
    ratios = {}
    for row in result["rows"]:
        what = f"| {row['group']}: {row['operation']} | {row['dtype']} |"
        ratios.setdefault(what, {})[row["shape"]] = f"{row['ratio']:.2f}"
    for what, cells in ratios.items():
        lines.append(f"{what} {' | '.join(cells.get(shape, '') for shape in shapes)} |")
    return "\n".join(lines)


def test_the_figures_of_frameworks_are_those_of_the_results():
    result = json.loads((README.parent / "bench/results/frameworks.json").read_text())
    assert not result["conditions"]["quick"]
    text = frameworks(result)
    assert text in README.read_text(), f"the README should have\n{text}"


def test_the_backend_in_it_is_the_one_that_is_tested():
    code = (README.parent / "tests/plugin/relu_xp_strict.py").read_text()
    assert f"```python\n{code}```" in README.read_text()


def test_nothing_in_it_is_left_to_be_filled_in():
    assert not re.findall("^[A-Z]+$", README.read_text(), re.MULTILINE)
