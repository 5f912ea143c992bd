"""Nothing of a tenant is reached from another, and nobody takes the daemon from the others."""

import contextlib
import gc
import mmap
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import hostile
import rig
from house import Guest, House, Wire, keys
from kvengine.config import Config
from kvengine.peer import messages as m
from kvengine.peer.channel import Channel
from kvengine.residents import Residents
from kvengine.server import STRANGERS_MAX, Server
from kvengine.slab import PAGE_BYTES
from kvengine.tenants import Quota, Tenants
from test_residents import client, save, serving

ONE = rig.layout()
NBYTES = 4 << 20
HELLO = m.Hello(1, m.VERSION, m.VERSION, "", b"", True)


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    return Tenants(tmp_path / "tenants.json")


@pytest.fixture
def server(tmp_path: Path, tenants: Tenants) -> Iterator[Server]:
    with serving(tmp_path, f"mem://?size={NBYTES}&lossless=0", tenants) as found:
        yield found


def fds() -> int:
    gc.collect()  # what a client had mapped
    return len(os.listdir("/proc/self/fd"))


# Names


def test_nothing_forged_is_taken():
    found = hostile.forged(20_000)
    assert found.count > 20_000 and not found.wrong, found.notes[:5]


def test_a_session_ends_with_its_process_also_where_a_child_has_its_sockets():
    wire = Wire(House())
    one, two = Guest(wire, 1), Guest(wire, 2)
    wire.connect(50, 5)  # says nothing
    wire.exit(one.line)
    assert {one.line, one.ear} <= wire.ended
    wire.exit(50)
    assert 50 in wire.ended
    one.say(m.Reserve(1, one.space, keys(2), 0, bytes(32)))  # as the child would
    assert (two.stats()["reservations"], len(wire.service.sessions)) == (0, 1)


def test_a_tenant_has_a_part_of_the_sessions(monkeypatch):
    monkeypatch.setattr("kvengine.peer.service.SESSIONS_MAX", 8)
    wire = Wire(House(), House(tenant="other"))
    for number in (1, 2):
        Guest(wire, number)
    wire.connect(30, 30)
    assert wire.say(30, HELLO).code == m.BUSY
    Guest(wire, 4, "other")


def test_deadlines_of_what_has_ended_are_forgotten(monkeypatch):
    monkeypatch.setattr("kvengine.peer.service.DEADLINES_SPARE", 8)
    wire = Wire(House())
    one = Guest(wire, 1)
    one.save(keys(1))
    wire.service._deadlines_max = 8
    for _ in range(100):
        one.say(m.Release(0, one.match(keys(1)).token))
    kept = one.match(keys(1))
    assert len(wire.service._deadlines) < 20
    wire.at(61.0)
    assert wire.heard[one.ear][-1] == m.Expired(0, kept.token)


# Memory

SCANS = """
import os, sys, numpy as np, rig, kvengine
from kvengine.config import Config
url, key, head, tail = sys.argv[1], *(bytes.fromhex(each) for each in sys.argv[2:5])
engine = kvengine.open(Config.load(url, options={"daemon.key": key.hex()})[0])
of = rig.layout()
keys = rig.names(engine, of).keys(rig.prompt(8, of))
print("open", flush=True)
sys.stdin.readline()
rig.save(engine, keys, rig.caches(of, 8, seed=5))  # in what memory there is now
found = scanned = 0
memory = open("/proc/self/mem", "rb", buffering=0)
for line in open("/proc/self/maps"):
    place, mode, *_, name = line.split(maxsplit=5) if line.count(" ") > 5 else [*line.split(), ""]
    if "r" not in mode or name.startswith("[v"):
        continue
    start, end = (int(each, 16) for each in place.split("-"))
    try:
        memory.seek(start)
        data = memory.read(end - start)
    except (OSError, ValueError):
        continue
    scanned += len(data) if "kvengine" in name else 0
    at = data.find(head)
    while at >= 0:
        found += data[at + len(head) : at + len(head) + len(tail)] == tail
        at = data.find(head, at + 1)
    del data
print(found, scanned, flush=True)
os._exit(0)
"""


