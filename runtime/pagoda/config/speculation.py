"""`speculative_config`: the keys that vLLM's has, for the methods that there are here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

METHODS = ("ngram", "suffix", "grammar", "draft_model", "eagle3", "mtp")

# Those whose drafts a model makes, on the rank that samples.
MODEL_METHODS = ("draft_model", "eagle3", "mtp")
# Of these, those that read hidden states of the model.
HEAD_METHODS = ("eagle3", "mtp")
# How a draft model's weights are rounded when it is loaded.
QUANTIZATIONS = ("int8", "int4")
# Other names of methods in vLLM.
_SPELLINGS = {
    "[ngram]": "ngram",
    **dict.fromkeys(
        ("deepseek_mtp", "glm4_moe_mtp", "glm4_moe_lite_mtp", "qwen3_next_mtp", "ernie_mtp", "mimo_mtp"), "mtp"
    ),
}

# More drafts than this in a row are never all right often enough to pay for their positions.
MAX_SPECULATIVE_TOKENS = 128

_DEFAULT_TOKENS = {"ngram": 16, "suffix": 24, "grammar": 16, "draft_model": 4, "eagle3": 3, "mtp": 1}
_COMMON = ("method", "num_speculative_tokens")
_KEYS = {
    "ngram": ("prompt_lookup_min", "prompt_lookup_max"),
    "suffix": (
        "suffix_decoding_max_tree_depth",
        "suffix_decoding_max_cached_requests",
        "suffix_decoding_max_spec_factor",
        "suffix_decoding_min_token_prob",
    ),
    "grammar": (),
    "draft_model": ("model", "quantization"),
    "eagle3": ("model",),
    "mtp": ("model",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How drafts are made. Names and meaning are vLLM's; `num_speculative_tokens` is the most drafts of a row in a step.

    ngram: what followed the last tokens when at least `prompt_lookup_min` of them stood earlier in prompt or output; the
    occurrence with the most equal tokens counts, up to `prompt_lookup_max`. suffix: what followed most often, in prompt and
    output and in earlier outputs of the same tenant, up to `max_cached_requests` of them; at most `max_spec_factor` times as
    many drafts as tokens are equal, while their estimated probability is at least `min_token_prob`. grammar: what a structured
    output leaves no choice about, which ngram and suffix propose, too. draft_model: what the
    small model `model`, a directory or a Hugging Face id, generates, with its weights rounded as `quantization` says; without
    `model`, the model served with rounded weights. eagle3: what the EAGLE-3 head `model` generates; None
    is the head of the built-in demo model. mtp: what the layer for multi-token prediction makes that the model's own
    checkpoint has; `model` may name that checkpoint.
    """

    method: str
    num_speculative_tokens: int
    model: str | None = None
    quantization: str | None = None
    prompt_lookup_min: int = 3
    prompt_lookup_max: int = 16
    suffix_decoding_max_tree_depth: int = 24
    suffix_decoding_max_cached_requests: int = 10_000
    suffix_decoding_max_spec_factor: float = 1.0
    suffix_decoding_min_token_prob: float = 0.1

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> SpeculativeConfig:
        """Of the JSON object that a user gave. Raises `ValueError` with a sentence on the first key that is wrong."""
        known = {field.name for field in fields(cls)}
        unknown = [key for key in value if key not in known]
        method = value.get("method", "draft_model" if "model" in value else None)
        method = _SPELLINGS.get(method, method) if isinstance(method, str) else method
        if method not in METHODS:
            given = f"method={method!r} is not one of them" if method is not None else "method is missing"
            raise ValueError(f"{given}: it must be one of {', '.join(METHODS)}")
        allowed = (*_COMMON, *_KEYS[method])
        for key in unknown or [key for key in value if key not in allowed]:
            raise ValueError(f"{str(key)[:80]!r} is not a key of method {method}, which has {', '.join(allowed)}")
        lookup = [value[key] for key in ("prompt_lookup_min", "prompt_lookup_max") if key in value]
        settings: dict[str, Any] = {
            "num_speculative_tokens": value.get("suffix_decoding_max_tree_depth", _DEFAULT_TOKENS[method])
        }
        if len(lookup) == 1:  # as in vLLM, the other is the same
            settings |= {"prompt_lookup_min": lookup[0], "prompt_lookup_max": lookup[0]}
        config = cls(**(settings | {**value, "method": method}))
        config._check()
        return config

    def max_draft_tokens(self, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        """The most drafts of all rows of a step together: more would not pay, and their logits take memory."""
        return min(max(max_num_seqs, MAX_SPECULATIVE_TOKENS), max_num_batched_tokens)

    def _check(self) -> None:
        _integer("num_speculative_tokens", self.num_speculative_tokens, 1, MAX_SPECULATIVE_TOKENS)
        _integer("prompt_lookup_min", self.prompt_lookup_min, 1, 128)
        _integer("prompt_lookup_max", self.prompt_lookup_max, 1, 128)
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min={self.prompt_lookup_min} must be at most prompt_lookup_max={self.prompt_lookup_max}"
            )
        _integer("suffix_decoding_max_tree_depth", self.suffix_decoding_max_tree_depth, 1, MAX_SPECULATIVE_TOKENS)
        _integer("suffix_decoding_max_cached_requests", self.suffix_decoding_max_cached_requests, 0, 1_000_000)
        _number("suffix_decoding_max_spec_factor", self.suffix_decoding_max_spec_factor, 0.0, 128.0)
        _number("suffix_decoding_min_token_prob", self.suffix_decoding_min_token_prob, 0.0, 1.0)
        is_named = isinstance(self.model, str) and bool(self.model)
        if self.method == "draft_model" and self.model is None and self.quantization is None:
            raise ValueError(
                "method draft_model needs model, the directory or the Hugging Face id of the small model, or quantization, by "
                "which the model served is rounded for its drafts"
            )
        if self.model is not None and not is_named:
            raise ValueError(f"model={self.model!r} must be a directory or a Hugging Face id")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ValueError(f"quantization={self.quantization!r} must be one of {', '.join(QUANTIZATIONS)}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be an integer between {low} and {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be a number between {low:g} and {high:g}")
