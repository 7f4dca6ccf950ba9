"""The README's table of libraries and members, from what a run of the tests has passed.

``pytest --ran=FILE`` writes what ran; ``python tests/support.py FILE`` prints the table, and fails
if the README has another one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from libraries import FLOATING, LIBRARIES

README = Path(__file__).parents[1] / "README.md"

TITLES = {
    "native": "NumPy",
    "native_streaming": "NumPy",
    "numpy": "NumPy, without compiled kernels",
    "cupy": "CuPy",
    "cupy_host": "CuPy's kernels, on a CPU",
    "torch": "PyTorch",
    "torch_elsewhere": "PyTorch, on another device or traced",
    "jax": "JAX",
    "dask": "Dask",
    "array_api_strict": "array_api_strict",
}
# The oracle's member that stands for a function; other functions have tests whose name begins with
# theirs.
FAMILY = {
    "relu": "relu",
    "leaky_relu": "leaky",
    "relu6": "relu6",
    "clipped_relu": "clipped-leaky",
    "thresholded_relu": "thresholded",
}
VARIANTS = ("prelu", "rrelu", "crelu", "squared_relu")
PASSES = ("test_forward", "test_grad", "test_backward_from_input", "test_vjp")


def function_of(test, member):
    """Return the function that a test of the truth table speaks of, or None."""
    for name in VARIANTS:
        if test.startswith(f"test_{name}_"):
            return name
    if test in PASSES:
        return next((name for name, stands in FAMILY.items() if stands == member), None)
    return None


class Ran:
    """A pytest plugin that collects what ran, and writes it to a file at the end."""

    def __init__(self, file):
        self.file = file
        self.outcomes = []

    def pytest_runtest_logreport(self, report):
        properties = dict(report.user_properties)
        if "library" in properties and (report.when == "call" or report.failed):
            self.outcomes.append({**properties, "passed": report.passed})

    def pytest_sessionfinish(self, session):
        if not hasattr(session.config, "workerinput"):  # of pytest-xdist: the others report to us
            Path(self.file).write_text(json.dumps(self.outcomes))


def properties_of(item):
    """Return what a report is to say of a test over the libraries."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    function = function_of(item.function.__name__, parameters.get("member"))
    if function is None or "dtype" not in parameters or isinstance(parameters["xp"], str):
        return []
    return [
        ("library", parameters["xp"].name),
        ("dtype", parameters["dtype"]),
        ("function", function),
    ]


def table(outcomes):
    """Return the table, in Markdown."""
    functions = [*FAMILY, *VARIANTS]
    lines = [f"| arrays | dtypes | {' | '.join(f'`{name}`' for name in functions)} | not kept |"]
    lines.append("|---" * (len(functions) + 3) + "|")
    for title in dict.fromkeys(TITLES.values()):
        names = [name for name in LIBRARIES if TITLES[name] == title]
        ran = [one for one in outcomes if one["library"] in names]
        dtypes = [dtype for dtype in FLOATING if any(one["dtype"] == dtype for one in ran)]
        cells = []
        for function in functions:
            rows = [one for one in ran if one["function"] == function]
            whole = {(one["library"], one["dtype"]) for one in rows if one["passed"]}
            failed = [one for one in rows if not one["passed"]]
            complete = whole and len(whole) == sum(len(LIBRARIES[name].dtypes) for name in names)
            cells.append("fails" if failed else "yes" if complete else "in part" if whole else "-")
        limits = [
            text
            for text, kept in (
                ("subnormals", all(LIBRARIES[name].subnormals for name in names)),
                ("payload of NaN", all(LIBRARIES[name].payloads for name in names)),
            )
            if not kept
        ]
        listed = ", ".join(dtypes) if ran else "not run"
        lines.append(f"| {title} | {listed} | {' | '.join(cells)} | {', '.join(limits)} |")
    return "\n".join(lines)


def main():
    """Compare the README's table with that of a run."""
    text = table(json.loads(Path(sys.argv[1]).read_text()))
    print(text)
    if text not in README.read_text():
        sys.exit("The README has another table of libraries and members.")


if __name__ == "__main__":
    main()
