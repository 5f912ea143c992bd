"""One connection of a client to the daemon of its host, on a Unix socket that blocks.

Whoever asks waits for the answer; one thread at a time. What fails, or takes too long, ends the
connection: what comes after would answer another question.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time

from kvengine.peer.messages import LENGTH_BYTES, MESSAGE_BYTES_MAX, Answer, Coder, Message, Wrong

RECEIVE_BYTES = 1 << 16
SOCKET_BYTES = 1 << 20
DESCRIPTORS_MAX = 4
UNSAID_MAX = 64


class Lost(OSError):
    """The connection has ended, or is to be ended."""


class Channel:
    """Messages over one socket. `timeout_s`: how long an answer may take, where nothing is said.

    Raises Lost from every verb, and OSError where nobody listens at `path`.
    """

    def __init__(self, path: str, timeout_s: float, hear_s: float | None = None) -> None:
        """Connect. hear_s: how long `hear` waits, `timeout_s` if None."""
        self._timeout_s = timeout_s
        self._hear_s = timeout_s if hear_s is None else hear_s
        self._coder = Coder()
        self._lock = threading.Lock()
        self._buffer = bytearray(RECEIVE_BYTES)
        self._have = 0
        self._unsaid: list[Message] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Not settimeout: that would cost a poll before each call.
            for option, wait_s in (
                (socket.SO_RCVTIMEO, self._hear_s),
                (socket.SO_SNDTIMEO, timeout_s),
            ):
                wait = struct.pack("ll", int(wait_s), int(wait_s % 1 * 1e6) or 1)
                self._socket.setsockopt(socket.SOL_SOCKET, option, wait)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise

    def ask(self, message: Message, timeout_s: float | None = None) -> Answer:
        """Say something and wait for its answer, which has the message's number."""
        return self.ask_with(message, timeout_s)[0]

    def ask_with(
        self, message: Message, timeout_s: float | None = None, descriptors: bool = False
    ) -> tuple[Answer, list[int]]:
        """Do as `ask`; return descriptors that have come with the answer, the caller's to close."""
        with self._lock:
            end = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
            fds: list[int] = []
            try:
                self._send(message)
                fds = self._receive_descriptors() if descriptors else []
                answer = self._read(end)
            except (OSError, Wrong) as error:
                self._end()
                for fd in fds:
                    os.close(fd)
                raise Lost(str(error)) from None
            if answer.number != message.number:
                self._end()
                raise Lost("an answer to something else")
            return answer, fds

    def tell(self, message: Message | None = None, *, later: bool = False) -> None:
        """Say something that has no answer, and all that was to be said later.

        later: say it before whatever is said next, so that both go together; somebody has to call
        `tell` before long. Some are said at once all the same.
        """
        with self._lock:
            if message is not None:
                self._unsaid.append(message)
            if not self._unsaid or (later and len(self._unsaid) < UNSAID_MAX):
                return
            try:
                self._send(None)
            except OSError as error:
                self._end()
                raise Lost(str(error)) from None

    def hear(self) -> Answer | None:
        """Wait for something that nobody has asked for here. None: nothing came in time."""
        try:
            return self._read(time.monotonic() + self._hear_s)
        except TimeoutError:
            return None
        except (OSError, Wrong) as error:
            self._end()
            raise Lost(str(error)) from None

    def end(self) -> None:
        """End the connection; whoever waits for it is told. `close` comes after."""
        self._end()

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def _send(self, message: Message | None) -> None:
        if self._unsaid:
            said, self._unsaid = self._unsaid, []
            if message is not None:
                said.append(message)
            self._socket.sendall(b"".join(map(self._coder.frame, said)))
        elif message is not None:
            self._socket.sendall(self._coder.frame(message))

    def _end(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended already

    def _receive_descriptors(self) -> list[int]:
        data, fds, _, _ = socket.recv_fds(self._socket, RECEIVE_BYTES, DESCRIPTORS_MAX)
        if not data:
            for fd in fds:
                os.close(fd)
            raise Lost("the daemon has closed the connection")
        self._buffer[self._have : self._have + len(data)] = data
        self._have += len(data)
        return list(fds)

    def _read(self, end: float) -> Answer:
        """Read one message. Raises TimeoutError where it has not come by then."""
        while True:
            if self._have >= LENGTH_BYTES:
                size = int.from_bytes(self._buffer[:LENGTH_BYTES], "little")
                if size > MESSAGE_BYTES_MAX:
                    raise Lost(f"an answer of {size} bytes")
                need = LENGTH_BYTES + size
                if self._have >= need:
                    with memoryview(self._buffer) as view:
                        answer = self._coder.answer(view[LENGTH_BYTES:need])
                    rest = self._have - need
                    if rest:
                        self._buffer[:rest] = self._buffer[need : self._have]
                    self._have = rest
                    return answer
                if need > len(self._buffer):
                    self._buffer.extend(bytes(need - len(self._buffer)))
            try:
                with memoryview(self._buffer) as view:
                    count = self._socket.recv_into(view[self._have :])
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise TimeoutError("no answer in time") from None
                continue
            if not count:
                raise Lost("the daemon has closed the connection")
            self._have += count
