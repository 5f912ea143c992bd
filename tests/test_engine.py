"""kvengine.Engine: what is saved comes back bit for bit, or is not called good."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvengine
import rig
from kvengine import Engine, Layout, LayoutError
from kvengine.codec import Raw
from kvengine.frame import frame_bytes

POOL = 12  # blocks of a cache
F32 = rig.layout()
FRAME = frame_bytes(F32)


@dataclass(frozen=True)
class Case:
    """A layout, and the blocks of the caller's cache that are saved."""

    name: str
    layout: Layout
    blocks: tuple[int, ...] = (7, 0, 3, 11)
    extra: dict = field(default_factory=dict)


def case(name: str, blocks: tuple[int, ...] = (7, 0, 3, 11), **changes) -> Case:
    return Case(name, rig.layout(**changes), blocks)


CASES = [
    case("paged_nhd"),
    case("paged_hnd", order="HND"),
    case("contiguous_nhd", paged=False),
    case("contiguous_hnd", paged=False, order="HND"),
    case("k_and_v_differ_nhd", head_dim=192, head_dim_v=128, kv_heads=3),
    case("k_and_v_differ_hnd", head_dim=24, head_dim_v=56, order="HND"),
    case("latent", kv_heads=1, head_dim=576, head_dim_v=0, dtype="bfloat16"),
    Case("opaque", Layout.opaque(layers=3, page_bytes=4097, block_tokens=16, permutation="amx")),
    case("head_dim_80", head_dim=80, head_dim_v=80, order="HND", dtype="float16"),
    case("head_dim_96_fp8", head_dim=96, head_dim_v=96, dtype="float8_e4m3fn"),
    case("head_dim_1_fp8", head_dim=1, head_dim_v=1, kv_heads=1, dtype="float8_e5m2"),
    case("one_token_blocks", block_tokens=1, kv_heads=5, dtype="bfloat16"),
    case("one_token_blocks_hnd", block_tokens=1, kv_heads=5, order="HND", paged=False),
    case("32_token_blocks", block_tokens=32, order="HND"),
    case("one_layer", layers=1),
    case("61_layers", layers=61, head_dim=16, head_dim_v=16),
    case("200_layers", layers=200, head_dim=4, head_dim_v=4, kv_heads=1, blocks=(1, 2)),
    case("one_block", blocks=(5,)),
    case("all_blocks", blocks=(11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)),
]
PLACES = ["table", "slots"]


def where(of: Layout, how: str, table: tuple[int, ...] | list[int], seed: int) -> tuple[dict, list]:
    """Arguments that name the places of a table of blocks, and the slots these are."""
    if how == "table":
        return {"table": np.array(table)}, rig.slots_of(of, table).tolist()
    slots = random.Random(seed).sample(range(POOL * of.block_tokens), len(table) * of.block_tokens)
    return {"slot_mapping": slots}, slots


@pytest.fixture(scope="module")
def engine():
    with kvengine.open("mem://?size=128M") as opened:
        yield opened
        opened.check()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("out", "back"), [(a, b) for a in PLACES for b in PLACES])
def test_round_trip(engine, case, out, back):
    of = case.layout
    if of.is_opaque and "slots" in (out, back):
        pytest.skip("opaque pages have no slots")
    keys = rig.names(engine, of, salt=f"{case.name}{out}{back}").keys(
        rig.prompt(len(case.blocks), of)
    )
    source, target = rig.caches(of, POOL, 1), rig.caches(of, POOL)
    given, here = where(of, out, case.blocks, 1)
    saved = rig.save(engine, keys, source, **given)
    assert saved.good.all() and saved.nbytes == len(keys) * of.payload_bytes
    places = random.Random(2).sample(range(POOL), len(keys))
    given, there = where(of, back, places, 3)
    loaded = rig.load(engine, keys, target, **given)
    assert loaded.good.all() and loaded.blocks == len(keys) and loaded.error is None
    assert loaded.nbytes == saved.nbytes
    assert rig.same(of, target, there, source, here)
    assert rig.untouched(of, target, there)
    engine.drop(keys)


