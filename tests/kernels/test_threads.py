"""Threads: the workers of a call, callers in several threads, child processes, exit."""

from __future__ import annotations

import collections
import concurrent.futures
import ctypes
import itertools
import os
import random
import signal
import sys
import sysconfig
import textwrap
import threading
import time

import numpy as np
import pytest
from libraries import LIBRARIES, unavailable

import relu_xp
from relu_xp import kernels

PRESETS = ({}, {"negative_slope": 0.1}, {"max_value": 0.75, "negative_slope": 0.1})


@pytest.fixture(scope="module")
def compiled(request):
    if reason := LIBRARIES["compiled"].load():
        unavailable(request.config, f"compiled kernels: {reason}")


@pytest.fixture
def four_threads(compiled):
    """Four threads, on any number of CPUs, and for small arrays too."""
    limits, count = kernels.cpu.set_limits(1 << 14, 1 << 14, 1 << 25), relu_xp.get_num_threads()
    relu_xp.set_num_threads(4)
    yield
    relu_xp.set_num_threads(count)
    kernels.cpu.set_limits(*limits)


def bits(x):
    return x.view(f"u{x.itemsize}")


# ---- How many ------------------------------------------------------------------------------------


class TestNumber:
    @pytest.fixture
    def quota(self, monkeypatch, tmp_path):
        """Eight CPUs, and a file that may limit them."""
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
        monkeypatch.setattr(kernels, "_QUOTA", tmp_path / "cpu.max")
        monkeypatch.delenv(kernels.NUM_THREADS, raising=False)
        return tmp_path / "cpu.max"

    @pytest.mark.parametrize(
        ("text", "limit", "wanted"),
        [(text, None, 8) for text in (None, "", "8", "9", "1000")]
        + [("1", None, 1), ("2", None, 2), ("3", "50000 100000\n", 1), ("3", "max 100000\n", 3)]
        + [(None, limit, 8) for limit in ("max 100000\n", "1600000 100000\n", "nonsense", "")]
        + [(None, "50000 100000\n", 1), (None, "150000 100000\n", 2)],
    )
    def test_the_environment_and_a_container_lower_it(
        self, quota, monkeypatch, text, limit, wanted
    ):
        if text is not None:
            monkeypatch.setenv(kernels.NUM_THREADS, text)
        if limit is not None:
            quota.write_text(limit)
        assert kernels._default_num_threads() == wanted

    @pytest.mark.parametrize("text", ["0", "two", "-1", "1.5", "1e1", "2,2", "0x2", " ", "²"])
    def test_an_invalid_environment_raises(self, quota, monkeypatch, text):
        monkeypatch.setenv(kernels.NUM_THREADS, text)
        with pytest.raises(ValueError, match=f"^RELU_XP_NUM_THREADS must be .* got {text!r}$"):
            kernels._default_num_threads()

    @pytest.mark.parametrize(("cpus", "wanted"), [(5, 5), (None, 1)])
    def test_a_system_without_affinity(self, quota, monkeypatch, cpus, wanted):
        monkeypatch.delattr(os, "sched_getaffinity")
        monkeypatch.setattr(os, "cpu_count", lambda: cpus)
        assert kernels._default_num_threads() == wanted

    def test_a_new_process(self, compiled, python):
        script = """
            import os, sys
            import numpy as np
            import relu_xp
            if len(sys.argv) > 1:
                os.sched_getaffinity = lambda _: set(range(int(sys.argv[1])))
            try:
                relu_xp.relu(np.ones(3))
                print(relu_xp.get_num_threads())
            except ValueError as error:
                print(error)
        """
        cpus = kernels._default_num_threads()
        assert python(script) == f"{cpus}\n"
        assert python(script, RELU_XP_NUM_THREADS=1) == "1\n"
        without = "import relu_xp\nrelu_xp.set_num_threads(2)\nprint(relu_xp.get_num_threads())"
        assert python(without, RELU_XP_NATIVE=0) == "1\n"
        assert python(script, RELU_XP_NUM_THREADS=100_000) == f"{cpus}\n"
        assert int(python(script, 5000)) <= 1024
        message = "RELU_XP_NUM_THREADS must be an integer, 1 or greater, got 'two'\n"
        assert python(script, RELU_XP_NUM_THREADS="two") == message

    def test_set_num_threads(self, four_threads):
        assert relu_xp.get_num_threads() == 4
        for number in (1, 7, np.int8(3), 1024):
            relu_xp.set_num_threads(number)
            assert relu_xp.get_num_threads() == number

    @pytest.mark.parametrize(
        ("n", "error"),
        [(n, TypeError) for n in (None, "2", 2.0, True)]
        + [(n, ValueError) for n in (0, -1, 1025, 10**30)],
    )
    def test_an_invalid_number_raises(self, n, error):
        before = relu_xp.get_num_threads()
        with pytest.raises(error, match="^set_num_threads: n must be"):
            relu_xp.set_num_threads(n)
        assert relu_xp.get_num_threads() == before

    def test_as_many_take_part(self, process):
        """The caller is one of them; workers that are no longer needed wait."""
        script = """
            for number in (1, 2, 5, 3):
                relu_xp.set_num_threads(number)
                check_calls()
                print(workers(), end=" ")
        """
        assert process(script) == "0 1 4 4 "


