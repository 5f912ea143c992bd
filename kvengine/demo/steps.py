"""What the demo's two processes do: the first computes, saves, evicts and reloads, the second
reloads what the first has left. `python -m kvengine.demo.steps JOB`: a JSON file in, one out.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
import torch
from blake3 import blake3
from transformers import DynamicCache

from kvengine.adapters.transformers import PrefixCache
from kvengine.config import MIB, parse_url
from kvengine.demo import text
from kvengine.demo.model import load, say
from kvengine.engine import Engine
from kvengine.errors import ConfigError, KVEngineError

NEW_TOKENS = 16
BLOCK_TOKENS = 16
FLUSH_S = 120.0


class Job(msgspec.Struct, kw_only=True):
    """What a process is told: `shared` is what the first one has found out for the second."""

    model: str
    dtype: str
    tier: str
    work: str
    result: str
    shared: dict[str, Any] | None = None


class Prompts(NamedTuple):
    """Token ids: the prefix int[1, n], and each prompt that begins with it."""

    prefix: torch.Tensor
    whole: list[torch.Tensor]


@dataclass(slots=True)
class Answer:
    """How one prompt went."""

    tokens: list[int]
    ttft_s: float
    reused_tokens: int = 0
    kv: str = ""  # digest of the K/V that were reused


class FirstToken:
    """A streamer that notes when the first generated token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: object) -> None:
        """Take the prompt, then a token at a time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to show."""


def prompts(tokenizer: Any, model: Any) -> Prompts:
    """Tokenise logbook and continuations apart, and join token ids: joined text may merge tokens.

    Raises ConfigError where the model's context is too short.
    """
    prefix = torch.tensor([tokenizer(text.logbook()).input_ids])
    whole = []
    for continuation in text.continuations():
        rest = torch.tensor([tokenizer(continuation, add_special_tokens=False).input_ids])
        whole.append(torch.cat([prefix, rest], dim=1))
    needed = max(each.shape[1] for each in whole) + NEW_TOKENS
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or needed
    if needed > limit:
        raise ConfigError(
            f"the model takes {limit} tokens, the demo's prompts need {needed}: give --model one "
            "with a longer context"
        )
    return Prompts(prefix, whole)


