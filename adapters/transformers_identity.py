"""What determines a transformers model's K/V beside the tokens: gathered once, part of every key.

Two processes share blocks only where all of this is equal; a model whose K/V is not the same
function of the tokens before it each time is refused by name. Tried with transformers 5.19.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from blake3 import blake3
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

from kvengine.errors import ModelNotSupported
from kvengine.layout import ITEM_BYTES, Layout

PLACES = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash")
# Their frequencies change with the length of the prompt, and so do keys already computed.
ROPE_BY_LENGTH = ("dynamic", "longrope")
# Of K/V with and without later tokens: what kernels differ by is 0.01, another meaning is 1.
CAUSAL_TOLERANCE = 0.1
GAP = 64  # columns; as many tokens, half of them on each side


Layer = Any  # transformers is not typed


@dataclass(frozen=True, slots=True)
class Facts:
    """The parts of an identity that a model's configuration and weights tell."""

    model: str
    revision: str
    kv_dtype: str
    positional: str


def describe(model: Any, layout: Layout, revision: str = "") -> Facts:
    """Gather the facts. `revision` names the weights; without it their bytes are hashed."""
    config = model.config.get_text_config(decoder=True)
    cpu = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    computed = "\n".join(
        (
            settings(model),
            f"attention {config._attn_implementation}",
            f"autocast {cpu}",
            f"transformers {transformers.__version__}",
        )
    )
    weights = f"named:{revision}" if revision else f"weights:{weights_digest(model)}"
    kind = type(model)
    return Facts(
        model=f"{kind.__module__}.{kind.__qualname__}",
        revision=f"{weights}+{blake3(computed.encode()).hexdigest()}",
        kv_dtype=f"{layout.dtype}/{model.dtype}",
        positional=f"rope {getattr(config, 'rope_parameters', None)}",
    )


def settings(model: Any) -> str:
    """Return all that the model's configuration says, but not where it lies."""

    def placeless(found: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in found.items() if name not in PLACES}

    text = model.config.to_json_string(use_diff=False)
    return json.dumps(json.loads(text, object_hook=placeless), sort_keys=True)


def tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by name: rotary frequencies too, which no checkpoint holds."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def weights_digest(model: Any) -> str:
    """Hash names, types, shapes and bytes of all weights, as they lie in memory.

    So merged adapters, edited or requantised weights are another revision, whatever their files
    are called. Takes about a second for each 2 GB. Raises ModelNotSupported for weights whose
    bytes cannot be read.
    """
    digest = blake3(max_threads=blake3.AUTO)
    for name, weight in tensors(model):
        digest.update(f"{name}\0{weight.dtype}\0{tuple(weight.shape)}\0".encode())
        try:
            flat = weight.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise ModelNotSupported(
                f"the bytes of {name} ({type(weight).__name__}) cannot be read ({error}): pass "
                "revision=, a name that changes with the weights"
            ) from error
        digest.update(flat.data)
    return digest.hexdigest()


