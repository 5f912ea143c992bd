"""Clients and the daemon in virtual time: promises hold, and what breaks one is found."""

from types import MethodType

import msgspec
import pytest

import hostsim
from kvengine.peer import messages as m
from kvengine.peer.service import End

SEEDS = 1000


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS // 4))
def test_promises_hold(first):
    done = sum((hostsim.run(seed) for seed in range(first, first + SEEDS // 4)), hostsim.Counter())
    for what in ("committed", "verified", "kill", "break", "stop", "bump", "adopt", "corrupt"):
        assert done[what]


def test_a_seed_names_a_run():
    assert hostsim.run(7) == hostsim.run(7)


# What may be wrong, planted in one run each: `sim` has not begun.


def each_store(change):
    return lambda sim: [change(sim, home, home.store) for home in sim.homes.values()]


def token_of_the_client(sim, home, store):
    """Two reservations of a client have one token."""
    real = store.reserve

    def reserve(*arguments):
        made = real(*arguments)
        token = sim._asked[0].pid.to_bytes(16, "big")
        if made.token in store._reservations:
            del store._reservations[made.token]
            made.token = token
            store._reservations[token] = made
        return made

    def commit(made, good=None):
        return type(store).commit(store, store._reservations.get(made.token, made), good)

    store.reserve, store.commit = reserve, commit


def generation_stays(sim, home, store):
    """A slot that is lent anew has the word that it had."""
    real = home.memory.take

    def take(nbytes, count):
        before = home.memory.generations.copy()
        slots = real(nbytes, count)
        home.memory.generations[:] = before
        return slots

    home.memory.take = take


def reader_looks_once(sim):
    """A reader does not look at the generation after its copy."""
    sim.checks_generation = False


def eviction_takes_leased_blocks(sim, home, store):
    """Leased blocks are victims as others are."""
    store._policy.held = store._policy.freed = lambda ids: None


def epoch_is_not_checked(sim):
    """Namespaces of an earlier epoch are served."""
    for home in sim.homes.values():
        home.is_current = lambda namespace: True


def slots_are_free_at_the_deadline(sim, home, store):
    """What a late writer may still write is lent to the next."""
    real = store._quarantined

    def quarantined(reservation):
        real(reservation)
        store._acknowledge(reservation.token)

    store._quarantined = quarantined


def leases_end_at_the_deadline(sim):
    """A lease whose deadline has come pins nothing, though its reader reads."""
    real = sim.service.tick

    def tick(now):
        found = real(now)
        for session in sim.service.sessions:
            for lease in session.leases.values():
                if lease.deadline <= now:
                    lease.release()
        return found

    for home in sim.homes.values():
        home.store._lease_s = hostsim.HOLD_S
    sim.service.tick = tick


def groups_fill_together(sim):
    """Parts of two fills make one block."""
    real = sim.service.received

    def received(connection, message, now):
        if isinstance(message, m.Reserve) and message.fill:
            message = msgspec.structs.replace(message, fill=b"one for all")
        return real(connection, message, now)

    sim.service.received = received


def a_part_is_enough(sim, home, store):
    """A block is seen when the first of its parts is committed."""
    real = store._fills.settle

    def settle(self, ids, parts, good):
        self._missing[ids[good & (self._opening[ids] != 0)]] = 0
        return real(ids, parts, good)

    store._fills.settle = MethodType(settle, store._fills)


def the_dead_keep_their_slots(sim):
    """What a client had reserved when it died is never given back."""
    real = sim.service._end

    def end(session):
        kept = session.reservations
        session.reservations = {}
        found = real(session)
        sim.kept = [*getattr(sim, "kept", []), kept]
        return found

    sim.service._end = end


def the_dead_are_heard(sim):
    """What a client had sent is granted after it was seen to be gone."""
    real = sim.service.received

    def received(connection, message, now):
        session = sim.service._sessions.get(connection)
        if session is None or not session.lost:
            return real(connection, message, now)
        session.lost = False
        try:
            return real(connection, message, now)
        finally:
            session.lost = True

    exited = sim.service.exited

    def stays(process, now):  # or its connections are closed, and nothing of them is read
        return [each for each in exited(process, now) if not isinstance(each, End)]

    sim.service.received, sim.service.exited = received, stays


def quota_is_ignored(sim):
    """Memory is lent beyond its limit."""
    for home in sim.homes.values():
        home.memory.limit = lambda nbytes: 0


def keys_are_free_too_soon(sim, home, store):
    """Reserved keys are given to others before the deadline."""
    store._reservation_s = hostsim.HOLD_S / 10


PLANTED = {
    each.__name__: each if each.__code__.co_argcount == 1 else each_store(each)
    for each in (
        token_of_the_client,
        generation_stays,
        reader_looks_once,
        eviction_takes_leased_blocks,
        epoch_is_not_checked,
        slots_are_free_at_the_deadline,
        leases_end_at_the_deadline,
        groups_fill_together,
        a_part_is_enough,
        the_dead_keep_their_slots,
        the_dead_are_heard,
        quota_is_ignored,
        keys_are_free_too_soon,
    )
}
WITHIN = 100  # seeds: the hardest to find takes 25


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(name):
    seed, how = hostsim.first_found(PLANTED[name], WITHIN)
    assert seed >= 0, f"{WITHIN} seeds do not find it"
    assert how