def test_paged_and_contiguous_caches_share_blocks(engine):
    for order in ("NHD", "HND"):
        paged = rig.layout(order=order)
        flat = rig.layout(order=order, paged=False)
        tokens = rig.prompt(3, paged)
        source, target = rig.caches(paged, 3, 1), rig.caches(flat, 3)
        rig.save(engine, rig.names(engine, paged, salt="share").keys(tokens), source)
        keys = rig.names(engine, flat, salt="share").keys(tokens)
        assert rig.load(engine, keys, target).good.all()
        slots = np.arange(48)
        for one, other in zip(target, source, strict=True):
            for a, b in zip(one, other, strict=True):
                assert np.array_equal(rig.by_token(flat, a)[slots], rig.by_token(paged, b)[slots])


def test_first_loads_the_rest_of_a_lease(engine):
    keys = rig.names(engine, F32, salt="first").keys(rig.prompt(5, F32))
    source, target = rig.caches(F32, 5, 1), rig.caches(F32, POOL)
    rig.save(engine, keys, source)
    with engine.match(keys) as lease:
        transfer = engine.load(lease, target, [9, 1], first=2)
    assert transfer.wait(rig.WAIT_S) and transfer.good.tolist() == [True, True]
    written = rig.slots_of(F32, [9, 1])
    assert rig.same(F32, target, written, source, rig.slots_of(F32, [2, 3]))
    assert rig.untouched(F32, target, written)


def test_target_with_gaps(engine):
    """Every third page, every second token and a slice of heads of something larger."""
    keys = rig.names(engine, F32, salt="gaps").keys(rig.prompt(3, F32))
    source = rig.caches(F32, 3, 1)
    rig.save(engine, keys, source)
    whole = [np.full((9, 32, 7, 32), 7.0, np.float32) for _ in range(4)]
    views = [each[::3, ::2, 2:4] for each in whole]
    target = [(views[0], views[1]), (views[2], views[3])]
    assert rig.load(engine, keys, target).good.all()
    for layer, twin in zip(target, source, strict=True):
        for a, b in zip(layer, twin, strict=True):
            assert np.array_equal(a.view(np.uint8), b.view(np.uint8))
    for each in whole:
        each[::3, ::2, 2:4] = 7.0
        assert (each == 7.0).all()


def test_only_the_tail_of_a_longer_prompt_is_saved(engine):
    keys = rig.names(engine, F32, salt="tail").keys(rig.prompt(6, F32))
    source = rig.caches(F32, 6, 1)
    assert rig.save(engine, keys[:4], source, [0, 1, 2, 3]).nbytes == 4 * F32.payload_bytes
    other = [tuple(np.zeros_like(a) for a in layer) for layer in source]
    for layer, twin in zip(other, source, strict=True):
        for a, b in zip(layer, twin, strict=True):
            a[4:] = b[4:]
    again = rig.save(engine, keys, other)
    assert again.good.all() and again.nbytes == 2 * F32.payload_bytes
    assert rig.check_right(engine, keys, source).all()
    assert rig.save(engine, keys, other).nbytes == 0
    assert engine.contains(keys).all()


def test_a_table_larger_than_the_memory():
    with kvengine.open("mem://?size=256K") as engine:
        fits = (256 << 10) // FRAME
        keys = rig.names(engine, F32).keys(rig.prompt(fits + 7, F32))
        source = rig.caches(F32, len(keys), 1)
        saved = rig.save(engine, keys, source)
        assert saved.good.tolist() == [True] * fits + [False] * 7
        assert engine.stats()["save_refused_blocks"] == 7
        assert engine.probe(keys) == fits
        assert rig.check_right(engine, keys, source)[:fits].all()
        engine.check()


def test_memory_moves_between_layouts():
    """What one layout has given back, another gets; a few leased blocks do not keep the rest."""
    other = rig.layout(head_dim=64)
    with kvengine.open("mem://?size=8M") as engine:
        one = rig.names(engine, F32).keys(rig.prompt(4, F32))
        two = rig.names(engine, other).keys(rig.prompt(4, other))
        rig.save(engine, one, rig.caches(F32, 4, 1))
        with engine.match(one):
            assert rig.save(engine, two, rig.caches(other, 4, 1)).good.all()
        for keys in (one, two, one):
            engine.squeeze(0)
            of = keys.namespace.layout
            many = rig.names(engine, of, salt="many").keys(rig.prompt(100, of))
            assert rig.save(engine, many, rig.caches(of, 100, 2)).good.all()
            assert rig.check_right(engine, many, rig.caches(of, 100, 2)).all()
            engine.drop(many)
        engine.check()


