"""One ReLU family, one set of rules, for every array library."""

from relu_xp import activations
from relu_xp.activations import *  # noqa: F403  all of its public names
from relu_xp.threads import get_num_threads, set_num_threads

__version__ = "0.2.0"

__all__ = ["get_num_threads", "set_num_threads", "show_versions"]
__all__ += activations.__all__


def show_versions() -> None:
    """Print the versions of relu_xp and of what it uses, its backends, and this machine's devices.

    ``relu-xp info`` prints the same; a report of a bug should contain it.
    """
    from relu_xp.cli.info import show_versions as show  # a slow import, which few need

    show()
