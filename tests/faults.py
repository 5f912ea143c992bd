"""What may befall a disk tier, each a function that says how it went: for tests and `bench faults`.

All of them take the tier's class, so that the same check runs against one whose guard was removed.
"""

import contextlib
import errno
import importlib.util
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

import numpy as np

from kvengine import frame
from kvengine.errors import ConfigError, DirectoryInUse
from kvengine.layout import Layout
from kvengine.tiers import Span
from kvengine.tiers.disk import DiskTier
from kvengine.tiers.files import Files
from kvengine.tiers.format import Geometry, SegmentHeader
from simdisk import Faulty, Inline, SimDisk

PAGE = 4096
OF = Layout(layers=2, kv_heads=1, head_dim=16, head_dim_v=16, dtype="float32", block_tokens=16)
FRAME = frame.frame_bytes(OF)
STRIDE = PAGE + FRAME
SLOTS = 5
SEGMENT_BYTES = Geometry(STRIDE, SLOTS).nbytes + PAGE
SIZE_BYTES = 4 * SEGMENT_BYTES
HOME = Path("/disk")
FAR_S = 1e9
Kind = type[DiskTier]


class Tally:
    """Stands in for Metrics: counts, without a registry."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + value

    def get(self, name: str) -> int:
        return int(self.counts.get(name, 0))


class Blocks:
    """So many frames, each with a key of its own, in whole pages."""

    def __init__(self, count: int, seed: int = 0, fill: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.keys = [draw.bytes(32) for _ in range(count)]
        self.index = {key: index for index, key in enumerate(self.keys)}
        content = np.random.default_rng((seed, fill))
        payloads = content.integers(0, 256, (count, OF.payload_bytes), np.uint8)
        template = frame.Template(OF, bytes(range(32)))
        parts = template.segments.tolist()
        digests = np.stack([frame.digests_of(each.data, parts) for each in payloads])
        zeros, fill_id = [bytes(32)] * count, bytes([fill]) * 16
        headers = template.write(self.keys, zeros, fill_id, range(count), digests)
        self.frames = []
        for header, payload in zip(headers, payloads, strict=True):
            memory = mmap.mmap(-1, FRAME)
            memory[:] = header + payload.tobytes()
            self.frames.append(memory)
        self.bytes = [memory[:] for memory in self.frames]

    def span(self, index: int, memory: mmap.mmap | None = None) -> Span:
        view = memoryview(self.frames[index] if memory is None else memory)
        return Span(self.keys[index], view, FRAME)


class Scene:
    """A tier over a file layer, and what it has said of each block."""

    def __init__(
        self, kind: Kind, files: Files, blocks: Blocks, *, durable: bool = True, **options: object
    ) -> None:
        self.blocks = blocks
        self.tally = Tally()
        self.acked: set[int] = set()
        self.room = mmap.mmap(-1, FRAME)
        self.workers = Inline()
        self.tier = kind(
            HOME,
            SIZE_BYTES,
            self.tally,
            self._dropped,
            segment_bytes=SEGMENT_BYTES,
            durable=durable,
            files=files,
            workers=self.workers,
            **options,
        )

    def _dropped(self, keys: Sequence[bytes]) -> None:
        self.acked -= {self.blocks.index[key] for key in keys}

    def write(self, indices: Sequence[int]) -> None:
        def report(at: int, good: bool) -> None:
            if good:
                self.acked.add(indices[at])

        self.tier.write([self.blocks.span(index) for index in indices], FAR_S, report)

    def read(self, index: int) -> bytes | None:
        """The bytes that the tier calls good, None for a miss."""
        said: list[bool] = []
        self.room[:] = b"\xa5" * FRAME
        span = self.blocks.span(index, self.room)
        self.tier.read([span], FAR_S, lambda _, good: said.append(good))
        assert len(said) == 1
        return self.room[:] if said[0] else None

    def drop(self, index: int) -> None:
        self.acked.discard(index)
        self.tier.drop([self.blocks.keys[index]])

    def held(self) -> set[int]:
        sizes = self.tier.find(self.blocks.keys, FAR_S)
        return {index for index, size in enumerate(sizes) if size}

    def close(self) -> None:
        self.tier.close()
        assert not self.workers.errors, self.workers.errors


@dataclass
class Found:
    """How it went. `wrong` blocks were served with other bytes, `lost` ones had been promised."""

    count: int = 0
    wrong: int = 0
    lost: int = 0
    refused: int = 0
    acked: int = 0
    worst_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def well(self) -> bool:
        return not (self.wrong or self.lost or self.refused)

    def note(self, text: str) -> None:
        if len(self.notes) < 20:
            self.notes.append(text)


def inspect(
    found: Found, kind: Kind, files: Files, blocks: Blocks, promised: set[int], note: str
) -> set[int]:
    """Open what is left and read all of it; returns which blocks were there and right."""
    found.count += 1
    found.acked += len(promised)
    try:
        scene = Scene(kind, files, blocks)
    except ConfigError as error:
        found.refused += 1
        found.note(f"{note}: {error}")
        return set()
    right = set()
    for index in sorted(scene.held() | promised):
        data = scene.read(index)
        if data is not None and data != blocks.bytes[index]:
            found.wrong += 1
            found.note(f"{note}: block {index} has other bytes")
        elif data is not None:
            right.add(index)
        elif index in promised:
            found.lost += 1
            found.note(f"{note}: block {index} is lost")
    scene.close()
    return right


def busy(scene: Scene, draw: random.Random, steps: int) -> None:
    """Write tables, read some, drop a few: more than the tier has room for."""
    count = len(scene.blocks.keys)
    for _ in range(steps):
        at = draw.randrange(count)
        scene.write([(at + i) % count for i in range(draw.choice((1, 2, 3, 4, 4, 7, 8)))])
        for index in draw.sample(sorted(scene.acked), min(2, len(scene.acked))):
            if scene.read(index) is None:
                scene.acked.discard(index)
        if scene.acked and draw.random() < 0.1:
            scene.drop(draw.choice(sorted(scene.acked)))


def power_loss(
    kind: Kind = DiskTier, states: int = 1000, seed: int = 0, *, stop: bool = False
) -> Found:
    """The power goes ahead of any call, in any way that a disk allows: at opening, writing,
    sealing, using segments again. What durable mode has reported is there; nothing is wrong.
    `stop`: at the first that is not so."""
    found = Found()
    run = 0
    while found.count < states and not (stop and not found.well):
        blocks = Blocks(3 * SLOTS * 2, seed)
        disk, draw = SimDisk(), random.Random(f"{seed} {run}")
        dice = np.random.default_rng((seed, run))
        durable = run % 4 != 3
        scenes: list[Scene] = []

        def lose(
            disk: SimDisk = disk,
            dice: np.random.Generator = dice,
            scenes: list[Scene] = scenes,
            durable: bool = durable,
            blocks: Blocks = blocks,
            run: int = run,
        ) -> None:
            promised = set(scenes[-1].acked) if scenes and durable else set()
            inspect(found, kind, disk.crash(dice), blocks, promised, f"seed {seed} run {run}")

        disk.before = lose
        for _ in range(2):
            before = set(scenes[-1].acked) if scenes else set()
            scene = Scene(kind, disk, blocks, durable=durable)
            scene.acked |= before
            scenes.append(scene)
            busy(scene, draw, 12)
            scene.close()
        run += 1
    return found


def killed(kind: Kind = DiskTier, runs: int = 20, seed: int = 0) -> Found:
    """A process that dies between two calls: what it held is there, and nothing else."""
    found = Found()
    for run in range(runs):
        blocks, disk = Blocks(30, seed), SimDisk()
        scene = Scene(kind, disk, blocks, durable=bool(run % 2))
        busy(scene, random.Random(f"{seed} {run}"), 15)
        right = inspect(found, kind, disk.copy(), blocks, scene.acked, f"seed {seed} run {run}")
        for index in right - scene.acked:
            found.wrong += 1
            found.note(f"seed {seed} run {run}: block {index} had been given up")
        scene.close()
    return found


def io_faults(
    kind: Kind = DiskTier,
    faults: Sequence[int | str] = (errno.EIO, errno.ENOSPC, errno.EINTR, "short", "nothing"),
    seed: int = 0,
    *,
    step: int = 1,
    stop: bool = False,
) -> Found:
    """Each `step`-th call of the file layer fails in each way, once, or with all after it."""
    found = Found()
    blocks = Blocks(24, seed)

    def run(files: Faulty, disk: SimDisk, note: str) -> None:
        scenes: list[Scene] = []
        try:
            for _ in range(2):
                before = set(scenes[-1].acked) if scenes else set()
                scene = Scene(kind, files, blocks)
                scenes.append(scene)
                scene.acked |= before & scene.held()
                draw = random.Random(seed)
                for _ in range(5):
                    at = draw.randrange(24)
                    scene.write([(at + i) % 24 for i in range(4)])
                    for index in draw.sample(sorted(scene.held()), min(3, len(scene.held()))):
                        data = scene.read(index)
                        if data is not None and data != blocks.bytes[index]:
                            found.wrong += 1
                            found.note(f"{note}: block {index} has other bytes")
                scene.drop(at)
                scene.close()
        except ConfigError:
            pass  # it says so at opening
        promised = set(scenes[-1].acked) if scenes else set()
        dice = np.random.default_rng(seed)
        inspect(found, kind, disk.crash(dice), blocks, promised, note)

    counting, disk = Faulty(SimDisk()), SimDisk()
    counting.files = disk
    run(counting, disk, "no fault")
    for fault in faults:
        for at in range(0, len(counting.calls), step):
            if stop and not found.well:
                return found
            if isinstance(fault, str) and counting.calls[at] not in ("read", "write"):
                continue
            for then in (0, 1 << 30):
                disk = SimDisk()
                note = f"{fault} at call {at} ({counting.calls[at]}), {then} more"
                run(Faulty(disk, at, fault, then), disk, note)
    return found


@dataclass
class Flips:
    """How many places were damaged, and how many of them were found."""

    count: int = 0
    found: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def well(self) -> bool:
        return self.found == self.count


def directory(kind: Kind, blocks: Blocks, count: int) -> SimDisk:
    """A closed directory with the first blocks, in full segments and one that is not."""
    disk = SimDisk()
    scene = Scene(kind, disk, blocks)
    for index in range(count):
        scene.write([index])
    scene.close()
    return disk


def bit_flips(kind: Kind = DiskTier, flips: int = 2000, seed: int = 0) -> Flips:
    """1 to 64 bits flipped within each slot, or within each segment's front and the superblock."""
    found = Flips()
    held = 3 * SLOTS + 2
    blocks = Blocks(held, seed)
    base = directory(kind, blocks, held)
    draw = random.Random(seed)
    fronts = 0
    while found.count < flips:
        disk = base.copy()
        front = fronts * 20 < found.count
        damaged = damage_fronts(disk, draw) if front else damage_slots(disk, draw)
        fronts += damaged if front else 0
        scene = Scene(kind, disk, blocks)
        found.count += damaged
        if front:
            noticed = min(damaged, scene.tally.get("corrupt_blocks"))
        else:
            noticed = sum(scene.read(index) is None for index in range(held))
            noticed = min(noticed, scene.tally.get("corrupt_blocks"))
            if scene.held():
                found.notes.append("a damaged block is still a hit")
                noticed -= 1
        if noticed < damaged:
            found.notes.append(f"{damaged - noticed} not found, fronts: {front}")
        found.found += noticed
        scene.close()
    return found


