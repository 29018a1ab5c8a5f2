"""May this principal do this? Cedar decides, by default no.

Rules:
- Schema and policies are read, validated against each other and parsed once, at start. A set that does not validate is no set.
- A policy that fails while it is evaluated, or a question that does not fit the schema, means no.
- This file reads files and decides; it knows nothing of HTTP.

Entities: `User::"tenant/subject"` in its `Group::"tenant/group"`s and its `Tenant::"tenant"`; `Model::"pool/model"` in
`Pool::"pool"`. Names carry their tenant, so that an issuer trusted for one tenant names nobody of another.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import cedarpy

from lacre.errors import SettingsError
from lacre.wire.header import Kem
from lacre_gateway.auth import Principal
from lacre_gateway.outer import Action, Shape

SCHEMA_FILE: Final = "lacre.cedarschema"
_POST_QUANTUM: Final = frozenset({Kem.XWING})


@dataclass(frozen=True, slots=True)
class Question:
    """One request as policy sees it."""

    principal: Principal
    action: Action
    pool: str
    model: str
    max_tokens: int
    sealed_bytes: int
    kem: Kem
    shape: Shape

    def request(self) -> dict[str, Any]:
        who = self.principal
        return {
            "principal": {"type": "User", "id": f"{who.tenant}/{who.subject}"},
            "action": {"type": "Action", "id": self.action.value},
            "resource": {"type": "Model", "id": f"{self.pool}/{self.model}"},
            "context": {
                "max_tokens": self.max_tokens,
                "sealed_bytes": self.sealed_bytes,
                "kem": self.kem.label,
                "post_quantum": self.kem in _POST_QUANTUM,
                "shape": self.shape.value,
                "scopes": list(who.scopes),
            },
        }

    def entities(self) -> list[dict[str, Any]]:
        who = self.principal
        tenant = {"type": "Tenant", "id": who.tenant}
        pool = {"type": "Pool", "id": self.pool}
        groups = [{"type": "Group", "id": f"{who.tenant}/{group}"} for group in who.groups]
        user = {"type": "User", "id": f"{who.tenant}/{who.subject}"}
        model = {"type": "Model", "id": f"{self.pool}/{self.model}"}
        attributes = {"issuer": who.issuer, "name": who.subject}
        return [
            {"uid": tenant, "attrs": {}, "parents": []},
            *({"uid": group, "attrs": {}, "parents": [tenant]} for group in groups),
            {"uid": user, "attrs": attributes, "parents": [tenant, *groups]},
            {"uid": pool, "attrs": {}, "parents": []},
            {"uid": model, "attrs": {"name": self.model}, "parents": [pool]},
        ]

    def entities_digest(self) -> str:
        """Hex SHA-256 of the entities as JSON, so that a record can name what was decided with."""
        return hashlib.sha256(json.dumps(self.entities(), separators=(",", ":"), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Decision:
    """policies: the ids (`@id` where a policy has one) of those that decided; none where no policy allowed it."""

    allowed: bool
    policies: tuple[str, ...]


class PolicySet:
    """A validated, parsed set of policies. digest: hex SHA-256 of the schema's text, a zero byte, and the policies' text."""

    def __init__(self, schema: cedarpy.Schema, policies: cedarpy.PolicySet, digest: str) -> None:
        self._schema = schema
        self._policies = policies
        self.digest = digest

    def decide(self, question: Question) -> Decision:
        result = cedarpy.is_authorized(question.request(), self._policies, question.entities(), self._schema)
        diagnostics = result.diagnostics
        names = diagnostics.id_annotations_by_reason
        decided = tuple(sorted(names.get(reason) or reason for reason in diagnostics.reasons))
        # A policy that could not be evaluated may be the very one that forbids.
        return Decision(result.allowed and not diagnostics.errors, decided)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads `lacre.cedarschema` and every `*.cedar` of the folder. Raises SettingsError."""
        try:
            schema_text = (folder / SCHEMA_FILE).read_text(encoding="utf-8")
            texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cedar"))]
        except OSError as exc:
            raise SettingsError(f"policies: cannot read {exc.filename} ({exc.strerror})") from exc
        if not texts:
            raise SettingsError(f"policies: {folder} has no *.cedar file, so nothing would be allowed: write one")
        return cls.parse(schema_text, "\n".join(texts))

    @classmethod
    def parse(cls, schema_text: str, policy_text: str) -> Self:
        """Raises SettingsError."""
        try:
            schema = cedarpy.Schema.from_str(schema_text)
            validation = cedarpy.validate_policies(policy_text, schema)
            if not validation.validation_passed:
                raise SettingsError(f"policies: they do not fit the schema: {'; '.join(map(str, validation.errors))}")
            digest = hashlib.sha256(f"{schema_text}\0{policy_text}".encode()).hexdigest()
            return cls(schema, cedarpy.PolicySet.from_str(policy_text), digest)
        except ValueError as exc:
            raise SettingsError(f"policies: not valid Cedar: {exc}") from exc


def shipped() -> Path:
    """The folder of the policies that come with Lacre: inside the wheel, or beside the rooms in a checkout."""
    packaged = Path(__file__).parent / "policies"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "policies"
