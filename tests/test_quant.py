"""kvengine.kernels.quant: every path gives the same codes, over awkward shapes and values.

Run as a program it does the Triton kernels' part, as tests/gpu.py says.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

import gpu
from kvengine.kernels import copy, launch, quant, rows
from kvengine.kernels.digest import digest
from kvengine.kernels.rows import Rows

POISON = 0xA5
POOL = 5  # blocks of a cache
WORDS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
each_scheme = pytest.mark.parametrize("scheme", quant.SCHEMES)


@dataclass(frozen=True)
class Case:
    """A cache and a table of its blocks."""

    name: str
    dims: tuple[int, ...] = (64, 64)
    heads: int = 2
    tokens: int = 16
    layers: int = 2
    blocks: tuple[int, ...] = (4, 0, 2)
    dtype: str = "bfloat16"
    order: str = "NHD"
    slots: bool = False
    lead: int = 0  # elements before the cache that its rows miss an alignment of 16 bytes by


CASES = [
    Case("dim_64"),
    Case("dim_80", dims=(80, 80), tokens=17, order="HND"),
    Case("dim_96_fp16", dims=(96, 96), dtype="float16", heads=1, tokens=5),
    Case("dim_128_slots", dims=(128, 128), slots=True, layers=1),
    Case("latent_576", dims=(576,), heads=1, tokens=7, layers=1, blocks=(1,)),
    Case("k_and_v_differ_fp32", dims=(192, 128), dtype="float32", layers=1, blocks=(3,)),
    Case("two_chunks", dims=(64, 32), tokens=67, layers=1, heads=1, blocks=(2,)),
    Case("repeated_hnd_slots", blocks=(3, 3, 1, 3), order="HND", slots=True, layers=1, tokens=3),
    Case("one_token", tokens=1, heads=3, dims=(16, 16)),
    Case("misaligned", lead=3, layers=1, blocks=(1,)),
    Case("no_blocks", blocks=()),
]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def special(words: np.ndarray, dtype: str) -> None:
    """Plant what is not ordinary among the words [tokens, heads, dim] of some rows."""
    sign, infinity, nan = {
        "bfloat16": (0x8000, 0x7F80, 0xFFFF),
        "float16": (0x8000, 0x7C00, 0x7E01),
        "float32": (0x8000_0000, 0x7F80_0000, 0xFFFF_FFFF),
    }[dtype]
    largest = words.dtype.type(infinity - 1)
    words[0, 0, :] = 0
    words[1 % len(words), 0, :] = sign  # -0, and keys of it below
    words[:, -1, 1] = sign
    words[:, -1, 2] = words.dtype.type(1)  # the smallest number
    words[:, -1, 3] = words[0, -1, 3]  # constant along the tokens
    words[-1, -1, 4] = infinity
    words[-1, -1, 5] = nan
    words[len(words) // 2, 0, :6] = largest, largest | sign, 1, 1 | sign, largest, 0


class Setup:
    """The memory of a case, and its Rows for a scheme."""

    def __init__(
        self,
        case: Case,
        scheme: str,
        seed: int = 0,
        ordinary: bool = False,
        place: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> None:
        draw = np.random.default_rng(seed)
        self.case = case
        self.caches, components, segments, offsets = [], [], [], []
        count, tokens, at = len(case.blocks), case.tokens, 0
        ids = np.array(case.blocks, np.int64)
        places = ids[:, None] * tokens + np.arange(tokens)
        if case.slots:
            places = draw.permutation(POOL * tokens)[: count * tokens].reshape(count, tokens)
        if len(set(case.blocks)) < count:
            places = ids[:, None] * tokens + np.arange(tokens)
        self.places = places
        word = WORDS[case.dtype]
        for _ in range(case.layers):
            first, start = len(components), at
            for part, dim in enumerate(case.dims):
                shape = (POOL, tokens, case.heads, dim)
                values = draw.standard_normal(shape, np.float32)
                values *= np.exp(draw.normal(0, 0.7, dim)).astype(np.float32)
                words = as_words(values, case.dtype)
                if not ordinary:
                    special(words[case.blocks[0] if count else 0], case.dtype)
                memory = np.zeros(words.size + case.lead, word)[case.lead :].reshape(shape)
                if case.order == "HND":
                    memory = memory.reshape(POOL, case.heads, tokens, dim).swapaxes(1, 2)
                memory[...] = words
                memory = place(memory)
                self.caches.append(memory)
                block, token, head, _ = memory.strides
                unit = places // tokens * block + places % tokens * token
                offsets.append(unit if case.slots else ids[:, None] * block)
                base = memory.__array_interface__["data"][0]
                keys = int(part == 0)
                row = (base, part, 0 if case.slots else token, head, case.heads, dim, keys, at)
                components.append(row)
                at += sum(quant.planes(scheme, case.heads, tokens, dim, bool(keys)))
            segments.append((first, len(components) - first, start, at - start))
        self.nbytes = at
        self.stride = -(-at // 64) * 64 + 64
        memory = place(np.full(self.stride * count + 64, POISON, np.uint8))
        self.memory = memory[-memory.ctypes.data % 64 :][: self.stride * count]
        self.starts = [n * self.stride for n in range(count)]
        units = tokens if case.slots else 1
        self.rows = Rows(
            np.array(components, np.int64),
            np.array(offsets[: len(case.dims)], np.int64).reshape(len(case.dims), count, units),
            np.array(segments, np.int64),
            np.array([self.memory.ctypes.data + s for s in self.starts], np.int64).reshape(-1),
            tokens,
            case.dtype,
        )
        self.digests = np.full((count, case.layers, 2), 0xA5A5, np.uint64)
        self.verdicts = np.full((count, case.layers), POISON, np.uint8)
        self.everything = (0, count), (0, case.layers)

    def poison(self) -> None:
        for cache in self.caches:
            cache[...] = cache.dtype.type(0xA5A5_A5A5 & np.iinfo(cache.dtype).max)

    def untouched(self) -> bool:
        """Whether all that lies outside the table's tokens is poison."""
        for cache in self.caches:
            rest = np.ones(POOL * self.case.tokens, bool)
            rest[self.places.reshape(-1)] = False
            flat = cache.reshape(POOL * self.case.tokens, self.case.heads, -1)
            if (flat[rest] != cache.dtype.type(0xA5A5_A5A5 & np.iinfo(cache.dtype).max)).any():
                return False
        return True

    def frames_whole(self) -> bool:
        """Whether all that lies between the frames is poison."""
        rest = np.ones(len(self.memory), bool)
        for start in self.starts:
            rest[start : start + self.nbytes] = False
        return bool((self.memory[rest] == POISON).all())


