"""Several threads: ours that help with a call, the user's that make calls, and processes."""

from __future__ import annotations

import collections
import concurrent.futures
import gc
import itertools
import os
import signal
import sys
import textwrap
import threading
import time
import weakref

import numpy as np
import pytest
from conftest import unavailable
from libraries import LIBRARIES

import relu_xp
from relu_xp import mask
from relu_xp.backends import llvm, threads
from relu_xp.backends import numpy as numpy_backend
from relu_xp.backends.llvm.loader import loader
from relu_xp.backends.llvm.runtime import BOARD

MEMBERS = ({}, {"negative_slope": 0.1}, {"max_value": 0.75, "negative_slope": 0.1})


class TestCount:
    @pytest.fixture(autouse=True)
    def eight(self, monkeypatch, tmp_path):
        """Eight CPUs, no limit."""
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
        monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
        monkeypatch.delenv(threads.VARIABLE, raising=False)
        self.quota = tmp_path / "cpu.max"
        threads.count.cache_clear()
        yield
        threads.count.cache_clear()

    def test_the_cpus_of_the_process(self):
        assert threads.count() == 8

    @pytest.mark.parametrize(
        ("text", "wanted"), [("1", 1), ("2", 2), ("8", 8), ("9", 8), ("1000", 8), ("", 8)]
    )
    def test_the_variable_asks_for_fewer(self, monkeypatch, text, wanted):
        monkeypatch.setenv(threads.VARIABLE, text)
        assert threads.count() == wanted

    @pytest.mark.parametrize("text", ["0", "two", "-1", "1.5", "1e1", "2,2", "0x2", " ", "²"])
    def test_what_is_no_number_of_threads_is_refused(self, monkeypatch, text):
        monkeypatch.setenv(threads.VARIABLE, text)
        with pytest.raises(ValueError, match=f"^RELU_XP_NUM_THREADS must be .* got {text!r}$"):
            threads.count()

    @pytest.mark.parametrize(
        ("quota", "wanted"),
        [
            ("max 100000\n", 8),
            ("50000 100000\n", 1),
            ("100000 100000\n", 1),
            ("150000 100000\n", 2),
            ("1600000 100000\n", 8),
            ("nonsense", 8),
            ("", 8),
        ],
    )
    def test_a_container_allows_fewer(self, monkeypatch, quota, wanted):
        self.quota.write_text(quota)
        assert threads.count() == wanted
        threads.count.cache_clear()
        monkeypatch.setenv(threads.VARIABLE, "3")
        assert threads.count() == min(wanted, 3)

    @pytest.mark.parametrize(("cpus", "wanted"), [(5, 5), (None, 1)])
    def test_a_system_without_affinity(self, monkeypatch, cpus, wanted):
        monkeypatch.delattr(os, "sched_getaffinity")
        monkeypatch.setattr(os, "cpu_count", lambda: cpus)
        assert threads.count() == wanted

    def test_read_once(self, monkeypatch):
        assert threads.count() == 8
        monkeypatch.setenv(threads.VARIABLE, "2")
        assert threads.count() == 8

    def test_a_process_bound_to_one_cpu(self, request, python):
        if sys.platform != "linux":
            unavailable(request.config, "a process is bound to CPUs as on Linux")
        script = """
            import os
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            from relu_xp.backends import threads
            print(threads.count())
        """
        for variable in (None, 2, 1000):
            assert python(script, RELU_XP_NUM_THREADS=variable) == "1\n"

    @pytest.mark.parametrize("jit", [0, 1])
    def test_a_large_call_refuses_the_variable_and_a_small_one_needs_it_not(self, python, jit):
        script = """
            import numpy as np
            import relu_xp
            relu_xp.warmup()
            assert relu_xp.relu(np.array([-1.0, 2.0])).tolist() == [0, 2]
            try:
                relu_xp.relu(np.ones(1 << 21))
            except ValueError as error:
                print(error)
        """
        assert python(script, RELU_XP_NUM_THREADS="two", RELU_XP_JIT=jit).startswith(
            "RELU_XP_NUM_THREADS must be"
        )


class Parts:
    """Counts the parts that were begun and those at work."""

    def __init__(self):
        self.lock = threading.Lock()
        self.begun = collections.Counter()
        self.by = set()
        self.running = 0

    def __call__(self, number, function=lambda: None):
        with self.lock:
            self.begun[number] += 1
            self.running += 1
            self.by.add(threading.current_thread())
        try:
            function()
        finally:
            with self.lock:
                self.running -= 1


class PartError(Exception):
    pass


def fail():
    raise PartError


