"""kvengine.kernels.lossless: every path gives the same bytes, and every bit pattern comes back.

Run as a program it does the Triton kernels' part: the interpreter must be chosen before they are
imported, so that part has a process of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest
import xxhash

import gpu
from kvengine.kernels import copy, lossless, rows
from kvengine.kernels.copy import BAD, GOOD, OVERFULL
from kvengine.kernels.launch import Launcher
from kvengine.kernels.rows import Rows

POISON = 0xA5
POOL = 5  # blocks of a cache
# Zeros and denormals, each an escape; then infinities and NaNs, which make escapes of all else in
# their channel: too many of them for a small tile.
PATTERNS = [0x0000, 0x8000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7F81, 0xFFFF]


@dataclass(frozen=True)
class Case:
    """A cache and a table of its blocks."""

    name: str
    tokens: int = 16
    heads: int = 2
    dims: tuple[int, ...] = (64, 64)
    order: str = "NHD"
    slots: bool = False
    blocks: tuple[int, ...] = (3, 0)
    layers: int = 2
    gap: int = 0  # elements between a head and the next


CASES = [
    Case("nhd"),
    Case("hnd", order="HND", heads=3),
    Case("slots", slots=True, blocks=(1, 4, 2)),
    Case("slots_hnd", slots=True, order="HND", tokens=5, dims=(96, 96)),
    Case("heads_apart", gap=8, heads=3, dims=(80, 80)),
    Case("heads_of_80_by_token", heads=3, dims=(80, 80), slots=True, order="HND"),
    Case("heads_of_128", heads=3, dims=(128, 128), blocks=(2,)),
    Case("latent", heads=1, dims=(576,), layers=1),
    Case("k_and_v_differ", heads=1, dims=(192, 128), tokens=33, layers=1),
    Case("several_tiles", tokens=64, heads=2, dims=(128, 80), layers=1, blocks=(4,)),
    Case("many_tokens", tokens=100, heads=1, dims=(8, 72), layers=1, blocks=(1,)),
    Case("one_token", tokens=1, heads=1, dims=(8,), layers=1),
    Case("one_wide_token", tokens=1, heads=64, dims=(128,), layers=1),
    Case("repeated", blocks=(3, 3, 1, 3), layers=1),
    Case("no_blocks", blocks=()),
]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Setup:
    """The memory of a case and its Rows; the cache holds Gaussians of a scale by channel.

    `whole` holds the frames, with GAP bytes of poison before, between and behind them; `place`
    gives memory that whoever works on it can reach.
    """

    GAP = 256

    def __init__(
        self, case: Case, seed: int = 0, place: Callable[[np.ndarray], np.ndarray] = np.asarray
    ) -> None:
        rng = np.random.default_rng(seed)
        tokens, heads, count = case.tokens, case.heads, len(case.blocks)
        ids = np.array(case.blocks, np.int64)
        places = ids[:, None] * tokens + np.arange(tokens)
        if case.slots:
            places = rng.permutation(POOL * tokens)[: count * tokens].reshape(count, tokens)
        self.places = places
        self.caches: list[np.ndarray] = []  # words [POOL, tokens, heads, dim]
        components: list[tuple[int, ...]] = []
        offsets: list[np.ndarray] = []
        segments, at = [], 0
        for _ in range(case.layers):
            first, start = len(components), at
            for group, dim in enumerate(case.dims):
                shape = (POOL, tokens, heads, dim + case.gap)
                view = place(keys(rng, shape, case.order))[..., :dim]
                odd = PATTERNS if tokens * heads * dim > 2000 and tokens < 50 else PATTERNS[:4]
                view[case.blocks[:1], 0, 0, : len(odd)] = odd
                block, token, head, _ = view.strides
                if len(offsets) <= group:
                    by_token = places // tokens * block + places % tokens * token
                    offsets.append(by_token if case.slots else ids[:, None] * block)
                base = view.__array_interface__["data"][0]
                by = (0 if case.slots else token, head, heads, dim)
                components.append((base, group, *by, int(group == 0), at))
                at += lossless.encoded_nbytes(tokens, heads * dim)
                self.caches.append(view)
            segments.append((first, len(components) - first, start, at - start))
        self.nbytes, self.stride = at, at + self.GAP
        self.whole = place(np.full(self.stride * count + 2 * self.GAP, POISON, np.uint8))
        skip = -self.whole.ctypes.data % 64 + self.GAP // 2
        self.memory = self.whole[skip:]
        frames = [self.memory.ctypes.data + n * self.stride for n in range(count)]
        units = tokens if case.slots else 1
        self.rows = Rows(
            np.array(components, np.int64),
            np.array(offsets, np.int64).reshape(len(case.dims), count, units),
            np.array(segments, np.int64),
            np.array(frames, np.int64),
            tokens,
            "bfloat16",
        )
        self.digests = np.full((count, case.layers, 2), POISON, np.uint64)
        self.verdicts = np.full((count, case.layers), POISON, np.uint8)

    @property
    def everything(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (0, len(self.rows.frames)), (0, len(self.rows.segments))

    @property
    def frames(self) -> np.ndarray:
        """The bytes of all frames, and the poison behind each."""
        return self.memory[: len(self.rows.frames) * self.stride]

    def run(self, function: Callable[..., None], *ranges: tuple[int, int]) -> np.ndarray:
        """Call a codec on these ranges, or on everything; return the verdicts."""
        spans = ranges or self.everything
        function(self.rows, *spans, self.digests, self.verdicts)
        return self.verdicts

    def encoded(self) -> np.ndarray:
        """Encode everything by the reference, and return the memory of all frames."""
        self.run(lossless.encode_reference)
        return self.whole.copy()

    def empty_caches(self) -> list[np.ndarray]:
        """Poison the caches; return what must be there once the table is decoded."""
        wanted = []
        for cache in self.caches:
            held = np.full_like(cache, POISON << 8 | POISON)
            flat, old = flattened(held), flattened(cache)
            flat[self.places] = old[self.places]
            wanted.append(flat.reshape(cache.shape))
            cache[...] = POISON << 8 | POISON
        return wanted

    def digest_all(self) -> None:
        """Make the digests those of what the frames hold."""
        for n in range(len(self.rows.frames)):
            for s, (_, _, offset, nbytes) in enumerate(self.rows.segments.tolist()):
                begin = n * self.stride + offset
                data = self.memory[begin : begin + nbytes].tobytes()
                value = xxhash.xxh3_128_intdigest(data)
                self.digests[n, s] = value & (1 << 64) - 1, value >> 64


def keys(rng: np.random.Generator, shape: tuple[int, ...], order: str) -> np.ndarray:
    """Make bf16 words [blocks, tokens, heads, dim], in memory as `order` says."""
    values = rng.standard_normal(shape, np.float32)
    values *= np.exp2(rng.integers(-9, 9, shape[2:])).astype(np.float32)
    words = (values.view(np.uint32) >> 16).astype(np.uint16)
    return words if order == "NHD" else np.ascontiguousarray(words.swapaxes(1, 2)).swapaxes(1, 2)


def flattened(cache: np.ndarray) -> np.ndarray:
    return cache.reshape(-1, *cache.shape[2:]).copy()


def ways(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    if name == "reference":
        return lossless.encode_reference, lossless.decode_reference
    native = name == "native"

    def encode(*args: object) -> None:
        lossless.encode(*args, native=native)  # type: ignore[arg-type]  # a table of callables

    def decode(*args: object) -> None:
        lossless.decode(*args, native=native)  # type: ignore[arg-type]  # a table of callables

    return encode, decode


@pytest.fixture(params=["native", "plain"])
def way(request: pytest.FixtureRequest, require: Callable[[str], ModuleType]) -> str:
    if request.param == "native":
        require("numba")
    return str(request.param)


@pytest.mark.parametrize("streams", [0, 1 << 40], ids=["streamed", "cached"])
@by_case
def test_encode_equals_the_reference(
    case: Case, streams: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "STREAM_NBYTES", streams)
    ours, theirs = Setup(case), Setup(case)
    lossless.check(ours.rows)
    theirs.encoded()
    assert (ours.run(ways(way)[0]) == GOOD).all()
    assert np.array_equal(ours.frames, theirs.frames)
    assert (ours.memory[len(ours.frames) :] == POISON).all()
    assert np.array_equal(ours.digests, theirs.digests)
    theirs.digest_all()
    assert np.array_equal(ours.digests, theirs.digests)


@pytest.mark.parametrize("streams", [0, 1 << 40], ids=["streamed", "cached"])
@by_case
def test_decode_gives_back_the_cache(
    case: Case, streams: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "STREAM_NBYTES", streams)
    setup = Setup(case)
    held = setup.encoded()
    wanted = setup.empty_caches()
    assert (setup.run(ways(way)[1]) == GOOD).all()
    for cache, want in zip(setup.caches, wanted, strict=True):
        assert np.array_equal(cache, want)
    assert np.array_equal(setup.whole, held)


def test_every_bit_pattern_comes_back(way: str) -> None:
    """All signs and mantissas of an exponent in a channel, then a token of escapes."""
    setup = Setup(Case("patterns", tokens=257, heads=1, dims=(256,), layers=1, blocks=(2,)))
    cache = setup.caches[0][2, :, 0]
    sign_and_mantissa = np.arange(256, dtype=np.uint16)[:, None]
    exponent = np.arange(256, dtype=np.uint16)[None, :]
    cache[1:] = (sign_and_mantissa & 128) << 8 | exponent << 7 | sign_and_mantissa & 127
    below = np.random.default_rng(1).integers(0, exponent[0] + 1).astype(np.uint16)
    cache[0] = below << 7 | exponent[0] & 127
    assert len(np.unique(cache[1:])) == 1 << 16
    encode, decode = ways(way)
    assert (setup.run(encode) == GOOD).all()
    wanted = setup.empty_caches()
    assert (setup.run(decode) == GOOD).all()
    assert np.array_equal(setup.caches[0], wanted[0])


def test_ranges_touch_only_their_own(way: str) -> None:
    setup, theirs = Setup(CASES[2]), Setup(CASES[2])
    theirs.encoded()
    encode, decode = ways(way)
    inside = np.zeros(setup.verdicts.shape, bool)
    inside[1:3, 1] = True
    setup.run(encode, (1, 3), (1, 2))
    assert (setup.verdicts[inside] == GOOD).all() and (setup.verdicts[~inside] == POISON).all()
    assert (setup.digests[~inside] == POISON).all()
    wanted = np.full_like(theirs.memory, POISON)
    _, _, offset, nbytes = setup.rows.segments[1].tolist()
    for n in (1, 2):
        part = slice(n * setup.stride + offset, n * setup.stride + offset + nbytes)
        wanted[part] = theirs.memory[part]
    assert np.array_equal(setup.frames, wanted[: len(setup.frames)])
    setup.run(encode, (2, 2), (0, 2))  # an empty range
    setup.run(decode, (2, 3), (1, 2))
    assert (setup.verdicts[~inside] == POISON).all()


def overfull(setup: Setup) -> None:
    """Make layer 1's V of the table's second block such that it does not fit."""
    cache, block = setup.caches[3], 0
    cache[block] = np.random.default_rng(7).integers(0, 1 << 16, cache[block].shape)


def test_a_block_that_does_not_fit_says_so(way: str) -> None:
    ours, theirs = Setup(CASES[0]), Setup(CASES[0])
    for setup in (ours, theirs):
        overfull(setup)
    theirs.encoded()
    verdicts = ours.run(ways(way)[0])
    assert verdicts[1, 1] == OVERFULL and (verdicts == GOOD).sum() == 3
    assert np.array_equal(ours.frames, theirs.frames)
    assert np.array_equal(ours.digests, theirs.digests)


def test_room_is_used_to_the_last_escape(way: str) -> None:
    case = Case("full", heads=1, dims=(64,), layers=1, blocks=(0,))
    room = lossless.tile_nbytes(16, 64) - lossless.escapes_at(16 * 64, 64)
    for extra, verdict in ((0, GOOD), (1, OVERFULL)):
        setup = Setup(case)
        words = setup.caches[0][0].reshape(16, 64)
        words[...] = 0x3F80
        words[1:].reshape(-1)[: room + extra] = 0x3C01
        assert lossless.escapes(words).tolist() == [room + extra]
        encode, decode = ways(way)
        assert setup.run(encode) == verdict
        wanted = setup.empty_caches()
        assert setup.run(decode) == GOOD  # the bytes are what they are said to be
        assert np.array_equal(setup.caches[0], wanted[0]) == (verdict == GOOD)


def test_one_flipped_bit_is_bad(way: str) -> None:
    setup = Setup(Case("flip", heads=1, dims=(64, 80), tokens=7, layers=2, blocks=(4,)))
    setup.run(ways(way)[0])
    half = int(setup.rows.segments[0, rows.NBYTES])
    for bit in range(0, setup.nbytes * 8, 5 if way == "native" else 37):
        setup.memory[bit // 8] ^= 1 << bit % 8
        verdicts = setup.run(ways(way)[1])
        setup.memory[bit // 8] ^= 1 << bit % 8
        bad = int(bit // 8 >= half)
        assert verdicts[0, bad] == BAD and verdicts[0, 1 - bad] == GOOD, bit
    setup.digests[0, 1, 0] ^= np.uint64(1)
    assert setup.run(ways(way)[1]).tolist() == [[GOOD, BAD]]


def some_heads(setup: Setup, first: int, last: int) -> Rows:
    """The rows of a cache that has these heads alone: here they lie in the whole one."""
    components = setup.rows.components.copy()
    components[:, rows.BASE] += first * components[:, rows.HEAD_CACHE]
    return replace(setup.rows, components=components, heads=(first, last))


def of_some_heads(setup: Setup, first: int, last: int) -> list[np.ndarray]:
    """Encode a case and poison its caches; return what they hold with some heads decoded."""
    setup.encoded()
    wanted = setup.empty_caches()
    for cache in wanted:
        cache[..., :first, :] = cache[..., last:, :] = POISON << 8 | POISON
    return wanted


@pytest.mark.parametrize("streams", [0, 1 << 40], ids=["streamed", "cached"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.heads > 1 and case.blocks], ids=lambda case: case.name
)
def test_some_heads_are_decoded_and_no_others(
    case: Case, streams: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "STREAM_NBYTES", streams)
    for first, last in ((0, 1), (1, case.heads), (case.heads - 1, case.heads)):
        setup = Setup(case)
        wanted = of_some_heads(setup, first, last)
        few = some_heads(setup, first, last)
        encode, decode = ways(way)
        decode(few, *setup.everything, setup.digests, setup.verdicts)
        assert (setup.verdicts == GOOD).all()
        assert all(map(np.array_equal, setup.caches, wanted))
        setup.memory[0] ^= 1  # of the first head: the whole segment is bad
        decode(few, (0, 1), (0, 1), setup.digests, setup.verdicts)
        assert setup.verdicts[0, 0] == BAD
        with pytest.raises(ValueError, match=f"heads {first} to {last} were given to fill frames"):
            encode(few, *setup.everything, setup.digests, setup.verdicts)


@pytest.mark.parametrize("name", ["hnd", "several_tiles", "many_tokens", "heads_apart"])
def test_hostile_bytes_decode_to_something_within_the_block(name: str, way: str) -> None:
    """Bytes that no coder wrote, whose digests are right, give the reference's words."""
    case = next(case for case in CASES if case.name == name)
    for fill in ("random", "ones", "zeros"):
        ours, theirs = hostile(case, fill), hostile(case, fill)
        theirs.run(lossless.decode_reference)
        assert (ours.run(ways(way)[1]) == GOOD).all()
        for cache, wanted in zip(ours.caches, theirs.caches, strict=True):
            assert np.array_equal(cache, wanted)


