"""What is put before a text, and around a pair of them, as the checkpoint asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pagoda.errors import ConfigError, InvalidRequestError, shown
from pagoda.models.checkpoint_files import has_file, read_json_object
from pagoda.models.config_reader import ConfigReader

SENTENCE_TRANSFORMERS_FILE = "config_sentence_transformers.json"
_MAX_PROMPT_CHARACTERS = 8192

# How Qwen3-Reranker was trained to be asked, by its model card.
RERANK_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n'
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
RERANK_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True, slots=True)
class PoolingPrompts:
    """`named`: texts to be put before another, by name (`query`, `document`); `default`: the one without a name.

    `rerank_template`: see the setting.
    """

    named: dict[str, str] = field(default_factory=dict)
    default: str = ""
    rerank_template: str = RERANK_TEMPLATE

    @classmethod
    def of(cls, directory: str | Path, rerank_template: str | None = None) -> PoolingPrompts:
        """Of the checkpoint in `directory`. Raises `CheckpointError`, or `ConfigError` for a template without its parts."""
        template = RERANK_TEMPLATE if rerank_template is None else rerank_template
        for part in ("{query}", "{document}"):
            if part not in template:
                raise ConfigError(f"rerank_template must have {part} in it")
        path = Path(directory)
        if not (path.is_dir() and has_file(path, SENTENCE_TRANSFORMERS_FILE)):
            return cls(rerank_template=template)
        where = str(path / SENTENCE_TRANSFORMERS_FILE)
        reader = ConfigReader(read_json_object(path, SENTENCE_TRANSFORMERS_FILE), where)
        prompts = reader.mapping("prompts")
        texts_only = all(isinstance(text, str) and len(text) <= _MAX_PROMPT_CHARACTERS for text in prompts.values())
        if not texts_only:
            raise reader.error("prompts", f"an object of texts of at most {_MAX_PROMPT_CHARACTERS} characters")
        name = reader.values.get("default_prompt_name")
        if name is not None and name not in prompts:
            raise reader.error("default_prompt_name", f"one of {', '.join(prompts)}")
        return cls(dict(prompts), "" if name is None else prompts[name], template)

    def before(self, name: str | None, text: str | None = None) -> str:
        """What is put before a text: `text` itself, the prompt of that name, or the default one.

        Raises `InvalidRequestError` for a name that the checkpoint does not have.
        """
        if text is not None:
            return text
        if name is None:
            return self.default
        if name not in self.named:
            known = ", ".join(self.named) or "none"
            raise InvalidRequestError(
                f"prompt_name {shown(name)} is no prompt of this model; it has {known}", "prompt_name"
            )
        return self.named[name]

    def of_kind(self, name: str) -> str:
        """What is put before a text of this kind, where the checkpoint has something for it, else the default."""
        return self.named.get(name, self.default)

    def rerank(self, query: str, document: str, instruction: str | None = None) -> str:
        """The prompt by which a language model scores a document."""
        # Not `format`: texts may have braces.
        text = self.rerank_template.replace("{instruction}", instruction or RERANK_INSTRUCTION)
        before, _, after = text.partition("{query}")
        return before.replace("{document}", document) + query + after.replace("{document}", document)