def as_words(values: np.ndarray, dtype: str) -> np.ndarray:
    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[dtype]
    return np.ascontiguousarray(values.astype(kind)).view(WORDS[dtype])


def values_of(words: np.ndarray, dtype: str) -> np.ndarray:
    return quant.floats(np.ascontiguousarray(words), dtype).astype(np.float64)


def alike(scheme: str, one: np.ndarray, other: np.ndarray, dtype: str) -> bool:
    """Equal; what rot4 gives differs by the order of its sums."""
    if scheme != "rot4":
        return np.array_equal(one, other)
    a, b = values_of(one, dtype), values_of(other, dtype)
    # two roundings of the result to the dtype, and of the sums
    return np.allclose(a, b, rtol=2**-7, atol=1e-4 * np.nanmax(np.abs(b)), equal_nan=True)


def same_frames(scheme: str, one: Setup, other: Setup) -> bool:
    """Equal; rot4: but for one code in a thousand, and the scale of its piece."""
    differ = (one.memory != other.memory).sum()
    return bool(differ <= (len(one.memory) / 1000 if scheme == "rot4" else 0))


@each_scheme
@by_case
def test_the_compiled_path_equals_the_plain_one(
    scheme: str, case: Case, require: Callable[[str], ModuleType]
) -> None:
    require("numba")
    one, other = Setup(case, scheme), Setup(case, scheme)
    quant.encode(scheme, one.rows, *one.everything, one.digests, native=True)
    quant.encode(scheme, other.rows, *other.everything, other.digests, native=False)
    assert one.frames_whole() and same_frames(scheme, one, other)
    one.memory[:], one.digests[:] = other.memory, other.digests
    for setup, native in ((one, True), (other, False)):
        setup.poison()
        quant.decode(
            scheme,
            setup.rows,
            *setup.everything,
            setup.digests,
            setup.verdicts,
            native=native,
        )
        assert (setup.verdicts == copy.GOOD).all() and setup.untouched()
    for found, wanted in zip(one.caches, other.caches, strict=True):
        assert alike(scheme, found, wanted, case.dtype)


