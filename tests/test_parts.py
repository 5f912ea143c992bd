"""Models on several ranks: each saves its parts, readers of any degree load what they need."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import kvengine
import rig
import servers
from kvengine import Engine, FrameError, Layout, LayoutError
from kvengine.frame import frame_bytes
from kvengine.layout import PARTS_MAX
from kvengine.tiers import Span, verify

RANKS, BLOCKS, POOL = 4, 5, 8
WHERE = [7, 0, 3, 6, 2]


def layout(**changes) -> Layout:
    fields = {"layers": 4, "kv_heads": 4, "head_dim": 32, "head_dim_v": 32, "head_parts": 4}
    return rig.layout(**(fields | changes))


CASES = {
    "f32": layout(),
    "hnd": layout(order="HND"),
    "flat": layout(paged=False),
    "k_and_v_differ": layout(head_dim=24, head_dim_v=40, dtype="float16", kv_heads=8),
    "latent_by_layers": layout(
        kv_heads=1, head_parts=1, layer_parts=4, head_dim=576, head_dim_v=0, dtype="float16"
    ),
    "both": layout(layer_parts=2, dtype="float8_e4m3fn"),
    "opaque": Layout(
        4, 1, 4100, 0, "uint8", 16, "HND", True, "full", "amx", layer_parts=4, head_parts=1
    ),
}


def ranks(of: Layout, count: int) -> list[dict]:
    """Views of so many ranks: by heads where the layout is cut so, by layers else."""
    if of.head_parts > 1:
        step = of.kv_heads // count
        return [{"heads": (at, at + step)} for at in range(0, of.kv_heads, step)]
    step = of.layers // count
    return [{"layers": (at, at + step)} for at in range(0, of.layers, step)]


def ranges(of: Layout, view: dict) -> tuple[tuple[int, int], tuple[int, int]]:
    return view.get("layers", (0, of.layers)), view.get("heads", (0, of.kv_heads))


def save_as_ranks(engine: Engine, names, tokens, whole, views, fill=b"request 1", table=WHERE):
    """All ranks at once, a thread each. Returns their transfers."""
    of = names.layout

    def run(view: dict):
        own = rig.cut(of, whole, *ranges(of, view))
        return rig.save(engine, names.part(**view).keys(tokens), own, table, fill=fill)

    with ThreadPoolExecutor(len(views)) as pool:
        return list(pool.map(run, views))


def check_loaded(engine: Engine, names, tokens, whole, view: dict) -> None:
    """One rank of readers gets what the whole cache has in its range, and writes nothing else."""
    of, keys = names.layout, names.part(**view).keys(tokens)
    here = keys.namespace.view.layout
    target = rig.caches(here, POOL)
    places = [1, 5, 0, 7, 4]
    loaded = rig.load(engine, keys, target, places)
    assert loaded.good.all() and len(loaded.good) == BLOCKS and loaded.error is None
    for layer in range(here.layers):
        assert loaded.layer_good(layer).all()
    expected = rig.cut(of, whole, *ranges(of, view))
    there = rig.slots_of(here, places)
    assert rig.same(here, target, there, expected, rig.slots_of(here, WHERE))
    assert rig.untouched(here, target, there)
    assert loaded.nbytes == BLOCKS * here.payload_bytes


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("place", ["memory", "disk", "sealed"])
def test_four_ranks_save_and_ranks_of_any_degree_load(name, place, tmp_path, require):
    of = CASES[name]
    if place == "sealed":
        require("cryptography")
    url = "mem://?size=16M" + (f" | file://{tmp_path}?size=64M" if place != "memory" else "")
    url += "&encrypt=1" if place == "sealed" else ""
    whole = rig.caches(of, POOL, 1)
    tokens = rig.prompt(BLOCKS, of)
    with kvengine.open(url) as engine:
        names = rig.names(engine, of)
        transfers = save_as_ranks(engine, names, tokens, whole, ranks(of, RANKS))
        assert any(each.good.all() for each in transfers), "the last one sees all blocks"
        assert engine.probe(names.keys(tokens)) == BLOCKS
        if place != "memory":
            assert engine.flush() and engine.squeeze(0) > 0
            assert engine.stats()["memory_blocks"] == 0
        for degree in (4, 2, 1):
            for view in ranks(of, degree):
                check_loaded(engine, names, tokens, whole, view)
        check_loaded(engine, names, tokens, whole, {"layers": (0, of.layers)})
        engine.check()
    if place != "memory":  # the next process reads what this one has written
        with kvengine.open(url) as engine:
            names = rig.names(engine, of)
            check_loaded(engine, names, tokens, whole, {})
            assert engine.metrics.get("corrupt_blocks") == 0
            engine.check()


def test_ranks_that_load_together_read_each_block_once(tmp_path):
    of = layout()
    whole, tokens = rig.caches(of, POOL, 1), rig.prompt(BLOCKS, of)
    with kvengine.open(f"mem://?size=16M | file://{tmp_path}?size=64M") as engine:
        names = rig.names(engine, of)
        save_as_ranks(engine, names, tokens, whole, ranks(of, RANKS))
        assert engine.flush() and engine.squeeze(0) > 0
        with ThreadPoolExecutor(RANKS) as pool:
            jobs = [
                pool.submit(check_loaded, engine, names, tokens, whole, view)
                for view in ranks(of, RANKS)
            ]
            for job in jobs:
                job.result()
        assert engine.metrics.get("fetched_blocks") == BLOCKS
        engine.check()


def test_engines_share_parts_through_a_remote_store(require):
    """A byte that changes in any part there is a miss, and the block is deleted."""
    of = layout()
    whole, tokens, secret = rig.caches(of, POOL, 1), rig.prompt(BLOCKS, of), bytes(range(32))
    with servers.Redis(require.program("redis-server")) as server:
        url = f"mem://?size=16M | valkey://127.0.0.1:{server.port}"
        with kvengine.open(url, secret=secret) as engine:
            names = rig.names(engine, of)
            save_as_ranks(engine, names, tokens, whole, ranks(of, RANKS))
            assert engine.flush()
        with kvengine.open(url, secret=secret) as engine:
            names = rig.names(engine, of)
            for degree in (2, 1):
                for view in ranks(of, degree):
                    check_loaded(engine, names, tokens, whole, view)
            keys, nbytes = names.keys(tokens), engine._store.forms(names).usual.nbytes
        with server.client() as client:
            name = "kvengine:" + keys.key(2).hex()
            value = bytearray(client.get(name))
            assert len(value) == nbytes
            value[-1] ^= 1
            client.set(name, bytes(value))
        with kvengine.open(url, secret=secret) as engine:
            keys = rig.names(engine, of).part(heads=(0, 1)).keys(tokens)
            loaded = rig.load(engine, keys, rig.caches(keys.namespace.view.layout, BLOCKS))
            assert loaded.good.tolist() == [True, True, False, True, True]
            assert rig.poll(lambda: engine.probe(keys) == 2)


def test_slot_mappings_and_pipeline_ranges():
    """Stages of layers save token by token; a reader has three of four layers, half the heads."""
    of = layout(layer_parts=4, head_parts=2)
    whole, tokens = rig.caches(of, POOL, 1), rig.prompt(BLOCKS, of)
    slots = np.random.default_rng(1).permutation(POOL * of.block_tokens)[: BLOCKS * 16]
    with kvengine.open("mem://?size=16M") as engine:
        names = rig.names(engine, of)
        for stage in ((0, 1), (1, 4)):
            keys = names.part(layers=stage).keys(tokens)
            own = rig.cut(of, whole, stage, (0, 4))
            rig.save(engine, keys, own, slot_mapping=slots, fill=b"r")
        view = {"layers": (1, 4), "heads": (2, 4)}
        keys = names.part(**view).keys(tokens)
        here = keys.namespace.view.layout
        assert (here.layers, here.kv_heads) == (3, 2)
        target, back = rig.caches(here, POOL), np.arange(BLOCKS * 16)[::-1].copy()
        assert rig.load(engine, keys, target, slot_mapping=back).good.all()
        assert rig.same(here, target, back, rig.cut(of, whole, *ranges(of, view)), slots)
        engine.check()


@pytest.mark.parametrize("fidelity", ["exact", "int8", "int4"])
def test_codecs_encode_each_part_by_itself(fidelity, require):
    """What ranks of half the heads save is what one process saves of all; both read either."""
    require("numba")
    of = layout(dtype="bfloat16", head_dim=64, head_dim_v=64, head_parts=2, layers=2)
    draw = np.random.default_rng(3)
    bf16 = rig.numpy_dtype("bfloat16")
    whole = [
        tuple(draw.normal(size=shape).astype(bf16) for shape in rig.shapes(of, POOL))
        for _ in range(of.layers)
    ]
    tokens = rig.prompt(BLOCKS, of)
    with kvengine.open("mem://?size=32M") as engine:
        first = rig.names(engine, of, fidelity=fidelity, salt="ranks")
        other = rig.names(engine, of, fidelity=fidelity, salt="one")
        save_as_ranks(engine, first, tokens, whole, ranks(of, 2))
        rig.save(engine, other.keys(tokens), whole, WHERE)
        assert engine.probe(first.keys(tokens)) == engine.probe(other.keys(tokens)) == BLOCKS
        found = []
        for names in (first, other):
            target = rig.caches(of, BLOCKS)
            assert rig.load(engine, names.keys(tokens), target).good.all()
            found.append(target)
            for view in ranks(of, 2):
                here = names.part(**view).keys(tokens)
                part = rig.caches(here.namespace.view.layout, BLOCKS)
                assert rig.load(engine, here, part).good.all()
                want = rig.cut(of, target, *ranges(of, view))
                slots = np.arange(BLOCKS * 16)
                assert rig.same(here.namespace.view.layout, part, slots, want, slots)
        slots = np.arange(BLOCKS * 16)
        assert rig.same(of, *[x for each in found for x in (each, slots)])
        if fidelity == "exact":
            assert rig.same(of, found[0], slots, whole, rig.slots_of(of, WHERE))
            assert engine.stats()["memory_bytes"] < 2 * BLOCKS * frame_bytes(of)
        engine.check()


def test_a_part_that_finds_no_room_sends_its_block_to_the_spare_form(require):
    """The others' arrays may have changed by then: the block is a miss, and whole the next time."""
    require("numba")
    of = layout(dtype="bfloat16", head_dim=64, head_dim_v=64, head_parts=2, layers=2)
    draw = np.random.default_rng(3)
    bf16 = rig.numpy_dtype("bfloat16")
    whole = [
        tuple(draw.normal(size=shape).astype(bf16) for shape in rig.shapes(of, POOL))
        for _ in range(of.layers)
    ]
    odd = whole[1][0][WHERE[2]].view(np.uint16)  # any bits at all: exponents far apart
    odd[:, 2:] = draw.integers(0, 1 << 16, odd[:, 2:].shape, dtype=np.uint16)
    tokens = rig.prompt(BLOCKS, of)
    with kvengine.open("mem://?size=32M", reservation_s=3600) as engine:
        names = rig.names(engine, of)
        save_as_ranks(engine, names, tokens, whole, ranks(of, 2))
        keys = names.keys(tokens)
        assert engine.contains(keys).tolist() == [True, True, False, True, True]
        assert engine.metrics.get("overfull_blocks") == 1
        assert engine.metrics.get("incomplete_blocks") == 1
        save_as_ranks(engine, names, tokens, whole, ranks(of, 2))  # the same request does not try
        assert engine.probe(keys) == 2 and engine.stats()["quarantined_blocks"] == 0
        save_as_ranks(engine, names, tokens, whole, ranks(of, 2), fill=b"request 2")
        assert engine.probe(keys) == BLOCKS and engine.metrics.get("overfull_blocks") == 1
        for degree in (2, 1):
            for view in ranks(of, degree):
                check_loaded(engine, names, tokens, whole, view)


