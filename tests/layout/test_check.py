"""Every invariant of a layout, broken one at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsetile.errors import LayoutError
from sparsetile.layout import BlockLayout
from sparsetile.patterns import Causal, Global, Local


def sound():
    return BlockLayout.from_pattern((Local(60) | Global(5)) & Causal(), 250, 250, 32)


def window():
    """Rows that begin with a partial tile and go on with whole ones."""
    return BlockLayout.from_pattern(Local(100) & Causal(), 250, 250, 32)


def other(name, tensor):
    """A sound layout with one tensor changed; names with ``t_`` mean its transpose."""
    layout = sound()
    if name.startswith("t_"):
        return replace(layout, _memo={}, given=layout.transpose._replace(**{name[2:]: tensor}))
    return replace(layout, _memo={}, **{name: tensor})


def changed(name, where, value):
    tensor = getattr(sound(), name).clone()
    tensor[where] = value
    return other(name, tensor)


def swapped(name, a, b):
    tensor = getattr(sound(), name).clone()
    tensor[[a, b]] = tensor[[b, a]]
    return other(name, tensor)


def tail_id():
    layout = sound()
    return int(layout.mask_ids[-1])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: replace(sound(), q_len=0), "q_len is 0"),
        (lambda: replace(sound(), heads=0), "heads is 0"),
        (lambda: replace(sound(), block_k=24), "block_k is 24"),
        (lambda: replace(sound(), heads=2), "indptr has shape"),
        (lambda: replace(sound(), k_len=400), "t_indptr has shape"),
        (lambda: replace(sound(), mask_ids=sound().mask_ids[:-1]), "mask_ids has shape"),
        (lambda: replace(sound(), masks=sound().masks.squeeze(-1)), "masks has shape"),
        (lambda: replace(sound(), indices=sound().indices.long()), "indices is torch.int64"),
        (lambda: replace(sound(), indptr=sound().indptr.long()), "indptr is torch.int64"),
        (lambda: replace(sound(), masks=sound().masks.to("meta")), "masks is on meta"),
        (lambda: changed("indptr", 0, 1), "indptr starts at 1"),
        (lambda: changed("indptr", 3, 0), "indptr descends"),
        (lambda: changed("indptr", -1, 10**6), "past the"),
        (lambda: replace(sound(), _memo={"nnz": 3}), "nnz is kept as 3"),
        (lambda: changed("indices", 0, 8), "indices go beyond"),
        (lambda: changed("indices", 0, -1), "indices go beyond"),
        (lambda: swapped("indices", -1, -2), "do not ascend"),
        (lambda: replace(sound(), row_bound=1), "more tiles than row_bound = 1"),
        (lambda: replace(window(), row_bound=8), "a whole tile comes after a partial one"),
        (lambda: changed("mask_ids", 0, 99), "mask_ids go beyond"),
        (lambda: changed("mask_ids", 0, -2), "mask_ids go beyond"),
        (lambda: changed("masks", 0, -1), "hold a full tile"),
        (lambda: changed("masks", 0, 0), "hold an empty tile"),
        (lambda: changed("masks", 0, sound().masks[1]), "the same tile twice"),
        (lambda: changed("mask_ids", -1, -1), "hangs over q_len is not partial"),
        (lambda: changed("masks", (tail_id(), 31), 1), "past q_len"),
        (lambda: changed("masks", (tail_id(), 0), 1 << 30), "past k_len"),
        (lambda: changed("t_indptr", 0, 1), "t_indptr starts at 1"),
        (lambda: changed("t_indptr", -1, 3), "t_indptr descends"),
        (lambda: other("t_indptr", sound().t_indptr.clamp(max=20)), "t_indptr ends at 20"),
        (lambda: changed("t_edges", 0, 5), "not a permutation"),
        (lambda: swapped("t_edges", 0, -1), "other columns"),
        (lambda: changed("t_indices", 2, 7), "t_indices differ"),
    ],
)
def test_each_broken_invariant_is_named(make, says):
    sound().validate()
    with pytest.raises(LayoutError, match=says):
        make().validate()


def test_transpose_must_ascend():
    layout = sound()
    edges, blocks = layout.t_edges.clone(), layout.t_indices.clone()
    edges[[0, 1]], blocks[[0, 1]] = edges[[1, 0]], blocks[[1, 0]]
    with pytest.raises(LayoutError, match="within a column"):
        replace(layout, given=layout.transpose._replace(edges=edges, indices=blocks)).validate()


def test_narrow_tiles_use_the_low_half_of_their_word():
    layout = BlockLayout.from_pattern(Causal(), 40, block_size=16)
    layout.validate()
    masks = layout.masks.clone()
    masks[0, 3] |= 1 << 20
    with pytest.raises(LayoutError, match="beyond the 16 keys"):
        replace(layout, masks=masks).validate()
