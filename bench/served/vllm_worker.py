"""One vLLM that does what it is told, a JSON line at a time: the part of `bench serving` that runs
in vLLM's own environment.

    python bench/served/vllm_worker.py MODEL SYSTEM FOLDER [--load by_layer]

SYSTEM is `none`, `kvengine`, or `native` (vLLM's own tiers, memory and `fs`). Commands:
    {"do": "fill", "tokens": [...]}     compute a prompt and wait until it is kept
    {"do": "hit", "tokens": [...], "place": "memory" or "disk"}
        ask for one token of a prompt that vLLM's own cache has forgotten, and that lies there;
        replies with the seconds, and how many tokens were not computed
    {"do": "steps", "tokens": [...], "output": n}
        generate n tokens; replies with [kind, seconds, seconds inside the connector] for each step
Each reply is a line `REPLY {...}`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
MEMORY_BYTES = 512 << 20
STEPS_MAX = 200  # in which saves end
BLOCK_TOKENS = 32


def transfer(system: str, folder: Path, load: str) -> dict[str, Any] | None:
    """vLLM's settings for one system. A native one has as much memory, and a folder as well."""
    if system == "kvengine":
        url = f"mem://?size={MEMORY_BYTES} | file://{folder}?size=4G"
        return {
            "kv_connector": "KVEngineConnector",
            "kv_connector_module_path": "kvengine.adapters.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"url": url, "load": load, "observe_prefill": False},
        }
    if system == "native":
        return {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "spec_name": "CpuTieringSpec",
                "spec_module_path": "native",
                "cpu_bytes_to_use": MEMORY_BYTES,
                "secondary_tiers": [{"type": "fs", "root_dir": str(folder)}],
            },
        }
    return None


class Clock:
    """Seconds inside the connector: its outermost calls, of both halves."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - start

        return timed


class Worker:
    def __init__(self, model: str, system: str, folder: Path, load: str) -> None:
        from vllm import LLM, SamplingParams

        self.system = system
        self.sampling = SamplingParams
        self.llm = LLM(
            model,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=4096,
            max_num_batched_tokens=4096,
            max_num_seqs=4,
            block_size=BLOCK_TOKENS,
            async_scheduling=False,
            kv_transfer_config=transfer(system, folder, load),
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.clock = Clock()
        self.steps: list[tuple[str, float, float]] = []
        self._watch()

    def _watch(self) -> None:
        """Time each step, and the connector's calls in it."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

        halves = [self.core.scheduler.connector]
        halves += [get_kv_transfer_group()] if has_kv_transfer_group() else []
        names = [
            name
            for name, value in vars(KVConnectorBase_V1).items()
            if callable(value) and not name.startswith("_")
        ]
        for half in halves:
            for name in names if half is not None else ():
                setattr(half, name, self.clock.wrap(getattr(half, name)))
        schedule, step = self.core.scheduler.schedule, self.core.step_fn
        kind = [""]

        def watched_schedule(*args: Any) -> Any:
            output = schedule(*args)
            counts = output.num_scheduled_tokens.values()
            kind[0] = "prefill" if any(count > 1 for count in counts) else "decode"
            kind[0] = kind[0] if counts else "idle"
            return output

        def watched_step() -> Any:
            self.clock.seconds = 0.0
            start = time.perf_counter()
            output = step()
            self.steps.append((kind[0], time.perf_counter() - start, self.clock.seconds))
            return output

        self.core.scheduler.schedule, self.core.step_fn = watched_schedule, watched_step

    def ask(self, tokens: list[int], output: int) -> tuple[float, int]:
        sampling = self.sampling(temperature=0, max_tokens=output, ignore_eos=True)
        start = time.perf_counter()
        (found,) = self.llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
        return time.perf_counter() - start, found.num_cached_tokens

    def settle(self) -> None:
        """Have saves end: vLLM looks after them in its steps only."""
        connector = self.core.scheduler.connector
        for _ in range(STEPS_MAX):
            if connector is None or not connector.has_pending_push_work():
                break
            self.ask([1], 2)
        if self.system == "kvengine":
            connector._manager.attachment.engine.flush()

    def fill(self, tokens: list[int]) -> dict[str, Any]:
        self.llm.reset_prefix_cache()
        self.ask(tokens, 1)
        self.settle()
        return {}

    def hit(self, tokens: list[int], place: str) -> dict[str, Any]:
        self.settle()
        self.llm.reset_prefix_cache()
        if place == "disk" and self.system == "kvengine":
            self.core.scheduler.connector._manager.attachment.engine.squeeze(0)
        elif place == "disk" and self.system == "native":
            self.core.scheduler.connector.scheduler.manager.primary_tier.reset_cache()
        seconds, cached = self.ask(tokens, 1)
        return {"seconds": seconds, "cached": cached}

    def run(self, tokens: list[int], output: int) -> dict[str, Any]:
        self.llm.reset_prefix_cache()
        self.steps.clear()
        self.ask(tokens, output)
        return {"steps": self.steps}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("system", choices=("none", "kvengine", "native"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--load", default="between_steps")
    options = parser.parse_args()
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    worker = Worker(options.model, options.system, options.folder, options.load)
    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        "fill": worker.fill,
        "hit": worker.hit,
        "steps": worker.run,
    }
    print("REPLY {}", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        reply = verbs[command.pop("do")](**command)
        print("REPLY " + json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
