"""kvengine.kernels.copy: every path gives the same bytes and digests, over awkward layouts.

Run as a program it does the Triton kernel's part: the interpreter must be chosen before the kernel
is imported, so that part has a process of its own.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import xxhash

import gpu
from kvengine.kernels import copy, launch
from kvengine.kernels.copy import Moves

POISON = 0xA5


@dataclass(frozen=True)
class Case:
    """A cache and a table of its blocks; sizes in bytes for a head of one token."""

    name: str
    order: str = "NHD"
    paged: bool = True
    slots: bool = False
    joined: bool = False  # K and V are strided views of one tensor
    heads: int = 2
    dims: tuple[int, ...] = (160, 160)
    tokens: int = 16  # of a block
    layers: int = 3
    blocks: tuple[int, ...] = (5, 0, 3, 6)
    lead: int = 0  # bytes by which frames miss an alignment of 64


CASES = [
    Case("paged_nhd"),
    Case("paged_hnd", order="HND"),
    Case("contiguous_nhd", paged=False),
    Case("contiguous_hnd", paged=False, order="HND"),
    Case("joined_nhd", joined=True),
    Case("joined_hnd", joined=True, order="HND", dims=(192, 192)),
    Case("slots_paged_nhd", slots=True),
    Case("slots_paged_hnd", slots=True, order="HND"),
    Case("slots_contiguous_hnd", slots=True, paged=False, order="HND", dims=(192, 64)),
    Case("slots_joined_hnd", slots=True, joined=True, order="HND", dims=(96, 80)),
    Case("odd_bytes", dims=(81, 81), heads=3, lead=5),
    Case("odd_bytes_slots", dims=(81, 33), heads=3, slots=True, order="HND", lead=3),
    Case("k_and_v_differ", dims=(192, 128)),
    Case("latent", dims=(1152,), heads=1),
    Case("no_blocks", blocks=()),
    Case("one_token_blocks", tokens=1, heads=5, dims=(96, 96)),
    Case("wide", heads=8, dims=(256, 256), tokens=64, blocks=(2, 1), layers=2),
    Case("wide_off_by_eight", heads=8, dims=(256, 256), tokens=64, blocks=(1,), layers=2, lead=8),
    Case("short", heads=1, dims=(24, 24), tokens=5),
    Case("exactly_240", heads=1, dims=(24,), tokens=10),
    Case("just_over_240", heads=1, dims=(241,), tokens=1),
    Case("whole_kilobytes", heads=1, dims=(512, 512), tokens=2),
]
POOL = 8  # blocks of a cache


class Setup:
    """The memory of a case, where `place` puts it, its Moves, and what must be in each frame."""

    def __init__(
        self, case: Case, seed: int = 0, place: Callable[[np.ndarray], np.ndarray] = np.asarray
    ) -> None:
        rng = np.random.default_rng(seed)
        self.case = case
        tokens, heads, count = case.tokens, case.heads, len(case.blocks)
        lead = (POOL, tokens) if case.paged else (POOL * tokens,)
        width = sum(case.dims)
        self.caches = []  # arrays that own memory
        rows, segments, wanted = [], [], [b""] * count
        ids = np.array(case.blocks, np.int64)
        # the slots of each block's tokens: anywhere in the pool, or in the block's place
        places = ids[:, None] * tokens + np.arange(tokens)
        if case.slots:
            places = rng.permutation(POOL * tokens)[: count * tokens].reshape(count, tokens)
        offsets: list[np.ndarray] = []
        at = 0
        for _ in range(case.layers):
            whole = rng.integers(0, 256, (*lead, heads, width), dtype=np.uint8)
            if case.order == "HND":  # the same axes, other strides
                whole = np.ascontiguousarray(np.moveaxis(whole, -2, -3)).swapaxes(-2, -3)
            whole = place(whole)
            ends = np.cumsum([0, *case.dims])
            views = [whole[..., a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
            if not case.joined:
                views = [view.copy(order="K") for view in views]
                views = [place(_same_order(view, case.order)) for view in views]
            self.caches += [whole] if case.joined else views
            first, start = len(rows), at
            for group, view in enumerate(views):
                run = view.shape[-1]
                block_stride = view.strides[0] * (1 if case.paged else tokens)
                token_stride, head_stride = view.strides[-3], view.strides[-2]
                by_token = places // tokens * block_stride + places % tokens * token_stride
                unit = by_token if case.slots else ids[:, None] * block_stride
                if len(offsets) <= group:
                    offsets.append(unit)
                frame_token = heads * run if case.order == "NHD" else run
                frame_head = run if case.order == "NHD" else tokens * run
                axes = [(tokens, token_stride, frame_token), (heads, head_stride, frame_head)]
                if case.slots:
                    axes[0] = (1, 0, 0)
                if case.order == "HND":
                    axes.reverse()
                unit_frame = frame_token if case.slots else tokens * heads * run
                base = view.__array_interface__["data"][0]
                rows.append((base, group, *axes[0], *axes[1], run, unit_frame, at))
                at += tokens * heads * run
                flat = view.reshape(POOL * tokens, heads, run)
                for n in range(count):
                    block = flat[places[n]]
                    block = block if case.order == "NHD" else block.swapaxes(0, 1)
                    wanted[n] += block.tobytes()
            segments.append((first, len(rows) - first, start, at - start))
        units = case.tokens if case.slots else 1
        self.payload_nbytes = at
        stride = -(-at // 64) * 64 + 64
        self.memory = place(np.full(stride * count + 128, POISON, np.uint8))
        start = -self.memory.ctypes.data % 64 + case.lead
        self.starts = [start + n * stride for n in range(count)]
        self.wanted = self.memory.copy()
        for n, text in enumerate(wanted):
            self.wanted[self.starts[n] : self.starts[n] + at] = np.frombuffer(text, np.uint8)
        self.moves = Moves(
            np.array(rows, np.int64),
            np.array(offsets, np.int64).reshape(len(case.dims), count, units),
            np.array(segments, np.int64),
            np.array([self.memory.ctypes.data + s for s in self.starts], np.int64),
        )
        self.digests = np.zeros((count, case.layers, 2), np.uint64)
        for n in range(count):
            for s, (_, _, offset, nbytes) in enumerate(segments):
                begin = self.starts[n] + offset
                value = xxhash.xxh3_128_intdigest(self.wanted[begin : begin + nbytes].tobytes())
                self.digests[n, s] = value & (1 << 64) - 1, value >> 64

    @property
    def everything(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (0, len(self.moves.frames)), (0, len(self.moves.segments))

    def empty_caches(self) -> list[np.ndarray]:
        """Poison the caches; return what they held where a block of the table lies."""
        kept = [cache.copy() for cache in self.caches]
        for cache in self.caches:
            cache[...] = POISON
        return kept

    def wanted_in(self, blocks: tuple[int, int], segment: int) -> np.ndarray:
        """What the frames' memory must hold once that segment of those blocks is gathered."""
        _, _, offset, nbytes = self.moves.segments[segment].tolist()
        wanted = np.full_like(self.memory, POISON)
        for n in range(*blocks):
            part = slice(self.starts[n] + offset, self.starts[n] + offset + nbytes)
            wanted[part] = self.wanted[part]
        return wanted

    def poisoned(self) -> np.ndarray:
        return np.full((*self.digests.shape[:2], 2), 0xA5A5, np.uint64)


