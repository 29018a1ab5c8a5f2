"""Which keys of a pool the manifest lists, which are due to go, and which key ids are free."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacre.errors import SettingsError
from lacre.trust.chain import MAX_FUTURE
from lacre.wire.header import Aead, Kdf, Kem, KeyConfig
from lacre_fabric.keys.generations import KEY_IDS, MAX_DRAIN, Generations

NOW = 1_800_000_000.0
DAY = 86400.0


def config(key_id: int, mark: int = 0) -> KeyConfig:
    return KeyConfig(key_id, Kem.X25519, mark.to_bytes(32, "big"), ((Kdf.HKDF_SHA256, Aead.AES_256_GCM),))


def rotated(generations: Generations, *ids: int, now: float, grace: float = 100.0) -> Generations:
    return generations.stage([config(key_id, int(now)) for key_id in ids]).list_staged(now, grace).published(now)


def listed(generations: Generations, now: float) -> list[tuple[int, float]]:
    return [(key.config.key_id, key.not_after) for key in generations.pool_keys(now, now + 7 * DAY)]


def test_the_new_generation_is_listed_first_and_a_staged_key_not_at_all() -> None:
    generations = rotated(rotated(Generations(), 1, 2, now=NOW - DAY), 3, 4, now=NOW).stage([config(5)])
    assert listed(generations, NOW) == [(3, NOW + 7 * DAY), (4, NOW + 7 * DAY), (1, NOW + 100), (2, NOW + 100)]
    assert generations.staged is not None
    assert generations.current is not None
    assert (generations.staged.ids, generations.current.ids) == ((5,), (3, 4))
    only = rotated(Generations(), 1, now=NOW).stage([config(2)])
    assert not only.published(NOW + 1).retirement_due(NOW + DAY)


def test_the_old_one_leaves_and_is_destroyed_after_the_queue_has_emptied() -> None:
    generations = rotated(rotated(Generations(), 1, now=NOW - DAY), 2, now=NOW)
    assert not generations.retirement_due(NOW + 99)
    assert generations.leaving(NOW + 100)
    assert generations.to_destroy(NOW + DAY) == ()  # not while the fabric may still have a manifest with it
    generations = generations.published(NOW + 100)
    assert listed(generations, NOW + 100) == [(2, NOW + 100 + 7 * DAY)]
    assert not generations.retirement_due(NOW + 100 + MAX_DRAIN - 1)
    (gone,) = generations.to_destroy(NOW + 100 + MAX_DRAIN)
    assert gone.ids == (1,)
    after = generations.destroyed(gone, NOW + 200, DAY)
    assert [one.ids for one in after.live] == [(2,)]
    assert not after.retirement_due(NOW + 10 * DAY)


@pytest.mark.parametrize(("grace", "drain"), [(0.0, 0.0), (3.0, 3.0), (1000.0, MAX_DRAIN)])
def test_who_wants_it_gone_soon_does_not_wait_for_the_queue(grace: float, drain: float) -> None:
    generations = rotated(rotated(Generations(), 1, now=NOW - DAY), 2, now=NOW, grace=grace).published(NOW + grace)
    assert bool(generations.to_destroy(NOW + grace + drain))
    assert drain == 0 or not generations.to_destroy(NOW + grace + drain - 1)


def test_another_rotation_shortens_a_grace_and_never_lengthens_it() -> None:
    generations = rotated(rotated(Generations(), 1, now=NOW - DAY), 2, now=NOW, grace=100)
    assert listed(rotated(generations, 3, now=NOW + 50, grace=1000), NOW + 50)[-1] == (1, NOW + 100)
    assert listed(rotated(generations, 3, now=NOW + 50, grace=10), NOW + 50)[-1] == (1, NOW + 60)


def test_a_key_id_is_free_again_when_no_manifest_with_it_can_be_in_use() -> None:
    generations = rotated(rotated(Generations(), 254, now=NOW - DAY), 255, now=NOW, grace=0)
    (gone,) = generations.to_destroy(NOW)
    generations = generations.destroyed(gone, NOW, DAY)
    free_at = NOW + DAY + MAX_FUTURE
    assert generations.free_ids(3, NOW) == (1, 2, 3)
    assert len(generations.free_ids(253, NOW)) == 253
    assert 254 in generations.free_ids(254, free_at)
    with pytest.raises(SettingsError, match="wait"):
        generations.free_ids(254, free_at - 1)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1500), st.floats(0, 3600))
def test_no_manifest_in_use_names_an_id_with_another_key(wait: float, grace: float) -> None:
    """Far more rotations than there are ids: whoever holds a manifest seals to the key that the id stands for now."""
    generations, now = rotated(Generations(), 1, 2, now=NOW), NOW
    promised: dict[int, tuple[KeyConfig, float]] = {}  # by key id: what a manifest said, and when the last one expires
    for _ in range(300):
        now += wait
        try:
            ids = generations.free_ids(2, now)
        except SettingsError:
            continue
        assert set(ids) <= set(KEY_IDS)
        generations = rotated(generations, *ids, now=now, grace=grace)
        for key in generations.pool_keys(now, now):
            said, until = promised.get(key.config.key_id, (key.config, 0.0))
            assert said == key.config or until <= now
            promised[key.config.key_id] = (key.config, now + DAY)
        for gone in generations.to_destroy(now):
            generations = generations.destroyed(gone, now, DAY)
    assert Generations.parse(generations.encode()) == generations


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'{"live": [], "spent": {}}', b'{"live": [{}], "spent": {}, "last_id": 1}',
     b'{"live": [], "spent": [], "last_id": 1}', b'{"live": [{"configs": ["AA"]}], "spent": {}, "last_id": 1}'],
)  # fmt: skip
def test_what_was_not_written_here(data: bytes) -> None:
    with pytest.raises(ValueError, match="generations"):
        Generations.parse(data)
