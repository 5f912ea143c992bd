"""kvengine.adapters.jax: blocks of paged pools that JAX owns, in place, bit for bit, and shared."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

import kvengine
import rig
from kvengine import Engine, Layout, LayoutError

jax = pytest.importorskip("jax")

from jax import numpy as jnp  # noqa: E402

from kvengine.adapters import jax as adapter  # noqa: E402

POOL = 9
FORMS = {
    "apart": (rig.layout(dtype="float32"), None),
    "hnd": (rig.layout(dtype="bfloat16", kv_heads=3, order="HND", head_dim_v=48), None),
    "flat": (rig.layout(dtype="float16", paged=False), 1),
    "interleaved": (rig.layout(dtype="bfloat16", kv_heads=4, order="HND", paged=False), 1),
    "packed": (rig.layout(dtype="bfloat16", kv_heads=4), 2),
    "packed_with_room": (rig.layout(dtype="float8_e4m3fn", kv_heads=3), 4),
    "packed_float32": (rig.layout(dtype="float32", kv_heads=2), 4),
    "latent": (rig.layout(dtype="bfloat16", kv_heads=1, head_dim=72, head_dim_v=0), None),
}


@pytest.fixture
def engine() -> Iterator[Engine]:
    with kvengine.open("mem://?size=16M", threads=1) as opened:
        yield opened
        opened.check()


def pool_of(of: Layout, packing: int | None, blocks: int = POOL) -> list[Any]:
    """Caches of random bits: K and V apart, or interleaved in groups."""
    draw = np.random.default_rng(7)
    shapes = [(blocks, of.block_tokens, of.kv_heads, dim) for dim in of.head_dims]
    if packing is not None:
        groups = -(-2 * of.kv_heads // packing)
        heads = (2 * of.kv_heads,) if packing == 1 else (groups, packing)
        shapes = [(blocks, of.block_tokens, *heads, of.head_dim)]
    caches = []
    for _ in range(of.layers):
        words = [
            draw.integers(0, 256, (*shape[:-1], shape[-1] * of.item_bytes), dtype=np.uint8)
            for shape in shapes
        ]
        arrays = [jnp.array(each.view(rig.numpy_dtype(of.dtype))) for each in words]
        caches.append(tuple(arrays) if len(arrays) > 1 else arrays[0])
    return caches


def leaves(caches: list[Any]) -> list[Any]:
    return jax.tree_util.tree_leaves(caches)


def pointers(caches: list[Any]) -> list[int]:
    return [each.unsafe_buffer_pointer() for each in leaves(caches)]


def bits(array: Any) -> np.ndarray:
    return np.asarray(array).view(np.uint8).copy()


def halves(of: Layout, caches: list[Any]) -> list[list[np.ndarray]]:
    """The bits of K and V of each layer: [blocks, tokens, heads, bytes]."""
    found = []
    for item in caches:
        if isinstance(item, tuple) or of.head_dim_v == 0:
            found.append([bits(each) for each in leaves([item])])
            continue
        flat = bits(item).reshape(*item.shape[:2], -1, of.head_dim * of.item_bytes)
        found.append([flat[:, :, half : 2 * of.kv_heads : 2] for half in (0, 1)])
    return found


def reference(of: Layout, cache: rig.Caches) -> list[list[np.ndarray]]:
    """The same of a numpy cache in the layout's own order of axes."""
    found = []
    for layer in cache:
        row = []
        for array in layer:
            raw = array.view(np.uint8)
            raw = raw.swapaxes(-2, -3) if of.order == "HND" else raw
            row.append(raw.reshape(-1, of.block_tokens, *raw.shape[-2:]))
        found.append(row)
    return found


