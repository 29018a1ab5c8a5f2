"""Merkle trees, signed checkpoints, and the proof of an answer: kept, read back, and held against what was sent."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st
from pymerkle import InmemoryTree
from pymerkle.proof import verify_consistency as their_consistency
from pymerkle.proof import verify_inclusion as their_inclusion

import lacre
from lacre.errors import InvalidAudit, InvalidMessage, InvalidProof, InvalidSignature, LacreError, MessageTooLarge
from lacre.evidence import audit_proof, checkpoints, merkle
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.checkpoints import Checkpoint
from lacre.jose.jws import raw_public_key
from parts import audited
from parts.bent import flipped
from parts.relay import MANIFEST, Relay, connect, served

SIZES = st.integers(1, 600)


class Tree:
    """Every complete subtree's hash, as `Frontier.grow` tells them, and the other implementation beside it."""

    def __init__(self, size: int) -> None:
        self.nodes: dict[tuple[int, int], bytes] = {}
        self.roots = [merkle.EMPTY_ROOT]
        self.theirs = InmemoryTree()
        frontier = merkle.Frontier()
        for number in range(size):
            entry = b"entry %d" % number
            self.theirs.append_entry(entry)
            for level, index, node in frontier.grow(merkle.leaf_hash(entry)):
                self.nodes[level, index] = node
            self.roots.append(frontier.root())

    def node(self, level: int, index: int) -> bytes:
        return self.nodes[level, index]

    def leaf(self, index: int) -> bytes:
        return self.nodes[0, index]


TREE = Tree(600)


def test_hashes_of_the_rfc() -> None:
    """The seven-leaf tree that RFC 6962 section 2.1.3 draws, with the leaves and hashes of the vectors in use everywhere."""
    leaves = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    roots = [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ]
    frontier = merkle.Frontier()
    for leaf, root in zip(leaves, roots, strict=True):
        for _ in frontier.grow(merkle.leaf_hash(bytes.fromhex(leaf))):
            pass
        assert frontier.root().hex() == root


@given(SIZES)
def test_roots_are_those_of_the_other_implementation(size: int) -> None:
    assert (merkle.subtree(0, size, TREE.node) if size else merkle.EMPTY_ROOT) == TREE.roots[size] == TREE.theirs.get_root(size)


@given(st.data(), SIZES)
def test_inclusion_agrees_with_the_other_implementation(data: st.DataObject, size: int) -> None:
    index = data.draw(st.integers(0, size - 1))
    path = merkle.inclusion_proof(index, size, TREE.node)
    theirs = TREE.theirs.prove_inclusion(index + 1, size)
    assert list(path) == theirs.path[1:]
    their_inclusion(TREE.leaf(index), TREE.roots[size], theirs)
    merkle.verify_inclusion(TREE.leaf(index), index, size, path, TREE.roots[size])


@given(st.data(), SIZES)
def test_consistency_agrees_with_the_other_implementation(data: st.DataObject, new: int) -> None:
    old = data.draw(st.integers(1, new))
    path = merkle.consistency_proof(old, new, TREE.node)
    merkle.verify_consistency(old, TREE.roots[old], new, TREE.roots[new], path)
    # It splits a proof otherwise than the RFC does; that both lead from one tree to the other is what they agree on.
    their_consistency(TREE.roots[old], TREE.roots[new], TREE.theirs.prove_consistency(old, new))


def test_proofs_as_the_rfc_draws_them() -> None:
    """RFC 6962 section 2.1.3: the tree of seven leaves."""
    a, b, c, d, e, f, j = map(TREE.leaf, range(7))
    g, h, i = (merkle.node_hash(*pair) for pair in ((a, b), (c, d), (e, f)))
    k, l_ = merkle.node_hash(g, h), merkle.node_hash(i, j)
    assert [merkle.consistency_proof(old, 7, TREE.node) for old in (3, 4, 6)] == [(c, d, g, l_), (l_,), (i, j, k)]
    assert [merkle.inclusion_proof(index, 7, TREE.node) for index in (0, 6)] == [(b, h, l_), (i, k)]


def bent(data: st.DataObject, path: tuple[bytes, ...]) -> list[tuple[bytes, ...]]:
    """Other paths: of another hash, shorter, longer."""
    found = [(*path, bytes(32))]
    if path:
        at = data.draw(st.integers(0, len(path) - 1))
        found += [path[:-1], (*path[:at], bytes(32), *path[at + 1 :])]
    return found


