"""Every Triton variant, to be compiled ahead of time: by the tests, by the bench, by who ships it.

A kernel module lists its own as `VARIANTS`; a new module is one line here. Imports triton,
so it is imported on use only.
"""

from kvengine.kernels import (
    blake3_device,
    device,
    lossless_device,
    quant_device,
    swap_device,
    xxh3_device,
)
from kvengine.kernels.build import TARGETS, Built, Variant, compile, faults

__all__ = ["TARGETS", "VARIANTS", "Built", "Variant", "compile", "faults"]

VARIANTS: tuple[Variant, ...] = (
    *blake3_device.VARIANTS,
    *device.VARIANTS,
    *lossless_device.VARIANTS,
    *quant_device.VARIANTS,
    *swap_device.VARIANTS,
    *xxh3_device.VARIANTS,
)
