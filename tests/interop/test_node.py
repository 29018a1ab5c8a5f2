"""The npm package `lacre`, written from docs/wire.md, against the Python side as it really opens and seals."""

from __future__ import annotations

import json
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import cryptography_vectors
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.evidence import checkpoints, merkle
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.checkpoints import Checkpoint
from lacre.exchange.affinity import affinity_of
from lacre.jose.jws import raw_public_key
from lacre.trust.manifest import ModelEntry
from parts import audited
from parts.bent import flipped, swapped, without
from parts.chat_app import ChatApp
from parts.live import Gateway, serving
from parts.node_chat import FORBIDDEN, INTEROP, KEMS, NODE, NPM, ONCE, chat, command, environment, problem, responding
from parts.relay import MANIFEST, SEALED, Relay, served

PACKAGE = INTEROP.parents[1] / "sdk" / "javascript"

pytestmark = pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed")


def node(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(NODE), *args], cwd=INTEROP, capture_output=True, text=True, check=False)


def test_the_lock_names_no_host() -> None:
    assert "://" not in (PACKAGE / "package-lock.json").read_text()


PUBLISHED = sorted(path.stem for path in (INTEROP.parents[1] / "docs" / "vectors").glob("*.json"))
HPKE = Path(cryptography_vectors.__file__).parent / "HPKE"
OFFICIAL = ("official.mjs", str(HPKE / "test-vectors.json"), str(HPKE / "hpke-pq-test-vectors.json"))


@pytest.mark.parametrize(
    ("command", "said", "times"),
    [
        *((("vectors.mjs", name), "ok ", 16) for name in PUBLISHED),
        pytest.param(OFFICIAL, "HPKE: 4 vectors", 1, id="official vectors"),
        pytest.param(("--test", "--test-reporter=tap"), "", 1, id="rules that no exchange shows"),
    ],
)
def test_programs(command: tuple[str, ...], said: str, times: int) -> None:
    done = node(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(said) >= times


@pytest.mark.parametrize("kem", KEMS)
async def test_a_sealed_chat(kem: str) -> None:
    app = ChatApp()
    ran = await chat(app=app, kem=kem, body={"user": "ada", "max_tokens": 512})
    assert ran.pieces == ["one ", "two ", "three"]
    assert ran.totals is not None
    info = ran.totals["info"]
    [part] = info["parts"]
    assert (part["kem"], part["receipt"]["completion_tokens"], info["attempts"]) == (KEMS[kem].label, 3, 1)
    assert part["audit"]["entry"]["decision"] == "allow"

    manifest, sealed = ran.gateway.relay.requests
    assert "authorization" not in manifest.headers
    expected = {
        "authorization": "Bearer t0ken", "content-type": "message/ohttp-chunked-req", "accept": "message/ohttp-chunked-res",
        "incremental": "?1", "lacre-pool": "default", "lacre-model": "tiny", "lacre-action": "chat",
        "lacre-max-tokens": "512", "lacre-shape": "pad",
    }  # fmt: skip
    of_http = {"host", "connection", "content-length", "accept-encoding", "accept-language", "sec-fetch-mode", "user-agent"}
    of_http |= {"cache-control", "pragma"}
    said = {name: value for name, value in sealed.headers.items() if name not in of_http}
    salt = dict(app.scopes[0]["headers"])[b"lacre-cache-salt"].decode()
    beginning = json.dumps([[None, None], json.loads(app.bodies[0])["messages"]], separators=(",", ":")).encode()
    assert said == {**expected, "lacre-affinity": affinity_of(salt, "default", "tiny", beginning)}
    assert b"Baltic" not in sealed.content
    assert len(sealed.content) == {"xwing": 5240, "x25519": 4152}[kem]
    asked = json.loads(app.bodies[0])
    assert asked["messages"] == [{"role": "user", "content": "How many Baltic states?"}]
    assert (asked["model"], asked["max_tokens"], asked["stream"]) == ("tiny", 512, True)
    inner = {name.decode() for name, _value in app.scopes[0]["headers"]}
    assert "user" not in asked
    assert inner == {
        "content-type", "accept", "date", "lacre-cache-salt", "lacre-resume",
        "lacre-pool", "lacre-model", "lacre-action", "lacre-max-tokens", "lacre-shape",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "body"),
    [({"affinity": False}, {}), ({}, {"messages": [{"role": "system", "content": "x"}]})],
    ids=["off", "no-user"],
)
async def test_an_affinity_is_not_always_said(options: dict[str, Any], body: dict[str, Any]) -> None:
    ran = await chat(options, body)
    assert ran.code == 0
    assert "lacre-affinity" not in ran.gateway.relay.requests[-1].headers


