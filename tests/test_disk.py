"""The disk tier, by the engine's verbs: what is found again; no damage turns into bytes."""

import contextlib
import errno
import mmap
import os
import random
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvengine
import rig
from kvengine import ConfigError, DirectoryInUse, Engine
from kvengine.frame import frame_bytes
from kvengine.tiers.files import OSFiles
from kvengine.tiers.format import Geometry, SegmentHeader

OF = rig.layout()
FRAME = frame_bytes(OF)
PAGE = 4096
STRIDE = PAGE + FRAME  # of a slot: its header, the frame, no padding
BLOCKS = 6
SOURCE = rig.caches(OF, BLOCKS, 1)
TOKENS = rig.prompt(BLOCKS, OF)
# Each payload ends 128 bytes past a page: the rest of its slot is padding.
ODD = rig.layout(layers=1, head_dim=33, head_dim_v=33)
FILLED_BYTES = Geometry.fitting(STRIDE, 8 << 20).offset(BLOCKS)


def open_at(path: Path, memory: str = "4M", disk: str = "size=64M", **options) -> Engine:
    return kvengine.open(f"mem://?size={memory} | file://{path}?{disk}", **options)


def keys_of(engine: Engine, tokens=TOKENS, of=OF):
    return rig.names(engine, of).keys(tokens)


def segments(path: Path) -> list[Path]:
    return sorted((path / "segments").iterdir())


def geometry(segment: Path) -> Geometry:
    with segment.open("rb") as file:
        return Geometry(*SegmentHeader.read(file.read(PAGE))[3:])


@pytest.fixture
def filled(tmp_path) -> Path:
    """A directory with one prompt, and nobody in it."""
    with open_at(tmp_path) as engine:
        assert rig.save(engine, keys_of(engine), SOURCE).good.all()
    return tmp_path


