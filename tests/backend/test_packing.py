"""Which texts go into one batch: fair between scopes, within the batch's room, none left behind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacre.errors import UsageError
from lacre_backend.engine.packing import Packing, Room

ROOM = Room(tokens=32, texts=4)
texts = st.lists(st.tuples(st.sampled_from([None, b"a", b"b"]), st.integers(1, ROOM.tokens)), max_size=40)


@settings(deadline=None)
@given(texts=texts, dropped=st.sets(st.integers(0, 39)))
def test_every_text_is_taken_once_and_no_batch_is_too_large(texts: list[tuple[bytes | None, int]], dropped: set[int]) -> None:
    packing = Packing(ROOM)
    for i, (scope, n_tokens) in enumerate(texts):
        packing.add(str(i), n_tokens, scope)
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
    for scope in (None, b"a", b"b"):
        own = [int(i) for i in taken if texts[int(i)][0] == scope]
        assert own == sorted(own), "a scope's texts keep their order"


def test_a_thousand_texts_of_one_scope_do_not_hold_up_anothers_one() -> None:
    packing = Packing(ROOM)
    for i in range(1000):
        packing.add(f"many {i}", 8, b"a")
    packing.add("one", 8, b"b")
    assert "one" in packing.take()


def test_what_fits_no_batch_and_what_is_known_already() -> None:
    packing = Packing(ROOM)
    packing.add("x", 1, None)
    for text_id, n_tokens in (("x", 1), ("y", ROOM.tokens + 1), ("z", 0)):
        with pytest.raises(UsageError):
            packing.add(text_id, n_tokens, None)
    assert packing.take() == ["x"]
    assert not packing.drop("x")
