"""What `lacre top` shows: a gateway's reports, drawn for a terminal of any size. It does no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lacre.cli.output import ago, printable
from lacre_gateway.admin.reports import PoolReport, StatusReport
from lacre_gateway.console.reports import MinuteReport, WorkerReport

HOUR: Final = 60  # minutes drawn
_BARS: Final = " ▁▂▃▄▅▆▇█"
_BAR: Final = 12  # characters of a bar
_AROUND: Final = 14  # lines that are neither pools nor workers
_SHOWN: Final = 40  # characters of a name
_WIDE: Final = 80  # columns; a narrower terminal gets fewer of a table's


@dataclass(frozen=True, slots=True)
class Look:
    """What the gateway said. workers, minutes: None if it has no console. fault: why it said nothing since."""

    status: StatusReport
    workers: Sequence[WorkerReport] | None = None
    minutes: Sequence[MinuteReport] | None = None
    fault: str | None = None


def drawn(look: Look, now: float, width: int, height: int) -> RenderableType:
    """now: seconds since the epoch. width, height: columns and lines of the terminal."""
    parts: list[RenderableType] = [_head(look.status), *_alerts(look)]
    if look.minutes is not None:
        parts += ["", _hour(look.minutes, int(now // 60))]
    parts += ["", _pools(look.status, wide=width >= _WIDE), ""]
    if look.workers is None:
        parts.append(Text("Add a table [console] to the gateway's settings to see its workers and the last hour.", style="dim"))
    else:
        pools = sum(map(len, look.status.pools.values()))
        parts.append(_workers(look.workers, max(3, height - _AROUND - pools), wide=width >= _WIDE))
    return Group(*parts)


def _head(status: StatusReport) -> Text:
    state, style = ("draining", "yellow") if status.draining else ("not ready", "red") if status.missing else ("ready", "green")
    told = f" {status.requests} requests, {status.streams} streams · up {ago(status.seconds)} · {status.audit_entries} entries"
    return Text.assemble(
        ("lacre ", "bold"), (_name(status.gateway), "bold"), f" {printable(status.version)} · ", (state, style), f" ·{told}"
    )


def _alerts(look: Look) -> Iterator[Text]:
    """The lines that someone should act on."""
    status, found = look.status, [] if look.fault is None else [look.fault]
    found += [f"{name}: {why}" for name, why in status.missing.items()]
    found += [
        f"pool {pool}: no live worker serves it"
        for pool, regions in status.pools.items() if not any(at.workers for at in regions.values())
    ]  # fmt: skip
    if status.settings is not None and status.settings.fault is not None:
        found.append(f"settings: the file on the disk was refused: {status.settings.fault}")
    return (Text(f"! {printable(line)}", style="red", overflow="fold") for line in found)


def _hour(minutes: Sequence[MinuteReport], now: int) -> Table:
    """now: the running minute. Minutes without a report stay empty."""
    by = {one.at // 60: one for one in minutes}
    hour = [by.get(at) for at in range(now - HOUR, now)]
    table = Table(box=None, show_header=False, pad_edge=False)
    rows: list[tuple[str, list[float | None], str]] = [
        ("requests/min", [None if one is None else float(one.answered + one.refused + one.failed) for one in hour], ""),
        ("tokens/s", [None if one is None else one.completion_tokens / 60 for one in hour], ""),
        ("first byte, 95 %", [None if one is None else one.most_ms for one in hour], " ms"),
    ]
    for name, values, unit in rows:
        last = next((value for value in reversed(values) if value is not None), None)
        table.add_row(name, spark(values), "–" if last is None else f"{last:.0f}{unit}")
    return table


def spark(values: Sequence[float | None]) -> str:
    """One character for each value, its height as a share of the largest; a space where there is none."""
    most = max((value for value in values if value is not None), default=0.0)
    steps = len(_BARS) - 1
    return "".join(
        " " if value is None else _BARS[1] if most <= 0 else _BARS[max(1, round(value / most * steps))] for value in values
    )


def bar(used: int, of: int) -> Text:
    """used: at most `of`."""
    share = 0.0 if of <= 0 else min(1.0, used / of)
    full = round(share * _BAR)
    return Text.assemble(("━" * full, "red" if share >= 1 else "green"), ("─" * (_BAR - full), "dim"), f" {share:.0%}")


def _pools(status: StatusReport, *, wide: bool) -> Table:
    rows = [
        (_name(pool), _name(region), str(at.workers), str(at.busy), str(at.busy + at.free), bar(at.busy, at.busy + at.free),
         "?" if at.queued is None else str(at.queued))
        for pool, region, at in _places(status)
    ]  # fmt: skip
    columns = ("pool", "-region", "+workers", "+busy", "+slots", "in use", "+queued")
    return _table(columns, rows, wide=wide)


def _places(status: StatusReport) -> Iterator[tuple[str, str, PoolReport]]:
    return ((pool, region, at) for pool, regions in sorted(status.pools.items()) for region, at in sorted(regions.items()))


def _workers(workers: Sequence[WorkerReport], room: int, *, wide: bool) -> RenderableType:
    """The busiest first. room: lines."""
    busiest = sorted(workers, key=lambda one: (-one.busy, -(one.tokens_per_second or 0), one.pool, one.region, one.node))
    rows = [
        (_name(one.node), _name(one.pool), _takes(one), str(one.busy), str(one.busy + one.free),
         "–" if one.tokens_per_second is None else f"{one.tokens_per_second:.0f}",
         "–" if one.prompt_tokens <= 0 else f"{one.cached_tokens / one.prompt_tokens:.0%}")
        for one in busiest[:room]
    ]  # fmt: skip
    table = _table(("worker", "pool", "-models", "+busy", "+slots", "+tokens/s", "+cached"), rows, wide=wide)
    more = len(workers) - room
    return table if more <= 0 else Group(table, Text(f"and {more} more", style="dim"))


def _takes(worker: WorkerReport) -> str:
    """The models that it takes work for, or why it takes none."""
    return "drained" if worker.drained else "draining" if worker.draining else ", ".join(map(_name, worker.models))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], *, wide: bool) -> Table:
    """columns: headings; `+` marks numbers, and `-` what a narrow terminal does without."""
    kept = [place for place, heading in enumerate(columns) if wide or heading[0] != "-"]
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for place in kept:
        right = columns[place][0] == "+"
        table.add_column(columns[place].lstrip("+-"), justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(row[place] for place in kept))
    return table


def _name(text: str) -> str:
    """A name as others chose it, short and without control characters."""
    shown = printable(text)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"
