"""The command line: what it prints, and that what is wrong with a request is one line."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from libraries import LIBRARIES

import relu_xp
from relu_xp import __main__ as command_line
from relu_xp import dispatch, files, plotting, training
from relu_xp.__main__ import main

ROOT = Path(relu_xp.__file__).parent.parent


@pytest.fixture(autouse=True)
def window(monkeypatch):
    """A window of the usual width, whatever the one is like that the tests run in."""
    monkeypatch.setenv("COLUMNS", "80")


def run(*arguments, path=()):
    """Run the command line as a process of its own."""
    paths = [*map(str, path), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, "-P", "-m", "relu_xp", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


@pytest.fixture
def quick(monkeypatch):
    """Let `train` return at once: what is tested is what comes before and after."""
    result = training.Result("numpy", "cpu", 5, (1.25, 0.5), (0.8, 0.975), 12345.6)
    calls = []

    def train(*arguments, **keywords):
        calls.append((arguments, keywords))
        return result

    monkeypatch.setattr(training, "train", train)
    return calls


# ---- train


def test_the_default_run_recognises_97_percent(require, capsys):
    require("sklearn"), require("tqdm")
    assert main(["train", "--backend", "numpy"]) == 0
    out, err = capsys.readouterr()
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines())
    assert list(lines) == [
        "backend",
        "device",
        "seed",
        "loss",
        "test accuracy",
        "images a second",
    ]
    assert (lines["backend"], lines["device"], lines["seed"]) == ("numpy", "cpu", "0")
    assert float(lines["test accuracy"].removesuffix(" %")) >= 97
    assert float(lines["loss"]) < 0.1
    assert int(lines["images a second"].replace(",", "")) > 0
    assert f"{training.EPOCHS}/{training.EPOCHS}" in err, "no progress bar"
    assert "test accuracy 9" in err


def test_options_reach_the_training(require, quick, capsys):
    require("sklearn"), require("tqdm")
    assert main(["train", "--backend", "numpy", "--epochs", "2", "--seed", "5"]) == 0
    assert quick == [(("numpy",), {"epochs": 2, "seed": 5, "progress": True})]
    assert capsys.readouterr().out.split("\n") == [
        "backend             numpy",
        "device              cpu",
        "seed                5",
        "loss                0.5000",
        "test accuracy       97.50 %",
        "images a second     12,346",
        "",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: '0' is not a whole number, 1 or greater"),
        (["--epochs", "-1"], "argument --epochs: '-1' is not a whole number, 1 or greater"),
        (["--epochs", "abc"], "argument --epochs: 'abc' is not a whole number, 1 or greater"),
        (["--epochs", "1.5"], "argument --epochs: '1.5' is not a whole number, 1 or greater"),
        (["--epochs", ""], "argument --epochs: '' is not a whole number, 1 or greater"),
        (["--epochs"], "argument --epochs: expected one argument"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number, 0 or greater"),
        (["--seed", "x\ny"], "argument --seed: 'x\\ny' is not a whole number, 0 or greater"),
        (["--scheduler", "tcp://a:1"], "argument --scheduler: only with --backend dask"),
        (["--backend", "json"], "backend 'json' is not an array API library"),
        (["--backend", "a\nb"], "backend 'a\\nb' is not installed; there is numpy"),
        (["--backend", "no_such"], "backend 'no_such' is not installed; there is numpy"),
    ],
)
def test_a_bad_value_is_one_line(require, refused, quick, arguments, message):
    require("sklearn"), require("tqdm")
    assert refused("train", *arguments).startswith(message)
    assert quick == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a command: info, plot, train or formulas (relu-xp --help tells more)"),
        (["nonsense"], "argument COMMAND: invalid choice: 'nonsense'"),
        (["info", "--no\nsuch"], "unrecognized arguments: --no such"),
    ],
)
def test_a_bad_command_is_one_line(refused, arguments, message):
    assert refused(*arguments, program="relu-xp").startswith(message)


def test_cupy_without_a_device_says_so(require, refused, request):
    require("cupy")
    if LIBRARIES["cupy"].load() is None:
        pytest.skip("CuPy has a device here")
    message = refused("train", "--backend", "cupy")
    assert re.match("backend 'cupy' is not available: .*(CUDA|cuda)", message)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("sklearn.datasets", [], r"training needs scikit-learn .*: pip install scikit-learn tqdm"),
        ("tqdm", [], r"training needs .* tqdm .*: pip install scikit-learn tqdm"),
        ("matplotlib", ["--plot", "c.png"], r"a picture needs .*: pip install matplotlib"),
        ("torch", ["--backend", "torch"], "backend 'torch' is not installed; there is numpy"),
        ("jax", ["--backend", "jax"], "backend 'jax' is not installed; there is numpy"),
        (
            "distributed",
            ["--backend", "dask", "--scheduler", "tcp://a:1"],
            r"a scheduler needs distributed .*: pip install distributed",
        ),
    ],
)
def test_a_missing_package_is_one_line(
    require, refused, quick, monkeypatch, tmp_path, module, arguments, message
):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    if module == "distributed":
        require("dask")
    if module in (
        "torch",
        "jax",
        "distributed",
    ):  # the demo's own packages come first, and may be missing too
        monkeypatch.setattr(training, "require_extra", lambda: None)
    assert re.match(message, refused("train", *arguments))
    assert quick == []
    assert list(tmp_path.iterdir()) == []


def test_no_traceback_from_a_process():
    result = run("train", "--backend", "json")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("relu-xp train: error: ")
    assert len(result.stderr.splitlines()) == 1


def test_ctrl_c_is_130_without_a_traceback(require, monkeypatch, capsys):
    require("sklearn"), require("tqdm")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupt)
    assert main(["train", "--backend", "numpy"]) == 130
    assert capsys.readouterr().err == "relu-xp train: interrupted\n"


# ---- train --plot


@pytest.fixture
def pictures(require):
    """What a test that draws needs."""
    require("matplotlib"), require("sklearn"), require("tqdm")


@pytest.mark.usefixtures("pictures")
def test_a_png(quick, capsys, tmp_path):
    file = tmp_path / "curve.png"
    file.write_bytes(b"an old picture")
    assert main(["train", "--backend", "numpy", "--plot", str(file)]) == 0
    assert "learning curve" in capsys.readouterr().out
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width >= 600
    assert height >= 400
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


@pytest.mark.usefixtures("pictures")
def test_an_svg(quick, capsys, tmp_path):
    file = tmp_path / "curve.SVG"
    assert main(["train", "--backend", "numpy", "--plot", str(file)]) == 0
    root = ElementTree.parse(file).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = file.read_text(encoding="utf-8")  # matplotlib keeps each text as a comment
    for words in ("epoch", "training loss (nats, log scale)", "test accuracy (%)"):
        assert f"<!-- {words} -->" in text
    assert "<!-- Digits classifier: numpy, seed 5, test accuracy 97.5% -->" in text


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("suffix", plotting.FORMATS)
@pytest.mark.parametrize("epochs", [1, 200])
def test_the_same_result_gives_the_same_picture(tmp_path, suffix, epochs):
    losses = tuple(2.0 / (epoch + 1) for epoch in range(epochs))
    result = training.Result("numpy", "cpu", 0, losses, (0.5,) * epochs, 1.0)
    files = [tmp_path / f"{number}{suffix}" for number in (1, 2)]
    for file in files:
        plotting.learning_curve(result, file)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("name", ["curve.gif", "curve", ".png", "png", ""])
def test_another_ending_is_refused_before_training(refused, quick, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = refused("train", "--backend", "numpy", "--plot", name)
    assert message == f"argument --plot: {name!r} must end in .png or .svg"
    assert quick == []


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("case", ["no folder", "a file for a folder", "a folder", "read-only"])
def test_an_unwritable_file_is_refused_before_training(refused, quick, tmp_path, case, monkeypatch):
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "old.png").write_bytes(b"old")
    target, reason = {
        "no folder": (tmp_path / "none" / "curve.png", "No such file or directory"),
        "a file for a folder": (tmp_path / "file" / "curve.png", "Not a directory"),
        "a folder": (tmp_path / "folder.png", "it is a directory"),
        "read-only": (tmp_path / "old.png", "it is read-only"),
    }[case]
    if case == "read-only":  # by hand: an administrator may write to any file
        monkeypatch.setattr(os, "access", lambda *_: False)
    before = sorted(tmp_path.rglob("*"))
    message = refused("train", "--backend", "numpy", "--plot", str(target))
    assert message == f"argument --plot: cannot write {str(target)!r}: {reason}"
    assert quick == []
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "old.png").read_bytes() == b"old"


@pytest.mark.usefixtures("pictures")
def test_the_check_leaves_an_old_picture_alone(tmp_path):
    file = tmp_path / "curve.png"
    file.write_bytes(b"old")
    plotting.check_file(file)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.usefixtures("pictures")
def test_a_disk_that_fails_leaves_the_old_picture(tmp_path, monkeypatch):
    file = tmp_path / "curve.png"
    file.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    result = training.Result("numpy", "cpu", 0, (1.0,), (0.5,), 1.0)
    with pytest.raises(OSError, match="^cannot write .*: No space left on device$"):
        plotting.learning_curve(result, file)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


# ---- info, --version


def sections(out):
    """Return the sections of `info` by title, each with its lines' values by label."""
    out = re.sub(r"\n {3,}", " ", out)  # a long value goes on, further in, on the next line
    return {
        block.splitlines()[0]: dict(
            [*re.split(r"\s{2,}", line[2:], maxsplit=1), ""][:2] for line in block.splitlines()[1:]
        )
        for block in out.strip().split("\n\n")
    }


