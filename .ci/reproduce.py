"""The same bits on every Python that is here, with the oldest and the newest dependencies.

    reproduce.py SOURCES

A wheel for each Python is built of the unpacked sdist. Environments with the newest and the oldest
versions that pyproject.toml allows (of those that have wheels for it), and one with only what the
package needs, get it. In each, `tests/bits.py` runs without compiled kernels and with them, on one
and on two threads, and in one environment with those of each instruction set; and the core of the
tests. Then all digests are compared, with each other and with tests/digests.txt. Warnings are
errors. uv has to be on the PATH. PYTHONS, if set, lists the interpreters; else they are those on
the PATH and pyenv's.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

OLDEST = (3, 11)
STRICT = ("-W", "error", "-P")  # -P: what is installed is tested, not what lies in a folder
EXTRAS = ("test", "demo", "plot", "dask")
INSTRUCTION_SETS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")
CORE = ("tests/activations", "tests/backends/test_numpy.py", "tests/backends/test_layouts.py")


class Environment(NamedTuple):
    """An interpreter, and what is installed for it."""

    python: str
    version: str
    dependencies: str  # newest, oldest or bare

    @property
    def name(self) -> str:
        """Version and dependencies."""
        return f"{self.version}-{self.dependencies}"


def main(sources: Path) -> None:
    """Run everything, and stop at what fails."""
    project = tomllib.loads((sources / "pyproject.toml").read_text())["project"]
    pythons = find_pythons()
    kinds = ["newest", "oldest"]
    environments = [Environment(p, v, k) for (v, p), k in itertools.product(pythons.items(), kinds)]
    environments.insert(0, Environment(sys.executable, version_of(sys.executable), "bare"))
    print(f"Python {', '.join(pythons)}; threads: {', '.join(threads())}", flush=True)
    for claim in sorted(set(claimed(project)) - {v.rstrip("t") for v in pythons}):
        print(f"NOT TRIED: Python {claim} is not here", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            wheels = {v: pool.submit(build, p, v, sources, folder) for v, p in pythons.items()}
            try:
                jobs = [
                    pool.submit(check, e, wheels[e.version].result(), sources, project, folder)
                    for e in environments
                ]
                files = [file for job in jobs for file in job.result()]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        python = str(folder / environments[1].name / "bin/python")
        recorded = sources / "tests/digests.txt"
        run([python, *STRICT, str(sources / "tests/bits.py"), str(recorded), *map(str, files)])
        lines = len(files[-1].read_text().splitlines())
        print(f"{lines} digests, those of {recorded.name}, of {len(files)} runs")


def check(
    environment: Environment, wheel: Path | SystemExit, sources: Path, project: dict, folder: Path
) -> list[Path]:
    """Make an environment, run everything in it, and return where its digests are."""
    start = time.monotonic()
    bare = environment.dependencies == "bare"
    try:
        if isinstance(wheel, SystemExit):
            raise wheel
        python = install(environment, wheel, project, folder)
    except SystemExit as error:
        if environment.version in claimed(project):
            raise
        print(f"NOT TRIED: {environment.name} cannot be had\n{error}", flush=True)
        return []
    files = []
    for setting in settings(environment):
        name = ",".join(f"{key.removeprefix('RELU_XP_')}={value}" for key, value in setting.items())
        file = folder / f"{environment.name},{name}"
        file.write_text(run([python, *STRICT, str(sources / "tests/bits.py")], folder, setting))
        files.append(file)
    bits = time.monotonic() - start
    tests = ""
    if not bare:
        options = ["-q", "-p", "no:cacheprovider"]
        options += ["--xp", "compiled,numpy,array_api_strict"]
        output = run([python, *STRICT, "-m", "pytest", *options, *CORE], sources, cache=folder)
        tests = output.splitlines()[-1]
    if environment.dependencies == "oldest":  # of the other extras, warnings are not ours
        run([python, "-P", "-m", "relu_xp", "train", "--epochs", "2"], folder)
        run([python, "-P", "-m", "relu_xp", "train", "--epochs", "1", "--backend", "dask"], folder)
        picture = f"{environment.name}.png"
        run([python, "-P", "-m", "relu_xp", "plot", "ReLU", "-o", picture], folder)
    seconds = f"{bits:.0f} s, then {time.monotonic() - start - bits:.0f} s"
    print(f"{environment.name} ({seconds}): {versions(python, project)} {tests}", flush=True)
    return files


def settings(environment: Environment) -> list[dict[str, str]]:
    """Return the environment variables of each run of tests/bits.py."""
    found = [{"RELU_XP_NATIVE": "0"}]
    found += [{"RELU_XP_NUM_THREADS": count} for count in threads()]
    if environment.dependencies == "bare":
        found += [{"RELU_XP_CPU": name} for name in instruction_sets()]
    return found


def instruction_sets() -> list[str]:
    """Return those that this processor has, and say which it has not."""
    flags = Path("/proc/cpuinfo").read_text().split()
    needed = dict(zip(INSTRUCTION_SETS, ("sse4_2", "avx2", "avx512bw"), strict=True))
    for name, flag in needed.items():
        if flag not in flags:
            print(f"NOT TRIED: {name}, which this processor lacks", flush=True)
    return [name for name, flag in needed.items() if flag in flags]


def build(python: str, version: str, sources: Path, folder: Path) -> Path | SystemExit:
    """Build a wheel for a Python, and return it; or the error, if that Python may be absent."""
    out = folder / f"wheel-{version}"
    try:
        run(["uv", "build", "--quiet", "--wheel", "--python", python, "-o", str(out), str(sources)])
    except SystemExit as error:
        return error
    (wheel,) = out.glob("*.whl")
    return wheel


def install(environment: Environment, wheel: Path, project: dict, folder: Path) -> str:
    """Make an environment, and return its interpreter."""
    python = str(folder / environment.name / "bin/python")
    run(["uv", "venv", "--quiet", "--python", environment.python, str(Path(python).parents[1])])
    given = list(project["dependencies"])
    if environment.dependencies != "bare":
        given += extras(project, EXTRAS if environment.dependencies == "oldest" else EXTRAS[:1])
    # Direct is what is given here: the wheel's own requirements would not be.
    resolution = "lowest-direct" if environment.dependencies == "oldest" else "highest"
    options = ["--quiet", "--only-binary", ":all:", "--resolution", resolution, "--python", python]
    run(["uv", "pip", "install", *options, str(wheel), *given])
    where = run([python, "-P", "-c", "import relu_xp; print(relu_xp.__file__)"], folder)
    assert where.startswith(str(folder)), f"relu_xp is not the wheel's: {where}"
    return python


def versions(python: str, project: dict) -> str:
    """Return what there is in an environment of what the package asks for."""
    asked = project["dependencies"] + extras(project, EXTRAS)
    names = {re.split(r"\W*[<>=\[]", one)[0] for one in asked}
    frozen = run(["uv", "pip", "freeze", "--quiet", "--python", python]).splitlines()
    return ", ".join(line for line in frozen if line.split("==")[0] in names)


def extras(project: dict, names: Sequence[str]) -> list[str]:
    """Return what the package's extras ask for, but for each other."""
    every = project["optional-dependencies"]
    return [one for name in names for one in every[name] if not one.startswith(project["name"])]


