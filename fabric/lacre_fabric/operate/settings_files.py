"""Settings files (TOML) that a program writes and a person edits: what the person wrote stays.

Rules
- A new file gets everything. In a file that is there, only the given values change: comments, order, other keys and tables
  stay, and a default that somebody removed stays away.
- A file that cannot be read is damaged, and is not overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from lacre.errors import SettingsError
from lacre_fabric.keys.secret_files import write_secret

Values = Mapping[str, object]


def read(path: Path) -> tomlkit.TOMLDocument | None:
    """None where there is no file. Raises SettingsError for a damaged one."""
    try:
        return tomlkit.parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TOMLKitError) as exc:
        raise SettingsError(f"{path} is damaged ({exc}): correct it, or remove it and lose what it says") from exc


def opened(path: Path) -> tuple[tomlkit.TOMLDocument, bool]:
    """The file's document, or an empty one; and whether it is new. Raises SettingsError for a damaged file."""
    document = read(path)
    return (tomlkit.document(), True) if document is None else (document, False)


def write(path: Path, values: Values, defaults: Values | None = None) -> None:
    """Sets `values`, tables by their keys; `defaults` go into a new file only. Raises SettingsError for a damaged file."""
    document, new = opened(path)
    update(document, values)
    if new:
        update(document, defaults or {})
    save(path, document)


def save(path: Path, document: tomlkit.TOMLDocument) -> None:
    """Leaves a file that says the same already; a link stays one, and what it names is replaced.

    Raises SettingsError for text that is not Unicode, such as a path in another encoding.
    """
    try:
        content = tomlkit.dumps(document).encode()
    except UnicodeEncodeError as exc:
        raise SettingsError(f"{path}: a name in it is not UTF-8, which TOML needs: rename that file or folder") from exc
    if not path.exists() or path.read_bytes() != content:
        write_secret(path.resolve(), content)


def update(table: MutableMapping[str, Any], values: Values) -> None:
    """Sets what differs, so that the rest keeps its form."""
    for key, value in values.items():
        inner = table.get(key)
        if isinstance(value, Mapping) and isinstance(inner, MutableMapping):
            update(inner, value)
        elif inner != value:
            table[key] = value


def tables(path: Path, document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The plain values of an array of tables; none where there is none. path: of the file, for messages.

    Raises SettingsError where it is something else.
    """
    found = document.get(key, [])
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise SettingsError(f"{path} is damaged: write `{key}` as [[{key}]] tables, or remove the file and lose what it says")
    return [dict(one.unwrap()) for one in found]


def set_tables(
    document: MutableMapping[str, Any], key: str, wanted: Sequence[Values], same: Callable[[Values, Values], bool]
) -> list[dict[str, Any]]:
    """Makes the array hold a table for each of `wanted`, in that order, and nothing else. A table that is there keeps what it
    says beside. Returns the tables that went.
    """
    before = list(document.get(key, []))
    chosen = [next((one for one in before if same(one, values)), None) for values in wanted]
    for found, values in zip(chosen, wanted, strict=True):
        if found is not None:
            update(found, values)
    if [id(one) for one in chosen] == [id(one) for one in before]:
        return []
    going = [dict(one.unwrap()) for one in before if not any(one is kept for kept in chosen)]
    array = tomlkit.aot()
    for found, values in zip(chosen, wanted, strict=True):
        array.append(found if isinstance(found, tomlkit.items.Table) else _table(found or {}, values))
    document.pop(key, None)
    document[key] = array
    return going


def _table(before: Values, values: Values) -> tomlkit.items.Table:
    table = tomlkit.table()
    table.update({**before, **values})
    return table