@given(st.data(), SIZES)
def test_nothing_else_is_included(data: st.DataObject, size: int) -> None:
    index, other = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
    leaf, path, root = TREE.leaf(index), merkle.inclusion_proof(index, size, TREE.node), TREE.roots[size]
    wrong = [(leaf, index, size, each, root) for each in bent(data, path)] + [
        (merkle.leaf_hash(b"another"), index, size, path, root), (leaf, index, size, path, TREE.roots[size - 1]),
        (leaf, size, size, path, root), (leaf, -1, size, path, root), (leaf, index, 2**41, path, root),
        *([(leaf, other, size, path, root)] if other != index else []),
    ]  # fmt: skip
    for case in wrong:
        with pytest.raises(InvalidProof):
            merkle.verify_inclusion(*case)


@given(st.data(), st.integers(2, 600))
def test_nothing_else_is_consistent(data: st.DataObject, new: int) -> None:
    old = data.draw(st.integers(1, new - 1))
    before, after, path = TREE.roots[old], TREE.roots[new], merkle.consistency_proof(old, new, TREE.node)
    wrong = [(old, before, new, after, each) for each in bent(data, path)] + [
        (old, bytes(32), new, after, path), (old, before, new, bytes(32), path), (new, after, old, before, path),
        (new, before, new, after, ()), (0, before, new, after, ()), (0, merkle.EMPTY_ROOT, new, after, path),
    ]  # fmt: skip
    for case in wrong:
        with pytest.raises(InvalidProof):
            merkle.verify_consistency(*case)


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_frontier_goes_on_from_where_it_stopped(size: int, more: int) -> None:
    frontier = merkle.Frontier()
    for index in range(size):
        frontier.grow(TREE.leaf(index))
    assert all(TREE.node(level, index) == node for level, index, node in frontier.nodes())
    copy = frontier.copy()
    for index in range(size, size + more):
        copy.grow(TREE.leaf(index))
    assert copy.root() == TREE.roots[size + more] and frontier.root() == TREE.roots[size]


def test_no_proof_of_what_is_not_there() -> None:
    for make in (lambda: merkle.inclusion_proof(3, 3, TREE.node), lambda: merkle.consistency_proof(4, 3, TREE.node)):
        with pytest.raises(ValueError, match=r"tree|smaller"):
            make()


def test_the_longest_path_is_within_the_bound() -> None:
    def node(level: int, index: int) -> bytes:
        return (level * 2**48 + index).to_bytes(32)

    assert len(merkle.inclusion_proof(0, merkle.MAX_LEAVES, node)) == merkle.MAX_PATH


# Checkpoints and proofs

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = raw_public_key(KEY)
ORIGIN = "gateway.example.com/audit/g1"
ENTRY = json.dumps({"kind": "intent", "enc": "abc", "subject": "alice"}).encode()


CHECKPOINT = Checkpoint(ORIGIN, 20852163, bytes(range(32, 64)))
NOTE = CHECKPOINT.sign(KEY, checkpoints.key_id(ORIGIN, PUBLIC))


def test_the_form() -> None:
    lines = NOTE.decode().split("\n")
    assert lines[:4] == [ORIGIN, "20852163", base64.b64encode(bytes(range(32, 64))).decode(), ""]
    assert lines[4].startswith(f"— {ORIGIN} ") and lines[5:] == [""]
    assert checkpoints.verify(NOTE, PUBLIC) == CHECKPOINT


def test_signatures_of_witnesses_are_passed_over() -> None:
    witness = b"\xe2\x80\x94 witness.example " + base64.b64encode(bytes(80)) + b"\n"
    assert checkpoints.verify(NOTE + witness, PUBLIC) == CHECKPOINT
    with pytest.raises(InvalidSignature, match="not signed by the expected key"):
        checkpoints.verify(CHECKPOINT.text() + b"\n" + witness, PUBLIC)


