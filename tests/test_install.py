"""What a plain `pip install kvengine` brings."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOWNLOADS_BYTES_MAX = 30_000_000
BASE = {
    "numpy",
    "pyzmq",
    "msgspec",
    "blake3",
    "xxhash",
    "prometheus-client",
    "cyclopts",
    "rich",
}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_base_dependencies_are_the_few_that_were_chosen():
    assert {line.partition(">")[0] for line in project()["dependencies"]} == BASE


def test_only_demo_and_test_pin_torch():
    extras = project()["optional-dependencies"]
    assert {name for name, lines in extras.items() if "torch==2.13.0" in lines} == {"demo", "test"}
    wanted = {
        "torch",
        "jax",
        "gpu",
        "cpu",
        "demo",
        "peers",
        "s3",
        "valkey",
        "etcd",
        "bench",
        "test",
    }
    assert wanted <= set(extras)


@pytest.mark.timeout(280)
def test_base_install_is_small(tmp_path, require, capsys):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--dest", tmp_path, ROOT],
        capture_output=True,
        text=True,
        timeout=270,
    )
    if done.returncode and "No matching distribution" in done.stderr:
        require.missing(f"needs a package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    # Of a local directory pip keeps no file: its own wheel would weigh less than its sources.
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    files["kvengine"] = sum(
        path.stat().st_size
        for folder in ("kvengine", "kernels", "adapters")
        for path in (ROOT / folder).rglob("*.py")
    )
    total = sum(files.values())
    with capsys.disabled():
        print(f"\nbase install: {total / 1e6:.1f} MB in {len(files)} files")
    assert any(name.startswith("numpy-") for name in files)
    assert total <= DOWNLOADS_BYTES_MAX, sorted(files.items(), key=lambda item: -item[1])
