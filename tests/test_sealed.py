"""Engines whose tiers are sealed: nothing of a block is to be read there, keys rotate and end."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import kvengine
import rig
import servers
import test_tiers
from kvengine import ConfigError, cli
from kvengine.config import Disk, Valkey
from kvengine.metrics import Metrics
from kvengine.seal import Sealer
from kvengine.tenants import DataKeys, Tenants
from kvengine.tiers.disk import DiskTier

pytest.importorskip("cryptography")

OF = rig.layout()
SECRET = bytes(range(32))
SOURCE = rig.caches(OF, 6, 1)


def open_(path: Path, query: str = "", **options) -> kvengine.Engine:
    return kvengine.open(f"mem://?size=4M | file://{path}?size=64M&encrypt=1{query}", **options)


def save(engine, seed: int = 0):
    keys = rig.names(engine, OF).keys(rig.prompt(6, OF, seed))
    assert rig.save(engine, keys, SOURCE).good.all()
    assert engine.flush(rig.WAIT_S)
    return keys


def again(engine, seed: int = 0) -> np.ndarray:
    """Which blocks can be read: what is loaded is right."""
    engine.squeeze(0)
    return rig.check_right(engine, rig.names(engine, OF).keys(rig.prompt(6, OF, seed)), SOURCE)


def stored(path: Path) -> bytes:
    return b"".join(each.read_bytes() for each in sorted(path.rglob("*.seg")))


@pytest.mark.parametrize("durable", [0, 1])
def test_a_sealed_disk_holds_nothing_that_can_be_read(tmp_path, durable):
    with open_(tmp_path / "kv", f"&durable={durable}") as engine:
        save(engine)
        assert again(engine).all()
        save(engine)  # what is held is read, opened and not written again
        assert engine.stats()["demoted_blocks"] == 6
    data = stored(tmp_path / "kv")
    for layer in SOURCE:
        for array in layer:
            raw = array.tobytes()
            assert all(raw[at : at + 16] not in data for at in range(0, len(raw), 4096))
    with open_(tmp_path / "kv") as engine:
        assert again(engine).all() and engine.stats()["corrupt_blocks"] == 0


def test_a_key_that_is_rotated_opens_what_it_has_sealed(tmp_path):
    with open_(tmp_path / "kv") as engine:
        save(engine, 1)
        first = engine._tenants.sealing_key()[0]
        assert engine.rotate_key() != first
        save(engine, 2)
    with open_(tmp_path / "kv") as engine:
        assert again(engine, 1).all() and again(engine, 2).all()
        assert engine._tenants.sealing_key()[0] != first


def test_blocks_of_a_dropped_key_are_counted_misses(tmp_path):
    with open_(tmp_path / "kv") as engine:
        save(engine)
        assert engine.drop_keys() == 1
        assert not again(engine).any()
        assert engine.metrics.get("unreadable_blocks", tier="disk") == 6
        assert engine.stats()["corrupt_blocks"] == 0
        save(engine, 2)
        assert again(engine, 2).all()
        save(engine)  # and are saved anew, under a new one
        assert again(engine).all()
        engine.check()


def test_another_secret_opens_nothing(tmp_path):
    with open_(tmp_path / "kv", secret=SECRET) as engine:
        save(engine)
        assert again(engine).all()
        with pytest.raises(ConfigError, match="comes of the secret"):
            engine.rotate_key()
        with pytest.raises(ConfigError, match="comes of the secret"):
            engine.drop_keys()
    data = (tmp_path / "kv" / "tenants.json").read_bytes()
    assert SECRET.hex().encode() not in data and b"data_keys" not in data
    with open_(tmp_path / "kv", secret=bytes(32)) as engine:
        assert not again(engine).any()
    with open_(tmp_path / "kv", secret=SECRET) as engine:
        assert again(engine).all()


@pytest.mark.parametrize("sealed", [False, True])
def test_a_directory_keeps_its_form(tmp_path, sealed):
    how = f"mem://?size=4M | file://{tmp_path}/kv?size=64M&encrypt="
    kvengine.open(how + str(int(sealed))).close()
    says = "holds {} blocks, and disk.encrypt asks for {} ones"
    kinds = ("sealed", "plain") if sealed else ("plain", "sealed")
    with pytest.raises(ConfigError, match=says.format(*kinds)):
        kvengine.open(how + str(int(not sealed)))
    kvengine.open(how + str(int(sealed))).close()


@pytest.fixture
def redis(require):
    with servers.Redis(require.program("redis-server")) as server:
        yield server


def test_engines_share_sealed_blocks_of_a_remote_store(redis, tmp_path):
    """The disk of the one and the store hold the same bytes; the other opens them."""
    remote = f"valkey://127.0.0.1:{redis.port}?encrypt=1"
    with open_(tmp_path / "kv", f" | {remote}", secret=SECRET) as engine:
        keys = save(engine)
        names = [keys.key(index).hex() for index in range(6)]
    data = stored(tmp_path / "kv")
    with redis.client() as client:
        assert all(client.get("kvengine:" + name) in data for name in names)
    with kvengine.open(f"mem://?size=4M | {remote}", secret=SECRET) as other:
        assert again(other).all()
        assert other.stats()["corrupt_blocks"] == 0
    with redis.client() as client:
        client.set("kvengine:" + names[0], client.get("kvengine:" + names[1]))
        value = bytearray(client.get("kvengine:" + names[2]))
        value[-1] ^= 1
        client.set("kvengine:" + names[2], bytes(value))
    with kvengine.open(f"mem://?size=4M | {remote}", secret=SECRET) as other:
        assert again(other).tolist() == [False, True, False, True, True, True]
        assert other.stats()["corrupt_blocks"] == 2


def test_a_value_whose_key_is_not_held_stays_for_others(redis):
    """It may be another's to open: it is a miss, and is not deleted."""
    url = f"mem://?size=4M | valkey://127.0.0.1:{redis.port}?encrypt=1"
    with kvengine.open(url, secret=SECRET) as engine:
        save(engine)
    with kvengine.open(url, secret=SECRET) as engine:
        engine._data_keys.opening = lambda key_id: None
        assert not again(engine).any()
        assert engine.metrics.get("unreadable_blocks", tier="valkey") > 0
    with kvengine.open(url, secret=SECRET) as engine:
        assert again(engine).all()


