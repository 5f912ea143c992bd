"""The rules that hold the architecture up, each a function from a tree to what breaks it there."""

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 100
PRODUCT = ("kvengine", "kernels", "adapters")
FOLDERS = (*PRODUCT, "tests", "bench")
FILES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
BANNED_STEMS = ("utils", "common", "helpers", "base", "core", "manager")
HEAVY = tuple("torch triton jax jaxlib numba llvmlite transformers vllm sglang lmcache".split())

# A module imports only from rows above its own. Names are below `kvengine.`; "" is the package
# itself, what `import kvengine` gives. A row may name modules that are still to come.
LAYERS = (
    (
        "errors",
        "compiled",
        "costs",
        "lifetime",
        "shares",
        "workers",
        "kernels.native",
        "kernels.build",
        "kernels.driver",
    ),
    (
        "metrics",
        "policy",
        "layout",
        "url",
        "slab",
        "adapters.array",
        "kernels.launch",
        "kernels.memory",
    ),
    ("policy.queues", "policy.ghosts", "policy.books", "policy.tournament"),
    ("policy.hazards",),
    ("policy.shadows",),
    ("policy.*", "keys", "arena", "kernels.digest"),
    ("policy.named", "policy.retention", "peer", "peer.messages"),
    ("kernels.copy", "peer.ring"),
    ("kernels.rows",),
    ("kernels.quant", "kernels.lossless"),
    (
        "config",
        "frame",
        "shadow",
        "tenants",
        "kernels.device",
        "kernels.relayout",
        "kernels.*_native",
        "tiers.files",
        "tiers.format",
        "tiers.breaker",
        "tiers.resp",
    ),
    ("cache", "index", "lease", "retention", "seal", "tiers", "kernels.*_device"),
    (
        "codec",
        "pin",
        "kernels.variants",
        "fetches",
        "fills",
        "transient",
        "tiers.segments",
        "tiers.remote",
    ),
    ("forms", "pools", "tiers.*", "transfer", "peer.node", "peer.wire", "peer.membership"),
    ("store", "peer.tier", "peer.channel"),
    ("blocks", "peer.service"),
    ("trace", "plan", "pins", "record", "load", "save", "writer", "arrays", "peer.proxy"),
    ("events", "formats", "tiered"),
    ("curves",),
    ("prefetch",),
    ("engine", "peer.client"),
    ("",),
    ("residents", "adapters.checkpoint"),
    ("replay", "server", "web", "adapters.torch", "adapters.vllm_identity"),
    ("adapters.guard", "adapters.sglang_pools"),
    (
        "adapters.transformers_identity",
        "adapters.jax",
        "adapters.sglang_identity",
        "adapters.vllm_requests",
        "demo.text",
        "demo.model",
    ),
    ("adapters.transformers_rows", "adapters.vllm_attachment"),
    ("adapters.transformers", "adapters.vllm_schedule"),
    (
        "adapters.transformers_paged",
        "adapters.vllm_work",
        "adapters.vllm_tier",
        "adapters.vllm_policy",
    ),
    ("adapters.vllm", "adapters.sglang", "adapters.lmcache", "demo", "demo.steps"),
    ("cli",),
)
# Whoever may import is above, but these may not: tiers and peers are handed to the store.
NEVER = (("store", "tiers.*"), ("store", "peer.*"))
# Imports of our own inside a function: (who, what).
LAZY = (
    ("transfer", "kernels.*"),
    ("cli", "*"),
    ("", "*"),
    ("kernels.launch", "kernels.native"),
    ("kernels.launch", "kernels.*_native"),
)
# Modules whose whole purpose is a framework, or that are imported only where it is there.
FRAMEWORK = (
    "adapters.*",
    "demo.*",
    "kernels.device",
    "kernels.native",
    "kernels.*_device",
    "kernels.*_native",
)
FRAMEWORK_LAZY = (*FRAMEWORK, "kernels.*", "compiled")
LIGHT = ("adapters", "adapters.array")
DYNAMIC = ("", "cli")  # may import a module whose name they compute
ENVIRONMENT = ("config",)
# `except Exception`: thread loops, and an adapter's outer border where it counts a metric.
CATCH_ALL = (
    ("workers", "Workers._run"),
    ("fetches", "Fetches._tell"),
    ("transfer", "Transfers._run.run"),
    ("transfer", "Transfers.guarded"),
    ("server", "Server._receive"),
    ("adapters.*", "*guarded"),
)
# One registry of engines by config, in an adapter whose framework builds several objects.
REGISTRIES = (("adapters.vllm", "_attachments"),)

