"""Sealed frames: what leaves the host's memory where a tier is told to encrypt.

A block is sealed once, when it first leaves, and that form is what disk, remote stores and peers
carry: a frame whose payload is the block as it lies in memory, headers, digests and all, encrypted.

    header       one page, as of any frame (kvengine.frame): key, identity, fill and when it
                 expires are in the clear, parent, part, position and tokens are zeros; digest
                 kind 2, key id, salt
    payload      the block, cut into segments of `segment_bytes`, each encrypted by itself; in the
                 header's table of digests stand their tags

Cipher: AES-256-GCM (NIST SP 800-38D). Each sealing draws a salt of 256 random bits; its frame key
is HKDF-SHA256 (RFC 5869) of the tenant's data key with that salt. Associated data of every segment
is the header up to its tags, so that nothing of it can be changed, and no segment can stand in
another frame, at another place, or in a frame of another length.

No nonce ever repeats under a key: a frame key serves one sealing, and the nonce of a segment is its
index, which is counted up once. Two sealings share a frame key only where two salts of 256 random
bits are equal: after 2^64 sealings under one data key that has happened with a probability below
2^-128. A block that is sealed twice gets another salt; what has been sealed is never changed, only
copied. Of one frame key at most SEGMENTS_MAX segments of at most 2^36 - 32 bytes are encrypted.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from kvengine import frame
from kvengine.errors import ConfigError, FrameError, UnknownKey
from kvengine.frame import FIXED_BYTES, PAGE_BYTES, Header, pages

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HEADER_BYTES = PAGE_BYTES  # how much larger a sealed block is
SEGMENTS_MAX = (PAGE_BYTES - FIXED_BYTES - frame.DIGEST_BYTES) // frame.SEGMENT_BYTES
SEGMENT_BYTES = 64 << 10
TAG_BYTES = 16
INFO = b"kvengine sealed frame 1"
KEPT_BYTES = 64 << 20
ROOMS_MAX = 32


class Keys(Protocol):
    """A tenant's data keys: 32 bytes each, and a number that is in every header."""

    def sealing(self) -> tuple[int, bytes]:
        """Return the number and the key that blocks are sealed with now."""
        ...

    def opening(self, key_id: int) -> bytes | None:
        """Return the key of that number, None where it is not held, or not this tenant's."""
        ...


@dataclass(eq=False)
class Made:
    """A sealed form in memory, and how many are using it."""

    room: memoryview
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    ready: bool = False


