"""What keeps a worker from working: each thing by its name, and nothing where all is well."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import NetworkError
from lacre.jose.jws import raw_public_key
from lacre.trust.manifest import Document, Manifest, ModelEntry, Pool, PoolKey, RootStatement, fingerprint
from lacre.trust.signing import sign_manifest, sign_statement
from lacre.wire.header import Kem
from lacre.wire.opening import PrivateKey
from lacre_backend.node.claims_probe import CLOCK, FAILURES, ClaimsProbe
from lacre_backend.node.readiness import Holding, Readiness, Reason, against, alive
from lacre_backend.settings import Upstream
from lacre_backend.upstream.origins import Origins
from lacre_backend.upstream.probe import Probe
from lacre_fabric.nats.manifest_feed import ManifestFeed
from lacre_fabric.operate.nats_server import free_port
from parts.behind import saying

NOW = 1_800_000_000.0
CLASSIC, OLD, FOREIGN = (PrivateKey.generate(key_id, Kem.X25519).config for key_id in (1, 3, 1))
XWING = PrivateKey.generate(2, Kem.XWING).config
KEYS = (PoolKey(XWING, NOW + 1000), PoolKey(CLASSIC, NOW + 1000), PoolKey(OLD, NOW - 1))
POOL = Pool(dict.fromkeys(("m1", "m2"), ModelEntry()), KEYS, b"r" * 32, ("none",))
OTHER = dataclasses.replace(POOL, receipt_key=b"o" * 32, keys=(PoolKey(FOREIGN, NOW + 1000),))
MANIFEST = Manifest("https://issuer.example", 1, NOW - 60, NOW + 600, b"g" * 32, {"a": POOL, "b": OTHER})
HELD = Holding("a", ("m1",), frozenset({fingerprint(XWING), fingerprint(CLASSIC)}), b"r" * 32)


@pytest.mark.parametrize(
    ("changed", "at", "kind", "said"),
    [
        ({}, NOW, None, ""),  # though it lacks a key that nobody should seal to any more
        ({"receipt_key": b"o" * 32}, NOW, "receipt_key", "it is pool b's"),
        ({"receipt_key": b"x" * 32}, NOW, "receipt_key", "the manifest has no pool with it"),
        ({"keys": frozenset({fingerprint(FOREIGN)})}, NOW, "keys", "none of the keys"),
        ({"keys": frozenset()}, NOW, "keys", "none of the keys"),
        ({"keys": frozenset({fingerprint(CLASSIC)})}, NOW, "keys", "not the keys 2"),
        ({}, NOW + 1000, "manifest", "expired"),
        ({}, NOW + 600, "manifest", "expired"),
        ({"pool": "c"}, NOW, "pool", "no pool c, but: a, b"),
        ({"models": ("m1", "m3")}, NOW, "model", "m3"),
    ],
)
def test_each_thing_has_its_name(changed: dict[str, object], at: float, kind: str | None, said: str) -> None:
    reasons = against(MANIFEST, dataclasses.replace(HELD, **changed), at)
    assert [reason.kind for reason in reasons] == ([kind] if kind else [])
    assert all(said in reason.detail and reason.remedy for reason in reasons)


FILE, OTHER_FILE = "1" * 64, "2" * 64


@pytest.mark.parametrize(
    ("named", "held", "said"),
    [
        ((), {"m1": f"sha256:{FILE}"}, None), ((FILE,), {"m1": f"sha256:{FILE}"}, None),
        ((OTHER_FILE, FILE), {"m1": f"sha256:{FILE}"}, None), ((), {}, None),
        ((OTHER_FILE,), {"m1": f"sha256:{FILE}"}, f"(sha256:{FILE})"), ((FILE,), {}, "(no file)"),
    ],
)  # fmt: skip
async def test_a_file_that_the_manifest_does_not_name(named: tuple[str, ...], held: dict[str, str], said: str | None) -> None:
    pool = dataclasses.replace(POOL, models={"m1": ModelEntry(named), "m2": ModelEntry()})
    manifest = dataclasses.replace(MANIFEST, pools={"a": pool})
    holding = dataclasses.replace(HELD, models=("m1", "m2"), digests=held)
    assert [said is not None and said in reason.detail for reason in against(manifest, holding, NOW)] == (
        [True] if said else []
    )
    assert (await readiness(manifest, held=holding)).models() == ({"m2"} if said else {"m1", "m2"})


def test_a_pool_whose_keys_are_all_over() -> None:
    [reason] = against(dataclasses.replace(MANIFEST, expires_at=NOW + 9999), HELD, NOW + 1000)
    assert (reason.kind, reason.model) == ("keys", None)


ROOT, SIGNER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
STATEMENT = sign_statement(RootStatement(raw_public_key(SIGNER), NOW + 1e6), ROOT)


async def readiness(
    manifest: Manifest | None = MANIFEST, *, root: Ed25519PrivateKey = ROOT, parts: Any = (), now: float = NOW,
    held: Holding = HELD,
) -> Readiness:  # fmt: skip
    async def fetch() -> bytes | None:
        return None if manifest is None else Document((STATEMENT,), sign_manifest(manifest, SIGNER)).encode()

    feed = ManifestFeed(fetch, raw_public_key(root), clock=lambda: now, poll=3600)
    await feed.start()
    await feed.close()
    found = Readiness(lambda: held, [lambda part=part: part for part in parts], clock=lambda: now)
    found.follow(feed)
    return found


async def test_a_wrong_trust_and_a_manifest_that_is_not_there() -> None:
    assert (await readiness(MANIFEST)).models() == {"m1"}
    for found, kind in (
        (await readiness(MANIFEST, root=Ed25519PrivateKey.generate()), "trust"),
        (await readiness(None), "manifest"),
        (await readiness(MANIFEST, now=NOW + 601), "manifest"),
        (await readiness(dataclasses.replace(MANIFEST, issued_at=NOW + 9999, expires_at=NOW + 99999)), "manifest"),
        (Readiness(lambda: HELD), "manifest"),
    ):
        assert (found.kinds(), found.models()) == ([kind], frozenset())
        assert all(reason.remedy for reason in found.reasons())


async def test_what_else_counts_whatever_the_manifest_says() -> None:
    found = await readiness(held=dataclasses.replace(HELD, models=("m1", "m3")))
    assert (found.models(), found.kinds()) == ({"m1"}, ["model"]), "an unknown model takes none of the others down"
    found = await readiness(parts=(None, Reason("upstream", "down", "start it")))
    assert (found.models(), found.kinds()) == (frozenset(), ["upstream"])


class Mortal:
    died = stuck = False


@pytest.mark.parametrize("how", ["died", "stuck"])
def test_a_dead_or_stuck_thread(how: str) -> None:
    engine, app = Mortal(), Mortal()
    look = alive(app, engine)
    assert look() is None
    setattr(engine, how, True)
    assert (look() or Reason("", "", "")).kind == "engine"


# Claims and clock


async def looked(answers: list[float | Exception | None], clock: Callable[[], float] = lambda: NOW) -> Reason | None:
    async def claim() -> float | None:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    probe = ClaimsProbe(claim, clock=clock)
    while answers:
        await probe.look()
    return probe.reason()


async def test_claims_that_cannot_be_written() -> None:
    lost = NetworkError("NATS refuses: maximum bytes exceeded")
    assert await looked([NOW, lost]) is None, "one may fail while a leader is elected"
    reason = await looked([NOW, *[lost] * FAILURES])
    assert reason is not None and reason.kind == "claims" and "maximum bytes" in reason.detail
    assert await looked([*[lost] * 5, NOW]) is None
    assert await looked([None]) is None


@pytest.mark.parametrize(
    ("ahead", "said"), [(0, None), (CLOCK - 1, None), (1 - CLOCK, None), (CLOCK + 1, "ahead"), (-CLOCK - 1, "behind")]
)
async def test_a_clock_that_is_off(ahead: float, said: str | None) -> None:
    reason = await looked([NOW - ahead])
    assert reason is None if said is None else reason.kind == "clock" and said in reason.detail


# An upstream


def probe(port: int, **settings: str) -> Probe:
    models = [{"name": "m1", "allow": ["POST /v1/chat/completions"]}]
    upstream = Upstream.model_validate({"origin": f"http://127.0.0.1:{port}", "models": models, **settings})
    return Probe(upstream, Origins(upstream))


async def test_an_upstream_that_is_down_and_comes_back() -> None:
    looking = probe(port := free_port())
    assert looking.reason() is not None, "before it was looked at, nothing is known"
    for up in (False, True, False):
        if up:
            async with saying(b"", port):
                await looking.look()
        else:
            await looking.look()
        reason = looking.reason()
        assert reason is None if up else reason.kind == "upstream" and str(port) in reason.detail
    await looking.close()


@pytest.mark.parametrize(
    ("answer", "ready"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", True),
        (b"HTTP/1.1 503 Loading\r\ncontent-length: 0\r\n\r\n", False),
        (b"HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n", False),
        (b"nonsense\r\n\r\n", False),
        (b"", False),
    ],
)
async def test_an_upstream_that_listens_must_also_answer_where_that_is_asked(answer: bytes, ready: bool) -> None:
    async with saying(answer) as port:
        looking = probe(port, health="/health")
        await looking.look()
        assert (looking.reason() is None) is ready
        await looking.close()
        plain = probe(port)
        await plain.look()
        assert plain.reason() is None
        await plain.close()
