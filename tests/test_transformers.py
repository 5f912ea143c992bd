"""Generation on from held blocks: the same tokens as without, or a refusal by name."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvengine
from kvengine.errors import LayoutError, ModelNotSupported

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvengine.adapters import guard  # noqa: E402
from kvengine.adapters import transformers as adapter  # noqa: E402
from kvengine.adapters import transformers_identity as identity  # noqa: E402

NEW = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny matrices gain nothing by threads, and threads wait long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(seed: int = 0, kind: str = "Llama", **changes: Any) -> Any:
    """A random model whose greedy output varies: with smaller weights it repeats one token."""
    fields = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "initializer_range": 0.08,
        "bos_token_id": 510,
        "eos_token_id": 511,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**(fields | changes))
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def tokens(count: int, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return torch.randint(0, 500, (1, count))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture
def engine():
    with kvengine.open("mem://?size=8M", threads=1) as engine:
        yield engine
        engine.check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_tokens_with_and_without(engine, dtype):
    model = tiny().to(getattr(torch, dtype))
    cache = adapter.PrefixCache(engine, model)
    ids = tokens(100)
    plain = model.generate(ids, **NEW)
    assert len(set(plain[0, 100:].tolist())) > 10
    assert torch.equal(cache.generate(ids, **NEW), plain)  # cold: nothing is split
    past = cache.load(ids)
    assert past.get_seq_length() == 96
    again = cache.generate(ids, past=past, **NEW)
    if dtype == "float32":
        assert torch.equal(again, plain)
    other = torch.cat([ids[:, :50], tokens(30, seed=2)], dim=1)
    assert cache.load(other).get_seq_length() == 48


def test_loaded_bytes_are_those_saved_and_the_last_token_is_computed(engine, model):
    cache = adapter.PrefixCache(engine, model)
    ids = tokens(64)
    past = cache.prefill(ids)
    assert past.get_seq_length() == 64
    found = cache.load(ids)
    assert found.get_seq_length() == 48  # the fourth block would leave no token to compute
    for a, b in zip(past.layers, found.layers, strict=True):
        for one, other in ((a.keys, b.keys), (a.values, b.values)):
            assert torch.equal(one[:, :, :48].view(torch.uint8), other.view(torch.uint8))
    assert cache.load(tokens(16)).get_seq_length() == 0
    assert cache.load(tokens(1)).get_seq_length() == 0


def test_the_next_turn_reuses_what_was_generated(engine, model):
    cache = adapter.PrefixCache(engine, model)
    first = cache.generate(tokens(40), **NEW)
    turn = torch.cat([first, tokens(10, seed=3)], dim=1)
    # 59 of 60 tokens have K/V: the last one was never fed back.
    assert cache.load(turn).get_seq_length() == 48
    assert torch.equal(cache.generate(turn, **NEW), model.generate(turn, **NEW))


def test_options_of_generate_go_through(engine, model):
    cache = adapter.PrefixCache(engine, model)
    ids = tokens(40)
    options = {**NEW, "return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
    for _ in range(2):
        output = cache.generate(input_ids=ids, **options)
        assert torch.equal(output.sequences, model.generate(ids, **NEW))
    torch.manual_seed(5)
    sampled = cache.generate(ids, max_new_tokens=8, do_sample=True, top_k=20)
    torch.manual_seed(5)
    assert torch.equal(sampled, model.generate(ids, max_new_tokens=8, do_sample=True, top_k=20))
    assert cache.generate(ids, save=False, **NEW).shape == (1, 60)


def test_other_attention_of_more_heads_than_keys(engine):
    model = tiny(kind="Qwen2", num_key_value_heads=1, num_attention_heads=8)
    cache = adapter.PrefixCache(engine, model)
    ids = tokens(50)
    plain = model.generate(ids, **NEW)
    assert all(torch.equal(cache.generate(ids, **NEW), plain) for _ in range(2))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rms_norm_eps": 1e-3},
        {"attn_implementation": "eager"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_model_is_a_miss(engine, model, other):
    ids = tokens(40)
    adapter.PrefixCache(engine, model).prefill(ids)
    assert adapter.PrefixCache(engine, tiny()).load(ids).get_seq_length() == 32
    assert adapter.PrefixCache(engine, tiny(**other)).load(ids).get_seq_length() == 0


def test_dtype_salt_and_revision_are_told_apart(engine, model):
    ids = tokens(40)
    adapter.PrefixCache(engine, model).prefill(ids)
    for other in (
        adapter.PrefixCache(engine, tiny().to(torch.bfloat16)),
        adapter.PrefixCache(engine, model, salt="b"),
        adapter.PrefixCache(engine, model, revision="r1"),
        adapter.PrefixCache(engine, model, block_tokens=32),
    ):
        assert other.load(ids).get_seq_length() == 0


@pytest.mark.parametrize("revision", ["", "r1"])
def test_weights_that_change_are_another_model(engine, revision):
    model = tiny()
    cache = adapter.PrefixCache(engine, model, revision=revision)
    ids = tokens(40)
    begun = cache.prefill(ids)
    assert cache.load(ids).get_seq_length() == 32
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert cache.load(ids).get_seq_length() == 0
    assert cache.save(ids, begun) == 0  # these K/V are of the weights before
    plain = model.generate(ids, **NEW)
    assert torch.equal(cache.generate(ids, past=begun, **NEW), plain)
    assert cache.load(ids).get_seq_length() == 32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cache.load(ids).get_seq_length() == 0


def test_a_closed_a_dropped_and_a_full_engine_compute(model):
    ids = tokens(100)
    plain = model.generate(ids, **NEW)
    with kvengine.open("mem://?size=8M", threads=1) as engine:
        cache = adapter.PrefixCache(engine, model)
        cache.generate(ids, **NEW)
        engine.drop_all()
        assert cache.load(ids).get_seq_length() == 0
        cache.generate(ids, **NEW)
        assert cache.load(ids).get_seq_length() == 96
    assert cache.load(ids).get_seq_length() == 0
    assert torch.equal(cache.generate(ids, **NEW), plain)
    with kvengine.open("mem://?size=64K", threads=1) as small:
        cache = adapter.PrefixCache(small, model)
        past = cache.prefill(ids, save=False)
        assert 0 <= cache.save(ids, past) < 6
        assert torch.equal(cache.generate(ids, **NEW), plain)
    with (
        kvengine.open("mem://?size=64K", threads=1) as none,
        pytest.raises(LayoutError, match="one block"),
    ):
        adapter.PrefixCache(none, model, block_tokens=256)


def test_faults_are_counted_and_pause_it(engine, model, monkeypatch):
    now = [0.0]
    cache = adapter.PrefixCache(engine, model, clock=lambda: now[0])
    ids = tokens(40)
    plain = cache.generate(ids, **NEW)

    def fail(*_: object) -> None:
        raise MemoryError("no tensor")

    monkeypatch.setattr(adapter.np, "arange", fail)
    for _ in range(2):
        assert torch.equal(cache.generate(ids, **NEW), plain)
    assert engine.metrics.get("adapter_errors", adapter="transformers") == 3
    monkeypatch.undo()
    assert cache.load(ids).get_seq_length() == 0
    now[0] = guard.PAUSE_S
    assert cache.load(ids).get_seq_length() == 32


def flip_a_byte(directory: Path) -> None:
    """Damage what lies in the middle of the largest file's data."""
    path = max(directory.rglob("*"), key=lambda each: each.stat().st_size)
    place = int(np.median(np.flatnonzero(np.fromfile(path, dtype=np.uint8))))
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_a_bad_block_is_computed(tmp_path, model):
    ids = tokens(100)
    plain = model.generate(ids, **NEW)
    with kvengine.open(f"mem://?size=8M | file://{tmp_path}?size=16M", threads=1) as engine:
        cache = adapter.PrefixCache(engine, model)
        cache.generate(ids, **NEW)
        assert engine.flush()
        engine.squeeze(0)
        flip_a_byte(tmp_path)
        assert 0 <= cache.load(ids).get_seq_length() < 96
        assert torch.equal(cache.generate(ids, **NEW), plain)
        assert engine.stats()["corrupt_blocks"] == 1


