"""`lacre model`: works on model files. The work itself is in `lacre_backend.workshop`.

Rules: every command has `--json`, whose members are those of the job's answer. Progress is drawn on stderr, at a terminal only.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from lacre.cli.output import AsJson, say_json, say_table, waiting
from lacre.errors import SettingsError

if TYPE_CHECKING:
    from lacre_backend.models.sealed import About
    from lacre_backend.models.signatures import SignedModel
    from lacre_backend.workshop.adapter_inspection import InspectedAdapter
    from lacre_backend.workshop.child import Job, Report
    from lacre_backend.workshop.inspection import Inspected

commands = typer.Typer(no_args_is_help=True)
ModelPath = Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file; if the model is split, any of its files.")]

Asked = TypeVar("Asked")
Told = TypeVar("Told")


def answer(job: Job[Asked, Told], question: Asked, as_json: bool) -> Told:
    """Runs a job in a child process, with its progress on stderr. With `as_json`, also prints the answer."""
    from pydantic import TypeAdapter

    from lacre_backend.workshop.child import run

    with drawn() as report:
        told = run(job, question, report)
    if as_json:
        say_json(TypeAdapter(job.told).dump_python(told, mode="json"), indent=2)
    return told


@contextmanager
def drawn() -> Iterator[Report]:
    """Draws a progress bar on stderr while the block runs. Without a terminal it draws nothing.

    SIGTERM ends the block by SystemExit, so that drafts are removed.
    """
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        with _bar() as report:
            yield report
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _bar() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, highlight=False, markup=False)
    if not console.is_terminal:
        yield lambda _what, _share: None
        return
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=1.0)

        def report(what: str, share: float) -> None:
            progress.update(bar, description=what, completed=share)

        yield report


@commands.callback()
def model() -> None:
    """Inspect and change model files."""


@commands.command("inspect")
def inspect(
    file: ModelPath,
    kms: Annotated[str | None, typer.Option(help="For a sealed model: the address of the KMS that opens it.")] = None,
    base: Annotated[Path | None, typer.Option(help="For an adapter: a model that it should fit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a model file holds, whether it is whole, and what this machine can run of it.

    Of an adapter it shows what it changes, and which models it fits. Of a sealed file, only the head is shown without --kms.
    """
    from pydantic import TypeAdapter

    from lacre_backend.models import sealed
    from lacre_backend.workshop.adapter_inspection import INSPECT_FILE, FileAsked, InspectedAdapter
    from lacre_backend.workshop.inspection import InspectAsked, Inspected

    if kms is None and file.is_file() and sealed.is_sealed(file):
        _say_sealed(sealed.read_head(file).about, file, as_json)
        return
    asked = InspectAsked(file) if kms is None else InspectAsked(file, kms)
    found = answer(INSPECT_FILE, FileAsked(asked, base), as_json=False)
    if as_json:
        either: TypeAdapter[Inspected | InspectedAdapter | None] = TypeAdapter(Inspected | InspectedAdapter | None)
        say_json(either.dump_python(found.model or found.adapter, mode="json"), indent=2)
    elif found.model is not None:
        say_table(("", ""), _rows(found.model))
    elif found.adapter is not None:
        say_table(("", ""), _adapter_rows(found.adapter))


ModelOrFolder = Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file, or a folder with a model.")]


@commands.command("sign")
def sign(
    file: ModelOrFolder,
    key: Annotated[Path, typer.Option(help="The private key (PEM, on P-256, P-384 or P-521).")],
    as_json: AsJson = False,
) -> None:
    """Sign a model: writes FILE.sig, an OpenSSF Model Signing bundle."""
    from lacre.runtime.private_files import replace
    from lacre_backend.engine.shards import check_name
    from lacre_backend.models import folders, signatures
    from lacre_backend.models.gguf import find
    from lacre_backend.workshop.inspection import check_whole

    private = signatures.private_key(key, _passphrase)
    with waiting("reading every byte"):
        if file.is_dir():
            check_name(file)
            digests, ignored = folders.read(file), list(folders.IGNORED)
        else:
            digests, ignored = find(file).digests, []
            check_whole(file)
    path = signatures.signature_path(file)
    replace(path, signatures.sign(digests, path.stem, private, ignored))
    path.chmod(0o644)  # a signature is public
    signer = signatures.signer_id(private.public_key())
    _say_signed(signatures.SignedModel(signer, f"sha256:{digests.model}"), path, as_json)


@commands.command("verify")
def verify(
    file: ModelOrFolder,
    key: Annotated[Path, typer.Option(help="The signer's public key (PEM).")],
    as_json: AsJson = False,
) -> None:
    """Verify FILE.sig: that this key signed this model, and that no byte changed since."""
    from lacre_backend.models import folders, signatures
    from lacre_backend.models.gguf import find

    public = signatures.public_key(key)
    with waiting("reading every byte"):
        found = None if file.is_dir() else find(file)
    path = signatures.signature_path(file)
    if not path.is_file():
        raise signatures.UntrustedModel(f"{file} has no signature: {path} does not exist")
    bundle = signatures.read_bundle(path)
    with signatures.naming(file), waiting("verifying every byte"):
        digests = folders.read(file, signatures.ignored_paths(bundle)) if found is None else found.digests
        signed = signatures.verify(digests, bundle, [public])
    _say_signed(signed, path, as_json)


