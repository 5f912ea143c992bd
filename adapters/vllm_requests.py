"""What a vLLM request computes beside its tokens: LoRA weights and media, by their content.

vLLM's hashes cover the tokens, the salt, prompt embeddings (by their bytes), media (by a hash, or
by a name that the client has chosen) and a LoRA adapter by name and path. The last two are not
enough for blocks that outlive the process: here an adapter gets the digest of its files, and a
request with media under a chosen name is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

# Hex of BLAKE3, SHA-256 or SHA-512: what vLLM computes of the media themselves.
CONTENT = re.compile(r"[0-9a-f]{64}([0-9a-f]{64})?")
SUFFIXES = (".safetensors", ".bin", ".pt", ".json")
ADAPTERS_MAX = 1024


class Unnamed(Exception):
    """Nothing tells the content of a request apart from another's: its blocks are not kept."""


@dataclass(slots=True)
class Adapters:
    """Digests of LoRA adapters by vLLM's number, taken when one is first asked for.

    `settings` is what else a LoRA computation depends on. vLLM loads an adapter once and may read
    its files again later: where they have changed since the digest, nobody knows what it has.
    """

    settings: str = ""
    _known: dict[int, tuple[str, str, str]] = field(default_factory=dict)

    def digest(self, lora: Any) -> str:
        """Return the digest of an adapter's files; "" for none. Raises Unnamed."""
        if lora is None:
            return ""
        place = Path(lora.lora_path)
        if not place.is_dir():
            raise Unnamed(f"the adapter {lora.lora_name!r} is no local folder: {lora.lora_path}")
        files = sorted(file for file in place.rglob("*") if file.suffix in SUFFIXES)
        state = repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
        known = self._known.get(lora.lora_int_id)
        if known is not None and not lora.load_inplace:
            if known[:2] != (str(place), state):
                raise Unnamed(f"the files of adapter {lora.lora_name!r} have changed in {place}")
            return known[2]
        if len(self._known) >= ADAPTERS_MAX:
            raise Unnamed(f"more than {ADAPTERS_MAX} adapters")
        digest = blake3(self.settings.encode())
        for file in files:
            digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
        self._known[lora.lora_int_id] = (str(place), state, digest.hexdigest())
        return self._known[lora.lora_int_id][2]


def check_media(request: Any) -> None:
    """Raise Unnamed where an image, sound or video has a name that is not its content's."""
    for feature in request.mm_features or ():
        name = feature.mm_hash or feature.identifier.rpartition(":")[2]
        if not CONTENT.fullmatch(name):
            raise Unnamed(f"media are named {name!r}, which is no hash of their content")
