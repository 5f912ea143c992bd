"""vLLM's own tiers on a CPU: its CPUOffloadingSpec refuses one, for want of a worker that copies.

TieringOffloadingSpec with such a worker, and nothing else of its own: vLLM's manager, shared memory
and `fs` tier. Neighbouring blocks are copied in one piece, which is as fast as memory allows.
"""

import time
from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CopyingWorker(OffloadingWorker):
    def __init__(self, kv_caches: Any, region: SharedOffloadRegion) -> None:
        self.region = region
        self.caches = [item.tensor for item in kv_caches.tensors]
        self.chunks = [
            region.create_next_worker_view(item.page_size_bytes) for item in kv_caches.tensors
        ]
        self.done: list[TransferResult] = []

    def submit_store(self, job_id: int, source: Any, target: Any) -> bool:
        return self._copy(job_id, self.caches, source.block_ids, self.chunks, target.block_ids)

    def submit_load(self, job_id: int, source: Any, target: Any) -> bool:
        return self._copy(job_id, self.chunks, source.block_ids, self.caches, target.block_ids)

    def _copy(self, job_id: int, sources: Any, from_: Any, targets: Any, to: Any) -> bool:
        start, runs = time.perf_counter(), []
        for here, there in zip(from_.tolist(), to.tolist(), strict=True):
            if runs and (here, there) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
                runs[-1][2] += 1
            else:
                runs.append([here, there, 1])
        for source, target in zip(sources, targets, strict=True):
            for here, there, count in runs:
                bytes_ = target[there : there + count].view(torch.int8).flatten(1)
                bytes_.copy_(source[here : here + count].view(torch.int8).flatten(1))
        nbytes = len(to) * sum(source.shape[1] for source in sources)
        self.done.append(TransferResult(job_id, True, nbytes, time.perf_counter() - start))
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self.done = self.done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self.region.cleanup()


class CpuTieringSpec(TieringOffloadingSpec):
    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = CopyingWorker(kv_caches, region)
        return self._worker