KmsOption = Annotated[str, typer.Option("--kms", help="The address of the key management service (docs/kms.md).")]
OutPath = Annotated[Path, typer.Option("--out", help="The file to write.")]


@commands.command("seal")
def seal(
    file: ModelPath,
    out: OutPath,
    kms: KmsOption,
    signer: Annotated[
        list[Path] | None,
        typer.Option(help="A public key (PEM) that must have signed the model; may be repeated: one of them suffices."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Encrypt a model at rest. A worker opens it into memory alone, with a key that the KMS unwraps."""
    from lacre_backend.workshop.sealing import seal_model

    with drawn() as report:
        about = seal_model(file, out, kms, report, signer or ())
    _say_sealed(about, out, as_json)


@commands.command("rewrap")
def rewrap(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A sealed model.")],
    kms: KmsOption,
    to: Annotated[str, typer.Option(help="The address of the KMS that wraps its key from now on.")],
    as_json: AsJson = False,
) -> None:
    """Wrap a sealed model's key with another KMS, or with the newest version of the same key."""
    from lacre_backend.workshop.sealing import rewrap_model

    _say_sealed(rewrap_model(file, kms, to), file, as_json)


def _say_sealed(about: About, path: Path, as_json: bool) -> None:
    if as_json:
        say_json({"sealed": str(path), "name": about.name, "digest": about.digest, "signed": bool(about.signature)}, indent=2)
    else:
        signed = "yes" if about.signature else "no"
        say_table(("", ""), (("sealed", str(path)), ("name", about.name), ("digest", about.digest), ("signed", signed)))


def _passphrase() -> bytes:
    if not sys.stdin.isatty():
        raise SettingsError("The key has a passphrase, and there is no terminal to ask for it. Run the command at a terminal.")
    return str(typer.prompt("Passphrase of the key", hide_input=True, err=True)).encode()


def _say_signed(signed: SignedModel, path: Path, as_json: bool) -> None:
    if as_json:
        say_json({"signature": str(path), "signer": signed.signer, "digest": signed.digest}, indent=2)
    else:
        say_table(("", ""), (("signature", str(path)), ("signer", signed.signer), ("digest", signed.digest)))


def _adapter_rows(found: InspectedAdapter) -> Iterable[tuple[str, str]]:
    yield "file", str(found.path)
    yield "digest", found.digest
    yield "name", found.name
    yield "adapter", f"LoRA for the architecture {found.architecture}, rank {found.rank}, alpha {found.alpha:g}"
    yield "changes", f"{', '.join(found.targets)} of {found.layers} layers"
    yield "size", f"{found.bytes / 1e6:,.1f} MB, {found.parameters / 1e6:,.1f} million parameters, {', '.join(found.types)}"
    yield "fits", ", ".join(found.fits) or found.reason or "none of the models beside it, nor the default one"
    yield "checksum", "matches" if found.checked else "none"
    yield "sealed", found.sealed or "no"
    yield "signature", found.signature or "none"


def _rows(found: Inspected) -> Iterable[tuple[str, str]]:
    yield "file", str(found.path) if len(found.files) == 1 else f"{found.path} and {len(found.files) - 1} more"
    yield "digest", found.digest
    yield "name", found.name
    yield "architecture", f"{found.architecture}, {found.kind}s, {found.layers or '?'} layers, width {found.embedding}"
    yield "size", f"{found.bytes / 1e6:,.1f} MB, {found.parameters / 1e6:,.1f} million parameters"
    yield "type", found.type
    for name, use in found.types.items():
        yield "", f"{name}: {use.tensors} tensors, {use.bytes / 1e6:,.1f} MB"
    if found.fell_back:
        yield "", f"{len(found.fell_back)} tensors fell back to another type: their rows are no multiple of 256"
    yield "context", f"{found.context:,} tokens; the cache takes {found.kv_bytes_per_token:,} bytes a token"
    yield "vocabulary", f"{found.vocabulary or 0:,} tokens, {found.tokenizer or 'unknown'}"
    yield "template", "none" if not found.template else f"yes; tool calls: {found.tool_format or 'taught by the prompt'}"
    yield "checksum", "none" if not found.checked else "matches"
    yield "sealed", found.sealed or "no"
    yield "signature", found.signature or "none"
    node = found.node
    if not node.fits:
        yield "this machine", f"cannot run it: {node.reason}"
    elif node.slots is None:
        yield "this machine", f"can run it on {node.threads} threads"
    else:
        yield "this machine", f"can run {node.slots} streams of {node.context:,} tokens on {node.threads} threads"
        yield "", f"at most {node.tokens_per_second:,.0f} tokens/s for one stream, by the speed of its memory"
    for fault in found.faults:
        yield "fault", fault