@pytest.mark.parametrize("kem", KEMS)
async def test_pieces_come_out_while_the_answer_is_still_sealed(kem: str) -> None:
    """The record of the second piece leaves the server only when the client has printed the first."""
    seen = anyio.Event()

    async def before(i: int) -> None:
        if i == 3:
            await seen.wait()

    async with serving(Gateway(Relay(ChatApp(), kem=KEMS[kem]), before)) as gateway:
        asking = command({"kems": [kem]})
        async with await anyio.open_process(asking, cwd=INTEROP, env=environment(gateway.url)) as process:
            assert process.stdout is not None
            out = b""
            while b"\n" not in out:
                out += await process.stdout.receive()
            assert json.loads(out.splitlines()[0]) == {"piece": "one "}
            assert b"done" not in out
            seen.set()
            async for more in process.stdout:
                out += more
            assert await process.wait() == 0
    assert json.loads(out.splitlines()[-1])["done"] is True


BENT = {
    "the last chunk is left out": (without, "TruncatedError"),
    "the answer stops inside a record": (lambda pieces: [*pieces[:2], pieces[2][:5]], "TruncatedError"),
    "a record is altered": (lambda pieces: [*pieces[:2], flipped(pieces[2]), *pieces[3:]], "AlteredError"),
    "the last chunk is altered": (lambda pieces: [*pieces[:-1], flipped(pieces[-1])], "AlteredError"),
    "two records are swapped": (lambda pieces: swapped(pieces, 2, 3), "AlteredError"),
    "a record is left out": (lambda pieces: without(pieces, 2), "AlteredError"),
    "a record comes twice": (lambda pieces: [*pieces[:3], *pieces[2:]], "AlteredError"),
    "a byte is added": (lambda pieces: [*pieces, b"\0"], "AlteredError"),
    "a record is announced too long": (lambda pieces: [*pieces[:2], b"\x80\x00\x40\x11"], "TooLargeError"),
}


@pytest.mark.parametrize("kem", KEMS)
@pytest.mark.parametrize("how", BENT)
async def test_a_bent_answer_is_an_error(kem: str, how: str) -> None:
    bend, error = BENT[how]
    ran = await chat(ONCE, kem=kem, bend=bend)
    assert (ran.code, ran.error["error"]) == (1, error)
    assert ran.pieces == ["one ", "two ", "three"][: len(ran.pieces)]
    assert ran.paths == [MANIFEST, SEALED], "nothing is tried again after the first record"


NAMED = ModelEntry(sha256=("77" * 32,))
UNNAMED = ModelEntry()
BAD_RECEIPT = "InvalidReceiptError"


@pytest.mark.parametrize(
    ("receipts", "entry", "error"),
    [
        pytest.param(lambda receipt: [], UNNAMED, BAD_RECEIPT, id="none"),
        pytest.param(lambda receipt: [receipt, receipt], UNNAMED, BAD_RECEIPT, id="two"),
        pytest.param(lambda receipt: [replace(receipt, enc=receipt.enc[::-1])], UNNAMED, BAD_RECEIPT, id="of another"),
        pytest.param(lambda receipt: [replace(receipt, final=False)], UNNAMED, BAD_RECEIPT, id="not final"),
        pytest.param(lambda receipt: [replace(receipt, completion_tokens=5000)], UNNAMED, BAD_RECEIPT, id="above the ceiling"),
        pytest.param(lambda receipt: [receipt], NAMED, "WrongModelError", id="another file"),
    ],
)
async def test_a_wrong_receipt_is_an_error_at_the_end(receipts: Any, entry: ModelEntry, error: str) -> None:
    ran = await chat(receipts=receipts, entry=entry)
    assert ran.error["error"] == error
    assert ran.error["remedy"]
    assert ran.paths == [MANIFEST, SEALED]


