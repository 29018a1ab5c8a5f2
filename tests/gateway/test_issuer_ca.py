"""`[[issuers]] ca`: the CA of an issuer's addresses, beside the system's CAs for all others."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_fabric.logs import make_log
from lacre_gateway.auth.fetch import FetchFailed, fetch, make_client
from lacre_gateway.auth.issuers import trusted
from lacre_gateway.auth.jwks_remote import RemoteKeys, Timing
from lacre_gateway.doctor.findings import Findings, State
from lacre_gateway.doctor.trust import check_issuers
from lacre_gateway.settings import Issuer, parse
from parts.certificates import DAY, Ca
from parts.stage import until
from parts.tls_issuer import DISCOVERY, TlsIssuer, running

QUICK = Timing(retry=0.02, patience=0.05, cooldown=0.01)


@pytest.fixture
def ca(tmp_path: Path) -> Ca:
    return Ca(tmp_path / "ca")


@pytest.fixture
def issuer(ca: Ca, tmp_path: Path) -> Iterator[TlsIssuer]:
    with running(ca, tmp_path / "issuer") as found:
        yield found


def settings(url: str, **more: object) -> Issuer:
    return Issuer.model_validate({"issuer": url, "audience": "lacre", "algorithms": ["EdDSA"], **more})


class Kept:
    """Keys of an issuer, and what the gateway logs of them."""

    def __init__(self, issuer: TlsIssuer, ca: Path | None) -> None:
        self.log = io.StringIO()
        self.keys = RemoteKeys(
            issuer.url, None, ("EdDSA",), place="issuers.0", log=make_log(self.log), timing=QUICK, ca=ca
        )  # fmt: skip
        self.keys.start()

    async def said(self, words: str) -> None:
        await until(lambda: words in self.log.getvalue())


async def test_keys_come_from_an_issuer_of_a_private_ca(issuer: TlsIssuer, ca: Ca) -> None:
    kept = Kept(issuer, ca.file)
    await until(lambda: kept.keys.usable)
    assert issuer.asked[:2] == [DISCOVERY, "/keys"]
    assert kept.log.getvalue() == ""
    await kept.keys.close()


async def test_without_its_ca_the_issuer_is_not_trusted_and_the_log_says_what_to_do(issuer: TlsIssuer) -> None:
    kept = Kept(issuer, None)
    await kept.said("is not signed by a trusted CA: set the issuer's `ca` to the CA that signed it")
    assert issuer.asked == []
    await kept.keys.close()


async def test_the_file_replaces_the_system_s_cas_for_this_issuer_alone(issuer: TlsIssuer, ca: Ca, tmp_path: Path) -> None:
    """Another private CA does not verify it, and a file of two does."""
    other = Ca(tmp_path / "other", "other")
    kept = Kept(issuer, other.file)
    await kept.said("not signed by a trusted CA")
    both = tmp_path / "both.pem"
    both.write_bytes(other.file.read_bytes() + ca.file.read_bytes())
    second = Kept(issuer, both)
    await until(lambda: second.keys.usable)
    await kept.keys.close()
    await second.keys.close()


async def test_a_renewed_file_is_read_without_a_restart(issuer: TlsIssuer, ca: Ca, tmp_path: Path) -> None:
    """Also one that was half written for a while, or gone."""
    file = tmp_path / "issuer-ca.pem"
    file.write_bytes(Ca(tmp_path / "old", "old").file.read_bytes())
    kept = Kept(issuer, file)
    await kept.said("not signed by a trusted CA")
    file.write_bytes(ca.file.read_bytes()[:300])
    await kept.said("issuers.0.ca: cannot use")
    file.unlink()
    await kept.said("No such file")
    file.write_bytes(ca.file.read_bytes())
    await until(lambda: kept.keys.usable)
    assert "issuer keys read again" in kept.log.getvalue()
    await kept.keys.close()


@pytest.mark.parametrize(
    ("valid", "host", "words"),
    [(-DAY, "localhost", "is not valid now: renew it"), (30 * DAY, "other.example", "is for another host")],
)
async def test_other_faults_of_a_certificate_have_their_own_words(
    valid: timedelta, host: str, words: str, ca: Ca, tmp_path: Path
) -> None:
    with running(ca, tmp_path / "issuer", host, valid) as issuer:
        kept = Kept(issuer, ca.file)
        await kept.said(words)
        await kept.keys.close()


async def test_a_damaged_renewal_keeps_the_last_good_ca(issuer: TlsIssuer, ca: Ca, tmp_path: Path) -> None:
    """Also after a fetch has failed for another reason; the log says why the file is not used."""
    file = tmp_path / "issuer-ca.pem"
    file.write_bytes(ca.file.read_bytes())
    kept = Kept(issuer, file)
    await until(lambda: kept.keys.usable)
    file.write_bytes(ca.file.read_bytes()[:300])
    assert await kept.keys.seek("unknown", "EdDSA") is None  # asks the issuer, with the CA from before
    assert kept.log.getvalue().count("issuer ca refused, the last good one stays") == 1
    assert "issuer keys not read" not in kept.log.getvalue()
    file.write_bytes(ca.file.read_bytes())
    assert await kept.keys.seek("unknown", "EdDSA") is None
    assert kept.log.getvalue().count("issuer ca taken") == 1
    await kept.keys.close()


async def test_an_issuer_that_moves_to_another_ca(ca: Ca, tmp_path: Path) -> None:
    """Its new certificate is trusted as soon as the file has the new CA."""
    file, other = tmp_path / "issuer-ca.pem", Ca(tmp_path / "other", "other")
    file.write_bytes(ca.file.read_bytes())
    with running(other, tmp_path / "issuer") as issuer:
        kept = Kept(issuer, file)
        await kept.said("not signed by a trusted CA")
        file.write_bytes(ca.file.read_bytes() + other.file.read_bytes())
        await until(lambda: kept.keys.usable)
        await kept.keys.close()


async def test_an_issuer_that_does_not_run_is_not_said_to_be_distrusted() -> None:
    async with make_client("https://127.0.0.1:1") as client:
        with pytest.raises(FetchFailed, match="cannot be reached: nothing listens there"):
            await fetch(client, "https://127.0.0.1:1/keys", None)


def damaged(ca: Ca, folder: Path, how: str) -> Path:
    """A file that is not the CA's."""
    file, whole = folder / "damaged.pem", ca.file.read_text()
    contents = {
        "empty": "", "not PEM": "hello", "a key": ca.issue(folder, "leaf").key.read_text(), "half written": whole[:300],
        "one good and a half": whole + whole[:300], "letters lost": whole.replace("M", "*", 3),
    }  # fmt: skip
    if how in contents:
        file.write_text(contents[how])
    elif how == "a folder":
        file.mkdir()
    elif how == "a device":
        file.symlink_to("/dev/zero")
    elif how == "a FIFO":
        os.mkfifo(file)
    elif how == "unending":
        with file.open("wb") as out:
            out.truncate(2**30)
    return file