def test_extension_lines_are_signed_too() -> None:
    text = CHECKPOINT.text() + b"an extension\n"
    signature = base64.b64encode(checkpoints.key_id(ORIGIN, PUBLIC) + KEY.sign(text)).decode()
    assert checkpoints.verify(text + f"\n— {ORIGIN} {signature}\n".encode(), PUBLIC) == CHECKPOINT
    with pytest.raises(InvalidSignature):
        checkpoints.verify(text.replace(b"an ", b"no ") + f"\n— {ORIGIN} {signature}\n".encode(), PUBLIC)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *((b"20852163", size) for size in (b"20852164", b"020852163", b"-1", "٢".encode(), b"2" * 30)),
        *((b"/g1\n208", line) for line in (b"/g2\n208", b"/g1 \n208", b"/g1\r\n208")),
        (b"\n\n", b"\n"), (b"\n\n", b"\n\n\n"), (b"ICEi", b"ICEj"), (b"ICEi", b"ICEi\n\x01"),
        ("—".encode(), b"-"), ("—".encode(), b"\xff"),
    ],
)  # fmt: skip
def test_any_other_note_is_refused(old: bytes, new: bytes) -> None:
    assert old in NOTE
    with pytest.raises((InvalidMessage, InvalidSignature)):
        checkpoints.verify(NOTE.replace(old, new, 1), PUBLIC)


def test_a_note_of_another_key_or_too_long() -> None:
    other = Ed25519PrivateKey.generate()
    with pytest.raises(InvalidSignature):
        checkpoints.verify(NOTE, raw_public_key(other))
    with pytest.raises(InvalidSignature, match="does not hold"):  # it takes the id of the key that is expected
        checkpoints.verify(CHECKPOINT.sign(other, checkpoints.key_id(ORIGIN, PUBLIC)), PUBLIC)
    with pytest.raises(MessageTooLarge):
        checkpoints.verify(NOTE + NOTE * 200, PUBLIC)


@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_no_note_makes_anything_but_our_errors(data: bytes) -> None:
    for note in (data, NOTE + data, data + NOTE, NOTE[: len(data)] + data):
        with contextlib.suppress(LacreError):
            assert checkpoints.verify(note, PUBLIC) == CHECKPOINT


