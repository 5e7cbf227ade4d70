"""The Triton kernels that reduce the sampled rows of an attention call: one launch for all that is said of rows, one for the coverage.

Importing this file needs Triton. Shapes: B batch, K keys, H query heads, h key heads, D width, R sampled rows a sample, Q quantities.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROWS, KEYS = 16, 64
"""Rows and keys that a program works on at a time: the smallest that the units for matrix products take, and what registers hold."""
OPTIONS = {"num_warps": 4, "num_stages": 2}
"""How the kernels are compiled."""

_ROWS = tl.constexpr(ROWS)
_KEYS = tl.constexpr(KEYS)
_LOWEST = tl.constexpr(-1e38)
_PADDING, _TEXT, _AUDIO, _REFERENCE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _scores(
    q_RD, k_ptr, k_key, k_wide, added_ptr, added_row, key_K, keys, wide_D, width, rows_R, there_R, scale, softcap,
    ADDED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Return the scores of some rows with some keys, float32 (R, K); far below any score where there is no key."""
    k_DK = tl.load(
        k_ptr + key_K[None, :].to(tl.int64) * k_key + wide_D[:, None] * k_wide,  # a long sequence's keys leave 32 bits
        mask=(key_K[None, :] < keys) & (wide_D[:, None] < width),
        other=0.0,
    )
    scores_RK = tl.dot(q_RD, k_DK.to(tl.float32), input_precision="ieee") * scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1): exact at both ends, and no library function.
        scores_RK = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (scores_RK / softcap)) + 1.0))
    if ADDED:
        scores_RK += tl.load(
            added_ptr + rows_R[:, None] * added_row + key_K[None, :], mask=there_R[:, None] & (key_K[None, :] < keys), other=0.0
        )
    return tl.where(key_K[None, :] < keys, scores_RK, -1e30)


