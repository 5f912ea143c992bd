"""kvengine.kernels.xxh3_device: its digests equal the host's, whoever copies and verifies.

Run as a program it does the device's part.
"""

import ctypes
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import xxhash

import gpu
from kvengine.kernels import copy
from test_copy import CASES, POISON, POOL, Case, Setup, check_caches, heads_of, some_heads

NAMED = {case.name: case for case in CASES}
ONE_PASS = [
    NAMED["paged_nhd"],
    NAMED["joined_hnd"],
    NAMED["slots_joined_hnd"],  # ends within a KiB
    NAMED["latent"],
    NAMED["whole_kilobytes"],
    Case("two_tiles", heads=8, dims=(256, 256), layers=2, blocks=(2, 1, 2)),
]
TWO_PASSES = [
    NAMED["odd_bytes"],
    NAMED["one_token_blocks"],
    NAMED["just_over_240"],
    Case("off_by_eight", heads=4, dims=(256, 256), layers=2, blocks=(1,), lead=8),
]
PARTS = "moves heads flips pairs ids spans".split()


def test_a_device_gives_the_digests_of_the_host(require: Callable[[str], ModuleType]) -> None:
    require("torch")
    require("triton")
    done = gpu.run(__file__).split()
    assert done == PARTS


def moves() -> None:
    """Every case is gathered, digested, verified and scattered, in one pass where it fits."""
    from kvengine.kernels import xxh3_device as xxh3

    for case in (*ONE_PASS, *TWO_PASSES):
        setup = Setup(case, place=gpu.reachable)
        assert (xxh3.chunk_of(setup.moves) > 0) == (case in ONE_PASS), case
        digests = gather(setup, setup.everything)
        assert np.array_equal(setup.memory, setup.wanted), case
        assert np.array_equal(digests, setup.digests), case
        before = setup.empty_caches()
        verdicts = scatter(setup, setup.everything, digests)
        assert (verdicts == copy.GOOD).all(), case
        check_caches(setup, before, case)
        if len(case.blocks) > 2:
            setup = Setup(case, place=gpu.reachable)
            digests = gather(setup, ((1, 3), (1, 2)))
            assert np.array_equal(setup.memory, setup.wanted_in((1, 3), 1)), case
            inside = np.zeros(digests.shape[:2], bool)
            inside[1:3, 1] = True
            assert np.array_equal(digests[inside], setup.digests[inside])
            assert (digests[~inside] == POISON).all()


def heads() -> None:
    """A cache of some heads: whole segments are verified, and those heads of them copied."""
    for name in ("paged_nhd", "slots_joined_hnd"):
        setup = Setup(NAMED[name], place=gpu.reachable)
        setup.memory[:] = setup.wanted
        wanted, _ = heads_of(setup, 1, 2)
        setup.moves = some_heads(setup, 1, 2)
        assert (scatter(setup, setup.everything, setup.digests) == copy.GOOD).all(), name
        assert all(map(np.array_equal, setup.caches, wanted)), name
        setup.memory[setup.starts[1]] ^= 1  # of the other head
        verdicts = scatter(setup, setup.everything, setup.digests)
        assert verdicts[1, 0] == copy.BAD and (verdicts == copy.BAD).sum() == 1, name


def gather(setup: Setup, ranges: tuple) -> np.ndarray:
    """Gather on the device; return the digests, which were poisoned before."""
    from kvengine.kernels import launch
    from kvengine.kernels import xxh3_device as xxh3

    on = launch.launcher(gpu.device())
    digests = on.table(np.full_like(setup.digests, POISON))
    xxh3.gather(setup.moves, *ranges, digests, on)
    return on.read(digests)


def scatter(setup: Setup, ranges: tuple, digests: np.ndarray) -> np.ndarray:
    from kvengine.kernels import launch
    from kvengine.kernels import xxh3_device as xxh3

    on = launch.launcher(gpu.device())
    verdicts = on.table(np.full(digests.shape[:2], POISON, np.uint8))
    xxh3.scatter(setup.moves, *ranges, on.table(digests), verdicts, on)
    return on.read(verdicts)


