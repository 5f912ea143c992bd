"""What computing and fetching cost, of models and places that are well known: for simulations.

A prefill takes 2 * active + attention * position operations a token, at so many operations a
second, and CALL_S a call; a table of n bytes takes `latency + n / bandwidth` from a place. Sources:
the models' cards for layers, heads and active weights; an H100 at 45 % of its peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

FLOPS = 450e12
CALL_S = 5e-3


class Model(NamedTuple):
    """Operations a token, and more of them a position; bytes of K/V a token (bf16)."""

    name: str
    flops: float
    attention: float
    token_bytes: int

    def seconds(self, first: int, stop: int) -> float:
        """Return what computing tokens first..stop of a prompt takes, without CALL_S."""
        return (self.flops * (stop - first) + self.attention * (stop**2 - first**2) / 2) / FLOPS


class Place(NamedTuple):
    """Where blocks are: seconds to the first byte, bytes a second."""

    name: str
    latency_s: float
    bandwidth: float

    def seconds(self, nbytes: int) -> float:
        """Return what reading so many bytes takes; nothing takes no time."""
        return self.latency_s + nbytes / self.bandwidth if nbytes else 0.0


MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "llama-3-8b": Model("Llama-3-8B", 16e9, 0.52e6, 131_072),
        "llama-3-70b": Model("Llama-3-70B", 140e9, 2.6e6, 327_680),
        "qwen3-30b-a3b": Model("Qwen3-30B-A3B", 6.6e9, 0.79e6, 98_304),
        "deepseek-v3": Model("DeepSeek-V3", 74e9, 5.0e6, 70_272),
    }
)
PLACES: Mapping[str, Place] = MappingProxyType(
    {
        "dram": Place("DRAM 50 GB/s", 20e-6, 50e9),
        "nvme": Place("NVMe 7 GB/s", 100e-6, 7e9),
        "25gbe": Place("25 GbE", 200e-6, 2.5e9),
        "s3": Place("S3 1 GB/s", 30e-3, 1e9),
    }
)
