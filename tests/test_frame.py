"""kvengine.frame: the header's bytes, and that no flipped, cut or forged frame passes for whole."""

import dataclasses
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvengine import Layout
from kvengine.errors import FrameError
from kvengine.frame import (
    FIXED_BYTES,
    NEVER,
    PAGE_BYTES,
    Header,
    Template,
    decode,
    digests_of,
    expires_of,
    header_bytes,
    header_digest,
    verify_payload,
)

# Offset and bytes of each field as the table in kvengine.frame lays them out; zero between them.
GOLDEN = [
    (0, "4b564546"),  # magic
    (4, "0000"),  # version
    (6, "0000"),  # encoding
    (8, "00100000"),  # header bytes
    (12, "02000000"),  # segments
    (16, "4000000000000000"),  # payload bytes
    (24, "0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20"),  # key
    (56, "2122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f40"),  # parent
    (88, "4142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f60"),  # identity
    (120, "6162636465666768696a6b6c6d6e6f70"),  # fill id
    (136, "0201040306050807"),  # part
    (144, "0c0b0a09"),  # position
    (148, "100f0e0d"),  # tokens
    (152, "0100"),  # digest kind
    (154, "0000"),  # flags
    (156, "14131211"),  # key id
    (160, "18171615"),  # expires
    (256, "00000000000000002800000000000000"),  # first segment: offset, bytes
    (272, "28000000000000001800000000000000"),  # second segment
    (288, "887766554433221100ffeeddccbbaa99"),  # digest of the first: low, high
    (304, "efcdab89674523011032547698badcfe"),  # digest of the second
    (4080, "6b807929012312af14c3797a50ae5fb5"),  # digest of all before it
]
HEADER = Header(
    key=bytes(range(1, 33)),
    parent=bytes(range(33, 65)),
    identity=bytes(range(65, 97)),
    fill=bytes(range(97, 113)),
    part=(0x0102, 0x0304, 0x0506, 0x0708),
    position=0x090A0B0C,
    tokens=0x0D0E0F10,
    segments=np.array([(0, 40), (40, 24)], np.uint64),
    digests=np.array(
        [(0x1122334455667788, 0x99AABBCCDDEEFF00), (0x0123456789ABCDEF, 0xFEDCBA9876543210)],
        np.uint64,
    ),
    key_id=0x11121314,
    expires=0x15161718,
)
SMALL = Layout(2, 1, 1, 1, "uint8", 4)
IDENTITY = bytes(range(32))
KEY, PARENT, FILL = b"k" * 32, b"p" * 32, b"f" * 16
PAYLOAD = bytes(range(SMALL.payload_bytes))


