"""The file calls of the disk tier, in one place, so that a test can stand between tier and disk.

`OSFiles` is the operating system's; a simulated disk, or one that fails, has the same verbs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

PAGE_BYTES = 4096
HANDLES_MAX = 128
Buffer = mmap.mmap | memoryview


class Files(Protocol):
    """What a tier asks of a file system. Failures are OSErrors; transfers may be short."""

    def open(self, path: Path, *, create: bool = False) -> int: ...
    def close(self, handle: int) -> None: ...
    def read(self, handle: int, buffers: Sequence[Buffer], offset: int) -> int: ...
    def write(self, handle: int, buffers: Sequence[Buffer], offset: int) -> int: ...
    def sync(self, handle: int) -> None: ...
    def allocate(self, handle: int, nbytes: int) -> None: ...
    def size(self, handle: int) -> int: ...
    def lock(self, path: Path) -> int: ...
    def names(self, folder: Path) -> list[str]: ...
    def rename(self, path: Path, target: Path) -> None: ...
    def remove(self, path: Path) -> None: ...
    def make_folder(self, folder: Path) -> None: ...
    def sync_folder(self, folder: Path) -> None: ...
    def settle(self, folder: Path) -> None: ...


class OSFiles:
    """Files of this machine, past the page cache where the file system can, else through it.

    What goes through the cache is dropped from it when it has been read or synced: blocks have a
    cache of their own, the arena. Buffers, offsets and sizes are whole pages.
    """

    def __init__(self) -> None:
        self._direct = True
        self._buffered: set[int] = set()

    def open(self, path: Path, *, create: bool = False) -> int:
        """Open for reading and writing; `create`: a new file, none may be there."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if create else 0)
        if self._direct:
            try:
                return os.open(path, flags | os.O_DIRECT, 0o600)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                flags &= ~os.O_EXCL  # the attempt may have made the file
        handle = os.open(path, flags, 0o600)
        self._buffered.add(handle)
        return handle

    def close(self, handle: int) -> None:
        """Give a descriptor back."""
        self._buffered.discard(handle)
        os.close(handle)

    def read(self, handle: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Fill buffers from one place; returns how many bytes there were."""
        got = os.preadv(handle, buffers, offset)
        self._forget(handle, offset, got)
        return got

    def write(self, handle: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Write buffers to one place; returns how many bytes were taken."""
        return os.pwritev(handle, buffers, offset)

    def sync(self, handle: int) -> None:
        """Return once what was written survives a loss of power."""
        os.fdatasync(handle)
        self._forget(handle, 0, 0)

    def allocate(self, handle: int, nbytes: int) -> None:
        """Have the disk's blocks ready."""
        os.posix_fallocate(handle, 0, nbytes)

    def size(self, handle: int) -> int:
        """Return the file's size in bytes."""
        return os.fstat(handle).st_size

    def lock(self, path: Path) -> int:
        """Own a file until its handle is closed. BlockingIOError where another does."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise
        return handle

    def names(self, folder: Path) -> list[str]:
        """Name what is in a folder."""
        return os.listdir(folder)

    def rename(self, path: Path, target: Path) -> None:
        """Give a file another name, in one step."""
        os.replace(path, target)

    def remove(self, path: Path) -> None:
        """Remove a file; it lives on for those who have it open."""
        path.unlink(missing_ok=True)

    def make_folder(self, folder: Path) -> None:
        """Make a folder and those above it, where they are missing."""
        folder.mkdir(parents=True, exist_ok=True)

    def sync_folder(self, folder: Path) -> None:
        """Return once the names in a folder survive a loss of power."""
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def settle(self, folder: Path) -> None:
        """Find out whether this file system takes reads and writes past the page cache."""
        path = folder / "direct"
        page = mmap.mmap(-1, PAGE_BYTES)
        self.remove(path)
        handle = self.open(path, create=True)
        try:
            self._direct = handle not in self._buffered
            if self._direct:
                os.pwritev(handle, [page], 0)
                os.preadv(handle, [page], 0)
        except OSError:
            self._direct = False
        finally:
            self.close(handle)
            self.remove(path)

    def _forget(self, handle: int, offset: int, nbytes: int) -> None:
        if handle in self._buffered:
            os.posix_fadvise(handle, offset, nbytes, os.POSIX_FADV_DONTNEED)


Move = Callable[[int, Sequence[Buffer], int], int]


def whole(move: Move, handle: int, buffers: Sequence[Buffer], offset: int) -> int:
    """Go on after short transfers until all is moved, or nothing moves; returns how much was."""
    left = [memoryview(each) for each in buffers]
    done = 0
    while left:
        moved = move(handle, left, offset + done)
        if moved <= 0:
            break
        done += moved
        while left and moved >= len(left[0]):
            moved -= len(left[0])
            del left[0]
        if left:
            left[0] = left[0][moved:]
    return done


class Handles:
    """Open files by path, a bounded number of them: a large directory has thousands of segments."""

    def __init__(self, files: Files, handles_max: int = HANDLES_MAX) -> None:
        self._files = files
        self._handles_max = handles_max
        self._lock = threading.Lock()
        self._users: OrderedDict[Path, list[int]] = OrderedDict()  # [handle, users], oldest first

    @contextlib.contextmanager
    def of(self, path: Path, *, create: bool = False) -> Iterator[int]:
        """Lend the descriptor of a file. Raises OSError where it cannot be opened."""
        with self._lock:
            held = self._users.get(path)
            if held is None:
                held = self._users[path] = [self._files.open(path, create=create), 0]
            self._users.move_to_end(path)
            held[1] += 1
            if len(self._users) > self._handles_max:
                idle = next((p for p, (_, users) in self._users.items() if not users), None)
                if idle is not None:
                    self._files.close(self._users.pop(idle)[0])
        try:
            yield held[0]
        finally:
            with self._lock:
                held[1] -= 1
                if not held[1] and self._users.get(path) is not held:
                    self._files.close(held[0])

    def forget(self, path: Path) -> None:
        """Close a file, now or when the last who uses it is done."""
        with self._lock:
            held = self._users.pop(path, None)
            if held is not None and not held[1]:
                self._files.close(held[0])

    def close(self) -> None:
        """Close all. Nobody uses them any more."""
        for handle, _ in self._users.values():
            self._files.close(handle)
        self._users.clear()

    def detach(self) -> None:
        """After a fork, in the child: the lock may be held by a thread that is not here."""
        self._lock = threading.Lock()
        self.close()
