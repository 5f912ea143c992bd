"""Tenants: who they are, which keys they may form, how much of a host is theirs.

A tenant's secret keys all its chains: nobody else can form its keys. Raising its epoch, or that of
one of its models, makes older blocks unreachable at once, since the epoch is part of every
identity. A client says which tenant it is by the user that it runs as, by the tenant's access key,
or by a ticket: a front end that serves several tenants signs one with the key of a gateway. All of
it is kept beside the store's data, mode 0600; several processes may change it.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import blake3
import msgspec

from kvengine.errors import ConfigError
from kvengine.keys import KEY_BYTES

DEFAULT = "default"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
TICKET_TAG = b"kvengine ticket 1"
TICKET_MAC_BYTES = 32
TICKET_TIME_BYTES = 8
MODELS_MAX = 4096
DATA_KEYS_MAX = 256

Count = Annotated[int, msgspec.Meta(ge=0)]
Above = Annotated[float, msgspec.Meta(gt=0)]


class Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a tenant is promised of memory, and what it may take. None: no limit of its own.

    What nobody has reserved is shared by `weight`. Rates are averages over some seconds.
    """

    reserved_bytes: Count = 0
    maximum_bytes: Count | None = None
    disk_bytes: Count | None = None
    weight: Above = 1.0
    lookups_per_s: Above | None = None
    saved_bytes_per_s: Above | None = None


UNLIMITED = Quota()


class DataKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What seals a tenant's blocks outside of memory: 32 bytes in hex, and a number for headers."""

    id: Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)]
    key: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Record(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What is kept of a tenant. `access`: the digest of its access key, "" for none.

    `models`: epochs of single models, beside the tenant's. A gateway is not a tenant: its secret
    signs tickets, of the tenants that it `serves`. The last of the `data_keys` seals, the others
    open what they have sealed before.
    """

    secret: str
    epoch: Count
    access: str = ""
    users: tuple[int, ...] = ()
    models: dict[str, Count] = msgspec.field(default_factory=dict)
    quota: Quota = UNLIMITED
    public: bool = False
    role: Literal["tenant", "gateway"] = "tenant"
    serves: tuple[str, ...] = ()
    data_keys: tuple[DataKey, ...] = ()


class Tenants:
    """The tenants of a store, in memory or in `path`; there is always one called "default".

    A given `secret` (32 bytes) is the default tenant's, and wins over a kept one. Raises
    ConfigError for a damaged file, and for a name that is no tenant's.
    """

    def __init__(self, path: Path | None = None, secret: bytes | None = None) -> None:
        if secret is not None and len(secret) != KEY_BYTES:
            raise ConfigError(
                f"a tenant's secret has {KEY_BYTES} bytes (64 hex digits), got {len(secret)} bytes"
            )
        self._path = path
        self._given = secret
        self._records: dict[str, Record] = {}
        self._seen: tuple[int, int, int] | None = None
        if path is not None and path.exists():
            self._records = _read(path)
        if DEFAULT not in self._records:
            with self._changing() as records:
                records.setdefault(DEFAULT, _fresh())

    # What is kept

    def names(self) -> list[str]:
        """Return the tenants' names, in order."""
        return sorted(name for name, each in self._records.items() if each.role == "tenant")

    def gateways(self) -> list[str]:
        """Return the gateways' names, in order."""
        return sorted(name for name, each in self._records.items() if each.role == "gateway")

    def secret(self, tenant: str = DEFAULT) -> bytes:
        """Return the 32 bytes that key the tenant's chains."""
        if tenant == DEFAULT and self._given:
            return self._given
        return bytes.fromhex(self._record(tenant).secret)

    def epoch(self, tenant: str = DEFAULT, model: str = "") -> int:
        """Return the number that stands in identities of the tenant's model. It only ever rises."""
        record = self._record(tenant)
        return record.epoch + record.models.get(model, 0)

    def is_current(self, tenant: str, model: str, epoch: int) -> bool:
        """Say whether this is the epoch now, as it is kept; never, for a tenant that is gone."""
        self.reload()
        record = self._records.get(tenant)
        return record is not None and epoch == record.epoch + record.models.get(model, 0)

    def is_same(self, tenant: str, secret: bytes) -> bool:
        """Say whether there is a tenant of this name, with this secret: not a later one."""
        record = self._records.get(tenant)
        return record is not None and record.role == "tenant" and self.secret(tenant) == secret

    def quota(self, tenant: str = DEFAULT) -> Quota:
        """Return what a tenant is promised and may take."""
        return self._record(tenant).quota

    def is_public(self, tenant: str) -> bool:
        """Say whether every tenant may read this one's blocks."""
        return self._record(tenant).public

    def reload(self) -> bool:
        """Take in what another process has changed. Returns whether anything was.

        A file that is gone, or was damaged by hand, changes nothing: what is known goes on.
        """
        if self._path is None:
            return False
        try:
            found = os.stat(self._path)
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
            if seen == self._seen:
                return False
            self._records, self._seen = _read(self._path), seen
        except (OSError, ConfigError):
            return False
        return True

    # Who someone is

    def admits(
        self, tenant: str, uid: int, credential: bytes, now: float
    ) -> Literal["", "r", "rw"]:
        """Say what a client may do with a tenant's blocks: nothing, read, or read and save.

        uid: the user that it runs as, as the kernel says. credential: the access key, a ticket, or
        b"". now: seconds since 1970, for tickets.
        """
        record = self._records.get(tenant)
        if record is None or record.role != "tenant":
            return ""
        known = uid in record.users or (
            tenant == DEFAULT and not record.access and uid == os.getuid()
        )
        if known or _is_access(record, credential) or self._is_ticket(tenant, credential, now):
            return "rw"
        return "r" if record.public else ""

    def ticket(self, gateway: str, tenant: str, expires: float) -> bytes:
        """Sign, as a gateway, that whoever shows this acts for a tenant, until `expires`."""
        record = self._records.get(gateway)
        if record is None or record.role != "gateway":
            raise ConfigError(f"{gateway!r} is no gateway; there are {self.gateways()}")
        return sign(bytes.fromhex(record.secret), tenant, expires)

    def _is_ticket(self, tenant: str, credential: bytes, now: float) -> bool:
        if len(credential) != TICKET_TIME_BYTES + TICKET_MAC_BYTES:
            return False
        expires = int.from_bytes(credential[:TICKET_TIME_BYTES], "big")
        if expires <= now:
            return False
        return any(
            hmac.compare_digest(sign(bytes.fromhex(each.secret), tenant, expires), credential)
            for each in self._records.values()
            if each.role == "gateway" and (tenant in each.serves or not each.serves)
        )

    # Changes

    def raise_epoch(self, tenant: str = DEFAULT, model: str = "") -> int:
        """Make all blocks of a tenant, or of one of its models, unreachable; return the new epoch.

        O(1). Raises ConfigError for a tenant that is not known.
        """
        with self._changing() as records:
            record = _of(records, tenant)
            if not model:
                record.epoch += 1
            elif model in record.models or len(record.models) < MODELS_MAX:
                record.models[model] = record.models.get(model, 0) + 1
            else:
                raise ConfigError(
                    f"{tenant!r} has raised the epochs of {MODELS_MAX} models: raise its own"
                )
        return self.epoch(tenant, model)

    def add(
        self,
        name: str,
        *,
        users: tuple[int, ...] = (),
        quota: Quota = UNLIMITED,
        public: bool = False,
        gateway: bool = False,
        serves: tuple[str, ...] = (),
    ) -> bytes:
        """Make a tenant, or a gateway; returns its access key (a gateway's signing key), once.

        Raises ConfigError for a name that is taken or malformed.
        """
        _check(name, quota)
        key = secrets.token_bytes(KEY_BYTES)
        with self._changing() as records:
            if name in records:
                raise ConfigError(f"there is a tenant or gateway {name!r} already")
            if gateway:
                records[name] = Record(key.hex(), 0, role="gateway", serves=serves)
            else:
                records[name] = _fresh()
                records[name].access = _digest(key)
                records[name].users = users
                records[name].quota = quota
                records[name].public = public
        return key

    def set_quota(self, tenant: str, quota: Quota) -> None:
        """Change what a tenant is promised and may take."""
        _check(tenant, quota)
        with self._changing() as records:
            _of(records, tenant).quota = quota

    def remove(self, name: str) -> None:
        """Forget a tenant and its secret: its blocks cannot be found any more, wherever they are.

        The default tenant stays: raise its epoch instead.
        """
        if name == DEFAULT:
            raise ConfigError(f"the tenant {DEFAULT!r} stays: raise its epoch to drop its blocks")
        with self._changing() as records:
            _of(records, name, "tenant or gateway")
            del records[name]

    # Data keys. That of a given secret is made from it: engines that share one share the other.

    def sealing_key(self, tenant: str = DEFAULT) -> tuple[int, bytes]:
        """Return the number and the key that a tenant's blocks are sealed with from now on."""
        if tenant == DEFAULT and self._given:
            return _derived(self._given)
        self.reload()
        if not self._record(tenant).data_keys:
            with self._changing() as records:
                if not _of(records, tenant).data_keys:
                    _add_key(records, tenant)
        last = self._record(tenant).data_keys[-1]
        return last.id, bytes.fromhex(last.key)

    def opening_key(self, key_id: int, tenant: str | None = None) -> bytes | None:
        """Return a tenant's key of that number, or (None) anybody's; None where it is not held."""
        if self._given and tenant in (DEFAULT, None):
            known, key = _derived(self._given)
            if known == key_id:
                return key
        self.reload()  # another process may have made it, or forgotten it
        for name, record in self._records.items():
            for each in record.data_keys if tenant in (name, None) else ():
                if each.id == key_id:
                    return bytes.fromhex(each.key)
        return None

    def rotate_key(self, tenant: str = DEFAULT) -> int:
        """Seal a tenant's blocks with a new key from now on; older ones can still be read.

        Returns its number. Raises ConfigError for keys that come of a given secret.
        """
        self._own_key(tenant)
        with self._changing() as records:
            _add_key(records, tenant)
        return self.sealing_key(tenant)[0]

    def drop_keys(self, tenant: str = DEFAULT) -> int:
        """Forget a tenant's data keys: no block sealed with them can be read any more, anywhere.

        Returns how many. Raises ConfigError for keys that come of a given secret.
        """
        self._own_key(tenant)
        with self._changing() as records:
            record = _of(records, tenant)
            count, record.data_keys = len(record.data_keys), ()
        return count

    def _own_key(self, tenant: str) -> None:
        if tenant == DEFAULT and self._given:
            raise ConfigError(
                "the data key comes of the secret that was given: give another one, and forget this"
            )

    # Inside

    def _record(self, tenant: str) -> Record:
        return _of(self._records, tenant)

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Record]]:
        """Change the records as they are kept now; nothing has changed where that fails."""
        if self._path is None:
            yield self._records
            return
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # of other processes; held for milliseconds
            records = _read(self._path) if self._path.exists() else {}
            yield records
            _write(self._path, records)
            os.fsync(folder)  # the name, too: a lost secret makes a whole disk tier unreachable
        finally:
            os.close(folder)
        self.reload()


