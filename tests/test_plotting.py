"""The figures of a layer: what they show is what the layer computes."""

from __future__ import annotations

import numpy as np
import pytest

import relu_xp
from relu_xp import layers, plotting
from relu_xp.__main__ import main

pytestmark = pytest.mark.usefixtures("matplotlib")


@pytest.fixture
def matplotlib(require):
    return require("matplotlib")


def lines(axes):
    """Return a figure's curves as lists of points, and its dots as {(x, y): filled}."""
    drawn = [line for line in axes.lines if line.get_transform() == axes.transData]
    curves = [line.get_xydata() for line in drawn if len(line.get_xydata()) > 1]
    dots = {}
    for line in drawn:
        if len(line.get_xydata()) == 1:
            x, y = line.get_xydata()[0]
            hollow = line.get_markerfacecolor() == "white"
            dots[round(float(x), 4), round(float(y), 4)] = not hollow
    return curves, dots


def test_what_is_drawn_is_what_the_layer_computes():
    layer = relu_xp.ReLU(negative_slope=0.5, threshold=1.0, positive_slope=2.0, max_value=8.0)
    for curves in ("forward", "gradient"):
        drawn, dots = lines(plotting.plot(layer, curves=curves))
        function = relu_xp.relu if curves == "forward" else relu_xp.relu_grad
        numbers = {"threshold": 1.0, "positive_slope": 2.0, "max_value": 8.0}
        assert len(drawn) == 3
        for points in drawn:
            x = points[:, 0].astype(np.float32)
            wanted = function(x, negative_slope=0.5, **numbers)
            np.testing.assert_allclose(points[:, 1], wanted, rtol=1e-6)
        if curves == "forward":  # a jump at the knee, none at the ceiling
            assert dots == {(1, 0.5): True, (1, 2): False}
        else:
            assert dots == {(1, 0.5): True, (1, 2): False, (4, 2): False, (4, 0): True}


def test_prelu_has_a_line_for_each_channel():
    layer = relu_xp.PReLU(2)
    layer.params[0][:] = [0.0, -0.5]
    curves, dots = lines(plotting.plot(layer, curves="gradient"))
    assert [set(points[:, 1]) for points in curves] == [{0}, {1}, {-0.5}, {1}]
    assert dots == {(0, 0): True, (0, -0.5): True, (0, 1): False}
    assert layer.params[0].tolist() == [0, -0.5]


def test_rrelu_is_drawn_in_evaluation_with_what_training_may_draw():
    layer = relu_xp.RReLU(0.25, 0.75)
    state = layer.rng.bit_generator.state
    axes = plotting.plot(layer, curves="gradient")
    curves, _ = lines(axes)
    assert [set(points[:, 1]) for points in curves] == [{0.5}, {1}]
    (band,) = axes.collections
    extent = band.get_paths()[0].get_extents()
    assert (extent.y0, extent.y1, extent.x1) == (0.25, 0.75, 0)
    assert layer.rng.bit_generator.state == state


def test_crelus_halves_are_mirrored():
    axes = plotting.plot(relu_xp.CReLU(axis=3), curves="gradient")
    curves, dots = lines(axes)
    assert [set(points[:, 1]) for points in curves] == [{0}, {1}, {-1}, {0}]
    assert dots == {(0, 0): True, (0, 1): False, (0, -1): False}
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["f'(x)", "f'(x), 2nd half"]


def test_both_are_told_apart_without_colour():
    axes = plotting.plot(relu_xp.ReLU())
    assert axes.get_xlabel() == "x"
    assert axes.get_ylabel() == "f(x), f'(x)"
    assert axes.get_title() == "ReLU()"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["f(x)", "f'(x)"]
    styles = {line.get_label(): line.get_linestyle() for line in axes.lines}
    assert styles["f(x)"] != styles["f'(x)"]
    colours = {line.get_color() for line in axes.lines}
    assert all(0 <= float(colour) <= 1 for colour in colours), "greys"
    _, dots = lines(axes)
    assert dots == {(0, 0): True, (0, 1): False}
    assert [text.get_text() for text in axes.texts] == ["knee: 0"]


def test_the_layer_is_as_before_and_the_axes_are_the_callers():
    from matplotlib.figure import Figure

    layer = relu_xp.ReLU(inplace=True)
    layer.forward(np.array([-1.0, 2.0]))
    axes = Figure().subplots()
    assert plotting.plot(layer, axes, curves="gradient") is axes
    assert layer.inplace
    assert layer.backward(np.ones(2)).tolist() == [0, 1]


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="^curves must be one of forward, gradient, both, got 'f'"):
        plotting.plot(relu_xp.ReLU(), curves="f")


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("backend", ["numpy", "array_api_strict", "torch", "jax"])
def test_every_library_draws_the_same(require, tmp_path, backend):
    require(backend)
    for name in layers.__all__:
        reference = lines(plotting.plot(getattr(layers, name)()))
        xp = require("relu_xp.dispatch").namespace(backend)
        curves, dots = lines(plotting.plot(getattr(layers, name)(), xp=xp))
        assert dots == reference[1]
        for got, wanted in zip(curves, reference[0], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6)


NUMBERS = {  # of the layers that have others: what is given, and what is then shown
    "LeakyReLU": (["--negative-slope", "0.25"], "LeakyReLU(0.25)"),
    "PReLU": (["--init", "0.5"], "PReLU(1, init=0.5, axis=1)"),
    "RReLU": (["--lower", "0", "--upper", "0.5"], "RReLU(0.0, 0.5)"),
    "CReLU": ([], "CReLU(axis=1)"),
    "SquaredReLU": ([], "SquaredReLU()"),
}


@pytest.mark.parametrize("layer", layers.__all__)
@pytest.mark.parametrize("suffix", plotting.FORMATS)
def test_the_command_line(tmp_path, capsys, layer, suffix):
    files = [tmp_path / f"{number}{suffix}" for number in range(2)]
    for file in files:
        numbers, shown = NUMBERS.get(layer, (["--negative-slope", "0.25"], "negative_slope=0.25"))
        assert main(["plot", layer, *numbers, "--backend", "numpy", "-o", str(file)]) == 0
    assert shown in capsys.readouterr().out
    assert files[0].read_bytes() == files[1].read_bytes()
    if suffix == ".png":
        from matplotlib import image

        height, width, _ = image.imread(files[0]).shape
        assert width > 3 * height > 1000
    else:
        text = files[0].read_text(encoding="utf-8")
        assert text.count("f'(x)") >= 2
        assert "knee" in text


def test_without_a_name_the_file_is_the_layers(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, name in (([], "ReLU"), (["relu"], "ReLU"), (["Relu"], "ReLU"), (["ReLU6"], "ReLU6")):
        assert main(["plot", *given, "--curves", "both", "--backend", "numpy"]) == 0
        (file,) = tmp_path.iterdir()
        assert file.name == f"{name}.png"
        assert file.name in capsys.readouterr().out
        file.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ReLU6", "--max-value", "3"], "argument --max-value: ReLU6 does not take it"),
        (["relu", "--init", "3"], "argument --init: ReLU does not take it"),
        (["--threshold", "nan"], "threshold must be finite, got nan"),
        (["--positive-slope", "0"], "positive_slope must not be 0"),
        (["-o", "x.gif"], "'x.gif' must end in .png or .svg"),
        (["-o", "nowhere/x.png"], "cannot write 'nowhere/x.png': No such file or directory"),
        (["--backend", "nope"], "backend 'nope' is not installed"),
        (["Softplus"], "argument LAYER: invalid choice: 'Softplus'"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["plot", *arguments])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"relu-xp plot: error: {message}")
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())