def form_of(data: bytes, key: bytes) -> bytes:
    """The sealed frame of a key in what is stored."""
    at = data.find(b"KVEF\0")
    while data[at + 24 : at + 56] != key:
        at = data.index(b"KVEF\0", at + 1)
    return data[at : at + 4096 + int.from_bytes(data[at + 16 : at + 24], "little")]


def test_what_is_moved_within_a_sealed_disk_is_not_sealed_again(tmp_path):
    """A segment's wanted blocks are copied as they are, after they have been verified."""
    path = tmp_path / "kv"
    url = f"mem://?size=1M | file://{path}?size=512K&segment=128K&encrypt=1"
    with kvengine.open(url) as engine:
        keys = save(engine)
        forms = [form_of(stored(path), keys.key(index)) for index in range(6)]
        for seed in range(1, 5):
            for index in range(6):
                engine.squeeze(0)
                rig.check_right(engine, keys[index : index + 1], SOURCE, first=index)
            save(engine, seed)
        engine.squeeze(0)
        left = np.flatnonzero(engine.contains(keys)).tolist()
        assert left, "what is read again and again outlives its segment"
        data = stored(path)
        for index in left:
            assert forms[index] in data
            assert rig.check_right(engine, keys[index : index + 1], SOURCE, first=index).all()
        assert engine.stats()["corrupt_blocks"] == 0


