"""The gated delta net (Yang et al., 2024): convolution, the state's last inputs, the delta rule, norm and output gate.

Each state is read and written by one program, and each channel's last inputs by one lane, so both may stay in their block:

    convolve_kernel         (row, tile of tokens) × channels     inputs of the step, and before them those of the state
    keep_inputs_kernel      row × channels                       the last inputs at the end of each block, in order
    delta_rule_kernel       row × value head × columns           the state in registers, token by token
    gated_norm_kernel       token × value head

`interleaved` projections are key head by key head: see `DeltaNetWeights`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _input_columns(
    channels,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Where a token's inputs of these channels of the convolution are in its projection."""
    if not INTERLEAVED:
        return channels
    KEYS: tl.constexpr = KEY_HEADS * KEY_DIM
    VALUES: tl.constexpr = GROUP * VALUE_DIM
    WIDTH: tl.constexpr = 2 * (KEY_DIM + VALUES)
    key = channels - KEYS
    value = channels - 2 * KEYS
    of_query = channels // KEY_DIM * WIDTH + channels % KEY_DIM
    of_key = key // KEY_DIM * WIDTH + KEY_DIM + key % KEY_DIM
    of_value = value // VALUES * WIDTH + 2 * KEY_DIM + value % VALUES
    return tl.where(channels < KEYS, of_query, tl.where(channels < 2 * KEYS, of_key, of_value))


@triton.jit
def _row(query_start_loc, seq_lens, row):
    """Of a row: its first token in the batch, the one after its last, and the position of the first."""
    begin = tl.load(query_start_loc + row)
    end = tl.load(query_start_loc + row + 1)
    return begin, end, tl.load(seq_lens + row) - (end - begin)


