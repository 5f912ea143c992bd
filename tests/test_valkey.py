"""Engines over a real server of the Redis protocol: shared, damaged, killed, stopped, full."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

import kvengine
import rig
import servers
from kvengine import ConfigError, Engine
from kvengine.frame import frame_bytes
from kvengine.retention import Retention

OF = rig.layout()
FRAME = frame_bytes(OF)
BLOCKS = 6
SOURCE = rig.caches(OF, BLOCKS, 1)
SECRET = "5e" * 32
BIG = rig.layout(layers=4, kv_heads=8, head_dim=64, head_dim_v=64)  # 512 KiB of payload


@pytest.fixture(scope="module")
def shared(require) -> Iterator[servers.Redis]:
    with servers.Redis(require.program("redis-server")) as redis:
        yield redis


@pytest.fixture
def redis(shared) -> servers.Redis:
    """A server that all tests of this file share, emptied."""
    with shared.client() as client:
        client.flushall()
    return shared


@pytest.fixture
def own(require) -> Iterator[servers.Redis]:
    """A server that the test may kill or stop."""
    with servers.Redis(require.program("redis-server")) as redis:
        yield redis


def open_at(redis: servers.Redis, query: str = "", memory: str = "4M", **options) -> Engine:
    url = f"mem://?size={memory} | valkey://127.0.0.1:{redis.port}?timeout_s=0.5{query}"
    return kvengine.open(url, **({"secret": SECRET, "find_s": 0.2} | options))


def keys_of(engine: Engine, seed: int = 0, of=OF, blocks: int = BLOCKS):
    return rig.names(engine, of).keys(rig.prompt(blocks, of, seed))


def fill(redis: servers.Redis, query: str = "") -> None:
    with open_at(redis, query) as engine:
        assert rig.save(engine, keys_of(engine), SOURCE).good.all()
        assert engine.flush(rig.WAIT_S)
        assert engine.stats()["valkey_blocks"] == BLOCKS


def names_in(redis: servers.Redis, prefix: str = "kvengine:") -> list[bytes]:
    with redis.client() as client:
        return sorted(client.keys(prefix + "*"))


def seconds(call) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


READER = """
import sys, rig, kvengine
of = rig.layout()
with kvengine.open(sys.argv[1]) as engine:
    keys = rig.names(engine, of).keys(rig.prompt(6, of))
    assert engine.probe(keys) == 6
    assert rig.check_right(engine, keys, rig.caches(of, 6, 1)).all()
    print(engine.stats()["fetched_blocks"])