@pytest.mark.leaks("a forked child ends without unwinding")
def test_a_forked_child_computes_for_itself(engine, model):
    cache = adapter.PrefixCache(engine, model)
    ids = tokens(40)
    cache.prefill(ids)
    child = os.fork()
    if not child:
        signal.alarm(30)
        held = cache.load(ids).get_seq_length()
        os._exit(0 if held == 0 and cache.save(ids, cache._empty()) == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert cache.load(ids).get_seq_length() == 32


UNSUPPORTED = (
    ("Mistral", {"sliding_window": 64}, "DynamicSlidingWindowLayer"),
    (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "'dynamic'",
    ),
)


@pytest.mark.parametrize(("kind", "changes", "says"), UNSUPPORTED)
def test_models_that_cannot_be_mapped_are_named(engine, kind, changes, says):
    with pytest.raises(ModelNotSupported, match=says):
        adapter.PrefixCache(engine, tiny(kind=kind, **changes))


def test_encoder_decoder_training_and_looking_ahead_are_refused(engine):
    small = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, **small))
    with pytest.raises(ModelNotSupported, match="encoder-decoder"):
        adapter.PrefixCache(engine, t5.eval())
    with pytest.raises(ModelNotSupported, match="training mode"):
        adapter.PrefixCache(engine, tiny().train())
    peft = tiny()
    peft.peft_config = {}
    with pytest.raises(ModelNotSupported, match="merge"):
        adapter.PrefixCache(engine, peft)
    ahead = tiny()

    def mix(_: object, __: object, output: Any) -> Any:
        return output + output.mean(dim=1, keepdim=True) * output.shape[1]

    ahead.model.embed_tokens.register_forward_hook(mix)
    with pytest.raises(ModelNotSupported, match="tokens that follow"):
        adapter.PrefixCache(engine, ahead)