def _same_order(view: np.ndarray, order: str) -> np.ndarray:
    """Copy to dense memory whose axes lie as `order` says."""
    if order == "NHD":
        return np.ascontiguousarray(view)
    return np.ascontiguousarray(view.swapaxes(-2, -3)).swapaxes(-2, -3)


def ways(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    if name == "reference":
        return copy.gather_reference, copy.scatter_reference
    native = name == "native"

    def gather(*args: object) -> None:
        copy.gather(*args, native=native)  # type: ignore[arg-type]  # a table of callables

    def scatter(*args: object) -> None:
        copy.scatter(*args, native=native)  # type: ignore[arg-type]  # a table of callables

    return gather, scatter


@pytest.fixture(params=["native", "plain", "reference"])
def way(request: pytest.FixtureRequest, require: Callable[[str], ModuleType]) -> str:
    if request.param == "native":
        require("numba")
    return str(request.param)


by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@by_case
def test_gather_fills_frames_and_digests(case: Case, way: str) -> None:
    setup = Setup(case)
    setup.moves.check()
    digests = setup.poisoned()
    ways(way)[0](setup.moves, *setup.everything, digests)
    assert np.array_equal(setup.memory, setup.wanted)
    assert np.array_equal(digests, setup.digests)


@by_case
def test_scatter_gives_back_the_cache(case: Case, way: str) -> None:
    setup = Setup(case)
    setup.memory[:] = setup.wanted
    before = setup.empty_caches()
    verdicts = np.full(setup.digests.shape[:2], POISON, np.uint8)
    ways(way)[1](setup.moves, *setup.everything, setup.digests, verdicts)
    assert (verdicts == copy.GOOD).all()
    assert np.array_equal(setup.memory, setup.wanted)
    check_caches(setup, before, case)


def check_caches(setup: Setup, before: list[np.ndarray], case: Case) -> None:
    """The table's bytes are back, and every other byte is still poison."""
    after = [cache.copy() for cache in setup.caches]
    for cache in setup.caches:
        cache[...] = 0
    setup.memory[:] = 1
    copy.scatter_reference(setup.moves, *setup.everything, *ones(setup))
    for cache, found, old in zip(setup.caches, after, before, strict=True):
        assert np.array_equal(found, np.where(cache == 1, old, POISON)), case.name


def ones(setup: Setup) -> tuple[np.ndarray, np.ndarray]:
    """Digests of segments that hold only ones, and a place for verdicts."""
    digests = np.zeros_like(setup.digests)
    for s, nbytes in enumerate(setup.moves.segments[:, copy.NBYTES].tolist()):
        value = xxhash.xxh3_128_intdigest(b"\x01" * nbytes)
        digests[:, s] = value & (1 << 64) - 1, value >> 64
    return digests, np.zeros(digests.shape[:2], np.uint8)


@pytest.mark.parametrize("big", [False, True], ids=["cached", "streamed"])
def test_a_block_may_be_gathered_many_times(
    big: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "STREAM_NBYTES", 0 if big else 1 << 40)
    setup = Setup(Case("repeated", blocks=(3, 3, 1, 3), heads=8, dims=(256, 256), lead=0))
    digests = setup.poisoned()
    ways(way)[0](setup.moves, *setup.everything, digests)
    assert np.array_equal(setup.memory, setup.wanted)
    assert np.array_equal(digests[0], digests[3])
    assert np.array_equal(digests, setup.digests)


def test_ranges_touch_only_their_own(way: str) -> None:
    setup = Setup(CASES[0])
    digests = setup.poisoned()
    gather, scatter = ways(way)
    gather(setup.moves, (1, 3), (1, 2), digests)
    inside = np.zeros(digests.shape[:2], bool)
    inside[1:3, 1] = True
    assert np.array_equal(digests[inside], setup.digests[inside])
    assert (digests[~inside] == 0xA5A5).all()
    assert np.array_equal(setup.memory, setup.wanted_in((1, 3), 1))

    verdicts = np.full(digests.shape[:2], POISON, np.uint8)
    before = [cache.copy() for cache in setup.caches]
    scatter(setup.moves, (1, 3), (1, 2), setup.digests, verdicts)
    assert (verdicts[inside] == copy.GOOD).all() and (verdicts[~inside] == POISON).all()
    scatter(setup.moves, (2, 2), (0, 3), setup.digests, verdicts)  # an empty range
    assert (verdicts[~inside] == POISON).all()
    assert all(map(np.array_equal, setup.caches, before))


@pytest.mark.parametrize("streams", [0, 1 << 40], ids=["streamed", "cached"])
def test_one_flipped_bit_is_bad(way: str, streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "STREAM_NBYTES", streams)
    case = Case("flip", heads=1, dims=(157, 200), tokens=7, layers=2, blocks=(4,))
    setup = Setup(case)
    setup.memory[:] = setup.wanted
    scatter = ways(way)[1]
    verdicts = np.zeros((1, 2), np.uint8)
    half = int(setup.moves.segments[0, copy.NBYTES])
    step = 1 if way == "native" else 37
    for bit in range(0, setup.payload_nbytes * 8, step):
        at = setup.starts[0] + bit // 8
        setup.memory[at] ^= 1 << bit % 8
        scatter(setup.moves, *setup.everything, setup.digests, verdicts)
        setup.memory[at] ^= 1 << bit % 8
        bad = int(bit // 8 >= half)
        assert verdicts[0, bad] == copy.BAD, bit
        assert verdicts[0, 1 - bad] == copy.GOOD, bit


def test_one_flipped_bit_of_a_digest_is_bad(way: str) -> None:
    setup = Setup(CASES[0])
    setup.memory[:] = setup.wanted
    verdicts = np.zeros(setup.digests.shape[:2], np.uint8)
    for bit in range(128):
        digests = setup.digests.copy()
        digests[2, 1, bit // 64] ^= np.uint64(1 << bit % 64)
        ways(way)[1](setup.moves, *setup.everything, digests, verdicts)
        assert verdicts[2, 1] == copy.BAD
        assert (verdicts == copy.BAD).sum() == 1


@pytest.mark.parametrize("name", ["wide", "slots_paged_hnd"])
def test_two_threads_share_one_table(name: str, require: Callable[[str], ModuleType]) -> None:
    require("numba")
    case = next(case for case in CASES if case.name == name)
    setup = Setup(case)
    digests = setup.poisoned()
    verdicts = np.zeros(digests.shape[:2], np.uint8)
    blocks, (_, last) = setup.everything
    halves = [(0, last // 2), (last // 2, last)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda part: copy.gather(setup.moves, blocks, part, digests), halves))
        assert np.array_equal(digests, setup.digests)
        assert np.array_equal(setup.memory, setup.wanted)
        before = setup.empty_caches()
        list(
            pool.map(
                lambda part: copy.scatter(setup.moves, blocks, part, digests, verdicts), halves
            )
        )
    assert (verdicts == copy.GOOD).all()
    check_caches(setup, before, case)


def some_heads(setup: Setup, first: int, last: int) -> Moves:
    """The moves of a cache that has these heads alone: here they lie in the whole one."""
    moves, order = setup.moves, setup.case.order
    components = moves.components.copy()
    count, cache, frame = copy.INNER, copy.INNER_CACHE, copy.INNER_FRAME
    if order == "HND":
        count, cache, frame = copy.OUTER, copy.OUTER_CACHE, copy.OUTER_FRAME
    components[:, count] = last - first
    components[:, copy.BASE] += first * components[:, cache]
    components[:, copy.FRAME] += first * components[:, frame]
    return Moves(components, moves.offsets, moves.segments, moves.frames, whole=False)


SOME_HEADS = [case for case in CASES if case.heads > 1 and len(case.blocks)]


@pytest.mark.parametrize("case", SOME_HEADS, ids=lambda case: case.name)
def test_some_heads_are_scattered_and_no_others(case: Case, way: str) -> None:
    setup = Setup(case)
    setup.memory[:] = setup.wanted
    wanted, poison = heads_of(setup, 1, case.heads)
    moves = some_heads(setup, 1, case.heads)
    moves.check()
    verdicts = np.full(setup.digests.shape[:2], POISON, np.uint8)
    ways(way)[1](moves, *setup.everything, setup.digests, verdicts)
    assert (verdicts == copy.GOOD).all()
    assert all(map(np.array_equal, setup.caches, wanted))
    # A head that the cache does not have has a wrong byte: the segment is bad, and not copied.
    setup.memory[setup.starts[0]] ^= 1
    for cache in setup.caches:
        cache[...] = POISON
    ways(way)[1](moves, (0, 1), (0, 1), setup.digests, verdicts)
    assert verdicts[0, 0] == copy.BAD
    assert all(map(np.array_equal, setup.caches, poison))


def heads_of(setup: Setup, first: int, last: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Poison the caches; return what they then hold with some heads of the table, and without."""
    setup.empty_caches()
    poison = [cache.copy() for cache in setup.caches]
    verdicts = np.zeros(setup.digests.shape[:2], np.uint8)
    copy.scatter_reference(setup.moves, *setup.everything, setup.digests, verdicts)
    wanted = [cache.copy() for cache in setup.caches]
    setup.empty_caches()
    for cache in wanted:
        cache[..., :first, :] = POISON
        cache[..., last:, :] = POISON
    return wanted, poison


def test_frames_are_not_made_of_some_heads(way: str) -> None:
    setup = Setup(CASES[0])
    moves = some_heads(setup, 0, 1)
    if way != "reference":
        with pytest.raises(ValueError, match="a table of a few heads was given to fill frames"):
            ways(way)[0](moves, *setup.everything, setup.digests)
    for column, value in ((copy.FRAME, 5121), (copy.RUN, 0), (copy.INNER_FRAME, -1)):
        bad = some_heads(setup, 0, 2)
        bad.components[0, column] = value
        with pytest.raises(ValueError, match="component 0 reaches from byte .* within 0 to 10240"):
            bad.check()


def test_read_only_tables_are_taken(way: str) -> None:
    setup = Setup(CASES[0])
    for table in (setup.moves.components, setup.moves.offsets, setup.digests):
        table.flags.writeable = False
    verdicts = np.zeros(setup.digests.shape[:2], np.uint8)
    setup.memory[:] = setup.wanted
    ways(way)[1](setup.moves, *setup.everything, setup.digests, verdicts)
    assert (verdicts == copy.GOOD).all()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (copy.GROUP, 7, "group 7"),
        (copy.FRAME, 1, "starts at byte 1, expected 0"),
        (copy.RUN, 161, "stride"),
        (copy.OUTER, 0, "0 outer runs, expected at least 1"),
        (copy.INNER_FRAME, 80, "inner stride 80 in the frame, expected 160"),
        (copy.INNER, 1, "stride"),
    ],
)
def test_check_names_a_component_that_does_not_tile(column: int, value: int, message: str) -> None:
    moves = Setup(CASES[0]).moves
    moves.components[0, column] = value
    with pytest.raises(ValueError, match=f"component 0 .*{message}"):
        moves.check()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (copy.FIRST, -1, "components -1 to 1"),
        (copy.COUNT, 70, "components 2 to 72"),
        (copy.COUNT, 0, "components 2 to 2"),
        (copy.OFFSET, 5, "starts at byte 5, inside another"),
        (copy.NBYTES, 9, "has 9 bytes, its components 10240"),
    ],
)
def test_check_names_a_segment_that_does_not_fit(column: int, value: int, message: str) -> None:
    moves = Setup(CASES[0]).moves
    moves.segments[1, column] = value
    with pytest.raises(ValueError, match=f"segment 1 .*{message}"):
        moves.check()


def test_tables_that_do_not_fit_are_named() -> None:
    setup = Setup(CASES[0])
    moves = setup.moves
    for tables, named in (
        ((moves.components.astype(np.int32), moves.offsets, moves.segments, moves.frames), "comp"),
        ((moves.components, moves.offsets[:, :1], moves.segments, moves.frames), "offsets"),
        ((moves.components, moves.offsets, moves.segments[:, :3], moves.frames), "segments"),
        ((moves.components, moves.offsets, moves.segments, moves.frames[::2]), "frames"),
    ):
        with pytest.raises(ValueError, match=f"^{named}.* is .*, expected C-contiguous"):
            Moves(*tables)
    for blocks, segments in (((0, 5), (0, 3)), ((-1, 2), (0, 3)), ((0, 4), (2, 1))):
        with pytest.raises(ValueError, match="are not within the"):
            copy.gather(moves, blocks, segments, setup.digests)
    with pytest.raises(ValueError, match="^digests is"):
        copy.gather(moves, *setup.everything, setup.digests[:, :1])
    with pytest.raises(ValueError, match="^verdicts is"):
        copy.scatter(moves, *setup.everything, setup.digests, np.zeros((4, 3), np.int8))


def test_native_without_numba_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "native", lambda: None)
    with pytest.raises(ImportError, match=r"kvengine\[cpu\]"):
        launch.choose(True)
    assert launch.choose(None) is None
    assert not launch.available("no_such_package_of_this_name")


def test_triton_kernel_equals_the_reference(require: Callable[[str], ModuleType]) -> None:
    require("triton")
    require("torch")
    assert gpu.run(__file__).split() == [case.name for case in CASES]


def test_triton_kernel_compiles_for_a_gpu_to_wide_loads(
    require: Callable[[str], ModuleType],
) -> None:
    """No GPU is needed for this; the interpreter takes kernels that the compiler refuses."""
    require("torch")
    triton = require("triton")
    compiler, backends = require("triton.compiler"), require("triton.backends.compiler")
    device = require("kvengine.kernels.device")
    constants = {"GATHER": True, "WORD": 4, "ALIGN": 16, "ROWS": 2, "COLS": 1024}
    names = device.copy_runs_kernel.arg_names
    kinds = dict.fromkeys(names, "i32") | dict.fromkeys(names[:3], "*i64")
    kinds |= dict.fromkeys(constants, "constexpr")
    source = compiler.ASTSource(device.copy_runs_kernel, kinds, constants)
    built = triton.compile(source, target=backends.GPUTarget("cuda", 90, 32))
    assert built.asm["ptx"].count("st.global.v4.b32") == 4
    assert ".local" not in built.asm["ptx"]


def on_device() -> None:
    """Run every case through the Triton kernel, on the addresses of numpy arrays."""
    from kvengine.kernels import device

    for case in CASES:
        setup = Setup(case, place=gpu.reachable)
        device.gather(setup.moves, *setup.everything, gpu.device())
        gpu.settle()
        assert np.array_equal(setup.memory, setup.wanted), f"gather {case}"
        before = setup.empty_caches()
        device.scatter(setup.moves, *setup.everything, gpu.device())
        gpu.settle()
        check_caches(setup, before, case)
        if len(case.blocks) > 2:
            ranged(device, case)
        if case.name in ("paged_nhd", "slots_paged_hnd", "odd_bytes"):
            of_some_heads(device, case)
        print(case.name)


def of_some_heads(device: ModuleType, case: Case) -> None:
    setup = Setup(case, place=gpu.reachable)
    setup.memory[:] = setup.wanted
    wanted, _ = heads_of(setup, 1, 2)
    moves = some_heads(setup, 1, 2)
    device.scatter(moves, *setup.everything, gpu.device())
    gpu.settle()
    assert all(map(np.array_equal, setup.caches, wanted)), f"scatter of a head {case}"
    with pytest.raises(ValueError, match="a table of a few heads"):
        device.gather(moves, *setup.everything, gpu.device())


def ranged(device: ModuleType, case: Case) -> None:
    setup = Setup(case, place=gpu.reachable)
    device.gather(setup.moves, (1, 3), (1, 2), gpu.device())
    gpu.settle()
    assert np.array_equal(setup.memory, setup.wanted_in((1, 3), 1)), f"gather of a range {case}"


if __name__ == "__main__":
    on_device()
