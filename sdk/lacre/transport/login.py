"""A person's login: what `lacre login` saved on this machine, and the access tokens that it yields (RFC 6749 section 6).

Rules:
- The refresh token is in the system's keyring, if the package `keyring` is installed and finds one. Otherwise it is in a
  file of mode 0600, like the rest.
- A login is for one deployment, named by the root that its clients pin. Another one never gets its tokens: it could use them.
- One process at a time renews. Many servers replace the refresh token at each use, and revoke a login whose old one comes again
  (RFC 9700 section 4.14.2).
- No token is logged, shown or part of an error.
"""

from __future__ import annotations

import configparser
import hashlib
import importlib
import json
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlencode

import httpx2

from lacre._version import __version__
from lacre.errors import LacreError, SettingsError, Unauthenticated
from lacre.runtime import file_locks, folders, forks, private_files
from lacre.runtime.json_objects import object_in, parse_object
from lacre.transport.dial import NoCookies
from lacre.transport.dialled import Dialled
from lacre.transport.mapped_errors import mapped
from lacre.transport.oauth import MAX_ANSWER, NONE_YET, Issued, RenewedToken
from lacre.transport.tls_settings import settings_checked

SERVICE: Final = "lacre"  # of the keyring's entry
MAX_FILE: Final = 64 * 1024  # bytes; a refresh token has some hundred, and a large JWT some thousand
PATIENCE: Final = 60.0  # seconds to wait for another process that renews: more than its own time limits
TIME_LIMIT: Final = httpx2.Timeout(10.0, read=30.0)  # of a login server, which only looks something up
OK: Final = 200
# What the package raises if it is missing, or if its configuration names a keyring that is not there.
_NO_KEYRING: Final = (ImportError, AttributeError, RuntimeError, ValueError, OSError, configparser.Error)
_UNWRITABLE: Final = "cannot keep the login in {} ({}): make it a folder that this user can write"
_FORM: Final = {"content-type": "application/x-www-form-urlencoded"}


@dataclass(frozen=True, slots=True)
class SavedLogin:
    """scope: None if the server chose it. refresh_token: empty while it is in the keyring. revoke_url: where it is made void;
    None if the server does not offer that.
    """

    issuer: str
    token_url: str
    client_id: str
    scope: str | None
    refresh_token: str = field(repr=False)
    revoke_url: str | None = None

    @classmethod
    def parse(cls, content: bytes) -> SavedLogin:
        """Raises LacreError, or another error for members of another form."""
        told = parse_object(content, "the file")
        scope, revoke_url = told["scope"], told["revoke_url"]
        texts = [told[name] for name in ("issuer", "token_url", "client_id", "refresh_token")]
        if not all(isinstance(each, str) for each in texts) or not all(
            isinstance(each, str | None) for each in (scope, revoke_url)
        ):
            raise TypeError
        issuer, token_url, client_id, refresh_token = texts
        return cls(issuer, token_url, client_id, scope, refresh_token, revoke_url)

    def encode(self) -> bytes:
        members = {
            "issuer": self.issuer, "token_url": self.token_url, "client_id": self.client_id, "scope": self.scope,
            "refresh_token": self.refresh_token, "revoke_url": self.revoke_url,
        }  # fmt: skip
        return json.dumps(members).encode()


class Vault(Protocol):
    """The functions of the package `keyring` that serve here."""

    def get_password(self, service_name: str, username: str) -> str | None: ...

    def set_password(self, service_name: str, username: str, password: str) -> None: ...

    def delete_password(self, service_name: str, username: str) -> None: ...


class OsKeyring:
    """One entry for each login, by its file's name. failure: the base of its errors."""

    def __init__(self, vault: Vault, failure: type[Exception]) -> None:
        self._vault = vault
        self._failure = failure

    @classmethod
    def find(cls) -> OsKeyring | None:
        """None without the package, on a machine without a keyring, or with one that the package cannot load."""
        try:
            module: Any = importlib.import_module("keyring")
            failure: Any = importlib.import_module("keyring.errors")
            usable = module.get_keyring().priority > 0
        except _NO_KEYRING:
            return None
        return cls(module, failure.KeyringError) if usable else None

    def read(self, name: str) -> str | None:
        """Raises SettingsError."""
        try:
            return self._vault.get_password(SERVICE, name)
        except self._failure as exc:
            raise SettingsError("the system's keyring cannot be read: unlock it, or run `lacre login --file`") from exc

    def write(self, name: str, secret: str) -> bool:
        """Whether the keyring took it."""
        try:
            self._vault.set_password(SERVICE, name, secret)
        except self._failure:
            return False
        return True

    def forget(self, name: str) -> None:
        """Does nothing if it holds none, or cannot be reached: a secret that stays there does nothing by itself."""
        try:
            self._vault.delete_password(SERVICE, name)
        except self._failure:
            return


