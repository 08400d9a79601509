"""What /v1/decisions takes and gives, in OpenAI's shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from pagoda.errors import shown
from pagoda.serving.openai.types import Integer, RequestModel

MAX_QUESTIONS = 400
MAX_OPTIONS = 255
TYPES = ("predicate", "choice", "score")


def _input(value: object) -> str | list[dict[str, Any]]:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError("a text or a list of items is needed, and not an empty one")
    return value


def _questions(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError("a list of questions is needed, and not an empty one")
    if len(value) > MAX_QUESTIONS:
        raise ValueError(f"at most {MAX_QUESTIONS} questions are allowed, got {len(value)}")
    for index, question in enumerate(value):
        if question.get("type") not in TYPES:
            raise ValueError(
                f"the type of question {index} must be one of {', '.join(TYPES)}, got {shown(question.get('type'))}"
            )
    return value


class DecisionRequest(RequestModel):
    """Questions about one input."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        json_schema_extra={
            "example": {
                "input": "I was charged twice for the same order.",
                "questions": [
                    {"type": "predicate", "name": "urgent", "instructions": "The customer wants an answer today."},
                    {
                        "type": "choice",
                        "name": "team",
                        "instructions": "Which team should answer?",
                        "choices": [{"value": "billing"}, {"value": "technical", "description": "errors, outages"}],
                    },
                    {
                        "type": "score",
                        "name": "mood",
                        "instructions": "How does the customer feel?",
                        "levels": [{"label": "calm"}, {"label": "annoyed"}, {"label": "furious"}],
                    },
                ],
            }
        },
    )

    input: Annotated[
        str | list[dict[str, Any]],
        PlainValidator(_input, json_schema_input_type=str | list[dict[str, Any]]),
        Field(description="A text, or messages and calls as /v1/responses takes them; parts may be input_json, too."),
    ]
    questions: Annotated[list[dict[str, Any]], PlainValidator(_questions, json_schema_input_type=list[dict[str, Any]])]
    return_prompt_token_ids: bool | None = Field(
        None, description="Each answer says by `prompt_token_ids` what the model was asked."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")
    priority: Integer | None = None
    cache_salt: str | None = None
    timeout_seconds: float | None = Field(None, description="Seconds from arrival after which the request is ended.")


class PredicateAnswer(BaseModel):
    """How likely the statement is true."""

    type: Literal["predicate"]
    name: str | None
    probability: float


class ChoiceProbability(BaseModel):
    """One of the options."""

    value: str | bool
    probability: float


class ChoiceAnswer(BaseModel):
    """The most likely option. `confidence`: 0 where all are equally likely, 1 where no other is possible."""

    type: Literal["choice"]
    name: str | None
    choice: str | bool
    probabilities: list[ChoiceProbability]
    confidence: float


class ScoreProbability(BaseModel):
    """One of the levels; `value` is its place, from 0."""

    value: int
    label: str
    probability: float


class ScoreAnswer(BaseModel):
    """The expected level."""

    type: Literal["score"]
    name: str | None
    score: float
    probabilities: list[ScoreProbability]
    confidence: float


class DecisionUsage(BaseModel):
    """Tokens of all questions' prompts, which share the input."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class DecisionResponse(BaseModel):
    """The answers, in the order of the questions."""

    model: str
    answers: list[PredicateAnswer | ChoiceAnswer | ScoreAnswer]
    usage: DecisionUsage
