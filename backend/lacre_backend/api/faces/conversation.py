"""What the faces of a conversation share: the prompt of messages, and the parser of what the model writes."""

from __future__ import annotations

from typing import Generic, TypeVar

from lacre_backend.api.faces.face import Face
from lacre_backend.api.prompts import Prompt, chat_start
from lacre_backend.api.registry import ServedModel
from lacre_backend.api.requests import ChatCompletionRequest
from lacre_backend.api.tools.thoughts import AnswerForm, Reader

AskedOfChat = TypeVar("AskedOfChat", bound=ChatCompletionRequest)


class ConversationFace(Face[AskedOfChat], Generic[AskedOfChat]):
    """A face whose prompt is messages."""

    action = "chat"

    async def prompt(self, served: ServedModel, request: AskedOfChat) -> Prompt:
        calling = request.calling()
        tools = () if calling is None else calling.tools
        goes_on = request.continue_final_message
        return await chat_start(served, request.messages, tools, goes_on=goes_on, wishes=request.wishes)

    def reader(self, request: AskedOfChat, form: AnswerForm, seed: str) -> Reader | None:
        return form.reader(request.calling(), seed)
