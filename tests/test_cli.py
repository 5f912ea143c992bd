"""The command line: what it prints, what it exits with, and that errors say what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvengine
from kvengine import cli, errors
from kvengine.config import Config
from kvengine.tenants import Tenants, sign


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVENGINE_")]:
        monkeypatch.delenv(name)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that is wrong, and give the one line that says so."""
    assert cli.run(list(arguments)) == cli.BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kvengine: ") and err.endswith("\n") and err.count("\n") == 1
    return err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == kvengine.__version__
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("demo", "config", "info"))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["bogus"], "bogus"),
        (["config", "show", "--fil", "x"], "--file"),
        (["demo", "--dtype", "float16"], "float32"),
        (["config", "check", "memm://?size=4G"], "did you mean 'mem'"),
        (["config", "check", "mem://?sise=4G"], "did you mean 'size'"),
        (["config", "show", "--set", "thread=2"], "did you mean 'threads'"),
        (["config", "show", "--set", "threads=none"], "a number of threads from 1 to 256"),
        (["config", "show", "--set", "threads"], "expected name=value"),
        (["config", "show", "--set", "threads=2", "--set", "threads=3"], "twice"),
        (["config", "show", "--file", "/nonexistent.toml"], "cannot be read"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert expected in fails(capsys, *arguments)


def test_config_show_says_where_each_value_came_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kv.toml"
    file.write_text('lease_s = 5\n[disk]\npath = "/var/cache/kv"\n')
    monkeypatch.setenv("KVENGINE_IO_THREADS", "3")
    arguments = ["config", "show", "mem://?size=5G", "--file", str(file), "--set", "threads=4"]
    assert cli.run([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["memory_bytes"] == {"value": 5 << 30, "origin": "url"}
    assert shown["threads"] == {"value": 4, "origin": "option"}
    assert shown["io_threads"] == {"value": 3, "origin": "env KVENGINE_IO_THREADS"}
    assert shown["lease_s"] == {"value": 5.0, "origin": f"file {file}"}
    assert shown["disk.path"]["value"] == "/var/cache/kv"
    assert shown["policy"]["origin"] == "default"

    assert cli.run(arguments) == 0
    table = capsys.readouterr().out
    assert "5368709120 (5G)" in table and "KVENGINE_MEMORY_BYTES" in table


def test_config_show_hides_the_secret(capsys: pytest.CaptureFixture[str]) -> None:
    secret = "5e" * 32
    for extra in ([], ["--json"]):
        assert cli.run(["config", "show", "--set", f"secret={secret}", *extra]) == 0
        shown = "".join(capsys.readouterr())
        assert "hidden" in shown and secret not in shown
    assert secret[2:] not in fails(capsys, "config", "check", "--set", f"secret={secret[2:]}")


def test_config_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = f"mem://?size=1G | file://{tmp_path}/not/made/yet"
    assert cli.run(["config", "check", url]) == 0
    count = len(Config.load(environ={})[1])
    assert capsys.readouterr().out == f"ok: {count} settings, 2 of them given\n"
    assert list(tmp_path.iterdir()) == []  # looked at, not made
    (tmp_path / "not").write_text("a file")
    assert "is not a directory" in fails(capsys, "config", "check", url)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kvengine"] == kvengine.__version__
    assert facts["numpy"] is not None
    assert cli.run(["info"]) == 0
    assert "loops" in capsys.readouterr().out


def test_an_engine_error_is_said_and_exits_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvengine import demo

    def refuse(**_: object) -> int:
        raise errors.ModelNotSupported("given a, expected b: do c")

    monkeypatch.setattr(demo, "run", refuse)
    assert fails(capsys, "demo") == "kvengine: given a, expected b: do c\n"


def test_demo_gets_its_options_and_gives_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvengine import demo

    given: dict[str, object] = {}

    def record(**options: object) -> int:
        given.update(options)
        return 1

    monkeypatch.setattr(demo, "run", record)
    assert cli.run(["demo", "--model", "m", "--dtype", "bfloat16", "--json"]) == 1
    assert given == {"model": "m", "dtype": "bfloat16", "directory": None, "as_json": True}


def test_interrupt_exits_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvengine import demo

    def interrupt(**_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert cli.run(["demo"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "kvengine: interrupted\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m kvengine.cli config show | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_installed_command_is_this_one() -> None:
    command = Path(sys.executable).with_name("kvengine")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, kvengine.__version__)


def test_tenants_are_added_listed_changed_and_dropped(capsys, tmp_path: Path) -> None:
    home = str(tmp_path)
    assert "start `kvengine serve` once" in fails(capsys, "tenants", "list", home + "/no")
    add = ["tenants", "add", home, "acme", "--users", "1001", "--reserved", "1G", "--saves", "100M"]
    assert cli.run(add) == 0
    key = bytes.fromhex(capsys.readouterr().out.strip())
    assert cli.run(["tenants", "add", home, "front", "--gateway", "--serves", "acme"]) == 0
    gateway = bytes.fromhex(capsys.readouterr().out.strip())
    assert cli.run(["tenants", "quota", home, "acme", "--maximum", "2G", "--saves", "none"]) == 0
    assert cli.run(["tenants", "list", home, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["gateways"] == ["front"]
    acme = next(row for row in shown["tenants"] if row["name"] == "acme")
    assert (acme["reserved_bytes"], acme["maximum_bytes"]) == (1 << 30, 2 << 30)
    assert acme["saved_bytes_per_s"] is None and not acme["public"]
    assert cli.run(["tenants", "list", home]) == 0
    table = capsys.readouterr().out
    assert "acme" in table and "gateway front" in table
    found = Tenants(tmp_path / "tenants.json")
    assert found.admits("acme", 5, key, 0.0) == found.admits("acme", 1001, b"", 0.0) == "rw"
    assert found.admits("acme", 5, sign(gateway, "acme", 9.0), 0.0) == "rw"
    for wrong, expected in (
        (["tenants", "add", home, "acme"], "already"),
        (["tenants", "add", home, "Acme!"], "a tenant's name is"),
        (["tenants", "add", home, "b", "--users", "x"], "numbers of users"),
        (["tenants", "quota", home, "acme", "--reserved", "lots"], "expected a number above 0"),
        (["tenants", "quota", home, "acme", "--weight", "0"], "expected a number above 0"),
        (["tenants", "quota", home, "acme", "--maximum", "1M"], "reserve no more"),
        (["tenants", "quota", home, "other", "--maximum", "1M"], "no tenant 'other'"),
        (["tenants", "drop", home, "default"], "stays"),
    ):
        assert expected in fails(capsys, *wrong)
    assert cli.run(["tenants", "drop", home, "acme"]) == 0
    assert found.reload() and found.names() == ["default"]


def test_an_epoch_is_bumped(capsys, tmp_path: Path) -> None:
    assert cli.run(["tenants", "add", str(tmp_path), "acme"]) == 0
    capsys.readouterr()
    for arguments, expected in ([], "1"), (["--model", "m"], "2"), ([], "2"):
        assert cli.run(["epoch", "bump", str(tmp_path), "acme", *arguments]) == 0
        assert capsys.readouterr().out == expected + "\n"
    assert Tenants(tmp_path / "tenants.json").epoch("acme", "m") == 3
