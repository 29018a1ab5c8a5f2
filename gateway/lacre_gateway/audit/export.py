"""The log for other systems: JSON lines, ArcSight's CEF, or OCSF, each with one entry a line.

Rules:
- Entries come in the order of the logs, and each has its log's origin and its index. So a reader can ask for its proof.
- In CEF and OCSF each line stands alone: an outcome names the caller of its intent, and an annex is a part of its intent.
- Every value of an entry may be hostile text; each format's escapes keep it in its field and on its line.

CEF: "Implementing ArcSight Common Event Format", version 0 of the format. OCSF: schema 1.8.0, classes API Activity (6003) and
Application Lifecycle (6002).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Literal

from lacre._version import __version__
from lacre.runtime.json_text import UNSHOWN, shown
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit.entries import Annex, Event, Intent, LogLink, Outcome, parse
from lacre_gateway.audit.feed import Cursor, PlacedEntry, place_of
from lacre_gateway.audit.reader import LogReader

Format = Literal["jsonl", "cef", "ocsf"]

OCSF_VERSION: Final = "1.8.0"
_LOOK_BACK: Final = 65536  # entries before a cursor in which the intents of later outcomes are looked for
_CALLER: Final = ("subject", "tenant", "issuer", "groups", "address", "action", "pool", "model")
_OTHER: Final = 99  # OCSF: an activity that the class has no number for; `activity_name` says which
_LIFECYCLE: Final = {kinds.STARTED: 3, kinds.STOPPED: 4, kinds.RELOADED: 8}  # Start, Stop, Update
_GRAVE: Final = frozenset({kinds.RECOVERED, kinds.RESUMED, kinds.UNRECORDED, kinds.RELOAD_REFUSED})
_NOTABLE: Final = frozenset({kinds.REVOKED, kinds.ERASED, kinds.KEYS_ROTATED, kinds.TOPPED_UP, kinds.RESET})
_BAD: Final = frozenset({"broken", "interrupted"})
_UNSHOWN: Final = re.compile(f"[\x00-\x1f{UNSHOWN}]")


@dataclass(slots=True)
class Exporter:
    """Makes lines of entries. since, until: seconds since the epoch; an annex has the time of its intent."""

    form: Format
    since: float | None = None
    until: float | None = None
    _callers: dict[str, dict[str, Any]] = field(default_factory=dict)
    _annex: tuple[PlacedEntry, dict[str, Any]] | None = None

    def look_back(self, root: Path, key: bytes | None, start: Cursor) -> None:
        """Reads the intents before a cursor, so that later outcomes can name their callers."""
        part, _ = place_of(root, key, start)
        if part.erased:
            return
        begin = max(0, start.index - _LOOK_BACK)
        for index, data in enumerate(LogReader(part.folder, part.key).entries(begin, start.index), begin):
            self.lines(PlacedEntry(start.origin, index, data))

    def lines(self, entry: PlacedEntry) -> list[str]:
        """The lines of an entry: none for one outside the asked time; for an intent in JSON, its annex too."""
        members = parse(entry.data)
        kind = members["kind"]
        annex, self._annex = self._annex, None
        if kind == Annex.kind:
            self._annex = entry, members
            return []
        if kind == Intent.kind and annex is not None:
            members.update({name: annex[1][name] for name in ("groups", "scopes", "policies")})
        self._remember(kind, members)
        moment = members["time"]
        if (self.since is not None and moment < self.since) or (self.until is not None and moment >= self.until):
            return []
        if self.form == "jsonl":
            return [_json_line(read) for read in ((annex[0], entry) if annex is not None else (entry,))]
        return [_LINES[self.form](entry, members)]

    def _remember(self, kind: str, members: dict[str, Any]) -> None:
        if kind == Intent.kind:
            self._callers[members["request_id"]] = {name: members[name] for name in _CALLER}
        elif kind == Outcome.kind:
            members.update(self._callers.pop(members["request_id"], {}))


def _json_line(entry: PlacedEntry) -> str:
    return shown({"log": entry.origin, "index": entry.index, **parse(entry.data)})


def _detail(members: Mapping[str, Any]) -> tuple[str, str]:
    """A short name for the kind of line, and a title in words."""
    kind = members["kind"]
    if kind == Event.kind:
        return str(members["event"]), f"Gateway event {members['event']}"
    if kind == LogLink.kind:
        return str(kind), "Log continued"
    if kind == Outcome.kind:
        return str(kind), f"Request {members['outcome']}"
    what = "Request" if kind == Intent.kind else "Administration"
    return str(kind), f"{what} {'allowed' if members['decision'] == 'allow' else 'denied'}"


def _failed(members: Mapping[str, Any]) -> bool:
    if members["kind"] == Outcome.kind:
        return bool(members["outcome"] != "answered")
    return members.get("decision") == "deny" or members.get("event") in _GRAVE


def _grave(members: Mapping[str, Any]) -> int:
    """From 0 (nothing to see) to 3."""
    if members.get("event") in _GRAVE or members.get("outcome") in _BAD:
        return 3
    if members.get("decision") == "deny" or members.get("event") in _NOTABLE:
        return 2
    return int(_failed(members))


# CEF


def _cef(entry: PlacedEntry, members: Mapping[str, Any]) -> str:
    name, title = _detail(members)
    severity = (1, 3, 5, 7)[_grave(members)]
    head = "|".join(map(_cef_header, ("CEF:0", "Lacre", "Gateway", __version__, name, title, str(severity))))
    pairs = " ".join(f"{key}={_cef_value(value)}" for key, value in _cef_pairs(entry, members) if value not in (None, "", ()))
    return f"{head}|{pairs}"


def _cef_pairs(entry: PlacedEntry, members: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    get = members.get
    yield "rt", round(members["time"] * 1000)
    yield "cat", members["kind"]
    yield "deviceExternalId", entry.origin
    yield "externalId", get("request_id")
    yield "suser", get("subject") or get("actor")
    yield from _cef_address(get("address"))
    yield "act", get("action") or get("event")
    yield "outcome", get("outcome") or get("decision")
    yield "reason", get("problem") or get("reason")
    yield "msg", get("target")
    yield "cnt", get("count")
    texts = (
        ("tenant", get("tenant")), ("model", get("model")), ("pool", get("pool")), ("issuer", get("issuer")),
        ("policies", ",".join(get("policies") or ())), ("groups", ",".join(get("groups") or ())),
    )  # fmt: skip
    numbers = ("index", entry.index), ("promptTokens", get("prompt_tokens")), ("completionTokens", get("completion_tokens"))
    for prefix, labelled in (("cs", texts), ("cn", numbers)):
        for number, (label, value) in enumerate(labelled, 1):
            if value not in (None, ""):
                yield f"{prefix}{number}Label", label
                yield f"{prefix}{number}", value


def _cef_address(address: str | None) -> Iterator[tuple[str, str]]:
    try:
        parsed = ip_address(address or "")
    except ValueError:
        return
    if parsed.version == 4:
        yield "src", str(parsed)
    else:  # `src` holds IPv4 only in version 0
        yield "c6a2Label", "Source IPv6 Address"
        yield "c6a2", str(parsed)


def _cef_header(text: str) -> str:
    return _one_line(text.replace("\\", "\\\\").replace("|", "\\|"), " ")


def _cef_value(value: object) -> str:
    return _one_line(str(value).replace("\\", "\\\\").replace("=", "\\="), "\\n")


def _one_line(text: str, instead: str) -> str:
    """CEF has an escape for line breaks, and none for other control characters."""
    return _UNSHOWN.sub("\ufffd", instead.join(text.splitlines()))


# OCSF


def _ocsf(entry: PlacedEntry, members: Mapping[str, Any]) -> str:
    kind = members["kind"]
    event = _lifecycle(members) if kind in (Event.kind, LogLink.kind) else _api_activity(members)
    name, title = _detail(members)
    category, activity = event["class_uid"] // 1000, event["activity_id"]
    common = {
        "category_uid": category, "type_uid": event["class_uid"] * 100 + activity, "time": round(members["time"] * 1000),
        "severity_id": (1, 2, 3, 4)[_grave(members)],  # informational, low, medium, high
        "status_id": 2 if _failed(members) else 1, "message": title,
        "metadata": {
            "version": OCSF_VERSION, "product": _PRODUCT, "log_name": entry.origin, "event_code": name,
            "sequence": entry.index, "uid": f"{entry.origin}#{entry.index}",
            **({"correlation_uid": members["request_id"]} if "request_id" in members else {}),
            **({"tenant_uid": members["tenant"]} if "tenant" in members else {}),
        },
    }  # fmt: skip
    rest = {name: value for name, value in members.items() if name not in _PLACED and value not in (None, [], ())}
    return shown({**event, **common, "unmapped": rest})


_PRODUCT: Final = {"name": "Lacre gateway", "vendor_name": "Lacre", "version": __version__}
_PLACED: Final = frozenset({"time", "request_id", "tenant", "subject", "groups", "address", "action", "problem"})


def _api_activity(members: Mapping[str, Any]) -> dict[str, Any]:
    action = str(members.get("action") or members["kind"])
    user: dict[str, Any] = {"uid": members.get("subject") or "unknown", "type_id": 1 if members.get("subject") else 0}
    if members.get("groups"):
        user["groups"] = [{"name": name} for name in members["groups"]]
    event: dict[str, Any] = {
        "class_uid": 6003, "activity_id": _OTHER, "activity_name": action, "actor": {"user": user},
        "api": {"operation": action, "service": {"name": "lacre"}, "request": {"uid": members["request_id"]}},
        "src_endpoint": {"ip": members["address"]} if members.get("address") else {"name": "unknown"},
    }  # fmt: skip
    if members.get("duration") is not None:
        event["duration"] = round(members["duration"] * 1000)
    if members.get("problem"):
        event["status_detail"] = members["problem"]
    if members.get("status") is not None:
        event["status_code"] = str(members["status"])
    return event


def _lifecycle(members: Mapping[str, Any]) -> dict[str, Any]:
    name = str(members.get("event", members["kind"]))
    activity = _LIFECYCLE.get(name, _OTHER)
    return {"class_uid": 6002, "activity_id": activity, "activity_name": name, "app": _PRODUCT}


_LINES: Final[Mapping[str, Callable[[PlacedEntry, Mapping[str, Any]], str]]] = {"cef": _cef, "ocsf": _ocsf}
FORMATS: Final[Sequence[Format]] = ("jsonl", "cef", "ocsf")