def flips() -> None:
    """One flipped bit makes its segment BAD, and no other."""
    rng = np.random.default_rng(5)
    for name in ("paged_nhd", "odd_bytes"):
        setup = Setup(NAMED[name], place=gpu.reachable)
        setup.memory[:] = setup.wanted
        segments = setup.moves.segments
        last = int(segments[0, copy.NBYTES]) - 1
        for at in (0, 1023, int(rng.integers(1024, last)), last):
            place = setup.starts[2] + int(segments[1, copy.OFFSET]) + at
            setup.memory[place] ^= 1 << at % 8
            verdicts = scatter(setup, setup.everything, setup.digests)
            setup.memory[place] ^= 1 << at % 8
            assert verdicts[2, 1] == copy.BAD, (name, at)
            assert (verdicts == copy.BAD).sum() == 1, (name, at)
        digests = setup.digests.copy()
        for half in range(2):
            digests[3, 2, half] ^= np.uint64(1 << 63)
            verdicts = scatter(setup, setup.everything, digests)
            digests[3, 2, half] ^= np.uint64(1 << 63)
            assert np.argwhere(verdicts == copy.BAD).tolist() == [[3, 2]]


def pairs() -> None:
    """Saved by host or device, verified by host or device: all four agree, and see a bad byte."""
    case = NAMED["joined_hnd"]
    for saver in ("host", "device"):
        for verifier in ("host", "device"):
            setup = Setup(case, place=gpu.reachable)
            digests = np.zeros_like(setup.digests)
            if saver == "host":
                copy.gather(setup.moves, *setup.everything, digests)
            else:
                digests = gather(setup, setup.everything)
            assert np.array_equal(setup.memory, setup.wanted)
            before = setup.empty_caches()
            for bad in (False, True):
                setup.memory[setup.starts[1] + 700] ^= bad
                verdicts = np.zeros(digests.shape[:2], np.uint8)
                if verifier == "host":
                    copy.scatter(setup.moves, *setup.everything, digests, verdicts)
                else:
                    verdicts = scatter(setup, setup.everything, digests)
                assert (verdicts == copy.BAD).sum() == bad, (saver, verifier)
                if not bad:
                    check_caches(setup, before, case)
                    setup.memory[:] = setup.wanted


def ids() -> None:
    """Tables of ids on the device: the same bytes; ids out of range move nothing, are counted."""
    from kvengine.kernels import device, launch
    from kvengine.kernels import xxh3_device as xxh3

    on = launch.launcher(gpu.device())
    for name, wide in (
        ("paged_nhd", np.int32),
        ("slots_paged_hnd", np.int64),
        ("odd_bytes", np.int64),
    ):
        setup = Setup(NAMED[name], place=gpu.reachable)
        given, strides, page, limit = described(setup, NAMED[name])
        bad = given.copy()
        bad[1, 0], bad[3, -1] = -1, limit
        for table, lost in ((given, 0), (bad, 2)):
            expected, count = device.offsets_reference(table, strides, limit, page)
            assert count == lost
            error = on.table(np.zeros(1, np.int32))
            made = device.Ids(on.table(table.astype(wide)), strides, limit, error, page)
            assert np.array_equal(on.read(made.offsets(setup.moves, on)), expected)
            assert on.read(error).tolist() == [lost]
            if lost:
                check_ids(setup, NAMED[name], on, made, expected[0] != -(1 << 63))
            else:
                assert np.array_equal(expected, setup.moves.offsets)
    setup = Setup(CASES[0])
    for table, limit, strides, said in (
        (np.zeros((4, 2), np.int32), 8, np.zeros((1, 2), np.int64), "ids are"),
        (np.zeros((4, 1), np.int32), 8, np.zeros((1, 2), np.int32), "strides is"),
        (np.zeros((4, 1), np.int32), 1 << 31, np.zeros((1, 2), np.int64), "no such cache"),
        (np.zeros((4, 1), np.float32), 8, np.zeros((2, 2), np.int64), "ids are float32"),
    ):
        try:
            device.Ids(on.table(table), strides, limit, None).offsets(setup.moves, on)
        except (TypeError, ValueError) as error:
            assert said in str(error)
        else:
            raise AssertionError(said)
    short = Setup(Case("short", heads=1, dims=(24, 24), tokens=5))
    try:
        xxh3.gather(short.moves, *short.everything, None, on)
    except ValueError as error:
        assert "240 bytes" in str(error)


