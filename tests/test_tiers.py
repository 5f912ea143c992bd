"""What every tier keeps to: one suite, passed by being listed in PLACES."""

import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import rig
import servers
from kvengine import frame
from kvengine.config import Objects, Valkey
from kvengine.metrics import Metrics
from kvengine.seal import Sealer
from kvengine.tiers import Span, Tier
from kvengine.tiers.disk import DiskTier
from kvengine.tiers.objects import ObjectsClient
from kvengine.tiers.remote import RemoteTier
from kvengine.tiers.valkey import ValkeyClient

PAGE = 4096
IDENTITY = bytes(range(32))
SIZES = [rig.layout(), rig.layout(layers=1, head_dim=33, head_dim_v=33), rig.layout(layers=3)]


def key_of(number: int) -> bytes:
    return np.random.default_rng(number).bytes(32)


def made(number: int, of=SIZES[0], key: bytes | None = None) -> bytes:
    """A whole frame of random bytes."""
    payload = memoryview(np.random.default_rng(1000 + number).bytes(of.payload_bytes))
    template = frame.Template(of, IDENTITY)
    segments = [(int(at), int(size)) for at, size in template.segments]
    digests = frame.digests_of(payload, segments)[None]
    key = key_of(number) if key is None else key
    (header,) = template.write([key], [bytes(32)], bytes(16), [0], digests)
    return header + payload


