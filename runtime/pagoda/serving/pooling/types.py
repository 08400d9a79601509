"""What the routes of models that pool take and give; requests are checked as OpenAI's are (`serving.openai.types`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from pagoda.request import TokenIds
from pagoda.serving.models import MAX_POOLED_PER_REQUEST
from pagoda.serving.openai.types import Integer, RequestModel
from pagoda.serving.openai.validators import prompts


def _inputs(value: object) -> list[str | list[int] | TokenIds]:
    return prompts(value, "input", MAX_POOLED_PER_REQUEST)


def _texts(value: object) -> list[str]:
    """One text, or several."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(type(text) is str for text in texts):
        raise ValueError("a text or a list of texts is needed, and not an empty one")
    if len(texts) > MAX_POOLED_PER_REQUEST:
        raise ValueError(f"at most {MAX_POOLED_PER_REQUEST} texts are allowed, got {len(texts)}")
    return texts


Input = Annotated[
    list[str | list[int] | TokenIds],
    PlainValidator(_inputs, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Texts = Annotated[list[str], PlainValidator(_texts, json_schema_input_type=str | list[str])]


class PoolingFields(RequestModel):
    """What all of them have in common."""

    truncate_prompt_tokens: Integer | None = Field(
        None, ge=-1, description="Cut longer inputs to so many tokens, -1: to as many as the model takes."
    )
    user: str | None = Field(None, description="Accepted and not used.")
    priority: Integer | None = None
    timeout_seconds: float | None = Field(None, description="Seconds from arrival after which the request is ended.")


class EmbeddingRequest(PoolingFields):
    """Texts, or token ids, to be made into vectors."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"example": {"input": "The cat sat."}})

    input: Input
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: little-endian float32; what OpenAI's Python client asks for."
    )
    dimensions: Integer | None = Field(
        None, description="Keep so many numbers of each vector, scaled to length 1 again."
    )
    normalize: bool | None = Field(None, description="Scale vectors to length 1, or not; as the checkpoint does.")
    add_special_tokens: bool | None = None
    prompt_name: str | None = Field(None, description="Instruction of the checkpoint that is put before each text.")
    input_type: str | None = Field(None, description="query or document: which of the checkpoint's prompts is used.")


class PoolingBody(EmbeddingRequest):
    """The same, for any task that the model does: vLLM's /pooling."""

    task: str | None = None


class ClassifyRequest(PoolingFields):
    """Texts, or token ids, to be classified."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"example": {"input": "I like it."}})

    input: Input
    add_special_tokens: bool | None = None
    use_activation: bool | None = Field(None, description="false: logits instead of probabilities.")


class ScoreRequest(PoolingFields):
    """Pairs of texts: one against one or many, or as many against as many."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        json_schema_extra={"example": {"text_1": "capital of France", "text_2": ["Paris", "Lyon"]}},
    )

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = Field(None, description="The same as text_1.")
    documents: Texts | None = Field(None, description="The same as text_2.")
    instruction: str | None = Field(
        None, description="Of a language model that scores: what is asked of the documents."
    )


class RerankRequest(PoolingFields):
    """Documents to be sorted by how well they belong to a query."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        json_schema_extra={"example": {"query": "capital of France", "documents": ["Paris", "Lyon"], "top_n": 1}},
    )

    query: str
    documents: Annotated[list[str | dict[str, Any]], Field(fail_fast=True)] | None = None
    texts: Texts | None = Field(None, description="Documents as Text Embeddings Inference has them.")
    top_n: Integer | None = Field(None, ge=0, description="Only the best of them; 0 or nothing: all.")
    return_documents: bool | None = None
    return_text: bool | None = None
    raw_scores: bool | None = None
    max_tokens_per_doc: Integer | None = Field(None, ge=1, description="Cut longer pairs to so many tokens.")
    instruction: str | None = Field(
        None, description="Of a language model that scores: what is asked of the documents."
    )


class PoolingUsage(BaseModel):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingObject(BaseModel):
    """One vector: numbers, or base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingResponse(BaseModel):
    """The vectors, in order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[EmbeddingObject]
    usage: PoolingUsage


class PoolingObject(BaseModel):
    """What one input became."""

    object: Literal["pooling"]
    index: int
    data: list[float] | list[list[float]] | str


class PoolingResponse(BaseModel):
    """What the inputs became, in order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PoolingObject]
    usage: PoolingUsage


class ClassifiedObject(BaseModel):
    """The best label of one input, and the probabilities of all."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(BaseModel):
    """The labels, in order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassifiedObject]
    usage: PoolingUsage


class ScoredObject(BaseModel):
    """The score of one pair."""

    object: Literal["score"]
    index: int
    score: float


class ScoreResponse(BaseModel):
    """The scores, in order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoredObject]
    usage: PoolingUsage


class RerankedDocument(BaseModel):
    """Its text."""

    text: str


class RerankedObject(BaseModel):
    """A document by its place in the request."""

    index: int
    relevance_score: float
    document: RerankedDocument | None = None


class RerankResponse(BaseModel):
    """The documents, the best first."""

    id: str
    model: str
    results: list[RerankedObject]
    usage: PoolingUsage
    meta: dict[str, Any] | None = None