class DataKeys:
    """The data keys of one tenant; for who only reads (None), those of all.

    `open_tenants` is called when they are first needed: the directory is the store's by then.
    """

    def __init__(self, open_tenants: Callable[[], Tenants], tenant: str | None) -> None:
        self._open = open_tenants
        self._tenant = tenant

    @cached_property
    def tenants(self) -> Tenants:
        """Whose keys they are."""
        return self._open()

    def sealing(self) -> tuple[int, bytes]:
        """Return the number and the key for the tenant's blocks, from now on."""
        assert self._tenant is not None
        return self.tenants.sealing_key(self._tenant)

    def opening(self, key_id: int) -> bytes | None:
        """Return the key of that number, where it is the tenant's."""
        return self.tenants.opening_key(key_id, self._tenant)


def sign(key: bytes, tenant: str, expires: float) -> bytes:
    """Make a ticket: when it ends (u64, big-endian) and a keyed BLAKE3 of that and the tenant."""
    end = int(expires).to_bytes(TICKET_TIME_BYTES, "big")
    return end + blake3.blake3(TICKET_TAG + end + tenant.encode(), key=key).digest()


def _derived(secret: bytes) -> tuple[int, bytes]:
    key = blake3.blake3(secret, derive_key_context="kvengine data key 1").digest()
    named = blake3.blake3(key, derive_key_context="kvengine data key number 1").digest(4)
    return int.from_bytes(named, "big") or 1, key


def _add_key(records: dict[str, Record], tenant: str) -> None:
    record = _of(records, tenant)
    taken = {each.id for known in records.values() for each in known.data_keys}
    while (number := secrets.randbelow((1 << 32) - 1) + 1) in taken:
        pass
    made = DataKey(number, secrets.token_hex(KEY_BYTES))
    record.data_keys = (*record.data_keys[1 - DATA_KEYS_MAX :], made)


def _fresh() -> Record:
    return Record(secrets.token_hex(KEY_BYTES), 0)


def _digest(key: bytes) -> str:
    # The key has 256 random bits: nothing is gained by a slow digest.
    return blake3.blake3(key, derive_key_context="kvengine tenant access 1").hexdigest()


def _is_access(record: Record, credential: bytes) -> bool:
    return len(credential) == KEY_BYTES and hmac.compare_digest(record.access, _digest(credential))


def _of(records: dict[str, Record], name: str, what: str = "tenant") -> Record:
    record = records.get(name)
    if record is None or (what == "tenant" and record.role != "tenant"):
        raise ConfigError(f"there is no {what} {name!r}: see `kvengine tenants list`")
    return record


def _check(name: str, quota: Quota) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"a tenant's name is {name!r}, expected up to 64 of a-z, 0-9, '.', '_', '-', the first "
            "a letter or digit"
        )
    if quota.maximum_bytes is not None and quota.reserved_bytes > quota.maximum_bytes:
        raise ConfigError(
            f"{name}: {quota.reserved_bytes} bytes are reserved and {quota.maximum_bytes} the most "
            "that may be taken: reserve no more than that"
        )


def _read(path: Path) -> dict[str, Record]:
    try:
        records = msgspec.json.decode(path.read_bytes(), type=dict[str, Record])
        for name, record in records.items():
            if len(bytes.fromhex(record.secret)) != KEY_BYTES:
                raise ValueError(f"the secret of {name!r} has not {KEY_BYTES} bytes")
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): restore it from a backup, or remove it to "
            "start with a new secret (blocks on disk are then unreachable)"
        ) from error
    return records


def _write(path: Path, records: dict[str, Record]) -> None:
    fresh = path.with_suffix(".new")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(handle, 0o600)  # a file that an interrupted write left keeps its own mode
        file.write(msgspec.json.format(msgspec.json.encode(records)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
