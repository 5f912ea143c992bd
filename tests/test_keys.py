"""kvengine.keys: golden vectors, and what changes which key."""

import dataclasses
import struct
from array import array

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvengine import Layout
from kvengine.errors import BadKey
from kvengine.keys import ROOT_KEY, BlockKeys, Identity, Namespace

BLOCK = 4
LAYOUT = Layout(2, 1, 8, 8, "float32", BLOCK)
SECRET = bytes(range(100, 132))
IDENTITY = Identity(
    format_version=0,
    tenant="default",
    model="m",
    revision="r1",
    adapter="",
    media="",
    salt="s",
    kv_dtype="float32",
    fidelity="exact",
    layout=bytes(range(32)),
    positional="rope",
    pool="target",
    source="tokens",
    epoch=3,
)
FIELDS = Identity.__struct_fields__
TOKENS = [t * t for t in range(3 * BLOCK + 1)]
HASHES = [bytes([i]) * 32 for i in range(1, 5)]

# Made by a program of its own from the description in kvengine.keys and the BLAKE3 specification.
RECORD = (
    "000100000030"
    "010700000064656661756c74"
    "02010000006d"
    "03020000007231"
    "0400000000"
    "0500000000"
    "060100000073"
    "0707000000666c6f61743332"
    "08050000006578616374"
    "0920000000000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
    "0a04000000726f7065"
    "0b06000000746172676574"
    "0c06000000746f6b656e73"
    "0d0100000033"
)
DIGEST = "6c1a78d57484f849a8cbeb4e2df210ccb5cec3f4335a357b2d12e98175c7e9e2"
ROOT = "84fdec029fae4ed06787718f3ba6151996b9aa1e71ae7d0eba9fbeb5ad61ddcc"
KEYS = [
    "82cdf6ccd48721f59ed61d1ddc224a188814ca7dd5dadcd7fd804d0cf7699f36",
    "1dd59646b7a396f9e5906fc7d066aaa534ebd2cba5ef3d860f3a6311ba302853",
    "9e3a293bf12c1ec0ef5d149ecf6c026113cf6cf41ae789305af583470409d13d",
]
KEY_OF_SEVENS = "ad22ce5350f1976900783ed6287a419371edeed9f21b93444d1afef88c86d4b1"


def names(identity: Identity = IDENTITY, secret: bytes = SECRET, layout: Layout = LAYOUT):
    return Namespace(identity, layout, 0, identity.digest(), identity.root(secret))


def rows(keys: BlockKeys) -> list[bytes]:
    return [keys.key(i) for i in range(len(keys))]


def changed(value: object) -> object:
    """Another value of the same kind."""
    match value:
        case bytes():
            return bytes([value[0] ^ 1]) + value[1:]
        case int():
            return value + 1
        case str():
            return value + "x"
    raise AssertionError(f"say how to change a field of {type(value)}")


def test_golden_vectors():
    assert IDENTITY.record().hex() == RECORD
    assert IDENTITY.digest().hex() == DIGEST
    assert IDENTITY.root(SECRET).hex() == ROOT
    keys = names().keys(TOKENS)
    assert [key.hex() for key in rows(keys)] == KEYS
    assert keys.data.hex() == "".join(KEYS) and keys.parent == ROOT_KEY and keys.position == 0
    assert names().keys_of_hashes([b"\7" * 32]).data.hex() == KEY_OF_SEVENS


@pytest.mark.parametrize("field", FIELDS)
def test_any_field_of_the_identity_changes_every_key(field):
    other = msgspec.structs.replace(IDENTITY, **{field: changed(getattr(IDENTITY, field))})
    assert other.digest() != IDENTITY.digest()
    for verb, given_ in (("keys", TOKENS), ("keys_of_hashes", HASHES)):
        ours, theirs = getattr(names(), verb)(given_), getattr(names(other), verb)(given_)
        assert len(ours) == len(theirs) >= 3 and not set(rows(ours)) & set(rows(theirs))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Layout)])
def test_any_field_of_the_layout_changes_its_digest_but_paged(field):
    layout = LAYOUT
    if field in ("window_tokens", "sink_tokens"):  # with full attention there is neither
        layout = dataclasses.replace(LAYOUT, attention="sliding", window_tokens=8, sink_tokens=4)
    other = dataclasses.replace(layout)
    value = getattr(layout, field)
    object.__setattr__(other, field, not value if isinstance(value, bool) else changed(value))
    assert (other.digest() != layout.digest()) == (field != "paged")


def test_every_field_of_the_identity_must_be_given():
    for field in FIELDS:
        rest = {name: getattr(IDENTITY, name) for name in FIELDS if name != field}
        with pytest.raises(TypeError, match=field):
            Identity(**rest)


def test_the_secret_and_the_epoch_change_every_key():
    tables = [
        rows(names(msgspec.structs.replace(IDENTITY, epoch=epoch), secret).keys(TOKENS))
        for epoch in (0, 1, 2)
        for secret in (SECRET, bytes(32), SECRET[::-1])
    ]
    assert len({key for table in tables for key in table}) == 9 * 3
    # What stands in headers is public: it does not depend on the secret.
    assert names(secret=bytes(32)).digest == names().digest != names().root


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33), b"00" * 32])
def test_a_secret_of_another_length_is_refused(secret):
    with pytest.raises(BadKey, match=f"32 bytes, got {len(secret)}"):
        IDENTITY.root(secret)