@each_scheme
@pytest.mark.parametrize("native", [True, False], ids=["native", "plain"])
def test_ranges_touch_only_their_own(
    scheme: str, native: bool, require: Callable[[str], ModuleType]
) -> None:
    if native:
        require("numba")
    whole, setup = Setup(CASES[0], scheme), Setup(CASES[0], scheme)
    quant.encode(scheme, whole.rows, *whole.everything, whole.digests, native=native)
    quant.encode(scheme, setup.rows, (1, 2), (1, 2), setup.digests, native=native)
    _, _, offset, nbytes = setup.rows.segments[1].tolist()
    part = slice(setup.starts[1] + offset, setup.starts[1] + offset + nbytes)
    wanted = np.full_like(setup.memory, POISON)
    wanted[part] = whole.memory[part]
    assert np.array_equal(setup.memory, wanted)
    written = setup.digests != 0xA5A5
    assert written[1, 1].all() and written.sum() == 2
    address = setup.memory.ctypes.data + part.start
    assert digest(address, nbytes) == tuple(setup.digests[1, 1].tolist())

    # Of a whole frame one bad segment of one block: all others are decoded, it is left alone.
    whole.memory[whole.starts[2] + 7] ^= 4
    whole.poison()
    given = (whole.digests, whole.verdicts)
    quant.decode(scheme, whole.rows, (1, 3), (0, 1), *given, native=native)
    assert whole.verdicts.tolist()[0] == [POISON] * 2
    assert whole.verdicts[1:, 0].tolist() == [copy.GOOD, copy.BAD]
    first = whole.caches[0]
    poison = first.dtype.type(0xA5A5)
    assert (first[2] == poison).all()
    assert (first[0] != poison).any()
    assert all((cache == poison).all() for cache in whole.caches[2:])


def some_heads(setup: Setup, first: int, last: int) -> Rows:
    """The rows of a cache that has these heads alone: here they lie in the whole one."""
    components = setup.rows.components.copy()
    components[:, rows.BASE] += first * components[:, rows.HEAD_CACHE]
    return replace(setup.rows, components=components, heads=(first, last))


def encoded(case: Case, scheme: str, **how: object) -> tuple[Setup, list[np.ndarray]]:
    """Frames of a case, its caches poisoned, and what those hold once all is decoded."""
    setup = Setup(case, scheme, **how)
    quant.encode(scheme, setup.rows, *setup.everything, setup.digests, native=False)
    setup.poison()
    given = (setup.digests, setup.verdicts)
    quant.decode(scheme, setup.rows, *setup.everything, *given, native=False)
    whole = [cache.copy() for cache in setup.caches]
    setup.poison()
    return setup, whole


def check_heads(scheme: str, setup: Setup, whole: list[np.ndarray], first: int, last: int) -> None:
    """The heads are what they are when all are decoded, and every other byte is poison."""
    for found, wanted in zip(setup.caches, whole, strict=True):
        wanted[..., :first, :] = wanted[..., last:, :] = wanted.dtype.type(
            0xA5A5_A5A5 & np.iinfo(wanted.dtype).max
        )
        assert alike(scheme, found, wanted, setup.case.dtype)


@each_scheme
@pytest.mark.parametrize("native", [True, False], ids=["native", "plain"])
@pytest.mark.parametrize("case", [case for case in CASES if case.heads > 1 and case.blocks])
def test_some_heads_are_decoded_and_no_others(
    scheme: str, case: Case, native: bool, require: Callable[[str], ModuleType]
) -> None:
    if native:
        require("numba")
    for first, last in ((0, 1), (1, case.heads)):
        setup, whole = encoded(case, scheme)
        few = some_heads(setup, first, last)
        given = (setup.digests, setup.verdicts)
        quant.decode(scheme, few, *setup.everything, *given, native=native)
        assert (setup.verdicts == copy.GOOD).all()
        check_heads(scheme, setup, whole, first, last)
        setup.poison()
        setup.memory[setup.starts[0]] ^= 1  # of the first head: the whole segment is bad
        quant.decode(scheme, few, (0, 1), (0, 1), *given, native=native)
        assert setup.verdicts[0, 0] == copy.BAD and setup.untouched()
        with pytest.raises(ValueError, match=f"heads {first} to {last} were given to fill frames"):
            quant.encode(scheme, few, *setup.everything, setup.digests, native=native)
    with pytest.raises(ValueError, match=f"are not within the {case.heads} of the rows"):
        some_heads(setup, 0, case.heads + 1)


