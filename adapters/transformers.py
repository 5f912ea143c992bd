"""Generation with transformers, on from the leading blocks that the engine holds.

    cache = PrefixCache(engine, model)
    output = cache.generate(input_ids, max_new_tokens=64)

One prompt or a batch of them, each on from what is held of it; samples and beams of a prompt share
one load, and blocks are stored once. Blocks are saved while tokens stream, each when it is full.
Bytes move once each way: from a layer's own tensors [rows, heads, tokens, dim] into frames, and
from frames into tensors that become the layer's own. (transformers itself copies them once more
when it appends to a dynamic cache.) Tried with transformers 5.19.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import StoppingCriteriaList
from transformers.cache_utils import DynamicCache, StaticCache

from kvengine import Client, Engine
from kvengine.adapters.guard import Guard
from kvengine.adapters.transformers_identity import (
    check_layers,
    check_model,
    describe,
    gaps_are_fine,
    mark,
    positions,
    probe,
)
from kvengine.adapters.transformers_rows import Row, Rows, Stream, batch, rows_of
from kvengine.errors import ModelNotSupported
from kvengine.keys import BlockKeys, Namespace
from kvengine.layout import Layout
from kvengine.lease import Lease
from kvengine.transfer import Transfer

LOAD_S, SAVE_S = 10.0, 30.0
DEFAULT_NEW_TOKENS = 20  # of transformers, where nobody says
MARK = "kvengine_mark"  # on a cache that was begun here: of which weights it is
# Options of generate under which the cache is not one prompt's own, by the value that is fine.
SETTINGS = {
    "use_cache": (None, True),
    "cache_implementation": (None, "static", "dynamic"),
    "prompt_lookup_num_tokens": (None,),
    "prefill_chunk_size": (None,),
    "penalty_alpha": (None,),
}
INSTEAD = {"prefill_chunk_size": "pass chunk_tokens"}
REFUSED = ("past_key_values", "inputs_embeds", "assistant_model", "custom_generate")

Ids = NDArray[np.int64]
AnyCache = DynamicCache | StaticCache
R = TypeVar("R")


class PrefixCache:
    """Saves and loads the K/V of one model's prompts, by their tokens.

    Blocks are shared with every process that runs the same weights, configuration and dtype on the
    same directory. `revision` names the weights where hashing them is not wanted; `salt` separates
    callers. With `measure` the engine is told what computing takes, and nothing is loaded that is
    sooner computed. What the engine cannot give is computed: only a model or call that cannot be
    mapped raises (ModelNotSupported). Any thread may call, as far as the model allows it.
    """

    def __init__(
        self,
        engine: Engine | Client,
        model: Any,
        *,
        block_tokens: int = 16,
        revision: str = "",
        salt: str = "",
        measure: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_model(model)
        self.engine = engine
        self.model = model
        self.layout = probe(model, block_tokens)
        self._salt, self._measure, self._clock = salt, measure, clock
        self.guard = Guard(engine, "transformers", clock)
        self._mark = mark(model)
        self._gaps: bool | None = None
        self._facts = describe(model, self.layout, revision)
        self._namespace()

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        past: DynamicCache | None = None,
        save: bool = True,
        chunk_tokens: int = 0,
        **options: Any,
    ) -> Any:
        """Do `model.generate(input_ids, **options)`, on from what is held; return what that gives.

        input_ids: int[prompts, tokens], padded on the left with an attention_mask where lengths
        differ. `past` is what `load` gave for one prompt, where the caller has asked before. With
        `save`, full blocks of the prompts and of what is generated are stored as they fill, so the
        next turn of a chat finds them (of beams, the prompts' only). `chunk_tokens`: compute long
        prompts in pieces of so many tokens. cache_implementation may be "dynamic" or "static".
        Raises ModelNotSupported for embeddings or other inputs than tokens, other padding, and
        caches of the caller's own.
        """
        rows = self._check(input_ids, options)
        chosen = options.get("generation_config") or self.model.generation_config
        beams = self._option(options, chosen, "num_beams") or 1
        each = beams if beams > 1 else self._option(options, chosen, "num_return_sequences") or 1
        if past is not None and not self._stale(past) and len(rows.rows) == 1:
            rows.rows[0].held = rows.rows[0].good = past.get_seq_length()
            cache: AnyCache = past
        else:
            static = self._option(options, chosen, "cache_implementation") == "static"
            room = self._new_tokens(options, chosen) if static else -1
            cache = self._begin(rows, room)
        options.pop("cache_implementation", None)
        if getattr(chosen, "cache_implementation", None):
            chosen = options["generation_config"] = copy.copy(chosen)
            chosen.cache_implementation = None  # the cache is given
        ids, mask = rows.inputs() if rows.past else _given(input_ids, options)
        if rows.past and rows.width != input_ids.shape[1]:
            self._relate(options, chosen, input_ids.shape[1], rows.width)
        if rows.past:
            options["attention_mask"] = mask
        stream = self._stream(rows, cache, each, beams) if save else None
        if chunk_tokens:
            self._chunks(ids, mask, cache, chunk_tokens, stream if each == 1 else None)
        expand(cache, each)
        if stream is not None and beams == 1:
            given = options.pop("stopping_criteria", None) or []
            options["stopping_criteria"] = StoppingCriteriaList([*given, stream])
        output = self.model.generate(ids, past_key_values=cache, **options)
        plain = isinstance(output, torch.Tensor)
        sequences = output if plain else output.sequences
        if stream is not None:
            computed = min(int(cache.get_seq_length()), rows.width if beams > 1 else 1 << 62)
            shown = ids.repeat_interleave(each, dim=0) if beams > 1 else sequences
            stream.advance(shown, computed)
            _settle(stream.transfers)
        if ids is input_ids:
            return output
        copies = len(sequences) // len(input_ids)
        prompts = input_ids.repeat_interleave(copies, dim=0)
        whole = torch.cat([prompts, sequences[:, rows.width :]], dim=1)
        if plain:
            return whole
        output.sequences = whole
        return output

    def prefill(
        self, input_ids: torch.Tensor, *, save: bool = True, chunk_tokens: int = 0
    ) -> DynamicCache:
        """Compute the K/V of a prompt, on from what is held, and store its full blocks.

        In pieces of `chunk_tokens`, each stored while the next is computed. Raises
        ModelNotSupported.
        """
        rows = self._check(input_ids, {})
        if len(rows.rows) != 1:
            raise ModelNotSupported(f"{len(rows.rows)} prompts, expected one: prefill them apart")
        past = self.load(input_ids)
        rows.rows[0].held = rows.rows[0].good = cached = past.get_seq_length()
        stream = self._stream(rows, past, 1, 1) if save else None
        ids = input_ids
        if chunk_tokens:
            mask = torch.ones_like(ids)
            self._chunks(ids, mask, past, chunk_tokens, stream)
        with torch.no_grad():
            rest = input_ids[:, past.get_seq_length() :]
            began = self._clock()
            # Only the last position's logits: those of a long prompt take more room than its K/V.
            self.model(rest, past_key_values=past, use_cache=True, logits_to_keep=1)
        if not chunk_tokens:
            self._observe(cached, rest.shape[1], self._clock() - began)
        if stream is not None:
            stream.advance(ids, ids.shape[1])
            _settle(stream.transfers)
        return past

    def load(self, input_ids: torch.Tensor) -> DynamicCache:
        """Return a cache with the leading blocks that are held; at least one token is left over.

        `get_seq_length` of it says how many tokens that are; none where the engine is closed, or
        anything fails.
        """
        found = self._begin(Rows(input_ids, [Row(_ids(input_ids))]), -1)
        assert isinstance(found, DynamicCache)
        return found

    def save(self, sequences: torch.Tensor, past: AnyCache) -> int:
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

    def _begin(self, rows: Rows, new_tokens: int) -> AnyCache:
        """Return a cache that holds what the engine does of each row; `rows` says how much.

        new_tokens: -1 for a dynamic cache, else what a static one has room for beside the prompts.
        """

        def otherwise() -> AnyCache:
            for row in rows.rows:
                row.held = row.good = 0
            return self._empty(rows.width + new_tokens if new_tokens >= 0 else 0)

        return self._guarded(lambda: self._load(rows, new_tokens, otherwise), otherwise)

    def _load(self, rows: Rows, new_tokens: int, otherwise: Callable[[], AnyCache]) -> AnyCache:
        names, size = self._namespace(), self.layout.block_tokens
        if (len(rows.rows) > 1 or new_tokens >= 0) and not self._gaps_fine():
            return otherwise()
        leases: list[Lease] = []
        try:
            for row in rows.rows:
                keys = names.keys(row.ids[: (len(row.ids) - 1) // size * size])
                leases.append(lease := self.engine.match(keys))
                row.held = len(lease.worth) * size  # what is sooner loaded than computed
            if not rows.past:
                return otherwise()
            # Room for the case that nothing held comes: then a row's tail is its whole prompt.
            longest = rows.past + max(len(row.ids) for row in rows.rows)
            cache = self._empty(longest + new_tokens if new_tokens >= 0 else 0)
            layers = self._room(cache, len(rows.rows), rows.past)
            under_way = [
                self.engine.load(
                    lease,
                    batch(layers, index, rows.start(row), rows.past),
                    np.arange(row.held // size),
                )
                for index, (row, lease) in enumerate(zip(rows.rows, leases, strict=True))
            ]
        finally:
            for lease in leases:
                lease.release()
        if not _settle(under_way, LOAD_S):
            return otherwise()  # they may still write, into tensors that nobody looks at
        for row, transfer in zip(rows.rows, under_way, strict=True):
            row.good = transfer.blocks * size
        if not any(row.good for row in rows.rows):
            return otherwise()
        if len(rows.rows) == 1 and isinstance(cache, DynamicCache):
            (row,) = rows.rows
            row.held = row.good
            for layer in layers:
                layer.keys, layer.values = (
                    each[:, :, : row.good] for each in (layer.keys, layer.values)
                )
        return cache

    def _gaps_fine(self) -> bool:
        """Whether a row may have masked columns inside; tried once."""
        if self._gaps is None:
            self._gaps = gaps_are_fine(self.model)
        return self._gaps

    def _room(self, cache: AnyCache, count: int, columns: int) -> list[Any]:
        """Give a new cache zeros for cached tokens: what is masked must still be a number."""
        layers, dtype = check_layers(cache), getattr(torch, self.layout.dtype)
        shape = (count, self.layout.kv_heads)
        dims = self.layout.head_dims
        for layer in layers:
            if isinstance(cache, StaticCache):
                layer.lazy_initialization(*(torch.empty(*shape, 0, d, dtype=dtype) for d in dims))
                layer.cumulative_length.fill_(columns)
            else:
                k, v = (torch.zeros(*shape, columns, d, dtype=dtype) for d in dims)
                layer.lazy_initialization(k, v)
                layer.keys, layer.values = k, v
        return layers

    def _stream(self, rows: Rows, cache: AnyCache, each: int, beams: int) -> Stream | None:
        """Save what fills from now on; where beams share a prompt, of the first one only."""

        def make() -> Stream | None:
            if self._stale(cache):
                return None
            names = self._namespace()
            before = [names.keys(row.ids[: row.good]) for row in rows.rows]
            first = [
                (index * each + copy, rows.tail(row), before[index])
                for index, row in enumerate(rows.rows)
                for copy in range(1 if beams > 1 else each)
            ]
            alone, began = len(rows.rows) * each == 1, self._clock()
            row = rows.rows[0]

            def on_first() -> None:
                if alone:
                    self._observe(row.good, len(row.ids) - row.good, self._clock() - began)

            def layers() -> list[Any]:
                return check_layers(cache)

            return Stream(self.engine, layers, first, self._guarded, on_first)

        return self._guarded(make, lambda: None)

    def _chunks(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: AnyCache, size: int, stream: Any
    ) -> None:
        """Compute all but the last column, `size` columns at a time; blocks are saved meanwhile."""
        if size < 1:
            raise ModelNotSupported(f"chunk_tokens is {size}, expected a number of tokens above 0")
        last = ids.shape[1] - 1
        for start in range(int(cache.get_seq_length()), last, size):
            stop = min(start + size, last)
            with torch.no_grad():
                self.model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    **positions(self.model, mask, start, stop),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            if stream is not None:
                stream.advance(ids, stop)

    def _observe(self, position: int, tokens: int, seconds: float) -> None:
        """Tell the engine what computing takes, so that it fetches only what is worth it."""

        def tell() -> None:
            self.engine.observe_prefill(self._namespace(), position, tokens, seconds)

        if self._measure and seconds > 0:
            self._guarded(tell, lambda: None)

    def _save(self, ids: Ids, past: AnyCache) -> int:
        size = self.layout.block_tokens
        blocks = min(len(ids), int(past.get_seq_length())) // size
        if not blocks or self._stale(past):
            return 0
        keys = self._namespace().keys(ids[: blocks * size])
        arrays = batch(check_layers(past), 0, 0, blocks * size)
        transfer = self.engine.save(keys, arrays, np.arange(blocks))
        transfer.wait(SAVE_S)
        return int(transfer.good.sum())

    def _namespace(self) -> Namespace:
        return self.names(self.layout)

    def names(self, layout: Layout, kernel: str = "") -> Namespace:
        """Return where keys come from, as the weights and the engine's epoch are now.

        For K/V in this layout; `kernel` names the attention, where it is not the model's own.
        """
        now = mark(self.model)
        if now != self._mark:
            check_model(self.model)
            # A name that was given for other weights no longer tells these.
            self._facts = describe(self.model, self.layout)
            self._mark = now
        facts = self._facts
        return self.engine.namespace(
            model=facts.model,
            revision=f"{facts.revision}+{kernel}" if kernel else facts.revision,
            layout=layout,
            kv_dtype=facts.kv_dtype,
            positional=facts.positional,
            salt=self._salt,
        )

    def _empty(self, columns: int = 0) -> AnyCache:
        """Return a new cache: a static one of so many columns, or for 0 a dynamic one."""
        config = self.model.config.get_text_config(decoder=True)
        past: AnyCache = DynamicCache(config=config)
        if columns:
            past = StaticCache(config=config, max_cache_len=columns)
        setattr(past, MARK, mark(self.model))
        return past

    def _stale(self, past: AnyCache) -> bool:
        """Whether the weights are others now than when this cache was begun."""
        now = mark(self.model)
        return bool(getattr(past, MARK, now) != now)

    def _guarded(self, verb: Callable[[], R], otherwise: Callable[[], R]) -> R:
        return otherwise() if self.model.training else self.guard.guarded(verb, otherwise)

    def _check(self, input_ids: torch.Tensor, options: dict[str, Any]) -> Rows:
        """Take the prompts; raises ModelNotSupported where the cache would not be theirs."""
        for name in REFUSED:
            if options.get(name) is not None:
                raise ModelNotSupported(
                    f"{name} was given, and K/V are named by the prompt's tokens alone: leave it "
                    "out, or call model.generate"
                )
        chosen = options.get("generation_config") or self.model.generation_config
        for name, fine in SETTINGS.items():
            value = self._option(options, chosen, name)
            if value not in fine:
                raise ModelNotSupported(
                    f"{name} is {value!r}, expected {fine[-1]!r}: a cache is to hold the tokens of "
                    f"its own prompts; {INSTEAD.get(name, 'or call model.generate')}"
                )
        for name, value in options.items():
            if isinstance(value, torch.Tensor) and name != "attention_mask":
                raise ModelNotSupported(
                    f"{name} is a tensor beside the tokens, which no key covers: leave it out, or "
                    "call model.generate"
                )
        mask = options.get("attention_mask")
        rows = rows_of(input_ids, mask)
        pad, end = chosen.pad_token_id, chosen.eos_token_id
        ends = end if isinstance(end, list | tuple) else [end]
        pads = mask is None and pad is not None and pad not in ends
        if pads and bool((input_ids == pad).any()):
            raise ModelNotSupported(
                "the prompt is padded (pad_token_id stands in it) without an attention_mask: pass "
                "the one that the tokenizer gives"
            )
        return rows

    def _option(self, options: dict[str, Any], chosen: Any, name: str) -> Any:
        return options.get(name, getattr(chosen, name, None))

    def _new_tokens(self, options: dict[str, Any], chosen: Any) -> int:
        """Return as many tokens as may be generated, or more, for a cache of a fixed size."""
        new = self._option(options, chosen, "max_new_tokens")
        return int(new or self._option(options, chosen, "max_length") or DEFAULT_NEW_TOKENS)

    def _relate(self, options: dict[str, Any], chosen: Any, given: int, width: int) -> None:
        """Turn lengths that count the prompt as it was given into lengths that do not."""
        for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = self._option(options, chosen, name)
            if value and self._option(options, chosen, new) is None:
                options[new] = max(value - given, 0)
                options.pop(name, None)


def expand(cache: AnyCache, copies: int) -> None:
    """Let each row of a cache stand for so many samples or beams, without a copy where it can."""
    if copies == 1 or not int(cache.get_seq_length()):
        return
    for layer in check_layers(cache):
        rows = len(layer.keys)
        for name in ("keys", "values"):
            held = getattr(layer, name)
            if rows == 1 and isinstance(cache, DynamicCache):
                held = held.expand(copies, -1, -1, -1)
            else:
                held = held.repeat_interleave(copies, dim=0)
            setattr(layer, name, held)
        if isinstance(cache, StaticCache):
            layer.batch_size = rows * copies


def _given(input_ids: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = options.get("attention_mask")
    return input_ids, torch.ones_like(input_ids) if mask is None else mask


def _settle(transfers: list[Transfer], timeout_s: float = SAVE_S) -> bool:
    """Wait for transfers, all together for so long; what is late is stopped. False: some were."""
    end = time.monotonic() + timeout_s
    in_time = [transfer.wait(max(0.0, end - time.monotonic())) for transfer in transfers]
    for transfer in transfers:
        if not transfer.done():
            transfer.stop()
    return all(in_time)


def _ids(input_ids: Any) -> Ids:
    """Return the tokens of one prompt; raises ModelNotSupported for anything else."""
    rows = rows_of(input_ids, None).rows
    if len(rows) != 1:
        raise ModelNotSupported(f"{len(rows)} prompts were given, expected one: int[1, tokens]")
    return rows[0].ids
