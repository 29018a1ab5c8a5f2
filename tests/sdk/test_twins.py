"""The sync half of the SDK: each file is what `tools/unasync.py` writes from the async one beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

import unasync

ROOT = Path(__file__).resolve().parents[2]
SDK = ROOT / "sdk/lacre"

ASYNC = sorted(SDK.rglob("*_async.py"))


@pytest.mark.parametrize("path", ASYNC, ids=lambda path: str(path.relative_to(SDK)))
def test_a_sync_twin_is_as_generated_and_says_nothing_of_async(path: Path) -> None:
    text = unasync.twin(path).read_text()
    assert text == unasync.generated(path), "run `make generate`"
    said = text.partition("\n")[2]  # its first line names the other file
    assert not [word for word in ("await ", "_async", "aclose", "anyio", "PerLoop") if word in said]


def test_each_sync_file_has_an_async_one() -> None:
    assert sorted(map(unasync.twin, ASYNC)) == sorted(SDK.rglob("*_sync.py"))
    assert ASYNC


@pytest.mark.parametrize(
    ("asynchronous", "sync"),
    [
        ("async def f() -> AsyncIterator[int]: ...", "def f() -> Iterator[int]: ..."),
        ("await self.aclose()", "self.close()"),
        ("async with a, b: ...", "with a, b: ..."),
        ("[await anext(x) async for x in y]", "[next(x) for x in y]"),
        ("class _AsyncStream(httpx2.AsyncByteStream): ...", "class _Stream(httpx2.SyncByteStream): ..."),
        (
            "from lacre.transport.sealed_async import AsyncSealedTransport",
            "from lacre.transport.sealed_sync import SealedTransport",
        ),
        ("async_outer(dial)", "outer(dial)"),
        ('"""`await client.chat(text)`, of an `AsyncClient`."""', '"""`client.chat(text)`, of an `Client`."""'),
        ("# an async client", "# an async client"),
        ("awaited = asynchronous", "awaited = asynchronous"),
    ],
)
def test_words(asynchronous: str, sync: str) -> None:
    assert unasync.sync_text(asynchronous, "x_async.py").splitlines() == [
        "# Generated from x_async.py by tools/unasync.py: do not edit.",
        sync,
    ]