def spans_of(frames: Sequence[tuple[bytes, bytes]], fill: bool) -> list[Span]:
    """Slots of whole pages for (key, frame), poisoned, or filled."""
    spans = []
    for key, data in frames:
        slot = memoryview(mmap.mmap(-1, -(-len(data) // PAGE) * PAGE))
        slot[:] = b"\xa5" * len(slot)
        if fill:
            slot[: len(data)] = data
        spans.append(Span(key, slot, len(data)))
    return spans


@dataclass
class Place:
    """Somewhere that a tier keeps frames: how to open it, and how to spoil what it keeps."""

    open: Callable[[Metrics, Callable], Tier]
    spoil: Callable[[bytes, Callable[[bytes], bytes]], None]  # key, what to make of what is there
    resizes: bool = True


class DataKeys:
    """One data key for all."""

    key = bytes(range(32))

    def sealing(self) -> tuple[int, bytes]:
        return 1, self.key

    def opening(self, key_id: int) -> bytes | None:
        return self.key if key_id == 1 else None


def disk_place(tmp_path: Path, _, seal: Sealer | None = None) -> Place:
    def open_(metrics, dropped):
        path = tmp_path / "kv"
        return DiskTier(path, 64 << 20, metrics, dropped, segment_bytes=1 << 20, seal=seal)

    def spoil(key: bytes, change: Callable[[bytes], bytes]) -> None:
        for path in (tmp_path / "kv" / "segments").iterdir():
            data = path.read_bytes()
            for at in range(0, len(data), PAGE):
                if data[at : at + 4] == frame.MAGIC and data[at + 24 : at + 56] == key:
                    nbytes = PAGE + int.from_bytes(data[at + 16 : at + 24], "little")
                    new = change(data[at : at + nbytes])
                    with path.open("r+b") as file:
                        file.seek(at)
                        file.write(new[:nbytes].ljust(nbytes, b"\0"))
                    return
        raise AssertionError("the frame is not on disk")

    return Place(open_, spoil, resizes=False)


def remote(client, metrics, lost, threads=2, seal: Sealer | None = None) -> RemoteTier:
    return RemoteTier(
        client, metrics, lost, prefix="kv:", threads=threads, timeout_s=5.0, seal=seal
    )


def valkey_place(
    tmp_path: Path, redis: servers.Redis, seal: Sealer | None = None, **options
) -> Place:
    database = 1 if seal else 0
    place = {"host": "127.0.0.1", "port": redis.port, "db": database}
    config = Valkey(**place, prefix="kv:", timeout_s=5.0, **options)

    def spoil(key: bytes, change: Callable[[bytes], bytes]) -> None:
        with redis.client(db=database) as client:
            client.set("kv:" + key.hex(), change(client.get("kv:" + key.hex())))

    def open_(metrics, lost):
        return remote(ValkeyClient(config), metrics, lost, seal=seal)

    return Place(open_, spoil)


def cluster_place(tmp_path: Path, nodes: list[servers.Redis]) -> Place:
    found = valkey_place(tmp_path, nodes[0], cluster=True)

    def spoil(key: bytes, change: Callable[[bytes], bytes]) -> None:
        import valkey

        for node in nodes:
            with node.client() as client, suppress(valkey.ResponseError):
                client.set("kv:" + key.hex(), change(client.get("kv:" + key.hex())))
                return

    found.spoil = spoil
    return found


def s3_place(tmp_path: Path, moto: servers.Moto, seal: Sealer | None = None) -> Place:
    folder = tmp_path.name
    config = Objects(
        url=f"s3://blocks/{folder}",
        endpoint=moto.endpoint,
        region="us-east-1",
        key_id="id",
        secret_key="key",
    )

    def spoil(key: bytes, change: Callable[[bytes], bytes]) -> None:
        store, name = moto.store(folder), f"kv:{key.hex()}"
        store.put(name, change(bytes(store.get(name).bytes())))

    def open_(metrics, lost):
        return remote(ObjectsClient(config), metrics, lost, 4, seal)

    return Place(open_, spoil)


PLACES = {
    "disk": disk_place,
    "valkey": valkey_place,
    "cluster": cluster_place,
    "s3": s3_place,
}
SEALED = {"sealed disk": "disk", "sealed valkey": "valkey", "sealed s3": "s3"}


@pytest.fixture(scope="module")
def running(require, tmp_path_factory) -> Iterator[Callable[[str], object]]:
    """Give the server of a place, started when it is first asked for, one for all tests here."""
    started: dict[str, object] = {}

    def get(name: str):
        if name not in started:
            if name == "s3":
                require("moto.server")
                started[name] = servers.Moto()
            elif name == "valkey":
                started[name] = servers.Redis(require.program("redis-server"))
            elif name == "cluster":
                program = require.program("redis-server")
                started[name] = servers.cluster(program, 2, tmp_path_factory.mktemp("cluster"))
            else:
                started[name] = None
        return started[name]

    yield get
    for found in started.values():
        for server in found if isinstance(found, list) else [found] if found else []:
            server.__exit__()


class Opened:
    """A tier with what it has said: keys dropped, results by index."""

    def __init__(self, place: Place) -> None:
        self.metrics = Metrics()
        self.lost: list[bytes] = []
        self.tier = place.open(self.metrics, self.lost.extend)
        list(self.tier.scan())

    def run(self, verb, spans: Sequence[Span], deadline_s: float = 30.0) -> list[bool]:
        """Read or write; each span is reported exactly once."""
        results: list[tuple[int, bool]] = []
        over = threading.Semaphore(0)

        def report(index: int, good: bool) -> None:
            results.append((index, good))
            over.release()

        verb(spans, time.monotonic() + deadline_s, report)
        for _ in spans:
            assert over.acquire(timeout=rig.WAIT_S), f"{len(results)} of {len(spans)} reported"
        assert sorted(index for index, _ in results) == list(range(len(spans)))
        return [good for _, good in sorted(results)]

    def write(self, frames: Sequence[tuple[bytes, bytes]], **how) -> list[bool]:
        return self.run(self.tier.write, spans_of(frames, True), **how)

    def read(self, frames: Sequence[tuple[bytes, bytes]], **how) -> list[bool]:
        """Read into poisoned slots; what is called good is right."""
        spans = spans_of(frames, False)
        good = self.run(self.tier.read, spans, **how)
        for span, (_, data), fine in zip(spans, frames, good, strict=True):
            assert not fine or span.frame[: span.nbytes] == data, "wrong bytes"
        return good

    def find(self, keys: Sequence[bytes]) -> list[int]:
        return self.tier.find(keys, time.monotonic() + 30.0)


@pytest.fixture(params=[*PLACES, *SEALED])
def place(request, require, tmp_path, running) -> Place:
    if request.param in PLACES:
        return PLACES[request.param](tmp_path, running(request.param))
    require("cryptography")
    name = SEALED[request.param]
    return PLACES[name](tmp_path, running(name), Sealer(DataKeys()))


@contextmanager
def opening(place: Place) -> Iterator[Opened]:
    opened = Opened(place)
    try:
        yield opened
    finally:
        opened.tier.close()


def frames_of(count: int, first: int = 0) -> list[tuple[bytes, bytes]]:
    return [(key_of(first + n), made(first + n)) for n in range(count)]


def test_what_is_written_is_read(place):
    frames = [(key_of(n), made(n, of)) for n, of in enumerate(SIZES * 3)]
    with opening(place) as opened:
        assert opened.read(frames) == [False] * 9
        assert opened.write(frames) == [True] * 9
        assert opened.read(frames) == [True] * 9
        assert opened.read(frames[::-2]) == [True] * 5
        assert opened.metrics.get("tier_failures") == opened.metrics.get("corrupt_blocks") == 0


def test_found_by_the_next_one(place):
    frames = frames_of(5, 100)
    with opening(place) as opened:
        opened.write(frames)
    with opening(place) as opened:
        assert opened.read(frames) == [True] * 5
        if not opened.tier.remote:
            assert opened.tier.nbytes >= sum(len(data) for _, data in frames)
    metrics = Metrics()
    tier = place.open(metrics, lambda keys: None)
    scanned = [key.tobytes() for held in tier.scan() for key in held.keys]
    tier.close()
    assert sorted(scanned) == ([] if tier.remote else sorted(key for key, _ in frames))


def test_find_says_sizes(place):
    frames = [(key_of(n), made(n, of)) for n, of in enumerate(SIZES, 200)]
    with opening(place) as opened:
        keys = [key for key, _ in frames]
        assert opened.find([]) == []
        assert opened.find(keys) in ([0, 0, 0], [0, -1, -1])
        opened.write(frames)
        sizes = opened.find(keys)
        for size, (_, data) in zip(sizes, frames, strict=True):
            assert len(data) <= size < len(data) + PAGE
        assert opened.find([*keys, key_of(299)]) == [*sizes, 0]
        assert opened.tier.find(keys, time.monotonic() - 1) in ([-1, -1, -1], sizes)


def test_empty_tables_and_keys_named_twice(place):
    frames = frames_of(2, 300)
    with opening(place) as opened:
        assert opened.write([]) == opened.read([]) == []
        assert any(opened.write([*frames, *frames]))
        assert opened.read([*frames, *frames]) == [True] * 4
        assert all(opened.write(frames)), "a key that is held is no failure"


def test_dropped_is_gone(place):
    frames = frames_of(4, 400)
    with opening(place) as opened:
        opened.write(frames)
        opened.tier.drop([])
        opened.tier.drop([frames[1][0], frames[2][0], key_of(499)])
        gone = rig.poll(lambda: opened.read(frames) == [True, False, False, True])
        assert gone and set(opened.lost) <= {frames[1][0], frames[2][0]}
    with opening(place) as opened:
        assert opened.read(frames) == [True, False, False, True]


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


DAMAGE = {
    "magic": lambda data, _: flipped(data, 0),
    "key": lambda data, _: flipped(data, 30, 5),
    "identity": lambda data, _: flipped(data, 90, 7),
    "digest table": lambda data, _: flipped(data, 300),
    "header padding": lambda data, _: flipped(data, 3000),
    "first of payload": lambda data, _: flipped(data, PAGE),
    "last byte": lambda data, _: flipped(data, len(data) - 1, 7),
    "another block": lambda data, other: other,
    "zeros": lambda data, _: bytes(len(data)),
    "truncated": lambda data, _: data[:-1],
    "header alone": lambda data, _: data[:PAGE],
    "empty": lambda data, _: b"",
    "a byte more": lambda data, _: data + b"\0",
    "twice": lambda data, _: data + data,
}
KEEP_SIZE = list(DAMAGE)[:9]


def test_damage_is_a_counted_miss_and_is_forgotten(place):
    kinds = list(DAMAGE) if place.resizes else KEEP_SIZE
    frames = frames_of(len(kinds) + 1, 500)
    whole = frames.pop()
    with opening(place) as opened:
        opened.write([*frames, whole])
        others: list[bytes] = []
        place.spoil(whole[0], lambda data: others.append(data) or data)
        for kind, (key, _) in zip(kinds, frames, strict=True):
            place.spoil(key, lambda data, kind=kind: DAMAGE[kind](data, others[0]))
        assert opened.read([*frames, whole]) == [False] * len(kinds) + [True]
        assert set(opened.lost) == {key for key, _ in frames}
        empty = "empty" in kinds  # an empty value cannot be told from none
        assert opened.metrics.get("corrupt_blocks") == len(kinds) - empty
        left = lambda: [opened.find([key])[0] for key, _ in frames]  # noqa: E731
        assert rig.poll(lambda: left() == [0] * len(kinds))
        assert opened.write(frames) == [True] * len(kinds)
        assert opened.read(frames) == [True] * len(kinds)


def test_past_the_deadline_nothing_is_begun(place):
    frames = frames_of(3, 600)
    with opening(place) as opened:
        assert opened.write(frames, deadline_s=-1.0) == [False] * 3
        opened.write(frames)
        assert opened.read(frames, deadline_s=-1.0) == [False] * 3
        assert opened.read(frames) == [True] * 3, "a late read gives nothing up"
        assert opened.lost == []


def test_closed_reports_failures_and_closes_twice(place):
    frames = frames_of(2, 700)
    with opening(place) as opened:
        opened.write(frames)
        opened.tier.close()
        assert opened.write(frames) == opened.read(frames) == [False] * 2
        opened.tier.drop([frames[0][0]])
    with opening(place) as opened:
        assert opened.read(frames) == [True] * 2


def test_queued_work_is_done_before_the_end(place):
    frames = frames_of(40, 800)
    results: list[bool] = []
    opened = Opened(place)
    opened.tier.write(
        spans_of(frames, True), time.monotonic() + 30, lambda _, good: results.append(good)
    )
    opened.tier.close()
    assert results == [True] * 40
    with opening(place) as opened:
        assert opened.read(frames) == [True] * 40


def test_many_threads(place):
    frames = frames_of(12, 900)
    with opening(place) as opened:
        opened.write(frames[:6])
        errors: list[BaseException] = []

        def work(turn: int) -> None:
            try:
                for step in range(3):
                    mine = frames[(turn + step) % 6 :][:6]
                    opened.write(mine)
                    opened.read(mine)
                    opened.find([key for key, _ in mine])
            except BaseException as error:  # told below
                errors.append(error)

        threads = [threading.Thread(target=partial(work, turn)) for turn in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        assert opened.write(frames) == opened.read(frames) == [True] * 12
        assert opened.metrics.get("corrupt_blocks") == 0
