"""One suite that every policy passes; then what each promises beyond it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

import loops
from kvengine.policy import NO_PARENT, Entries, Policy, Run

# A policy passes by being listed: its module and its class.
POLICIES = [
    ("kvengine.policy.lru", "LRU"),
    ("kvengine.policy.ttl", "TTL"),
    ("kvengine.policy.arc", "ARC"),
    ("kvengine.policy.s3fifo", "S3FIFO"),
    ("kvengine.policy.windowed", "WindowedLRU"),
    ("kvengine.policy.adaptive", "Adaptive"),
    ("kvengine.policy.retention", "Retained"),
]

PAGE_BYTES = 4096
IDS = 60
EXAMPLES = 60  # of each machine; several policies and both kinds of loops
ALL = 1 << 40
BYTES_A_BLOCK = 128  # of a policy alone
BYTES_FIXED = 5 << 20  # tables of what it has learned, whatever the number of blocks
NOBODY = [*range(IDS, IDS + 3), 5000, 2**31 - 2]  # ids that no policy has seen
Make = Callable[[], Policy]


@pytest.fixture(params=loops.KINDS, scope="module")
def kind(request: pytest.FixtureRequest, require) -> str:
    if request.param == "native":
        require("numba")
    return request.param


@pytest.fixture(params=POLICIES, ids=lambda policy: policy[1], scope="module")
def make(request: pytest.FixtureRequest, kind: str) -> Make:
    module, name = request.param
    return getattr(loops.load(module, kind), name)


@pytest.fixture(scope="module")
def make_lru(kind: str) -> Make:
    return loops.load("kvengine.policy.lru", kind).LRU


def entries(*ids: int) -> Entries:
    return np.array(ids, np.int32)


def run(*ids: int, parent: int = NO_PARENT, position: int = 0, pages: int = 1) -> Run:
    return Run(entries(*ids), parent, position, pages * PAGE_BYTES)


def evict(policy: Policy, nbytes: int = ALL) -> list[int]:
    """Take victims as the store does."""
    taken: list[int] = []
    for victims in policy.victims(nbytes, 0.0):
        policy.removed(victims)
        taken += victims.tolist()
    return taken


@dataclass
class Block:
    """What a policy was told of a block. `parent` and `children` are those that are here."""

    parent: int | None
    position: int
    pages: int
    held: bool = False
    children: set[int] = field(default_factory=set)


class Conformance(RuleBasedStateMachine):
    """Any events in any order: only candidates are victims, leaves first, until enough."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.policy = make()
        self.blocks: dict[int, Block] = {}
        self.now = 0.0

    # What a policy of known order says beyond the suite.

    def used(self, ids: list[int]) -> None:
        """Blocks of a run were used now."""

    def expected(self) -> int | None:
        """The next victim, None where any candidate will do."""
        return None

    def dropped(self, ids: list[int]) -> list[int]:
        """The blocks to drop for these."""
        return ids

    # Events

    def draw(self, data: st.DataObject, size: int = 8) -> list[int]:
        """Ids of blocks that are here and of some that are not, each once or twice."""
        known = st.sampled_from(sorted(self.blocks)) if self.blocks else st.nothing()
        return data.draw(st.lists(known | st.sampled_from([0, 1, IDS - 1, *NOBODY]), max_size=size))

    def tick(self) -> float:
        self.now += 0.25
        return self.now

    @rule(data=st.data(), count=st.integers(0, 6), spare=st.integers(0, PAGE_BYTES - 1))
    def add(self, data: st.DataObject, count: int, spare: int) -> None:
        free = [i for i in range(IDS) if i not in self.blocks]
        ids = data.draw(st.permutations(free))[:count]
        absent = [NO_PARENT, NO_PARENT, *NOBODY, *(i for i in free if i not in ids)]
        parent = data.draw(st.sampled_from([*absent, *sorted(self.blocks) * 3]))
        above = self.blocks.get(parent)
        position = above.position + 1 if above else data.draw(st.integers(0, 9))
        pages = data.draw(st.integers(1, 3))
        nbytes = pages * PAGE_BYTES - spare
        self.policy.added(Run(entries(*ids), parent, position, nbytes), self.tick())
        for number in ids:
            self.blocks[number] = Block(parent if above else None, position, pages)
            if above:
                above.children.add(number)
            parent, above, position = number, self.blocks[number], position + 1
        self.used(ids)

    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        ids = self.draw(data)
        self.policy.touched(run(*ids), self.tick())
        self.used([i for i in ids if i in self.blocks and not self.blocks[i].held])

    @rule(data=st.data())
    def touch_a_prompt(self, data: st.DataObject) -> None:
        if self.blocks:
            leaf = data.draw(st.sampled_from(sorted(self.blocks)))
            ids = list(self.ancestry(leaf))[::-1]
            self.policy.touched(run(*ids, position=self.blocks[ids[0]].position), self.tick())
            self.used([i for i in ids if not self.blocks[i].held])

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        ids = self.draw(data)
        self.policy.held(entries(*ids))
        for number in ids:
            if number in self.blocks:
                self.blocks[number].held = True

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.free_all(self.draw(data))

    def free_all(self, ids: list[int]) -> None:
        self.policy.freed(entries(*ids))
        ended = [i for at, i in enumerate(ids) if i in self.blocks and i not in ids[at + 1 :]]
        ended = [i for i in ended if self.blocks[i].held]
        for number in ended:
            self.blocks[number].held = False
        self.used(ended)

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Blocks leave on other grounds, held ones too, and parents before their children."""
        ids = self.dropped(self.draw(data, 4))
        self.policy.removed(entries(*ids))
        for number in ids:
            self.forget(number)

    @rule(nbytes=st.integers(0, 12 * PAGE_BYTES))
    def evict(self, nbytes: int) -> None:
        self.take(nbytes)

    @rule(nbytes=st.integers(1, 12 * PAGE_BYTES), some=st.integers(1, 5))
    def evict_some(self, nbytes: int, some: int) -> None:
        """The store may stop at any time, and take fewer than it is offered."""
        for victims in self.policy.victims(nbytes, self.tick()):
            for number in victims[:some].tolist():
                self.check_victim(number)
                self.forget(number)
            self.policy.removed(victims[:some])
            break

    @rule(nbytes=st.integers(0, 12 * PAGE_BYTES))
    def ask_twice(self, nbytes: int) -> None:
        """Nothing is forgotten until it is removed."""
        first = next(self.policy.victims(nbytes, self.tick()), entries())
        again = [victims.tolist() for victims in self.policy.victims(nbytes, self.tick())]
        assert (again[0] if again else []) == first.tolist()

    # Checks

    def take(self, nbytes: int) -> None:
        missing = -(-nbytes // PAGE_BYTES)
        for victims in self.policy.victims(nbytes, self.tick()):
            assert victims.dtype == np.int32 and len(victims)
            for number in victims.tolist():
                assert missing > 0, "more victims than asked for"
                missing -= self.blocks[number].pages
                self.check_victim(number)
                self.forget(number)
            self.policy.removed(victims)
        if missing > 0:
            leaves = [block for block in self.blocks.values() if not block.children]
            assert all(leaf.held for leaf in leaves), "candidates are left"

    def check_victim(self, number: int) -> None:
        assert number in self.blocks, "a victim that is not here, or twice"
        assert not self.blocks[number].held, "a held victim"
        assert not self.blocks[number].children, "a parent before its child"
        assert self.expected() in (None, number)

    def forget(self, number: int) -> None:
        block = self.blocks.pop(number, None)
        if block is None:
            return
        if block.parent is not None:
            self.blocks[block.parent].children.discard(number)
        for child in block.children:
            self.blocks[child].parent = None

    def ancestry(self, number: int) -> Iterator[int]:
        above: int | None = number
        while above is not None:
            yield above
            above = self.blocks[above].parent

    def teardown(self) -> None:
        """Every block that is let go is a victim in the end."""
        self.free_all(sorted(self.blocks))
        self.take(ALL)
        assert not self.blocks and not list(self.policy.victims(1, self.tick()))


def test_conformance(make):
    run_state_machine_as_test(
        lambda: Conformance(make), settings=settings(max_examples=EXAMPLES, stateful_step_count=40)
    )


def test_nobody_is_a_victim_of_an_empty_policy(make):
    policy = make()
    assert evict(policy) == []
    policy.held(entries(*NOBODY))
    policy.freed(entries(*NOBODY, 0))
    policy.removed(entries(*NOBODY, 0))
    policy.touched(run(*NOBODY), 0.0)
    policy.added(run(), 0.0)
    for nothing in (entries(), np.empty(0, np.int32)):
        policy.held(nothing)
        policy.freed(nothing)
        policy.removed(nothing)
    assert evict(policy) == []


@pytest.mark.parametrize("nbytes", [0, 1, PAGE_BYTES, PAGE_BYTES + 1, 5 * PAGE_BYTES])
def test_as_many_victims_as_asked_for(make, nbytes):
    policy = make()
    for number in range(20):
        policy.added(run(number), 0.0)
    assert len(evict(policy, nbytes)) == -(-nbytes // PAGE_BYTES)


def test_large_blocks_count_as_many_pages(make):
    policy = make()
    for number in range(20):
        policy.added(Run(entries(number), NO_PARENT, 0, 2 * PAGE_BYTES + 1), 0.0)
    assert len(evict(policy, 9 * PAGE_BYTES)) == 3
    assert len(evict(policy, 10 * PAGE_BYTES)) == 4


def test_many_blocks_leave_in_several_walks(make):
    """More than one walk gives at once, in chains that share a prefix."""
    policy, parents, here = make(), {}, set()
    shared = list(range(1000))
    policy.added(run(*shared), 0.0)
    parents |= dict(zip(shared[1:], shared, strict=False))
    for start in range(1000, 13_000, 500):
        ids = list(range(start, start + 500))
        policy.added(run(*ids, parent=999, position=1000), 0.0)
        parents |= dict(zip(ids, [999, *ids], strict=False))
    here |= set(range(13_000))
    for number in evict(policy):
        here.remove(number)
        parents.pop(number, None)
    assert not here and not parents
    policy.added(run(*shared), 0.0)
    assert evict(policy) == shared[::-1]


def test_a_long_prompt_leaves_from_its_end(make):
    policy = make()
    policy.added(run(*range(100)), 0.0)
    policy.added(run(*range(100, 200), parent=99, position=100), 1.0)
    policy.touched(run(*range(50)), 2.0)
    assert evict(policy, 60 * PAGE_BYTES) == list(range(199, 139, -1))
    policy.held(entries(120))
    assert evict(policy) == list(range(139, 120, -1))
    policy.freed(entries(120))
    assert evict(policy) == list(range(120, -1, -1))


def test_an_id_given_out_again_has_no_children(make):
    """Blocks whose parent has gone are roots, also when another block has the parent's id."""
    policy = make()
    policy.added(run(0, 1), 0.0)
    policy.removed(entries(0))
    policy.added(run(0), 1.0)
    policy.held(entries(1))
    assert evict(policy) == [0]
    policy.freed(entries(1))
    assert evict(policy) == [1]


