"""Every README: its Python blocks run, its links resolve, its computed tables are up to date."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
from libraries import LIBRARIES, installed

import relu_xp
import relu_xp.activations

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
for folder in ("relu_xp", "tests", "bench"):
    FILES += sorted((ROOT / folder).rglob("*.md"))
TEXTS = {file.relative_to(ROOT).as_posix(): file.read_text() for file in FILES}


def python_blocks():
    for name, text in TEXTS.items():
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        for number, block in enumerate(blocks):
            # A block that does not import the package continues the one before it.
            code = block if "relu_xp" in block or not number else blocks[number - 1] + block
            yield pytest.param(code, id=f"{name}-{number}")


@pytest.mark.parametrize("code", list(python_blocks()))
def test_blocks_run(code):
    """They only compile where a library or a device is missing: test_libraries.py reports that."""
    compiled, names = compile(code, "README.md", "exec"), {}
    modules = re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)
    if not all(map(installed, modules)) or ("cupy" in modules and LIBRARIES["cupy"].reason):
        return
    exec(compiled, names)
    for name in [name for name in names if name.startswith("test_")]:
        names[name](np)


@pytest.mark.parametrize("name", TEXTS)
def test_links_resolve(name):
    text = re.sub(r"^```.*?^```", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not target.startswith("https://"):
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text()), target
    for path in re.findall(r"`((?:relu_xp|tests|bench)/[\w/.]*\w)(?:::\w+)?`", text):
        assert (ROOT / path).exists(), path


def anchors(text):
    """Return the anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_commands_that_ci_runs_are_blocks():
    commands = re.findall(r"```sh\n(.*?)\n```", TEXTS["README.md"], re.DOTALL)
    assert [command.split()[-1] for command in commands] == ["train", "pytest"]


def test_docstring_examples():
    found = pkgutil.iter_modules(relu_xp.activations.__path__, "relu_xp.activations.")
    results = [doctest.testmod(importlib.import_module(module.name)) for module in found]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0


def test_the_example_backend_is_the_one_that_is_tested():
    code = (ROOT / "tests/plugin/relu_xp_strict.py").read_text()
    assert f"```python\n{code}```" in TEXTS["relu_xp/backends/README.md"]


def markdown(header, rows):
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def special_values():
    """Return the table of special values; what is wrong of the formulas is bold."""
    titles = ["-inf", "-0.0", "0.0", "1e-40", "inf", "nan"]
    x = np.array([float(title) for title in titles], np.float32)
    dy = np.full_like(x, np.nan)
    relu, gradient = relu_xp.relu(x), relu_xp.relu_backward(dy, x)
    with np.errstate(invalid="ignore"):
        rows = [
            ("relu(x)", relu, relu),
            ("relu6(x)", relu_xp.relu6(x), None),
            ("leaky_relu(x, 0.1)", relu_xp.leaky_relu(x, 0.1), None),
            ("relu_grad(x)", relu_xp.relu_grad(x), None),
            ("relu_backward(nan, x)", gradient, None),
            ("x * (x > 0)", x * (x > 0), relu),
            ("(abs(x) + x) / 2", (abs(x) + x) / 2, relu),
            ("np.where(x > 0, x, 0)", np.where(x > 0, x, np.float32(0)), relu),
            ("nan * (x > 0)", dy * (x > 0), gradient),
        ]
    lines = []
    for title, values, right in rows:
        right = values if right is None else right
        same = [str(value) == str(other) for value, other in zip(values, right, strict=True)]
        texts = [str(float(f"{value:.3g}")) for value in values]
        cells = [text if ok else f"**{text}**" for text, ok in zip(texts, same, strict=True)]
        lines.append([f"`{title}`", *cells])
    return markdown(["x", *titles], lines)


def measured(name):
    text = (ROOT / "bench/results" / name).read_text()
    assert '"quick": true' not in text
    return json.loads(text)


def conditions(section):
    it = section["conditions"]
    return (
        f"Measured on {it['date']}: {it['cpus']} CPUs ({it['processor']}, "
        f"{it['instruction_set']}), {it['threads']} threads, Python {it['python']}, "
        f"NumPy {it['versions']['numpy']}, PyTorch {it['versions']['torch']}."
    )


def speed():
    """Return the README's table of speed."""
    section = measured("cpu.json")["sweep"]
    rows = []
    for row in section["rows"]:
        if row["elements"] in (10, 10_000_000):
            times = [row["relu_xp"], row["NumPy"], row.get("PyTorch", row.get("autograd"))]
            cells = [f"{time:,.0f}" if time > 100 else f"{time:.3g}" for time in times]
            rows.append([row["operation"], f"{row['elements']:,}", *cells])
    header = ["microseconds, float32", "elements", "relu_xp", "NumPy", "PyTorch"]
    return f"{conditions(section)}\n\n{markdown(header, rows)}"


def figures():
    """Return the tables of bench/README.md."""
    result = measured("cpu.json")
    texts = [conditions(result["limit"])]
    for section in ("limit", "layouts", "prelu", "bias", "versions", "import"):
        rows = result[section]["rows"]
        for group in dict.fromkeys(row["group"] for row in rows):
            cells = [
                [row["case"], row.get("dtype", ""), f"{row['value']:.2f}", row.get("wanted", "")]
                for row in rows
                if row["group"] == group
            ]
            texts.append(markdown([group, "dtype", "measured", "target"], cells))
    return "\n\n".join(texts)


def frameworks():
    """Return the table of PyTorch and JAX in bench/README.md."""
    result = measured("frameworks.json")
    rows, it = result["rows"], result["conditions"]
    when = f"{it['date']}, PyTorch {it['versions']['torch']}, JAX {it['versions']['jax']}"
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    ratios = {}
    for row in rows:
        what = (f"{row['group']}: {row['operation']}", row["dtype"])
        ratios.setdefault(what, {})[row["shape"]] = f"{row['ratio']:.2f}"
    cells = [[*what, *(ratio.get(shape, "") for shape in shapes)] for what, ratio in ratios.items()]
    return markdown([when, "dtype", *shapes], cells)


def training():
    """Return the table of training steps in bench/README.md, or that there are no figures yet."""
    if not (ROOT / "bench/results/training.json").exists():
        return "Training steps on a CPU: not measured."
    section = measured("training.json")["cpu"]
    cells = {}
    for row in section["rows"]:
        case, _, part = row["group"].rpartition(": ")
        time, ratio = f"{row.get('us', 0):,.0f} us", f"{row.get('value', 0):.2f}"
        if row["candidate"].startswith("matrix products"):
            text = f"{time}, {row['share']:.0%}"
        else:
            text = row.get("note") or (time if row["candidate"].startswith("relu_xp") else ratio)
        cells.setdefault((part, row["candidate"]), {})[case] = text
    cases = list(dict.fromkeys(row["group"].rpartition(": ")[0] for row in section["rows"]))
    order = sorted(cells.items(), key=lambda item: item[0][0])  # steps, then parts of them
    header = ["a step, and without its matrix products", *cases]
    rows = [[name, *(row[case] for case in cases)] for (_, name), row in order]
    versions = section["conditions"]["versions"]
    others = f"{conditions(section)[:-1]}, JAX {versions['jax']}."
    return f"{others}\n\n{markdown(header, rows)}"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("README.md", special_values),
        ("README.md", speed),
        ("bench/README.md", figures),
        ("bench/README.md", frameworks),
        ("bench/README.md", training),
    ],
)
def test_tables_are_computed(name, table):
    text = table()
    assert text in TEXTS[name], f"{name} should have\n{text}"