@pytest.fixture(scope="module")
def info():
    """The output of ``python -m relu_xp info``."""
    result = run("info")
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    return result.stdout


def test_info_names_everything(info):
    found = sections(info)
    assert list(found) == [
        "Versions",
        "Backends",
        "Kernels",
        "Third-party backends",
        "GPU",
        "CPU",
    ]
    assert found["Versions"]["relu_xp"] == relu_xp.__version__
    assert "distributed" in found["Versions"]
    assert found["Versions"]["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert list(found["Backends"]) == list(found["Kernels"]) == list(dispatch.LIBRARIES)
    assert set(dispatch.LIBRARIES) >= {"numpy", "cupy", "torch", "jax", "dask", "array_api_strict"}
    assert found["Backends"]["numpy"] == "available"
    kernels = dispatch.kernels()
    detail = kernels.cpu.instruction_set if kernels.cpu else kernels.reason
    assert found["Kernels"]["numpy"] == f"{dispatch.module_of('numpy')} ({detail})"
    assert found["Kernels"]["cupy"].startswith("relu_xp.backends.cupy")
    assert re.match(r"[1-9]\d*\b", found["CPU"]["threads"])


def test_info_says_why_there_are_no_kernels(monkeypatch):
    monkeypatch.setenv("RELU_XP_NATIVE", "0")
    found = sections(run("info").stdout)
    reason = "switched off by RELU_XP_NATIVE=0"
    assert found["Kernels"]["numpy"] == f"relu_xp.backends.numpy ({reason})"
    assert found["CPU"]["threads"] == "1"


@pytest.mark.parametrize(
    ("variable", "value", "flaw"),
    [
        ("RELU_XP_NUM_THREADS", "0", "RELU_XP_NUM_THREADS must be an integer, 1 or greater, "),
        ("RELU_XP_NUM_THREADS", "two", "RELU_XP_NUM_THREADS must be an integer, 1 or greater, "),
        ("RELU_XP_CPU", "z80", "RELU_XP_CPU must be x86-64-v2, x86-64-v3 or x86-64-v4, "),
    ],
)
def test_a_variable_that_is_wrong_is_one_line(native, monkeypatch, variable, value, flaw):
    monkeypatch.setenv(variable, value)
    result = run("info")
    assert (result.returncode, result.stderr) == (0, "")
    found = sections(result.stdout)
    message = f"{flaw}got {value!r}"
    assert found["Kernels"]["numpy"] == found["CPU"]["threads"] == message
    result = run("train", "--backend", "numpy")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"relu-xp train: error: {message}\n"


def test_info_fits_80_columns(info):
    assert max(map(len, info.splitlines())) < 80
    assert not re.search(" $", info, re.MULTILINE)


def test_info_counts_the_gpu_kernels(require, info):
    count = len(require("relu_xp.backends.cupy").PASSES)
    assert f"relu_xp.backends.cupy (ElementwiseKernels of {count} passes)" in info


def test_info_tells_the_gpu_or_why_there_is_none(info):
    gpu = sections(info)["GPU"]
    if LIBRARIES["cupy"].load() is None:
        assert "GiB" in gpu["device 0"]
        assert gpu["driver"].startswith("CUDA ")
    else:
        assert gpu["none"].startswith("CuPy: not ")


@pytest.mark.parametrize(
    "source",
    [
        "raise ImportError('\\n====\\nFailed to import\\n') from OSError('libcudart is missing')",
        "raise OSError('libcudart is missing')",
        "1 / 0",
        "class ndarray: pass\ndef asarray(x): raise RuntimeError",
        "",  # an empty folder called cupy imports, too, and then trips array_api_compat
    ],
)
def test_info_survives_a_broken_cupy(tmp_path, source):
    """Of any kind; the other libraries are left out here, because they take seconds to import."""
    (tmp_path / "cupy.py").write_text(source + "\n")
    for name in ("torch", "jax", "dask"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})\n")
    result = run("info", path=[tmp_path])
    assert (result.returncode, result.stderr) == (0, "")
    found = sections(result.stdout)
    reason = found["Backends"]["cupy"]
    assert reason.startswith("not available: " if source else "not an array API library")
    assert "libcudart" not in source or reason.endswith("libcudart is missing")
    assert found["GPU"]["none"] == f"CuPy: {reason}"
    assert found["Backends"]["torch"] == found["Backends"]["jax"] == "not installed"


