"""Manifests, statements, and what is remembered of them: what is written is read back, and versions only rise."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lacre import errors
from lacre.jose import jws
from lacre.jose.claims import Members
from lacre.jose.jws import b64u, b64u_decode, raw_public_key, sign
from lacre.trust.chain import verify
from lacre.trust.manifest import MANIFEST_TYP, Document, Manifest, ModelEntry, ModelKind, Pool, PoolKey, RootStatement
from lacre.trust.manifest_store import MAX_REMEMBERED, Memory, VersionFile, VersionMemory, accept
from lacre.trust.signing import sign_manifest, sign_statement
from lacre.wire.header import ALL_ALGORITHMS, Kem, KeyConfig
from parts.trust import DAY, NOW, PINNED, ROOTS, changes, document, foreign, manifest, statement

ROOT, SIGNER = (Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)) for number in (1, 2))
CHAIN = (sign_statement(RootStatement(raw_public_key(SIGNER), NOW + 1e9), ROOT),)
REFUSED = (errors.ProtocolError, errors.VerificationError)

NAMES = st.text(max_size=12)
TIMES = st.floats(0, NOW, width=32) | st.integers(0, int(NOW)).map(float)
KEYS = st.binary(min_size=32, max_size=32)


@st.composite
def configs(draw: st.DrawFn) -> KeyConfig:
    kem = draw(st.sampled_from(Kem))
    algorithms = tuple(draw(st.lists(st.sampled_from(ALL_ALGORITHMS), min_size=1, unique=True)))
    return KeyConfig(draw(st.integers(0, 255)), kem, draw(st.binary(min_size=1, max_size=4)).ljust(kem.n_pk, b"\1"), algorithms)


NAME_LISTS = st.lists(NAMES, max_size=3).map(tuple)
POOL_KEYS = st.builds(PoolKey, configs(), TIMES)
HEX = st.lists(st.text("0123456789abcdef", min_size=64, max_size=64), max_size=2).map(tuple)
COUNTS = st.none() | st.integers(1, 2**31 - 1)
WORDS = st.text("abcdefghij0123456789", min_size=1, max_size=8)
ENTRIES = st.builds(
    ModelEntry, HEX, HEX, st.none() | st.sampled_from(ModelKind), COUNTS, COUNTS, st.lists(WORDS, max_size=8).map(tuple),
    st.none() | WORDS,
)  # fmt: skip
MODELS = st.dictionaries(NAMES, ENTRIES, max_size=3)
POOLS = st.builds(Pool, MODELS, st.lists(POOL_KEYS, max_size=3).map(tuple), KEYS, NAME_LISTS)
MANIFESTS = st.builds(
    Manifest, NAMES, st.integers(0, 2**53 - 1), TIMES, TIMES.map(lambda time: time + NOW + 1), KEYS,
    st.dictionaries(NAMES, POOLS, max_size=3),
)  # fmt: skip
STATEMENTS = st.builds(RootStatement, KEYS, TIMES, st.none() | KEYS)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ENTRY = ModelEntry(("0" * 64,), ("1" * 64,))
EXAMPLE = Manifest(
    "test", 1, NOW, NOW + 1, bytes(32),
    {"default": Pool({"tiny": ENTRY}, (PoolKey(KeyConfig(1, Kem.X25519, b"\1" * 32), NOW),), bytes(32), ("pad",))},
)  # fmt: skip
MEMBERS = [
    *((name,) for name in EXAMPLE.members()),
    *(("pools", "default", name) for name in ("models", "default_model", "keys", "receipt_key", "shapes")),
    *(("pools", "default", "models", "tiny", name) for name in ("sha256", "signers")),
    *(("pools", "default", "keys", 0, name) for name in ("config", "not_after")),
]


def served(members: dict[str, Any]) -> bytes:
    return Document(CHAIN, sign(members, SIGNER, MANIFEST_TYP)).encode()


def example_and(path: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    """The example's members, and the object in them that `path` leads into."""
    members = json.loads(json.dumps(EXAMPLE.members()))
    inner = members
    for step in path[:-1]:
        inner = inner[step]
    return members, inner


@given(MANIFESTS)
@settings(deadline=None)
def test_a_manifest_is_read_back(manifest: Manifest) -> None:
    document = Document(CHAIN, sign_manifest(manifest, SIGNER))
    assert verify(document.encode(), raw_public_key(ROOT), NOW).manifest == manifest
    assert Document.parse(document.encode()) == document


