"""A sampler as one would write it for a single row, with lists and a sort, to hold the batched one against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pagoda.sampling.noise import uniforms
from pagoda.sampling.params import SamplingParams


@dataclass
class Row:
    """One request at one moment: its logits, its tokens so far, and its parameters (with a seed)."""

    logits: list[float]
    prompt: list[int]
    output: list[int]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


class TooCloseError(Exception):
    """The outcome hangs on the last bits of a sum, so two right samplers may differ."""


def processed(row: Row) -> list[float]:
    """Logits after everything but temperature, min-p, top-k and top-p."""
    p, tokens = row.params, row.tokens
    logits = list(row.logits)
    forbidden: set[int] = set()
    if p.allowed_token_ids is not None:
        forbidden |= set(range(len(logits))) - set(p.allowed_token_ids)
    if len(row.output) < p.min_tokens:
        forbidden |= set(row.eos_token_ids) | set(p.stop_token_ids)
    for token, bias in (p.logit_bias or {}).items():
        logits[token] += bias
    for *prefix, last in p.bad_words_token_ids:
        if len(prefix) <= len(tokens) and tokens[len(tokens) - len(prefix) :] == prefix:
            forbidden.add(last)
    for token in set(tokens):
        logits[token] = (
            logits[token] / p.repetition_penalty if logits[token] > 0 else logits[token] * p.repetition_penalty
        )
    for token in set(row.output):
        logits[token] -= p.presence_penalty + p.frequency_penalty * row.output.count(token)
    return [-math.inf if token in forbidden else logit for token, logit in enumerate(logits)]


def ranked(row: Row) -> list[tuple[int, float]]:
    """Tokens with their relative probabilities after temperature, min-p and top-k, best first."""
    logits = processed(row)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    best = logits[order[0]]
    weights = [(token, math.exp((logits[token] - best) / row.params.temperature)) for token in order]
    if row.params.top_k > 0:
        weights = weights[: row.params.top_k]
    return [(token, weight) for token, weight in weights if weight > 0 and weight >= row.params.min_p]


def nucleus(weights: list[tuple[int, float]], top_p: float) -> list[tuple[int, float]]:
    """The shortest beginning that weighs `top_p` of all."""
    needed = top_p * sum(weight for _, weight in weights)
    kept: list[tuple[int, float]] = []
    held = 0.0
    for token, weight in weights:
        if kept and abs(held - needed) < 1e-5 * needed and top_p < 1.0:
            raise TooCloseError
        if held >= needed:
            break
        kept.append((token, weight))
        held += weight
    return kept


def _draw(weights: list[tuple[int, float]], uniform: float) -> int:
    target = uniform * sum(weight for _, weight in weights)
    before = 0.0
    for token, weight in weights:
        if before + weight > target:
            if min(target - before, before + weight - target) < 1e-5:
                raise TooCloseError
            return token
        before += weight
    raise TooCloseError


def sample(row: Row) -> int:
    """The token of a row; greedy, or with the noise of its seed and position."""
    if row.params.is_greedy:
        logits = processed(row)
        return logits.index(max(logits))
    weights = ranked(row)
    allowed = nucleus(weights, row.params.top_p)
    seed = np.array([row.params.seed % 2**64], dtype=np.uint64)
    position = np.array([len(row.tokens)], dtype=np.int64)
    if 0 < row.params.top_k < len(row.logits):
        return _draw(allowed, float(uniforms(seed, position)[0]))
    rest = weights
    for attempt in range(10_000):
        token = _draw(sorted(rest), float(uniforms(seed, position, attempt)[0]))
        if any(token == kept for kept, _ in allowed):
            return token
        rest = rest[: [kept for kept, _ in rest].index(token)]
    raise AssertionError("rejection does not end")
