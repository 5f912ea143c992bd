"""kvengine.layout: what is refused, and how blocks are cut into segments."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvengine import Layout
from kvengine.errors import LayoutError
from kvengine.frame import Template, frame_bytes, header_bytes
from kvengine.layout import ITEM_BYTES

GOOD = {"layers": 2, "kv_heads": 3, "head_dim": 8, "head_dim_v": 4, "dtype": "float32"}
OPAQUE = {"layers": 3, "page_bytes": 1000, "block_tokens": 16, "permutation": "p"}

NO_COUNT = [0, -1, 1.0, "2", None, np.float64(4)]
NO_DTYPE = ["float", "fp8", "bool", "", None, "int32", np.dtype("float32"), ["float32"]]
BAD = [
    ("layers", NO_COUNT, "whole number of at least 1"),
    ("kv_heads", NO_COUNT, "whole number of at least 1"),
    ("head_dim", NO_COUNT, "whole number of at least 1"),
    ("block_tokens", NO_COUNT, "whole number of at least 1"),
    ("head_dim_v", [-1, 1.5, None, "0"], "0 or more"),
    ("layers", [4097], "at most 4096"),
    ("kv_heads", [65536], "at most 65535"),
    ("block_tokens", [1 << 32], "at most 4294967295"),
    ("dtype", NO_DTYPE, "float32, float16, bfloat16"),
    ("order", ["nhd", "DHN", "", None, "N"], "'NHD' or 'HND'"),
    ("attention", ["half", None], "'full', 'sliding' or 'state'"),
    ("attention", ["sliding"], "at least 1 token"),
    ("window_tokens", [1, -1, None, "5"], "expected 0 with"),
    ("sink_tokens", [1, -1, None], "expected 0 with"),
    ("permutation", [None, 5, b"x"], "text"),
    ("layer_parts", [0, -1, 3, 1.0, "2", None], "divide Layout.layers (2)"),
    ("head_parts", [0, 2, 4, "3"], "divide Layout.kv_heads (3)"),
]

layouts = st.builds(
    Layout,
    layers=st.integers(1, 200),
    kv_heads=st.integers(1, 9),
    head_dim=st.integers(1, 300),
    head_dim_v=st.integers(0, 300),
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
    block_tokens=st.integers(1, 64),
    order=st.sampled_from(["NHD", "HND"]),
    paged=st.booleans(),
)
pages = st.builds(
    Layout.opaque,
    layers=st.integers(1, 200),
    page_bytes=st.integers(1, 1 << 20),
    block_tokens=st.integers(1, 512),
    permutation=st.text(min_size=1, max_size=8),
)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [(field, value, expected) for field, values, expected in BAD for value in values],
    ids=lambda value: repr(value)[:24],
)
def test_a_bad_value_is_named_with_what_was_expected(field, value, expected):
    with pytest.raises(LayoutError) as caught:
        Layout(**(GOOD | {field: value}))
    said = str(caught.value)
    assert expected in said and field.removesuffix("_parts") in said
    assert repr(value) in said or str(value) in said


@pytest.mark.parametrize(
    ("field", "value"),
    [("permutation", ""), ("page_bytes", 0), ("page_bytes", -4096), ("layers", 0)],
)
def test_bad_opaque_pages_are_refused(field, value):
    with pytest.raises(LayoutError):
        Layout.opaque(**(OPAQUE | {field: value}))


@pytest.mark.parametrize("field", ["head_dim", "head_dim_v"])
def test_a_block_too_large_for_a_frame_is_refused(field):
    with pytest.raises(LayoutError, match=f"at most {1 << 40} fit.*{field}"):
        Layout(**(GOOD | {field: 1 << 40}))


def test_the_largest_that_fit():
    """The widths of a header's fields hold them."""
    for changes in ({"layers": 4096}, {"kv_heads": 65535}, {"block_tokens": 65536}):
        of = Layout(**(GOOD | changes))
        template = Template(of, bytes(32))
        digests = np.zeros((1, of.layers, 2), np.uint64)
        (header,) = template.write([bytes(32)], [bytes(32)], bytes(16), [0], digests)
        assert len(header) == header_bytes(of.layers)


