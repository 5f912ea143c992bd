"""vLLM's own scheduler, our connector, and in the place of a model one that writes what a block is.

    python tests/serving/vllm_aborts.py MODEL COUNT LOAD

Requests share prompts, many of them are aborted at any moment, the paged cache is so small that
others are preempted, and one load in twenty fails. Every block that a step would compute with is
compared with what it ought to be. The last line of the output is `RESULT {...}`.
"""

import argparse
import json
import os
import random
from typing import Any

import numpy as np
import torch
import vllm_generate

BLOCKS, BLOCK_TOKENS, LAYERS, HEADS, HEAD_DIM = 48, 32, 2, 2, 8
PAGE_BYTES = HEADS * BLOCK_TOKENS * 2 * HEAD_DIM * 4
PROMPTS, RUNNING, ABORTED, FAILING = 24, 12, 0.03, 0.05  # aborted: of those there are, a step
IDLE_MAX = 20_000


class Served:
    """A scheduler and a worker's connector, stepped as vLLM's engine steps them."""

    def __init__(self, model: str, load: str) -> None:
        from vllm.config import KVTransferConfig
        from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from kvengine.adapters.vllm import KVEngineConnector

        settings = vllm_generate.connector("mem://?size=8M", load=load)
        config = EngineArgs(
            model,
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=RUNNING,
            block_size=BLOCK_TOKENS,
            enforce_eager=True,
            async_scheduling=False,
            kv_transfer_config=KVTransferConfig(**settings),
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = BLOCKS
        names = [f"layer{number}" for number in range(LAYERS)]
        spec = FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=HEADS, head_size=HEAD_DIM, dtype=torch.float32
        )
        caches = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(names, spec)])
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        self.scheduler = Scheduler(
            config, caches, StructuredOutputManager(config), BLOCK_TOKENS, BLOCK_TOKENS
        )
        self.worker = KVEngineConnector(config, KVConnectorRole.WORKER, caches)
        shape = (BLOCKS, HEADS, BLOCK_TOKENS, 2 * HEAD_DIM)
        caches_of = {name: torch.zeros(shape) for name in names}
        self.worker.register_kv_caches(caches_of)
        self.pages = {
            name: cache.view(BLOCKS, -1).numpy().view(np.uint8) for name, cache in caches_of.items()
        }
        self.manager = self.scheduler.connector._manager
        self.compared = self.preempted = 0

    def add(self, name: str, tokens: list[int], output: int) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        sampling = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0)
        request = Request(name, tokens, sampling, None, block_hasher=self.hasher)
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        output = self.scheduler.schedule()
        self.preempted += len(output.preempted_req_ids or ())
        worker, step = self.worker, output.kv_connector_metadata
        worker.handle_preemptions(step)
        worker.bind_connector_metadata(step)
        if output.has_sync_kv_loads:
            worker.start_load_kv(None)
            for name in self.pages:
                worker.wait_for_layer_load(name)
        # As in a model: a layer's K and V of all requests are written before attention reads any.
        for name, count in output.num_scheduled_tokens.items():
            self._write(name, count)
        read = [self._read(name, count) for name, count in output.num_scheduled_tokens.items()]
        if not output.has_sync_kv_loads:
            worker.start_load_kv(None)
        worker.wait_for_save()
        moved = worker.get_transfer_results(output.finished_req_ids)
        invalid = worker.get_block_ids_with_load_errors()
        for blocks in read if not invalid else ():
            for block, want, had in blocks:
                assert all(page == want for page in had), f"block {block} is not its own"
                self.compared += 1
        said = KVConnectorOutput(
            finished_recving=moved.finished_recving,
            failed_recving=moved.failed_recving,
            invalid_block_ids=invalid,
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
        )
        worker.clear_connector_metadata()
        names = list(output.num_scheduled_tokens)
        over = [self.scheduler.requests[name] for name in names]
        sampled = [[7] if each.num_computed_tokens >= each.num_tokens else [] for each in over]
        indices = {name: index for index, name in enumerate(names)}
        result = ModelRunnerOutput(names, indices, sampled, kv_connector_output=said)
        self.scheduler.update_from_output(output, result)

    def _write(self, name: str, count: int) -> None:
        """Write the blocks that a step fills."""
        request = self.scheduler.requests[name]
        (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
        end = request.num_computed_tokens
        full = min(end // BLOCK_TOKENS, len(request.block_hashes))
        for at in range((end - count) // BLOCK_TOKENS, full):
            for page in self.pages.values():
                page[blocks[at]] = np.frombuffer(self._content(request, at), np.uint8)

    def _read(self, name: str, count: int) -> list[Any]:
        """Return the blocks that a step computes with, what they are to hold, and what they do."""
        request = self.scheduler.requests[name]
        (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
        first = (request.num_computed_tokens - count) // BLOCK_TOKENS
        return [
            (blocks[at], self._content(request, at), self._held(blocks[at])) for at in range(first)
        ]

    def _content(self, request: Any, at: int) -> bytes:
        name = bytes(request.block_hashes[at])
        return name * (PAGE_BYTES // len(name))

    def _held(self, block: int) -> list[bytes]:
        return [page[block].tobytes() for page in self.pages.values()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("count", type=int)
    parser.add_argument("load")
    options = parser.parse_args()
    offline = vllm_generate.OFFLINE
    os.environ.update({name: os.environ.get(name, value) for name, value in offline.items()})
    source = random.Random(11)
    prompts = [[source.randrange(1000) for _ in range(8 * BLOCK_TOKENS)] for _ in range(PROMPTS)]
    served = Served(options.model, options.load)
    engine = served.manager.attachment.engine
    load = engine.load
    failed = [0]

    def fails(*args: Any, **kwargs: Any) -> Any:
        if source.random() < FAILING:
            failed[0] += 1
            raise OSError("planted")
        return load(*args, **kwargs)

    engine.load = fails
    added = aborted = steps = 0
    while added < options.count or served.scheduler.has_unfinished_requests():
        waiting = len(served.scheduler.requests)
        while added < options.count and waiting < 2 * RUNNING:
            tokens = source.choice(prompts)[: source.randrange(20, 8 * BLOCK_TOKENS)]
            served.add(f"{added}", tokens, source.randrange(1, 40))
            added, waiting = added + 1, waiting + 1
        for name in list(served.scheduler.requests):
            if source.random() < ABORTED:
                served.abort(name)
                aborted += 1
        served.step()
        served.manager.attachment.succeeded()  # errors are planted: no pause is wanted
        steps += 1
    for _ in range(IDLE_MAX):
        served.step()
        if not served.scheduler.connector.has_pending_push_work() and not served.manager._asked:
            break
    engine.check()
    leases, hits = served.manager.leases, engine.stats()["hit_blocks"]
    engine.squeeze(0)
    left = engine.stats()["memory_blocks"]
    result = {
        "requests": added,
        "aborted": aborted,
        "preempted": served.preempted,
        "failed_loads": failed[0],
        "compared": served.compared,
        "hits": hits,
        "steps": steps,
        "leases": leases,
        "asked": len(served.manager._asked),
        "held": left,
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
