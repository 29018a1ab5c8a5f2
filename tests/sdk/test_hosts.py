"""Which `Host` means this machine: what a program may write into a base URL, and what a web page could make of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre.errors import SettingsError
from lacre.runtime.served_hosts import Hosts, as_origin, base_url

PRINTED = {
    "127.0.0.1": "http://127.0.0.1:8080/v1",
    "127.0.0.2": "http://127.0.0.2:8080/v1",
    "LocalHost": "http://localhost:8080/v1",
    "0.0.0.0": "http://127.0.0.1:8080/v1",
    "192.0.2.7": "http://192.0.2.7:8080/v1",
    "::1": "http://[::1]:8080/v1",
    "0:0:0:0:0:0:0:1": "http://[::1]:8080/v1",
    "::": "http://[::1]:8080/v1",
    "FE80::1%eth0": "http://[fe80::1]:8080/v1",
}


@pytest.mark.parametrize(("listening", "url"), PRINTED.items())
def test_what_is_printed_is_answered(listening: str, url: str) -> None:
    assert base_url(listening, 8080) == url
    assert Hosts.of(listening, 8080).know(url.removeprefix("http://").removesuffix("/v1"))


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "[::1]", "localhost.", "127.0.0.1:", "localhost:80", "box", "BOX:80"]
)
def test_port_80_need_not_be_written(host: str) -> None:
    assert Hosts.of("127.0.0.1", 80, ["Box"]).know(host)


ANOTHER = ["localhost", "127.0.0.1", "localhost:80", "localhost:8081", "localhost:08080x", "192.0.2.7:8080"]
NONE = [
    *("", ":8080", "evil.example:8080", "127.1:8080", "0x7f.0.0.1:8080", "2130706433:8080", "a@localhost:8080"),
    *("localhost:8080/x", "localhost:8080,evil.example", "[127.0.0.1]x:8080", "[::1]]:8080", "[]:8080"),
    *("löcalhost:8080", "localhost :8080"),
]


ELSEWHERE = [("127.0.0.1", host) for host in (*ANOTHER, *NONE)] + [("0.0.0.0", host) for host in NONE]


@pytest.mark.parametrize(("listening", "host"), ELSEWHERE)
def test_what_is_no_host_of_this_server(listening: str, host: str) -> None:
    assert not Hosts.of(listening, 8080).know(host)


def test_a_name_with_a_port_of_its_own() -> None:
    """As through a tunnel."""
    hosts = Hosts.of("127.0.0.1", 8080, ["box.lan:9000", "other.lan"])
    assert hosts.know("box.lan:9000") and hosts.know("other.lan:8080")
    assert not hosts.know("box.lan:8080") and not hosts.know("other.lan:9000")
    assert "box.lan:9000" in str(hosts) and "other.lan:8080" in str(hosts)


@pytest.mark.parametrize("name", ["", "two words", "http://box", "box/x", "[::1", "ü"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(SettingsError, match="is not a host"):
        Hosts.of("127.0.0.1", 8080, [name])


@given(st.text(max_size=40))
def test_no_text_does_anything_but_yes_or_no(text: str) -> None:
    assert Hosts.of("0.0.0.0", 8080).know(text) in (True, False)


SENT = {
    "http://localhost:3000": "http://localhost:3000", "http://localhost:3000/": "http://localhost:3000",
    "HTTPS://App.Example": "https://app.example", "https://app.example:443/": "https://app.example",
    "http://app.example:443": "http://app.example:443", "http://[::1]:80": "http://[::1]",
    "chrome-extension://abcdef": "chrome-extension://abcdef", "null": "null",
}  # fmt: skip


@pytest.mark.parametrize(("written", "sent"), SENT.items())
def test_an_origin_is_what_a_browser_sends(written: str, sent: str) -> None:
    assert as_origin(written) == sent


@pytest.mark.parametrize(
    "written",
    ["", "*", "localhost", "localhost:3000", "http://", "http://a/b", "http://a?b", "http://u@a", "http://é", "http://[::g]"],
)
def test_an_origin_that_no_browser_sends(written: str) -> None:
    with pytest.raises(SettingsError, match="is not the origin"):
        as_origin(written)
