"""What OpenAI's routes take and give, with the extra fields that vLLM's clients know.

Requests are checked strictly (a string is no number; 8.0 is an integer) and to the first error: pydantic would make one for
every element of a list and every branch of a union. Unknown fields are kept, logged once and otherwise ignored: new clients
send new fields. Responses are built as plain dictionaries; the response types here document them and check them in tests.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from pagoda.errors import InvalidRequestError, shown
from pagoda.request import TokenIds
from pagoda.serving.openai.validators import first_error, mapping, prompts, strings, token_ids
from pagoda.serving.parameters import whole_number


class RequestPart(BaseModel):
    """Base of the objects in a request."""

    model_config = ConfigDict(strict=True, extra="allow")


class RequestModel(RequestPart):
    """Base of all request types."""

    model: str | None = Field(None, description="The served model; may be left out.")


Integer = Annotated[int, BeforeValidator(whole_number)]
Strings = Annotated[list[str], PlainValidator(strings, json_schema_input_type=list[str])]
Ids = Annotated[list[int] | TokenIds, PlainValidator(token_ids, json_schema_input_type=list[int])]
LogitBias = Annotated[dict[str, float], PlainValidator(mapping, json_schema_input_type=dict[str, float])]
"""Its values are checked where it is read."""


class StreamOptions(RequestPart):
    """What a stream carries beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(RequestModel):
    """What the two generating routes have in common."""

    max_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Integer | None = None
    stop: str | Strings | None = None
    seed: Integer | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted and not used.")

    # Beyond OpenAI, by vLLM's names.
    top_k: Integer | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Integer | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: Strings | None = None
    allowed_token_ids: Ids | None = None
    prompt_logprobs: Integer | None = None
    add_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Tokens in logprobs as `token_id:N`: texts of tokens may be equal, or no text at all."
    )
    return_token_ids: bool | None = Field(
        None,
        description="`token_ids` of the answer beside its text, in each event those that are new, and `prompt_token_ids`.",
    )
    priority: Integer | None = None
    cache_salt: str | None = None
    timeout_seconds: float | None = Field(None, description="Seconds from arrival after which the request is ended.")
    num_speculative_tokens: Integer | None = Field(
        None, description="Most drafts in a step, below the server's own number; 0: no speculative decoding."
    )

    # The form of the answer, by OpenAI's and by vLLM's names.
    response_format: dict[str, Any] | None = Field(
        None, description="Of type text, json_object, json_schema or structural_tag."
    )
    structured_outputs: dict[str, Any] | None = Field(
        None, description="One of json, json_object, regex, choice, grammar, structural_tag."
    )
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = Field(None, description="Accepted and not used.")
    # By SGLang's and llama.cpp's names.
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None


class CompletionRequest(SamplingFields):
    """A prompt, or several: text, or token ids."""

    model_config = ConfigDict(
        strict=True, extra="allow", json_schema_extra={"example": {"prompt": "Once upon a time", "max_tokens": 32}}
    )

    prompt: Annotated[
        list[str | list[int] | TokenIds],
        PlainValidator(prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    logprobs: Integer | None = None
    echo: bool | None = None


MAX_TOOLS = 1024


class CalledFunction(RequestPart):
    """A function's name, and its arguments as JSON text; an object is taken too."""

    name: str
    arguments: str | dict[str, Any] | None = None


class CalledTool(RequestPart):
    """A call in an assistant's message."""

    id: str | None = None
    type: str | None = None
    function: CalledFunction


class FunctionDefinition(RequestPart):
    """A function that may be called; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        None, description="Arguments keep to the schema, where the format of calls has a grammar."
    )


class ToolDefinition(RequestPart):
    """A tool that may be called: a function."""

    type: str
    function: FunctionDefinition | None = None


Tools = Annotated[list[ToolDefinition], Field(fail_fast=True, max_length=MAX_TOOLS)]


class Message(RequestPart):
    """One message of a conversation; text may come in parts."""

    role: str
    content: str | Annotated[list[dict[str, Any] | str], Field(fail_fast=True)] | None = None
    name: str | None = None
    reasoning: str | None = Field(None, description="What an assistant's message had; reasoning_content is the same.")
    reasoning_content: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None


def messages_of(kind: type[RequestPart]) -> PlainValidator:
    """A field of messages as the client wrote them, each checked as a `kind`, which held would take ten times its memory."""

    def check(value: object) -> list[dict[str, Any]]:
        if not isinstance(value, list):
            raise ValueError(f"a list of messages is needed, got {shown(value)}")
        for index, message in enumerate(value):
            try:
                kind.model_validate(message)
            except ValidationError as error:
                where, what = first_error(error)
                where = ".".join(("messages", str(index), where)) if where else f"messages.{index}"
                raise InvalidRequestError(f"{where}: {what}", "messages") from None
        return value

    return PlainValidator(check, json_schema_input_type=list[kind])  # type: ignore[valid-type]


Messages = Annotated[list[dict[str, Any]], messages_of(Message)]


class TextPart(RequestPart):
    """A part of a text."""

    type: Literal["text"]
    text: str


class Prediction(RequestPart):
    """What the answer will mostly be, such as a file that is edited; with speculative decoding it then comes faster."""

    type: Literal["content"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    @property
    def text(self) -> str:
        """The parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatCompletionRequest(SamplingFields):
    """A conversation to be continued by the assistant."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        json_schema_extra={"example": {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 32}},
    )

    messages: Messages
    max_completion_tokens: Integer | None = Field(None, description="Wins over max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    prediction: Prediction | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = Field(None, description="The same as in chat_template_kwargs.")
    thinking_token_budget: Integer | None = Field(
        None, description="Tokens of reasoning; then its end is forced. -1: no bound."
    )
    include_reasoning: bool | None = Field(None, description="false: reasoning is left out of the answer.")


class TokenizeRequest(RequestModel):
    """A text, or a conversation through the chat template."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"example": {"prompt": "Once upon a time"}})

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestModel):
    """Token ids."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"example": {"tokens": [10, 11]}})

    tokens: Ids


class OpenAIError(BaseModel):
    """What is wrong; `code` is the kind of error, `param` the field where there is one."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorResponse(BaseModel):
    """An error of OpenAI's routes."""

    error: OpenAIError


class PromptTokensDetails(BaseModel):
    """Prompt tokens found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Reasoning among the generated tokens, and drafts of speculative decoding: accepted ones are part of the completion."""

    reasoning_tokens: int | None = None
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class Usage(BaseModel):
    """Tokens of all choices together; a prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class CompletionLogprobs(BaseModel):
    """One entry a token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(BaseModel):
    """The response of /v1/completions; in a stream each event is one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A candidate at one position; `bytes` joins with its neighbours' to whole characters."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token at one position, with the most probable ones there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry a token."""

    content: list[TokenLogprob] | None


class MessageFunction(BaseModel):
    """The function that is called; `arguments` is the JSON text that the model wrote."""

    name: str
    arguments: str


class MessageToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: MessageFunction


class AssistantMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None


class ChatChoice(BaseModel):
    """One message of the assistant."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionResponse(BaseModel):
    """The response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None


class ModelCard(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None = None
    max_model_len: int | None


class ModelList(BaseModel):
    """All served models: one."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    """Token ids, and their texts if they were asked for."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    """The text of the ids."""

    prompt: str