def test_one_missing_part_is_a_miss():
    of = layout()
    whole, tokens = rig.caches(of, POOL, 1), rig.prompt(BLOCKS, of)
    with kvengine.open("mem://?size=16M", reservation_s=0.05) as engine:
        names = rig.names(engine, of)
        views = ranks(of, RANKS)
        for transfer in save_as_ranks(engine, names, tokens, whole, views[:-1]):
            assert not transfer.good.any()
        assert engine.probe(names.keys(tokens)) == 0
        assert engine.stats()["memory_bytes"] > 0
        assert rig.poll(lambda: engine.match(names.keys(tokens)).blocks == 0 and gave_up(engine))
        assert engine.stats()["memory_bytes"] == 0
        (late,) = save_as_ranks(engine, names, tokens, whole, views[-1:])
        assert not late.good.any() and engine.probe(names.keys(tokens)) == 0
        assert rig.poll(lambda: engine.match(names.keys(tokens)).blocks == 0 and gave_up(engine, 2))
        assert engine.stats()["memory_bytes"] == 0, "a part that came late waits for no one"
        engine.check()


def gave_up(engine: Engine, times: int = 1) -> bool:
    return engine.metrics.get("incomplete_blocks", reason="missing") >= times * BLOCKS


def test_parts_of_two_fills_never_mix():
    """Two engines' ranks save the same prompt, crosswise, with other bytes: one of them counts."""
    of = layout(head_parts=2)
    tokens = rig.prompt(BLOCKS, of)
    views = ranks(of, 2)
    with kvengine.open("mem://?size=16M") as engine:
        for seed in range(5):
            names = rig.names(engine, of, salt=str(seed))
            caches = [rig.caches(of, POOL, 10 * seed + group) for group in (1, 2)]
            gate = threading.Barrier(4)

            def run(group: int, view: dict, names=names, caches=caches, gate=gate) -> None:
                own = rig.cut(of, caches[group], *ranges(of, view))
                keys = names.part(**view).keys(tokens)
                gate.wait(rig.WAIT_S)
                rig.save(engine, keys, own, WHERE, fill=b"group %d" % group)

            with ThreadPoolExecutor(4) as pool:
                jobs = [pool.submit(run, group, view) for group in (0, 1) for view in views]
                for job in jobs:
                    job.result()
            keys, target = names.keys(tokens), rig.caches(of, BLOCKS)
            blocks = rig.load(engine, keys, target).blocks
            for block in range(blocks):
                here, there = rig.slots_of(of, [block]), rig.slots_of(of, [WHERE[block]])
                assert any(rig.same(of, target, here, each, there) for each in caches)