def test_eviction_to_disk_and_back(tmp_path):
    with kvengine.open(f"mem://?size=512K | file://{tmp_path}?size=64M") as engine:
        of = F32
        prompts = [rig.names(engine, of).keys(rig.prompt(8, of, seed)) for seed in range(6)]
        sources = [rig.caches(of, 8, seed) for seed in range(6)]
        for keys, source in zip(prompts, sources, strict=True):
            assert rig.save(engine, keys, source).good.all()
            assert engine.flush(rig.WAIT_S)
        stats = engine.stats()
        assert stats["evicted_blocks"] and stats["tier_blocks"] == stats["demoted_blocks"] == 48
        assert stats["memory_bytes"] <= 512 << 10
        for keys, source in zip(prompts, sources, strict=True):
            assert engine.probe(keys) == 8
            assert rig.check_right(engine, keys, source).all()
        assert engine.stats()["fetched_blocks"] >= 8
        assert engine.stats()["corrupt_blocks"] == engine.stats()["tier_failures"] == 0
        engine.check()


def test_a_prefix_longer_than_memory(tmp_path):
    """It is saved in parts, and one load reads it through the share that fetches may take."""
    with kvengine.open(f"mem://?size=256K | file://{tmp_path}?size=64M") as engine:
        keys = rig.names(engine, F32).keys(rig.prompt(30, F32))
        source = rig.caches(F32, 30, 1)
        for at in range(0, 30, 6):
            rig.save(engine, keys[at : at + 6], source, range(at, at + 6))
            assert engine.flush(rig.WAIT_S)
        assert engine.probe(keys) == 30
        assert 6 <= rig.check_right(engine, keys, source).sum() <= 30  # memory is the load's own
        engine.squeeze(0)
        assert rig.check_right(engine, keys, source).all()
        engine.check()
        # In parts, all of it comes.
        for at in range(0, 30, 6):
            assert rig.check_right(engine, keys[at : at + 6], source, first=at).all()
        engine.check()


def test_what_is_held(tmp_path):
    with kvengine.open(f"mem://?size=4M | file://{tmp_path}?size=64M") as engine:
        names = rig.names(engine, F32)
        keys, other = names.keys(rig.prompt(4, F32)), names.keys(rig.prompt(4, F32, 9))
        source = rig.caches(F32, 4, 1)
        assert engine.probe(keys) == 0 and not engine.contains(keys).any()
        rig.save(engine, keys[:1], source, [0])
        rig.save(engine, keys[2:], source, [2, 3])
        assert engine.contains(keys).tolist() == [True, False, True, True]
        assert engine.probe(keys) == 1 and engine.match(keys).blocks == 1
        assert engine.probe(other) == 0 and engine.match(other).blocks == 0
        rig.save(engine, keys, source)
        with engine.match(keys) as lease:
            assert (lease.blocks, lease.in_memory, len(lease)) == (4, 4, 4)
        assert engine.flush(rig.WAIT_S)
        assert engine.squeeze(2 * FRAME) == 2 * FRAME
        with engine.match(keys) as lease:
            assert lease.blocks == 4 and lease.in_memory <= 2
        stats = engine.stats()
        assert (stats["blocks"], stats["memory_blocks"], stats["tier_blocks"]) == (4, 2, 4)
        assert stats["memory_bytes"] == 2 * FRAME and stats["tier_bytes"] >= 4 * FRAME
        assert stats["lookup_blocks"] == 16 and stats["hit_blocks"] == 9
        assert stats["saved_blocks"] == 4
        assert engine.drop(keys[2:]) == 2 and engine.probe(keys) == 2
        assert engine.drop(other) == 0 and engine.drop(keys[2:]) == 0
        again = rig.save(engine, keys, source)
        assert again.good.all() and again.nbytes == 2 * F32.payload_bytes
        assert rig.check_right(engine, keys, source).all()