@triton.jit
def convolve_kernel(
    output,
    projected,
    weight,
    conv_states,
    query_start_loc,
    seq_lens,
    block_table,
    table_stride,
    conv_stride,
    num_tiles,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (rows * num_tiles, tiles of channels): output[token] = SiLU of the convolution, [T, channels]."""
    CHANNELS: tl.constexpr = KEY_HEADS * (2 * KEY_DIM + GROUP * VALUE_DIM)
    WIDTH: tl.constexpr = CHANNELS + KEY_HEADS * GROUP * VALUE_DIM
    row = tl.program_id(0) // num_tiles
    begin, end, first = _row(query_start_loc, seq_lens, row)
    tokens = begin + tl.program_id(0) % num_tiles * TOKENS + tl.arange(0, TOKENS)
    channels = tl.program_id(1) * TILE + tl.arange(0, TILE)
    has_channel = channels < CHANNELS
    columns = _input_columns(channels, KEY_HEADS, GROUP, KEY_DIM, VALUE_DIM, INTERLEAVED)
    before = tl.load(block_table + row * table_stride + tl.maximum(first - 1, 0) // BLOCK_SIZE).to(tl.int64)
    dtype = output.dtype.element_ty
    total = tl.zeros((TOKENS, TILE), tl.float32)
    for tap in tl.static_range(TAPS + 1):
        source = tokens - TAPS + tap
        is_here = (source >= begin) & (tokens < end)
        inputs = tl.load(
            projected + source.to(tl.int64)[:, None] * WIDTH + columns[None, :],
            mask=is_here[:, None] & has_channel[None, :],
            other=0.0,
        ).to(tl.float32)
        is_kept = (source < begin) & (tokens < end) & (first > 0)
        inputs += tl.load(
            conv_states + before * conv_stride + (source - begin + TAPS)[:, None] * CHANNELS + channels[None, :],
            mask=is_kept[:, None] & has_channel[None, :],
            other=0.0,
        )
        total += inputs * tl.load(weight + tap * CHANNELS + channels, mask=has_channel, other=0.0)[None, :]
    total = total.to(dtype).to(tl.float32)
    activated = total / (1.0 + tl.exp(-total))
    to = output + tokens.to(tl.int64)[:, None] * CHANNELS + channels[None, :]
    tl.store(to, activated.to(dtype), mask=(tokens < end)[:, None] & has_channel[None, :])


@triton.jit
def keep_inputs_kernel(
    conv_states,
    projected,
    query_start_loc,
    seq_lens,
    block_table,
    table_stride,
    conv_stride,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (rows, tiles of channels): the last TAPS inputs at the end of each block that the row reaches.

    A lane takes what is before the row's tokens from the block before, which may be the one it writes: tap after tap, each of
    which comes from the same or a later one.
    """
    CHANNELS: tl.constexpr = KEY_HEADS * (2 * KEY_DIM + GROUP * VALUE_DIM)
    WIDTH: tl.constexpr = CHANNELS + KEY_HEADS * GROUP * VALUE_DIM
    row = tl.program_id(0)
    begin, end, first = _row(query_start_loc, seq_lens, row)
    table = block_table + row * table_stride
    channels = tl.program_id(1) * TILE + tl.arange(0, TILE)
    has_channel = channels < CHANNELS
    columns = _input_columns(channels, KEY_HEADS, GROUP, KEY_DIM, VALUE_DIM, INTERLEAVED)
    length = first + end - begin
    known = first
    known_block = tl.load(table + tl.maximum(first - 1, 0) // BLOCK_SIZE).to(tl.int64)
    for index in range(first // BLOCK_SIZE, (length - 1) // BLOCK_SIZE + 1):
        block = tl.load(table + index).to(tl.int64)
        reached = tl.minimum((index + 1) * BLOCK_SIZE, length)
        for tap in tl.static_range(TAPS):
            position = reached - TAPS + tap
            is_new = position >= known
            inputs = tl.load(
                projected + (begin + position - first).to(tl.int64) * WIDTH + columns,
                mask=has_channel & is_new,
                other=0.0,
            ).to(tl.float32)
            is_kept = (position < known) & (known > 0)
            inputs += tl.load(
                conv_states + known_block * conv_stride + (position - known + TAPS) * CHANNELS + channels,
                mask=has_channel & is_kept,
                other=0.0,
            )
            tl.store(conv_states + block * conv_stride + tap * CHANNELS + channels, inputs, mask=has_channel)
        known = reached
        known_block = block


@triton.jit
def delta_rule_kernel(
    output,
    mixed,
    gates,
    decay_log,
    step_bias,
    first_states,
    other_states,
    query_start_loc,
    seq_lens,
    block_table,
    table_stride,
    first_stride,
    other_stride,
    key_scale,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    PADDED_KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FIRST_HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (rows, value heads, tiles of VALUE_DIM): what each token reads of its state, [T, value heads, VALUE_DIM]."""
    KEYS: tl.constexpr = KEY_HEADS * KEY_DIM
    HEADS: tl.constexpr = KEY_HEADS * GROUP
    CHANNELS: tl.constexpr = 2 * KEYS + HEADS * VALUE_DIM
    row, head = tl.program_id(0), tl.program_id(1)
    begin, end, first = _row(query_start_loc, seq_lens, row)
    table = block_table + row * table_stride
    keys = tl.arange(0, PADDED_KEY_DIM)
    columns = tl.program_id(2) * TILE + tl.arange(0, TILE)
    has_key, has_column = keys < KEY_DIM, columns < VALUE_DIM
    is_own = has_key[:, None] & has_column[None, :]
    places = keys[:, None] * VALUE_DIM + columns[None, :]
    if head < FIRST_HEADS:
        states = first_states + head * (KEY_DIM * VALUE_DIM)
        stride = first_stride
    else:
        states = other_states + (head - FIRST_HEADS) * (KEY_DIM * VALUE_DIM)
        stride = other_stride
    before = tl.load(table + tl.maximum(first - 1, 0) // BLOCK_SIZE).to(tl.int64)
    state = tl.load(states + before * stride + places, mask=is_own & (first > 0), other=0.0)
    if INTERLEAVED:
        write_gate = head // GROUP * (2 * GROUP) + head % GROUP
        step = write_gate + GROUP
    else:
        write_gate = head
        step = HEADS + head
    rate = tl.exp(tl.load(decay_log + head))
    bias = tl.load(step_bias + head)
    for token in range(begin, end):
        of_token = mixed + tl.cast(token, tl.int64) * CHANNELS
        query = tl.load(of_token + head // GROUP * KEY_DIM + keys, mask=has_key, other=0.0).to(tl.float32)
        key = tl.load(of_token + KEYS + head // GROUP * KEY_DIM + keys, mask=has_key, other=0.0).to(tl.float32)
        value = tl.load(of_token + 2 * KEYS + head * VALUE_DIM + columns, mask=has_column, other=0.0).to(tl.float32)
        query = query / tl.sqrt(tl.sum(query * query) + 1e-6) * key_scale
        key = key / tl.sqrt(tl.sum(key * key) + 1e-6)
        of_gates = gates + tl.cast(token, tl.int64) * (2 * HEADS)
        beta = 1.0 / (1.0 + tl.exp(-tl.load(of_gates + write_gate)))
        x = tl.load(of_gates + step) + bias
        softplus = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
        state = state * tl.exp(-rate * softplus)
        change = (value - tl.sum(state * key[:, None], axis=0)) * beta
        state = state + key[:, None] * change[None, :]
        read = tl.sum(state * query[:, None], axis=0)
        to = output + (tl.cast(token, tl.int64) * HEADS + head) * VALUE_DIM + columns
        tl.store(to, read.to(output.dtype.element_ty), mask=has_column)
        position = first + token - begin
        if (token == end - 1) | ((position + 1) % BLOCK_SIZE == 0):
            block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
            tl.store(states + block * stride + places, state, mask=is_own)


@triton.jit
def gated_norm_kernel(
    output,
    read,
    projected,
    weight,
    eps,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Grid (tokens, value heads): RMSNorm of what a head read, times SiLU of its output gate."""
    HEADS: tl.constexpr = KEY_HEADS * GROUP
    VALUES: tl.constexpr = GROUP * VALUE_DIM
    CHANNELS: tl.constexpr = 2 * KEY_HEADS * KEY_DIM + HEADS * VALUE_DIM
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, PADDED_VALUE_DIM)
    has_column = columns < VALUE_DIM
    place = (token * HEADS + head) * VALUE_DIM + columns
    if INTERLEAVED:
        gate_column = head // GROUP * (2 * (KEY_DIM + VALUES)) + 2 * KEY_DIM + VALUES + head % GROUP * VALUE_DIM
    else:
        gate_column = CHANNELS + head * VALUE_DIM
    from_gate = projected + token * (CHANNELS + HEADS * VALUE_DIM) + gate_column + columns
    gate = tl.load(from_gate, mask=has_column, other=0.0).to(tl.float32)
    x = tl.load(read + place, mask=has_column, other=0.0).to(tl.float32)
    dtype = output.dtype.element_ty
    unit = (x / tl.sqrt(tl.sum(x * x) / VALUE_DIM + eps)).to(dtype).to(tl.float32)
    weighted = (unit * tl.load(weight + columns, mask=has_column, other=0.0)).to(dtype).to(tl.float32)
    tl.store(output + place, (weighted * (gate / (1.0 + tl.exp(-gate)))).to(dtype), mask=has_column)
