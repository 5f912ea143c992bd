"""kvengine.arena: slots never overlap, and no page is lost or counted twice."""

import ctypes
import os

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvengine.arena import PAGE_BYTES, POPULATE_BYTES, Arena
from kvengine.errors import ConfigError
from kvengine.slab import shared

SIZES = [1, PAGE_BYTES, PAGE_BYTES + 1, 3 * PAGE_BYTES, 5 * PAGE_BYTES - 1, 8 * PAGE_BYTES]


def pages_of(nbytes: int) -> int:
    return (nbytes + PAGE_BYTES - 1) // PAGE_BYTES


class Slots(RuleBasedStateMachine):
    """Take and give slots of several sizes; each taken one is full of a byte of its own."""

    @initialize(pages=st.sampled_from([1, 7, 32, 100, 400]), rest=st.integers(0, PAGE_BYTES - 1))
    def open(self, pages: int, rest: int) -> None:
        self.pages = pages
        self.arena = Arena(pages * PAGE_BYTES + rest)
        self.owner = np.zeros(pages, np.int64)  # which taken slot has each page, 0: none
        self.taken: dict[int, tuple[int, int]] = {}  # number: slot, nbytes
        self.number = 0

    @rule(nbytes=st.sampled_from(SIZES), count=st.integers(0, 40))
    def take(self, nbytes: int, count: int) -> None:
        available = self.arena.available(nbytes)
        slots = self.arena.take(nbytes, count)
        assert slots.dtype == np.int32 and len(slots) == min(count, available)
        assert self.arena.available(nbytes) == available - len(slots)
        offsets, addresses = self.arena.offsets(slots), self.arena.addresses(slots)
        size = pages_of(nbytes)
        for slot, offset, address in zip(slots.tolist(), offsets, addresses, strict=True):
            assert 0 <= offset and offset + size * PAGE_BYTES <= self.arena.nbytes
            assert offset == slot * PAGE_BYTES and address % PAGE_BYTES == 0
            assert not self.owner[slot : slot + size].any(), "a page of two slots"
            self.number += 1
            self.owner[slot : slot + size] = self.number
            self.taken[self.number] = (slot, nbytes)
            view = self.arena.view(slot, nbytes)
            view[:] = bytes([self.number % 251]) * nbytes
            assert len(view) == nbytes
            assert ctypes.string_at(int(address), 1) == bytes([self.number % 251])

    @rule(data=st.data(), some=st.sampled_from([1, 2, 5, 1000]))
    def give(self, data: st.DataObject, some: int) -> None:
        if not self.taken:
            return
        size = self.taken[data.draw(st.sampled_from(sorted(self.taken)))][1]
        mine = [number for number, (_, nbytes) in self.taken.items() if nbytes == size][:some]
        slots = []
        for number in mine:
            slot, nbytes = self.taken.pop(number)
            held = bytes([number % 251]) * nbytes
            assert self.arena.view(slot, nbytes) == held, "someone wrote into a taken slot"
            self.owner[slot : slot + pages_of(nbytes)] = 0
            slots.append(slot)
        available = self.arena.available(size)
        self.arena.give(size, np.array(slots, np.int32))
        assert self.arena.available(size) == available + len(slots)

    @rule()
    def compact(self) -> None:
        self.arena.compact()
        assert not self.arena.compact(), "whole extents were left"

    @invariant()
    def no_page_is_lost(self) -> None:
        if not hasattr(self, "arena"):
            return
        assert self.arena.nbytes == self.pages * PAGE_BYTES
        assert self.arena.taken_pages == np.count_nonzero(self.owner)
        for nbytes in SIZES:
            assert self.arena.available(nbytes) * pages_of(nbytes) <= np.count_nonzero(
                self.owner == 0
            )

    def teardown(self) -> None:
        """All given back and compacted, the slab is whole again, for any size."""
        if not hasattr(self, "arena"):
            return
        for slot, nbytes in self.taken.values():
            self.arena.give(nbytes, np.array([slot], np.int32))
        self.arena.compact()
        assert self.arena.taken_pages == 0
        for nbytes in (*SIZES, self.pages * PAGE_BYTES):
            assert self.arena.available(nbytes) == self.pages // pages_of(nbytes)
        assert len(self.arena.take(self.pages * PAGE_BYTES, 2)) == 1


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("nbytes", [-1, 0, 1, PAGE_BYTES - 1])
def test_an_arena_of_less_than_a_page_is_refused(nbytes):
    with pytest.raises(ConfigError, match=f"at least 4096 bytes, got {nbytes}"):
        Arena(nbytes)


