"""Run cases through one vLLM and print what happened. Run by tests/test_vllm.py.

    python tests/serving/vllm_cases.py alone MODEL
    python tests/serving/vllm_cases.py cases MODEL URL
    python tests/serving/vllm_cases.py by_layer MODEL URL
    python tests/serving/vllm_cases.py multi MODEL URL

MODEL stands beside two LoRA adapters, `first` and `second`. `alone` prints the tokens that vLLM
generates by itself; `cases` those of each case with kvengine, in one process, `by_layer` the same
with loads in steps, and `multi` those of MultiConnector with two engines, in a process that finds
URL filled. The last line of the output is `RESULT {case: ...}`.
"""

import argparse
import inspect
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import vllm_generate

POOL_BLOCKS, CROWD, CROWD_TOKENS, CROWD_OUTPUT = 64, 8, 300, 120
SHORT_TOKENS, SHORT_OUTPUT = 300, 8


def words(seed: int, count: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(1000) for _ in range(count)]


class Cases:
    """One vLLM and what to ask it. `kvengine`: with our connector, or alone."""

    def __init__(self, model: str, transfer: dict[str, Any] | None, by_layer: bool) -> None:
        from vllm import LLM, SamplingParams
        from vllm.config import KVEventsConfig
        from vllm.lora.request import LoRARequest

        self.prefilled = vllm_generate.watch_prefill()
        self.llm = LLM(
            model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=CROWD,
            block_size=32,
            disable_log_stats=False,
            enable_lora=True,
            max_lora_rank=8,
            num_gpu_blocks_override=POOL_BLOCKS if transfer else None,
            kv_transfer_config=transfer,
            kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
            async_scheduling=False if by_layer else None,
        )
        self.told: set[str] = set()  # where vLLM has published that blocks are
        publisher = self.llm.llm_engine.engine_core.engine_core.scheduler.kv_event_publisher
        publisher.publish = lambda batch: self.told.update(
            event.medium for event in batch.events if hasattr(event, "token_ids")
        )
        place = Path(model).parent
        self.lora = {
            name: LoRARequest(name, number, str(place / name))
            for number, name in enumerate(("first", "second"), 1)
        }
        self.sampling = SamplingParams

    def ask(
        self, prompts: list[list[int]], output: int, lora: str = "", salt: str = ""
    ) -> list[list[int]]:
        """Generate for all prompts in one batch, greedily. vLLM's own cache is forgotten first."""
        assert self.llm.reset_prefix_cache()
        self.prefilled.clear()
        sampling = self.sampling(temperature=0, max_tokens=output, ignore_eos=True)
        asked = [
            {"prompt_token_ids": each} | ({"cache_salt": salt} if salt else {}) for each in prompts
        ]
        found = self.llm.generate(asked, sampling, use_tqdm=False, lora_request=self.lora.get(lora))
        return [list(each.outputs[0].token_ids) for each in found]

    def computed(self) -> int:
        """Prompt tokens that the last `ask` computed."""
        return sum(self.prefilled.values())

    def preemptions(self) -> int:
        return int(
            sum(
                each.value for each in self.llm.get_metrics() if each.name == "vllm:num_preemptions"
            )
        )

    # What is asked

    def crowd(self) -> list[list[int]]:
        return self.ask([words(seed, CROWD_TOKENS) for seed in range(CROWD)], CROWD_OUTPUT)

    def shared(self, lora: str = "", salt: str = "") -> list[list[int]]:
        """Two prompts, one after the other, that share all but their ends."""
        prefix = words(99, SHORT_TOKENS)
        found = [
            self.ask([prefix + words(100 + at, 20)], SHORT_OUTPUT, lora, salt)[0] for at in range(2)
        ]
        return found


def alone(cases: Cases) -> dict[str, Any]:
    computed = {}
    found = {}
    for name, ask in {"crowd": cases.crowd, "shared": cases.shared}.items():
        found[name], computed[name] = ask(), cases.computed()
    for name in cases.lora:
        found[name], computed[name] = cases.shared(name), cases.computed()
    return found | {"computed": computed}


