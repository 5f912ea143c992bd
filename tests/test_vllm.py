"""Real vLLM, in an environment of its own (`.ci/vllm.sh`), over an engine with a directory.

Each run is a process: vLLM alone, vLLM that fills the directory, vLLM that finds it filled, and
vLLM that finds a part of it damaged; and some with many cases in one vLLM, with LoRA and a paged
cache so small that requests are preempted. All must generate the same tokens.
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

    def result(self, script: str, *arguments: str | Path) -> Any:
        """Return what the script says in its last line."""
        line = self(script, *arguments).strip().splitlines()[-1]
        return json.loads(line.removeprefix("RESULT "))


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
    assert len(results) == 20


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


ALONE = ("crowd", "shared", "first", "second")


@dataclass
class Cases:
    """What `vllm_cases.py` says of a model with two LoRA adapters beside it."""

    run: Runner
    model: Path
    alone: dict[str, Any]

    def __call__(self, mode: str, url: str) -> dict[str, Any]:
        found: dict[str, Any] = self.run.result("vllm_cases.py", mode, self.model, url)
        return found


@pytest.fixture(scope="module")
def cases(run: Runner, vllm: Vllm) -> Cases:
    for seed, name in enumerate(ALONE[2:]):
        run("tiny_lora.py", vllm.model.parent / name, str(seed))
    return Cases(run, vllm.model, run.result("vllm_cases.py", "alone", vllm.model))


@pytest.mark.parametrize("mode", ["cases", "by_layer"])
def test_cases_in_one_vllm(cases: Cases, mode: str) -> None:
    """Preemption, LoRA, salts, failed loads, and an error in every function of ours, one by one."""
    found = cases(mode, "mem://?size=64M")
    alone = cases.alone
    errors = found.pop("errors")
    assert len(errors) > 80
    assert {name for name, tokens in errors.items() if tokens != alone["shared"]} == set()
    assert found.pop("leases") == 0
    assert found.pop("told") == ["CPU", "GPU"]
    for name, case in found.items():
        assert case["tokens"] == alone.get(name.split(",")[0], alone["shared"]), name
    computed = {name: case["computed"] for name, case in found.items()}
    assert computed.pop("crowd, cold") == 8 * 300
    assert computed.pop("crowd, warm") == 8 * (300 % 32)
    assert computed.pop("no load") == computed.pop("no lease") == 320
    shared = {"cold": 32, "warm": 1}  # the second of two prompts that share all but their ends
    for name in ("shared", "first", "second"):
        for temperature, tokens in shared.items():
            assert computed.pop(f"{name}, {temperature}") == tokens
    assert (computed.pop("salt one 0"), computed.pop("salt two 1")) == (32, 32)
    assert set(computed.values()) == {1}
    assert found["crowd, cold"]["preemptions"] > 0


def test_two_connectors_over_a_filled_directory(cases: Cases, tmp_path: Path) -> None:
    url = f"mem://?size=64M | file://{tmp_path}?size=1G"
    cold = cases("multi", url)
    warm = cases("multi", url)
    for name in ALONE:
        assert cold[name] == warm[name] == cases.alone[name]
    assert cold["computed"] == cases.alone["computed"] | {"shared": 32, "first": 32, "second": 32}
    assert warm["computed"] == {"crowd": 8 * (300 % 32), "shared": 1, "first": 1, "second": 1}


@pytest.mark.parametrize("load", ["between_steps", "by_layer"])
def test_aborted_and_preempted_requests_leave_nothing(vllm: Vllm, load: str) -> None:
    """vLLM's scheduler without a model: by hand with 10000 in the place of 2000."""
    found = vllm.run.result("vllm_aborts.py", vllm.model, "2000", load)
    assert (found["leases"], found["asked"], found["held"]) == (0, 0, 0)
    assert found["aborted"] > 150 and found["preempted"] > 5 and found["failed_loads"] > 5
    assert found["hits"] > 300 and found["compared"] > 5_000


def test_windows_are_loaded(run: Runner) -> None:
    """Full attention and a window: of the window's layers only the last blocks are loaded."""
    model = run.folder / "windows"
    run("tiny_model.py", model, "windows")
    alone = run.result("vllm_windows.py", model)
    found = run.result("vllm_windows.py", model, "mem://?size=64M")
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in alone]
    assert [computed for _, computed in alone] == [320] * 6
    assert [computed for _, computed in found] == [320, 32, 32, 32, 320, 32]
