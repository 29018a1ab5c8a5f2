"""The names of streams, subjects and buckets. Names become NATS tokens here."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from lacre.errors import InvalidMessage, SettingsError
from lacre.jose.jws import b64u

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_REGION: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
DEFAULT_REGION: Final = "lacre"  # the name of the only region, unless the operator gave one
ONE_REGION: Final = (DEFAULT_REGION,)
_REQUEST: Final = re.compile(r"[0-9a-f]{32}")
_TOKEN: Final = re.compile(r"[A-Za-z0-9_:-]{1,200}")
PROCESS: Final = "__"  # between a gateway's name and its process number
_MAX_GATEWAY: Final = 56
_MAX_MODEL: Final = 180  # bytes; as base64 in a consumer's name it stays below JetStream's 255
_ORDER: Final = "-"  # in place of a model's token
API: Final = "FABRIC.API"  # JetStream's API as every account sees it: `$JS.API` is each account's own (see `accounts`)
TRUST_BUCKET: Final = "trust"
MANIFEST_KEY: Final = "manifest"
_REVOCATIONS: Final = "revocations"
REVOCATIONS_STREAM: Final = f"KV_{_REVOCATIONS}"
READ_REVOCATIONS: Final = f"{API}.STREAM.MSG.GET.{REVOCATIONS_STREAM}"
BUDGETS_BUCKET: Final = "budgets"
READ_BUDGETS: Final = f"{API}.STREAM.MSG.GET.KV_{BUDGETS_BUCKET}"


def is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def check_name(kind: str, name: str) -> str:
    """Checks the name of a pool, gateway or node. It becomes part of subjects, where `.`, `*` and `>` would match others'."""
    if not is_name(name):
        raise SettingsError(f"a {kind} name has 1 to 63 of a-z, 0-9, - and _, and begins with a letter or digit: {name!r}")
    return name


def check_region(name: str) -> str:
    """Checks a region's name, which is its NATS cluster's. Without `_` in it, a queue's name has exactly one pool and
    region.
    """
    if not _REGION.fullmatch(name):
        raise SettingsError(f"a region's name has 1 to 31 of a-z, 0-9 and -, and begins with a letter or digit: {name!r}")
    return name


def check_gateway(name: str) -> str:
    """As `check_name`; leaves room for a process number, and cannot equal a process's name."""
    if PROCESS in name or len(name) > _MAX_GATEWAY:
        raise SettingsError(f"a gateway's name has no {PROCESS} in it, and at most {_MAX_GATEWAY} characters: {name!r}")
    return check_name("gateway", name)


@lru_cache(maxsize=1024)
def model_token(model: str) -> str:
    """A model's name as one token; the name may contain any character. Raises SettingsError if it is empty or too long."""
    name = model.encode("utf-8", "surrogatepass")
    if not 0 < len(name) <= _MAX_MODEL:
        raise SettingsError(f"a model name has 1 to {_MAX_MODEL} bytes: {model[:40]!r}")
    return b64u(name)


def work_stream(pool: str, region: str) -> str:
    return f"WORK_{pool}_{region}"


def work(pool: str, region: str, model: str) -> str:
    return f"work.{pool}.{region}.{model_token(model)}"


def works(pool: str, region: str) -> str:
    """The subjects of all models."""
    return f"work.{pool}.{region}.*"


def consumer(model: str) -> str:
    """The durable consumer of a model's subject."""
    return f"model-{model_token(model)}"


def reply(pool: str, gateway: str, request: str) -> str:
    return f"reply.{pool}.{gateway}.{request}"


def process_name(gateway: str, number: int) -> str:
    """The name of one of a gateway's processes, which has its own replies. No gateway can have this name."""
    return f"{gateway}{PROCESS}{number}"


def replies(gateway: str, pool: str = "*") -> str:
    """All replies to one gateway process, from one pool or from all."""
    return f"reply.{pool}.{gateway}.*"


