"""kvengine.tenants: a secret and an epoch that outlive the process, and nobody else reads."""

import json
import os
import stat
from pathlib import Path

import pytest

from kvengine.errors import ConfigError
from kvengine.tenants import DEFAULT, Tenants

SECRET = bytes(range(32))
GOOD = {DEFAULT: {"secret": SECRET.hex(), "epoch": 3}}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tenants.json"


def test_secret_and_epoch_are_kept(path):
    one = Tenants(path)
    assert len(one.secret()) == 32 and one.epoch() == 0
    two = Tenants(path)
    assert two.secret() == one.secret() and two.epoch() == 0
    assert two.raise_epoch() == 1 and two.raise_epoch() == 2 and two.epoch() == 2
    assert Tenants(path).epoch() == 2 and Tenants(path).secret() == one.secret()
    assert os.listdir(path.parent) == [path.name]


def test_a_kept_file_is_read(path):
    path.write_text(json.dumps(GOOD | {"other": {"secret": "ab" * 32, "epoch": 1}}))
    tenants = Tenants(path)
    assert tenants.secret() == SECRET and tenants.epoch(DEFAULT) == 3
    assert tenants.secret("other") == b"\xab" * 32 and tenants.epoch("other") == 1
    tenants.raise_epoch()
    assert Tenants(path).epoch() == 4 and Tenants(path).epoch("other") == 1


def test_secrets_are_random(path):
    assert len({Tenants().secret() for _ in range(8)} | {Tenants(path).secret()}) == 9


def test_in_memory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tenants = Tenants()
    assert tenants.raise_epoch() == 1 and tenants.epoch() == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_owner_reads_the_file(path, umask):
    before = os.umask(umask)
    try:
        tenants = Tenants(path)
        assert mode(path) == 0o600
        tenants.raise_epoch()
        assert mode(path) == 0o600
    finally:
        os.umask(before)


def test_a_file_that_a_crash_left_does_not_open_the_secret_to_others(path):
    left = path.with_suffix(".new")
    left.write_text("half a record")
    left.chmod(0o644)
    tenants = Tenants(path)
    assert mode(path) == 0o600 and not left.exists()
    assert Tenants(path).secret() == tenants.secret()


def test_a_failed_write_leaves_the_kept_record(path, monkeypatch):
    tenants = Tenants(path)
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        tenants.raise_epoch()
    assert path.read_bytes() == before


def test_a_given_secret_wins(path):
    kept = Tenants(path).secret()
    assert Tenants(path, SECRET).secret() == SECRET != kept
    assert Tenants(path).secret() == kept
    assert SECRET.hex() not in path.read_text()
    assert Tenants(secret=SECRET).secret() == SECRET


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33), SECRET.hex().encode()])
def test_a_given_secret_of_another_length_is_refused(path, secret):
    with pytest.raises(ConfigError, match=f"32 bytes .*got {len(secret)} bytes"):
        Tenants(path, secret)
    assert not path.exists()


def record(**changes: object) -> bytes:
    return json.dumps({DEFAULT: GOOD[DEFAULT] | changes}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 64,
        b"not json",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"text"',
        b'{"default": 5}',
        b'{"default": {}}',
        json.dumps(GOOD).encode()[:-1],
        json.dumps(GOOD).encode() + b"x",
        json.dumps({DEFAULT: {"secret": SECRET.hex()}}).encode(),
        json.dumps({DEFAULT: {"epoch": 1}}).encode(),
        json.dumps({"version": 1, "tenants": GOOD}).encode(),
        record(secret=""),
        record(secret=SECRET.hex()[:-2]),
        record(secret=SECRET.hex() + "00"),
        record(secret="x" * 64),
        record(secret=5),
        record(secret=None),
        record(epoch="1"),
        record(epoch=1.5),
        record(epoch=-1),
        record(epoch=None),
        record(quota=5),
    ],
    ids=lambda content: repr(content)[:40],
)
def test_a_damaged_file_is_named_and_kept(path, content):
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Tenants(path)
    said = str(caught.value)
    assert said.startswith(f"{path} is damaged (") and "remove it to start" in said
    assert path.read_bytes() == content
    assert SECRET.hex()[:16] not in said


def test_every_cut_of_a_file_is_noticed(path):
    Tenants(path)
    whole = path.read_bytes()
    for size in range(len(whole.rstrip())):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="is damaged"):
            Tenants(path)
    path.write_bytes(whole)
    assert len(Tenants(path).secret()) == 32
