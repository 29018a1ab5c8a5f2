"""Alerts of budgets: when they go out, how they are signed, and what a receiver that fails or hangs costs nobody."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import io
import json
import shutil
import ssl
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import structlog

from lacre.errors import SettingsError
from lacre.runtime import tasks
from lacre.runtime.watched_files import watch
from lacre_fabric.logs import Log, make_log
from lacre_gateway.budget.alerts import BudgetAlerts
from lacre_gateway.budget.lease import Account, Need
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.budget.webhook import MAX_WAITING, TRIES, WebhookEvent, WebhookSender, read_keys, signed
from lacre_gateway.serve import _Link, _watched
from lacre_gateway.settings import Webhook
from parts.certificates import Ca
from parts.fake_worker import Script
from parts.waiting import until

from .conftest import PutUp

KEY, OLD, NEW = bytes(range(32)), bytes(24), bytes([7]) * 24
NOW = 1_800_000_000.5
DAY = LimitKind.TOKENS_PER_DAY


def written(folder: Path, *keys: bytes, mode: int = 0o600) -> Path:
    path = folder / "webhook-secret"
    path.write_text("".join(f"whsec_{base64.b64encode(key).decode()}\n" for key in keys))
    path.chmod(mode)
    return path


@dataclass
class Receiver:
    """An HTTP server that answers with these statuses in turn, and then with the last one; 0: it never answers."""

    statuses: list[int]
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    port: int = 0
    open: list[asyncio.StreamWriter] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.append(writer)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
        fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in head)}
        body = await reader.readexactly(int(fields["content-length"]))
        self.got.append((fields, body))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if status:
            told = "location: http://127.0.0.1:1/\r\ncontent-length: 0\r\nconnection: close"
            writer.write(f"HTTP/1.1 {status} x\r\n{told}\r\n\r\n".encode())
            await writer.drain()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"


@asynccontextmanager
async def receiver(*statuses: int, context: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    made = Receiver(list(statuses))
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=context)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        for writer in made.open:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


@asynccontextmanager
async def sender(
    folder: Path, url: str, tries: tuple[float, ...] = (0.0, 0.0, 0.0), log: Log | None = None, ca: Path | None = None
) -> AsyncIterator[WebhookSender]:
    settings = Webhook(url=url, secret=written(folder, KEY, OLD), ca=ca)
    made = WebhookSender(settings, log or structlog.get_logger(), lambda: NOW, tries)
    try:
        yield made
    finally:
        await made.close()


def event(number: int = 1, until: float | None = None) -> WebhookEvent:
    return WebhookEvent(f"msg_{number}", "budget.threshold", NOW - 0.25, {"level": 80}, until, {"limit": "tokens_per_day"})


def lost(log: io.StringIO) -> list[tuple[str, str, int]]:
    """What the log says of alerts that were given up: id, reason, tries."""
    lines = [line for line in map(json.loads, log.getvalue().splitlines()) if line["event"] == "alert given up"]
    assert all(line["limit"] == "tokens_per_day" and "[alerts]" in line["remedy"] for line in lines)
    return [(line["id"], line["reason"], line["number"]) for line in lines]


async def test_an_event_is_signed_as_the_specification_says(tmp_path: Path) -> None:
    """Computed here as a receiver does it: from the fields and the bytes that came, with each secret."""
    async with receiver(204) as hook, sender(tmp_path, hook.url) as sending:
        sending.send(event())
        await until(lambda: len(hook.got) == 1)
    [(fields, body)] = hook.got
    assert json.loads(body) == {"type": "budget.threshold", "timestamp": "2027-01-15T08:00:00.250Z", "data": {"level": 80}}
    assert (fields["webhook-id"], fields["webhook-timestamp"]) == ("msg_1", "1800000000")
    content = f"{fields['webhook-id']}.{fields['webhook-timestamp']}.".encode() + body
    due = [base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode() for key in (KEY, OLD)]
    assert fields["webhook-signature"].split(" ") == [f"v1,{each}" for each in due]


async def test_a_new_secret_and_a_new_ca_count_without_a_restart(tmp_path: Path) -> None:
    """Files that cannot be used change nothing, and the log says so."""
    old, new, log = Ca(tmp_path, "old"), Ca(tmp_path, "new"), io.StringIO()
    pair, ca = new.issue(tmp_path, "hook", "localhost"), tmp_path / "ca.pem"
    shutil.copy(old.file, ca)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.certificate, pair.key)

    def told(event: str) -> bool:
        return event in log.getvalue()

    async with receiver(204, context=context) as hook:
        url = f"https://localhost:{hook.port}/hook"
        async with sender(tmp_path, url, (0.0,), log=make_log(log), ca=ca) as sending:
            watching = asyncio.create_task(watch(lambda: sending.files, every=0.02))
            sending.send(event(1))
            await until(lambda: lost(log))
            secret = f"whsec_{base64.b64encode(NEW).decode()}"
            for what, path, whole in (("ca", ca, new.file.read_text()), ("secret", tmp_path / "webhook-secret", secret)):
                path.write_text(whole[:20])
                await until(partial(told, f"webhook {what} refused"))
                path.write_text(whole)
                await until(partial(told, f"webhook {what} taken"))
            sending.send(event(2))
            await until(lambda: hook.got)
            await tasks.end(watching)
    [(fields, body)] = hook.got
    assert fields["webhook-signature"] == signed([NEW], "msg_2", int(NOW), body)["webhook-signature"]


def test_a_client_that_cannot_be_made_shows_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address may hold a secret, and this error is printed."""
    monkeypatch.setenv("HTTPS_PROXY", "socks9://x")
    settings = Webhook(url="https://hooks.example/s3cret", secret=written(tmp_path, KEY))
    with pytest.raises(SettingsError, match=r"^alerts: .*correct SSL_CERT_FILE, SSL_CERT_DIR and the \*_PROXY") as caught:
        WebhookSender(settings, structlog.get_logger())
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_a_known_signature() -> None:
    """The example that the specification's libraries test themselves with."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    told = signed([key], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert told["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(("statuses", "tries"), [((500, 200), 2), ((302, 200), 2), ((404,), 3), ((503,), 3), ((410,), 1)])
async def test_a_failed_event_is_tried_again_and_given_up(tmp_path: Path, statuses: tuple[int, ...], tries: int) -> None:
    """No redirect is followed. A receiver that says 410 wants no more of it."""
    async with receiver(*statuses) as hook, sender(tmp_path, hook.url) as sending:
        sending.send(event())
        await until(lambda: sending._task is not None and sending._task.done())
    assert [fields["webhook-id"] for fields, _ in hook.got] == ["msg_1"] * tries


async def test_a_failed_event_delays_no_other(tmp_path: Path) -> None:
    async with receiver(500, 200) as hook, sender(tmp_path, hook.url, (0.0, 3600.0)) as sending:
        sending.send(event(1))
        sending.send(event(2))
        await until(lambda: len(hook.got) == 2)
    assert [fields["webhook-id"] for fields, _ in hook.got] == ["msg_1", "msg_2"]


async def test_what_waits_for_a_receiver_that_hangs_is_bounded(tmp_path: Path) -> None:
    """And each alert that is lost has its line: those for which there was no room, and those that wait at the end."""
    log = io.StringIO()
    async with receiver(0) as hook:
        async with sender(tmp_path, hook.url, log=make_log(log)) as sending:
            for number in range(MAX_WAITING + 2):
                sending.send(event(number))
            await until(lambda: len(hook.got) == 1)
            assert len(sending._waiting) == MAX_WAITING
        sending.send(event(900))
    told = lost(log)
    assert told[:2] == [(f"msg_{MAX_WAITING + number}", "too many alerts wait", 0) for number in range(2)]
    assert {reason for _, reason, _ in told[2:]} == {"the gateway ends"}
    assert {number for number, _, _ in told} == {f"msg_{number}" for number in (*range(MAX_WAITING + 2), 900)}


@pytest.mark.parametrize(
    ("statuses", "reason", "tries"), [((500,), "500", 3), ((302,), "302", 3), ((410,), "410", 1), ((500, 204), None, 2)]
)
async def test_an_alert_that_is_given_up_says_why(
    tmp_path: Path, statuses: tuple[int, ...], reason: str | None, tries: int
) -> None:
    log = io.StringIO()
    async with receiver(*statuses) as hook, sender(tmp_path, hook.url, log=make_log(log)) as sending:
        sending.send(event())
        await until(lambda: sending._task is not None and sending._task.done())
        assert lost(log) == ([] if reason is None else [("msg_1", reason, tries)])
        assert hook.url not in log.getvalue()
    assert lost(log) == ([] if reason is None else [("msg_1", reason, tries)])


async def test_an_alert_of_a_window_that_is_over_is_not_tried_again(tmp_path: Path) -> None:
    log = io.StringIO()
    async with receiver(500) as hook, sender(tmp_path, hook.url, log=make_log(log)) as sending:
        sending.send(event(1, until=NOW - 1))
        sending.send(event(2, until=NOW + 1))
        await until(lambda: sending._task is not None and sending._task.done())
    assert [fields["webhook-id"] for fields, _ in hook.got].count("msg_1") == 1
    assert sorted(lost(log)) == [("msg_1", "the limit's window has ended", 1), ("msg_2", "500", 3)]


def test_tries_outlast_a_nights_maintenance() -> None:
    assert 6 * 3600 < sum(TRIES) < 24 * 3600


@pytest.mark.parametrize(
    ("host", "trusted", "fault"), [("localhost", True, 0), ("hooks.example", True, 1), ("localhost", False, 1)]
)
async def test_a_private_address_is_proved_by_its_certificate(tmp_path: Path, host: str, trusted: bool, fault: int) -> None:
    """The name leads to this machine. Nothing is sent to a server whose certificate is another's, or of an unknown CA."""
    ca, other = Ca(tmp_path, "ours"), Ca(tmp_path, "other")
    pair, log = ca.issue(tmp_path, "hook", host), io.StringIO()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.certificate, pair.key)
    async with receiver(204, context=context) as hook:
        url = f"https://localhost:{hook.port}/hook"
        async with sender(tmp_path, url, log=make_log(log), ca=(ca if trusted else other).file) as sending:
            sending.send(event())
            await until(lambda: sending._task is not None and sending._task.done())
    assert len(hook.got) == 1 - fault
    assert ("certificate" in log.getvalue()) == bool(fault)
    assert [number for number, _, _ in lost(log)] == ["msg_1"] * fault


