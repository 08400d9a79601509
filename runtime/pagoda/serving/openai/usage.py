"""Counting the tokens of a response."""

from __future__ import annotations

from typing import Any

from pagoda.text.output import CompletionOutput, GenerationChunk


class UsageCounter:
    """Tokens of all choices of a response so far; a prompt counts once however many choices it has."""

    def __init__(self, *, has_drafts: bool) -> None:
        """`has_drafts`: the engine does speculative decoding, and `usage` says how many drafts were accepted."""
        self._has_drafts = has_drafts
        self._prompt_tokens: dict[int, int] = {}
        self._cached_tokens: dict[int, int] = {}
        self._completion_tokens = 0
        self._reasoning_tokens = 0
        self._draft_tokens = 0
        self._accepted_tokens = 0

    def add(self, prompt_index: int, part: GenerationChunk | CompletionOutput) -> None:
        """Count a chunk, or a whole sequence."""
        self._completion_tokens += len(part.token_ids)
        self._reasoning_tokens += part.num_reasoning_tokens
        if part.num_draft_tokens:
            self._draft_tokens += part.num_draft_tokens
            self._accepted_tokens += part.num_accepted_tokens
        if part.num_prompt_tokens is not None:
            self._prompt_tokens[prompt_index] = part.num_prompt_tokens
            # The choices of a prompt find one another's blocks; the first tells what was cached before the request.
            self._cached_tokens.setdefault(prompt_index, part.num_cached_tokens or 0)

    def usage(self) -> dict[str, Any]:
        """The `usage` object."""
        prompt_tokens = sum(self._prompt_tokens.values())
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
        }
        details: dict[str, int] = {}
        if self._reasoning_tokens:
            details["reasoning_tokens"] = self._reasoning_tokens
        if self._has_drafts:
            details["accepted_prediction_tokens"] = self._accepted_tokens
            details["rejected_prediction_tokens"] = self._draft_tokens - self._accepted_tokens
        if details:
            usage["completion_tokens_details"] = details
        return usage