class TestRun:
    @pytest.fixture(autouse=True)
    def four(self, monkeypatch):
        """Four threads, whatever the CPUs."""
        monkeypatch.setattr(threads, "count", lambda: 4)
        threads._pool.cache_clear()
        yield
        threads._pool().shutdown()
        threads._pool.cache_clear()

    @pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 1000])
    def test_every_part_once(self, number):
        parts = Parts()
        threads.run(parts, ((i,) for i in range(number)))
        assert parts.begun == dict.fromkeys(range(number), 1)
        assert parts.running == 0

    def test_four_at_once(self):
        parts, meeting = Parts(), threading.Barrier(4, timeout=20)
        threads.run(parts, [(i, meeting.wait) for i in range(8)])
        assert len(parts.by) == 4
        assert threading.current_thread() in parts.by

    def test_a_thread_that_is_held_up_delays_only_its_own_part(self):
        parts, others = Parts(), threading.Semaphore(0)

        def wait():
            for _ in range(99):
                assert others.acquire(timeout=20)

        threads.run(parts, [(0, wait), *[(i, others.release) for i in range(1, 100)]])
        assert parts.begun.total() == 100

    @pytest.mark.parametrize(
        "failing",
        [["caller"], [0], [1], [2], [0, 1, 2], ["caller", 0]],
        ids=lambda failing: "-".join(map(str, failing)),
    )
    def test_an_error_goes_to_the_caller_when_nothing_is_at_work(self, failing):
        """An error of the caller's own part, or of those of some of three helpers."""
        parts = Parts()
        meeting = threading.Barrier(4, timeout=20)

        def work():
            name = threading.current_thread().name
            meeting.wait()
            if ("caller" if name == "MainThread" else int(name[-1])) in failing:
                raise PartError
            time.sleep(0.0 if name == "MainThread" else 0.3)

        with pytest.raises(PartError):
            threads.run(parts, [(i, work) for i in range(4)])
        assert parts.running == 0
        assert len(parts.by) == 4
        threads.run(parts, [(1000,)])
        assert parts.begun[1000] == 1

    def test_after_an_error_of_the_caller_no_other_part_is_begun(self):
        parts = Parts()

        def work():
            if threading.current_thread() is threading.main_thread():
                raise PartError
            time.sleep(0.01)

        with pytest.raises(PartError):
            threads.run(parts, [(i, work) for i in range(1000)])
        assert parts.running == 0
        assert parts.begun.total() < 50

    def test_an_interrupt_while_helpers_finish_waits_for_them(self, request):
        if sys.platform == "win32":
            unavailable(request.config, "there is no SIGINT that wakes a waiting thread")
        parts = Parts()
        begun = threading.Event()

        def work():
            if threading.current_thread() is threading.main_thread():
                assert begun.wait(20)
                return
            begun.set()
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

        with pytest.raises(KeyboardInterrupt):
            threads.run(parts, [(0, work), (1, work)])
        running = parts.running
        time.sleep(0.6)
        assert running == 0

    def test_without_threads_the_caller_does_all(self, monkeypatch):
        def start(thread):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", start)
        parts = Parts()
        threads.run(parts, [(i,) for i in range(100)])
        assert parts.begun == dict.fromkeys(range(100), 1)
        assert parts.by == {threading.current_thread()}

    def test_a_helper_that_could_not_be_started_is_not_at_work_afterwards(self, monkeypatch):
        """Its job lies in the pool's queue, where a helper of another call may find it."""
        other, parts = Parts(), Parts()
        both, go, found = threading.Barrier(3, timeout=20), threading.Event(), threading.Event()

        def hold():
            both.wait()
            assert go.wait(20)

        def first():
            go.set()  # the other call ends, and its helper is free
            found.wait(1)

        def second():
            found.set()
            time.sleep(0.3)

        caller = threading.Thread(target=threads.run, args=(other, [(0, hold), (1, hold)]))
        caller.start()
        both.wait()

        def start(thread):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as context:
            context.setattr(threading.Thread, "start", start)
            threads.run(parts, [(0, first), (1, second)])
        running = parts.running
        caller.join()
        time.sleep(0.4)
        assert running == 0

    @pytest.mark.parametrize("how", ["well", "without threads", "with an error"])
    def test_nothing_of_it_is_kept(self, monkeypatch, how):
        """Nor is anything left to the garbage collector: it would be large arrays."""

        def start(thread):
            raise RuntimeError("can't start new thread")

        if how == "without threads":
            monkeypatch.setattr(threading.Thread, "start", start)

        def run():
            parts = Parts()
            part = {"well": lambda: None, "without threads": lambda: None}.get(how, fail)
            try:
                threads.run(parts, [(i, part) for i in range(8)])
            except PartError:
                assert how == "with an error"
            return weakref.ref(parts)

        gc.disable()
        try:
            left = run()
            deadline = time.monotonic() + 5
            while left() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert left() is None
        finally:
            gc.enable()

    def test_a_part_may_run_parts(self):
        parts = Parts()

        def more(base):
            threads.run(parts, [(base + i,) for i in range(1, 10)])

        threads.run(parts, [(100 * i, lambda i=i: more(100 * i)) for i in range(20)])
        assert parts.begun.total() == 200
        assert set(parts.begun.values()) == {1}

    def test_many_callers(self):
        def call(_):
            parts = Parts()
            threads.run(parts, [(i,) for i in range(50)])
            return parts.begun == dict.fromkeys(range(50), 1) and parts.running == 0

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            assert all(pool.map(call, range(500)))


def bits(x):
    return x.view(f"u{x.itemsize}")


