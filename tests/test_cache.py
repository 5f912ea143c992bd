"""kvengine.cache, by the engine's verbs: which arrays and tables fit, what the others are told."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

import kvengine
import rig
from kvengine import Engine, Layout, LayoutError

BLOCKS = 5
F32 = rig.layout()
OPAQUE = Layout.opaque(layers=2, page_bytes=600, block_tokens=16, permutation="x")
LATENT = rig.layout(kv_heads=1, head_dim=72, head_dim_v=0)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with kvengine.open("mem://?size=128M") as opened:
        yield opened


class Elsewhere:
    """A mock: an array of DLPack whose memory lies on a CUDA device (no capsule is looked into)."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: object) -> object:
        from kvengine.adapters.array import export, view

        class Lying:
            def __init__(self, inner: object) -> None:
                self.inner = inner

        found = view(self.array)
        fields = {name: getattr(found, name) for name in found.__slots__ if name != "device"}
        return export(type(found)(device=("cuda", 0), **fields)).__dlpack__()


def misaligned(array: np.ndarray) -> np.ndarray:
    raw = np.zeros(array.nbytes + 1, np.uint8)[1:]
    return raw.view(array.dtype).reshape(array.shape)


def frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def first(change: Callable[[np.ndarray], object]) -> Callable[[list], list]:
    """Change the first array of the second layer."""

    def changed(cache: list) -> list:
        return [cache[0], (change(cache[1][0]), *cache[1][1:])]

    return changed


# name, layout, what is done to good caches, what the message says: given, expected, what to do
ARRAYS = [
    ("too few layers", F32, lambda c: c[:1], "1 layers.* has 2.*give one item a layer"),
    ("too many layers", F32, lambda c: c * 2, "4 layers.* has 2.*give one item a layer"),
    ("K alone", F32, lambda c: [c[0], (c[1][0],)], "layer 1.*1 arrays, expected 2"),
    ("three arrays", F32, lambda c: [c[0], c[1] + c[1][:1]], "layer 1.*3 arrays, expected 2"),
    ("one array", F32, lambda c: [c[0], c[1][0]], r"layer 1.*\(5, .*expected \(K, V\)"),
    ("pair of latents", LATENT, lambda c: [c[0], c[1] * 2], "layer 1.*2 arrays, expected 1"),
    (
        "dtype",
        F32,
        first(lambda a: np.zeros(a.shape, np.float16)),
        "layer 1.*float16.*float32.*cast",
    ),
    ("dtype of pages", OPAQUE, first(lambda a: a.view(np.int16)), "layer 1.*int16.*1-byte"),
    (
        "dtype no one knows",
        F32,
        first(lambda a: np.zeros(a.shape, np.complex64)),
        "complex64.*float32.*cast",
    ),
    ("no array", F32, first(lambda a: a.tolist()), "list is not an array.*__dlpack__"),
    ("heads", F32, first(lambda a: a[:, :, :1]), r"layer 1.*\(5, 16, 1, 32\), expected .*2, 32"),
    ("width", F32, first(lambda a: a[..., :16]), r"\(5, 16, 2, 16\), expected \(blocks, tokens"),
    ("axes", F32, first(lambda a: a[0]), r"\(16, 2, 32\), expected \(blocks, tokens, 2, 32\)"),
    ("page size", OPAQUE, first(lambda a: a[:, :500]), r"\(5, 500\), expected \(blocks, 600\)"),
    ("fewer blocks", F32, first(lambda a: a[:4]), r"layer 1.*\(4, .*another number of blocks"),
    ("reversed", F32, first(lambda a: a[::-1]), "layer 1.*stride -.*contiguous"),
    ("wide last axis", F32, first(lambda a: np.repeat(a, 2, -1)[..., ::2]), "last axis.*contig"),
    ("misaligned", F32, first(misaligned), "layer 1.*no multiple of 4 bytes.*aligned"),
    ("device (mock)", F32, first(Elsewhere), "layer 1.*cuda:0.*host.*CPU"),
]
FOR_LOAD = [
    ("expanded", F32, first(lambda a: np.broadcast_to(a[:1], a.shape)), "read-only|share memory"),
    ("read-only", F32, first(frozen), "read-only, expected memory to write to: pass a writable"),
]


@pytest.mark.parametrize(
    ("of", "change", "says"), [c[1:] for c in ARRAYS], ids=[c[0] for c in ARRAYS]
)
@pytest.mark.parametrize("verb", ["save", "load"])
def test_arrays_that_do_not_fit(engine, verb, of, change, says):
    keys = rig.names(engine, of).keys(rig.prompt(2, of))
    cache = rig.caches(of, BLOCKS, 1)
    rig.save(engine, keys, cache)
    given = change(cache)
    with engine.match(keys) as lease, pytest.raises(LayoutError, match=f"(?s){says}"):
        if verb == "save":
            engine.save(keys, given, [0, 1])
        else:
            engine.load(lease, given, [0, 1])


