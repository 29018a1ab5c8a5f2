"""`python seed.py ARCHIVE STATE [KEYS]`: fills a new state folder from an archive.

Rules:
- Each part, a pool or the rest, is unpacked once. Destroyed keys must not come back, and no version may be signed twice.
- KEYS has a folder for each pool: a volume with the pool's keys, which its workers read.
- models.json beside this file says which model files the manifest names. If it names none, the state keeps its own.
"""

import json
import os
import sys
import tarfile
from pathlib import Path, PurePosixPath


def part(name: PurePosixPath) -> str:
    return "/".join(name.parts[:2]) if name.parts[0] == "pools" else "."


def seed(archive: Path, state: Path, keys: Path | None) -> None:
    marker = state / "seeded.json"
    done = set(json.loads(marker.read_text())) if marker.exists() else set()
    with tarfile.open(archive) as source:
        files = {PurePosixPath(member.name): member for member in source if member.isfile()}
        files = {name: member for name, member in files.items() if part(name) not in done}
        for name in files:
            if name.is_absolute() or ".." in name.parts:
                raise SystemExit(f"{archive} names a file outside of the state: {name}")
            make_room(state, name, keys)
            (state / name).write_bytes(source.extractfile(files[name]).read())
    marker.write_text(json.dumps(sorted(done | {part(name) for name in files})))


def name_models(chosen: Path, state: Path) -> None:
    text = chosen.read_text()
    if not json.loads(text)["pools"]:
        return
    kept = state / "trust" / "models.json"
    draft = kept.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(kept)


def make_room(state: Path, name: PurePosixPath, keys: Path | None) -> None:
    folder = state / name.parent
    if keys is not None and name.parts[0] == "pools" and name.parent.name == "keys" and not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(keys / name.parts[1])
    folder.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    os.umask(0o077)
    seed(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
    name_models(Path(__file__).with_name("models.json"), Path(sys.argv[2]))
