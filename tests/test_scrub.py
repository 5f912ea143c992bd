"""Verify and scrub: what they find, what they mend, and how they say it."""

import json
import random
from contextlib import suppress

import numpy as np
import pytest

import faults
import kvengine
import rig
import servers
import test_tiers
from kvengine import ConfigError, DirectoryInUse, cli
from kvengine.tiers.scrub import scrub
from simdisk import SimDisk

HELD = 3 * faults.SLOTS + 2


@pytest.fixture
def blocks() -> faults.Blocks:
    return faults.Blocks(HELD)


def walk(disk: SimDisk, *, mend: bool = False, **options):
    return scrub(faults.HOME, mend=mend, files=disk, **options)


def test_a_whole_directory(blocks):
    disk = faults.directory(faults.DiskTier, blocks, HELD)
    steps = []
    found = walk(disk, progress=lambda done, total: steps.append((done, total)))
    assert found.whole and found.blocks == HELD and found.segments == 4
    assert steps[-1] == (HELD * faults.STRIDE,) * 2


@pytest.mark.parametrize("seed", range(5))
def test_damaged_blocks_are_found_and_given_up(blocks, seed):
    disk = faults.directory(faults.DiskTier, blocks, HELD)
    draw = random.Random(seed)
    path = draw.choice([path for path in disk.names_now if path.suffix == ".seg"])
    one = SimDisk()
    one.names_now = {path: disk.names_now[path]}
    count = faults.damage_slots(one, draw)
    before = {path: file.now.copy() for path, file in disk.names_now.items()}
    found = walk(disk)
    assert found.damaged_blocks == count and not found.whole
    assert found.blocks == HELD - count
    assert all(np.array_equal(file.now, before[p]) for p, file in disk.names_now.items())
    assert walk(disk, mend=True).damaged_blocks == count
    assert walk(disk).whole
    scene = faults.Scene(faults.DiskTier, disk, blocks)
    assert len(scene.held()) == HELD - count and not scene.tally.get("corrupt_blocks")
    assert all(scene.read(index) == blocks.bytes[index] for index in scene.held())
    scene.close()


@pytest.mark.parametrize("seed", range(5))
def test_damaged_pages_are_found_and_mended(blocks, seed):
    disk = faults.directory(faults.DiskTier, blocks, HELD)
    count = faults.damage_fronts(disk, random.Random(seed))
    assert walk(disk).damaged_pages == count
    assert walk(disk, mend=True).damaged_pages == count
    found = walk(disk)
    assert found.whole and found.blocks == HELD


def test_a_rate_is_kept(blocks):
    """By a clock that only sleeping moves."""
    disk = faults.directory(faults.DiskTier, blocks, HELD)
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    found = walk(disk, rate_bytes=faults.STRIDE, clock=lambda: now[0], sleep=sleep)
    assert found.seconds == pytest.approx(HELD)


OF = rig.layout()


@pytest.fixture
def place(tmp_path):
    with kvengine.open(f"mem://?size=4M | file://{tmp_path}/kv?size=64M") as engine:
        keys = rig.names(engine, OF).keys(rig.prompt(6, OF))
        rig.save(engine, keys, rig.caches(OF, 6, 1))
    return tmp_path / "kv"


def test_the_commands(place, capsys):
    assert cli.run(["verify", str(place), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["blocks"], said["damaged blocks"], said["damaged"]) == (6, 0, [])
    (segment,) = (place / "segments").iterdir()
    end = segment.read_bytes().rstrip(b"\0")  # the last payload
    with segment.open("r+b") as file:
        file.seek(len(end) - 1)
        file.write(bytes([end[-1] ^ 1]))
    assert cli.run(["verify", str(place)]) == 1
    out = capsys.readouterr().out
    assert "damaged blocks  1" in out and "slot 5: the bytes of segments [1]" in out
    assert cli.run(["scrub", f"file://{place}", "--rate", "1G"]) == 1
    assert cli.run(["scrub", str(place)]) == 0
    assert cli.run(["verify", str(place)]) == 0


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["verify", "/nonexistent"], "/nonexistent is not a directory"),
        (["scrub", "mem://?size=1G"], "names no directory and no remote store"),
        (["verify", "valkey://127.0.0.1:1?timeout_s=0.1"], "the store does not answer"),
        (["verify", "{}", "--rate", "fast"], "--rate fast: expected bytes a second"),
        (["verify", "{}"], "has no superblock"),
    ],
)
def test_bad_input(command, says, tmp_path, capsys):
    assert cli.run([word.format(tmp_path) for word in command]) == cli.BAD_INPUT
    assert says in capsys.readouterr().err


def test_a_directory_in_use(tmp_path):
    with (
        kvengine.open(f"mem://?size=4M | file://{tmp_path}?size=64M"),
        pytest.raises(DirectoryInUse, match="held by an engine"),
    ):
        scrub(tmp_path, mend=False)
    with pytest.raises(ConfigError):
        scrub(tmp_path / "other", mend=False)


@pytest.fixture(params=["valkey", "cluster", "s3"])
def store(request, require, tmp_path):
    """A remote store: its URL, and how to put a value under a name."""
    if request.param == "s3":
        require("moto.server")
        with servers.Moto() as moto:
            url = f"s3://blocks/here?endpoint={moto.endpoint}&region=us-east-1"
            yield url, moto.store("here").put
        return
    program = require.program("redis-server")
    nodes = 1 if request.param == "valkey" else 2
    started = [servers.Redis(program)] if nodes == 1 else servers.cluster(program, nodes, tmp_path)
    try:

        def put(name: str, value: bytes) -> None:
            import valkey

            for node in started:
                with node.client() as client, suppress(valkey.ResponseError):
                    client.set("k[v]*:" + name, value)
                    return

        url = f"valkey://127.0.0.1:{started[0].port}?prefix=k[v]*:&cluster={nodes - 1}"
        yield url, put
    finally:
        for node in started:
            node.__exit__()


def test_a_remote_store(store, capsys, monkeypatch):
    url, put = store
    if url.startswith("s3://"):
        monkeypatch.setenv("KVENGINE_OBJECTS_KEY_ID", "id")
        monkeypatch.setenv("KVENGINE_OBJECTS_SECRET_KEY", "key")
    secret = {"secret": bytes(range(32))}
    with kvengine.open(f"mem://?size=4M | {url}", **secret) as engine:
        keys = rig.names(engine, OF).keys(rig.prompt(6, OF))
        rig.save(engine, keys, rig.caches(OF, 6, 1))
    assert cli.run(["verify", url, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["blocks"], said["damaged blocks"], said["others"]) == (6, 0, 0)
    bad = [keys.key(index).hex() for index in range(2)]
    put(bad[0], b"x" * 20480)
    put(bad[1], b"y")
    put("ab" * 32, test_tiers.made(7))  # whole, under another's name
    put("not a key", b"1")
    for mend, blocks in (("verify", 4), ("scrub", 4)):
        assert cli.run([mend, url, "--json"]) == 1
        said = json.loads(capsys.readouterr().out)
        assert (said["blocks"], said["damaged blocks"], said["others"]) == (blocks, 3, 1)
        assert all(any(name in line for line in said["damaged"]) for name in [*bad, "ab" * 32])
    assert cli.run(["verify", url, "--json", "--rate", "100M"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["blocks"], said["damaged blocks"], said["others"]) == (4, 0, 1)