def test_squeeze_spares_what_is_leased():
    with kvengine.open("mem://?size=4M") as engine:
        keys = rig.names(engine, F32).keys(rig.prompt(4, F32))
        source = rig.caches(F32, 4, 1)
        rig.save(engine, keys, source)
        with engine.match(keys[:2]):
            assert engine.squeeze(0) == 2 * FRAME
            assert engine.probe(keys) == 2
        assert engine.squeeze(0) == 2 * FRAME and engine.probe(keys) == 0
        assert engine.stats()["memory_bytes"] == 0


def test_drop_while_leased_and_loading(tmp_path):
    with kvengine.open(f"mem://?size=4M | file://{tmp_path}?size=64M") as engine:
        keys = rig.names(engine, F32).keys(rig.prompt(4, F32))
        source, target = rig.caches(F32, 4, 1), rig.caches(F32, 4)
        rig.save(engine, keys, source)
        with engine.match(keys) as lease:
            assert engine.drop(keys) == 4 and engine.probe(keys) == 0
            assert engine.load(lease, target, range(4)).wait(rig.WAIT_S)
        assert rig.same(F32, target, range(64), source, range(64))
        assert engine.flush(rig.WAIT_S) and engine.stats()["tier_blocks"] == 0
        engine.check()


def test_drop_all_makes_old_and_new_names_miss(tmp_path):
    url = f"mem://?size=4M | file://{tmp_path}?size=64M"
    with kvengine.open(url) as engine:
        old = rig.names(engine, F32)
        tokens, source = rig.prompt(4, F32), rig.caches(F32, 4, 1)
        rig.save(engine, old.keys(tokens), source)
        epoch = engine.drop_all()
        assert engine.drop_all() == epoch + 1
        assert engine.probe(old.keys(tokens)) == 0
        assert not rig.save(engine, old.keys(tokens), source).good.any()
        fresh = rig.names(engine, F32).keys(tokens)
        assert engine.probe(fresh) == 0
        assert rig.save(engine, fresh, source).good.all()
    with kvengine.open(url) as engine:
        assert engine.probe(rig.names(engine, F32).keys(tokens)) == 4


SECRETS = ["11" * 32, "22" * 32]


def test_another_secret_misses(tmp_path, monkeypatch):
    """By option and by variable; the directory of one tenant tells the other nothing."""
    url = f"mem://?size=4M | file://{tmp_path}?size=64M"
    tokens, source = rig.prompt(3, F32), rig.caches(F32, 3, 1)
    with kvengine.open(url, secret=SECRETS[0]) as engine:
        mine = rig.names(engine, F32).keys(tokens)
        rig.save(engine, mine, source)
    monkeypatch.setenv("KVENGINE_SECRET", SECRETS[1])
    with kvengine.open(url) as engine:
        keys = rig.names(engine, F32).keys(tokens)
        assert engine.probe(keys) == 0 and keys.data != mine.data
    monkeypatch.setenv("KVENGINE_SECRET", SECRETS[0])
    with kvengine.open(url) as engine:
        assert rig.check_right(engine, rig.names(engine, F32).keys(tokens), source).all()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"revision": "2"},
        {"kv_dtype": "fp8"},
        {"adapter": "lora"},
        {"media": "image"},
        {"salt": "s"},
        {"positional": "none"},
        {"pool": "draft"},
        {"source": "vllm"},
        {"layout": rig.layout(order="HND")},
        {"layout": rig.layout(dtype="int8", head_dim=128, head_dim_v=128)},
        {"layout": rig.layout(block_tokens=8)},
        {"layout": rig.layout(permutation="p")},
    ],
    ids=str,
)
def test_any_field_of_the_identity_changes_all_keys(engine, change):
    tokens, source = rig.prompt(2, F32), rig.caches(F32, 2, 1)
    rig.save(engine, rig.names(engine, F32).keys(tokens), source)
    keys = rig.names(engine, F32, **change).keys(tokens)
    assert not engine.contains(keys).any() and engine.match(keys).blocks == 0
    assert engine.probe(rig.names(engine, rig.layout()).keys(tokens)) == 2


