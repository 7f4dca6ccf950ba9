"""The package uses public names of other packages only, in all of its modules."""

from __future__ import annotations

import ast
import pathlib

import relu_xp

# Documented methods of the standard library's NamedTuple.
DOCUMENTED = {"_asdict", "_fields", "_replace"}


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_"


def names_of(tree):
    """Return the private names that a module defines, and those that it takes from somewhere."""
    defined, taken = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            (defined if isinstance(node.ctx, ast.Store) else taken).add(name)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] != "relu_xp":
                taken.update((node.module or "").split("."), (alias.name for alias in node.names))
        elif isinstance(node, ast.Import):
            taken.update(part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            taken.update(one.value for one in node.args[1:2] if isinstance(one, ast.Constant))
    return set(filter(is_private, defined)), set(filter(is_private, taken))


def test_no_name_that_begins_with_an_underscore_is_taken_from_another_package():
    """A private name that is read is one that some module here defines."""
    folder = pathlib.Path(relu_xp.__file__).parent
    defined, taken = set(DOCUMENTED), {}
    for file in sorted(folder.rglob("*.py")):
        own, others = names_of(ast.parse(file.read_text()))
        defined |= own | {file.stem}
        taken[str(file.relative_to(folder))] = others
    defined.add("_cpu")  # the compiled module of `relu_xp.kernels`
    assert len(taken) > 20
    foreign = {file: others - defined for file, others in taken.items() if others - defined}
    assert foreign == {}


def test_a_name_that_is_taken_is_found():
    source = """
import torch, a._b
from c import _d
from relu_xp.mask import _own
class _K:
    def f(self, x):
        self._e = x._g
        return getattr(x, "_h"), torch._C.i(self._e), x.__dict__, _K, _own
"""
    defined, taken = names_of(ast.parse(source))
    assert defined == {"_K", "_e"}
    assert taken - defined - {"_own"} == {"_b", "_d", "_g", "_h", "_C"}