def flip(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def back(engine: Engine) -> bool:
    """Whether the disk is trusted again, some time after it has failed."""
    return rig.poll(lambda: not engine._tiers[0].away)


def check_survives(engine: Engine, keys, source, lost: int | None = None) -> np.ndarray:
    """What is loaded is right; what is not good is missed next, is saved again, then is right."""
    assert back(engine)
    good = rig.check_right(engine, keys, source)
    if lost is not None:
        assert (~good).sum() == lost
    assert engine.contains(keys)[good].all()
    assert not engine.contains(keys)[: engine.probe(keys) + 1][engine.probe(keys) :].any()
    assert rig.save(engine, keys, source).good.all()
    assert rig.check_right(engine, keys, source).all()
    assert engine.flush(rig.WAIT_S)
    engine.squeeze(0)
    assert rig.check_right(engine, keys, source).all()
    engine.check()
    return good


# Found again


@pytest.mark.parametrize("durable", [0, 1])
def test_reopened_after_a_clean_close(tmp_path, durable):
    with open_at(tmp_path, disk=f"size=64M&durable={durable}") as engine:
        keys = keys_of(engine)
        rig.save(engine, keys, SOURCE)
    for _ in range(2):
        with open_at(tmp_path) as engine:
            assert engine.stats()["tier_blocks"] == BLOCKS
            assert engine.stats()["memory_blocks"] == 0
            keys = keys_of(engine)
            with engine.match(keys) as lease:
                assert (lease.blocks, lease.in_memory) == (BLOCKS, 0)
            assert rig.check_right(engine, keys, SOURCE).all()
            assert rig.save(engine, keys, SOURCE).nbytes == 0
            assert engine.stats()["fetched_blocks"] == BLOCKS
            engine.check()


def test_layouts_of_many_sizes_in_one_directory(tmp_path):
    layouts = [rig.layout(layers=n, head_dim_v=n) for n in range(1, 9)] + [ODD]
    for _ in range(2):
        with open_at(tmp_path, memory="16M") as engine:
            for of in layouts:
                keys, source = keys_of(engine, rig.prompt(3, of), of), rig.caches(of, 3, 7)
                assert rig.save(engine, keys, source).good.all()
            assert engine.flush(rig.WAIT_S)
            engine.squeeze(0)
            for of in layouts:
                keys, source = keys_of(engine, rig.prompt(3, of), of), rig.caches(of, 3, 7)
                assert rig.check_right(engine, keys, source).all()
            engine.check()


def test_without_direct_access(tmp_path, monkeypatch):
    """Where a file system takes no O_DIRECT, all goes through the page cache, and out of it."""
    opened: list[int] = []

    def open_file(path, flags, mode=0o777, opens=os.open):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        opened.append(flags)
        return opens(path, flags, mode)

    monkeypatch.setattr(os, "open", open_file)
    for durable in (0, 1):
        with open_at(tmp_path, disk=f"size=64M&durable={durable}") as engine:
            rig.save(engine, keys_of(engine), SOURCE)
            assert engine.flush(rig.WAIT_S)
            engine.squeeze(0)
            assert rig.check_right(engine, keys_of(engine), SOURCE).all()
            assert engine.stats()["tier_failures"] == 0
    assert opened


def test_a_file_that_is_there_is_not_taken_for_a_new_one(tmp_path):
    files = OSFiles()
    (tmp_path / "there").write_bytes(b"x")
    with pytest.raises(FileExistsError):
        files.open(tmp_path / "there", create=True)
    with pytest.raises(FileNotFoundError):
        files.open(tmp_path / "not there")


def test_dropped_blocks_stay_dropped(filled):
    with open_at(filled) as engine:
        assert engine.drop(keys_of(engine)[2:4]) == 2
    with open_at(filled) as engine:
        keys = keys_of(engine)
        assert engine.contains(keys).tolist() == [True, True, False, False, True, True]
        check_survives(engine, keys, SOURCE)


WRITER = """
import sys, rig, kvengine
of = rig.layout()
engine = kvengine.open(f"mem://?size=2M | file://{sys.argv[1]}?size=256M&segment=1M")
seed = 0
while True:
    keys = rig.names(engine, of).keys(rig.prompt(6, of, seed))
    rig.save(engine, keys, rig.caches(of, 6, seed))
    if seed % 8 == 0:
        assert engine.flush(30)
        print(seed, flush=True)
    seed += 1
"""


@pytest.mark.parametrize("flushes", [1, 4, 9])
def test_reopened_after_kill_9(tmp_path, flushes):
    """Of a process in the midst of writing: all that was flushed is there, nothing is wrong."""
    writer = rig.start(WRITER, tmp_path)
    flushed = -1
    for _ in range(flushes):
        flushed = int(writer.stdout.readline())
    writer.kill()
    writer.communicate()
    with open_at(tmp_path, memory="16M", disk="size=256M&segment=1M") as engine:
        names = rig.names(engine, OF)
        for seed in range(flushed + 9):
            keys = names.keys(rig.prompt(6, OF, seed))
            held = engine.contains(keys)
            assert held.all() or seed > flushed
            good = rig.check_right(engine, keys, rig.caches(OF, 6, seed))
            assert good.all() or seed > flushed
        check_survives(engine, keys, rig.caches(OF, 6, seed))


# One owner


def test_a_directory_has_one_owner(tmp_path):
    with (
        open_at(tmp_path) as engine,
        pytest.raises(DirectoryInUse, match=f"{tmp_path} is held.*a directory of its own"),
    ):
        open_at(tmp_path)
        engine.check()
    code = "import kvengine, sys; kvengine.open(sys.argv[1])"
    with open_at(tmp_path) as engine:
        done = rig.python(code, f"file://{tmp_path}")
        assert done.returncode == 1
        assert f"DirectoryInUse: {tmp_path} is held" in done.stderr
        assert rig.save(engine, keys_of(engine), SOURCE).good.all()
    open_at(tmp_path).close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_text("x"), "cannot be used"),
        (lambda path: (path.mkdir(), (path / "superblock").mkdir()), "cannot be used"),
        (lambda path: (path.mkdir(), (path / "superblock").write_text("y")), "not a kvengine"),
        (lambda path: (path.mkdir(), (path / "superblock").write_bytes(b"z" * PAGE)), "not a kve"),
        (lambda path: (path.mkdir(), (path / "tenants.json").write_text("{")), "damaged.*restore"),
    ],
    ids=["file", "folder", "short superblock", "strange superblock", "tenants"],
)
def test_what_is_no_directory_of_ours(tmp_path, make, says):
    make(tmp_path / "there")
    with pytest.raises(ConfigError, match=f"(?s){tmp_path}/there.*{says}"):
        open_at(tmp_path / "there")


