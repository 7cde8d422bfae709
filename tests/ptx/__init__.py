"""Compiled Triton kernels, run without a GPU: an emulator of the PTX that Triton emits, in numpy.

    import ptx
    emulator = ptx.install("sm_80")     # from now on every kernel[grid](...) on CPU tensors is compiled for sm_80,
    kernel[grid](...)                   # and its PTX runs here, on the tensors' own memory
    print(emulator.problems)            # races and hazards; what is out of bounds, and deadlock, raise

See README.md.
"""

from .driver import Emulator, install
from .report import EmulationError, Problems
from .scheduler import Settings

__all__ = ["EmulationError", "Emulator", "Problems", "Settings", "install"]