MUTABLE_CALLS = frozenset(
    "list dict set bytearray deque defaultdict OrderedDict Counter WeakKeyDictionary WeakSet "
    "WeakValueDictionary Queue SimpleQueue".split()
)
STATEFUL_CALLS = frozenset("Lock RLock Condition Event Semaphore local ContextVar count".split())
MUTATORS = frozenset(
    "append add update pop setdefault extend clear remove insert discard popitem appendleft "
    "sort reverse".split()
)
UNSAFE_MODULES = frozenset("pickle cPickle marshal shelve dill cloudpickle joblib".split())


class Source(NamedTuple):
    path: Path
    name: str  # below kvengine. for the product, "tests.x" and "bench.x" for the others
    tree: ast.Module


class Import(NamedTuple):
    line: int
    module: str  # in full
    lazy: bool


Checker = Callable[[Path], list[str]]


def named(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def paired(one: str, other: str, pairs: tuple[tuple[str, str], ...]) -> bool:
    return any(named(one, (a,)) and named(other, (b,)) for a, b in pairs)


def sources(root: Path, folders: tuple[str, ...]) -> Iterator[Source]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            parts = list(path.relative_to(root).with_suffix("").parts)
            if folder == "kvengine":
                parts = parts[1:]
            if parts[-1] == "__init__":
                parts = parts[:-1]
            yield Source(path, ".".join(parts), ast.parse(path.read_text(), str(path)))


def at(root: Path, source: Source, line: int, what: str) -> str:
    return f"{source.path.relative_to(root)}:{line}: {what}"


def imports(source: Source) -> Iterator[Import]:
    """Every import statement, and every `import_module` of a literal; TYPE_CHECKING ones too."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(child.lineno, alias.name, lazy)
            elif isinstance(child, ast.ImportFrom):
                module = "." * child.level + (child.module or "")
                for alias in child.names:
                    yield Import(child.lineno, f"{module}.{alias.name}", lazy)
            elif isinstance(child, ast.Call) and called(child) in ("import_module", "__import__"):
                first = child.args[0] if child.args else None
                literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
                yield Import(child.lineno, first.value if literal else "?", lazy)
            yield from walk(child, inside)

    return walk(source.tree, False)


def called(node: ast.AST) -> str:
    """The last part of the name that a call calls."""
    function = node.func if isinstance(node, ast.Call) else None
    if isinstance(function, ast.Subscript):
        function = function.value
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def row_of(name: str) -> int | None:
    exact = [row for row, names in enumerate(LAYERS) if name in names]
    return (exact or [row for row, names in enumerate(LAYERS) if named(name, names)] or [None])[0]


def own_module(module: str, modules: set[str]) -> str | None:
    """Which of our modules an import names: `from kvengine.frame import X` names frame."""
    if module.split(".")[0] != "kvengine":
        return None
    name = module.removeprefix("kvengine").removeprefix(".")
    while name and name not in modules and row_of(name) is None:
        name = name.rpartition(".")[0]
    while name not in modules and named(name, ("policy.*", "tiers.*", "adapters.vllm_*")):
        name = name.rpartition(".")[0]  # a pattern matches a function's name as well
    return name


def check_layers(root: Path) -> list[str]:
    """Imports go up the table, lazy ones of our own only where the table says."""
    found = []
    product = list(sources(root, PRODUCT))
    modules = {source.name for source in product}
    for source in product:
        if source.name in ("kernels", "adapters"):
            continue  # docstrings only, see check_packages
        row = row_of(source.name)
        if row is None:
            found.append(at(root, source, 1, f"{source.name} stands in no row of LAYERS"))
            continue
        for line, module, lazy in imports(source):
            name = own_module(module, modules)
            if name is None:
                continue
            if source.name.startswith("kernels.") and not name.startswith("kernels."):
                found.append(at(root, source, line, f"a kernel imports {module} of the engine"))
            other = row_of(name)
            allowed = lazy and paired(source.name, name, LAZY)
            if other is None:
                found.append(at(root, source, line, f"{module} stands in no row of LAYERS"))
            elif other >= row and not allowed:
                found.append(at(root, source, line, f"{source.name} imports {name} from below"))
            elif paired(source.name, name, NEVER):
                found.append(at(root, source, line, f"{source.name} must not import {name}"))
            elif lazy and not allowed:
                found.append(at(root, source, line, f"{source.name} imports {name} lazily"))
    return found


def check_imports(root: Path) -> list[str]:
    """No second copy of kernels and adapters, no relative or computed imports, no unsafe ones."""
    found = []
    for source in sources(root, FOLDERS):
        product = source.path.relative_to(root).parts[0] in PRODUCT
        for line, module, _ in imports(source):
            top = module.split(".")[0]
            if top in ("kernels", "adapters"):
                found.append(at(root, source, line, f"imports {module}: write kvengine.{module}"))
            if module.startswith("."):
                found.append(at(root, source, line, f"relative import {module}"))
            if product and top in UNSAFE_MODULES:
                found.append(at(root, source, line, f"imports {module}"))
            if product and module == "?" and source.name not in DYNAMIC:
                found.append(at(root, source, line, "imports a module by a computed name"))
    return found


def check_frameworks(root: Path) -> list[str]:
    """Torch, triton, jax and numba stay in adapters and kernels, and out of what core imports."""
    found = []
    for source in sources(root, PRODUCT):
        light = source.name in LIGHT
        for line, module, lazy in imports(source):
            patterns = FRAMEWORK_LAZY if lazy else FRAMEWORK
            if module.split(".")[0] in HEAVY and (light or not named(source.name, patterns)):
                found.append(at(root, source, line, f"{source.name} imports {module}"))
    return found


def check_unsafe(root: Path) -> list[str]:
    """No eval, exec or compile."""
    return [
        at(root, source, node.lineno, f"calls {node.func.id}")
        for source in sources(root, PRODUCT)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("eval", "exec", "compile")
    ]


def check_environment(root: Path) -> list[str]:
    """Only config reads the environment."""
    names = ("environ", "environb", "getenv", "putenv", "unsetenv")
    found = []
    for source in sources(root, PRODUCT):
        if source.name in ENVIRONMENT:
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "os" and node.attr in names:
                    found.append(at(root, source, node.lineno, f"uses os.{node.attr}"))
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                for alias in node.names:
                    if alias.name in names:
                        found.append(at(root, source, node.lineno, f"uses os.{alias.name}"))
    return found


def check_catch_all(root: Path) -> list[str]:
    """Exceptions are caught by name, but in CATCH_ALL; one that is raised again may be any."""
    found = []

    def walk(source: Source, node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = inside
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{inside}.{child.name}".lstrip(".")
            if isinstance(child, ast.ExceptHandler) and catches_all(child):
                again = isinstance(child.body[-1], ast.Raise) and child.body[-1].exc is None
                if not again and not paired(source.name, inside, CATCH_ALL):
                    place = f"in {inside}" if inside else "at module level"
                    found.append(at(root, source, child.lineno, f"catches everything {place}"))
            walk(source, child, name)

    for source in sources(root, PRODUCT):
        walk(source, source.tree, "")
    return found


def catches_all(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = ("Exception", "BaseException")
    return any(kind is None or isinstance(kind, ast.Name) and kind.id in names for kind in kinds)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import: of the module, its branches and its classes."""
    for statement in body:
        yield statement
        for field in ("body", "orelse", "finalbody"):
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from statements(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from statements(handler.body)


def check_state(root: Path) -> list[str]:
    """No mutable state of a module or class: constants only, and nobody changes those."""
    found = []
    for source in sources(root, PRODUCT):
        constants = set()
        for statement in statements(source.tree.body):
            if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
                continue
            whole = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in whole:
                name = target.id if isinstance(target, ast.Name) else ""
                if (source.name, name) in REGISTRIES or name == "__all__":
                    continue
                constant = re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name) is not None
                if constant:
                    constants.add(name)
                if stateful(statement.value) or (mutable(statement.value) and not constant):
                    what = f"{name or 'a target'} is mutable state of a module or class"
                    found.append(at(root, source, statement.lineno, what))
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Global):
                what = f"global {', '.join(node.names)}"
                found.append(at(root, source, node.lineno, what))
            elif name := changed(node, constants):
                found.append(at(root, source, node.lineno, f"changes the constant {name}"))
    return found