async def test_nobody_listens(tmp_path: Path) -> None:
    log = io.StringIO()
    async with receiver(204) as hook:
        url = hook.url
    async with sender(tmp_path, url, log=make_log(log)) as sending:
        sending.send(event())
        await until(lambda: sending._task is not None and sending._task.done())
    assert [(number, tries) for number, _, tries in lost(log)] == [("msg_1", 3)]


async def test_signatures_have_the_time_of_the_message_server(put_up: PutUp, tmp_path: Path) -> None:
    """Receivers reject a signature that is minutes off, which this machine's clock may be."""
    written(tmp_path, KEY)
    async with receiver(204) as hook:
        stage = await put_up(settings=f'alerts = {{ url = "{hook.url}", secret = "webhook-secret" }}')
        stage.gateway.budgets._offset = 86_400.0
        assert stage.gateway.webhook is not None
        stage.gateway.webhook.send(event())
        await until(lambda: len(hook.got) == 1)
    assert abs(float(hook.got[0][0]["webhook-timestamp"]) - stage.gateway.clock() - 86_400) < 60


@pytest.mark.parametrize(
    "content", ["", "x", "whsec_", "whsec_!!!!", f"whsec_{base64.b64encode(bytes(23)).decode()}", "whsec_é"]
)
def test_a_secret_that_is_none(tmp_path: Path, content: str) -> None:
    path = written(tmp_path, KEY)
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"alerts\.secret: .*openssl rand"):
        read_keys(path)