NO_DEVICE = """
    class CUDARuntimeError(RuntimeError):
        pass

    class runtime:
        @staticmethod
        def getDeviceCount():
            {count}

    class cuda:
        runtime = runtime

    class ndarray:
        pass

    def asarray(x):
        if not runtime.getDeviceCount():
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
"""
# How CuPy may be broken: its source, and what is said of it.
BROKEN = {
    "no driver": (
        NO_DEVICE.format(count="raise RuntimeError('cudaErrorInsufficientDriver: the driver')"),
        "cudaErrorInsufficientDriver: the driver",
    ),
    "no device": (
        NO_DEVICE.format(count="return 0"),
        "cudaErrorNoDevice: no CUDA-capable device is detected",
    ),
    "a module of its own is missing": ("import cupy._core.none", "No module named 'cupy._core'"),
    "a library is missing": (
        "import ctypes\nctypes.CDLL('libcudart.so.99')",
        "libcudart.so.99: cannot open shared object file: No such file or directory",
    ),
    "no Python": ("def asarray(x:", "'(' was never closed"),
    "half of it": (
        "import sys\nsys.modules[__name__].core",
        "partially initialized module 'cupy' has no attribute 'core'",
    ),
    "it prints": (
        "import sys\nprint('hello')\nprint('woe', file=sys.stderr)\nraise OSError('no luck')",
        "no luck",
    ),
    "it warns": ("import warnings\nwarnings.warn('CUDA path')\n1 / 0", "division by zero"),
    "it exits": ("import sys\nsys.exit('go away')", "go away"),
    "it exits without a word": ("import sys\nsys.exit()", "SystemExit"),
}


