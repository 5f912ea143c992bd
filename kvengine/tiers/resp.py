"""The protocol of Valkey and Redis (RESP 2) over a connected socket: values are not copied.

Commands leave as pieces, a value's memory among them as it is; a value that comes back is received
straight into the caller's memory, but for the first bytes that came with the line before it.
Source of the format: "Redis serialization protocol specification", section "RESP protocol
description".
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence

CHUNK_BYTES = 4096  # a value's first bytes are copied: few
LINES_BYTES = 1 << 16
DRAIN_BYTES_MAX = 64 << 20
DEPTH_MAX = 8
ITEMS_MAX = 1 << 16

Reply = bytes | int | None | Exception | list["Reply"]
Piece = bytes | memoryview


class ReplyError(Exception):
    """What the server answered instead of a value: "OOM command not allowed …"."""


def command(*arguments: bytes) -> bytes:
    """Write one command whole."""
    parts = [b"*%d\r\n" % len(arguments)]
    parts += [b"$%d\r\n%s\r\n" % (len(argument), argument) for argument in arguments]
    return b"".join(parts)


class Exchange:
    """Send pieces and read replies over a socket, all of it until a point in time.

    Raises OSError (TimeoutError past the time) for a connection that cannot be used any more; it
    is to be closed then, since replies may still be under way.
    """

    def __init__(
        self, sock: socket.socket, clock: Callable[[], float], silence_s: float, until: float
    ) -> None:
        self._sock = sock
        self._clock = clock
        self._silence_s = silence_s
        self._until = until
        self._buffer = bytearray(LINES_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    def send(self, pieces: Iterable[Piece]) -> None:
        """Send pieces in order; the small ones before a value's memory together."""
        small: list[bytes] = []
        for piece in pieces:
            if isinstance(piece, bytes):
                small.append(piece)
                continue
            self._send(b"".join(small))
            self._send(piece)
            small = []
        self._send(b"".join(small))

    def value(self, target: memoryview) -> int | ReplyError:
        """Read a value into the target: its size, 0 for none. One of another size is let by.

        Then the target's content is undefined and the size says so; 0 also for an empty value.
        """
        line = self._line(CHUNK_BYTES)
        if line[:1] == b"-":
            return ReplyError(line[1:].decode("utf-8", "replace"))
        if line[:1] != b"$":
            raise ConnectionError(f"a reply that is no value: {bytes(line[:16])!r}")
        size = _number(line)
        if size < 0:
            return 0
        if size == len(target):
            self._fill(target)
        else:
            self._drain(size)
        self._crlf()
        return size

    def reply(self, depth: int = 0) -> Reply:
        """Read any reply. An error is returned as a ReplyError, values are small ones."""
        line = self._line(LINES_BYTES)
        kind = line[:1]
        if kind == b"+":
            return line[1:]
        if kind == b"-":
            return ReplyError(line[1:].decode("utf-8", "replace"))
        if kind == b":":
            return _number(line)
        if kind == b"$":
            size = _number(line)
            if size < 0:
                return None
            if size > LINES_BYTES:
                raise ConnectionError(f"a reply of {size} bytes where a short one was expected")
            data = bytearray(size)
            self._fill(memoryview(data))
            self._crlf()
            return bytes(data)
        if kind == b"*" and depth < DEPTH_MAX and (count := _number(line)) <= ITEMS_MAX:
            return [self.reply(depth + 1) for _ in range(count)]
        raise ConnectionError(f"a reply that is not known: {bytes(line[:16])!r}")

    def over(self) -> bool:
        """Whether all that was received has been read."""
        return self._start == self._end

    def _left(self) -> float:
        left = min(self._silence_s, self._until - self._clock())
        if left <= 0:
            raise TimeoutError("the time is over")
        return left

    def _send(self, data: Piece) -> None:
        if len(data):
            self._sock.settimeout(self._left())
            self._sock.sendall(data)

    def _receive(self, target: memoryview) -> int:
        self._sock.settimeout(self._left())
        got = self._sock.recv_into(target)
        if not got:
            raise ConnectionError("the server has closed the connection")
        return got

    def _line(self, chunk: int) -> bytes:
        while (at := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            if self._start:
                kept = bytes(self._view[self._start : self._end])
                self._view[: len(kept)] = kept
                self._start, self._end = 0, len(kept)
            if self._end == LINES_BYTES:
                raise ConnectionError("a line without an end")
            room = self._view[self._end : min(LINES_BYTES, self._end + chunk)]
            self._end += self._receive(room)
        line = bytes(self._view[self._start : at])
        self._start = at + 2
        return line

    def _fill(self, target: memoryview) -> None:
        here = min(len(target), self._end - self._start)
        target[:here] = self._view[self._start : self._start + here]
        self._start += here
        while here < len(target):
            here += self._receive(target[here:])

    def _drain(self, size: int) -> None:
        """Read a value that nobody wants, so that the replies after it can be read."""
        if size > DRAIN_BYTES_MAX:
            raise ConnectionError(f"a value of {size} bytes")
        scratch = memoryview(bytearray(min(size, LINES_BYTES)))
        while size:
            part = scratch[: min(size, len(scratch))]
            self._fill(part)
            size -= len(part)

    def _crlf(self) -> None:
        end = bytearray(2)
        self._fill(memoryview(end))
        if end != b"\r\n":
            raise ConnectionError("a value that is longer than it said")


def strings(reply: Reply, expected: int) -> Sequence[Reply]:
    """Return the items of an array reply with at least `expected` items."""
    if not isinstance(reply, list) or len(reply) < expected:
        raise ConnectionError(f"a reply that is no array of {expected}")
    return reply


def _number(line: bytes) -> int:
    try:
        return int(line[1:])
    except ValueError:
        raise ConnectionError(f"a reply without a number: {line[:16]!r}") from None
