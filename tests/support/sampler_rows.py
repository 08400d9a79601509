"""Runs the batched sampler on naive rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from pagoda.sampling.sampler import Sampler, SamplerOutput
from pagoda_kernels import reference
from pagoda_kernels.interface import KernelBackend
from tests.support.naive_sampler import Row

MAX_TOKENS = 64


def make_sampler(
    vocab_size: int, max_num_seqs: int, kernels: KernelBackend = reference.BACKEND
) -> tuple[Sampler, torch.Tensor]:
    """A sampler and the token pool that it reads."""
    pool = torch.full((max_num_seqs, MAX_TOKENS + 1), 0, dtype=torch.int64)
    return Sampler(vocab_size=vocab_size, token_pool=pool, kernels=kernels, seed=0), pool


def enter(sampler: Sampler, pool: torch.Tensor, req_index: int, row: Row) -> None:
    pool[req_index, : len(row.tokens)] = torch.tensor(row.tokens)
    sampler.add(req_index, request_of(row.params, row.prompt, row.eos_token_ids))


def request_of(
    params: SamplingParams, prompt_token_ids: Sequence[int] = (0,), eos_token_ids: Sequence[int] = ()
) -> EngineRequest:
    """A request as the sampler gets it."""
    return EngineRequest(
        params=params, prompt_token_ids=list(prompt_token_ids), max_tokens=1, eos_token_ids=tuple(eos_token_ids)
    )


def run(sampler: Sampler, rows: list[Row], req_indices: list[int]) -> SamplerOutput:
    """Sample rows that are in their request slots already."""
    logits = torch.tensor([row.logits for row in rows], dtype=torch.float32)
    positions = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    return sampler.sample(logits, np.array(req_indices, dtype=np.int64), positions)


def sample_rows(
    rows: list[Row],
    req_indices: list[int] | None = None,
    max_num_seqs: int | None = None,
    kernels: KernelBackend = reference.BACKEND,
) -> SamplerOutput:
    """Sample rows in a sampler of their own."""
    req_indices = list(range(len(rows))) if req_indices is None else req_indices
    sampler, pool = make_sampler(len(rows[0].logits), max_num_seqs or len(rows), kernels)
    for req_index, row in zip(req_indices, rows, strict=True):
        enter(sampler, pool, req_index, row)
    return run(sampler, rows, req_indices)