@pytest.mark.parametrize("at", [*range(0, 10), 20, 31, PAGE - 16, PAGE - 1])
def test_a_damaged_superblock(filled, at):
    """It stands there twice: one damaged page is found and written anew, two are refused."""
    for page in (0, PAGE):
        flip(filled / "superblock", page + at)
        with open_at(filled) as engine:
            assert engine.probe(keys_of(engine)) == BLOCKS
            assert engine.stats()["corrupt_blocks"] == 1
        with open_at(filled) as engine:
            assert engine.stats()["corrupt_blocks"] == 0
    for page in (0, PAGE):
        flip(filled / "superblock", page + at)
    with pytest.raises(ConfigError, match=f"{filled}/superblock.*(directory|version)"):
        open_at(filled)
    flip(filled / "superblock", at)
    with open_at(filled) as engine:
        assert engine.probe(keys_of(engine)) == BLOCKS


# Size


def used(path: Path) -> int:
    return sum(each.stat().st_blocks * 512 for each in path.rglob("*") if each.is_file())


def test_old_segments_go(tmp_path):
    """The oldest blocks are missed, the newest are there, and the directory keeps to its size."""
    size = 2 << 20
    with open_at(tmp_path, memory="512K", disk="size=2M&segment=256K") as engine:
        names = rig.names(engine, OF)
        prompts = [names.keys(rig.prompt(BLOCKS, OF, seed)) for seed in range(30)]
        sources = [rig.caches(OF, BLOCKS, seed) for seed in range(30)]
        for keys, source in zip(prompts, sources, strict=True):
            rig.save(engine, keys, source)
            assert engine.flush(rig.WAIT_S)
            assert used(tmp_path) <= size + 3 * PAGE  # superblock and tenants
        engine.squeeze(0)
        rig.poll(lambda: engine.stats()["tier_blocks"] * FRAME <= size)
        assert engine.metrics.get("evicted_blocks", reason="disk size") > 0
        stats = engine.stats()
        assert stats["tier_bytes"] <= size and stats["tier_blocks"] * FRAME <= size
        assert engine.probe(prompts[0]) == 0 and engine.probe(prompts[-1]) == BLOCKS
        for keys, source in zip(prompts, sources, strict=True):
            held = engine.contains(keys)
            good = rig.check_right(engine, keys, source)
            assert good.sum() == held.argmin() or held.all() and good.all()
        engine.check()
    with open_at(tmp_path, disk="size=1M&segment=256K") as engine:
        check_survives(engine, keys_of(engine), SOURCE)
        assert used(tmp_path) <= (1 << 20) + 3 * PAGE


def test_a_disk_too_small_for_one_frame(tmp_path):
    big = rig.layout(head_dim=512, head_dim_v=512)
    with open_at(tmp_path, disk="size=64K") as engine:
        keys, source = keys_of(engine, of=big), rig.caches(big, BLOCKS, 1)
        assert rig.save(engine, keys, source).good.all()
        assert engine.flush(rig.WAIT_S) and engine.stats()["tier_blocks"] == 0
        assert rig.check_right(engine, keys, source).all()
        engine.check()


# Full and failing disks


def goes_on_from_memory(engine: Engine, seed: int = 3, *, fails: bool = True) -> None:
    """Saves are held in memory and loaded from there; the tier's failure is counted."""
    keys, source = keys_of(engine, rig.prompt(BLOCKS, OF, seed)), rig.caches(OF, BLOCKS, seed)
    before = engine.stats()["tier_failures"]
    assert rig.save(engine, keys, source).good.all()
    assert engine.flush(rig.WAIT_S)
    assert (engine.stats()["tier_failures"] > before) is fails
    assert engine.probe(keys) == BLOCKS
    assert rig.check_right(engine, keys, source).all()
    engine.check()


