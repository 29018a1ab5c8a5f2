"""Converts a LoRA adapter of PEFT to GGUF, and tries the result beside its base model: `lacre model convert`.

Rules:
- The base model is converted too, into a file that is removed: what peft computes is compared with what llama.cpp computes with
  both. Only then does the draft get its name.
- The comparison must see the adapter: most of its effect has to be there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError
from lacre_backend.models import checksum
from lacre_backend.workshop import converter
from lacre_backend.workshop.adapter_folder import AdapterFolder
from lacre_backend.workshop.checkpoint import ModelFolder, read_checkpoint
from lacre_backend.workshop.child import Report, run
from lacre_backend.workshop.conversion import PROBE, ConvertedType, ProbeAsked, Probed, ask_transformers
from lacre_backend.workshop.converter import ConverterPlace
from lacre_backend.workshop.draft import draft
from lacre_backend.workshop.published import CheckedSource, check_source

NEEDED: Final = "peft"  # a package, beside those for models
_BYTES: Final = 4  # of a parameter, at most: both files have 16 bits unless asked otherwise
_SHARES: Final = (0.1, 0.5, 0.75, 0.9)  # of the progress: the adapter, its base, peft, the comparison


@dataclass(frozen=True, slots=True)
class ConvertedAdapter:
    """The new file. base: the folder of the model that it is for. source: of the adapter. The rest: as in `AdapterFolder`, and
    of `conversion.py`.
    """

    path: Path
    architecture: str
    base: Path
    rank: int
    alpha: float
    targets: list[str]
    parameters: int
    bytes: int
    probe: Probed
    source: CheckedSource


def convert_adapter(
    adapter: AdapterFolder,
    out: Path,
    kind: ConvertedType,
    where: ConverterPlace,
    report: Report,
    *,
    trust_code: bool = False,
    signers: Sequence[Path] = (),
) -> ConvertedAdapter:
    """Writes `out`. signers: of the adapter, as in `check_source`.

    Raises SettingsError, what `check_source` raises, or OSError.
    """
    source = read_checkpoint(adapter.base, trust_code=trust_code)
    report("checking the source", 0.0)
    check_source(source, ())
    checked = check_source(ModelFolder(adapter.folder, "", (adapter.weights,), adapter.parameters), signers)
    if set("{}") & set(str(out)):
        raise SettingsError(f"{out}: the converter takes braces in a path for a pattern. Give another --out.")
    size = (source.parameters + adapter.parameters) * _BYTES
    sources = (adapter.weights, *source.weights)
    with converter.unpacked(where.sources) as code, draft(out, sources, size=size) as path:
        wanted = ConvertedType.F16 if kind is ConvertedType.AUTO else kind
        options = [str(adapter.folder), "--base", str(source.folder), "--outfile", str(path.absolute())]
        options += ["--outtype", wanted.value]
        converter.convert(
            where.python,
            code,
            options,
            lambda what, share: report(what, share * _SHARES[0]),
            script=converter.ADAPTER_SCRIPT,
        )
        if not path.is_file():
            raise SettingsError(f"The converter wrote nothing for {adapter.folder}. Check that this is a LoRA adapter.")
        probe = _probe(adapter, path, AdapterTrial(source, code, where, trust_code), report)
        report("writing", _SHARES[3])
        checksum.write(path)
        written = path.stat().st_size
    about = adapter.rank, adapter.alpha, list(adapter.targets), adapter.parameters
    return ConvertedAdapter(out, source.architecture, source.folder, *about, written, probe, checked)


@dataclass(frozen=True, slots=True)
class AdapterTrial:
    """What the comparison runs. code: of the converter."""

    source: ModelFolder
    code: Path
    where: ConverterPlace
    trust_code: bool


def _probe(adapter: AdapterFolder, path: Path, trial: AdapterTrial, report: Report) -> Probed:
    """path: the draft. The base model is written beside it for a while."""
    python, source = trial.where.python, trial.source
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as kept:
        whole, compared = Path(kept).absolute() / "base.gguf", Path(kept) / "reference.npz"
        options = [str(source.folder), "--outfile", str(whole), "--outtype", ConvertedType.AUTO.value]
        begin, end = _SHARES[:2]
        converter.convert(python, trial.code, options, lambda _, s: report("converting the base", begin + s * (end - begin)))
        report("computing with peft", _SHARES[1])
        ask_transformers(python, source, compared, trust_code=trial.trust_code, adapter=adapter.folder)
        report("comparing", _SHARES[2])
        return run(PROBE, ProbeAsked(whole, compared, path))