DAMAGE = {
    "empty": "holds no certificate in PEM form",
    "not PEM": "holds no certificate in PEM form",
    "a key": "holds no certificate in PEM form",
    "half written": "damaged or cut short",
    "one good and a half": "damaged or cut short",
    "letters lost": "damaged or cut short",
    "a folder": "it is not a file",
    "a device": "it is not a file",
    "a FIFO": "it is not a file",
    "missing": "No such file",
    "unending": "larger than 4194304 bytes",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_file_that_is_no_ca_ends_the_start(how: str, ca: Ca, tmp_path: Path) -> None:
    found = settings("https://issuer.example", ca=damaged(ca, tmp_path, how))
    with pytest.raises(SettingsError, match=f"issuers.0.ca: cannot use .*{DAMAGE[how]}"):
        trusted([found], make_log(io.StringIO()))


def test_a_file_that_the_gateway_may_not_read_ends_the_start(ca: Ca) -> None:
    ca.file.chmod(0)
    found = settings("https://issuer.example", ca=ca.file)
    me = os.geteuid()
    if me == 0:  # root reads everything
        os.seteuid(65534)
    try:
        with pytest.raises(SettingsError, match=r"issuers.0.ca: cannot use .*Permission denied"):
            trusted([found], make_log(io.StringIO()))
    finally:
        os.seteuid(me)


async def test_the_doctor_says_which_setting_to_correct(ca: Ca, tmp_path: Path) -> None:
    text = f"""
        gateway = "g1"
        public_url = "https://gateway.example"
        trust = "{"A" * 43}"
        signing_key = "grant.pem"
        audit = "audit"
        nats = {{url = "nats://127.0.0.1:4222", credentials = "gateway.json"}}
        [[issuers]]
        issuer = "https://issuer.example"
        audience = "lacre"
        algorithms = ["EdDSA"]
        ca = "{damaged(ca, tmp_path, "half written")}"
    """
    findings = Findings()
    await check_issuers(parse(text, tmp_path / "gateway.toml"), findings)
    [found] = findings.found
    assert (found.check, found.state, found.remedy) == ("issuers.0", State.FAILED, "correct issuers.0.ca")
    assert "issuers.0.ca: cannot use" in found.detail
