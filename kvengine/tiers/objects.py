"""Object stores: S3 and what speaks as it does, Google Cloud Storage, Azure. One object a frame.

The package `obstore` (extra `[s3]`) does the talking, in threads of its own. An object appears
whole or not at all. How long objects live is for the bucket's own lifecycle rules to say.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kvengine.config import Objects
from kvengine.errors import ConfigError
from kvengine.tiers.remote import ABSENT, FOREIGN
from kvengine.workers import Workers

if TYPE_CHECKING:
    from obstore.store import ObjectStore

ASK_THREADS = 16
CLOSE_S = 10.0
LIST_COUNT = 1000
PROBED = "kvengine"  # asked for to see whether the store answers; need not be there
CREDENTIALS = MappingProxyType(
    {"s3": ("access_key_id", "secret_access_key"), "az": ("account_name", "account_key")}
)
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
# What a server says of credentials that it does not take.
REFUSED = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")


class ObjectsClient:
    """One bucket, or the part of it below a prefix. Any thread may call any verb.

    Raises ConfigError where the package is missing, the bucket is not there, or the credentials
    are refused; a store that cannot be reached is away, and is tried again by the tier.
    """

    batch_bytes = 1  # each object is a request of its own

    def __init__(self, config: Objects, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self.name = urlsplit(config.url).scheme
        try:
            self._errors = import_module("obstore.exceptions")
            make = import_module("obstore.store").from_url
        except ImportError as error:
            raise ConfigError(
                f"{self.name}:// needs the package 'obstore', which is not installed: "
                "pip install 'kvengine[s3]'"
            ) from error
        options = {"endpoint": config.endpoint, "region": config.region}
        if config.key_id or config.secret_key:
            if self.name not in CREDENTIALS:
                raise ConfigError(
                    f"{config.url} takes no key: set GOOGLE_APPLICATION_CREDENTIALS, and leave "
                    "objects.key_id and objects.secret_key out"
                )
            names = CREDENTIALS[self.name]
            options[names[0]] = config.key_id
            options[names[1]] = (config.secret_key or b"").decode()
        limit = timedelta(seconds=config.timeout_s)
        try:
            self._store: ObjectStore | None = make(
                config.url,
                client_options={
                    "timeout": limit,
                    "connect_timeout": limit,
                    "allow_http": config.endpoint.startswith("http://"),
                },
                retry_config={"max_retries": 1, "retry_timeout": limit},
                **{name: value for name, value in options.items() if value},
            )
        except (self._errors.BaseError, ValueError, TypeError) as error:
            raise ConfigError(f"{config.url}: {_first_line(error)}") from None
        self._askers = Workers(ASK_THREADS, f"kvengine-{self.name}-ask", lambda _: None)
        self._greet()

    def get(
        self,
        names: Sequence[str],
        targets: Sequence[memoryview],
        until: float,
        report: Callable[[int, int], None],
    ) -> None:
        """See Client. The package gathers a body in memory of its own: one copy from there."""
        for index, (name, target) in enumerate(zip(names, targets, strict=True)):
            store = self._there(until)
            try:
                found = store.get(name)
                size = found.meta["size"]
                if size == len(target):
                    body = found.bytes()
                    size = len(body)
                    if size == len(target):
                        target[:] = memoryview(body)
            except (FileNotFoundError, self._errors.PermissionDeniedError):
                size = ABSENT  # S3 forbids, rather than denies, to those who may not list
            except self._errors.BaseError as error:
                raise ConnectionError(_first_line(error)) from error
            report(index, size if size in (ABSENT, len(target)) else FOREIGN)

    def put(
        self,
        names: Sequence[str],
        values: Sequence[memoryview],
        until: float,
        report: Callable[[int, bool], None],
    ) -> None:
        """See Client. The package reads the value's own memory."""
        for index, (name, value) in enumerate(zip(names, values, strict=True)):
            store = self._there(until)
            try:
                store.put(name, value, use_multipart=False)
            except (FileNotFoundError, self._errors.PermissionDeniedError):
                report(index, False)
            except self._errors.BaseError as error:
                raise ConnectionError(_first_line(error)) from error
            else:
                report(index, True)

    def sizes(self, names: Sequence[str], until: float) -> list[int]:
        """See Client. A HEAD each, ASK_THREADS at a time, up to the first that is not there."""
        sizes = [-1] * len(names)
        failures: list[OSError] = []
        for first in range(0, len(names), ASK_THREADS):
            window = range(first, min(first + ASK_THREADS, len(names)))
            left = threading.Semaphore(0)
            for index in window:
                work = partial(self._head, names[index], index, sizes, failures, left, until)
                if not self._askers.submit(work):
                    raise ConnectionError("the store is closed")
            for _ in window:
                if not left.acquire(timeout=max(0.0, until - self._clock())):
                    if max(sizes) < 0:
                        raise TimeoutError("no answer in time")
                    return list(sizes)
            if failures:
                raise failures[0]
            if any(sizes[index] <= 0 for index in window):
                break
        return list(sizes)

    def delete(self, names: Sequence[str], until: float) -> None:
        """See Client."""
        try:
            self._there(until).delete(list(names))
        except FileNotFoundError:
            pass
        except self._errors.BaseError as error:
            raise ConnectionError(_first_line(error)) from error

    def names(self, prefix: str) -> Iterator[tuple[str, int]]:
        """See Client. One request for a thousand objects."""
        try:
            for table in self._there(float("inf")).list(chunk_size=LIST_COUNT):
                for found in table:
                    if found["path"].startswith(prefix):
                        yield found["path"], found["size"]
        except self._errors.BaseError as error:
            raise ConnectionError(_first_line(error)) from error

    def ping(self, until: float) -> None:
        """See Client. Raises ConfigError where the store says that it will never do."""
        store = self._there(until)
        try:
            store.get(PROBED)
        except (OSError, self._errors.BaseError) as error:
            said = str(error)
            if any(word in said for word in NO_BUCKET):
                raise ConfigError(
                    f"{self._config.url} names a bucket that is not there: make it, or name another"
                ) from None
            if isinstance(error, self._errors.UnauthenticatedError) or any(
                word in said for word in REFUSED
            ):
                raise ConfigError(
                    f"{self._config.url} refuses the credentials: set KVENGINE_OBJECTS_KEY_ID and "
                    "KVENGINE_OBJECTS_SECRET_KEY, or what the cloud's own tools read"
                ) from None
            if not isinstance(error, (FileNotFoundError, self._errors.PermissionDeniedError)):
                raise ConnectionError(_first_line(error)) from error

    def close(self) -> None:
        """See Client. The package closes its connections when the store is let go."""
        self._askers.close(CLOSE_S)
        self._store = None

    def detach(self) -> None:
        """See Client. The package's threads are not here: it is not to be called any more."""

    # Inside

    def _there(self, until: float) -> ObjectStore:
        if self._store is None or self._clock() >= until:
            raise TimeoutError("the time is over")
        return self._store

    def _greet(self) -> None:
        """Look once whether the settings are right. A store that is slow to answer is away."""
        said: list[ConfigError] = []
        over = threading.Event()

        def look() -> None:
            try:
                self.ping(self._clock() + self._config.timeout_s)
            except ConfigError as error:
                said.append(error)
            except OSError:
                pass  # away: the tier tries again
            finally:
                over.set()

        self._askers.submit(look)
        over.wait(self._config.timeout_s)
        if said:
            self.close()
            raise said[0]

    def _head(
        self,
        name: str,
        index: int,
        sizes: list[int],
        failures: list[OSError],
        left: threading.Semaphore,
        until: float,
    ) -> None:
        try:
            sizes[index] = self._there(until).head(name)["size"]
        except (FileNotFoundError, self._errors.PermissionDeniedError):
            sizes[index] = ABSENT
        except (OSError, self._errors.BaseError) as error:
            failures.append(ConnectionError(_first_line(error)))
        finally:
            left.release()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
