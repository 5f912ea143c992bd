"""One schema for all settings, and the only reader of the environment.

A value is looked for in the options of the command line (or of `open`), then in `KVENGINE_*`
variables, then in a TOML file, then among the defaults; `Config.load` says for each where it came
from. A URL is a short way to say the same settings, the fastest tier first:

    mem://?size=4G | file:///var/cache/kv?size=100G | valkey://host:6379?ttl_s=86400
    mem://?size=4G | s3://bucket/prefix?region=eu-west-1
"""

import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Self
from urllib.parse import urlsplit

import msgspec

from kvengine.errors import ConfigError
from kvengine.policy import UnknownPolicy
from kvengine.policy.named import POLICIES, check_name
from kvengine.url import OBJECTS, read_url, unknown

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
UNITS = MappingProxyType({"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40})
SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?) ?([KMGT]?)(?:i?B)?", re.ASCII)
BYTES_MAX = 1 << 60
MEMORY_BYTES_MIN = 64 * KIB
SEGMENT_BYTES = 256 * MIB
SEGMENT_BYTES_MIN = 64 * KIB
SECRET_BYTES = 32
TICKET_BYTES = 40
PREFIX = "KVENGINE_"
# Variables that are read by the tests of this project, not by the engine.
FOREIGN = frozenset({"KVENGINE_REQUIRE_ALL"})


class Secret(bytes):
    """A key or a password; a log, a traceback or `config show` says "hidden" instead."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "hidden"

    __str__ = __repr__


def size_bytes(value: object) -> int:
    """Read a size: an integer number of bytes, or a text such as 4G, 512M, 1.5T (powers of 1024).

    Raises ValueError for anything else, below zero, or above 2**60.
    """
    if isinstance(value, str):
        match = SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError
        nbytes = int(Fraction(match[1]) * UNITS[match[2]])
    elif isinstance(value, int) and not isinstance(value, bool):
        nbytes = value
    else:
        raise ValueError
    if not 0 <= nbytes <= BYTES_MAX:
        raise ValueError
    return nbytes


def _memory(value: object) -> int:
    nbytes = size_bytes(value)
    if nbytes < MEMORY_BYTES_MIN:
        raise ValueError
    return nbytes


def _segment(value: object) -> int:
    nbytes = size_bytes(value)
    if 0 < nbytes < SEGMENT_BYTES_MIN:
        raise ValueError
    return nbytes


def _threads(value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"\d{1,3}", value, re.ASCII):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 256:
        raise ValueError
    return value


def _seconds(value: object) -> float:
    return _within(value, 86400)


def _within(value: object, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError
    seconds = float(value)
    if not (math.isfinite(seconds) and 0 < seconds <= most):
        raise ValueError
    return seconds


def _share(value: object) -> float:
    return 0.0 if value in ("0", 0) and value is not False else _within(value, 1)


def _life(value: object) -> float:
    return 0.0 if value in ("0", 0) and value is not False else _within(value, 10 * 366 * 86400)


def _number(value: object, most: int) -> int:
    if isinstance(value, str) and re.fullmatch(r"\d{1,5}", value, re.ASCII):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError
    return value


def _port(value: object) -> int:
    if (port := _number(value, 65535)) == 0:
        raise ValueError
    return port


def _database(value: object) -> int:
    return _number(value, 9999)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > 1024:
        raise ValueError
    return value


def _host(value: object) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:-]{1,255}", host := _text(value), re.ASCII):
        raise ValueError
    return host


def _prefix(value: object) -> str:
    if not re.fullmatch(r"[\x21-\x7e]{0,256}", prefix := _text(value), re.ASCII):
        raise ValueError
    return prefix


def _password(value: object) -> Secret | None:
    if isinstance(value, str) and value:
        value = value.encode()
    if value is not None and not (isinstance(value, bytes) and value):
        raise ValueError
    return None if value is None else Secret(value)


def _place_of_objects(value: object) -> str:
    url = urlsplit(_text(value))
    if url.scheme not in OBJECTS or not url.netloc or "@" in url.netloc or url.query:
        raise ValueError
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"


def _endpoint(value: object) -> str:
    url = urlsplit(text := _text(value))
    if text and (url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc):
        raise ValueError
    return text.rstrip("/")


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if value in ("1", "true"):
        return True
    if value in ("0", "false"):
        return False
    raise ValueError


def _path(value: object) -> str:
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise ValueError
    path = os.path.abspath(os.path.expanduser(value))
    if path == "/":
        raise ValueError
    return path


def _policy(value: object) -> str:
    return check_name(value)


def _policies(value: object) -> tuple[str, ...]:
    given = [name for name in value.split(",") if name] if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)):
        raise ValueError
    return tuple(dict.fromkeys(check_name(name) for name in given))


def _record(value: object) -> str:
    return "" if value == "" else _path(value)


def _secret(value: object, sizes: tuple[int, ...] = (SECRET_BYTES,)) -> Secret | None:
    if value is None:
        return None
    if isinstance(value, str):
        if re.fullmatch(r"[0-9a-fA-F]+", value):
            value = bytes.fromhex(value)
        else:
            value = _secret_of_file(Path(value).expanduser())
    if not isinstance(value, bytes) or len(value) not in sizes:
        raise ValueError
    return Secret(value)


def _credential(value: object) -> Secret | None:
    return _secret(value, (SECRET_BYTES, TICKET_BYTES))


def _secret_of_file(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except (OSError, ValueError):
        raise ValueError from None
    try:
        return bytes.fromhex(content.decode("ascii"))
    except ValueError:
        return content


class Setting(NamedTuple):
    """How one setting is read, and what its reader expects, in words."""

    read: Callable[[object], object]
    expected: str


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "memory_bytes": Setting(_memory, "a size of at least 64K, such as 512M or 4G"),
        "disk.path": Setting(_path, "the path of a directory (not /)"),
        "disk.size_bytes": Setting(_memory, "a size of at least 64K, such as 100G or 1.5T"),
        "disk.segment_bytes": Setting(_segment, "a size of at least 64K, such as 256M, or 0"),
        "disk.durable": Setting(_flag, "1, 0, true or false"),
        "disk.encrypt": Setting(_flag, "1, 0, true or false"),
        "disk.clean_low": Setting(_share, "a share of memory from 0 to 1"),
        "disk.clean_high": Setting(_share, "a share of memory from 0 to 1"),
        "lossless": Setting(_flag, "1, 0, true or false"),
        "pin": Setting(_flag, "1, 0, true or false"),
        "populate": Setting(_flag, "1, 0, true or false"),
        "threads": Setting(_threads, "a number of threads from 1 to 256"),
        "io_threads": Setting(_threads, "a number of threads from 1 to 256"),
        "secret": Setting(
            _secret, "64 hex digits, or the path of a file with 32 bytes or 64 hex digits"
        ),
        "lease_s": Setting(_seconds, "a number of seconds above 0, up to 86400"),
        "find_s": Setting(_seconds, "a number of seconds above 0, up to 86400"),
        "fetch_s": Setting(_seconds, "a number of seconds above 0, up to 86400"),
        "reservation_s": Setting(_seconds, "a number of seconds above 0, up to 86400"),
        "valkey.host": Setting(_host, "the name or address of a host"),
        "valkey.port": Setting(_port, "a port from 1 to 65535"),
        "valkey.db": Setting(_database, "a number from 0 to 9999"),
        "valkey.user": Setting(_text, "the name of a user, or nothing"),
        "valkey.password": Setting(_password, "a password"),
        "valkey.tls": Setting(_flag, "1, 0, true or false"),
        "valkey.cluster": Setting(_flag, "1, 0, true or false"),
        "valkey.prefix": Setting(_prefix, "up to 256 printable ASCII characters, no blanks"),
        "valkey.encrypt": Setting(_flag, "1, 0, true or false"),
        "valkey.ttl_s": Setting(_life, "a number of seconds, 0 for ever"),
        "valkey.timeout_s": Setting(_seconds, "a number of seconds above 0, up to 86400"),
        "valkey.connections": Setting(_threads, "a number of connections from 1 to 256"),
        "objects.url": Setting(
            _place_of_objects, "s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
        ),
        "objects.endpoint": Setting(_endpoint, "an address such as https://host:9000, or nothing"),
        "objects.region": Setting(_text, "the name of a region, or nothing"),
        "objects.key_id": Setting(_text, "the id of an access key, or nothing"),
        "objects.secret_key": Setting(_password, "the secret of an access key"),
        "objects.encrypt": Setting(_flag, "1, 0, true or false"),
        "objects.timeout_s": Setting(_seconds, "a number of seconds above 0, up to 86400"),
        "objects.connections": Setting(_threads, "a number of connections from 1 to 256"),
        "daemon.socket": Setting(_path, "the path of a daemon's socket"),
        "daemon.tenant": Setting(_text, "the name of a tenant"),
        "daemon.key": Setting(
            _credential, "a tenant's access key (64 hex digits), a ticket (80), or a file of one"
        ),
        "daemon.timeout_s": Setting(_seconds, "a number of seconds above 0, up to 86400"),
        "policy": Setting(_policy, f"the name of a policy: {', '.join(POLICIES)}"),
        "shadow": Setting(_policies, f"names of policies, as in arc,s3fifo: {', '.join(POLICIES)}"),
        "record": Setting(_record, "the path of a file, or nothing"),
    }
)
HIDDEN = ("secret", "valkey.password", "objects.secret_key", "daemon.key")
ENVIRONMENT_OF: Mapping[str, str] = MappingProxyType(
    {name: PREFIX + name.replace(".", "_").upper() for name in SETTINGS}
)
# What stands in the query of a URL. A secret does not: URLs are logged.
QUERIES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "mem": {
            "size": "memory_bytes",
            "lossless": "lossless",
            "pin": "pin",
            "populate": "populate",
            "threads": "threads",
            "io_threads": "io_threads",
            "lease_s": "lease_s",
            "reservation_s": "reservation_s",
            "find_s": "find_s",
            "fetch_s": "fetch_s",
            "policy": "policy",
            "shadow": "shadow",
            "record": "record",
        },
        "file": {
            "size": "disk.size_bytes",
            "segment": "disk.segment_bytes",
            "durable": "disk.durable",
            "encrypt": "disk.encrypt",
            "clean_low": "disk.clean_low",
            "clean_high": "disk.clean_high",
        },
        "unix": {
            "tenant": "daemon.tenant",
            "timeout_s": "daemon.timeout_s",
            "lossless": "lossless",
            "threads": "threads",
            "fetch_s": "fetch_s",
        },
        **dict.fromkeys(
            ("valkey", "redis", "valkeys", "rediss"),
            {
                name: f"valkey.{name}"
                for name in ("cluster", "prefix", "ttl_s", "timeout_s", "connections", "encrypt")
            },
        ),
        **dict.fromkeys(
            OBJECTS,
            {
                name: f"objects.{name}"
                for name in ("endpoint", "region", "timeout_s", "connections", "encrypt")
            },
        ),
    }
)


class Disk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The disk tier: a directory that one engine holds at a time, and how much it may take.

    `segment_bytes` is the size of one segment file; 0 picks 256M, less on a small disk,
    up to 1G on a large one.
    `durable` makes a write count only once it has been synced.
    Writing begins when more than `clean_low` of memory waits for it (0: at once), gently, and goes
    at full rate above `clean_high`; closing and flushing write all. What waits is lost in a crash.
    `encrypt` seals blocks with the tenant's data key (AES-256-GCM; package `cryptography`). Give a
    `secret` from elsewhere: kept in the directory, the key would lie beside what it seals.
    """

    path: str
    size_bytes: int = 10 * GIB
    segment_bytes: int = 0
    durable: bool = False
    clean_low: float = 0.0
    clean_high: float = 0.25
    encrypt: bool = False

    def __post_init__(self) -> None:
        _check(self, "disk.")
        if self.clean_low > self.clean_high:
            raise ConfigError(
                f"disk.clean_low is {self.clean_low}, above disk.clean_high {self.clean_high}: "
                "writing is to begin before it goes at full rate"
            )
        if self.durable and self.clean_low:
            raise ConfigError(
                f"disk.clean_low is {self.clean_low}, but disk.durable is on, which writes at "
                "once: leave one of them out"
            )
        # Few files, so that opening is quick; many enough to give room up in small steps.
        large = min(GIB, max(SEGMENT_BYTES, self.size_bytes // 1024))
        fitting = min(large, max(SEGMENT_BYTES_MIN, self.size_bytes // 8))
        segment = self.segment_bytes or fitting
        if segment > self.size_bytes:
            raise ConfigError(
                f"disk.segment_bytes is {segment}, more than disk.size_bytes {self.size_bytes}: "
                "make the disk larger, or leave the segment size out"
            )
        msgspec.structs.force_setattr(self, "segment_bytes", segment)


class Valkey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Valkey or Redis server, or a cluster of them, that several engines may share.

    `prefix` stands before the keys' names there. `ttl_s` is how long a block lives from its
    writing; 0: until the server evicts it. `timeout_s`: how long the server may be silent.
    `encrypt`: as of a disk; all engines that share blocks set it alike.
    """

    host: str
    port: int = 6379
    db: int = 0
    user: str = ""
    password: Secret | None = None
    tls: bool = False
    cluster: bool = False
    prefix: str = "kvengine:"
    ttl_s: float = 0.0
    timeout_s: float = 1.0
    connections: int = 2
    encrypt: bool = False

    def __post_init__(self) -> None:
        _check(self, "valkey.")
        if self.cluster and self.db:
            raise ConfigError(f"valkey.db is {self.db}: a cluster has database 0 only")


class Objects(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bucket of S3 (or what speaks as S3 does), Google Cloud Storage or Azure.

    `url` is s3://bucket/prefix, gs://bucket/prefix or az://container/prefix. Where no key is
    given, credentials are found as the cloud's own tools do: variables, profiles, the machine's
    role. Of Azure, `key_id` is the account's name; Google's are found only so. `timeout_s`: how
    long one request may take. `encrypt`: as of a disk.
    """

    url: str
    endpoint: str = ""
    region: str = ""
    key_id: str = ""
    secret_key: Secret | None = None
    timeout_s: float = 10.0
    connections: int = 8
    encrypt: bool = False

    def __post_init__(self) -> None:
        _check(self, "objects.")


class Daemon(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The daemon of this host, which keeps the blocks: its socket, and who this process is to it.

    `tenant` is the daemon's default one if "". `timeout_s`: how long it may take to answer; then it
    is away.
    """

    socket: str
    tenant: str = ""
    key: Secret | None = None
    timeout_s: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "daemon.")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of one engine. Sizes in bytes (texts such as "4G" are read), times in seconds.

    `disk`, `valkey` and `objects` are the tiers below memory, in this order; None: not there.
    `daemon`: another process of this host keeps the blocks, and has memory and tiers of its own.
    `threads` copy and hash, `io_threads` read and write the disk.
    `lossless` saves bf16 blocks in three quarters of their size where numba is installed, which
    takes longer than copying them; either way what is saved is loaded bit for bit, by engines set
    either way.
    `pin` registers the memory with the driver of this process's GPU, in the background, so that
    copies between them need no staging; where that fails it is counted, and memory works as it is.
    `populate` has the system back all of the memory when the engine is opened, in the background;
    if not, a page is backed when it is first written, which takes longer then.
    `find_s` is how long a look-up may wait for the answer of remote tiers, `fetch_s` how long a
    load may wait for what it reads from tiers.
    `shadow` names policies that are run beside `policy` on metadata alone, on a sample of the
    blocks: `Engine.shadows` says what each would have hit. `record` is a file that what `match` is
    asked for is written to, as a trace of hashes.
    `secret` keys the block keys: two engines share blocks only where it is the same; it may be
    given as hex or as the path of a file, and is never printed.
    Raises ConfigError, naming what was given, what was expected and what to do.
    """

    memory_bytes: int = GIB
    disk: Disk | None = None
    valkey: Valkey | None = None
    objects: Objects | None = None
    daemon: Daemon | None = None
    lossless: bool = True
    pin: bool = False
    populate: bool = True
    threads: int = 2
    io_threads: int = 2
    secret: Secret | None = None
    lease_s: float = 60.0
    reservation_s: float = 60.0
    find_s: float = 0.1
    fetch_s: float = 60.0
    policy: str = "lru"
    shadow: tuple[str, ...] = ()
    record: str = ""

    def __post_init__(self) -> None:
        for name, kind in SECTIONS.items():
            if not isinstance(given := getattr(self, name), kind | None):
                raise ConfigError(f"{name}: given {given!r}, expected a {kind.__name__} or None")
        _check(self, "")
        if self.daemon and (self.disk or self.valkey or self.objects):
            raise ConfigError(
                "a daemon's socket is given, and tiers as well: name the tiers where the daemon is "
                "started, or leave daemon.socket out"
            )
        if self.secret is None and self.disk is None and (self.valkey or self.objects):
            raise ConfigError(
                "no secret is given, and no directory to keep one in: no other engine could name "
                "the blocks of a remote tier. Set KVENGINE_SECRET to 64 hex digits (or a file with "
                "them), the same for all engines that are to share blocks"
            )

    def shown(self) -> dict[str, object]:
        """Give every setting by its dotted name, fit to be printed: the secret is hidden."""
        flat: dict[str, object] = {}
        for field in self.__struct_fields__:
            value = getattr(self, field)
            inner = value.__struct_fields__ if isinstance(value, msgspec.Struct) else ()
            flat |= {f"{field}.{name}": getattr(value, name) for name in inner}
            if not inner:
                flat[field] = value
        return {k: str(v) if isinstance(v, Secret) else v for k, v in flat.items()}

    @classmethod
    def load(
        cls,
        url: str | None = None,
        *,
        file: str | Path | None = None,
        options: Mapping[str, object] | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> tuple[Self, dict[str, str]]:
        """Gather the settings, and say of each, by its dotted name, where it came from.

        Options come before the URL, both before the environment (a variable of its own before
        `KVENGINE_URL`), that before the TOML file (`file`, or the one that `KVENGINE_CONFIG`
        names), and that before the defaults. `options` has dotted names; an option that is None
        and a variable that is empty count as not given. Raises ConfigError.
        """
        given: dict[str, object] = {}
        origins = dict.fromkeys(SETTINGS, "default")
        for origin, settings in _sources(url, file, options or {}, environ):
            for name, value in settings.items():
                if name not in SETTINGS:
                    unknown(f"setting {name!r} ({origin})", name, SETTINGS)
                given[name] = _read(name, value, origin)
                origins[name] = origin
        sections: dict[str, object] = {}
        for section, needed in NEEDED.items():
            dotted = [name for name in given if name.startswith(f"{section}.")]
            if dotted and f"{section}.{needed}" not in dotted:
                raise ConfigError(
                    f"{dotted[0]} ({origins[dotted[0]]}) is set but {section}.{needed} is not: "
                    f"{NEEDED_HINT[section]}, as {ENVIRONMENT_OF[f'{section}.{needed}']}, or leave "
                    f"{dotted[0]} out"
                )
            # Each value has gone through the reader of its setting, which gives it its type.
            fields = {name.removeprefix(f"{section}."): given.pop(name) for name in dotted}
            if fields:
                sections[section] = SECTIONS[section](**fields)  # type: ignore[arg-type]  # above
        return cls(**sections, **given), origins  # type: ignore[arg-type]  # as said above


SECTIONS: Mapping[str, type[Disk | Valkey | Objects | Daemon]] = MappingProxyType(
    {"disk": Disk, "valkey": Valkey, "objects": Objects, "daemon": Daemon}
)
NEEDED: Mapping[str, str] = MappingProxyType(
    {"disk": "path", "valkey": "host", "objects": "url", "daemon": "socket"}
)
NEEDED_HINT: Mapping[str, str] = MappingProxyType(
    {
        "disk": "name the directory",
        "valkey": "name the server",
        "objects": "name the bucket",
        "daemon": "name the socket",
    }
)


def parse_url(text: str) -> Config:
    """Read `mem://?size=4G | file:///path?size=100G&segment=256M&durable=1`, fastest tier first.

    The environment is not looked at. Raises ConfigError for an unknown scheme or key.
    """
    return Config.load(text, environ={})[0]


def child_environment(**defaults: str) -> dict[str, str]:
    """Return the environment for a child process: `defaults`, and this one's over them."""
    return {**defaults, **os.environ}


def cache_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the user's folder for what can be made again: $XDG_CACHE_HOME, else ~/.cache."""
    given = environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "kvengine"


def _sources(
    url: str | None,
    file: str | Path | None,
    options: Mapping[str, object],
    environ: Mapping[str, str],
) -> Iterable[tuple[str, Mapping[str, object]]]:
    """Yield (origin, settings), the weakest first."""
    variables = {name: text for name, text in environ.items() if name.startswith(PREFIX) and text}
    config = file or variables.pop(PREFIX + "CONFIG", None)
    if config is not None:
        yield f"file {config}", _file(Path(config))
    if found := variables.pop(PREFIX + "URL", None):
        yield "env KVENGINE_URL", read_url(found, QUERIES)
    for name, variable in ENVIRONMENT_OF.items():
        if variable in variables:
            yield f"env {variable}", {name: variables.pop(variable)}
    for variable in variables.keys() - FOREIGN:
        known = [*ENVIRONMENT_OF.values(), PREFIX + "URL", PREFIX + "CONFIG"]
        unknown(f"environment variable {variable}", variable, known)
    if url is not None:
        yield "url", read_url(url, QUERIES)
    yield "option", {name: value for name, value in options.items() if value is not None}


def _file(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as stream:
            table = tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"file {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"file {path}: not TOML: {error}") from None
    flat: dict[str, object] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": deep for inner, deep in value.items()}
        else:
            flat[name] = value
    return flat


def _read(name: str, value: object, origin: str) -> object:
    setting = SETTINGS[name]
    try:
        return setting.read(value)
    except UnknownPolicy as error:
        raise ConfigError(f"{name} ({origin}): {error}") from None
    except ValueError:
        given = "a value that is not shown" if name in HIDDEN else repr(value)
        raise ConfigError(
            f"{name} ({origin}): given {given}, expected {setting.expected}"
        ) from None


def _check(struct: Disk | Valkey | Objects | Daemon | Config, prefix: str) -> None:
    """Read every field of a struct that was made by hand as if it came from a file."""
    for field in struct.__struct_fields__:
        if (name := prefix + field) in SETTINGS:
            value = _read(name, getattr(struct, field), type(struct).__name__)
            msgspec.structs.force_setattr(struct, field, value)