@pytest.fixture(params=BROKEN)
def broken(request, tmp_path):
    """A folder with a broken CuPy, and what is to be said of it; no library that takes long."""
    source, reason = BROKEN[request.param]
    (tmp_path / "cupy.py").write_text(textwrap.dedent(source) + "\n")
    for name in ("torch", "jax", "dask"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})\n")
    return tmp_path, reason


class TestBrokenCupy:
    def test_info_says_why(self, broken):
        folder, reason = broken
        result = run("info", path=[folder])
        assert result.returncode == 0
        out = result.stdout.removeprefix("hello\n")
        said = sections(out[out.index("Versions") :])["Backends"]["cupy"]
        assert said.startswith(f"not available: {reason}")
        assert "Traceback" not in result.stderr

    def test_training_on_it_is_refused_in_a_line(self, require, broken):
        require("sklearn"), require("tqdm")
        folder, reason = broken
        result = run("train", "--backend", "cupy", path=[folder])
        assert result.returncode == 2
        line = result.stderr.splitlines()[-1]
        start = f"relu-xp train: error: backend 'cupy' is not available: {reason}"
        assert line.startswith(start)
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        "broken", ["no device", "a library is missing", "half of it", "it exits"], indirect=True
    )
    def test_numpy_is_unaffected(self, require, broken, python):
        require("sklearn"), require("tqdm")
        script = """
            import pickle, sys
            sys.path.insert(0, sys.argv[1])
            import numpy as np
            import relu_xp
            from relu_xp.__main__ import main

            x = np.array([[-1.0, 2.0], [3.0, -4.0]], np.float32)
            wanted = np.maximum(x, 0)
            assert np.array_equal(relu_xp.relu(x), wanted)
            assert np.array_equal(relu_xp.relu_vjp(x)[1](x), wanted)
            assert np.array_equal(relu_xp.relu_backward(x, x), wanted)
            for name in LAYERS:
                layer = pickle.loads(pickle.dumps(getattr(relu_xp, name)()))
                layer.backward(layer.forward(x))
                assert layer.forward(x, training=False)[1, 0] > 0
                pickle.loads(pickle.dumps(layer))
            for argument in (None, [1.0], 1.0, np.ma.array([1.0]), np.array([1j])):
                try:
                    relu_xp.relu(argument)
                except TypeError:
                    continue
                raise AssertionError(argument)
            assert main(["train", "--backend", "numpy", "--epochs", "1"]) == 0
            assert "cupy" not in sys.modules
            try:
                import cupy
            except BaseException:
                pass
            assert np.array_equal(relu_xp.relu(x), wanted)  # also after the user's own attempt
            assert np.array_equal(relu_xp.ReLU().forward(x.astype(np.float64)), wanted)
        """
        layers = [n for n in relu_xp.__all__ if n.endswith("LU") or n == "ReLU6"]
        assert len(layers) >= 9
        folder, _ = broken
        python(
            script.replace("LAYERS", repr(layers)),
            folder,
            stderr=".*",
            PYTHONPATH=os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        )


