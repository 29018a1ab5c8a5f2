"""The worker's own credentials at the upstream: each request has them, and nothing else does."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from lacre.errors import SettingsError
from lacre_backend.settings import Upstream
from lacre_backend.upstream.app import create_app
from lacre_backend.upstream.credentials import MAX_FILE, FixedHeaders
from lacre_backend.upstream.origins import Origins
from lacre_backend.upstream.probe import Probe
from lacre_fabric.settings import parse
from parts.behind import answering, ask, serving
from parts.upstream import CHAT, JSON, PREDICT, granted, settings

SECRET = "k3y-canary-4711"
OK = answering(200, JSON, b"{}")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "server.key", SECRET.encode())


def written(path: Path, content: bytes) -> Path:
    path.touch(0o600)
    path.write_bytes(content)
    return path


def table(file: Path, more: str = "") -> str:
    return f'credentials = [{{file = "{file}"{more}}}]'


async def test_each_request_has_it_and_a_caller_s_own_does_not_displace_it(file: Path) -> None:
    more = f'credentials = [{{file = "{file}"}}, {{header = "x-api-key", file = "{file}"}}]\nheaders = ["x-mine"]'
    theirs = [("Authorization", "Bearer theirs"), ("X-API-Key", "theirs"), ("x-mine", "1")]
    async with serving(OK) as server:
        upstream = settings(server.url, more)
        app = create_app(upstream, Origins(upstream))
        await ask(app, granted(), "POST", PREDICT, b"x", theirs)
        body = b'{"model": "writer", "messages": [], "max_tokens": 1}'
        await ask(app, granted("chat", "writer"), "POST", CHAT, body, theirs)
    for scope in server.seen:
        headers = [(name, value) for name, value in scope["headers"] if name in (b"authorization", b"x-api-key")]
        assert sorted(headers) == [(b"authorization", f"Bearer {SECRET}".encode()), (b"x-api-key", SECRET.encode())]
    assert server.seen[0]["headers"].count((b"x-mine", b"1")) == 1


@pytest.mark.parametrize(
    ("more", "value"),
    [
        ("", f"Bearer {SECRET}"),
        (', scheme = "Basic"', f"Basic {SECRET}"),
        (', scheme = ""', SECRET),
        (', header = "x-api-key"', SECRET),
        (', header = "x-api-key", scheme = "Token"', f"Token {SECRET}"),
    ],
)
def test_schemes(file: Path, more: str, value: str) -> None:
    [(_, found)] = FixedHeaders(settings("http://127.0.0.1:1", table(file, more)).credentials).headers
    assert found.decode() == value


async def test_a_health_check_has_it_and_a_changed_file_is_read_again(file: Path) -> None:
    async with serving(OK) as server:
        upstream = settings(server.url, f'{table(file)}\nhealth = "/health"')
        origins = Origins(upstream)
        probe, app = Probe(upstream, origins), create_app(upstream, origins)
        await probe.look()
        assert server.headers["authorization"] == f"Bearer {SECRET}"
        new = written(file.with_suffix(".new"), b"another\n")
        new.replace(file)
        with capture_logs() as logs:
            await probe.look()
        assert server.headers["authorization"] == "Bearer another"
        assert [entry["event"] for entry in logs if "credential" in entry["event"]] == ["upstream.credential_read"]
        await ask(app, granted(), "POST", PREDICT)
        assert server.headers["authorization"] == "Bearer another"
        await probe.close()


@pytest.mark.parametrize("fault", ["gone", "open", "empty"])
def test_a_file_that_goes_bad_later_leaves_the_last_value(file: Path, fault: str) -> None:
    fixed = FixedHeaders(settings("http://127.0.0.1:1", table(file)).credentials)
    if fault == "gone":
        file.unlink()
    elif fault == "open":
        file.chmod(0o644)
    else:
        file.write_bytes(b"")
    with capture_logs() as logs:
        fixed.reload()
        fixed.reload()
    assert [entry["event"] for entry in logs] == ["upstream.credential_kept"], "once"
    assert str(file) in logs[0]["reason"]
    assert list(fixed.headers) == [(b"authorization", f"Bearer {SECRET}".encode())]
    written(file, b"back").chmod(0o600)
    fixed.reload()
    assert list(fixed.headers) == [(b"authorization", b"Bearer back")]


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (SECRET.encode(), 0o644, "chmod 600"),
        (b" \n", 0o600, "is empty"),
        (f"{SECRET}\nx-evil: 1".encode(), 0o600, "holds several lines"),
        (f"{SECRET}\xe9".encode(), 0o600, "holds several lines, or characters"),
        (f"bearer {SECRET}".encode(), 0o600, "begins with 'Bearer'"),
        (SECRET.encode() * (MAX_FILE // 8), 0o600, "larger than 8192 bytes"),
        (None, 0, "cannot read .*No such file"),
    ],
    ids=["open", "empty", "lines", "characters", "scheme", "large", "missing"],
)
def test_files_that_are_refused_by_name_without_their_content(
    tmp_path: Path, content: bytes | None, mode: int, said: str
) -> None:
    path = tmp_path / "server.key"
    if content is not None:
        written(path, content).chmod(mode)
    with pytest.raises(SettingsError, match=said) as raised:
        Origins(settings("http://127.0.0.1:1", table(path)))
    assert str(path) in str(raised.value)
    assert SECRET not in f"{raised.value} {raised.value.__cause__} {raised.value.__context__}"


async def test_it_is_in_no_log_and_no_repr(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with capture_logs() as logs:
        async with serving(OK) as server:
            upstream = settings(server.url, f'{table(file)}\nhealth = "/health"')
            origins = Origins(upstream)
            probe = Probe(upstream, origins)
            await probe.look()
            await ask(create_app(upstream, origins), granted(), "POST", PREDICT, b"x")
        await ask(create_app(upstream, origins), granted(), "POST", PREDICT, b"x")  # to nobody
        await probe.look()
        await probe.close()
    shown = [
        repr(logs),
        caplog.text,
        repr(upstream),
        repr(origins.fixed),
        repr(origins),
        repr(probe.reason()),
        *origins.lines(),
    ]
    assert "upstream.unavailable" in repr(logs)
    assert SECRET not in "\n".join(shown)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('credentials = [{header = "host", file = "k"}]', "describes the message itself"),
        ('credentials = [{header = "content-type", file = "k"}]', "describes the message itself"),
        ('credentials = [{header = "lacre-cache-salt", file = "k"}]', "describes the message itself"),
        ('credentials = [{header = "X-Key", file = "k"}]', r"credentials\.0\.header: must match pattern"),
        ('credentials = [{scheme = "Bearer ", file = "k"}]', r"credentials\.0\.scheme: must match pattern"),
        ("credentials = [{}]", r"credentials\.0\.file: missing"),
        ('credentials = [{file = "k"}, {file = "l"}]', r"credentials\.1\.header: is also"),
        ('credentials = [{header = "x-key", file = "k"}]\nheaders = ["x-key"]', r"credentials\.0\.header: is also"),
        ('credentials = [{value = "s3cret", file = "k"}]', r"credentials\.0\.value: unknown key"),
    ],
)
def test_settings_that_are_refused(lines: str, said: str) -> None:
    text = f'origin = "http://127.0.0.1:1"\n{lines}\n[[models]]\nname = "m"\nallow = ["GET /"]'
    with pytest.raises(SettingsError, match=said) as raised:
        parse(Upstream, text, Path("worker.toml"))
    assert "s3cret" not in str(raised.value)


def test_a_path_is_taken_from_the_settings_folder(tmp_path: Path) -> None:
    written(tmp_path / "k", SECRET.encode())
    text = 'origin = "http://127.0.0.1:1"\ncredentials = [{file = "k"}]\n[[models]]\nname = "m"\nallow = ["GET /"]'
    upstream = parse(Upstream, text, tmp_path / "worker.toml")
    assert upstream.credentials[0].file == Path(os.path.realpath(tmp_path)) / "k"
    assert len(list(FixedHeaders(upstream.credentials).headers)) == 1