def test_latent_attention_is_kept_as_it_lies(engine):
    """DeepSeek's layers keep a latent and a rotary part as the K and V of a single head."""
    mla = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
    more = {"v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    more |= {"topk_group": 1, "num_key_value_heads": 4, "moe_intermediate_size": 32}
    model = tiny(kind="DeepseekV3", **mla, **more, head_dim=8, first_k_dense_replace=3)
    cache = adapter.PrefixCache(engine, model)
    layout = cache.layout
    assert (layout.kv_heads, layout.head_dim, layout.head_dim_v) == (1, 16, 8)
    ids = tokens(50)
    plain = model.generate(ids, **NEW)
    assert all(torch.equal(cache.generate(ids, **NEW), plain) for _ in range(2))
    assert cache.load(ids).get_seq_length() == 48


@pytest.mark.parametrize(
    ("ids", "options", "says"),
    [
        (torch.ones(20, dtype=torch.long), {}, r"int\[prompts, tokens\]"),
        (torch.ones(1, 20), {}, "integer"),
        (torch.ones(1, 0, dtype=torch.long), {}, "at least one"),
        ([[1, 2]], {}, "input_ids"),
        (None, {"use_cache": False}, "use_cache is False"),
        (None, {"cache_implementation": "quantized"}, "cache_implementation"),
        (None, {"prefill_chunk_size": 8}, "pass chunk_tokens"),
        (None, {"penalty_alpha": 0.5}, "penalty_alpha"),
        (None, {"past_key_values": object()}, "past_key_values"),
        (None, {"inputs_embeds": torch.ones(1, 20, 64)}, "inputs_embeds"),
        (None, {"pixel_values": torch.ones(1)}, "pixel_values is a tensor"),
        (None, {"attention_mask": torch.tensor([[1] * 19 + [0]])}, "padded on the left"),
        (None, {"attention_mask": torch.zeros(1, 20, dtype=torch.long)}, "padded on the left"),
        (None, {"attention_mask": torch.ones(1, 19)}, "that of input_ids"),
    ],
)
def test_calls_that_cannot_be_mapped_are_named(engine, model, ids, options, says):
    cache = adapter.PrefixCache(engine, model)
    with pytest.raises(ModelNotSupported, match=says):
        cache.generate(tokens(20) if ids is None else ids, **options)


def test_padding_by_token_and_foreign_caches_are_refused(engine, model):
    cache = adapter.PrefixCache(engine, model)
    ids = tokens(20)
    config = transformers.GenerationConfig(pad_token_id=int(ids[0, 3]), eos_token_id=511)
    with pytest.raises(ModelNotSupported, match="padded"):
        cache.generate(ids, generation_config=config)
    quantised = object.__new__(transformers.QuantizedCache)
    with pytest.raises(ModelNotSupported, match="a QuantizedCache was given"):
        cache.save(ids, quantised)
    with pytest.raises(ModelNotSupported, match="2 prompts"):
        cache.load(ids.expand(2, -1))
    with pytest.raises(ModelNotSupported, match="layers"):
        cache.save(ids, transformers.DynamicCache(config=tiny(num_hidden_layers=2).config))


def test_weights_digest_reads_every_byte():
    model = tiny()
    before = identity.weights_digest(model)
    assert identity.weights_digest(tiny()) == before
    last = list(model.parameters())[-1].detach()
    last.view(torch.uint8).reshape(-1)[-1] ^= 1
    assert identity.weights_digest(model) != before
