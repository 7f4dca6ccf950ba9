"""PyTorch and JAX: their own derivatives, transformations and compilers obey the table too."""

from __future__ import annotations

import numpy as np
import pytest
from libraries import LIBRARIES

import relu_xp
from relu_xp.testing import oracle
from relu_xp.testing.conformance import array_of, check

MEMBERS = list(oracle.MEMBERS)
PRESETS = {
    "relu": relu_xp.relu,
    "leaky_relu": relu_xp.leaky_relu,
    "relu6": relu_xp.relu6,
    "clipped_relu": lambda x: relu_xp.clipped_relu(x, 0.75),
    "thresholded_relu": relu_xp.thresholded_relu,
    "mirrored": lambda x: relu_xp.relu(x, positive_slope=-1.0),
    "everything": lambda x: relu_xp.relu(x, **oracle.MEMBERS["everything"]),
}


def is_positive_zero(array):
    array = np.asarray(array)
    return bool((array == 0).all() and not np.signbit(array).any())


@pytest.fixture
def torch(require):
    return require("torch")


@pytest.fixture
def jax(require):
    module = require("jax")
    module.config.update("jax_enable_x64", True)
    return module


class TestAutograd:
    @pytest.mark.parametrize("dtype", oracle.DTYPES)
    @pytest.mark.parametrize("member", MEMBERS)
    def test_the_gradient_is_the_table_s_to_the_bit(self, torch, dtype, member):
        xp = LIBRARIES["torch"]
        patterns = oracle.patterns(dtype)
        gradients = oracle.gradients(dtype, patterns.size)
        x = array_of(xp, patterns, dtype).requires_grad_()
        y = relu_xp.relu(x, **oracle.MEMBERS[member])
        check(xp, y.detach(), oracle.forward(dtype, member), patterns)
        y.backward(array_of(xp, gradients, dtype))
        expected = oracle.backward(dtype, dtype, member)
        check(xp, x.grad, expected, gradients, patterns)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own torch.jit.script
    @pytest.mark.parametrize("member", MEMBERS)
    def test_transformed_it_agrees(self, torch, member):
        """torch.func composes: equal values, and a dead unit is +0 there too."""
        x = torch.tensor([-3.0, -0.4, -0.0, 0.0, 0.2, 0.6, 5.0, 7.0])
        dy = torch.tensor([np.nan, np.inf, -1.0, np.nan, -2.0, 3.0, np.inf, np.nan])
        numbers = oracle.MEMBERS[member]
        wanted = relu_xp.relu_backward(dy, x, **numbers)

        def f(x):
            return relu_xp.relu(x, **numbers)

        y, vjp = torch.func.vjp(f, x)
        assert torch.equal(y, f(x))
        np.testing.assert_array_equal(vjp(dy)[0], wanted)
        dead = relu_xp.relu_grad(x, **numbers) == 0
        assert is_positive_zero(vjp(dy)[0][dead])
        each = torch.func.vmap(torch.func.grad(f))(x)
        assert torch.equal(each, relu_xp.relu_grad(x, **numbers))
        assert torch.equal(torch.func.jvp(f, (x,), (torch.ones(8),))[1], each)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones(8))
            tangent = torch.autograd.forward_ad.unpack_dual(f(dual)).tangent
        assert torch.equal(tangent, each)

    @pytest.mark.parametrize("member", MEMBERS)
    def test_derivatives_of_derivatives(self, torch, member):
        """With respect to dy it is the same gradient again; with respect to x there is none."""
        x = torch.tensor([-3.0, -0.4, 0.2, 0.6, 5.0], dtype=torch.float64, requires_grad=True)
        dy = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0], dtype=torch.float64, requires_grad=True)
        numbers = oracle.MEMBERS[member]
        (dx,) = torch.autograd.grad(relu_xp.relu(x, **numbers), x, dy, create_graph=True)
        g = relu_xp.relu_grad(x, **numbers)
        assert torch.equal(dx, g * dy)
        (ddy,) = torch.autograd.grad(dx.sum(), dy)
        assert torch.equal(ddy, g)
        assert torch.autograd.gradgradcheck(lambda x: relu_xp.relu(x, **numbers), x, dy)

    @pytest.mark.parametrize("member", ["relu", "leaky", "clipped-leaky"])
    def test_many_gradients_at_once(self, torch, member):
        x = torch.linspace(-2, 2, 6, requires_grad=True)
        numbers = oracle.MEMBERS[member]
        rows = torch.autograd.grad(
            relu_xp.relu(x, **numbers), x, torch.eye(6), is_grads_batched=True
        )[0]
        assert torch.equal(rows, torch.diag(relu_xp.relu_grad(x.detach(), **numbers)))

    @pytest.mark.parametrize("numbers", [{}, {"negative_slope": 0.5}, {"max_value": 1.0}], ids=str)
    def test_what_the_graph_keeps_may_be_overwritten_or_is_watched(self, torch, numbers):
        x = torch.tensor([-1.0, 0.5, 3.0], requires_grad=True)
        wanted = relu_xp.relu_grad(x.detach(), **numbers)
        hidden = x * 1
        y = relu_xp.relu(hidden, **numbers)
        y.mul_(2)  # y is kept nowhere
        y.sum().backward()
        assert torch.equal(x.grad, 2 * wanted)

    def test_autograd_sees_that_an_out_is_written(self, torch):
        x = torch.ones(3, requires_grad=True)
        kept = torch.ones(3)
        y = x * kept
        relu_xp.leaky_relu(torch.ones(3), out=kept)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize("slope", [0.0, 0.5])
    def test_out_keeps_the_graph(self, torch, slope):
        x = torch.tensor([-1.0, 2.0], requires_grad=True)
        out = torch.empty(2)
        assert relu_xp.relu(x, negative_slope=slope, out=out) is out
        out.sum().backward()
        assert x.grad.tolist() == [slope, 1]

    def test_without_gradients_there_is_no_graph(self, torch):
        x = torch.tensor([-1.0, 2.0], requires_grad=True)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert relu_xp.leaky_relu(x, 0.5).tolist() == [-0.5, 2]
                assert not relu_xp.leaky_relu(x, 0.5).requires_grad
                out = torch.empty(2)
                assert relu_xp.leaky_relu(x, 0.5, out=out) is out
        assert not relu_xp.relu_grad(x).requires_grad

    @pytest.mark.parametrize("member", MEMBERS)
    def test_a_layer_between_operations_of_pytorch(self, torch, member):
        """y has its graph, as relu's has; backward is of the mask, on any dy."""
        numbers = oracle.MEMBERS[member]
        x = torch.linspace(-2, 2, 9, requires_grad=True)
        wanted = relu_xp.relu_grad(x.detach(), **numbers)
        layer = relu_xp.ReLU(**numbers)
        y = layer.forward(x)
        dy = torch.ones(9, requires_grad=True)
        dx = layer.backward(dy, retain=True)
        assert torch.equal(dx, wanted)
        dx.sum().backward()
        assert torch.equal(dy.grad, wanted)
        assert not layer.backward(torch.ones(9)).requires_grad
        y.sum().backward()
        assert torch.equal(x.grad, wanted)