# ---- Callers -------------------------------------------------------------------------------------


class Case:
    """Arrays, and the results of every function without compiled kernels."""

    def __init__(self, number):
        dtype = np.dtype(("float32", "float64", "float16")[number // 3 % 3])
        self.params = PRESETS[number % 3]
        rng = np.random.default_rng(number)
        order = np.asfortranarray if number % 2 else np.asarray
        arrays = rng.standard_normal((2, 300 + 7 * (number // 4), 401)).astype(dtype)
        self.x, self.dy = map(order, arrays)
        self.opposite, self.out = -self.x, np.empty_like(self.x)
        self.layer = relu_xp.ReLU(**self.params)
        self.others = [
            relu_xp.PReLU(401, init=0.5),
            relu_xp.RReLU(0.5, 0.5),
            relu_xp.CReLU(),
            relu_xp.SquaredReLU(),
        ]
        with LIBRARIES["numpy"].running():
            self.wanted = [y.copy() for y in self.results()]
        self.small = np.ascontiguousarray(self.x[:20]).astype(np.float32)
        self.slopes = itertools.count(number, 16)
        names = ("torch", "jax", "dask", "array_api_strict")
        names = [name for name in names if LIBRARIES[name].load() is None]
        self.library = LIBRARIES[names[number % len(names)]] if names else None

    def results(self):
        params, x, dy, out = self.params, self.x, self.dy, self.out
        yield relu_xp.relu(x, **params)
        yield relu_xp.relu(x, **params, out=out)
        y, pullback = relu_xp.relu_vjp(x, **params)
        _, opposite = relu_xp.relu_vjp(self.opposite, **params)
        yield from (y, self.layer.forward(x), pullback(dy), opposite(dy), self.layer.backward(dy))
        yield pullback(dy, out=out)
        yield relu_xp.relu_backward(dy, x, **params)
        yield relu_xp.relu_grad(x, **params)
        out[...] = x
        y, pullback = relu_xp.relu_vjp(out, **params, out=out)
        yield y
        out[...] = dy
        yield pullback(out, out=out)
        for layer in self.others:
            y = layer.forward(x)
            yield from (y, layer.backward(y), *layer.grads)

    def check(self):
        """Compare all results; also with a new slope every time, and of another library."""
        for wanted, got in zip(self.wanted, self.results(), strict=True):
            assert np.array_equal(bits(wanted), bits(got))
        slope = np.float32(1 / (1 + next(self.slopes)))
        got = relu_xp.relu(self.small, negative_slope=float(slope))
        assert np.array_equal(got, np.where(self.small > 0, self.small, self.small * slope))
        if self.library:
            y, pullback = relu_xp.relu_vjp(self.library.array(self.small))
            dx = pullback(self.library.array(self.small))
            for got in map(self.library.numpy, (y, dx)):
                assert np.array_equal(got, np.maximum(self.small, 0))


@pytest.mark.slow
def test_the_bits_do_not_depend_on_the_number_of_threads(four_threads):
    for case, threads in itertools.product(map(Case, range(9)), (1, 2, 3, 7)):
        relu_xp.set_num_threads(threads)
        case.check()


def test_the_number_of_threads_is_set_while_others_call(four_threads):
    case, draw = Case(1), random.Random(0)

    def call():
        assert np.array_equal(relu_xp.relu(case.x, **case.params), case.wanted[0])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(call) for _ in range(500)]
        while not all(future.done() for future in calls):
            relu_xp.set_num_threads(draw.randrange(1, 9))
        for future in calls:
            future.result()


class TestCallersAtOnce:
    @pytest.fixture(params=["numpy", "compiled"], autouse=True)
    def backend(self, request):
        if request.param == "compiled":
            request.getfixturevalue("four_threads")
        with LIBRARIES[request.param].running():
            yield

    @pytest.mark.slow
    def test_sixteen_threads(self, request):
        cases = [Case(number) for number in range(16)]
        for case in cases:  # array_api_compat raises while another thread imports PyTorch
            case.check()
        rounds = collections.Counter()
        start = threading.Barrier(16, timeout=20)
        deadline = time.monotonic() + request.config.getoption("--soak")

        def work(number):
            start.wait()
            while time.monotonic() < deadline:
                cases[number].check()
                rounds[number] += 1

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            for future in [pool.submit(work, number) for number in range(16)]:
                future.result()
        assert len(rounds) == 16

    @pytest.mark.parametrize("which", [0, -1])
    def test_the_check_can_fail(self, which):
        case = Case(0)
        case.check()
        bits(case.wanted[which]).reshape(-1)[-1] ^= 1
        with pytest.raises(AssertionError):
            case.check()


class TestEnvironment:
    """A worker has its caller's floating-point environment."""

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_products_are_rounded_as_the_caller_rounds(self, four_threads, request, dtype):
        if sys.platform != "linux":
            unavailable(request.config, "the rounding mode is set as on Linux")
        libm = ctypes.CDLL("libm.so.6")
        modes = {"x86_64": (0, 0x400, 0x800, 0xC00), "aarch64": (0, 2 << 22, 1 << 22, 3 << 22)}
        x = -np.random.default_rng(0).random(1 << 20).astype(dtype)
        slope = dtype(0.1)
        found = []
        for mode in modes[os.uname().machine] * 3:
            before = libm.fegetround()
            assert libm.fesetround(mode) == 0
            try:
                y = relu_xp.relu(x, negative_slope=slope)
                wanted = x * slope  # in this thread
            finally:
                libm.fesetround(before)
            assert np.array_equal(y, wanted)
            found.append(y.tobytes())
        assert len(set(found)) == 3  # up is towards zero

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_products_are_flushed_as_the_callers_are(self, four_threads, flush_to_zero, dtype):
        x = np.full(1 << 17, -np.finfo(dtype).smallest_normal)
        for _ in range(50):
            with flush_to_zero():
                flushed = relu_xp.relu(x, negative_slope=0.5)
            assert not bits(np.abs(flushed)).any()
            assert bits(relu_xp.relu(x, negative_slope=0.5)).all()


# ---- Processes -----------------------------------------------------------------------------------

# Four threads, for small arrays too; and functions that start and check child processes.
BEGIN = """
    import atexit, ctypes, multiprocessing, os, signal, sys, threading, time, warnings
    # Python 3.12 and later warn of a fork with threads.
    warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
    # A shell starts background jobs with this signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's, whose threads would be counted
    import numpy as np
    import relu_xp
    from relu_xp.kernels import cpu

    cpu.set_limits(1 << 14, 1 << 14, 1 << 25)
    relu_xp.set_num_threads(4)
    x = np.random.default_rng(0).standard_normal((211, 401), np.float32)
    wanted = np.where(x > 0, x, np.float32(0))
    big = np.ones(1 << 22, np.float32)

    def check_calls(repeats=3):
        for _ in range(repeats):
            assert np.array_equal(relu_xp.relu(x), wanted)
            y, pullback = relu_xp.relu_vjp(x)
            assert np.array_equal(y, wanted)
            assert np.array_equal(pullback(x), wanted)
            assert np.array_equal(relu_xp.relu_backward(x, x), wanted)

    def workers():
        # Threads of this process that are not Python's.
        return len(os.listdir("/proc/self/task")) - threading.active_count()

    def call_forever():
        mine = big.copy()
        while True:
            relu_xp.relu(mine, out=mine)
            relu_xp.relu_vjp(mine, out=mine)[1](mine, out=mine)

    def child(pipe):
        assert workers() == 0
        check_calls()
        pipe.send(workers())

    def check(context, target=child):
        pipe, its = context.Pipe()
        process = context.Process(target=target, args=(its,))
        process.start()
        its.close()
        try:
            assert pipe.poll(20), "the child sends nothing"
            assert pipe.recv() == 3, "the child has no workers of its own"
            process.join(20)
            assert process.exitcode == 0, process.exitcode
        finally:
            process.kill()
            pipe.close()

    def interrupt(delay):
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)

    def wait_for(child):
        deadline = time.monotonic() + 20
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                raise AssertionError("the child does not end")
            time.sleep(0.01)
        return os.waitstatus_to_exitcode(done[1])
"""


@pytest.fixture
def process(request, compiled, python):
    """Return a function that runs BEGIN and a script in a new process."""
    if sys.platform != "linux":
        unavailable(request.config, "the threads of a process are counted as on Linux")

    def run(script, *, status=0, stderr="", timeout=60):
        text = textwrap.dedent(BEGIN) + textwrap.dedent(script)
        return python(text, status=status, stderr=stderr, timeout=timeout)

    return run


FORKS = {
    "a child forked while the workers wait": """
        context = multiprocessing.get_context("fork")
        check(context)  # before there are any
        check_calls()
        assert workers() == 3
        for _ in range(10):
            check(context)
            check_calls()
        time.sleep(0.05)  # they sleep
        check(context)
        check_calls()
        assert workers() == 3

        def parent(pipe):
            check(context)
            child(pipe)
            check(context)

        check(context, parent)
        with context.Pool(3) as pool:
            for y in pool.map(relu_xp.relu, [x] * 20):
                assert np.array_equal(y, wanted)
    """,
    "forked while other threads are in calls": """
        check_calls()
        context = multiprocessing.get_context("fork")
        line = np.linspace(-1, 1, 1 << 22, dtype=np.float32)
        above, stop, failed = np.maximum(line, 0), threading.Event(), []

        def call():
            while not stop.is_set():
                if not np.array_equal(relu_xp.relu(line), above):
                    failed.append(1)

        callers = [threading.Thread(target=call) for _ in range(2)]
        for caller in callers:
            caller.start()
        try:
            for _ in range(30):
                check(context)
            check_calls()
        finally:
            stop.set()
        for caller in callers:
            caller.join()
        assert not failed
    """,
    "forked in c": """
        check_calls()
        fork = ctypes.PyDLL(None).fork  # neither Python nor this package is notified
        threading.Thread(target=call_forever, daemon=True).start()
        for number in range(20):
            child = fork()
            if child == 0:
                try:
                    before = len(os.listdir("/proc/self/task"))
                    check_calls()
                    os._exit(len(os.listdir("/proc/self/task")) - before)
                finally:
                    os._exit(99)
            assert wait_for(child) == 3
            check_calls(1)
    """,
    "a child that exits or was forked by a thread": """
        def fork(function, leave):
            child = os.fork()
            if child == 0:
                try:
                    function()
                except BaseException as error:
                    print(type(error), error, file=sys.stderr)
                    os._exit(1)
                if leave:
                    os._exit(0)
                sys.exit(7)  # by way of atexit, where the workers are joined
            assert wait_for(child) == (0 if leave else 7)

        for first in (lambda: None, check_calls):
            first()
            fork(check_calls, True)
            fork(check_calls, False)
            fork(lambda: None, False)
        thread = threading.Thread(target=fork, args=(check_calls, True))
        thread.start()
        thread.join()
        check_calls()
    """,
}


class TestProcesses:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", FORKS)
    def test_fork(self, process, name):
        process(FORKS[name])

    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    def test_other_start_methods(self, process, method):
        script = f"""
            if __name__ == "__main__":
                check_calls()
                context = multiprocessing.get_context({method!r})
                check(context)
                check_calls()
        """
        process(script)


# ---- Exit, interrupts, idleness ------------------------------------------------------------------


class TestExit:
    """A process ends in time, with the expected status, and prints nothing."""

    @pytest.mark.slow
    def test_daemon_threads_are_in_calls(self, process):
        """Their first calls, and later ones."""
        script = """
            for _ in range(2):
                threading.Thread(target=call_forever, daemon=True).start()
            time.sleep(DELAY)
            sys.exit(3)
        """
        scripts = [script.replace("DELAY", str(0.001 * number)) for number in range(40)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda text: process(text, status=3), scripts))

    @pytest.mark.slow
    @pytest.mark.parametrize("last", ["", "time.sleep(0.05)", "sys.exit(0)", "cpu.shut_down()"])
    def test_right_after_a_call(self, process, last):
        for _ in range(5):
            process(f"check_calls()\nassert workers() == 3\n{last}", timeout=20)

    @pytest.mark.parametrize("first", ["", "check_calls()"])
    def test_calls_from_atexit_use_no_workers(self, process, first):
        """A function that is registered before `shut_down` runs after it."""
        script = f"""
            import relu_xp.kernels

            def last():
                assert workers() == 0
                check_calls()
                assert np.array_equal(relu_xp.relu(big), big)
                assert workers() == 0
                print("last")

            atexit.unregister(cpu.shut_down)
            atexit.register(last)
            atexit.register(cpu.shut_down)
            atexit.register(check_calls)
            {first}
        """
        assert process(script, timeout=20) == "last\n"

    def test_an_interrupt_ends_a_process_in_a_long_call(self, process):
        script = """
            threading.Thread(target=interrupt, args=(0.1,)).start()
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                relu_xp.relu(big, out=big)
        """
        message = r"Traceback .*\nKeyboardInterrupt\n"
        for _ in range(3):
            process(script, status=-signal.SIGINT, stderr=message)


class TestInterrupts:
    @pytest.mark.slow
    def test_many_in_large_calls(self, process):
        script = """
            check_calls()
            mine = big[: 1 << 21].copy()
            caught = 0

            def call_until_then(thread):
                thread.start()
                deadline = time.monotonic() + 20
                while time.monotonic() < deadline:
                    relu_xp.relu(mine, out=mine)
                    relu_xp.relu_vjp(mine, out=mine)[1](mine)

            for number in range(100):
                thread = threading.Thread(target=interrupt, args=(0.0003 * number,))
                try:
                    call_until_then(thread)
                except KeyboardInterrupt:
                    caught += 1
                thread.join()
                check_calls(1)
            assert caught == 100, caught
        """
        process(script)

    @pytest.mark.slow
    def test_at_every_point_of_a_call(self, process):
        """Python raises one where a function of the package begins or returns."""
        script = """
            def interrupt_everywhere(call, then):
                points = whole = 0
                while not whole:
                    left = points

                    def profile(frame, event, argument):
                        nonlocal left
                        callers = [f and f.f_code.co_filename for f in (frame, frame.f_back)]
                        if event != "c_call" and any("relu_xp" in (name or "") for name in callers):
                            left -= 1
                            if left == -1:
                                raise KeyboardInterrupt

                    try:
                        sys.setprofile(profile)
                        call()
                    except KeyboardInterrupt:
                        assert left == -1
                    else:
                        sys.setprofile(None)
                        whole = left >= 0
                    then()
                    points += 1
                return points

            layers = [
                relu_xp.ReLU(), relu_xp.LeakyReLU(), relu_xp.ReLU6(negative_slope=0.1),
                relu_xp.PReLU(401), relu_xp.RReLU(), relu_xp.CReLU(), relu_xp.SquaredReLU(),
            ]
            mine, few, slopes = x.copy(), x[::2], iter(range(1, 10_000))
            y, pullback = relu_xp.relu_vjp(x)
            calls = [
                lambda: relu_xp.relu(x, negative_slope=1 / next(slopes)),
                lambda: relu_xp.relu_vjp(x, max_value=next(slopes), out=mine),
                lambda: pullback(x, out=mine),
                lambda: relu_xp.relu_backward(x, x, threshold=1 / next(slopes)),
                lambda: relu_xp.relu_vjp(few)[1](few),
                *[lambda layer=layer: layer.backward(layer.forward(x)) for layer in layers],
            ]
            points = [interrupt_everywhere(call, lambda: check_calls(1)) for call in calls]
            assert min(points) > 5, points
            for layer in layers:  # none is left in an invalid state
                layer.backward(layer.forward(x))
        """
        process(script)


def test_idle_workers_use_no_processor(process):
    script = """
        check_calls()
        assert workers() == 3
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(0.5)
        print(time.process_time() - before)
    """
    assert float(process(script)) < 0.05


def test_no_system_thread_can_be_started(process):
    """Calls do without."""
    script = """
        import resource
        stack, most = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 22), most))  # less than a stack
        check_calls()
        assert workers() == 0
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        check_calls()
        assert workers() == 3
    """
    process(script)


def test_gevent(compiled, require, python):
    """A worker that waited as one of its greenlets would never be notified."""
    require("gevent")
    script = """
        from gevent import monkey
        monkey.patch_all()
        import gevent
        import numpy as np
        import relu_xp

        x = np.linspace(-1, 1, 1 << 22, dtype=np.float32)
        relu_xp.set_num_threads(2)
        for _ in range(3):
            y = relu_xp.relu(x)
            gevent.sleep(0)
            assert np.array_equal(y, np.maximum(x, 0))
        jobs = [gevent.spawn(relu_xp.relu, x) for _ in range(4)]
        gevent.joinall(jobs, timeout=20)
        assert all(np.array_equal(job.value, y) for job in jobs)
        print("done")
    """
    assert python(script) == "done\n"


if sysconfig.get_config_var("Py_GIL_DISABLED"):

    def test_importing_leaves_the_gil_off(compiled, python):
        script = """
            import sys
            import numpy as np
            import relu_xp
            if sys._is_gil_enabled():
                sys.exit(print("NumPy switches it on"))
            relu_xp.relu(np.ones(3))
            assert "relu_xp.kernels._cpu" in sys.modules
            assert not sys._is_gil_enabled()
        """
        assert python(script) == ""