def test_a_part_whose_bytes_change_takes_its_block_with_it():
    of = layout()
    whole, tokens = rig.caches(of, POOL, 1), rig.prompt(BLOCKS, of)
    with kvengine.open("mem://?size=16M") as engine:
        names = rig.names(engine, of)
        save_as_ranks(engine, names, tokens, whole, ranks(of, RANKS))
        keys = names.keys(tokens)
        form = engine._store.forms(names).usual
        with engine.match(keys) as lease:
            slot = int(engine._store.slots(lease.ids)[1])
        engine._store.arena.view(slot, form.nbytes)[form.payload(2) + 9] ^= 1
        fine, hurt = ({"heads": (at, at + 1)} for at in (0, 2))
        check_loaded(engine, names, tokens, whole, fine)
        target = names.part(**hurt).keys(tokens)
        loaded = rig.load(engine, target, rig.caches(target.namespace.view.layout, BLOCKS))
        assert loaded.good.tolist() == [True, False, True, True, True]
        assert engine.probe(keys) == 1 and engine.metrics.get("corrupt_blocks") == 1


def test_a_block_of_parts_is_verified_to_its_last_byte():
    """As tiers do it: frames of one block and one fill, zeros between them, nothing after them."""
    of = layout(kv_heads=8, head_dim=20, head_dim_v=40, dtype="float16")
    tokens = rig.prompt(1, of)
    with kvengine.open("mem://?size=16M") as engine:
        names = rig.names(engine, of)
        save_as_ranks(engine, names, tokens, rig.caches(of, POOL, 1), ranks(of, RANKS), table=[3])
        form, key = engine._store.forms(names).usual, names.keys(tokens)
        assert form.step > form.template.frame_bytes and len(form.templates) == RANKS
        with engine.match(key) as lease:
            slot = int(engine._store.slots(lease.ids)[0])
            room = bytearray(engine._store.arena.view(slot, form.nbytes))
    span = Span(key.key(0), memoryview(room), form.nbytes)
    verify(span)
    edges = [part * form.step + at for part in range(1, RANKS) for at in (-1, 0, 1)]
    for at in [*edges, 0, form.nbytes - 1, *np.random.default_rng(1).integers(0, len(room), 200)]:
        room[at] ^= 1
        with pytest.raises(FrameError):
            verify(span)
        room[at] ^= 1
    for nbytes in (form.template.frame_bytes + 1, form.step, form.step + 100, form.nbytes - 1):
        with pytest.raises(FrameError):
            verify(replace(span, nbytes=nbytes))
    longer = bytearray(form.nbytes + form.step)
    longer[: form.nbytes] = room
    with pytest.raises(FrameError):
        verify(Span(key.key(0), memoryview(longer), len(longer)))
    one, two = (slice(at * form.step, at * form.step + form.template.frame_bytes) for at in (1, 2))
    room[one], room[two] = room[two], room[one]
    good, _ = form.read(
        lambda slot, nbytes: memoryview(room)[:nbytes], [0], [key.key(0)], of.view()
    )
    assert not good.any(), "parts have changed places"


