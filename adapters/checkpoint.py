"""Names for weights in local files: part of every key where no hub's commit is known."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

SMALL_BYTES = 1 << 20


def files_revision(place: Path) -> str:
    """Return a fingerprint of a file, or of all files of a folder.

    It covers names, sizes and times, and the bytes of small files: a copy with other times is
    another revision (a cold start, never a wrong byte). Raises OSError for what cannot be read.
    """
    digest = blake3()
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if file.is_file():
            stat = file.stat()
            name = file.relative_to(place if place.is_dir() else place.parent)
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
            if stat.st_size <= SMALL_BYTES:
                digest.update(file.read_bytes())
    return f"files:{digest.hexdigest()}"
