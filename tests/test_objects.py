"""Engines over a real S3 server, by HTTP on loopback: shared, damaged, killed, misnamed."""

import sys
import time
from collections.abc import Iterator

import pytest

import kvengine
import rig
import servers
from kvengine import ConfigError, Engine
from kvengine.config import Objects
from kvengine.frame import frame_bytes
from kvengine.tiers.objects import ASK_THREADS, ObjectsClient

OF = rig.layout()
FRAME = frame_bytes(OF)
BLOCKS = 6
SOURCE = rig.caches(OF, BLOCKS, 1)
SECRET = "5e" * 32
KEYS = {"objects.key_id": "id", "objects.secret_key": "key", "objects.region": "us-east-1"}


@pytest.fixture(scope="module")
def moto(require) -> Iterator[servers.Moto]:
    require("moto.server")
    with servers.Moto() as server:
        yield server


def open_at(moto: servers.Moto, place: str, query: str = "", **options) -> Engine:
    url = f"mem://?size=4M | s3://blocks/{place}?endpoint={moto.endpoint}{query}"
    options = {"secret": SECRET, "find_s": 5.0} | KEYS | options
    return kvengine.open(url, **options)


def keys_of(engine: Engine, seed: int = 0, blocks: int = BLOCKS):
    return rig.names(engine, OF).keys(rig.prompt(blocks, OF, seed))


def fill(moto: servers.Moto, place: str) -> None:
    with open_at(moto, place) as engine:
        assert rig.save(engine, keys_of(engine), SOURCE).good.all()
        assert engine.flush(rig.WAIT_S)
        assert engine.stats()["s3_blocks"] == BLOCKS


READER = """
import sys, rig, kvengine
of = rig.layout()
with kvengine.open(sys.argv[1], find_s=5.0) as engine:
    keys = rig.names(engine, of).keys(rig.prompt(6, of))
    assert engine.probe(keys) == 6
    assert rig.check_right(engine, keys, rig.caches(of, 6, 1)).all()
    print(engine.stats()["fetched_blocks"])
"""


def test_a_second_process_reuses_what_the_first_computed(moto):
    fill(moto, "second/process")
    url = f"mem://?size=4M | s3://blocks/second/process?endpoint={moto.endpoint}&region=us-east-1"
    cloud = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}
    done = rig.python(READER, url, KVENGINE_SECRET=SECRET, **cloud)
    assert done.stdout == f"{BLOCKS}\n", done.stderr


def test_objects_are_frames_under_the_keys_names(moto):
    fill(moto, "names")
    store = moto.store("names")
    with open_at(moto, "names") as engine:
        keys = keys_of(engine)
        assert store.head(keys.key(3).hex())["size"] == FRAME
        assert bytes(store.get_range(keys.key(3).hex(), start=0, length=4)) == b"KVEF"
    with open_at(moto, "elsewhere") as engine:
        assert engine.probe(keys_of(engine)) == 0


@pytest.mark.parametrize("spoil", ["flip", "cut", "longer", "swapped"])
def test_what_was_spoilt_is_missed_then_saved_again(moto, spoil):
    place = f"spoilt/{spoil}"
    fill(moto, place)
    store = moto.store(place)
    with open_at(moto, place) as engine:
        keys = keys_of(engine)
        assert engine.probe(keys) == BLOCKS
        for index in range(0, BLOCKS, 2):
            name = keys.key(index).hex()
            data = bytearray(store.get(name).bytes())
            data[-9] ^= 1
            other = bytes(store.get(keys.key(1).hex()).bytes())
            changed = {"flip": data, "cut": data[:-1], "longer": data + b"x", "swapped": other}
            store.put(name, bytes(changed[spoil]))
        assert rig.check_right(engine, keys, SOURCE).tolist() == [False, True] * 3
        assert engine.metrics.get("corrupt_blocks", tier="s3") == 3
        assert rig.poll(lambda: engine.probe(keys) == 0)
        assert rig.save(engine, keys, SOURCE).good.all() and engine.flush(rig.WAIT_S)
        engine.squeeze(0)
        assert rig.check_right(engine, keys, SOURCE).all()
        engine.check()


def test_a_long_prompt_is_found_in_windows(moto):
    blocks = 2 * ASK_THREADS + 5
    source = rig.caches(OF, blocks, 2)
    with open_at(moto, "long") as engine:
        keys = keys_of(engine, 2, blocks)
        assert rig.save(engine, keys, source).good.all() and engine.flush(rig.WAIT_S)
        engine.squeeze(0)
        assert engine.probe(keys) == blocks
        moto.store("long").delete(keys.key(ASK_THREADS + 2).hex())
    with open_at(moto, "long") as engine:
        assert engine.probe(keys_of(engine, 2, blocks)) == ASK_THREADS + 2


def test_killed_stopped_and_come_back(require):
    require("moto.server")
    with servers.Moto() as moto, open_at(moto, "away", "&timeout_s=1", find_s=0.3) as engine:
        keys = keys_of(engine)
        rig.save(engine, keys, SOURCE)
        assert engine.flush(rig.WAIT_S)
        engine.squeeze(0)
        moto.pause()
        start = time.monotonic()
        assert not rig.check_right(engine, keys, SOURCE).any()
        for seed in range(10, 20):
            engine.probe(keys_of(engine, seed))
        assert time.monotonic() - start < 15.0
        moto.kill()
        assert rig.save(engine, keys, SOURCE).good.all()
        assert engine.flush(rig.WAIT_S)
        moto.start()

        def saved() -> bool:
            engine.drop(keys)
            engine.probe(keys_of(engine, 99))
            rig.save(engine, keys, SOURCE)
            return engine.flush(rig.WAIT_S) and engine.stats()["s3_blocks"] == BLOCKS

        assert rig.poll(saved)
        engine.squeeze(0)
        assert rig.poll(lambda: engine.probe(keys) == BLOCKS)
        assert rig.check_right(engine, keys, SOURCE).all()
        engine.check()


def test_a_bucket_that_is_not_there(moto):
    url = f"mem://?size=4M | s3://nowhere?endpoint={moto.endpoint}"
    with pytest.raises(ConfigError, match="s3://nowhere names a bucket that is not there: make it"):
        kvengine.open(url, secret=SECRET, **KEYS)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ConfigError, match=r"gs:// needs .*pip install 'kvengine\[s3\]'"):
        kvengine.open("mem://?size=4M | gs://bucket", secret=SECRET)


@pytest.mark.parametrize(
    ("url", "keys"),
    [
        ("gs://bucket/prefix", {}),
        ("az://container/prefix", {"key_id": "account", "secret_key": "a2V5"}),
    ],
)
def test_other_clouds_are_known(url, keys, monkeypatch):
    """No server of theirs is at hand: the store is made, and not asked."""
    monkeypatch.setattr(ObjectsClient, "_greet", lambda self: None)
    client = ObjectsClient(Objects(url=url, timeout_s=0.1, **keys))
    assert client.name == url[:2]
    client.close()


def test_settings_that_a_cloud_does_not_take():
    with pytest.raises(ConfigError, match="gs://b takes no key: set GOOGLE_APPLICATION_CREDENT"):
        ObjectsClient(Objects(url="gs://b", key_id="id"))
    with pytest.raises(ConfigError, match="az://c: .*Account must be specified"):
        ObjectsClient(Objects(url="az://c"))