def mutable(value: ast.expr) -> bool:
    displays = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
    return isinstance(value, displays) or called(value) in MUTABLE_CALLS


def stateful(value: ast.expr) -> bool:
    return called(value) in STATEFUL_CALLS


def changed(node: ast.AST, constants: set[str]) -> str:
    """Which of `constants` the node changes in place."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = [t.value for t in node.targets if isinstance(t, ast.Subscript)]
    elif isinstance(node, ast.AugAssign):
        targets = [node.target.value if isinstance(node.target, ast.Subscript) else node.target]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        targets = [node.func.value] if node.func.attr in MUTATORS else []
    names = [t.id for t in targets if isinstance(t, ast.Name) and t.id in constants]
    return names[0] if names else ""


def check_names(root: Path) -> list[str]:
    """No file or folder whose name says nothing."""
    return [
        f"{path.relative_to(root)}: says nothing; name it after what is in it"
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("*"))
        if path.name.partition(".")[0].lower().strip("_") in BANNED_STEMS
    ]


def check_packages(root: Path) -> list[str]:
    """The packages listed are those that there are; kernels and adapters are docstrings only."""
    found = []
    there = set()
    for source in sources(root, PRODUCT):
        if source.path.name == "__init__.py":
            there.add(f"kvengine.{source.name}".rstrip("."))
        if source.name in ("kernels", "adapters"):
            for statement in source.tree.body:
                if not (
                    isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                ):
                    found.append(at(root, source, statement.lineno, "not a docstring"))
    listed = set(
        tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found += [f"pyproject.toml: does not list the package {name}" for name in there - listed]
    return found + [f"pyproject.toml: lists {name}, which is not there" for name in listed - there]


def check_columns(root: Path) -> list[str]:
    paths = [path for folder in FOLDERS for path in (root / folder).rglob("*.py")]
    paths += [path for path in (root / ".ci").rglob("*") if path.is_file()]
    return [
        f"{path.relative_to(root)}:{number}: {len(line)} columns"
        for path in sorted(paths)
        if "__pycache__" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > COLUMNS
    ]


def check_top(root: Path) -> list[str]:
    """Five folders, four files, and what begins with a dot."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if (root / ".git").exists() and shutil.which("git"):
        done = subprocess.run(listing, cwd=root, capture_output=True, text=True, check=True)
        names = [line.split("/") for line in done.stdout.splitlines()]
    else:
        ignored = [line.strip("/") for line in (root / ".gitignore").read_text().split()]
        names = [
            [name, ""] if (root / name).is_dir() else [name]
            for name in os.listdir(root)
            if not named(name, tuple(ignored))
        ]
    found = {
        f"{parts[0]}: not one of {', '.join(FOLDERS if len(parts) > 1 else FILES)}"
        for parts in names
        if not parts[0].startswith(".") and parts[0] not in (FOLDERS if len(parts) > 1 else FILES)
    }
    return sorted(found)


