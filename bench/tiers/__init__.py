"""Rows of each tier, for `python -m bench store --tier disk,valkey,s3`.

A tier's rows are made by a module of its own here, with `run(options) -> list[Row]`. It measures
ours and the bare device or client in turns, with the same bytes and the same number of threads.
"""

import argparse
import importlib
import os

from bench.runner import Row
from kvengine.seal import Sealer

NAMES = ("disk", "valkey", "s3")


class DataKey:
    """One data key, as a tenant has it."""

    def __init__(self) -> None:
        self.key = os.urandom(32)

    def sealing(self) -> tuple[int, bytes]:
        """Return its number and itself."""
        return 1, self.key

    def opening(self, key_id: int) -> bytes | None:
        """Return it."""
        return self.key if key_id == 1 else None


def sealer() -> Sealer:
    """Return what seals for one tier, with a key of its own."""
    return Sealer(DataKey())


def chosen(text: str) -> list[str]:
    """Read a list such as "disk,valkey"."""
    names = text.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"no tier {unknown[0]!r}: there are {', '.join(NAMES)}")
    return names


def run(options: argparse.Namespace) -> list[Row]:
    """Measure the tiers that were chosen."""
    modules = [importlib.import_module(f"bench.tiers.{name}") for name in options.tier]
    return [row for module in modules for row in module.run(options)]