def hostile(case: Case, fill: str, place: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Setup:
    setup = Setup(case, place=place)
    if fill == "random":
        random = np.random.default_rng(3)
        setup.memory[:] = random.integers(0, 256, len(setup.memory), dtype=np.uint8)
    else:
        setup.memory[:] = 255 if fill == "ones" else 0
    setup.digest_all()
    setup.empty_caches()
    return setup


def test_sizes_are_those_that_are_promised() -> None:
    for tokens, ratio in ((64, 1.36), (256, 1.36), (16, 1.32)):
        for channels in (1024, 576, 192, 8 * 96, 128):
            raw = 2 * tokens * channels
            assert raw / lossless.encoded_nbytes(tokens, channels) >= ratio
    for tokens in (1, 3, 5, 16, 33, 64, 65, 100, 256):
        for channels in (8, 72, 80, 576, 1024):
            table = lossless.tiles(tokens, channels)
            covered = np.zeros((tokens, channels), np.int64)
            at = 0
            for token, height, channel, width, start, size in table.tolist():
                covered[token : token + height, channel : channel + width] += 1
                assert start == at and size % 64 == 0
                count = height * width
                assert count <= lossless.ELEMENTS and height <= lossless.TOKENS_MAX
                assert size - lossless.escapes_at(count, width) >= count // 16
                at += size
            assert (covered == 1).all()
            assert at == lossless.encoded_nbytes(tokens, channels)
    assert lossless.pays(16, 1024) and lossless.pays(64, 576)
    assert not lossless.pays(1, 1024) and not lossless.pays(16, 81)


def test_bad_input_is_named() -> None:
    setup = Setup(CASES[0])
    table = setup.rows
    with pytest.raises(ValueError, match="multiple of 8"):
        lossless.tiles(16, 81)
    with pytest.raises(ValueError, match="digests is"):
        lossless.encode(table, *setup.everything, setup.digests[:1], setup.verdicts)
    with pytest.raises(ValueError, match="verdicts is"):
        lossless.decode(table, *setup.everything, setup.digests, setup.verdicts[:, :1])
    with pytest.raises(ValueError, match="are not within"):
        lossless.encode(table, (0, 3), (0, 1), setup.digests, setup.verdicts)
    for dtype, column, value, named in (
        ("float16", 0, None, "elements of float16"),
        ("bfloat16", rows.FRAME, 64, "component 1 is at byte 64"),
        ("bfloat16", rows.DIM, 60, "component 1 has heads of 60 elements"),
        ("bfloat16", rows.DIM, 128, "segment 0 has"),
    ):
        components = table.components.copy()
        if value is not None:
            components[1, column] = value
        wrong = Rows(components, table.offsets, table.segments, table.frames, 16, dtype)
        with pytest.raises(ValueError, match=named):
            lossless.check(wrong)
    half = replace(table, dtype="float16")
    for function in (lossless.encode, lossless.decode):
        with pytest.raises(ValueError, match="elements of float16: lossless coding knows bfloat16"):
            function(half, *setup.everything, setup.digests, setup.verdicts)


def test_triton_kernels_equal_the_reference(require: Callable[[str], ModuleType]) -> None:
    require("triton")
    require("torch")
    assert gpu.run(__file__).split() == [case.name for case in CASES]


def interpret() -> None:
    """Run every case through the Triton kernels, on the addresses of numpy arrays."""
    from kvengine.kernels import launch, lossless_device

    on = launch.launcher(gpu.device())
    for case in CASES:
        ours, theirs = Setup(case, place=gpu.reachable), Setup(case)
        full = case.name == "nhd"
        if full:
            overfull(ours)
            overfull(theirs)
        theirs.encoded()
        found = on.table(np.full_like(ours.verdicts, GOOD))
        lossless_device.encode(ours.rows, *ours.everything, found, on)
        assert np.array_equal(on.read(found), theirs.verdicts), f"verdicts {case}"
        assert np.array_equal(ours.frames, theirs.frames), f"encode {case}"
        wanted = ours.empty_caches()
        lossless_device.decode(ours.rows, *ours.everything, on)
        gpu.settle()
        for i, (cache, want) in enumerate(zip(ours.caches, wanted, strict=True)):
            assert (full and i == 3) or np.array_equal(cache, want), f"decode {case}"
        print(case.name)
    for fill in ("random", "ones"):
        ours = hostile(CASES[1], fill, place=gpu.reachable)
        theirs = hostile(CASES[1], fill)
        theirs.run(lossless.decode_reference)
        lossless_device.decode(ours.rows, *ours.everything, on)
        gpu.settle()
        assert all(map(np.array_equal, ours.caches, theirs.caches)), f"hostile {fill}"
    for name in ("hnd", "several_tiles", "heads_of_80_by_token"):
        case = next(case for case in CASES if case.name == name)
        ours = Setup(case, place=gpu.reachable)
        wanted = of_some_heads(ours, 1, case.heads)
        few = some_heads(ours, 1, case.heads)
        lossless_device.decode(few, *ours.everything, on)
        gpu.settle()
        assert all(map(np.array_equal, ours.caches, wanted)), f"heads of {name}"
        with pytest.raises(ValueError, match="were given to fill frames"):
            found = on.table(np.full_like(ours.verdicts, GOOD))
            lossless_device.encode(few, *ours.everything, found, on)
    ranged(lossless_device, on)
    lost(lossless_device, on)


def ranged(device: ModuleType, on: Launcher) -> None:
    ours, theirs = Setup(CASES[2], place=gpu.reachable), Setup(CASES[2])
    theirs.run(lossless.encode_reference, (1, 3), (1, 2))
    found = on.table(np.full_like(ours.verdicts, GOOD))
    device.encode(ours.rows, (1, 1), (0, 2), found, on)
    device.encode(ours.rows, (1, 3), (1, 2), found, on)
    gpu.settle()
    assert np.array_equal(ours.frames, theirs.frames), "encode of a range"
    with pytest.MonkeyPatch.context() as patch:  # more blocks than a launch takes
        patch.setattr(device, "BLOCKS_MAX", 2)
        whole = Setup(CASES[2])
        whole.encoded()
        device.encode(ours.rows, *ours.everything, found, on)
        wanted = ours.empty_caches()
        device.decode(ours.rows, *ours.everything, on)
        gpu.settle()
    assert np.array_equal(ours.frames, whole.frames), "encode in several launches"
    assert all(map(np.array_equal, ours.caches, wanted)), "decode in several launches"
    components = ours.rows.components.copy()
    components[:, rows.BASE] += 2
    odd = Rows(components, *(getattr(ours.rows, name) for name in REST))
    with pytest.raises(ValueError, match="are multiples of 2 bytes, expected of 4"):
        device.encode(odd, *ours.everything, found, on)
    with pytest.raises(ValueError, match="elements of float16"):
        device.decode(replace(ours.rows, dtype="float16"), *ours.everything, on)
    components[:, rows.BASE] -= 2
    components[:, [rows.HEADS, rows.DIM]] = 16, 4
    with pytest.raises(ValueError, match="heads of 4 elements, expected a multiple of 8"):
        device.decode(odd, *ours.everything, on)


REST = ("offsets", "segments", "frames", "tokens", "dtype")


def lost(device: ModuleType, on: Launcher) -> None:
    """Ids on the device: one that is out of range is coded as zeros, and decoded to nowhere."""
    from kvengine.kernels.device import Ids

    ours, theirs = Setup(CASES[0], place=gpu.reachable), Setup(CASES[0])
    for cache in theirs.caches:
        cache[0] = 0
    theirs.encoded()
    strides = np.array([[cache.strides[0], 0] for cache in ours.caches[:2]], np.int64)
    error = on.table(np.zeros(1, np.int32))
    ids = Ids(on.table(np.array([[3], [POOL]], np.int32)), strides, POOL, error)
    found = on.table(np.full_like(ours.verdicts, GOOD))
    device.encode(ours.rows, *ours.everything, found, on, ids)
    assert on.read(error).tolist() == [1] and (on.read(found) == GOOD).all()
    assert np.array_equal(ours.frames, theirs.frames), "encode of an id out of range"
    wanted = ours.empty_caches()
    for cache in wanted:
        cache[0] = POISON << 8 | POISON
    device.decode(ours.rows, *ours.everything, on, ids)
    gpu.settle()
    assert all(map(np.array_equal, ours.caches, wanted)), "decode of an id out of range"


if __name__ == "__main__":
    interpret()