class Case:
    """Arrays, and what each of the functions makes of them."""

    def __init__(self, number):
        dtype = np.dtype(("float32", "float64", "float16")[number // 3 % 3])
        self.numbers = MEMBERS[number % 3]
        rng = np.random.default_rng(number)
        x, dy = rng.standard_normal((2, 300 + 7 * (number // 4), 401)).astype(dtype)
        slope = dtype.type(self.numbers.get("negative_slope", 0.0))
        ceiling = dtype.type(self.numbers.get("max_value", np.inf))
        zero = dtype.type(0)

        def gradient(x):
            upper = np.where(x < ceiling, dy, zero)
            return np.where(x > 0, upper, dy * slope if slope else zero)

        self.y = np.where(x > 0, np.minimum(x, ceiling), x * slope if slope else zero)
        self.dx, self.opposite_dx = gradient(x), gradient(-x)
        order = np.asfortranarray if number % 2 else np.asarray
        self.x, self.dy, self.opposite = map(order, (x, dy, -x))
        self.out = np.empty_like(self.x)
        self.layer = relu_xp.ReLU(**self.numbers)

    def check(self):
        numbers, x, dy, out = self.numbers, self.x, self.dy, self.out
        self.equal(self.y, relu_xp.relu(x, **numbers))
        self.equal(self.y, relu_xp.relu(x, **numbers, out=out))
        y, pullback = relu_xp.relu_vjp(x, **numbers)
        self.equal(self.y, y)
        _, opposite = relu_xp.relu_vjp(self.opposite, **numbers)
        self.equal(self.y, self.layer.forward(x))
        self.equal(self.dx, pullback(dy))
        self.equal(self.opposite_dx, opposite(dy))
        self.equal(self.dx, self.layer.backward(dy))
        self.equal(self.dx, pullback(dy, out=out))
        self.equal(self.dx, relu_xp.relu_backward(dy, x, **numbers))
        out[...] = x
        y, pullback = relu_xp.relu_vjp(out, **numbers, out=out)
        self.equal(self.y, y)
        out[...] = dy
        self.equal(self.dx, pullback(out, out=out))

    def equal(self, wanted, got):
        assert np.array_equal(bits(wanted), bits(got))


class Others(Case):
    """The variants' layers, relu_grad, a new slope every time, and arrays of other libraries."""

    def __init__(self, number):
        super().__init__(number)
        self.slopes = itertools.count(number, 16)
        names = ("torch", "jax", "dask", "array_api_strict")
        names = [name for name in names if LIBRARIES[name].load() is None]
        self.library = LIBRARIES[names[number % len(names)]] if names else None
        self.others = [
            relu_xp.PReLU(401, init=0.5),
            relu_xp.RReLU(0.5, 0.5),
            relu_xp.CReLU(),
            relu_xp.SquaredReLU(),
        ]
        self.wanted = list(self.results())
        self.small = np.ascontiguousarray(self.x[:20]).astype(np.float32)

    def results(self):
        yield relu_xp.relu_grad(self.x, **self.numbers)
        for layer in self.others:
            y = layer.forward(self.x)
            yield y
            yield layer.backward(np.concatenate([self.dy] * 2, 1) if len(y[0]) > 401 else self.dy)
            yield from [gradient.copy() for gradient in layer.grads]

    def check(self):
        for wanted, got in zip(self.wanted, self.results(), strict=True):
            self.equal(wanted, got)
        slope = np.float32(1 / (1 + next(self.slopes)))
        wanted = np.where(self.small > 0, self.small, self.small * slope)
        self.equal(wanted, relu_xp.relu(self.small, negative_slope=float(slope)))
        if self.library:
            y, pullback = relu_xp.relu_vjp(self.library.array(self.small))
            dx = pullback(self.library.array(self.small))
            for got in (y, dx):
                self.equal(
                    np.where(self.small > 0, self.small, np.float32(0)), self.library.numpy(got)
                )


@pytest.fixture(params=["numpy", "numpy_llvm"])
def backend(request, monkeypatch):
    """Either backend of NumPy arrays, with several threads from small arrays on."""
    library = LIBRARIES[request.param]
    if reason := library.load():
        unavailable(request.config, reason)
    monkeypatch.setattr(mask, "_LARGE", 1 << 10)  # masks share memory, one after the other
    with library.running():
        if request.param == "numpy":
            monkeypatch.setattr(threads, "count", lambda: 4)
            monkeypatch.setattr(numpy_backend, "_THREADED", 1 << 14)
            monkeypatch.setattr(numpy_backend, "_BLOCK", 1 << 12)
            threads._pool.cache_clear()
            yield "relu_xp_"
            threads._pool().shutdown()
            threads._pool.cache_clear()
        else:
            monkeypatch.setattr(llvm, "_MANY", 0)
            word = BOARD["threaded_bytes"]
            before = loader.board[word]
            loader.board[word] = 1 << 14
            yield "relu_xp-"
            loader.board[word] = before


def helpers(prefix):
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if name.startswith(prefix) and name != "relu_xp-compiler"}


class TestCallersAtOnce:
    def test_sixteen_threads(self, backend, request):
        cases = [Case(number) for number in range(16)]
        others = [Others(number) for number in range(16)]
        rounds = collections.Counter()
        start = threading.Barrier(16, timeout=20)
        deadline = time.monotonic() + request.config.getoption("--soak")

        def work(number):
            start.wait()
            while time.monotonic() < deadline:
                cases[number].check()
                others[number].check()
                rounds[number] += 1

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            for future in [pool.submit(work, number) for number in range(16)]:
                future.result()
        assert len(rounds) == 16
        if backend == "relu_xp_" or loader.board[BOARD["threads"]] > 1:
            assert helpers(backend)

    @pytest.mark.parametrize("kind", ["dx", "other"])
    def test_the_check_can_fail(self, backend, kind):
        case = Case(0) if kind == "dx" else Others(0)
        case.check()
        case.dx = case.dx if kind == "dx" else case.wanted[-1]
        bits(case.dx)[-1, -1] ^= 1
        with pytest.raises(AssertionError):
            case.check()

    def test_one_array_by_many_threads(self, backend):
        case = Case(4)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for y in pool.map(lambda _: relu_xp.relu(case.x, **case.numbers), range(100)):
                case.equal(case.y, y)

    def test_products_do_not_depend_on_the_thread(self, backend, flush_to_zero):
        """While the caller's processor takes subnormals for zero, all those that help do."""
        for dtype in (np.float32, np.float64):
            x = np.full(1 << 17, -np.finfo(dtype).smallest_normal)
            for _ in range(50):
                with flush_to_zero():
                    flushed = relu_xp.relu(x, negative_slope=0.5)
                assert not bits(np.abs(flushed)).any()
                assert (bits(relu_xp.relu(x, negative_slope=0.5)) != 0).all()
                assert (relu_xp.relu(x, negative_slope=0.5) != 0).all()

    def test_a_pool_of_workers(self, backend):
        cases = [Case(number) for number in range(6)]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            for _ in range(5):
                list(pool.map(Case.check, cases))

    def test_dask_with_threads(self, backend, require):
        da = require("dask.array")
        case = Case(1)
        for chunks in ((100, 401), (50, 200), (307, 401)):
            lazy = da.from_array(case.x, chunks=chunks)
            result = lazy.map_blocks(relu_xp.relu, dtype=case.x.dtype, **case.numbers)
            got = result.compute(scheduler="threads", num_workers=4)
            case.equal(case.y, got)
            both = da.map_blocks(
                relu_xp.relu_backward,
                da.from_array(case.dy, chunks=chunks),
                lazy,
                dtype=case.x.dtype,
                **case.numbers,
            )
            got = both.compute(scheduler="threads", num_workers=4)
            case.equal(case.dx, got)
            lazy_too = relu_xp.relu(lazy, **case.numbers)
            got = lazy_too.compute(scheduler="threads", num_workers=4)
            case.equal(case.y, got)


# A process of its own, with four threads whatever the CPUs, from small arrays on.
BEGIN = """
    import atexit, multiprocessing, os, signal, sys, threading, time, warnings
    os.sched_getaffinity = lambda pid: set(range(4))
    # Python 3.12 and later warn of what is to be shown to work.
    warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
    import numpy as np
    import relu_xp
    from relu_xp.backends import numpy as alone
    from relu_xp.backends import threads

    jit = os.environ["RELU_XP_JIT"] == "1"
    alone._THREADED, alone._BLOCK = 1 << 14, 1 << 12

    def warm():
        if jit:
            from relu_xp.backends import llvm
            from relu_xp.backends.llvm.runtime import BOARD
            from relu_xp.backends.llvm.loader import loader
            relu_xp.warmup()
            assert loader.failure is None, loader.failure
            llvm._MANY = 0
            loader.board[BOARD["threaded_bytes"]] = 1 << 14

    x = np.random.default_rng(0).standard_normal((211, 401), np.float32)
    wanted = np.where(x > 0, x, np.float32(0))
    big = np.ones(1 << 23, np.float32)

    def right(again=3):
        for _ in range(again):
            assert np.array_equal(relu_xp.relu(x), wanted)
            y, pullback = relu_xp.relu_vjp(x)
            assert np.array_equal(y, wanted)
            assert np.array_equal(pullback(x), wanted)
            assert np.array_equal(relu_xp.relu_backward(x, x), wanted)

    def helpers():
        names = [thread.name for thread in threading.enumerate()]
        return [n for n in names if n.startswith("relu_xp") and n != "relu_xp-compiler"]

    def published():
        if not jit:
            return None
        from relu_xp.backends.llvm.runtime import BOARD
        from relu_xp.backends.llvm.loader import loader
        return int(loader.board[BOARD["published"]]) if loader.addresses else None

    def compiling():
        return any(thread.name == "relu_xp-compiler" for thread in threading.enumerate())

    def call_for_ever(begun=None):
        mine = big.copy()
        while True:
            relu_xp.relu(mine, out=mine)
            relu_xp.relu_vjp(mine, out=mine)[1](mine, out=mine)
            if begun:
                begun.set()
"""


@pytest.fixture(params=[0, 1], ids=["numpy", "llvm"])
def process(request, python):
    """Return a function that runs a script, after BEGIN, with either backend."""
    if request.param and (reason := LIBRARIES["numpy_llvm"].load()):
        unavailable(request.config, reason)

    def run(script, *, status=0, stderr="", timeout=30, **variables):
        text = textwrap.dedent(BEGIN) + textwrap.dedent(script)
        variables = {"RELU_XP_JIT": request.param} | variables
        return python(text, status=status, stderr=stderr, timeout=timeout, **variables)

    return run


only_with_kernels = pytest.mark.parametrize("process", [1], ids=["llvm"], indirect=True)


# Children send what they found, or nothing in time.
CHILDREN = """
    def child(pipe):
        before, jobs = helpers(), published()
        right()
        assert jobs is None or published() > jobs, "no call was shared with helpers"
        pipe.send((before, helpers()))

    def start(context, target=child):
        mine, its = context.Pipe()
        process = context.Process(target=target, args=(its,))
        process.start()
        its.close()
        return process, mine

    def finish(process, pipe):
        try:
            assert pipe.poll(20), "the child says nothing"
            result = pipe.recv()
            process.join(20)
            assert process.exitcode == 0, process.exitcode
            return result
        finally:
            process.kill()
            pipe.close()

    def check(context, target=child):
        before, after = finish(*start(context, target))
        assert before == [], before
        assert after, "the child did without helpers"
"""


def with_children(script):
    return textwrap.dedent(CHILDREN) + textwrap.dedent(script)


class TestProcesses:
    @pytest.fixture(autouse=True)
    def posix(self, request):
        if not hasattr(os, "fork"):
            unavailable(request.config, "a system without fork")

    def test_a_child_forked_after_helpers_were_used_has_its_own(self, process):
        script = """
            warm()
            context = multiprocessing.get_context("fork")
            check(context)
            right()
            assert helpers()
            for _ in range(5):
                check(context)
                right()
            time.sleep(0.1)  # the helpers sleep
            check(context)
            right()
        """
        process(with_children(script))

    def test_a_child_of_a_child(self, process):
        script = """
            warm()
            right()
            context = multiprocessing.get_context("fork")

            def parent(pipe):
                before = helpers()
                right()
                check(context)
                right()
                pipe.send((before, helpers()))

            check(context, parent)
            right()
        """
        process(with_children(script))

    def test_forked_while_another_thread_is_in_a_call(self, process):
        script = """
            warm()
            right()
            context = multiprocessing.get_context("fork")
            begun, stop, failed = threading.Event(), threading.Event(), []
            line = np.linspace(-1, 1, 1 << 22, dtype=np.float32)
            above = np.maximum(line, 0)

            def call():
                while not stop.is_set():
                    if not np.array_equal(relu_xp.relu(line), above):
                        failed.append(1)
                    begun.set()

            callers = [threading.Thread(target=call) for _ in range(2)]
            for caller in callers:
                caller.start()
            try:
                assert begun.wait(20)
                for _ in range(25):
                    check(context)
                right()
            finally:
                stop.set()
            for caller in callers:
                caller.join()
            assert not failed
        """
        process(with_children(script))

    @only_with_kernels
    def test_forked_while_a_kernel_is_compiled(self, process, tmp_path):
        script = """
            import itertools
            import relu_xp.backends.llvm
            from relu_xp.backends.llvm import kernels
            from relu_xp.backends.llvm.loader import loader
            context = multiprocessing.get_context("fork")

            def child(pipe):
                made = len(loader.addresses)
                assert not compiling()
                right()
                assert relu_xp.relu(big).all()  # asks for a kernel
                deadline = time.monotonic() + 20
                while kernels.Structure("float32") not in loader.addresses:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                right()
                relu_xp.warmup()
                assert loader.failure is None
                right()
                pipe.send((made, len(loader.addresses)))

            make = loader.make

            def make_and_pause(structure):
                make(structure)
                time.sleep(0.01)  # when it is this thread's turn to fork

            loader.make = make_and_pause
            for structure in kernels.structures()[::-1]:
                loader.request(structure)
            children = []
            for _ in range(4):
                assert compiling()
                children.append(start(context, child))
                time.sleep(0.05)
            loader.make = make
            results = [finish(*one) for one in children]
            served = len(list(filter(loader.engine().serves, kernels.structures())))
            assert {number for _, number in results} == {served}
            assert results[0][0] < served
            right()
            relu_xp.warmup()
            assert len(loader.addresses) == served
            right()
        """
        process(with_children(script), timeout=60, XDG_CACHE_HOME=tmp_path / "cache")

    def test_forked_by_a_thread_that_ends_its_child_by_itself(self, process):
        script = """
            warm()
            right()

            def fork(function):
                child = os.fork()
                if child == 0:
                    try:
                        function()
                        right()
                        status = 0
                    except BaseException as error:
                        print(type(error), error, file=sys.stderr)
                        status = 1
                    if status or leave:
                        os._exit(status)
                    sys.exit(7)  # by way of atexit, where helpers are dismissed
                deadline = time.monotonic() + 20
                while not (done := os.waitpid(child, os.WNOHANG))[0]:
                    if time.monotonic() > deadline:
                        os.kill(child, signal.SIGKILL)
                        raise AssertionError("the child does not end")
                    time.sleep(0.01)
                status = os.waitstatus_to_exitcode(done[1])
                assert status == (0 if leave else 7), status

            for leave in (True, False):
                for function in (lambda: None, lambda: time.sleep(0.05), warm):
                    fork(function)
            leave = True
            thread = threading.Thread(target=fork, args=(right,))
            thread.start()
            thread.join()
            right()
        """
        process(script)

    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    def test_other_ways_to_start_a_child(self, process, method):
        script = f"""
            def warm_child(pipe):
                warm()
                child(pipe)

            if __name__ == "__main__":
                warm()
                right()
                context = multiprocessing.get_context({method!r})
                check(context, warm_child)
                check(context)
                right()
        """
        process(with_children(script))

    def test_a_pool_of_processes(self, process):
        script = """
            warm()
            right()
            with multiprocessing.get_context("fork").Pool(3) as pool:
                for y in pool.map(relu_xp.relu, [x] * 20):
                    assert np.array_equal(y, wanted)
            right()
        """
        process(script)


INTERRUPTED = r"Traceback .*\nKeyboardInterrupt\n"


class TestExit:
    """A process ends in time, with the status expected, and without a word."""

    def ends(self, process, script, times=3, **expected):
        for _ in range(times):
            process(script, timeout=10, **expected)

    def test_a_daemon_is_in_a_call(self, process):
        script = """
            warm()
            begun = threading.Event()
            for _ in range(2):
                threading.Thread(target=call_for_ever, args=(begun,), daemon=True).start()
            assert begun.wait(8)
            right()
            time.sleep(0.02)
        """
        self.ends(process, script)
        self.ends(process, script + "    sys.exit(3)", times=1, status=3)

    def test_the_first_call_of_a_daemon(self, process):
        script = """
            warm()
            begun = threading.Event()

            def call():
                begun.set()
                call_for_ever()

            threading.Thread(target=call, daemon=True).start()
            begun.wait()
        """
        self.ends(process, script)

    def test_helpers_still_look_for_work(self, process):
        self.ends(process, "warm()\nright()\nassert helpers()")

    def test_helpers_sleep(self, process):
        self.ends(process, "warm()\nright()\ntime.sleep(0.1)\nassert helpers()")

    def test_a_thread_goes_on_after_the_main_one(self, process):
        script = """
            warm()

            def call():
                while threading.main_thread().is_alive():
                    right(1)
                right(30)
                print("done")

            threading.Thread(target=call).start()
        """
        assert process(script, timeout=10) == "done\n"

    @only_with_kernels
    def test_a_kernel_is_being_compiled(self, process, tmp_path):
        script = """
            relu_xp.relu(x)
            from relu_xp.backends.llvm import kernels
            from relu_xp.backends.llvm.loader import loader
            for structure in kernels.structures():
                loader.request(structure)
            time.sleep(DELAY)
            assert compiling()
        """
        for number, delay in enumerate((0, 0.05, 0.1, 0.2, 0.4)):
            folder = tmp_path / f"cache{number}"
            process(script.replace("DELAY", str(delay)), timeout=10, XDG_CACHE_HOME=folder)
            written = list(folder.rglob("*"))
            assert len(written) < 40
            assert {file.suffix for file in written if file.is_file()} <= {".o"}

    @pytest.mark.parametrize("use", ["", "right()"])
    def test_calls_from_atexit(self, process, use):
        script = f"""
            def last():
                assert helpers() == []
                right()
                assert np.array_equal(relu_xp.relu(big), big)
                assert helpers() == []
                print("last")

            atexit.register(last)  # called after what is registered later
            warm()
            {use}
            atexit.register(right)
        """
        assert process(script, timeout=10) == "last\n"

    def test_the_first_calls_from_atexit(self, process, tmp_path):
        """Kernels are asked for when no thread may be started any more."""
        script = """
            def last():
                for dtype in (np.float32, np.float64, np.float16):
                    for slope in (0.0, 0.5):
                        y = relu_xp.relu(big.astype(dtype), negative_slope=slope)
                        assert y.all()
                right()
                print("last")

            atexit.register(last)
        """
        for _ in range(2):
            assert process(script, timeout=20, XDG_CACHE_HOME=tmp_path / "cache") == "last\n"

    def test_warmup_from_atexit(self, process, tmp_path):
        script = """
            def last():
                warm()
                right()
                print("last")

            atexit.register(last)
        """
        assert process(script, timeout=20, XDG_CACHE_HOME=tmp_path / "cache") == "last\n"

    def test_sys_exit_in_a_thread(self, process):
        script = """
            warm()

            def leave():
                right()
                sys.exit(5)

            thread = threading.Thread(target=leave)
            thread.start()
            right()
            thread.join()
            right()
        """
        self.ends(process, script)

    def test_an_error_ends_the_process(self, process):
        script = "warm()\nright()\nraise LookupError('as it should')"
        self.ends(process, script, 1, status=1, stderr="Traceback .*LookupError: as it should\n")

    def test_an_interrupt_in_a_long_call(self, process):
        script = """
            warm()
            right()

            def interrupt():
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGINT)

            threading.Thread(target=interrupt).start()
            deadline = time.monotonic() + 8
            mine = np.ones(1 << 24, np.float32)
            while time.monotonic() < deadline:
                relu_xp.relu(mine, out=mine)
        """
        self.ends(process, script, status=-signal.SIGINT, stderr=INTERRUPTED)

    def test_many_interrupts_and_then_on(self, process):
        script = """
            warm()
            right()
            mine = np.ones(1 << 22, np.float32)
            some = mine[: 1 << 19]  # masks of more have a finalizer, where Python loses interrupts
            caught = 0

            def interrupt(delay):
                time.sleep(delay)
                os.kill(os.getpid(), signal.SIGINT)

            for number in range(40):
                try:
                    thread = threading.Thread(target=interrupt, args=(0.001 * number,))
                    thread.start()
                    deadline = time.monotonic() + 8
                    while time.monotonic() < deadline:
                        relu_xp.relu(mine, out=mine)
                        relu_xp.relu_vjp(some, out=some)[1](some)
                except KeyboardInterrupt:
                    caught += 1
                thread.join()
                right(1)
            assert caught == 40, caught
        """
        process(script, timeout=30)


# Ctrl-C at every point of a call in turn: Python hears of it when a function begins or returns. But
# not when a lock was entered: Python 3.14 itself would leave that locked, other versions wait.
POINTS = """
    import itertools, sys, threading, time

    def interrupt_everywhere(call, then):
        \"\"\"Return how many points there were; after each, `then` must find all well.\"\"\"
        points = whole = 0
        while whole < 5:  # how many there are may depend on threads
            left = points

            def profile(frame, event, argument):
                nonlocal left
                ours = [f and "relu_xp" in f.f_code.co_filename for f in (frame, frame.f_back)]
                heard = any(ours[: 1 if event == "c_return" else 2]) and event != "c_call"
                entered = getattr(argument, "__name__", None) == "__enter__"
                if heard and not entered and "llvmlite" not in frame.f_code.co_filename:
                    left -= 1
                    if left == -1:
                        raise KeyboardInterrupt

            try:
                sys.setprofile(profile)
                call()
            except KeyboardInterrupt:
                assert left == -1
                whole = 0
            else:
                sys.setprofile(None)
                assert left >= 0 or lost.pop() is KeyboardInterrupt, f"point {points}"
                whole += left >= 0
            then()
            points += 1
        return points - whole

    lost = []  # in finalizers: Python only tells of what they raise
    sys.unraisablehook = lambda event: lost.append(event.exc_type)
"""


class TestInterrupts:
    def test_of_a_call_with_helpers(self, python):
        """When the caller has the error, nothing is at work any more."""
        script = """
            from relu_xp.backends import threads
            threads.count = lambda: 3
            at_work, helped = [], 0

            def part(number):
                global helped
                if threading.current_thread() is threading.main_thread():
                    time.sleep(0.001)
                else:
                    at_work.append(number)
                    helped += 1
                    time.sleep(0.003)
                    at_work.pop()

            def then():
                assert not at_work
                done = set()
                threads.run(done.add, [(number,) for number in range(4)])
                assert done == set(range(4))

            parts = [(number,) for number in range(4)]
            points = interrupt_everywhere(lambda: threads.run(part, parts), then)
            assert points > 20, points
            assert helped > 20, helped
        """
        python(textwrap.dedent(POINTS) + textwrap.dedent(script))

    def test_of_public_calls(self, process):
        script = """
            from relu_xp import mask
            mask._LARGE = 1 << 10
            warm()
            right()
            slopes = itertools.count(1)
            layers = [
                relu_xp.ReLU(), relu_xp.LeakyReLU(), relu_xp.ReLU6(negative_slope=0.1),
                relu_xp.PReLU(401), relu_xp.RReLU(), relu_xp.CReLU(), relu_xp.SquaredReLU(),
            ]
            x, wanted = x[:50].copy(), wanted[:50]
            mine, few = x.copy(), x[::2]
            y, pullback = relu_xp.relu_vjp(x)

            def through(layer):
                layer.backward(layer.forward(x))

            calls = [
                lambda: relu_xp.relu(x, negative_slope=1 / next(slopes)),
                lambda: relu_xp.relu_vjp(x, max_value=next(slopes), out=mine),
                lambda: pullback(x, out=mine),
                lambda: relu_xp.relu_backward(x, x, threshold=1 / next(slopes)),
                lambda: relu_xp.relu_grad(few),
                lambda: relu_xp.relu_vjp(few)[1](few),
                *[lambda layer=layer: through(layer) for layer in layers],
            ]
            points = [interrupt_everywhere(call, lambda: right(1)) for call in calls]
            assert min(points) > 20, points
            for layer in layers:  # none was left in a state that it does not come out of
                layer.backward(layer.forward(x))
        """
        process(textwrap.dedent(POINTS) + textwrap.dedent(script), timeout=120)

    @only_with_kernels
    def test_of_what_asks_for_a_kernel(self, process):
        """The next to ask has it made."""
        script = """
            from relu_xp.backends.llvm import kernels
            from relu_xp.backends.llvm.loader import Loader
            structure = kernels.Structure("float32")

            def begin():
                global mine, made
                mine, made = Loader(), threading.Event()
                mine.make = lambda structure: made.set()

            def then():
                mine.request(structure)
                assert made.wait(5), "never"
                begin()

            begin()
            assert interrupt_everywhere(lambda: mine.request(structure), then) > 4
        """
        process(textwrap.dedent(POINTS) + textwrap.dedent(script))

    @only_with_kernels
    def test_of_what_makes_a_kernel_and_starts_helpers(self, process):
        script = """
            from relu_xp.backends import llvm
            from relu_xp.backends.llvm import kernels
            from relu_xp.backends.llvm.loader import loader
            from relu_xp.backends.llvm.runtime import BOARD
            warm()
            structure = kernels.Structure("float32")

            def begin():
                loader.__init__()
                del loader.muster

            def make():
                loader.make(structure)
                loader.muster()
                dismiss()

            def dismiss():
                if "muster" in vars(loader):
                    loader.muster.__self__.dismiss()

            def then():
                loader.make(structure)
                assert loader.failure is None
                assert structure in loader.addresses
                loader.board[BOARD["threaded_bytes"]] = 1 << 14
                llvm._member.cache_clear()
                jobs = published()
                right(1)
                assert published() > jobs
                dismiss()
                deadline = time.monotonic() + 5
                while helpers():  # one that was not known yet is told to stop, but not waited for
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                begin()

            os.register_at_fork = lambda **_: None
            atexit.register = lambda function: None
            dismiss()
            begin()
            assert interrupt_everywhere(make, then) > 100
        """
        process(textwrap.dedent(POINTS) + textwrap.dedent(script), timeout=120)


class TestNoThreads:
    def test_calls_do_without(self, process, tmp_path):
        script = """
            start = threading.Thread.start

            def refuse(thread):
                refused.append(thread.name)
                raise RuntimeError("can't start new thread")

            refused = []
            threading.Thread.start = refuse
            right()
            for _ in range(3):
                assert np.array_equal(relu_xp.relu(big), big)
            right()
            assert refused
            assert len(threading.enumerate()) == 1
            if jit:
                assert "relu_xp-compiler" in refused
                warm()
                refused.clear()
                right()
                assert "relu_xp-1" in refused
                assert helpers() == []

                from relu_xp.backends.llvm import kernels
                from relu_xp.backends.llvm.loader import loader
                structure = kernels.Structure("float32", low=True)
                del loader.addresses[structure]
                loader.request(structure)
                threading.Thread.start = start
                loader.request(structure)
                deadline = time.monotonic() + 20
                while structure not in loader.addresses:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            threading.Thread.start = start
            right()
        """
        process(script, XDG_CACHE_HOME=tmp_path / "cache")


class TestAffinity:
    """Helpers go to another CPU than the caller's, and are free again."""

    @pytest.fixture(autouse=True)
    def linux(self, request):
        if sys.platform != "linux":
            unavailable(request.config, "threads are bound to CPUs as on Linux")

    @only_with_kernels
    def test_no_thread_stays_bound(self, process):
        script = """
            import posix
            warm()
            before = posix.sched_getaffinity(0)
            for _ in range(20):
                right(10)
                time.sleep(0.002)
            time.sleep(0.2)
            alive = [t for t in threading.enumerate() if t.name.startswith("relu_xp-")]
            assert len(alive) == 3
            for thread in alive:
                assert posix.sched_getaffinity(thread.native_id) == before
            assert posix.sched_getaffinity(0) == before
        """
        process(script)

    def test_more_threads_than_cpus(self, process):
        script = """
            import posix
            posix.sched_setaffinity(0, {min(posix.sched_getaffinity(0))})
            warm()
            right(20)
            caller = threading.Thread(target=right, args=(20,))
            caller.start()
            right(20)
            caller.join()
            assert helpers()
        """
        process(script)


class TestOneThread:
    SCRIPT = """
        started = []
        start = threading.Thread.start

        def record(thread):
            started.append(thread.name)
            start(thread)

        threading.Thread.start = record
        warm()
        digest = __import__("hashlib").sha256()
        rng = np.random.default_rng(1)
        for dtype in (np.float32, np.float64, np.float16):
            x, dy = rng.standard_normal((2, 1 << 21)).astype(dtype)
            for numbers in ({}, {"negative_slope": 0.1, "max_value": 0.5}):
                y, pullback = relu_xp.relu_vjp(x, **numbers)
                dx = relu_xp.relu_backward(dy, x, **numbers)
                for result in (y, dx, pullback(dy), relu_xp.relu(x, **numbers)):
                    digest.update(result.tobytes())
                names = {thread.name for thread in threading.enumerate()}
                if threads.count() == 1:
                    assert names <= {"MainThread", "relu_xp-compiler"}, names
        print(digest.hexdigest(), *sorted(set(started) - {"relu_xp-compiler"}))
    """

    def test_no_other_is_started_and_the_bits_are_the_same(self, process):
        digest, *started = process(self.SCRIPT, RELU_XP_NUM_THREADS=1).split()
        assert started == []
        for number in (2, 4):
            other, *started = process(self.SCRIPT, RELU_XP_NUM_THREADS=number).split()
            assert other == digest
            assert 1 <= len(started) <= number

    def test_before_there_are_kernels(self, process, tmp_path):
        script = self.SCRIPT.replace("warm()", "")
        cache = tmp_path / "cache"
        _, *started = process(script, RELU_XP_NUM_THREADS=1, XDG_CACHE_HOME=cache).split()
        assert started == []


class TestMemory:
    """A process of many calls is as large after 100,000 more: pages, not only Python's objects.

    The heap may take a while to settle, but what leaks grows in every round.
    """

    SCRIPT = """
        import gc, itertools
        x, dy = np.random.default_rng(0).standard_normal((2, 20, 30), np.float32)
        out, few = np.empty_like(x), x[::2, ::3]
        new = itertools.count(1)
        y, pullback = relu_xp.relu_vjp(x)
        layers = [getattr(relu_xp, name)() for name in LAYERS]
        layers += [relu_xp.ReLU(max_value=1.0, negative_slope=0.5), relu_xp.ReLU(inplace=True)]

        def refused(function, *arguments, **options):
            try:
                function(*arguments, **options)
            except (TypeError, ValueError, RuntimeError):
                return
            raise AssertionError(function)

        def through(layer):
            y = layer.forward(out)
            layer.backward(y, retain=True)
            layer.forward(x.copy(), training=False)
            layer.saved_nbytes

        calls = [
            lambda: relu_xp.relu(x),
            lambda: relu_xp.relu(few, out=out[::2, ::3]),
            lambda: relu_xp.relu(x, negative_slope=1 / next(new)),
            lambda: relu_xp.relu_vjp(x, max_value=next(new), negative_slope=0.5)[1](dy),
            lambda: relu_xp.relu_backward(dy, x, threshold=1 / next(new), out=out),
            lambda: relu_xp.relu_grad(x.astype(np.float64), positive_slope=next(new)),
            lambda: relu_xp.relu(x.astype(np.float16), max_value=6.0),
            lambda: relu_xp.relu((x * 9).astype(np.int32)),
            lambda: relu_xp.leaky_relu(x, 1 / next(new), out=out),
            lambda: (relu_xp.relu6(x), relu_xp.clipped_relu(x), relu_xp.thresholded_relu(x)),
            lambda: pullback(dy, out=out),
            lambda: relu_xp.prelu(x, np.full(30, 0.5, np.float32)),
            lambda: relu_xp.prelu_vjp(x, np.full(30, 0.5, np.float32))[1](dy),
            lambda: (relu_xp.rrelu(x), relu_xp.crelu(x), relu_xp.squared_relu(x)),
            lambda: relu_xp.LeakyReLU(1 / next(new)).forward(x),
            lambda: repr(relu_xp.ThresholdedReLU(1 / next(new))),
            lambda: refused(relu_xp.relu, [1.0]),
            lambda: refused(relu_xp.relu, x, negative_slope=float("nan")),
            lambda: refused(relu_xp.relu, x, max_value=-1.0 / next(new)),
            lambda: refused(relu_xp.relu, x, out=out[1:]),
            lambda: refused(relu_xp.relu_vjp, x.astype(np.int8)),
            lambda: refused(relu_xp.relu_backward, dy[1:], x),
            lambda: refused(pullback, dy.astype(complex)),
            lambda: refused(relu_xp.ReLU().backward, dy),
            *[lambda layer=layer: through(layer) for layer in layers],
            *LEAKS,
        ]

        def many(number):
            for call in itertools.islice(itertools.cycle(calls), number):
                call()
            gc.collect()

        def pages():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        warm()
        many(60_000)  # thousands of new numbers: the caches are full
        grown = []
        while len(grown) < ROUNDS and not (grown and grown[-1] < 1 << 18):
            before = pages()
            many(100_000)
            grown.append(pages() - before)
        from relu_xp.activation import _activation
        assert next(new) > 10_000
        served = sys.modules["relu_xp.backends.llvm"]._member if jit else alone._constants
        for cache in (_activation, served):
            assert cache.cache_info().currsize == cache.cache_info().maxsize == 1024
        print(grown[-1])
    """

    def growth(self, request, process, leaks, rounds):
        if sys.platform != "linux":
            unavailable(request.config, "the pages of a process are counted as on Linux")
        layers = [name for name in relu_xp.__all__ if name.endswith("LU") or name == "ReLU6"]
        script = textwrap.dedent(self.SCRIPT).replace("LAYERS", repr(layers))
        script = script.replace("LEAKS", leaks).replace("ROUNDS", str(rounds))
        return int(process(script, timeout=240))

    def test_100_000_calls_take_none(self, request, process):
        assert self.growth(request, process, "[]", 5) < 1 << 18

    @pytest.mark.parametrize("process", [0], ids=["numpy"], indirect=True)
    def test_the_check_can_fail(self, request, process):
        """A leak of a kilobyte in one call of forty."""
        leaks = "[lambda kept=[]: kept.append(bytes(1024))]"
        assert self.growth(request, process, leaks, 2) > 1 << 18