async def test_a_pinned_file_that_the_manifest_does_not_name() -> None:
    ran = await chat({"pinModels": {"tiny": "sha256:" + "66" * 32}}, entry=NAMED)
    assert (ran.error["error"], ran.paths) == ("WrongModelError", [MANIFEST])


def moved(proof: AuditProof) -> AuditProof:
    return replace(proof, index=1)


def of_another_key(proof: AuditProof) -> AuditProof:
    return audited.proof(proof.members, Ed25519PrivateKey.generate())


@pytest.mark.parametrize("audit", [lambda proof: None, moved, of_another_key])
async def test_an_answer_without_its_proof_is_not_opened(audit: Any) -> None:
    ran = await chat(audit=audit)
    assert (ran.pieces, ran.error["error"]) == ([], "InvalidAuditError")
    assert ran.paths == [MANIFEST, SEALED, MANIFEST], "the gateway's key may have changed: it asks once"


@pytest.mark.parametrize(
    "member", ["enc", "pool", "model", "action", "max_tokens", "shape", "kem", "sealed_bytes", "decision", "kind"]
)
async def test_a_proof_of_another_request_is_refused(member: str) -> None:
    made: list[Relay] = []

    def bent(proof: AuditProof) -> AuditProof:
        return audited.proof(dict(proof.members) | {member: 7}, made[0].gateway_key)

    made.append(Relay(ChatApp(), audit=bent))
    await refused(made[0])


async def test_a_signed_entry_that_repeats_a_member_is_refused() -> None:
    """Another reader of the log would take the first one."""
    made: list[Relay] = []

    def bent(proof: AuditProof) -> AuditProof:
        entry, key = b'{"kind": "event", ' + proof.entry[1:], made[0].gateway_key
        identity = checkpoints.key_id(audited.ORIGIN, raw_public_key(key))
        note = Checkpoint(audited.ORIGIN, 1, merkle.leaf_hash(entry)).sign(key, identity)
        return AuditProof(entry, 0, (), note)

    made.append(Relay(ChatApp(), audit=bent))
    await refused(made[0])


async def refused(relay: Relay) -> None:
    """The package opens nothing of an answer with this proof."""
    async with serving(Gateway(relay)) as gateway:
        done = await anyio.run_process(command(), cwd=INTEROP, env=environment(gateway.url), check=False)
    assert json.loads(done.stderr)["error"] == "InvalidAuditError"
    assert not done.stdout


class Cut(Exception):
    """Ends an answer by breaking its connection."""


async def cut(i: int) -> None:
    if i == 3:
        raise Cut


def closed(url: str) -> str:
    """The gateway's url, on a port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"lacre+http://127.0.0.1:{listener.getsockname()[1]}?{url.partition('?')[2]}"


def another_root(url: str) -> str:
    return f"{url.partition('?')[0]}?{Relay(ChatApp()).url.partition('?')[2]}"


FAILS: dict[str, tuple[dict[str, Any], dict[str, str], list[str]]] = {
    "its connection breaks": ({"before": cut}, {"error": "TruncatedError"}, [MANIFEST, SEALED]),
    "there is no server": ({"url": closed}, {"error": "NetworkError"}, []),
    "its root is another": ({"url": another_root}, {"error": "UntrustedRootError"}, [MANIFEST]),
    "a redirect": (
        responding(served(307, b"", {"location": "/v1/elsewhere"})), {"error": "ProblemError"}, [MANIFEST, SEALED],
    ),
    "a refusal": (responding(problem(403, FORBIDDEN)), {"error": "ProblemError", "type": FORBIDDEN}, [MANIFEST, SEALED]),
    "another media type": (
        responding(served(200, b"{}", {"content-type": "application/json"})), {"error": "ProtocolError"}, [MANIFEST, SEALED],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FAILS)
async def test_a_failure_is_told_and_nothing_more_is_sent(what: str) -> None:
    how, error, paths = FAILS[what]
    ran = await chat(ONCE, **how)
    assert ran.error == {**ran.error, **error}
    assert ran.error["remedy"]
    assert ran.paths == paths