def test_int8_is_the_nearest_step_of_the_largest() -> None:
    """Against another formulation, in double precision."""
    setup = Setup(replace(CASES[6], dims=(64, 64)), "int8", ordinary=True)
    quant.encode("int8", setup.rows, *setup.everything, setup.digests)
    before = [cache[setup.case.blocks[0]].copy() for cache in setup.caches]
    setup.poison()
    quant.decode("int8", setup.rows, *setup.everything, setup.digests, setup.verdicts)
    for part, (words, cache) in enumerate(zip(before, setup.caches, strict=True)):
        given = values_of(words, "bfloat16")
        found = values_of(cache[setup.case.blocks[0]], "bfloat16")
        for chunk in (slice(0, 64), slice(64, 67)):
            largest = np.abs(given[chunk]).max(axis=2 if part else 0, keepdims=True)
            # half a step, what its own rounding to bf16 adds over 127, and that of the result
            most = largest / 127 * (0.5 + 127 / 512) + np.abs(given[chunk]) / 256
            assert (np.abs(found[chunk] - given[chunk]) <= most).all()


def test_int8_keys_bear_channels_that_are_far_larger() -> None:
    """Of a row that has one, a scale of its own would leave the others few steps."""
    draw = np.random.default_rng(2)
    values = draw.standard_normal((2, 64, 128), np.float32)
    values[:, :, 5] *= 50
    words = as_words(values, "bfloat16")
    error = {}
    for keys in (True, False):
        data = quant.encode_component("int8", words, "bfloat16", keys)
        back = quant.decode_component("int8", data, *words.shape, "bfloat16", keys)
        rest = np.delete(values_of(back, "bfloat16") - values_of(words, "bfloat16"), 5, axis=2)
        error[keys] = (rest**2).mean()
    assert error[True] * 50 < error[False]


def test_e4m3_codes_are_those_of_ml_dtypes() -> None:
    steps = np.concatenate(
        [np.linspace(-448, 448, 40001), 2.0 ** np.linspace(-14, 9, 4001)], dtype=np.float32
    ).clip(-448, 448)
    wanted = steps.astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(quant._nearest_e4m3(steps), wanted.view(np.uint8))
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    wide = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(quant._of_e4m3(codes), wide)


def test_an_approximate_quotient_gives_the_same_inverse() -> None:
    """Every bf16 scale there is; a device may be two units in the last place off."""
    words = np.arange(0x0080, 0x7E80, dtype=np.uint32)
    scale = (words << 16).view(np.float32)
    quotient = (np.float32(1) / scale).view(np.uint32)
    for off in range(-3, 4):
        near = (quotient + np.uint32(off & 0xFFFF_FFFF) + np.uint32(0x400)) & np.uint32(0xFFFFF800)
        assert np.array_equal(near, quant._inverse(scale).view(np.uint32))


@each_scheme
@pytest.mark.parametrize("dtype", WORDS)
def test_what_is_not_finite_is_nan_and_stays_where_it_was(scheme: str, dtype: str) -> None:
    case = Case("nan", dims=(128,), heads=2, tokens=16, layers=1, blocks=(1,), dtype=dtype)
    for bad in (np.nan, np.inf, -np.inf):
        setup = Setup(case, scheme, ordinary=True)
        cache = setup.caches[0]
        cache[1, 3, 1, 5] = as_words(np.array([bad], np.float32), dtype)[0]
        quant.encode(scheme, setup.rows, *setup.everything, setup.digests)
        setup.poison()
        quant.decode(scheme, setup.rows, *setup.everything, setup.digests, setup.verdicts)
        wanted = np.zeros((16, 2, 128), bool)
        if quant.by_channel(scheme, True):  # the channel of the head
            wanted[:, 1, 5] = True
        else:
            wanted[3, 1, :] = True
        found = values_of(cache[1], dtype)
        assert np.array_equal(np.isnan(found), wanted)
        assert np.isfinite(found[~wanted]).all()
        assert (cache[1][wanted] == quant.NAN_WORDS[dtype]).all()