@given(MANIFESTS)
@settings(deadline=None)
def test_there_is_one_way_to_write_a_manifest(manifest: Manifest) -> None:
    """Ed25519 is deterministic: the same manifest is the same bytes, so the rule of one version, one manifest, can hold."""
    again = Manifest.parse(Members(json.loads(json.dumps(manifest.members())), "the manifest"))
    assert sign_manifest(again, SIGNER) == sign_manifest(manifest, SIGNER)


@given(STATEMENTS)
def test_a_root_statement_is_read_back(statement: RootStatement) -> None:
    read = RootStatement.parse(Members(json.loads(statement.payload()), "a root statement"))
    assert read == statement
    assert read.payload() == statement.payload()


@given(st.sampled_from(MEMBERS), st.text(max_size=8).map(lambda name: f"x-{name}"), JSON)
def test_unknown_members_are_passed_over(path: tuple[Any, ...], name: str, value: object) -> None:
    members, inner = example_and(path)
    inner[name] = value
    assert verify(served(members), raw_public_key(ROOT), NOW).manifest == EXAMPLE


@pytest.mark.parametrize("path", MEMBERS, ids=lambda path: ".".join(map(str, path)))
def test_no_member_may_be_missing(path: tuple[Any, ...]) -> None:
    members, inner = example_and(path)
    del inner[path[-1]]
    with pytest.raises(errors.InvalidMessage):
        verify(served(members), raw_public_key(ROOT), NOW)


@given(st.sampled_from(MEMBERS), JSON)
@example(("ver",), True)
@example(("ver",), -1)
@example(("exp",), 10**400)
@example(("exp",), float("inf"))
@example(("pools", "default", "keys", 0, "config"), "0000")
def test_another_value_is_read_as_it_is_or_refused(path: tuple[Any, ...], value: object) -> None:
    members, inner = example_and(path)
    inner[path[-1]] = value
    try:
        manifest = verify(served(members), raw_public_key(ROOT), NOW).manifest
    except REFUSED:
        return
    again = manifest.members()
    for step in path:
        if again == []:  # the key is of a suite that the SDK does not know yet, so it was left out
            return
        again = again[step]
    assert again == value
    assert isinstance(again, bool) == isinstance(value, bool)  # which Python holds to be a number
    assert manifest.version >= 0


@given(st.binary(max_size=40), st.integers(0, 60), st.sampled_from("AQz09-_+/=. \n"))
def test_base64url_has_one_form(data: bytes, place: int, letter: str) -> None:
    text = b64u(data)
    assert b64u_decode(text) == data
    other = text[: place % (len(text) + 1)] + letter + text[place % (len(text) + 1) + 1 :]
    try:
        decoded = b64u_decode(other)
    except errors.InvalidMessage:
        return
    assert b64u(decoded) == other


TYP, SAID = "lacre-grant+jwt", {"jti": "x", "exp": 7}


def signed(header: dict[str, str], payload: bytes = b'{"jti":"x","exp":7}') -> str:
    text = f"{b64u(json.dumps(header).encode())}.{b64u(payload)}"
    return f"{text}.{b64u(SIGNER.sign(text.encode()))}"


OTHER = signed({"typ": TYP, "alg": "EdDSA"})
BOTH = pytest.mark.parametrize("token", [sign(SAID, SIGNER, TYP), OTHER], ids=["ours", "in other words"])


@BOTH
def test_a_statement_of_either_form_is_read(token: str) -> None:
    assert jws.verify(token, raw_public_key(SIGNER), TYP) == SAID
    for key, typ in ((ROOT, TYP), (SIGNER, "lacre-receipt+jwt")):
        with pytest.raises(errors.InvalidSignature):
            jws.verify(token, raw_public_key(key), typ)


@BOTH
def test_nothing_of_a_statement_may_change(token: str) -> None:
    changed = [
        token[:at] + other + token[at + 1 :]
        for at, character in enumerate(token)
        for other in {"A", "é", ".", "="} - {character}
    ]
    for bent in [*changed, *(token[:end] for end in range(len(token)))]:
        with pytest.raises(errors.LacreError):
            jws.verify(bent, raw_public_key(SIGNER), TYP)