def test_info_survives_a_device_that_fails(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "availability", lambda name: None)
    monkeypatch.setitem(sys.modules, "cupy", object())
    assert main(["info"]) == 0
    assert sections(capsys.readouterr().out)["GPU"]["unknown"].startswith("AttributeError: ")


def test_info_names_a_backend_from_elsewhere(tmp_path):
    metadata = tmp_path / "fast_relu-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fast-relu\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[relu_xp.backends]\narray_api_strict = fast_relu.strict\nnovel = fast_relu.novel\n"
    )
    for name in ("torch", "jax", "dask", "cupy"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})\n")
    found = sections(run("info", path=[tmp_path]).stdout)
    assert found["Third-party backends"] == {
        "array_api_strict": "fast_relu.strict",
        "novel": "fast_relu.novel",
    }
    assert found["Kernels"]["array_api_strict"] == "fast_relu.strict"


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"relu-xp {relu_xp.__version__}\n"


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for command in ("info", "plot", "formulas", "train"):
        assert re.search(f"^ +{command} ", out, re.MULTILINE)


@pytest.mark.parametrize("columns", [40, 60])
@pytest.mark.parametrize("command", [(), ("info",), ("plot",), ("formulas",), ("train",)])
def test_help_fits_a_narrow_window(capsys, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= columns


@pytest.mark.parametrize("columns", [40, 60])
def test_tables_fit_a_narrow_window_but_words_stay_whole(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    file = f"/a/long/folder-with-a-name{'/of/several/parts' * 4}.png"
    rows = {"test accuracy": "97.50 %", "figure": file, "kernels": "some words in a row " * 4}
    command_line._print_table(rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "test accuracy       97.50 %"
    assert f"    {file}" in lines
    rest = [line for line in lines if file not in line]
    assert max(map(len, rest)) < columns
    assert " ".join(" ".join(rest).split()).endswith(("kernels " + rows["kernels"]).strip())


def test_a_reader_that_stops_early_is_no_error():
    command = f"{shlex.quote(sys.executable)} -P -m relu_xp"
    script = f"({command} --help; {command} info) | head -n 1"  # head has gone before info prints
    result = subprocess.run(["sh", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.startswith("usage: ")
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


def test_the_command_line_loads_no_optional_library():
    names = [
        "cupy",
        "dask",
        "distributed",
        "jax",
        "matplotlib",
        "numba",
        "sklearn",
        "torch",
        "tqdm",
    ]
    script = f"import sys, relu_xp.__main__; print([n for n in {names} if n in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout == "[]\n"


def test_what_is_no_regular_file_is_written_into(tmp_path):
    """A pipe or a device stays what it is."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    files.write(pipe, None)  # nobody reads: only asked
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    files.write(pipe, b"whole")
    assert reader.communicate(timeout=10)[0] == b"whole"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    files.write(os.devnull, b"nothing")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    regular = tmp_path / "regular"
    regular.write_bytes(b"old")
    regular.chmod(0o600)
    files.write(regular, b"new")
    assert (regular.read_bytes(), stat.S_IMODE(regular.stat().st_mode)) == (b"new", 0o600)


def test_a_layers_name_in_any_case(require, capsys, tmp_path):
    require("matplotlib")
    assert main(["plot", "leakyrelu", "-o", str(tmp_path / "a.png")]) == 0
    assert "LeakyReLU(0.01)" in capsys.readouterr().out


def test_a_number_of_another_layer_says_which_it_takes(require, refused):
    require("matplotlib")
    message = refused("plot", "PReLU", "--negative-slope", ".1", program="relu-xp plot")
    assert message == "argument --negative-slope: PReLU does not take it, but --init"
