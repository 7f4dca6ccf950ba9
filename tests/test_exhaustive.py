"""All 2**32 patterns of float32, forward, gradient and vjp: ``pytest -m exhaustive``.

A block is patterns in a row that share sign and exponent. Within one, numbers are in order, so that
where a piece begins is found by bisection, asking the oracle on Python integers; the products in
between are those of integers, rounded once. Every pattern is x once, and dy once.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import sys

import numpy as np
import pytest
from conftest import unavailable
from libraries import LIBRARIES, parameter

import relu_xp
from relu_xp.testing import oracle

FORM = oracle.Format("float32")
FRACTION, HIDDEN = FORM.fraction, 1 << FORM.fraction
SIZE = 1 << 19  # patterns of a block: few calls, and arrays that stay in the caches
BLOCKS = (1 << FORM.width) // SIZE
TOGETHER = 64  # blocks that a process takes at a time
STEP = 2371  # odd: from one block of dy to the next

MEMBERS = {"relu": {}, "relu6": {"max_value": 6.0}, "leaky_relu": {"negative_slope": 0.01}}

LIFE = contextlib.ExitStack()  # of a process that checks blocks

PATHS = [parameter(LIBRARIES[name]) for name in ("numpy", "native", "cupy_host", "cupy")]


class Block:
    """Patterns in a row, from `start` up to `stop`."""

    def __init__(self, number):
        self.start = number % BLOCKS * SIZE
        self.stop = self.start + SIZE
        self.patterns = np.arange(self.start, self.stop, dtype=np.uint32)
        self.numbers = self.patterns.view(np.float32)

    def runs(self, member):
        """Yield a piece and which of the patterns lie in it, one run after the other."""
        begin = self.start
        while begin < self.stop:
            piece = member.piece(begin)
            rest = range(begin, self.stop)
            end = begin + bisect.bisect(rest, False, key=lambda bits: member.piece(bits) != piece)
            yield piece, slice(begin - self.start, end - self.start)
            begin = end

    def times(self, slope):
        """Return the bits of the rounded products, NaN as all ones.

        The slope is from 2**-14 to 2**20, or the opposite of such a number.
        """
        sign = (self.start ^ slope) & FORM.sign
        field = (self.start & FORM.infinity) >> FRACTION
        first = self.start & (HIDDEN - 1)
        if field == FORM.infinity >> FRACTION:
            found = np.full(SIZE, 0xFFFFFFFF, np.uint32)
            if not first:
                found[0] = sign | FORM.infinity
            return found
        # A number is a significand times 2**exponent, in units of the smallest subnormal.
        exponent = max(field, 1) - 1
        first |= HIDDEN if field else 0
        its_exponent = ((slope & FORM.infinity) >> FRACTION) - 1 - FORM.unit_shift
        its_significand = slope & (HIDDEN - 1) | HIDDEN
        exact = np.arange(first, first + SIZE, dtype=np.int64) * its_significand
        found = np.empty(SIZE, np.uint32)
        begin = 0
        while begin < SIZE:  # once for each length that a product has
            length = int(exact[begin]).bit_length()
            end = int(np.searchsorted(exact, 1 << length))
            # What the significand has no place for is dropped, or what lies below the unit.
            drop = max(length - FRACTION - 1, -exponent - its_exponent)
            whole = exact[begin:end]
            if drop > 0:
                whole += (whole >> drop & 1) + ((1 << (drop - 1)) - 1)  # ties to even
                whole >>= drop
            else:
                whole <<= -drop
            # A carry past the significand lands in the exponent, as it should.
            whole += exponent + its_exponent + drop << FRACTION
            found[begin:end] = np.minimum(whole, FORM.infinity, out=whole)
            begin = end
        found |= np.uint32(sign)
        return found


@functools.cache
def oracle_member(name):
    return oracle.Member(FORM, **MEMBERS[name])


def expected(name, x, dy):
    """Return f(x), f'(x) and f'(x) * dy of a member, as bits, and where the last are products."""
    member = oracle_member(name)
    y, dx = x.patterns.copy(), dy.patterns.copy()
    gradient = np.full(SIZE, FORM.round(1.0), np.uint32)
    products = slice(0)
    for piece, run in x.runs(member):
        if piece == 2:
            y[run] = member.ceiling_bits
            gradient[run] = dx[run] = 0
        elif piece == 0 and member.flat:
            y[run] = gradient[run] = dx[run] = 0
        elif piece == 0:
            products = run
            y[run] = x.times(member.negative_slope)[run]
            gradient[run] = member.negative_slope
            dx[run] = dy.times(member.negative_slope)[run]
    return y, gradient, dx, products


def compare(what, got, wanted, x, dy, products=slice(0)):
    """Raise AssertionError unless the bits are those expected; a product's NaN may be any."""
    got = got.view(np.uint32)
    if np.array_equal(got, wanted):
        return
    wrong = got != wanted
    nan = oracle.is_nan(FORM, got[products]) & oracle.is_nan(FORM, wanted[products])
    wrong[products] &= ~nan
    assert not wrong.any(), (
        f"{what}: {wrong.sum()} wrong; x {x.patterns[wrong][0]:#x}, dy {dy.patterns[wrong][0]:#x}, "
        f"got {got[wrong][0]:#x}, expected {wanted[wrong][0]:#x}"
    )