def test_names_of_another_engine_change_nothing():
    """Keys whose namespace this engine did not make: refused, and no block of ours is harmed."""
    big = rig.layout(layers=8)
    with kvengine.open("mem://?size=1M") as one, kvengine.open("mem://?size=1M") as two:
        strange = rig.names(one, big).keys(rig.prompt(3, big))
        keys = rig.names(two, F32).keys(rig.prompt(30, F32))
        source = rig.caches(F32, 30, 1)
        rig.save(two, keys, source)
        try:
            transfer = rig.save(two, strange, rig.caches(big, 3, 2))
            assert not transfer.good.any()
            assert two.probe(strange) == 0 and two.match(strange).blocks == 0
        except LayoutError as error:
            assert "engine" in str(error)
        assert rig.check_right(two, keys, source).all()
        assert two.stats()["corrupt_blocks"] == 0
        # A lease of one engine names nothing in another.
        with two.match(keys) as lease:
            mine = one.load(lease, rig.caches(F32, 30), range(30)) if lease.blocks == 0 else None
        assert mine is None


def test_names_kept_from_before_a_reopening(tmp_path):
    url = f"mem://?size=1M | file://{tmp_path}?size=64M"
    big = rig.layout(layers=8)
    tokens = rig.prompt(3, F32)
    with kvengine.open(url) as engine:
        kept = rig.names(engine, big)
        mine = rig.names(engine, F32)
        rig.save(engine, mine.keys(tokens), rig.caches(F32, 3, 1))
    with kvengine.open(url) as engine:
        fresh = rig.names(engine, F32)
        try:
            assert not rig.save(engine, kept.keys(tokens), rig.caches(big, 3, 2)).good.any()
        except LayoutError as error:
            assert "engine" in str(error)
        assert rig.check_right(engine, fresh.keys(tokens), rig.caches(F32, 3, 1)).all()


def test_keys_of_hashes(engine):
    names = rig.names(engine, F32, source="vllm")
    hashes = [bytes([i]) * 32 for i in range(4)]
    keys = names.keys_of_hashes(hashes, position=7, parent=b"p" * 32)
    assert keys.position == 7 and len(keys) == 4
    source = rig.caches(F32, 4, 1)
    rig.save(engine, keys, source)
    assert rig.check_right(engine, names.keys_of_hashes(hashes), source).all()
    with pytest.raises(kvengine.BadKey, match="has 31 bytes, expected at least 32"):
        names.keys_of_hashes([b"x" * 31])


def test_a_table_that_names_a_key_twice(tmp_path):
    """Either refused, or right: saved once, loaded into both places, no slot lost."""
    with kvengine.open(f"mem://?size=4M | file://{tmp_path}?size=64M") as engine:
        names = rig.names(engine, F32)
        source = rig.caches(F32, 3, 1)
        try:
            keys = names.keys_of_hashes([b"a" * 32, b"b" * 32, b"a" * 32, b"c" * 32])
        except kvengine.BadKey:
            return
        assert rig.save(engine, keys, source, [0, 1, 0, 2]).good.all()
        for _ in range(2):
            target = rig.caches(F32, 4)
            assert rig.load(engine, keys, target).good.all()
            assert rig.same(F32, target, range(64), source, rig.slots_of(F32, [0, 1, 0, 2]))
            engine.check()
            assert engine.flush(rig.WAIT_S)
            engine.squeeze(0)
            engine.check()


def test_a_lease_that_has_ended_loads_nothing():
    with kvengine.open("mem://?size=4M", lease_s=0.02) as engine:
        keys = rig.names(engine, F32).keys(rig.prompt(3, F32))
        rig.save(engine, keys, rig.caches(F32, 3, 1))
        target = rig.caches(F32, 3)
        released = engine.match(keys)
        released.release()
        released.release()
        expired = engine.match(keys)

        def over() -> bool:
            engine.match(keys[:0])
            return engine.stats()["leases"] == 0

        assert rig.poll(over)
        for lease in (released, expired):
            transfer = engine.load(lease, target, range(3))
            assert transfer.wait(rig.WAIT_S) and not transfer.good.any()
            assert transfer.blocks == 0 and transfer.nbytes == 0
        expired.release()
        assert rig.untouched(F32, target, [])
        assert engine.metrics.get("expired", kind="lease") == 1
        engine.check()


