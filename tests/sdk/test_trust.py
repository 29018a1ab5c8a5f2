"""The connection string, the chain of roots, and the manifest's rules. What is remembered: `test_manifest`."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from lacre import errors
from lacre.jose import jws
from lacre.jose.jws import b64u, b64u_decode, raw_public_key
from lacre.trust.chain import MAX_FOREIGN, MAX_STATEMENT, ConnectionString, verify
from lacre.trust.manifest import Document, RootStatement
from lacre.trust.signing import sign_statement
from parts.chat_app import ChatApp
from parts.relay import Relay, connect, served
from parts.trust import NOW, PINNED, ROOTS, SIGNER, changes, document, foreign, manifest, signature_checks, statement

THIEF = Ed25519PrivateKey.generate()


def spaced(new: Ed25519PrivateKey) -> str:
    """The first change of root as the new root would sign it, in another form of the same JSON."""
    token = statement(ROOTS[0], new)[0]
    payload = b64u_decode(token.split(".")[1]).replace(b",", b", ")
    return jws.sign_bytes(payload, new, "lacre-root+jwt")


def holding(manifest: str) -> bytes:
    """A document of a manifest that is signed already."""
    return Document((statement(ROOTS[0]),), manifest).encode()


# A pin as the tests' own names show it: the same in every process that collects them.
WRITTEN = b64u(bytes(32))


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
            "", "http://x", f"lacre://?trust={WRITTEN}", "lacre://host", "lacre://host?trust=AAAA", "lacre://host?trust=%",
            f"lacre+http://10.0.0.1?trust={WRITTEN}", f"lacre+http://example.com?trust={WRITTEN}",
            f"lacre://u:p@host?trust={WRITTEN}", f"lacre://host/path?trust={WRITTEN}",
            f"lacre://host?trust={WRITTEN}&trust={WRITTEN}", f"lacre://host:99999?trust={WRITTEN}", "lacre://[::1",
        ],
    )  # fmt: skip
    def test_refused(self, text: str) -> None:
        with pytest.raises(errors.SettingsError):
            ConnectionString.parse(text)


class TestChain:
    def test_the_manifest_comes_back_as_it_was_signed(self) -> None:
        assert verify(document(), PINNED, NOW).manifest == manifest()

    @pytest.mark.parametrize("pin", range(4))
    def test_every_root_that_ever_was_may_be_pinned(self, pin: int) -> None:
        """Whatever stands before it is ignored, and changes never seen are followed."""
        served = document(statement(ROOTS[0]), *changes(), statement(ROOTS[-1]))
        assert verify(served, raw_public_key(ROOTS[pin]), NOW).roots == tuple(map(raw_public_key, ROOTS[pin:]))

    def test_a_client_follows_them(self) -> None:
        relay = Relay(ChatApp(), root=ROOTS[0], signer=SIGNER)
        relay.respond = lambda request: served(200, document(*changes(), of=relay.manifest())) if not request.content else None
        with connect(relay) as client:
            assert client.chat("Count.").text == "one two three"

    def test_a_new_signer(self) -> None:
        other = Ed25519PrivateKey.generate()
        chain = [statement(ROOTS[0]), statement(ROOTS[0], signer=other)]
        assert verify(document(*chain, signer=other), PINNED, NOW).manifest.version == 1
        with pytest.raises(errors.InvalidSignature):
            verify(document(*chain, signer=SIGNER), PINNED, NOW)

    @pytest.mark.parametrize(
        ("chain", "says"),
        [
            ([statement(ROOTS[1])], "pinned root"),  # never announced
            ([statement(ROOTS[0]), statement(ROOTS[1])], "gap"),  # not announced by the old
            ([statement(ROOTS[0], ROOTS[1]), statement(ROOTS[2])], "gap"),
            ([statement(ROOTS[0], ROOTS[1])[:1]], "by the new root"),
            ([statement(ROOTS[0], ROOTS[1])[1:]], "pinned root"),  # not signed by the old
            ([statement(ROOTS[0], ROOTS[1]), statement(ROOTS[0])], "gap"),  # the old one again, after it handed over
            ([(statement(ROOTS[0], ROOTS[1])[0], spaced(ROOTS[1]))], "by the new root"),  # the same members, other bytes
        ],
    )
    def test_untrusted(self, chain: list[tuple[str, ...]], says: str) -> None:
        with pytest.raises(errors.UntrustedRoot, match=says):
            verify(document(*chain), PINNED, NOW)

    @pytest.mark.parametrize(
        ("served", "error", "says"),
        [
            (document((*statement(ROOTS[0], ROOTS[1]), "x.y.z")), errors.InvalidMessage, None),
            (document((statement(ROOTS[0])[0] + "A" * MAX_STATEMENT,)), errors.MessageTooLarge, None),
            (document(statement(ROOTS[0], exp=NOW)), errors.Expired, "signer"),
            (document(of=manifest(expires=NOW)), errors.Expired, None),
            (document(of=manifest(issued=NOW + 600)), errors.Expired, None),
            (holding(jws.sign(manifest().members(), SIGNER, "lacre-grant+jwt")), errors.InvalidSignature, None),
        ],
        ids=["three signatures", "size", "signer's expiry", "expired", "not yet valid", "another type"],
    )
    def test_refused(self, served: bytes, error: type[errors.LacreError], says: str | None) -> None:
        with pytest.raises(error, match=says):
            verify(served, PINNED, NOW)


class TestForeignStatements:
    """Whoever serves a document fills its chain with what it likes; the pinned root's part of it is found all the same."""

    @pytest.mark.parametrize(
        ("chain", "roots", "checks"),
        [
            ([*foreign(900), statement(ROOTS[0])], ROOTS[:1], 12),
            ([*foreign(900), statement(ROOTS[0]), statement(ROOTS[0], exp=NOW + 1)], ROOTS[:1], 12),
            ([*foreign(900), *changes()], ROOTS[2:], 20),
            ([statement(ROOTS[0])] * 1000, ROOTS[:1], 5),
        ],
        ids=["before the pinned root", "before two of its statements", "before a change of root", "repeated"],
    )
    def test_they_cost_little(self, chain: list[tuple[str, ...]], roots: list[Ed25519PrivateKey], checks: int) -> None:
        served, pins = document(*chain), tuple(map(raw_public_key, roots))
        assert verify(served, pins[0], NOW).roots == pins
        assert signature_checks(lambda: verify(served, pins[0], NOW)) < checks

    @pytest.mark.parametrize(
        "chain",
        [
            [*foreign(450), statement(ROOTS[0]), *foreign(450)],  # a gap
            foreign(1000),
            [sign_statement(RootStatement(PINNED, NOW, PINNED), THIEF, ROOTS[0])[:1] * 2] * 1000,  # each names the pinned root
            [("AAAA.e30." + "A" * 86,) * 2] * 1000,
        ],
    )
    def test_that_lead_nowhere(self, chain: list[tuple[str, ...]]) -> None:
        served = document(*chain)

        def refused() -> None:
            with pytest.raises((errors.UntrustedRoot, errors.InvalidMessage)):
                verify(served, PINNED, NOW)

        assert signature_checks(refused) < 2 * MAX_FOREIGN + 20


class TestManifest:
    def test_a_key_of_an_unknown_suite_is_passed_over(self) -> None:
        members = manifest().members()
        unknown = {"config": b64u(bytes.fromhex("05fffe0000000400010001")), "not_after": NOW}
        members["pools"]["default"]["keys"].insert(0, unknown)
        trusted = verify(holding(jws.sign(members, SIGNER, "lacre-manifest+jwt")), PINNED, NOW)
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
