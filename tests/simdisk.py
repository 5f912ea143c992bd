"""A disk in memory that loses power, and one that fails: file layers for the disk tier.

`SimDisk` keeps what was synced apart from what was only written. `crash` gives a disk as it may be
found after a loss of power: of each unsynced sector the old bytes, the new ones, some of both, or
noise; of each unsynced name the old file, the new one, or none.
"""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kvengine.tiers.files import Buffer, Files
from kvengine.workers import Work, Workers

SECTOR = 512
LOST, KEPT, TORN, NOISE = range(4)


class Inline(Workers):
    """Work is done where it is submitted: no threads, so a run is the same each time."""

    def __init__(self) -> None:
        super().__init__(0, "inline", lambda error: None)
        self.errors: list[Exception] = []

    def submit(self, work: Work) -> bool:
        if self._closed:
            return False
        try:
            work()
        except Exception as error:
            self.errors.append(error)
        return True


class SimFile:
    """One file: its bytes as synced, as written, and which sectors differ."""

    def __init__(self, nbytes: int = 0) -> None:
        self.stable = np.zeros(nbytes, np.uint8)
        self.now = np.zeros(nbytes, np.uint8)
        self.dirty = np.zeros(nbytes // SECTOR, np.bool_)

    def grow(self, nbytes: int) -> None:
        """`nbytes`: whole sectors."""
        if nbytes > len(self.now):
            self.now = np.concatenate([self.now, np.zeros(nbytes - len(self.now), np.uint8)])
            more = np.zeros(nbytes // SECTOR - len(self.dirty), np.bool_)
            self.dirty = np.concatenate([self.dirty, more])

    def sync(self) -> None:
        if len(self.stable) < len(self.now):
            self.stable = self.now.copy()
        else:
            sectors = np.flatnonzero(self.dirty)
            self.stable.reshape(-1, SECTOR)[sectors] = self.now.reshape(-1, SECTOR)[sectors]
        self.dirty[:] = False

    def forget(self) -> None:
        """Lose what was not synced, as a kernel does whose sync has failed."""
        self.now[: len(self.stable)] = self.stable
        self.now[len(self.stable) :] = 0
        self.dirty[:] = False

    def crashed(self, draw: np.random.Generator, bias: np.ndarray) -> "SimFile":
        """What may be found of it. bias: float[4], how often each fate befalls a sector."""
        found = SimFile()
        longer = len(self.now) > len(self.stable)
        nbytes = len(self.now) if not longer or draw.random() < 0.5 else len(self.stable)
        data = np.zeros(nbytes, np.uint8)
        data[: len(self.stable)] = self.stable[:nbytes]
        sectors = np.flatnonzero(self.dirty[: nbytes // SECTOR])
        if len(sectors):
            fates = draw.choice(4, len(sectors), p=bias)
            old, new = data.reshape(-1, SECTOR), self.now[:nbytes].reshape(-1, SECTOR)
            kept = sectors[fates == KEPT]
            old[kept] = new[kept]
            torn = sectors[fates == TORN]
            cut = int(draw.integers(1, SECTOR))
            old[torn, :cut] = new[torn, :cut]
            noise = sectors[fates == NOISE]
            old[noise] = draw.integers(0, 256, (len(noise), SECTOR), np.uint8)
        found.stable, found.now = data, data.copy()
        found.dirty = np.zeros(nbytes // SECTOR, np.bool_)
        return found


class SimDisk:
    """`before` is called ahead of each call that changes something: a place to lose power."""

    def __init__(self) -> None:
        self.names_now: dict[Path, SimFile] = {}
        self.names_stable: dict[Path, SimFile] = {}
        self.before: Callable[[], None] = lambda: None
        self._handles: dict[int, SimFile] = {}
        self._next = 1000

    def crash(self, draw: np.random.Generator) -> "SimDisk":
        """A disk as it may be found if the power goes now."""
        kind = draw.integers(6)
        bias = np.full(4, 0.25)
        if kind < 4:  # mostly of one fate
            bias = np.full(4, 0.02)
            bias[kind] = 0.94
        made, twins = SimDisk(), {}
        for path in {**self.names_now, **self.names_stable}:
            now, stable = self.names_now.get(path), self.names_stable.get(path)
            file = now if draw.random() < 0.5 else stable
            if file is not None:
                twin = twins.get(id(file))
                if twin is None:
                    twin = twins[id(file)] = file.crashed(draw, bias)
                made.names_now[path] = made.names_stable[path] = twin
        return made

    def copy(self) -> "SimDisk":
        """All of it, as if synced: what a killed process leaves."""
        made = SimDisk()
        for path, file in self.names_now.items():
            twin = SimFile()
            twin.stable, twin.now = file.now.copy(), file.now.copy()
            twin.dirty = np.zeros(len(file.dirty), np.bool_)
            made.names_now[path] = made.names_stable[path] = twin
        return made

    # Files

    def open(self, path: Path, *, create: bool = False) -> int:
        if create:
            if path in self.names_now:
                raise FileExistsError(errno.EEXIST, "there already", str(path))
            self.before()
            self.names_now[path] = SimFile()
        if path not in self.names_now:
            raise FileNotFoundError(errno.ENOENT, "not there", str(path))
        return self._handle(self.names_now[path])

    def _handle(self, file: SimFile) -> int:
        self._next += 1
        self._handles[self._next] = file
        return self._next

    def close(self, handle: int) -> None:
        del self._handles[handle]

    def read(self, handle: int, buffers: Sequence[Buffer], offset: int) -> int:
        data, got = self._handles[handle].now, 0
        for buffer in buffers:
            piece = data[offset + got : offset + got + len(buffer)]
            buffer[: len(piece)] = piece.tobytes()
            got += len(piece)
        return got

    def write(self, handle: int, buffers: Sequence[Buffer], offset: int) -> int:
        self.before()
        file, put = self._handles[handle], 0
        for buffer in buffers:
            at = offset + put
            put += len(buffer)
            assert at % SECTOR == 0 and len(buffer) % SECTOR == 0
            file.grow(offset + put)
            file.now[at : offset + put] = np.frombuffer(buffer, np.uint8)
            file.dirty[at // SECTOR : (offset + put) // SECTOR] = True
        return put

    def sync(self, handle: int) -> None:
        self.before()
        self._handles[handle].sync()

    def lose(self, handle: int) -> None:
        """What a sync that fails does."""
        self._handles[handle].forget()

    def allocate(self, handle: int, nbytes: int) -> None:
        self.before()
        self._handles[handle].grow(-(-nbytes // SECTOR) * SECTOR)

    def size(self, handle: int) -> int:
        return len(self._handles[handle].now)

    def lock(self, path: Path) -> int:
        return self._handle(SimFile())

    def names(self, folder: Path) -> list[str]:
        return [path.name for path in self.names_now if path.parent == folder]

    def rename(self, path: Path, target: Path) -> None:
        self.before()
        self.names_now[target] = self.names_now.pop(path)

    def remove(self, path: Path) -> None:
        self.before()
        self.names_now.pop(path, None)

    def make_folder(self, folder: Path) -> None:
        pass

    def sync_folder(self, folder: Path) -> None:
        self.before()
        for path in {**self.names_now, **self.names_stable}:
            if path.parent == folder:
                if path in self.names_now:
                    self.names_stable[path] = self.names_now[path]
                else:
                    del self.names_stable[path]

    def settle(self, folder: Path) -> None:
        pass


class Faulty:
    """A file layer whose call number `at` fails: with an errno, or "short" (half), or "nothing".

    A fault of a sync loses what was not synced, as kernels do. `then` is how many calls of the
    same verb after it fail as well.
    """

    VERBS = ("open", "read", "write", "sync", "allocate", "size", "rename", "remove", "sync_folder")

    def __init__(self, files: Files, at: int = -1, fault: int | str = errno.EIO, then: int = 0):
        self.files = files
        self.at = at
        self.fault = fault
        self.then = then
        self.calls: list[str] = []
        self._failing = ""

    def __getattr__(self, name: str) -> Callable[..., object]:
        call = getattr(self.files, name)
        if name not in self.VERBS:
            return call

        def wrapped(*args: object, **options: object) -> object:
            index = len(self.calls)
            self.calls.append(name)
            if index == self.at:
                self._failing = name
            elif self._failing != name or not 0 <= index - self.at or self.then <= 0:
                return call(*args, **options)
            else:
                self.then -= 1
            if isinstance(self.fault, int):
                if name == "sync" and hasattr(self.files, "lose"):
                    self.files.lose(args[0])
                raise OSError(self.fault, os.strerror(self.fault))
            if name not in ("read", "write"):
                return call(*args, **options)
            handle, buffers, offset = args
            if self.fault == "nothing":
                return 0
            half = sum(len(each) for each in buffers) // 2 // 4096 * 4096
            pieces, left = [], half
            for buffer in buffers:
                piece = memoryview(buffer)[:left]
                left -= len(piece)
                if len(piece):
                    pieces.append(piece)
            return call(handle, pieces, offset) if half else 0

        return wrapped