def test_a_lease_that_ends_while_its_load_runs(tmp_path, monkeypatch):
    """The transfer keeps its own hold: drop, squeeze and other saves do not reach its slots."""
    with kvengine.open(f"mem://?size=256K | file://{tmp_path}?size=64M", lease_s=0.01) as engine:
        keys = rig.names(engine, F32).keys(rig.prompt(6, F32))
        other = rig.names(engine, F32).keys(rig.prompt(12, F32, 5))
        source, target = rig.caches(F32, 6, 1), rig.caches(F32, 6)
        rig.save(engine, keys, source)
        assert engine.flush(rig.WAIT_S)
        gate, decode = threading.Event(), Raw.decode

        def late(*given: object) -> None:
            gate.wait(rig.WAIT_S)
            decode(*given)

        monkeypatch.setattr(Raw, "decode", lambda *given: late(*given))
        transfer = engine.load(engine.match(keys), target, range(6))
        assert rig.poll(lambda: not (engine.match(keys[:0]), engine.stats()["leases"])[1])
        engine.squeeze(0)
        engine.drop(keys)
        for block in range(12):
            assert engine.save(other[: block + 1], rig.caches(F32, 12, 2), range(block + 1))
        assert not transfer.done() and not transfer.wait(0.001)
        gate.set()
        assert transfer.wait(rig.WAIT_S) and transfer.good.all()
        assert rig.same(F32, target, range(96), source, range(96))
        assert engine.flush(rig.WAIT_S)


def test_layer_by_layer():
    of = rig.layout(layers=24, head_dim=128, head_dim_v=128, kv_heads=8)
    with kvengine.open("mem://?size=128M") as engine:
        keys = rig.names(engine, of).keys(rig.prompt(16, of))
        source, target = rig.caches(of, 16, 1), rig.caches(of, 16)
        rig.save(engine, keys, source)
        with engine.match(keys) as lease:
            transfer = engine.load(lease, target, range(16))
        for layer in range(of.layers):
            assert transfer.wait_layer(layer, rig.WAIT_S)
            assert transfer.layer_good(layer).all()
            for a, b in zip(target[layer], source[layer], strict=True):
                assert np.array_equal(a.view(np.uint8), b.view(np.uint8))
        assert transfer.wait(rig.WAIT_S) and transfer.good.all()


def test_concurrent_saves_and_loads(tmp_path):
    """Eight threads, more prompts than memory holds, some of them shared."""
    of, depth = F32, 6
    sources = [rig.caches(of, depth, seed) for seed in range(10)]
    with kvengine.open(f"mem://?size=1M | file://{tmp_path}?size=2M&segment=256K") as engine:
        names = rig.names(engine, of)
        prompts = [names.keys(rig.prompt(depth, of, seed)) for seed in range(10)]

        def work(seed: int) -> int:
            draw, found = random.Random(seed), 0
            for _ in range(25):
                which = draw.randrange(10)
                match draw.randrange(8):
                    case 0 | 1 | 2:
                        rig.save(engine, prompts[which], sources[which])
                    case 3:
                        engine.squeeze(draw.randrange(1 << 20))
                    case 4:
                        engine.drop(prompts[which][draw.randrange(depth) :])
                    case _:
                        found += rig.check_right(engine, prompts[which], sources[which]).sum()
            return found

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) > 0
        assert engine.flush(rig.WAIT_S)
        stats = engine.stats()
        assert stats["corrupt_blocks"] == stats["leases"] == stats["reservations"] == 0
        assert stats["quarantined_blocks"] == stats["unwritten_blocks"] == 0
        engine.check()


PLAIN = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numba", "llvmlite"):
            raise ModuleNotFoundError(name, name=name)
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
sys.meta_path.insert(0, Hidden())
import rig, kvengine
of = rig.layout(head_dim=80, order="HND")
with kvengine.open(f"mem://?size=1M | file://{sys.argv[1]}?size=64M") as engine:
    keys = rig.names(engine, of).keys(rig.prompt(4, of))
    if sys.argv[2] == "save":
        assert rig.save(engine, keys, rig.caches(of, 4, 1), [3, 1, 0, 2]).good.all()
        assert engine.flush(30) and engine.squeeze(0)
    target = rig.caches(of, 4)
    transfer = rig.load(engine, keys, target, [3, 1, 0, 2])
    assert transfer.good.all(), transfer.good
    assert rig.same(of, target, range(64), rig.caches(of, 4, 1), range(64))
    engine.check()
