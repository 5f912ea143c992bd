"""Replies read off a socket pair: whole, in pieces, wrong, too slow."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvengine.tiers.resp import CHUNK_BYTES, Exchange, ReplyError, command


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def exchange(sock: socket.socket, silence_s: float = 5.0, until_s: float = 5.0) -> Exchange:
    return Exchange(sock, time.monotonic, silence_s, time.monotonic() + until_s)


def slot(nbytes: int) -> memoryview:
    return memoryview(bytearray(b"\xa5" * nbytes))


def send_all(sock: socket.socket, data: bytes, step: int | None = None) -> threading.Thread:
    def work() -> None:
        for at in range(0, len(data), step or len(data) or 1):
            sock.sendall(data[at : at + (step or len(data))])

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_commands_as_the_specification_says():
    assert command(b"GET", b"a\r\n") == b"*2\r\n$3\r\nGET\r\n$3\r\na\r\n\r\n"


@pytest.mark.parametrize("step", [None, 1, 3, 4096])
@pytest.mark.parametrize("size", [1, 2, 4095, CHUNK_BYTES, 70_000])
def test_values_go_into_their_places(pair, step, size):
    if step == 1 and size > 5000:
        step = 7
    here, there = pair
    values = [bytes([number]) * size for number in range(3)]
    stream = b"".join(b"$%d\r\n%s\r\n" % (len(value), value) for value in values) + b":5\r\n"
    sender = send_all(there, stream, step)
    reading = exchange(here)
    for value in values:
        target = slot(size)
        assert reading.value(target) == size and target == value
    assert reading.reply() == 5 and reading.over()
    sender.join()


def test_what_is_no_value_of_that_size(pair):
    here, there = pair
    stream = b"$-1\r\n$0\r\n\r\n$9\r\n123456789\r\n-WRONGTYPE it is\r\n$3\r\nabc\r\n"
    there.sendall(stream)
    reading, target = exchange(here), slot(3)
    assert [reading.value(target) for _ in range(3)] == [0, 0, 9]
    error = reading.value(target)
    assert isinstance(error, ReplyError) and str(error) == "WRONGTYPE it is"
    assert target == b"\xa5" * 3
    assert reading.value(target) == 3 and target == b"abc"


def test_replies_of_all_kinds(pair):
    here, there = pair
    there.sendall(
        b"+OK\r\n:-12\r\n$2\r\nhi\r\n$-1\r\n*2\r\n:1\r\n*1\r\n$1\r\nx\r\n*0\r\n-ERR no\r\n"
    )
    reading = exchange(here)
    assert [reading.reply() for _ in range(6)] == [b"OK", -12, b"hi", None, [1, [b"x"]], []]
    assert str(reading.reply()) == "ERR no"


@pytest.mark.parametrize(
    "stream",
    [
        b"?what\r\n",
        b"$x\r\n",
        b"$99999999999\r\n",
        b"$3\r\nabcd\r\n",
        b"$3\r\nabc",
        b"$3",
        b"",
        b":1" + b"0" * 70_000,
        b"*99999999\r\n",
        b"*1\r\n" * 20 + b":1\r\n",
        b"+OK\r\n",
    ],
)
def test_nonsense_is_a_connection_that_is_over(pair, stream):
    here, there = pair
    sender = send_all(there, stream)
    sender.join()
    there.shutdown(socket.SHUT_WR)
    with pytest.raises(OSError):
        reading = exchange(here)
        reading.value(slot(3))


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([b"$", b"3", b"-", b"1", b"\r\n", b"+", b":", b"*", b"abc", b"\0"]))
)
def test_any_stream_is_read_or_refused(parts):
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"".join(parts))
        there.shutdown(socket.SHUT_WR)
        reading, target = exchange(here), slot(3)
        try:
            for _ in range(100):
                reading.value(target)
                reading.reply()
        except OSError:
            return
        raise AssertionError("a stream without an end")


def test_silence_and_drips_end_in_time(pair):
    here, there = pair
    there.sendall(b"$10\r\n12345")
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        exchange(here, silence_s=0.1).value(slot(10))
    over = threading.Event()

    def drip() -> None:
        there.sendall(b"$1000\r\n")
        while not over.wait(0.01):
            there.sendall(b"x")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        with pytest.raises(TimeoutError):
            exchange(here, silence_s=1.0, until_s=0.3).value(slot(1000))
    finally:
        over.set()
        dripping.join()
    assert time.monotonic() - start < 3.0
    with pytest.raises(TimeoutError):
        exchange(here, until_s=-1.0).send([b"x"])
