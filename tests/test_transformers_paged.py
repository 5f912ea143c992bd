"""Continuous batching over an engine: the same tokens, and a second manager finds the prefixes."""

import types
from typing import Any

import pytest

import kvengine
from kvengine.errors import ModelNotSupported

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402

from kvengine.adapters import transformers as adapter  # noqa: E402
from kvengine.adapters.transformers_paged import attach, wrap  # noqa: E402
from test_transformers import flip_a_byte, one_thread, tiny, tokens  # noqa: E402, F401

PAGE, NEW = 32, 40


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


def prompts(count: int = 4) -> list[list[int]]:
    shared = tokens(300)[0].tolist()
    return [shared + tokens(10 + 7 * n, n + 2)[0].tolist() for n in range(count)]


def run(model: Any, asked: list[list[int]], cache: Any = None, **changes: Any) -> Any:
    """Generate for all prompts; also how many prompt tokens were found in the paged cache."""
    settings = {"num_blocks": 128, "page_size": PAGE, "max_batch_tokens": 256} | changes
    config = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=511, pad_token_id=511
    )
    manager = model.init_continuous_batching(config, ContinuousBatchingConfig(**settings))
    found: list[int] = []
    if cache is not None:
        attach(cache, manager)
        create = manager._create_batch_processor

        def created(_: Any) -> Any:
            processor = create()
            search = processor.cache.search_prefix_match

            def counted(*given: Any) -> int:
                found.append(search(*given))
                return found[-1]

            processor.cache.search_prefix_match = counted
            return processor

        manager._create_batch_processor = types.MethodType(created, manager)
    manager.start()
    try:
        names = manager.add_requests(asked, max_new_tokens=NEW)
        done: dict[str, list[int]] = {}
        for _ in range(600):
            result = manager.get_result(timeout=0.1)
            if result is not None and result.is_finished():
                assert result.error is None
                done[result.request_id] = result.generated_tokens
            if len(done) == len(asked):
                break
        return [done[name] for name in names], found
    finally:
        manager.stop(block=True, timeout=30)


def test_a_second_manager_finds_all_prefixes(model, tmp_path):
    asked = prompts()
    plain, _ = run(model, asked)
    url = f"mem://?size=32M | file://{tmp_path}?size=64M"
    for turn in range(2):
        with kvengine.open(url, threads=1) as engine:
            cache = adapter.PrefixCache(engine, model, measure=False)
            given, found = run(model, asked, cache)
            assert given == plain
            if turn:
                assert sorted(found) == sorted((len(ids) - 1) // PAGE * PAGE for ids in asked)
            else:
                assert found[0] == 0
            assert engine.metrics.get("adapter_errors", adapter="transformers") == 0
            engine.check()
            if not turn:  # the next turn of a chat
                longer = [ids + new for ids, new in zip(asked, plain, strict=True)]
                _, found = run(model, longer, cache)
                assert min(found) >= (len(longer[0]) - 1) // PAGE * PAGE - PAGE


def test_little_room_and_damage_cost_hits_only(model, tmp_path):
    asked = prompts()
    plain, _ = run(model, asked)
    with kvengine.open(f"mem://?size=32M | file://{tmp_path}?size=64M", threads=1) as engine:
        cache = adapter.PrefixCache(engine, model, measure=False)
        assert run(model, asked, cache, num_blocks=24)[0] == plain
        assert engine.flush()
        engine.squeeze(0)
        flip_a_byte(tmp_path)
        assert run(model, asked, cache, num_blocks=24)[0] == plain
        assert engine.metrics.get("adapter_errors", adapter="transformers") == 0
        engine.check()


def test_faults_are_misses(model, monkeypatch):
    asked = prompts(2)
    plain, _ = run(model, asked)
    with kvengine.open("mem://?size=32M", threads=1) as engine:
        cache = adapter.PrefixCache(engine, model, measure=False)

        def fail(*_: object, **__: object) -> None:
            raise MemoryError("no room")

        monkeypatch.setattr(engine, "match", fail)
        monkeypatch.setattr(engine, "save", fail)
        assert run(model, asked, cache)[0] == plain
        assert engine.metrics.get("adapter_errors", adapter="transformers") == 3


def test_what_cannot_be_mapped_is_named(model):
    with kvengine.open("mem://?size=4M", threads=1) as engine:
        cache = adapter.PrefixCache(engine, model, measure=False)
        with pytest.raises(ModelNotSupported, match="before manager"):
            attach(cache, object())
        for allocators, says in (
            ({}, "nothing known"),
            ({"full_attention": 1, "sliding_attention": 2}, "full attention in all layers"),
            ({"full_attention": types.SimpleNamespace()}, "allocator._copy_view"),
        ):
            with pytest.raises(ModelNotSupported, match=says):
                wrap(cache, types.SimpleNamespace(cache_allocators=allocators))
