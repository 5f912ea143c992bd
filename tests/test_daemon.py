"""The daemon and its clients, as processes: what one saves another loads, and nobody wedges."""

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvengine
import rig
from kvengine.codec import Raw
from kvengine.frame import expires_of
from kvengine.peer import messages as m
from kvengine.peer.channel import Channel

ONE = rig.layout()


class Daemon:
    """`kvengine serve` as a process of its own."""

    def __init__(self, folder: Path, url: str = "mem://?size=4M", *more: str) -> None:
        self.socket = folder / "kv.sock"
        self.url = f"unix://{self.socket}?timeout_s=20"  # the machine may be busy
        self._command = [sys.executable, "-m", "kvengine.cli", "serve", url]
        self._command += ["--socket", str(self.socket), "--http", "0", *more]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        said = self.process.stdout.readline()
        assert said.startswith("serving unix://"), said + self.process.stderr.read()
        self.http = said.split()[-1]

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        _, errors = self.process.communicate(timeout=30)
        assert not errors, errors
        return self.process.returncode

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.http + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@contextlib.contextmanager
def closing(found: Daemon) -> Iterator[Daemon]:
    try:
        yield found
    finally:
        if found.process.poll() is None:
            assert found.stop() == 0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with closing(Daemon(tmp_path)) as found:
        yield found


SAVES = """
import sys, time, rig, kvengine
url, first, count, what = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
of = rig.layout()
engine = kvengine.open(url)
keys = rig.names(engine, of).keys(rig.prompt(first + count, of))[first:]
if what == "reserves":  # and never says what became of it
    made = engine._proxy.reserve(keys)
    assert len(made) == count
    print("reserved", flush=True)
    time.sleep(1000)
assert rig.save(engine, keys, rig.caches(of, count, seed=first + 1)).good.all()
if what == "leases":
    lease = engine.match(keys)
    assert lease.blocks == count
    print(lease.token.hex(), flush=True)
    time.sleep(1000)
engine.close()
"""


@contextlib.contextmanager
def client(daemon: Daemon, *how: object) -> Iterator[subprocess.Popen]:
    """Run SAVES, which says a line once it holds something."""
    process = rig.start(SAVES, daemon.url, *how)
    try:
        said = process.stdout.readline().strip()
        assert said, process.stderr.read()
        process.said = said
        yield process
    finally:
        process.kill()
        process.communicate()


def keys_of(engine, count: int, first: int = 0):
    return rig.names(engine, ONE).keys(rig.prompt(first + count, ONE))[first:]


def at_rest(engine) -> bool:
    """Whether nobody holds anything, but what the daemon itself keeps."""
    stats = engine.stats()
    return not (stats["leases"] or stats["reservations"] or stats["quarantined_blocks"])


def test_what_one_process_saves_another_loads(daemon):
    done = rig.python(SAVES, daemon.url, 0, 8, "saves")
    assert done.returncode == 0, done.stderr
    with kvengine.open(daemon.url) as engine:
        keys = keys_of(engine, 8)
        assert engine.probe(keys) == 8 and engine.contains(keys).all()
        assert rig.check_right(engine, keys, rig.caches(ONE, 8, seed=1)).all()
        stats = engine.stats()
        assert (stats["saved_blocks"], stats["memory_blocks"], stats["leases"]) == (8, 8, 0)
        assert engine.drop(keys[6:]) == 2 and engine.probe(keys) == 6
        engine.check()
        assert engine.drop_all() == 1 and engine.probe(keys) == 0
        assert engine.probe(keys_of(engine, 8)) == 0
        assert daemon.get("/livez") == (200, "ok\n") == daemon.get("/readyz")
        saved = 'kvengine_saved_blocks_total{tenant="default"} 8.0'
        assert saved in daemon.get("/metrics")[1]
        assert daemon.get("/other")[0] == 404


