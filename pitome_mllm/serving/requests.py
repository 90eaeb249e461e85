"""What a request for a chat completion may hold, in OpenAI's words. Anything else is an error that names its field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..errors import UserError

COOLEST = 0.01  # lower temperatures are greedy: their logits would leave the range of float32


class Refused(UserError):
    """A request that gets an error of OpenAI's shape."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Text(_Strict):
    type: Literal["text"]
    text: str


class Address(_Strict):
    url: str
    detail: str | None = None


class Picture(_Strict):
    type: Literal["image_url"]
    image_url: Address


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Annotated[Text | Picture, Field(discriminator="type")]], BeforeValidator(_as_parts)]
    name: str | None = None
    refusal: None = None


class StreamOptions(_Strict):
    include_usage: bool = False


class Plain(_Strict):
    type: Literal["text"]


NewTokens = Annotated[int, Field(ge=1)]
Word = Annotated[str, Field(min_length=1)]
Nothing = Annotated[float, Field(ge=0, le=0)]


class ChatRequest(_Strict):
    """The body of a request; ``keep`` is no field of OpenAI's: visual tokens per image, as for `attach`."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    keep: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0)] | None = None
    max_completion_tokens: NewTokens | None = None
    max_tokens: NewTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Annotated[list[Word], Field(max_length=4)] | None, BeforeValidator(_as_list)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # What is here once: other values are refused.
    n: Literal[1] | None = None
    frequency_penalty: Nothing | None = None
    presence_penalty: Nothing | None = None
    logprobs: Literal[False] | None = None
    response_format: Plain | None = None
    # What changes no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def sampling(self) -> dict[str, Any]:
        """Keywords of ``generate``; none where the request leaves it to the model."""
        if self.temperature is None:
            return {}
        if self.temperature < COOLEST:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p or 1.0, "top_k": 0}


def parse(body: bytes) -> ChatRequest:
    """The request in a body; `Refused` with the first field that is wrong."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"] if part not in ("text", "image_url", "int")) or None
        reason = "is not possible here" if first["type"] == "extra_forbidden" else first["msg"]
        raise Refused(f"{param}: {reason}" if param else reason, param) from error
