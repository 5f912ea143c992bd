"""kvengine.codec, by the engine's verbs: lossy blocks are close, verified, and never exact ones."""

from collections.abc import Iterator
from dataclasses import replace

import msgspec
import numpy as np
import pytest

import kvengine
import rig
from kvengine import Engine, Layout, LayoutError
from kvengine.codec import Forms, Lossless, Quantised, Raw, forms_of
from kvengine.frame import frame_bytes
from kvengine.kernels import copy, launch, quant

POOL = 9
# The largest mean square error of normal values over theirs: what 8 and 4 bits can do.
WORST = {"int8": 5e-4, "fp8": 1e-3, "int4": 0.015, "rot4": 0.015}
LAYOUTS = {
    "bf16": rig.layout(dtype="bfloat16", head_dim=64, head_dim_v=64),
    "hnd": rig.layout(dtype="float16", head_dim=80, head_dim_v=96, order="HND"),
    "flat": rig.layout(dtype="float32", head_dim=48, head_dim_v=128, paged=False),
    "latent": rig.layout(dtype="bfloat16", kv_heads=1, head_dim=576, head_dim_v=0),
}
each_scheme = pytest.mark.parametrize("scheme", quant.SCHEMES)


@pytest.fixture(params=["memory", "disk"])
def engine(request: pytest.FixtureRequest, tmp_path) -> Iterator[Engine]:
    disk = f" | file://{tmp_path}?size=64M" if request.param == "disk" else ""
    with kvengine.open(f"mem://?size=16M{disk}") as opened:
        yield opened
        opened.check()


def normal(of: Layout, blocks: int, seed: int = 0) -> rig.Caches:
    """A cache of values as K/V have them: each channel has a scale of its own."""
    draw = np.random.default_rng(seed)
    made = rig.caches(of, blocks)
    for layer in made:
        for array in layer:
            wide = draw.standard_normal(array.shape, np.float32)
            wide *= np.exp(draw.normal(0, 0.7, array.shape[-1])).astype(np.float32)
            array[...] = wide.astype(array.dtype)
    return made


def values(of: Layout, cache: rig.Caches, table: list[int]) -> np.ndarray:
    """The values of a cache's blocks, in order."""
    slots = rig.slots_of(of, table)
    dtype = rig.numpy_dtype(of.dtype)
    parts = [
        np.ascontiguousarray(rig.by_token(of, array)[slots]).view(dtype).astype(np.float64)
        for layer in cache
        for array in layer
    ]
    return np.concatenate([part.reshape(-1) for part in parts])


def error(of: Layout, one: rig.Caches, here: list[int], other: rig.Caches, there: list[int]):
    given, found = values(of, one, here), values(of, other, there)
    return ((given - found) ** 2).mean() / (given**2).mean()


def below(engine: Engine) -> None:
    """Move all that is held to the disk, where there is one."""
    assert engine.flush(rig.WAIT_S)
    if engine.stats()["tier_blocks"]:
        engine.squeeze(0)
        assert engine.stats()["memory_blocks"] == 0


@each_scheme
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_comes_back_is_close(engine, scheme, name):
    of = LAYOUTS[name]
    tokens = rig.prompt(5, of)
    keys = rig.names(engine, of, fidelity=scheme).keys(tokens)
    source, target = normal(of, POOL), rig.caches(of, POOL)
    given, places = [7, 0, 3, 8, 2], [1, 8, 4, 6, 0]
    saved = rig.save(engine, keys, source, given)
    assert saved.good.all() and saved.error is None
    below(engine)
    loaded = rig.load(engine, keys, target, places)
    assert loaded.good.all() and loaded.nbytes == 5 * of.payload_bytes
    assert rig.untouched(of, target, rig.slots_of(of, places))
    assert error(of, source, given, target, places) < WORST[scheme]
    # The first block of a prompt keeps 8 bits, or all of them.
    first = error(of, source, given[:1], target, places[:1])
    assert first < WORST["fp8"] if scheme in ("int4", "rot4") else first == 0
    # The same blocks by their slots.
    again = rig.caches(of, POOL)
    rig.load(engine, keys, again, slot_mapping=rig.slots_of(of, places))
    assert rig.same(of, again, rig.slots_of(of, places), target, rig.slots_of(of, places))
    assert engine.stats()["corrupt_blocks"] == 0


@each_scheme
def test_a_lossy_block_never_answers_another_fidelity(engine, scheme):
    of = LAYOUTS["bf16"]
    tokens = rig.prompt(3, of)
    rig.save(engine, rig.names(engine, of, fidelity=scheme).keys(tokens), normal(of, 3))
    for other in ("exact", *quant.SCHEMES):
        keys = rig.names(engine, of, fidelity=other).keys(tokens)
        assert engine.probe(keys) == (3 if other == scheme else 0)