"""


def test_a_second_process_reuses_what_the_first_computed(redis):
    fill(redis)
    url = f"mem://?size=4M | redis://127.0.0.1:{redis.port}/0"
    done = rig.python(READER, url, KVENGINE_SECRET=SECRET)
    assert done.stdout == f"{BLOCKS}\n", done.stderr


def test_another_secret_finds_nothing(redis):
    fill(redis)
    with open_at(redis, secret="77" * 32) as engine:
        assert engine.probe(keys_of(engine)) == 0


def test_names_and_values(redis):
    fill(redis, "&prefix=here/")
    with open_at(redis, "&prefix=here/") as engine, redis.client() as client:
        keys = keys_of(engine)
        names = [f"here/{keys.key(index).hex()}".encode() for index in range(BLOCKS)]
        assert names_in(redis, "") == sorted(names)
        assert client.strlen(names[0]) == FRAME and client.ttl(names[0]) == -1
        assert client.getrange(names[0], 0, 3) == b"KVEF"
    with open_at(redis) as engine:
        assert engine.probe(keys_of(engine)) == 0


def test_ttl_is_passed_on_and_what_expires_is_a_miss(redis):
    fill(redis, "&ttl_s=1000")
    with redis.client() as client, open_at(redis) as engine:
        assert all(990 < client.ttl(name) <= 1000 for name in names_in(redis))
        keys = keys_of(engine)
        assert engine.probe(keys) == BLOCKS
        for index in (1, 2):
            client.pexpire(f"kvengine:{keys.key(index).hex()}", 1)
        assert rig.poll(lambda: len(names_in(redis)) == BLOCKS - 2)
        assert rig.check_right(engine, keys, SOURCE).tolist() == [True, *[False] * 2, *[True] * 3]
        assert engine.probe(keys) == 1
        assert engine.stats()["corrupt_blocks"] == 0
        engine.check()


def test_a_life_of_a_block_goes_with_it(redis):
    """It expires there by itself, whoever asks; the shorter of both lives counts."""
    with open_at(redis, "&ttl_s=500") as engine, redis.client() as client:
        keys = keys_of(engine)
        asked = [Retention(ttl_s=100, last_token=16), Retention(ttl_s=900, first_token=32)]
        rig.save(engine, keys, SOURCE, retention=asked)
        assert engine.flush(rig.WAIT_S)
        lives = [client.ttl(f"kvengine:{keys.key(at).hex()}") for at in range(BLOCKS)]
        assert 98 <= lives[0] <= 101 and all(498 <= life <= 500 for life in lives[1:])


@pytest.mark.parametrize("spoil", ["flip", "cut", "longer", "swapped", "a list"])
def test_what_was_spoilt_is_missed_then_saved_again(redis, spoil):
    fill(redis)
    with redis.client() as client, open_at(redis) as engine:
        keys = keys_of(engine)
        assert engine.probe(keys) == BLOCKS
        for index in range(0, BLOCKS, 2):
            name = f"kvengine:{keys.key(index).hex()}"
            if spoil == "flip":
                client.setrange(name, FRAME - 100 - index, b"\x00\x01\x02\x03")
            elif spoil == "cut":
                client.set(name, client.getrange(name, 0, FRAME - 2))
            elif spoil == "longer":
                client.append(name, b"x" * 100_000)
            elif spoil == "swapped":
                client.set(name, client.get(f"kvengine:{keys.key(1).hex()}"))
            else:
                client.delete(name)
                client.rpush(name, "x")
        good = rig.check_right(engine, keys, SOURCE)
        assert good.tolist() == [False, True] * 3
        assert engine.metrics.get("corrupt_blocks", tier="valkey") == 3
        assert rig.poll(lambda: len(names_in(redis)) == 3), "what is spoilt is deleted there"
        assert engine.probe(keys) == 0
        assert rig.save(engine, keys, SOURCE).good.all() and engine.flush(rig.WAIT_S)
        engine.squeeze(0)
        assert rig.check_right(engine, keys, SOURCE).all()
        engine.check()


def test_disk_before_valkey_and_each_is_enough(redis, tmp_path):
    url = f"mem://?size=4M | file://{tmp_path}?size=64M | valkey://127.0.0.1:{redis.port}"
    with kvengine.open(url, secret=SECRET) as engine:
        keys = keys_of(engine)
        rig.save(engine, keys, SOURCE)
        assert engine.flush(rig.WAIT_S)
        assert engine.stats()["disk_blocks"] == engine.stats()["valkey_blocks"] == BLOCKS
        engine.squeeze(0)
        assert rig.check_right(engine, keys, SOURCE).all()
        assert engine.metrics.get("fetched_blocks", tier="disk") == BLOCKS
    with redis.client() as client:
        client.flushall()
    with kvengine.open(url, secret=SECRET) as engine:
        assert rig.check_right(engine, keys_of(engine), SOURCE).all()


def test_killed_and_come_back(own):
    with open_at(own) as engine:
        keys = keys_of(engine)
        rig.save(engine, keys, SOURCE)
        assert engine.flush(rig.WAIT_S)
        engine.squeeze(0)
        own.kill()
        assert seconds(lambda: engine.probe(keys)) < 1.0
        assert not rig.check_right(engine, keys, SOURCE).any()
        for _ in range(5):
            engine.probe(keys_of(engine, 5))
        assert seconds(lambda: [engine.probe(keys_of(engine, n)) for n in range(20)]) < 1.0
        assert rig.save(engine, keys, SOURCE).good.all()
        assert engine.flush(rig.WAIT_S), "what cannot be written is given up"
        assert rig.check_right(engine, keys, SOURCE).all()
        own.start()
        assert rig.poll(lambda: (engine.probe(keys_of(engine, 6)), saved(engine, 7))[1])
        engine.squeeze(0)
        again = keys_of(engine, 7)
        assert rig.check_right(engine, again, rig.caches(OF, BLOCKS, 7)).all()
        engine.check()


def test_dropped_is_gone_at_once_and_deleted_when_the_server_is_back(own):
    fill(own)
    with open_at(own) as engine:
        keys = keys_of(engine)
        assert engine.probe(keys) == BLOCKS
        engine.drop(keys[4:])
        assert engine.probe(keys) == 4
        own.pause()
        engine.drop(keys[2:])
        own.go_on()
        assert rig.poll(lambda: engine.probe(keys) == 2 and len(names_in(own)) == 2)
        engine.check()


def saved(engine: Engine, seed: int) -> bool:
    """Save a prompt anew; whether the server has it."""
    keys = keys_of(engine, seed)
    engine.drop(keys)
    rig.save(engine, keys, rig.caches(OF, BLOCKS, seed))
    assert engine.flush(rig.WAIT_S)
    return engine.stats()["valkey_blocks"] == BLOCKS


def test_killed_while_blocks_are_read_and_written(own):
    with open_at(own, memory="64M") as engine:
        source = rig.caches(BIG, 24, 3)
        keys = keys_of(engine, 3, BIG, 24)
        rig.save(engine, keys, source)
        assert engine.flush(rig.WAIT_S)
        for delay in (0.0, 0.002, 0.005):
            engine.squeeze(0)
            assert rig.poll(lambda: engine.probe(keys) == 24)
            target = rig.caches(BIG, 24)
            with engine.match(keys) as lease:
                assert lease.blocks == 24
                transfer = engine.load(lease, target, np.arange(24))
                more = engine.save(keys_of(engine, 4, BIG, 24), source, np.arange(24))
            time.sleep(delay)
            own.kill()
            assert transfer.wait(rig.WAIT_S) and more.wait(rig.WAIT_S)
            for block in np.flatnonzero(transfer.good).tolist():
                at = rig.slots_of(BIG, [block])
                assert rig.same(BIG, target, at, source, at)
            assert engine.flush(rig.WAIT_S)
            engine.check()
            own.start()
            assert rig.poll(lambda: (engine.probe(keys), refilled(engine, keys, source))[1])


def refilled(engine: Engine, keys, source) -> bool:
    engine.drop(keys)
    rig.save(engine, keys, source)
    assert engine.flush(rig.WAIT_S)
    return engine.stats()["valkey_blocks"] >= len(keys)


def test_stopped_server_costs_its_timeout_a_few_times_then_nothing(own):
    with open_at(own) as engine:
        keys = keys_of(engine)
        rig.save(engine, keys, SOURCE)
        assert engine.flush(rig.WAIT_S)
        engine.squeeze(0)
        assert engine.probe(keys) == BLOCKS
        own.pause()
        assert seconds(lambda: rig.check_right(engine, keys, SOURCE)) < 3.0
        assert seconds(lambda: [engine.probe(keys_of(engine, n)) for n in range(50)]) < 3.0
        quick = seconds(lambda: [engine.probe(keys_of(engine, 50 + n)) for n in range(20)])
        assert quick < 0.5, "the breaker is open: no one waits"
        assert rig.save(engine, keys, SOURCE).good.all()
        assert engine.flush(rig.WAIT_S)
        own.go_on()
        assert rig.poll(lambda: (engine.probe(keys_of(engine, 99)), saved(engine, 8))[1])
        engine.check()


def test_closing_over_a_stopped_server_ends(own):
    engine = open_at(own)
    rig.save(engine, keys_of(engine), SOURCE)
    assert engine.flush(rig.WAIT_S)
    own.pause()
    rig.save(engine, keys_of(engine, 2), SOURCE)
    assert seconds(engine.close) < 10.0


def test_opened_before_the_server_is_there(require):
    port = servers.free_port()
    url = f"mem://?size=4M | valkey://127.0.0.1:{port}?timeout_s=0.5"
    with kvengine.open(url, secret=SECRET) as engine:
        assert engine.probe(keys_of(engine)) == 0
        assert rig.save(engine, keys_of(engine), SOURCE).good.all() and engine.flush(rig.WAIT_S)
        with servers.Redis(require.program("redis-server"), port=port):
            assert rig.poll(lambda: (engine.probe(keys_of(engine, 1)), saved(engine, 9))[1])


def test_a_full_server_refuses_and_is_still_read(require):
    arguments = ("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    with servers.Redis(require.program("redis-server"), *arguments) as redis:
        with open_at(redis, memory="16M") as engine:
            for seed in range(30):
                source = rig.caches(OF, BLOCKS, seed)
                assert rig.save(engine, keys_of(engine, seed), source).good.all()
            assert engine.flush(rig.WAIT_S)
            held = engine.stats()["valkey_blocks"]
            assert 0 < held < 30 * BLOCKS and engine.stats()["tier_failures"] > 0
            engine.squeeze(0)
            right = 0
            for seed in range(30):
                source = rig.caches(OF, BLOCKS, seed)
                right += rig.check_right(engine, keys_of(engine, seed), source).sum()
            assert right >= held - BLOCKS
            engine.check()


def test_what_the_server_evicts_is_missed(require):
    arguments = ("--maxmemory", "3mb", "--maxmemory-policy", "allkeys-lru")
    with servers.Redis(require.program("redis-server"), *arguments) as redis:
        with open_at(redis, memory="16M") as engine:
            for seed in range(30):
                rig.save(engine, keys_of(engine, seed), rig.caches(OF, BLOCKS, seed))
            assert engine.flush(rig.WAIT_S)
            assert engine.stats()["demoted_blocks"] == 30 * BLOCKS
            engine.squeeze(0)
            assert engine.stats()["blocks"] == 0
            right = 0
            for seed in range(30):
                source = rig.caches(OF, BLOCKS, seed)
                right += rig.check_right(engine, keys_of(engine, seed), source).sum()
            assert 0 < right < 30 * BLOCKS and engine.stats()["corrupt_blocks"] == 0
            engine.check()


def test_passwords(require):
    program = require.program("redis-server")
    with servers.Redis(program, "--requirepass", "Geheim") as redis:
        at = f"127.0.0.1:{redis.port}"
        for url in (f"valkey://{at}", f"valkey://:wrong@{at}", f"valkey://me:wrong@{at}"):
            with pytest.raises(ConfigError) as caught:
                kvengine.open(f"mem://?size=4M | {url}", secret=SECRET)
            assert f"{at} refuses the user or password" in str(caught.value)
            assert "KVENGINE_VALKEY_PASSWORD" in str(caught.value)
            assert "wrong" not in str(caught.value).replace("WRONGPASS", "")
        for options in ({}, {"valkey.user": "default"}):
            url = f"mem://?size=4M | valkey://{at}"
            options |= {"secret": SECRET, "valkey.password": "Geheim"}
            with kvengine.open(url, **options) as engine:
                assert rig.poll(lambda e=engine: saved(e, 1))


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "valkey", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvengine\[valkey\]'"):
        kvengine.open("mem://?size=4M | valkey://127.0.0.1:1", secret=SECRET)


def test_a_forked_child_leaves_the_parents_connections_alone(redis):
    fill(redis)
    with open_at(redis) as engine:
        keys = keys_of(engine)
        assert engine.probe(keys) == BLOCKS
        child = os.fork()
        if child == 0:
            missed = engine.probe(keys) == 0
            engine.close()
            os._exit(0 if missed else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert rig.check_right(engine, keys, SOURCE).all()
        assert engine.metrics.get("tier_failures") == 0


def test_tls(require, tmp_path):
    openssl = require.program("openssl")
    make = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True)
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    port = servers.free_port()
    arguments = ["--tls-port", str(port), "--tls-cert-file", cert, "--tls-key-file", key]
    arguments += ["--tls-ca-cert-file", cert, "--tls-auth-clients", "no"]
    with servers.Redis(require.program("redis-server"), *arguments):
        url = f"mem://?size=4M | valkeys://127.0.0.1:{port}"
        code = (
            "import sys, rig, kvengine; of = rig.layout()\n"
            "engine = kvengine.open(sys.argv[1])\n"
            "keys = rig.names(engine, of).keys(rig.prompt(6, of))\n"
            "rig.save(engine, keys, rig.caches(of, 6, 1)); engine.flush(30); engine.squeeze(0)\n"
            "good = rig.check_right(engine, keys, rig.caches(of, 6, 1)); engine.close()\n"
            "print(good.sum())"
        )
        trusting = rig.python(code, url, KVENGINE_SECRET=SECRET, SSL_CERT_FILE=cert)
        assert trusting.stdout == "6\n", trusting.stderr
        wary = rig.python(code, url, KVENGINE_SECRET=SECRET)
        assert wary.stdout == "0\n", wary.stderr
