"""Faults of disks and processes, few of each: `python -m bench faults` does the same in full."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

import faults
import test_tiers
from kvengine.seal import Sealer
from simdisk import Faulty, SimDisk

CHECKS = [
    faults.misdirected,
    faults.swapped,
    faults.spliced,
    faults.short_reads,
    faults.stale,
    faults.numbers_are_new,
    faults.incarnations_rise,
    faults.one_owner,
]


def test_a_sealed_tier_is_as_safe(require):
    """Power loss, ends in the midst of writing, and calls that fail, over encrypted blocks."""
    require("cryptography")
    seal = Sealer(test_tiers.DataKeys())

    def kind(*given, **named):
        return faults.DiskTier(*given, seal=seal, **named)

    for found in (
        faults.power_loss(kind, 60),
        faults.killed(kind, 6),
        faults.io_faults(kind, step=25),
    ):
        assert found.well and found.acked, found.notes


@pytest.mark.parametrize("durable", [True, False])
def test_a_tier_on_a_simulated_disk(durable):
    blocks = faults.Blocks(12)
    disk = SimDisk()
    scene = faults.Scene(faults.DiskTier, disk, blocks, durable=durable)
    scene.write(range(12))
    assert scene.acked == scene.held() == set(range(12))
    assert all(scene.read(index) == blocks.bytes[index] for index in range(12))
    scene.close()
    again = faults.Scene(faults.DiskTier, disk, blocks)
    assert all(again.read(index) == blocks.bytes[index] for index in range(12))
    again.close()


def test_what_was_never_synced_may_be_lost():
    """The simulated disk does lose things: without durable mode, promises are broken."""
    found = faults.Found()
    for seed in range(20):
        blocks, disk = faults.Blocks(4), SimDisk()
        scene = faults.Scene(faults.DiskTier, disk, blocks, durable=False)
        scene.write(range(4))
        dice = faults.np.random.default_rng(seed)
        faults.inspect(found, faults.DiskTier, disk.crash(dice), blocks, scene.acked, "")
        scene.tier.detach()
    assert found.lost > 20 and not found.wrong


def test_a_promise_for_what_an_earlier_process_left():
    """What a process wrote without a sync, and the next is given again, is synced by that."""
    found = faults.Found()
    for seed in range(10):
        blocks, disk = faults.Blocks(4), SimDisk()
        dead = faults.Scene(faults.DiskTier, disk, blocks, durable=False)
        dead.write(range(4))
        dead.tier.detach()
        scene = faults.Scene(faults.DiskTier, disk, blocks, durable=True)
        scene.write(range(4))
        assert scene.acked == set(range(4))
        dice = faults.np.random.default_rng(seed)
        faults.inspect(found, faults.DiskTier, disk.crash(dice), blocks, scene.acked, "")
        scene.tier.detach()
    assert not found.lost and not found.wrong


def test_power_loss():
    found = faults.power_loss(states=1200)
    assert found.well, found.notes
    assert found.acked > 5 * found.count


def test_a_process_that_dies_between_calls():
    found = faults.killed(runs=10)
    assert found.well, found.notes


def test_kill_9(tmp_path):
    found = faults.kill_9(tmp_path / "disk", 10)
    assert found.well, found.notes
    assert found.acked


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC, errno.EINTR, "short", "nothing"])
def test_calls_that_fail(fault):
    found = faults.io_faults(faults=(fault,), step=7)
    assert found.well, found.notes
    assert found.count > 20


def test_bit_flips():
    found = faults.bit_flips(flips=2000)
    assert found.well, found.notes


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_guards(check):
    assert check()


@pytest.mark.parametrize("mutation", faults.MUTATIONS, ids=lambda m: m.name)
def test_without_a_guard_its_check_fails(mutation):
    assert not faults.survives(mutation)


def test_a_failed_sync_is_not_tried_again():
    """Its segment goes, with what was promised of it; the next table has a segment of its own."""
    blocks, disk = faults.Blocks(8), SimDisk()
    files = Faulty(disk)
    scene = faults.Scene(faults.DiskTier, files, blocks)
    scene.write([0, 1])
    files.at = len(files.calls) + 2  # two frames are written, then synced
    scene.write([2, 3])
    assert files.calls[files.at] == "sync"
    assert scene.acked == scene.held() == set()
    scene.write([4, 5])
    assert scene.acked == scene.held() == {4, 5}
    scene.close()


def test_a_failing_disk_is_left_alone_until_a_trial_goes_well():
    blocks, disk, now = faults.Blocks(8), SimDisk(), [0.0]
    files = Faulty(disk)
    scene = faults.Scene(faults.DiskTier, files, blocks, clock=lambda: now[0])
    scene.write(range(6))
    files.at, files.then = len(files.calls), 1 << 30
    assert [scene.read(index) for index in range(6)] == [None] * 6
    assert scene.tier.away and len(scene.held()) == 3
    calls = len(files.calls)
    scene.write([6])
    assert len(files.calls) == calls and scene.acked == {3, 4, 5}
    now[0] += 0.3  # the pause is over, and the trial fails
    assert scene.tier.away and len(files.calls) == calls + 1
    now[0] += 0.3
    assert scene.tier.away and len(files.calls) == calls + 1
    files.then, files.at = 0, -1
    now[0] += 1
    assert not scene.tier.away
    assert [scene.read(index) for index in (3, 4, 5)] == blocks.bytes[3:6]
    scene.write([0, 6])
    assert scene.held() == {0, 3, 4, 5, 6}
    scene.close()


def test_a_full_segment_is_used_again():
    """Names of files do not grow, and what was read since it was written outlives its segment."""
    blocks, disk = faults.Blocks(60), SimDisk()
    scene = faults.Scene(faults.DiskTier, disk, blocks)
    for index in range(60):
        scene.write([index])
        assert scene.read(0) == blocks.bytes[0]
    names = [path.name for path in disk.names_now if path.suffix == ".seg"]
    assert names == [f"0000000{n}.seg" for n in (1, 2, 3, 4)]
    assert scene.held() >= {0, *range(60 - 3 * faults.SLOTS + 3, 60)}
    assert 1 not in scene.held()
    assert scene.tier.count == len(scene.held()) == len(scene.acked)
    assert scene.tier.nbytes == scene.tier.count * faults.FRAME
    scene.close()


def test_more_segments_than_open_files(tmp_path):
    from kvengine.tiers.files import Handles, OSFiles

    handles = Handles(OSFiles(), 4)
    for number in range(10):
        with handles.of(tmp_path / str(number), create=True):
            assert len(handles._users) <= 5
    with handles.of(tmp_path / "0") as one, handles.of(tmp_path / "1") as two:
        assert one != two
        handles.forget(tmp_path / "0")
        with handles.of(tmp_path / "0") as other:
            assert other != one
    handles.close()


def test_the_bench_has_a_row_for_each(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "bench", "faults", "--share", "0.002", "--json", str(out)]
    subprocess.run(command, cwd=Path(faults.__file__).parent.parent, check=True)
    rows = {(row["case"], row["metric"]): row["value"] for row in json.loads(out.read_text())}
    for case in ("power loss states", "kill -9 cycles", "io faults"):
        assert rows[case, "wrong_bytes"] == 0 and rows[case, "count"] >= 1
    assert rows["bit flips", "found_fraction"] == rows["mutations", "killed_fraction"] == 1
