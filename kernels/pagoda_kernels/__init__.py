"""Pagoda's kernels: paged attention, KV write, norm, rope, activation, sampling. Imports only torch (and triton on a GPU)."""