class Sealer:
    """Seal blocks on their way out, open them on their way in. Any thread may call any verb.

    `kept_bytes` of sealed forms are remembered, for other tiers that take the same block a little
    later. Raises ConfigError where the package is missing.
    """

    def __init__(self, keys: Keys, kept_bytes: int = 0) -> None:
        try:
            self._aes = import_module("cryptography.hazmat.primitives.ciphers.aead").AESGCM
            self._hkdf = import_module("cryptography.hazmat.primitives.kdf.hkdf").HKDF
            self._sha256 = import_module("cryptography.hazmat.primitives.hashes").SHA256
            self._bad_tag = import_module("cryptography.exceptions").InvalidTag
        except ImportError as error:
            raise ConfigError(
                "encrypt=1 needs the package 'cryptography', which is not installed: "
                "pip install 'kvengine[peers]'"
            ) from error
        self._keys = keys
        self._kept_bytes = kept_bytes
        self._lock = threading.Lock()
        self._busy: dict[bytes, Made] = {}
        self._idle: OrderedDict[bytes, Made] = OrderedDict()  # the oldest first
        self._idle_bytes = 0
        self._rooms: list[memoryview] = []

    @contextmanager
    def sealed(self, block: memoryview, nbytes: int) -> Iterator[memoryview]:
        """Lend the sealed form of a block: HEADER_BYTES more than its `nbytes`, in whole pages.

        Raises FrameError where there is no block.
        """
        digest = frame.header_digest(block[:nbytes])
        key_id, data_key = self._keys.sealing()
        # What an older key has sealed is not for tiers that are written to now.
        name = key_id.to_bytes(4, "little") + bytes(block[24:144]) + digest
        with self._lock:
            made = self._busy.get(name)
            if made is None and (made := self._idle.pop(name, None)) is not None:
                self._idle_bytes -= len(made.room)
            made = self._busy[name] = made or Made(self._take(HEADER_BYTES + nbytes))
            made.users += 1
        try:
            with made.lock:
                if not made.ready:
                    self._seal(block[:nbytes], made.room, key_id, data_key)
                    made.ready = True
            yield made.room[: pages(HEADER_BYTES + nbytes)]
        finally:
            self._leave(name, made)

    @contextmanager
    def room(self, nbytes: int) -> Iterator[memoryview]:
        """Lend memory for a sealed block, or a plain one: whole pages, a little more than asked."""
        with self._lock:
            room = self._take(nbytes)
        try:
            yield room
        finally:
            with self._lock:
                self._give(room)

    def open(
        self,
        sealed: memoryview,
        key: bytes,
        target: memoryview,
        nbytes: int,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        """Decrypt the block of `nbytes` under `key` into `target`. The caller verifies it as well.

        `start` and `stop` ask for some of it: no byte before `start` is written, a few after `stop`
        may be; of `sealed` the header and the segments that `around` names are looked at, where
        they stand in the whole. It is written to, and is as before in the end. Where this raises,
        what stands in target is nothing: FrameError, or UnknownKey where the data key is not held.
        """
        header = structure(sealed, key, nbytes)
        data_key = self._keys.opening(header.key_id)
        if data_key is None:
            raise UnknownKey(
                f"a block that is sealed with key {header.key_id:#010x}, not held here"
            )
        cipher, bound = self._cipher(data_key, header.salt), _bound(sealed)
        tags = header.digests.astype("<u8").tobytes()
        stop = nbytes if stop is None else stop
        for index, (at, size) in enumerate(header.segments.tolist()):
            if at + size <= start or at >= stop:
                continue
            place, end = HEADER_BYTES + at, HEADER_BYTES + at + size
            if end > len(sealed):
                raise FrameError(f"a sealed frame cut short: {len(sealed)} bytes")
            tag = tags[TAG_BYTES * index : TAG_BYTES * (index + 1)]
            if end + TAG_BYTES <= len(sealed):
                data, after = sealed[place : end + TAG_BYTES], bytes(sealed[end : end + TAG_BYTES])
                data[size:] = tag
            else:
                data, after = memoryview(bytearray(sealed[place:end]) + tag), b""
            plain = target[at : at + size] if at >= start else memoryview(bytearray(size))
            try:
                cipher.decrypt_into(_nonce(index), data, bound, plain)
            except self._bad_tag:
                raise FrameError(f"segment {index} is not as it was sealed") from None
            finally:
                if after:
                    data[size:] = after
            if at < start:
                target[start : at + size] = plain[start - at :]

    # Inside

    def _seal(self, block: memoryview, room: memoryview, key_id: int, data_key: bytes) -> None:
        """Encrypt a block into a room that has TAG_BYTES more than its sealed form."""
        nbytes = len(block)
        salt = os.urandom(frame.SALT_BYTES)
        segments = cut(nbytes)
        header = Header(
            key=bytes(block[24:56]),
            parent=bytes(32),
            identity=bytes(block[88:120]),
            fill=bytes(block[frame.FILL]),
            part=(0, 0, 0, 0),
            position=0,
            tokens=0,
            segments=segments,
            digests=np.zeros((len(segments), 2), dtype=np.uint64),
            digest_kind=frame.TAG_AES_256_GCM,
            key_id=key_id,
            expires=frame.expires_of(block),
            salt=salt,
        )
        room[:HEADER_BYTES] = header.encode()
        cipher, bound = self._cipher(data_key, salt), _bound(room)
        tags = []
        for index, (at, size) in enumerate(segments.tolist()):
            # The tag stands where the next segment's first bytes come.
            end = HEADER_BYTES + at + size
            target = room[HEADER_BYTES + at : end + TAG_BYTES]
            cipher.encrypt_into(_nonce(index), block[at : at + size], bound, target)
            tags.append(bytes(target[size:]))
        digests = np.frombuffer(b"".join(tags), dtype="<u8").reshape(-1, 2)
        room[:HEADER_BYTES] = replace(header, digests=digests).encode()
        tail = pages(HEADER_BYTES + nbytes) - HEADER_BYTES - nbytes
        room[HEADER_BYTES + nbytes :][:tail] = bytes(tail)  # the room may have held a plain block

    def _cipher(self, data_key: bytes, salt: bytes) -> AESGCM:
        made: AESGCM = self._aes(self._hkdf(self._sha256(), 32, salt, INFO).derive(data_key))
        return made

    def _leave(self, name: bytes, made: Made) -> None:
        with self._lock:
            made.users -= 1
            if made.users:
                return
            del self._busy[name]
            if not made.ready:
                self._give(made.room)
                return
            self._idle[name] = made
            self._idle_bytes += len(made.room)
            while self._idle_bytes > self._kept_bytes:
                oldest = self._idle.popitem(last=False)[1]
                self._idle_bytes -= len(oldest.room)
                self._give(oldest.room)

    def _take(self, nbytes: int) -> memoryview:
        size = pages(nbytes + TAG_BYTES)
        for index in reversed(range(len(self._rooms))):  # the last given back is warm
            if len(self._rooms[index]) == size:
                return self._rooms.pop(index)
        return memoryview(mmap.mmap(-1, size))

    def _give(self, room: memoryview) -> None:
        self._rooms.append(room)
        if len(self._rooms) > ROOMS_MAX:
            del self._rooms[0]


def cut(nbytes: int) -> NDArray[np.uint64]:
    """Return where a block's segments begin and their sizes: whole pages, but for the last."""
    size = _segment_bytes(nbytes)
    starts = np.arange(0, nbytes, size, dtype=np.uint64)
    sizes = np.minimum(np.uint64(size), np.uint64(nbytes) - starts)
    return np.stack([starts, sizes], axis=1)


def _segment_bytes(nbytes: int) -> int:
    return max(SEGMENT_BYTES, pages(-(-nbytes // SEGMENTS_MAX)))


def around(nbytes: int, start: int, stop: int) -> tuple[int, int]:
    """Return the bytes of a block that the segments take which have any from `start` to `stop`."""
    size = _segment_bytes(nbytes)
    return start // size * size, min(nbytes, -(-stop // size) * size)


def structure(sealed: memoryview, key: bytes, nbytes: int) -> Header:
    """Check what can be seen of the frame of a block of `nbytes` without its key.

    sealed: at least the header. Raises FrameError.
    """
    header = frame.decode(sealed, frame.TAG_AES_256_GCM)
    if header.key != key:
        raise FrameError("a sealed frame of another block")
    if header.payload_bytes != nbytes:
        raise FrameError(f"a sealed block of {header.payload_bytes} bytes, expected {nbytes}")
    if not np.array_equal(header.segments, cut(header.payload_bytes)):
        raise FrameError("a sealed frame with other segments")
    return header


def _bound(sealed: memoryview) -> bytes:
    """Return what of a header goes into every tag: all of it before the tags."""
    count = int.from_bytes(sealed[12:16], "little")
    return bytes(sealed[: FIXED_BYTES + (frame.SEGMENT_BYTES - TAG_BYTES) * count])


def _nonce(index: int) -> bytes:
    return index.to_bytes(12, "big")
