"""The bytes between a client and its daemon: golden ones, and what is refused."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvengine.peer import messages as m

KEY, TOKEN = bytes(range(32)), bytes(range(16))
# The bytes of version 1. They may grow at the end of a message, and change in no other way.
GOLDEN = (
    (m.Hello(1, 1, 1, "t", b"k", True), "9701010101a174c4016bc3"),
    (m.Listen(2, TOKEN), "930202c410" + TOKEN.hex()),
    (
        m.Match(3, 4, KEY, 5, KEY, True, 6, 2),
        "99060304c420" + KEY.hex() + "05c420" + KEY.hex() + "c30602",
    ),
    (m.Release(0, TOKEN), "930700c410" + TOKEN.hex()),
    (m.Commit(7, TOKEN, b"\1\0"), "940b07c410" + TOKEN.hex() + "c4020100"),
    (
        m.Reserve(8, 1, KEY, 0, KEY, b"f", (0, 1, 2, 3)),
        "980a0801c420" + KEY.hex() + "00c420" + KEY.hex() + "c401669400010203",
    ),
    (m.Refused(9, m.BUSY, "no"), "944109a462757379a26e6f"),
    (
        m.Leased(1, TOKEN, 1.5, 2, b"s", b"f", b"g", 0, 2),
        "9a4601c410" + TOKEN.hex() + "cb3ff800000000000002c40173c40166c401670002",
    ),
    (m.Fetched(3, b"s", b"g"), "944a03c40173c40167"),
    (m.Expired(0, TOKEN), "934b00c410" + TOKEN.hex()),
)


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=lambda each: type(each).__name__)
def test_golden_bytes(message, golden):
    coder = m.Coder()
    data = bytes(coder.frame(message))
    assert int.from_bytes(data[:4], "little") == len(data) - 4
    assert data[4:].hex() == golden
    read = coder.request if isinstance(message, m.Request) else coder.answer
    assert read(bytes.fromhex(golden)) == message


def test_every_message_has_a_tag_of_its_own():
    kinds = [*m.Request.__args__, *m.Answer.__args__]
    tags = [kind.__struct_config__.tag for kind in kinds]
    assert len(set(tags)) == len(tags)


def test_a_later_field_is_left_alone_and_a_missing_one_has_its_default():
    coder = m.Coder()
    match = msgspec.msgpack.decode(coder.frame(m.Match(3, 4, KEY, 5, KEY))[4:])
    assert coder.request(msgspec.msgpack.encode([*match, "new"])) == m.Match(3, 4, KEY, 5, KEY)
    assert coder.request(msgspec.msgpack.encode(match[:6])) == m.Match(3, 4, KEY, 5, KEY)


@pytest.mark.parametrize(
    "wrong",
    [
        [99, 1],
        [6, 1],
        [2, 1, b"short"],
        [6, -1, 0, KEY, 0, KEY],
        [6, 1, 0, KEY * (m.KEYS_MAX + 1), 0, KEY],
        [23, 1, 0, 0, 1, float("nan")],
        {"type": 6},
        "text",
    ],
    ids=str,
)
def test_what_is_no_message_is_wrong(wrong):
    with pytest.raises(m.Wrong):
        m.Coder().request(msgspec.msgpack.encode(wrong))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_wrong(data):
    try:
        m.Coder().request(data)
    except m.Wrong:
        pass


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(1, 50))
def test_messages_are_cut_wherever_the_socket_cuts_them(parts, step):
    stream = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    found, rest = [], bytearray()
    for at in range(0, len(stream), step):
        more, rest = m.split(rest + stream[at : at + step])
        found += more
    assert found == parts and not rest


def test_a_message_too_long_is_wrong_before_it_has_come():
    with pytest.raises(m.Wrong, match="at most"):
        m.split(bytearray((m.MESSAGE_BYTES_MAX + 1).to_bytes(4, "little")))