def test_an_arena_is_zero_and_whole_pages():
    arena = Arena(3 * PAGE_BYTES + 5)
    assert arena.nbytes == len(arena.memory) == 3 * PAGE_BYTES
    assert arena.memory == bytes(3 * PAGE_BYTES) and arena.address % PAGE_BYTES == 0


def test_the_last_given_is_the_next_taken():
    """Its memory is warm."""
    arena = Arena(64 * PAGE_BYTES)
    slots = arena.take(PAGE_BYTES, 10)
    for slot in (slots[3:4], slots[7:8]):
        arena.give(PAGE_BYTES, slot)
        assert arena.take(PAGE_BYTES, 1).tolist() == slot.tolist()


def test_slots_are_taken_from_the_start():
    """Where `populate` begins."""
    arena = Arena(64 * PAGE_BYTES)
    assert max(arena.take(2 * PAGE_BYTES, 3)) < 8 * 2


def test_sizes_of_one_page_count_share_slots():
    arena = Arena(8 * PAGE_BYTES)
    slots = arena.take(PAGE_BYTES + 1, 4)
    assert len(arena.take(2 * PAGE_BYTES, 1)) == 0
    arena.give(PAGE_BYTES + 1, slots)
    assert sorted(arena.take(2 * PAGE_BYTES, 9).tolist()) == sorted(slots.tolist())


def test_a_size_class_does_not_keep_the_slab():
    arena = Arena(64 * PAGE_BYTES)
    one = arena.take(PAGE_BYTES, 64)
    assert len(one) == 64 and len(arena.take(3 * PAGE_BYTES, 1)) == 0
    arena.give(PAGE_BYTES, one)
    assert arena.available(3 * PAGE_BYTES) == 0, "extents belong to their class until compact"
    assert arena.compact() and not arena.compact()
    assert len(arena.take(3 * PAGE_BYTES, 99)) == 21
    assert len(arena.take(PAGE_BYTES, 99)) == 1


def test_a_first_slot_leaves_room_for_other_sizes():
    arena = Arena(64 * PAGE_BYTES)
    arena.take(PAGE_BYTES, 1)
    assert arena.available(8 * PAGE_BYTES) >= 7


def test_an_extent_with_a_taken_slot_stays():
    arena = Arena(64 * PAGE_BYTES)
    slots = arena.take(PAGE_BYTES, 64)
    kept = np.sort(slots)[30:31]
    arena.give(PAGE_BYTES, slots[slots != kept])
    assert arena.compact()
    large = arena.take(4 * PAGE_BYTES, 99)
    inside = [slot for slot in large.tolist() if slot <= int(kept[0]) < slot + 4]
    assert len(large) >= 14 and not inside and arena.taken_pages == 1 + 4 * len(large)


def test_nothing_is_taken_where_nothing_fits():
    arena = Arena(4 * PAGE_BYTES)
    assert len(arena.take(5 * PAGE_BYTES, 3)) == 0 and arena.available(5 * PAGE_BYTES) == 0
    arena.give(5 * PAGE_BYTES, np.empty(0, np.int32))
    assert arena.taken_pages == 0 and not arena.compact()