class TestTensors:
    def test_a_mask_is_packed(self, torch):
        layer = relu_xp.LeakyReLU()
        layer.forward(torch.ones(800))
        assert 100 <= layer.saved_nbytes <= 107
        layer.forward(torch.ones(800, requires_grad=True))
        assert 100 <= layer.saved_nbytes <= 107

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int8", "int64"])
    def test_integers_of_every_width(self, torch, dtype):
        x = torch.arange(9).to(getattr(torch, dtype))
        y = relu_xp.relu6(x)
        assert y.dtype == x.dtype
        assert y.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6]

    def test_a_subclass_stays_one(self, torch):
        class Marked(torch.Tensor):
            pass

        x = torch.tensor([-1.0, 2.0]).as_subclass(Marked)
        for y in (relu_xp.relu(x), relu_xp.leaky_relu(x), relu_xp.relu_vjp(x, max_value=1)[1](x)):
            assert type(y) is Marked
        parameter = torch.nn.Parameter(torch.tensor([-1.0, 2.0]))
        assert type(relu_xp.leaky_relu(parameter)) is torch.Tensor

    def test_what_is_no_tensor_is_refused(self, torch):
        for other in (torch.Size([2]), torch.float32, torch.nn.Identity()):
            with pytest.raises(TypeError, match="^relu: x must be an array, got "):
                relu_xp.relu(other)

    def test_without_ml_dtypes_bfloat16_is_served_all_the_same(self, torch, monkeypatch):
        from relu_xp.backends import torch as backend

        x = torch.tensor([-4.0, 2.0], dtype=torch.bfloat16)
        wanted = relu_xp.leaky_relu(x, 0.5)
        monkeypatch.setattr(backend, "_BFLOAT16", None)
        assert torch.equal(relu_xp.leaky_relu(x, 0.5), wanted)

    def test_what_only_looks_like_memory(self, torch):
        """A tensor that is negated when it is read, and one on a device without memory."""
        x = torch.tensor([1.0, -2.0])
        assert relu_xp.leaky_relu(torch._neg_view(x), 0.5).tolist() == [-0.5, 2]
        y = relu_xp.leaky_relu(x.to("meta"), 0.5)
        assert (y.device.type, y.shape) == ("meta", x.shape)


