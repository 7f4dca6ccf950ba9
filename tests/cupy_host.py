"""CuPy without a device: compile its kernels, and run them on the CPU.

Three things that CI can do without a GPU, each with the exact source that CuPy generates:

- `compile_for`: NVRTC, with CuPy's own options, to PTX or to machine code; `disassemble`;
- `HostKernel`: g++, behind a few macros, called with real ``cupy.ndarray``s over host memory. The
  32 threads of a warp are coroutines, so that they can vote and shuffle;
- `array` and `allocate`: such arrays, so that dispatch, strides and fall-backs run for real.

What this cannot show is speed, races and coalescing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import cupy
import numpy as np
from cupy._core import _kernel, core
from cupy.cuda import nvrtc

_ARRAY, _INDEXER, _SCALAR = 1, 2, 3  # CuPy's _ArgKind

_SHIM = r"""
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <setjmp.h>
#include <ucontext.h>
using std::ptrdiff_t;
#define __CUDACC_VER_MAJOR__ 13
#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
struct Dimension { unsigned int x, y, z; };
static Dimension blockIdx = {0, 0, 0}, threadIdx = {0, 0, 0};
static const Dimension blockDim = {32, 1, 1}, gridDim = {1, 1, 1};
inline int __popc(unsigned int x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
#define MINMAX(T) inline T min(T a, T b) { return a < b ? a : b; } \
                  inline T max(T a, T b) { return a > b ? a : b; }
MINMAX(int) MINMAX(float) MINMAX(double)

// A warp: each thread runs until it votes, shuffles or ends; then the next one has its turn. When a
// thread goes on, all that it named must have come to the same call. Contexts only begin a thread:
// to swap two of them asks the kernel for a signal mask, a hundred times what a jump takes.
namespace host {

constexpr int warp = 32;
static jmp_buf scheduler, threads[warp];
static ucontext_t beginnings[warp];
static char stacks[warp][1 << 16];
static bool begun[warp], ended[warp];
static unsigned int calls[warp], values[2][warp];

__attribute__((noinline)) static void turn(int lane) {
  threadIdx.x = lane;
  if (_setjmp(scheduler)) return;
  if (begun[lane]) _longjmp(threads[lane], 1);
  begun[lane] = true;
  setcontext(&beginnings[lane]);
}

__attribute__((noinline)) static void give_way(int lane) {
  if (!_setjmp(threads[lane])) _longjmp(scheduler, 1);
}

static unsigned int meet(unsigned int mask, unsigned int value) {
  const int lane = threadIdx.x;
  const unsigned int call = calls[lane]++;
  values[call % 2][lane] = value;
  give_way(lane);
  for (int other = 0; other < warp; ++other) {
    if ((mask >> other & 1) && calls[other] <= call) {
      std::fprintf(stderr, "thread %d waits for %d, which does not come\n", lane, other);
      std::abort();
    }
  }
  if (!(mask >> lane & 1)) std::abort();
  return call % 2;
}

template <class Body> void run(Body body) {
  static Body* current;
  current = &body;
  for (int lane = 0; lane < warp; ++lane) {
    begun[lane] = ended[lane] = false;
    calls[lane] = 0;
    getcontext(&beginnings[lane]);
    beginnings[lane].uc_stack.ss_sp = stacks[lane];
    beginnings[lane].uc_stack.ss_size = sizeof(stacks[lane]);
    void (*entry)() = [] {
      (*current)();
      ended[threadIdx.x] = true;
      _longjmp(scheduler, 1);
    };
    makecontext(&beginnings[lane], entry, 0);
  }
  for (int left = warp; left;) {
    left = 0;
    for (int lane = 0; lane < warp; ++lane) {
      if (!ended[lane]) turn(lane);
      left += !ended[lane];
    }
  }
}

}  // namespace host

inline unsigned int __ballot_sync(unsigned int mask, int vote) {
  const unsigned int slot = host::meet(mask, vote != 0);
  unsigned int all = 0;
  for (int lane = 0; lane < host::warp; ++lane) {
    if (mask >> lane & 1) all |= host::values[slot][lane] << lane;
  }
  return all;
}

inline unsigned int __shfl_down_sync(unsigned int mask, unsigned int value, int by) {
  const unsigned int slot = host::meet(mask, value);
  const int lane = threadIdx.x + by;
  if (lane >= host::warp) return value;
  return mask >> lane & 1 ? host::values[slot][lane] : 0xdeadbeefu;  // undefined, on a device
}

#include <cupy/carray.cuh>
"""


def source(kernel, types, layouts, small=True):
    """Return what CuPy generates for an ElementwiseKernel.

    Parameters
    ----------
    kernel : cupy.ElementwiseKernel
    types : sequence of dtype or None
        Of each argument; None for a scalar.
    layouts : sequence of (ndim, c_contiguous) or None
        Of each array argument, and last that of the index.
    small : bool
        Whether 32 bits are enough for an index.
    """
    types = [None if t is None else np.dtype(t) for t in types]
    resolved = kernel._decide_params_type(tuple(types[: kernel.nin]), tuple(types[kernel.nin :]))
    infos = [
        _kernel._ArgInfo(_SCALAR, type(None), np.dtype(dtype), 0, True, True)
        if given is None
        else _kernel._ArgInfo(_ARRAY, cupy.ndarray, np.dtype(dtype), *layout, small)
        for given, dtype, layout in zip(types, resolved[0] + resolved[1], layouts[:-1], strict=True)
    ]
    infos.append(_kernel._ArgInfo(_INDEXER, type(None), None, layouts[-1][0], True, small))
    code = _kernel._get_elementwise_kernel_code(
        tuple(infos), resolved[2], kernel.params, kernel.operation, kernel.name, kernel.preamble
    )
    return code, resolved[0] + resolved[1]


def merge(codes, preamble):
    """Return several generated sources as one, a namespace each, their common preamble once.

    NVRTC takes 0.1 s for CuPy's headers and 0.02 s for a kernel.
    """
    headers, parts = set(), [preamble]
    for number, code in enumerate(codes):
        assert preamble in code
        headers.update(re.findall(r"^ *(#include .*)$", code, re.M))
        rest = re.sub(r"^ *#include .*$", "", code.replace(preamble, ""), flags=re.M)
        rest = re.sub(r"(__global__ void \w+)\(", rf"\1_{number}(", rest)
        parts.append(f"namespace kernel_{number} {{\n{rest}\n}}")
    return "\n".join([*sorted(headers), *parts])


def compile_for(code, architecture, *, ptx=False):
    """Compile generated source with NVRTC and CuPy's options.

    Parameters
    ----------
    code : str
    architecture : int
        Compute capability, for example 90.
    ptx : bool
        Return the PTX as text, instead of the machine code as bytes.
    """
    headers = "".join(f"#include <{name}>\n" for name in core._cupy_header_list)
    program = nvrtc.createProgram(headers + code, "kernel.cu", (), ())
    try:
        options = (
            *core.assemble_cupy_compiler_options(()),
            "-ftz=true",
            f"-arch={'compute' if ptx else 'sm'}_{architecture}",
            "--device-as-default-execution-space",
        )
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError:
            raise AssertionError(nvrtc.getProgramLog(program)) from None
        if ptx:
            return nvrtc.getPTX(program).decode().rstrip("\0")
        return nvrtc.getCUBIN(program) + b"\0"  # CuPy's own drops the last byte
    finally:
        nvrtc.destroyProgram(program)


def disassembler():
    """Return where nvdisasm is, of the wheel or on the path; None if it is nowhere."""
    import nvidia

    for folder in nvidia.__path__:
        for found in Path(folder).glob("cu*/bin/nvdisasm"):
            return str(found)
    return shutil.which("nvdisasm")


def disassemble(cubin):
    """Return the instructions of machine code: a list of lines for each kernel's name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [disassembler(), "--print-code", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = {}
    for line in done.stdout.splitlines():
        if section := re.match(r"\.text\.(\w+):", line):
            instructions = kernels[section[1]] = []
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    return kernels


def allocate(size):
    """Allocate host memory the way that CuPy allocates a device's, misaligned by nothing."""
    buffer = np.empty(size + 256, np.uint8)
    buffer[:] = 0xA5  # whatever is read before it is written shows
    offset = -buffer.ctypes.data % 256
    memory = cupy.cuda.UnownedMemory(buffer.ctypes.data + offset, size, buffer, device_id=0)
    return cupy.cuda.MemoryPointer(memory, 0)


def array(host, device=0):
    """Return a ``cupy.ndarray`` over the memory of a NumPy array, strides and all."""
    low, high = np.lib.array_utils.byte_bounds(host)
    memory = cupy.cuda.UnownedMemory(low, max(high - low, 1), host, device_id=device)
    pointer = cupy.cuda.MemoryPointer(memory, host.__array_interface__["data"][0] - low)
    return cupy.ndarray(host.shape, host.dtype, pointer, strides=host.strides)


def fenced(host, offset):
    """Copy a 1-D array to `offset` elements behind an aligned address, between two fences.

    Return the ``cupy.ndarray``, and a function that tells whether the fences are as they were.
    """
    memory = np.full(host.nbytes + 1024, 0x5A, np.uint8)
    start = -memory.ctypes.data % 256 + 256 + offset * host.itemsize
    inside = slice(start, start + host.nbytes)
    view = memory[inside].view(host.dtype)
    view[...] = host

    def intact():
        outside = np.ones(memory.size, bool)
        outside[inside] = False
        return bool((memory[outside] == 0x5A).all())

    return array(view), intact


def to_numpy(x):
    """Return a NumPy view of such an array."""
    shape, strides, itemsize = x.shape, x.strides, x.dtype.itemsize
    if x.size == 0:
        return np.empty(shape, x.dtype)
    low = x.data.ptr + sum(min(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True))
    span = sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True)) + itemsize
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(low))
    view = np.ndarray(shape, x.dtype, raw, x.data.ptr - low, strides)
    return view.copy(order="K")


