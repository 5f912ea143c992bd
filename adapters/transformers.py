"""Generation with transformers, on from the leading blocks that the engine holds.

    cache = PrefixCache(engine, model)
    output = cache.generate(input_ids, max_new_tokens=64)

Bytes move once each way: from a layer's own tensors [1, heads, tokens, dim] into frames, and from
frames into tensors that become the layer's own. (transformers itself copies them once more when it
appends.) Tried with transformers 5.19.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import DynamicCache

from kvengine.adapters.guard import Guard
from kvengine.adapters.transformers_identity import (
    check_layers,
    check_model,
    describe,
    mark,
    pairs,
    probe,
)
from kvengine.engine import Engine
from kvengine.errors import ModelNotSupported
from kvengine.keys import BlockKeys, Namespace

LOAD_S, SAVE_S = 10.0, 30.0
MARK = "kvengine_mark"  # on a cache that was begun here: of which weights it is
# Options of generate under which the cache is not one prompt's own, by the value that is fine.
SETTINGS = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic"),
    "prompt_lookup_num_tokens": (None,),
    "prefill_chunk_size": (None,),
    "penalty_alpha": (None,),
}
REFUSED = ("past_key_values", "inputs_embeds", "assistant_model", "custom_generate")

Ids = NDArray[np.int64]
R = TypeVar("R")


class PrefixCache:
    """Saves and loads the K/V of one model's prompts, by their tokens.

    Blocks are shared with every process that runs the same weights, configuration and dtype on the
    same directory. `revision` names the weights where hashing them is not wanted; `salt` separates
    callers. What the engine cannot give is computed: only a model or call that cannot be mapped
    raises (ModelNotSupported). Any thread may call, as far as the model allows it.
    """

    def __init__(
        self,
        engine: Engine,
        model: Any,
        *,
        block_tokens: int = 16,
        revision: str = "",
        salt: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_model(model)
        self.engine = engine
        self.model = model
        self.layout = probe(model, block_tokens)
        self._salt = salt
        self._guard = Guard(engine, "transformers", clock)
        self._mark = mark(model)
        self._facts = describe(model, self.layout, revision)
        self._namespace()

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        past: DynamicCache | None = None,
        save: bool = True,
        **options: Any,
    ) -> Any:
        """Do `model.generate(input_ids, **options)`, on from what is held; return what that gives.

        input_ids: int[1, tokens]. `past` is what `load` gave for them, where the caller has asked
        before. With `save`, full blocks of the prompt and of what is generated are stored, so the
        next turn of a chat finds them. Raises ModelNotSupported for a batch, padding, embeddings
        or other inputs than tokens, beams, and caches of the caller's own.
        """
        self._check(input_ids, options)
        if past is None or self._stale(past):
            past = self.load(input_ids)
        output = self.model.generate(input_ids, past_key_values=past, **options)
        if save:
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            self.save(sequences, past)
        return output

    def prefill(self, input_ids: torch.Tensor, *, save: bool = True) -> DynamicCache:
        """Compute the K/V of a prompt, on from what is held, and store its full blocks."""
        self._check(input_ids, {})
        past = self.load(input_ids)
        with torch.no_grad():
            rest = input_ids[:, past.get_seq_length() :]
            # Only the last position's logits: those of a long prompt take more room than its K/V.
            self.model(rest, past_key_values=past, use_cache=True, logits_to_keep=1)
        if save:
            self.save(input_ids, past)
        return past

    def load(self, input_ids: torch.Tensor) -> DynamicCache:
        """Return a cache with the leading blocks that are held; at least one token is left over.

        `get_seq_length` of it says how many tokens that are; none where the engine is closed, or
        anything fails.
        """
        ids = _ids(input_ids)
        return self._guarded(lambda: self._load(ids), self._empty)

    def save(self, sequences: torch.Tensor, past: DynamicCache) -> int:
        """Store the full blocks of `past`, which holds the K/V of `sequences` int[1, tokens].

        Returns how many of them the engine holds now, and when their bytes have been taken. None
        of a cache that `load` gave before the weights were changed.
        """
        ids, layers = _ids(sequences), check_layers(past)
        if len(layers) != self.layout.layers:
            raise ModelNotSupported(
                f"a cache of {len(layers)} layers was given, the model has {self.layout.layers}"
            )
        return self._guarded(lambda: self._save(ids, past), lambda: 0)

    def keys(self, input_ids: torch.Tensor) -> BlockKeys:
        """Name the full blocks of a prompt, for the engine's own verbs. Raises ClosedError."""
        return self._namespace().keys(_ids(input_ids))

    # Inside

    def _load(self, ids: Ids) -> DynamicCache:
        names, size = self._namespace(), self.layout.block_tokens
        keys = names.keys(ids[: (len(ids) - 1) // size * size])
        with self.engine.match(keys) as lease:
            if not lease.blocks:
                return self._empty()
            shape = (1, self.layout.kv_heads, lease.blocks * size)
            dtype = getattr(torch, self.layout.dtype)
            loaded = [
                tuple(torch.empty((*shape, dim), dtype=dtype) for dim in self.layout.head_dims)
                for _ in range(self.layout.layers)
            ]
            arrays = [(k[0], v[0]) for k, v in loaded]
            transfer = self.engine.load(lease, arrays, np.arange(lease.blocks))
        if not transfer.wait(LOAD_S):
            transfer.stop()  # it may still write, into tensors that nobody looks at
            return self._empty()
        tokens = transfer.blocks * size
        past = self._empty()
        if not tokens:
            return past
        for layer, (k, v) in zip(check_layers(past), loaded, strict=True):
            layer.lazy_initialization(k, v)
            layer.keys, layer.values = k[:, :, :tokens], v[:, :, :tokens]
        return past

    def _save(self, ids: Ids, past: DynamicCache) -> int:
        size = self.layout.block_tokens
        blocks = min(len(ids), past.get_seq_length()) // size
        if not blocks or self._stale(past):
            return 0
        keys = self._namespace().keys(ids[: blocks * size])
        arrays = [(k[0].detach(), v[0].detach()) for k, v in pairs(check_layers(past))]
        transfer = self.engine.save(keys, arrays, np.arange(blocks))
        transfer.wait(SAVE_S)
        return int(transfer.good.sum())

    def _namespace(self) -> Namespace:
        """Where keys come from, as the weights and the engine's epoch are now."""
        now = mark(self.model)
        if now != self._mark:
            check_model(self.model)
            # A name that was given for other weights no longer tells these.
            self._facts = describe(self.model, self.layout)
            self._mark = now
        facts = self._facts
        return self.engine.namespace(
            model=facts.model,
            revision=facts.revision,
            layout=self.layout,
            kv_dtype=facts.kv_dtype,
            positional=facts.positional,
            salt=self._salt,
        )

    def _empty(self) -> DynamicCache:
        past = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        setattr(past, MARK, mark(self.model))
        return past

    def _stale(self, past: DynamicCache) -> bool:
        """Whether the weights are others now than when this cache was begun."""
        now = mark(self.model)
        return bool(getattr(past, MARK, now) != now)

    def _guarded(self, verb: Callable[[], R], otherwise: Callable[[], R]) -> R:
        return otherwise() if self.model.training else self._guard.guarded(verb, otherwise)

    def _check(self, input_ids: torch.Tensor, options: dict[str, Any]) -> None:
        """Raise ModelNotSupported for a call whose cache would not be that of these tokens."""
        ids = _ids(input_ids)
        for name in REFUSED:
            if options.get(name) is not None:
                raise ModelNotSupported(
                    f"{name} was given, and K/V are named by the prompt's tokens alone: leave it "
                    "out, or call model.generate"
                )
        chosen = options.get("generation_config") or self.model.generation_config
        for name, fine in SETTINGS.items():
            value = options.get(name, getattr(chosen, name, None))
            if value not in fine:
                raise ModelNotSupported(
                    f"{name} is {value!r}, expected {fine[-1]!r}: one sequence is generated from "
                    "one prompt, with a cache of its own; or call model.generate"
                )
        for name, value in options.items():
            if isinstance(value, torch.Tensor) and name != "attention_mask":
                raise ModelNotSupported(
                    f"{name} is a tensor beside the tokens, which no key covers: leave it out, or "
                    "call model.generate"
                )
        mask = options.get("attention_mask")
        pad, end = chosen.pad_token_id, chosen.eos_token_id
        ends = end if isinstance(end, list | tuple) else [end]
        padded = mask is None and pad is not None and pad not in ends and bool((ids == pad).any())
        if padded or (mask is not None and not bool(mask.all())):
            raise ModelNotSupported(
                "the prompt is padded (attention_mask has zeros, or pad_token_id stands in it), "
                "expected one without: its positions are not those of its tokens"
            )


def _ids(input_ids: Any) -> Ids:
    """Return the tokens of one prompt; raises ModelNotSupported for anything else."""
    shape = getattr(input_ids, "shape", None)
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ModelNotSupported(
            f"input_ids of shape {None if shape is None else list(shape)}, expected int[1, "
            "tokens]: generate for one prompt at a time; a batch is not supported yet"
        )
    if input_ids.is_floating_point() or not input_ids.shape[1]:
        raise ModelNotSupported(
            f"input_ids of {input_ids.dtype} and {input_ids.shape[1]} tokens, expected at least "
            "one integer token"
        )
    found: Ids = input_ids[0].cpu().numpy().astype(np.int64, copy=False)
    return found
