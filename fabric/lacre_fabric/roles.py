"""Who may do what on the fabric: each role's credential and the permissions that nats-server enforces (DESIGN section 7).

Rules:
- Every process has a credential of its own, with an inbox of its own: with the usual `_INBOX.>` a worker of one pool could
  read what is delivered to another.
- Only the provisioner creates streams, consumers and buckets, or writes the manifest.
- A gateway reads its own replies only. A worker touches its own pool only.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lacre.errors import InvalidMessage, SettingsError
from lacre.members import Members
from lacre_fabric import subjects
from lacre_fabric.keyfiles import read_secret, write_secret


@dataclass(frozen=True, slots=True)
class Credential:
    """A name and a password for nats-server, in a 0600 file. `name` is the role too: what stands in inbox subjects."""

    name: str
    password: str = field(repr=False)

    @classmethod
    def new(cls, name: str) -> Credential:
        return cls(name, secrets.token_urlsafe(32))

    @classmethod
    def load(cls, path: Path) -> Credential:
        """Raises SettingsError."""
        try:
            members = Members(json.loads(read_secret(path)), "the credential")
            return cls(members.text("name"), members.text("password"))
        except (ValueError, InvalidMessage) as exc:
            raise SettingsError(f"{path} is not a fabric credential: `lacre up` and `lacre keys init` write them") from exc

    @classmethod
    def load_or_new(cls, path: Path, name: str) -> Credential:
        if not path.exists():
            cls.new(name).save(path)
        return cls.load(path)

    def save(self, path: Path) -> None:
        write_secret(path, json.dumps(asdict(self)).encode())


@dataclass(frozen=True, slots=True)
class Role:
    """A credential and the subjects it may publish and subscribe to."""

    credential: Credential
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]

    def user(self) -> dict[str, Any]:
        """The user's entry in nats-server's configuration."""
        return {
            "user": self.credential.name,
            "password": self.credential.password,
            "permissions": {"publish": list(self.publish), "subscribe": list(self.subscribe)},
        }


def provisioner(credential: Credential) -> Role:
    return Role(credential, (">",), (">",))


def gateway(credential: Credential, gateway_id: str, pools: Sequence[str]) -> Role:
    """pools: those it sends work to; a wildcard would let it delete from the buckets too."""
    subjects.check_name("gateway", gateway_id)
    withdraw = (f"$JS.API.STREAM.MSG.DELETE.{subjects.work_stream(pool)}" for pool in pools)
    return Role(
        credential,
        ("work.>", "cancel.>", "credit.>", *withdraw, *_read_bucket(subjects.TRUST_BUCKET)),
        (
            _own_inbox(credential),
            subjects.replies(gateway_id),
            "presence.>",
            "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.>",
        ),
    )


def worker(credential: Credential, pool: str, node: str) -> Role:
    subjects.check_name("pool", pool)
    stream, claims = subjects.work_stream(pool), subjects.claims_bucket(pool)
    return Role(
        credential,
        (
            f"reply.{pool}.>",
            f"$JS.API.CONSUMER.MSG.NEXT.{stream}.*",
            f"$JS.ACK.{stream}.>",
            f"$KV.{claims}.>",
            *_read_bucket(claims),
            *_read_bucket(subjects.TRUST_BUCKET),
            subjects.presence(pool, subjects.check_name("node", node)),
        ),
        (_own_inbox(credential), f"cancel.{pool}.*", f"credit.{pool}.*"),
    )


def _own_inbox(credential: Credential) -> str:
    return f"{subjects.inbox(credential.name)}.>"


def _read_bucket(bucket: str) -> tuple[str, str]:
    return f"$JS.API.STREAM.INFO.KV_{bucket}", f"$JS.API.DIRECT.GET.KV_{bucket}.>"
