"""What determines the bytes of a vLLM block beside its tokens: gathered once, part of every key.

Two processes share blocks only where all of this is equal; what cannot be told apart is refused.
Tried with vLLM 0.32, whose objects have no types here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, iter_layer_specs

from kvengine.adapters.checkpoint import files_revision
from kvengine.errors import ConfigError, ModelNotSupported

HASHES = ("sha256", "sha256_cbor")
PLACES = ("_name_or_path", "name_or_path", "transformers_version")


@dataclass(frozen=True, slots=True)
class Facts:
    """The parts of an identity that vLLM does not tell an offloading spec."""

    model: str
    revision: str
    kv_dtype: str
    positional: str
    source: str
    permutation: str
    windowed: frozenset[int] = frozenset()  # groups whose attention reads the last tokens only
    lora: str = ""  # what an adapter's K/V depend on beside its files


def describe(vllm_config: Any, kv_cache_config: Any) -> Facts:
    """Gather the facts from a VllmConfig and a KVCacheConfig.

    Raises ConfigError or ModelNotSupported for what no key could tell apart.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    algorithm = cache.prefix_caching_hash_algo
    if algorithm not in HASHES:
        raise ConfigError(
            f"prefix_caching_hash_algo is {algorithm!r}, expected one of {', '.join(HASHES)}: "
            "blocks outlive the process, so their names must be collision resistant"
        )
    groups = [
        list(iter_layer_specs(group.kv_cache_spec)) for group in kv_cache_config.kv_cache_groups
    ]
    specs = [spec for group in groups for spec in group]
    if not all(isinstance(spec, FullAttentionSpec | SlidingWindowSpec) for spec in specs):
        kinds = ", ".join(sorted({type(spec).__name__ for spec in specs}))
        raise ModelNotSupported(
            f"the model has KV cache groups of {kinds}, expected full or sliding-window attention: "
            "recurrent and other layers are not supported yet, serve them without kvengine"
        )
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    weights = extra.get("revision") or weights_revision(model)
    load_format = vllm_config.load_config.load_format
    computed = f"{settings(model)}\n{model.dtype}\n{model.quantization}\n{load_format}"
    return Facts(
        model=model_name(model),
        revision=f"{weights}+{blake3(computed.encode()).hexdigest()}",
        kv_dtype=f"{cache.cache_dtype}/{model.dtype}",
        positional=f"rope {getattr(model.hf_text_config, 'rope_parameters', None)}",
        source=f"vllm/{algorithm}/{hash_seed()}",
        permutation=permutation(vllm_config, specs),
        windowed=frozenset(
            number for number, group in enumerate(groups) if isinstance(group[0], SlidingWindowSpec)
        ),
        lora=lora_settings(vllm_config.lora_config),
    )


def lora_settings(config: Any) -> str:
    """Return what LoRA computes with; "" where it is off."""
    if config is None:
        return ""
    return json.dumps({"dtype": str(config.lora_dtype), "rank": config.max_lora_rank})


def model_name(model: Any) -> str:
    """Return the hub's name, or the name of the local folder, wherever that stands."""
    place = Path(model.model)
    return place.resolve().name if place.exists() else str(model.model)


def settings(model: Any) -> str:
    """Return all that the model's configuration says, overrides included, but not where it lies."""

    def placeless(found: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in found.items() if name not in PLACES}

    text = model.hf_config.to_json_string(use_diff=False)
    return json.dumps(json.loads(text, object_hook=placeless), sort_keys=True)


def weights_revision(model: Any) -> str:
    """Name the weights: the hub's commit, or a fingerprint of the local files.

    The extra setting "revision" says that weights on several hosts are equal.
    """
    commit = getattr(model.hf_config, "_commit_hash", None)
    if commit:
        return f"commit:{commit}"
    place = Path(model.model)
    if not place.exists():
        raise ConfigError(
            f"the weights of {model.model!r} have no commit, and are no local files: set "
            "'revision' in kv_connector_extra_config to a name that changes with the weights"
        )
    return files_revision(place)


def hash_seed() -> str:
    """Return the seed of vLLM's hash chains (PYTHONHASHSEED, or vLLM's fixed one)."""
    from vllm.v1.core.kv_cache_utils import get_none_hash_seed

    return str(get_none_hash_seed())


def pages(vllm_config: Any, kv_caches: dict[str, Any]) -> str:
    """Name what only the worker knows of a page: the kernels' class, the shape and the strides."""
    layers = vllm_config.compilation_config.static_forward_context
    found = set()
    for name, cache in kv_caches.items():
        backend = layers[name].get_attn_backend() if name in layers else None
        kernel = f"{backend.__module__}.{backend.__qualname__}" if backend else "unknown"
        found.add(f"{kernel} {cache.dtype} {tuple(cache.shape[1:])} {cache.stride()[1:]}")
    return blake3("\n".join(sorted(found)).encode()).hexdigest()


def permutation(vllm_config: Any, specs: list[Any]) -> str:
    """Name the order of the bytes in a page: equal names promise that equal bytes mean the same.

    The CPU kernels order K and V by the instruction set; others are told apart by their name.
    """
    import vllm
    from vllm.platforms import current_platform

    kernel = str(vllm_config.attention_config.backend)
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        cache_dtype, dtype = vllm_config.cache_config.cache_dtype, vllm_config.model_config.dtype
        kernel = _get_attn_isa(dtype, specs[0].block_size, specs[0].head_size, cache_dtype)
    order = f"{current_platform.device_type} {kernel} {vllm_config.cache_config.kv_cache_layout}"
    return f"vllm {vllm.__version__} {order} {blake3(repr(specs).encode()).hexdigest()}"