def described(setup: Setup, case: Case) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Give the ids of a case, their strides, the tokens of a page and how many ids there are."""
    page = case.tokens if case.slots else 1
    strides = np.array(
        [
            (view.strides[0], view.strides[-3] if case.slots else 0)
            for view in setup.caches[: len(case.dims)]
        ],
        np.int64,
    )
    pages, rest = np.divmod(setup.moves.offsets[0], strides[0, 0])
    tokens = rest // strides[0, 1] if case.slots else rest
    return pages * page + tokens, strides, page, POOL * page


def check_ids(setup: Setup, case: Case, on: object, made: object, known: np.ndarray) -> None:
    """Gather and scatter by ids, raw and digested."""
    from kvengine.kernels import device
    from kvengine.kernels import xxh3_device as xxh3

    digests = on.table(np.zeros_like(setup.digests))
    verdicts = on.table(np.zeros(setup.digests.shape[:2], np.uint8))
    for digested in (False, True):
        fresh = Setup(case, place=gpu.reachable)
        wanted = fresh.wanted.copy()
        for is_known, _, frame, nbytes in runs(fresh, known):
            if not is_known:
                start = frame - fresh.memory.ctypes.data
                wanted[start : start + nbytes] = 0
        if digested:
            xxh3.gather(fresh.moves, *fresh.everything, digests, on, made)
        else:
            device.gather(fresh.moves, *fresh.everything, on, made)
        gpu.settle()
        assert np.array_equal(fresh.memory, wanted), case
        fresh.empty_caches()
        if digested:
            xxh3.scatter(fresh.moves, *fresh.everything, digests, verdicts, on, made)
            assert (on.read(verdicts) == copy.GOOD).all()
        else:
            device.scatter(fresh.moves, *fresh.everything, on, made)
        gpu.settle()
        found = fresh.empty_caches()
        for is_known, cache, frame, nbytes in runs(fresh, known):
            if is_known:
                ctypes.memmove(cache, frame, nbytes)
        assert all(map(np.array_equal, found, fresh.caches)), case


def runs(setup: Setup, known: np.ndarray) -> Iterator[tuple[bool, int, int, int]]:
    """Give (whether its unit is known, address in the cache, in the frame, nbytes) of each run."""
    offsets = setup.moves.offsets
    for row in setup.moves.components.tolist():
        for n, u in np.ndindex(offsets.shape[1:]):
            cache = row[copy.BASE] + int(offsets[row[copy.GROUP], n, u])
            frame = int(setup.moves.frames[n]) + row[copy.FRAME] + u * row[copy.UNIT_FRAME]
            for a, b in np.ndindex(row[copy.OUTER], row[copy.INNER]):
                yield (
                    bool(known[n, u]),
                    cache + a * row[copy.OUTER_CACHE] + b * row[copy.INNER_CACHE],
                    frame + a * row[copy.OUTER_FRAME] + b * row[copy.INNER_FRAME],
                    row[copy.RUN],
                )


def spans() -> None:
    """Every length from 241 on that changes something, at any address."""
    from kvengine.kernels import launch
    from kvengine.kernels import xxh3_device as xxh3

    on = launch.launcher(gpu.device())
    rng = np.random.default_rng(3)
    sizes = [*range(241, 330, 7), *range(1020, 1092, 3), 2048, 2049, 16_384, 16_385, 20_000]
    data = gpu.reachable(rng.integers(0, 256, 60_000, dtype=np.uint8))
    for lead in (0, 1, 8):
        start = -data.ctypes.data % 16 + lead
        nbytes = np.array(sizes, np.int64)
        addresses = np.full(len(sizes), data.ctypes.data + start, np.int64)
        out = on.table(np.full((len(sizes), 2), POISON, np.uint64))
        xxh3.digest_spans(addresses, nbytes, out, on)
        for size, found in zip(sizes, on.read(out).tolist(), strict=True):
            value = xxhash.xxh3_128_intdigest(data[start : start + size].tobytes())
            assert found == [value & (1 << 64) - 1, value >> 64], (lead, size)
    none = np.zeros(0, np.int64)
    xxh3.digest_spans(none, none, None, on)
    try:
        xxh3.digest_spans(addresses[:1], np.array([240]), None, on)
    except ValueError as error:
        assert "digest it on the host" in str(error)


if __name__ == "__main__":
    for name in PARTS:
        globals()[name]()
        print(name, flush=True)