texts = st.text(alphabet=st.characters(codec="utf-8"), max_size=6)
identities = st.builds(
    Identity,
    **{
        name: {str: texts, bytes: st.binary(max_size=6), int: st.integers(0, 300)}[
            type(getattr(IDENTITY, name))
        ]
        for name in FIELDS
    },
)


@given(identities)
@example(msgspec.structs.replace(IDENTITY, model="ab", revision="c"))
@example(msgspec.structs.replace(IDENTITY, model="a", revision="bc"))
@example(msgspec.structs.replace(IDENTITY, model="\x03\x01\0\0\0x"))
def test_a_record_says_every_field_apart(identity):
    """No two identities share a record, since each can be read back from its record."""
    record, at, found = identity.record(), 0, []
    while at < len(record):
        tag, size = struct.unpack_from("<BI", record, at)
        assert tag == len(found)
        found.append(record[at + 5 : at + 5 + size])
        at += 5 + size
    assert at == len(record)
    values = [getattr(identity, name) for name in FIELDS]
    assert found == [v if isinstance(v, bytes) else str(v).encode() for v in values]


def test_text_moved_to_the_next_field_is_another_identity():
    for one, other in zip(FIELDS, FIELDS[1:], strict=False):
        kinds = {type(getattr(IDENTITY, one)), type(getattr(IDENTITY, other))}
        if kinds == {str}:
            left = msgspec.structs.replace(IDENTITY, **{one: "ab", other: ""})
            right = msgspec.structs.replace(IDENTITY, **{one: "a", other: "b"})
            swapped = msgspec.structs.replace(IDENTITY, **{one: "", other: "ab"})
            assert len({i.digest() for i in (left, right, swapped)}) == 3


def test_a_field_too_long_is_named():
    long = msgspec.structs.replace(IDENTITY, salt="x" * ((1 << 20) + 1))
    with pytest.raises(BadKey, match="'salt' has 1048577 bytes"):
        long.record()


