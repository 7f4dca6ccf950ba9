"""Compiles the kernels, keeps them on disk, and makes Python functions of them.

What was compiled lies in the user's cache folder, under a name made of all that it depends on, with
a checksum: code that is not what was written there is compiled again. Where nothing can be written,
each process compiles for itself, some 40 ms a structure.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relu_xp.backends.llvm import kernels, runtime

__all__ = ["Engine", "cache_folder"]

_HEADER = object.__basicsize__
_METH_FASTCALL = 0x80
_NEW_LIKE_ARRAY = 277  # PyArray_NewLikeArray
_DIGEST = hashlib.sha256().digest_size


class Engine:
    """LLVM for this machine.

    Raises
    ------
    ImportError, RuntimeError
        If LLVM is not there, or Python, NumPy or the machine is not one that the kernels know.
    """

    def __init__(self) -> None:
        if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != 8:
            raise RuntimeError("the kernels are for 64-bit CPython")
        if sysconfig.get_config_var("Py_GIL_DISABLED"):  # nothing but the GIL is known to them
            raise RuntimeError("the kernels are not for a Python without the GIL")
        machine = platform.machine().lower()
        if machine not in runtime.MACHINES:
            raise RuntimeError(f"the kernels are not for the processor architecture {machine!r}")
        self.c_api = _c_api()
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        features = llvm.get_host_cpu_features()
        target = llvm.Target.from_default_triple()
        self._llvm = llvm
        self._machine = target.create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3, jit=True
        )
        self._float16 = machine not in ("x86_64", "amd64") or bool(features.get("f16c"))
        version = ".".join(map(str, llvm.llvm_version_info))
        self.name = f"LLVM {version} for {llvm.get_host_cpu_name()}"
        self._target = "\n".join(
            (
                self.name,
                target.triple,
                features.flatten(),
            )
        )

    def serves(self, structure: kernels.Structure) -> bool:
        """Tell whether a structure can be compiled: not if LLVM needed a library for its floats."""
        products = structure.low or structure.scaled
        return self._float16 or not products or structure.dtype_name != "float16"

    def addresses(self, text: str, names: Sequence[str]) -> dict[str, int]:
        """Return where functions of a module lie, compiling it unless the disk has it.

        Parameters
        ----------
        text : str
            LLVM IR.
        names : sequence of str
            The functions.
        """
        file = self._file(text)
        code = _read(file)
        if code is None:
            module = self._llvm.parse_assembly(text)
            module.verify()
            code = self._machine.emit_object(module)
            _write(file, code)
        jit = self._llvm.create_mcjit_compiler(self._llvm.parse_assembly(""), self._machine_again())
        jit.add_object_file(self._llvm.object_file.ObjectFileRef.from_data(code))
        jit.finalize_object()
        found = {name: jit.get_function_address(name) for name in names}
        jit.detach()  # the code is never freed: at exit, a thread may still be in it
        return found

    def is_kept(self, text: str) -> bool:
        """Tell whether the disk has a module."""
        return _read(self._file(text)) is not None

    def _file(self, text: str) -> Path | None:
        folder = cache_folder()
        key = hashlib.sha256(f"{self._target}\n{text}".encode()).hexdigest()
        return None if folder is None else folder / f"{key}.o"

    def _machine_again(self) -> Any:
        """Return a target machine to be given away: a JIT takes the one that it is made with."""
        return self._llvm.Target.from_default_triple().create_target_machine(jit=True)

    def runtime(self, board: np.ndarray[Any, Any]) -> tuple[Any, ...]:
        """Return ``call``, ``fits``, ``help`` and ``ring`` over a board (`runtime.source`)."""
        names = ("call", "fits", "help", "ring")
        addresses = self.addresses(runtime.source(_HEADER), names)
        return tuple(self._function(name, addresses[name], board) for name in names)

    def _function(self, name: str, address: int, board: np.ndarray[Any, Any]) -> Any:
        """Make a builtin of compiled code: 20 ns a call, where ctypes takes 330."""
        definition = _MethodDefinition(name.encode(), address, _METH_FASTCALL, None)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(definition))  # likewise
        new = ctypes.pythonapi.PyCFunction_NewEx
        new.argtypes = (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
        new.restype = ctypes.py_object
        return new(ctypes.byref(definition), board, None)


class _MethodDefinition(ctypes.Structure):
    """PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


