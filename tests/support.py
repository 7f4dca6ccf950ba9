"""The table "What ran where" of tests/README.md.

``pytest --junit-xml=FILE`` writes what ran; ``python tests/support.py FILE`` prints the table, and
fails if tests/README.md has another one.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

from libraries import FLOATING, LIBRARIES

TITLES = {
    "compiled": "NumPy",
    "compiled_streaming": "NumPy",
    "numpy": "NumPy, without compiled kernels",
    "cupy": "CuPy",
    "cupy_host": "CuPy's kernels for sm_90, executed on a CPU",
    "cupy_host_75": "the same for sm_75, where they differ",
    "cupy_host_120": "the same for sm_120",
    "torch": "PyTorch",
    "torch_elsewhere": "PyTorch, on another device or traced",
    "jax": "JAX",
    "dask": "Dask",
    "array_api_strict": "array_api_strict",
}
PRESETS = {  # of relu_xp.testing.reference, by the name of the function that each stands for
    "relu": "relu",
    "leaky_relu": "leaky",
    "relu6": "relu6",
    "clipped_relu": "clipped-leaky",
    "thresholded_relu": "thresholded",
}
FUNCTIONS = (*PRESETS, "prelu", "bias_relu", "rrelu", "crelu", "squared_relu")


def properties_of(item):
    """Return what a report is to contain about a test of the rules: library, dtype and function."""
    match = re.fullmatch(r"test_(\w+)_obeys_the_table", item.function.__name__)
    if match is None:
        return []
    parameters, function = item.callspec.params, match[1]
    if function == "relu":
        names = [name for name, preset in PRESETS.items() if preset == parameters["preset"]]
        function = names[0] if names else "relu with other parameters"
    names = {"library": parameters["xp"].name, "dtype": parameters["dtype"], "function": function}
    return list(names.items())


def read(file):
    """Return the properties of each test of the rules that ran, and whether it passed."""
    outcomes = []
    for case in ElementTree.parse(file).iter("testcase"):
        properties = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
        if "library" in properties and case.find("skipped") is None:
            passed = case.find("failure") is None and case.find("error") is None
            outcomes.append({**properties, "passed": passed})
    return outcomes


def cell(rows, names):
    """Return what a table's cell says of the outcomes of a function over some libraries."""
    if not all(row["passed"] for row in rows):
        return "fails"
    ran = {(row["library"], row["dtype"]) for row in rows}
    complete = len(ran) == sum(len(LIBRARIES[name].dtypes) for name in names)
    return "yes" if complete else "in part" if ran else "-"


def table(outcomes):
    """Return the table, in Markdown."""
    lines = [f"| arrays | dtypes | {' | '.join(f'`{name}`' for name in FUNCTIONS)} | not kept |"]
    lines.append("|---" * (len(FUNCTIONS) + 3) + "|")
    for title in dict.fromkeys(TITLES.values()):
        names = [name for name in LIBRARIES if TITLES[name] == title]
        ran = [row for row in outcomes if row["library"] in names]
        dtypes = [dtype for dtype in FLOATING if any(row["dtype"] == dtype for row in ran)]
        cells = [cell([row for row in ran if row["function"] == f], names) for f in FUNCTIONS]
        changed = ["subnormals"] * (not all(LIBRARIES[name].subnormals for name in names))
        changed += ["payload of NaN"] * (not all(LIBRARIES[name].payloads for name in names))
        listed = ", ".join(dtypes) or "not run"
        lines.append(f"| {title} | {listed} | {' | '.join(cells)} | {', '.join(changed)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    text = table(read(sys.argv[1]))
    print(text)
    if text not in Path(__file__).with_name("README.md").read_text():
        sys.exit("tests/README.md has another table")
