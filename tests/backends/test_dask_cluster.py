"""Dask on worker processes that have little memory or are killed, and training on them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from passes import run_all

import relu_xp
from relu_xp.cli import train

da = pytest.importorskip("dask.array")
distributed = pytest.importorskip("distributed")
import dask  # noqa: E402

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def cluster_of_two(**settings):
    """Start two worker processes of one thread each, and a client for which Dask computes there."""
    with (
        dask.config.set({f"distributed.{name}": value for name, value in settings.items()}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit="1GB", dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def cluster():
    with cluster_of_two() as client:
        yield client


def test_a_cluster_computes_the_same(cluster):
    host = np.random.default_rng(1).standard_normal((60, 50)).astype(np.float32)
    x, dy = da.from_array(host, chunks=(16, 25)), da.from_array(host + 1, chunks=(60, 10))
    for params in ({}, {"negative_slope": 0.5, "max_value": 1.0}, {"positive_slope": 2.0}):
        lazy = cluster.gather(cluster.compute(run_all(x, dy, params)))
        for got, wanted in zip(lazy, run_all(host, host + 1, params), strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_a_worker_computes_the_backward_pass(cluster):
    """Pullbacks of NumPy arrays travel there and back; what is lazy may be given too."""
    x = np.random.default_rng(2).standard_normal((60, 50)).astype(np.float32)
    weight = np.linspace(-1, 1, 50, dtype=np.float32)
    calls = [("relu", x), ("prelu", x, weight), ("bias_relu", x, weight)]
    for name, *operands in (*calls, ("crelu", x), ("squared_relu", x)):
        y, pullback = getattr(relu_xp, f"{name}_vjp")(*operands)
        found, wanted = cluster.submit(pullback, y).result(), pullback(y)
        for one, other in zip(found, wanted, strict=True):  # of gradients, or of rows
            np.testing.assert_array_equal(one, other)
    lazy = da.from_array(x, chunks=(16, 25))
    y, pullback = relu_xp.relu_vjp(lazy)
    dx = cluster.submit(lambda p, dy: p(dy).compute(), pullback, y, priority=1).result()
    np.testing.assert_array_equal(dx, relu_xp.relu_backward(relu_xp.relu(x), x))
    y, pullback = relu_xp.bias_relu_vjp(lazy, da.from_array(weight, chunks=50))
    found = [future.result() for future in cluster.compute(pullback(y))]
    its_y, its_pullback = relu_xp.bias_relu_vjp(x, weight)
    dx, bias_grad = its_pullback(its_y)
    np.testing.assert_array_equal(found[0], dx)
    np.testing.assert_allclose(found[1], bias_grad, rtol=1e-6)


def test_four_gigabytes_through_two_workers_of_one():
    """The gradient needs the whole of y, 4 GB, before it can begin. What is held by then: masks.

    Nothing is spilled to disk or paused, and a worker beyond its limit is killed for good.
    """
    # Nested functions: a worker cannot import this file.

    def make_block(block_info=None):
        rows, columns = block_info[None]["chunk-shape"]
        return np.tile(np.arange(-2, 3, dtype=np.float32), (rows, columns // 5))

    def limits(dask_worker):
        manager = dask_worker.memory_manager
        return manager.memory_limit, manager.memory_target_fraction, manager.memory_spill_fraction

    def peak_memory():
        """Return the most bytes of this process that were in memory, without its parent's."""
        with open("/proc/self/status") as status:
            (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM:"))
        return 1024 * int(peak)

    memory = {f"worker.memory.{name}": False for name in ("target", "spill", "pause")}
    memory["worker.memory.terminate"] = 0.95
    with cluster_of_two(**memory, **{"scheduler.allowed-failures": 0}) as client:
        assert {*client.run(limits).values()} == {(10**9, False, False)}
        rows, columns = 250_000, 4_000
        meta = np.empty((0, 0), np.float32)
        chunks = ((1000,) * (rows // 1000), (columns,))
        x = da.map_blocks(make_block, chunks=chunks, dtype=np.float32, meta=meta)
        assert x.nbytes == 4 * 10**9
        y, pullback = relu_xp.relu_vjp(x)
        assert pullback.saved_nbytes == x.nbytes // 32
        dx = pullback(da.broadcast_to(y.max(), x.shape, chunks=x.chunks))
        results = dask.compute(y.sum(dtype="f8"), dx.sum(dtype="f8"))
        assert results == (rows * columns * 3 / 5, 2 * rows * columns * 2 / 5)
        assert max(client.run(peak_memory).values()) < 10**9


@pytest.fixture(scope="module")
def undisturbed(require, cluster):
    require("sklearn"), require("tqdm")
    return train.train("dask", epochs=2, seed=1)


def assert_same(result, undisturbed):
    """Raise AssertionError unless two runs have learned the same, to the bit."""
    for one in ("losses", "accuracies", "seed", "backend"):
        assert getattr(result, one) == getattr(undisturbed, one)


def test_a_cluster_learns_what_numpy_does(cluster, undisturbed):
    reference = train.train("numpy", epochs=2, seed=1)
    assert undisturbed.losses == pytest.approx(reference.losses, rel=1e-4)
    assert undisturbed.accuracies == pytest.approx(reference.accuracies, abs=0.01)
    assert cluster.scheduler.address in undisturbed.device


# Older versions of Dask warn of what is intended here: the cluster's client is not used.
@pytest.mark.filterwarnings("ignore:Running on a single-machine scheduler:UserWarning")
def test_threads_learn_the_same_to_the_bit(undisturbed):
    """The sums do not depend on who computes them."""
    with dask.config.set(scheduler="threads"):
        result = train.train("dask", epochs=2, seed=1)
    assert "tcp:" not in result.device
    assert_same(result, undisturbed)


def test_a_worker_that_is_killed_takes_nothing_away(cluster, undisturbed, monkeypatch):
    victim = next(iter(cluster.run(os.getpid).values()))
    steps = []
    gradient = train._gradient_of_chunks

    def interrupted(*arguments):
        steps.append(None)
        if len(steps) == 50:
            os.kill(victim, signal.SIGKILL)
        return gradient(*arguments)

    monkeypatch.setattr(train, "_gradient_of_chunks", interrupted)
    assert_same(train.train("dask", epochs=2, seed=1), undisturbed)
    assert len(steps) == 88
    assert victim not in cluster.run(os.getpid).values()
    cluster.wait_for_workers(2, timeout=60)


def run_command(scheduler):
    command = [sys.executable, "-P", "-m", "relu_xp", "train", "--backend", "dask"]
    command += ["--epochs", "1", "--scheduler", scheduler]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_line_on_a_cluster(undisturbed, cluster):
    result = run_command(cluster.scheduler.address)
    assert result.returncode == 0, result.stderr
    backend, device, *_ = result.stdout.splitlines()
    assert (backend.split(), cluster.scheduler.address in device) == (["backend", "dask"], True)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "tcp://127.0.0.1:{}", "nonsense"])
def test_a_scheduler_that_does_not_answer_is_one_line(address):
    with socket.create_server(("127.0.0.1", 0)) as server:  # which is no scheduler
        address = address.format(server.getsockname()[1])
        result = run_command(address)
    reason = "missing port number" if address == "nonsense" else "nothing within 3 s"
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    start = f"relu-xp train: error: no scheduler answers at {address!r}: {reason}"
    assert result.stderr.startswith(start)


def test_a_scheduler_without_workers_is_refused():
    with distributed.LocalCluster(
        n_workers=0, dashboard_address=":0", processes=False, protocol="tcp"
    ) as cluster:
        address = cluster.scheduler_address
        with (
            pytest.raises(ValueError, match=f"the scheduler at {address} has no workers"),
            train.connected(address),
        ):
            pass