def scan(url: str, key: bytes, mark: bytes) -> subprocess.Popen:
    """Start a client that scans all it has mapped for a mark, whose halves it knows."""
    found = rig.start(SCANS, url, key.hex(), mark[:8].hex(), mark[8:].hex())
    assert found.stdout.readline() == "open\n", found.stderr.read()
    return found


def said(process: subprocess.Popen) -> list[int]:
    out, errors = process.communicate("go\n", timeout=60)
    assert process.returncode == 0, errors
    return [int(each) for each in out.split()]


def test_a_client_finds_nothing_of_another_tenant_in_its_map(tmp_path, tenants, server):
    a, b = tenants.add("a"), tenants.add("b")
    assert rig.poll(lambda: {"a", "b"} <= server._residents.engines().keys())
    mark = os.urandom(16)
    source = rig.caches(ONE, 8)
    for layer in source:
        for array in layer:
            array.view(np.uint8).reshape(-1, 16)[:] = np.frombuffer(mark, dtype=np.uint8)
    url = f"unix://{tmp_path}/kv.sock?timeout_s=20&tenant="
    with client(tmp_path, "a", a) as one:
        names = rig.names(one, ONE)
        for seed in range(1, 12):  # more than half of all memory
            keys = names.keys(rig.prompt(8, ONE, seed))
            assert rig.save(one, keys, source).good.any()
        own, other = scan(url + "a", a, mark), scan(url + "b", b, mark)
        seen, scanned = said(own)
        assert seen > 100 and scanned >= NBYTES, "the mark is found where it is"
        # Now most of it goes to the other.
        tenants.set_quota("a", Quota(maximum_bytes=PAGE_BYTES * 64))
        engines = server._residents.engines()
        assert rig.poll(lambda: engines["a"].memory_bytes() <= PAGE_BYTES * 64)
        seen, scanned = said(other)
        assert seen == 0 and scanned >= NBYTES