def first(job: Job, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Run uncached, save the prefix, reload it from memory, evict it, reload it from disk."""
    asked = prompts(tokenizer, model)
    say(f"{len(asked.whole)} prompts with the same {asked.prefix.shape[1]} tokens: uncached")
    with torch.no_grad():
        model.generate(asked.prefix[:, :64], max_new_tokens=2, do_sample=False)  # warms up torch
    cold = [_uncached(model, asked, prompt, job.dtype) for prompt in asked.whole]
    with _engine(job, model, asked) as engine:
        cache = PrefixCache(engine, model, block_tokens=BLOCK_TOKENS)
        blocks = asked.prefix.shape[1] // BLOCK_TOKENS
        _forget(engine, cache, asked)
        say("the prefix is computed once and saved")
        past = cache.prefill(asked.prefix, save=False)
        saved = digest(past, blocks * BLOCK_TOKENS)
        held = cache.save(asked.prefix, past)
        del past
        memory_bytes = engine.stats()["memory_bytes"]
        say("from memory")
        memory = [_cached(cache, prompt) for prompt in asked.whole]
        say("memory is squeezed: from disk")

        def squeeze() -> None:
            if not engine.flush(FLUSH_S):
                raise KVEngineError(f"blocks were not on disk after {FLUSH_S:.0f} s: a full disk?")
            engine.squeeze(0)

        squeeze()
        squeezed = engine.stats()
        disk = [_cached(cache, prompt, squeeze) for prompt in asked.whole]
        stats = engine.stats()
    return {
        "pid": os.getpid(),
        "prefix_tokens": asked.prefix.shape[1],
        "prefix_blocks": blocks,
        "saved_blocks": held,
        "kv_bytes": blocks * cache.layout.payload_bytes,
        "kv": saved,
        "cold": [asdict(each) for each in cold],
        "memory": [asdict(each) for each in memory],
        "disk": [asdict(each) for each in disk],
        "memory_bytes": memory_bytes,
        "squeezed": squeezed,
        "stats": stats,
        "text": [tokenizer.decode(each.tokens) for each in cold],
        "peak_bytes": _peak_bytes(),
    }


def second(job: Job, model: Any, tokenizer: Any) -> dict[str, Any]:
    """In another process: open the same directory, and answer the prompts from what is there."""
    asked = prompts(tokenizer, model)
    with _engine(job, model, asked) as engine:
        cache = PrefixCache(engine, model, block_tokens=BLOCK_TOKENS)
        before = engine.stats()
        say("a second process: from disk")
        with torch.no_grad():
            model.generate(asked.prefix[:, :64], max_new_tokens=2, do_sample=False)
        answers = [_cached(cache, prompt, lambda: engine.squeeze(0)) for prompt in asked.whole]
        stats = engine.stats()
    return {
        "pid": os.getpid(),
        "answers": [asdict(each) for each in answers],
        "before": before,
        "stats": stats,
        "peak_bytes": _peak_bytes(),
    }


def digest(past: Any, tokens: int) -> str:
    """Hash the K/V of the leading tokens, layer by layer, as they lie in the model's cache."""
    found = blake3()
    for layer in past.layers if tokens else ():
        for each in (layer.keys, layer.values):
            part = each[:, :, :tokens].detach().contiguous()
            found.update(part.reshape(-1).view(torch.uint8).numpy().data)
    return str(found.hexdigest())


def main(path: str) -> int:
    """Do the job of a file, and leave its result beside."""
    job = msgspec.json.decode(Path(path).read_bytes(), type=Job)
    try:
        model, tokenizer = load(job.model, job.dtype, Path(job.work))
        step = first if job.shared is None else second
        result = step(job, model, tokenizer)
    except KVEngineError as error:
        result = {"error": str(error)}
    Path(job.result).write_text(json.dumps(result))
    return 0


def _engine(job: Job, model: Any, asked: Prompts) -> Engine:
    """Open memory and disk with room for the prefix, several times."""
    config = model.config.get_text_config(decoder=True)
    # An upper bound, before the layout is known: K and V of every query head.
    token_bytes = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    size = 64 * MIB + 2 * asked.prefix.shape[1] * token_bytes
    return Engine(parse_url(f"mem://?size={size} | file://{quote(job.tier)}?size={4 * size}"))


def _forget(engine: Engine, cache: PrefixCache, asked: Prompts) -> None:
    """Drop what an earlier demo has left in this directory: the first run is to be a cold one."""
    engine.drop(cache.keys(asked.prefix))


def _uncached(model: Any, asked: Prompts, prompt: torch.Tensor, dtype: str) -> Answer:
    """Generate without kvengine.

    In bfloat16 K/V depend on how many tokens are computed at once (kernels choose their order of
    summation by shape), so the prompt is computed in the same two pieces as with it.
    """
    start = time.perf_counter()
    past = None
    if dtype != "float32":
        past = _fresh(model)
        tokens = asked.prefix.shape[1] // BLOCK_TOKENS * BLOCK_TOKENS
        with torch.no_grad():
            model(asked.prefix, past_key_values=past, use_cache=True, logits_to_keep=1)
        past.crop(tokens - asked.prefix.shape[1])
    seen = FirstToken()
    output = model.generate(prompt, past_key_values=past, **_options(seen))
    return Answer(output[0, prompt.shape[1] :].tolist(), seen.times[1] - start)


def _cached(
    cache: PrefixCache, prompt: torch.Tensor, before: Callable[[], object] = lambda: None
) -> Answer:
    """Generate on from what is held; the digest of it is taken while the clock stands."""
    before()
    start = time.perf_counter()
    past = cache.load(prompt)
    loaded_s = time.perf_counter() - start
    reused = past.get_seq_length()
    kv = digest(past, reused)
    start = time.perf_counter()
    seen = FirstToken()
    # Nothing is saved, so that each prompt is computed in the same pieces each time.
    output = cache.generate(prompt, past=past, save=False, **_options(seen))
    ttft_s = loaded_s + seen.times[1] - start
    return Answer(output[0, prompt.shape[1] :].tolist(), ttft_s, reused, kv)


def _options(seen: FirstToken) -> dict[str, Any]:
    """Greedy, and long enough to show a difference."""
    return {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "streamer": seen,
    }


def _fresh(model: Any) -> Any:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    sys.exit(main(*arguments))
