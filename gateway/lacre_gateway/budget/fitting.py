"""How much of a prompt to reserve, if the largest possible prompt in the sealed request does not fit a limit.

A gateway cannot see a prompt. It knows the sealed size, which may be mostly padding: a greeting of two tokens looks like 4,000.
If that many do not fit a limit, the gateway reserves fewer, and the grant says how many.

Rules:
- No I/O and no clock.
- Nothing is under-reserved: the worker refuses a prompt of more tokens than the grant allows, before it computes any.
- If the caller named no ceiling of output, that is lowered first: as far as ordinary text of the request's size needs, and down
  to `LEAST_OUTPUT`.
- If the largest possible prompt fits the limit but not its remainder, the reservation of a padded request is cut too, as long
  as ordinary text of its size fits. Otherwise it waits, like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from lacre_gateway.budget.callers import Caller, ceiling_of
from lacre_gateway.budget.holds import AboveLimit, Met
from lacre_gateway.budget.in_flight import Reservation
from lacre_gateway.budget.plans import LimitKind, Price

# Prompt tokens: a short question in most chat templates. If fewer are left, waiting is better.
LEAST: Final = 64
# Output tokens: a paragraph or two, or a short tool call. If fewer are left, waiting is better than a cut answer.
LEAST_OUTPUT: Final = 256
_MILLION: Final = 10**6


def room(kind: LimitKind, available: int, price: Price | None, completion: int) -> int | None:
    """The prompt tokens that fit into the available rest of a limit, beside the output; below 1: none. None: any number."""
    match kind:
        case LimitKind.TOKENS_PER_MINUTE | LimitKind.TOKENS_PER_DAY:
            return available - completion
        case LimitKind.MONEY_PER_MONTH if price is not None:
            left = available * _MILLION - completion * price.completion
            each = max(price.prompt, price.cached)
            return left // each if each else (None if left >= 0 else -1)
        case _:
            return None


def lowered(asked: Reservation, price: Price | None, available: Iterable[tuple[LimitKind, int]]) -> Reservation:
    """With as much of a default output as fits beside ordinary text, but at least its floor. available: of each limit."""
    if asked.floor == asked.max_tokens:
        return asked
    rooms = [_output(kind, rest, price, asked.ordinary) for kind, rest in available]
    return replace(asked, max_tokens=max(asked.floor, min([asked.max_tokens, *(each for each in rooms if each is not None)])))


def at_ceilings(caller: Caller) -> Iterator[tuple[LimitKind, int]]:
    """What each of the caller's limits has when unused."""
    return ((kind, ceiling) for _, kind, ceiling in _limits(caller))


def most(caller: Caller, price: Price | None, asked: Reservation) -> int:
    """The prompt tokens that may be reserved at all: of those asked for, as many as fit each of the caller's limits when
    unused. Raises AboveLimit.
    """
    found = asked.max_prompt_tokens
    if ceiling_of(price, found, asked.max_tokens).fit(caller.least):  # nearly always, and limits are many
        return found
    if asked.shrinks:
        least_of_all = min(found, 1)
        for _, kind, ceiling in _limits(caller):
            left = room(kind, ceiling, price, asked.max_tokens)
            if left is not None and left < found:
                found = max(least_of_all, left)
    amounts = ceiling_of(price, found, asked.max_tokens)
    for scope, kind, ceiling in _limits(caller):
        if amounts.of(kind) > ceiling:
            met = Met(scope, ceiling, amounts.of(kind), fits=_fits(kind, ceiling, price, asked))
            raise AboveLimit(caller.plan, kind, met)
    return found


def least(asked: Reservation, most_of_it: int) -> int:
    """If fewer prompt tokens than this are left, a request waits for its limits, and is not cut further."""
    return min(most_of_it, LEAST if most_of_it < asked.max_prompt_tokens else asked.ordinary)


def _fits(kind: LimitKind, ceiling: int, price: Price | None, asked: Reservation) -> int | None:
    """The output tokens that would fit beside a short prompt; None if no number would."""
    prompt = min(LEAST, asked.max_prompt_tokens) if asked.shrinks else asked.max_prompt_tokens
    found = _output(kind, ceiling, price, prompt)
    return found if found is not None and found > 0 else None


def _output(kind: LimitKind, available: int, price: Price | None, prompt: int) -> int | None:
    """The output tokens that fit into the available rest of a limit, beside the prompt; below 1: none. None: any number."""
    match kind:
        case LimitKind.TOKENS_PER_MINUTE | LimitKind.TOKENS_PER_DAY:
            return available - prompt
        case LimitKind.MONEY_PER_MONTH if price is not None and price.completion:
            return (available * _MILLION - prompt * max(price.prompt, price.cached)) // price.completion
        case _:
            return None


def _limits(caller: Caller) -> Iterator[tuple[str, LimitKind, int]]:
    for scope in caller.scopes:
        for kind, ceiling in scope.limits:
            yield scope.label, kind, ceiling