def flip(data: np.ndarray, draw: random.Random) -> None:
    """Flip 1 to 64 bits somewhere in `data`."""
    for at in draw.sample(range(8 * len(data)), draw.choice((1, 1, 1, 2, 3, 8, 64))):
        data[at // 8] ^= 1 << at % 8


def damage_slots(disk: SimDisk, draw: random.Random) -> int:
    count = 0
    for path, file in sorted(disk.names_now.items()):
        if path.suffix != ".seg":
            continue
        geometry = Geometry(*SegmentHeader.read(file.now[:PAGE].tobytes())[3:])
        for slot in range(geometry.slots):
            at = geometry.offset(slot)
            if file.now[at : at + PAGE].any():
                page = draw.randrange(3)  # slot header, frame header, payload
                end = at + STRIDE if page == 2 else at + (page + 1) * PAGE
                flip(file.now[at + page * PAGE : end], draw)
                count += 1
    return count


def damage_fronts(disk: SimDisk, draw: random.Random) -> int:
    count = 0
    for path, file in sorted(disk.names_now.items()):
        page = draw.randrange(3 if path.suffix == ".seg" else 2)
        if path.suffix == ".seg" or path.name == "superblock":
            flip(file.now[page * PAGE : (page + 1) * PAGE], draw)
            count += 1
    return count


def misdirected(kind: Kind = DiskTier) -> bool:
    """A slot written over another, of the same segment or of another one, before it was sealed."""
    blocks = Blocks(8)
    well = True
    for there in ((0, 3), (1, 0)):
        disk = SimDisk()
        scene = Scene(kind, disk, blocks)
        for index in range(7):
            scene.write([index])
        files = [disk.names_now[HOME / "segments" / f"0000000{n}.seg"] for n in (1, 2)]
        offset = Geometry.fitting(STRIDE, SEGMENT_BYTES).offset
        one, slot = there
        moved = files[0].now[offset(1) : offset(2)].copy()
        files[one].now[offset(slot) : offset(slot + 1)] = moved
        left = disk.copy()
        left.names_now[HOME / "segments" / "00000001.seg"].now[PAGE : 2 * PAGE] = 0
        fresh = Scene(kind, left, blocks)
        well &= fresh.tally.get("corrupt_blocks") >= 1
        fresh.close()
        scene.close()
    return well


def spliced(kind: Kind = DiskTier) -> bool:
    """Another fill of the same block, whole by itself, is not what was written here."""
    blocks, others = Blocks(1), Blocks(1, fill=1)
    disk = directory(kind, blocks, 1)
    (file,) = (f for p, f in disk.names_now.items() if p.suffix == ".seg")
    at = Geometry.fitting(STRIDE, SEGMENT_BYTES).offset(0) + PAGE
    file.now[at : at + FRAME] = np.frombuffer(others.bytes[0], np.uint8)
    scene = Scene(kind, disk, blocks)
    data = scene.read(0)
    scene.close()
    return data is None


def short_reads(kind: Kind = DiskTier) -> bool:
    """Bytes that were in the buffer before are not the disk's, even if they are right."""
    blocks = Blocks(1)
    disk = directory(kind, blocks, 1)

    class Short:
        def __getattr__(self, name: str) -> object:
            return getattr(disk, name)

        def read(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
            got = disk.read(handle, buffers[:1], offset)
            return got if len(buffers) > 1 or len(buffers[0]) != FRAME else 0

    scene = Scene(kind, Short(), blocks)
    said: list[bool] = []
    scene.room[:] = blocks.bytes[0]
    span = blocks.span(0, scene.room)
    scene.tier.read([span], FAR_S, lambda _, good: said.append(good))
    scene.close()
    return said == [False]


def stale(kind: Kind = DiskTier) -> bool:
    """A write that the power took, and that the disk gives back instead of a later one."""
    blocks, others = Blocks(1), Blocks(1, fill=1)
    disk = directory(kind, others, 1)
    (file,) = (f for p, f in disk.names_now.items() if p.suffix == ".seg")
    offset = Geometry.fitting(STRIDE, SEGMENT_BYTES).offset
    first = file.now[offset(0) : offset(1)].copy()
    file.now[offset(0) : offset(1)] = 0
    file.now[PAGE : 2 * PAGE] = 0
    scene = Scene(kind, disk, blocks)
    scene.write([0])
    assert file.now[offset(0) : offset(1)].any()
    file.now[offset(0) : offset(1)] = first
    data = scene.read(0)
    scene.close()
    return data is None


def incarnations_rise(kind: Kind = DiskTier) -> bool:
    """Whenever the power goes while a directory is opened, the next writer has a new number."""
    blocks, disk, dice = Blocks(1), SimDisk(), np.random.default_rng(0)
    numbers = []
    for _ in range(4):
        left: list[SimDisk] = []
        disk.before = lambda left=left, disk=disk: left.append(disk.crash(dice))
        scene = Scene(kind, disk, blocks)
        disk.before = lambda: None
        for state in left * 8 if numbers else []:
            after = Scene(kind, state.crash(dice), blocks)
            if after.tier.incarnation <= numbers[-1]:
                return False
            after.close()
        numbers.append(scene.tier.incarnation)
        scene.close()
    return len(set(numbers)) == 4


def numbers_are_new(kind: Kind = DiskTier) -> bool:
    """No generation is drawn twice, though the power takes the segments that had it."""
    blocks, seen = Blocks(2), []
    disk = SimDisk()
    for _ in range(3):
        scene = Scene(kind, disk, blocks, durable=False)
        scene.write([0])
        for path, file in list(disk.names_now.items()):
            if path.suffix == ".seg":
                seen.append(SegmentHeader.read(file.now[:PAGE].tobytes()).generation)
                disk.remove(path)
        scene.tier.detach()
    return len(set(seen)) == 3


def one_owner(kind: Kind = DiskTier, folder: Path | None = None) -> bool:
    """A second opener of a directory is refused."""
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            return one_owner(kind, Path(made))
    first = kind(folder, SIZE_BYTES, Tally(), lambda keys: None)
    try:
        kind(folder, SIZE_BYTES, Tally(), lambda keys: None).close()
        return False
    except DirectoryInUse:
        return True
    finally:
        first.close()


# Processes


def kill_9(folder: Path, cycles: int, kind: Kind = DiskTier, seed: int = 0) -> Found:
    """A process writes, and is killed in the midst of it; the next opens what it left."""
    found, draw = Found(), random.Random(seed)
    blocks = Blocks(60, seed)
    # What is compiled, or loaded, once in a process is no part of a recovery.
    Scene(kind, directory(kind, blocks, 2 * SLOTS), blocks).close()
    for cycle in range(cycles):
        if cycle % 50 == 0:
            shutil.rmtree(folder, ignore_errors=True)
            promised: set[int] = set()
        durable = bool(cycle % 2)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            _write_for_ever(folder, kind, blocks, durable, writer, draw.randrange(1 << 30))
        os.close(writer)
        heard = b""
        for _ in range(draw.randrange(1, 30)):
            heard += os.read(reader, 64)
        time.sleep(draw.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(reader, 1 << 16):
            heard += more
        os.close(reader)
        for code in heard:
            promised = promised | {code} if code < 128 else promised - {code - 128}
        start = time.perf_counter()
        tier = kind(folder, SIZE_BYTES, Tally(), lambda keys: None, segment_bytes=SEGMENT_BYTES)
        found.worst_s = max(found.worst_s, time.perf_counter() - start)
        _check_all(found, tier, blocks, promised, f"cycle {cycle}")
        tier.close()
    return found


def _write_for_ever(
    folder: Path, kind: Kind, blocks: Blocks, durable: bool, out: int, seed: int
) -> None:
    """In the child: each byte written to `out` is a block that is there, +128: given up."""
    try:
        tier = kind(
            folder,
            SIZE_BYTES,
            Tally(),
            lambda keys: os.write(out, bytes(128 + blocks.index[key] for key in keys)),
            segment_bytes=SEGMENT_BYTES,
            durable=durable,
        )
        draw = random.Random(seed)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            table = [draw.randrange(60) for _ in range(4)]
            left = [len(table)]

            def report(at: int, good: bool, table=table, left=left) -> None:
                if good:
                    os.write(out, bytes([table[at]]))
                left[0] -= 1

            tier.write([blocks.span(index) for index in dict.fromkeys(table)], FAR_S, report)
            while left[0] > len(table) - len(set(table)):
                time.sleep(0.0005)
    finally:
        os._exit(1)


def _check_all(found: Found, tier: DiskTier, blocks: Blocks, promised: set[int], note: str) -> None:
    found.count += 1
    found.acked += len(promised)
    sizes = tier.find(blocks.keys, FAR_S)
    rooms = [mmap.mmap(-1, FRAME) for _ in blocks.keys]
    said: dict[int, bool] = {}
    spans = [blocks.span(index, room) for index, room in enumerate(rooms)]
    tier.read(spans, FAR_S, lambda at, good: said.__setitem__(at, good))
    end = time.monotonic() + 30
    while len(said) < len(spans) and time.monotonic() < end:
        time.sleep(0.0005)
    for index, room in enumerate(rooms):
        if said[index] and room[:] != blocks.bytes[index]:
            found.wrong += 1
            found.note(f"{note}: block {index} has other bytes")
        if index in promised and not said[index]:
            found.lost += 1
            found.note(f"{note}: block {index} is lost, {sizes[index]}")


# Mutations


@dataclass(frozen=True)
class Mutation:
    """A guard in the source, what stands there without it, and the check that must notice."""

    name: str
    module: str
    guard: str
    without: str
    check: Callable[[Kind], bool]


CHAIN = tuple(f"kvengine.tiers.{name}" for name in ("files", "format", "segments", "disk"))


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, change: tuple[str, str] | None) -> None:
        super().__init__(name, path)
        self.change = change

    def get_code(self, fullname: str) -> CodeType:
        source = Path(self.path).read_text()
        if self.change is not None:
            assert source.count(self.change[0]) == 1, f"{self.change[0]!r} is not there once"
            source = source.replace(*self.change)
        return self.source_to_code(source.encode(), self.path)


@contextlib.contextmanager
def mutated(mutation: Mutation) -> Iterator[Kind]:
    """Give a tier whose guard is gone. Other modules keep the one that they have."""
    before = {name: sys.modules[name] for name in CHAIN}
    try:
        for name in CHAIN:
            path = before[name].__file__
            change = (mutation.guard, mutation.without) if name == mutation.module else None
            spec = importlib.util.spec_from_loader(name, _Loader(name, path, change))
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        yield sys.modules[CHAIN[-1]].DiskTier
    finally:
        sys.modules.update(before)


MUTATIONS = (
    Mutation(
        "page digest",
        "kvengine.tiers.format",
        "if xxhash.xxh3_128_digest(page[:-DIGEST_BYTES]) != page[-DIGEST_BYTES:]:",
        "if False:",
        lambda kind: bit_flips(kind, 300).well,
    ),
    Mutation(
        "footer's table digest",
        "kvengine.tiers.segments",
        "if table_digest(data) != footer.digest:",
        "if False:",
        lambda kind: bit_flips(kind, 1500).well,
    ),
    Mutation(
        "payload digests",
        "kvengine.tiers.disk",
        """            verify(span)
            return True
        except FrameExpired:""",
        """            return True
        except FrameExpired:""",
        lambda kind: bit_flips(kind, 100).well,
    ),
    Mutation(
        "quarantine",
        "kvengine.tiers.disk",
        """            self._count("corrupt_blocks")
            self._give_up(span.key, place)
""",
        """            self._count("corrupt_blocks")
""",
        lambda kind: bit_flips(kind, 100).well,
    ),
    Mutation(
        "counting what is corrupt",
        "kvengine.tiers.disk",
        """            self._count("corrupt_blocks")
            self._give_up(span.key, place)
""",
        """            self._give_up(span.key, place)
""",
        lambda kind: bit_flips(kind, 100).well,
    ),
    Mutation(
        "slot tied to its place",
        "kvengine.tiers.segments",
        "return found[1:5] == place and found",
        "return found",
        misdirected,
    ),
    Mutation(
        "segment tied to its directory and number",
        "kvengine.tiers.segments",
        "damaged = header is None or header[:2] != (self._uuid, number)",
        "damaged = header is None",
        lambda kind: swapped(kind),
    ),
    Mutation(
        "slot tied to its frame",
        "kvengine.tiers.segments",
        "if found.frame_digest != frame.header_digest(target[: found.frame_bytes]):",
        "if False:",
        spliced,
    ),
    Mutation(
        "sequence of a slot",
        "kvengine.tiers.segments",
        " or found.sequence != sequence:",
        ":",
        stale,
    ),
    Mutation(
        "byte count of a read",
        "kvengine.tiers.segments",
        "if min(got - PAGE_BYTES, len(target)) < want:",
        "if False:",
        short_reads,
    ),
    Mutation(
        "byte count of a write",
        "kvengine.tiers.segments",
        """        self._all(put, PAGE_BYTES + want)
        return header
""",
        """        return header
""",
        lambda kind: io_faults(kind, ("nothing",), stop=True).well,
    ),
    Mutation(
        "generation of a segment used again",
        "kvengine.tiers.disk",
        "return self._folder.renew(victim, generation)",
        "return self._folder.renew(victim, victim.generation)",
        lambda kind: killed(kind).well,
    ),
    Mutation(
        "incarnation of a writer",
        "kvengine.tiers.disk",
        "return self.incarnation << 32 | self._drawn",
        "return self._drawn",
        numbers_are_new,
    ),
    Mutation(
        "two superblocks in turns",
        "kvengine.tiers.segments",
        "return PAGE_BYTES if there[0] is found else 0, found",
        "return 0 if there[0] is found else PAGE_BYTES, found",
        lambda kind: incarnations_rise(kind),
    ),
    Mutation(
        "sync before a block counts",
        "kvengine.tiers.disk",
        """        self._sync_segments([place.segment for place, _ in written])
        for (index, _), good""",
        """        for (index, _), good""",
        lambda kind: power_loss(kind, 400, stop=True).well,
    ),
    Mutation(
        "sync of a new segment's name",
        "kvengine.tiers.segments",
        """            if durable:
                self._files.sync_folder(self._home)
""",
        "",
        lambda kind: power_loss(kind, 400, stop=True).well,
    ),
    Mutation(
        "sync of what is written once more",
        "kvengine.tiers.disk",
        """        if self._durable:
            self._sync_segments([place.segment for _, (place, _) in moved])
""",
        "",
        lambda kind: power_loss(kind, 3000, stop=True).well,
    ),
    Mutation(
        "the later of two copies must be whole",
        "kvengine.tiers.disk",
        "if (later is place) is self._is_whole(later):",
        "if later is place:",
        lambda kind: power_loss(kind, 3000, stop=True).well,
    ),
    Mutation(
        "a sync that fails takes its segment",
        "kvengine.tiers.disk",
        """                self._failed(error)
                self._lose(segment)

    def _settle""",
        """                self._failed(error)

    def _settle""",
        # Which sync is the last of its segment, so that no read finds the loss, is up to the seed.
        lambda kind: all(io_faults(kind, (errno.EIO,), s, stop=True).well for s in range(1, 4)),
    ),
    Mutation(
        "lock of the directory",
        "kvengine.tiers.files",
        "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        lambda kind: one_owner(kind),
    ),
)


def swapped(kind: Kind = DiskTier) -> bool:
    """A segment file under another's name is found at opening."""
    blocks = Blocks(2 * SLOTS)
    disk = directory(kind, blocks, 2 * SLOTS)
    paths = [path for path in disk.names_now if path.suffix == ".seg"]
    one, two = (disk.names_now[path] for path in paths)
    disk.names_now.update({paths[0]: two, paths[1]: one})
    scene = Scene(kind, disk, blocks)
    well = scene.tally.get("corrupt_blocks") == 2
    scene.close()
    return well


def survives(mutation: Mutation) -> bool:
    """Whether the check does not notice that the guard is gone."""
    with mutated(mutation) as kind:
        try:
            return mutation.check(kind)
        except (AssertionError, ValueError, IndexError, KeyError):
            return False
