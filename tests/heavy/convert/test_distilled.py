"""The recipe of docs/distillation.md from the teacher's answers on, in small: a student, converted, and served sealed."""

from __future__ import annotations

import json
import subprocess
from contextlib import closing
from pathlib import Path

from heavy.conftest import ROOT
from lacre_backend.api.app import create_app
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.workshop.conversion import ConvertedType, convert_model
from lacre_backend.workshop.converter import ConverterPlace
from parts.relay import Relay, connect

PROGRAM = ROOT / "examples" / "distill.py"
ANSWERS = 24
SHAPE = ("--steps", "30", "--width", "64", "--layers", "1", "--longest", "64")


def answers(path: Path) -> Path:
    """One teacher's: it says the same of all things."""
    things = [f"thing number {i}" for i in range(ANSWERS)]
    turns = [
        [{"role": "user", "content": f"What is {thing}?"}, {"role": "assistant", "content": "It is a thing of the sea."}]
        for thing in things
    ]
    path.write_text("".join(json.dumps({"model": "teacher", "messages": each}) + "\n" for each in turns))
    return path


def test_a_student_learns_and_is_served(where: ConverterPlace, checkpoint: Path, tmp_path: Path) -> None:
    student, file = tmp_path / "student", tmp_path / "student.gguf"
    command = [where.python, "-P", PROGRAM, "train", answers(tmp_path / "answers.jsonl"), "--tokenizer", checkpoint]
    done = subprocess.run([*command, "--out", student, *SHAPE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["trained_on"], told["held_out"]) == (ANSWERS * 7 // 8, ANSWERS // 8)
    assert told["before"] > 10, "nothing is known yet: the logarithm of the vocabulary is 10.8"
    assert told["after"] < told["before"] - 2
    converted = convert_model(student, file, ConvertedType.AUTO, where, lambda _what, _share: None)
    assert converted.probe.kl is not None and converted.probe.kl < 1e-3
    settings = LlamaSettings(n_ctx=64, threads=1)
    with closing(LlamaEngine(file, name="tiny", digest="sha256:0", settings=settings)) as engine:
        relay = Relay(create_app([engine]))
        with connect(relay) as client:
            reply = client.chat("What is thing number 3?", temperature=0, max_tokens=8)
    assert reply.usage.completion and relay.sealed, "it answers through the seal, whatever it says"
