"""Writes the tables of `docs/threat-model.md` from the attacks and the mutations themselves: `python -m hostile.table`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from hostile.attacks import ADVERSARIES, every
from hostile.mutations import MUTATIONS, ROOT

DOCUMENT: Final = ROOT / "docs/threat-model.md"
BEGIN, END = "<!-- from here on written by `make threat-model` -->\n", "<!-- to here -->\n"


def rendered() -> str:
    """What stands between the two comments."""
    return "\n".join([*attacks(), *defences()])


def attacks() -> Iterator[str]:
    for adversary, description in ADVERSARIES.items():
        rows = [(test, attack) for test, attack in every().items() if attack.by == adversary]
        yield f"### {description}\n"
        yield "| attack | defence | outcome | test |\n|---|---|---|---|"
        for test, attack in rows:
            name = test.removeprefix("tests/hostile/").replace(".py::test_", ": ").removeprefix("test_")
            yield f"| {attack.name} | {attack.defence} | {attack.outcome} | {name} |"
        yield ""


def defences() -> Iterator[str]:
    attack = every()
    yield "### Defences, and the attack that succeeds without each\n"
    yield "| defence | in | attack that succeeds without it |\n|---|---|---|"
    for mutation in MUTATIONS:
        yield f"| {mutation.defence} | `{mutation.place}` | {attack[f'tests/hostile/{mutation.test}'].name} |"
    yield ""


def with_tables(document: str) -> str:
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{rendered()}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
