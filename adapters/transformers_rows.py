"""Prompts side by side in one cache, each with as many cached tokens as were held of it.

A row is  pads · cached tokens · gap · tail · what is generated.  Cached tokens end at one column in
all rows, and so do prompts; pads and gap are masked, and positions count what is not, so a batch
computes no more columns than its longest tail. (Models that read distances off the columns are
found out by trying; batches of theirs are computed whole.) Saves go along while tokens stream: each
block as soon as it is full, from the tensors that the model has just made, which nobody writes
again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import StoppingCriteria

from kvengine import Client, Engine
from kvengine.adapters.transformers_identity import pairs
from kvengine.errors import ModelNotSupported
from kvengine.keys import BlockKeys
from kvengine.transfer import Transfer

Ids = NDArray[np.int64]
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(slots=True)
class Row:
    """One prompt, without its pads. `held` of its tokens have room in the cache, `good` are there.

    Both are whole blocks, and less than the prompt.
    """

    ids: Ids
    held: int = 0
    good: int = 0


class Rows:
    """Prompts of a batch and the columns that they take."""

    def __init__(self, given: torch.Tensor, rows: list[Row]) -> None:
        self._given = given
        self.rows = rows

    @property
    def past(self) -> int:
        """Columns of cached tokens."""
        return max(row.held for row in self.rows)

    @property
    def width(self) -> int:
        """Columns of all prompts, cached tokens and gaps included; as given where none are held."""
        if not self.past:
            return self._given.shape[1]
        return self.past + max(len(row.ids) - row.good for row in self.rows)

    def start(self, row: Row) -> int:
        """Return the column of a row's first cached token."""
        return self.past - row.held

    def tail(self, row: Row) -> int:
        """Return the column of a row's first token that is not cached."""
        return self.width - (len(row.ids) - row.good)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and attention mask, int[rows, width] each.

        Masked columns repeat a row's first id, so that what looks at ids alone finds none but its.
        """
        count = len(self.rows)
        ids = self._given[:, :1].expand(count, self.width).clone()
        mask = torch.zeros((count, self.width), dtype=torch.long)
        for index, row in enumerate(self.rows):
            tokens = torch.from_numpy(row.ids).to(ids.dtype)
            for at, part in (
                (self.start(row), tokens[: row.good]),
                (self.tail(row), tokens[row.good :]),
            ):
                ids[index, at : at + len(part)] = part
                mask[index, at : at + len(part)] = 1
        return ids, mask


def rows_of(input_ids: Any, attention_mask: Any) -> Rows:
    """Take prompts, int[rows, tokens], padded on the left or not at all.

    Raises ModelNotSupported for anything else.
    """
    shape = getattr(input_ids, "shape", None)
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
        raise ModelNotSupported(
            f"input_ids of shape {None if shape is None else list(shape)}, expected int[prompts, "
            "tokens]"
        )
    if input_ids.is_floating_point() or not input_ids.numel():
        raise ModelNotSupported(
            f"input_ids of {input_ids.dtype} and shape {list(input_ids.shape)}, expected at least "
            "one integer token"
        )
    ids: Ids = input_ids.cpu().numpy().astype(np.int64, copy=False)
    counts = np.full(len(ids), ids.shape[1])
    if attention_mask is not None:
        if tuple(attention_mask.shape) != ids.shape:
            raise ModelNotSupported(
                f"attention_mask of shape {list(attention_mask.shape)}, expected that of input_ids"
            )
        mask = attention_mask.cpu().numpy().astype(np.bool_)
        counts = mask.sum(axis=1)
        if (np.diff(mask.astype(np.int8), axis=1) < 0).any() or not counts.all():
            raise ModelNotSupported(
                "attention_mask has zeros after ones, or a row of zeros: a prompt is padded on "
                "the left (tokenizer.padding_side = 'left'), and not empty"
            )
    columns = ids.shape[1]
    found = [Row(row[columns - count :]) for row, count in zip(ids, counts.tolist(), strict=True)]
    return Rows(input_ids, found)


def batch(layers: list[Any], row: int, start: int, stop: int) -> Pairs:
    """Return K and V, [heads, tokens, dim], of some columns of one row of a cache's layers."""
    return [
        (k[row, :, start:stop].detach(), v[row, :, start:stop].detach()) for k, v in pairs(layers)
    ]


class Stream(StoppingCriteria):
    """Saves blocks of each row as they fill; transformers calls it after each token.

    first: where blocks begin that the engine does not hold yet, (row of the cache, column, the keys
    of the blocks before it). `on_first` is called once, at the first token. Stops no generation.
    """

    def __init__(
        self,
        engine: Engine | Client,
        layers: Callable[[], list[Any]],
        first: Sequence[tuple[int, int, BlockKeys]],
        guarded: Callable[[Callable[[], None], Callable[[], None]], None],
        on_first: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._size = first[0][2].namespace.layout.block_tokens
        self._layers = layers
        self._guarded = guarded
        self._on_first: Callable[[], None] | None = on_first
        self._columns = [column for _, column, _ in first]
        self._rows = [row for row, _, _ in first]
        self._keys = [keys for _, _, keys in first]
        self._next = [column + self._size for column in self._columns]  # where a block is full
        self.transfers: list[Transfer] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self._on_first is not None:
            self._on_first()
            self._on_first = None
        # The last token's K/V is not computed before the next step.
        self.advance(input_ids, input_ids.shape[1] - 1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def advance(self, ids: torch.Tensor, computed: int) -> None:
        """Save what is full. ids: int[rows, columns], of which so many are computed."""
        if any(computed >= full for full in self._next):
            self._guarded(lambda: self._save(ids, computed), lambda: None)

    def _save(self, ids: torch.Tensor, computed: int) -> None:
        layers = self._layers()
        for index, row in enumerate(self._rows):
            start = self._columns[index]
            count = (computed - start) // self._size
            if count < 1:
                continue
            stop = start + count * self._size
            self._columns[index], self._next[index] = stop, stop + self._size
            keys = self._keys[index].following(ids[row, start:stop].cpu().numpy())
            self._keys[index] = keys
            arrays = batch(layers, row, start, stop)
            self.transfers.append(self._engine.save(keys, arrays, np.arange(count)))