@contextlib.contextmanager
def small_disk(require, path: Path) -> Iterator[Path]:
    mount = require.program("mount")
    path.mkdir()
    command = [mount, "-t", "tmpfs", "-o", "size=320k", "kvengine-test", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        require.missing(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run([require.program("umount"), str(path)], check=True)


def test_a_full_disk(tmp_path, require):
    """What the disk has given already is used again: the newest blocks are there."""
    with small_disk(require, tmp_path / "small") as path:
        with open_at(path, disk="size=64M&segment=256K") as engine:
            rig.save(engine, keys_of(engine), SOURCE)
            assert engine.flush(rig.WAIT_S)
            assert engine.stats()["tier_blocks"] == BLOCKS
            goes_on_from_memory(engine, 3)
            goes_on_from_memory(engine, 4, fails=False)
        with open_at(path, disk="size=64M&segment=256K") as engine:
            assert engine.stats()["tier_blocks"] > 0
            for seed in (1, 3, 4):
                keys = keys_of(engine, TOKENS if seed == 1 else rig.prompt(BLOCKS, OF, seed))
                rig.check_right(engine, keys, rig.caches(OF, BLOCKS, seed))
            engine.check()


def test_a_limit_on_file_sizes(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_at(tmp_path) as engine:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, before[1]))
        try:
            goes_on_from_memory(engine)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        check_survives(engine, keys_of(engine), SOURCE)


def fails(number: int) -> Callable[..., int]:
    def call(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


def short(handle: int, buffers: list, offset: int, write=os.pwritev) -> int:
    """Write half, as a full disk or a signal may have it."""
    flat = b"".join(bytes(each) for each in buffers)
    half = len(flat) // 2 // PAGE * PAGE
    if not half:
        return 0
    aligned = mmap.mmap(-1, half)  # as O_DIRECT wants it
    aligned[:] = flat[:half]
    return write(handle, [aligned], offset)


WRITES = [
    ("ENOSPC", "pwritev", fails(errno.ENOSPC)),
    ("EIO", "pwritev", fails(errno.EIO)),
    ("nothing", "pwritev", lambda *_: 0),
    ("no room", "posix_fallocate", fails(errno.ENOSPC)),
]


@pytest.mark.parametrize(("call", "fake"), [c[1:] for c in WRITES], ids=[c[0] for c in WRITES])
def test_writes_that_fail(tmp_path, monkeypatch, call, fake):
    with open_at(tmp_path) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fake)
            goes_on_from_memory(engine)
            assert engine.stats()["tier_blocks"] == 0
        check_survives(engine, keys_of(engine), SOURCE)
    with open_at(tmp_path) as engine:
        assert rig.check_right(engine, keys_of(engine), SOURCE).all()


def test_short_writes(tmp_path, monkeypatch):
    """Half a frame behind a whole slot header is no block, now or after reopening."""
    with open_at(tmp_path) as engine:
        rig.save(engine, keys_of(engine, rig.prompt(1, OF, 9)), rig.caches(OF, 1, 9))
        assert engine.flush(rig.WAIT_S)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", short)
            goes_on_from_memory(engine)
        assert engine.stats()["tier_blocks"] == 1
    with open_at(tmp_path) as engine:
        keys = keys_of(engine, rig.prompt(BLOCKS, OF, 3))
        check_survives(engine, keys, rig.caches(OF, BLOCKS, 3), lost=BLOCKS)


def test_syncs_that_fail(tmp_path, monkeypatch):
    """In durable mode a write whose sync failed does not count, now or after reopening."""
    with open_at(tmp_path, disk="size=64M&durable=1") as engine:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fails(errno.EIO))
            goes_on_from_memory(engine)
            assert engine.stats()["tier_blocks"] == 0
        check_survives(engine, keys_of(engine), SOURCE)


READS = [
    ("nothing", lambda *_: 0),
    ("half", lambda h, b, at, read=os.preadv: read(h, b[:1], at) if len(b) > 1 else 0),
]


@pytest.mark.parametrize("fake", [c[1] for c in READS], ids=[c[0] for c in READS])
def test_reads_that_give_less(filled, monkeypatch, fake):
    """Not good, counted, and no hit any more: a later save may put the block elsewhere."""
    with open_at(filled) as engine:
        keys = keys_of(engine)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fake)
            assert not rig.check_right(engine, keys, SOURCE).any()
        assert engine.stats()["corrupt_blocks"] == BLOCKS
        assert engine.probe(keys) == 0
        check_survives(engine, keys, SOURCE, lost=BLOCKS)


def test_reads_that_fail(filled, monkeypatch):
    """After some failures the disk is left alone; what was not tried is a hit when it is back."""
    with open_at(filled) as engine:
        keys = keys_of(engine)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fails(errno.EIO))
            assert not rig.check_right(engine, keys, SOURCE).any()
            failures = engine.stats()["tier_failures"]
            assert 3 <= failures < BLOCKS
            assert engine.probe(keys) == 0 and not engine.contains(keys).any()
            assert rig.save(engine, keys, SOURCE).nbytes < sum(a.nbytes for p in SOURCE for a in p)
        assert back(engine)
        engine.squeeze(0)
        assert 0 < engine.contains(keys).sum() < BLOCKS
        check_survives(engine, keys, SOURCE)


def test_reads_that_fail_at_opening(filled, monkeypatch):
    with monkeypatch.context() as patch:
        calls: list[int] = []

        def sometimes(handle: int, buffers: list, at: int, read=os.preadv) -> int:
            calls.append(at)
            if len(calls) == 3:
                raise OSError(errno.EIO, "a bad sector")
            return read(handle, buffers, at)

        patch.setattr(os, "preadv", sometimes)
        engine = open_at(filled)
    with engine:
        assert engine.stats()["tier_failures"] + engine.stats()["corrupt_blocks"] >= 1
        check_survives(engine, keys_of(engine), SOURCE)


