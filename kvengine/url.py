"""URLs of engines: the fastest tier first, one part each, a bar between them.

    mem://?size=4G | file:///var/cache/kv?size=100G | valkey://user:password@host:6379/0?ttl_s=86400

A password may stand in a URL, but in no message about it.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import NoReturn
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kvengine.errors import ConfigError

OBJECTS = ("s3", "gs", "az")
TIERS = ("disk", "valkey", "objects")  # the fastest first
EXAMPLE = "'mem://?size=4G | file:///var/cache/kv?size=100G'"


def read_url(text: str, queries: Mapping[str, Mapping[str, str]]) -> dict[str, object]:
    """Return the settings that a URL gives, by their dotted names.

    `queries` says for each scheme which key of its query is which setting. Raises ConfigError.
    """
    settings: dict[str, object] = {}
    seen: list[str] = []
    for part in map(str.strip, text.split("|")):
        shown = _without_password(part)
        if "://" not in part:
            raise ConfigError(f"URL {shown!r} has no scheme; expected {EXAMPLE}")
        try:
            url = urlsplit(part)
            query = parse_qsl(url.query, keep_blank_values=True, strict_parsing=bool(url.query))
        except ValueError:
            raise ConfigError(f"URL {shown!r} cannot be read; expected {EXAMPLE}") from None
        scheme = url.scheme
        if scheme not in queries:
            unknown(f"URL scheme {part.partition('://')[0]!r}", scheme, queries)
        section = _section(scheme)
        order = ("daemon", "mem", *TIERS)
        if "daemon" in seen or seen and section == "daemon":
            raise ConfigError(
                f"URL {_without_password(text)!r}: unix:// stands alone; memory and tiers are "
                "named where the daemon is started"
            )
        if seen and order.index(section) <= order.index(seen[-1]):
            raise ConfigError(
                f"URL {_without_password(text)!r}: mem:// stands first, then file://, valkey:// "
                f"and s3:// (gs://, az://), each tier once, as in {EXAMPLE}"
            )
        seen.append(section)
        settings |= _place(section, url, shown)
        for key, value in query:
            if key not in queries[scheme]:
                unknown(f"key {key!r} of {scheme}:// in the URL", key, queries[scheme])
            if queries[scheme][key] in settings:
                raise ConfigError(f"URL {shown!r} gives {key} twice: leave one out")
            settings[queries[scheme][key]] = value
        if url.fragment:
            raise ConfigError(f"URL {shown!r} has a '#': write it as %23")
    return settings


def _section(scheme: str) -> str:
    if scheme in OBJECTS:
        return "objects"
    return {"mem": "mem", "file": "disk", "unix": "daemon"}.get(scheme, "valkey")


def _without_password(text: str) -> str:
    """Show a URL without what may be a password: errors are logged."""
    return re.sub(r"(://[^/?|@]*:)[^|]*@", r"\1***@", text)


def _place(section: str, url: SplitResult, shown: str) -> dict[str, object]:
    """Read what stands between scheme and query."""
    netloc, path = url.netloc, url.path
    if section == "mem":
        if netloc or path not in ("", "/"):
            raise ConfigError(f"URL {shown!r}: memory has no place; expected mem://?size=4G")
        return {}
    if section == "disk":
        if netloc or path in ("", "/"):
            raise ConfigError(
                f"URL {shown!r} names no directory; expected an absolute path after three slashes: "
                "file:///var/cache/kv"
            )
        return {"disk.path": unquote(path)}
    if section == "daemon":
        if netloc or path in ("", "/"):
            raise ConfigError(
                f"URL {shown!r} names no socket; expected an absolute path after three slashes: "
                "unix:///run/kvengine/kv.sock"
            )
        return {"daemon.socket": unquote(path)}
    if section == "objects":
        if not netloc or "@" in netloc:
            raise ConfigError(
                f"URL {shown!r} names no bucket; expected {url.scheme}://bucket/prefix, and the "
                "key in variables"
            )
        return {"objects.url": f"{url.scheme}://{netloc}{unquote(path)}"}
    try:
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if not host or "," in netloc:
        raise ConfigError(f"URL {shown!r} names no server; expected valkey://host:6379")
    found = {
        "valkey.host": host,
        "valkey.port": port,
        "valkey.db": path.strip("/") or None,
        "valkey.user": unquote(url.username or "") or None,
        "valkey.password": unquote(url.password or "") or None,
        "valkey.tls": True if url.scheme in ("valkeys", "rediss") else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def unknown(what: str, name: str, known: Iterable[str]) -> NoReturn:
    """Raise a ConfigError that names the nearest known name, and all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown {what}: {hint}known are {', '.join(known)}")
