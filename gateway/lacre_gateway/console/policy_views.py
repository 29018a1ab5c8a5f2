"""The rules in force, what they say to a question, and what others would decide of the log's newest requests."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lacre.errors import InvalidMessage, UsageError
from lacre_gateway.admin.api import AdminCaller
from lacre_gateway.audit import feed
from lacre_gateway.console.log_reading import read_log
from lacre_gateway.console.reports import (
    ExplainedReport,
    PolicyReport,
    ReplayedReport,
    ReplayReport,
    RuleReport,
    VoiceReport,
)
from lacre_gateway.policy.cedar import PolicyError, PolicySet
from lacre_gateway.policy.explain import Explanation, explain, requested, written_out
from lacre_gateway.policy.question import AdminAction, AnyQuestion
from lacre_gateway.policy.replay import replay

NEWEST: Final = 20_000  # entries that a replay reads, some seconds of work; `lacre policy replay` reads all
MOST_SHOWN: Final = 200  # changed decisions of one answer


@dataclass(frozen=True, slots=True)
class PolicyViews:
    """root: of the audit logs. replaying: one replay at a time."""

    root: Path
    replaying: asyncio.Lock

    async def policy(self, asking: AdminCaller) -> PolicyReport:
        gateway = await asking.may(AdminAction.AUDIT)
        rules, status = gateway.rules.current, gateway.rules.status
        return PolicyReport(
            policy_set=status.policy_set, digest=status.rules, since=status.since, reloads=status.reloads,
            refused=None if status.refused is None else status.refused.fault,
            refused_file=None if status.refused is None else status.refused.place or None,
            rules=[
                RuleReport(name=name, effect=effect, annotations=dict(notes), text=text)
                for name, effect, notes, text in written_out(rules.policies)
            ],
            cases=len(rules.cases), zone=rules.policies.zone.name, plans=sorted(rules.plans.plans),
        )  # fmt: skip

    async def test(self, asking: AdminCaller, asked: dict[str, Any]) -> ExplainedReport:
        """asked: as a case of the rules. Raises UsageError."""
        gateway = await asking.may(AdminAction.AUDIT)
        try:
            question, missing = requested(asked)
        except PolicyError as exc:
            raise UsageError(exc.why) from exc
        except InvalidMessage as exc:
            raise UsageError(str(exc)) from exc
        return explained(gateway.rules.current.policies, question, missing)

    async def replay(self, asking: AdminCaller, candidate: str) -> ReplayReport:
        """candidate: the text of policies, in place of those in force; the schema stays. Raises UsageError."""
        gateway = await asking.may(AdminAction.AUDIT)
        async with self.replaying:
            try:
                policies = await asyncio.to_thread(gateway.rules.current.with_policies, candidate)
            except PolicyError as exc:
                raise UsageError(exc.why) from exc
            return await read_log(self._replayed, policies)

    def _replayed(self, policies: PolicySet) -> ReplayReport:
        found = replay(self._newest(), policies)
        return ReplayReport(
            decided=found.decided, changed=len(found.changes), unsure=len(found.unsure), policy_set=policies.digest,
            changes=[
                ReplayedReport(
                    request_id=one.asked.members["request_id"], time=one.asked.members["time"],
                    subject=one.asked.members["subject"], tenant=one.asked.members["tenant"],
                    action=one.asked.members["action"], resource=one.asked.resource,
                    was="allow" if one.asked.was.allowed else "deny", becomes="allow" if one.becomes.allowed else "deny",
                    by=list(one.becomes.policies),
                ) for one in found.changes[-MOST_SHOWN:][::-1]
            ],
        )  # fmt: skip

    def _newest(self) -> Iterator[bytes]:
        """The newest entries, the oldest first."""
        yield from deque(feed.entries(self.root), NEWEST)


def explained(policies: PolicySet, question: AnyQuestion, missing: frozenset[str] = frozenset()) -> ExplainedReport:
    found: Explanation = explain(policies, question, missing)
    return ExplainedReport(
        allowed=found.allowed, deciding=[voice.name for voice in found.deciding] if found.allowed is not None else [],
        missing=list(found.missing), policy_set=policies.digest,
        rules=[
            VoiceReport(
                rule=voice.name, effect=voice.effect, applies=voice.holds, in_scope=voice.speaks, failed=voice.failed,
                needs=list(voice.needs), text=voice.text,
            ) for voice in found.voices
        ],
    )  # fmt: skip
