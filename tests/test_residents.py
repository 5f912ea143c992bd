"""Tenants of one daemon: nobody finds, slows down or pushes out what is another's."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import kvengine
import rig
from kvengine import cli
from kvengine.arena import PAGE_BYTES
from kvengine.config import Config
from kvengine.engine import Engine
from kvengine.errors import AwayError, ConfigError, KVEngineError
from kvengine.residents import Residents, label
from kvengine.server import Server
from kvengine.tenants import DEFAULT, Quota, Tenants, sign

ONE = rig.layout()
NBYTES = 4 << 20
TAKES = 40  # blocks of ONE, less than a tenant's half


@contextmanager
def serving(folder: Path, url: str, tenants: Tenants) -> Iterator[Server]:
    server = Server(Config.load(url)[0], folder / "kv.sock", 0, tenants)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def client(folder: Path, tenant: str = DEFAULT, key: bytes = b"") -> Engine:
    more = f"&tenant={tenant}" if tenant != DEFAULT else ""
    options = {"daemon.key": key.hex()} if key else {}
    config = Config.load(f"unix://{folder}/kv.sock?timeout_s=20{more}", options=options)[0]
    return kvengine.open(config)


def save(engine: Engine, seed: int = 0, blocks: int = 8, model: str = "m"):
    keys = rig.names(engine, ONE, model=model).keys(rig.prompt(blocks, ONE, seed))
    rig.save(engine, keys, rig.caches(ONE, blocks, seed=seed))
    return keys


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    return Tenants(tmp_path / "tenants.json")


def test_two_tenants_see_nothing_of_each_other(tmp_path, tenants):
    a, b = tenants.add("a"), tenants.add("b")
    with serving(tmp_path, f"mem://?size={NBYTES}", tenants) as server:
        with client(tmp_path, "a", a) as one, client(tmp_path, "b", b) as two:
            assert one.probe(save(one)) == 8
            mine = rig.names(one, ONE).keys(rig.prompt(8, ONE))
            other = rig.names(two, ONE).keys(rig.prompt(8, ONE))
            assert not set(rig_keys(mine)) & set(rig_keys(other)), "keys of another's secret"
            assert two.probe(other) == 0 and two.stats()["memory_blocks"] == 0
            save(two, seed=1)
            right = rig.caches(ONE, 8, seed=0)
            assert rig.check_right(one, mine, right).all()
        for wrong in (b"", b, os.urandom(32)):
            with pytest.raises(KVEngineError, match="not served"):
                rig.names(client(tmp_path, "a", wrong), ONE)
        text = server.metrics().decode()
        assert f'tenant="{label("a")}"' in text and 'tenant="a"' not in text
        assert text.count("# HELP kvengine_saved_blocks_total") == 1


def rig_keys(keys) -> list[bytes]:
    return [keys.key(index) for index in range(len(keys))]


def test_a_ticket_of_a_gateway_opens_its_tenants(tmp_path, tenants):
    a = tenants.add("a")
    front = tenants.add("front", gateway=True, serves=("a",))
    with serving(tmp_path, f"mem://?size={NBYTES}", tenants):
        with client(tmp_path, "a", a) as one:
            keys = save(one)
        with client(tmp_path, "a", sign(front, "a", time.time() + 100)) as two:
            assert two.probe(rig.names(two, ONE).keys(rig.prompt(8, ONE))) == len(keys)
        with pytest.raises(KVEngineError, match="not served"):
            rig.names(client(tmp_path, "a", sign(front, "a", time.time() - 1)), ONE)


def test_everybody_reads_what_is_public_and_nobody_else_writes_it(tmp_path, tenants):
    key, other = tenants.add("shared", public=True), tenants.add("other")
    with serving(tmp_path, f"mem://?size={NBYTES}", tenants):
        with client(tmp_path, "shared", key) as owner:
            save(owner)
        with client(tmp_path, "shared", other) as reader:
            keys = rig.names(reader, ONE).keys(rig.prompt(8, ONE))
            assert rig.check_right(reader, keys, rig.caches(ONE, 8, seed=0)).all()
            more = rig.names(reader, ONE).keys(rig.prompt(8, ONE, seed=1))
            assert not rig.save(reader, more, rig.caches(ONE, 8, seed=1)).good.any()
            assert reader.probe(more) == 0
            assert reader.drop(keys) == reader.squeeze(0) == reader.pin(keys, hard=True) == 0
            with pytest.raises(AwayError, match="dropped nothing"):
                reader.drop_all()
            assert reader.probe(keys) == 8


def test_an_epoch_is_fenced_for_all_processes_at_once(tmp_path, tenants, capsys):
    with serving(tmp_path, f"mem://?size={NBYTES}", tenants):
        with client(tmp_path) as one:
            old, kept = save(one), save(one, model="n")
            assert one.probe(old) == one.probe(kept) == 8
            assert cli.run(["epoch", "bump", str(tmp_path), DEFAULT, "--model", "m"]) == 0
            assert one.probe(old) == 0 and one.probe(kept) == 8
            assert not rig.save(one, old, rig.caches(ONE, 8, seed=0)).good.any()
            fresh = rig.names(one, ONE).keys(rig.prompt(8, ONE))
            assert one.probe(fresh) == 0
            assert one.probe(save(one)) == 8
    capsys.readouterr()


def test_a_tenant_comes_and_goes_while_the_daemon_runs(tmp_path, tenants):
    url = f"mem://?size={NBYTES} | file://{tmp_path}/disk?size=64M"
    with serving(tmp_path, url, tenants):
        with client(tmp_path) as one:
            keys = save(one)
            a = Tenants(tmp_path / "tenants.json").add("a")
            place = tmp_path / "disk" / "tenant.a"
            assert rig.poll(place.exists)
            assert rig.poll(lambda: is_let_in(tmp_path, a))
            with client(tmp_path, "a", a) as two:
                theirs = save(two, seed=3)
                assert two.probe(theirs) == 8 and two.flush()
                Tenants(tmp_path / "tenants.json").remove("a")
                assert rig.poll(lambda: not place.exists())
                assert two.probe(theirs) == 0
            assert not is_let_in(tmp_path, a)
            assert one.probe(keys) == 8


def test_a_name_that_is_given_anew_is_another_tenant(residents, tenants):
    """Whoever was let in as the one before is not as the one after, however soon that comes."""
    before = residents.engines()["a"]
    keys = save(before)
    assert before.probe(keys) == 8 and residents.gone() == []
    tenants.remove("a")
    tenants.add("a")
    assert residents.gone() == ["a"]
    residents.balance()
    after = residents.engines()["a"]
    assert residents.gone() == [] and before.probe(keys) == 0
    assert residents.descriptors(before, True) == []
    handles = residents.descriptors(after, True)
    assert len(handles) == 2
    for handle in handles:
        os.close(handle)
    theirs = save(after)
    assert after.probe(theirs) == 8 and not after.contains(keys).any()


def test_a_tenant_that_cannot_be_opened_keeps_no_other_out(tmp_path, tenants):
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "tenant.a").write_bytes(b"no directory")
    residents = Residents(Config.load(f"mem://?size={NBYTES} | file://{disk}?size=64M")[0], tenants)
    tenants.add("a")
    tenants.add("b")
    try:
        with pytest.raises(ConfigError, match=r"tenant\.a cannot be used"):
            residents.balance()
        assert sorted(residents.engines()) == ["b", DEFAULT]
        assert min(each.limit_bytes for each in residents.residents()) > 0, "memory is shared out"
        (disk / "tenant.a").unlink()
        residents.balance()
        assert sorted(residents.engines()) == ["a", "b", DEFAULT]
    finally:
        residents.close()


def is_let_in(folder: Path, key: bytes) -> bool:
    try:
        with client(folder, "a", key) as found:
            rig.names(found, ONE)
            return True
    except KVEngineError:
        return False


# Memory


def fill(engine: Engine, seeds: range) -> None:
    for seed in seeds:
        save(engine, seed=seed, blocks=4)


def held(residents: Residents) -> dict[str, int]:
    return {name: engine.memory_bytes() for name, engine in residents.engines().items()}


@pytest.fixture
def residents(tenants: Tenants) -> Iterator[Residents]:
    tenants.add("a", quota=Quota(reserved_bytes=NBYTES // 4))
    tenants.add("b", quota=Quota(weight=2.0))
    found = Residents(Config(memory_bytes=NBYTES), tenants)
    found.balance()
    yield found
    found.close()


def test_memory_goes_where_it_is_used_and_never_beyond_what_there_is(residents):
    engines = residents.engines()
    for step in range(12):
        fill(engines["b"], range(100 * step, 100 * step + 40))
        residents.balance()
        assert sum(held(residents).values()) <= NBYTES
        assert sum(each.limit_bytes for each in residents.residents()) <= NBYTES
    alone = held(residents)["b"]
    assert alone > NBYTES * 0.6, "what nobody uses is lent"
    for step in range(12):
        for name in ("a", "b", DEFAULT):
            fill(engines[name], range(5000 + 100 * step, 5000 + 100 * step + 40))
        residents.balance()
        assert sum(held(residents).values()) <= NBYTES
    shared_out = held(residents)
    assert shared_out["a"] >= NBYTES // 4 * 0.9
    assert shared_out["b"] < alone
    assert shared_out["b"] > 1.4 * shared_out[DEFAULT], "by weight"


def test_a_flood_takes_nothing_of_what_another_has_reserved(residents):
    engines = residents.engines()
    quota = NBYTES // 4
    each = engines["a"].store.frame_bytes(rig.names(engines["a"], ONE).number)
    blocks = int(quota * 0.9) // (-(-each // PAGE_BYTES) * PAGE_BYTES) // 4 * 4
    mine = [save(engines["a"], seed=seed, blocks=4) for seed in range(blocks // 4)]
    for step in range(10):
        fill(engines["b"], range(1000 + 100 * step, 1000 + 100 * step + 50))
        fill(engines[DEFAULT], range(9000 + 100 * step, 9000 + 100 * step + 50))
        residents.balance()
        assert [engines["a"].probe(keys) for keys in mine] == [4] * len(mine)


def test_a_quota_is_the_most_that_is_taken_and_changes_at_once(residents, tenants):
    engines = residents.engines()
    tenants.set_quota("b", Quota(maximum_bytes=NBYTES // 8))
    residents.balance()
    fill(engines["b"], range(100))
    assert held(residents)["b"] <= NBYTES // 8
    tenants.set_quota("b", Quota())
    for step in range(8):
        fill(engines["b"], range(1000 + 100 * step, 1000 + 100 * step + 40))
        residents.balance()
    assert held(residents)["b"] > NBYTES // 4


def test_leased_blocks_stay_when_memory_is_to_move(residents, tenants):
    engines = residents.engines()
    keys = save(engines["b"], blocks=16)
    lease = engines["b"].match(keys)
    before = held(residents)["b"]
    tenants.set_quota("b", Quota(maximum_bytes=PAGE_BYTES))
    residents.balance()
    fill(engines[DEFAULT], range(200))
    assert held(residents)["b"] == before and engines["b"].probe(keys) == 16
    assert sum(held(residents).values()) <= NBYTES
    lease.release()
    residents.balance()
    assert held(residents)["b"] == 0


def test_rates_are_held(tmp_path, tenants):
    tenants.set_quota(DEFAULT, Quota(lookups_per_s=4.0))
    with serving(tmp_path, f"mem://?size={NBYTES}", tenants):
        with client(tmp_path) as one:
            keys = save(one)
            found = [one.probe(keys) for _ in range(20)]
            assert found[0] == 8 and 0 in found, "too many are misses"
            tenants.set_quota(DEFAULT, Quota())
            assert rig.poll(lambda: one.probe(keys) == 8)
            assert [one.probe(keys) for _ in range(20)] == [8] * 20
