"""Log-probabilities in the two shapes of OpenAI, and prompt log-probabilities in vLLM's."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from pagoda.serving.json_values import finite_logprob
from pagoda.text.detokenizer import IncrementalDetokenizer
from pagoda.text.output import PositionLogprobs, TokenLogprob
from pagoda.text.tokenizer import Tokenizer


def chat_logprobs(positions: Sequence[PositionLogprobs], *, as_token_ids: bool = False) -> dict[str, Any]:
    """The `logprobs` of a chat choice; `as_token_ids`: tokens by their ids."""

    def described(token: TokenLogprob) -> dict[str, Any]:
        name = token_id_name(token.token_id) if as_token_ids else token.token
        return {"token": name, "logprob": finite_logprob(token.logprob), "bytes": token.bytes}

    return {
        "content": [
            {**described(position.chosen), "top_logprobs": [described(token) for token in position.top]}
            for position in positions
        ]
    }


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
    """Builds the `logprobs` of one completion choice, piece by piece.

    `text_offset` of a token is where its text begins in the text of the choice. A token that is left out of the text (a
    special token, the one that ended it) stands where it would be; all parts of one character stand where that character is.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._skips_special_tokens = skip_special_tokens
        self._as_token_ids = as_token_ids
        self._length = 0  # of the text so far, in characters
        self._detokenizer: IncrementalDetokenizer | None = None

    def add(
        self, positions: Sequence[PositionLogprobs], prompt_token_ids: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """The lists for the next tokens; `prompt_token_ids` with the first ones."""
        if self._detokenizer is None:
            self._detokenizer = IncrementalDetokenizer(
                self._tokenizer,
                prompt_token_ids=prompt_token_ids or (),
                skip_special_tokens=self._skips_special_tokens,
            )
        offsets = []
        for position in positions:
            piece = self._detokenizer.feed(position.chosen.token_id)
            offsets.append(self._length + _own_beginning(piece, position.chosen.bytes))
            self._length += len(piece)
        return self._lists(positions, offsets)

    def add_prompt(
        self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None], echoed: str
    ) -> dict[str, Any]:
        """The lists for an echoed prompt, of which `echoed` is the text; its first token has no log-probability.

        What the client sent is looked through for each token's text: tokens that were put around it are not in it.
        """
        detokenizer = IncrementalDetokenizer(self._tokenizer, skip_special_tokens=False)
        end, offsets = 0, []
        for token_id in token_ids:
            piece = detokenizer.feed(token_id)
            found = echoed.find(piece, end, end + len(piece) + _MAX_SKIPPED_CHARACTERS)
            begin = end if found < 0 else found
            offsets.append(begin + _own_beginning(piece, self._tokenizer.token_bytes(token_id)))
            end = begin if found < 0 else found + len(piece)
        self._length = len(echoed)
        first = self._name(token_ids[0], self._tokenizer.token_bytes(token_ids[0]).decode(errors="replace"))
        rest = self._lists([position for position in positions if position is not None], offsets[1:])
        begun = {"tokens": [first], "token_logprobs": [None], "top_logprobs": [None], "text_offset": offsets[:1]}
        return joined([begun, rest])

    def _lists(self, positions: Sequence[PositionLogprobs], offsets: list[int]) -> dict[str, Any]:
        return {
            "tokens": [self._name(position.chosen.token_id, position.chosen.token) for position in positions],
            "token_logprobs": [finite_logprob(position.chosen.logprob) for position in positions],
            "top_logprobs": [self._candidates(position) for position in positions],
            "text_offset": offsets,
        }

    def _candidates(self, position: PositionLogprobs) -> dict[str, float]:
        """Log-probabilities by text; candidates whose text another one has, as parts of characters have, go by their ids."""
        ids: dict[str, int] = {}
        logprobs: dict[str, float] = {}
        for token in (*position.top, position.chosen):
            name = self._name(token.token_id, token.token)
            if ids.setdefault(name, token.token_id) != token.token_id:
                name = token_id_name(token.token_id)
            logprobs[name] = finite_logprob(token.logprob)
        return logprobs

    def _name(self, token_id: int, text: str) -> str:
        return token_id_name(token_id) if self._as_token_ids else text


# Normalizers add and take away a character here and there; what stands farther off is another token's.
_MAX_SKIPPED_CHARACTERS = 8


def token_id_name(token_id: int) -> str:
    """A token by its id, as vLLM writes it with `return_tokens_as_token_ids`."""
    return f"token_id:{token_id}"


def _own_beginning(piece: str, token_bytes: Sequence[int]) -> int:
    """Where a token's text begins in `piece`, what it settled: behind a character that an earlier one left half."""
    data = bytes(token_bytes)
    if not data or data[0] & 0xC0 == 0x80:  # it goes on with that character
        return 0
    own = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(data)
    return max(0, len(piece) - len(own))


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lists of several pieces behind one another."""
    return {key: [entry for part in parts for entry in part[key]] for key in parts[0]}
