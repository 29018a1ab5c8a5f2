"""A receipt: the pool's signed statement of what a request used. It shows who counted; it does not prove the count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import InvalidReceipt, LacreError, UsageError, WrongModel
from lacre.jose import jws
from lacre.jose.claims import EXACT
from lacre.jose.ed25519 import Check, verifies
from lacre.jose.formats import Format
from lacre.runtime import arguments
from lacre.runtime.json_objects import parse_object
from lacre.trust.manifest import ModelEntry

TYP: Final = "lacre-receipt+jwt"
RECEIPT: Final = Format("receipt", "program (SDK or gateway)")
TRAILER: Final = "lacre-receipt"  # the trailer field of the sealed answer that carries the final receipt
# Bytes of a body that count as one unit, for the action `http`: the app behind it may not know tokens. A partial unit counts as
# one.
UNIT: Final = 1024
MAX_SHOWN: Final = 80  # characters of a receipt's `model` in an error; a digest has 71


def units(size: int) -> int:
    """The units of a body of `size` bytes, for the action `http`."""
    return -(-size // UNIT)


@dataclass(frozen=True, slots=True)
class Receipt:
    """enc: base64url SHA-256 of `hdr ‖ enc`. model: `sha256:` and the digest of the model file; empty if the worker knows no
    file. Counts are tokens; for the action `http`, they are `units` of the bodies: the request's as prompt, and the answer's.
    start, end: seconds since the epoch. final: False for a cumulative receipt on a beat. signed: the JWS that it was read from;
    empty if it was not.
    """  # fmt: skip

    enc: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    start: float
    end: float
    final: bool
    signed: str = field(default="", repr=False, compare=False)

    def text(self) -> str:
        """The signed receipt, to keep: `lacre receipt check` checks it later. Raises UsageError if it was not read from one."""
        if not self.signed:
            raise UsageError("this receipt was made here and is not signed: keep one of an answer")
        return self.signed

    def members(self) -> dict[str, Any]:
        return {
            "enc": self.enc, "model": self.model, "prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens, "start": self.start, "end": self.end, "final": self.final,
        }  # fmt: skip

    def sign(self, key: Ed25519PrivateKey, write: jws.Write = jws.written) -> str:
        """write: as in `jws.sign`."""
        arguments.instance(key, Ed25519PrivateKey, "key")
        return jws.sign(self.members(), key, TYP, write)

    @classmethod
    def verify(cls, token: str, key: bytes, read: jws.Read = parse_object, check: Check = verifies) -> Receipt:
        """Raises InvalidMessage or InvalidSignature. key: the pool's `receipt_key` in the manifest. read, check: as in
        `jws.verify`.
        """
        arguments.instance(token, str, "token")
        arguments.instance(key, bytes, "key")
        members = RECEIPT.members(jws.verify(token, key, TYP, read, check))
        return cls(
            enc=members.text("enc"),
            model=members.text("model"),
            prompt_tokens=members.count("prompt_tokens", EXACT),
            cached_tokens=members.count("cached_tokens", EXACT),
            completion_tokens=members.count("completion_tokens", EXACT),
            start=members.time("start"),
            end=members.time("end"),
            final=members.flag("final"),
            signed=token,
        )


def of_answer(trailers: Sequence[tuple[str, str]], key: bytes, digest: bytes, max_tokens: int) -> Receipt:
    """The receipt of a whole answer: signed by the pool, for this request, final, and within the requested maximum.

    key: the pool's `receipt_key`. digest: SHA-256 of the request's `hdr ‖ enc`. max_tokens: over all choices. Raises
    InvalidReceipt.
    """
    tokens = [value for name, value in trailers if name == TRAILER]
    if len(tokens) != 1:
        raise InvalidReceipt(f"the answer has {len(tokens)} receipts instead of one: tell the pool's operator")
    try:
        receipt = Receipt.verify(tokens[0], key)
    except LacreError as exc:
        raise InvalidReceipt("the answer's receipt is not signed by the pool's receipt key: tell the pool's operator") from exc
    if receipt.enc != jws.b64u(digest) or not receipt.final:
        raise InvalidReceipt("the answer's receipt is for another request, or not for all of this one")
    if receipt.completion_tokens > max_tokens or receipt.cached_tokens > receipt.prompt_tokens:
        raise InvalidReceipt("the answer's receipt claims more tokens than the request allows: tell the pool's operator")
    return receipt


def digests_of(name: str, model: ModelEntry, pin: str | None) -> tuple[str, ...]:
    """The digests that a receipt may name for this model; empty: any. model: its entry in the manifest. pin: the caller's own.

    Raises WrongModel if the manifest names other digests than the pin.
    """
    if pin is None:
        return model.digests
    if model.sha256 and pin not in model.digests:
        raise WrongModel(
            f"the manifest names {_listed(model.digests)} for the model {name!r}, but pin_models has {pin}; nothing was sent"
        )
    return (pin,)


def check_model(receipt: Receipt, name: str, digests: Sequence[str], *, ran: bool) -> None:
    """Refuses the receipt of another model file. name: of the model that was asked. digests: see `digests_of`. ran: whether the
    model must have run; else the receipt may also name no file.

    Raises WrongModel.
    """
    if not digests or receipt.model in digests or not (ran or receipt.model):
        return
    served = repr(receipt.model[:MAX_SHOWN]) if receipt.model else "no file"
    raise WrongModel(f"the answer's receipt names {served} for the model {name!r} instead of {_listed(digests)}")


def _listed(digests: Sequence[str]) -> str:
    return digests[0] if len(digests) == 1 else f"{digests[0]} or {len(digests) - 1} more"
