"""kvengine.trace: play a trace as a store would, and as the optimum would."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvengine
import rig
from kvengine.arena import Arena
from kvengine.errors import TraceError
from kvengine.formats import read
from kvengine.frame import PAGE_BYTES, frame_bytes
from kvengine.metrics import Metrics
from kvengine.policy import Request
from kvengine.policy.adaptive import Adaptive
from kvengine.policy.lru import LRU
from kvengine.policy.named import POLICIES
from kvengine.policy.ttl import TTL
from kvengine.store import Store
from kvengine.trace import Trace, optimum, simulate

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"


def drawn(requests: int = 400, seed: int = 0, sessions: int = 40) -> Trace:
    """Chats that grow, from a few shared beginnings, in order of time."""
    random = np.random.default_rng(seed)
    known: dict[tuple[int, int], int] = {}
    paths, seconds, now = [], [], 0.0
    chats = [[int(random.integers(3))] for _ in range(sessions)]
    for _ in range(requests):
        chat = chats[int(random.integers(sessions) * random.random())]
        chat += [int(each) for each in random.integers(0, 1 << 30, random.integers(0, 5))]
        parent, path = -1, []
        for name in chat:
            parent = known.setdefault((parent, name), len(known))
            path.append(parent)
        now += float(random.exponential(3.0))
        paths.append(path)
        seconds.append(now)
    offsets = np.cumsum([0, *map(len, paths)]).astype(np.int64)
    prints = random.integers(-(2**63), 2**63 - 1, len(known), dtype=np.int64)
    return Trace(
        "drawn",
        16,
        np.array([node for path in paths for node in path], np.int32),
        offsets,
        np.array(seconds),
        random.integers(0, 600, requests).astype(np.int32),
        random.integers(0, 3, requests).astype(np.int32),
        prints,
    )


# Playing


@pytest.mark.parametrize("blocks", [0, -1])
def test_no_capacity(blocks):
    for play in (lambda: simulate(drawn(9), LRU(), blocks), lambda: optimum(drawn(9), blocks)):
        with pytest.raises(TraceError, match=f"capacity: given {blocks} blocks, expected 1 to"):
            play()


@pytest.mark.parametrize("name", POLICIES)
def test_less_room_than_a_request(name):
    """A prompt longer than the memory is held in part, from its start."""
    trace = drawn(100)
    result = simulate(trace, POLICIES[name](), 2)
    assert 0 < result.hits < result.accesses


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "ttl"])
def test_room_for_all(name):
    """Then every policy hits what was there before."""
    trace = drawn(200)
    assert simulate(trace, POLICIES[name](), trace.unique).hits == len(trace.nodes) - trace.unique


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 999), share=st.sampled_from([0.02, 0.1, 0.4]))
def test_optimum_is_not_beaten(seed, share):
    trace = drawn(150, seed)
    blocks = max(1, int(trace.unique * share))
    best = optimum(trace, blocks).hits
    for make in (LRU, Adaptive, POLICIES["arc"]):
        assert simulate(trace, make(), blocks).hits <= best


def test_optimum_against_a_plain_model():
    trace = drawn(120, 3)
    blocks, here, hits = 30, set(), 0
    paths = [trace.path(r).tolist() for r in range(trace.requests)]
    for r, path in enumerate(paths):
        count = next((i for i, node in enumerate(path) if node not in here), len(path))
        hits += count
        here |= set(path)
        while len(here) > blocks:
            following = {
                node: next((q for q in range(r + 1, len(paths)) if node in paths[q]), 1 << 30)
                for node in here
            }
            here.remove(max(here, key=lambda node: (following[node], node)))
    assert optimum(trace, blocks).hits == hits


def decisions(trace: Trace, make, blocks: int) -> list[tuple[int, list[int]]]:
    made: list[tuple[int, list[int]]] = []
    simulate(trace, make(), blocks, evicted=lambda r, gone: made.append((r, gone.tolist())))
    return made


@pytest.mark.parametrize("make", [LRU, Adaptive])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_one_loop_and_verbs_agree(make, share):
    trace = drawn(600, 1)
    blocks = int(trace.unique * share)
    whole = simulate(trace, make(), blocks, 100)
    told: list[int] = []
    verbs = simulate(trace, make(), blocks, 100, evicted=lambda r, gone: told.extend(gone.tolist()))
    assert (whole.hits, whole.evictions) == (verbs.hits, verbs.evictions)
    assert len(told) == whole.evictions > 100


@pytest.mark.parametrize("name", POLICIES)
def test_a_store_decides_as_the_replay_does(name):
    """The same prompts through a store of that size: the same blocks leave at the same time."""
    trace = drawn(300, 2)
    blocks = int(trace.unique * 0.15)
    of = rig.layout(block_tokens=16)
    slot_bytes = -(-frame_bytes(of) // PAGE_BYTES) * PAGE_BYTES
    clock = [0.0]
    policy = Watched(POLICIES[name]())
    store = Store(Arena(blocks * slot_bytes), policy, Metrics(), lambda: clock[0])
    with kvengine.open("mem://?size=1M") as engine:
        identity = engine.namespace(model="m", layout=of).identity
    names = store.namespace(identity, of, bytes(32))
    mine = np.random.default_rng(5).bytes(32 * trace.unique)
    words = np.frombuffer(mine, np.uint8).reshape(-1, 32)
    prints = words[:, :8].copy().view(np.int64).reshape(-1)
    number = {int(each): node for node, each in enumerate(prints)}
    for r in range(trace.requests):
        clock[0] = float(trace.seconds[r])
        policy.request = r
        keys = names.keys_of(words[trace.path(r)].tobytes())
        request = Request(int(trace.output_tokens[r]), int(trace.stops[r]), trace.block_tokens)
        store.match(keys, request=request).release()
        if len(keys):
            store.commit(store.reserve(keys))
    store.check()
    trace = Trace(**(vars(trace) | {"prints": prints}))
    expected = decisions(trace, POLICIES[name], blocks)
    told = [(r, [number[each] for each in gone]) for r, gone in policy.told]
    assert flat(told) == flat(expected) and len(told) > 50


def flat(made: list[tuple[int, list[int]]]) -> list[tuple[int, int]]:
    return [(r, node) for r, gone in made for node in gone]


class Watched:
    """A policy whose victims are noted, by the prints of their keys."""

    def __init__(self, policy) -> None:
        self.policy = policy
        self.told: list[tuple[int, list[int]]] = []
        self.names: dict[int, int] = {}
        self.request = 0

    def __getattr__(self, name: str):
        return getattr(self.policy, name)

    def added(self, run, now):
        self.names |= dict(zip(run.entries.tolist(), run.prints.tolist(), strict=True))
        self.policy.added(run, now)

    def victims(self, nbytes, now, incoming=None):
        for gone in self.policy.victims(nbytes, now, incoming):
            self.told.append((self.request, [self.names[each] for each in gone.tolist()]))
            yield gone


def test_time_to_live():
    """What was not used for its time is gone, whatever room there is."""
    trace = drawn(200)
    some = simulate(trace, TTL(20.0), trace.unique)
    most = simulate(trace, TTL(1e6), trace.unique)
    assert 0 < some.hits < most.hits == len(trace.nodes) - trace.unique


def test_adaptive_on_a_slice_of_real_chat():
    path = SHARED / "mooncake_conversation.npz"
    if not path.exists():
        pytest.skip("no traces beside this checkout")
    trace = read(path).first(4000)
    blocks = trace.unique // 20
    least, best = simulate(trace, LRU(), blocks), optimum(trace, blocks)
    ours = simulate(trace, Adaptive(), blocks)
    assert ours.hit_ratio > least.hit_ratio + 0.15 * (best.hit_ratio - least.hit_ratio)
