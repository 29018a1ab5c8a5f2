"""`lacre model quantize` and `prune`: what they write, what they measure, and what they refuse without leaving anything."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from tests.parts.small_disk import NO_DISK, filled, small_disk
from tests.parts.tiny_model import N_FF, N_LAYER, tiny_model, tiny_split_model
from typer.testing import CliRunner

from lacre.errors import SettingsError, UsageError
from lacre_backend.commands.model import drawn
from lacre_backend.commands.weights import commands
from lacre_backend.engine.shards import files_of
from lacre_backend.engine.tune import SLOTS
from lacre_backend.models.gguf import default_path, find
from lacre_backend.workshop.comparison import Figures
from lacre_backend.workshop.default_model import known_models
from lacre_backend.workshop.draft import draft
from lacre_backend.workshop.fidelity import Fidelity
from lacre_backend.workshop.importance import importance_matrix, influence
from lacre_backend.workshop.inspection import read_header
from lacre_backend.workshop.pruning import PruneAsked, Pruned, prune
from lacre_backend.workshop.quantization import AUTOMATIC, MAX_KL, QuantizeAsked, Quantized, Trial, is_better, quantize
from lacre_backend.workshop.rewriting import Rewriting, rewrite, type_numbers
from lacre_backend.workshop.source import SourceModel, loaded
from lacre_backend.workshop.speed import Speed, gain

pytestmark = pytest.mark.usefixtures("one_core")
WORDS = "The river rises above the town. " * 10


def silent(_what: str, _share: float) -> None: ...


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return path


@contextmanager
def refused(folder: Path, said: str) -> Iterator[None]:
    """And nothing in the folder has changed."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SettingsError, match=said):
        yield
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def quantized(source: Path, out: Path, *types: str, **more: Any) -> Quantized:
    return quantize(QuantizeAsked(source, out, types, **more), silent)


# Quantize


def test_a_quantized_model_is_measured_against_its_source(tmp_path: Path, text: Path) -> None:
    source, out = tiny_model(tmp_path / "tiny.gguf"), tmp_path / "out.gguf"
    found = quantized(source, out, "q8_0", text=text)
    assert (found.type, found.out, found.digest) == ("Q8_0", out, find(out).digest)
    assert found.max_kl is None
    (trial,) = found.tried
    assert trial.figures.bytes == out.stat().st_size < source.stat().st_size / 3
    assert 0 < trial.figures.fidelity.kl < 0.1
    assert 0.8 < trial.figures.fidelity.same_top <= 1
    assert found.source.type == "F32"
    assert found.source.speed == trial.beside
    assert trial.gain == gain(trial.figures.speed, trial.beside)
    assert trial.seconds > 0
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "out.gguf", "text.txt"}
    worse = quantized(source, out, "Q4_K_M", text=text).tried[0]  # replaces the file
    assert worse.figures.fidelity.kl > trial.figures.fidelity.kl
    assert worse.fell_back > 0


def test_a_split_model_becomes_one_file(tmp_path: Path, text: Path) -> None:
    shards = tiny_split_model(tmp_path)
    quantized(shards[1], tmp_path / "out.gguf", "Q8_0", text=text)
    whole = SourceModel.read(tmp_path / "out.gguf")
    assert len(whole.files) == 1
    assert len(whole.tensors) == sum(len(read_header(shard).tensors) for shard in shards)


def test_a_split_model_is_merged_without_a_change(tmp_path: Path, text: Path) -> None:
    """Sealing tells to do that. A quantized model needs no --requantize, because nothing is quantized."""
    source, out = tmp_path / "q.gguf", tmp_path / "out.gguf"
    shards = tiny_split_model(tmp_path)
    assert quantized(shards[0], out, "copy", text=text).tried[0].figures.fidelity.kl < 1e-6
    kept = {tensor.name: bytes(tensor.data) for shard in shards for tensor in GGUFReader(shard).tensors}
    assert {tensor.name: bytes(tensor.data) for tensor in GGUFReader(out).tensors} == kept
    quantized(out, source, "Q8_0", text=text)
    assert quantized(source, out, "COPY", text=text).type == "Q8_0"
    assert len(files_of(out)) == 1


