"""Batches, samples, beams, static caches, chunks and streams: the same tokens as without."""

from typing import Any

import numpy as np
import pytest

import kvengine
from kvengine.errors import ModelNotSupported

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvengine.adapters import transformers as adapter  # noqa: E402
from kvengine.adapters.transformers_rows import Row, Rows  # noqa: E402
from test_transformers import NEW, one_thread, tiny, tokens  # noqa: E402, F401

SIZE = 16


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture
def engine():
    with kvengine.open("mem://?size=32M", threads=1) as engine:
        yield engine


@pytest.fixture
def cache(engine, model):
    found = adapter.PrefixCache(engine, model, measure=False)
    assert found._gaps_fine()  # before columns are counted
    return found


def padded(prompts: list[Any]) -> dict[str, Any]:
    """Prompts of several lengths as a tokenizer pads them, and their mask."""
    width = max(prompt.shape[1] for prompt in prompts)
    ids = torch.full((len(prompts), width), 511)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.shape[1] :] = prompt
        mask[row, width - prompt.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


class Columns:
    """Counts the columns that the model computes, call by call."""

    def __init__(self, model: Any) -> None:
        self.counts: list[int] = []
        hook = self._note
        self._handle = model.model.embed_tokens.register_forward_pre_hook(hook)

    def _note(self, _: Any, given: Any) -> None:
        self.counts.append(given[0].shape[1])

    def __enter__(self) -> "Columns":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


HELD = (
    (0, 0, 0, 0),
    (48, 0, 0, 0),
    (48, 16, 64, 0),
    (16, 16, 16, 16),
    (0, 16, 32, 16),
    (48, 32, 64, 16),
)


@pytest.mark.parametrize("held", HELD, ids=str)
def test_prompts_with_different_cached_lengths(model, cache, held):
    prompts = [tokens(count, seed) for seed, count in enumerate((50, 33, 70, 20))]
    given = padded(prompts)
    plain = model.generate(**given, **NEW, pad_token_id=511)
    for prompt, count in zip(prompts, held, strict=True):
        if count:
            cache.prefill(prompt[:, : count + 1])
    tail = max(prompt.shape[1] - count for prompt, count in zip(prompts, held, strict=True))
    with Columns(model) as columns:
        found = cache.generate(**given, **NEW, pad_token_id=511)
    assert torch.equal(found, plain)
    assert columns.counts == [tail] + [1] * (NEW["max_new_tokens"] - 1)
    for row, prompt in zip(found, prompts, strict=True):  # and what was generated is held now
        whole = torch.cat([prompt, row[None, -NEW["max_new_tokens"] :]], dim=1)
        expected = (whole.shape[1] - 1) // SIZE * SIZE
        assert cache.load(whole).get_seq_length() == expected
    cache.engine.check()


FAMILIES = (
    ("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 512}, False),
    ("Bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4}, True),
    ("GPTNeoX", {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}, True),
)


@pytest.mark.parametrize(("kind", "fields", "fine"), FAMILIES)
def test_positions_of_other_kinds(engine, kind, fields, fine):
    """Where distances are read off the columns, a batch is computed whole; one prompt is not."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")
    config = config(vocab_size=512, initializer_range=0.2, use_cache=True, **fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    cache = adapter.PrefixCache(engine, model, measure=False)
    prompts = [tokens(50, 0), tokens(33, 1), tokens(70, 2)]
    given, options = padded(prompts), {**NEW, "use_cache": True, "pad_token_id": 511}
    plain, alone = model.generate(**given, **options), model.generate(prompts[0], **options)
    cache.prefill(prompts[0])
    cache.prefill(prompts[2][:, :33])
    assert torch.equal(cache.generate(**given, **options), plain)
    assert torch.equal(cache.generate(prompts[0], **options, chunk_tokens=16), alone)
    assert cache._gaps == fine
    assert cache.load(prompts[2]).get_seq_length() == 64
    assert engine.metrics.get("adapter_errors", adapter="transformers") == 0


def test_a_batch_of_40(model, cache):
    prompts = [torch.cat([tokens(40), tokens(5 + n, n)], dim=1) for n in range(40)]
    given = padded(prompts)
    options = {**NEW, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 511}
    plain = model.generate(**given, **options)
    cache.prefill(tokens(40))
    with Columns(model) as columns:
        assert torch.equal(cache.generate(**given, **options), plain)
    assert columns.counts[0] == 40 + 44 - 32
    with Columns(model) as columns:
        assert torch.equal(cache.generate(**given, **options), plain)
    assert columns.counts[0] == SIZE
    assert cache.engine.metrics.get("adapter_errors", adapter="transformers") == 0


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.3}, {"max_length": 120}], ids=str)
def test_options_that_look_at_the_prompt(model, cache, options):
    given = padded([tokens(70, 1), tokens(33, 2)])
    options = {**options, "do_sample": False, "pad_token_id": 511}
    plain = model.generate(**given, **options)
    cache.prefill(tokens(70, 1))
    found = cache.generate(**given, **options, return_dict_in_generate=True)
    assert torch.equal(found.sequences, plain)


def test_samples_and_beams_share_their_prompt(model, cache):
    ids = tokens(70)
    blocks = lambda: cache.engine.stats()["memory_blocks"]  # noqa: E731
    sampled = {"max_new_tokens": 40, "do_sample": True, "num_return_sequences": 5}
    torch.manual_seed(3)
    plain = model.generate(ids, **sampled)
    for _ in range(2):  # cold, then on from what is held
        torch.manual_seed(3)
        assert torch.equal(cache.generate(ids, **sampled), plain)
    paths = {tuple(row[:stop].tolist()) for row in plain for stop in range(SIZE, 110, SIZE)}
    assert blocks() == len(paths) < 5 * 6
    searched = {"max_new_tokens": 20, "num_beams": 4, "num_return_sequences": 2}
    plain = model.generate(ids, **searched, do_sample=False)
    with Columns(model) as columns:
        assert torch.equal(cache.generate(ids, **searched, do_sample=False), plain)
    assert columns.counts[0] == 70 - 64
    assert blocks() == len(paths)
    given = padded([tokens(50, 8), tokens(20, 9)])
    plain = model.generate(**given, **searched, do_sample=False, pad_token_id=511)
    for _ in range(2):
        found = cache.generate(**given, **searched, do_sample=False, pad_token_id=511)
        assert torch.equal(found, plain)
    assert cache.load(tokens(50, 8)).get_seq_length() == 48


@pytest.mark.parametrize("more", [{}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_static_caches(model, cache, more):
    given = padded([tokens(50, 1), tokens(33, 2)])
    options = {**NEW, **more, "pad_token_id": 511}
    plain = model.generate(**given, **options)
    with Columns(model) as columns:
        for _ in range(2):
            found = cache.generate(**given, **options, cache_implementation="static")
            assert torch.equal(found, plain)
    first = [count for count in columns.counts if count > 1]
    assert first == [50, 2]  # 48 of 50 tokens are held, and 32 of 33
    assert torch.equal(cache.generate(**given, **options), plain)
    config = transformers.GenerationConfig(**options, cache_implementation="static")
    assert torch.equal(cache.generate(**given, generation_config=config), plain)


def test_a_static_cache_is_saved(model, cache):
    ids = tokens(40)
    static = transformers.StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(ids, past_key_values=static)
    assert cache.save(ids, static) == 2
    assert cache.load(ids).get_seq_length() == 32


def test_blocks_are_saved_while_tokens_stream(model, cache, monkeypatch):
    """Each block is given to the engine once it is computed, and nobody waits for it."""
    engine, seen, waited = cache.engine, [], []
    save, wait = engine.save, kvengine.Transfer.wait

    def saves(keys: Any, *rest: Any, **more: Any) -> Any:
        seen.append((len(streamer.tokens), keys.position, len(keys)))
        return save(keys, *rest, **more)

    def waits(transfer: Any, timeout_s: Any = None) -> bool:
        waited.append(len(streamer.tokens))
        return wait(transfer, timeout_s)

    class Streamer:
        tokens: list[int] = []

        def put(self, value: Any) -> None:
            self.tokens.extend(value.reshape(-1).tolist())

        def end(self) -> None:
            pass

    streamer = Streamer()
    monkeypatch.setattr(engine, "save", saves)
    monkeypatch.setattr(kvengine.Transfer, "wait", waits)
    options = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False}
    found = cache.generate(tokens(40), streamer=streamer, **options)
    assert streamer.tokens == found[0].tolist()
    assert [(position, count) for _, position, count in seen] == [
        (0, 2),
        (2, 1),
        (3, 1),
        (4, 1),
        (5, 1),
    ]
    assert [at - (position + count) * SIZE for at, position, count in seen[1:]] == [0] * 4
    assert set(waited) == {100}


def test_long_prompts_in_chunks(model, cache):
    ids = tokens(200)
    plain = model.generate(ids, **NEW)
    seen = []
    with Columns(model) as columns:
        save = cache.engine.save
        cache.engine.save = lambda keys, *rest: (
            seen.append(sum(columns.counts)) or save(keys, *rest)
        )
        past = cache.prefill(ids, chunk_tokens=64)
        cache.engine.save = save
    assert columns.counts == [64, 64, 64, 7, 1]
    assert seen[:3] == [64, 128, 192]  # while the rest of the prompt was not computed yet
    assert cache.load(ids).get_seq_length() == 192
    assert past.get_seq_length() == 200
    given = padded([torch.cat([ids, tokens(70, 5)], dim=1), tokens(90, 4)])
    plain = model.generate(**given, **NEW, pad_token_id=511)
    with Columns(model) as columns:
        found = cache.generate(**given, **NEW, chunk_tokens=32, pad_token_id=511)
    assert torch.equal(found, plain)
    assert max(columns.counts) == 32
    with pytest.raises(ModelNotSupported, match="chunk_tokens is -1"):
        cache.generate(ids, chunk_tokens=-1)


def test_only_what_is_worth_it_is_loaded(model, engine, monkeypatch):
    cache = adapter.PrefixCache(engine, model)
    told = []
    monkeypatch.setattr(engine, "observe_prefill", lambda *what: told.append(what[1:]))
    ids = tokens(70)
    plain = cache.generate(ids, **NEW)
    match = engine.match

    def picky(keys: Any) -> Any:
        lease = match(keys)
        lease.worth = range(min(2, lease.blocks))
        return lease

    monkeypatch.setattr(engine, "match", picky)
    assert torch.equal(cache.generate(ids, **NEW), plain)
    assert [what[:2] for what in told] == [(0, 70), (32, 38)]
    assert all(0 < seconds < 60 for _, _, seconds in told)


def test_columns_of_rows():
    rows = [Row(np.arange(10), 4, 4), Row(np.arange(20, 30), 8, 4), Row(np.arange(50, 53))]
    made = Rows(torch.zeros((3, 10), dtype=torch.long), rows)
    assert (made.past, made.width) == (8, 14)
    ids, mask = made.inputs()
    assert [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)] == [
        row.ids.tolist() for row in rows
    ]
    assert mask.tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
    ]
