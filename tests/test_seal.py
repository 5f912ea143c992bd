"""kvengine.seal: what is sealed opens to the same bytes, untouched, under its key; or not."""

import mmap
import os
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rig
import test_tiers
from kvengine import frame
from kvengine.errors import FrameError, UnknownKey
from kvengine.seal import HEADER_BYTES, SEGMENT_BYTES, SEGMENTS_MAX, Sealer, around, cut, structure
from kvengine.tiers import Span, verify

pytest.importorskip("cryptography")

PAGE = 4096
LARGE = rig.layout(layers=5, head_dim=64, head_dim_v=64, block_tokens=32)


class Keys:
    """Data keys of one tenant, the last seals."""

    def __init__(self, *ids: int) -> None:
        self.held = {key_id: os.urandom(32) for key_id in ids or (7,)}

    def sealing(self) -> tuple[int, bytes]:
        return list(self.held.items())[-1]

    def opening(self, key_id: int) -> bytes | None:
        return self.held.get(key_id)


@pytest.fixture(scope="module")
def keys() -> Keys:
    return Keys()


@pytest.fixture(scope="module")
def sealer(keys) -> Sealer:
    return Sealer(keys)


def block(number: int, of=LARGE) -> tuple[bytes, bytes]:
    key = test_tiers.key_of(number)
    return key, test_tiers.made(number, of)


def sealed(sealer: Sealer, data: bytes) -> bytes:
    (span,) = test_tiers.spans_of([(data[24:56], data)], True)
    with sealer.sealed(span.frame, span.nbytes) as made:
        assert len(made) % PAGE == 0 and not any(made[HEADER_BYTES + len(data) :])
        return bytes(made[: HEADER_BYTES + len(data)])


def opened(sealer: Sealer, form: bytes, key: bytes, nbytes: int, slack: int = 0) -> bytes:
    """Open into poisoned memory, verify, and see that the sealed form is as before."""
    room = memoryview(bytearray(form + b"\x5a" * slack))
    target = memoryview(mmap.mmap(-1, frame.pages(nbytes)))
    try:
        sealer.open(room, key, target, nbytes)
    finally:
        assert room == form + b"\x5a" * slack
    verify(Span(key, target, nbytes))
    return bytes(target[:nbytes])


@pytest.mark.parametrize("of", [*test_tiers.SIZES, LARGE])
@pytest.mark.parametrize("slack", [0, 1, 16, PAGE])
def test_what_is_sealed_opens_to_the_same_bytes(sealer, of, slack):
    key, data = block(1, of)
    form = sealed(sealer, data)
    assert opened(sealer, form, key, len(data), slack) == data
    header = structure(memoryview(form), key, len(form) - PAGE)
    assert (header.key, header.identity) == (key, test_tiers.IDENTITY)
    payload = data[PAGE:]
    assert all(payload[at : at + 8] not in form for at in range(0, len(payload) - 8, 997))


