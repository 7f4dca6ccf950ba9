"""The command line without a home, UTF-8, a reader, a wide terminal or a writable folder."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys

import pytest
from libraries import unavailable

from relu_xp.cli import _shared, main

COMMANDS = (
    "info",
    "plot --backend numpy -o {}.png",
    "train --backend numpy --epochs 1 --plot {}.png",
    "formulas --backend numpy --shape 9 --repeats 1 --json {}.json --plot {}.svg",
)
SHORT = ("--help", "info", "formulas --backend numpy --shape 9")
OTHERS = "(numpy: |Matplotlib |Fontconfig ).*"  # what tqdm and matplotlib write on stderr


@pytest.fixture
def complete(require, process, monkeypatch, tmp_path):
    """Return a function that runs a command in an empty folder, with a name for its files.

    That asserts the status, the files and that stderr has no line of this package.
    """
    require("matplotlib"), require("sklearn"), require("tqdm")
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(command, name, **options):
        result = process(*shlex.split(command.replace("{}", name)), **options)
        assert re.sub(OTHERS, "", result.stderr.replace("\r", "\n")).strip() == ""
        assert result.returncode == 0
        files = {name + suffix for suffix in re.findall(r"\{\}(\.\w+)", command)}
        made = {file.name for file in folder.iterdir()} - {"~"}  # of CuPy, which has a cache
        assert made == files
        return result.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_no_home_and_no_entry_of_the_user(complete, monkeypatch, tmp_path, command):
    """As in a container that runs under any number of a user."""
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, pwd\n"
        "pwd.getpwuid = lambda uid: {}[uid]\n"
        "try:\n"
        "    pathlib.Path.home()\n"
        "except RuntimeError:\n"
        "    print('no home')\n"
    )
    out = complete(command, "file", path=[tmp_path])
    assert out.startswith("no home\n")
    assert not re.search("not available: (?!cuda)", out), "a library needs a home"


# ---- terminals


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_terminal_without_cyrillic(complete, monkeypatch, without_libraries, command, encoding):
    """In the name of a file, or in a message that a library has from the system."""
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("LC_ALL", "C")
    no = "\u043d\u0435\u0442"
    (without_libraries / "cupy.py").write_text(f"import sys\nsys.exit('{no}')\n", "utf-8")
    out = complete(command, "\u0436", path=[without_libraries])
    assert out.isascii()
    assert (ascii(no)[1:-1] if command == "info" else r"\u") in out


def test_characters_that_the_terminal_lacks_are_escapes(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    _shared.print_table({"caf\xe9": "\xe9", "file": "\u0436.png"})
    sys.stdout.flush()
    lines = ["caf\xe9".ljust(20) + "\xe9", "file".ljust(20) + r"\u0436.png"]
    assert written.getvalue().decode("cp1252").splitlines() == lines


@pytest.mark.parametrize("columns", [1, 20])
def test_a_very_narrow_terminal(capsys, monkeypatch, columns):
    """Words stay whole."""
    monkeypatch.setenv("COLUMNS", str(columns))
    _shared.print_table({"figure": "a b-c", "none": "", "test accuracy": "97.50 %"})
    printed = capsys.readouterr().out
    assert printed.split() == ["figure", "a", "b-c", "none", "test", "accuracy", "97.50", "%"]
    with pytest.raises(SystemExit, match="^0$"):
        main(["formulas", "--help"])
    assert "--repeats" in capsys.readouterr().out


# ---- streams


@pytest.fixture
def shell(without_libraries):
    """Return a function that runs a script in which `run` is the command line.

    That returns what is on stdout, and the lines on stderr but for progress bars.
    """
    command = f'run() {{ {shlex.quote(sys.executable)} -P -m relu_xp "$@"; }}'
    paths = [str(without_libraries), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": ""}

    def run(script):
        result = subprocess.run(
            ["sh", "-c", f"{command}\n{script}"],
            capture_output=True,
            text=True,
            env=os.environ | variables,
            timeout=300,
        )
        return result.stdout, re.sub(OTHERS, "", result.stderr.replace("\r", "\n")).strip()

    return run


@pytest.mark.parametrize("command", ["", *SHORT])
def test_a_reader_that_stops_early_is_no_error(shell, command):
    """It has stopped before the second command begins."""
    script = f"(run; run {command}; echo status $? >&2) | head -n 1"
    out, errors = shell(script)
    assert out.startswith("usage: ")
    assert errors == "status 0"


@pytest.mark.parametrize("command", SHORT)
def test_streams_that_are_closed(shell, command):
    closed = (">&-", "2>&-", ">&- 2>&- <&-")
    out, errors = shell("\n".join(f"run {command} {one}; echo status $?" for one in closed))
    assert re.findall("^status .*", out, re.MULTILINE) == ["status 0"] * 3
    assert errors == ""


def test_a_full_disk_is_one_line(request, shell):
    if not os.path.exists("/dev/full"):
        unavailable(request.config, "no /dev/full")
    errors = "relu-xp info: error: [Errno 28] No space left on device"
    assert shell("run info >/dev/full; echo status $?") == ("status 2\n", errors)


# ---- files


@pytest.mark.parametrize("command", ["plot", "train --plot ReLU.png", "formulas --json ReLU.png"])
def test_a_folder_that_is_read_only_is_one_line(
    require, process, unprivileged, monkeypatch, tmp_path, without_libraries, command
):
    require("matplotlib")
    folder = tmp_path / "here"
    folder.mkdir(0o555)
    monkeypatch.chdir(folder)
    result = process(*command.split(), path=[without_libraries], before=unprivileged)
    assert (result.returncode, result.stdout) == (2, "")
    message = r"relu-xp \w+: error: (argument .*: )?cannot write 'ReLU.png': Permission denied\n"
    assert re.fullmatch(f"(Fontconfig .*\n)*{message}", result.stderr)
    assert list(folder.iterdir()) == []
