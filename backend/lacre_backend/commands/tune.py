"""`lacre worker tune`: measures each model of a settings file, and writes the best values and the figures into it.

Rules:
- Only the chosen keys and our own comment in the file change. Every other line stays as it is.
- The new file is parsed and checked before it atomically replaces the old one. What an engine would refuse is not written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.model import ModelMetadata
from lacre_backend.engine.pace import PREFILL
from lacre_backend.engine.plan import STEP
from lacre_backend.engine.protocol import TaskKind
from lacre_backend.engine.sizing import LlamaSettings, SpeculationKind, derive
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.engine.tune import SLOTS, TuningResult, tune
from lacre_backend.engine.tune_speculation import SpeculationTrial, try_speculation
from lacre_backend.engine.tune_steps import StepSizes, tune_steps
from lacre_backend.engine_process.loading import open_draft, options
from lacre_backend.models.gguf import find
from lacre_backend.settings import ModelSettings, load

_MARK: Final = "# measured by `lacre worker tune`:"
_TABLE: Final = re.compile(r"\s*\[")
_MODEL: Final = re.compile(r"\s*\[\[\s*models\s*\]\]")


def run(path: Path, report: Callable[[str], None]) -> None:
    """Tunes every model of the settings file. If the path is a link, the link stays. Raises SettingsError."""
    path = path.resolve()
    settings = load(path)
    if not settings.models:
        raise SettingsError(f"{path} has no models of its own: tune the upstream itself")
    text = path.read_text(encoding="utf-8")
    for index, model in enumerate(settings.models):
        file = find(model.path, model.name)
        if ModelMetadata.read(file.path).kind is TaskKind.EMBED:
            report(f"{file.name}: embeds; nothing to tune")
            continue
        wanted = options(model)
        most = max((slots for slots in SLOTS if _fits(file.path, _freed(wanted, slots))), default=1)
        report(f"{file.name}: measuring")
        choice = tune(file.path, wanted.gpu, most=most, kv_type=wanted.kv_type)
        for line in choice.table():
            report("  " + line)
        report(f"  chosen: {choice.way}, {choice.slots} slots")
        sizes = tune_steps(file.path, as_chosen(wanted, choice))
        for line in sizes.table:
            report("  " + line)
        report(f"  chosen: {sizes}")
        derive(file.path, with_sizes(as_chosen(wanted, choice), sizes))  # a worker would refuse what this refuses
        trials = speculations(file.path, model, settings.kms, choice, report)
        best = max((trial for trial in trials if trial.worth_it), key=lambda trial: trial.gain, default=None)
        report(f"  chosen: speculation {'off: no gain measured' if best is None else best.kind}")
        table = [*choice.table(), *sizes.table, *map(str, trials)]
        text = written(text, index, values(choice, sizes, "off" if best is None else best.kind), table)
    draft = path.with_name(path.name + ".tuned")
    draft.write_text(text, encoding="utf-8")
    draft.chmod(path.stat().st_mode & 0o777)
    load(draft)
    draft.replace(path)


def speculations(
    path: Path, model: ModelSettings, kms: str, choice: TuningResult, report: Callable[[str], None]
) -> list[SpeculationTrial]:
    """What each kind of speculation gains, if the model is run as chosen."""
    trials = []
    for kind in ("lookup", "draft") if model.draft_model is not None else ("lookup",):
        settings = replace(as_chosen(options(model), choice), speculation=kind)
        try:
            draft = open_draft(model.model_copy(update={"speculation": kind}), model.conditions(kms))
            with closing(Tokenizer(path)) as tokenizer:
                engine = LlamaEngine(path, name=path.stem, digest="", settings=settings, tokenizer=tokenizer, draft=draft)
                with closing(engine):
                    if engine.speculation is not None:
                        trials.append(try_speculation(engine, engine.speculation, kind, sorted({1, choice.slots})))
                        report(f"  {trials[-1]}")
        except SettingsError as exc:  # for example, a state that cannot take guesses back
            report(f"  speculation {kind}: not tried: {exc}")
    return trials


def as_chosen(wanted: LlamaSettings, choice: TuningResult) -> LlamaSettings:
    """The model's settings with what was chosen. The sizes of its steps are measured next."""
    way = choice.way
    return replace(
        wanted,
        threads=way.threads,
        flash=way.flash,
        unified=way.unified,
        slots=choice.slots,
        cells=None,
        n_batch=None if wanted.n_ubatch is None else max(STEP, wanted.n_ubatch),
        chunk=None,
        burst=None,
        prefill=PREFILL,
    )


def with_sizes(settings: LlamaSettings, sizes: StepSizes) -> LlamaSettings:
    """The settings as they will be written."""
    return replace(settings, n_batch=sizes.n_batch, chunk=sizes.chunk, burst=sizes.burst, prefill=sizes.prefill)


def values(choice: TuningResult, sizes: StepSizes, speculation: SpeculationKind) -> dict[str, str]:
    """As TOML. A unified cache needs no size: it holds the contexts of all slots."""
    way = choice.way
    flags = {"flash": way.flash, "unified": way.unified}
    numbers = {"threads": way.threads, "slots": choice.slots}
    numbers |= {"n_batch": sizes.n_batch, "chunk": sizes.chunk, "burst": sizes.burst}
    return {
        **{name: str(number) for name, number in numbers.items()},
        "prefill": str(sizes.prefill),
        **{name: str(flag).lower() for name, flag in flags.items()},
        "speculation": f'"{speculation}"',
    }


def written(text: str, index: int, values: Mapping[str, str], table: list[str]) -> str:
    """The file's text with `values` in its `index`-th `[[models]]` table, and our comment above them."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if _MODEL.match(line)]
    if index >= len(starts):
        raise SettingsError("The settings write `models` in a form other than [[models]] tables. Write them as tables.")
    begin = starts[index] + 1
    end = next((i for i in range(begin, len(lines)) if _TABLE.match(lines[i])), len(lines))
    ours = re.compile(rf"\s*({'|'.join(values)})\s*=|{re.escape(_MARK)}|#\|")
    kept = [line for line in lines[begin:end] if not ours.match(line)]
    fresh = [_MARK, *(f"#| {line}" for line in table), *(f"{name} = {value}" for name, value in values.items())]
    return "\n".join([*lines[:begin], *fresh, *kept, *lines[end:]]) + "\n"


def _freed(wanted: LlamaSettings, slots: int) -> LlamaSettings:
    """With so many slots, and without the sizes that are measured again."""
    return replace(wanted, slots=slots, cells=None, n_batch=None, n_ubatch=None, chunk=None, burst=None)


def _fits(path: Path, settings: LlamaSettings) -> bool:
    try:
        derive(path, settings)
    except SettingsError:
        return False
    return True