def test_bytes_a_block(make):
    policy, step = make(), 1000
    fixed = policy.nbytes
    assert fixed <= BYTES_FIXED
    for first in range(0, 100_000, step):
        policy.added(run(*range(first, first + step)), 0.0)
        if first >= 32_000:
            assert policy.nbytes - fixed <= BYTES_A_BLOCK * (first + step)


class Recency(Conformance):
    """LRU's order: each time the leaf whose last use is the longest ago."""

    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.uses = 0
        self.last: dict[int, int] = {}

    def used(self, ids: list[int]) -> None:
        for number in reversed(ids):
            self.uses += 1
            self.last[number] = self.uses

    def expected(self) -> int | None:
        free = [n for n, block in self.blocks.items() if not block.held and not block.children]
        return min(free, key=lambda number: self.last[number])

    def dropped(self, ids: list[int]) -> list[int]:
        """Whole prompts: a parent whose last child is dropped may go to the old end."""
        found: list[int] = []
        stack = [list(self.ancestry(i))[-1] for i in ids if i in self.blocks]
        while stack:
            number = stack.pop()
            if number not in found:
                found.append(number)
                stack += self.blocks[number].children
        return found


@pytest.fixture(scope="module")
def make_one_class(kind: str) -> Make:
    adaptive = loops.load("kvengine.policy.adaptive", kind).Adaptive
    return lambda: adaptive(features=(), guard=False)


