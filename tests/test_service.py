"""What the daemon answers, without sockets and in virtual time."""

from dataclasses import asdict

import numpy as np
import pytest

import rig
from house import Guest, House, Wire, keys
from kvengine.peer import messages as m


@pytest.fixture
def wire():
    made = Wire(House())
    yield made
    for session in made.service.sessions:
        made.exit(session.peer.process)
    assert not made.service.sessions
    made.service.draining = False
    made.houses["default"].now += 1000.0
    made.houses["default"].store.match(_none(made))  # sweeps
    made.houses["default"].store.check()


def _none(wire):
    guest = Guest(wire, 99)
    space = next(iter(wire.service.sessions)).spaces[guest.space]
    wire.exit(guest.line)
    return space.keys([])


def test_what_one_commits_another_is_lent(wire):
    one, two = Guest(wire, 1), Guest(wire, 2)
    made = one.reserve(keys(3))
    assert two.probe(keys(3)) == 0 and len(two.reserve(keys(3)).slots) == 0
    assert one.commit(made) == 3
    leased = two.match(keys(4))
    assert leased.slots == made.slots and leased.in_memory == 3 and leased.forms == b""
    assert one.commit(made) == 0  # its token has ended


def test_a_slot_has_another_generation_when_it_is_lent_again(wire):
    one = Guest(wire, 1)
    one.save(keys(8))
    before = one.match(keys(8))
    one.say(m.Release(0, before.token))
    one.save(keys(8, seed=1))
    after = one.match(keys(8, seed=1))
    first = dict(zip(_numbers(before.slots), _numbers(before.generations), strict=True))
    second = dict(zip(_numbers(after.slots), _numbers(after.generations), strict=True))
    assert first.keys() == second.keys()
    assert all(second[slot] > first[slot] for slot in first)


def _numbers(column: bytes) -> list[int]:
    return np.frombuffer(column, dtype="<i4").tolist()


def test_leased_blocks_stay_until_the_client_releases_them(wire):
    one, two = Guest(wire, 1), Guest(wire, 2)
    one.save(keys(8))
    leased = two.match(keys(8))
    assert one.save(keys(8, seed=1)) == 0
    wire.at(61.0)  # the deadline: two is told, and may still be reading
    assert wire.heard[two.ear][-1] == m.Expired(0, leased.token)
    assert one.save(keys(8, seed=1)) == 0
    two.say(m.Release(0, leased.token))
    assert one.save(keys(8, seed=1)) == 8


def test_a_late_reservation_frees_its_keys_and_keeps_its_slots(wire):
    one, two = Guest(wire, 1), Guest(wire, 2)
    made = one.reserve(keys(8))
    wire.at(61.0)
    assert wire.heard[one.ear][-1] == m.Expired(0, made.token)
    assert two.stats()["quarantined_blocks"] == 8
    assert len(two.reserve(keys(8)).slots) == 0  # no room: one may be writing still
    assert one.commit(made) == 0 and two.stats()["quarantined_blocks"] == 0
    assert two.save(keys(8)) == 8 and one.probe(keys(8)) == 8


@pytest.mark.parametrize("how", ["exit", "close", "bye"])
def test_what_a_client_leaves_behind(wire, how):
    one, two = Guest(wire, 1), Guest(wire, 2)
    two.save(keys(2))
    one.match(keys(2))
    one.reserve(keys(6, seed=1))
    if how == "exit":
        wire.close(one.line)
        wire.exit(one.line)
    elif how == "close":  # the process lives, and may be reading and writing
        wire.close(one.ear)
        assert two.stats()["quarantined_blocks"] == 6 and two.stats()["leases"] == 1
        assert len(two.reserve(keys(1, seed=1)).slots) == 0
        again = Guest(wire, 1)  # it is back, with other sockets
        assert again.say(m.Settled(1, one.welcome.session)) == m.Done(1)
    else:
        assert one.say(m.Bye(1)) == m.Done(1)
        assert {one.line, one.ear} <= wire.ended
    stats = two.stats()
    assert (stats["leases"], stats["reservations"], stats["quarantined_blocks"]) == (0, 0, 0)
    assert two.save(keys(6, seed=1)) == 6
    assert one.line in wire.forgotten


@pytest.mark.parametrize("said", ["reserve", "match"])
def test_what_a_dead_client_had_sent_is_lent_nothing(wire, said):
    one, two = Guest(wire, 1), Guest(wire, 2)
    two.save(keys(2))
    wire.exit(one.line)  # seen before what stands in its socket is read
    if said == "reserve":
        wire.say(one.line, m.Reserve(1, one.space, keys(2, seed=1), 0, bytes(32)))
    else:
        wire.say(one.line, m.Match(1, one.space, keys(2), 0, bytes(32)))
    stats = two.stats()
    assert (stats["leases"], stats["reservations"]) == (0, 0)
    assert {one.line, one.ear} <= wire.ended


def test_nobody_settles_for_another_process(wire):
    one, two = Guest(wire, 1), Guest(wire, 2)
    one.reserve(keys(2))
    wire.close(one.line)
    two.say(m.Settled(0, one.welcome.session))
    assert two.stats()["quarantined_blocks"] == 2


