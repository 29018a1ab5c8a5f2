"""What must hold when all is over. Each check takes what was found, and returns in words what is wrong with it.

No I/O: `findings` reads what these judge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from chaos.load import DEADLINE, Ended
from chaos.vitals import Life
from lacre_gateway.budget.plans import Price

Entries = Mapping[str, Sequence[Mapping[str, Any]]]  # of the audit logs, by gateway

# A survivor may hold half as much again as when it had settled, and this much more: queues, caches, an allocator's ways.
MORE_BYTES: Final = 48 * 2**20
MORE_DESCRIPTORS: Final = 24
WATCHED: Final = 10.0  # seconds after it had settled, for which a process must have been seen to be judged


def ends(found: Sequence[Ended], asked: int) -> Iterator[str]:
    """Every request ended whole or in a typed error, within its deadline, and no answer is another one."""
    if len({end.number for end in found}) != asked:
        yield f"{asked} requests were made, and {len({end.number for end in found})} ended"
    for end in found:
        what = f"request {end.number} ({end.kind}, {end.model})"
        if end.how == "hung":
            yield f"{what} did not end"
        elif end.took > DEADLINE:
            yield f"{what} took {end.took:.1f} s, more than {DEADLINE:.0f} s"
        if not end.typed:
            yield f"{what} ended in {end.error}, which is no error of Lacre's"
        if not end.right:
            yield f"{what} got another answer than it asked for"
        if end.how == "whole" and not end.receipts:
            yield f"{what} is whole without a receipt"


def receipts(entries: Entries, found: Sequence[Ended]) -> Iterator[str]:
    """No digest has two receipts, and what a client holds is what its gateway settled, unless that one died first."""
    settled: dict[str, list[Mapping[str, Any]]] = {}
    unknown = set()
    for enc, outcome in _outcomes(entries):
        if outcome is None or outcome["duration"] is None:
            unknown.add(enc)
        elif outcome["receipt"]:
            settled.setdefault(enc, []).append(outcome)
    for enc, outcomes in settled.items():
        if len(outcomes) > 1:
            yield f"digest {enc} has {len(outcomes)} receipts"
    held = Counter(receipt[0] for end in found for receipt in end.receipts)
    for enc, times in held.items():
        if times > 1:
            yield f"digest {enc} answered {times} requests"
    for end in found:
        for enc, prompt, cached, completion in end.receipts:
            said = [(one["prompt_tokens"], one["cached_tokens"], one["completion_tokens"]) for one in settled.get(enc, ())]
            if (prompt, cached, completion) not in said and enc not in unknown:
                yield f"digest {enc}: the client's receipt says {prompt, cached, completion}, the audit logs {said}"


def books(entries: Entries, price: Price, lines: Sequence[Mapping[str, Any]], killed: frozenset[str]) -> Iterator[str]:
    """Budgets are exact: what was drawn is what receipts cost, to the micro-unit, and what the killed forfeited.

    lines: of `lacre budget show --json`, once every gateway was stopped in order: what is unused on a lease is a dead one's.
    One that is open and used up is none: whoever gave all back while idle has forgotten it. A record has the last two windows
    of each limit: of a minute's, the earlier ones can be held against nothing.
    """
    spent: Counter[tuple[str, int]] = Counter()
    for intent, outcome in _pairs(entries):
        if outcome is None or outcome["duration"] is None or outcome["outcome"] == "refused":
            continue
        tokens = [outcome[name] or 0 for name in ("prompt_tokens", "cached_tokens", "completion_tokens")]
        if outcome["money"] != price.of(*tokens):
            yield f"request {intent['request_id']} was charged {outcome['money']}, and costs {price.of(*tokens)}"
        for limit in intent["limits"]:
            name, _, window = limit.rpartition("/")[2].partition("@")
            amounts = {"money_per_month": outcome["money"], "requests_per_minute": 1, "tokens_per_day": tokens[0] + tokens[2]}
            spent[name, int(window)] += amounts.get(name, 0)
    drawn: Counter[tuple[str, int]] = Counter()
    for line in (line for line in lines if line["limit"] != "concurrent_streams"):
        if line["wrong"]:
            yield f"{line['name']}, {line['limit']}: {line['wrong']}"
        for lease in line["leases"]:
            if lease["drawn"] != lease["used"] and lease["holder"].partition(".")[0] not in killed:
                yield f"{line['name']}, {line['limit']}: {lease['holder']} left in order and did not give back its lease"
        drawn[line["limit"], line["window"]] += line["drawn"] - sum(each["drawn"] - each["used"] for each in line["leases"])
    if not drawn:
        yield "nothing was drawn from any budget"
    latest = {limit: max(window for name, window in spent if name == limit) for limit, _ in spent}
    for place in drawn | spent:
        if place[1] >= latest.get(place[0], 0) - 1 and drawn[place] != spent[place]:
            yield f"{place[0]} of window {place[1]}: {drawn[place]} is gone from the budgets, and receipts say {spent[place]}"


def logs(verdicts: Mapping[str, str | None], proofs: int, broken: Mapping[str, str]) -> Iterator[str]:
    """Every log verifies, and has every entry whose proof a client received.

    verdicts: by gateway, what is wrong with its log. broken: by proof, what is wrong with it.
    """
    for name, wrong in verdicts.items():
        if wrong is not None:
            yield f"the audit log of {name} does not hold: {wrong}"
    for proof, wrong in broken.items():
        yield f"a client's proof ({proof[:40]}...) is not covered: {wrong}"
    if not proofs:
        yield "no client received a proof"


def lives(survivors: Sequence[Life]) -> Iterator[str]:
    """No process that lived on holds much more than when it had settled."""
    judged = [life for life in survivors if life.settled is not None and life.watched >= WATCHED]
    for life in judged:
        assert life.settled is not None
        (memory, descriptors), (memory_now, descriptors_now) = life.settled, life.now
        if memory_now > memory * 1.5 + MORE_BYTES:
            yield f"{life.name} held {memory >> 20} MiB once it had settled, and {memory_now >> 20} MiB at the end"
        if descriptors_now > descriptors + MORE_DESCRIPTORS:
            yield f"{life.name} held {descriptors} descriptors once it had settled, and {descriptors_now} at the end"
    if not judged:
        yield "no process lived long enough to be judged"


def _pairs(entries: Entries) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any] | None]]:
    """Each intent that was allowed, with its outcome."""
    for log in entries.values():
        outcomes = {entry["request_id"]: entry for entry in log if entry["kind"] == "outcome"}
        for intent in log:
            if intent["kind"] == "intent" and intent["decision"] == "allow":
                yield intent, outcomes.get(intent["request_id"])


def _outcomes(entries: Entries) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    for intent, outcome in _pairs(entries):
        yield intent["enc"], outcome