@given(st.integers(0, len(NOTE) * 8 - 1))
def test_every_bit_of_a_note_counts(bit: int) -> None:
    with pytest.raises(LacreError):
        checkpoints.verify(flipped(NOTE, bit // 8, bit % 8), PUBLIC)


GOOGLES = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"
NEUMANNS = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"


@pytest.mark.parametrize("published", [GOOGLES, NEUMANNS])
def test_keys_that_others_published(published: str) -> None:
    """The key id is the one that other implementations of signed notes make."""
    assert checkpoints.verifier_key(*checkpoints.parse_verifier_key(published)) == published


@pytest.mark.parametrize("text", ["", "a", "a+b", "a+00000000+AAAA", f"{GOOGLES[:24]}BAAA", GOOGLES.replace("0ae", "0af")])
def test_no_verifier_key(text: str) -> None:
    with pytest.raises(InvalidMessage):
        checkpoints.parse_verifier_key(text)


def test_a_note_that_others_signed() -> None:
    """From the documentation of Go's `note` package: a text that is no checkpoint, so its signature is held against it here."""
    text = b"If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
    _, key = checkpoints.parse_verifier_key(NEUMANNS)
    line = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
    Ed25519PublicKey.from_public_bytes(key).verify(base64.b64decode(line)[4:], text)
    with pytest.raises(InvalidMessage):
        checkpoints.verify(text + f"\n— PeterNeumann {line}\n".encode(), key)


def proof_of(entry: bytes, others: int = 6, index: int = 3, key: Ed25519PrivateKey = KEY) -> AuditProof:
    nodes, frontier = {}, merkle.Frontier()
    for number in range(others + 1):
        for level, place, node in frontier.grow(merkle.leaf_hash(entry if number == index else b"%d" % number)):
            nodes[level, place] = node
    path = merkle.inclusion_proof(index, frontier.size, lambda level, place: nodes[level, place])
    note = Checkpoint(ORIGIN, frontier.size, frontier.root()).sign(key, checkpoints.key_id(ORIGIN, raw_public_key(key)))
    return AuditProof(entry, index, path, note)


PROOF = proof_of(ENTRY)


def test_header_and_file_hold_the_same() -> None:
    assert AuditProof.parse_header(PROOF.header()) == PROOF
    assert AuditProof.parse(PROOF.text()) == PROOF
    assert PROOF.text().startswith("c2sp.org/tlog-proof@v1\nextra ")
    assert audit_proof.of_answer(PROOF.header(), [PUBLIC], {"kind": "intent", "enc": "abc", "subject": "alice"}) == PROOF


def test_a_log_of_one_entry() -> None:
    alone = proof_of(ENTRY, others=0, index=0)
    assert "path=::" in alone.header()
    assert AuditProof.parse_header(alone.header()) == alone == AuditProof.parse(alone.text())
    assert alone.verify(PUBLIC).size == 1


@pytest.mark.parametrize("entry", [b'{"model":"larger","model":"m"}', b'{"model":"m","x":{"a":1,"a":2}}', b"[]", b"{"])
def test_an_entry_with_two_readings(entry: bytes) -> None:
    with pytest.raises(InvalidAudit):
        _ = AuditProof(entry, 0, (), b"").members


def test_members_of_the_future_are_passed_over() -> None:
    assert AuditProof.parse_header(PROOF.header() + ', witness=:AAAA:, more="x"') == PROOF


@pytest.mark.parametrize(
    ("header", "expected", "told"),
    [
        (PROOF.header(), {"enc": "abd"}, "another request"),
        *((PROOF.header(), {name: value}, f"another {name}") for name, value in (
            ("subject", "bob"), ("pool", "default"), ("kind", None),
        )),
        ("", {}, "has no proof that it was recorded"),
        ("x" * (audit_proof.MAX_HEADER + 1), {}, "malformed"),
        *((PROOF.header().replace(old, new, 1), {}, "malformed") for old, new in (
            ("index=3", "index=03"), ("index=3, ", ""), ("entry=:", "entry="), ("path=:", "path=:AAAA"), (":, path", ", path"),
            ("=:", '="'),
        )),
    ],
)  # fmt: skip
def test_a_header_that_is_none_or_says_something_else(header: str, expected: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidAudit, match=told):
        audit_proof.of_answer(header, [PUBLIC], expected)


def spoiled(**members: object) -> AuditProof:
    return dataclasses.replace(PROOF, **members)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "proof",
    [
        spoiled(entry=ENTRY.replace(b"alice", b"mallo")), spoiled(index=2), spoiled(path=PROOF.path[:-1]),
        spoiled(path=(*PROOF.path, bytes(32))), spoiled(checkpoint=PROOF.checkpoint.replace(b"\n7\n", b"\n8\n")),
        proof_of(ENTRY, key=Ed25519PrivateKey.generate()), proof_of(b"not JSON"), proof_of(b"[1]"),
    ],
    ids=["entry", "index", "a shorter path", "a longer path", "checkpoint", "another key", "not JSON", "no object"],
)  # fmt: skip
def test_what_is_not_proved(proof: AuditProof) -> None:
    with pytest.raises(InvalidAudit):
        audit_proof.of_answer(proof.header(), [PUBLIC], {"enc": "abc"})


def test_a_file_that_is_too_long() -> None:
    with pytest.raises(LacreError):
        AuditProof.parse("x" * 200_000)


def test_the_largest_fits() -> None:
    """An entry as large as the gateway makes one, the longest path, and a checkpoint with the longest origin."""
    note = Checkpoint("o" * 255, merkle.MAX_LEAVES, bytes(32)).sign(KEY, bytes(4))
    largest = AuditProof(bytes(audit_proof.MAX_INTENT), merkle.MAX_LEAVES - 1, (bytes(32),) * merkle.MAX_PATH, note)
    assert len(largest.header()) <= audit_proof.MAX_HEADER
    assert AuditProof.parse_header(largest.header()) == largest


@given(st.text(max_size=300), st.integers(0, 500))
def test_nothing_else_escapes(junk: str, at: int) -> None:
    for text, parse in ((PROOF.header(), AuditProof.parse_header), (PROOF.text(), AuditProof.parse)):
        for bent in (junk, text[:at] + junk + text[at:], text[:at] + junk):
            with contextlib.suppress(LacreError):
                parse(bent).verify(PUBLIC)


def jwt_of(claims: object) -> str:
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.c2ln"


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (jwt_of({"sub": "alice", "iss": "https://issuer.example"}), {"subject": "alice", "issuer": "https://issuer.example"}),
        *((token, {}) for token in (jwt_of({"sub": 7}), jwt_of([1]), "opaque", "a.b.c", "a.é.c")),
    ],
)
def test_whom_a_token_names(token: str, expected: dict[str, str]) -> None:
    assert audit_proof.speaks_for(token) == expected


# Answers: each comes with its proof, and is refused where the proof is of anything else.

ANOTHER = Ed25519PrivateKey.generate()


