"""The command line as a whole: help, errors, interrupts, tables and files."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import relu_xp
from relu_xp.cli import _shared, main, train

COMMANDS = ("info", "plot", "train", "formulas")


def printed(capsys, *arguments):
    """Return what a command prints that ends in argparse's own way."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_and_version(capsys):
    out = printed(capsys, "--help")
    assert all(re.search(f"^ +{command} ", out, re.MULTILINE) for command in COMMANDS)
    assert main([]) == 0
    assert capsys.readouterr() == (out, "")
    assert printed(capsys, "--version") == f"relu-xp {relu_xp.__version__}\n"


@pytest.mark.parametrize("command", [(), *((one,) for one in COMMANDS)])
def test_help_fits_a_narrow_window_and_an_ascii_terminal(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "40")
    out = printed(capsys, *command, "--help")
    assert max(map(len, out.splitlines())) <= 40
    assert out.isascii()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("info '--no\nsuch'", "unrecognized arguments: --no such"),
        ("train --epochs 0", "argument --epochs: 0 is less than 1"),
        ("train --epochs 1.5", "argument --epochs: invalid integer value: '1.5'"),
        ("train --seed 'x\ny'", "argument --seed: invalid integer value: 'x\\ny'"),
        ("train --scheduler tcp://a:1", "argument --scheduler: only with --backend dask"),
        ("train --plot no/c.png", "argument --plot: cannot write 'no/c.png': No such file"),
        ("formulas --backend 'a\nb'", "backend 'a\\nb' is not installed; "),
        ("formulas --dtype int32", "argument --dtype: invalid choice: 'int32'"),
        ("formulas --shape 0x5", "argument --shape: '0x5' is not a shape"),
        ("formulas --json .", "argument --json: cannot write '.': Is a directory"),
        ("formulas --plot t.gif", "argument --plot: 't.gif' must end in .png or .svg"),
        ("plot Softplus", "argument LAYER: invalid choice: 'Softplus'"),
        ("plot ReLU6 --max-value 3", "argument --max-value: ReLU6 does not take it"),
        ("plot --threshold nan", "threshold must be finite, got nan"),
        ("plot --curves x", "argument --curves: invalid choice: 'x'"),
        ("plot -o no/x.png", "argument -o/--output: cannot write 'no/x.png': No such file"),
    ],
)
def test_a_bad_request_is_one_line_and_writes_nothing(refused, quick, command, message):
    assert refused(*shlex.split(command)).startswith(message)
    assert quick == []


@pytest.mark.parametrize(
    ("module", "command", "message"),
    [
        ("sklearn.datasets", "train", "scikit-learn is needed .*: pip install scikit-learn$"),
        ("tqdm", "train --backend numpy", "tqdm is needed .*: pip install tqdm$"),
        ("matplotlib.figure", "plot", "matplotlib is needed .*: pip install matplotlib$"),
        ("torch", "train --backend torch", "backend 'torch' is not installed; .* numpy"),
        ("distributed", "train --backend dask --scheduler tcp://a:1", ".*: pip install distribut"),
    ],
)
def test_a_missing_package_is_one_line(refused, monkeypatch, module, command, message):
    monkeypatch.setitem(sys.modules, module, None)
    assert re.match(message, refused(*command.split()))


@pytest.mark.parametrize(("variable", "value"), [("NUM_THREADS", "two"), ("CPU", "z80")])
def test_an_invalid_variable_is_one_line(
    native, process, without_libraries, monkeypatch, variable, value
):
    monkeypatch.setenv(f"RELU_XP_{variable}", value)
    result = process("formulas", "--backend", "numpy", path=[without_libraries])
    assert (result.returncode, result.stdout) == (2, "")
    message = f"RELU_XP_{variable} must be .*?, got {value!r}"
    assert re.fullmatch(f"relu-xp formulas: error: {message}\n", result.stderr)
    result = process("info", path=[without_libraries])
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(message, " ".join(result.stdout.split()))


def test_ctrl_c_is_130_without_a_traceback(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupt)
    assert main(["train", "--backend", "numpy"]) == 130
    assert capsys.readouterr().err == "relu-xp train: interrupted\n"