CHECKERS: tuple[Checker, ...] = (
    check_layers,
    check_imports,
    check_frameworks,
    check_unsafe,
    check_environment,
    check_catch_all,
    check_state,
    check_names,
    check_packages,
    check_columns,
    check_top,
)


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_tree_is_tidy(checker):
    assert checker(ROOT) == []


PLANTED = (
    (check_layers, "kvengine/layout.py", "import kvengine.engine", "layout imports engine from"),
    (check_layers, "kvengine/layout.py", "from kvengine.keys import x", "imports keys from below"),
    (check_layers, "kvengine/layout.py", "from kvengine import store", "imports store from below"),
    (check_layers, "kvengine/layout.py", "from kvengine import x", "layout imports  from below"),
    (check_layers, "kvengine/index.py", "from kvengine.codec import x", "imports codec from below"),
    (check_layers, "kvengine/index.py", "def f():\n import kvengine.engine", "engine from below"),
    (check_layers, "kvengine/index.py", "def f():\n import kvengine.errors", "errors lazily"),
    (check_layers, "kvengine/index.py", "if TYPE_CHECKING:\n import kvengine.engine", "from below"),
    (check_layers, "kvengine/store.py", "from kvengine.tiers.disk import x", "must not import"),
    (check_layers, "kvengine/store.py", "from kvengine.peer import ring", "must not import"),
    (check_layers, "kvengine/engine.py", "import kvengine.adapters.torch", "from below"),
    (check_layers, "kvengine/engine.py", "import kvengine.somewhere", "engine imports  from below"),
    (check_layers, "kvengine/thing.py", "", "thing stands in no row"),
    (check_layers, "kvengine/policy/lru.py", "import kvengine.index", "imports index from below"),
    (check_layers, "kernels/copy.py", "from kvengine.errors import x", "a kernel imports"),
    (check_imports, "kvengine/index.py", "import kernels.copy", "write kvengine.kernels.copy"),
    (check_imports, "tests/test_x.py", "from adapters import torch", "write kvengine.adapters"),
    (check_imports, "bench/x.py", "def f():\n import kernels", "write kvengine.kernels"),
    (check_imports, "bench/x.py", "importlib.import_module('kernels.copy')", "write kvengine."),
    (check_imports, "kvengine/index.py", "from . import errors", "relative import"),
    (check_imports, "kvengine/index.py", "import pickle", "imports pickle"),
    (check_imports, "kvengine/index.py", "def f():\n from marshal import loads", "marshal.loads"),
    (check_imports, "kvengine/index.py", "import_module(name)", "by a computed name"),
    (check_frameworks, "kvengine/index.py", "import torch.nn", "index imports torch.nn"),
    (check_frameworks, "kvengine/index.py", "def f():\n import numba", "index imports numba"),
    (check_frameworks, "kernels/copy.py", "import triton", "kernels.copy imports triton"),
    (check_frameworks, "adapters/array.py", "def f():\n import torch", "array imports torch"),
    (check_unsafe, "kvengine/index.py", "x = eval('1')", "calls eval"),
    (check_unsafe, "kvengine/index.py", "exec('1')", "calls exec"),
    (check_environment, "kvengine/index.py", "import os\nx = os.environ['A']", "uses os.environ"),
    (check_environment, "adapters/torch.py", "def f(): return os.getenv('A')", "uses os.getenv"),
    (check_environment, "kernels/copy.py", "from os import environ", "uses os.environ"),
    (check_catch_all, "kvengine/index.py", "try: x\nexcept Exception: pass", "at module level"),
    (check_catch_all, "kvengine/index.py", "def f():\n try: x\n except: raise X", "in f"),
    (check_catch_all, "kvengine/workers.py", "def f():\n try: x\n except Exception: y", "in f"),
    (check_catch_all, "adapters/torch.py", "try: x\nexcept (X, BaseException): y", "everything"),
    (check_state, "kvengine/index.py", "cache = {}", "cache is mutable state"),
    (check_state, "kvengine/index.py", "seen: set[int] = set()", "seen is mutable state"),
    (check_state, "kvengine/index.py", "class A:\n  held = [1]", "held is mutable state"),
    (check_state, "kvengine/index.py", "if x:\n  rows = [y for y in x]", "rows is mutable state"),
    (check_state, "kvengine/index.py", "LOCK = threading.Lock()", "LOCK is mutable state"),
    (check_state, "kvengine/index.py", "A = {}\ndef f(): A['x'] = 1", "changes the constant A"),
    (check_state, "kvengine/index.py", "A = []\ndef f(): A.append(1)", "changes the constant A"),
    (check_state, "kvengine/index.py", "a = 1\ndef f():\n global a\n a += 1", "global a"),
    (check_names, "kvengine/utils.py", "", "says nothing"),
    (check_names, "tests/helpers/x.py", "", "tests/helpers: says nothing"),
    (check_packages, "kernels/__init__.py", '"""Ours."""\nimport numpy', "not a docstring"),
    (check_packages, "kvengine/peer/__init__.py", "", "does not list the package kvengine.peer"),
    (check_columns, "tests/test_x.py", "#" * 101, "101 columns"),
    (check_columns, ".ci/run", "#" * 101, "101 columns"),
    (check_top, "scripts/x.py", "", "scripts: not one of kvengine"),
    (check_top, "setup.py", "", "setup.py: not one of pyproject.toml"),
)
SOUND = {
    "kvengine/__init__.py": "def f():\n import kvengine.engine",
    "kvengine/errors.py": "class A(Exception): pass",
    "kvengine/index.py": 'from kvengine import errors\nA = {1: 2}\n__all__ = ["A"]\nB = A[1]',
    "kvengine/config.py": "import os\nx = os.environ",
    "kvengine/transfer.py": "def f():\n import kvengine.kernels.copy",
    "kvengine/workers.py": "class Workers:\n def _run(self):\n  try: x\n  except Exception: y",
    "kvengine/store.py": "def f():\n try: x\n except BaseException:\n  undo()\n  raise",
    "kvengine/cli.py": "def f():\n import kvengine.engine",
    "kvengine/policy/__init__.py": "def f(): pass",
    "kvengine/policy/lru.py": "from kvengine.policy import f",
    "kvengine/tiers/__init__.py": "from kvengine.errors import A",
    "kvengine/tiers/disk.py": "from kvengine.tiers import A",
    "kernels/__init__.py": '"""Kernels."""',
    "kernels/copy.py": "def f():\n import torch",
    "adapters/__init__.py": '"""Adapters."""',
    "adapters/torch.py": "import torch\nfrom kvengine.adapters.array import View",
    "pyproject.toml": (
        "[tool.setuptools]\npackages = ['kvengine', 'kvengine.policy', 'kvengine.tiers', "
        "'kvengine.kernels', 'kvengine.adapters']"
    ),
    ".gitignore": "/build/\n*.egg-info/\n",
    "build/x": "",
    "tests/test_x.py": "import pickle\nx = []",
}


