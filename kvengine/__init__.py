"""kvengine: a storage engine for attention keys and values.

    engine = kvengine.open("mem://?size=4G | file:///var/cache/kv?size=100G")
    layout = kvengine.Layout(layers=32, kv_heads=8, head_dim=128, head_dim_v=128, dtype="bfloat16")
    names = engine.namespace(model="my-model", layout=layout)

    keys = names.keys(tokens)
    engine.save(keys, kv_caches, block_table).wait()
    with engine.match(keys) as lease:
        transfer = engine.load(lease, kv_caches, block_table)

Importing this package loads no framework, and no part of the engine before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvengine.errors import (
    AwayError,
    BadKey,
    ClosedError,
    ConfigError,
    DirectoryInUse,
    FrameError,
    KVEngineError,
    LayoutError,
    ModelNotSupported,
)

if TYPE_CHECKING:
    from pathlib import Path

    from kvengine.config import Config, Disk
    from kvengine.engine import Engine
    from kvengine.keys import BlockKeys, Namespace
    from kvengine.layout import Layout
    from kvengine.lease import Lease
    from kvengine.peer.client import Client
    from kvengine.retention import Retention
    from kvengine.transfer import Transfer

__version__ = "0.1.0"
__all__ = [
    "AwayError",
    "BadKey",
    "BlockKeys",
    "Client",
    "ClosedError",
    "Config",
    "ConfigError",
    "DirectoryInUse",
    "Disk",
    "Engine",
    "FrameError",
    "KVEngineError",
    "Layout",
    "LayoutError",
    "Lease",
    "ModelNotSupported",
    "Namespace",
    "Retention",
    "Transfer",
    "open",
]
HOMES = (
    ("Config", "config"),
    ("Disk", "config"),
    ("Engine", "engine"),
    ("BlockKeys", "keys"),
    ("Client", "peer.client"),
    ("Namespace", "keys"),
    ("Layout", "layout"),
    ("Lease", "lease"),
    ("Retention", "retention"),
    ("Transfer", "transfer"),
)


def open(  # noqa: A001  # read as kvengine.open
    url: str | Config | None = None, *, file: str | Path | None = None, **options: object
) -> Engine | Client:
    """Open an engine from a URL, a Config, a TOML file, the environment and options.

    url: "mem://?size=4G | file:///var/cache/kv?size=100G", fastest tier first; or
    "unix:///run/kvengine/kv.sock", where a daemon (`kvengine serve`) keeps the blocks of all
    processes of this host. Options are settings by name (memory_bytes="4G", threads=2 …) and win
    over the URL, both over `KVENGINE_*` variables, those over the file. Several ranks of a model
    save parts of a block each: they share the daemon of their host. Raises ConfigError,
    DirectoryInUse where another process holds the directory, or AwayError where no daemon answers.
    """
    from kvengine.config import Config

    if isinstance(url, Config):
        if options or file is not None:
            raise ConfigError("give either a Config or a URL with options, not both")
        config = url
    else:
        config = Config.load(url, file=file, options=options)[0]
    if config.daemon is not None:
        from kvengine.peer.client import Client

        return Client(config)
    from kvengine.engine import Engine

    return Engine(config)


def __getattr__(name: str) -> object:
    for known, module in HOMES:
        if known == name:
            import importlib

            return getattr(importlib.import_module(f"kvengine.{module}"), name)
    raise AttributeError(f"module 'kvengine' has no attribute {name!r}")