def test_one_class_without_a_guard_is_lru(make_one_class):
    run_state_machine_as_test(
        lambda: Recency(make_one_class),
        settings=settings(max_examples=EXAMPLES, stateful_step_count=40),
    )


def test_lru_against_a_plain_model(make_lru):
    run_state_machine_as_test(
        lambda: Recency(make_lru), settings=settings(max_examples=EXAMPLES, stateful_step_count=40)
    )


def test_lru_the_oldest_prompt_leaves_first(make_lru):
    policy = make_lru()
    policy.added(run(0, 1, 2), 0.0)
    policy.added(run(3, 4), 0.0)
    policy.added(run(5, 6, parent=1, position=2), 0.0)
    assert evict(policy, 3 * PAGE_BYTES) == [2, 4, 3]
    assert evict(policy) == [6, 5, 1, 0]


def test_lru_a_use_makes_blocks_the_newest(make_lru):
    policy = make_lru()
    for number in range(5):
        policy.added(run(number), 0.0)
    policy.touched(run(1), 0.0)
    policy.held(entries(0, 2))
    policy.freed(entries(2))
    assert evict(policy) == [3, 4, 1, 2]
    policy.freed(entries(0))
    assert evict(policy) == [0]


def test_lru_the_deepest_of_a_run_is_the_oldest(make_lru):
    policy = make_lru()
    policy.added(run(0, 1, 2), 0.0)
    policy.added(run(3), 0.0)
    policy.touched(run(0, 1, 2), 0.0)
    assert evict(policy) == [3, 2, 1, 0]


def test_lru_a_parent_follows_its_last_child(make_lru):
    """It was met in the walk before: it is older than all that is left."""
    policy = make_lru()
    policy.added(run(0), 0.0)
    policy.added(run(1, parent=0, position=1), 0.0)
    policy.added(run(2), 0.0)
    policy.added(run(3, parent=0, position=1), 0.0)
    policy.added(run(4), 0.0)
    assert evict(policy) == [1, 2, 3, 0, 4]
