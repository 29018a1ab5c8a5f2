"""Explains a decision: what each policy says of the request, and what the decision still depends on.

Each policy is evaluated alone, once with only its scope and once whole. A policy that reads a context member which the request
omits is undecided, even if its other conditions fail: nothing is guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import cedarpy
from cedarpy import pst

from lacre.errors import InvalidMessage
from lacre_gateway.audit.entries import AdminIntent, Intent
from lacre_gateway.policy.cases import written
from lacre_gateway.policy.cedar import PolicySet
from lacre_gateway.policy.question import AdminAction, AnyQuestion
from lacre_gateway.policy.reads import WHOLE, context_of
from lacre_gateway.policy.replay import question_of

# A case names the time by its `hour` or its `time`.
_TIMES: Final = frozenset({"hour", "weekday", "local_hour", "local_minute"})
# The members of the file that a request may leave open, each with a placeholder for the evaluation.
_OPEN: Final[Mapping[str, tuple[frozenset[str], object]]] = {
    "max_tokens": (frozenset({"max_tokens"}), 1),
    "sealed_bytes": (frozenset({"sealed_bytes"}), 1),
    "kem": (frozenset({"kem", "post_quantum"}), "X25519"),
    "shape": (frozenset({"shape"}), "none"),
    "address": (frozenset({"address"}), "192.0.2.1"),
    "hour": (_TIMES, 0),
}
_OPEN_OF_PRINCIPAL: Final = ("scopes", "plan")
_OF_ADMIN: Final = frozenset({"address", "hour"})


@dataclass(frozen=True, slots=True)
class Voice:
    """The result of one policy. speaks: whether its scope fits. holds: whether it applies; None if that depends on `needs`.

    failed: it could not be evaluated, which denies. text: the policy, as Cedar formats it.
    """

    name: str
    effect: str
    annotations: Mapping[str, str]
    speaks: bool
    holds: bool | None
    failed: bool
    needs: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """allowed: None if it depends on `missing`, which are members of the context."""

    allowed: bool | None
    voices: tuple[Voice, ...]

    @property
    def deciding(self) -> tuple[Voice, ...]:
        """The deciding policies: those that forbid or fail, or else those that permit."""
        forbids = tuple(voice for voice in self.voices if voice.failed or (voice.holds and voice.effect == "forbid"))
        return forbids or tuple(voice for voice in self.voices if voice.holds)

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(sorted({name for voice in self.voices if voice.holds is None for name in voice.needs}))

    @property
    def near(self) -> tuple[Voice, ...]:
        """Policies for such requests whose conditions do not hold."""
        return tuple(voice for voice in self.voices if voice.speaks and voice.holds is False and not voice.failed)


def written_out(policies: PolicySet) -> Iterator[tuple[str, str, Mapping[str, str], str]]:
    """Each policy: its name, its effect, its annotations and its text, as Cedar formats it."""
    for template in policies.policies.to_pst().static_policies.values():
        notes = {name: text for name, text in template.annotations.items() if name != "id"}
        yield policies.names[template.id], template.effect, notes, str(_alone(template)).strip()


def explain(policies: PolicySet, question: AnyQuestion, missing: frozenset[str] = frozenset()) -> Explanation:
    """missing: members of the context for which `question` has only placeholders."""
    templates = policies.policies.to_pst().static_policies
    voices = tuple(_voice(policies, template, question, missing) for template in templates.values())
    return Explanation(_verdict(voices), voices)


def requested(values: Any) -> tuple[AnyQuestion, frozenset[str]]:
    """The question in a case or in an entry of the audit log, and the context members that it leaves open.

    Raises PolicyError or InvalidMessage.
    """
    if isinstance(values, dict) and values.get("kind") in (Intent.kind, AdminIntent.kind):
        if values.get("annex") is not None:
            raise InvalidMessage("its groups and scopes are in the annex before it: copy them from there, and remove `annex`")
        return question_of(values), frozenset()
    missing: set[str] = set()
    if isinstance(values, dict):
        admin = values.get("action") in set(AdminAction)
        values = dict(values)
        for name, (open_names, stand_in) in _OPEN.items():
            if name == "hour" and values.get("time") is not None:
                continue
            if name not in values and (not admin or name in _OF_ADMIN):
                values[name] = stand_in
                missing |= open_names
        if isinstance(values.get("principal"), dict):
            missing |= {name for name in _OPEN_OF_PRINCIPAL if name not in values["principal"]}
    return written("the request", values).question(), frozenset(missing)


def _voice(policies: PolicySet, template: pst.Template, question: AnyQuestion, missing: frozenset[str]) -> Voice:
    speaks, _ = _applies(policies, dataclasses.replace(template, clauses=()), question)
    needs = tuple(sorted(_reads(template, missing))) if speaks else ()
    holds, failed = (None, False) if needs else _applies(policies, template, question)
    return Voice(
        name=policies.names[template.id],
        effect=template.effect,
        annotations={name: text for name, text in template.annotations.items() if name != "id"},
        speaks=speaks,
        holds=holds,
        failed=failed,
        needs=needs,
        text=str(_alone(template)).strip(),
    )


def _applies(policies: PolicySet, template: pst.Template, question: AnyQuestion) -> tuple[bool, bool]:
    """Whether it applies, and whether it failed."""
    alone = _alone(dataclasses.replace(template, effect="permit"))
    result = cedarpy.is_authorized(policies.asked(question), alone, question.entities(), policies.schema)
    return result.allowed, bool(result.diagnostics.errors)


def _alone(template: pst.Template) -> cedarpy.PolicySet:
    return cedarpy.PolicySet.from_pst(pst.PolicySet(templates={}, static_policies={template.id: template}, template_links=()))


def _reads(template: pst.Template, missing: frozenset[str]) -> frozenset[str]:
    """The missing members that its conditions name."""
    names = context_of(template)
    return missing if WHOLE in names else names & missing


def _verdict(voices: tuple[Voice, ...]) -> bool | None:
    """A forbid or a failure wins; otherwise a permit is needed. An undecided policy leaves open what it could change."""
    forbids = [voice for voice in voices if voice.effect == "forbid"]
    permits = [voice for voice in voices if voice.effect == "permit"]
    if any(voice.failed for voice in voices) or any(voice.holds for voice in forbids):
        return False
    if all(voice.holds is False for voice in permits):
        return False
    if any(voice.holds for voice in permits) and all(voice.holds is False for voice in forbids):
        return True
    return None
