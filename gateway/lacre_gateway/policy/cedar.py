"""May this principal do this? Cedar decides; the default is no.

Rules:
- Schema and policies are validated against each other and parsed once. A set that does not validate is refused.
- A policy that fails during evaluation, or a question that does not fit the schema, means no.
- Every policy has an `@id` of its own, because the audit log names policies by it: numbers change whenever a policy is added.
- A verdict is remembered by what the set's rules read of the question (`question.VerdictKeys`), and within that set alone.
- The digest of the entities is each question's own, because the audit log names it.
- A schema of an older version lacks members and actions that were added since. The set then decides without these members, and
  denies these actions.
- This file reads no files and does not know HTTP.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import field
from typing import Any, Final, Generic, Self, TypeVar

import cedarpy

from lacre.errors import SettingsError
from lacre.runtime.records import record
from lacre_gateway.policy import reads
from lacre_gateway.policy.local_time import UTC_ZONE, TimeZone
from lacre_gateway.policy.question import LATER_ACTIONS, OMITTED_BY_OLDER, AnyQuestion, VerdictKeys

# Each holds names from a token (at most 16 KiB), which the verdicts of `auth` hold as well.
MAX_DECISIONS: Final = 4096
_MAX_PARTIES: Final = 4096
_POLICY: Final = re.compile(r"`(policy[0-9]+)`")
_T = TypeVar("_T")


class PolicyError(SettingsError):
    """A set of policies that cannot be used. fault: in a word, for logs and the audit; place: the file, if known."""

    def __init__(self, fault: str, place: str, why: str) -> None:
        super().__init__(f"policies: {place}: {why}" if place else f"policies: {why}")
        self.fault = fault
        self.place = place
        self.why = why


SYNTAX: Final = "syntax"  # not Cedar
SCHEMA: Final = "schema"  # Cedar that does not fit the schema, or a schema that does not fit this gateway
NAMES: Final = "names"  # a policy without an @id of its own


@record(frozen=True, slots=True)
class Decision:
    """policies: the ids of the deciding or failed ones; none if no policy allowed the request.

    policy_set, entities: hex SHA-256 of the rules and entities of the decision, so that a record can name them.
    """

    allowed: bool
    policies: tuple[str, ...]
    policy_set: str = field(default="", compare=False)
    entities: str = field(default="", compare=False)


class _Parties:
    """The parties of a question. digest: hex SHA-256 of them as JSON. Cedar reads them when it is first asked about them."""

    __slots__ = ("_read", "_text", "digest")

    def __init__(self, text: str) -> None:
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self._text: str | None = text
        self._read: cedarpy.Entities | None = None

    @classmethod
    def of(cls, question: AnyQuestion) -> Self:
        return cls(_json(question.entities()))

    def parsed(self, schema: cedarpy.Schema) -> cedarpy.Entities | None:
        """None if the schema does not know them."""
        if self._text is not None:
            with contextlib.suppress(ValueError):
                self._read = cedarpy.Entities.from_json_str(self._text, schema)
            self._text = None
        return self._read


class PolicySet:
    """A validated, parsed set of policies.

    digest: hex SHA-256 of the schema's text, a zero byte, and the policies' text. names: each policy's `@id`, by Cedar's own
    name. zone: in which it knows weekdays and local times. evaluated: how many questions Cedar has answered.
    """

    def __init__(
        self, schema: cedarpy.Schema, policies: cedarpy.PolicySet, names: Mapping[str, str], digest: str, zone: TimeZone
    ) -> None:
        self.schema = schema
        self.policies = policies
        self.names = names
        self.digest = digest
        self.zone = zone
        self._omitted: dict[type, frozenset[str]] = {}  # members of the context that the schema lacks, by kind of question
        self._reads = reads.of(policies.to_pst().static_policies.values())
        self._keys = VerdictKeys(self._reads, zone)
        self._verdicts = _Remembered[tuple[bool, tuple[str, ...]]](MAX_DECISIONS)
        self._parties = _Remembered[_Parties](_MAX_PARTIES)
        self.evaluated = 0

    def decide(self, question: AnyQuestion) -> Decision:
        parties = self._parties.get(question.entities_key, lambda: _Parties.of(question))
        allowed, named = self._verdicts.get(self._keys.of(question), lambda: self._judge(question, parties))
        return Decision(allowed, named, self.digest, parties.digest)

    def read(self, member: str) -> bool:
        """Whether a decision may depend on this member of the context."""
        return self._reads.member(member)

    def would_allow(self, question: AnyQuestion) -> bool:
        """A decision that is neither remembered nor recorded: no caller has asked this question."""
        return self._judge(question, self._parties.get(question.entities_key, lambda: _Parties.of(question)))[0]

    def _judge(self, question: AnyQuestion, parties: _Parties) -> tuple[bool, tuple[str, ...]]:
        """Whether it is allowed, and by which policies it is decided."""
        self.evaluated += 1
        entities = parties.parsed(self.schema)
        if entities is None:
            return False, ()
        result = cedarpy.is_authorized(self.asked(question), self.policies, entities, self.schema)
        diagnostics = result.diagnostics
        # A policy that could not be evaluated may be the one that forbids.
        failed = {name for error in diagnostics.errors for name in _POLICY.findall(error)}
        decided = failed or set(diagnostics.reasons)
        named = tuple(sorted(self.names.get(name, name) for name in decided))
        return result.allowed and not diagnostics.errors, named

    def asked(self, question: AnyQuestion) -> dict[str, Any]:
        """The question for Cedar, with the members that the schema has."""
        request, omitted = question.request(self.zone), self._omitted.get(type(question), frozenset())
        return {**request, "context": {name: value for name, value in request["context"].items() if name not in omitted}}

    def misfit(self, question: AnyQuestion) -> str | None:
        """Why the schema does not accept the question, in Cedar's words; None if it does, or if its version did not have it."""
        if question.action in LATER_ACTIONS and f'"{question.action}"' not in str(self.schema):
            return None
        why = self._misfit(question)
        if why is not None and type(question) not in self._omitted:
            for members in OMITTED_BY_OLDER:
                self._omitted[type(question)] = members
                if self._misfit(question) is None:
                    return None
            del self._omitted[type(question)]
        return why

    def _misfit(self, question: AnyQuestion) -> str | None:
        try:
            entities = cedarpy.Entities.from_json_str(_json(question.entities()), self.schema)
        except ValueError as exc:
            return str(exc)
        result = cedarpy.is_authorized(self.asked(question), self.policies, entities, self.schema)
        return "; ".join(result.diagnostics.errors) if result.decision is cedarpy.Decision.NoDecision else None

    @classmethod
    def parse(cls, schema_text: str, texts: Mapping[str, str], zone: TimeZone = UTC_ZONE) -> Self:
        """texts: the policies, by the names of their files. Raises PolicyError."""
        try:
            schema = cedarpy.Schema.from_str(schema_text)
        except ValueError as exc:
            raise PolicyError(SYNTAX, "", f"the schema is not valid Cedar: {exc}") from exc
        for name, text in texts.items():
            _check(name, text, schema)
        whole = "\n".join(texts.values())
        policies = cedarpy.PolicySet.from_str(whole)
        digest = hashlib.sha256(f"{schema_text}\0{whole}".encode()).hexdigest()
        return cls(schema, policies, _names(policies), digest, zone)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def _check(place: str, text: str, schema: cedarpy.Schema) -> None:
    """Raises PolicyError unless the file's policies parse, fit the schema, and have names."""
    try:
        parsed = cedarpy.PolicySet.from_str(text)
    except ValueError as exc:
        raise PolicyError(SYNTAX, place, f"not valid Cedar: {exc}") from exc
    if parsed.templates():
        raise PolicyError(SYNTAX, place, "a template, which decides nothing because nothing links it: write policies")
    names = _names(parsed, place)
    validation = cedarpy.validate_policies(text, schema)
    if not validation.validation_passed:
        errors = {f"{names.get(error.policy_id, error.policy_id)}: {error.error}" for error in validation.errors}
        raise PolicyError(SCHEMA, place, f"does not fit the schema: {'; '.join(sorted(errors))}")


def _names(policies: cedarpy.PolicySet, place: str = "") -> dict[str, str]:
    """Raises PolicyError if a policy has no `@id`, or one that another has too."""
    names: dict[str, str] = {}
    try:
        static = policies.to_pst().static_policies
    except ValueError as exc:  # more than 100 levels; no decision goes deeper, so none can exhaust a stack
        raise PolicyError(SYNTAX, place, f"an expression is nested too deep: {exc}") from exc
    for name, policy in static.items():
        own = policy.annotations.get("id", "")
        if not own or not own.isprintable():
            raise PolicyError(NAMES, place, f'its policy number {int(name.removeprefix("policy")) + 1} needs an @id("…")')
        if own in names.values():
            raise PolicyError(NAMES, place, f'two policies are called @id("{own}"): the audit log could not tell them apart')
        names[name] = own
    return names


class _Remembered(Generic[_T]):
    """The most recent values, by the inputs that they were made from."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, _T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], _T]) -> _T:
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make()
        if len(self._values) > self._size:
            self._values.popitem(last=False)
        return value
