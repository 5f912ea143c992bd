"""Listen to vLLM's KV events, and write down what `kvengine.formats` reads: hashes, never a token.

vLLM publishes what its cache stores over ZeroMQ (`--kv-events-config '{"enable_kv_cache_events":
true, "publisher": "zmq"}'`): a topic, a number that counts up, and a batch in msgpack. Of a batch
this keeps the time and which blocks were stored after which; tokens and extra keys are left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from kvengine.errors import ConfigError

POLL_S = 0.2
ROW = ("type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium")


@dataclass
class Heard:
    """What was written down; `missed` batches were published and did not arrive."""

    batches: int = 0
    blocks: int = 0
    missed: int = 0
    malformed: int = 0


def listen(
    endpoint: str,
    to: Path,
    seconds: float | None = None,
    progress: Callable[[Heard], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Heard:
    """Write batches of an endpoint (tcp://127.0.0.1:5557) to a new file, a line each.

    Ends after `seconds`, or with KeyboardInterrupt, which is not raised. A batch that is none is
    counted. Raises ConfigError where the endpoint or the file cannot be had.
    """
    heard, after = Heard(), -1
    end = float("inf") if seconds is None else clock() + seconds
    encoder = msgspec.json.Encoder()
    context = zmq.Context()
    socket = context.socket(zmq.SUB)
    try:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(endpoint)
        handle = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(handle, "wb") as stream:
            while (left := end - clock()) > 0:
                if not socket.poll(int(1000 * min(POLL_S, left))):
                    stream.flush()
                    continue
                number, batch = _batch(socket.recv_multipart())
                heard.missed += max(0, number - after - 1) if after >= 0 else 0
                after = max(after, number)
                if batch is None:
                    heard.malformed += 1
                    continue
                heard.batches += 1
                heard.blocks += sum(len(event.block_hashes) for event in batch.events)
                stream.write(encoder.encode(batch) + b"\n")
                if progress is not None:
                    progress(heard)
    except KeyboardInterrupt:
        pass
    except zmq.ZMQError as error:
        raise ConfigError(
            f"{endpoint}: {error}; expected where vLLM publishes, as in tcp://127.0.0.1:5557"
        ) from None
    except OSError as error:
        raise ConfigError(f"{to}: cannot be written: {error.strerror}") from None
    finally:
        context.destroy(linger=0)
    return heard


class _Stored(msgspec.Struct, tag="BlockStored"):
    """What is kept of an event: hashes as text or numbers, nothing to tell a token by."""

    block_hashes: list[int | str]
    parent_block_hash: int | str | None
    block_size: int
    medium: str | None = None
    group_idx: int | None = None


class _Batch(msgspec.Struct):
    ts: float
    events: list[_Stored]


def _batch(parts: list[bytes]) -> tuple[int, _Batch | None]:
    """Return a message's number and what is kept of its batch; None for what is no batch."""
    if len(parts) != 3 or len(parts[1]) != 8:
        return -1, None
    number = int.from_bytes(parts[1], "big")
    try:
        found = msgspec.msgpack.decode(parts[2])
        if isinstance(found, list):  # versions that send arrays
            found = {
                "ts": found[0],
                "events": [dict(zip(ROW, event, strict=False)) for event in found[1]],
            }
        stored = [_kept(event) for event in found["events"] if event["type"] == "BlockStored"]
        return number, _Batch(float(found["ts"]), stored)
    except (msgspec.DecodeError, LookupError, TypeError, ValueError):
        return number, None


def _kept(event: dict[str, object]) -> _Stored:
    hashes, above = event["block_hashes"], event["parent_block_hash"]
    if not isinstance(hashes, list):
        raise TypeError
    named = {"block_hashes": [_shown(each) for each in hashes], "parent_block_hash": _shown(above)}
    return msgspec.convert(event | named, _Stored)


def _shown(name: object) -> object:
    return name.hex() if isinstance(name, bytes) else name