def test_the_fastest_within_the_bound_is_kept(tmp_path: Path, text: Path) -> None:
    """A bound of 0 is met by the source alone, which is copied; a wide one by the fastest of all."""
    source, out = tiny_model(tmp_path / "tiny.gguf"), tmp_path / "out.gguf"
    types = ("Q8_0", "Q4_0")
    found = quantized(source, out, *types, max_kl=0.0, text=text)
    assert (found.type, [trial.figures.type for trial in found.tried]) == (found.source.type, [*types])
    kept = {tensor.name: bytes(tensor.data) for tensor in GGUFReader(source).tensors}
    assert {tensor.name: bytes(tensor.data) for tensor in GGUFReader(out).tensors} == kept
    found = quantized(source, out, *types, max_kl=100.0, text=text)
    if found.type in types:  # on a busy machine neither may be faster than so small a model
        assert [trial.figures.type for trial in found.tried] == [*types]
        assert max(found.tried, key=lambda trial: trial.gain).figures.type == found.type == SourceModel.read(out).type
        assert found.source.speed.prompt == max(trial.beside.prompt for trial in found.tried), "not of the first turns alone"


def test_a_matrix_weighs_columns_by_what_they_are_multiplied_with(tmp_path: Path) -> None:
    source = SourceModel.read(tiny_model(tmp_path / "tiny.gguf"))
    with loaded(source.path) as model:
        matrix = importance_matrix(source, model, WORDS, lambda _share: None)
    matrices = {tensor.name: tensor.shape[0] for tensor in source.tensors if len(tensor.shape) > 1}
    assert {name: len(values) for name, values in matrix.items()} == {
        name: columns for name, columns in matrices.items() if name != "token_embd.weight"  # looked up, not multiplied
    }  # fmt: skip
    assert all(np.isfinite(values).all() and (values >= 0).all() for values in matrix.values())
    assert matrix["blk.0.attn_q.weight"].mean() == pytest.approx(1, rel=1e-3)  # an RMS norm's output, all weights 1
    assert matrix[f"blk.{N_LAYER - 1}.ffn_down.weight"].shape == (N_FF,)


def test_types_of_few_bits_need_the_matrix_and_use_it(tmp_path: Path, text: Path) -> None:
    source, out = tiny_model(tmp_path / "tiny.gguf"), tmp_path / "out.gguf"
    for name in ("IQ2_XS", "IQ3_XS"):  # the second mixes types of which one needs it
        with refused(tmp_path, f"{name} needs an importance matrix"):
            quantized(source, out, name, text=text)
    quantized(source, out, "IQ2_XS", text=text, calibrate=text)
    with_matrix = out.read_bytes()
    rewrite(source, out, Rewriting("IQ2_XS"), lambda _share: None)  # whose fallback needs none
    assert out.read_bytes() != with_matrix