def test_tokens_are_of_one_session(wire):
    one, two = Guest(wire, 1), Guest(wire, 2)
    made = one.reserve(keys(2))
    assert two.say(m.Commit(1, made.token, b"\1\1")) == m.Count(1, 0)
    two.say(m.Abort(0, made.token))
    assert one.commit(made) == 2
    leased = one.match(keys(2))
    two.say(m.Release(0, leased.token))
    two.say(m.Corrupt(0, leased.token, bytes(4)))
    assert one.stats()["leases"] == 1 and one.probe(keys(2)) == 2


def test_a_lease_can_be_adopted_in_its_tenant():
    wire = Wire(House(), House(tenant="other"))
    one, two, stranger = Guest(wire, 1), Guest(wire, 2), Guest(wire, 3, "other")
    one.save(keys(3))
    leased = one.match(keys(3))
    adopted = two.say(m.Adopt(1, leased.token))
    assert adopted.lease.slots == leased.slots and adopted.keys == keys(3)
    assert stranger.say(m.Adopt(1, leased.token)).code == m.STALE
    one.say(m.Release(0, leased.token))
    assert two.stats()["leases"] == 1
    assert two.say(m.Adopt(1, leased.token)).code == m.STALE  # it has ended


def test_tenants_do_not_meet():
    wire = Wire(House(), House(tenant="other"))
    one, two = Guest(wire, 1), Guest(wire, 2, "other")
    one.save(keys(3))
    assert two.probe(keys(3)) == 0  # not even by the keys themselves
    wire.connect(50, 5)
    assert wire.say(50, m.Hello(1, 1, 1, "third", b"", True)).code == m.TENANT
    assert 50 in wire.ended


def test_an_epoch_fences_what_was_opened_before(wire):
    one, two = Guest(wire, 1), Guest(wire, 2)
    one.save(keys(2))
    assert two.say(m.DropAll(1)) == m.Count(1, 1)
    for message in (m.Probe, m.Match, m.Reserve, m.Contains):
        said = one.say(message(1, one.space, keys(2), 0, bytes(32)))
        assert said.code == m.STALE


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (m.Probe(7, 1234, b"", 0, bytes(32)), m.SPACE),
        (m.Probe(7, 0, b"k" * 33, 0, bytes(32)), m.LAYOUT),
        (m.Open(7, {"model": "m"}, {}, False), m.LAYOUT),
        (m.Open(7, dict.fromkeys(m.IDENTITY, ""), {"layers": -1}, False), m.LAYOUT),
        (m.Reserve(7, 0, b"k" * 32, 0, bytes(32), b"group", (0, 9, 0, 1)), m.LAYOUT),
    ],
    ids=["space", "keys", "identity", "layout", "part"],
)
def test_what_cannot_be_is_refused(wire, message, code):
    guest = Guest(wire, 1)
    said = guest.say(message)
    assert (said.number, said.code) == (7, code) and guest.line not in wire.ended


def test_what_a_client_must_not_do_ends_its_connection(wire):
    one = Guest(wire, 1)
    wire.say(one.ear, m.Stats(1))  # asks where it is to listen
    assert {one.ear, one.line} <= wire.ended
    wire.connect(50, 5)
    wire.say(50, m.Stats(1))  # before it has said who it is
    assert 50 in wire.ended
    wire.connect(60, 6)
    assert wire.say(60, m.Hello(1, 2, 9, "", b"", True)).code == m.VERSIONS
    wire.connect(70, 7)
    wire.say(70, m.Listen(1, Guest(wire, 8).welcome.session))  # another's session
    assert {60, 70} <= wire.ended


def test_a_reader_changes_nothing(wire, monkeypatch):
    """Of a public tenant's: it takes no blocks from others, and says nothing that counts."""
    owner, guest = Guest(wire, 1), Guest(wire, 2)
    owner.save(keys(2))
    next(s for s in wire.service.sessions if s.peer.pid == 2).writable = False
    table = (1, guest.space, keys(2), 0, bytes(32))
    for message in (
        m.Reserve(*table),
        m.Keep(*table, bytes(2), 0, None, 1e-3),
        m.Hint(*table, False, None),
        m.Pin(*table, None),
        m.Unpin(*table),
        m.Drop(*table),
        m.DropAll(1),
        m.Squeeze(1, 0),
        m.Observe(1, guest.space, 0, 16, 1e-9),
    ):
        assert guest.say(message).code == m.READ_ONLY
    leased = guest.match(keys(2))
    for message in (m.Corrupt(0, leased.token, bytes(4)), m.Widen(0, keys(2))):
        assert guest.say(message) is None
    guest.say(m.Release(0, leased.token))
    assert owner.probe(keys(2)) == guest.probe(keys(2)) == 2
    lives: list[float | None] = []
    space = House.space
    monkeypatch.setattr(House, "space", lambda *args: lives.append(args[-1]) or space(*args))
    facts = dict.fromkeys(m.IDENTITY, "") | {"model": "m", "fidelity": "exact"}
    for one in (owner, guest):
        one.say(m.Open(1, facts, asdict(rig.layout()), False, 5.0))
    assert lives == [5.0, None], "how long the owner's blocks live is the owner's to say"


def test_nothing_new_begins_while_it_drains(wire):
    one = Guest(wire, 1)
    made = one.reserve(keys(1))
    wire.service.draining = True
    assert one.reserve(keys(1, seed=1)).code == m.BUSY
    assert one.commit(made) == 1 and one.probe(keys(1)) == 1
    wire.connect(50, 5)
    assert wire.say(50, m.Hello(1, 1, 1, "", b"", True)).code == m.BUSY
