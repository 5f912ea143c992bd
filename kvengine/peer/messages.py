"""What a client and the daemon of its host say to each other. See README.md beside this file.

A message is a length (u32, little-endian) and so many bytes of msgpack: an array that begins with
its tag and its request's number. Tables are packed: 32 bytes a key, little-endian columns. Fields
are only ever added, at the end. Golden bytes stand in tests/test_messages.py.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

VERSION: Final = 1
TOKEN_BYTES: Final = 16
KEY_BYTES: Final = 32
KEYS_MAX: Final = 1 << 17  # of one table: two million tokens in blocks of 16
MESSAGE_BYTES_MAX: Final = 8 << 20
LENGTH_BYTES: Final = 4
TEXT_MAX: Final = 1 << 12
# What a client names of an identity; tenant, epoch and format are the daemon's to say.
IDENTITY: Final = (
    "model",
    "revision",
    "adapter",
    "media",
    "salt",
    "kv_dtype",
    "fidelity",
    "positional",
    "pool",
    "source",
)

Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Token = Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
Tokens = Annotated[bytes, msgspec.Meta(max_length=TOKEN_BYTES << 16)]  # packed
Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Keys = Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES * KEYS_MAX)]  # packed
Flags = Annotated[bytes, msgspec.Meta(max_length=KEYS_MAX)]  # a byte a key, 0 or 1
Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Column = bytes  # what the daemon packs


class Message(msgspec.Struct, array_like=True):
    """`number`: of the request; its answer has the same. 0: there is no answer."""

    number: Number


# What a client says.


class Hello(Message, tag=1):
    """The first message of a connection: which versions, which tenant, and whether it will save.

    Answer: Welcome, with two descriptors, or Refused.
    """

    oldest: Number
    newest: Number
    tenant: Text
    key: Annotated[bytes, msgspec.Meta(max_length=256)]
    writable: bool


class Listen(Message, tag=2):
    """The first message of a client's second connection: send what nobody has asked for here.

    Answer: Done.
    """

    session: Token


class Open(Message, tag=3):
    """Name a namespace: the identity but for tenant and epoch, and the layout. Answer: Opened."""

    identity: dict[Text, Text]
    layout: dict[Text, int | bool | Text]
    smaller: bool
    ttl_s: Seconds | None = None


class Table(Message):
    """A table of keys in a namespace, and where in its prompt it begins."""

    space: Number
    keys: Keys
    position: Number
    parent: Key


class Probe(Table, tag=4):
    """Count the leading blocks that are held. Answer: Count."""


class Contains(Table, tag=5):
    """Say for each key whether it is held. Answer: Which."""


class Match(Table, tag=6):
    """Lease the leading blocks that are held. Answer: Leased."""

    split: bool = False
    output_tokens: int = -1
    stop: Number = 0


class Release(Message, tag=7):
    """Let leases go. No answer."""

    tokens: Tokens


class Adopt(Message, tag=8):
    """Lease what another process of the tenant has leased. Answer: Adopted."""

    token: Token


class Fetch(Message, tag=9):
    """Read leased blocks from tiers into memory, ahead of need if `number` is 0.

    rows: int32 of the lease's blocks. Answer: Fetched, on the other connection.
    """

    token: Token
    rows: Keys
    timeout_s: Seconds


WHOLE: Final = (0, 0, 0, 0)


class Reserve(Table, tag=10):
    """Take slots for blocks that are not held. `space`: of a form. Answer: Reserved.

    fill: names the ranks that fill the blocks together, each a `part`: first layer, end layer,
    first head, end head. b"" where this one has all of them.
    """

    fill: Annotated[bytes, msgspec.Meta(max_length=1024)] = b""
    part: tuple[Number, Number, Number, Number] = WHOLE


class Commit(Message, tag=11):
    """Make filled blocks visible. good: a flag for each reserved block. Answer: Count."""

    token: Token
    good: Flags


class Abort(Message, tag=12):
    """Give reserved slots back: nobody writes them any more. No answer."""

    tokens: Tokens


class Widen(Message, tag=26):
    """Name blocks that have no room in their usual form: parts of them take the spare one.

    keys: packed. No answer.
    """

    keys: Keys


class Corrupt(Message, tag=13):
    """Name leased blocks whose bytes did not verify. rows: int32 of the lease's. No answer."""

    token: Token
    rows: Keys


class Keep(Table, tag=14):
    """Say how to keep blocks of a save. new: flags, those that it brought. Answer: Count."""

    new: Flags
    level: Number
    duration_s: Seconds | None
    ttl_s: Seconds | None


class Hint(Table, tag=15):
    """Say what will become of a prompt. resume_s: None for an end. Answer: Count."""

    branch: bool
    resume_s: Seconds | None


class Pin(Table, tag=16):
    """Keep blocks in memory. duration_s: None for ever. Answer: Count."""

    duration_s: Seconds | None


class Unpin(Table, tag=17):
    """Take pins away. Answer: Count."""


class Drop(Table, tag=18):
    """Forget blocks everywhere. Answer: Count."""


class DropAll(Message, tag=19):
    """Raise the tenant's epoch. Answer: Count, the new one."""


class Stats(Message, tag=20):
    """Ask for counts. Answer: Facts."""


class IsClean(Message, tag=21):
    """Ask whether all that is committed has been written below. Answer: Count, 1 or 0."""


