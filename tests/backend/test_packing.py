"""Which texts go into one batch: fair between tenants and callers, within the batch's room, none left behind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacre.errors import UsageError
from lacre_backend.engine.packing import Packing, Room
from lacre_backend.engine.turns import Fair

ROOM = Room(tokens=32, texts=4)
CALLERS: list[Fair] = [("t", "a"), ("t", "b"), ("u", "c")]
texts = st.lists(st.tuples(st.sampled_from(CALLERS), st.integers(1, ROOM.tokens)), max_size=40)


@settings(deadline=None)
@given(texts=texts, dropped=st.sets(st.integers(0, 39)))
def test_every_text_is_taken_once_and_no_batch_is_too_large(texts: list[tuple[Fair, int]], dropped: set[int]) -> None:
    packing = Packing(ROOM)
    for i, (fair, n_tokens) in enumerate(texts):
        packing.add(str(i), n_tokens, fair)
    for i in dropped:
        assert packing.drop(str(i)) == (i < len(texts))
    taken: list[str] = []
    while len(packing):
        batch = packing.take()
        assert 0 < len(batch) <= ROOM.texts
        assert sum(texts[int(i)][1] for i in batch) <= ROOM.tokens
        taken += batch
    assert packing.take() == []
    assert sorted(map(int, taken)) == [i for i in range(len(texts)) if i not in dropped]
    for fair in CALLERS:
        own = [int(i) for i in taken if texts[int(i)][0] == fair]
        assert own == sorted(own), "a caller's texts keep their order"


@pytest.mark.parametrize("callers", [1, 1000], ids=["one caller", "a caller each"])
def test_a_thousand_texts_of_one_tenant_do_not_hold_up_anothers_one(callers: int) -> None:
    packing = Packing(ROOM)
    for i in range(1000):
        packing.add(f"many {i}", 8, ("many", str(i % callers)))
    packing.add("one", 8, ("one", "one"))
    assert "one" in packing.take()


def test_long_texts_take_no_more_than_short_ones() -> None:
    """Turns are counted in tokens: four texts of 8 tokens are one of 32."""
    packing = Packing(Room(tokens=64, texts=16))
    for i in range(100):
        packing.add(f"long {i}", 32, ("long", "a"))
        packing.add(f"short {i}", 8, ("short", "b"))
    taken = [text.partition(" ")[0] for _ in range(10) for text in packing.take()]
    assert abs(32 * taken.count("long") - 8 * taken.count("short")) <= 64


def test_what_fits_no_batch_and_what_is_known_already() -> None:
    packing = Packing(ROOM)
    packing.add("x", 1)
    for text_id, n_tokens in (("x", 1), ("y", ROOM.tokens + 1), ("z", 0)):
        with pytest.raises(UsageError):
            packing.add(text_id, n_tokens)
    assert packing.take() == ["x"]
    assert not packing.drop("x")
