"""Real vLLM, in an environment of its own (`.ci/vllm.sh`), over an engine with a directory.

Each run is a process: vLLM alone, vLLM that fills the directory, vLLM that finds it filled, and
vLLM that finds a part of it damaged. All must generate the same tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
VENV = ".venv-vllm"
SCRIPTS = ROOT / "tests" / "serving"
PROMPT_TOKENS = [950, 957, 964, 971]
TIMEOUT_S = 120.0
FLIP_STEP = 1 << 20


@dataclass
class Runner:
    """Runs a script of tests/serving with vLLM's Python."""

    python: Path
    folder: Path

    def __call__(self, script: str, *arguments: str | Path) -> str:
        """Return the output. Fails the test with its end where the script fails."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("KVENGINE_")
        }
        # The numba of this environment would share, and each time replace, the cache of the other.
        environment["NUMBA_CACHE_DIR"] = str(self.python.parent.parent / "numba-cache")
        command = [self.python, SCRIPTS / script, *arguments]
        done = subprocess.run(
            [str(word) for word in command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        if done.returncode:
            pytest.fail(f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        return done.stdout

    def result(self, script: str, *arguments: str | Path) -> dict[str, Any]:
        """Return what the script says in its last line."""
        line = self(script, *arguments).strip().splitlines()[-1]
        found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
        return found


@dataclass
class Vllm:
    """A model, what vLLM alone makes of it, and a directory that one run has filled."""

    run: Runner
    model: Path
    directory: Path
    alone: dict[str, Any]
    first: dict[str, Any]

    @property
    def url(self) -> str:
        return f"mem://?size=64M | file://{self.directory}?size=1G"

    def generate(self) -> dict[str, Any]:
        """Run once more on the directory. The model's folder may be named in another way."""
        model = self.model.relative_to(self.run.folder) if self.first else self.model
        return self.run.result("vllm_generate.py", model, "--url", self.url)


@pytest.fixture(scope="module")
def run(require: Any, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    require.path(f"{VENV}/kvengine-stamp", "make it with .ci/vllm.sh (about 90 s, 3.5 GB)")
    return Runner(ROOT / VENV / "bin" / "python", tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def vllm(run: Runner) -> Iterator[Vllm]:
    model, directory = run.folder / "model", run.folder / "kv"
    run("tiny_model.py", model)
    alone = run.result("vllm_generate.py", model)
    found = Vllm(run, model, directory, alone, {})
    found.first = found.generate()
    yield found


def column(result: dict[str, Any], name: str) -> list[Any]:
    return [request[name] for request in result["requests"]]


def test_halves(run: Runner) -> None:
    """What needs vLLM's classes and no model: misses, failed loads, errors, resets, refusals."""
    results = run.result("vllm_halves.py")
    assert {name: error for name, error in results.items() if error != "good"} == {}
    assert len(results) == 9


def test_first_process_computes_all(vllm: Vllm) -> None:
    assert column(vllm.first, "prompt") == PROMPT_TOKENS
    assert column(vllm.first, "tokens") == column(vllm.alone, "tokens")
    assert column(vllm.first, "prefilled") == column(vllm.alone, "prefilled")
    assert column(vllm.first, "prefilled")[0] == PROMPT_TOKENS[0]
    assert len(set(map(tuple, column(vllm.alone, "tokens")))) == len(PROMPT_TOKENS)


def test_second_process_skips_the_prefix(vllm: Vllm) -> None:
    began = time.monotonic()
    second = vllm.generate()
    for request in second["requests"]:
        print("{cached}/{prompt} tokens cached, {prefilled} prefilled".format(**request))
    print(f"from {second['counters']}, {time.monotonic() - began:.1f} s")
    assert column(second, "tokens") == column(vllm.alone, "tokens")
    assert column(second, "cached") == [928, 928, 960, 960]  # whole blocks of 32 tokens
    assert column(second, "prefilled") == [22, 29, 4, 11]
    assert second["counters"]["disk"] == 928 + 32 + 32 + 96
    assert "kvengine_errors" not in second["counters"]


def test_damaged_blocks_are_computed(vllm: Vllm) -> None:
    """Flip a bit of every MiB of the directory: what does not verify is computed anew."""
    for file in vllm.directory.rglob("*.seg"):
        with file.open("r+b") as segments:
            for place in range(FLIP_STEP, file.stat().st_size, FLIP_STEP):
                segments.seek(place)
                (byte,) = segments.read(1)
                segments.seek(place)
                segments.write(bytes([byte ^ 1]))
    damaged = vllm.generate()
    assert column(damaged, "tokens") == column(vllm.alone, "tokens")
    assert PROMPT_TOKENS[0] > column(damaged, "prefilled")[0] > 22
    assert damaged["counters"].get("kvengine_errors", 0) == 0