def test_populate_changes_no_byte():
    arena = Arena(2 * POPULATE_BYTES + PAGE_BYTES)
    arena.memory[:4] = b"some"
    arena.memory[-4:] = b"more"
    before = resident(arena)
    arena.populate()
    # Linux before 5.14 does not know the advice: the slab is backed as it is touched.
    assert resident(arena) in (before, arena.nbytes // PAGE_BYTES)
    assert arena.memory[:4] == b"some" and arena.memory[-4:] == b"more"
    assert not any(arena.memory[4:-4:PAGE_BYTES])


def test_populate_ends_after_stop():
    arena = Arena(4 * POPULATE_BYTES)
    arena.stop()
    arena.populate()
    assert resident(arena) == 0


def resident(arena: Arena) -> int:
    """How many pages of the slab the system has backed with memory."""
    flags = (ctypes.c_ubyte * (arena.nbytes // PAGE_BYTES))()
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p)
    assert mincore(arena.address, arena.nbytes, ctypes.addressof(flags)) == 0
    return sum(flag & 1 for flag in flags)


def shared_arena(nbytes: int) -> Arena:
    handle = shared(nbytes, "kvengine test")
    try:
        return Arena(nbytes, handle, np.zeros(nbytes // PAGE_BYTES, np.uint32))
    finally:
        os.close(handle)


def backed_bytes(arena: Arena) -> int:
    """Bytes of the mapping that the system keeps in memory."""
    size = arena.nbytes // PAGE_BYTES
    found = (ctypes.c_ubyte * size)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(arena.address), ctypes.c_size_t(arena.nbytes), found) == 0
    return sum(byte & 1 for byte in found) * PAGE_BYTES


def test_a_limit_gives_memory_back_as_zeros():
    arena = shared_arena(256 * PAGE_BYTES)
    slots = np.concatenate([arena.take(3 * PAGE_BYTES, 40), arena.take(PAGE_BYTES, 60)])
    arena.memory[:] = b"x" * arena.nbytes
    arena.give(3 * PAGE_BYTES, slots[:40][::2])
    arena.give(PAGE_BYTES, slots[40:][1::3])
    taken, words = arena.taken_pages, arena.generation(slots)
    assert arena.limit(taken * PAGE_BYTES) == taken * PAGE_BYTES == backed_bytes(arena)
    held = np.zeros(256, np.bool_)
    for slot in slots[:40][1::2]:
        held[slot : slot + 3] = True
    for slot in np.delete(slots[40:], np.s_[1::3]):
        held[slot] = True
    pages = np.frombuffer(arena.memory, np.uint8).reshape(256, PAGE_BYTES)
    assert (pages[held] == ord("x")).all(), "what is lent stays"
    raised = arena.generation(slots) != words
    assert (raised == ~held[slots]).all(), "who reads still what is zero now can tell"
    assert not pages[~held].any(), "nobody finds what was there before"
    assert arena.available(PAGE_BYTES) == 0 == len(arena.take(PAGE_BYTES, 5))
    arena.give(PAGE_BYTES, slots[40:41])
    assert arena.available(PAGE_BYTES) == 1 and arena.available(3 * PAGE_BYTES) == 0
    arena.limit(arena.nbytes)
    assert arena.available(PAGE_BYTES) > 1 and arena.available(3 * PAGE_BYTES) >= 20


def test_below_what_is_lent_a_limit_lends_nothing_and_says_what_is_in_use():
    arena = shared_arena(64 * PAGE_BYTES)
    slots = arena.take(PAGE_BYTES, 32)
    assert arena.limit(8 * PAGE_BYTES) == 32 * PAGE_BYTES
    assert arena.available(PAGE_BYTES) == 0 == len(arena.take(2 * PAGE_BYTES, 1))
    arena.give(PAGE_BYTES, slots[:20])
    assert arena.available(PAGE_BYTES) == 0, "still above the limit"
    assert arena.limit(8 * PAGE_BYTES) == 12 * PAGE_BYTES
    arena.give(PAGE_BYTES, slots[20:])
    assert arena.limit(8 * PAGE_BYTES) == 0 and arena.available(PAGE_BYTES) == 8


def test_what_was_lent_in_any_size_counts():
    """Free slots of one size keep their memory when another size takes its own."""
    arena = shared_arena(256 * PAGE_BYTES)
    for pages in (3, 1, 5):
        slots = arena.take(pages * PAGE_BYTES, 10)
        for slot in slots.tolist():
            arena.view(slot, pages * PAGE_BYTES)[:] = b"x" * pages * PAGE_BYTES
        arena.give(pages * PAGE_BYTES, slots)
    assert arena.limit(100 * PAGE_BYTES) == 90 * PAGE_BYTES == backed_bytes(arena)
    assert arena.limit(64 * PAGE_BYTES) == 0 == backed_bytes(arena)


def test_private_memory_is_limited_as_well():
    arena = Arena(64 * PAGE_BYTES)
    arena.limit(8 * PAGE_BYTES)
    assert len(arena.take(PAGE_BYTES, 10)) == 8