@pytest.mark.parametrize("scheme", ("exact", *quant.SCHEMES))
def test_a_flipped_bit_is_found(engine, scheme):
    of = LAYOUTS["bf16"]
    names = rig.names(engine, of, fidelity=scheme)
    keys = names.keys(rig.prompt(4, of))
    rig.save(engine, keys, normal(of, 4))
    forms = engine._store.forms(names)
    draw = np.random.default_rng(1)
    for block in range(4):
        form = forms.usual if block else forms.first
        target = rig.caches(of, 4)
        with engine.match(keys[block : block + 1]) as lease:
            ids, slots, _ = engine._store.pin(lease, 0, 1)
            at = draw.integers(form.template.header_bytes, form.template.frame_bytes)
            engine._store.arena.view(int(slots[0]), form.template.frame_bytes)[at] ^= 1 << at % 8
            engine._store.unpin(ids)
            loaded = engine.load(lease, target, [block])
            assert loaded.wait(rig.WAIT_S)
        assert not loaded.good.any()
        good = loaded._verdicts == copy.GOOD
        assert good.sum() == of.layers - 1  # the other layer is right
        assert engine.stats()["corrupt_blocks"] == block + 1


def test_frames_are_smaller_and_the_first_is_not(engine):
    of = rig.layout(dtype="bfloat16", head_dim=128, head_dim_v=128, kv_heads=8, block_tokens=64)
    ratios = {"int8": 1.96, "fp8": 1.96, "int4": 3.55, "rot4": 3.87}
    for scheme, ratio in ratios.items():
        forms = forms_of(scheme, of)
        sizes = [int(form.segment_bytes.sum()) for form in (forms.usual, forms.first)]
        first = ratios["int8"] if scheme in ("int4", "rot4") else 1.0
        assert of.payload_bytes / sizes[0] == pytest.approx(ratio, abs=0.01)
        assert of.payload_bytes / sizes[1] == pytest.approx(first, abs=0.01)
        assert (
            sizes[0]
            == sum(sum(quant.planes(scheme, 8, 64, 128, keys)) for keys in (True, False))
            * of.layers
        )


@pytest.mark.parametrize(
    ("fidelity", "changes", "says"),
    [
        ("int9", {}, "'int9' is not known, expected one of exact, int8, fp8, int4, rot4"),
        ("int8 v9", {}, "is not known"),
        ("int8 v0 scale=row", {}, "is not known"),
        ("int8", {"dtype": "uint8"}, "'int8' of uint8, expected a layout of bfloat16"),
        ("fp8", {"dtype": "float8_e4m3fn"}, "of float8_e4m3fn, .*: ask for 'exact'"),
        ("int4", {"head_dim": 33}, "packs channels in pairs: heads of 33 are odd; ask for"),
        ("rot4", {"head_dim": 40}, "rot4 rotates 16 channels or more: heads of 40"),
    ],
)
def test_a_fidelity_that_does_not_fit_is_named(engine, fidelity, changes, says):
    with pytest.raises(LayoutError, match=says):
        rig.names(engine, rig.layout(**changes), fidelity=fidelity)
    opaque = Layout.opaque(layers=2, page_bytes=64, block_tokens=16, permutation="x")
    with pytest.raises(LayoutError, match="of opaque pages"):
        rig.names(engine, opaque, fidelity="int8")


def test_what_was_lossy_and_what_is_exact_share_the_memory(engine):
    """Frames of several sizes in one namespace: slots come and go, all blocks stay right."""
    of = LAYOUTS["bf16"]
    kept = []
    for turn in range(12):
        scheme = ("int4", "exact", "rot4", "int8")[turn % 4]
        keys = rig.names(engine, of, fidelity=scheme, salt=str(turn % 3)).keys(
            rig.prompt(40, of, turn)
        )
        source = normal(of, 40, turn)
        assert rig.save(engine, keys, source).good.all()
        kept.append((keys, source, WORST.get(scheme, 0.0)))
        engine.squeeze(1 << 20)
    for keys, source, worst in kept:
        target = rig.caches(of, 40)
        good = np.flatnonzero(rig.load(engine, keys, target).good).tolist()
        if good:
            assert error(of, source, good, target, good) <= worst


class Overfull(Quantised):
    """A codec, called exact here, that finds no room for a third of all blocks, in one layer."""

    def __init__(self, of: Layout) -> None:
        super().__init__(of, "fp8")
        self.encoding, self.fidelity = 1, "exact"

    def table(self, cache, frames, block_table, slot_mapping):
        self.blocks = block_table
        return super().table(cache, frames, block_table, slot_mapping)

    def encode(self, table, blocks, segments, digests, verdicts):
        super().encode(table, blocks, segments, digests, verdicts)
        for n in range(*blocks):
            if self.blocks[n] % 3 == 1:
                verdicts[n, segments[0]] = copy.OVERFULL


