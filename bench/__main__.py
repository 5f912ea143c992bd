"""`python -m bench NAME [--json FILE] [--csv FILE] [--rounds N] [its own options]`; NAME first."""

import importlib
import pkgutil
import sys

from rich.console import Console

import bench
from bench import runner

PIPED_COLUMNS = 160


def names() -> list[str]:
    """Name the benches: the modules of this folder, but for what they share."""
    found = (module.name for module in pkgutil.iter_modules(bench.__path__))
    return sorted(name for name in found if name not in ("runner", "tiers", "__main__"))


def main(arguments: list[str]) -> int:
    """Run one bench; 1 where a row does not match its reference."""
    parser = runner.parser(names())
    if arguments and arguments[0] in names():
        module = importlib.import_module(f"bench.{arguments[0]}")
        if hasattr(module, "add_options"):
            module.add_options(parser)
    options = parser.parse_args(arguments)
    chosen = importlib.import_module(f"bench.{options.name}")
    rows: list[runner.Row] = chosen.run(options)
    show = getattr(chosen, "show", runner.show)
    show(rows, Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS))
    if options.json:
        runner.write_json(rows, options.json)
    if options.csv:
        runner.write_csv(rows, options.csv)
    return int(any(row.matches_reference is False for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