def golden() -> bytes:
    data = bytearray(PAGE_BYTES)
    for offset, text in GOLDEN:
        data[offset : offset + len(text) // 2] = bytes.fromhex(text)
    return bytes(data)


def small() -> bytes:
    """The header of a frame of SMALL with PAYLOAD, as the store writes it."""
    template = Template(SMALL, IDENTITY)
    digests = digests_of(memoryview(PAYLOAD), template.segments.tolist())
    (data,) = template.write([KEY], [PARENT], FILL, [5], digests[None])
    return data


def sealed(data: bytes) -> bytes:
    """The same header with a digest that fits its bytes: what only a forger or another version
    of this program writes."""
    return data[:-16] + xxhash.xxh3_128_intdigest(data[:-16]).to_bytes(16, "little")


def with_field(data: bytes, offset: int, form: str, *values: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into("<" + form, changed, offset, *values)
    return sealed(bytes(changed))


def flips(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each bit's place, and the bytes with this bit flipped."""
    changed = bytearray(data)
    for bit in range(8 * len(data)):
        changed[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(changed)
        changed[bit // 8] ^= 1 << bit % 8


def equal(one: Header, two: Header) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(two, field.name))
        for field in dataclasses.fields(Header)
    )


def refused(data: bytes) -> bool:
    """Whether neither way of reading takes the bytes for a header of this key."""
    good, _ = Template(SMALL, IDENTITY).read([data], [KEY])
    try:
        known = decode(data).key == KEY
    except FrameError:
        known = False
    return not known and not good[0]


def test_golden_header():
    data = HEADER.encode()
    for offset, text in GOLDEN:
        assert data[offset : offset + len(text) // 2].hex() == text, f"at {offset}"
    assert data == golden()
    assert equal(decode(golden()), HEADER)
    assert HEADER.payload_bytes == 64 and HEADER.nbytes == PAGE_BYTES + 64


@pytest.mark.parametrize(("segments", "pages"), [(1, 1), (119, 1), (120, 2), (247, 2), (248, 3)])
def test_headers_fill_whole_pages(segments, pages):
    assert header_bytes(segments) == pages * PAGE_BYTES


@st.composite
def headers(draw: st.DrawFn) -> Header:
    sizes = np.array(draw(st.lists(st.integers(0, 1 << 28), min_size=1, max_size=130)), np.uint64)
    words = st.integers(0, (1 << 64) - 1)
    count = len(sizes)
    return Header(
        key=draw(st.binary(min_size=32, max_size=32)),
        parent=draw(st.binary(min_size=32, max_size=32)),
        identity=draw(st.binary(min_size=32, max_size=32)),
        fill=draw(st.binary(min_size=16, max_size=16)),
        part=draw(st.tuples(*[st.integers(0, 0xFFFF)] * 4)),
        position=draw(st.integers(0, (1 << 32) - 1)),
        tokens=draw(st.integers(0, (1 << 32) - 1)),
        segments=np.stack([np.cumsum(sizes) - sizes, sizes], axis=1),
        digests=np.array([(draw(words), draw(words))] * count, np.uint64),
        key_id=draw(st.integers(0, (1 << 32) - 1)),
        expires=draw(st.integers(0, (1 << 32) - 1)),
    )


@given(headers(), st.binary(max_size=50))
def test_what_is_encoded_is_decoded(header, payload):
    data = header.encode()
    assert len(data) == header_bytes(len(header.segments)) == header.nbytes - header.payload_bytes
    assert equal(decode(data), header) and equal(decode(memoryview(data + payload)), header)
    assert decode(data).encode() == data
    assert header_digest(memoryview(data + payload)) == data[-16:]
    assert expires_of(data) == header.expires and expires_of(b"no frame" + data[8:]) == NEVER


def test_any_flipped_bit_of_a_header_is_noticed():
    whole, template = small(), Template(SMALL, IDENTITY)
    assert decode(whole).key == KEY
    for bit, data in flips(whole):
        with pytest.raises(FrameError):
            decode(data)
            pytest.fail(f"bit {bit} of the header")
    damaged = [data for _, data in flips(whole)]
    good, _ = template.read([*damaged, whole], [KEY] * (len(damaged) + 1))
    assert np.flatnonzero(good).tolist() == [len(damaged)]


def test_any_flipped_bit_of_a_payload_is_noticed():
    header = decode(small())
    assert verify_payload(header, memoryview(PAYLOAD)) == []
    for bit, data in flips(PAYLOAD):
        segment = bit // 8 // SMALL.segment_bytes
        assert verify_payload(header, memoryview(data)) == [segment], f"bit {bit}"
    backwards = PAYLOAD[SMALL.segment_bytes :] + PAYLOAD[: SMALL.segment_bytes]
    assert verify_payload(header, memoryview(backwards)) == [0, 1]


def test_any_flipped_bit_of_a_payloads_digest_is_noticed():
    header = decode(small())
    for bit in range(256):
        digests = header.digests.copy()
        digests.reshape(-1)[bit // 64] ^= np.uint64(1 << bit % 64)
        changed = dataclasses.replace(header, digests=digests)
        assert verify_payload(changed, memoryview(PAYLOAD)) == [bit // 128]


def test_a_frame_cut_anywhere_is_noticed():
    whole = small()
    for size in range(len(whole)):
        with pytest.raises(FrameError):
            decode(whole[:size])
        assert size % 97 or refused(whole[:size])
    header = decode(whole)
    for size in range(len(PAYLOAD)):
        expected = [i for i in range(2) if size < (i + 1) * SMALL.segment_bytes]
        assert verify_payload(header, memoryview(PAYLOAD)[:size]) == expected


def test_a_cut_header_does_not_hide_its_neighbours():
    whole, template = small(), Template(SMALL, IDENTITY)
    good, digests = template.read([whole, whole[:100], b"", whole], [KEY] * 4)
    assert good.tolist() == [True, False, False, True]
    assert digests[3].tolist() == digests[0].tolist() == decode(whole).digests.tolist()


@pytest.mark.parametrize(
    ("offset", "form", "values", "said"),
    [
        (0, "4B", b"KVEG", "begins with b'KVEG', expected b'KVEF'"),
        (4, "H", [1], "version 1, this reader knows 0"),
        (6, "H", [6], "encoding 6.*not known"),
        (8, "I", [8192], "header of 8192 bytes does not hold 2 segments"),
        (8, "I", [0], "header of 0 bytes"),
        (12, "I", [0], "does not hold 0 segments"),
        (12, "I", [0xFFFFFFFF], "does not hold 4294967295 segments"),
        (12, "I", [1], "not known"),  # the second segment lies in what must be zero
        (16, "Q", [17], "segments of 16 bytes in a payload of 17"),
        (16, "Q", [(1 << 64) - 1], "segments of 16 bytes in a payload of 18446744073709551615"),
        (152, "H", [2], "digest kind 2.*not known"),
        (154, "H", [1], "flags 1: not known"),
        (164, "B", [1], "not known"),
        (255, "B", [1], "not known"),
        (4079, "B", [1], "not known"),
        (256, "Q", [1], "do not tile"),
        (272, "Q", [7], "do not tile"),
        (256, "4Q", [8, 8, 0, 8], "do not tile"),
        (264, "Q", [9], "payload of 16"),
        (264, "Q", [1 << 63], "payload of 16"),
        # Sizes whose sum passes 2**64 and comes out right.
        (256, "4Q", [0, 1 << 63, 1 << 63, (1 << 63) + 16], "payload of 16"),
        (256, "4Q", [0, (1 << 64) - 8, (1 << 64) - 8, 24], "payload of 16"),
    ],
)
def test_a_field_that_does_not_hold_is_named(offset, form, values, said):
    """Even where the header's own digest is right."""
    data = with_field(small(), offset, form, *values)
    with pytest.raises(FrameError, match=said):
        decode(data)
    assert refused(data)


@pytest.mark.parametrize(
    "offset", [*range(24), *range(88, 120), *range(136, 144), *range(148, 160), *range(164, 288)]
)
def test_a_template_takes_no_frame_of_another_namespace(offset):
    """What is fixed in a namespace is compared, whatever the header's digest says."""
    data = bytearray(small())
    data[offset] ^= 1
    good, _ = Template(SMALL, IDENTITY).read([sealed(bytes(data))], [KEY])
    assert not good[0]


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 4079), st.integers(0, 255)), min_size=1, max_size=4))
@example([(0, 0)])
@example([(271, 0x80), (279, 0x80), (287, 0x80)])
def test_a_forged_header_is_refused_or_holds_together(changes):
    data = bytearray(small())
    for offset, value in changes:
        data[offset] = value
    try:
        header = decode(sealed(bytes(data)))
    except FrameError:
        return
    assert header.encode() == sealed(bytes(data))
    end = 0
    for offset, nbytes in header.segments.tolist():
        assert offset == end
        end += nbytes
    assert end == header.payload_bytes <= 1 << 40


@given(
    st.lists(
        st.tuples(
            st.binary(min_size=32, max_size=32),
            st.binary(min_size=32, max_size=32),
            st.integers(0, (1 << 32) - 1),
        ),
        max_size=5,
    ),
    st.sampled_from([1, 2, 119, 120]),
    st.integers(0, 1 << 32),
)
def test_a_template_writes_what_a_header_encodes(frames, layers, seed):
    of = Layout(layers, 3, 5, 7, "bfloat16", 16)
    template = Template(of, IDENTITY)
    assert template.header_bytes == header_bytes(layers)
    digests = np.random.default_rng(seed).integers(
        0, 1 << 64, (len(frames), layers, 2), dtype=np.uint64
    )
    keys, parents, positions = ([frame[i] for frame in frames] for i in range(3))
    lives = [seed * at % (1 << 32) for at in range(len(frames))]
    written = list(template.write(keys, parents, FILL, positions, digests, lives))
    part, segments = (0, layers, 0, 3), template.segments
    expected = [
        Header(key, parent, IDENTITY, FILL, part, place, 16, segments, digest, expires=life)
        for (key, parent, place), digest, life in zip(frames, digests, lives, strict=True)
    ]
    assert written == [header.encode() for header in expected]
    assert all(equal(decode(a), b) for a, b in zip(written, expected, strict=True))
    good, found = template.read([memoryview(data) for data in written], keys)
    assert good.all() and np.array_equal(found, digests)
    for_ever = list(template.write(keys, parents, FILL, positions, digests))
    assert [expires_of(data) for data in for_ever] == [NEVER] * len(frames)
    others = [bytes([key[0] ^ 1]) + key[1:] for key in keys]
    assert not template.read(written, others)[0].any()
    assert not Template(of, bytes(32)).read(written, keys)[0].any()


def test_a_template_of_another_layout_takes_nothing():
    for other in (
        Layout(2, 1, 1, 1, "uint8", 8),
        Layout(2, 1, 2, 2, "uint8", 4),
        Layout(1, 1, 1, 1, "uint8", 4),
        Layout(2, 2, 1, 1, "uint8", 4),
        Layout(120, 1, 1, 1, "uint8", 4),
    ):
        good, _ = Template(other, IDENTITY).read([small()], [KEY])
        assert not good[0], other


@given(st.binary(max_size=64), st.data())
def test_digests_of_a_payload(payload, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(payload)), max_size=4)))
    edges = [0, *cuts, len(payload)]
    segments = [(a, b - a) for a, b in zip(edges, edges[1:], strict=False)]
    found = digests_of(memoryview(payload), segments)
    assert found.shape == (len(segments), 2) and found.dtype == np.uint64
    for (at, size), (low, high) in zip(segments, found.tolist(), strict=True):
        assert high << 64 | low == xxhash.xxh3_128_intdigest(payload[at : at + size])


@pytest.mark.parametrize("size", [0, 255, 4097, (1 << 32) - 1])
def test_a_frame_without_a_whole_header_has_no_digest(size):
    data = bytearray(small())
    struct.pack_into("<I", data, 8, size)
    with pytest.raises(FrameError, match=f"header of {size} bytes in a frame of 4096"):
        header_digest(memoryview(data))
    for cut in (0, 11, FIXED_BYTES):
        with pytest.raises(FrameError):
            header_digest(memoryview(small())[:cut])