def test_a_secret_that_others_can_read_and_one_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"0?644"):
        read_keys(written(tmp_path, KEY, mode=0o644))
    with pytest.raises(SettingsError, match=r"cannot read .*openssl rand"):
        read_keys(tmp_path / "none")
    with pytest.raises(SettingsError, match="one secret, or two"):
        read_keys(written(tmp_path, KEY, OLD, KEY))


@pytest.mark.parametrize("url", ["http://hooks.example.com/x", "ftp://x", "https://u:p@hooks.example.com/", "nonsense"])
def test_an_address_that_would_not_keep_a_secret(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="https address of a webhook"):
        Webhook(url=url, secret=tmp_path / "x")


def told() -> tuple[list[WebhookEvent], BudgetAlerts]:
    sent: list[WebhookEvent] = []
    return sent, BudgetAlerts(sent.append, [DAY], "g1", lambda: "EUR")


def test_levels() -> None:
    """Each once, also when it is passed in one step; and again once the ceiling was raised."""
    sent, alerts = told()
    account = Account("user.x.y", "alice", "g1", 60.0)
    proposal = account.propose(None, {DAY: 1}, [Need({DAY: (100, 100)})], 0.0)
    counter = account.counter(DAY, 1, 100)
    for used in (0, 79, 80, 81, 99, 100, 100):
        counter.used = used
        alerts.wrote(account, proposal, 5.0)
    assert [(each.data["level"], each.data["used"]) for each in sent] == [(80, 80), (100, 100)]
    counter.ceiling = 120
    alerts.wrote(account, proposal, 5.0)
    assert [each.data["level"] for each in sent] == [80, 100, 80]
    counter.reserve(21)
    counter.settle(21, 0)
    alerts.refused([(account, counter, 10)], 5.0)
    assert len(sent) == 3
    for _ in range(2):
        alerts.refused([(account, counter, 21)], 5.0)
    counter.used = 120
    alerts.wrote(account, proposal, 5.0)
    assert [(each.data["level"], each.data["refused"]) for each in sent[2:]] == [(80, False), (100, True), (100, False)]
    assert len({each.id for each in sent}) == 5
    counter.used = 100
    again, others = told()
    others.wrote(account, proposal, 9.0)
    assert [each.id for each in again] == [sent[2].id], "another gateway's alert has the same id"
    assert sent[0].data == {
        "level": 80, "budget": "alice", "key": "user.x.y", "limit": "tokens_per_day", "window": 1, "used": 80, "ceiling": 100,
        "refused": False, "unit": "tokens", "currency": None, "resets_at": 2 * 86400.0, "gateway": "g1",
    }  # fmt: skip