def test_what_cannot_be_quantized_is_refused(tmp_path: Path, text: Path) -> None:
    source, out = tiny_model(tmp_path / "tiny.gguf"), tmp_path / "out.gguf"
    already = tmp_path / "already.gguf"
    rewrite(source, already, Rewriting("Q8_0"), lambda _share: None)
    nan = tmp_path / "nan.gguf"
    head, tensor = read_header(source), read_header(source).tensors[0]  # an embedding that the text does not use
    data = bytearray(source.read_bytes())
    data[head.data_at + tensor.offset : head.data_at + tensor.offset + 4] = np.float32(np.nan).tobytes()
    nan.write_bytes(data)
    embeds = tiny_model(tmp_path / "embeds.gguf", embeds=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, to, kind, said in (
        (source, out, "Q9", "There is no type 'Q9'. Give one of: .*Q4_K_M.*Q8_0"),
        (source, source, "Q8_0", "is the input itself"),
        (source, folder, "Q8_0", "is a folder"),
        (source, tmp_path / "no/out.gguf", "Q8_0", "does not exist"),
        (tmp_path / "no.gguf", out, "Q8_0", "No such model file"),
        (already, out, "Q4_0", r"quantized already \(Q8_0\).*--requantize"),
        (nan, out, "Q8_0", rf"the tensor '{tensor.name}' has weights that are infinite or not numbers"),
        (embeds, out, "Q8_0", "This command measures generation"),
        (source, out, "Q1_0", "llama.cpp cannot write this .* no tensor type fallback"),
    ):
        with refused(tmp_path, said):
            quantized(path, to, kind, text=text)
    link = tmp_path / "link.gguf"
    link.symlink_to(source)
    with refused(tmp_path, "is the input itself"):
        quantized(link, source, "Q8_0", text=text)
    assert quantized(already, out, "Q4_0", text=text, requantize=True).source.type == "Q8_0"


@pytest.mark.skipif(NO_DISK is not None, reason=str(NO_DISK))
def test_a_full_disk_is_named_and_left_as_it_was(tmp_path: Path, text: Path) -> None:
    source = tiny_model(tmp_path / "tiny.gguf")
    with small_disk(tmp_path / "disk", "100k") as disk:
        with refused(tmp_path, "takes .* MiB or more"):  # known beforehand
            quantized(source, disk / "out.gguf", "Q8_0", text=text)
        with filled(disk), refused(tmp_path, "disk of .* is full"):  # the smallest type's size is unknown
            quantized(source, disk / "out.gguf", "IQ2_M", text=text, calibrate=text)


@pytest.mark.parametrize(
    ("kl", "faster", "best", "bound", "kept"),
    [
        (0.9, 0.5, None, None, True),  # --type: written, whatever it loses
        (0.02, 1.1, None, 0.02, True),
        (0.021, 9.9, None, 0.02, False),
        (0.01, 1.0, None, 0.02, False),  # the source is as fast
        (0.01, 1.2, 1.3, 0.02, False),
        (0.01, 1.4, 1.3, 0.02, True),
    ],
)
def test_which_type_is_kept(kl: float, faster: float, best: float | None, bound: float | None, kept: bool) -> None:
    def trial(loss: float, speed: float) -> Trial:
        measured = Speed(dict.fromkeys(SLOTS, speed), speed)
        beside = Speed(dict.fromkeys(SLOTS, 1.0), 1.0)
        return Trial(Figures(Path("x"), 1, "Q8_0", Fidelity(100, 9.0, loss), measured), beside, speed, 0, 1.0)

    assert is_better(trial(kl, faster), None if best is None else trial(0.0, best), bound) is kept


# Prune


def test_a_layer_without_influence_is_found_and_dropped(tmp_path: Path, text: Path) -> None:
    """The weights of one layer are zero: what leaves it is what entered, and nothing changes without it."""
    source = tiny_model(tmp_path / "tiny.gguf")
    head, data = read_header(source), bytearray(source.read_bytes())
    for tensor in head.tensors:
        if tensor.name in ("blk.1.attn_output.weight", "blk.1.ffn_down.weight"):
            at = head.data_at + tensor.offset
            data[at : at + 4 * tensor.elements] = bytes(4 * tensor.elements)
    source.write_bytes(data)
    found = prune(PruneAsked(source, source, drop=1, text=text), tmp_path / "out.gguf", silent)
    assert found.dropped == [1]
    assert found.influence[1] == pytest.approx(0, abs=1e-6)
    assert found.influence[0] > 0.01
    assert found.after.fidelity.kl == pytest.approx(0, abs=1e-6)
    assert found.digest == find(tmp_path / "out.gguf").digest
    assert SourceModel.read(tmp_path / "out.gguf").number("block_count") == N_LAYER - 1
    other = prune(PruneAsked(source, source, layers=(0,), text=text), None, silent)
    assert (other.dropped, other.out) == ([0], None)
    assert other.after.fidelity.kl > 0.1
    assert other.advice.startswith(("Keep the source", "Do not serve it"))
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "out.gguf", "text.txt"}


