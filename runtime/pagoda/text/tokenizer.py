"""The tokenizer of a checkpoint, read with the `tokenizers` library alone.

transformers' AutoTokenizer imports torch, which costs seconds; the process that answers HTTP needs neither. A checkpoint with
a tokenizer.json is therefore read directly, and that file is the truth about normalization, splitting and decoding. Only
a checkpoint without one goes through AutoTokenizer, which converts its vocabulary to the same library.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from tokenizers import Encoding, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as TokenizersTokenizer

from pagoda.errors import CheckpointError, InvalidRequestError
from pagoda.models.checkpoint_files import (
    checkpoint_file,
    has_file,
    is_checkpoint,
    names_ending_with,
    read_json_object,
    shown,
    shown_reason,
)
from pagoda.text.stream_decoder import DecoderPlan
from pagoda.text.tokenizer_bounds import check_steps, check_vocabulary
from pagoda.text.tokenizer_files import TokenizerFiles, read_tokenizer_files
from pagoda.text.tokenizer_loading import (
    MAX_TOKENIZER_BYTES,
    TOKENIZER_FILE,
    is_panic,
    load_tokenizer_json,
    read_tokenizer_json,
)

# Of a checkpoint without tokenizer.json: what transformers may read for its tokenizer, and what of it is JSON.
_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm", ".bpe")
_READ_AS_JSON = (
    *("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("chat_template.json", "processor_config.json", "preprocessor_config.json"),
)


_loaded: WeakValueDictionary[tuple[bytes, str], Tokenizer] = WeakValueDictionary()
"""By what they were loaded from. While the library loads one, 0.1 to 0.4 s, it holds the interpreter lock: a server streams
nothing; versions of a model have the same one, and so has a model that comes again.
"""
_last_loaded: deque[Tokenizer] = deque(maxlen=2)


class Tokenizer:
    """Text to token ids and back. Safe to share between threads: nothing but caches changes after construction.

    `special_tokens`: content by name (`eos_token`, ...). `special_token_ids`: the ids that `skip_special_tokens` drops.
    `chat_templates`: jinja sources by name; empty for a tokenizer without one. `vocab_size`: one more than the largest id.
    `longest_token_characters`: the most input characters of one token: bounds a text by its token limit. `added_tokens`: the
    ids of tokens that were added to the vocabulary whole, by content. `response_template`: as it is in its file.
    """

    def __init__(
        self,
        backend: TokenizersTokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_templates: dict[str, str] | None = None,
        response_template: Any = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = special_tokens or {}
        self.chat_templates = chat_templates or {}
        self.response_template = response_template
        added = backend.get_added_tokens_decoder()
        self.added_tokens = {token.content: token_id for token_id, token in added.items()}
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        check_vocabulary(vocabulary)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.longest_token_characters = max(map(len, vocabulary), default=1)
        # The decoder's state is its description in tokenizer.json; the whole backend's would hold the vocabulary too.
        self.decoder_plan = DecoderPlan(json.loads(backend.decoder.__getstate__()) if backend.decoder else None)
        self.settled_texts = SettledTexts(self)

    @classmethod
    def from_directory(cls, directory: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
        """Load the tokenizer of the checkpoint in `directory`; nothing is downloaded.

        `trust_remote_code` lets a checkpoint without tokenizer.json bring Python code of its own.
        Raises `CheckpointError` when there is no tokenizer or it cannot be read.
        """
        path = Path(directory)
        if not is_checkpoint(path):
            raise CheckpointError(f"{path} is not a directory with a tokenizer, nor a GGUF file")
        files = read_tokenizer_files(path)
        if not has_file(path, TOKENIZER_FILE):
            return _from_auto_tokenizer(files, trust_remote_code)
        data, digest = read_tokenizer_json(path)
        content = digest, repr(replace(files, directory=Path()))
        tokenizer = _loaded.get(content)
        if tokenizer is None:
            tokenizer = _loaded[content] = cls._of_json(path, files, load_tokenizer_json(path, data, digest))
        _last_loaded.append(tokenizer)
        return tokenizer

    @classmethod
    def _of_json(cls, path: Path, files: TokenizerFiles, backend: TokenizersTokenizer) -> Tokenizer:
        _apply_add_prefix_space(backend, files)
        _add_missing_tokens(backend, files)
        backend.encode_special_tokens = files.split_special_tokens
        tokenizer = cls(
            backend,
            special_tokens={name: token.content for name, token in files.special_tokens.items()},
            chat_templates=files.chat_templates,
            response_template=files.response_template,
        )
        for token_id, token in files.added_tokens.items():
            if token_id >= tokenizer.vocab_size:
                raise CheckpointError(
                    f"{path}: the added token {shown(token.content)} has id {token_id}, beyond the vocabulary of "
                    f"{tokenizer.vocab_size} tokens; ids of added tokens must follow on it without a gap"
                )
        return tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. Tokens that are spelled out in the text, special ones too, become their ids.

        `add_special_tokens` adds what the tokenizer puts around every text, such as a begin-of-sequence token.
        Raises `InvalidRequestError` for text that is not valid Unicode (lone surrogates).
        """
        try:
            # The batch call, unlike `encode`, works with the interpreter lock released.
            ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequestError(f"the text is not valid Unicode and cannot be tokenized: {error}") from error
        return ids

    def encode_whole(
        self, text: str, pair: str | None = None, *, add_special_tokens: bool = True, max_length: int | None = None
    ) -> tuple[list[int], int | None]:
        """The ids of a text, or of two that are read together, and where the second one's token type begins, if it has one.

        `max_length`: keep so many tokens, those around the texts included; of two texts the longer one is cut first, as
        transformers does by `longest_first`. Raises `InvalidRequestError` for text that is not valid Unicode.
        """
        try:
            if max_length is None:
                texts = [text] if pair is None else [(text, pair)]
                encoding = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)[0]
            else:
                encoding = self._truncated(text, pair, max_length, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequestError(f"the text is not valid Unicode and cannot be tokenized: {error}") from error
        second = None
        if pair is not None and 1 in encoding.type_ids:
            second = encoding.type_ids.index(1)
        return encoding.ids, second

    def _truncated(self, text: str, pair: str | None, max_length: int, *, add_special_tokens: bool) -> Encoding:
        texts = [text] if pair is None else [text, pair]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        around = self._backend.num_special_tokens_to_add(pair is not None) if add_special_tokens else 0
        room = max(0, max_length - around)
        lengths = [len(encoding.ids) for encoding in encodings]
        for encoding, length in zip(encodings, _shortened(lengths, room), strict=True):
            encoding.truncate(length)
        first, second = encodings[0], encodings[1] if pair is not None else None
        return self._backend.post_process(first, second, add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; ids that no token has are left out, bytes that are no character become U+FFFD."""
        text: str = self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)[0]
        return text

    def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        """`decode` of each id by itself, special tokens too."""
        texts: list[str] = self._backend.decode_batch([[token_id] for token_id in token_ids], skip_special_tokens=False)
        return texts

    def token(self, token_id: int) -> str | None:
        """The vocabulary entry of an id as it is written in the vocabulary; None for an id without one."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry; None if there is none."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text it does not begin; empty for an id without a token."""
        token = self.token(token_id)
        return b"" if token is None else self.decoder_plan.token_bytes(token)

    @cached_property
    def eos_token_id(self) -> int | None:
        """The id of the end-of-sequence token that the tokenizer's own files name."""
        return self._named_id("eos_token")

    @cached_property
    def bos_token_id(self) -> int | None:
        """The id of the begin-of-sequence token that the tokenizer's own files name."""
        return self._named_id("bos_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint brings a chat template."""
        return bool(self.chat_templates)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_id(token)


def _shortened(lengths: list[int], room: int) -> list[int]:
    """Lengths of one or two texts cut to `room` in all, the longer one first."""
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    shorter, longer = sorted(lengths)
    if shorter + longer > room:
        longer = max(shorter, room - shorter)
        if shorter + longer > room:
            shorter, longer = room // 2, room - room // 2
    return [shorter, longer] if lengths[0] <= lengths[1] else [longer, shorter]


class SettledTexts(dict[int, str | None]):
    """Token id to `DecoderPlan.settled_text`, filled as ids occur; an id without a token adds nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str | None:
        token = self._tokenizer.token(token_id)
        text = self[token_id] = "" if token is None else self._tokenizer.decoder_plan.settled_text(token)
        return text


def _apply_add_prefix_space(backend: TokenizersTokenizer, files: TokenizerFiles) -> None:
    """Obey `add_prefix_space` of tokenizer_config.json where the tokenizer's class in transformers does."""
    if files.add_prefix_space is None:
        return
    steps = list(_steps(backend.pre_tokenizer))
    byte_level = [step for step in steps if isinstance(step, pre_tokenizers.ByteLevel)]
    if files.tokenizer_class in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        for step in byte_level:
            step.add_prefix_space = files.add_prefix_space
    elif files.tokenizer_class == "LlamaTokenizer" and isinstance(backend.model, models.BPE) and not byte_level:
        # That class makes these steps anew, whatever tokenizer.json says.
        scheme = ("always" if files.legacy else "first") if files.add_prefix_space else "never"
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        strip = [decoders.Strip(content=" ", left=1)] if files.add_prefix_space else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )


def _steps(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None,
) -> Iterator[pre_tokenizers.PreTokenizer]:
    """The steps of a pre-tokenizer; to change one changes it in the tokenizer."""
    if isinstance(pre_tokenizer, pre_tokenizers.Sequence):
        for step in pre_tokenizer:  # type: ignore[attr-defined]
            yield from _steps(step)
    elif pre_tokenizer is not None:
        yield pre_tokenizer


def _add_missing_tokens(backend: TokenizersTokenizer, files: TokenizerFiles) -> None:
    """Add the tokens that only the files beside tokenizer.json name, in transformers' order so that ids come out equal."""
    present = backend.get_added_tokens_decoder()
    known = {repr(token) for token in present.values()}
    to_add = [token for _, token in sorted(files.added_tokens.items()) if repr(token) not in known]
    contents = {token.content for token in (*present.values(), *to_add)}
    for token in (*files.special_tokens.values(), *files.extra_special_tokens):
        if token.content not in contents:
            contents.add(token.content)
            to_add.append(token)
    special_contents = {token.content for token in files.special_tokens.values()}
    for token in to_add:
        token.special = token.special or token.content in special_contents
    if to_add:
        backend.add_tokens(to_add)


def _from_auto_tokenizer(files: TokenizerFiles, trust_remote_code: bool) -> Tokenizer:
    """A checkpoint without tokenizer.json: transformers converts what it has (vocab.json + merges.txt, tokenizer.model)."""
    # transformers opens what it looks for by itself.
    for name in names_ending_with(files.directory, _TOKENIZER_SUFFIXES):
        if name in _READ_AS_JSON:
            read_json_object(files.directory, name)
        elif (size := checkpoint_file(files.directory, name).stat().st_size) > MAX_TOKENIZER_BYTES:
            raise CheckpointError(
                f"{files.directory / name} has {size} bytes; at most {MAX_TOKENIZER_BYTES} are allowed"
            )
    models_only = names_ending_with(files.directory, (".model",)) and not has_file(files.directory, "vocab.json")
    if models_only and find_spec("sentencepiece") is None:
        raise _needs_conversion(files.directory, "the package sentencepiece, which reads it, is not installed")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(files.directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except BaseException as error:  # transformers raises whatever the converter of the vocabulary raised
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if models_only:
            raise _needs_conversion(files.directory, shown_reason(error)) from error
        raise CheckpointError(
            f"{files.directory} has no {TOKENIZER_FILE}, and transformers cannot load another tokenizer from it: "
            f"{shown_reason(error)}"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, TokenizersTokenizer):
        raise CheckpointError(
            f"{files.directory} has a tokenizer of class {type(tokenizer).__name__}, which has no form for the tokenizers "
            f"library; convert it and save a tokenizer.json beside it"
        )
    check_steps(backend)
    return Tokenizer(
        backend,
        special_tokens=dict(tokenizer.special_tokens_map),
        chat_templates=files.chat_templates,
        response_template=files.response_template,
    )


def _needs_conversion(directory: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{directory} has the vocabulary of its tokenizer in a .model file only and no {TOKENIZER_FILE}, and it cannot be "
        f"converted here: {reason}; where sentencepiece is installed, convert it once with "
        "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    )