class LoginStore:
    """The saved login of this user at one deployment. A new one replaces it. keyring: None to use the file alone."""

    def __init__(self, folder: Path, root: bytes, keyring: OsKeyring | None) -> None:
        """root: the deployment's, as its clients pin it."""
        self._folder = folder
        self._keyring = keyring
        self.path = _file(folder, root)

    @classmethod
    def default(cls, root: bytes) -> LoginStore:
        """In the state folder: `$XDG_STATE_HOME/lacre`, or `~/.local/state/lacre`. Raises SettingsError."""
        return cls(folders.state(), root, OsKeyring.find())

    def save(self, login: SavedLogin, *, in_file: bool = False) -> bool:
        """Whether the refresh token went into the keyring. in_file: not to try that. Raises SettingsError."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._alone():
                return self._write(login, in_file=in_file)
        except OSError as exc:
            raise SettingsError(_UNWRITABLE.format(self._folder, exc.strerror)) from exc

    def _write(self, login: SavedLogin, *, in_file: bool) -> bool:
        hidden = not in_file and self._keyring is not None and self._keyring.write(self.path.stem, login.refresh_token)
        private_files.replace(self.path, (replace(login, refresh_token="") if hidden else login).encode())
        return hidden

    def _alone(self) -> AbstractContextManager[None]:
        busy = "another process renews the login and does not end: try again"
        return file_locks.held(self.path.with_suffix(".lock"), busy, PATIENCE)

    def load(self) -> SavedLogin | None:
        """None if nobody has logged in. Raises SettingsError."""
        try:
            private_files.check(self.path, self.path.stat().st_mode)
            with self.path.open("rb") as file:
                login = SavedLogin.parse(file.read(MAX_FILE))
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise SettingsError(f"{self.path} cannot be read ({exc.strerror}): run `lacre login` again") from exc
        except SettingsError:
            raise
        except (LacreError, LookupError, TypeError) as exc:
            raise SettingsError(f"{self.path} is damaged: run `lacre login` again") from exc
        if login.refresh_token:
            return login
        secret = None if self._keyring is None else self._keyring.read(self.path.stem)
        if not secret:
            raise SettingsError("the keyring no longer has the login: run `lacre login` again")
        return replace(login, refresh_token=secret)

    def end(self, http: httpx2.Client) -> bool:
        """Forgets the login here, even if the server cannot be reached. Returns whether the server made the refresh token void
        (RFC 7009).

        Raises SettingsError if nobody is logged in, or the file cannot be removed.
        """
        if not self.path.is_file():
            raise SettingsError("nobody is logged in on this machine: check LACRE_URL")
        try:
            with self._alone():
                revoked = self._revoked(http)
                self._forget()
                return revoked
        except OSError as exc:
            raise SettingsError(_UNWRITABLE.format(self._folder, exc.strerror)) from exc

    def _revoked(self, http: httpx2.Client) -> bool:
        try:
            login = self.load()
            if login is None or login.revoke_url is None:
                return False
            asked = {"token": login.refresh_token, "token_type_hint": "refresh_token", "client_id": login.client_id}
            return post(http, login.revoke_url, asked)[0] == OK
        except LacreError:  # it is damaged, or the server cannot be reached: it is forgotten all the same
            return False

    def _forget(self) -> None:
        self.path.unlink(missing_ok=True)
        if self._keyring is not None:
            self._keyring.forget(self.path.stem)

    def renew(self, http: httpx2.Client) -> Issued:
        """A new access token. Raises SettingsError, Unauthenticated, NetworkError and others."""
        try:
            with self._alone():
                return self._renewed(http)
        except OSError as exc:
            raise SettingsError(_UNWRITABLE.format(self._folder, exc.strerror)) from exc

    def _renewed(self, http: httpx2.Client) -> Issued:
        login = self.load()  # another process may have replaced it
        if login is None:
            raise SettingsError("nobody is logged in here: run `lacre login`, or pass token=...")
        asked = {"grant_type": "refresh_token", "refresh_token": login.refresh_token, "client_id": login.client_id}
        began = time.monotonic()
        status, content = post(http, login.token_url, asked)
        try:
            issued = Issued.parse(status, content, began)
        except Unauthenticated as exc:
            again = "Run `lacre login` again."
            raise Unauthenticated(
                "the login has ended or was revoked", status=exc.status, problem=exc.problem, remedy=again
            ) from exc
        newer = (object_in(content) or {}).get("refresh_token")
        if isinstance(newer, str) and newer and newer != login.refresh_token:
            stored_in_file = SavedLogin.parse(self.path.read_bytes()).refresh_token != ""
            self._write(replace(login, refresh_token=newer), in_file=stored_in_file)
        return issued


class UserLogin(RenewedToken):
    """The saved login as the token of clients that were given none, and find no LACRE_TOKEN.

    A callable, which renews the access token before it expires. Thread-safe. Its requests use the system's certificate
    authorities and proxies, and not those of a client.
    """

    def __init__(self, store: LoginStore, transport: httpx2.BaseTransport | None = None) -> None:
        """transport: for its requests; None: a new connection for each."""
        self._store = store
        self._transport = transport
        self._lock = threading.Lock()
        self._issued = NONE_YET
        forks.watch(self)

    @classmethod
    def find(cls, root: bytes) -> UserLogin | None:
        """None if this user has no login at the deployment of this root."""
        with suppress(SettingsError, OSError):  # no home folder, or none that this user may read
            if _file(folders.state(), root).is_file():
                return cls(LoginStore.default(root))
        return None

    @property
    def awaited(self) -> AwaitedLogin:
        """The same for an event loop."""
        return AwaitedLogin(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, refused: str | None = None) -> str:
        with self._lock:
            if not self._issued.fresh(refused):
                with login_http(self._transport) as http:
                    self._issued = self._store.renew(http)
            return self._issued.token

    def ready(self, refused: str | None) -> str | None:
        """The token, if it needs no renewal."""
        issued = self._issued
        return issued.token if issued.fresh(refused) else None


class AwaitedLogin(RenewedToken):
    """A login for an event loop, which goes on while the token is renewed."""

    def __init__(self, login: UserLogin) -> None:
        self._login = login

    async def __call__(self, refused: str | None = None) -> str:
        if (token := self._login.ready(refused)) is not None:
            return token
        from anyio import to_thread  # noqa: PLC0415 - keeps `import lacre` fast

        return await to_thread.run_sync(self._login, refused)


def _file(folder: Path, root: bytes) -> Path:
    return folder / f"login-{hashlib.sha256(root).hexdigest()[:16]}.json"


def login_http(transport: httpx2.BaseTransport | None = None) -> httpx2.Client:
    """A client for a login server. Raises SettingsError."""
    headers = {"user-agent": f"lacre/{__version__}", "accept": "application/json", "accept-encoding": "identity"}
    with settings_checked(True, None):
        return httpx2.Client(headers=headers, cookies=NoCookies(), timeout=TIME_LIMIT, transport=transport)


def post(http: httpx2.Client, url: str, form: Mapping[str, str]) -> tuple[int, bytes]:
    """The status and the body of the answer. Raises NetworkError and SettingsError."""
    return fetched(http, "POST", url, urlencode(form).encode())


def fetched(http: httpx2.Client, method: str, url: str, content: bytes | None = None) -> tuple[int, bytes]:
    """As `post`, of any method. Reads at most `MAX_ANSWER` bytes, and a little more."""
    with mapped("the login server", "--issuer"):
        request = http.build_request(method, url, headers={} if content is None else _FORM, content=content)
        Dialled().watch(request)
        response = http.send(request, stream=True, follow_redirects=False)
        try:
            body = b""
            for piece in response.iter_raw():
                body += piece
                if len(body) > MAX_ANSWER:
                    break
        finally:
            response.close()
    return response.status_code, body