def test_no_optional_library_is_imported():
    names = ["cupy", "dask", "distributed", "jax", "matplotlib", "sklearn", "torch", "tqdm"]
    script = f"import sys, relu_xp.cli; print([n for n in {names} if n in sys.modules])"
    command = [sys.executable, "-P", "-c", script]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"[]\n"


def test_by_default_cupy_where_it_works_else_numpy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert _shared.choose_library() == _shared.choose_library("numpy")
    assert _shared.choose_library().device == "cpu"
    working = SimpleNamespace(asarray=np.asarray)  # for a CuPy with a device
    monkeypatch.setitem(sys.modules, "cupy", working)
    assert _shared.choose_library().name == "cupy"


# ---- pictures, tables and files

PICTURES = {  # commands, and texts in their pictures
    "plot BiasReLU --threshold 0.5 -o": ["x + bias", "BiasReLU(1, threshold=0.5)"],
    "plot PReLU --init 0.5 -o": ["f'(x)", " threshold: 0 ", "PReLU(1, init=0.5, axis=1)"],
    "train --plot": ["epoch", "Digits classifier: numpy, seed 5, test accuracy 97.5%"],
    "formulas --plot": ["x[x &lt; 0] = 0", "NaN at -inf; writes x", "right", "125", "62.5"],
}
LAYERS = {one.__name__ for one in vars(relu_xp).values() if hasattr(one, "forward")}


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_the_picture_of_a_layer_is_named_after_it(require, tmp_path, capsys, monkeypatch, layer):
    image = require("matplotlib.image")
    monkeypatch.chdir(tmp_path)
    assert main(["plot", layer.lower(), "--backend", "numpy"]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name == f"{layer}.png"
    printed = capsys.readouterr().out.split()
    assert (printed[1].startswith(f"{layer}("), printed[-1]) == (True, file.name)
    height, width, _ = image.imread(file).shape
    assert width > 3 * height > 1000


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("command", PICTURES)
def test_a_picture_is_replaced_and_the_same_each_time(tmp_path, command):
    file = tmp_path / "a.SVG"
    file.write_bytes(b"old")
    pictures = []
    for _ in range(2):
        assert main([*command.split(), str(file), "--backend", "numpy"]) == 0
        pictures.append(file.read_bytes())
    assert pictures[0] == pictures[1]
    assert list(tmp_path.iterdir()) == [file]
    for text in PICTURES[command]:  # matplotlib keeps each text as a comment
        assert f"<!-- {text} -->" in pictures[0].decode()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("command", [*PICTURES, "formulas --json"])
def test_a_disk_that_fails_leaves_the_old_file(refused, tmp_path, monkeypatch, command):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    file = tmp_path / "old.png"
    file.write_bytes(b"old")
    message = refused(*command.split(), str(file), "--backend", "numpy")
    assert message == f"cannot write {str(file)!r}: No space left on device"
    assert file.read_bytes() == b"old"


def test_tables_fit_a_narrow_window_but_words_stay_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    file = f"/a/long/folder-with-a-name{'/of/several/parts' * 4}.png"
    _shared.print_table({"loss": "0.5", "figure": file, "kernels": "some words in a row " * 4})
    loss, figure, *lines = capsys.readouterr().out.splitlines()
    assert [loss, figure] == ["loss                0.5", f"figure              {file}"]
    assert max(map(len, lines)) < 40
    assert " ".join(lines).split() == ["kernels", *["some", "words", "in", "a", "row"] * 4]


def test_a_file_is_replaced_with_its_permissions_and_a_link_stays_one(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"old")
    file.chmod(0o600)
    link.symlink_to(file)
    _shared.write_file(str(link), None)
    assert file.read_bytes() == b"old"
    _shared.write_file(str(link), b"new")
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (b"new", 0o600)
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [file, link]
    with pytest.raises(OSError, match="^cannot write .*: Not a directory$"):
        _shared.write_file(f"{file}/curve.png", None)


def test_a_pipe_or_a_device_is_written_into(tmp_path):
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    _shared.write_file(pipe, None)  # without a reader
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    _shared.write_file(pipe, b"whole")
    assert reader.communicate(timeout=10)[0] == b"whole"
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)
    _shared.write_file(os.devnull, b"nothing")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