@pytest.mark.parametrize("name", FORMS)
def test_blocks_go_in_and_out_bit_for_bit_and_in_place(engine: Engine, name: str) -> None:
    of, packing = FORMS[name]
    caches = pool_of(of, packing)
    names = rig.names(engine, of)
    pool = adapter.PagedPool(engine, names, caches, interleaved=packing is not None)
    source, given, places = rig.caches(of, POOL, seed=1), [7, 0, 3, 8, 2], [1, 8, 4, 6, 0]
    keys = names.keys(rig.prompt(5, of))
    assert rig.save(engine, keys, source, given).good.all()
    before, was = [bits(each) for each in leaves(caches)], halves(of, caches)
    for step in range(3):  # the second and third time over itself
        at, old = pointers(caches), leaves(caches)
        with engine.match(keys) as lease:
            caches, blocks = pool.load(lease, caches, jnp.array(places))
        assert blocks == 5 and pointers(caches) == at, step
        assert all(each.is_deleted() for each in old)
    rest = [block for block in range(POOL) if block not in places]
    for found, wanted, old_half in zip(halves(of, caches), reference(of, source), was, strict=True):
        for one, other, old_one in zip(found, wanted, old_half, strict=True):
            assert np.array_equal(one[places], other[given])
            assert np.array_equal(one[rest], old_one[rest])
    for one, other in zip(leaves(caches), before, strict=True):
        assert np.array_equal(bits(one)[rest], other[rest])
    # Out again under another name, while the pool goes on being donated.
    other = rig.names(engine, of, salt="again").keys(rig.prompt(5, of))
    at = pointers(caches)
    saved = pool.save(other, caches, np.array(places, np.int64))
    with engine.match(keys) as lease:
        caches, _ = pool.load(lease, caches, rest[:4])
    assert pointers(caches) == at
    assert saved.wait(rig.WAIT_S) and saved.good.all()
    back = rig.caches(of, POOL)
    assert rig.load(engine, other, back, given).good.all()
    where = rig.slots_of(of, given)
    assert rig.same(of, back, where, source, where)


def test_long_loads_go_by_windows_and_end_at_a_bad_block(engine: Engine) -> None:
    of = rig.layout(dtype="float32")
    names, source = rig.names(engine, of), rig.caches(of, 20, seed=1)
    keys = names.keys(rig.prompt(20, of))
    assert rig.save(engine, keys, source).good.all()
    caches = pool_of(of, None, blocks=24)
    pool = adapter.PagedPool(engine, names, caches, staged_bytes=3 * of.payload_bytes)
    untouched = bits(caches[0][0])
    at = pointers(caches)
    with engine.match(keys) as lease:
        caches, blocks = pool.load(lease, caches, np.arange(20)[::-1])
    assert blocks == 20 and pointers(caches) == at
    wanted = reference(of, source)
    for found, other in zip(halves(of, caches), wanted, strict=True):
        assert all(np.array_equal(a[:20], b[::-1]) for a, b in zip(found, other, strict=True))
    assert np.array_equal(bits(caches[0][0])[20:], untouched[20:])

    caches = pool_of(of, None, blocks=24)
    form = engine._store.forms(names).usual
    with engine.match(keys) as lease:
        ids, slots, _ = engine._store.pin(lease, 10, 1)
        engine._store.arena.view(int(slots[0]), form.template.frame_bytes)[-1] ^= 1
        engine._store.unpin(ids)
        caches, blocks = pool.load(lease, caches, np.arange(2, 20), first=2)
    assert blocks == 8  # two windows, and two blocks of the third
    for found, other in zip(halves(of, caches), wanted, strict=True):
        assert all(np.array_equal(a[2:10], b[2:10]) for a, b in zip(found, other, strict=True))
    assert np.array_equal(bits(caches[0][0])[10:], untouched[10:])
    with engine.match(keys) as lease:  # the bad one is gone: the next is a miss
        caches, blocks = pool.load(lease, caches, np.arange(lease.blocks))
        assert blocks == lease.blocks == 10


