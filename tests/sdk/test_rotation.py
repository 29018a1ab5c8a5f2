"""A client and the chain of roots that a gateway serves it: nothing is sealed where it does not lead to the signer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import lacre
from lacre import errors
from lacre.jose.jws import raw_public_key
from lacre.trust.chain import ConnectionString
from lacre.trust.manifest import Document, RootStatement
from lacre.trust.signing import sign_manifest, sign_statement
from parts.chat_app import ChatApp
from parts.relay import AsyncWire, Relay, Wire, served

LATER = [Ed25519PrivateKey.generate() for _ in range(3)]
THIEF = Ed25519PrivateKey.generate()
Key = Ed25519PrivateKey
Entry = tuple[str, ...]


class Site:
    """Signs what a relay serves."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.roots = [relay.root, *LATER]
        self.served: bytes | None = None
        relay.respond = lambda request: (
            served(200, self.served) if request.url.path == "/v1/manifest" and self.served is not None else None
        )

    def says(self, root: Key, following: Key | None = None, *, signer: Key | None = None, lives: float = 36000.0) -> Entry:
        next_root = None if following is None else raw_public_key(following)
        signer = signer or self.relay.signer
        return sign_statement(RootStatement(raw_public_key(signer), time.time() + lives, next_root), root, following)

    def handovers(self) -> list[Entry]:
        return [self.says(old, new) for old, new in itertools.pairwise(self.roots)]

    def serve(self, chain: Sequence[Entry], *, version: int = 1, signer: Key | None = None, lives: float = 3600.0) -> None:
        manifest = replace(self.relay.manifest(), version=version, expires_at=time.time() + lives)
        self.served = Document(tuple(chain), sign_manifest(manifest, signer or self.relay.signer)).encode()

    def client(self, pin: Key | None = None, memory: lacre.VersionMemory | None = None) -> lacre.Client:
        url = str(ConnectionString("http://127.0.0.1:9", raw_public_key(pin or self.relay.root)))
        return lacre.Client(url, token="t", memory=memory or lacre.VersionMemory(), transport=Wire(self.relay))

    def nothing_was_sealed(self) -> bool:
        return all(request.url.path == "/v1/manifest" for request in self.relay.requests)


@pytest.fixture
def site(app: ChatApp) -> Site:
    return Site(Relay(app))


class TestChanges:
    def test_three_changes_never_seen(self, site: Site) -> None:
        site.serve([site.says(site.relay.root), *site.handovers()])
        with site.client() as client:
            assert client.chat("Count.").text == "one two three"

    async def test_three_changes_never_seen_async(self, site: Site) -> None:
        site.serve([site.says(site.relay.root), *site.handovers()])
        memory = lacre.VersionMemory()
        async with lacre.AsyncClient(site.relay.url, token="t", memory=memory, transport=AsyncWire(site.relay)) as client:
            assert (await client.chat("Count.")).text == "one two three"

    @pytest.mark.parametrize("pin", range(4))
    def test_every_root_that_ever_was_may_be_pinned(self, site: Site, pin: int) -> None:
        site.serve([site.says(site.relay.root), *site.handovers(), site.says(LATER[-1])])
        with site.client(site.roots[pin]) as client:
            assert client.chat("Count.").text == "one two three"

    def test_a_root_that_was_never_announced(self, site: Site) -> None:
        site.serve([site.says(THIEF, signer=THIEF)], signer=THIEF)
        with site.client() as client, pytest.raises(errors.UntrustedRoot):
            client.chat("Count.")
        assert site.nothing_was_sealed()

    def test_a_root_that_the_old_one_did_not_name(self, site: Site) -> None:
        site.serve([site.says(site.relay.root), site.says(THIEF, signer=THIEF)], signer=THIEF)
        with site.client() as client, pytest.raises(errors.UntrustedRoot, match="gap"):
            client.chat("Count.")
        assert site.nothing_was_sealed()

    @pytest.mark.parametrize("missing", [1, 2])
    def test_a_chain_with_a_gap(self, site: Site, missing: int) -> None:
        chain = [site.says(site.relay.root), *site.handovers()]
        del chain[missing]
        site.serve(chain)
        with site.client() as client, pytest.raises(errors.UntrustedRoot):
            client.chat("Count.")
        assert site.nothing_was_sealed()

    def test_a_signer_past_its_expiry(self, site: Site) -> None:
        site.serve([site.says(site.relay.root, lives=-1)])
        with site.client() as client, pytest.raises(errors.Expired, match="signer"):
            client.chat("Count.")
        assert site.nothing_was_sealed()

    def test_the_signer_of_before(self, site: Site) -> None:
        successor = Ed25519PrivateKey.generate()
        site.serve([site.says(site.relay.root), site.says(site.relay.root, signer=successor)])
        with site.client() as client, pytest.raises(errors.InvalidSignature):
            client.chat("Count.")
        assert site.nothing_was_sealed()


class TestMemory:
    """Two programs of one machine, or one that starts again."""

    def test_the_thief_of_a_replaced_signer_goes_unheard(self, site: Site) -> None:
        memory, root = lacre.VersionMemory(), site.relay.root
        before, after = site.says(root, signer=THIEF), site.says(root)
        site.serve([before, after], version=2)
        with site.client(memory=memory) as client:
            assert client.chat("Count.").text
        site.serve([before], version=1000, signer=THIEF)
        with site.client(memory=memory) as client:
            assert client.chat("Count.").text  # sealed to the key of version 2, which is still good
            assert client._sealed.manifest().version == 2

    def test_a_frozen_manifest_ends_with_its_expiry(self, site: Site) -> None:
        memory, root = lacre.VersionMemory(), site.relay.root
        site.serve([site.says(root)], version=2, lives=0.6)
        with site.client(memory=memory) as client:
            client.models()
        time.sleep(0.6)
        with site.client(memory=memory) as client, pytest.raises(errors.Expired):
            client.chat("Count.")
        site.serve([site.says(root)], version=1)  # and an older one does not come back in its place
        with site.client(memory=memory) as client, pytest.raises(errors.Rollback):
            client.chat("Count.")
        assert site.nothing_was_sealed()

    def test_a_late_gateway_in_a_rolling_update_is_no_outage(self, site: Site) -> None:
        memory = lacre.VersionMemory()
        chain = [site.says(site.relay.root), *site.handovers()]
        site.serve(chain, version=7)
        with site.client(memory=memory) as client:
            client.models()
        site.serve(chain[:1], version=6)
        with site.client(memory=memory) as client:
            assert client.chat("Count.").text

    def test_a_pin_that_moves_keeps_its_memory(self, site: Site) -> None:
        memory = lacre.VersionMemory()
        chain = [site.says(site.relay.root), *site.handovers()]
        site.serve(chain, version=7, lives=0.6)
        with site.client(memory=memory) as client:
            client.models()
        time.sleep(0.6)
        site.serve(chain, version=6)
        with site.client(LATER[-1], memory) as client, pytest.raises(errors.Rollback):
            client.chat("Count.")
        assert site.nothing_was_sealed()