def mark(model: Any) -> int:
    """Return a number that changes when weights are replaced or written, or are used otherwise.

    Cheap: no weight is read. (A write through `.data` leaves no trace: make a new PrefixCache.)
    """
    places = [
        (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        for _, weight in tensors(model)
    ]
    config = model.config.get_text_config(decoder=True)
    autocast = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    return hash((tuple(places), config._attn_implementation, autocast))


def check_model(model: Any) -> None:
    """Raise ModelNotSupported for what the configuration already shows."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ModelNotSupported(
            f"{name} is an encoder-decoder model, expected a decoder: its cross attention is "
            "no function of the tokens before; generate without kvengine"
        )
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise ModelNotSupported(
            f"{name} has a PEFT adapter loaded, which may be switched between calls: merge it "
            "into the weights (merge_and_unload)"
        )
    if model.training:
        raise ModelNotSupported(f"{name} is in training mode: call model.eval() first")
    if getattr(model, "device", torch.device("cpu")).type != "cpu":
        raise ModelNotSupported(
            f"{name} lies on {model.device}, this version copies host memory: move it to the CPU"
        )
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope.get("rope_type")] + [
        each.get("rope_type") for each in rope.values() if isinstance(each, dict)
    ]
    for kind in kinds:
        if kind in ROPE_BY_LENGTH:
            raise ModelNotSupported(
                f"{name} has rope_type {kind!r}, whose angles change with the length of the "
                "prompt: blocks of a prefix would not fit a longer one"
            )


KINDS = {DynamicCache: DynamicLayer, StaticCache: StaticLayer}


def check_layers(cache: object) -> list[Layer]:
    """Return the layers of a cache of full attention, dynamic or static.

    Raises ModelNotSupported.
    """
    if type(cache) not in KINDS:
        raise ModelNotSupported(
            f"a {type(cache).__name__} was given, expected a DynamicCache or StaticCache: "
            "quantised and encoder-decoder caches are not supported"
        )
    kind = KINDS[type(cache)]
    layers: list[Any] = list(cast(Any, cache).layers)
    for index, layer in enumerate(layers):
        if type(layer) is not kind:
            raise ModelNotSupported(
                f"layer {index} keeps a {type(layer).__name__}, expected {kind.__name__} (full "
                "attention): sliding-window, recurrent and indexed layers are not supported yet; "
                "generate without kvengine"
            )
    return layers


def probe(model: Any, block_tokens: int) -> Layout:
    """Run one and three tokens through the model to see what it keeps: shapes, dtype, causality.

    Raises ModelNotSupported for what blocks cannot hold.
    """
    name = type(model).__name__
    one, three = (_probed(model, length) for length in (1, 3))
    shapes = {(k.shape[:2], k.shape[3], v.shape[3]) for k, v in one}
    dtypes = {each.dtype for pair in one for each in pair}
    places = {each.device.type for pair in one for each in pair}
    kinds = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if len(shapes) != 1 or len(kinds) != 1 or kinds[0] not in ITEM_BYTES or places != {"cpu"}:
        raise ModelNotSupported(
            f"the layers of {name} keep {sorted(map(str, shapes))} of {', '.join(kinds)} on "
            f"{', '.join(sorted(places))}, expected one shape and dtype on the CPU"
        )
    for index, (short, long) in enumerate(zip(one, three, strict=True)):
        for a, b in zip(short, long, strict=True):
            first, same = a[:, :, 0].float(), b[:, :, 0].float()
            if not torch.linalg.norm(first - same) <= CAUSAL_TOLERANCE * torch.linalg.norm(first):
                raise ModelNotSupported(
                    f"K/V of {name} (layer {index}) depend on the tokens that follow: a prefix "
                    "cannot be reused under another continuation"
                )
    keys, values = one[0]
    return Layout(
        layers=len(one),
        kv_heads=keys.shape[1],
        head_dim=keys.shape[3],
        head_dim_v=values.shape[3],
        dtype=kinds[0],
        block_tokens=block_tokens,
        order="HND",
        paged=False,
    )


def gaps_are_fine(model: Any) -> bool:
    """Tell whether masked columns between two tokens change nothing of what follows.

    Not so where a model reads distances off the columns (ALiBi of MPT).
    """
    config = model.config.get_text_config(decoder=True)
    head, tail = (torch.arange(GAP)[None] + start for start in (0, GAP // 2))
    head, tail = head[:, : GAP // 2] % config.vocab_size, tail[:, : GAP // 2] % config.vocab_size
    found = []
    for gap in (0, GAP):
        cache = DynamicCache(config=config)
        mask = torch.ones((1, GAP + gap), dtype=torch.long)
        mask[:, GAP // 2 : GAP // 2 + gap] = 0
        rest = torch.cat([tail[:, :1].expand(1, gap), tail], dim=1)
        with torch.no_grad():
            model(head, past_key_values=cache, use_cache=True)
            columns = positions(model, mask, GAP // 2, GAP + gap)
            made = model(
                rest, attention_mask=mask, past_key_values=cache, use_cache=True, **columns
            )
        found.append(made.logits[:, -1].float())
    plain, gapped = found
    close = torch.linalg.norm(plain - gapped) <= CAUSAL_TOLERANCE * torch.linalg.norm(plain)
    return bool(close)


def positions(model: Any, mask: torch.Tensor, start: int, stop: int) -> dict[str, torch.Tensor]:
    """Return the positions of some columns, as a model takes them that takes any."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)[:, start:stop]}


def pairs(layers: list[Layer]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return K and V [1, heads, tokens, dim] of each layer; raises ModelNotSupported if empty."""
    found = []
    for index, layer in enumerate(layers):
        if layer.keys is None or layer.values is None or layer.keys.ndim != 4:
            raise ModelNotSupported(
                f"layer {index} of the cache is empty (some models share K/V among layers, or keep "
                "their state elsewhere), expected K and V for each layer"
            )
        found.append((layer.keys, layer.values))
    return found


def _probed(model: Any, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    check_layers(cache)
    ids = torch.arange(length)[None] % config.vocab_size
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return pairs(check_layers(cache))