# Never a wrong byte


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    """Directories to be copied, one for each layout; never changed."""
    home = tmp_path_factory.mktemp("golden")
    for name, of in (("even", OF), ("odd", ODD)):
        with open_at(home / name) as engine:
            rig.save(engine, keys_of(engine, of=of), rig.caches(of, BLOCKS, 1))
        (segment,) = segments(home / name)
        os.truncate(segment, geometry(segment).offset(BLOCKS))
    return home


@contextlib.contextmanager
def copied(source: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(source, Path(folder) / "copy"))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bit_flipped_on_disk(golden, data):
    """Anywhere in a segment file, while it is open or before: right bytes or none."""
    name = data.draw(st.sampled_from(["even", "odd"]))
    of = {"even": OF, "odd": ODD}[name]
    stride = PAGE + -(-frame_bytes(of) // PAGE) * PAGE
    slot = data.draw(st.integers(0, BLOCKS - 1))
    within = data.draw(
        st.integers(0, 200)  # slot header
        | st.integers(PAGE - 16, PAGE - 1)  # its digest
        | st.integers(PAGE, PAGE + 350)  # frame header
        | st.integers(2 * PAGE, stride - 1)  # payload, padding
        | st.integers(0, stride - 1)
    )
    early = data.draw(st.booleans())
    source = rig.caches(of, BLOCKS, 1)
    bit = data.draw(st.integers(0, 7))
    with copied(golden / name) as path:
        (segment,) = segments(path)
        at = geometry(segment).offset(slot) + within
        if early:
            flip(segment, at, bit)
        with open_at(path) as engine:
            if not early:
                flip(segment, at, bit)
            keys = keys_of(engine, of=of)
            good = check_survives(engine, keys, source)
            assert good.sum() >= (slot if early else BLOCKS - 1)
            detected = engine.stats()["corrupt_blocks"]
            harmless = within >= PAGE + frame_bytes(of)  # padding behind the frame
            assert detected == (0 if harmless else 1)
        with open_at(path) as engine:
            assert rig.check_right(engine, keys_of(engine, of=of), source).all()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, 2 * PAGE) | st.integers(0, FILLED_BYTES - 1), early=st.booleans())