def test_a_scribbling_client_harms_itself(tmp_path, tenants, server):
    b = tenants.add("b")
    assert rig.poll(lambda: "b" in server._residents.engines())
    with client(tmp_path, "b", b) as other, client(tmp_path) as mate:
        kept, lost = save(other, seed=1), save(mate, seed=2)
        line = Channel(str(server.path), 20.0)
        welcome, handles = line.ask_with(HELLO, descriptors=True)
        slots, words = handles
        try:
            for fd in handles:
                for size in (0, PAGE_BYTES, 1 << 40):
                    with pytest.raises(OSError):
                        os.ftruncate(fd, size)
            with pytest.raises(PermissionError):
                mmap.mmap(words, PAGE_BYTES, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            with pytest.raises(OSError):
                os.write(words, b"x")
            with mmap.mmap(slots, welcome.nbytes) as memory:
                memory[:] = os.urandom(1 << 16) * (welcome.nbytes >> 16)
                assert not rig.check_right(mate, lost, rig.caches(ONE, 8, seed=2)).any()
                assert rig.check_right(other, kept, rig.caches(ONE, 8, seed=1)).all()
                memory.madvise(mmap.MADV_REMOVE)  # holes are zeros, not faults
            assert rig.check_right(other, kept, rig.caches(ONE, 8, seed=1)).all()
            again = save(mate, seed=2)
            assert rig.check_right(mate, again, rig.caches(ONE, 8, seed=2)).all()
        finally:
            for fd in handles:
                os.close(fd)
            line.close()


def test_what_is_scribbled_beyond_a_limit_is_given_back(tenants):
    tenants.add("a")
    residents = Residents(Config(memory_bytes=NBYTES, populate=False), tenants)
    residents.balance()
    try:
        memory = residents.residents()[0].memory
        engine = residents.residents()[0].engine
        handles = memory.descriptors(True)
        with mmap.mmap(handles[0], memory.arena.nbytes) as mapped:
            mapped[:] = b"x" * memory.arena.nbytes
        used = lambda: os.fstat(handles[0]).st_blocks * 512  # noqa: E731
        assert used() >= NBYTES
        engine.limit(NBYTES // 4)
        assert used() <= NBYTES // 4
        for handle in handles:
            os.close(handle)
    finally:
        residents.close()


def test_a_flood_takes_no_hits_of_what_another_has_reserved():
    alone, flooded = hostile.flooded(400)
    assert alone > 0.9 and alone - flooded <= 0.01


# Sockets


@contextlib.contextmanager
def lines(server: Server, count: int) -> Iterator[list[socket.socket]]:
    found = []
    try:
        for _ in range(count):
            found.append(socket.socket(socket.AF_UNIX))
            found[-1].settimeout(20)
            found[-1].connect(str(server.path))
        yield found
    finally:
        for line in found:
            line.close()


def test_nonsense_of_all_kinds_is_survived(tmp_path, server):
    draw, coder = random.Random(0), m.Coder()
    table = (1, 0, keys(4), 0, bytes(32))
    requests = [
        m.Open(1, dict.fromkeys(m.IDENTITY, "x"), {"layers": 1 << 40, "dtype": "?"}, True, 1e9),
        m.Pin(*table, 1e9),
        m.Hint(*table, False, 1e9),
        m.Match(*table, True, -(1 << 63), 0xFFFF_FFFF),
        m.Reserve(*table, b"x" * 1024, (0, 0xFFFF_FFFF, 0, 0xFFFF_FFFF)),
        m.Squeeze(1, -(1 << 63)),
        m.Keep(*table, bytes(9), 0xFFFF_FFFF, 1e9, 0.0),
        m.Observe(1, 0, 0xFFFF_FFFF, 0xFFFF_FFFF, 1e-300),
        m.Fetch(1, bytes(16), b"123", 0.0),
        m.Stats(1),
    ]
    with client(tmp_path) as one:
        kept = save(one)
        facts = one._named[0].message
        before = fds()
        for turn in range(150):
            with lines(server, 1) as (line,):
                sent = bytearray(coder.frame(HELLO) if turn % 5 else b"")
                sent += coder.frame(m.Open(2, facts.identity, facts.layout, facts.smaller))
                for _ in range(draw.randrange(4)):
                    sent += coder.frame(draw.choice(requests))
                if turn % 3 == 0:
                    sent[draw.randrange(len(sent))] ^= 1 << draw.randrange(8)
                if turn % 4 == 0:
                    del sent[draw.randrange(len(sent)) :]
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    line.sendall(sent)
        assert rig.poll(lambda: fds() <= before)
        assert one.probe(kept) == 8
        assert rig.check_right(one, kept, rig.caches(ONE, 8, seed=0)).all()


def test_every_request_with_its_least_and_most_is_answered(tmp_path, server):
    """What a client may say by its types is answered or ends a connection, and nothing else."""
    with client(tmp_path) as one:
        kept = save(one)
        proxy = one._proxy
        space = proxy._spaces[kept.namespace.number].number
        table = (1, space, kept.data, 0, bytes(32))
        line = proxy._channel
        for seconds in (0.0, 1e-300, 1e9):
            assert isinstance(line.ask(m.Pin(*table, seconds)), m.Count | m.Refused)
            assert isinstance(line.ask(m.Hint(*table, False, seconds)), m.Count | m.Refused)
            keep = m.Keep(*table, bytes(8), 50, seconds, seconds)
            assert isinstance(line.ask(keep), m.Count | m.Refused)
        for position in (0, (1 << 31) - 1, (1 << 32) - 1):
            ask = m.Match(1, space, kept.data * 2, position, bytes(32), True, 1 << 62, 1)
            assert isinstance(line.ask(ask), m.Leased)
        assert not one.away


def test_strangers_keep_nobody_out(tmp_path, server):
    before = fds()
    with lines(server, 3 * STRANGERS_MAX):
        assert rig.poll(lambda: len(server._strangers) <= STRANGERS_MAX)
        with client(tmp_path) as one:
            assert one.probe(save(one)) == 8
            del one  # and what it has mapped
    assert rig.poll(lambda: fds() <= before)


@pytest.mark.parametrize("sent", [b"\xa1\xff", b"\x91" * 5000, b"\xc1", b""])
def test_a_message_that_cannot_be_read_ends_its_connection(server, sent):
    """Texts that are no UTF-8, and arrays in arrays, are no message either."""
    hello = b"\x96\x01\x01\x01\x01"
    if sent[:1] == b"\x91":
        hello = b"\x98\x01\x01\x01\x01\xa0\xc4\x00\xc2"
    data = hello + sent
    with pytest.raises(m.Wrong):
        m.Coder().request(data)
    with lines(server, 1) as (line,):
        line.sendall(len(data).to_bytes(4, "little") + data)
        assert line.recv(1) == b""
    assert server.service.incarnation and not server._stopping.is_set()


def test_a_stranger_says_little(server):
    with lines(server, 1) as (line,):
        line.sendall((1 << 20).to_bytes(4, "little"))
        assert line.recv(1) == b""


def test_a_child_that_keeps_the_sockets_keeps_nothing_else(server):
    code = (
        "import os, socket, sys, time\n"
        "line = socket.socket(socket.AF_UNIX)\n"
        "line.connect(sys.argv[1])\n"
        "if os.fork():\n"
        "    os._exit(0)\n"
        "print(len(line.recv(1)), flush=True)\n"  # the daemon ends it
    )
    done = subprocess.run(
        [sys.executable, "-c", code, server.path], capture_output=True, text=True, timeout=30
    )
    assert done.stdout == "0\n", done.stderr
    assert rig.poll(lambda: not server._watched)


def test_a_fault_of_the_daemon_ends_one_connection(tmp_path, server, monkeypatch):
    with client(tmp_path) as one:
        kept = save(one)
        verbs = server.service._verbs
        monkeypatch.setitem(verbs, m.IsClean, lambda session, message, now: 1 // 0)
        line = Channel(str(server.path), 20.0)
        _, handles = line.ask_with(HELLO, descriptors=True)
        for handle in handles:
            os.close(handle)
        with pytest.raises(OSError):
            line.ask(m.IsClean(2))
        line.close()
        assert one.probe(kept) == 8
        engine = next(iter(server._residents.engines().values()))
        assert engine.metrics.get("tier_failures", tier="daemon") == 1


def test_small_pieces_are_not_copied_for_each_other():
    inbox = bytearray(m.LENGTH_BYTES + 100)
    inbox[0] = 200
    found, rest = m.split(inbox)
    assert found == [] and rest is inbox
    inbox += bytes(100) + b"\5"
    found, rest = m.split(inbox)
    assert found == [bytes(200)] and rest == b"\5"


def test_no_descriptors_of_what_is_gone(tenants):
    tenants.add("a")
    residents = Residents(Config(memory_bytes=NBYTES, populate=False), tenants)
    residents.balance()
    try:
        first = residents.engines()["a"]
        tenants.remove("a")
        residents.balance()
        assert residents.descriptors(first, True) == []
    finally:
        residents.close()


# Processes


def test_processes_are_killed_and_stopped(tmp_path):
    found = hostile.cycles(tmp_path, 6, daemons=5)
    assert found.count > 20 and not found.wrong, found.notes


def test_watchers_that_say_nothing_are_few(server):
    with contextlib.ExitStack() as open_:
        for _ in range(40):
            watcher = open_.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        assert sum("process_request" in each.name for each in threading.enumerate()) <= 32
        assert watcher.recv(1) == b""
