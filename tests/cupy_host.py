"""CuPy without a device: compile its kernels, and run them on the CPU.

Three things that need no GPU, each with the exact source that CuPy generates:

- `compile_for` and `disassemble`: PTX or machine code by NVRTC, with CuPy's own options;
- `HostKernel`: a kernel whose PTX is executed by ptx.py, called with ``cupy.ndarray``s over host
  memory;
- `array` and `allocate`: such arrays, so that dispatch, strides and errors are those of a device.

What this cannot show is speed, and what the driver makes of PTX.
"""

from __future__ import annotations

import collections
import contextlib
import copyreg
import functools
import hashlib
import math
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
from ptx import Program

from relu_xp.backends.overlap import address_view

_ARRAY, _INDEXER, _SCALAR = 1, 2, 3  # CuPy's _ArgKind

architecture = 90  # whose PTX is executed
first_block = lambda threads: 0  # noqa: E731  # of a launch; those before it are not executed
launches = []  # of each HostKernel: its name, and (ndim, c_contiguous) of the arrays
traces = collections.deque(maxlen=2)  # of the latest ones: kernel, arguments, list of Access


def source(kernel, types, layouts, small=True):
    """Return what CuPy generates for an ElementwiseKernel, and the dtypes of its arguments.

    `types` are the dtypes of the arguments, None for a scalar; `layouts` the (ndim, c_contiguous)
    of array arguments, and last that of the index. `small` is whether indices have 32 bits: of all
    of these together, or of each.
    """
    small = small if isinstance(small, list) else [small] * len(layouts)
    types = [None if t is None else np.dtype(t) for t in types]
    resolved = kernel._decide_params_type(tuple(types[: kernel.nin]), tuple(types[kernel.nin :]))
    infos = [
        _kernel._ArgInfo(_SCALAR, type(None), np.dtype(dtype), 0, True, True)
        if given is None
        else _kernel._ArgInfo(_ARRAY, cupy.ndarray, np.dtype(dtype), *layout, its_small)
        for given, dtype, layout, its_small in zip(
            types, resolved[0] + resolved[1], layouts[:-1], small[:-1], strict=True
        )
    ]
    infos.append(_kernel._ArgInfo(_INDEXER, type(None), None, layouts[-1][0], True, small[-1]))
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
    """Return generated source as NVRTC compiles it with CuPy's options: machine code, or PTX."""
    headers = "".join(f"#include <{name}>\n" for name in core._cupy_header_list)
    program = nvrtc.createProgram(headers + code, "kernel.cu", (), ())
    try:
        options = [*core.assemble_cupy_compiler_options(()), "-ftz=true"]
        options += [f"-arch={'compute' if ptx else 'sm'}_{architecture}"]
        options += ["--device-as-default-execution-space"]
        try:
            nvrtc.compileProgram(program, tuple(options))
        except nvrtc.NVRTCError:
            raise AssertionError(nvrtc.getProgramLog(program)) from None
        if ptx:
            return nvrtc.getPTX(program).decode().rstrip("\0")
        return nvrtc.getCUBIN(program) + b"\0"  # CuPy's own drops the last byte
    finally:
        nvrtc.destroyProgram(program)


def disassembler():
    """Return the path of nvdisasm, of its wheel or on the search path; None if it is absent."""
    import nvidia

    found = [file for folder in nvidia.__path__ for file in Path(folder).glob("cu*/bin/nvdisasm")]
    return str(found[0]) if found else shutil.which("nvdisasm")


def disassemble(cubin):
    """Return the instructions of machine code: a list of lines by the name of the kernel."""
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
    """Return host memory in the way that CuPy allocates a device's: aligned to 256 bytes."""
    buffer = np.empty(size + 256, np.uint8)
    buffer[:] = 0xA5  # so that a read of memory that nothing has written shows
    offset = -buffer.ctypes.data % 256
    memory = cupy.cuda.UnownedMemory(buffer.ctypes.data + offset, size, buffer, device_id=0)
    return cupy.cuda.MemoryPointer(memory, 0)


def array(host, device=0):
    """Return a ``cupy.ndarray`` over the memory of a NumPy array, with its strides."""
    low, high = np.lib.array_utils.byte_bounds(host)
    memory = cupy.cuda.UnownedMemory(low, max(high - low, 1), host, device_id=device)
    pointer = cupy.cuda.MemoryPointer(memory, host.__array_interface__["data"][0] - low)
    return cupy.ndarray(host.shape, host.dtype, pointer, strides=host.strides)


def to_numpy(x):
    """Return a copy of such an array as a NumPy array."""
    view = address_view(x.data.ptr, x.shape, x.strides, x.itemsize)
    return view.view(x.dtype).copy(order="K")


