"""Log-probabilities in the two shapes of OpenAI, and prompt log-probabilities in vLLM's."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from pagoda.serving.json_values import finite_logprob
from pagoda.text.output import PositionLogprobs, TokenLogprob


def chat_logprobs(positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""
    return {
        "content": [
            {**_chat_token(position.chosen), "top_logprobs": [_chat_token(token) for token in position.top]}
            for position in positions
        ]
    }


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": finite_logprob(token.logprob), "bytes": token.bytes}


def prompt_logprobs(positions: Sequence[PositionLogprobs | None]) -> list[dict[str, Any] | None]:
    """One mapping of token id to its log-probability a position; the first token of a prompt has none."""
    return [
        None
        if position is None
        else {
            str(token.token_id): {
                "logprob": finite_logprob(token.logprob),
                "rank": token.rank,
                "decoded_token": token.token,
            }
            for token in (*position.top, position.chosen)
        }
        for position in positions
    ]


class CompletionLogprobs:
    """Builds the `logprobs` of one completion choice, piece by piece; offsets count characters of the whole text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def add(self, positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
        """The lists for the next tokens."""
        offsets = []
        for position in positions:
            added = bytes(position.chosen.bytes)
            breaks_off = bool(self._decoder.getstate()[0] and added) and added[0] & 0xC0 != 0x80
            # A character that this token leaves half is one U+FFFD in the text, before this token's own.
            offsets.append(self._offset + breaks_off)
            self._offset += len(self._decoder.decode(added))
        return {
            "tokens": [position.chosen.token for position in positions],
            "token_logprobs": [finite_logprob(position.chosen.logprob) for position in positions],
            "top_logprobs": [
                {token.token: finite_logprob(token.logprob) for token in (*position.top, position.chosen)}
                for position in positions
            ],
            "text_offset": offsets,
        }

    def add_first(self, token: str, num_characters: int) -> dict[str, Any]:
        """The lists for the first token of an echoed prompt, which has no log-probability."""
        self._offset += num_characters
        return {"tokens": [token], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lists of several pieces behind one another."""
    return {key: [entry for part in parts for entry in part[key]] for key in parts[0]}