def test_a_truncated_segment(golden, length, early):
    with copied(golden / "even") as path:
        (segment,) = segments(path)
        if early:
            os.truncate(segment, length)
        with open_at(path) as engine:
            if not early:
                os.truncate(segment, length)
            keys = keys_of(engine)
            whole = max(0, (length - Geometry.fitting(STRIDE, 8 << 20).slots_at) // STRIDE)
            good = check_survives(engine, keys, SOURCE)
            assert good.sum() == whole  # two threads write: slots need not be in order
        with open_at(path) as engine:
            assert rig.check_right(engine, keys_of(engine), SOURCE).all()


def test_a_segment_deleted_while_open(filled):
    with open_at(filled) as engine:
        (segment,) = segments(filled)
        segment.unlink()
        check_survives(engine, keys_of(engine), SOURCE, lost=BLOCKS)
        more = keys_of(engine, rig.prompt(BLOCKS, OF, 5))
        rig.save(engine, more, rig.caches(OF, BLOCKS, 5))
    with open_at(filled) as engine:
        check_survives(engine, keys_of(engine), SOURCE, lost=0)


def test_a_segment_deleted_before_opening(filled):
    segments(filled)[0].unlink()
    with open_at(filled) as engine:
        check_survives(engine, keys_of(engine), SOURCE, lost=BLOCKS)


@pytest.fixture
def several(tmp_path) -> Path:
    """A directory with a prompt in each of three segments and more."""
    with open_at(tmp_path, disk="size=4M&segment=160K") as engine:
        for seed in range(3):
            keys = keys_of(engine, rig.prompt(BLOCKS, OF, seed))
            rig.save(engine, keys, rig.caches(OF, BLOCKS, seed))
            assert engine.flush(rig.WAIT_S)
    assert len(segments(tmp_path)) == 3
    return tmp_path


def survivors(path: Path) -> list[int]:
    """Blocks loaded right of each prompt of `several`; then all are saved again and loaded."""
    with open_at(path, disk="size=4M&segment=160K") as engine:
        counts = []
        for seed in range(3):
            keys, source = (
                keys_of(engine, rig.prompt(BLOCKS, OF, seed)),
                rig.caches(OF, BLOCKS, seed),
            )
            counts.append(int(check_survives(engine, keys, source).sum()))
    with open_at(path, disk="size=4M&segment=160K") as engine:
        for seed in range(3):
            keys, source = (
                keys_of(engine, rig.prompt(BLOCKS, OF, seed)),
                rig.caches(OF, BLOCKS, seed),
            )
            assert rig.check_right(engine, keys, source).all()
        assert used(path) <= (4 << 20) + 3 * PAGE
    return counts


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("at", [0, 8, 20, 33, 40, 60, PAGE - 1])
def test_a_damaged_segment_header(several, which, at):
    """Its footer says the same; where both are damaged, the segment is lost."""
    flip(segments(several)[which], at)
    assert survivors(several) == [BLOCKS] * 3
    flip(segments(several)[which], PAGE + at)
    assert survivors(several) == [0 if seed == which else BLOCKS for seed in range(3)]


def test_swapped_segments(several):
    one, two, _ = segments(several)
    spare = several / "spare"
    one.rename(spare)
    two.rename(one)
    spare.rename(two)
    assert survivors(several) == [0, 0, BLOCKS]


@pytest.mark.parametrize("opened", [False, True])
def test_a_misdirected_write(filled, opened):
    """A slot copied over another, with its slot header or without."""
    for lead in (0, PAGE):
        with copied(filled) as path:
            (segment,) = segments(path)
            engine = open_at(path) if opened else None
            offset = geometry(segment).offset
            slot = segment.read_bytes()[offset(1) + lead : offset(2)]
            with segment.open("r+b") as file:
                file.seek(offset(3) + lead)
                file.write(slot)
            with engine or open_at(path) as engine:
                good = check_survives(engine, keys_of(engine), SOURCE, lost=None)
                assert (~good).sum() >= 1
                assert engine.stats()["corrupt_blocks"] == 1


def test_segments_of_another_directory(several, tmp_path_factory):
    """The same secret and prompts, another UUID: a copy of a file is not a copy of the store."""
    other = tmp_path_factory.mktemp("other")
    shutil.copy(several / "tenants.json", other / "tenants.json")
    (other / "segments").mkdir()
    for path in segments(several):
        shutil.copy(path, other / "segments")
    assert survivors(other) == [0, 0, 0]
    assert survivors(several) == [BLOCKS] * 3


def test_strange_files_among_segments(several):
    (several / "segments" / "00000009.seg").mkdir()
    (several / "segments" / "notes.txt").write_text("hello")
    (several / "segments" / "00000008.seg").write_bytes(b"")
    (several / "segments" / "00000007.seg").symlink_to("/nonexistent")
    with open_at(several, disk="size=4M&segment=160K") as engine:
        for seed in range(3):
            keys = keys_of(engine, rig.prompt(BLOCKS, OF, seed))
            assert rig.check_right(engine, keys, rig.caches(OF, BLOCKS, seed)).all()
        for seed in range(3, 9):
            keys = keys_of(engine, rig.prompt(BLOCKS, OF, seed))
            rig.save(engine, keys, rig.caches(OF, BLOCKS, seed))
            assert engine.flush(rig.WAIT_S)
        assert engine.stats()["tier_blocks"] >= 7 * BLOCKS


@pytest.mark.parametrize("seed", range(8))
def test_noise_in_a_directory(several, seed):
    """Pages of noise in segment files: never a wrong byte, and saves make all of it whole again."""
    draw = random.Random(seed)
    for _ in range(10):
        path = draw.choice(segments(several))
        with path.open("r+b") as file:
            file.seek(draw.randrange(path.stat().st_size // PAGE) * PAGE)
            file.write(draw.randbytes(PAGE * draw.randrange(1, 4)))
    with open_at(several, disk="size=4M&segment=160K") as engine:
        for each in range(3):
            keys = keys_of(engine, rig.prompt(BLOCKS, OF, each))
            source = rig.caches(OF, BLOCKS, each)
            # Behind a miss, damage shows only once the miss has been filled.
            for _ in range(BLOCKS + 1):
                if rig.check_right(engine, keys, source).all():
                    break
                assert rig.save(engine, keys, source).good.all()
                assert engine.flush(rig.WAIT_S)
                engine.squeeze(0)
            else:
                pytest.fail("damage does not heal")
        engine.check()
