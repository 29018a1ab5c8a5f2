"""`lacre model convert`: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lacre.cli.output import AsJson, say_json, say_table
from lacre.errors import SettingsError
from lacre_backend.commands.model import OutPath, drawn
from lacre_backend.commands.weights import commands

if TYPE_CHECKING:
    from lacre_backend.workshop.adapting import ConvertedAdapter
    from lacre_backend.workshop.conversion import Converted, Probed
    from lacre_backend.workshop.published import CheckedSource

__all__ = ["commands"]


@commands.command("convert")
def convert(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model as Hugging Face has it, or a LoRA adapter of PEFT.")],
    out: OutPath,
    kind: Annotated[str, typer.Option("--type", help="auto (16 bits), f32, f16, bf16 or q8_0.")] = "auto",
    base: Annotated[Path | None, typer.Option(help="For an adapter: the folder of its base model.")] = None,
    python: Annotated[Path | None, typer.Option(help="An interpreter with PyTorch and transformers.")] = None,
    sources: Annotated[Path | None, typer.Option(help="llama-cpp-python's source archive, or a folder of llama.cpp.")] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Let Python files of the model run.")] = False,
    signer: Annotated[
        list[Path] | None,
        typer.Option(help="A public key (PEM) that must have signed DIR; may be repeated: one of them suffices."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert a model of Hugging Face, or a LoRA adapter of PEFT, to GGUF.

    Before the file gets its name, it is compared with what transformers computes.
    """
    from pydantic import TypeAdapter

    from lacre_backend.workshop import adapter_folder, adapting, converter
    from lacre_backend.workshop.checkpoint import read_checkpoint
    from lacre_backend.workshop.conversion import Converted, convert_model, converted_type

    wanted = converted_type(kind)
    if adapter_folder.is_adapter(folder):
        adapter = adapter_folder.read_adapter(folder, base)
        read_checkpoint(adapter.base, trust_code=trust_code)
        where = converter.place(python, sources, adapting.NEEDED)
        with drawn() as report:
            written = adapting.convert_adapter(adapter, out, wanted, where, report, trust_code=trust_code, signers=signer or ())
        if as_json:
            say_json(TypeAdapter(adapting.ConvertedAdapter).dump_python(written, mode="json"), indent=2)
        else:
            say_table(("", ""), _adapter_rows(written))
        return
    if base is not None:
        raise SettingsError(f"--base is for adapters, and {folder} has no adapter_config.json. Leave --base away.")
    read_checkpoint(folder, trust_code=trust_code)  # a folder that no environment would help is refused first
    where = converter.place(python, sources)
    with drawn() as report:
        converted = convert_model(folder, out, wanted, where, report, trust_code=trust_code, signers=signer or ())
    if as_json:
        say_json(TypeAdapter(Converted).dump_python(converted, mode="json"), indent=2)
    else:
        say_table(("", ""), _rows(converted))


def _adapter_rows(converted: ConvertedAdapter) -> list[tuple[str, str]]:
    effect = converted.probe.effect
    return [
        ("written", str(converted.path)),
        ("source", _source(converted.source)),
        ("adapter", f"rank {converted.rank}, alpha {converted.alpha:g}, {converted.parameters / 1e6:,.1f} million parameters"),
        ("changes", ", ".join(converted.targets)),
        ("base", f"{converted.base}, {converted.architecture}"),
        ("size", f"{converted.bytes / 1e6:,.1f} MB"),
        ("logits", _compared(converted.probe)),
        ("effect", "unknown" if effect is None else f"KL {effect:.6f} between the base and the adapted model"),
    ]


def _compared(probe: Probed) -> str:
    if probe.kl is not None and probe.same_top is not None:
        return f"KL {probe.kl:.6f}, same top token {probe.same_top:.1%}"
    return f"not compared: {probe.not_compared}"


def _rows(converted: Converted) -> list[tuple[str, str]]:
    probe = converted.probe
    return [
        ("written", str(converted.path)),
        ("source", _source(converted.source)),
        ("architecture", f"{converted.architecture}, {converted.parameters / 1e6:,.1f} million parameters"),
        ("size", f"{converted.bytes / 1e6:,.1f} MB"),
        ("tokens", f"{probe.tokens} of the sample, as transformers makes them"),
        ("logits", _compared(probe)),
    ]


def _source(source: CheckedSource) -> str:
    if source.signed:
        return "as it was signed" + (f" by {source.signer}" if source.signer else "; whose signature it is was not verified")
    said = f"{source.published} files as Hugging Face published them"
    if source.unchecked:
        said += f"; not checked: {', '.join(source.unchecked)}, which have no signature and no digest of Hugging Face"
    return said