@pytest.mark.parametrize(
    ("of", "change", "says"), [c[1:] for c in FOR_LOAD], ids=[c[0] for c in FOR_LOAD]
)
def test_arrays_that_may_be_saved_but_not_loaded(engine, of, change, says):
    names = rig.names(engine, of, salt=says)
    keys = names.keys(rig.prompt(2, of))
    given = change(rig.caches(of, BLOCKS, 1))
    assert rig.save(engine, keys, given).good.all()
    assert rig.check_right(engine, keys, given).all()
    for cache in (given, engine.cache(names, given, writable=False)):
        with engine.match(keys) as lease, pytest.raises(LayoutError, match=says + "|saving only"):
            engine.load(lease, cache, [0, 1])


TABLES = [
    ("neither", {}, "either block_table or slot_mapping"),
    ("both", {"block_table": [0, 1], "slot_mapping": range(32)}, "either block_table or slot_map"),
    ("floats", {"block_table": [0.0, 1.0]}, "integers, got float64"),
    ("bools", {"block_table": np.array([True, False])}, "integers, got bool"),
    ("texts", {"block_table": ["0", "1"]}, "integers, got <U1"),
    ("huge numbers", {"block_table": [0, 10**30]}, "integers, got object"),
    ("wrapped", {"block_table": np.array([0, 2**63], np.uint64)}, r"block_table names -?\d+"),
    ("negative", {"block_table": [0, -1]}, r"names -1\.\.0, the cache has 0\.\.4"),
    ("too large", {"block_table": [5, 0]}, r"names 0\.\.5, the cache has 0\.\.4"),
    ("slot too large", {"slot_mapping": [*range(31), 80]}, r"names 0\.\.80, the cache has 0\.\.79"),
    ("a part of a block", {"slot_mapping": range(31)}, "31 tokens is no multiple of 16.*leave out"),
    ("too many", {"block_table": [0, 1, 2]}, "3 blocks, at most 2"),
    ("too many slots", {"slot_mapping": range(48)}, "3 blocks, at most 2"),
    ("ragged", {"block_table": [[0], [1, 2]]}, "block_table"),
    ("device (mock)", {"block_table": Elsewhere(np.arange(2))}, "block_table"),
]


@pytest.mark.parametrize("verb", ["save", "load"])
@pytest.mark.parametrize(("given", "says"), [c[1:] for c in TABLES], ids=[c[0] for c in TABLES])
def test_tables_that_do_not_fit(engine, verb, given, says):
    keys = rig.names(engine, F32).keys(rig.prompt(2, F32))
    cache = rig.caches(F32, BLOCKS, 1)
    rig.save(engine, keys, cache)
    with engine.match(keys) as lease, pytest.raises(LayoutError, match=says):
        if verb == "save":
            engine.save(keys, cache, **given)
        else:
            engine.load(lease, cache, **given)


def test_a_place_may_be_saved_twice_but_loaded_into_once(engine):
    keys = rig.names(engine, F32, salt="twice").keys(rig.prompt(2, F32))
    cache = rig.caches(F32, BLOCKS, 1)
    assert rig.save(engine, keys, cache, [3, 3]).good.all()
    target = rig.caches(F32, 2)
    assert rig.load(engine, keys, target).good.all()
    slots = rig.slots_of(F32, [3, 3])
    assert rig.same(F32, target, np.arange(32), cache, slots)
    for given in ({"block_table": [1, 1]}, {"slot_mapping": [0] * 32}):
        with engine.match(keys) as lease, pytest.raises(LayoutError, match="twice"):
            engine.load(lease, target, **given)


def test_tables_of_other_counts_and_first(engine):
    keys = rig.names(engine, F32, salt="first").keys(rig.prompt(3, F32))
    cache = rig.caches(F32, BLOCKS, 1)
    with pytest.raises(LayoutError, match="2 blocks and 3 keys: give one for each"):
        engine.save(keys, cache, [0, 1])
    rig.save(engine, keys, cache)
    with engine.match(keys) as lease:
        for wrong in (-1, 4):
            with pytest.raises(LayoutError, match=f"first is {wrong}, the lease has 3"):
                engine.load(lease, cache, [0], first=wrong)
        with pytest.raises(LayoutError, match="at most 2"):
            engine.load(lease, cache, [0, 1, 2], first=1)
        none = engine.load(lease, cache, [], first=3)
        assert none.wait(1) and not len(none.good)


def test_opaque_pages_have_no_slots(engine):
    keys = rig.names(engine, OPAQUE).keys(rig.prompt(2, OPAQUE))
    with pytest.raises(LayoutError, match="no token slots: use block_table"):
        engine.save(keys, rig.caches(OPAQUE, BLOCKS, 1), slot_mapping=range(32))


def test_pages_of_another_size_go_by_slot(engine):
    keys = rig.names(engine, F32, salt="pages").keys(rig.prompt(2, F32))
    pages = rig.caches(rig.layout(block_tokens=4), 20, 1)
    with pytest.raises(LayoutError, match="pages of 4 tokens and blocks of 16: use slot_mapping"):
        engine.save(keys, pages, [0, 1])
    slots = np.random.default_rng(0).permutation(80)[:32]
    assert rig.save(engine, keys, pages, slot_mapping=slots).good.all()
    target = rig.caches(F32, 2)
    assert rig.load(engine, keys, target).good.all()
    assert rig.same(F32, target, np.arange(32), pages, slots)


