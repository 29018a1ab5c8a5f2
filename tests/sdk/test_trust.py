"""The connection string, the chain of roots, the manifest's rules, and what is remembered of versions."""

from __future__ import annotations

import itertools
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from lacre import errors, jws
from lacre.jws import b64u, raw_public_key
from lacre.manifest import Document, Manifest, Pool, PoolKey, RootStatement
from lacre.memory import Memory, VersionFile, VersionMemory, accept
from lacre.signing import sign_manifest, sign_statement
from lacre.trust import ConnectionString, verify
from lacre.wire.header import Kem
from lacre.wire.opening import PrivateKey

NOW = 1_800_000_000.0
DAY = 86400.0
ROOTS = [Ed25519PrivateKey.generate() for _ in range(4)]
SIGNER = Ed25519PrivateKey.generate()
KEY = PrivateKey.generate(3, Kem.X25519)
PINNED = raw_public_key(ROOTS[0])


def manifest(version: int = 1, *, issued: float = NOW, expires: float = NOW + DAY) -> Manifest:
    pool = Pool(("tiny",), (PoolKey(KEY.config, NOW + DAY),), bytes(32), ("none", "pad"))
    return Manifest("test", version, issued, expires, bytes(32), {"default": pool})


def statement(
    root: Ed25519PrivateKey,
    next_root: Ed25519PrivateKey | None = None,
    *,
    signer: Ed25519PrivateKey = SIGNER,
    exp: float = NOW + 9 * DAY,
) -> tuple[str, ...]:
    following = None if next_root is None else raw_public_key(next_root)
    return sign_statement(RootStatement(raw_public_key(signer), exp, following), root, next_root)


def document(*chain: Sequence[str], of: Manifest | None = None, signer: Ed25519PrivateKey = SIGNER) -> bytes:
    return Document(tuple(map(tuple, chain or [statement(ROOTS[0])])), sign_manifest(of or manifest(), signer)).encode()


class TestConnectionString:
    def test_round_trip(self) -> None:
        text = f"lacre://gw.example:8321?trust={b64u(PINNED)}"
        parsed = ConnectionString.parse(text)
        assert (parsed.base_url, parsed.root, str(parsed)) == ("https://gw.example:8321", PINNED, text)

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
    def test_clear_http_on_loopback_only(self, host: str) -> None:
        assert ConnectionString.parse(f"lacre+http://{host}:1?trust={b64u(PINNED)}").base_url == f"http://{host}:1"

    @pytest.mark.parametrize(
        "text",
        [
            "", "http://x", f"lacre://?trust={b64u(PINNED)}", "lacre://host", "lacre://host?trust=AAAA", "lacre://host?trust=%",
            f"lacre+http://10.0.0.1?trust={b64u(PINNED)}", f"lacre+http://example.com?trust={b64u(PINNED)}",
            f"lacre://u:p@host?trust={b64u(PINNED)}", f"lacre://host/path?trust={b64u(PINNED)}",
            f"lacre://host?trust={b64u(PINNED)}&trust={b64u(PINNED)}", f"lacre://host:99999?trust={b64u(PINNED)}", "lacre://[::1",
        ],
    )  # fmt: skip
    def test_refused(self, text: str) -> None:
        with pytest.raises(errors.SettingsError):
            ConnectionString.parse(text)


class TestChain:
    def test_the_manifest_comes_back_as_it_was_signed(self) -> None:
        assert verify(document(), PINNED, NOW).manifest == manifest()

    def test_three_changes_never_seen(self) -> None:
        chain = [statement(old, new) for old, new in itertools.pairwise(ROOTS)]
        trusted = verify(document(statement(ROOTS[0]), *chain), PINNED, NOW)
        assert trusted.roots == tuple(map(raw_public_key, ROOTS))

    def test_a_later_pin_ignores_the_history_before_it(self) -> None:
        chain = [statement(old, new) for old, new in itertools.pairwise(ROOTS)]
        assert verify(document(*chain), raw_public_key(ROOTS[2]), NOW).manifest.version == 1

    def test_a_new_signer(self) -> None:
        other = Ed25519PrivateKey.generate()
        chain = [statement(ROOTS[0]), statement(ROOTS[0], signer=other)]
        assert verify(document(*chain, signer=other), PINNED, NOW).manifest.version == 1
        with pytest.raises(errors.InvalidSignature):
            verify(document(*chain, signer=SIGNER), PINNED, NOW)

    @pytest.mark.parametrize(
        "chain",
        [
            [statement(ROOTS[1])],  # never announced
            [statement(ROOTS[0]), statement(ROOTS[1])],  # not announced by the old
            [statement(ROOTS[0], ROOTS[1]), statement(ROOTS[2])],  # a gap
            [statement(ROOTS[0], ROOTS[1])[:1]],  # not signed by the new
            [statement(ROOTS[0], ROOTS[1])[1:]],  # not signed by the old
            [statement(ROOTS[0], ROOTS[1]), statement(ROOTS[0])],  # the old one again, after it handed over
        ],
    )
    def test_untrusted(self, chain: list[tuple[str, ...]]) -> None:
        with pytest.raises(errors.UntrustedRoot):
            verify(document(*chain), PINNED, NOW)

    def test_signer_past_its_expiry(self) -> None:
        with pytest.raises(errors.Expired, match="signer"):
            verify(document(statement(ROOTS[0], exp=NOW)), PINNED, NOW)


