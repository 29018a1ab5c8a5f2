"""The entries of the audit log.

Rules:
- An entry holds the fields of its dataclass and no other. There is no field for content, a token or an exception's text.
- A request has an *intent* before it is served, and exactly one *outcome*, however it ends. Request ids are random.
- An intent travels to the client in a header, so it is bounded. If groups, scopes and policies make it too long, they go into
  an *annex* right before it. The intent names the annex by digest.
- Text is UTF-8 JSON; `auth` accepts only printable names. Lone surrogates would be bytes that no reader accepts: refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import MISSING, dataclass, fields
from operator import attrgetter
from typing import Any, ClassVar, Final, Literal

from lacre.errors import InvalidMessage, LacreError, NewerFormat
from lacre.evidence.audit_proof import MAX_INTENT
from lacre.jose.formats import Format
from lacre.runtime.records import record
from lacre_fabric.native.json_bytes import read_object, write, write_object

_MAX_LISTS: Final = 1024  # bytes of groups, scopes and policies in the intent itself
MAX_ENTRY: Final = 0xFFFF  # C2SP tlog-tiles: an entry's length is two bytes in its bundle


class EntryTooLarge(LacreError):
    """No header could carry the intent: names in the settings or the token are absurdly long. Nothing was recorded."""


@record(frozen=True, slots=True, kw_only=True)
class Intent:
    """A request that is about to be served, and for whom.

    time: seconds since the epoch. jti: hex SHA-256 of the token's id. enc: base64url SHA-256 of `hdr ‖ enc`. policies: the ids
    of the deciding ones. policy_set, entities: hex SHA-256 of the rules and entities of the decision. reserved_*: amounts
    charged to the caller's limits at admission, in tokens and micro-units; none if policy or a budget refused. max_tokens: as
    the client sent it; allowed_tokens: what policy decided on, if that was a default above what it allows. affinity: whether
    there was one; missing if no rule reads that, because older verifiers do not know it. limits: which limits
    were charged, in the form of `Hold.limits`. lease: the holder whose leases were charged. annex: hex SHA-256 of the annex
    entry, if there is one.
    """

    kind: ClassVar[str] = "intent"

    request_id: str
    time: float
    subject: str
    tenant: str
    issuer: str
    jti: str | None
    address: str
    pool: str
    model: str
    action: str
    shape: str
    kem: str
    max_tokens: int
    sealed_bytes: int
    enc: str
    groups: tuple[str, ...]
    scopes: tuple[str, ...]
    plan: str | None
    decision: Literal["allow", "deny"]
    policies: tuple[str, ...]
    policy_set: str
    entities: str
    reserved_prompt_tokens: int | None
    reserved_tokens: int | None
    reserved_money: int | None = None
    lease: str | None = None
    limits: tuple[str, ...] = ()
    annex: str | None = None
    allowed_tokens: int | None = None
    affinity: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Annex:
    """The lists of an intent that are too long for a header."""

    kind: ClassVar[str] = "annex"

    request_id: str
    groups: tuple[str, ...]
    scopes: tuple[str, ...]
    policies: tuple[str, ...]


@record(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended. duration: seconds. Tokens are those of the receipt that settled it, `receipt` its hex SHA-256; None
    without a receipt. refused_receipt: why the newest receipt was refused. money: the charge, in micro-units. problem: the
    problem that the client got instead of an answer, by its slug. exceeded: the limit for which a budget refused the request,
    in the form of `Hold.limits`. The client gets the intent but not the outcome, and only the operator may know that a whole
    plan is used up.
    """

    kind: ClassVar[str] = "outcome"

    request_id: str
    time: float
    outcome: str
    status: int | None
    unreceipted: bool
    receipt: str | None
    refused_receipt: str | None
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    duration: float | None
    money: int | None = None
    problem: str | None = None
    exceeded: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminIntent:
    """A requested action on the gateway itself, and whether the caller may do it. Its result is an event of the same `actor`.

    target: of the action, such as a subject. actor, in events: `<tenant>/<subject>`.
    """

    kind: ClassVar[str] = "admin"

    request_id: str
    time: float
    subject: str
    tenant: str
    issuer: str
    jti: str | None
    address: str
    gateway: str
    action: str
    target: str | None
    groups: tuple[str, ...]
    scopes: tuple[str, ...]
    plan: str | None
    decision: Literal["allow", "deny"]
    policies: tuple[str, ...]
    policy_set: str
    entities: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An entry that is not about a request: a start, a stop, a recovery, the result of an admin's action, a reload.

    actor: who did it; None: the process itself. target: of the action. count: how many of the things that the event names.
    policy_set, rules: hex SHA-256 of the new policies, and of all files of that set. reason: of a failure, in a word.
    """

    kind: ClassVar[str] = "event"

    time: float
    event: str
    actor: str | None = None
    target: str | None = None
    policy_set: str | None = None
    count: int | None = None
    rules: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLink:
    """The first entry of a log that continues another one.

    checkpoint: the last signed checkpoint of the log before, whole. open: how many requests of that log had no outcome yet;
    their outcomes are in this log, or in a later one.
    """

    kind: ClassVar[str] = "link"

    time: float
    checkpoint: str
    open: int


Entry = Intent | Annex | Outcome | AdminIntent | Event | LogLink
STARTED: Final = "started"  # count: the intents that got the outcome `interrupted`
RECOVERED: Final = "recovered"  # count: the bytes of an unfinished commit that were cut off
RESUMED: Final = "resumed"  # count: the requests refused while the log could not be written
STOPPED: Final = "stopped"
# target: the digest of the token or subject, as revocations name it; count: how many at once, if there are many.
# Without an actor, another gateway or `lacre revoke` made it.
REVOKED: Final = "revoked"
RELOADED: Final = "reloaded"
# target: the budget's name, the limit and the window, as `alice of acme on free/tokens_per_day@20782`; count: by how much the
# ceiling was raised, money in micro-units.
TOPPED_UP: Final = "budget-topped-up"
RESET: Final = "budget-reset"
RELOAD_REFUSED: Final = "reload-refused"  # reason: the fault; target: the file; the named set is the one that stays
SETTINGS_RELOADED: Final = "settings-reloaded"  # target: the tables that changed
SETTINGS_REFUSED: Final = "settings-refused"  # reason: the key, and what is wrong with it, without its value
# count: requests of one minute that were refused after their callers had used up their limits of refusals
UNRECORDED: Final = "unrecorded"
# target: whose public keys a newer manifest changed, as `pool/<name>`, `receipts/<name>` or `gateway`; count: its version
KEYS_ROTATED: Final = "keys-rotated"
MANIFEST: Final = "manifest"  # a newer manifest is in force; target: its document's digest, hex SHA-256; count: its version
# The last entry of a log that another one continues; target: the other one's origin; reason: its key, if that is a new one
ROTATED: Final = "rotated"
ERASED: Final = "erased"  # retention erased an old log; target: its origin; count: its entries
INTERRUPTED: Final = "interrupted"


def _form(kind: type[Entry]) -> tuple[frozenset[str], frozenset[str]]:
    """The members that an entry must have, and those that it may have."""
    required = {"kind", *(field.name for field in fields(kind) if field.default is MISSING)}
    return frozenset(required), frozenset({"kind", *(field.name for field in fields(kind))})


ENTRY: Final = Format("audit entry", "gateway or command")
_VERIFY_NEWER: Final = "if a newer version of Lacre wrote it, upgrade the program that verifies the log"
_KINDS: Final = (Intent, Annex, Outcome, AdminIntent, Event, LogLink)
_FORMS: Final = {kind.kind: _form(kind) for kind in _KINDS}
_NAMES: Final = {kind: tuple(field.name for field in fields(kind)) for kind in _KINDS}
_VALUES: Final = {kind: attrgetter(*names) for kind, names in _NAMES.items()}


def encode(entry: Entry) -> tuple[bytes, ...]:
    """The bytes of the entry; for an intent with an annex, the annex first. Raises EntryTooLarge."""
    members = _members(entry)
    if not isinstance(entry, Intent):
        return (_bounded(write_object(members), MAX_ENTRY),)
    data = write_object(members)
    if len(data) <= _MAX_LISTS:  # so are the lists in it
        return (data,)
    lists = {name: members[name] for name in ("groups", "scopes", "policies")}
    if sum(map(len, map(write, lists.values()))) <= _MAX_LISTS:
        return (_bounded(data, MAX_INTENT),)
    annex = _bounded(write_object({"kind": Annex.kind, "request_id": entry.request_id, **lists}), MAX_ENTRY)
    digest = hashlib.sha256(annex).hexdigest()
    return annex, _bounded(write_object({**members, **dict.fromkeys(lists, ()), "annex": digest}), MAX_INTENT)


def parse(data: bytes) -> dict[str, Any]:
    """The members of an entry. Raises InvalidMessage if some of its kind are missing, and NewerFormat.

    A newer version may have added members and kinds: a gateway continues a log to which a newer one wrote.
    """
    members = read_object(data, "it")
    ENTRY.check(members)
    if not isinstance(members.get("kind"), str):
        raise InvalidMessage("it is of no known kind")
    if members["kind"] in _FORMS and not _FORMS[members["kind"]][0] <= members.keys():
        raise InvalidMessage(f"its fields are not those of an {members['kind']}")
    return members


def parse_known(data: bytes) -> dict[str, Any]:
    """The same, for who checks a log: exactly the members of a known kind, or a gateway could hide anything in others.

    Raises NewerFormat for others.
    """
    members = parse(data)
    if members["kind"] not in _FORMS:
        raise NewerFormat(f"it is of no known kind: {_VERIFY_NEWER}")
    if not members.keys() <= _FORMS[members["kind"]][1]:
        raise NewerFormat(f"its fields are not those of an {members['kind']}: {_VERIFY_NEWER}")
    return members


def _members(entry: Entry) -> dict[str, Any]:
    kind = type(entry)
    members = {"kind": entry.kind, **dict(zip(_NAMES[kind], _VALUES[kind](entry), strict=True))}
    if kind is Intent and members["affinity"] is None:
        del members["affinity"]
    return members


def _bounded(data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise EntryTooLarge(f"the audit entry has {len(data)} bytes; at most {limit} can be recorded")
    return data
