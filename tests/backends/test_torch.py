"""PyTorch, beyond the conformance suite: autograd, transformations, compilers, and its memory."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from libraries import LIBRARIES
from operands import bits

import relu_xp
from relu_xp import CReLU, PReLU, ReLU, RReLU, SquaredReLU, dispatch
from relu_xp.testing import reference

torch = pytest.importorskip("torch")
forward_ad = torch.autograd.forward_ad

# Of PyTorch's own use of what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

LIBRARY = LIBRARIES["torch"]
PRESETS = reference.PRESETS
each_preset = pytest.mark.parametrize("params", PRESETS.values(), ids=PRESETS)
X = torch.tensor([-3.0, -0.4, -0.0, 0.0, 0.2, 0.6, 5.0, 7.0])
DY = torch.tensor([math.nan, math.inf, -1.0, math.nan, -2.0, 3.0, math.inf, math.nan])


def backend():
    return dispatch.backend_for("f", "x", torch.ones(1))


@pytest.fixture(params=["here", "elsewhere"])
def place(request):
    """Run a test on tensors in this machine's memory, and as if they were on another device."""
    library = LIBRARIES["torch" if request.param == "here" else "torch_elsewhere"]
    with library.running():
        yield request.param


@pytest.mark.parametrize("dtype", LIBRARY.dtypes)
@each_preset
def test_the_gradient_of_autograd_is_that_of_relu_backward(place, dtype, params):
    patterns = np.tile(reference.specials(dtype), 9)
    gradients = reference.gradients(dtype, patterns.size)
    x, dy = (LIBRARY.array(p.view(reference.DTYPES[dtype])) for p in (patterns, gradients))
    y, dx = relu_xp.relu(x, **params), relu_xp.relu_backward(dy, x, **params)
    for f in (relu_xp.relu, lambda x, **params: relu_xp.relu_vjp(x, **params)[0]):
        tracked = x.clone().requires_grad_()
        result = f(tracked, **params)
        result.backward(dy)
        for one, other in ((result.detach(), y), (tracked.grad, dx)):
            np.testing.assert_array_equal(*(bits(LIBRARY.numpy(z)) for z in (one, other)))


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "prelu"])
def test_first_and_second_derivatives_are_those_of_pytorch(place, name):
    x, more = torch.linspace(-7, 7, 30).reshape(3, 10), []
    if name in ("leaky_relu", "prelu"):
        more = [0.1 if name == "leaky_relu" else torch.tensor([0.5])]

    def derivatives(f):
        tracked = x.clone().requires_grad_()
        y = (f(tracked, *more) ** 2 * torch.cos(tracked)).sum()
        (first,) = torch.autograd.grad(y, tracked, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), tracked)
        hessian = torch.func.hessian(lambda x: (f(x, *more) ** 3).sum())(x)
        return y, first, second, hessian

    ours, theirs = (getattr(module, name) for module in (relu_xp, torch.nn.functional))
    torch.testing.assert_close(derivatives(ours), derivatives(theirs))


@each_preset
def test_derivatives_agree_with_differences(place, params):
    """Of the first and the second order; the second is that with respect to dy."""
    x = torch.tensor([-3.0, -0.4, 0.2, 0.6, 5.0], dtype=torch.float64, requires_grad=True)
    dy = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0], dtype=torch.float64, requires_grad=True)

    def f(x):
        return relu_xp.relu(x, **params)

    if params.get("negative_slope") != 1e30:
        assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x, dy)
    assert not relu_xp.relu_grad(x, **params).requires_grad