@pytest.mark.parametrize("payload", [b"", b"[]", b"{", b"\xff"])
def test_payloads_that_say_nothing(payload: bytes) -> None:
    for header in ({"alg": "EdDSA", "typ": TYP}, {"typ": TYP, "alg": "EdDSA"}):
        with pytest.raises(errors.LacreError):
            jws.verify(signed(header, payload), raw_public_key(SIGNER), TYP)


# Remembered, in the process and on disk

FIRST, SECOND, THIRD, LAST = map(raw_public_key, ROOTS)
THIEF, STOLEN, SUCCESSOR = (Ed25519PrivateKey.generate() for _ in range(3))
OWN, CHANGES = statement(ROOTS[0]), changes()  # R0 hands over to R1, R2 and R3
WHOLE = [OWN, *CHANGES]
HANDOVER = statement(ROOTS[0], ROOTS[1], signer=THIEF)
BEFORE, AFTER = statement(ROOTS[0], signer=STOLEN), statement(ROOTS[0], signer=SUCCESSOR)
NONE = 0  # the version that is believed then: none, it is a rollback


def of(version: int, *chain: Any, signer: Any = None, **times: float) -> bytes:
    return document(*chain, of=manifest(version, **times), **({} if signer is None else {"signer": signer}))


# What is served one after the other, with the pin it is held against, and the version that is believed then; at last, when.
HISTORIES: dict[str, list[tuple[Any, ...]]] = {
    "a lower version, while the newer is valid": [(of(5), FIRST, 5), (of(4), FIRST, 5), (of(6), FIRST, 6)],
    "a lower version, once the newer has expired": [(of(5, expires=NOW + 10), FIRST, 5), (of(4), FIRST, NONE, NOW + 20)],
    "the same version with other bytes": [(of(5), FIRST, 5), (of(5, issued=NOW - 1), FIRST, NONE)],
    "the same, after its expiry": [(of(5, expires=NOW + 10), FIRST, 5), (of(5), FIRST, NONE, NOW + 20)],
    "another root has a memory of its own": [(of(5), FIRST, 5), (of(1, statement(ROOTS[1])), SECOND, 1)],
    "a pin moves to a root already met": [(of(5, *CHANGES), FIRST, 5), (of(4, *CHANGES), THIRD, 5)],
    # and what was seen does not reach to the new pin
    "a pin moves to a root never met": [(of(5), FIRST, 5), (of(4, *WHOLE), THIRD, NONE), (of(6, *WHOLE), THIRD, 6)],
    "old and new pins on one machine": [(of(5, *WHOLE), FIRST, 5), (of(7, *WHOLE), THIRD, 7), (of(6, *WHOLE), FIRST, 7)],
    # behind statements of nobody's
    "a pin moves to a root that was met": [(of(5), FIRST, 5), (of(4, *foreign(50), *CHANGES), THIRD, NONE)],
    # the second is of a trimmed chain: unrelated yet
    "lineages that turn out to be one": [
        (of(3, OWN), FIRST, 3), (of(9, WHOLE[-1]), LAST, 9), (of(8, *WHOLE), FIRST, NONE), (of(10, *WHOLE), FIRST, 10),
    ],
    "the thief of a replaced signer": [
        (of(5, BEFORE, AFTER, signer=SUCCESSOR), FIRST, 5), (of(99, BEFORE, signer=STOLEN), FIRST, 5),
        (of(99, BEFORE, signer=STOLEN, issued=NOW + DAY, expires=NOW + 2 * DAY), FIRST, NONE, NOW + DAY),
    ],
    # The last chain's last statement says what the last one seen said, but by the wrong root.
    "the thief of a replaced root": [
        (of(5, HANDOVER, statement(ROOTS[1])), FIRST, 5),
        *((of(99, *chain, signer=THIEF), FIRST, 5)
          for chain in ([statement(ROOTS[0], signer=THIEF)], [HANDOVER], [OWN, HANDOVER])),
    ],
    "a chain served short forgets no root": [
        (of(5, *CHANGES), FIRST, 5), (of(7, CHANGES[-1]), LAST, 7), (of(6, OWN), FIRST, NONE),
    ],
    "a longer chain under the same manifest": [(of(5, OWN), FIRST, 5), (of(5, *WHOLE), FIRST, 5), (of(4, *CHANGES), THIRD, 5)],
}  # fmt: skip