def test_headers_of_two_fills_in_one_slot_are_not_read():
    """However they have come there: a slot is read only where its parts are of one fill."""
    of = layout(head_parts=2)
    tokens = rig.prompt(1, of)
    with kvengine.open("mem://?size=16M") as engine:
        names = [rig.names(engine, of, salt=salt) for salt in "ab"]
        whole = rig.caches(of, POOL, 1)
        for each in names:
            rig.save(engine, each.keys(tokens), whole, WHERE[:1])
        form = engine._store.forms(names[0]).usual
        keys = names[0].keys(tokens)
        with engine.match(keys) as lease:
            room = engine._store.arena.view(int(engine._store.slots(lease.ids)[0]), form.nbytes)
        part = bytes(room[form.step : form.step + form.template.header_bytes])
        digests = form.templates[1].read([part], [keys.key(0)])[1]
        (other,) = form.templates[1].write([keys.key(0)], [bytes(32)], b"f" * 16, [0], digests)
        room[form.step : form.step + len(other)] = other
        assert not rig.load(engine, keys, rig.caches(of, 1)).good.any()
        assert engine.metrics.get("corrupt_blocks") == 1


def test_replicated_heads_have_one_writer():
    of = layout(kv_heads=2, head_parts=2)
    whole, tokens = rig.caches(of, POOL, 1), rig.prompt(BLOCKS, of)
    with kvengine.open("mem://?size=16M") as engine:
        names = rig.names(engine, of)
        views = [view for view in ranks(of, 2) for _ in range(2)]
        save_as_ranks(engine, names, tokens, whole, views)
        check_loaded(engine, names, tokens, whole, {})
        engine.check()