class TestManifest:
    def test_expired(self) -> None:
        with pytest.raises(errors.Expired):
            verify(document(of=manifest(expires=NOW)), PINNED, NOW)

    def test_not_yet_valid(self) -> None:
        with pytest.raises(errors.Expired):
            verify(document(of=manifest(issued=NOW + 600)), PINNED, NOW)

    def test_another_type_of_statement_never_passes(self) -> None:
        token = jws.sign(manifest().members(), SIGNER, "lacre-grant+jwt")
        with pytest.raises(errors.InvalidSignature):
            verify(Document((statement(ROOTS[0]),), token).encode(), PINNED, NOW)

    def test_a_key_of_an_unknown_suite_is_passed_over(self) -> None:
        members = manifest().members()
        members["pools"]["default"]["keys"].insert(
            0, {"config": b64u(bytes.fromhex("05fffe0000000400010001")), "not_after": NOW}
        )
        token = jws.sign(members, SIGNER, "lacre-manifest+jwt")
        trusted = verify(Document((statement(ROOTS[0]),), token).encode(), PINNED, NOW)
        assert [key.config.key_id for key in trusted.manifest.pools["default"].keys] == [3]

    @given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
    def test_only_protocol_errors_escape(self, data: bytes) -> None:
        with pytest.raises((errors.ProtocolError, errors.VerificationError)):
            verify(data, PINNED, NOW)

    @given(st.integers(0, 10**6), st.integers(1, 255))
    def test_no_altered_byte_passes(self, at: int, flip: int) -> None:
        data = bytearray(document())
        data[at % len(data)] ^= flip
        try:
            trusted = verify(bytes(data), PINNED, NOW)
        except (errors.ProtocolError, errors.VerificationError):
            return
        assert trusted.manifest == manifest()  # only JSON's own white space and escapes may differ


@pytest.fixture(params=["process", "file"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Memory:
    return VersionMemory() if request.param == "process" else VersionFile(tmp_path / "manifests")


class TestMemory:
    def test_a_lower_version_is_passed_over_while_the_newer_is_valid(self, memory: Memory) -> None:
        accept(document(of=manifest(5)), PINNED, memory, NOW)
        assert accept(document(of=manifest(4)), PINNED, memory, NOW).manifest.version == 5
        assert accept(document(of=manifest(6)), PINNED, memory, NOW).manifest.version == 6

    def test_a_lower_version_is_refused_once_the_newer_has_expired(self, memory: Memory) -> None:
        accept(document(of=manifest(5, expires=NOW + 10)), PINNED, memory, NOW)
        with pytest.raises(errors.Rollback):
            accept(document(of=manifest(4)), PINNED, memory, NOW + 20)

    def test_the_same_version_with_other_bytes_is_refused(self, memory: Memory) -> None:
        accept(document(of=manifest(5)), PINNED, memory, NOW)
        with pytest.raises(errors.Rollback):
            accept(document(of=manifest(5, issued=NOW - 1)), PINNED, memory, NOW)

    def test_the_same_version_with_other_bytes_is_refused_after_its_expiry_too(self, memory: Memory) -> None:
        accept(document(of=manifest(5, expires=NOW + 10)), PINNED, memory, NOW)
        with pytest.raises(errors.Rollback):
            accept(document(of=manifest(5)), PINNED, memory, NOW + 20)

    def test_other_roots_have_memories_of_their_own(self, memory: Memory) -> None:
        accept(document(of=manifest(5)), PINNED, memory, NOW)
        other = document(statement(ROOTS[1]), of=manifest(1))
        assert accept(other, raw_public_key(ROOTS[1]), memory, NOW).manifest.version == 1


class TestVersionFile:
    def test_private_and_remembered_by_another_process(self, tmp_path: Path) -> None:
        folder = tmp_path / "manifests"
        accept(document(of=manifest(5)), PINNED, VersionFile(folder), NOW)
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())
        assert accept(document(of=manifest(4)), PINNED, VersionFile(folder), NOW).manifest.version == 5

    def test_a_damaged_file_is_no_way_back(self, tmp_path: Path) -> None:
        accept(document(of=manifest(5)), PINNED, VersionFile(tmp_path), NOW)
        next(tmp_path.glob("*.json")).write_text("{")
        with pytest.raises(errors.SettingsError, match="damaged"):
            accept(document(of=manifest(4)), PINNED, VersionFile(tmp_path), NOW)

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(errors.SettingsError, match="VersionMemory"):
            accept(document(), PINNED, VersionFile(tmp_path / "file" / "x"), NOW)

    def test_between_processes_the_newest_wins(self, tmp_path: Path) -> None:
        documents = [document(of=manifest(version)) for version in range(1, 13)]
        code = (
            "import sys; from pathlib import Path; from lacre.memory import VersionFile, accept;"
            "folder, root, now, *files = sys.argv[1:];"
            "[accept(Path(f).read_bytes(), bytes.fromhex(root), VersionFile(Path(folder)), float(now)) for f in files]"
        )
        files = []
        for number, data in enumerate(documents):
            files.append(tmp_path / f"{number}.document")
            files[-1].write_bytes(data)
        commands = [[sys.executable, "-c", code, tmp_path, PINNED.hex(), str(NOW), *files[start::3]] for start in range(3)]
        running = [subprocess.Popen(command) for command in commands]
        assert [process.wait(60) for process in running] == [0, 0, 0]
        assert accept(documents[0], PINNED, VersionFile(tmp_path), NOW).manifest.version == 12