def test_memory_is_shared_and_stays_as_large_as_it_is(daemon):
    with kvengine.open(daemon.url) as engine:
        keys = keys_of(engine, 2)
        rig.save(engine, keys, rig.caches(ONE, 2, seed=1))
        line = Channel(str(daemon.socket), 20.0)
        hello = m.Hello(1, m.VERSION, m.VERSION, "", b"", False)
        _, (slots, words) = line.ask_with(hello, descriptors=True)
        try:
            for fd in (slots, words):
                with pytest.raises(OSError):
                    os.ftruncate(fd, 4096)
                with pytest.raises(OSError):
                    os.ftruncate(fd, 1 << 30)
                with pytest.raises(PermissionError):
                    mmap.mmap(fd, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            for fd in (slots, words):
                os.close(fd)
            line.close()
        # Whoever saves may write to all of its tenant's memory: what is scribbled on is a miss.
        lease = engine.match(keys)
        _, places, _ = engine._proxy.pin(lease, 0, 2)
        engine._proxy.unpin(lease.ids)
        engine._proxy.arena.view(int(places[1]), 8192)[5000] ^= 1
        lease.release()
        assert rig.check_right(engine, keys, rig.caches(ONE, 2, seed=1)).tolist() == [True, False]
        assert rig.poll(lambda: engine.probe(keys) == 1)
        assert engine.stats()["corrupt_blocks"] == 1


def test_a_killed_client_leaves_nothing_behind(daemon):
    with kvengine.open(daemon.url) as engine:
        for what in ("reserves", "leases"):
            with client(daemon, 0, 4, what) as process:
                assert not at_rest(engine)
                assert engine.probe(keys_of(engine, 4)) == (4 if what == "leases" else 0)
                process.kill()
                assert rig.poll(lambda: at_rest(engine))
        fds = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
        for _ in range(3):
            with client(daemon, 0, 4, "leases") as process:
                process.kill()
        assert rig.poll(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/fd")) == fds)
        assert rig.check_right(engine, keys_of(engine, 4), rig.caches(ONE, 4, seed=1)).all()


def test_a_stopped_client_wedges_nobody(tmp_path):
    with closing(Daemon(tmp_path, "mem://?size=4M&reservation_s=0.2&lease_s=0.2")) as daemon:
        with kvengine.open(daemon.url) as engine, client(daemon, 0, 4, "reserves") as process:
            process.send_signal(signal.SIGSTOP)
            keys = keys_of(engine, 4)
            assert rig.poll(lambda: engine.stats()["quarantined_blocks"] == 4)
            source = rig.caches(ONE, 4, seed=7)
            assert rig.save(engine, keys, source).good.all()  # its keys are free, its slots are not
            assert rig.check_right(engine, keys, source).all()
            assert engine.stats()["quarantined_blocks"] == 4
            process.send_signal(signal.SIGKILL)
            assert rig.poll(lambda: at_rest(engine))


def test_a_lease_is_used_by_another_process(daemon):
    with kvengine.open(daemon.url) as engine, client(daemon, 0, 4, "leases") as process:
        space = rig.names(engine, ONE)
        target = rig.caches(ONE, 4)
        with engine.adopt(bytes.fromhex(process.said), space) as lease:
            process.kill()
            assert lease.blocks == 4 and lease.keys.data == keys_of(engine, 4).data
            assert engine.load(lease, target, np.arange(4)).wait(rig.WAIT_S)
        slots = rig.slots_of(ONE, range(4))
        assert rig.same(ONE, target, slots, rig.caches(ONE, 4, seed=1), slots)
        assert engine.adopt(bytes(16), space) is None


def test_a_slow_client_is_let_go(daemon):
    with kvengine.open(daemon.url) as engine:
        table = keys_of(engine, 4).data * 4096
        line = socket.socket(socket.AF_UNIX)
        line.connect(str(daemon.socket))
        line.settimeout(20)
        coder = m.Coder()
        line.sendall(coder.frame(m.Hello(1, 1, 1, "", b"", False)))
        _, fds, _, _ = socket.recv_fds(line, 1 << 16, 4)
        for fd in fds:
            os.close(fd)
        named = engine._named[0].message
        line.sendall(coder.frame(m.Open(2, named.identity, named.layout, named.smaller)))
        said = coder.answer(line.recv(1 << 16)[4:])
        # It asks again and again, and reads no answer.
        ask = coder.frame(m.Contains(3, said.numbers[0], table, 0, bytes(32)))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(2000):
                line.sendall(ask)
        line.close()
        assert engine.probe(keys_of(engine, 4)) == 0  # and others are answered
        for nonsense in (b"\xff" * 64, b"\4\0\0\0oops", b""):
            line = socket.socket(socket.AF_UNIX)
            line.connect(str(daemon.socket))
            line.sendall(nonsense)
            if nonsense:
                assert line.recv(64) == b""
            line.close()
        assert at_rest(engine)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_daemon_comes_back_with_what_its_tiers_hold(tmp_path, how):
    url = f"mem://?size=4M | file://{tmp_path}/disk?size=16M&durable=1"
    with closing(Daemon(tmp_path, url)) as daemon, kvengine.open(daemon.url) as engine:
        keys, source = keys_of(engine, 8), rig.caches(ONE, 8, seed=1)
        rig.save(engine, keys, source)
        assert engine.flush(rig.WAIT_S)
        lease = engine.match(keys)
        daemon.stop(how)
        assert rig.poll(lambda: engine.away)
        assert engine.probe(keys) == 0 and not engine.match(keys).blocks and engine.stats() == {}
        assert not rig.save(engine, keys, source).good.any()
        assert engine.load(lease, rig.caches(ONE, 8), np.arange(8)).error == "refused"
        with pytest.raises(kvengine.AwayError):
            rig.names(engine, ONE)
        daemon.start()
        assert rig.poll(lambda: engine.probe(keys) == 8)  # it came back by itself
        assert not engine.load(lease, rig.caches(ONE, 8), np.arange(8)).good.any()
        lease.release()
        assert engine.stats()["memory_blocks"] == 0
        assert rig.check_right(engine, keys, source).all()  # fetched by the daemon
        assert engine.stats()["memory_blocks"] == 8 and engine.stats()["fetched_blocks"] == 8
        assert rig.poll(lambda: at_rest(engine))


def test_who_comes_too_late_or_second_is_told(daemon, tmp_path):
    command = [sys.executable, "-m", "kvengine.cli", "serve", "mem://", "--socket"]
    second = subprocess.run([*command, daemon.socket], capture_output=True, text=True)
    assert second.returncode == 2 and "another daemon serves" in second.stderr
    nowhere = subprocess.run([*command, tmp_path / "no" / "kv"], capture_output=True, text=True)
    assert nowhere.returncode == 2 and "cannot be made" in nowhere.stderr
    with pytest.raises(kvengine.AwayError, match="kvengine serve"):
        kvengine.open(f"unix://{tmp_path}/other.sock")
    with pytest.raises(kvengine.AwayError, match="refuses: tenant 'other' is not served"):
        kvengine.open(daemon.url + "&tenant=other")
    assert daemon.stop() == 0 and not daemon.socket.exists()


def test_a_forked_child_has_no_daemon(daemon):
    code = (
        "import os, sys, rig, kvengine\n"
        "with kvengine.open(sys.argv[1]) as engine:\n"
        "    of = rig.layout()\n"
        "    keys = rig.names(engine, of).keys(rig.prompt(4, of))\n"
        "    rig.save(engine, keys, rig.caches(of, 4, seed=1))\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os._exit(engine.probe(keys))\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "    assert engine.probe(keys) == 4\n"
    )
    done = rig.python(code, daemon.url)
    assert done.returncode == 0, done.stderr


def test_whoever_matches_after_a_save_is_done_hits(daemon, monkeypatch):
    encode, draw = Raw.encode, np.random.default_rng(0)

    def late(*how):
        time.sleep(draw.uniform(0, 0.01))  # a device that copies when it pleases
        encode(*how)

    monkeypatch.setattr(Raw, "encode", late)
    with kvengine.open(daemon.url) as one, kvengine.open(daemon.url) as two:
        for turn in range(10):
            keys = keys_of(two, 4, first=4 * turn)
            transfer = one.save(
                keys_of(one, 4, first=4 * turn), rig.caches(ONE, 4, seed=turn), np.arange(4)
            )
            while not transfer.wait(0.001):
                assert two.probe(keys) in (0, 4)
            assert transfer.good.all() and two.probe(keys) == 4
        assert rig.check_right(two, keys, rig.caches(ONE, 4, seed=turn)).all()


def test_a_time_to_live_of_a_namespace_is_that_of_its_blocks(daemon):
    """In memory, and in the frames that tiers are given."""
    with kvengine.open(daemon.url) as engine:
        names = rig.names(engine, ONE, ttl_s=1.0)
        rig.names(engine, ONE)  # asking again without one takes nothing back
        keys = names.keys(rig.prompt(3, ONE))
        before = time.time()
        assert rig.save(engine, keys, rig.caches(ONE, 3)).good.all()
        assert rig.poll(lambda: not blocks(engine, keys))
        lasting = rig.names(engine, ONE, ttl_s=1000.0).keys(rig.prompt(3, ONE, seed=2))
        rig.save(engine, lasting, rig.caches(ONE, 3))
        with engine.match(lasting) as lease:
            ids, slots, _ = engine._proxy.pin(lease, 0, 3)
            for slot in slots.tolist():
                expires = expires_of(engine._proxy.arena.view(slot, 4096))
                assert before + 1000 <= expires <= time.time() + 1001
            engine._proxy.unpin(ids)


def test_arrays_miss_where_the_daemon_has_just_gone(daemon, monkeypatch):
    with kvengine.open(daemon.url) as engine:
        assert engine.save_array("one", np.arange(9), model="encoder")
        assert engine.load_array("one", model="encoder") is not None
        daemon.process.kill()
        daemon.process.wait()
        monkeypatch.setattr(type(engine), "away", False)  # nobody has noticed yet
        assert engine.load_array("one", model="encoder") is None
        assert not engine.save_array("two", np.arange(9), model="encoder")
        monkeypatch.undo()


def blocks(engine, keys) -> int:
    with engine.match(keys) as lease:
        return lease.blocks