@given(st.data())
def test_a_part_of_a_block_is_opened_by_itself(sealer, data):
    """No byte before it is written; of the sealed form only the segments around it are needed."""
    key, plain = block(30)
    form = sealed(sealer, plain)
    start = data.draw(st.integers(0, len(plain) // PAGE - 1)) * PAGE
    stop = data.draw(st.integers(start + 1, len(plain)))
    first, last = around(len(plain), start, stop)
    room = memoryview(bytearray(b"\x5a" * len(form)))
    room[:PAGE] = form[:PAGE]
    room[PAGE + first : PAGE + last] = form[PAGE + first : PAGE + last]
    target = memoryview(bytearray(b"\xa5" * len(plain)))
    sealer.open(room, key, target, len(plain), start, stop)
    assert target[:start] == b"\xa5" * start
    assert target[start:stop] == plain[start:stop]
    room[PAGE + data.draw(st.integers(first, last - 1))] ^= 1
    with pytest.raises(FrameError, match="not as it was sealed"):
        sealer.open(room, key, target, len(plain), start, stop)


def test_a_block_of_several_frames(sealer):
    parts = [test_tiers.made(n, key=test_tiers.key_of(1)) for n in range(3)]
    data = b"".join(part.ljust(frame.pages(len(part)), b"\0") for part in parts)
    key = test_tiers.key_of(1)
    assert opened(sealer, sealed(sealer, data), key, len(data)) == data


@pytest.mark.parametrize("nbytes", [1, PAGE, SEGMENT_BYTES, SEGMENT_BYTES + 1, 5 << 20, 300 << 20])
def test_segments_tile_the_block_and_fit_one_header(nbytes):
    segments = cut(nbytes).tolist()
    assert len(segments) <= SEGMENTS_MAX and frame.header_bytes(len(segments)) == HEADER_BYTES
    assert all(at % PAGE == 0 and size for at, size in segments)
    ends = [at + size for at, size in segments]
    assert [0, *ends[:-1]] == [at for at, _ in segments] and ends[-1] == nbytes


@given(st.data())
def test_any_bit_that_is_flipped_is_found(sealer, data):
    """Of header, salt, tags and every segment; also where the header's digest is made to fit."""
    key, plain = block(2)
    form = bytearray(sealed(sealer, plain))
    bit = data.draw(
        st.one_of(st.integers(0, 8 * PAGE - 1), st.integers(8 * PAGE, 8 * len(form) - 1))
    )
    form[bit // 8] ^= 1 << bit % 8
    if data.draw(st.booleans()):
        form[:PAGE] = refitted(bytes(form[:PAGE]))
        if form == sealed_again(sealer, plain, form):
            return  # the bit was in the digest itself, which has been put right
    with pytest.raises(FrameError):
        opened(sealer, bytes(form), key, len(plain))


def refitted(header: bytes) -> bytes:
    """A header whose own digest fits: what a forger writes."""
    return header[:-16] + frame._digest(header[:-16])


def sealed_again(sealer: Sealer, plain: bytes, form: bytes) -> bytes:
    """The form itself, where it opens to the plain block."""
    try:
        opened(sealer, bytes(form), plain[24:56], len(plain))
    except FrameError:
        return b""
    return form


FIELDS = {
    "magic": slice(0, 4),
    "version": slice(4, 6),
    "encoding": slice(6, 8),
    "header bytes": slice(8, 12),
    "segments": slice(12, 16),
    "payload bytes": slice(16, 24),
    "key": slice(24, 56),
    "parent": slice(56, 88),
    "identity": slice(88, 120),
    "fill": slice(120, 136),
    "part": slice(136, 144),
    "position": slice(144, 148),
    "tokens": slice(148, 152),
    "digest kind": slice(152, 154),
    "flags": slice(154, 156),
    "key id": slice(156, 160),
    "expires": slice(160, 164),
    "salt": slice(164, 196),
    "reserved": slice(196, 256),
    "first segment": slice(256, 272),
    "last segment's tag": slice(272, 288),
    "padding": slice(2000, 2016),
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_the_header_is_bound(sealer, name):
    """A forger who makes the digest fit is found by the tags, or by what cannot be."""
    key, data = block(3, test_tiers.SIZES[0])
    form = sealed(sealer, data)
    assert opened(sealer, refitted(form[:PAGE]) + form[PAGE:], key, len(data)) == data
    for at in (FIELDS[name].start, FIELDS[name].stop - 1):
        header = bytearray(form[:PAGE])
        header[at] ^= 1
        with pytest.raises(FrameError):
            forged = refitted(bytes(header)) + form[PAGE:]
            opened(sealer, forged, bytes(header[24:56]), len(data))


@given(st.integers(0, 1 << 30))
def test_what_is_cut_short_or_longer_is_refused(sealer, size):
    key, data = block(4)
    form = sealed(sealer, data)
    size %= len(form)
    for changed in (form[:size], form + b"\0" * (1 + size % PAGE)):
        with pytest.raises(FrameError):
            opened(sealer, changed, key, max(1, len(changed) - HEADER_BYTES))
    with pytest.raises(FrameError):
        opened(sealer, form[:size], key, len(data))


def segments_of(form: bytes) -> list[bytes]:
    return [form[PAGE + at :][:size] for at, size in cut(len(form) - PAGE).tolist()]


def test_nothing_of_one_frame_stands_in_another(sealer):
    """Whole payloads, single segments with their tags, and salts change places."""
    (key, one), (_, two) = block(5), block(6)
    first, second = sealed(sealer, one), sealed(sealer, two)
    again = sealed(sealer, one)
    tags = slice(256 + 16 * len(cut(len(one))), None)
    forged: Sequence[bytes] = [
        first[:PAGE] + second[PAGE:],
        first[:PAGE] + again[PAGE:],
        refitted(first[: tags.start] + second[tags.start : PAGE]) + second[PAGE:],
        refitted(first[:164] + again[164:196] + first[196:PAGE]) + first[PAGE:],
        refitted(first[:24] + second[24:56] + first[56:PAGE]) + first[PAGE:],
        first[:PAGE] + b"".join([segments_of(again)[0], *segments_of(first)[1:]]),
        first[:PAGE] + b"".join([segments_of(first)[i] for i in (1, 0)]) + first[PAGE * 33 :],
    ]
    for changed in forged:
        for asked in (key, changed[24:56]):
            with pytest.raises(FrameError):
                opened(sealer, changed, asked, len(one))
    with pytest.raises(FrameError, match="another block"):
        opened(sealer, second, key, len(two))


def test_segments_of_one_frame_do_not_change_places(sealer):
    key, data = block(7)
    form = sealed(sealer, data)
    parts, count = segments_of(form), len(cut(len(data)))
    header, at = bytearray(form[:PAGE]), 256 + 16 * count
    header[at : at + 16], header[at + 16 : at + 32] = (
        header[at + 16 : at + 32],
        header[at : at + 16],
    )
    parts[0], parts[1] = parts[1], parts[0]
    with pytest.raises(FrameError):
        opened(sealer, refitted(bytes(header)) + b"".join(parts), key, len(data))


def test_who_expects_a_sealed_frame_takes_no_plain_one_nor_the_reverse(sealer):
    key, data = block(8)
    form = sealed(sealer, data)
    with pytest.raises(FrameError):
        verify(Span(key, memoryview(form), len(form)))
    with pytest.raises(FrameError):
        structure(memoryview(data), key, len(data) - PAGE)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
def test_keys_that_rotate_and_are_dropped(kept_bytes):
    """Also where a form of the older key is kept for another tier: that is given none of it."""
    keys = Keys(1)
    sealer = Sealer(keys, kept_bytes)
    key, data = block(9)
    old = sealed(sealer, data)
    keys.held[2] = os.urandom(32)
    new = sealed(sealer, data)
    assert [structure(memoryview(form), key, len(form) - PAGE).key_id for form in (old, new)] == [
        1,
        2,
    ]
    assert opened(sealer, old, key, len(data)) == opened(sealer, new, key, len(data)) == data
    del keys.held[1]
    assert opened(sealer, new, key, len(data)) == data
    with pytest.raises(UnknownKey, match="0x00000001, not held here"):
        opened(sealer, old, key, len(data))


def test_another_tenant_cannot_open_it(sealer):
    """Not with a key of the same number, nor without one."""
    key, data = block(10)
    form = sealed(sealer, data)
    with pytest.raises(FrameError, match="not as it was sealed"):
        opened(Sealer(Keys()), form, key, len(data))
    with pytest.raises(UnknownKey):
        opened(Sealer(Keys(8)), form, key, len(data))


def test_no_key_and_nonce_are_used_twice(keys):
    """Of many sealings of one block and of others, with what the package is given written down."""
    sealer, used = Sealer(keys), []
    plain = sealer._aes

    class Watched:
        def __init__(self, key: bytes) -> None:
            self.key, self.inner = key, plain(key)

        def encrypt_into(self, nonce, data, bound, target):
            used.append((self.key, nonce))
            return self.inner.encrypt_into(nonce, data, bound, target)

    sealer._aes = Watched
    forms = [sealed(sealer, block(11 + n % 2)[1]) for n in range(50)]
    assert len(used) == len(set(used)) == 50 * len(cut(len(block(11)[1])))
    assert len({form[164:196] for form in forms}) == len({key for key, _ in used}) == 50


def test_the_sealed_form_is_made_once_for_several_tiers(keys):
    sealer, forms = Sealer(keys, kept_bytes=1 << 20), []
    made = [block(n, test_tiers.SIZES[0]) for n in range(8)]
    for _ in range(3):
        forms.append([sealed(sealer, data) for _, data in made])
    assert forms[0] == forms[1] == forms[2]
    for _ in range(40):
        sealed(sealer, block(20)[1])
        sealed(sealer, block(21)[1])
    many = [block(30 + n) for n in range(12)]
    first = [sealed(sealer, data) for _, data in many]
    assert sealed(sealer, many[-1][1]) == first[-1]
    assert sealed(sealer, many[0][1]) != first[0], "only so much of them is kept"
    held = sum(len(each.room) for each in sealer._idle.values())
    assert held == sealer._idle_bytes <= 1 << 20 and not sealer._busy


def test_a_block_that_is_none_leaves_nothing_behind(sealer):
    room = memoryview(mmap.mmap(-1, 2 * PAGE))
    with pytest.raises(FrameError), sealer.sealed(room, 5000):
        pass
    assert not sealer._busy and np.frombuffer(room, np.uint8).sum() == 0


@pytest.mark.parametrize("name", ["identity", "fill", "expires", "parent", "part", "tokens"])
def test_without_what_is_bound_a_forger_would_pass(sealer, monkeypatch, name):
    """It is the associated data that guards these fields: nothing else would notice."""
    monkeypatch.setattr("kvengine.seal._bound", lambda sealed: b"")
    key, data = block(3, test_tiers.SIZES[0])
    form = bytearray(sealed(sealer, data))
    form[FIELDS[name].start] ^= 1
    forged = refitted(bytes(form[:PAGE])) + bytes(form[PAGE:])
    assert opened(sealer, forged, key, len(data)) == data
