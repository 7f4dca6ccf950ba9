"""What a release is made of: the wheel has the package only, the sdist what is in the repository.

    package.py FOLDER

In the wheel is the compiled module, in the place of its sources; it asks for no other library than
every Linux of some age has. The folder has one wheel and one sdist, made from this clean clone. The
extras that the other checks do not install have to resolve. For each Python that pyproject.toml
claims, cibuildwheel has a wheel to build.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from sysconfig import get_config_var

# What only the build needs. Of relu_xp/kernels the GPU's part is compiled where there is a GPU.
SOURCES = (
    "*.cpp",
    "*/cpu_kernels.h",
    "*/gradient_sums.h",
    "*/prelu.h",
    "*/strided.h",
    "*/thread_pool.h",
    "*/CMakeLists.txt",
)
LARGEST = 3 << 20  # bytes of a wheel
RESOLVED = {"cuda12": "cupy-cuda12x", "cuda13": "cupy-cuda13x", "rocm7": "cupy-rocm-7-0"}


def main(folder: Path) -> None:
    """Check a wheel and an sdist, and stop at what is wrong."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    ours = {name for name in output("git", "ls-files").splitlines() if not name.startswith(".")}

    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {name for name in ours if name.startswith("relu_xp/")}
    wanted -= {name for name in wanted for pattern in SOURCES if fnmatch(name, pattern)}
    same("wheel", found, wanted | {f"relu_xp/kernels/_cpu{get_config_var('EXT_SUFFIX')}"})
    if (size := wheel.stat().st_size) > LARGEST:
        raise SystemExit(f"the wheel has {size:,} bytes")
    with tarfile.open(sdist) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    same("sdist", found, ours | {"PKG-INFO"})

    tag = json.loads(output("auditwheel", "show", "--json", str(wheel)))["overall_tag"]
    if not tag.startswith("manylinux"):
        raise SystemExit(f"the wheel is for this machine only: auditwheel says {tag}")
    command = ["cibuildwheel", "--print-build-identifiers", "--platform=linux", "--archs=x86_64"]
    found = {name.partition("-")[0] for name in output(*command).split()}
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    claimed = re.findall(r"Python :: (3)\.(\d+)", "\n".join(project["classifiers"]))
    same(
        "list of cibuildwheel's Pythons",
        {n.rstrip("t") for n in found},
        {f"cp{a}{b}" for a, b in claimed},
    )

    for extra, name in RESOLVED.items():
        asked = ["pip", "install", "--quiet", "--dry-run", "--report", "-", f"{wheel}[{extra}]"]
        report = json.loads(output(sys.executable, "-m", *asked))["install"]
        found = {re.sub(r"[-_.]+", "-", one["metadata"]["name"]).lower() for one in report}
        if name not in found:  # an extra that is not there is but a warning of pip's
            raise SystemExit(f"{extra} brings {', '.join(sorted(found))}, and no {name}")
    print(f"{wheel.name} ({size:,} bytes), {sdist.name}: the files of the repository; {tag}")
    print(f"{', '.join(RESOLVED)} resolve")


def output(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def same(what: str, found: set[str], wanted: set[str]) -> None:
    """Stop if two sets of files differ."""
    if found != wanted:
        more, lacking = sorted(found - wanted), sorted(wanted - found)
        raise SystemExit(f"the {what} has {more} that it should not, and lacks {lacking}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