def test_a_request_that_is_too_large_hides_no_alert() -> None:
    """Nothing was booked for it, so the limit is as far from its end as before."""
    sent, alerts = told()
    account = Account("user.x.y", "alice", "g1", 60.0)
    proposal = account.propose(None, {DAY: 1}, [Need({DAY: (1, 100)})], 0.0)
    counter = account.counter(DAY, 1, 100)
    counter.reserve(30)
    counter.settle(30, 5)
    alerts.refused([(account, counter, 96)], 1.0)
    assert sent == []
    counter.used = 75
    alerts.refused([(account, counter, 30)], 2.0)
    for counter.used in (85, 100):
        alerts.wrote(account, proposal, 3.0)
    alerts.refused([(account, counter, 30)], 4.0)
    told_of = [(each.data["level"], each.data["used"], each.data["refused"]) for each in sent]
    assert told_of == [(100, 75, True), (80, 85, False), (100, 100, False)]


def test_other_limits_and_limits_of_zero_alert_nobody() -> None:
    sent, alerts = told()
    account = Account("k", "n", "g1", 60.0)
    counter = account.counter(LimitKind.REQUESTS_PER_MINUTE, 1, 1)
    counter.used = 1
    alerts.refused([(account, counter, 1), (account, account.counter(DAY, 1, 0), 1)], 0.0)
    assert sent == []


async def test_a_gateway_alerts_while_it_serves(put_up: PutUp, tmp_path: Path) -> None:
    """The receiver hangs, and no request waits for it."""
    plans = 'default_plan = "p"\n[plans.p.user]\ntokens_per_day = 5000\n'
    stage = await put_up(plans=plans)
    async with receiver(0) as hook, sender(tmp_path, hook.url) as sending:
        stage.gateway.budgets.alerts = BudgetAlerts(sending.send, [DAY], "g1", lambda: "USD")
        async with stage.fake_worker() as worker, stage.http() as client:
            worker.script = Script(usage={"completion_tokens": 250})
            answers = [(await stage.post(client)).status_code for _ in range(30)]
        await until(lambda: len(hook.got) == 1)
    assert answers[0] == 200 and answers[-1] == 429
    assert json.loads(hook.got[0][1])["data"]["budget"] == "alice of acme on p"


async def test_a_gateway_reads_where_to_alert_from_its_settings(put_up: PutUp, tmp_path: Path) -> None:
    """A file that others can read ends the start."""
    plans = 'default_plan = "p"\n[plans.p.user]\nrequests_per_minute = 1\n'
    written(tmp_path, KEY)
    async with receiver(200) as hook:
        table = f'alerts = {{ url = "{hook.url}", secret = "webhook-secret", limits = ["requests_per_minute"] }}'
        stage = await put_up(plans=plans, settings=table)
        async with stage.fake_worker(), stage.http() as client:
            assert (await stage.post(client)).status_code == 200
            assert (await stage.post(client)).status_code == 429
        await until(lambda: len(hook.got) == 1)
        data = json.loads(hook.got[0][1])["data"]
        assert (data["level"], data["limit"], data["ceiling"]) == (100, "requests_per_minute", 1)
        assert stage.gateway.webhook is not None
        assert [*_watched(stage.gateway, _Link(), None)] == [*stage.gateway.webhook.files]
        (tmp_path / "webhook-secret").chmod(0o640)
        with pytest.raises(SettingsError, match=r"640"):
            await put_up(settings=table)
