"""A fixture for tests of CuPy without a device."""

from __future__ import annotations

import pytest
from libraries import LIBRARIES, unavailable


@pytest.fixture
def launches(request):
    """The launches of CuPy's kernels, which run on the CPU."""
    if reason := LIBRARIES["cupy_host"].load():
        unavailable(request.config, reason)
    with LIBRARIES["cupy_host"].running() as found:
        yield found