def test_an_overfull_block_is_saved_in_the_spare_form(engine):
    of = LAYOUTS["bf16"]
    overfull, raw = Overfull(of), Raw(of)
    identity = msgspec.structs.replace(rig.names(engine, of).identity, salt="overfull")
    forms = Forms(overfull, overfull, raw)
    names = engine._store.namespace(identity, of, bytes(32), forms)
    keys = names.keys(rig.prompt(POOL, of))
    source, target = normal(of, POOL), rig.caches(of, POOL)
    saved = rig.save(engine, keys, source)
    assert saved.good.all() and saved.nbytes == POOL * of.payload_bytes
    assert engine.metrics.get("overfull_blocks") == 3
    small = sum(map(int, overfull.segment_bytes))
    sizes = [6 * (4096 + -(-small // 4096) * 4096), 3 * frame_bytes(of)]
    assert engine.stats()["blocks"] == POOL
    assert engine.stats()["memory_bytes"] == sum(sizes)
    below(engine)
    assert rig.load(engine, keys, target).good.all()
    for block in range(POOL):
        worst = 0.0 if block % 3 == 1 else WORST["fp8"]
        assert error(of, source, [block], target, [block]) <= worst


OF_FOUR = {
    "bf16": rig.layout(dtype="bfloat16", kv_heads=4, head_dim=64, head_dim_v=80),
    "hnd": rig.layout(dtype="float16", kv_heads=4, head_dim=80, head_dim_v=96, order="HND"),
    "flat": rig.layout(dtype="float32", kv_heads=4, head_dim=48, head_dim_v=128, paged=False),
}


@pytest.mark.parametrize("scheme", ("exact", *quant.SCHEMES))
@pytest.mark.parametrize("name", OF_FOUR)
def test_a_cache_of_some_heads_gets_those(engine, scheme, name):
    of, places = OF_FOUR[name], [1, 8, 4, 6, 0]
    names = rig.names(engine, of, fidelity=scheme)
    keys = names.keys(rig.prompt(5, of))
    assert rig.save(engine, keys, normal(of, POOL), [7, 0, 3, 8, 2]).good.all()
    whole = rig.caches(of, POOL)
    assert rig.load(engine, keys, whole, places).good.all()
    axis = -2 if of.order == "NHD" else -3
    for first, last in ((1, 3), (3, 4)):
        below(engine)
        rank = replace(of, kv_heads=last - first)
        some = names.part(heads=(first, last)).keys(rig.prompt(5, of))
        for how in ({"table": places}, {"slot_mapping": rig.slots_of(of, places)}):
            target = rig.caches(rank, POOL)
            loaded = rig.load(engine, some, target, **how)
            assert loaded.good.all()
            for given, found in zip(whole, target, strict=True):
                for one, other in zip(given, found, strict=True):
                    cut = np.take(one.view(np.uint8), range(first, last), axis)
                    assert np.array_equal(cut, other.view(np.uint8))
    assert engine.stats()["corrupt_blocks"] == 0
    with pytest.raises(LayoutError, match="head=3, head_end=4.* 1 x 1 parts: .* whole parts are"):
        engine.save(some, target, places)
    with pytest.raises(LayoutError, match="has shape .*, expected"):
        engine.load(engine.match(some), whole, places)


def test_a_scheme_has_a_codec():
    of = LAYOUTS["bf16"]
    for scheme in quant.SCHEMES:
        codec = Quantised(of, scheme)
        assert codec.fidelity.startswith(f"{scheme} v")
        assert forms_of(codec.fidelity, of).usual.encoding == codec.encoding


def words(of: Layout, cache: rig.Caches, table: list[int]) -> list[np.ndarray]:
    slots = rig.slots_of(of, table)
    return [rig.by_token(of, array)[slots] for layer in cache for array in layer]


@pytest.mark.parametrize(
    "of",
    [
        LAYOUTS["bf16"],
        LAYOUTS["latent"],
        rig.layout(dtype="bfloat16", head_dim=80, head_dim_v=96, order="HND", block_tokens=33),
        rig.layout(dtype="bfloat16", head_dim=128, head_dim_v=128, paged=False, block_tokens=64),
    ],
    ids=["bf16", "latent", "odd", "flat"],
)
def test_bf16_is_kept_bit_for_bit_in_less_memory(engine, of):
    keys = rig.names(engine, of).keys(rig.prompt(5, of))
    source, target = normal(of, POOL), rig.caches(of, POOL)
    given, places = [7, 0, 3, 8, 2], [1, 8, 4, 6, 0]
    saved = rig.save(engine, keys, source, given)
    assert saved.good.all() and saved.nbytes == 5 * of.payload_bytes
    pages = -(-int(Lossless(of).segment_bytes.sum()) // 4096)
    stats = engine.stats()
    assert stats["memory_bytes"] == 5 * 4096 * (1 + pages)
    assert stats["memory_bytes"] < 5 * frame_bytes(of)
    below(engine)
    assert rig.load(engine, keys, target, places).good.all()
    assert rig.untouched(of, target, rig.slots_of(of, places))
    for one, other in zip(words(of, source, given), words(of, target, places), strict=True):
        assert np.array_equal(one, other)
    again = rig.caches(of, POOL)
    rig.load(engine, keys, again, slot_mapping=rig.slots_of(of, places))
    assert rig.same(of, again, rig.slots_of(of, places), target, rig.slots_of(of, places))
    stats = engine.stats()
    assert stats["corrupt_blocks"] == 0 and engine.metrics.get("overfull_blocks") == 0


def test_a_block_of_any_bytes_is_kept_as_it_is(engine):
    """Random bytes have no exponents in common: those blocks are counted, and saved raw."""
    of = LAYOUTS["bf16"]
    keys = rig.names(engine, of).keys(rig.prompt(POOL, of))
    source, noise = normal(of, POOL), rig.caches(of, POOL, seed=3)
    for layer, twin in zip(source, noise, strict=True):
        layer[1][1::3] = twin[1][1::3]
    assert rig.save(engine, keys, source).good.all()
    assert engine.metrics.get("overfull_blocks") == 3
    small = 4096 + int(Lossless(of).segment_bytes.sum())
    assert engine.stats()["memory_bytes"] == 6 * small + 3 * frame_bytes(of)
    below(engine)
    assert rig.check_right(engine, keys, source).all()


def test_engines_with_and_without_it_read_each_other(tmp_path):
    of = LAYOUTS["bf16"]
    one, two = normal(of, 4, seed=1), normal(of, 4, seed=2)
    place = f"file://{tmp_path}?size=64M"

    def opened(lossless: int) -> Engine:
        return kvengine.open(f"mem://?size=16M&lossless={lossless} | {place}")

    def held(engine: Engine, seed: int):
        return rig.names(engine, of).keys(rig.prompt(4, of, seed))

    sizes = []
    with opened(1) as engine:
        assert rig.save(engine, held(engine, 1), one).good.all()
        sizes.append(engine.stats()["memory_bytes"])
    with opened(0) as engine:
        assert rig.check_right(engine, held(engine, 1), one).all()
        assert not rig.save(engine, held(engine, 1), one).nbytes  # it is held already
        engine.squeeze(0)
        assert rig.save(engine, held(engine, 2), two).good.all()
        sizes.append(engine.stats()["memory_bytes"])
    assert sizes == [4 * (4096 + int(Lossless(of).segment_bytes.sum())), 4 * frame_bytes(of)]
    with opened(1) as engine:
        assert rig.check_right(engine, held(engine, 2), two).all()
        assert rig.check_right(engine, held(engine, 1), one).all()
        assert engine.stats()["corrupt_blocks"] == 0


def test_without_numba_blocks_are_kept_as_they_are(engine, monkeypatch):
    """Plain numpy codes at a hundredth of memcpy: it reads what others have coded, no more."""
    of = LAYOUTS["bf16"]
    keys = rig.names(engine, of).keys(rig.prompt(4, of))
    source = normal(of, 4)
    assert rig.save(engine, keys, source).good.all()
    monkeypatch.setattr(launch, "native", lambda: None)
    monkeypatch.setattr(launch, "available", lambda package: package != "numba")
    assert rig.check_right(engine, keys, source).all()
    names = rig.names(engine, of, salt="plain")
    assert [type(form.codec) for form in engine._store.forms(names)] == [Raw, Lossless]
    other = names.keys(rig.prompt(4, of))
    assert rig.save(engine, other, source).good.all()
    assert rig.check_right(engine, other, source).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"dtype": "bfloat16", "block_tokens": 1},
        {"dtype": "bfloat16", "head_dim": 33},
        {"dtype": "bfloat16", "head_dim_v": 12},
        {"dtype": "uint8"},
    ],
)
def test_what_would_not_get_smaller_is_kept_as_it_is(changes):
    of = rig.layout(**changes)
    assert not Lossless.pays(of)
    assert [type(each) for each in forms_of("exact", of)] == [Raw]
    assert [type(each) for each in forms_of("exact", LAYOUTS["bf16"])] == [Lossless, Raw]
