"""A stand-in for a GPU: a device of torch whose work is done late, in an order that only events restrict.

Its tensors look like those of a GPU: the host cannot read their addresses, copies and kernels are queued on
streams, and nothing is done before something waits for it. Then streams take turns by chance. So a wait, a
copy or an event that is missing in the code under test gives wrong numbers here, as it might on a GPU.
"""

import functools

from tests.support.standin import hooks, kernels, operators, windows
from tests.support.standin.operators import NAME

__all__ = ["NAME", "register"]


@functools.cache
def register() -> None:
    """Add the device to torch, for the rest of the process."""
    operators.register()
    hooks.install()
    kernels.install()
    windows.install()
