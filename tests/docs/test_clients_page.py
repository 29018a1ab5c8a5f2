"""docs/clients.md says what the tests of clients recorded."""

from __future__ import annotations

from ecosystem import clients


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
