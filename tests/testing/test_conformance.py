"""The conformance suite over the backends of this package, each behind its own `Library`."""

from relu_xp.testing.conformance import *  # noqa: F403