# What PyTorch's own compiler warns of is not ours.
@pytest.mark.filterwarnings("ignore")
class TestCompiled:
    @staticmethod
    def compiled(torch, function):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    @pytest.mark.parametrize("name", PRESETS)
    def test_presets(self, torch, name):
        f = PRESETS[name]
        x = torch.linspace(-8, 8, 33, requires_grad=True)
        y = self.compiled(torch, lambda x: f(x * 2))(x)
        y.sum().backward()
        assert torch.equal(y, f(x * 2))
        again = x.detach().clone().requires_grad_()
        f(again * 2).sum().backward()
        assert torch.equal(x.grad, again.grad)

    @pytest.mark.parametrize("seen", [False, True])
    def test_every_function_and_a_layer(self, torch, seen):
        slope = 0.4375 if seen else 0.3125
        numbers = {"negative_slope": slope, "max_value": 3.0}
        layer = relu_xp.ReLU(**numbers)

        def f(x, dy):
            y, pullback = relu_xp.relu_vjp(x, **numbers)
            results = [y, pullback(dy), layer.forward(x), layer.backward(dy)]
            results.append(relu_xp.relu_backward(dy, x, **numbers))
            results.append(relu_xp.relu_grad(x, **numbers))
            results.append(relu_xp.relu(x, **numbers, out=torch.empty_like(x)))
            return results

        x, dy = torch.linspace(-8, 8, 33), torch.linspace(2, 4, 33)
        if seen:
            f(x, dy)
        results = self.compiled(torch, f)(x, dy)
        for one, other in zip(results, f(x, dy), strict=True):
            assert torch.equal(one, other)

    def test_in_a_fresh_process(self, require, python):
        """Nothing of PyTorch's was met before: no backend is loaded, and no number rounded."""
        require("torch")
        printed = python(
            """
            import warnings
            import relu_xp, torch

            parameter = torch.nn.Parameter(torch.tensor([-2.0, 4.0]))

            @torch.compile(fullgraph=True, backend="eager")
            def f(x):
                y = relu_xp.relu(x) + relu_xp.leaky_relu(x, 0.25) + relu_xp.relu6(x.bfloat16())
                return y + relu_xp.leaky_relu(parameter, 0.5)

            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                print(f(torch.tensor([-4.0, 8.0])).tolist())
            """,
            timeout=120,
        )
        assert printed == "[-2.0, 26.0]\n"

    def test_what_is_recorded_is_run_again_on_other_numbers(self, torch):
        from torch.fx.experimental.proxy_tensor import make_fx

        def f(x):
            y, pullback = relu_xp.relu_vjp(x, negative_slope=0.5, max_value=2.0)
            return y + pullback(x) + relu_xp.leaky_relu(x)

        x, other = torch.linspace(-4, 4, 9), torch.linspace(5, -5, 9)
        assert torch.equal(make_fx(f)(x)(other), f(other))
        assert torch.equal(torch.jit.trace(f, x)(other), f(other))


class TestJax:
    @pytest.mark.parametrize("member", MEMBERS)
    def test_dead_units_have_a_gradient_of_plus_zero(self, jax, member):
        """At and below a knee without a slope, and at a ceiling, whatever comes back."""
        numbers = oracle.MEMBERS[member]
        x = jax.numpy.asarray([-np.inf, -3.0, -2.0, 7.0, np.inf], "float32")
        x = x[np.asarray(relu_xp.relu_grad(x, **numbers)) == 0]
        dy = jax.numpy.asarray([np.nan, np.inf, 2.0, -np.inf, -2.0], "float32")[: x.size]

        def f(x):
            return relu_xp.relu(x, **numbers)

        for function in (f, jax.jit(f), jax.vmap(f)):
            _, vjp = jax.vjp(function, x)
            assert is_positive_zero(vjp(dy)[0])

    @pytest.mark.parametrize("name", PRESETS)
    def test_every_transformation(self, jax, name):
        f = PRESETS[name]
        x = jax.numpy.linspace(-8, 8, 32, dtype="float32")
        wanted = jax.vmap(jax.grad(f))(x)
        np.testing.assert_array_equal(f(x), jax.jit(f)(x))
        np.testing.assert_array_equal(jax.jvp(f, (x,), (jax.numpy.ones_like(x),))[1], wanted)
        np.testing.assert_array_equal(jax.numpy.diag(jax.jacfwd(f)(x)), wanted)
        np.testing.assert_array_equal(jax.numpy.diag(jax.jacrev(f)(x)), wanted)
        np.testing.assert_array_equal(jax.hessian(lambda x: f(x).sum())(x), np.zeros((32, 32)))
        _, vjp = jax.vjp(f, x)
        np.testing.assert_array_equal(vjp(jax.numpy.ones_like(x))[0], wanted)

    @pytest.mark.parametrize("member", MEMBERS)
    def test_a_layer_inside_jit(self, jax, member):
        """Where forward and backward are in one trace."""
        layer = relu_xp.ReLU(**oracle.MEMBERS[member])

        @jax.jit
        def f(x, dy):
            y = layer.forward(x)
            return y, layer.backward(dy)

        x = jax.numpy.linspace(-2, 2, 9, dtype="float32")
        dy = jax.numpy.cos(x)
        y, dx = f(x, dy)
        np.testing.assert_array_equal(y, layer.forward(x))
        np.testing.assert_array_equal(dx, layer.backward(dy))