def test_the_reply_keeps_it(client: lacre.Client, relay: Relay) -> None:
    reply = client.chat("Hello.")
    assert reply.audit.verify(raw_public_key(relay.gateway_key)).origin == audited.ORIGIN
    assert reply.audit.members["enc"] == reply.receipt.enc
    assert AuditProof.parse(reply.audit.text()) == reply.audit
    stream = client.chat_stream("Hello.")
    assert "".join(stream) and stream.audit.members["action"] == "chat"
    response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi."}]})
    assert response.extensions["lacre"].audit.members["enc"] == response.extensions["lacre"].receipt.enc


async def test_the_async_client_checks_it_before_anything_is_opened(async_client: lacre.AsyncClient, relay: Relay) -> None:
    reply = await async_client.chat("Hello.")
    assert reply.audit.verify(raw_public_key(relay.gateway_key)).size == 1
    relay.audit, relay.bend = (lambda _proof: None), (lambda _pieces: [b"never read"])
    with pytest.raises(lacre.InvalidAudit):
        await async_client.chat("Hello.")


@pytest.mark.parametrize(
    "changes",
    [
        {"enc": "A" * 43}, {"pool": "other"}, {"model": "larger"}, {"action": "http"}, {"max_tokens": 1}, {"shape": "none"},
        {"kem": "X25519"}, {"sealed_bytes": 7}, {"decision": "deny"}, {"kind": "outcome"},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_of_something_else(client: lacre.Client, relay: Relay, changes: dict[str, Any]) -> None:
    relay.audit = lambda proof: audited.proof({**proof.members, **changes}, relay.gateway_key)
    [name] = changes
    with pytest.raises(lacre.InvalidAudit, match="another request" if name == "enc" else f"another {name}") as raised:
        client.chat("Hello.")
    assert ("tell its operator" in str(raised.value)) == (name != "enc")  # connections may be mixed up anywhere


@pytest.mark.parametrize(
    "bend",
    [
        lambda _proof: None,
        lambda proof: dataclasses.replace(proof, path=(b"short",)),
        lambda proof: audited.proof(proof.members, ANOTHER),
        lambda proof: dataclasses.replace(proof, entry=json.dumps(proof.members, indent=1).encode()),
    ],
    ids=["missing", "malformed", "another key", "another entry"],
)
def test_no_proof(client: lacre.Client, relay: Relay, bend: Any) -> None:
    relay.audit = bend
    for ask in (client.chat, lambda question: list(client.chat_stream(question))):
        with pytest.raises(lacre.InvalidAudit):
            ask("Hello.")


class TestTheGatewaysKeyHasChanged:
    """Nobody is accused: what this side knew was old, and it looks for the new key while the answer waits."""

    @pytest.fixture(autouse=True)
    def changed(self, client: lacre.Client, relay: Relay) -> None:
        now = time.time()
        relay.clock = lambda: now  # the signer's, so that the root's statement stays the very same
        client.chat("Hello.")
        relay.gateway_key, relay.version = ANOTHER, 2

    def test_and_the_manifest_says_so(self, client: lacre.Client, relay: Relay) -> None:
        reply = client.chat("Hello.")
        assert (reply.attempts, relay.manifests) == (1, 2)
        assert reply.audit

    def test_but_the_newest_manifest_names_another(self, client: lacre.Client, relay: Relay) -> None:
        relay.version = 1
        with pytest.raises(lacre.InvalidAudit, match="does not hold"):
            client.chat("Hello.")
        assert relay.manifests == 2

    def test_and_there_is_no_manifest_to_look_into(self, client: lacre.Client, relay: Relay) -> None:
        """The call fails; the next one fetches the manifest first."""
        relay.respond = lambda request: served(404) if request.url.path == MANIFEST else None
        with pytest.raises(lacre.InvalidAudit) as raised:
            client.chat("Hello.")
        assert raised.value.remedy.startswith("Ask again")
        relay.respond = lambda _request: None
        assert client.chat("Hello.").audit


@pytest.mark.parametrize(("claims", "other"), [({"sub": "alice"}, ""), ({"sub": "bob"}, "subject"), ({"iss": "x"}, "issuer")])
def test_the_entry_names_the_tokens_bearer(relay: Relay, claims: dict[str, str], other: str) -> None:
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    with connect(relay, token=f"e30.{payload}.c2ln") as client:
        if other:
            with pytest.raises(lacre.InvalidAudit, match=f"another {other}"):
                client.chat("Hello.")
        else:
            assert client.chat("Hello.").audit.members["subject"] == "alice"
