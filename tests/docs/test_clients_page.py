"""docs/clients.md says what the tests of clients recorded."""

from __future__ import annotations

from ecosystem import bodies, clients


def test_it_is_what_was_recorded() -> None:
    assert clients.DOCUMENT.read_text() == clients.page(), "run `make clients`"


def test_the_engines_fill_no_cells_of_each_other() -> None:
    """A mark of one engine stands where that engine's record has the feature, and nowhere else."""
    rows = [line.split(" | ") for line in clients.page().splitlines() if line.startswith("| ")]
    cells = {row[0].removeprefix("| "): dict(zip(clients.COLUMNS, row[3:], strict=True)) for row in rows if len(row) > 9}
    for client in clients.ALL:
        for engine, mark in clients.MARKS.items():
            marked = {feature for feature, cell in cells[client.title].items() if mark in cell}
            assert marked == {feature for feature, works in clients.recorded(client, engine).items() if works}


def test_what_every_client_can_do() -> None:
    """They chat, stream, use tools and take long answers. No feature of theirs was left untried."""
    for client in clients.ALL:
        seen = clients.recorded(client, "scripted")
        assert {"chat", "stream", "tools", "long"} <= {feature for feature, works in seen.items() if works}, client.title
        assert set(seen) == set(client.features) - {"embeddings"}, client.title


def test_what_every_client_sent_was_recorded() -> None:
    assert {file.stem for file in bodies.FOLDER.glob("*.json")} == {client.environment for client in clients.ALL}
