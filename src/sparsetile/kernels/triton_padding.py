# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,assignment"
"""Key padding for kernels that read whole tiles by bulk copy: which keys count, as bits, and clean tiles."""

import triton
import triton.language as tl

from sparsetile.kernels.triton_tiles import COUNTS, load_tile, store_tile


# fmt: off
@triton.jit(do_not_specialize=COUNTS)
def kept_kernel(
    padding, k, v, kept_words, kept_notes, kept_k, kept_v, sp_b, sp_h, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n,
    heads, k_len, k_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """One key tile of one key head. Its words: bits, 1 for a key that counts. Its note: −1 if all its keys
    do, else the tile's number; and then its part of kept_k and kept_v is that of k and v, with zeros for the
    keys to ignore. Whatever those hold, NaN included, no product may see it.

    kept_words is int32 ``[B·Hkv·k_blocks, BLOCK_K/32]``, kept_notes int32 ``[B·Hkv·k_blocks]``, kept_k and
    kept_v ``[B, Hkv, Nk, D]``, contiguous; ``heads`` are key heads.
    """
    tile = tl.program_id(0)
    owner = tile // k_blocks
    batch = (owner // heads).to(tl.int64)
    head = (owner % heads).to(tl.int64)
    key0 = tile % k_blocks * BLOCK_K
    padding += batch * sp_b + head * sp_h + key0
    left = k_len - key0

    groups = tl.arange(0, BLOCK_K // 32)
    places = tl.arange(0, 32)
    spread = groups[:, None] * 32 + places[None, :]
    bits = (tl.load(padding + spread, mask=spread < left, other=1) == 0).to(tl.int32)
    tl.store(kept_words + tile * (BLOCK_K // 32) + groups, tl.sum(bits << places[None, :], 1))

    keys = tl.arange(0, BLOCK_K)
    inside = keys < left
    ignored = tl.load(padding + keys, mask=inside, other=0) != 0
    some = tl.max(ignored.to(tl.int32), 0) != 0
    tl.store(kept_notes + tile, tl.where(some, tile, -1))
    if some:
        dims = tl.arange(0, BLOCK_D)
        counts = inside & (ignored == 0)
        first = key0.to(tl.int64)
        from_k = k + batch * sk_b + head * sk_h + first * sk_n
        from_v = v + batch * sv_b + head * sv_h + first * sv_n
        into = (owner.to(tl.int64) * k_len + first) * D
        k_tile = load_tile(from_k, keys, sk_n, dims, counts, D, BLOCK_D, True)
        store_tile(kept_k + into, keys, D, dims, inside, k_tile, D, BLOCK_D)
        v_tile = load_tile(from_v, keys, sv_n, dims, counts, D, BLOCK_D, True)
        store_tile(kept_v + into, keys, D, dims, inside, v_tile, D, BLOCK_D)
