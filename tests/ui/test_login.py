"""The login: no request passes without the password, and an address that other machines reach always has one."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import MagicMock

import pytest

from pitlane.ui import app
from pitlane.ui.login import COOKIE, LOGIN_PATH, Login, is_loopback, new_password
from pitlane.ui.page_server import PageServer
from pitlane.ui.session import EngineOptions

PASSWORD = "open sesame & more"


class Browser:
    """Sends requests to a login as a browser would, with its cookie, and counts the requests that pass."""

    def __init__(self, login: Login, host: str = "") -> None:
        self.login, self.host, self.cookie, self.passed = login, host, "", 0

    def get(self, path: str = "/", query: str = "", body: bytes | None = None) -> tuple[int, str]:
        return asyncio.run(self._send(path, query, body))

    async def _send(self, path: str, query: str, body: bytes | None) -> tuple[int, str]:
        headers = [(b"cookie", self.cookie.encode())] if self.cookie else []
        headers += [(b"host", self.host.encode())] if self.host else []
        scope = {
            "type": "http", "method": "GET" if body is None else "POST", "path": path, "query_string": query.encode(),
            "headers": headers, "scheme": "http", "server": ("test", 80), "root_path": "",
        }  # fmt: skip
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body or b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        if await self.login(scope, receive, send):
            self.passed += 1
            return 200, ""
        headers = dict(sent[0]["headers"])
        self.cookie = headers.get(b"set-cookie", b"").decode().partition(";")[0] or self.cookie
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode()


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch) -> Browser:
    monkeypatch.setattr("pitlane.ui.login.WRONG_SECONDS", 0.0)
    return Browser(Login(PASSWORD))


@pytest.mark.parametrize("path", ["/", "/pitlane/model", "/gradio_api/upload", "/pitlane/export/1.md"])
def test_nothing_passes_without_the_password(browser: Browser, path: str) -> None:
    browser.cookie = f"{COOKIE}=guess"
    status, text = browser.get(path)
    assert (status, browser.passed) == (401, 0) and 'type="password"' in text and "not the password" not in text
    assert browser.get(path, body=b"x")[0] == 401 and not browser.passed


def test_the_form_and_the_link_log_in_for_good(browser: Browser) -> None:
    status, text = browser.get(LOGIN_PATH, body=b"password=wrong")
    assert status == 401 and "not the password" in text and not browser.cookie
    assert browser.get(LOGIN_PATH, body=b"password=" + b"x" * 5000)[0] == 401 and not browser.cookie
    assert browser.get(LOGIN_PATH, body=b"password=open+sesame+%26+more")[0] == 303 and COOKIE in browser.cookie
    assert browser.get("/")[0] == 200 and browser.passed == 1
    assert PASSWORD not in browser.cookie and browser.cookie != f"{COOKIE}={PASSWORD}"
    other = Browser(browser.login)
    link = browser.login.link("http://host:1")
    assert other.get("/", link.partition("?")[2])[0] == 303 and other.get("/")[0] == 200
    assert Browser(Login(PASSWORD)).get("/")[0] == 401, "the cookie of one server is not known to the next"


def test_two_pages_of_a_host_do_not_log_each_other_out() -> None:
    logins = {port: Login(PASSWORD) for port in (7860, 7861)}
    jar: dict[str, str] = {}
    for port, login in logins.items():
        browser = Browser(login, f"host:{port}")
        assert browser.get(LOGIN_PATH, body=b"password=open+sesame+%26+more")[0] == 303
        name, _, token = browser.cookie.partition("=")
        jar[name] = token
    for port, login in logins.items():
        browser = Browser(login, f"host:{port}")
        browser.cookie = "; ".join(f"{name}={token}" for name, token in jar.items())
        assert browser.get("/")[0] == 200


def test_the_password_leaves_the_address_of_a_browser_that_is_logged_in(browser: Browser) -> None:
    query = browser.login.link("").partition("?")[2]
    assert [browser.get("/", query)[0] for _ in range(2)] == [303, 303] and not browser.passed
    assert browser.get("/", "key=another")[0] == 200, "a parameter of the page"


def test_the_browser_is_opened_without_the_password(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    opened: list[str] = []
    server = MagicMock()
    server.__enter__.return_value.url = "http://127.0.0.1:1"
    monkeypatch.setattr(app, "PageServer", lambda *_: server)
    for name in ("ModelSwitch", "Store"):
        monkeypatch.setattr(app, name, MagicMock())
    for name in ("serve", "note"):
        monkeypatch.setattr(app, name, lambda *_: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # so that the value of `launch` is taken back
    monkeypatch.setattr(app.webbrowser, "open", opened.append)
    app.launch(MagicMock(), port=0, password="open-sesame")
    assert opened == ["http://127.0.0.1:1"] and "?key=open-sesame" in capsys.readouterr().out


def test_a_websocket_does_not_pass(browser: Browser) -> None:
    assert asyncio.run(browser.login({"type": "websocket"}, None, None)) is False


def test_addresses_that_other_machines_reach_are_known() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")] == [True] * 5
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.4", "example.org", "")] == [False] * 5
    assert new_password() != new_password() and len(new_password()) >= 16


@pytest.mark.parametrize(
    "host, password, has_login", [("127.0.0.1", "", False), ("127.0.0.1", "x", True), ("0.0.0.0", "", True)]
)
def test_the_page_has_a_login_where_it_must(
    monkeypatch: pytest.MonkeyPatch, host: str, password: str, has_login: bool
) -> None:
    made: list[Any] = []

    class Stop(Exception):
        pass

    def server(*arguments: Any) -> Any:
        made.append(arguments)
        raise Stop

    monkeypatch.setattr(app, "PageServer", server)
    with pytest.raises(Stop):
        app.launch(EngineOptions("random:tiny"), host=host, port=0, password=password)
    assert isinstance(made[0][2], Login) is has_login
    assert (PageServer(host, 0, made[0][2])._login is not None) is has_login
