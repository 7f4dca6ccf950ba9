"""A backend for each array library: `base.Backend`, and subclasses that override passes of it.

See the README.md of this folder for how to write one.
"""

from relu_xp.backends.base import Backend

__all__ = ["Backend"]