@given(st.data())
def test_a_changed_token_changes_its_block_and_all_after(data):
    count = data.draw(st.integers(BLOCK, 10 * BLOCK))
    tokens = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=count, max_size=count))
    at = data.draw(st.integers(0, count - 1))
    other = list(tokens)
    other[at] ^= 1 << data.draw(st.integers(0, 31))
    one, two = rows(names().keys(tokens)), rows(names().keys(other))
    assert len(one) == len(two) == count // BLOCK
    assert one[: at // BLOCK] == two[: at // BLOCK]
    assert not set(one[at // BLOCK :]) & set(two)


@given(st.lists(st.integers(0, 3), max_size=5 * BLOCK), st.integers(0, 5 * BLOCK))
def test_prefixes_share_keys_and_nothing_repeats(tokens, cut):
    keys = names().keys(tokens)
    assert len(keys) == len(tokens) // BLOCK and len(set(rows(keys))) == len(keys)
    prefix = names().keys(tokens[:cut])
    assert rows(prefix) == rows(keys)[: len(prefix)]


def test_equal_tokens_in_other_blocks_have_other_keys():
    long, short = Layout(2, 1, 8, 8, "float32", 8), LAYOUT
    one, two = names(layout=long).keys(TOKENS[:8]), names(layout=short).keys(TOKENS[:8])
    assert len(one) == 1 and len(two) == 2 and not set(rows(one)) & set(rows(two))
    assert names().keys([0] * 8).key(0) != names().keys([0] * 8).key(1)


@pytest.mark.parametrize(
    "tokens",
    [
        tuple(TOKENS),
        array("I", TOKENS),
        range(0),
        *(np.array(TOKENS, kind) for kind in ("u1", "i2", "u2", "i4", "u4", "i8", "u8")),
        np.array(TOKENS, ">i4"),
        np.array(TOKENS, ">u4"),
        np.repeat(np.array(TOKENS, np.int32), 3)[::3],
        np.array(TOKENS[::-1], np.uint32)[::-1],
    ],
    ids=lambda tokens: f"{type(tokens).__name__} {getattr(tokens, 'dtype', '')}",
)
def test_every_kind_of_integers_names_the_same_blocks(tokens):
    keys = names().keys(tokens)
    assert [key.hex() for key in rows(keys)] == (KEYS if len(tokens) else [])


def test_the_ends_of_the_range_of_tokens():
    ends = [0, 2**32 - 1] * 2
    assert names().keys(ends).data == names().keys(np.array(ends, np.uint32)).data
    assert names().keys(ends).data != names().keys([0, 2**31 - 1] * 2).data


@pytest.mark.parametrize(
    "tokens",
    [
        [1.0, 2.0, 3.0, 4.0],
        np.ones(4, np.float32),
        [True] * 4,
        ["1"] * 4,
        "1234",
        b"1234",
        None,
        [None] * 4,
        {1: 2},
        [[1, 2], [3, 4]],
        [[1, 2, 3], [4]],
        np.ones((2, 4), np.int64),
        5,
        np.int64(5),
        [1j] * 4,
    ],
    ids=repr,
)
def test_what_is_no_row_of_integers_is_refused(tokens):
    with pytest.raises(BadKey, match="one-dimensional sequence of integers"):
        names().keys(tokens)


@pytest.mark.parametrize("bad", [-1, 2**32, -(2**31), 2**63, 2**64, 2**70])
def test_tokens_out_of_range_are_refused(bad):
    with pytest.raises(BadKey, match="integers|0..2\\*\\*32-1"):
        names().keys([1, 2, 3, bad])


@pytest.mark.parametrize("kind", ["i1", "i4", "i8"])
def test_negative_tokens_are_named(kind):
    with pytest.raises(BadKey, match=r"0\.\.2\*\*32-1, got -7\.\.3"):
        names().keys(np.array([1, 2, 3, -7], kind))


@given(st.integers(0, 9), st.data())
def test_slices(blocks, data):
    keys = names().keys(list(range(blocks * BLOCK)))
    ends = st.none() | st.integers(-12, 12)
    part = slice(data.draw(ends), data.draw(ends))
    found = keys[part]
    assert rows(found) == rows(keys)[part] and len(found) == len(rows(keys)[part])
    assert found.namespace is keys.namespace
    if len(found):
        first = rows(keys).index(found.key(0))
        assert found.position == first
        assert found.parent == (keys.key(first - 1) if first else ROOT_KEY)
        assert found[:] == found and keys[first:][: len(found)] == found


def test_slices_of_slices_know_their_place():
    keys = names().keys_of_hashes(HASHES, position=7, parent=bytes(32))
    part = keys[1:][1:3]
    assert part.position == 9 and part.parent == keys.key(1) and rows(part) == rows(keys)[2:4]
    assert keys[:2].parent == keys.parent != ROOT_KEY and keys[:2].position == 7


@pytest.mark.parametrize("step", [2, -1])
def test_a_slice_with_a_step_is_refused(step):
    with pytest.raises(BadKey, match=f"step 1, got {step}"):
        names().keys(TOKENS)[::step]


def test_tables_and_words_are_views_of_the_keys():
    keys = names().keys(TOKENS)
    assert keys.table.shape == (3, 32) and keys.table.tobytes() == keys.data
    assert keys.words.shape == (3, 4) and keys.words.astype("<u8").tobytes() == keys.data
    assert not keys.table.flags.writeable and not keys.words.flags.writeable
    none = names().keys([])
    assert len(none) == 0 and none.table.shape == (0, 32) and none.words.shape == (0, 4)


def test_keys_of_hashes_are_keyed_one_by_one():
    keys = names().keys_of_hashes(HASHES)
    assert len(set(rows(keys))) == len(HASHES) and not set(rows(keys)) & set(HASHES)
    assert keys.parent == ROOT_KEY and keys.position == 0
    later = names().keys_of_hashes(HASHES[2:], position=2, parent=HASHES[1])
    assert rows(later) == rows(keys)[2:] and later.position == 2
    assert later.parent == keys.key(1) and keys[2:] == later
    assert not set(rows(names(secret=bytes(32)).keys_of_hashes(HASHES))) & set(rows(keys))
    assert len(names().keys_of_hashes([])) == 0


def test_long_hashes_are_not_shortened():
    one, two = b"\0" * 63 + b"\1", b"\0" * 63 + b"\2"
    keys = names().keys_of_hashes([one, two, one[:32]])
    assert len(set(rows(keys))) == 3


@pytest.mark.parametrize("short", [b"", b"x", bytes(8), bytes(31)])
def test_short_hashes_are_refused(short):
    with pytest.raises(BadKey, match=f"hash 1 has {len(short)} bytes.*sha256"):
        names().keys_of_hashes([bytes(32), short])
    with pytest.raises(BadKey, match=f"parent's hash has {len(short)} bytes.*sha256"):
        names().keys_of_hashes([bytes(32)], 1, parent=short)


@pytest.mark.parametrize("position", [-1, 2**32 - 1, 2**32])
def test_a_position_that_no_header_holds_is_refused(position):
    with pytest.raises(BadKey, match=f"got {position}"):
        names().keys_of_hashes(HASHES, position)


def test_keys_formed_before():
    keys = names().keys(TOKENS)
    assert names().keys_of(keys.data) == keys
    assert names().keys_of(keys.data[32:], keys.key(0)).parent == keys.key(0)
    for table, parent in ((bytes(31), ROOT_KEY), (bytes(65), ROOT_KEY), (bytes(64), bytes(31))):
        with pytest.raises(BadKey, match=f"32 bytes each, got {len(table)} .*{len(parent)}"):
            names().keys_of(table, parent)


def test_nothing_secret_is_printed():
    space = names()
    for shown in (repr(space), str(space), repr(space.keys(TOKENS))):
        assert space.root.hex() not in shown and repr(space.root) not in shown
        assert SECRET.hex() not in shown