@given(layouts | pages)
def test_segments_tile_the_payload(of):
    """Each byte of the payload lies in one segment, in the order of layers."""
    segments = Template(of, bytes(32)).segments.tolist()
    assert len(segments) == of.layers
    end = 0
    for offset, nbytes in segments:
        assert offset == end and nbytes == of.segment_bytes == sum(of.component_bytes) > 0
        end = offset + nbytes
    assert end == of.payload_bytes
    assert frame_bytes(of) == header_bytes(of.layers) + of.payload_bytes
    assert len(of.component_bytes) == len(of.head_dims) == (2 if of.head_dim_v else 1)


@given(layouts)
def test_components_have_the_bytes_of_their_arrays(of):
    for nbytes, dim in zip(of.component_bytes, (of.head_dim, of.head_dim_v), strict=False):
        assert nbytes == of.block_tokens * of.kv_heads * dim * ITEM_BYTES[of.dtype]
    assert of.item_bytes == ITEM_BYTES[of.dtype] and not of.is_opaque


@given(pages)
def test_opaque_pages_are_bytes(of):
    assert of.is_opaque and of.item_bytes == 1 and of.head_dim_v == 0
    assert of.component_bytes == (of.head_dim,) and of.segment_bytes == of.head_dim


def test_item_sizes_are_those_of_the_dtypes(require):
    ml_dtypes = require("ml_dtypes")
    for name, size in ITEM_BYTES.items():
        assert np.dtype(getattr(np, name, None) or getattr(ml_dtypes, name)).itemsize == size


@given(st.data())
def test_places_tile_a_view(data):
    """Each layer and head of a view stands in one place, where it is in its part."""
    parts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    of = Layout(
        **(GOOD | {"layers": parts[0] * data.draw(st.integers(1, 3))})
        | {"kv_heads": parts[1] * data.draw(st.integers(1, 3))},
        layer_parts=parts[0],
        head_parts=parts[1],
    )
    assert len(of.parts) == of.part_count and of.part_layout.payload_bytes * of.part_count == (
        of.payload_bytes
    )
    first, last = sorted(data.draw(st.sets(st.integers(0, of.layers), min_size=2, max_size=2)))
    low, high = sorted(data.draw(st.sets(st.integers(0, of.kv_heads), min_size=2, max_size=2)))
    view = of.view((first, last), (low, high))
    assert (view.layout.layers, view.layout.kv_heads) == (last - first, high - low)
    seen = np.zeros((last - first, high - low), int)
    whole = True
    for number, mine, layers, heads in view.places:
        part = of.parts[number]
        assert (part.layer + layers[0], part.layer + layers[1]) == (
            first + mine.layer,
            first + mine.layer_end,
        )
        assert (part.head + heads[0], part.head + heads[1]) == (
            low + mine.head,
            low + mine.head_end,
        )
        assert part.layer_end >= part.layer + layers[1] and part.head_end >= part.head + heads[1]
        seen[mine.layer : mine.layer_end, mine.head : mine.head_end] += 1
        whole &= (layers, heads) == (
            (0, of.part_layout.layers),
            (0, of.part_layout.kv_heads),
        )
    assert (seen == 1).all()
    assert view.mask == (sum(1 << place.number for place in view.places) if whole else 0)
    assert len(view.places) % view.lanes == 0
    assert (
        of.view((0, of.layers), (0, of.kv_heads)).mask
        == of.view().mask
        == ((1 << of.part_count) - 1)
    )


@given(layouts, layouts)
def test_digests_are_equal_only_for_equal_frames(one, two):
    same = dataclasses.replace(one, paged=True) == dataclasses.replace(two, paged=True)
    assert (one.digest() == two.digest()) == same
    assert dataclasses.replace(one, paged=not one.paged).digest() == one.digest()


def test_a_permutation_cannot_pose_as_other_fields():
    tricky = ["a", "a'", "a\nlayer_parts=2", "a'\nlayer_parts=1\nhead_parts=1", "a\\n", "a\n", ""]
    found = [Layout(**GOOD, permutation=name).digest() for name in tricky]
    assert all(one != two for one, two in combinations(found, 2))


def test_the_golden_digest():
    assert Layout(**GOOD).digest().hex() == GOLDEN
    assert Layout.opaque(**OPAQUE).digest().hex() == GOLDEN_OPAQUE


# Made by a program of its own: BLAKE3 of the fields' names and values, a line each.
GOLDEN = "b83d83a3ce0711da0e05faea016aa3c39de3514a368c472d8c973116b45c9477"
GOLDEN_OPAQUE = "e453f5945d795306dc531a528ace8f307e0269ddce97006bd5f325b89a9f5541"
