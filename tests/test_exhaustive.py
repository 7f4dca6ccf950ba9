"""All 2**32 patterns of float32, forward, gradient and vjp: ``pytest -m exhaustive``.

Every pattern is x once, and dy once; of the PTX of CuPy's kernels it is a sixteenth (blocks.sweep).
The other tests show that this would find an error.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import sys

import numpy as np
import pytest
from blocks import (
    BATCH,
    BLOCKS,
    FORM,
    PRESETS,
    SIZE,
    STEP,
    Block,
    check,
    expected,
    initialize,
    preset_of,
    sweep,
)
from libraries import LIBRARIES

import relu_xp
from relu_xp.testing import reference

each_library = pytest.mark.libraries(names=["numpy", "compiled", "cupy_host", "cupy"])
HIDDEN = 1 << FORM.fraction  # the bit of a significand that a pattern does not have


@pytest.mark.exhaustive
@each_library
def test_every_pattern(library, require, capsys):
    tqdm = require("tqdm").tqdm
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), spawn, initialize, (library.name,)
    )
    often = 0.2 if sys.stderr.isatty() else 20
    with pool, capsys.disabled(), tqdm(total=1 << 32, unit_scale=True, mininterval=often) as bar:
        bar.set_description(library.name)
        task = functools.partial(sweep, library.name)
        for patterns in pool.map(task, range(0, BLOCKS, BATCH)):
            bar.update(patterns)


# Blocks around each threshold, ceiling, limit and NaN, of either sign.
NUMBERS = sorted(
    {
        (sign | magnitude) // SIZE
        for sign in (0, FORM.sign)
        for point in (1, HIDDEN, FORM.round(6.0), FORM.infinity, FORM.sign)
        for magnitude in (point - 1, min(point, FORM.sign - 1))
    }
)


def test_blocks_make_up_all_patterns():
    assert BLOCKS * SIZE == 1 << 32
    assert BLOCKS % BATCH == 0
    assert SIZE <= HIDDEN, "one exponent a block"
    some = range(0, BLOCKS, 97)
    for step in (1, STEP):
        assert len({Block(number * step).start for number in some}) == len(some)


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_expected_is_what_the_reference_returns(name):
    preset, rng = preset_of(name), np.random.default_rng(0)
    for number in (*NUMBERS, *rng.integers(0, BLOCKS, 10)):
        x, dy = Block(int(number)), Block(int(number) * STEP)
        y, gradient, dx, products = expected(name, x, dy)
        for k in (0, 1, 2, SIZE - 2, SIZE - 1, *rng.integers(0, SIZE, 60)):
            bits, its_dy = int(x.patterns[k]), int(dy.patterns[k])
            branch = preset.branch(bits)
            assert y[k] == preset.forward(bits)
            assert gradient[k] == preset.backward(branch, FORM.round(1.0))
            wanted = preset.backward(branch, its_dy)
            if wanted is reference.ANY_NAN:
                assert products.start <= k < products.stop
                assert reference.is_nan(FORM, dx[k])
            else:
                assert dx[k] == wanted


@pytest.mark.parametrize("slope", [1.0, 0.01, -3.5, 2.0**-14, 1e6, 1.9999999])
def test_its_products_are_those_of_the_reference(slope):
    factor, rng = FORM.round(slope), np.random.default_rng(1)
    for number in (*NUMBERS, *rng.integers(0, BLOCKS, 10)):
        block = Block(int(number))
        found = block.times(factor)
        for k in (0, 1, 2, 3, SIZE - 1, *rng.integers(0, SIZE, 60)):
            wanted = FORM.product(factor, int(block.patterns[k]))
            assert found[k] == (0xFFFFFFFF if wanted is reference.ANY_NAN else wanted)


@each_library
def test_some_blocks(library):
    for number in NUMBERS:
        check(library, number)


@pytest.mark.parametrize("function", ["relu", "relu_grad", "relu_vjp", "pullback"])
@pytest.mark.parametrize("pattern", [0x80000000, 0x00000001, 0x40C00000, 0x7FC00001, 0xFF800000])
def test_one_wrong_pattern_is_found(monkeypatch, function, pattern):
    right = getattr(relu_xp, "relu_vjp" if function == "pullback" else function)

    def flip(array):
        array.view(np.uint32)[pattern % SIZE] ^= 1
        return array

    def wrong(x, **params):
        result = right(x, **params)
        if function == "pullback":
            return result[0], lambda dy: flip(result[1](dy))
        flip(result[0] if function == "relu_vjp" else result)
        return result

    monkeypatch.setattr(relu_xp, right.__name__, wrong)
    with pytest.raises(AssertionError, match=f"^relu, {function}: 1 wrong; x {pattern:#x}, "):
        check(LIBRARIES["numpy"], pattern // SIZE)
