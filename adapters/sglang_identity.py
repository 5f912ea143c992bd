"""What determines the bytes of a SGLang page beside its tokens: gathered once, part of every key.

Two processes share pages only where all of this is equal; what cannot be told apart is refused.
SGLang's page hash covers the tokens before it, the request's extra key and its salt. Tried with
SGLang 0.5.23, whose objects have no types here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from kvengine.adapters.checkpoint import files_revision
from kvengine.errors import ConfigError

# Arguments of the server that change what K/V are computed from the same weights and tokens.
ARGUMENTS = (
    "dtype",
    "kv_cache_dtype",
    "quantization",
    "quantization_param_path",
    "json_model_override_args",
    "load_format",
    "model_impl",
    "attention_backend",
    "prefill_attention_backend",
    "context_length",
    "torchao_config",
)


@dataclass(frozen=True, slots=True)
class Facts:
    """The parts of an identity that neither the pools nor the page hashes tell."""

    model: str
    revision: str
    kv_dtype: str
    adapter: str
    source: str


def describe(config: Any, arguments: Any) -> Facts:
    """Gather the facts from a HiCacheStorageConfig and the server's arguments (None: not known).

    Raises ConfigError for weights that nothing names.
    """
    extra = config.extra_config or {}
    model = config.model_name or getattr(arguments, "model_path", None)
    if not model:
        raise ConfigError("the storage config names no model: start SGLang with --model-path")
    place = getattr(arguments, "model_path", None) or model
    weights = extra.get("revision") or _weights(str(place), "revision")
    parts = [f"{name}={getattr(arguments, name, None)!r}" for name in ARGUMENTS]
    draft = getattr(arguments, "speculative_draft_model_path", None)
    if draft:
        named = extra.get("draft_revision") or _weights(str(draft), "draft_revision")
        parts.append(f"draft={Path(str(draft)).name} {named}")
    settings = blake3("\n".join(parts).encode()).hexdigest()
    return Facts(
        model=Path(str(model)).name if Path(str(model)).exists() else str(model),
        revision=f"{weights}+{settings}",
        kv_dtype=str(getattr(arguments, "kv_cache_dtype", "auto")),
        adapter=_adapters(getattr(arguments, "lora_paths", None) or ()),
        source="sglang/sha256-page-v1",
    )


def _weights(place: str, setting: str) -> str:
    if not Path(place).exists():
        raise ConfigError(
            f"the weights of {place!r} are no local files: set {setting!r} in "
            "--hicache-storage-backend-extra-config to a name that changes with the weights"
        )
    return files_revision(Path(place))


def _adapters(given: Any) -> str:
    """Name the content of LoRA adapters: SGLang's own ids of them are of names and paths."""
    parts = []
    for each in given.values() if isinstance(given, dict) else given:
        path = str(getattr(each, "lora_path", each)).rpartition("=")[2]
        if not Path(path).exists():
            raise ConfigError(
                f"the LoRA adapter {path!r} is no local folder, and SGLang tells adapters apart by "
                "name and path, not by content: download it first, or serve without kvengine"
            )
        parts.append(f"{getattr(each, 'lora_name', path)} {files_revision(Path(path))}")
    return blake3("\n".join(sorted(parts)).encode()).hexdigest() if parts else ""