@each_scheme
@pytest.mark.parametrize("dtype", WORDS)
def test_nothing_finite_becomes_infinite(scheme: str, dtype: str) -> None:
    case = Case("large", dims=(64, 64), heads=1, layers=1, blocks=(1,), dtype=dtype)
    for value in (quant.LARGEST[dtype], -quant.LARGEST[dtype], 0.0, -0.0, 1e-40):
        setup = Setup(case, scheme, ordinary=True)
        word = as_words(np.array([value], np.float32), dtype)[0]
        for cache in setup.caches:
            cache[1] = word
        quant.encode(scheme, setup.rows, *setup.everything, setup.digests)
        setup.poison()
        quant.decode(scheme, setup.rows, *setup.everything, setup.digests, setup.verdicts)
        for cache in setup.caches:
            found = values_of(cache[1], dtype)
            squared = scheme == "rot4" and abs(value) > 1e18
            if squared:
                assert np.isnan(found).all()  # what overflows is not taken for a number
            else:
                share = 0.25 if scheme == "rot4" else 0.02
                assert (np.abs(found - value) <= abs(value) * share + 1e-38).all()


def test_a_rotation_turns_back() -> None:
    for width in (16, 32, 64, 128):
        matrix = quant.hadamard(width) * quant.signs(width)[:, None]
        assert np.array_equal(matrix @ matrix.T, width * np.eye(width, dtype=np.float32))
        assert set(np.unique(matrix)) == {-1.0, 1.0}
    assert [quant.piece(dim) for dim in (64, 80, 96, 128, 256, 576)] == [64, 16, 32, 128, 128, 64]


def test_bad_input_is_named() -> None:
    setup = Setup(CASES[0], "int8")
    rows, digests = setup.rows, setup.digests
    with pytest.raises(ValueError, match="scheme 'int3', expected one of int8, fp8, int4, rot4"):
        quant.encode("int3", rows, *setup.everything, digests)
    for blocks, segments in (((0, 9), (0, 1)), ((2, 1), (0, 1)), ((0, 1), (0, 3))):
        with pytest.raises(ValueError, match="are not within the"):
            quant.encode("int8", rows, blocks, segments, digests)
    for wrong in (digests[:, :1], digests.astype(np.int64)):
        with pytest.raises(ValueError, match="^digests is"):
            quant.encode("int8", rows, *setup.everything, wrong)
    with pytest.raises(ValueError, match="^verdicts is"):
        quant.decode("int8", rows, *setup.everything, digests, np.zeros((3, 1), np.uint8))
    components = rows.components.copy()
    components[0, 5] = 33
    odd = replace(rows, components=components)
    for scheme, says in (("int4", "heads of 33 are odd"), ("rot4", "no multiple")):
        with pytest.raises(ValueError, match=says):
            quant.encode(scheme, odd, *setup.everything, digests)
    with pytest.raises(TypeError, match="elements of uint8: codecs know bfloat16"):
        replace(rows, dtype="uint8")
    with pytest.raises(ValueError, match="^offsets is|^offsets of"):
        replace(rows, offsets=np.repeat(rows.offsets, 3, axis=2))
    for name in ("components", "segments", "frames"):
        with pytest.raises(ValueError, match=f"^{name} is .*, expected C-contiguous int64"):
            replace(rows, **{name: getattr(rows, name).astype(np.int32)})


def test_native_without_numba_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "native", lambda: None)
    with pytest.raises(ImportError, match=r"kvengine\[cpu\]"):
        launch.quantizers(True)
    assert launch.quantizers(None) is None
    launch.load_quantizer("int8")
    setup = Setup(CASES[0], "int8")
    quant.encode("int8", setup.rows, *setup.everything, setup.digests)
    assert setup.frames_whole()


def nothing() -> None:
    """Stands for what is compiled, which takes longer."""


