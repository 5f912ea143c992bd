"""What every test gets: optional needs by name, a watch for leaks, and one hypothesis profile."""

import gc
import importlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SETTLE_S = 5.0

hypothesis.settings.register_profile("kvengine", deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("kvengine")


class Require:
    """Name what a test needs. What is missing skips the test, or fails it where all must be there.

    `KVENGINE_REQUIRE_ALL=1` turns every skip but that of `shared` into a failure.
    """

    def __init__(self, everything: bool) -> None:
        self.everything = everything

    def __call__(self, name: str) -> ModuleType:
        """Import the module `name`."""
        try:
            return importlib.import_module(name)
        except ImportError as error:
            self.missing(f"needs the module {name}: {error}")

    def program(self, name: str) -> str:
        """Give the path of the program `name`."""
        found = shutil.which(name)
        if found is None:
            self.missing(f"needs the program {name}, which is not on PATH")
        return found

    def path(self, path: str | Path, hint: str) -> Path:
        """Give `path`, relative to the repository, which `hint` says how to make."""
        found = ROOT / path
        if not found.exists():
            self.missing(f"needs {path}: {hint}")
        return found

    def shared(self, path: str) -> Path:
        """Give the file `path` of the folder shared/ beside the repository; may always skip."""
        found = SHARED / path
        if not found.exists():
            pytest.skip(f"needs ../shared/{path}")
        return found

    def missing(self, reason: str) -> NoReturn:
        """Skip for `reason`, or fail where all must be there."""
        if self.everything:
            pytest.fail(f"KVENGINE_REQUIRE_ALL is set, and this test {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def require() -> Require:
    return Require(os.environ.get("KVENGINE_REQUIRE_ALL") == "1")


def running() -> set[threading.Thread]:
    """Threads that would outlive their test: all that keep the process alive, and all of ours."""
    return {
        thread
        for thread in threading.enumerate()
        if not thread.daemon or thread.name.startswith("kvengine")
    }


def open_files() -> dict[int, str]:
    """Descriptors of regular files, memfds and sockets; pipes and devices belong to libraries."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the descriptor of the listing itself
        if not target.startswith(("pipe:", "anon_inode:", "/dev/", "/proc/", "/sys/")):
            found[int(name)] = target
    return found


def leaked(threads: set[threading.Thread], files: dict[int, str]) -> list[str]:
    left = [f"thread {thread.name}" for thread in running() - threads]
    now = open_files()
    return left + [f"file {fd} {now[fd]}" for fd in now if files.get(fd) != now[fd]]


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a thread or an open file; `@pytest.mark.leaks(reason)` lets it."""
    if request.node.get_closest_marker("leaks") or not Path("/proc/self/fd").is_dir():
        yield
        return
    threads, files = running(), open_files()
    yield
    if not leaked(threads, files):
        return
    gc.collect()
    deadline = time.monotonic() + SETTLE_S
    while left := leaked(threads, files):
        if time.monotonic() > deadline:
            pytest.fail("left behind: " + ", ".join(left), pytrace=False)
        time.sleep(0.01)
