"""Tenants: who may form which keys. One default tenant for now: a secret and an epoch.

The secret keys every chain of the tenant; raising the epoch makes all its blocks unreachable at
once, since the epoch is part of every identity. Both are kept beside the store's data, mode 0600.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

import msgspec

from kvengine.errors import ConfigError
from kvengine.keys import KEY_BYTES

DEFAULT = "default"


class Record(msgspec.Struct, forbid_unknown_fields=True):
    """What is kept of a tenant."""

    secret: str
    epoch: Annotated[int, msgspec.Meta(ge=0)]


class Tenants:
    """The default tenant's secret and epoch, in memory or in `path`.

    A given `secret` (32 bytes) wins over a kept one. Raises ConfigError for a damaged file.
    """

    def __init__(self, path: Path | None = None, secret: bytes | None = None) -> None:
        if secret is not None and len(secret) != KEY_BYTES:
            raise ConfigError(
                f"a tenant's secret has {KEY_BYTES} bytes (64 hex digits), got {len(secret)} bytes"
            )
        self._path = path
        self._given = secret
        self._records = self._read()
        if DEFAULT not in self._records:
            self._records[DEFAULT] = Record(secrets.token_hex(KEY_BYTES), 0)
            self._write()

    def secret(self, tenant: str = DEFAULT) -> bytes:
        """Return the 32 bytes that key the tenant's chains."""
        return self._given or bytes.fromhex(self._records[tenant].secret)

    def epoch(self, tenant: str = DEFAULT) -> int:
        """Return the number that stands in the tenant's identities."""
        return self._records[tenant].epoch

    def raise_epoch(self, tenant: str = DEFAULT) -> int:
        """Make every block of the tenant unreachable; return the new epoch. O(1)."""
        self._records[tenant].epoch += 1
        self._write()
        return self._records[tenant].epoch

    def _read(self) -> dict[str, Record]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            records = msgspec.json.decode(self._path.read_bytes(), type=dict[str, Record])
            for name, record in records.items():
                if len(bytes.fromhex(record.secret)) != KEY_BYTES:
                    raise ValueError(f"the secret of {name!r} has not {KEY_BYTES} bytes")
        except (msgspec.DecodeError, ValueError) as error:
            raise ConfigError(
                f"{self._path} is damaged ({error}): restore it from a backup, or remove it to "
                "start with a new secret (blocks on disk are then unreachable)"
            ) from error
        return records

    def _write(self) -> None:
        if self._path is None:
            return
        fresh = self._path.with_suffix(".new")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o600)  # a file that an interrupted write left keeps its own mode
            file.write(msgspec.json.format(msgspec.json.encode(self._records)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too: a lost secret makes a whole disk tier unreachable
        finally:
            os.close(folder)
