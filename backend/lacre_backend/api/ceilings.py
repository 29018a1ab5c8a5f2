"""Limits of a call: what the request asks for, what the grant allows, and what the model holds.

Rules:
- The gateway authorized the values outside of the seal. A sealed request that asks for more, or for another model or action, is
  refused whole (`grant_mismatch`). It is never served in part.
- Without a grant (in a test, or behind another server) only the model's limits apply.
"""

from __future__ import annotations

from collections.abc import Sequence

from lacre.asgi import Call
from lacre.wire.outer import MAX_LENS_LAYERS, MAX_LENS_TOKENS
from lacre_backend.api.errors import RequestRefused, context_length_exceeded, grant_mismatch
from lacre_backend.api.requests import Generate, Named
from lacre_backend.engine.protocol import ModelInfo


def check_action(call: Call | None, request: Named, action: str) -> None:
    if call is None:
        return
    if call.action is not None and call.action != action:
        raise grant_mismatch(f"The request is a `{action}`, but was granted as `{call.action}`.", "action")
    if call.model is not None and call.model != request.model:
        raise grant_mismatch(f"The request names the model `{request.model}`, but was granted `{call.model}`.", "model")


def max_tokens(call: Call | None, request: Generate, model: ModelInfo, n_prompt: int) -> int:
    """Output tokens for each choice. n_prompt: of the longest prompt; includes the begun answer.

    For a resumed answer these are the remaining ones: the request's limit covers the whole answer, the grant only this request.
    """
    field, asked = request.output_limit()
    asked = None if asked is None else max(asked - len(request.begun), 0)
    room = model.n_ctx - n_prompt
    if call is None or call.max_tokens is None:
        return room if asked is None else asked
    allowed = call.max_tokens // request.choices
    each = allowed if asked is None else asked
    if each * request.choices > call.max_tokens or allowed < 1:
        raise grant_mismatch(
            f"The request asks for {request.choices} x {max(each, 1)} output tokens, but was granted {call.max_tokens}.", field
        )
    return each


def check_length(model: ModelInfo, text_bytes: int, param: str) -> None:
    """Refuses a text that cannot fit before it is tokenized, which takes time: no token is longer than `longest_piece`."""
    if text_bytes > model.n_ctx * model.longest_piece:
        raise context_length_exceeded(model.n_ctx, None, param)


def check_prompt(call: Call | None, model: ModelInfo, counts: Sequence[int], param: str, *, begun: int = 0) -> None:
    """counts: the tokens of each prompt, with the begun answer. It may fill the context: then the answer lacks only its end.

    The context limits each prompt, the grant limits their sum.
    """
    longest, total = max(counts), sum(counts)
    if longest - begun >= model.n_ctx or longest > model.n_ctx:
        raise context_length_exceeded(model.n_ctx, longest, param)
    if call is not None and call.max_prompt_tokens is not None and total > call.max_prompt_tokens:
        raise _too_much("prompt", total, call.max_prompt_tokens, param)


def check_inputs(call: Call | None, model: ModelInfo, counts: Sequence[int], param: str) -> None:
    """Checks texts to embed or rank. counts: each text's tokens. The context limits each text, the grant limits their sum."""
    longest, total = max(counts), sum(counts)
    if longest > model.n_ctx:
        raise context_length_exceeded(model.n_ctx, longest, param)
    if call is not None and call.max_prompt_tokens is not None and total > call.max_prompt_tokens:
        raise _too_much("input", total, call.max_prompt_tokens, param)


def explained_tokens(call: Call | None, model: ModelInfo, asked: int | None, n_prompt: int) -> int:
    """How many tokens an answer to be explained may have. asked: by the request. n_prompt: tokens of the longest prompt."""
    room = model.n_ctx - n_prompt
    if room < 1:
        raise context_length_exceeded(model.n_ctx, n_prompt, "messages")
    granted = None if call is None else call.max_tokens
    if asked is not None and granted is not None and asked > granted:
        raise grant_mismatch(f"The request asks for {asked} output tokens, but was granted {granted}.", "max_tokens")
    return min(asked or granted or room, room)


def check_explained(
    call: Call | None, model: ModelInfo, prompts: Sequence[int], n_answer: int, scores: int, *, lens: bool
) -> None:
    """Checks all prompts of an explanation. prompts: the tokens of each. n_answer: at most. scores: prompts that score it.
    lens: whether the whole prompt, the first one, is read once more, and each layer of the answer's first tokens.

    The context limits each prompt with its answer. The grant limits their sum: all of it is computed.
    """
    if max(prompts) + n_answer > model.n_ctx:
        raise context_length_exceeded(model.n_ctx, max(prompts) + n_answer, "messages")
    seen = min(n_answer, MAX_LENS_TOKENS)
    total = sum(prompts) + scores * n_answer + (prompts[0] + seen * (1 + MAX_LENS_LAYERS) if lens else 0)
    if call is not None and call.max_prompt_tokens is not None and total > call.max_prompt_tokens:
        raise _too_much("prompt, computed once whole and once without each part,", total, call.max_prompt_tokens, "messages")


def _too_much(what: str, tokens: int, granted: int, param: str) -> RequestRefused:
    return grant_mismatch(
        f"The {what} has {tokens} tokens, but was granted {granted}. This caller's limits, or the size of the sealed request, "
        "do not allow it. Shorten it, ask for fewer output tokens, or try again when the limit's window has ended.",
        param,
    )
