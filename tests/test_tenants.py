"""kvengine.tenants: a secret and an epoch that outlive the process, and nobody else reads."""

import json
import os
import stat
from pathlib import Path

import pytest

from kvengine.errors import ConfigError
from kvengine.tenants import DEFAULT, Quota, Tenants, sign

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


NOBODY = 1 << 20  # a user that no tenant names


def test_a_tenant_is_added_changed_and_removed(path):
    tenants = Tenants(path)
    quota = Quota(reserved_bytes=1 << 20, weight=2.0)
    key = tenants.add("acme", users=(1001,), quota=quota)
    assert len(key) == 32 and tenants.names() == ["acme", DEFAULT]
    assert key.hex() not in path.read_text(), "only its digest is kept"
    again = Tenants(path)
    assert again.quota("acme") == quota and again.quota() == Quota()
    assert again.secret("acme") == tenants.secret("acme") != again.secret()
    again.set_quota("acme", Quota(maximum_bytes=5))
    assert tenants.quota("acme") == quota and tenants.reload() and not tenants.reload()
    assert tenants.quota("acme") == Quota(maximum_bytes=5)
    tenants.remove("acme")
    assert again.reload() and again.names() == [DEFAULT]
    with pytest.raises(ConfigError, match="no tenant 'acme'"):
        again.secret("acme")
    first = tenants.secret(DEFAULT)
    tenants.add("acme")
    assert tenants.secret("acme") != first


def test_changes_of_two_processes_are_both_kept(path):
    one, two = Tenants(path), Tenants(path)
    one.add("a")
    two.add("b")
    two.raise_epoch("a")
    one.raise_epoch("a")
    assert Tenants(path).names() == ["a", "b", DEFAULT] and Tenants(path).epoch("a") == 2


@pytest.mark.parametrize("name", ["", "A", "-a", "a/b", "../a", "a" * 65, "a\n", "\xe9"])
def test_a_malformed_name_is_refused(path, name):
    with pytest.raises(ConfigError, match="a tenant's name is"):
        Tenants(path).add(name)


def test_what_cannot_be_is_refused(path):
    tenants = Tenants(path)
    tenants.add("acme")
    with pytest.raises(ConfigError, match="'acme' already"):
        tenants.add("acme")
    with pytest.raises(ConfigError, match="reserve no more"):
        tenants.set_quota("acme", Quota(reserved_bytes=2, maximum_bytes=1))
    with pytest.raises(ConfigError, match="stays"):
        tenants.remove(DEFAULT)
    with pytest.raises(ConfigError, match="no tenant or gateway 'other'"):
        tenants.remove("other")
    with pytest.raises(ConfigError, match="'acme' is no gateway"):
        tenants.ticket("acme", DEFAULT, 1e9)


def test_epochs_of_a_model_and_of_the_tenant_only_rise(path):
    tenants = Tenants(path)
    seen = [tenants.epoch(model="m")]
    for model in ("m", "", "m", "", ""):
        before, other = tenants.epoch(model="m"), tenants.epoch(model="n")
        tenants.raise_epoch(model=model)
        seen.append(tenants.epoch(model="m"))
        assert seen[-1] > before
        assert (tenants.epoch(model="n") == other) == (model == "m")
    assert len(set(seen)) == len(seen)
    assert Tenants(path).epoch(model="m") == seen[-1]


def test_who_is_admitted(path):
    tenants = Tenants(path)
    key = tenants.add("acme", users=(NOBODY - 1,))
    other = tenants.add("other")
    gateway = tenants.add("front", gateway=True, serves=("acme",))
    anyone = tenants.add("open", gateway=True)
    assert tenants.gateways() == ["front", "open"]
    assert tenants.admits(DEFAULT, os.getuid(), b"", 0.0) == "rw"
    assert tenants.admits(DEFAULT, NOBODY, b"", 0.0) == ""
    assert tenants.admits("acme", NOBODY - 1, b"", 0.0) == "rw"
    assert tenants.admits("acme", os.getuid(), b"", 0.0) == ""
    assert tenants.admits("acme", NOBODY, key, 0.0) == "rw"
    assert tenants.admits("acme", NOBODY, other, 0.0) == ""
    assert tenants.admits("nobody", NOBODY, key, 0.0) == ""
    assert tenants.admits("front", NOBODY, gateway, 0.0) == "", "a gateway is no tenant"
    ticket = tenants.ticket("front", "acme", 100.0)
    assert ticket == sign(gateway, "acme", 100.0)
    assert tenants.admits("acme", NOBODY, ticket, 99.0) == "rw"
    assert tenants.admits("acme", NOBODY, ticket, 100.0) == "", "it has ended"
    assert tenants.admits("other", NOBODY, ticket, 99.0) == "", "of another tenant"
    assert tenants.admits("other", NOBODY, sign(gateway, "other", 100.0), 99.0) == ""
    assert tenants.admits("other", NOBODY, sign(anyone, "other", 100.0), 99.0) == "rw"
    for at in range(len(ticket)):
        forged = bytearray(ticket)
        forged[at] ^= 1
        assert tenants.admits("acme", NOBODY, bytes(forged), 0.0) == ""
    tenants.remove("front")
    assert tenants.admits("acme", NOBODY, ticket, 99.0) == ""


def test_everyone_reads_what_is_public_and_its_owner_writes(path):
    tenants = Tenants(path)
    key = tenants.add("shared", public=True)
    assert tenants.is_public("shared") and not tenants.is_public(DEFAULT)
    assert tenants.admits("shared", NOBODY, b"", 0.0) == "r"
    assert tenants.admits("shared", NOBODY, key, 0.0) == "rw"
