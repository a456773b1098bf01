"""The login of the page: one password for the server, asked for before anything else is served.

A browser that gave the password holds a cookie with a random token of this server. A link with `?key=PASSWORD` logs in too, as the
terminal prints it; the browser is redirected, so that the password leaves its address line. Knows no Gradio. `PageServer` asks
`Login` about every request.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import secrets
from typing import Any
from urllib.parse import parse_qs, urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

COOKIE = "pitlane_login"
LOGIN_PATH = "/pitlane/login"
MAX_FORM_BYTES = 4096
WRONG_SECONDS = 1.0  # before the answer to a wrong password
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Pitlane: log in</title><style>
:root {{ color-scheme: light dark; }}
body {{ display: grid; min-height: 100dvh; margin: 0; place-items: center; font: 16px/1.5 system-ui, sans-serif; }}
form {{ display: grid; gap: 12px; width: min(320px, 86vw); }} h1 {{ margin: 0; font-size: 22px; }} p {{ margin: 0; }}
label {{ display: grid; gap: 4px; font-size: 14px; }}
input, button {{ min-height: 40px; padding: 0 12px; border: 1px solid #8a969f; border-radius: 8px; font: inherit; }}
button {{ border-color: #0a6e4e; background: #0a6e4e; color: #fff; cursor: pointer; }} .wrong {{ color: #d3382c; }}
</style></head><body><main><form method="post" action="{action}"><h1>Pitlane</h1>{reason}
<label>Password<input type="password" name="password" autocomplete="current-password" required autofocus></label>
<button>Log in</button></form></main></body></html>"""


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach an address. A name other than `localhost` may resolve to any address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def new_password() -> str:
    """A random password that can be typed."""
    return "-".join(secrets.token_hex(2) for _ in range(4))


class Login:
    """Lets requests of browsers that know the password pass."""

    def __init__(self, password: str) -> None:
        self._password, self._token = password, secrets.token_urlsafe(32)

    def link(self, url: str) -> str:
        """The address that logs in."""
        return f"{url}/?{urlencode({'key': self._password})}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> bool:
        """Whether a request may pass. A request that may not is answered: with the login page, or with its outcome."""
        if scope["type"] != "http":
            return bool(scope["type"] == "lifespan")  # Gradio serves no websockets
        request = Request(scope, receive)
        if self._knows(request.cookies.get(_cookie(request))) and not self._has_key(request):
            return True
        await (await self._answer(request))(scope, receive, send)
        return False

    async def _answer(self, request: Request) -> Response:
        given = _key(request)
        is_form = request.method == "POST" and request.url.path.endswith(LOGIN_PATH)
        if is_form:
            given = await _password_of(request)
        if not given:
            return self._page(request, "")
        if not self._is_password(given):
            await asyncio.sleep(WRONG_SECONDS)
            return self._page(request, '<p class="wrong" role="alert">This is not the password.</p>')
        response = RedirectResponse("../" if is_form else "./", 303)
        response.set_cookie(_cookie(request), self._token, httponly=True, samesite="strict", path="/")
        return response

    def _page(self, request: Request, reason: str) -> Response:
        action = "login" if request.url.path.endswith(LOGIN_PATH) else f".{LOGIN_PATH}"
        return HTMLResponse(_PAGE.format(reason=reason, action=action), 401, {"Cache-Control": "no-store"})

    def _has_key(self, request: Request) -> bool:
        return request.method == "GET" and self._is_password(_key(request))

    def _is_password(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._password.encode())

    def _knows(self, token: str | None) -> bool:
        return token is not None and hmac.compare_digest(token.encode(), self._token.encode())


def _cookie(request: Request) -> str:
    """The name of the cookie: browsers send a cookie to all ports of a host, so the port of the address is in the name."""
    port = request.headers.get("host", "").rpartition(":")[2]
    return f"{COOKIE}_{port}" if port.isdecimal() else COOKIE


def _key(request: Request) -> str:
    return parse_qs(request.url.query).get("key", [""])[0]


async def _password_of(request: Request) -> str:
    """The password of the form; empty for a body that is no form of a short password."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_FORM_BYTES:
            return ""
    return parse_qs(body.decode("utf-8", "replace")).get("password", [""])[0]
