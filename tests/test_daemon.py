"""The daemon and its clients, as processes: what one saves another loads, and nobody wedges."""

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvengine
import rig

ONE = rig.layout()


class Daemon:
    """`kvengine serve` as a process of its own."""

    def __init__(self, folder: Path, url: str = "mem://?size=4M", *more: str) -> None:
        self.socket = folder / "kv.sock"
        self.url = f"unix://{self.socket}?timeout_s=20"  # the machine may be busy
        self._command = [sys.executable, "-m", "kvengine.cli", "serve", url]
        self._command += ["--socket", str(self.socket), "--http", "0", *more]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        said = self.process.stdout.readline()
        assert said.startswith("serving unix://"), said + self.process.stderr.read()
        self.http = said.split()[-1]

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        _, errors = self.process.communicate(timeout=30)
        assert not errors, errors
        return self.process.returncode

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.http + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    found = Daemon(tmp_path)
    yield found
    if found.process.poll() is None:
        assert found.stop() == 0


def test_what_one_process_saves_another_loads(daemon):
    code = (
        "import sys, rig, kvengine\n"
        "with kvengine.open(sys.argv[1]) as engine:\n"
        "    keys = rig.names(engine, rig.layout()).keys(rig.prompt(8, rig.layout()))\n"
        "    assert rig.save(engine, keys, rig.caches(rig.layout(), 8, seed=1)).good.all()\n"
    )
    done = rig.python(code, daemon.url)
    assert done.returncode == 0, done.stderr
    with kvengine.open(daemon.url) as engine:
        keys = rig.names(engine, ONE).keys(rig.prompt(8, ONE))
        assert engine.probe(keys) == 8 and engine.contains(keys).all()
        assert rig.check_right(engine, keys, rig.caches(ONE, 8, seed=1)).all()
        stats = engine.stats()
        assert (stats["saved_blocks"], stats["memory_blocks"], stats["leases"]) == (8, 8, 0)
