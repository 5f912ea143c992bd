"""A model with layers that see the last tokens only: two groups of layers, through one vLLM.

    python tests/serving/vllm_windows.py MODEL [URL]

Without a URL vLLM runs alone. The last line of the output is `RESULT [[tokens, computed], ...]`,
for two prompts that share all but their ends, asked twice, then with every load failing, and again.
"""

import json
import os
import sys
from typing import Any

import vllm_cases
import vllm_generate


def main(model: str, url: str | None = None) -> None:
    offline = vllm_generate.OFFLINE
    os.environ.update({name: os.environ.get(name, value) for name, value in offline.items()})
    from vllm import LLM, SamplingParams

    prefilled = vllm_generate.watch_prefill()
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        block_size=32,
        kv_transfer_config=vllm_generate.connector(url),
    )
    from kvengine.engine import Engine  # loads numba, which vLLM does not find when it starts

    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    assert len(groups) == 2
    shared = vllm_cases.words(99, 300)
    prompts = [shared + vllm_cases.words(100 + number, 20) for number in range(2)]
    results: list[Any] = []

    def ask(tokens: list[int]) -> None:
        llm.reset_prefix_cache()
        prefilled.clear()
        sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        (found,) = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
        results.append([list(found.outputs[0].token_ids), sum(prefilled.values())])

    for prompt in prompts * 2:
        ask(prompt)
    with vllm_cases.planted(Engine.load):
        ask(prompts[0])
    ask(prompts[0])
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
