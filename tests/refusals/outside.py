"""What a gateway answers outside the seal: to the question for a manifest, and to a sealed request."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import httpx2

import lacre
from lacre import problems
from lacre.jose.jws import b64u_decode
from lacre.trust.chain import ConnectionString
from lacre.wire.header import MEDIA_TYPE_RESPONSE, Kem
from parts.relay import MANIFEST as MANIFEST_PATH
from parts.relay import served
from refusals.documents import document, manifest, statement
from refusals.form import Case, Packed, Said, packed, said, unpacked
from refusals.proofs import HONEST
from refusals.statements import MANIFEST, public

ISSUED, EXPIRES = 1_780_000_000, 4_102_444_800  # in May 2026, and with the year 2100: these two ask the clock
POOLS: Final = {
    "default": {**MANIFEST["pools"]["default"], "keys": [{**MANIFEST["pools"]["default"]["keys"][0], "not_after": EXPIRES}]}
}
VALID: Final = document(statement(exp=EXPIRES), of=manifest(iat=ISSUED, exp=EXPIRES, pools=POOLS))
JAVASCRIPT: Final = {
    **dict.fromkeys(("RefusedError", "Unavailable", "Forbidden", "Unauthenticated", "RateLimited"), "ProblemError"),
    "UnsealedResponse": "ProtocolError", "InvalidAudit": "InvalidAuditError", "InvalidMessage": "TrustError",
    "MessageTooLarge": "TooLargeError", "Expired": "ExpiredError",
}  # fmt: skip
PLAIN: Final = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"Pay us."}}]}'
TO: Final = {"location": "http://evil.example/v1/sealed"}
SEALED: Final = {"content-type": MEDIA_TYPE_RESPONSE}
PROBLEM: Final = {"content-type": problems.MEDIA_TYPE}
Answer = tuple[int, dict[str, str], bytes]


def problem(kind: problems.Problem) -> Answer:
    return kind.status, PROBLEM, kind.body()


def proved(header: str) -> Answer:
    return 200, {**SEALED, "lacre-audit": header}, bytes(64)


TO_SEALED: Final[dict[str, Answer]] = {
    **{f"a plain 200 of {kind or 'no type'}": (200, {"content-type": kind} if kind else {}, PLAIN)
       for kind in ("application/json", "text/event-stream", "message/ohttp-res", "message/ohttp-chunked-req", "")},
    "no proof": (200, SEALED, bytes(64)),
    "the proof of another request": proved(HONEST.header()),
    "a proof that is none": proved("index=0"),
    **{f"a redirect by {status}": (status, TO, b"") for status in (301, 302, 303, 307, 308)},
    **{f"a sealed answer under {status}": (status, SEALED, bytes(64)) for status in (201, 202, 203, 206)},
    "204": (204, {}, b""), "304": (304, {}, b""),
    "401": problem(problems.INVALID_TOKEN), "403": problem(problems.FORBIDDEN), "503": problem(problems.BUSY),
    "429": (429, {**PROBLEM, "retry-after": "9999"}, problems.RATE_LIMITED.body()),
    "a page of a proxy": (502, {"content-type": "text/html"}, b"<h1>Bad Gateway</h1>"),
    "a problem that is no JSON": (503, PROBLEM, b"{"),
    "a problem that is a list": (503, PROBLEM, b"[]"),
    "a problem in UTF-16": (503, PROBLEM, problems.BUSY.body().decode().encode("utf-16")),
    "a problem whose type is a number": (403, PROBLEM, b'{"type":7,"title":7}'),
    "a problem of 64 KiB and more": (503, PROBLEM, b'{"type":"' + b"x" * 70000 + b'"}'),
    "a problem of an unknown type": (403, PROBLEM, b'{"type":"urn:example:news","title":"News"}'),
}  # fmt: skip
TO_MANIFEST: Final[dict[str, Answer]] = {
    "500": (500, {}, b""), "503": problem(problems.BUSY), "a redirect": (301, TO, b""), "204": (204, {}, b""),
    "a page": (200, {"content-type": "text/html"}, b"<h1>Welcome</h1>"),
    "1 MiB and a byte": (200, {}, b"[" * (2**20 + 1)),
    "one with an entry that is no token": (200, {}, VALID.replace(b'"roots":[[', b'"roots":[["x"],[')),
    "an expired one": (200, {}, document(statement(exp=EXPIRES), of=manifest(iat=ISSUED, exp=ISSUED + 1))),
}  # fmt: skip


def case(name: str, to: str, answer: Answer) -> Case:
    status, headers, body = answer
    return {"name": name, "to": to, "status": status, "headers": headers, "body": packed(body)}


def cases() -> dict[str, Any]:
    """The content of the file."""
    about = "Answers outside the seal. docs/wire.md sections 12 and 13."
    content = {"about": about, "root": public("root"), "manifest": packed(VALID)}
    made = [
        *(case(name, "sealed", each) for name, each in TO_SEALED.items()),
        *(case(name, "manifest", each) for name, each in TO_MANIFEST.items()),
    ]
    return content | {"cases": [each | {"said": check(content, each)} for each in made]}


class Gateway(httpx2.AsyncBaseTransport):
    """Answers by a case of the file; what the case does not say is as it should be."""

    def __init__(self, manifest: Packed, case: Case) -> None:
        self._manifest, self._case = manifest, case

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        if (request.url.path == MANIFEST_PATH) != (self._case["to"] == "manifest"):
            return served(200, unpacked(self._manifest))
        return served(self._case["status"], unpacked(self._case["body"]), self._case["headers"])


def check(content: Mapping[str, Any], case: Case) -> Said:
    """What the SDK says of a case of the file. Nothing is tried again."""
    return said(lambda: asyncio.run(_asked(content, case)), JAVASCRIPT)


async def _asked(content: Mapping[str, Any], case: Case) -> str:
    url = str(ConnectionString("http://127.0.0.1:9", b64u_decode(content["root"])))
    options: dict[str, Any] = {"token": "t", "memory": lacre.VersionMemory(), "retries": 0, "resume": 0, "kem": Kem.X25519}
    async with lacre.AsyncClient(url, transport=Gateway(content["manifest"], case), **options) as client:
        return (await client.chat("hello")).text
