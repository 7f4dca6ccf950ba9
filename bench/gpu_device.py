"""The device that `bench.gpu` uses: its clock, streams, graphs, and kernels of other libraries."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import time
from collections.abc import Iterator
from typing import Any

from bench.gpu_cases import TORCH
from bench.harness import Names, Run, module


def missing() -> str:
    """Return why there is no device; an empty string if there is one."""
    cupy = module("cupy")
    if cupy is None:
        return "CuPy is not installed"
    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "none is visible"
    except Exception as error:  # of the driver, or because CUDA's libraries are absent
        return next(iter(str(error).splitlines()), type(error).__name__)


class Device:
    """The current CUDA device of CuPy and PyTorch; the tests replace it by one made of NumPy."""

    def __init__(self) -> None:
        self.xp = module("cupy")
        self._runtime = self.xp.cuda.runtime
        self._properties = self._runtime.getDeviceProperties(self._runtime.getDevice())
        self.l2: int = self._properties["l2CacheSize"]
        torch = module("torch")
        self.torch: Any = torch if torch and torch.cuda.is_available() else None
        self.full = (MemoryError, *((torch.cuda.OutOfMemoryError,) if self.torch else ()))
        self._start, self._end = self.xp.cuda.Event(), self.xp.cuda.Event()
        self._side = self.xp.cuda.Stream(non_blocking=True)

    def conditions(self) -> dict[str, Any]:
        """Return what figures depend on: bytes, kHz, and CUDA's numbers for its versions."""
        name, attributes = self._properties["name"], self._properties.items()
        return {
            "device": name.decode() if isinstance(name, bytes) else name,
            "attributes": {key: value for key, value in attributes if isinstance(value, int)},
            "driver": self._runtime.driverGetVersion(),
            "runtime": self._runtime.runtimeGetVersion(),
        }

    def free(self) -> None:
        """Free what the pools of both libraries keep."""
        gc.collect()
        self.xp.get_default_memory_pool().free_all_blocks()
        if self.torch:
            self.torch.cuda.empty_cache()

    def copy(self, target: Any, source: Any) -> None:
        """Copy an array with cudaMemcpyAsync."""
        target.data.copy_from_device_async(source.data, source.nbytes)

    def numpy(self, array: Any) -> Any:
        """Return a copy for NumPy."""
        return self.xp.asnumpy(array)

    def synchronize(self) -> None:
        """Wait for the device; an error of its kernels is raised here."""
        self._runtime.deviceSynchronize()

    def seconds(self, run: Run, calls: int) -> float:
        """Return the device's seconds per call, of several in a row."""
        run(1)  # meanwhile the host gets ahead: the device is not to wait for the first call
        self._start.record()
        run(calls)
        self._end.record()
        self._end.synchronize()
        milliseconds: float = self.xp.cuda.get_elapsed_time(self._start, self._end)
        return 1e-3 * milliseconds / calls

    def host_seconds(self, run: Run, calls: int) -> float:
        """Return the host's seconds per call; it must not wait for the device."""
        self.synchronize()
        start = time.perf_counter()
        run(calls)
        return (time.perf_counter() - start) / calls

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """Run both libraries on a stream that can be captured."""
        self.synchronize()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._side)
            if self.torch:
                stream = self.torch.cuda.ExternalStream(self._side.ptr)
                stack.enter_context(self.torch.cuda.stream(stream))
            yield
        self.synchronize()

    def captured(self, library: str, run: Run) -> Run:
        """Return a call as a CUDA graph that is replayed."""
        if library in TORCH:
            graph = self.torch.cuda.CUDAGraph()
            with self.torch.cuda.graph(graph):
                run(1)
            replay = graph.replay
        else:
            self._side.begin_capture()
            try:
                run(1)
            finally:  # also where the call failed: the stream is needed again
                graph = self._side.end_capture()
            replay = graph.launch

        def replays(calls: int) -> None:
            for _ in itertools.repeat(None, calls):
                replay()

        return replays

    def names(self) -> Names:
        """Return what the cases find beside arrays: libraries, and kernels as others write them."""
        # Chainer's relu_bwd (chainer/functions/activation/relu.py) reads the saved output. Its
        # forward pass is cupy.maximum; here it is a kernel likewise.
        elementwise, backward = self.xp.ElementwiseKernel, "gx = y > 0 ? gy : (T)0"
        names: Names = {
            "cupy": self.xp,
            "copy": self.copy,
            "chainer_forward": elementwise("T x", "T y", "y = max(x, (T)0)", "relu_fwd"),
            "chainer_backward": elementwise("T y, T gy", "T gx", backward, "relu_bwd"),
        }
        if torch := self.torch:

            @functools.cache
            def reset() -> None:  # it gives up when it has seen eight shapes and dtypes
                torch.compiler.reset()

            @functools.cache
            def compiled(name: str) -> Any:  # at the first call, which may be refused
                reset()
                return torch.compile(functions[name], dynamic=False)

            def bias_back(dy: Any, y: Any) -> Any:
                dx = torch.where(y > 0, dy, 0)
                return dx, dx.sum(0)

            functions = {
                "compiled_relu": lambda x: torch.relu(x),
                "compiled_bias_relu": lambda x, bias: torch.relu(x + bias),
                "compiled_bias_back": bias_back,
            }
            names |= {"torch": torch, "aten": torch.ops.aten}
            for name in functions:
                names[name] = lambda *arrays, name=name: compiled(name)(*arrays)
        return names
