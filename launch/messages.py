"""Messages from agents to the supervisor, and from ranks and roles to their agent. Any other line is dropped, such as
output of a login shell. A message has the fields of its class here, and may have more."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, TypeAdapter, ValidationError

_Text = str
_Seconds = Annotated[FiniteFloat, Field(ge=0)]
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_Code = Annotated[int, Field(ge=-255, le=255)]
_Reserved = frozenset({"name", "time", "event", "attempt", "host", "self"})


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _State(_Message):
    """A rank's phase, its step, and since when (``age``). ``longest``: seconds that phases took; ``own``: rows of own
    seconds by rank."""

    phase: _Text
    step: _Count
    age: _Seconds
    longest: dict[str, _Seconds] = {}
    own: list[list[FiniteFloat]] = []


class _Beating(_State):
    kind: Literal["state"]
    longest: dict[str, _Seconds]
    own: list[list[FiniteFloat]]


class _Progress(_Message):
    kind: Literal["progress"]
    label: _Text
    done: _Count
    total: _Count
    facts: dict[str, float | str]


class _Note(_Message):
    kind: Literal["note"]
    text: _Text


class _RoleEvent(_Message):
    kind: Literal["event"]
    name: _Text
    text: _Text


class _Error(_Message):
    kind: Literal["error"]
    code: _Code
    text: _Text
    cause: str | None = None
    step: _Count | None = None


class _Beat(_Message):
    kind: Literal["beat"]
    role: _Text
    pid: _Count
    done: _Count
    outstanding: _Count | None


_OfRole = Annotated[_Beating | _Progress | _Note | _RoleEvent | _Error | _Beat, Field(discriminator="kind")]


class _Facts(_Message):
    say: Literal["facts"]
    gpus: _Count
    cores: _Count
    address: str | None
    nodename: _Text


class _Port(_Message):
    say: Literal["port"]
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    error: str | None = None


class _Answer(_Message):
    say: Literal["answer"]
    answer: JsonValue


class _Quiet(_State):
    quiet: _Seconds


class _Alive(_Message):
    say: Literal["alive"]
    ranks: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], _Quiet]
    memory_kills: int
    free: _Count | None


class _Done(_Message):
    say: Literal["begun", "ranks_ended", "drained", "ended"]


class _Refused(_Message):
    say: Literal["refused"]
    text: _Text


class _Asked(_Message):
    say: Literal["asked"]
    signal: Annotated[int, Field(ge=1, le=64)]


class _Relay(_Message):
    say: Literal["relay"]
    rank: Annotated[int, Field(ge=-1)]
    message: _OfRole


class _End(_Message):
    say: Literal["end"]
    rank: _Count
    code: _Code
    by_us: bool


class _Event(_Message):
    say: Literal["event"]
    name: _Text
    facts: dict[str, Any]


_OfAgent = Annotated[
    _Facts | _Port | _Answer | _Alive | _Done | _Refused | _Asked | _Relay | _End | _Event, Field(discriminator="say")
]
_OF_ROLE: TypeAdapter[Any] = TypeAdapter(_OfRole)
_OF_AGENT: TypeAdapter[Any] = TypeAdapter(_OfAgent)


def of_agents(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the valid messages of an agent; others are dropped."""
    return [
        message
        for message in messages
        if _fits(_OF_AGENT, message) and not (message["say"] == "event" and _Reserved & message["facts"].keys())
    ]


def of_roles(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the valid messages of a rank or a role; others are dropped."""
    return [message for message in messages if _fits(_OF_ROLE, message)]


def _fits(adapter: TypeAdapter[Any], message: dict[str, Any]) -> bool:
    try:
        adapter.validate_python(message)
    except ValidationError:
        return False
    return True
