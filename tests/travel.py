"""The ways in which an object travels: pickles of every protocol, and copies."""

from __future__ import annotations

import copy
import functools
import importlib.util
import pickle

import pytest


def reloaded(value, dumps=pickle.dumps, **options):
    return pickle.loads(dumps(value, **options))


PICKLES = {
    f"protocol {n}": functools.partial(reloaded, protocol=n)
    for n in range(pickle.HIGHEST_PROTOCOL + 1)
}
if importlib.util.find_spec("cloudpickle"):
    import cloudpickle

    PICKLES["cloudpickle"] = functools.partial(reloaded, dumps=cloudpickle.dumps)
COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy}

each_pickle = pytest.mark.parametrize("load", PICKLES.values(), ids=PICKLES)
each_copy = pytest.mark.parametrize("load", COPIES.values(), ids=COPIES)
each_way = pytest.mark.parametrize("load", (PICKLES | COPIES).values(), ids=PICKLES | COPIES)


def message_of(call, *arguments):
    with pytest.raises(RuntimeError, match="^backward: nothing is saved.*call forward") as caught:
        call(*arguments)
    return str(caught.value)