class HostKernel:
    """An ElementwiseKernel's stand-in that runs the same source on the CPU.

    It takes what CuPy takes (arrays over host memory), decides types and layouts as CuPy does, and
    appends to `launches` the kernel's name and the arguments' (dtype, ndim, c_contiguous).
    """

    def __init__(self, kernel, launches):
        self.kernel = kernel
        self.launches = launches

    def __call__(self, *arguments, size=None):
        kernel = self.kernel
        parameters = kernel.params[:-1]
        assert len(arguments) == len(parameters)
        plain = [
            index
            for index, (argument, parameter) in enumerate(zip(arguments, parameters, strict=True))
            if isinstance(argument, cupy.ndarray) and not parameter.raw
        ]
        assert (size is None) == bool(plain), "size= is for kernels whose arrays are all raw"
        shapes = [arguments[index].shape for index in plain]
        shape = np.broadcast_shapes(*shapes) if plain else (size,)
        assert len({a.data.device_id for a in arguments if isinstance(a, cupy.ndarray)}) == 1

        views = {i: a for i, a in enumerate(arguments) if isinstance(a, cupy.ndarray)}
        for index in plain:
            if index >= kernel.nin:
                assert views[index].shape == shape, "an output is not broadcast"
            views[index] = cupy.broadcast_to(views[index], shape)
        if all(views[index].flags.c_contiguous for index in plain) and len(shape) > 1:
            shape = (views[plain[0]].size,)
            views.update((index, views[index].reshape(-1)) for index in plain)
        layouts = [
            (views[i].ndim, views[i].flags.c_contiguous) if i in views else None
            for i in range(len(arguments))
        ]
        types = [views[i].dtype if i in views else None for i in range(len(arguments))]
        code, resolved = source(kernel, types, [*layouts, (len(shape), True)])
        self.launches.append((kernel.name, [layout for layout in layouts if layout]))
        if 0 in shape:
            return

        values = []
        for i, (argument, dtype) in enumerate(zip(arguments, resolved, strict=True)):
            if i in views:
                view = views[i]
                values.append(
                    np.array([view.data.ptr, view.size, *view.shape, *view.strides], np.int64)
                )
            else:
                values.append(np.array(argument, dtype))
        values.append(np.array([np.prod(shape, dtype=int), *shape, *([0] * len(shape))], np.int64))
        pointers = (ctypes.c_void_p * len(values))(*[value.ctypes.data for value in values])
        _compiled(code)(pointers)