def test_influence_is_the_turn_of_the_residual_stream(tmp_path: Path) -> None:
    source = SourceModel.read(tiny_model(tmp_path / "tiny.gguf"))
    with loaded(source.path) as model:
        found = influence(source, model, WORDS, lambda _share: None)
    assert len(found) == N_LAYER
    assert all(0 < value < 1 for value in found)


@pytest.mark.parametrize(
    ("drop", "layers", "said"),
    [
        (N_LAYER, (), f"{N_LAYER} layers cannot be dropped"),
        (-1, (), "-1 layers cannot"),
        (0, (0, 1), f"{N_LAYER} layers cannot be dropped"),
        (0, (7,), "no layer 7. Its layers are 0 to 1"),
        (0, (-1,), "no layer -1"),
        (0, (1, 1), "Layer 1 is named twice"),
    ],
)
def test_what_cannot_be_dropped_is_refused(tmp_path: Path, text: Path, drop: int, layers: tuple[int, ...], said: str) -> None:
    source = tiny_model(tmp_path / "tiny.gguf")
    with refused(tmp_path, said):
        prune(PruneAsked(source, source, drop, layers, text), tmp_path / "out.gguf", silent)


# The commands


def test_the_commands_print_tables_or_json(tmp_path: Path, text: Path) -> None:
    source, out = str(tiny_model(tmp_path / "tiny.gguf")), str(tmp_path / "out.gguf")
    more = ["--text", str(text), "--out", out]
    for arguments, kind in ((["quantize", source, "--type", "Q8_0"], Quantized), (["prune", source, "--drop", "1"], Pruned)):
        printed = CliRunner().invoke(commands, [*arguments, *more, "--json"])
        assert set(json.loads(printed.stdout)) == {*kind.__slots__}  # type: ignore[attr-defined]
        table = CliRunner().invoke(commands, [*arguments, *more])
        assert "same top" in table.stdout
        assert f"{out} (sha256:" in table.stdout


@pytest.mark.parametrize(
    "arguments",
    [["quantize", "x", "--out", "y"], ["quantize", "x", "--out", "y", "--type", "Q8_0", "--auto"],
     ["quantize", "x", "--out", "y", "--type", "Q8_0", "--max-kl", "0.1"], ["prune", "x"],
     ["prune", "x", "--drop", "1", "--layer", "1"]],
)  # fmt: skip
def test_options_that_contradict_are_refused(arguments: list[str]) -> None:
    assert isinstance(CliRunner().invoke(commands, arguments).exception, UsageError)


def test_a_terminated_command_leaves_nothing(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, drawn(), draft(tmp_path / "out", []) as path:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # it is handled before that
    assert ended.value.code == 128 + signal.SIGTERM
    assert not [*tmp_path.iterdir()]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_the_default_model_becomes_faster_within_the_bound(tmp_path: Path) -> None:
    """The types are those of `--auto` that can win here; the loss does not depend on the machine."""
    assert {"Q8_0", "Q6_K"} < {*AUTOMATIC} < {*type_numbers()}
    out = tmp_path / "out.gguf"
    found = quantized(default_path(), out, "Q8_0", "Q4_0", max_kl=1.0, requantize=True)
    losses = {trial.figures.type: trial.figures.fidelity.kl for trial in found.tried}
    assert 0 < losses["Q8_0"] < MAX_KL < losses["Q4_0"]
    shipped = known_models()[find().digest]  # the table that `lacre up` goes by
    assert {name: shipped.types[name].kl for name in losses} == pytest.approx(losses, rel=0.1)
    assert shipped.types["Q8_0"].bytes == pytest.approx(found.tried[0].figures.bytes, rel=0.001)
    assert find(out).digest == found.digest
