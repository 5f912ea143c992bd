"""Run a fixed set of prompts through vLLM, in one process, and print what happened.

    python tests/serving/vllm_generate.py MODEL [--url URL] [--llm JSON] [--together]

Without a URL vLLM runs alone. The last line of the output is `RESULT {...}`: for each request the
tokens of its prompt, how many of them came from a cache and how many the scheduler gave to prefill,
and the tokens generated; and some of vLLM's counters.
"""

import argparse
import json
import os
import random
from typing import Any

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # One thread: two that wait for each other crawl where something else takes a core.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
PREFIX_TOKENS = 900
GENERATED_TOKENS = 24
COUNTERS = ("vllm:prompt_tokens_cached_by_source", "vllm:kvengine_")


def prompts() -> list[list[int]]:
    """Four prompts, of 950 to 971 tokens, that share their first 900."""
    source = random.Random(7)
    shared = [source.randrange(1000) for _ in range(PREFIX_TOKENS)]
    return [shared + [source.randrange(1000) for _ in range(50 + 7 * i)] for i in range(4)]


def connector(url: str | None, **extra: Any) -> dict[str, Any] | None:
    """vLLM's settings for kvengine, as its README gives them."""
    if url is None:
        return None
    return {
        "kv_connector": "KVEngineConnector",
        "kv_connector_module_path": "kvengine.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        # What is loaded is not to depend on how busy the machine is.
        "kv_connector_extra_config": {"url": url, "observe_prefill": False, **extra},
    }


def watch_prefill() -> dict[str, int]:
    """Count the prompt tokens that the scheduler gives to each request, by its number."""
    from vllm.v1.core.sched.scheduler import Scheduler

    prefilled: dict[str, int] = {}
    schedule = Scheduler.schedule

    def watched(self: Any, *rest: Any) -> Any:
        output = schedule(self, *rest)
        for name, count in output.num_scheduled_tokens.items():
            number = name.split("-")[0]
            if not self.requests[name].num_output_tokens:
                prefilled[number] = prefilled.get(number, 0) + count
        return output

    Scheduler.schedule = watched
    return prefilled


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--url")
    parser.add_argument("--llm", default="{}", help="more arguments of vllm.LLM")
    parser.add_argument("--together", action="store_true", help="all prompts in one batch")
    arguments = parser.parse_args()
    os.environ.update({name: os.environ.get(name, value) for name, value in OFFLINE.items()})
    from vllm import LLM, SamplingParams

    prefilled = watch_prefill()
    llm = LLM(
        arguments.model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=8,
        block_size=32,
        disable_log_stats=False,
        kv_transfer_config=connector(arguments.url),
        **json.loads(arguments.llm),
    )
    sampling = SamplingParams(temperature=0, max_tokens=GENERATED_TOKENS, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts()]
    requests = [
        {
            "prompt": len(output.prompt_token_ids),
            "cached": output.num_cached_tokens,
            "prefilled": prefilled.get(output.request_id.split("-")[0], 0),
            "tokens": list(output.outputs[0].token_ids),
        }
        for batch in ([asked] if arguments.together else [[one] for one in asked])
        for output in llm.generate(batch, sampling, use_tqdm=False)
    ]
    counters: dict[str, float] = {}
    for metric in llm.get_metrics():
        if metric.name.startswith(COUNTERS):
            name = metric.labels.get("source", metric.name.removeprefix("vllm:"))
            counters[name] = counters.get(name, 0) + metric.value
    print("RESULT " + json.dumps({"requests": requests, "counters": counters}), flush=True)


if __name__ == "__main__":
    main()