@functools.cache
def _compiled(code):
    """Build generated source with g++ and return a function that takes pointers to arguments."""
    signature = re.search(r'extern "C" __global__ void (\w+)\((.*?)\) \{', code, re.DOTALL)
    name, parameters = signature.groups()
    types = [p.rsplit(None, 1)[0] for p in re.split(r",\s*(?![^<]*>)", parameters)]
    casts = ", ".join(f"*static_cast<{t}*>(arguments[{i}])" for i, t in enumerate(types))
    casts = re.sub(r"static_cast<const ", "static_cast<", casts)
    text = (
        f'{_SHIM}{code}\nextern "C" void launch(void** arguments) '
        f"{{ host::run([=] {{ {name}({casts}); }}); }}\n"
    )
    includes = [o for o in core.assemble_cupy_compiler_options(()) if o.startswith("-I")]
    # A device stops at an access that is not aligned to its width; an x86 does not.
    checks = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-fno-strict-aliasing",
        "-fPIC",
        "-shared",
        "-w",
        *checks,
    ]
    folder = _cache_folder()
    digest = hashlib.sha256("\n".join([*command, *includes, text]).encode()).hexdigest()[:24]
    library = folder / f"{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            unit, made = Path(place, "kernel.cpp"), Path(place, "kernel.so")
            unit.write_text(text)
            done = subprocess.run(
                [*command, *includes, str(unit), "-o", str(made)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-4000:]
            made.replace(library)
    function = ctypes.CDLL(str(library)).launch
    function.restype = None
    return function


@functools.cache
def _cache_folder():
    """Return a folder that the processes of a test run share: g++ takes 0.3 s a kernel."""
    folder = Path(tempfile.gettempdir(), f"relu-xp-host-kernels-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), folder
    return folder


@contextlib.contextmanager
def installed():
    """Let relu_xp's CuPy backend run on the host; yield the list of launches."""
    from relu_xp.backends import cupy as backend

    launches = []

    def kernel(*arguments, make=backend.kernel):
        return HostKernel(make(*arguments), launches)

    def variant(name, make=backend.variant):
        return HostKernel(make(name), launches)

    def total(x, axis):
        with np.errstate(all="ignore"):
            return array(np.sum(to_numpy(x), axis))

    backend._launcher.cache_clear()
    with (
        mock.patch.object(backend, "kernel", functools.cache(kernel)),
        mock.patch.object(backend, "variant", functools.cache(variant)),
        mock.patch.object(cupy, "sum", total),
        mock.patch.object(cupy, "asarray", lambda x: array(x) if type(x) is np.ndarray else x),
        mock.patch.object(
            backend, "FORWARD_INTEGER", HostKernel(backend.FORWARD_INTEGER, launches)
        ),
        mock.patch.object(cupy.cuda.runtime, "getDevice", return_value=0),
        cupy.cuda.using_allocator(allocate),
    ):
        yield launches
    backend._launcher.cache_clear()