class Squeeze(Message, tag=22):
    """Evict until so many bytes of memory are used. Answer: Count, of bytes given up."""

    nbytes: int


class Observe(Message, tag=23):
    """Tell what computing took. Answer: Done."""

    space: Number
    position: Number
    tokens: Number
    seconds: Seconds


class Settled(Message, tag=24):
    """Nothing of an earlier session of this process is in use any more. Answer: Done."""

    session: Token


class Bye(Message, tag=25):
    """Nothing of this session is in use any more, and it ends. Answer: Done."""


# What the daemon says.


class Welcome(Message, tag=64):
    """Who answers, and how large the memory is that comes with this: slots, generations."""

    version: Number
    incarnation: Token
    session: Token
    nbytes: int
    tenant: Text
    fetch_s: float
    populate: bool
    writable: bool


class Refused(Message, tag=65):
    """A request that cannot be, and why. `code` is one of the names below."""

    code: Text
    text: Text


class Done(Message, tag=66):
    """It is so."""


class Count(Message, tag=67):
    """A number."""

    count: int


class Which(Message, tag=68):
    """A byte for each key, 1 or 0."""

    flags: Column


class Opened(Message, tag=69):
    """A namespace: the root of its keys, and the number of each of its forms, in their order."""

    root: Key
    epoch: Number
    numbers: list[Number]


class Leased(Message, tag=70):
    """Leased blocks: slots int32 (-1: in a tier), forms uint8, generations uint32, one each.

    `forms` is the lowest bit of a form's number; empty where all are the usual one.
    """

    token: Token
    lease_s: float
    in_memory: Number
    slots: Column
    forms: Column
    generations: Column
    first: Number
    stop: Number


class Adopted(Message, tag=71):
    """A lease like another's, and what its keys were."""

    lease: Leased
    space: Number
    keys: Keys
    position: Number
    parent: Key


class Reserved(Message, tag=72):
    """Slots to fill: indices int32 of the table's keys, slots int32, held uint8 for all keys."""

    token: Token
    fill: Token
    reservation_s: float
    indices: Column
    slots: Column
    held: Column


class Facts(Message, tag=73):
    """Counts by name."""

    counts: dict[str, int]


class Fetched(Message, tag=74):
    """Where fetched blocks lie now: slots int32, generations uint32. Number: of the Fetch."""

    slots: Column
    generations: Column


class Expired(Message, tag=75):
    """The deadline of a lease or a reservation has come: say Release or Abort once it is unused."""

    token: Token


Request = (
    Hello
    | Listen
    | Open
    | Probe
    | Contains
    | Match
    | Release
    | Adopt
    | Fetch
    | Reserve
    | Commit
    | Abort
    | Corrupt
    | Keep
    | Hint
    | Pin
    | Unpin
    | Drop
    | DropAll
    | Stats
    | IsClean
    | Squeeze
    | Observe
    | Settled
    | Bye
    | Widen
)
Answer = (
    Welcome
    | Refused
    | Done
    | Count
    | Which
    | Opened
    | Leased
    | Adopted
    | Reserved
    | Facts
    | Fetched
    | Expired
)

# Why a request is refused.
VERSIONS, TENANT, SPACE, STALE, LAYOUT, BUSY, READ_ONLY, FAILED = (
    "version",
    "tenant",
    "space",
    "stale",
    "layout",
    "busy",
    "read only",
    "failed",
)


# What a decoder raises: of texts that are no UTF-8, and of what is nested too deep, not its own.
UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Wrong(ValueError):
    """Bytes that are no message: the connection ends."""


class Coder:
    """Messages to bytes and back; one for each thread.

    `frame` puts the length before a message. `request` and `answer` raise Wrong.
    """

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._requests = msgspec.msgpack.Decoder(Request)
        self._answers = msgspec.msgpack.Decoder(Answer)

    def frame(self, message: Message) -> bytearray:
        """Encode a message, its length before it."""
        data = bytearray(LENGTH_BYTES)
        self._encoder.encode_into(message, data, LENGTH_BYTES)
        data[:LENGTH_BYTES] = (len(data) - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little")
        return data

    def request(self, data: bytes | memoryview | bytearray) -> Request:
        """Decode what a client has said."""
        try:
            found: Request = self._requests.decode(data)
            return found
        except UNREADABLE as error:
            raise Wrong(str(error)) from None

    def answer(self, data: bytes | memoryview | bytearray) -> Answer:
        """Decode what a daemon has said."""
        try:
            found: Answer = self._answers.decode(data)
            return found
        except UNREADABLE as error:
            raise Wrong(str(error)) from None


def split(data: bytearray, limit: int = MESSAGE_BYTES_MAX) -> tuple[list[bytes], bytearray]:
    """Cut received bytes into whole messages, and what is left. Raises Wrong for one too long."""
    found: list[bytes] = []
    at = 0
    while len(data) - at >= LENGTH_BYTES:
        size = int.from_bytes(data[at : at + LENGTH_BYTES], "little")
        if size > limit:
            raise Wrong(f"a message of {size} bytes, at most {limit} are taken")
        if len(data) - at - LENGTH_BYTES < size:
            break
        found.append(bytes(data[at + LENGTH_BYTES : at + LENGTH_BYTES + size]))
        at += LENGTH_BYTES + size
    if at:
        del data[:at]  # what comes in small pieces is not copied for each of them
    return found, data