def check(library, number):
    """Compare all that a library makes of a block of x and another one of dy."""
    x, dy = Block(number), Block(number * STEP)
    array, its_dy = library.array(x.numbers), library.array(dy.numbers)
    for name, numbers in MEMBERS.items():
        y, gradient, dx, products = expected(name, x, dy)
        saved_y, pullback = relu_xp.relu_vjp(array, **numbers)
        for what, result, wanted, free in (
            ("relu", relu_xp.relu(array, **numbers), y, slice(0)),
            ("relu_grad", relu_xp.relu_grad(array, **numbers), gradient, slice(0)),
            ("relu_vjp", saved_y, y, slice(0)),
            ("pullback", pullback(its_dy), dx, products),
        ):
            compare(f"{name}, {what}", library.numpy(result), wanted, x, dy, free)


def serve(name):
    """Make a process ready to check blocks over a library, with one thread."""
    relu_xp.set_num_threads(1)
    LIBRARIES[name].load()
    LIFE.enter_context(LIBRARIES[name].running())


def sweep(name, first):
    """Check some blocks, and return how many patterns these are."""
    for number in range(first, first + TOGETHER):
        check(LIBRARIES[name], number)
    return TOGETHER * SIZE


@pytest.mark.exhaustive
@pytest.mark.parametrize("library", PATHS)
def test_every_pattern(library, request, require, capsys):
    if reason := library.load():
        unavailable(request.config, reason, gpu=library.gpu)
    tqdm = require("tqdm").tqdm
    pool = concurrent.futures.ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"), serve, (library.name,)
    )
    often = 0.2 if sys.stderr.isatty() else 20
    with pool, capsys.disabled(), tqdm(total=1 << 32, unit_scale=True, mininterval=often) as bar:
        bar.set_description(library.name)
        for patterns in pool.map(
            functools.partial(sweep, library.name), range(0, BLOCKS, TOGETHER)
        ):
            bar.update(patterns)


# Blocks around each knee, ceiling, limit and NaN, of either sign.
NUMBERS = sorted(
    {
        (sign | magnitude) // SIZE
        for sign in (0, FORM.sign)
        for knee in (1, HIDDEN, FORM.round(6.0), FORM.infinity, FORM.sign)
        for magnitude in (knee - 1, min(knee, FORM.sign - 1))
    }
)


class TestTheSweep:
    """What it compares with, and that it can fail; run with all other tests."""

    def test_blocks_make_up_all_patterns(self):
        assert BLOCKS * SIZE == 1 << 32
        assert BLOCKS % TOGETHER == 0
        assert SIZE <= HIDDEN, "one exponent a block"
        for step in (1, STEP):
            assert len({Block(number * step).start for number in range(0, BLOCKS, 97)}) == 85

    @pytest.mark.parametrize("name", MEMBERS)
    def test_its_expectations_are_the_oracles(self, name):
        member, rng = oracle_member(name), np.random.default_rng(0)
        for number in (*NUMBERS, *rng.integers(0, BLOCKS, 40)):
            x, dy = Block(int(number)), Block(int(number) * STEP)
            y, gradient, dx, products = expected(name, x, dy)
            for k in (0, 1, 2, SIZE - 2, SIZE - 1, *rng.integers(0, SIZE, 60)):
                bits, its_dy = int(x.patterns[k]), int(dy.patterns[k])
                piece = member.piece(bits)
                assert y[k] == member.forward(bits)
                assert gradient[k] == member.backward(piece, FORM.round(1.0))
                wanted = member.backward(piece, its_dy)
                if wanted is oracle.ANY_NAN:
                    assert products.start <= k < products.stop
                    assert oracle.is_nan(FORM, dx[k])
                else:
                    assert dx[k] == wanted

    @pytest.mark.parametrize("slope", [1.0, 0.01, -3.5, 2.0**-14, 1e6, 1.9999999])
    def test_its_products_are_the_oracles(self, slope):
        factor, rng = FORM.round(slope), np.random.default_rng(1)
        for number in (*NUMBERS, *rng.integers(0, BLOCKS, 40)):
            block = Block(int(number))
            found = block.times(factor)
            for k in (0, 1, 2, 3, SIZE - 1, *rng.integers(0, SIZE, 60)):
                wanted = FORM.product(factor, int(block.patterns[k]))
                assert found[k] == (0xFFFFFFFF if wanted is oracle.ANY_NAN else wanted)

    @pytest.mark.parametrize("library", PATHS)
    def test_some_blocks(self, library, request):
        if reason := library.load():
            unavailable(request.config, reason, gpu=library.gpu)
        with library.running():
            for number in NUMBERS:
                check(library, number)

    @pytest.mark.parametrize("function", ["relu", "relu_grad", "relu_vjp", "pullback"])
    @pytest.mark.parametrize(
        "pattern", [0x80000000, 0x00000001, 0x40C00000, 0x7FC00001, 0xFF800000]
    )
    def test_one_wrong_pattern_is_seen(self, monkeypatch, function, pattern):
        def spoil(result):
            result.view(np.uint32)[pattern % SIZE] ^= 1
            return result

        def wrong(x, **numbers):
            result = right(x, **numbers)
            if function == "relu_vjp":
                spoil(result[0])
            elif function == "pullback":
                return result[0], lambda dy: spoil(result[1](dy))
            else:
                spoil(result)
            return result

        right = getattr(relu_xp, "relu_vjp" if function == "pullback" else function)
        monkeypatch.setattr(relu_xp, right.__name__, wrong)
        with pytest.raises(AssertionError, match=f"^relu, {function}: 1 wrong; x {pattern:#x}, "):
            check(LIBRARIES["numpy"], pattern // SIZE)