class HostKernel:
    """An ElementwiseKernel's stand-in that executes its PTX on the CPU.

    It takes what CuPy takes (arrays over host memory), and decides types and layouts as CuPy does;
    but of arrays with three axes or more that are not C-contiguous CuPy first merges what axes it
    can, so that a device gets code for fewer of them.
    """

    def __init__(self, kernel):
        self.kernel = kernel

    def __call__(self, *arguments, size=None):
        kernel, parameters = self.kernel, self.kernel.params[:-1]
        assert len(arguments) == len(parameters)
        views = {i: a for i, a in enumerate(arguments) if isinstance(a, cupy.ndarray)}
        assert len({a.data.device_id for a in views.values()}) == 1
        indexed = [i for i in views if not parameters[i].raw]
        assert (size is None) == bool(indexed), "size= is for kernels whose arrays are all raw"
        shape = np.broadcast_shapes(*(views[i].shape for i in indexed)) if indexed else (size,)
        for i in indexed:
            assert i < kernel.nin or views[i].shape == shape, "an output is not broadcast"
            views[i] = cupy.broadcast_to(views[i], shape)
        if len(shape) > 1 and all(views[i].flags.c_contiguous for i in indexed):
            views.update((i, views[i].reshape(-1)) for i in indexed)
            shape = views[indexed[0]].shape

        count = range(len(arguments))
        layouts = [
            (views[i].ndim, views[i].flags.c_contiguous) if i in views else None for i in count
        ]
        types = [views[i].dtype if i in views else None for i in count]
        threads = math.prod(shape)
        small = [i not in views or views[i]._index_32_bits for i in count]
        small.append(threads <= 1 << 31)
        code, dtypes = source(kernel, types, [*layouts, (len(shape), True)], small)
        launches.append((kernel.name, [layout for layout in layouts if layout]))
        if 0 in shape:
            return
        values = [
            np.array([v.data.ptr, v.size, *v.shape, *v.strides], np.int64)
            if (v := views.get(i)) is not None
            else np.array(arguments[i], dtypes[i])
            for i in count
        ]
        values.append(np.array([threads, *shape, *([0] * len(shape))], np.int64))
        inputs, outputs = [], []
        for i, view in views.items():
            if view.size:
                memory = address_view(view.data.ptr, view.shape, view.strides, view.itemsize)
                extent = np.lib.array_utils.byte_bounds(memory)
                (inputs if i < kernel.nin else outputs).append(extent)
        values = [value.tobytes() for value in values]
        program = compiled(code, architecture)
        accesses = program.run(values, threads, inputs, outputs, first_block(threads))
        traces.append((kernel, arguments, accesses))


@functools.cache
def compiled(code, architecture):
    """Return generated source as a program."""
    return Program(ptx_of(code, architecture))


def ptx_of(code, architecture):
    """Return the PTX of generated source, which is kept for other processes and later runs."""
    folder = Path(tempfile.gettempdir(), f"relu-xp-ptx-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), folder
    given = cupy.__version__, nvrtc.getVersion(), core.assemble_cupy_compiler_options(())
    digest = hashlib.sha256(f"{given}\n{architecture}\n{code}".encode()).hexdigest()[:24]
    file = folder / f"{digest}.ptx"
    if not file.exists():
        text = compile_for(code, architecture, ptx=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as scratch:
            scratch.write(text)
        Path(scratch.name).replace(file)
    return file.read_text()


@contextlib.contextmanager
def installed():
    """Run the kernels of the CuPy backend on the host; return `launches`, empty."""
    from relu_xp.backends import cupy as backend
    from relu_xp.backends import cupy_kernels as kernels
    from relu_xp.backends import cupy_sums as sums

    def on_host(make):
        return functools.cache(lambda *arguments: HostKernel(make(*arguments)))

    replacements = {
        (kernels, "kernel"): on_host(kernels.kernel),
        (backend, "variant"): on_host(kernels.variant),
        (sums, "variant"): on_host(kernels.variant),
        (backend, "FORWARD_INTEGER"): HostKernel(kernels.FORWARD_INTEGER),
        (cupy, "asarray"): lambda x, dtype=None: array(x) if type(x) is np.ndarray else x,
        (cupy, "zeros_like"): lambda x, dtype=None: array(np.zeros(x.shape, x.dtype)),
        (cupy.cuda, "Device"): contextlib.nullcontext,
        (cupy.cuda.runtime, "getDevice"): lambda: 0,
    }
    pickled = {cupy.ndarray: lambda x: (array, (to_numpy(x),))}
    launches.clear()
    kernels.launcher.cache_clear()
    with contextlib.ExitStack() as stack:
        for (owner, name), replacement in replacements.items():
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(cupy.cuda.using_allocator(allocate))
        stack.enter_context(mock.patch.dict(copyreg.dispatch_table, pickled))
        yield launches
    kernels.launcher.cache_clear()