def test_what_comes_too_late_is_not_in(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    of = rig.layout(dtype="float32")
    names = rig.names(engine, of)
    keys = names.keys(rig.prompt(4, of))
    assert rig.save(engine, keys, rig.caches(of, 4, seed=1)).good.all()
    caches = pool_of(of, None)
    pool = adapter.PagedPool(engine, names, caches)
    before = bits(caches[0][0])
    never = kvengine.Transfer(4, of.layers)
    load = Engine.load
    monkeypatch.setattr(Engine, "load", lambda *args, **how: (load(*args, **how), never)[1])
    with engine.match(keys) as lease:
        caches, blocks = pool.load(lease, caches, np.arange(4), timeout_s=0.0)
    assert blocks == 0 and never.cancelled and np.array_equal(bits(caches[0][0]), before)
    assert not pool._stages  # its memory is used no more
    monkeypatch.undo()
    with engine.match(keys) as lease:
        assert pool.load(lease, caches, np.arange(4))[1] == 4


def test_a_fault_of_ours_is_a_counted_miss(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    of = rig.layout(dtype="float32")
    names = rig.names(engine, of)
    keys = names.keys(rig.prompt(4, of))
    assert rig.save(engine, keys, rig.caches(of, 4, seed=1)).good.all()
    caches = pool_of(of, None)
    pool = adapter.PagedPool(engine, names, caches)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(Engine, "load", broken)
    monkeypatch.setattr(Engine, "save", broken)
    at = pointers(caches)
    with engine.match(keys) as lease:
        caches, blocks = pool.load(lease, caches, np.arange(4))
    assert blocks == 0 and pointers(caches) == at
    saved = pool.save(keys, caches, np.arange(4))
    assert saved.done() and not saved.good.any()
    assert engine.metrics.get("adapter_errors", adapter="jax") == 2


def test_a_pool_of_some_heads_loads_those(engine: Engine) -> None:
    of = rig.layout(dtype="bfloat16", kv_heads=4)
    names, source = rig.names(engine, of), rig.caches(of, 3, seed=1)
    keys = names.keys(rig.prompt(3, of))
    assert rig.save(engine, keys, source).good.all()
    mine, some = pool_of(replace(of, kv_heads=2), 1), names.part(heads=(1, 3))
    pool = adapter.PagedPool(engine, some, mine, interleaved=True)
    with engine.match(some.keys(rig.prompt(3, of))) as lease:
        mine, blocks = pool.load(lease, mine, [4, 0, 5])
    assert blocks == 3
    rank = replace(of, kv_heads=2)
    for found, wanted in zip(halves(rank, mine), reference(of, source), strict=True):
        for one, other in zip(found, wanted, strict=True):
            assert np.array_equal(one[[4, 0, 5]], other[:, :, 1:3])


def test_ranks_save_parts_that_one_loads(engine: Engine) -> None:
    of = rig.layout(dtype="float32", kv_heads=4, head_parts=2)
    names = rig.names(engine, of)
    tokens = rig.prompt(3, of)
    ranks = []
    for first in (0, 2):
        part = names.part(heads=(first, first + 2))
        caches = pool_of(replace(of, kv_heads=2, head_parts=1), 2)
        pool = adapter.PagedPool(engine, part, caches, interleaved=True)
        saved = pool.save(part.keys(tokens), caches, [2, 7, 1], fill=b"step 1")
        assert saved.wait(rig.WAIT_S)
        ranks.append(halves(replace(of, kv_heads=2), caches))
    whole = pool_of(of, None)
    pool = adapter.PagedPool(engine, names, whole)
    with engine.match(names.keys(tokens)) as lease:
        whole, blocks = pool.load(lease, whole, [0, 1, 2])
    assert blocks == 3
    for found, *parts in zip(halves(of, whole), *ranks, strict=True):
        for one, low, high in zip(found, *parts, strict=True):
            both = np.concatenate([low, high], axis=2)
            assert np.array_equal(one[:3], both[[2, 7, 1]])


SHARDED = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import kvengine, rig, test_jax
from kvengine.adapters.jax import PagedPool

mesh = Mesh(np.array(jax.devices()), ("tp",))
for name, spec in (("apart", (None, None, "tp")), ("packed", (None, None, "tp")),
                   ("interleaved", (None, None, "tp"))):
    of, packing = test_jax.FORMS[name]
    where = NamedSharding(mesh, PartitionSpec(*spec))
    caches = jax.tree_util.tree_map(
        lambda each: jax.device_put(each, where), test_jax.pool_of(of, packing)
    )
    shards = lambda: [
        shard.data.unsafe_buffer_pointer()
        for each in jax.tree_util.tree_leaves(caches) for shard in each.addressable_shards
    ]
    with kvengine.open("mem://?size=16M", threads=1) as engine:
        names, source = rig.names(engine, of), rig.caches(of, 3, seed=1)
        keys = names.keys(rig.prompt(3, of))
        assert rig.save(engine, keys, source).good.all()
        pool = PagedPool(engine, names, caches, interleaved=packing is not None,
                         host_kind="pinned_host")
        for step in range(2):
            at = shards()
            assert len(set(at)) == 2 * len(jax.tree_util.tree_leaves(caches))
            with engine.match(keys) as lease:
                caches, blocks = pool.load(lease, caches, [4, 0, 5])
            assert blocks == 3 and shards() == at, step
        for found, wanted in zip(test_jax.halves(of, caches), test_jax.reference(of, source)):
            assert all(np.array_equal(a[[4, 0, 5]], b) for a, b in zip(found, wanted))
        again = rig.names(engine, of, salt="again").keys(rig.prompt(3, of))
        assert pool.save(again, caches, [4, 0, 5]).wait(30)
        assert rig.check_right(engine, again, source).all()
    print(name)
"""


def test_pools_sharded_by_heads() -> None:
    done = rig.python(SHARDED, PYTHONPATH="tests")
    assert done.stdout.split() == ["apart", "packed", "interleaved"], done.stderr


def test_what_does_not_fit_is_named(engine: Engine) -> None:
    of = rig.layout(dtype="float32")
    names = rig.names(engine, of)
    good = pool_of(of, None)
    pool = adapter.PagedPool(engine, names, good)
    keys = names.keys(rig.prompt(2, of))
    rig.save(engine, keys, rig.caches(of, 2, seed=1))
    with engine.match(keys) as lease:
        for table, says in (
            ([0, POOL], r"block_table names 0\.\.9, the pool has 0\.\.8"),
            ([-1, 0], r"names -1\.\.0"),
            ([3, 3], "names a block twice"),
            ([0.5, 1.0], r"is float64\[2\], expected int\[k\]"),
            ([[0, 1]], r"is int64\[1, 2\]"),
            ([0, 1, 2], "a table for 3 blocks, the lease has 2 from 0"),
        ):
            with pytest.raises(LayoutError, match=says):
                pool.load(lease, good, table)
        assert pool.load(lease, good, [])[1] == 0
    with pytest.raises(LayoutError, match="a table for 1 blocks and 2 keys: one for each"):
        pool.save(keys, good, [0])
    wider = rig.names(engine, replace(of, head_dim=64)).keys(rig.prompt(2, of))
    with pytest.raises(LayoutError, match="keys of a namespace of another layout"):
        pool.save(wider, good, [0, 1])
    half = [tuple(each.astype(jnp.bfloat16) for each in layer) for layer in good]
    for caches, how, says in (
        (good[:1], {}, "caches of 1 layers, the layout has 2"),
        ([layer[:1] for layer in good], {}, "layer 0: 1 arrays, expected 2"),
        (half, {}, "layer 0 is bfloat16, the layout says float32"),
        (pool_of(of, 1), {}, "layer 0: 1 arrays, expected 2"),
        (good, {"interleaved": True}, "layer 0: 2 arrays, expected 1"),
        (pool_of(replace(of, kv_heads=3), 4), {"interleaved": True}, "groups, packing, 32. of 4"),
        (pool_of(replace(of, kv_heads=1), None), {}, r"expected \[9, 16, 2, 32\]"),
        (good, {"host_kind": "moon"}, "host_kind 'moon', .* has device, pinned_host"),
    ):
        with pytest.raises(LayoutError, match=says):
            adapter.PagedPool(engine, names, caches, **how)
    for changes, says in (
        ({"dtype": "float64"}, "a layout of float64, which JAX's caches do not have"),
        ({"head_dim_v": 48}, "interleaved K and V of 32 and 48 elements"),
    ):
        other = rig.names(engine, replace(of, **changes))
        with pytest.raises(LayoutError, match=says):
            adapter.PagedPool(engine, other, good, interleaved=True)
    opaque = Layout.opaque(layers=2, page_bytes=64, block_tokens=16, permutation="x")
    with pytest.raises(LayoutError, match="a layout of opaque pages"):
        adapter.PagedPool(engine, rig.names(engine, opaque), good)


# One small model in torch and in JAX

BLOCK, PLACES = 16, 12


def weights(model: Any) -> dict[str, Any]:
    return {name: jnp.array(each.detach().numpy()) for name, each in model.state_dict().items()}


def normed(x: Any, scale: Any, eps: float) -> Any:
    return x * jax.lax.rsqrt((x * x).mean() + eps) * scale


def turned(x: Any, angle: Any) -> Any:
    low, high = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def step(sizes: tuple[int, ...], w: Any, caches: list[Any], token: Any, at: Any, table: Any) -> Any:
    """Compute one token at a position, its K/V to the pool: heads K0 V0 K1 V1 ... of each layer."""
    heads, kv_heads, dim, theta, eps = sizes
    angle = at / theta ** (jnp.arange(0, dim, 2) / dim)
    x, updated = w["model.embed_tokens.weight"][token], []
    for layer, cache in enumerate(caches):

        def of(name: str, layer: int = layer) -> Any:
            return w[f"model.layers.{layer}.{name}.weight"]

        h = normed(x, of("input_layernorm"), eps)
        q = turned((of("self_attn.q_proj") @ h).reshape(heads, dim), angle)
        k = turned((of("self_attn.k_proj") @ h).reshape(kv_heads, dim), angle)
        v = (of("self_attn.v_proj") @ h).reshape(kv_heads, dim)
        both = jnp.stack([k, v], axis=1).reshape(2 * kv_heads, dim)
        cache = cache.at[table[at // BLOCK], at % BLOCK].set(both)
        updated.append(cache)
        seen = cache[table].reshape(-1, kv_heads, 2, dim)
        score = jnp.einsum("grd,tgd->grt", q.reshape(kv_heads, -1, dim), seen[:, :, 0])
        score = jnp.where(jnp.arange(len(seen)) <= at, score / math.sqrt(dim), -jnp.inf)
        mixed = jnp.einsum("grt,tgd->grd", jax.nn.softmax(score), seen[:, :, 1])
        x = x + of("self_attn.o_proj") @ mixed.reshape(-1)
        h = normed(x, of("post_attention_layernorm"), eps)
        gate = jax.nn.silu(of("mlp.gate_proj") @ h)
        x = x + of("mlp.down_proj") @ (gate * (of("mlp.up_proj") @ h))
    return (w["lm_head.weight"] @ normed(x, w["model.norm.weight"], eps)).argmax(), updated


class Model:
    """The torch model's twin, over a paged pool of JAX's own."""

    def __init__(self, torch_model: Any) -> None:
        config = torch_model.config
        theta = float(config.rope_parameters["rope_theta"])
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.sizes = (heads, kv_heads, config.head_dim, theta, config.rms_norm_eps)
        self.weights = weights(torch_model)
        shape = (PLACES, BLOCK, 2 * kv_heads, config.head_dim)
        self.caches = [jnp.zeros(shape) for _ in range(config.num_hidden_layers)]
        self.table = np.random.default_rng(3).permutation(PLACES).astype(np.int32)

    def run(self, tokens: list[int], first: int, new: int) -> list[int]:
        """Compute tokens from position `first` on, then `new` more; the pool stays in its place."""
        tokens = list(tokens)
        for at in range(first, len(tokens) + new - 1):
            places = pointers(self.caches)
            given = (np.int32(tokens[at]), np.int32(at), self.table)
            chosen, self.caches = step(self.sizes, self.weights, self.caches, *given)
            assert pointers(self.caches) == places
            if at + 1 == len(tokens):
                tokens.append(int(chosen))
        return tokens


def test_torch_computes_jax_goes_on_and_back(engine: Engine) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("kvengine.adapters.transformers")
    import test_transformers

    model = test_transformers.tiny()
    prefixes = transformers.PrefixCache(engine, model)
    twin = Model(model)
    how = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    prompt = test_transformers.tokens(100)
    plain = model.generate(prompt, **how)
    past = prefixes.prefill(prompt)
    keys = prefixes.keys(prompt)
    pool = adapter.PagedPool(engine, keys.namespace, twin.caches, interleaved=True)

    places = pointers(twin.caches)
    with engine.match(keys) as lease:
        twin.caches, blocks = pool.load(lease, twin.caches, twin.table[:6])
    assert blocks == 6 and pointers(twin.caches) == places
    assert twin.run(prompt[0].tolist(), 96, 20) == plain[0].tolist()

    # Bit for bit what torch computed, back from JAX's pool under another name.
    names = engine.namespace(model="copy", layout=prefixes.layout)
    copied = names.keys(prompt[0, :96].numpy())
    assert pool.save(copied, twin.caches, twin.table[:6]).wait(rig.WAIT_S)
    shape = (prefixes.layout.kv_heads, 96, prefixes.layout.head_dim)
    back = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(prefixes.layout.layers)]
    with engine.match(copied) as lease:
        loaded = engine.load(lease, back, np.arange(6))
    assert loaded.wait(rig.WAIT_S) and loaded.blocks == 6
    for layer, pair in zip(past.layers, back, strict=True):
        for one, other in zip((layer.keys, layer.values), pair, strict=True):
            assert torch.equal(one[0, :, :96].view(torch.int32), other.view(torch.int32))

    # JAX computes another prompt, and torch goes on.
    prompt = test_transformers.tokens(50, seed=9)
    assert not engine.probe(prefixes.keys(prompt))
    twin.run(prompt[0].tolist(), 0, 1)
    keys = prefixes.keys(prompt)
    assert pool.save(keys, twin.caches, twin.table[:3]).wait(rig.WAIT_S)
    past = prefixes.load(prompt)
    assert past.get_seq_length() == 48
    assert torch.equal(prefixes.generate(prompt, past=past, **how), model.generate(prompt, **how))