def cancel(pool: str, request: str) -> str:
    return f"cancel.{pool}.{request}"


def kick(server: str) -> str:
    """The subject on which a nats-server (2.10 or later) accepts orders to close a connection: `{"cid": N}`. server: its id, or
    `*` for all.
    """
    return f"$SYS.REQ.SERVER.{server}.KICK"


def reload(server: str) -> str:
    """The subject on which a nats-server (2.10 or later) accepts the order to read its own configuration again. server: its id,
    or `*` for all.
    """
    return f"$SYS.REQ.SERVER.{server}.RELOAD"


def credit(pool: str, request: str) -> str:
    return f"credit.{pool}.{request}"


def presence(pool: str, region: str, node: str) -> str:
    return f"presence.{pool}.{region}.{node}"


def offer(pool: str, region: str, node: str, model: str) -> str:
    """Work of the model for one worker. Only its gateway keeps it until the worker takes it."""
    return f"{offers(pool, region, node)[:-1]}{model_token(model)}"


def offers(pool: str, region: str, node: str) -> str:
    """The subjects of all models. node: or `*` for all."""
    return f"offer.{pool}.{region}.{node}.*"


def order(pool: str, region: str, node: str) -> str:
    """Orders to one worker (`work.drain_orders`). No model's token is one character long.

    The subject is one of the offers'. So NATS servers need no new permissions: a gateway may send there, and that worker alone
    hears it.
    """
    return f"{offers(pool, region, node)[:-1]}{_ORDER}"


def is_order(subject: str) -> bool:
    return subject.endswith(f".{_ORDER}")


def is_request(request: str) -> bool:
    """Whether it is a valid request id."""
    return _REQUEST.fullmatch(request) is not None


def parse_presence(subject: str) -> tuple[str, str, str]:
    """Pool, region and node of a subject that a worker chose. Raises InvalidMessage."""
    kind, *names = subject.split(".", 4)
    if kind != "presence" or len(names) != 3 or not (is_name(names[0]) and _REGION.fullmatch(names[1]) and is_name(names[2])):
        raise InvalidMessage("a presence message under an invalid name")
    return names[0], names[1], names[2]


def parse_reply(subject: str) -> tuple[str, str]:
    """Pool and request of a subject that a worker chose. Raises InvalidMessage."""
    kind, *names = subject.split(".", 4)
    if kind != "reply" or len(names) != 3 or not is_name(names[0]) or not is_request(names[2]):
        raise InvalidMessage("a reply to an invalid request id")
    return names[0], names[2]


def claims_bucket(pool: str) -> str:
    return f"claims_{pool}"


def claim(pool: str, key: str) -> str:
    """key: a request's digest in hex."""
    return f"$KV.{claims_bucket(pool)}.{key}"


def handed_back(pool: str, key: str) -> str:
    """The mark of a request that a worker returned to its queue. key: its digest in hex."""
    return claim(pool, f"back-{key}")


def manifest() -> str:
    return f"$KV.{TRUST_BUCKET}.{MANIFEST_KEY}"


def store_mark() -> str:
    """Of the provisioner's mark in the bucket of revocations. No credential has this name."""
    return revocation("stores")


def revocation(writer: str) -> str:
    """writer: the name of a credential, or `*` for all."""
    return f"$KV.{_REVOCATIONS}.{writer}"


def budgets_of(writer: str) -> str:
    """All subjects of the budgets that a credential may write."""
    return f"$KV.{BUDGETS_BUCKET}.{writer}.>"


def inbox(credential: str) -> str:
    """A credential's own inbox prefix. With the usual `_INBOX`, each client could read the others' answers."""
    if not _TOKEN.fullmatch(credential):
        raise SettingsError(f"a credential's name has 1 to 200 of A-Z, a-z, 0-9, -, _ and `:`: {credential!r}")
    return f"_INBOX_{credential}"
