"""What the benchmarks report: ratios and targets, conditions, tables and JSON files."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import relu_xp
from bench.harness import Timings

Row = dict[str, Any]  # of a table and of the JSON

RESULTS = Path(__file__).with_name("results")

_STARTED = time.perf_counter()


def judged(value: float, target: str) -> Row:
    """Return the cells for a target such as ``>=0.95``: itself, and whether a value reaches it."""
    if not target:
        return {}
    sign, limit = target[:2], float(target[2:])
    return {"wanted": target, "reached": value >= limit if sign == ">=" else value <= limit}


def compared(
    timings: Timings | None, numerator: str, denominator: str, target: str = "", name: str = "value"
) -> Row:
    """Return the cells for the ratio of two candidates' times, and the times in microseconds."""
    codes = numerator, denominator
    if timings is None or not all(code in timings for code in codes):
        return {name: "not measured"}
    spread = timings.ratio(*codes)
    times = {code: timings.microseconds(code).median for code in codes}
    return spread.cells(name) | judged(spread.median, target) | {"us": times}


def cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor(field: str) -> str:
    """Return a field of Linux's description of the first processor, or an empty string."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith(field)), "")


def conditions(*packages: str, quick: bool) -> dict[str, Any]:
    """Return what figures depend on: date, machine and versions."""
    versions = {"relu_xp": relu_xp.__version__}
    for package in ("numpy", "array-api-compat", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor("model name") or platform.processor(),
        "cpus": cpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "quick": quick,
    }


def command_line(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of ``python -m bench.<name>``, with the options of every benchmark."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    add, default = parser.add_argument, f"bench/results/{name}.json"
    add("--quick", action="store_true", help="smaller, shorter; writes nothing without --json")
    add("--json", type=Path, metavar="FILE", help=f"where to write; default: {default}")
    parser.set_defaults(name=name, pictures=False, section=None)
    return parser


def opened(options: argparse.Namespace) -> tuple[Path | None, Row]:
    """Return the file to write, and those of its sections that are not measured again."""
    path: Path | None = options.json
    if path is None and (options.pictures or not options.quick):
        path = RESULTS / f"{options.name}.json"
    keep = (options.pictures or options.section) and path and path.exists()
    return path, json.loads(path.read_text()) if path and keep else {}


def measure(
    name: str, section: Iterable[list[Row]], conditions: Row, result: Row, path: Path | None
) -> list[Row]:
    """Return the rows of a section, saved in a result after each batch lest a failure lose them."""
    rows: list[Row] = []
    for batch in section:
        rows += rounded(batch)
        result[name] = {"conditions": conditions, "rows": rows}
        save(path, result)
    return rows


def rounded(rows: Sequence[Row]) -> list[Row]:
    """Return rows with four significant digits of each figure: its spread is larger than that."""
    text = json.dumps(rows)
    found: list[Row] = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.4g}"))
    return found


def save(path: Path | None, result: Row) -> None:
    """Write a result as JSON, if there is a path."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")  # a run that is stopped leaves the file whole
        part.write_text(json.dumps(result, indent=2) + "\n")
        part.replace(path)


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Print some columns of the rows, with ``row["group"]`` above those that share it."""
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    titles, *lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
    group = None
    for row, line in zip(rows, lines, strict=True):
        if row["group"] != group:
            group = row["group"]
            print(f"\n{group}\n{titles}")
        print(line)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, dict):
        return " / ".join(map(str, value.values()))
    return "" if value is None else textwrap.shorten(str(value), 56, placeholder=" ...")


def progress(text: str) -> None:
    """Print to stderr what is measured next, and the time since the start."""
    print(f"[{time.perf_counter() - _STARTED:4.0f} s] {text}", file=sys.stderr, flush=True)
