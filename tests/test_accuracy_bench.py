"""bench.accuracy: all rows, on a model so small that its weights are drawn here."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, require: Callable[[str], ModuleType]) -> ModuleType:
    """bench.accuracy with short windows, its model replaced."""
    torch, transformers = require("torch"), require("transformers")
    monkeypatch.syspath_prepend(str(ROOT))
    import bench.accuracy

    def load(*_: object) -> tuple[object, object]:
        torch.manual_seed(1)
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=256, **sizes, **heads)
        )
        return model.eval(), lambda text: SimpleNamespace(input_ids=list(text.encode()))

    monkeypatch.setattr(bench.accuracy.models, "find", lambda model: "x")
    monkeypatch.setattr(bench.accuracy.models, "load", load)
    monkeypatch.setattr(bench.accuracy, "MEMORY", "mem://?size=16M")
    monkeypatch.setattr(bench.accuracy, "PREFIX", 128)
    monkeypatch.setattr(bench.accuracy, "FOLLOWING", 32)
    return bench.accuracy


def test_every_codec_has_its_rows(bench: ModuleType) -> None:
    rows = bench.run(argparse.Namespace(model=None, windows=2))
    values = {(row.case, row.metric): row.value for row in rows}
    assert len(values) == len(rows)
    assert values["lossless", "bit_exact"] == values["lossless 16 tokens", "bit_exact"] == 1
    for name in ("int8", "fp8", "int4", "rot4"):
        assert 0 < values[name, "relative_mse"] < 0.02
        assert 0.5 < values[name, "top1_agreement"] <= 1
        assert abs(values[name, "delta_loss"]) < 0.1
        for case in (name, f"{name} 16 tokens"):
            assert values[case, "ratio"] * values[case, "bits_per_element"] == pytest.approx(16)
    # One block of two is the first of its prompt, and has 16 bits, or 8 where the others have 4.
    assert values["int8", "bits_per_element"] == (16 + 8.25) / 2
    assert values["int8 16 tokens", "bits_per_element"] == (16 + 7 * (9 + 8.25) / 2) / 8
    assert values["rot4", "bits_per_element"] == (4.25 + 8.25) / 2
    assert values["lossless 64 tokens", "ratio"] > 1.3


def test_what_is_not_as_it_was_is_said(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench.kvengine.Engine.load

    def load(engine: object, lease: object, caches: list, table: object) -> object:
        transfer = whole(engine, lease, caches, table)
        assert transfer.wait(60)
        caches[0][0][0, 3, 5] += 1
        return transfer

    monkeypatch.setattr(bench.kvengine.Engine, "load", load)
    rows = bench.run(argparse.Namespace(model=None, windows=1))
    found = {row.matches_reference for row in rows if row.metric == "bit_exact"}
    assert found == {False}


def test_a_missing_model_is_named(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(model: object) -> str:
        raise bench.kvengine.ConfigError("no model: install one")

    monkeypatch.setattr(bench.models, "find", find)
    with pytest.raises(SystemExit, match="no model: install one"):
        bench.run(argparse.Namespace(model=None, windows=1))
    with pytest.raises(SystemExit, match="--windows 0: expected 1 or more"):
        bench.run(argparse.Namespace(model=None, windows=0))