def cache_folder() -> Path | None:
    """Return the folder that compiled code is kept in; it may not exist. None for no home."""
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        root = "~/Library/Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME", "")
        if not os.path.isabs(root):  # as its specification has it
            root = "~/.cache"
    try:
        return Path(root).expanduser() / "relu_xp"
    except RuntimeError:
        return None


def _c_api() -> dict[str, int]:
    """Return the addresses that a board has, by their names there.

    Raises
    ------
    RuntimeError
        If arrays do not lie in memory as the kernels read them, which is tried on some.
    """
    python = {
        "save_thread": "PyEval_SaveThread",
        "restore_thread": "PyEval_RestoreThread",
        "as_ssize_t": "PyLong_AsSsize_t",
        "incref": "Py_IncRef",
        "acquire_lock": "PyThread_acquire_lock",
        "release_lock": "PyThread_release_lock",
    }
    addresses = {
        name: ctypes.cast(getattr(ctypes.pythonapi, function), ctypes.c_void_p).value or 0
        for name, function in python.items()
    }
    system = {"give_way": "SwitchToThread" if sys.platform == "win32" else "sched_yield"}
    if sys.platform == "linux":
        system |= {
            "get_cpu": "sched_getcpu",
            "get_affinity": "sched_getaffinity",
            "set_affinity": "sched_setaffinity",
        }
    library = ctypes.CDLL("kernel32" if sys.platform == "win32" else None)
    for name, function in system.items():
        addresses[name] = ctypes.cast(getattr(library, function), ctypes.c_void_p).value or 0
    addresses |= {"none": id(None), "true": id(True), "false": id(False)}
    addresses |= {"array": id(np.ndarray), "memmap": id(np.memmap)}
    addresses["new_like"] = _numpy_function(_NEW_LIKE_ARRAY)
    new_like = ctypes.PYFUNCTYPE(
        ctypes.py_object, ctypes.py_object, ctypes.c_int, ctypes.c_void_p, ctypes.c_int
    )(addresses["new_like"])
    for array in (np.ones((2, 3)), np.ones((2, 3), "f4", order="F"), np.ones((4, 6))[1::2, ::2]):
        at = {name: id(array) + _HEADER + offset for name, offset in runtime.FIELDS.items()}
        lengths = ctypes.c_ssize_t * array.ndim
        shape = ctypes.c_size_t.from_address(at["shape"]).value
        flags = ctypes.c_int.from_address(at["flags"]).value
        known = (
            ctypes.c_size_t.from_address(at["class"]).value == id(np.ndarray)
            and ctypes.c_size_t.from_address(at["data"]).value == _address(array)
            and ctypes.c_int.from_address(at["axes"]).value == array.ndim
            and tuple(lengths.from_address(shape)) == array.shape
            and ctypes.c_size_t.from_address(at["dtype"]).value == id(array.dtype)
            and flags & runtime.FLAGS == array.flags.num & runtime.FLAGS
        )
        fresh, expected = new_like(array, runtime.KEEP_ORDER, None, 0), np.empty_like(array)
        known = known and fresh.dtype == expected.dtype and fresh.strides == expected.strides
        if not known:
            raise RuntimeError("NumPy's arrays lie in memory in an unknown way")
    return addresses


def _address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _numpy_function(number: int) -> int:
    """Return the address of a function of NumPy's C API, whose numbers are part of its ABI."""
    capsule = np._core._multiarray_umath._ARRAY_API  # type: ignore[attr-defined]
    get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    table = ctypes.cast(get_pointer(capsule, None), ctypes.POINTER(ctypes.c_void_p))
    abi_version = ctypes.PYFUNCTYPE(ctypes.c_uint)(table[0])() >> 24
    if abi_version != 2 or not (address := table[number]):
        raise RuntimeError(f"NumPy's C API has the unknown version {abi_version}")
    return int(address)


def _read(file: Path | None) -> bytes | None:
    """Return what `_write` wrote; None if there is no such file, or it is damaged."""
    if file is None:
        return None
    try:
        if not (_is_ours(file.parent) and _is_ours(file)):
            return None
        content = file.read_bytes()
    except OSError:
        return None
    code = content[_DIGEST:]
    return code if hashlib.sha256(code).digest() == content[:_DIGEST] else None


def _is_ours(path: Path) -> bool:
    """Tell whether nobody else may have written a file or folder: it is code that is to run."""
    if sys.platform == "win32":
        return True  # the folder is in the user's profile
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _write(file: Path | None, code: bytes) -> None:
    """Write a file as a whole or not at all; a folder that cannot be written is left alone."""
    if file is None:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(hashlib.sha256(code).digest() + code)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