def test_verify_and_scrub_with_keys_and_without(tmp_path, capsys, monkeypatch):
    path = tmp_path / "kv"
    with open_(path, secret=SECRET) as engine:
        save(engine)
    for secret, unopened in ((SECRET.hex(), 0), (None, 6)):
        if secret:
            monkeypatch.setenv("KVENGINE_SECRET", secret)
        else:
            monkeypatch.delenv("KVENGINE_SECRET")
        assert cli.run(["verify", str(path), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["blocks"], said["unopened"]) == (6, unopened)
    (segment,) = (path / "segments").iterdir()
    data = bytearray(segment.read_bytes())
    at = data.index(b"KVEF\0")
    data[at + 4096 + 100] ^= 1  # of the ciphertext
    segment.write_bytes(bytes(data))
    assert cli.run(["verify", str(path), "--json"]) == 0, "not to be seen without the key"
    capsys.readouterr()
    monkeypatch.setenv("KVENGINE_SECRET", SECRET.hex())
    assert cli.run(["verify", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["damaged blocks"] == 1
    data[at + 200] ^= 1  # of the header: found by anyone
    segment.write_bytes(bytes(data))
    monkeypatch.delenv("KVENGINE_SECRET")
    assert cli.run(["scrub", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["damaged blocks"] == 1
    assert cli.run(["verify", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == 5


def test_verify_of_a_sealed_remote_store(redis, capsys, monkeypatch):
    url = f"valkey://127.0.0.1:{redis.port}?encrypt=1"
    with kvengine.open(f"mem://?size=4M | {url}", secret=SECRET) as engine:
        keys = save(engine)
    assert cli.run(["verify", url, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["blocks"], said["unopened"]) == (6, 6)
    monkeypatch.setenv("KVENGINE_SECRET", SECRET.hex())
    with redis.client() as client:
        name = "kvengine:" + keys.key(3).hex()
        value = bytearray(client.get(name))
        value[9000] ^= 1
        client.set(name, bytes(value))
    assert cli.run(["scrub", url, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["blocks"], said["unopened"], said["damaged blocks"]) == (5, 0, 1)
    assert cli.run(["verify", url]) == 0


# Keys


def test_data_keys_are_kept_with_the_tenant(tmp_path):
    path = tmp_path / "tenants.json"
    tenants = Tenants(path)
    tenants.add("other")
    first = tenants.sealing_key()
    assert tenants.sealing_key() == first == Tenants(path).sealing_key()
    second = tenants.sealing_key("other")
    assert second[0] != first[0] and second[1] != first[1]
    assert tenants.opening_key(first[0], "other") is None
    assert tenants.opening_key(first[0]) == tenants.opening_key(first[0], "default") == first[1]
    late = Tenants(path)
    made = tenants.rotate_key()
    assert late.opening_key(made) == tenants.sealing_key()[1], "made by another process meanwhile"
    assert tenants.opening_key(first[0]) == first[1]
    assert tenants.drop_keys() == 2 and tenants.drop_keys() == 0
    assert late.opening_key(made) is None, "forgotten everywhere, at once"
    assert tenants.opening_key(first[0]) is None and first[1].hex() not in path.read_text()
    assert Tenants(path).opening_key(second[0], "other") == second[1]
    assert tenants.sealing_key()[0] not in (first[0], made)
    tenants.remove("other")
    assert tenants.opening_key(second[0]) is None


def test_keys_by_command(tmp_path, capsys):
    path = tmp_path / "kv"
    with open_(path) as engine:
        save(engine)
    assert cli.run(["tenants", "rotate", str(path), "default"]) == 0
    number = int(capsys.readouterr().out)
    with open_(path) as engine:
        assert engine._tenants.sealing_key()[0] == number and again(engine).all()
    assert cli.run(["tenants", "shred", str(path), "default"]) == 0
    assert capsys.readouterr().out == "2 keys forgotten\n"
    assert cli.run(["tenants", "shred", str(path), "nobody"]) == cli.BAD_INPUT
    with open_(path) as engine:
        assert not again(engine).any()
        assert engine.metrics.get("unreadable_blocks", tier="disk") > 0


def test_data_keys_are_those_of_the_tenant():
    """An engine opens no other tenant's blocks; who verifies all of a tier does."""
    tenants = Tenants()
    tenants.add("a")
    one, two, all_ = (DataKeys(lambda: tenants, each) for each in ("a", "default", None))
    number, key = one.sealing()
    assert (number, key) == tenants.sealing_key("a") != two.sealing()
    assert one.opening(number) == all_.opening(number) == key and two.opening(number) is None


def test_writes_without_a_key_hold_no_segment(tmp_path):
    """As of a tenant that was removed a moment ago: refused and counted, the next ones go on."""
    tenants = Tenants()
    tenants.add("a")
    seal, metrics = Sealer(DataKeys(lambda: tenants, "a")), Metrics()
    tenants.remove("a")
    data = test_tiers.made(1)
    spans = test_tiers.spans_of([(test_tiers.key_of(1), data)], True)
    tier = DiskTier(tmp_path / "kv", 64 << 20, metrics, lambda keys: None, seal=seal)
    good: list[bool] = []
    tier.write(spans, math.inf, lambda index, whole: good.append(whole))
    segments = tier._segments.values()
    tier._workers.close(rig.WAIT_S)
    assert good == [False] and metrics.get("tier_failures", tier="disk") == 1
    assert [segment.writing for segment in segments] == [0]
    tier.close()


def test_a_given_secret_makes_the_same_key_everywhere():
    one, two = Tenants(None, SECRET), Tenants(None, SECRET)
    number, key = one.sealing_key()
    assert two.sealing_key() == (number, key) and two.opening_key(number, "default") == key
    assert Tenants(None, bytes(32)).opening_key(number) is None
    assert key != SECRET and 1 <= number < 1 << 32


def test_without_the_package(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvengine\[peers\]'"):
        open_(tmp_path / "kv")
    kvengine.open(f"mem://?size=4M | file://{tmp_path}/kv?size=64M").close()


def test_the_setting_is_read_from_urls():
    config = kvengine.Config.load("mem:// | file:///kv?encrypt=1 | valkey://h?encrypt=true")[0]
    assert config.disk == Disk(path="/kv", encrypt=True)
    assert config.valkey == Valkey(host="h", encrypt=True)


def test_large_blocks_come_layer_by_layer(tmp_path):
    """Of a sealed disk as of a plain one: the first layers are there before the last are read."""
    of = rig.layout(layers=24, kv_heads=4, head_dim=128, head_dim_v=128, dtype="float16")
    source, target = rig.caches(of, 4, 1), rig.caches(of, 4)
    url = f"mem://?size=64M | file://{tmp_path}/kv?size=256M&encrypt=1"
    with kvengine.open(url, lossless=False) as engine:
        keys = rig.names(engine, of).keys(rig.prompt(4, of))
        assert rig.save(engine, keys, source).good.all() and engine.flush(rig.WAIT_S)
        engine.squeeze(0)
        disk, asked = engine._tiers[0], []
        read = disk._read_sealed
        disk._read_sealed = lambda span, place: asked.append(span.start) or read(span, place)
        transfer = rig.load(engine, keys, target)
        assert transfer.good.all() and len(set(asked)) > 1
        slots = rig.slots_of(of, range(4))
        assert rig.same(of, target, slots, source, slots)
        # A bit flipped in a later piece is found there.
        engine.squeeze(0)
        (segment,) = (tmp_path / "kv" / "segments").iterdir()
        with segment.open("r+b") as file:
            data = file.read()
            file.seek(data.index(b"KVEF\0") + len(form_of(data, keys.key(0))) - 1)
            file.write(bytes([data[file.tell()] ^ 1]))
        assert rig.check_right(engine, keys, source).sum() == 3
        assert engine.stats()["corrupt_blocks"] == 1
        engine.check()
