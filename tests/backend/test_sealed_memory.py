"""Where the weights of a sealed model are: in the memory of the process that decodes, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf

from lacre_backend.workshop.sealing import seal_model
from parts.memory import found_in_memory
from parts.tiny_model import tiny_model

PROGRAM = """
import sys
from pathlib import Path
from lacre_backend.engine_process.loading import load_engine
from lacre_backend.settings import ModelSettings
engine = load_engine(ModelSettings(path=Path(sys.argv[1]), name="m", sealed=True, slots=1, context=64, threads=1), sys.argv[2])
print(engine.model.digest, flush=True)
sys.stdin.read()
engine.close()
"""
SLICE = 64  # bytes of a weight to look for


def slices(path: Path) -> dict[str, bytes]:
    tensors = {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
    embeddings, last = tensors["token_embd.weight"], tensors["blk.1.ffn_down.weight"]
    return {"embedding": embeddings[len(embeddings) // 2 :][:SLICE], "last": last[-SLICE:]}


def children(pid: int) -> list[int]:
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [below for child in own for below in children(child)]


def files_held_by(pid: int) -> list[bytes]:
    """The content of every regular file that the process has open or mapped, in memory or on the disk."""
    found = []
    for link in [*Path(f"/proc/{pid}/fd").iterdir(), *Path(f"/proc/{pid}/map_files").iterdir()]:
        target = str(link.readlink())
        if "memfd:" in target or target.endswith((".sealed", ".gguf")):
            found.append(link.read_bytes())
    return found


def test_weights_are_in_the_memory_of_the_process_that_decodes_alone(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny.gguf")
    needles = slices(model)
    kms = f"file:{tmp_path / 'kms'}"
    seal_model(model, tmp_path / "tiny.sealed", kms, lambda _what, _share: None)
    assert all(needle in model.read_bytes() for needle in needles.values())
    model.unlink()
    command = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path / "tiny.sealed"), kms]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as engine:
        try:
            assert engine.stdout is not None
            assert engine.stdout.readline().startswith("sha256:")
            assert found_in_memory(engine.pid, needles) == {*needles}
            below = children(engine.pid)
            assert below, "the tokenizer has a process of its own"
            for child in below:
                assert not found_in_memory(child, needles)
            held = [content for pid in (engine.pid, *below) for content in files_held_by(pid)]
            assert any(content.startswith(b"GGUF") for content in held), "the head is in a file in memory"
            assert not any(needle in content for content in held for needle in needles.values())
            for file in tmp_path.iterdir():
                assert not any(needle in file.read_bytes() for needle in needles.values())
        finally:
            engine.communicate("")