assert "numba" not in sys.modules
print("fine")
"""


def test_without_numba(tmp_path):
    """The plain path reads what it wrote, and what the compiled path wrote."""
    of = rig.layout(head_dim=80, order="HND")
    mine, plain = tmp_path / "mine", tmp_path / "plain"
    with kvengine.open(f"mem://?size=1M | file://{mine}?size=64M") as engine:
        keys = rig.names(engine, of).keys(rig.prompt(4, of))
        rig.save(engine, keys, rig.caches(of, 4, 1), [3, 1, 0, 2])
    for path, verb in ((mine, "load"), (plain, "save")):
        done = rig.python(PLAIN, path, verb)
        assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")
    with kvengine.open(f"mem://?size=1M | file://{plain}?size=64M") as engine:
        keys = rig.names(engine, of).keys(rig.prompt(4, of))
        target = rig.caches(of, 4)
        assert rig.load(engine, keys, target, [3, 1, 0, 2]).good.all()
        assert rig.same(of, target, range(64), rig.caches(of, 4, 1), range(64))


# Never a wrong byte


@settings(max_examples=60)
@given(st.data())
def test_any_bit_flipped_in_memory(data):
    """The block is not good and the rest is; it is counted once, missed next, and saved again."""
    with kvengine.open("mem://?size=64K") as engine:
        keys = rig.names(engine, F32).keys(rig.prompt(3, F32))
        source = rig.caches(F32, 3, 1)
        rig.save(engine, keys, source)
        memory = engine._store.arena.memory
        bases = [at for at in range(0, len(memory), 4096) if memory[at : at + 4] == b"KVEF"]
        assert len(bases) == 3
        at = data.draw(st.sampled_from(bases)) + data.draw(
            st.integers(0, 400) | st.integers(0, FRAME - 1)
        )
        memory[at] ^= 1 << data.draw(st.integers(0, 7))
        good = rig.check_right(engine, keys, source)
        assert good.sum() == 2
        assert engine.stats()["corrupt_blocks"] == 1
        assert engine.contains(keys).tolist() == good.tolist()
        assert engine.probe(keys) == good.argmin()
        assert rig.save(engine, keys, source).good.all()
        assert rig.check_right(engine, keys, source).all()
        engine.check()


def test_frames_that_have_changed_places_in_memory():
    with kvengine.open("mem://?size=64K") as engine:
        keys = rig.names(engine, F32).keys(rig.prompt(2, F32))
        source = rig.caches(F32, 2, 1)
        rig.save(engine, keys, source)
        memory = engine._store.arena.memory
        one, two = (at for at in range(0, len(memory), 4096) if memory[at : at + 4] == b"KVEF")
        memory[one : one + FRAME] = bytes(memory[two : two + FRAME])
        assert rig.check_right(engine, keys, source).sum() == 1
        assert engine.stats()["corrupt_blocks"] == 1


def test_a_closed_engine_misses():
    engine = kvengine.open("mem://?size=4M")
    names = rig.names(engine, F32)
    keys, source = names.keys(rig.prompt(2, F32)), rig.caches(F32, 2, 1)
    rig.save(engine, keys, source)
    lease = engine.match(keys)
    engine.close()
    engine.close()
    assert isinstance(engine, Engine)
    assert engine.probe(keys) == 0 and not engine.contains(keys).any()
    assert engine.match(keys).blocks == 0
    for transfer in (engine.load(lease, source, [0, 1]), engine.save(keys, source, [0, 1])):
        assert transfer.wait(1) and not transfer.good.any() and transfer.error
    assert engine.drop(keys) == 0 and engine.squeeze(0) == 0
    assert engine.flush() and engine.stats() == {}
    lease.release()
    for verb in (engine.drop_all, lambda: rig.names(engine, F32)):
        with pytest.raises(kvengine.ClosedError, match="open another"):
            verb()