def test_a_cache_checked_once_serves_its_layout_only(engine):
    mine = rig.names(engine, F32)
    other = rig.names(engine, rig.layout(head_dim_v=64))
    cache = engine.cache(mine, rig.caches(F32, BLOCKS, 1))
    keys = mine.keys(rig.prompt(2, F32))
    assert engine.save(keys, cache, [0, 1]).wait(rig.WAIT_S)
    with pytest.raises(LayoutError, match="another layout"):
        engine.save(other.keys(rig.prompt(2, F32)), cache, [0, 1])


LAYOUTS = [
    ({"layer_parts": 3}, r"layer_parts must divide Layout.layers \(2\), got 3"),
    ({"head_parts": 4}, r"head_parts must divide Layout.kv_heads \(2\), got 4"),
    ({"attention": "sliding"}, "window_tokens is 0 .*: with attention 'sliding' a window has"),
    ({"attention": "local"}, "'full', 'sliding' or 'state', got 'local'"),
    ({"dtype": "float8"}, "'float8' is not one of .*float8_e4m3fn"),
    ({"order": "DHN"}, "'NHD' or 'HND', got 'DHN'"),
    ({"layers": 0}, "Layout.layers must be a whole number of at least 1, got 0"),
    ({"layers": 5000}, "at most 4096, got 5000"),
    ({"kv_heads": 1.5}, "Layout.kv_heads .* got 1.5"),
    ({"block_tokens": -16}, "Layout.block_tokens"),
    ({"head_dim_v": -1}, "Layout.head_dim_v"),
]


@pytest.mark.parametrize(("changes", "says"), LAYOUTS, ids=lambda each: str(each)[:30])
def test_layouts_that_are_refused(changes, says):
    with pytest.raises(LayoutError, match=says):
        rig.layout(**changes)


def test_pages_without_a_name_for_their_order_are_refused():
    with pytest.raises(LayoutError, match="permutation"):
        Layout.opaque(layers=2, page_bytes=600, block_tokens=16, permutation="")


def test_a_block_larger_than_the_memory_is_refused(engine):
    with pytest.raises(LayoutError, match=r"takes \d+ bytes, the arena has 134217728: open .*more"):
        rig.names(engine, rig.layout(head_dim=1 << 20))


def test_joined_arrays(engine):
    """One [2, ...] array a layer is K and V, for both verbs."""
    keys = rig.names(engine, F32, salt="joined").keys(rig.prompt(2, F32))
    source = rig.caches(F32, BLOCKS, 1)
    assert rig.save(engine, keys, [np.stack(layer) for layer in source], [4, 1]).good.all()
    target = [np.stack(layer) for layer in rig.caches(F32, BLOCKS)]
    assert rig.load(engine, keys, target, [0, 3]).good.all()
    split = [tuple(layer) for layer in target]
    written, from_ = rig.slots_of(F32, [0, 3]), rig.slots_of(F32, [4, 1])
    assert rig.same(F32, split, written, source, from_)
    assert rig.untouched(F32, split, written)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float16"])
def test_torch_caches(engine, require, dtype):
    """Views of one big tensor, K and V side by side, as serving engines have them."""
    torch = require("torch")
    of = rig.layout(dtype=dtype)
    keys = rig.names(engine, of).keys(rig.prompt(3, of))
    size = (BLOCKS, 2, 16, 2, 32 * of.item_bytes)

    def views(tensor: object) -> list:
        return [(each[:, 0], each[:, 1]) for each in tensor]

    source = torch.randint(0, 256, (2, *size), dtype=torch.uint8).view(getattr(torch, dtype))
    target = torch.full((2, *size), rig.POISON, dtype=torch.uint8).view(getattr(torch, dtype))
    assert not source[0][:, 0].is_contiguous()
    assert rig.save(engine, keys, views(source), torch.tensor([4, 0, 2])).good.all()
    assert rig.load(engine, keys, views(target), torch.tensor([1, 2, 0])).good.all()
    left, right = target.view(torch.uint8), source.view(torch.uint8)
    assert torch.equal(left[:, [1, 2, 0]], right[:, [4, 0, 2]])
    assert (left[:, 3:] == rig.POISON).all()


def test_jax_caches_are_saved_only(engine, require):
    jnp = require("jax.numpy")
    keys = rig.names(engine, F32, salt="jax").keys(rig.prompt(2, F32))
    source = rig.caches(F32, BLOCKS, 1)
    arrays = [tuple(jnp.asarray(each) for each in layer) for layer in source]
    assert rig.save(engine, keys, arrays).good.all()
    assert rig.check_right(engine, keys, [tuple(map(np.asarray, layer)) for layer in arrays]).all()
    with engine.match(keys) as lease, pytest.raises(LayoutError, match="jax arrays are immutable"):
        engine.load(lease, arrays, [0, 1])