@pytest.fixture(params=["process", "file"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Memory:
    return VersionMemory() if request.param == "process" else VersionFile(tmp_path / "manifests")


def believed(served: bytes, memory: Memory, pin: bytes = PINNED, now: float = NOW) -> int:
    try:
        return accept(served, pin, memory, now).manifest.version
    except errors.Rollback:
        return NONE


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_versions_only_rise(memory: Memory, history: list[tuple[Any, ...]]) -> None:
    for number, (served, pin, version, *when) in enumerate(history):
        assert believed(served, memory, pin, *when) == version, f"step {number}"


class TestWaiting:
    """Nobody waits without end for another one that holds the memory, and nobody goes on without it."""

    def test_a_file_that_stays_locked(self, tmp_path: Path) -> None:
        holder = os.open(tmp_path / "seen.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(holder, fcntl.LOCK_EX)
            with pytest.raises(errors.SettingsError, match="locked the stored manifests"):
                accept(of(1), PINNED, VersionFile(tmp_path, patience=0.1), NOW)
        finally:
            os.close(holder)
        assert believed(of(1), VersionFile(tmp_path, patience=0.1)) == 1

    def test_a_thread_that_does_not_come_to_an_end(self) -> None:
        memory, entered, leave = VersionMemory(patience=0.1), threading.Event(), threading.Event()

        def stuck(_: object) -> Any:
            entered.set()
            leave.wait(60)
            raise errors.UsageError("enough")

        def hold() -> None:
            with pytest.raises(errors.UsageError):
                memory.update(stuck)

        thread = threading.Thread(target=hold)
        thread.start()
        entered.wait(60)
        with pytest.raises(errors.SettingsError, match="locked the stored manifests"):
            accept(of(1), PINNED, memory, NOW)
        leave.set()
        thread.join(60)
        assert believed(of(1), memory) == 1


class TestVersionFile:
    def test_private_and_remembered_by_another_process(self, tmp_path: Path) -> None:
        folder = tmp_path / "manifests"
        accept(of(5), PINNED, VersionFile(folder), NOW)
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())
        assert believed(of(4), VersionFile(folder)) == 5

    def test_nothing_new_writes_nothing(self, tmp_path: Path) -> None:
        for _ in range(2):  # two pins of one lineage, and another lineage
            accept(of(5, *CHANGES), FIRST, VersionFile(tmp_path), NOW)
            accept(of(5, *CHANGES), THIRD, VersionFile(tmp_path), NOW)
            accept(of(1, statement(THIEF)), raw_public_key(THIEF), VersionFile(tmp_path), NOW)
            written = (tmp_path / "seen.json").stat().st_ino
        accept(of(5, *CHANGES), THIRD, VersionFile(tmp_path), NOW)
        assert (tmp_path / "seen.json").stat().st_ino == written

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            *((text, "damaged") for text in ("{", "{}", "[{}]", "null")),
            ('[{"pin": "AA", "roots": [], "ver": "x", "document": ""}]', "damaged"),
            (" " * (MAX_REMEMBERED + 1), "bytes"),
        ],
        ids=["cut", "an object", "nothing of an entry", "null", "another form", "without end"],
    )
    def test_a_damaged_file_is_no_way_back(self, tmp_path: Path, content: str, told: str) -> None:
        accept(of(5), PINNED, VersionFile(tmp_path), NOW)
        (tmp_path / "seen.json").write_text(content)
        with pytest.raises(errors.SettingsError, match=told):
            accept(of(4), PINNED, VersionFile(tmp_path), NOW)

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(errors.SettingsError, match="VersionMemory"):
            accept(of(1), PINNED, VersionFile(tmp_path / "file" / "x"), NOW)

    def test_between_processes_the_newest_wins(self, tmp_path: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from lacre.trust.manifest_store import VersionFile, accept;"
            "folder, root, now, *files = sys.argv[1:];"
            "[accept(Path(f).read_bytes(), bytes.fromhex(root), VersionFile(Path(folder)), float(now)) for f in files]"
        )
        files = [tmp_path / f"{version}.document" for version in range(1, 13)]
        for version, file in enumerate(files, 1):
            file.write_bytes(of(version))
        commands = [[sys.executable, "-P", "-c", code, tmp_path, PINNED.hex(), str(NOW), *files[at::3]] for at in range(3)]
        running = [subprocess.Popen(command) for command in commands]
        assert [process.wait(60) for process in running] == [0, 0, 0]
        assert believed(files[0].read_bytes(), VersionFile(tmp_path)) == 12