def claimed(project: dict) -> list[str]:
    """Return the Pythons that pyproject.toml says are supported."""
    matches = (re.search(r"Python :: (3\.\d+)$", one) for one in project["classifiers"])
    return [match[1] for match in matches if match]


def threads() -> list[str]:
    """Return the numbers of threads to try: no more than there are CPUs."""
    return ["1", "2"] if len(os.sched_getaffinity(0)) > 1 else ["1"]


def find_pythons() -> dict[str, str]:
    """Return interpreters by version: 3.13, or 3.13t for a free-threaded one."""
    given = os.environ.get("PYTHONS", "").split()
    candidates = given or [sys.executable]
    if not given:
        names = [f"python3.{minor}{kind}" for minor in range(OLDEST[1], 30) for kind in ("", "t")]
        candidates += filter(None, map(shutil.which, names))
        root = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
        candidates += sorted(map(str, root.glob("versions/*/bin/python")))
    found: dict[str, str] = {}
    for candidate in candidates:
        version = version_of(candidate)
        if version:
            found.setdefault(version, candidate)
        elif given:
            raise SystemExit(f"{candidate} of PYTHONS is no CPython from {OLDEST} on")
    return dict(sorted(found.items(), key=lambda item: int(item[0].split(".")[1].rstrip("t"))))


def version_of(python: str) -> str | None:
    """Return an interpreter's version, or None if it does not work or is too old."""
    script = (
        "import sys, sysconfig; assert sys.implementation.name == 'cpython'; "
        "v = sys.version_info; print(v.releaselevel, v.major, v.minor, "
        "sysconfig.get_config_var('Py_GIL_DISABLED') or 0)"
    )
    try:
        asked = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode or not asked.stdout.startswith("final"):  # pyenv's shims, for example
        return None
    _, major, minor, free = asked.stdout.split()
    return f"{major}.{minor}{'t' * int(free)}" if (int(major), int(minor)) >= OLDEST else None


def run(
    command: list[str],
    folder: Path | None = None,
    setting: dict[str, str] | None = None,
    cache: Path | None = None,
) -> str:
    """Run a command in a folder and return its output; or show it, and fail."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")}
    if command[0] != "uv" and (cache := cache or folder):
        environment["XDG_CACHE_HOME"] = str(cache / "cache")
    environment |= setting or {}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