def test_a_constant_that_changes_is_compiled_anew(
    require: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    native = require("kvengine.kernels.quant_native")
    config = require("numba").config
    monkeypatch.setattr(config, "CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator", raising=False)
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    source = Path(quant.__file__).read_text()
    for text, count in ((source, 1), (source, 1), (source.replace("0.2578", "0.2579"), 2)):
        (tmp_path / "quant.py").write_text(text)
        monkeypatch.setattr(quant, "__file__", str(tmp_path / "quant.py"))
        native._compiled()(nothing)()()
        assert len(list(tmp_path.rglob("*.nbi"))) == count


def test_triton_kernels_equal_the_reference(require: Callable[[str], ModuleType]) -> None:
    require("triton")
    require("torch")
    said = gpu.run(__file__).split()
    assert said == [f"{scheme}:{case.name}" for scheme in quant.SCHEMES for case in CASES]


def on_device() -> None:
    """Run every case through the Triton kernels."""
    for scheme in quant.SCHEMES:
        for case in CASES:
            one, other = Setup(case, scheme, place=gpu.reachable), Setup(case, scheme)
            run("encode", scheme, one, *one.everything)
            quant.encode(scheme, other.rows, *other.everything, other.digests, native=False)
            assert one.frames_whole() and same_frames(scheme, one, other), (scheme, case)
            one.memory[:] = other.memory
            one.poison(), other.poison()
            run("decode", scheme, one, *one.everything)
            given = (other.digests, other.verdicts)
            quant.decode(scheme, other.rows, *other.everything, *given, native=False)
            assert one.untouched(), (scheme, case)
            for found, wanted in zip(one.caches, other.caches, strict=True):
                assert alike(scheme, found, wanted, case.dtype), (scheme, case)
            print(f"{scheme}:{case.name}")
        a_range(scheme)
        for case in (CASES[1], CASES[8]):
            of_some_heads(scheme, case)
        by_ids(scheme)


def run(verb: str, scheme: str, setup: Setup, *how: object) -> None:
    from kvengine.kernels import quant_device

    blocks, segments, *ids = how
    getattr(quant_device, verb)(scheme, setup.rows, blocks, segments, gpu.device(), *ids)
    gpu.settle()


def a_range(scheme: str) -> None:
    """One segment of one block."""
    whole, setup = Setup(CASES[0], scheme), Setup(CASES[0], scheme, place=gpu.reachable)
    quant.encode(scheme, whole.rows, *whole.everything, whole.digests, native=False)
    run("encode", scheme, setup, (1, 2), (1, 2))
    _, _, offset, nbytes = setup.rows.segments[1].tolist()
    part = slice(setup.starts[1] + offset, setup.starts[1] + offset + nbytes)
    wanted = np.full_like(setup.memory, POISON)
    wanted[part] = whole.memory[part]
    differ = (setup.memory != wanted).sum()
    assert differ <= (nbytes / 1000 if scheme == "rot4" else 0)


def of_some_heads(scheme: str, case: Case) -> None:
    from kvengine.kernels import quant_device

    setup, whole = encoded(case, scheme, place=gpu.reachable)
    few = some_heads(setup, 1, case.heads)
    quant_device.decode(scheme, few, *setup.everything, gpu.device())
    gpu.settle()
    check_heads(scheme, setup, whole, 1, case.heads)
    with pytest.raises(ValueError, match="were given to fill frames"):
        quant_device.encode(scheme, few, *setup.everything, gpu.device())


def by_ids(scheme: str) -> None:
    """Block ids on the device; one that is out of range is counted, and touches nothing."""
    import torch

    from kvengine.kernels.device import Ids

    one, other = (Setup(CASES[0], scheme, place=gpu.reachable) for _ in range(2))
    strides = np.array([[cache.strides[0], 0] for cache in one.caches[:2]], np.int64)
    error = torch.zeros(1, dtype=torch.int32, device=gpu.device())

    def named(*blocks: int) -> Ids:
        ids = torch.tensor(blocks, dtype=torch.int32, device=gpu.device())[:, None]
        return Ids(ids, strides, POOL, error)

    run("encode", scheme, one, *one.everything, named(4, 0, 2))
    run("encode", scheme, other, *other.everything, named(4, POOL, 2))
    assert int(error[0]) == 1
    plain = Setup(CASES[0], scheme)
    quant.encode(scheme, plain.rows, *plain.everything, plain.digests, native=False)
    assert same_frames(scheme, one, plain)
    middle = slice(one.starts[1], one.starts[2])
    one.memory[middle] = other.memory[middle]
    assert np.array_equal(one.memory, other.memory)
    other.poison()
    error[0] = 0
    run("decode", scheme, other, *other.everything, named(4, -1, 2))
    assert int(error[0]) == 1
    assert all((cache[[0, 1, 3]] == cache.dtype.type(0xA5A5)).all() for cache in other.caches)
    assert all((cache[[2, 4]] != cache.dtype.type(0xA5A5)).any() for cache in other.caches)


if __name__ == "__main__":
    on_device()