@triton.jit
def reduce_rows(
    q_ptr, k_ptr, index_ptr, added_ptr, blind_ptr, row_ptr, key_ptr, code_ptr, first_ptr, raw_ptr, normaliser_ptr,
    q_sample, q_head, q_row, q_wide, k_sample, k_head, k_key, k_wide, added_sample, added_row, key_sample, code_sample,
    heads, group, rows, keys, width, scale, softcap, band,
    ADDED: tl.constexpr, SOFTCAP: tl.constexpr, IN_KEYS: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write what each head's row says, float32 (Q, B, H, R), and the largest score and the sum of exponentials of each.

    One program works on ``ROWS`` rows of one head of one sample, over all keys, once: sums are scaled down whenever a larger score comes.

    What the pointers point to; strides (in elements), sizes and factors follow them:

    * q_ptr, k_ptr: (B, H, S, D) and (B, h, K, D) with the strides that follow, of one dtype.
    * index_ptr: int64 (B, R): the rows.
    * added_ptr: With ``ADDED`` float32 (B, R, K): added to the scores, -1e30 where a key is hidden.
    * blind_ptr: With ``ADDED`` bool (B, R): rows that see no key; 0 is written for them.
    * row_ptr, key_ptr: float32 (B, R) and (B, K) or (K,): where rows and keys lie.
    * code_ptr: With ``GROUPS`` int8 (B, K): modality; stride 0 where there is one code for all.
    * first_ptr: With ``GROUPS`` int64 (B,): the first key of each sample.
    * raw_ptr: float32 (6, or with ``GROUPS`` 12, B, H, R), written.
    * normaliser_ptr: float32 (2, B, H, R), written.
    """
    at = tl.program_id(0)
    sample, head = at // heads, at % heads
    slot_R = tl.program_id(1) * _ROWS + tl.arange(0, _ROWS)
    there_R = slot_R < rows
    wide_D = tl.arange(0, WIDE)
    index_R = tl.load(index_ptr + sample * rows + slot_R, mask=there_R, other=0)
    q_ptr += sample.to(tl.int64) * q_sample + head.to(tl.int64) * q_head
    k_ptr += sample.to(tl.int64) * k_sample + (head // group).to(tl.int64) * k_head
    added_ptr += sample.to(tl.int64) * added_sample
    q_RD = tl.load(
        q_ptr + index_R[:, None] * q_row + wide_D[None, :] * q_wide, mask=there_R[:, None] & (wide_D[None, :] < width), other=0.0
    ).to(tl.float32)
    row_R = tl.load(row_ptr + sample * rows + slot_R, mask=there_R, other=0.0)
    first = tl.load(first_ptr + sample) if GROUPS else 0
    largest_R = tl.full([_ROWS], _LOWEST, tl.float32)
    zero_R = tl.zeros([_ROWS], tl.float32)
    total_R, weighted_R, square_R, band_R, distance_R = zero_R, zero_R, zero_R, zero_R, zero_R
    padding_R, text_R, audio_R, reference_R, first_R, place_R = zero_R, zero_R, zero_R, zero_R, zero_R, zero_R
    for start in range(0, keys, _KEYS):
        key_K = start + tl.arange(0, _KEYS)
        scores_RK = _scores(
            q_RD, k_ptr, k_key, k_wide, added_ptr, added_row, key_K, keys, wide_D, width, slot_R, there_R, scale, softcap, ADDED, SOFTCAP
        )
        now_R = tl.maximum(largest_R, tl.max(scores_RK, axis=1))
        down_R = largest_R - now_R
        shrink_R = tl.exp(down_R)
        below_RK = scores_RK - now_R[:, None]
        e_RK = tl.exp(below_RK)
        weighted_R = shrink_R * (weighted_R + down_R * total_R) + tl.sum(e_RK * below_RK, axis=1)
        total_R = shrink_R * total_R + tl.sum(e_RK, axis=1)
        square_R = shrink_R * shrink_R * square_R + tl.sum(e_RK * e_RK, axis=1)
        lie_K = tl.load(key_ptr + sample * key_sample + key_K, mask=key_K < keys, other=float("inf"))
        away_RK = tl.abs(lie_K[None, :] - row_R[:, None])
        band_R = shrink_R * band_R + tl.sum(tl.where(away_RK <= band, e_RK, 0.0), axis=1)
        if IN_KEYS:
            distance_R = shrink_R * distance_R + tl.sum(e_RK * tl.where(key_K[None, :] < keys, away_RK, 0.0), axis=1)
        if GROUPS:
            code_K = tl.load(code_ptr + sample * code_sample + tl.where(code_sample > 0, key_K, 0), mask=key_K < keys, other=-1)
            audio_RK = tl.where((code_K >= _AUDIO)[None, :], e_RK, 0.0)
            padding_R = shrink_R * padding_R + tl.sum(tl.where((code_K == _PADDING)[None, :], e_RK, 0.0), axis=1)
            text_R = shrink_R * text_R + tl.sum(tl.where((code_K == _TEXT)[None, :], e_RK, 0.0), axis=1)
            audio_R = shrink_R * audio_R + tl.sum(audio_RK, axis=1)
            reference_R = shrink_R * reference_R + tl.sum(tl.where((code_K == _REFERENCE)[None, :], e_RK, 0.0), axis=1)
            first_R = shrink_R * first_R + tl.sum(tl.where((key_K == first)[None, :], e_RK, 0.0), axis=1)
            place_R = shrink_R * place_R + tl.sum(audio_RK * key_K[None, :].to(tl.float32), axis=1)
        largest_R = now_R
    sees_R = there_R
    if ADDED:
        sees_R = there_R & (tl.load(blind_ptr + sample * rows + slot_R, mask=there_R, other=1) == 0)
    share_R = tl.where(sees_R, 1.0 / total_R, 0.0)
    entropy_R = tl.where(sees_R, tl.log(total_R) - weighted_R / total_R, 0.0)
    step = tl.num_programs(0) * rows
    out_ptr = raw_ptr + at * rows + slot_R
    tl.store(out_ptr, entropy_R, mask=there_R)
    tl.store(out_ptr + step, square_R * share_R * share_R, mask=there_R)
    tl.store(out_ptr + 2 * step, share_R, mask=there_R)
    tl.store(out_ptr + 3 * step, band_R * share_R, mask=there_R)
    tl.store(out_ptr + 4 * step, distance_R * share_R, mask=there_R)
    tl.store(out_ptr + 5 * step, zero_R, mask=there_R)
    if GROUPS:
        tl.store(out_ptr + 6 * step, padding_R * share_R, mask=there_R)
        tl.store(out_ptr + 7 * step, text_R * share_R, mask=there_R)
        tl.store(out_ptr + 8 * step, audio_R * share_R, mask=there_R)
        tl.store(out_ptr + 9 * step, reference_R * share_R, mask=there_R)
        tl.store(out_ptr + 10 * step, first_R * share_R, mask=there_R)
        tl.store(out_ptr + 11 * step, place_R * share_R, mask=there_R)
    tl.store(normaliser_ptr + at * rows + slot_R, largest_R, mask=there_R)
    tl.store(normaliser_ptr + step + at * rows + slot_R, share_R, mask=there_R)


@triton.jit
def add_up_rows(
    q_ptr, k_ptr, index_ptr, added_ptr, weight_ptr, normaliser_ptr, sum_ptr,
    q_sample, q_head, q_row, q_wide, k_sample, k_head, k_key, k_wide, added_sample, added_row,
    heads, group, rows, keys, width, scale, softcap,
    ADDED: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the weighted sum of the rows' probabilities, float32 (B, H, K), from what :func:`reduce_rows` left in ``normaliser_ptr``.

    One program works on ``KEYS`` keys of one head of one sample, over all rows. ``weight_ptr`` is float32 (B, R).
    """
    at = tl.program_id(0)
    sample, head = at // heads, at % heads
    key_K = tl.program_id(1) * _KEYS + tl.arange(0, _KEYS)
    wide_D = tl.arange(0, WIDE)
    q_ptr += sample.to(tl.int64) * q_sample + head.to(tl.int64) * q_head
    k_ptr += sample.to(tl.int64) * k_sample + (head // group).to(tl.int64) * k_head
    added_ptr += sample.to(tl.int64) * added_sample
    step = tl.num_programs(0) * rows
    sum_K = tl.zeros([_KEYS], tl.float32)
    for start in range(0, rows, _ROWS):
        slot_R = start + tl.arange(0, _ROWS)
        there_R = slot_R < rows
        index_R = tl.load(index_ptr + sample * rows + slot_R, mask=there_R, other=0)
        q_RD = tl.load(
            q_ptr + index_R[:, None] * q_row + wide_D[None, :] * q_wide, mask=there_R[:, None] & (wide_D[None, :] < width), other=0.0
        ).to(tl.float32)
        scores_RK = _scores(
            q_RD, k_ptr, k_key, k_wide, added_ptr, added_row, key_K, keys, wide_D, width, slot_R, there_R, scale, softcap, ADDED, SOFTCAP
        )
        largest_R = tl.load(normaliser_ptr + at * rows + slot_R, mask=there_R, other=0.0)
        share_R = tl.load(normaliser_ptr + step + at * rows + slot_R, mask=there_R, other=0.0)
        weight_R = tl.load(weight_ptr + sample * rows + slot_R, mask=there_R, other=0.0)
        p_RK = tl.exp(scores_RK - largest_R[:, None]) * (share_R * weight_R)[:, None]
        sum_K += tl.sum(tl.where(there_R[:, None], p_RK, 0.0), axis=0)
    tl.store(sum_ptr + at * keys + key_K, sum_K, mask=key_K < keys)
