"""SGLang's own base class, factory and host pools, in an environment of their own.

`.ci/sglang.sh` makes it. The checks are those of tests/serving/sglang_storage.py, run there.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
VENV = ".venv-sglang"
CHECKS = (
    "mha_pages_fit_every_layout",
    "k_and_v_may_differ",
    "latents_fit_every_layout",
    "bytes_move_once_each_way",
    "pages_through_tensors",
    "parts_are_shared_by_parallel_degrees",
    "processes_of_a_host_share_a_daemon",
    "latents_have_one_writer",
    "several_pools_at_once",
    "faults_are_misses",
    "planted_exceptions_are_misses",
    "what_cannot_be_told_apart_is_refused",
    "facts_change_the_names",
)


def checked(script: str, folder: Path) -> dict[str, str]:
    """Run a script of tests/serving with that environment's Python; return what it found."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("KVENGINE_")
    }
    # The numba of this environment would share, and each time replace, the cache of the other.
    environment["NUMBA_CACHE_DIR"] = str(ROOT / VENV / "numba-cache")
    done = subprocess.run(
        [ROOT / VENV / "bin" / "python", ROOT / "tests" / "serving" / script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    line = done.stdout.strip().splitlines()[-1]
    found: dict[str, str] = json.loads(line.removeprefix("RESULT "))
    return found


@pytest.fixture(scope="module")
def results(require: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    require.path(f"{VENV}/kvengine-stamp", "make it with .ci/sglang.sh (about 70 s, 1.8 GB)")
    return checked("sglang_storage.py", tmp_path_factory.mktemp("sglang"))


@pytest.mark.slow
def test_every_check_has_run(results: dict[str, str]) -> None:
    assert tuple(results) == CHECKS


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_with_sglangs_own_classes(results: dict[str, str], check: str) -> None:
    assert results[check] == "good", results[check]
