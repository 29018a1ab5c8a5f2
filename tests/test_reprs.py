"""What a `repr` says ends up in logs and reports: no prompt, no answer, no token of access is in one."""

from __future__ import annotations

import dataclasses

import pytest

from lacre.chat import choices, reply, request, stream
from lacre.exchange import request as inner
from lacre.exchange import resume_marks, steps
from lacre.runtime import http1
from lacre.transport import oauth
from lacre.wire import bhttp
from lacre_backend.api.tools import parts
from lacre_backend.engine import protocol
from lacre_backend.upstream import bodies, origin
from lacre_gateway.auth import tokens
from lacre_gateway.http import headers

# What holds a part of a prompt, an answer or a credential, by the members that do.
HOLDERS: dict[type, set[str]] = {
    inner.Plain: {"headers", "content"}, steps.Send: {"body"}, request.ChatRequest: {"content", "options"},
    oauth.ClientCredentials: {"client_secret"}, oauth.Issued: {"token"}, tokens._Shown: {"authorization", "proof"},
    bhttp.Request: {"headers", "content"}, bhttp.ResponseHead: {"headers"}, bhttp.Data: {"content"},
    http1.RequestHead: {"query", "fields"}, http1.Body: {"content"}, headers.Fields: {"values"},
    resume_marks.Mark: {"tokens"}, reply.Reply: {"raw"}, choices.ToolCall: {"name", "arguments"},
    choices.Choice: {"text", "tool_calls", "refusal", "reasoning", "logprobs", "message"},
    choices.TokenLogprob: {"token", "raw", "top"}, choices.TextDelta: {"text", "logprobs"},
    choices.ReasoningDelta: {"text"}, choices.RefusalDelta: {"text"}, choices.ToolCallDelta: {"name", "arguments"},
    protocol.Task: {"prompt", "begun", "stop", "cache_scope"}, protocol.Token: {"id", "text", "raw"},
    protocol.Alternative: {"id", "raw"}, protocol.Finish: {"text"},
    parts.Speech: {"text"}, parts.Thought: {"text"}, parts.Called: {"name"}, parts.Argued: {"text"},
    bodies.UpstreamBody: {"content"}, origin.UpstreamRequest: {"target", "headers", "content"},
}  # fmt: skip


@pytest.mark.parametrize(("holder", "hidden"), HOLDERS.items(), ids=[f"{each.__module__}.{each.__name__}" for each in HOLDERS])
def test_what_is_hidden(holder: type, hidden: set[str]) -> None:
    shown = {field.name for field in dataclasses.fields(holder) if field.repr}
    assert not hidden & shown
    assert hidden <= {field.name for field in dataclasses.fields(holder)}
    assert "__repr__" not in vars(holder) or holder.__dataclass_params__.repr  # type: ignore[attr-defined]


def test_every_event_of_a_stream_is_looked_at() -> None:
    assert set(stream.StreamEvent.__args__) - HOLDERS.keys() == {choices.Finished}


def test_a_request_and_an_answer() -> None:
    plain = inner.Plain("POST", "/v1/chat/completions", [("authorization", "canary")], b"canary")
    shown = [plain, resume_marks.Mark(1, 0, 1, [77123]), bhttp.Data(b"canary"), http1.Body(b"canary")]
    assert "canary" not in repr(shown)
    assert "77123" not in repr(shown)
