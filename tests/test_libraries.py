"""One test for each library, skipped with the reason where it is absent.

Every other test over the libraries is collected for those that are there (conftest.py).
"""

from __future__ import annotations

import numpy as np
import pytest
from libraries import FLOATING, LIBRARIES, unavailable

import relu_xp
from relu_xp import dispatch


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_is_there_and_its_backend_serves_it(name, request):
    library = LIBRARIES[name]
    if library.reason:
        unavailable(request.config, library.reason, gpu=library.gpu)
    assert library.load() is None
    assert [dtype for dtype in FLOATING if dtype in library.dtypes] == list(library.dtypes)
    with library.running():
        x = library.array(np.array([-1.0, 2.0], library.dtypes[-1]))
        assert type(dispatch.backend_for("test", "x", x)).__name__ == library.backend
        assert library.numpy(relu_xp.relu(x)).tolist() == [0.0, 2.0]