VIEWS = [
    *({"heads": heads} for heads in [(0, 1), (1, 2), (1, 3), (2, 7), (5, 8)]),
    *({"layers": layers} for layers in [(0, 1), (1, 3), (3, 4)]),
    {"layers": (1, 4), "heads": (3, 6)},
    {"layers": (2, 3), "heads": (4, 8)},
]


@pytest.mark.parametrize("fidelity", ["exact", "int8"])
@pytest.mark.parametrize("changes", [{}, {"order": "HND"}, {"dtype": "bfloat16"}], ids=str)
def test_readers_of_a_range_of_a_part(changes, fidelity, require):
    """Of more ranks than have saved, or of another cut altogether."""
    require("numba")
    of = layout(kv_heads=8, layer_parts=2, head_parts=2, head_dim=64, head_dim_v=64, **changes)
    draw, dtype = np.random.default_rng(3), rig.numpy_dtype(of.dtype)
    whole = [
        tuple(draw.normal(size=shape).astype(dtype) for shape in rig.shapes(of, POOL))
        for _ in range(of.layers)
    ]
    tokens = rig.prompt(BLOCKS, of)
    with kvengine.open("mem://?size=16M") as engine:
        names = rig.names(engine, of, fidelity=fidelity)
        save_as_ranks(engine, names, tokens, whole, ranks(of, 2))
        if fidelity != "exact":  # what is close to what was saved, but the same for all readers
            found = rig.caches(of, POOL)
            assert rig.load(engine, names.keys(tokens), found, WHERE).good.all()
            whole = found
        for view in VIEWS:
            check_loaded(engine, names, tokens, whole, view)
        engine.check()


@pytest.mark.parametrize(
    ("view", "said"),
    [
        ({"heads": (2, 2)}, "heads 2..2, expected a range within 0..4"),
        ({"heads": (2, 6)}, "heads 2..6, expected a range within 0..4"),
        ({"layers": (2, 5)}, "layers 2..5, expected a range within 0..4"),
        ({"layers": (-4, 4)}, "layers -4..4, expected a range within 0..4"),
    ],
)
def test_ranges_that_are_none_are_refused(view, said):
    with kvengine.open("mem://?size=4M") as engine:
        names = rig.names(engine, layout(head_parts=2))
        with pytest.raises(LayoutError, match=said):
            names.part(**view)


def test_what_does_not_fit_a_part_is_named():
    of = layout()
    with kvengine.open("mem://?size=16M") as engine:
        names = rig.names(engine, of)
        keys = names.part(heads=(1, 2)).keys(rig.prompt(2, of))
        own = rig.caches(keys.namespace.view.layout, POOL, 1)
        some = rig.names(engine, layout(head_parts=2)).part(heads=(1, 2)).keys(rig.prompt(2, of))
        with pytest.raises(LayoutError, match="head_end=2.* 1 x 2 parts: .* whole parts are saved"):
            engine.save(some, own, [0, 1], fill=b"r")
        for fill in (None, b"", "text", bytes(2000)):
            with pytest.raises(LayoutError, match="fill is .* that all ranks"):
                engine.save(keys, own, [0, 1], fill=fill)
        with pytest.raises(LayoutError, match=r"shape .* expected \(blocks, tokens, 1, 32\)"):
            engine.save(keys, rig.caches(of, POOL, 1), [0, 1], fill=b"r")
    with pytest.raises(LayoutError, match=f"at most {PARTS_MAX}"):
        layout(layers=64, layer_parts=64, head_parts=2)