def test_derivatives_of_the_other_activations_agree_with_differences(place):
    x = torch.tensor([[-3.0, -0.4, 0.2, 0.6]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.25, 0.0, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    for f in (relu_xp.prelu, relu_xp.bias_relu, relu_xp.crelu, relu_xp.squared_relu, relu_xp.rrelu):
        inputs = (x, weight) if f in (relu_xp.prelu, relu_xp.bias_relu) else (x,)
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("slope", [0.25, 0.0])
def test_autograd_of_prelu_is_its_pullback(place, slope):
    """Also where the slope is 0: it must learn from there; a NaN above 0 does not reach it."""
    host = np.array([[np.nan, -2.0, -0.5, 0.0, 1.0, np.inf]], np.float32)
    dy = torch.linspace(1, 2, 6).reshape(1, 6)
    dx, weight_grad = relu_xp.prelu_vjp(host, np.array([slope], np.float32))[1](dy.numpy())
    for f in (relu_xp.prelu, lambda x, weight: relu_xp.prelu_vjp(x, weight)[0]):
        x = torch.from_numpy(host.copy()).requires_grad_()
        weight = torch.tensor([slope], requires_grad=True)
        f(x, weight).backward(dy)
        np.testing.assert_array_equal(x.grad, dx)
        np.testing.assert_allclose(weight.grad, weight_grad, rtol=1e-6)
    weight = torch.zeros(1, requires_grad=True)
    relu_xp.prelu(torch.tensor([-math.inf, -2.0]), weight, axis=0).sum().backward()
    assert weight.grad.tolist() == [-2]  # +0 stands for what is not finite


@pytest.mark.parametrize("dtype", LIBRARY.dtypes)
@pytest.mark.parametrize("name", ["relu", "leaky", "everything"])
def test_autograd_of_bias_relu_is_its_pullback(place, dtype, name):
    """Also where x or the bias alone is tracked, and for a bias of another dtype."""
    params = PRESETS[name]
    kind = getattr(torch, dtype)
    x, dy = (torch.linspace(-3, end, 40).reshape(4, 5, 2).to(kind) for end in (5, 2))
    bias = torch.tensor([0.5, -0.25, 1.0, 2.0, -3.0], dtype=torch.float64)
    y, pullback = relu_xp.bias_relu_vjp(x, bias, axis=1, **params)
    dx, bias_grad = pullback(dy)
    for f in (relu_xp.bias_relu, lambda *args, **params: relu_xp.bias_relu_vjp(*args, **params)[0]):
        for tracked in ((True, True), (True, False), (False, True)):
            inputs = [
                one.clone().requires_grad_(t) for one, t in zip((x, bias), tracked, strict=True)
            ]
            result = f(*inputs, axis=1, **params)
            result.backward(dy)
            assert torch.equal(result.detach(), y)
            assert inputs[0].grad is None or torch.equal(inputs[0].grad, dx)
            if inputs[1].grad is not None:  # which autograd sums in the dtype of x
                epsilon = torch.finfo(kind).eps
                np.testing.assert_allclose(inputs[1].grad, bias_grad, 8 * epsilon, 32 * epsilon)


def test_gradients_of_bias_relu_hold_no_graph(place):
    """But that of x, if dy has one, as the pullback of relu."""
    x, dy = torch.tensor([[-1.0, 2.0]]), torch.ones(1, 2, requires_grad=True)
    y, pullback = relu_xp.bias_relu_vjp(x, torch.zeros(2, requires_grad=True))
    dx, bias_grad = pullback(dy)
    assert (y.requires_grad, dx.requires_grad, bias_grad.requires_grad) == (True, True, False)
    assert not any(gradient.requires_grad for gradient in pullback(dy.detach()))


def test_bias_relu_writes_an_out_in_memory(place):
    """Autograd learns of it; x and dy may be the out; a leaf that requires a gradient may not."""
    x, bias = torch.tensor([[-1.0, 2.0], [3.0, -4.0]]), torch.tensor([0.5, 1.0])
    leaf = torch.zeros(2, 2, requires_grad=True)
    product = leaf * x  # keeps x
    assert relu_xp.bias_relu(x, bias, out=x) is x
    assert x.tolist() == [[0, 3], [3.5, 0]]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    _, pullback = relu_xp.bias_relu_vjp(x, bias)
    dy = torch.ones(2, 2)
    dx, bias_grad = pullback(dy, out=dy)
    assert dx is dy
    assert (dy.tolist(), bias_grad.tolist()) == ([[1, 1], [1, 1]], [2, 2])
    with pytest.raises(ValueError, match="is a leaf that"):
        relu_xp.bias_relu(leaf, bias, out=leaf)
    with pytest.raises(ValueError, match="out overlaps an input without being the same"):
        relu_xp.bias_relu(torch.ones(1, 2), bias, out=bias[None])


def test_the_gradient_of_a_bias_is_rounded_once():
    """By NumPy: PyTorch rounds float64 to 16 bits by way of float32. One NaN stands for all."""
    terms = torch.tensor([1.0, 2.0**-11, 2.0**-40], dtype=torch.float64)[:, None]
    _, pullback = relu_xp.bias_relu_vjp(torch.ones(3, 1), torch.zeros(1, dtype=torch.float16))
    assert pullback(terms)[1].item() == 1 + 2.0**-10
    _, pullback = relu_xp.bias_relu_vjp(torch.ones(2, 3), torch.zeros(3))
    infinite = torch.tensor([[math.inf, math.nan, -math.nan], [-math.inf, 1, 1]])
    assert pullback(infinite)[1].view(torch.int32).tolist() == [0x7FC00000] * 3


@pytest.mark.parametrize("params", [{}, {"negative_slope": 0.5}, {"max_value": 1.0}], ids=str)
def test_the_graph_keeps_no_y_and_returns_many_gradients_at_once(place, params):
    x = torch.linspace(-2, 2, 6, requires_grad=True)
    g = relu_xp.relu_grad(x, **params)
    y = relu_xp.relu(x * 1, **params)
    rows = torch.autograd.grad(y, x, torch.eye(6), is_grads_batched=True, retain_graph=True)[0]
    assert torch.equal(rows, torch.diag(g))
    y.mul_(2)
    y.sum().backward()
    assert torch.equal(x.grad, 2 * g)


@each_preset
def test_a_layer_between_operations_of_pytorch(place, params):
    """y has its graph, as relu's has; backward is of the mask, on any dy."""
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    g = relu_xp.relu_grad(x, **params)
    layer = ReLU(**params)
    y = layer.forward(x)
    dy = torch.ones(9, requires_grad=True)
    dx = layer.backward(dy, retain=True)
    assert torch.equal(dx, g)
    dx.sum().backward()
    assert torch.equal(dy.grad, g)
    assert not layer.backward(torch.ones(9)).requires_grad
    y.sum().backward()
    assert torch.equal(x.grad, g)


def test_a_layer_keeps_no_graph(place):
    """Neither its gradients nor its residuals, although x and dy are tracked."""
    x, dy = (torch.ones((2, 3), requires_grad=True) * -1 for _ in range(2))
    for layer in (PReLU(3, xp=torch), SquaredReLU(), CReLU(), RReLU()):
        y = layer.forward(x)
        dx = layer.backward(torch.cat([dy, dy], 1) if y.shape[1] == 6 else dy.detach())
        assert y.requires_grad
        assert dx.requires_grad == (y.shape[1] == 6)
        assert not any(array.requires_grad for array in layer.params + layer.grads)
    layer = PReLU(3, xp=torch)
    for _ in range(2):
        layer.forward(x)
        layer.backward(dy)
        assert layer.grads[0].grad_fn is None
    assert layer.grads[0].tolist() == [2, 2, 2]


def test_without_gradients_there_is_no_graph(place):
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y, out = relu_xp.leaky_relu(x, 0.5), torch.empty(2)
            assert (y.tolist(), y.requires_grad) == ([-0.5, 2], False)
            assert relu_xp.leaky_relu(x, 0.5, out=out) is out


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_autograd_learns_that_an_out_was_written(place, slope):
    x, out = torch.tensor([-1.0, 2.0], requires_grad=True), torch.ones(2)
    product = x * out  # keeps out for its gradient
    relu_xp.relu(torch.ones(2), negative_slope=slope, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    assert relu_xp.relu(x, negative_slope=slope, out=out) is out
    out.sum().backward()
    assert x.grad.tolist() == [slope, 1]


def test_a_leaf_that_requires_a_gradient_is_no_out(place):
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    with pytest.raises(ValueError, match="^relu: x, which is to be overwritten, .* is a leaf that"):
        relu_xp.relu(x, out=x)
    assert x.tolist() == [-1, 2]
    with torch.no_grad():
        assert relu_xp.relu(x, out=x) is x
    assert x.tolist() == [0, 2]
    layer = PReLU(xp=torch, inplace=True)
    layer.forward(torch.tensor([[-1.0, 2.0]]))
    with pytest.raises(ValueError, match="^backward: dy, which is to be overwritten, .* is a leaf"):
        layer.backward(torch.ones((1, 2), requires_grad=True))
    assert layer.grads[0].tolist() == [0]
    assert layer.backward(torch.ones((1, 2))).tolist() == [[0.25, 1]]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "requires_grad"])
def test_overlap_is_refused(place, kind):
    memory = torch.arange(-8.0, 8.0, dtype=torch.bfloat16 if kind == "bfloat16" else None)
    x = memory.clone().requires_grad_() if kind == "requires_grad" else memory
    memory = x.detach()
    before = memory.clone()
    with pytest.raises(ValueError, match="relu: out overlaps an input without being the same"):
        relu_xp.relu(x[:8], out=memory[4:12])
    with pytest.raises(ValueError, match="relu: out is a broadcast view"):
        relu_xp.relu(x[:8], out=memory[:1].expand(8))
    assert torch.equal(memory, before)
    assert relu_xp.relu(memory[:8], out=memory[:8]).sum() == memory[:8].sum() == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_kernels_read_and_write_the_memory_of_tensors(dtype):
    x = torch.linspace(-2, 2, 24).to(getattr(torch, dtype)).reshape(1, 2, 3, 4)
    for one in (x, x[..., ::2], x.to(memory_format=torch.channels_last), torch.nn.Parameter(x)):
        (view,) = backend()._views(one)
        assert view.ctypes.data == one.data_ptr()
        assert view.strides == tuple(one.element_size() * stride for stride in one.stride())
    y = relu_xp.leaky_relu(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    layer = relu_xp.LeakyReLU()  # whose mask has one bit per element
    for x in (torch.ones(800), torch.ones(800, requires_grad=True)):
        layer.forward(x)
        assert 100 <= layer.saved_nbytes <= 107


def test_every_kind_of_tensor():
    """A subclass stays one, a parameter does not; what is not in memory goes to the base class."""

    class Marked(torch.Tensor):
        pass

    x = torch.tensor([1.0, -2.0])
    marked = x.as_subclass(Marked)
    dx = relu_xp.relu_vjp(marked, max_value=1)[1](marked)
    assert {type(y) for y in (relu_xp.relu(marked), relu_xp.leaky_relu(marked), dx)} == {Marked}
    assert type(relu_xp.leaky_relu(torch.nn.Parameter(x))) is torch.Tensor
    for kind in (torch.Tensor, torch.nn.Parameter, Marked):
        assert dispatch.BACKENDS[kind] is backend()
    negative = torch.complex(x, -x).conj().imag  # which is negated when it is read
    assert negative.is_neg()
    assert relu_xp.leaky_relu(negative, 0.5).tolist() == [1, -1]
    y = relu_xp.leaky_relu(x.to("meta"), 0.5)
    assert (y.device.type, y.shape) == ("meta", x.shape)
    for dtype in (torch.int8, torch.uint16, torch.uint64):
        y = relu_xp.relu6(torch.arange(9).to(dtype))
        assert (y.dtype, y.tolist()) == (dtype, [0, 1, 2, 3, 4, 5, 6, 6, 6])
    for other in (torch.Size([2]), torch.float32, torch.nn.Identity()):
        with pytest.raises(TypeError, match="^relu: x must be an array, got "):
            relu_xp.relu(other)


def test_without_ml_dtypes_bfloat16_is_served_by_the_base_class(monkeypatch):
    from relu_xp.backends import torch as module

    x = torch.tensor([-4.0, 2.0], dtype=torch.bfloat16)
    expected = relu_xp.leaky_relu(x, 0.5)
    monkeypatch.setattr(module, "ml_dtypes", None)
    assert backend()._views(x) is None
    assert torch.equal(relu_xp.leaky_relu(x, 0.5), expected)


@each_preset
def test_torch_func_and_forward_mode(params):
    """Equal values, and a dead unit is +0 there too."""

    def f(x):
        return relu_xp.relu(x, **params)

    def derivative(dual):
        return forward_ad.unpack_dual(f(dual)).tangent

    y, g, tracked = f(X), relu_xp.relu_grad(X, **params), X.clone().requires_grad_()
    result, vjp = torch.func.vjp(f, X)
    assert torch.equal(result, y)
    assert torch.equal(torch.func.functionalize(f)(X), y)
    np.testing.assert_array_equal(vjp(DY)[0], relu_xp.relu_backward(DY, X, **params))
    assert not vjp(DY)[0].view(torch.int32)[g == 0].any()
    assert torch.equal(torch.func.vmap(torch.func.grad(f))(X), g)
    assert torch.equal(torch.func.jvp(f, (X,), (torch.ones(8),))[1], g)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        assert torch.equal(jacobian(f)(X), torch.diag(g))
    assert not torch.func.hessian(lambda x: f(x).sum())(X).any()
    assert torch.equal(torch.func.vmap(lambda a: a * f(tracked))(torch.ones(2))[1], y)
    with forward_ad.dual_level():
        for x in (X, tracked):
            assert torch.equal(derivative(forward_ad.make_dual(x, torch.ones(8))), g)


@pytest.mark.parametrize("name", ["relu", "leaky", "everything"])
def test_torch_func_of_bias_relu(name):
    """By x and by the bias, and through a pullback."""
    params = PRESETS[name]
    xs, bias = torch.linspace(-3, 4, 24).reshape(2, 3, 4), torch.tensor([0.5, -1.0, 0.0, 2.0])

    def f(x, bias):
        return relu_xp.bias_relu(x, bias, **params)

    def gradients(x, bias, dy):
        return relu_xp.bias_relu_vjp(x, bias, **params)[1](dy)

    rows = xs[0]
    total, g = xs + bias, relu_xp.relu_grad(xs + bias, **params)
    y = relu_xp.relu(total, **params)
    assert torch.equal(torch.func.vmap(f, (0, None))(xs, bias), y)
    assert torch.equal(torch.func.vmap(f, (None, 0))(rows, rows)[1], f(rows, rows[1]))
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        found = jacobian(f, argnums=1)(rows, bias)
        assert torch.equal(found, torch.diag_embed(g[0]))
    for x, back, slopes in zip(xs, xs.flip(0), g, strict=True):
        dx, bias_grad = torch.func.vjp(f, x, bias)[1](back)
        assert torch.equal(dx, slopes * back + 0.0)
        torch.testing.assert_close(bias_grad, gradients(x, bias, back)[1])
    mapped = torch.func.vmap(gradients, (0, None, 0))(xs, bias, xs)
    for index, x in enumerate(xs):
        for one, other in zip(mapped, gradients(x, bias, x), strict=True):
            torch.testing.assert_close(one[index], other)
    by_dy = torch.func.jacrev(gradients, argnums=2)(rows, bias, rows)[1]
    torch.testing.assert_close(by_dy, torch.diag_embed(g[0]).transpose(0, 1))
    assert not torch.func.hessian(lambda bias: f(rows, bias).sum())(bias).any()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # a shape is a constant
def test_what_is_recorded_runs_again_on_other_values():
    from torch.fx.experimental.proxy_tensor import make_fx

    def f(x):
        y, pullback = relu_xp.relu_vjp(x, negative_slope=0.5, max_value=2.0)
        biased, its_pullback = relu_xp.bias_relu_vjp(x, x, negative_slope=0.5)
        y = y + pullback(x) + biased + sum(its_pullback(x))
        return y + relu_xp.leaky_relu(x) + relu_xp.squared_relu(x) + relu_xp.bias_relu(x, x)

    x, other = torch.linspace(-4, 4, 9), torch.linspace(5, -5, 9)
    expected = f(other)
    assert torch.equal(torch.jit.trace(f, x)(other), expected)
    for mode in ("real", "fake", "symbolic"):
        assert torch.equal(make_fx(f, tracing_mode=mode)(x)(other), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", "leaky", "everything"])
def test_a_compiled_function_is_one_graph_after_a_first_call(name):
    """That call prepares the parameters, which the compiler cannot trace."""
    params = PRESETS[name]
    layer = ReLU(**params)

    def f(x, dy):
        y, pullback = relu_xp.relu_vjp(x, **params)
        results = [y, pullback(dy), layer.forward(x), layer.backward(dy)]
        results += [relu_xp.relu_backward(dy, x, **params), relu_xp.relu_grad(x, **params)]
        results += [relu_xp.relu(x, **params, out=torch.empty_like(x)), relu_xp.crelu(x, axis=0)]
        results += [relu_xp.prelu(x, dy[:1], axis=0), relu_xp.bias_relu(x, dy, **params)]
        return [*results, relu_xp.squared_relu(x)]

    torch.compiler.reset()
    dy, results = torch.linspace(2, 4, 33), []
    f(torch.ones(33), dy)
    with warnings.catch_warnings(action="ignore"):  # of the compiler's own imports
        for function in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
            x = torch.linspace(-8, 8, 33, requires_grad=True)
            y = function(x, dy)
            sum(one.sum() for one in y).backward()
            results.append([*y, x.grad])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_the_first_call_of_a_process_may_be_compiled(python):
    """No backend is imported and no parameter cast yet; the graph breaks there, as for a slope."""
    printed = python(
        """
        import warnings
        import relu_xp, torch

        parameter = torch.nn.Parameter(torch.tensor([-2.0, 4.0]))

        def f(x, slope):
            y = relu_xp.relu(x) + relu_xp.leaky_relu(x, slope) + relu_xp.relu6(x.bfloat16())
            return y + relu_xp.leaky_relu(parameter, 0.5)

        with warnings.catch_warnings(action="ignore"):
            compiled = torch.compile(f, backend="aot_eager")
            for slope in (0.25, 0.125):
                x = torch.tensor([-4.0, 8.0], requires_grad=True)
                y = compiled(x, slope)
                y.sum().backward()
                print(y.tolist(), x.grad.tolist())
            to_machine_code = torch.compile(lambda x: relu_xp.leaky_relu(x, 0.25), fullgraph=True)
            print(to_machine_code(x.detach()).tolist())
        """,
        timeout=240,
    )
    assert printed.splitlines() == [
        "[-2.0, 26.0] [0.25, 2.0]",
        "[-1.5, 26.0] [0.125, 2.0]",
        "[-1.0, 8.0]",
    ]


def test_nothing_of_a_subclass_holds_the_graph():
    class Subclass(torch.Tensor):
        pass

    x = torch.linspace(-2, 2, 6, requires_grad=True).as_subclass(Subclass) * 2
    layer = relu_xp.PReLU(xp=torch)
    layer.forward(x.reshape(2, 3))
    layer.backward(torch.ones(2, 3))
    assert layer.grads[0].grad_fn is None
    dx = relu_xp.squared_relu_vjp(x)[1](torch.ones(6))
    assert not dx.requires_grad
