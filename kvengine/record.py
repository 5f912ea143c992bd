"""Record what an engine is asked for, as a trace: hashes of blocks and times, never a token.

A line a look-up, as Mooncake's traces have them: `kvengine trace simulate FILE --block-tokens N`
plays it. A hash is the first 8 bytes of a block's keyed key, so that no one without the tenant's
secret can tell what was asked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from kvengine.keys import BlockKeys
from kvengine.policy import Request

RECORD_BYTES = 256 << 20


class Recorder:
    """Append to a file of at most half of `size_bytes`; the one before it is kept as NAME.1.

    Any thread may call any verb. Raises OSError where the file cannot be made; later on a failing
    write ends the recording, and `failed` says so.
    """

    def __init__(self, path: Path, size_bytes: int, clock: Callable[[], float]) -> None:
        self._path = path
        self._limit = max(1, size_bytes // 2)
        self._clock = clock
        self._start = clock()
        self._lock = threading.Lock()
        self._encoder = msgspec.json.Encoder()
        self._handle = self._open()
        self._written = 0
        self.failed = False

    def asked(self, keys: BlockKeys, request: Request | None = None) -> None:
        """Write down one look-up of a whole prompt.

        Those of a later part, or of a pool of other than full attention, are left out.
        """
        if keys.position or self.failed or keys.namespace.layout.attention != "full":
            return
        with self._lock:
            line = {
                "timestamp": round(1000 * (self._clock() - self._start), 3),
                "input_length": len(keys) * keys.namespace.layout.block_tokens,
                "output_length": 0 if request is None else max(0, request.output_tokens),
                "hash_ids": keys.prints.tolist(),
            }
            data = self._encoder.encode(line) + b"\n"
            try:
                if self._written and self._written + len(data) > self._limit:
                    self._turn_over()
                os.write(self._handle, data)
            except OSError:
                self.failed = True
            self._written += len(data)

    def close(self) -> None:
        """End the recording. Idempotent."""
        with self._lock:
            self.failed = True
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1

    def _turn_over(self) -> None:
        os.close(self._handle)
        self._handle = -1
        os.replace(self._path, self._path.with_name(self._path.name + ".1"))
        self._handle = self._open()
        self._written = 0

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
