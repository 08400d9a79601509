"""Norm, gated activation, and everything between the projection and attention, in Triton.

Numbers are rounded to the tensors' type exactly where the reference rounds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
# gpt-oss's, as `pagoda_kernels.types` has them: that imports torch, which is too slow for processes that compile this.
ALPHA = tl.constexpr(1.702)
LIMIT = tl.constexpr(7.0)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def _weighted(unit, weight, DTYPE: tl.constexpr):
    """Normalized numbers times the norm's weight, in DTYPE: rounded before the product too, unless the weight is float32."""
    if weight.dtype == tl.float32:
        return (unit * weight).to(DTYPE)
    return unit.to(DTYPE) * weight


@triton.jit
def rms_norm_kernel(
    normed,
    stream,
    x,
    residual,
    weight,
    eps,
    token_stride,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Grid (tokens * HEADS): one vector of SIZE numbers a program.

    x [tokens, HEADS, SIZE] with `token_stride` elements a token; normed, stream and residual are contiguous. `stream` is
    written only if there is a residual.
    """
    vector = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, PADDED_SIZE)
    exists = index < SIZE
    start = vector // HEADS * token_stride + vector % HEADS * SIZE
    value = tl.load(x + start + index, mask=exists, other=0.0)
    if HAS_RESIDUAL:
        value = value + tl.load(residual + vector * SIZE + index, mask=exists, other=0.0)
        tl.store(stream + vector * SIZE + index, value, mask=exists)
    wide = value.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    scaled = _weighted(wide * inverse_rms, tl.load(weight + index, mask=exists, other=0.0), value.dtype)
    tl.store(normed + vector * SIZE + index, scaled, mask=exists)


@triton.jit
def gated_activation(gate, up, ACTIVATION: tl.constexpr):
    """Of two tensors of one type, in this type; see `gated_activation_kernel`."""
    wide = gate.to(tl.float32)
    if ACTIVATION == 2:
        wide = tl.minimum(wide, LIMIT)
        wide_up = tl.minimum(tl.maximum(up.to(tl.float32), -LIMIT), LIMIT) + 1.0
        result = (wide * _sigmoid(wide * ALPHA) * wide_up).to(gate.dtype)
    elif ACTIVATION == 1:
        # 0.5 * (1 + tanh(y)) = sigmoid(2 y), y = sqrt(2 / pi) * (x + 0.044715 x**3)
        result = (wide * _sigmoid((wide + 0.044715 * wide * wide * wide) * SQRT_8_OVER_PI)).to(gate.dtype) * up
    else:
        result = (wide * _sigmoid(wide)).to(gate.dtype) * up
    return result


@triton.jit
def gated_activation_kernel(output, x, SIZE: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr):
    """Grid (tokens, tiles of SIZE): x = [gate | up] of shape [tokens, 2 * SIZE] to act(gate) * up.

    ACTIVATION 0: SiLU. 1: GELU in its tanh form (Hendrycks and Gimpel, 2016). 2: gpt-oss's, clamped, times up + 1.
    """
    token = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * TILE + tl.arange(0, TILE)
    exists = index < SIZE
    gate = tl.load(x + token * (2 * SIZE) + index, mask=exists, other=0.0)
    up = tl.load(x + token * (2 * SIZE) + SIZE + index, mask=exists, other=0.0)
    tl.store(output + token * SIZE + index, gated_activation(gate, up, ACTIVATION), mask=exists)


@triton.jit
def _pair(dims, HALF: tl.constexpr, ROTARY_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where the two dimensions of each pair `dims` of a head are: the first ROTARY_HALF pairs are rotated, and the dimensions
    that are not are paired behind them."""
    if ROTARY_HALF == HALF and not INTERLEAVED:
        return dims, HALF + dims
    if INTERLEAVED:
        first, second = 2 * dims, 2 * dims + 1
    else:
        first, second = dims, ROTARY_HALF + dims
    is_rotated = dims < ROTARY_HALF
    return tl.where(is_rotated, first, ROTARY_HALF + dims), tl.where(is_rotated, second, HALF + dims)


@triton.jit
def _normed_and_rotated(
    x,
    norm_weight,
    cos,
    sin,
    eps,
    token,
    heads,
    head_exists,
    token_stride,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Both dimensions of each pair of a token's heads, float32 [heads, PADDED_HALF], normalized if HAS_NORM, and turned."""
    HALF: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, PADDED_HALF)
    dim_exists = dims < HALF
    exists = head_exists[:, None] & dim_exists[None, :]
    first_dims, second_dims = _pair(dims, HALF, ROTARY_HALF, INTERLEAVED)
    start = x + token * token_stride + heads[:, None] * HEAD_DIM
    first = tl.load(start + first_dims[None, :], mask=exists, other=0.0)
    second = tl.load(start + second_dims[None, :], mask=exists, other=0.0)
    if HAS_NORM:
        wide_first = first.to(tl.float32)
        wide_second = second.to(tl.float32)
        squares = tl.sum(wide_first * wide_first, 1) + tl.sum(wide_second * wide_second, 1)
        inverse_rms = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        weight_first = tl.load(norm_weight + first_dims, mask=dim_exists, other=0.0)
        weight_second = tl.load(norm_weight + second_dims, mask=dim_exists, other=0.0)
        first = _weighted(wide_first * inverse_rms, weight_first[None, :], first.dtype)
        second = _weighted(wide_second * inverse_rms, weight_second[None, :], second.dtype)
    has_angle = dims < ROTARY_HALF
    cosines = tl.load(cos + token * ROTARY_HALF + dims, mask=has_angle, other=1.0)[None, :]
    sines = tl.load(sin + token * ROTARY_HALF + dims, mask=has_angle, other=0.0)[None, :]
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    return first * cosines - second * sines, second * cosines + first * sines


@triton.jit
def _rotate_heads(
    rotated,
    x,
    norm_weight,
    cos,
    sin,
    eps,
    token,
    token_stride,
    NUM_HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Store a token's heads, normalized if HAS_NORM and turned, into `rotated` [tokens, NUM_HEADS, HEAD_DIM]."""
    HALF: tl.constexpr = HEAD_DIM // 2
    heads = tl.arange(0, PADDED_HEADS)
    dims = tl.arange(0, PADDED_HALF)
    first_dims, second_dims = _pair(dims, HALF, ROTARY_HALF, INTERLEAVED)
    first, second = _normed_and_rotated(
        x, norm_weight, cos, sin, eps, token, heads, heads < NUM_HEADS, token_stride, HEAD_DIM, PADDED_HALF,
        HAS_NORM, ROTARY_HALF, INTERLEAVED,
    )  # fmt: skip
    target = rotated + (token * NUM_HEADS + heads[:, None]) * HEAD_DIM
    exists = (heads < NUM_HEADS)[:, None] & (dims < HALF)[None, :]
    tl.store(target + first_dims[None, :], first.to(rotated.dtype.element_ty), mask=exists)
    tl.store(target + second_dims[None, :], second.to(rotated.dtype.element_ty), mask=exists)


@triton.jit
def _as_cached(x, inverse_scale, cache, FLOAT8_MAX: tl.constexpr):
    """float32 numbers as the cache keeps them; float8 ones are kept inside the type's range. FLOAT8_MAX 0: no float8."""
    if FLOAT8_MAX > 0:
        # NaN stays NaN, as in the twin: a prefix that another request finds must not look sane.
        x = tl.maximum(x * inverse_scale, -FLOAT8_MAX, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, FLOAT8_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(cache.dtype.element_ty)


@triton.jit(do_not_specialize_on_alignment=["slot_mapping", "cos", "sin"])
def rotate_and_store_kernel(
    rotated_query,
    query,
    key,
    value,
    cos,
    sin,
    query_norm,
    key_norm,
    k_cache,
    v_cache,
    slot_mapping,
    eps,
    inverse_k_scale,
    inverse_v_scale,
    query_stride,
    key_stride,
    value_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    FLOAT8_MAX: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Grid (tokens, 3): program 0 turns a token's queries, 1 turns its keys and stores them, 2 stores its values.

    query, key and value are views of one projection: [tokens, heads, HEAD_DIM] with their strides in elements a token;
    cos and sin float32 [tokens, ROTARY_HALF]; norms [HEAD_DIM]; caches and slot_mapping as in `AttentionMetadata`.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part == 0:
        _rotate_heads(
            rotated_query, query, query_norm, cos, sin, eps, token, query_stride, NUM_HEADS, PADDED_HEADS, HEAD_DIM,
            PADDED_HALF, HAS_NORM, ROTARY_HALF, INTERLEAVED,
        )  # fmt: skip
    else:
        dims = tl.arange(0, PADDED_HALF)
        first_dims, second_dims = _pair(dims, HALF, ROTARY_HALF, INTERLEAVED)
        kv_heads = tl.arange(0, PADDED_KV_HEADS)
        kv_exists = (kv_heads < NUM_KV_HEADS)[:, None] & (dims < HALF)[None, :]
        slot = tl.load(slot_mapping + token)
        page = (slot // BLOCK_SIZE * NUM_KV_HEADS + kv_heads) * BLOCK_SIZE + slot % BLOCK_SIZE
        first_place = page[:, None] * HEAD_DIM + first_dims[None, :]
        second_place = page[:, None] * HEAD_DIM + second_dims[None, :]
        if part == 1:
            first_key, second_key = _normed_and_rotated(
                key, key_norm, cos, sin, eps, token, kv_heads, kv_heads < NUM_KV_HEADS, key_stride, HEAD_DIM, PADDED_HALF,
                HAS_NORM, ROTARY_HALF, INTERLEAVED,
            )  # fmt: skip
            # Rounded to the model's type first, as where the cache has that type.
            first_key = first_key.to(key.dtype.element_ty).to(tl.float32)
            second_key = second_key.to(key.dtype.element_ty).to(tl.float32)
            first_key = _as_cached(first_key, inverse_k_scale, k_cache, FLOAT8_MAX)
            second_key = _as_cached(second_key, inverse_k_scale, k_cache, FLOAT8_MAX)
            tl.store(k_cache + first_place, first_key, mask=kv_exists)
            tl.store(k_cache + second_place, second_key, mask=kv_exists)
        else:
            start = value + token * value_stride + kv_heads[:, None] * HEAD_DIM
            first_value = tl.load(start + first_dims[None, :], mask=kv_exists, other=0.0).to(tl.float32)
            second_value = tl.load(start + second_dims[None, :], mask=kv_exists, other=0.0).to(tl.float32)
            first_value = _as_cached(first_value, inverse_v_scale, v_cache, FLOAT8_MAX)
            second_value = _as_cached(second_value, inverse_v_scale, v_cache, FLOAT8_MAX)
            tl.store(v_cache + first_place, first_value, mask=kv_exists)
            tl.store(v_cache + second_place, second_value, mask=kv_exists)


@triton.jit(do_not_specialize_on_alignment=["cos", "sin"])
def rotate_kernel(
    rotated_query,
    rotated_key,
    query,
    key,
    cos,
    sin,
    query_stride,
    key_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Grid (tokens, 2): program 0 turns a token's queries, 1 its keys. Arguments as of `rotate_and_store_kernel`."""
    token = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _rotate_heads(
            rotated_query, query, query, cos, sin, 0.0, token, query_stride, NUM_HEADS, PADDED_HEADS, HEAD_DIM,
            PADDED_HALF, False, ROTARY_HALF, INTERLEAVED,
        )  # fmt: skip
    else:
        _rotate_heads(
            rotated_key, key, key, cos, sin, 0.0, token, key_stride, NUM_KV_HEADS, PADDED_KV_HEADS, HEAD_DIM,
            PADDED_HALF, False, ROTARY_HALF, INTERLEAVED,
        )  # fmt: skip