@pytest.fixture
def sound(tmp_path):
    plant(tmp_path, SOUND)
    return tmp_path


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_a_sound_tree_passes(checker, sound):
    assert checker(sound) == []


@pytest.mark.parametrize(("checker", "path", "text", "says"), PLANTED)
def test_a_planted_violation_is_found(checker, path, text, says, sound):
    plant(sound, {path: text})
    found = checker(sound)
    assert len(found) == 1, found
    assert says in found[0]
    assert found[0].startswith((path.split("/")[0], "pyproject.toml"))


def test_every_checker_has_a_planted_violation():
    assert {checker for checker, *_ in PLANTED} == set(CHECKERS)


def test_top_reads_git_where_there_is_git(sound, require):
    git = require.program("git")
    plant(sound, {"scripts/x.sh": "", "build/y": ""})
    subprocess.run([git, "init", "-q"], cwd=sound, check=True)
    assert check_top(sound) == [f"scripts: not one of {', '.join(FOLDERS)}"]


@pytest.mark.parametrize(
    ("code", "arguments"),
    [("import kvengine", ()), ("from kvengine.cli import main; main()", ("--help",))],
    ids=["import kvengine", "kvengine --help"],
)
def test_import_is_light(code, arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-400:]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "kvengine" in loaded
    assert not {name for name in loaded if name.split(".")[0] in HEAVY}


def run_tool(*command: str, environ: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing(require):
    require("ruff")
    run_tool("ruff", "check", "--quiet")


def test_ruff_would_format_nothing(require):
    require("ruff")
    run_tool("ruff", "format", "--check", "--quiet", "--diff")


def test_types_are_strict(require):
    """An editable install hides kvengine.kernels from mypy: it is shown a tree of symlinks."""
    require("mypy")
    overlay = ROOT / ".mypy_cache" / "overlay"
    shutil.rmtree(overlay, ignore_errors=True)
    (overlay / "kvengine").mkdir(parents=True)
    for path in [*(ROOT / "kvengine").iterdir(), ROOT / "kernels", ROOT / "adapters"]:
        (overlay / "kvengine" / path.name).symlink_to(path)
    (overlay / "bench").symlink_to(ROOT / "bench")
    run_tool("mypy", "--package", "kvengine", environ={"MYPYPATH": str(overlay)})