def with_kvengine(cases: Cases) -> dict[str, Any]:
    manager = cases.llm.llm_engine.engine_core.engine_core.scheduler.connector._manager
    attachment = manager.attachment
    results: dict[str, Any] = {}

    def note(name: str, ask: Callable[..., Any], *rest: str) -> None:
        before = cases.preemptions()
        tokens = ask(*rest)
        preemptions = cases.preemptions() - before
        results[name] = {
            "tokens": tokens,
            "computed": cases.computed(),
            "preemptions": preemptions,
        }

    for temperature in ("cold", "warm"):
        note(f"crowd, {temperature}", cases.crowd)
    for lora in ("", "first", "second"):
        for temperature in ("cold", "warm"):
            note(f"{lora or 'shared'}, {temperature}", cases.shared, lora)
    for number, salt in enumerate(("one", "two", "one")):
        note(f"salt {salt} {number}", cases.shared, "", salt)
    for name, verb in (("no load", "load"), ("no lease", "match")):
        with planted(getattr(type(attachment.engine), verb)):
            note(name, cases.shared)
        attachment.succeeded()
        note(f"after {name}", cases.shared)
    results["errors"] = planted_everywhere(cases, attachment)
    note("after errors", cases.shared)
    results["leases"] = manager.leases
    results["told"] = sorted(cases.told)
    attachment.engine.check()
    return results


def boom(*_: Any, **__: Any) -> Any:
    raise RuntimeError("planted")


@contextmanager
def planted(function: Any) -> Iterator[None]:
    """Have a function of ours fail whenever it is called, wherever it is held."""
    code = function.__code__
    function.__code__ = boom.__code__
    try:
        yield
    finally:
        function.__code__ = code


def ours() -> dict[str, FunctionType]:
    """Every function that runs while vLLM serves, and every verb that it calls of the engine."""
    from kvengine import engine, lease, transfer
    from kvengine.adapters import vllm_attachment, vllm_requests, vllm_schedule, vllm_work

    verbs = ("match", "probe", "contains", "save", "load", "namespace", "observe_prefill", "stats")
    classes: list[tuple[type, Callable[[str], bool]]] = [
        (engine.Engine, lambda name: name in verbs),
        (lease.Lease, lambda name: name == "release"),
        (transfer.Transfer, lambda name: name in ("wait", "wait_layer", "done", "cancel")),
    ]
    found: dict[str, FunctionType] = {}
    for module in (vllm_attachment, vllm_requests, vllm_schedule, vllm_work):
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__:
                classes.append((value, lambda name: not name.startswith("__")))
            elif inspect.isfunction(value) and value.__module__ == module.__name__:
                found[name] = value
    for owner, chosen in classes:
        for name, value in vars(owner).items():
            value = value.fget if isinstance(value, property) else inspect.unwrap(value)
            if inspect.isfunction(value) and chosen(name) and not value.__code__.co_freevars:
                found[f"{owner.__name__}.{name}"] = value
    del found["border"]
    return found


def planted_everywhere(cases: Cases, attachment: Any) -> dict[str, Any]:
    """Let each function fail in turn, while prompts are served; return the tokens by its name."""
    results = {}
    for name, function in ours().items():
        print(f"{name} fails", file=sys.stderr, flush=True)
        with planted(function):
            results[name] = cases.shared()
        attachment.succeeded()
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("alone", "cases", "by_layer", "multi"))
    parser.add_argument("model")
    parser.add_argument("url", nargs="?")
    options = parser.parse_args()
    offline = vllm_generate.OFFLINE
    os.environ.update({name: os.environ.get(name, value) for name, value in offline.items()})
    transfer = None
    by_layer = options.mode == "by_layer"
    if by_layer:
        transfer = vllm_generate.connector(options.url, load="by_layer")
    elif options.mode == "cases":
        transfer = vllm_generate.connector(options.url)
    elif options.mode == "multi":
        children = [vllm_generate.connector(url) for url in (options.url, "mem://?size=64M")]
        transfer = children[0] | {
            "kv_connector": "MultiConnector",
            "kv_connector_extra_config": {"connectors": children},
        }
        del transfer["kv_connector_module_path"]
    cases = Cases(options.model, transfer, by_layer)
    run = with_kvengine if options.mode in ("cases", "by_layer") else alone
    print("RESULT " + json.dumps(run(cases)), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
