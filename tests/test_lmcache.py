"""LMCache's own remote backend over the plug-in, in the environment that `.ci/sglang.sh` makes.

The checks are those of tests/serving/lmcache_storage.py, run there.
"""

from __future__ import annotations

from typing import Any

import pytest

from test_sglang import VENV, checked

CHECKS = (
    "what_is_put_is_got",
    "names_differ_by_all_that_lmcache_says",
    "partial_chunks_and_damage_are_misses",
    "wrong_settings_are_named",
)


@pytest.fixture(scope="module")
def results(require: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    require.path(f"{VENV}/kvengine-stamp", "make it with .ci/sglang.sh (about 70 s, 1.8 GB)")
    return checked("lmcache_storage.py", tmp_path_factory.mktemp("lmcache"))


@pytest.mark.slow
def test_every_check_has_run(results: dict[str, str]) -> None:
    assert tuple(results) == CHECKS


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_with_lmcaches_own_classes(results: dict[str, str], check: str) -> None:
    assert results[check] == "good", results[check]
