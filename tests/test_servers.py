"""Servers that answer as they like: the HTTP client, lists of JSON, and ingest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.server
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.parse
from email.utils import formatdate
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import fake_servers
import pytest
from conftest import Refresherr, Result
from fake_servers import (
    API_KEY,
    RADARR_3,
    RADARR_4,
    RADARR_5,
    RADARR_6,
    SICKNESSES,
    SONARR_3,
    SONARR_4,
    SONARR_5,
    FakeRadarr,
    FakeRelay,
    FakeServer,
    FakeSonarr,
    Reply,
    Request,
)

import refresherr as program

KILL_AFTER = 100.0  # seconds; only there to fail instead of hanging
TIMEOUT = 0.6  # what the config of the sick servers says, in seconds
MEDIA = ("movies", "movie_files", "series", "episode_files")


class Canned(FakeServer):
    """A Sonarr, or Radarr, that answers a GET with what it is given, bytes or JSON."""

    def __init__(self, app: str = "Sonarr", **answers: Any) -> None:
        super().__init__()
        self.api_key = API_KEY
        self.answers: Dict[str, Any] = {"system/status": {"appName": app, "version": "4.0.0.1"}}
        self.answers.update(answers)
        self.plain: Optional[Reply] = None  # for everything

    def answer(self, request: Request) -> Reply:
        if self.plain is not None:
            return self.plain
        name = request.path.partition("/api/v3/")[2]
        title = request.query.get("seriesId", [""])[0]
        found = self.answers.get(f"{name}_{title}", self.answers.get(name, []))
        return Reply(200, found if isinstance(found, bytes) else json.dumps(found).encode())


class Hub(FakeServer):
    """One socket for many servers, told apart by their URL base: each would poll its own."""

    def __init__(self) -> None:
        super().__init__()
        self.behind: Dict[str, FakeServer] = {}

    def add(self, name: str, server: FakeServer) -> str:
        """Put a server behind /NAME that does not listen itself; return its URL."""
        server.port = self.port
        self.behind[name] = server
        return f"{FakeServer.url.fget(self)}/{name}"  # type: ignore[attr-defined]

    def serve(self, request: Request, handler: Any) -> None:
        self.behind[request.path.split("/")[1]].serve(request, handler)

    def clean_up(self) -> None:
        for server in self.behind.values():
            server.closing.set()
            server.clean_up()
            self.errors += server.errors


def finish(process: subprocess.Popen[str]) -> Result:
    """Wait for a program that was started, but not for ever."""
    try:
        out, err = process.communicate(timeout=KILL_AFTER)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"it hangs; so far it said {err!r}") from None
    return Result(process.returncode, out, err)


def run(refresherr: Refresherr, *args: object) -> Result:
    return finish(refresherr.start(*args))


def section(name: str, server: Any, **more: object) -> str:
    """Return the section of the config for a server: section("sonarr tv", fake, roots=...)."""
    lines = [f"[{name}]", f"url = {server.url}", f"api_key = {server.api_key}"]
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in more.items())]) + "\n"


def configure(refresherr: Refresherr, *sections: str, timeout: float = 20.0) -> None:
    """Have the program use a config of these sections."""
    file = Path(refresherr.env["HOME"]) / "refresherr.ini"
    limits = f"timeout = {timeout:.3f}\nlist_timeout = {timeout:.3f}\n"
    head = f"[repair]\n{limits}min_age = 0\npatience = 0\n"
    file.write_text(head + "".join(sections), encoding="utf-8")
    file.chmod(0o600)
    refresherr.env["REFRESHERR_CONFIG"] = str(file)


def ingested(refresherr: Refresherr, *args: object) -> Dict[str, Dict[str, Any]]:
    """Run ingest --json; return the line of each instance."""
    result = run(refresherr, "ingest", "--json", *args)
    assert "Traceback" not in result.err
    assert "instances" in result.json, result.err
    return {line["name"]: line for line in result.json["instances"]}


def table(refresherr: Refresherr, name: str, instance: str = "%") -> List[Dict[str, Any]]:
    """Return the rows of a table as dictionaries, without their ids."""
    conn = sqlite3.connect(str(refresherr.db_path))
    conn.row_factory = sqlite3.Row
    with contextlib.closing(conn):
        found = conn.execute(f"SELECT * FROM {name} WHERE instance LIKE ?", (instance,))
        rows = [dict(row) for row in found]
    for row in rows:
        del row["id"]
    return rows


def mirror(refresherr: Refresherr) -> Dict[str, List[Any]]:
    """Return all rows of the four tables of media, ids included."""
    return {name: refresherr.query(f"SELECT * FROM {name} ORDER BY id") for name in MEDIA}


def ask(
    server: FakeServer,
    method: str = "GET",
    url: str = "",
    key: str = API_KEY,
    token: str = "",
    timeout: float = 20.0,
    **query: str,
) -> Any:
    """Ask a server through the client; return its JSON, or the HttpError."""
    headers = {"X-Api-Key": key} if key else {}
    client = program.Client("sonarr_tv", url or server.url, timeout, headers, token)
    body = {"name": "x"} if method == "POST" else None
    try:
        return client.ask(method, "/api/v3/series", body, **query)
    except program.HttpError as exc:
        return exc


def assert_clean(text: str, *secrets: str) -> None:
    """Check what is shown: one line, nothing that a terminal obeys, no secret, no piece of one."""
    assert "\x1b" not in text
    for value in secrets:
        for start in range(max(1, len(value) - 11)):
            assert value[start : start + 12] not in text, text


@pytest.fixture
def server() -> Iterator[Canned]:
    with Canned() as canned:
        yield canned


# The client: errors


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"message":"Series with ID 7 does not exist","description":"at X()"}', "ID 7 does not"),
        (b'{"message":"BadRequest: no ids","content":"no ids"}', "BadRequest: no ids"),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
        (b'{"errorMessage":"Sonarr is starting up"}', "Sonarr is starting up"),
        (b'[{"propertyName":"Name","errorMessage":"is empty"}]', "Name: is empty"),
        (b'{"title":"Not Found","status":404,"traceId":"0-1"}', "Not Found"),
        (b'{"title":"Wrong","errors":{"$.ids":["cannot be converted"]}}', "cannot be converted"),
    ],
)
def test_all_shapes_of_an_error_become_words(server: Canned, body: bytes, words: str) -> None:
    server.plain = Reply(400, body)
    error = ask(server)
    assert words in str(error)
    assert str(error).startswith("sonarr_tv: answered 400")
    assert "at X()" not in str(error)
    assert (error.status, error.retry) == (400, False)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"7",
        b'"words"',
        b"[]",
        b"[null, 7, []]",
        b'{"message": null}',
        b'{"message": {"a": ["b"]}, "errors": 7}',
        b'{"errors": {"": null}}',
        b"\xff\xfe",
        b"[" * 60000,
        b'{"message": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"errors": {"x": ' + b"[" * 900 + b"]" * 900 + b"}}",
        b'{"message": "\\ud800 \\udfff"}',
        b'{"message": ' + b"9" * 5000 + b"}",
    ],
)
def test_an_error_of_no_shape_at_all(server: Canned, body: bytes) -> None:
    server.plain = Reply(500, body)
    error = ask(server)
    assert isinstance(error, program.HttpError)
    assert (error.status, error.retry) == (500, True)
    assert len(str(error)) < 400


@pytest.mark.parametrize("length", range(255, 300, 4))
def test_a_key_that_is_cut_off_does_not_show(server: Canned, length: int) -> None:
    server.plain = Reply(500, json.dumps({"message": "x" * length + API_KEY}).encode())
    assert_clean(str(ask(server)), API_KEY)


def test_a_key_does_not_show_wherever_the_server_puts_it(server: Canned) -> None:
    everywhere = f"key {API_KEY}\x1b[31m\r\n{API_KEY}"
    for reply in (
        Reply(500, json.dumps({"message": everywhere}).encode()),
        Reply(500, json.dumps([{"propertyName": API_KEY, "errorMessage": API_KEY}]).encode()),
        Reply(500, json.dumps({"errors": {API_KEY: [API_KEY]}}).encode()),
        Reply(200, b"x", {"Content-Type": f"text/{API_KEY}"}),
        Reply(307, b"", {"Location": f"http://other.invalid/{API_KEY}?apikey={API_KEY}"}),
    ):
        server.plain = reply
        assert_clean(program.escape_message(str(ask(server))), API_KEY)


@pytest.mark.parametrize(
    "field", ["appName", "version", "path", "title", "contentType", "location", "message"]
)
def test_what_a_server_says_is_short(server: Canned, field: str) -> None:
    flood = "x" * 60000
    if field == "contentType":
        server.plain = Reply(200, b"x", {"Content-Type": flood})
    elif field == "location":
        server.plain = Reply(302, b"", {"Location": flood})
    elif field == "message":
        server.plain = Reply(400, json.dumps({"message": flood}).encode())
    else:
        server.answers["system/status"] = {"appName": "Sonarr", "version": "4", field: flood}
    instance = program.Instance("sonarr", "sonarr_tv", section_settings(server))
    try:
        said = program.Server(instance, 20.0).connect()
    except program.HttpError as exc:
        said = str(exc)
    assert len(said) < 1000


def section_settings(server: Canned) -> program.InstanceSettings:
    return program.InstanceSettings(url=server.url, api_key=API_KEY)


def test_an_app_name_with_the_key_in_it(server: Canned) -> None:
    server.answers["system/status"] = {"appName": API_KEY, "version": API_KEY}
    instance = program.Instance("sonarr", "sonarr_tv", section_settings(server))
    with pytest.raises(program.HttpError) as caught:
        program.Server(instance, 20.0).connect()
    assert_clean(str(caught.value), API_KEY)


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("7", 7, 7),
        (" 7 ", 7, 7),
        ("0", 0, 0),
        ("-7", 0, 0),
        ("7.5", 0, 7.5),
        ("soon", 0, 0),
        ("\u00b2".encode().decode("latin-1"), 0, 0),
        ("9" * 5000, 86400, 86400),
        (formatdate(time.time() + 3000, usegmt=True), 2000, 3000),
        (formatdate(time.time() - 3000, usegmt=True), 0, 0),
        (formatdate(time.time() + 1e7, usegmt=True), 86400, 86400),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86400, 86400),
        ("Fri, 99 Foo 2026 99:99:99 GMT", 0, 0),
        ("Sun Nov  6 08:49:37 1994", 0, 0),
    ],
)
def test_retry_after(server: Canned, header: str, low: float, high: float) -> None:
    server.plain = Reply(503, b"", {"Retry-After": header})
    error = ask(server)
    assert error.retry
    assert low <= error.after <= high


@pytest.mark.parametrize(
    ("status", "retry"),
    [(status, False) for status in (300, 302, 304, 400, 401, 403, 404, 409, 415)]
    + [(status, True) for status in (408, 425, 429, 500, 501, 503, 599)],
)
def test_whether_a_retry_makes_sense(server: Canned, status: int, retry: bool) -> None:
    server.plain = Reply(status, b"")
    error = ask(server)
    assert (error.status, error.retry) == (status, retry)
    assert str(status) in str(error)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\r\n" * 100,
        b"HTTP/1.1 999999999 OK\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"zz\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[1, 2",
        b"HTTP/1.1 200 OK\r\nContent-Type: \xff\xfe\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 307 x\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 x\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 x\r\nLocation: /a\r\n \x1b[31mb\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_http_that_is_none(server: Canned, raw: bytes) -> None:
    server.script(kind="raw", body=raw)
    error = ask(server)
    assert isinstance(error, program.HttpError)
    shown = program.escape_message(str(error))
    assert shown.startswith("sonarr_tv: ")
    assert "\n" not in shown
    assert "\x1b" not in shown


def test_a_connection_that_is_closed_is_not_called_no_http(server: Canned) -> None:
    server.sick("close")
    assert "speaks no HTTP" not in str(ask(server))


def test_a_post_must_be_answered_with_created(server: Canned) -> None:
    server.plain = Reply(200, b"[]")  # what a redirect that was followed would look like
    error = ask(server, "POST")
    assert "201" in str(error)
    server.plain = Reply(201, b'{"id": 1}')
    assert ask(server, "POST") == {"id": 1}


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_host_is_not_followed(
    server: Canned, method: str, status: int
) -> None:
    with FakeServer() as other:
        server.plain = Reply(status, b"", {"Location": f"{other.url}/api/v3/series"})
        error = ask(server, method)
        assert not other.requests
    assert len(server.requests) == 1
    assert error.status == status
    assert f"redirect to {other.url}" in str(error)
    assert not error.retry


@pytest.mark.parametrize("version", [SONARR_3, "4.0.0.1", SONARR_4])
def test_a_url_base_that_is_missing_is_suggested(tmp_path: Path, version: str) -> None:
    with FakeSonarr(tmp_path, version=version, url_base="/sonarr") as sonarr:
        root = FakeServer.url.fget(sonarr)  # type: ignore[attr-defined]
        error = ask(sonarr, url=root)
    assert re.search(rf"{root}/sonarr(?![/\w])", str(error)), error


def test_a_url_base_that_is_wrong_suggests_nothing_wrong(tmp_path: Path) -> None:
    with FakeSonarr(tmp_path, url_base="/sonarr") as sonarr:
        root = FakeServer.url.fget(sonarr)  # type: ignore[attr-defined]
        error = ask(sonarr, url=f"{root}/sonar")
    assert f"{root}/sonar/sonarr" not in str(error)


# The client: where it goes, and what it takes along


def test_the_key_is_in_the_header_and_nowhere_else(server: Canned) -> None:
    server.plain = Reply(201, b"[]")
    for method in ("GET", "POST", "PUT", "DELETE"):
        ask(server, method, term="a b&c")
    for request in server.requests:
        assert request.headers["x-api-key"] == API_KEY
        assert API_KEY not in request.target
        assert API_KEY.encode() not in request.raw
        assert "authorization" not in request.headers


@pytest.mark.parametrize(
    ("userinfo", "sent"),
    [
        ("user:hunter2-hunter2", "user:hunter2-hunter2"),
        ("user:p%20w%2Fhunter2-hunter2", "user:p w/hunter2-hunter2"),
        ("user:hunter2@-hunter2", "user:hunter2@-hunter2"),
        ("us'er:hunter2-hunter2", "us'er:hunter2-hunter2"),
        ('user:hunter2"-hunter2', 'user:hunter2"-hunter2'),
        ("user", "user"),
    ],
)
def test_user_and_password_become_basic(server: Canned, userinfo: str, sent: str) -> None:
    import base64

    url = server.url.replace("//", f"//{userinfo}@")
    server.plain = Reply(200, b"[]")
    assert ask(server, url=url) == []
    kind, _, value = server.requests[-1].headers["authorization"].partition(" ")
    assert (kind, base64.b64decode(value).decode()) == ("Basic", sent)
    password = sent.partition(":")[2]
    words = f"bad password {password}, {userinfo}, {value}"
    server.plain = Reply(500, json.dumps({"message": words}).encode())
    if password:
        assert_clean(str(ask(server, url=url)), password, value, userinfo)
    server.close()
    assert_clean(str(ask(server, url=url)), *filter(None, [password]))


@pytest.mark.parametrize(
    "key", ["first-line-of-it\nsecond-line-of-it", "a key \u2026 of typography"]
)
def test_a_key_that_is_no_header_does_not_show(server: Canned, key: str) -> None:
    error = ask(server, key=key)
    assert isinstance(error, program.HttpError)
    assert_clean(str(error), *key.splitlines())
    assert not server.requests


@pytest.mark.parametrize(
    "url",
    [
        "http://nowhere.invalid:8989",
        "http://b\u00fccher.invalid",
        "http://a..b",
        f"http://{'a' * 70}.invalid",
        "http://127.0.0.1:1",
        "http://127.0.0.1:65536",
        "http://127.0.0.1:89x9",
        "http://[::1",
        "http://[::1]:1",
        "http://127.0.0.1:1/\u00e4",
    ],
)
def test_addresses_where_nobody_is(server: Canned, url: str) -> None:
    error = ask(server, url=url, timeout=5.0)
    assert isinstance(error, program.HttpError)
    assert str(error).startswith(f"sonarr_tv: {url}: ")
    assert "HTTP there" not in str(error)


def test_https_to_a_server_that_has_none(server: Canned) -> None:
    error = ask(server, url=server.url.replace("http:", "https:"))
    assert str(error).startswith("sonarr_tv: https://127.0.0.1")


def test_only_http_and_https(server: Canned, tmp_path: Path) -> None:
    secret = tmp_path / "api" / "v3" / "series"
    secret.parent.mkdir(parents=True)
    secret.write_text("[1]", encoding="utf-8")
    for url in (f"file://{tmp_path}", "ftp://127.0.0.1/", "data:application/json,[]", "unix:/x"):
        with pytest.raises(ValueError, match="http"):
            program.parse_url(url)
        assert isinstance(ask(server, url=url), program.HttpError)


def test_proxies_of_the_environment_are_not_used(
    server: Canned, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeServer() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert ask(server) == []
        assert not proxy.requests


class SixServer(Canned):
    """The same on [::1]."""

    def open(self) -> None:
        class Six(fake_servers._Http):
            address_family = socket.AF_INET6

            def server_bind(self) -> None:
                self.server_address = ("::1", 0)
                super().server_bind()

        four, fake_servers._Http = fake_servers._Http, Six  # type: ignore[misc]
        try:
            super().open()
        finally:
            fake_servers._Http = four  # type: ignore[misc]

    @property
    def url(self) -> str:
        return f"http://[::1]:{self.port}"


def test_an_ipv6_literal() -> None:
    try:
        with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    with SixServer() as six:
        assert ask(six) == []
        url = six.url.replace("//", "//user:hunter2@")
        assert ask(six, url=url) == []
        assert six.requests[0].headers["host"] == f"[::1]:{six.port}"
        assert six.requests[1].headers["authorization"] == "Basic dXNlcjpodW50ZXIy"


def test_the_relays_token_does_not_show(tmp_path: Path) -> None:
    """Neither as it is nor percent-encoded, on the terminal, in JSON or the database."""
    token = "s3/cret+token&more"
    quoted = [token, urllib.parse.quote_plus(token), urllib.parse.quote(token)]
    refresherr = Refresherr(tmp_path)
    links = [tmp_path / "doc" / f"Show {n} (2019)" / "S01E01.mkv" for n in range(4)]
    for number, link in enumerate([*links, tmp_path / "doc" / "Good (2019)" / "S01E01.mkv"]):
        link.parent.mkdir(parents=True)
        goal = tmp_path / "mount" / f"file {number}"
        goal.parent.mkdir(exist_ok=True)
        if number == 4:
            goal.write_bytes(b"video")
        link.symlink_to(goal)
    with FakeRelay(token) as relay:
        for number, (status, name) in enumerate(
            [(200, "detail"), (502, "error"), (400, "error"), (200, "error")]
        ):
            body = {"ok": False, "code": 503, name: f"cannot GET {quoted[number % 3]} of {quoted}"}
            relay.script(
                where=lambda request, n=number: f"Show {n}" in str(request.query),  # type: ignore
                status=status,
                body=json.dumps(body).encode(),
                times=None,
            )
        text = f"[scan]\nroots = {tmp_path / 'doc'}\nmax_new_broken = 100%\n"
        text += f"[relay]\nbase = {relay.url}\ntoken = {token}\n"
        configure(refresherr, text, f"routes = {tmp_path / 'doc'} => sonarr_doc\n")
        for command in (["scan"], ["queue"], ["dispatch", "--apply", "--json"], ["actions"]):
            result = run(refresherr, *command)
            for value in quoted:
                assert value not in result.out + result.err
    assert len([request for request in relay.requests if request.query]) == 4
    assert_not_on_disk(refresherr, *quoted)


def assert_not_on_disk(refresherr: Refresherr, *values: str) -> None:
    """Check that no file of the data directory holds any of these."""
    files = [path for path in refresherr.data_dir.rglob("*") if path.is_file()]
    assert files or not refresherr.db_path.exists()
    for path in files:
        content = path.read_bytes()
        for value in values:
            assert value.encode() not in content, path


class Counting(http.server.BaseHTTPRequestHandler):
    """Keeps connections alive, and notes which request came over which of them."""

    protocol_version = "HTTP/1.1"
    seen: List[Tuple[str, int]] = []

    def do_GET(self) -> None:
        self.seen.append((self.command, self.client_address[1]))
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        head = "HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 2"
        self.wfile.write(f"{head}\r\n\r\n[]".encode())
        self.close_connection = self.path == "/last"  # without a word of it

    do_POST = do_GET

    def log_message(self, *words: Any) -> None:
        pass


def test_connections_are_kept_but_nothing_is_changed_over_one() -> None:
    """A GET that meets one which the server has closed is sent again, a POST never."""
    Counting.seen = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = program.Client("x", f"http://127.0.0.1:{server.server_port}", 20.0, {})
        calls = ["GET /", "GET /last", "GET /", "POST /last", "POST /", "GET /", "POST /"]
        for method, path in map(str.split, calls):
            assert client.ask(method, path, {} if method == "POST" else None) == []
            time.sleep(0.1)  # so that the end of the connection has arrived
        server.shutdown()
    ports = [port for _, port in Counting.seen]
    assert [method for method, _ in Counting.seen] == [call.split()[0] for call in calls]
    assert ports[0] == ports[1] and ports[4] == ports[5]
    assert len(set(ports)) == 5


# Lists of JSON


class Pieces:
    """A file that gives at most so many bytes at a time."""

    def __init__(self, content: bytes, sizes: Callable[[], int]) -> None:
        self._stream = io.BytesIO(content)
        self._sizes = sizes

    def read(self, size: int = -1) -> bytes:
        assert size > 0
        return self._stream.read(min(size, self._sizes()))


def elements(content: bytes, size: int = 1 << 30) -> List[Any]:
    return list(program.iterate_json(Pieces(content, lambda: size)))


def random_value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(9 if depth else 7)
    if kind < 2:
        text = "".join(
            rng.choice('aB "\\/[]{},:\n\t\u00e9\u20ac\U0001f600\x00\ud800') for _ in "12345"
        )
        return text[: rng.randrange(6)]
    if kind == 2:
        return rng.choice([0, -1, 7, 10**25, -(2**63), 1 << 64])
    if kind == 3:
        return rng.choice([0.5, -1.25e-7, 1e300, 3.0])
    if kind < 7:
        return rng.choice([None, True, False, "", {}, []])
    if kind == 7:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {str(n): random_value(rng, depth - 1) for n in range(rng.randrange(4))}


@pytest.mark.parametrize("seed", range(30))
def test_any_list_comes_out_as_it_went_in_however_it_arrives(seed: int) -> None:
    rng = random.Random(seed)
    value = [{"id": n, "x": random_value(rng, 4)} for n in range(rng.randrange(8))]
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only, indent=rng.choice([None, 1]))
        with contextlib.suppress(UnicodeEncodeError):
            content = b" \n" + text.encode() + b"\r\n "
            assert elements(content) == value
            assert elements(content, 1) == value
            assert list(program.iterate_json(Pieces(content, lambda: rng.randrange(1, 9)))) == value


def test_split_at_every_byte() -> None:
    value: List[Any] = [{"a": '\u20ac\U0001f600\\"]}', "b": [1.5, -3, True, None]}, {}, [], "x,]["]
    content = json.dumps(value, ensure_ascii=False).encode()
    for cut in range(1, len(content)):
        sizes = iter([cut])
        assert list(program.iterate_json(Pieces(content, lambda: next(sizes, 1 << 20)))) == value  # noqa: B023


def test_numbers_are_not_cut_in_two() -> None:
    value = [12, 345, -6.75, 1e5, 0]
    for size in (1, 2, 3, 100):
        assert elements(json.dumps(value).encode(), size) == value


@pytest.mark.parametrize("content", [b"[]", b" [ ] ", b"[\n]\n"])
def test_an_empty_list(content: bytes) -> None:
    assert elements(content) == elements(content, 1) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" ",
        b"null",
        b"7",
        b"{}",
        b'{"a": [1]}',
        b'"[]"',
        b"[",
        b'[{"id": 1}',
        b'[{"id": 1},',
        b'[{"id": 1}, {"id',
        b'[{"id": 1}, {"id": "\\ud8',
        b'[{"id": 1}}',
        b"[nope]",
        b'[{"id": 1}, "\xff"]',
        b'[{"id": 1}, "\xe2\x82',
        b'[{"id": 1} {"id": 2}]',
        b'[{"id": 1},, {"id": 2}]',
        b'[, {"id": 1}]',
        b'[{"id": 1}] [{"id": 2}]',
        b'[{"id": 1}]<html>',
        b"[{'id': 1}]",
        b"[" * 100000,
        b'[{"a":' * 100000,
    ],
)
def test_what_is_no_whole_list(content: bytes) -> None:
    for size in (1, 7, 1 << 30) if len(content) < 100 else (1 << 16,):
        with pytest.raises((ValueError, RecursionError)):
            elements(content, size)


def test_a_huge_element_is_refused_and_costs_no_squared_time() -> None:
    def seconds(size: int) -> float:
        content = b'[{"title":"' + b"x" * size
        best = 1e9
        for _ in range(3):
            began = time.perf_counter()
            with pytest.raises(ValueError, match="end"):
                elements(content)
            best = min(best, time.perf_counter() - began)
        return best

    assert seconds(8 << 20) / seconds(2 << 20) < 12  # 4 is linear, 16 is squared
    with pytest.raises(ValueError, match="end"):
        elements(b'[{"title":"' + b"x" * (40 << 20) + b'"}]')


def test_a_list_is_read_no_further_than_it_is_asked_for() -> None:
    stream = io.BytesIO(b"[" + b'{"id": 1, "title": "something"},' * 100000)
    found = program.iterate_json(stream)
    assert next(found)["id"] == 1
    assert stream.tell() < 1 << 18


# Paths


@pytest.mark.parametrize(
    ("pairs", "here", "there"),
    [
        ((), "/tv/x", "/tv/x"),
        ((("/opt/tv", "/tv"),), "/opt/tv/Show/x.mkv", "/tv/Show/x.mkv"),
        ((("/opt/tv", "/tv"),), "/opt/tv", "/tv"),
        ((("/opt/tv", "/tv"),), "/opt/tv 2/x", "/opt/tv 2/x"),
        ((("/opt/tv", "/tv"),), "/opt/tvx", "/opt/tvx"),
        ((("/opt/tv/", "/tv/"),), "/opt/tv/x", "/tv/x"),
        ((("/opt", "/a"), ("/opt/tv", "/b")), "/opt/tv/x", "/b/x"),
        ((("/opt/tv", "/b"), ("/opt", "/a")), "/opt/tv/x", "/b/x"),
        ((("/opt", "/a"), ("/opt/tv", "/b")), "/opt/tv2/x", "/a/tv2/x"),
        ((("/", "/host"),), "/tv/x", "/host/tv/x"),
        ((("/opt/tv", "/"),), "/opt/tv/x", "/x"),
        ((("/opt/tv", "/"),), "/opt/tv", "/"),
        ((("/opt/tv", "/tv"),), "/opt/tv/a\udcff\n\u00e4", "/tv/a\udcff\n\u00e4"),
        ((("/opt/tv", "D:/tv"),), "/opt/tv/a/x", "D:\\tv\\a\\x"),
        ((("/opt/tv", "D:\\"),), "/opt/tv/a/x", "D:\\a\\x"),
        ((("/opt/tv", "\\\\nas\\tv"),), "/opt/tv/a/x", "\\\\nas\\tv\\a\\x"),
        ((("/opt/tv", "/tv"),), "/opt/tv/a\\b", "/tv/a\\b"),
    ],
)
def test_paths_are_mapped_both_ways(
    pairs: Tuple[Tuple[str, str], ...], here: str, there: str
) -> None:
    assert program.map_path(here, pairs) == there
    assert program.map_back(there, pairs) == [here]


def test_a_longer_prefix_of_the_server_wins_on_the_way_back() -> None:
    pairs = (("/a", "/data"), ("/b", "/data/tv"))
    assert program.map_back("/data/tv/x", pairs) == ["/b/x"]
    assert program.map_back("/data/tv2/x", pairs) == ["/a/tv2/x"]
    assert program.map_back("/data", pairs) == ["/a"]


# Ingest: what goes into which column


def test_every_column_of_sonarr_3_to_5(refresherr: Refresherr, tmp_path: Path) -> None:
    versions = {"v3": SONARR_3, "v4": SONARR_4, "v5": SONARR_5}
    with contextlib.ExitStack() as stack:
        sections = []
        for name, version in versions.items():
            sonarr = stack.enter_context(FakeSonarr(tmp_path / name, version=version))
            shows = [sonarr.add_series(f"Show {n} of {name}", monitored=n == 1) for n in (1, 2)]
            for show in shows:
                sonarr.add_file(show, "Season 02/x.mkv", [(2, 1), (2, 2)], size=1 << 40)
                sonarr.add_file(show, "Specials/y.mkv", [(0, 1)], quality="SDTV")
            sections.append(section(f"sonarr {name}", sonarr))
        configure(refresherr, *sections)
        lines = ingested(refresherr)
    keys = ["name", "kind", "version", "titles", "files", "linked", "removed", "error"]
    for name, version in versions.items():
        instance, old = f"sonarr_{name}", name == "v3"
        line = dict(zip(keys, [instance, "sonarr", version, 2, 4, 0, 0, None]))
        assert lines[instance] == line
        assert table(refresherr, "series", instance) == [
            {
                "instance": instance,
                "sonarr_id": number,
                "title": f"Show {number - 10} of {name}",
                "imdb_id": "tt9000011" if number == 11 else None,
                "tvdb_id": 900000 + number,
                "tmdb_id": None if old else 800000 + number,
                "monitored": int(number == 11),
                "poster_url": f"https://artworks.example/{number}/poster.jpg",
                "fanart_url": None,
                "year": 2020,
                "tags": "",
            }
            for number in (11, 12)
        ]
        files = sorted(
            table(refresherr, "episode_files", instance), key=lambda r: r["sonarr_file_id"]
        )
        path = tmp_path / name / f"Show 1 of {name} (2020)"
        shared = {"instance": instance, "release_group": "GRP", "sonarr_series_id": 11}
        assert files[:2] == [
            {
                **shared,
                "sonarr_file_id": 501,
                "season_number": 2,
                "quality": "WEBDL-1080p",
                "resolution": 1080,
                "size_bytes": 1 << 40,
                "original_path": f"{path}/Season 02/x.mkv",
                "symlink_path": None,
            },
            {
                **shared,
                "sonarr_file_id": 502,
                "season_number": 0,
                "quality": "SDTV",
                "resolution": 480,
                "size_bytes": 2147483648,
                "original_path": f"{path}/Specials/y.mkv",
                "symlink_path": None,
            },
        ]
        assert [row["sonarr_series_id"] for row in files] == [11, 11, 12, 12]


def test_every_column_of_radarr_3_to_6(refresherr: Refresherr, tmp_path: Path) -> None:
    versions = {"v3": RADARR_3, "v4": RADARR_4, "v5": RADARR_5, "v6": RADARR_6}
    with contextlib.ExitStack() as stack:
        sections, fakes = [], []
        for name, version in versions.items():
            radarr = stack.enter_context(FakeRadarr(tmp_path / name, version=version))
            radarr.omit_has_file = True
            radarr.add_movie(f"Film of {name}", 1999, file_name="f.mkv", size=1 << 41)
            radarr.add_movie("Not there yet", monitored=False)
            sections.append(section(f"radarr {name}", radarr))
            fakes.append(radarr)
        configure(refresherr, *sections)
        lines = ingested(refresherr)
        for radarr in fakes:
            paths = [request.target for request in radarr.requests]
            assert paths == ["/api/v3/system/status", "/api/v3/movie"]
    for name, version in versions.items():
        instance = f"radarr_{name}"
        line = lines[instance]
        assert (line["version"], line["titles"], line["files"]) == (version, 2, 1)
        rows = table(refresherr, "movies", instance)
        assert rows[0] == {
            "instance": instance,
            "radarr_id": 31,
            "title": f"Film of {name}",
            "year": 1999,
            "imdb_id": "tt9000031",
            "tmdb_id": 800031,
            "monitored": 1,
            "added_utc": "2024-05-01T09:00:00Z",
            "poster_url": "https://img.example/31.jpg",
            "fanart_url": None,
            "tags": "",
        }
        assert (rows[1]["title"], rows[1]["monitored"], rows[1]["imdb_id"]) == (
            "Not there yet",
            0,
            None,
        )
        assert table(refresherr, "movie_files", instance) == [
            {
                "instance": instance,
                "radarr_movie_id": 31,
                "radarr_file_id": 601,
                "quality": "Bluray-1080p",
                "resolution": 1080,
                "video_codec": "x265",
                "audio_codec": "EAC3",
                "size_bytes": 1 << 41,
                "original_path": f"{tmp_path}/{name}/Film of {name} (1999)/f.mkv",
                "symlink_path": None,
            }
        ]


def test_pictures_and_what_is_left_out(refresherr: Refresherr) -> None:
    pictures = [
        {"coverType": "banner", "url": "/b.jpg"},
        {"coverType": "fanart", "url": "/f.jpg", "remoteUrl": "https://img.example/f.jpg"},
        {"coverType": "poster", "url": "/p.jpg?lastWrite=1"},
    ]
    with Canned(series=[{"id": 1, "images": pictures}, {"id": 2, "title": "Bare"}]) as sonarr:
        configure(refresherr, section("sonarr tv", sonarr))
        assert ingested(refresherr)["sonarr_tv"]["titles"] == 2
    first, second = table(refresherr, "series")
    assert first["poster_url"] == "/p.jpg?lastWrite=1"
    assert first["fanart_url"] == "https://img.example/f.jpg"
    nothing = dict.fromkeys(first)
    bare = {"instance": "sonarr_tv", "sonarr_id": 2, "title": "Bare", "tags": ""}
    assert second == {**nothing, **bare}


def test_the_same_numbers_on_several_servers(refresherr: Refresherr, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        sections = []
        for number in range(3):
            sonarr = stack.enter_context(FakeSonarr(tmp_path / f"tv{number}"))
            sonarr.add_file(sonarr.add_series(f"Show {number}"), "x.mkv", [(1, 1)])
            radarr = stack.enter_context(FakeRadarr(tmp_path / f"movies{number}"))
            radarr.add_movie(f"Film {number}", file_name="x.mkv")
            sections += [section(f"sonarr {number}", sonarr), section(f"radarr {number}", radarr)]
        configure(refresherr, *sections)
        for _ in range(2):
            assert all(line["error"] is None for line in ingested(refresherr).values())
            assert sorted(row["title"] for row in table(refresherr, "series")) == [
                "Show 0",
                "Show 1",
                "Show 2",
            ]
            assert [len(table(refresherr, name)) for name in MEDIA] == [3, 3, 3, 3]
        before = mirror(refresherr)
        ingested(refresherr, "sonarr_1")
        after = mirror(refresherr)
    assert before["movies"] == after["movies"]
    others = [row for row in before["series"] if row[1] != "sonarr_1"]
    assert others == [row for row in after["series"] if row[1] != "sonarr_1"]


def test_files_are_linked_to_their_symlinks(refresherr: Refresherr, tmp_path: Path) -> None:
    """By the link's own path, mapped or not, and by where it points, absolute or relative."""
    media, mount = tmp_path / "media", tmp_path / "mount"
    mount.mkdir()

    def link(name: str, target: str) -> str:
        path = media / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
        real = Path(os.path.normpath(str(path.parent / target)))
        real.parent.mkdir(parents=True, exist_ok=True)
        real.write_bytes(b"video")
        return str(path)

    odd = "line\nfeed \x1b[31m \u00e9.mkv"
    expected = {
        "/tv/own.mkv": link("tv/own.mkv", str(mount / "1")),
        str(mount / "absolute.mkv"): link("other/a.mkv", str(mount / "absolute.mkv")),
        str(mount / "relative.mkv"): link("other/r.mkv", "../../mount/relative.mkv"),
        "/remote/mapped.mkv": link("other/m.mkv", str(mount / "remote" / "mapped.mkv")),
        f"/tv/{odd}": link(f"tv/{odd}", str(mount / "odd")),
        "/tv/nobody.mkv": None,
        "/tv/gone.mkv": None,
        "/tv 2/own.mkv": None,
    }
    gone = link("tv/gone.mkv", str(mount / "2"))
    files = [{"id": number, "seriesId": 1, "path": path} for number, path in enumerate(expected, 1)]
    series = [{"id": 1, "statistics": {"episodeFileCount": len(files)}}]
    path_map = f"\n    {media / 'tv'} => /tv\n    {mount / 'remote'} => /remote"
    with Canned(series=series, episodefile=files) as sonarr:
        settings = section("sonarr tv", sonarr, path_map=path_map)
        configure(refresherr, f"[scan]\nroots = {media}\n", settings)
        run(refresherr, "scan")
        os.unlink(gone)
        run(refresherr, "scan")
        assert ingested(refresherr)["sonarr_tv"]["linked"] == 5
    rows = table(refresherr, "episode_files")
    assert {row["original_path"]: row["symlink_path"] for row in rows} == expected
    os.unlink(mount / "odd")
    run(refresherr, "scan")
    shown = run(refresherr, "broken")
    assert "\x1b" not in shown.out + shown.err
    assert "line\\nfeed" in shown.out


# Ingest: a mirror


def test_what_the_server_has_no_more_goes_away(refresherr: Refresherr, tmp_path: Path) -> None:
    with FakeSonarr(tmp_path / "tv") as sonarr, FakeRadarr(tmp_path / "movies") as radarr:
        kept, lost = sonarr.add_series("Kept"), sonarr.add_series("Lost")
        first = sonarr.add_file(kept, "1.mkv", [(1, 1)])
        sonarr.add_file(kept, "2.mkv", [(1, 2)])
        last = sonarr.add_file(lost, "3.mkv", [(1, 1)])
        movie = radarr.add_movie("Lost", file_name="4.mkv")
        radarr.add_movie("Kept", file_name="5.mkv")
        configure(refresherr, section("sonarr tv", sonarr), section("radarr m", radarr))
        assert [line["removed"] for line in ingested(refresherr).values()] == [0, 0]
        del sonarr.files[first], sonarr.files[last], sonarr.series[lost]
        del radarr.files[radarr.movies.pop(movie)["movieFileId"]]
        lines = ingested(refresherr)
        assert (lines["sonarr_tv"]["removed"], lines["radarr_m"]["removed"]) == (2, 1)
        assert [line["removed"] for line in ingested(refresherr).values()] == [0, 0]
    assert [row["title"] for row in table(refresherr, "series")] == ["Kept"]
    assert [row["title"] for row in table(refresherr, "movies")] == ["Kept"]
    assert [row["sonarr_file_id"] for row in table(refresherr, "episode_files")] == [502]
    assert [row["radarr_file_id"] for row in table(refresherr, "movie_files")] == [602]


def test_no_more_requests_than_are_needed_and_four_at_once(
    refresherr: Refresherr, tmp_path: Path
) -> None:
    with FakeSonarr(tmp_path / "tv", latency=0.05) as sonarr:
        for number in range(24):
            show = sonarr.add_series(f"Show {number}")
            if number % 2:
                sonarr.add_file(show, "x.mkv", [(1, 1)])
            else:
                sonarr.add_episode(show, 1, 1)
        configure(refresherr, section("sonarr tv", sonarr))
        line = ingested(refresherr)["sonarr_tv"]
        assert (line["titles"], line["files"]) == (24, 12)
        asked = [request.target.partition("?")[0] for request in sonarr.requests]
        assert asked.count("/api/v3/episodefile") == 12
        assert len(asked) == 14
        assert 2 <= sonarr.peak <= 4


def test_a_series_that_is_deleted_meanwhile(refresherr: Refresherr, tmp_path: Path) -> None:
    with FakeSonarr(tmp_path / "tv") as sonarr:
        shows = [sonarr.add_series(f"Show {number}") for number in range(3)]
        for show in shows:
            sonarr.add_file(show, "x.mkv", [(1, 1)])
        body = b'{"message":"Series with ID 12 does not exist","description":"at X()"}'
        sonarr.script(path_regex="episodefile", where=is_for(shows[1]), status=404, body=body)
        gone = f"/series/{shows[1]}$"
        sonarr.script(path_regex=gone, status=404, body=b"", times=None)
        configure(refresherr, section("sonarr tv", sonarr))
        line = ingested(refresherr)["sonarr_tv"]
    assert (line["error"], line["files"]) == (None, 2)


def test_a_proxy_that_knows_nothing_any_more_empties_no_mirror(
    refresherr: Refresherr, tmp_path: Path
) -> None:
    """It answers 404 to everything while the container behind it restarts."""
    with FakeSonarr(tmp_path / "tv") as sonarr:
        for number in range(3):
            sonarr.add_file(sonarr.add_series(f"Show {number}"), "x.mkv", [(1, 1)])
        configure(refresherr, section("sonarr tv", sonarr))
        ingested(refresherr)
        before = mirror(refresherr)
        sonarr.sick("404", skip=2, times=None)
        assert ingested(refresherr)["sonarr_tv"]["error"]
    assert mirror(refresherr) == before


def is_for(series_id: int) -> Callable[[Request], bool]:
    return lambda request: request.query.get("seriesId") == [str(series_id)]


def test_names_of_instances_and_exit_codes(refresherr: Refresherr, tmp_path: Path) -> None:
    with FakeSonarr(tmp_path / "tv") as good, FakeSonarr(tmp_path / "tv2") as bad:
        bad.sick("500", times=None)
        configure(refresherr, section("sonarr good", good), section("sonarr bad", bad))
        nobody = run(refresherr, "ingest", "sonarr_godo", "--json")
        assert nobody.code == nobody.json["exit_code"] == 2
        assert "sonarr_good" in nobody.json["message"]
        assert not good.requests
        results = {
            3: run(refresherr, "ingest", "--json"),
            1: run(refresherr, "ingest", "--json", "sonarr_bad"),
            0: run(refresherr, "ingest", "--json", "sonarr_good"),
        }
    for code, result in results.items():
        assert result.code == result.json["exit_code"] == code
        assert result.json["status"] == {3: "partial", 1: "error", 0: "ok"}[code]
        assert result.json["command"] == "ingest"
        assert ("message" in result.json) == bool(code)
    both = {line["name"]: line for line in results[3].json["instances"]}
    keys = {"name", "kind", "version", "titles", "files", "linked", "removed", "error"}
    assert keys <= set(both["sonarr_bad"])
    assert keys <= set(both["sonarr_good"])
    assert "database is locked" in both["sonarr_bad"]["error"]
    assert both["sonarr_good"]["error"] is None


def test_a_dry_run_leaves_the_database_as_it_is(refresherr: Refresherr, tmp_path: Path) -> None:
    with FakeSonarr(tmp_path / "tv") as sonarr:
        show = sonarr.add_series("Show")
        sonarr.add_file(show, "x.mkv", [(1, 1)])
        configure(refresherr, section("sonarr tv", sonarr))
        preview = run(refresherr, "ingest", "-n", "--json")
        assert preview.code == 0
        assert preview.json["instances"][0]["files"] == 1
        assert not refresherr.data_dir.exists()
        run(refresherr, "ingest")
        sonarr.add_file(show, "y.mkv", [(1, 2)])

        def state() -> Dict[str, str]:
            files = sorted(refresherr.data_dir.iterdir())
            return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

        before = state()
        assert run(refresherr, "ingest", "-n", "--json").json["instances"][0]["files"] == 2
        assert state() == before
        assert not sonarr.changes()


def test_another_run_holds_the_lock(refresherr: Refresherr, tmp_path: Path) -> None:
    with FakeSonarr(tmp_path / "tv") as sonarr:
        configure(refresherr, section("sonarr tv", sonarr))
        refresherr.scan(tmp_path / "tv")  # makes the database
        with open(f"{refresherr.db_path}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            started = [
                refresherr.start("ingest", "--json"),
                refresherr.start("dispatch", "--apply", "--json"),
            ]
            for result in map(finish, started):
                assert result.code == 5
                assert result.json["status"] == "locked"
                assert len(result.err.splitlines()) == 1
        assert not sonarr.requests


def test_a_signal_in_the_middle_changes_nothing_and_is_obeyed_at_once(tmp_path: Path) -> None:
    """While the server hangs: not after the time-outs of all the requests that are under way."""
    timeout = 4.0
    signals = {signal.SIGINT: 130, signal.SIGTERM: 130, signal.SIGKILL: -9}
    with FakeSonarr(tmp_path / "tv") as sonarr:
        for number in range(6):
            sonarr.add_file(sonarr.add_series(f"Show {number}"), "x.mkv", [(1, 1)])
        first = Refresherr(tmp_path)
        configure(first, section("sonarr tv", sonarr), timeout=timeout)
        ingested(first)
        before = mirror(first)
        sonarr.series[11]["title"] = "New"
        sonarr.clear_requests()
        sonarr.sick("hang", path_regex="episodefile", times=None)
        runs = {}
        for number in signals:
            other = Refresherr(tmp_path)
            other.data_dir = tmp_path / f"data-{number}"
            shutil.copytree(str(first.data_dir), str(other.data_dir))
            other.env = first.env
            runs[number] = (other, other.start("ingest", "--json"))
        limit = time.monotonic() + KILL_AFTER
        while sum("episodefile" in request.path for request in list(sonarr.requests)) < 12:
            assert time.monotonic() < limit
            time.sleep(0.01)
        began = time.monotonic()
        for number, (_, process) in runs.items():
            process.send_signal(number)
        for number, (other, process) in runs.items():
            result = finish(process)
            assert result.code == signals[number], result.err
            assert mirror(other) == before
            if number != signal.SIGKILL:
                assert result.json["status"] == "interrupted"
                assert "Traceback" not in result.err
                assert other.query("SELECT exit_code FROM runs ORDER BY run_id") == [(0,), (130,)]
        took = time.monotonic() - began
    assert took / timeout < 0.5


# Ingest: whatever stands in the JSON


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: Dict[str, Any] = {
    "texts": {"id": "11", "title": "x", "year": "soon", "monitored": "yes", "tmdbId": "x"},
    "objects": {"id": 1, "title": {"a": 1}, "year": {}, "monitored": [], "imdbId": {}},
    "noid": {"title": "x", "movieFile": {"path": "/x"}},
    "noid2": {"title": "x", "statistics": {"episodeFileCount": 1}},
    "nullid": {"id": None, "title": "x", "statistics": {"episodeFileCount": 1}},
    "objectid": {"id": {"a": [1]}, "statistics": {"episodeFileCount": 1}},
    "bools": {"id": True, "year": False, "movieFile": {"id": True, "path": "/x"}},
    "huge": {"id": 1 << 70, "year": 1 << 64, "tmdbId": -(1 << 80)},
    "limits": {"id": (1 << 63) - 1, "tmdbId": -(1 << 63), "year": 1e308, "monitored": 1},
    "floats": {"id": 1.5, "title": 1.5, "movieFile": {"id": 2.5, "size": 1e400, "path": 1.5}},
    "nul": {"id": 1, "title": "a\x00b", "movieFile": {"id": 1, "path": "/a\x00b"}},
    "surrogates": {"id": 1, "title": "\ud800", "movieFile": {"id": 1, "path": "/\udfff\udc80"}},
    "images": {"id": 1, "images": [None, 7, [], {}, {"coverType": "poster", "url": {}}]},
    "nested": {"id": 1, "images": nested(600), "title": nested(600)},
    "file": {"id": 1, "movieFile": [{"id": 1}]},
    "quality": {"id": 1, "movieFile": {"id": 1, "path": None, "quality": [], "mediaInfo": "x"}},
    "statistics": {"id": 1, "statistics": {"episodeFileCount": "many"}},
    "statistics2": {"id": "1&x=2#", "statistics": {"episodeFileCount": 1e308}},
    "escapes": {
        "id": 1,
        "title": "\x1b]0;pwned\x07\u202e",
        "movieFile": {"id": 1, "path": "/\x1b["},
    },
    "long": {"id": 1, "title": "x" * (10 << 20)},
    "long2": {"id": 1, "title": "\U0001f600" * 50000},
}


def test_types_that_do_not_belong_there_stop_nobody(refresherr: Refresherr) -> None:
    """One server each, Sonarr and Radarr; what is no list of objects with ids changes no row."""
    with Hub() as hub:
        sections = []
        for name, item in HOSTILE.items():
            for app, answers in (
                ("Radarr", {"movie": [{"id": 77, "title": "Good"}, item]}),
                ("Sonarr", {"series": [{"id": 77, "title": "Good"}, item], "episodefile": [item]}),
            ):
                url = hub.add(f"{app}-{name}", Canned(app, **answers))
                sections.append(f"[{app} {name}]\nurl = {url}\napi_key = {API_KEY}\n")
        configure(refresherr, *sections)
        result = run(refresherr, "ingest", "--json")
    assert "internal error" not in result.err, result.err
    assert "Traceback" not in result.err
    assert "\x1b" not in result.out + result.err
    lines = {line["name"]: line for line in result.json["instances"]}
    assert len(lines) == 2 * len(HOSTILE)
    failed = {name for name, line in lines.items() if line["error"]}
    no_id = {
        "texts",
        "noid",
        "noid2",
        "nullid",
        "objectid",
        "bools",
        "huge",
        "floats",
        "statistics2",
    }
    sick = {f"{app}_{name}" for app in ("sonarr", "radarr") for name in no_id}
    sick |= {"radarr_file"}
    assert failed - {"radarr_long", "sonarr_long", "radarr_nested", "sonarr_nested"} == sick
    assert len(result.err.splitlines()) == len(failed)
    for name in HOSTILE:
        for instance, kind in ((f"radarr_{name}", "movies"), (f"sonarr_{name}", "series")):
            rows = table(refresherr, kind, instance)
            assert (instance in failed) != ("Good" in [row["title"] for row in rows])
    shown = run(refresherr, "stats", "--json")
    assert shown.code == 0, shown.err


@pytest.mark.parametrize(
    "answer",
    [b"[1,2,3]", b"[null,{}]", b"{}", b"null", b'[{"id":1},7]', b'[{"title":"no id"}]', b"[[]]"],
)
@pytest.mark.parametrize("size", ["short", "long"])
def test_what_is_no_list_of_objects_with_ids_empties_no_mirror(
    refresherr: Refresherr, tmp_path: Path, answer: bytes, size: str
) -> None:
    """A list that is decoded at once, and one that is decoded piece by piece."""
    padding = b" " * (program.MAX_ELEMENT + 1 if size == "long" else 0)
    with FakeRadarr(tmp_path / "movies") as radarr, FakeSonarr(tmp_path / "tv") as sonarr:
        fake_servers.populate_movies(radarr, 3)
        fake_servers.populate(sonarr, 2, 2)
        configure(refresherr, section("radarr m", radarr), section("sonarr tv", sonarr))
        ingested(refresherr)
        before = mirror(refresherr)
        radarr.script(path_regex="movie$", status=200, body=padding + answer)
        sonarr.script(path_regex="episodefile$", status=200, body=padding + answer)
        lines = ingested(refresherr)
    assert lines["radarr_m"]["error"] and lines["sonarr_tv"]["error"]
    assert mirror(refresherr) == before


# Sick servers
#
# A Sonarr for every sickness at every stage, and a healthy one: one run each, all at the same time.

STAGES = {
    "ingest": {"status": "/system/status", "list": "/series$", "files": "/episodefile$"},
    "doctor": {"status": "/system/status", "list": "/rootfolder$"},
    "dispatch": {"status": "/system/status", "change": "/episodefile/", "search": "/command$"},
}
# The same code reads the status for ingest; here only how the commands differ is of interest.
FEWER = {
    ("doctor", "list"): ("html", "bad json", "drip", "reset", "500"),
    ("dispatch", "status"): ("html", "hang", "close", "redirect", "401", "404", "429", "500"),
}
CASES = [
    (command, stage, sickness)
    for command, stages in STAGES.items()
    for stage in stages
    for sickness in FEWER.get((command, stage), SICKNESSES)
]
# What the line must say at least, besides the name: what is wrong, or what to do.
WORDS = {
    "html": "url",
    "bad json": "damaged",
    "not utf-8": "damaged",
    "empty": "JSON",
    "truncated": "broke off",
    "endless": "longer",
    "drip": "within",
    "slow headers": "within",
    "reset": "reset",
    "hang": "within",
    "garbage": "no HTTP",
    "redirect": "redirect",
    "401": "key",
    "404": "url",
    "429": "429",
    "500": "database is locked",
    "502": "502",
    "503": "503",
}


class Ward(NamedTuple):
    """A program with its servers, all sick at the same stage."""

    command: str
    stage: str
    refresherr: Refresherr
    servers: Dict[str, FakeSonarr]  # by the name of the instance

    @property
    def apply(self) -> Sequence[str]:
        return ["--apply", "--no-wait"] if self.command == "dispatch" else []

    def infect(self) -> None:
        method = {"change": "DELETE", "search": "POST"}.get(self.stage, "GET")
        for sickness in FEWER.get((self.command, self.stage), SICKNESSES):
            server = self.servers[instance_of(sickness)]
            server.drip_interval = TIMEOUT / 10
            server.clear_requests()
            server.sick(
                sickness,
                method=method,
                path_regex=STAGES[self.command][self.stage],
                times=None,
                size=12 << 20,
            )
        self.servers["sonarr_healthy"].clear_requests()


class Report(NamedTuple):
    """What became of a ward."""

    ward: Ward
    result: Result
    before: Dict[str, List[Any]]
    after: Dict[str, List[Any]]
    seconds: Dict[str, float]  # from the first request to one server to that to the next
    healed: Optional[Result]  # of another run when all were well again


def instance_of(sickness: str) -> str:
    return "sonarr_" + re.sub(r"\W", "", sickness)


def open_ward(folder: Path, hub: Hub, command: str, stage: str) -> Ward:
    """Make the servers; for dispatch each with a broken link, unmonitored, among others."""
    folder.mkdir()
    servers, sections = {}, [f"[scan]\nroots = {folder / 'media'}\nmax_new_broken = 100%\n"]
    sick = FEWER.get((command, stage), SICKNESSES)
    for name in [*map(instance_of, sick), "sonarr_healthy"]:
        root = folder / "media" / name
        base = f"{command}-{stage}-{name}"
        sonarr = FakeSonarr(root, auto_unmonitor=True, url_base=base)
        hub.add(base, sonarr)
        for number in range(6 if stage == "files" else 1):
            show = sonarr.add_series(f"Show {number}")
            for episode in (1, 2, 3) if command == "dispatch" else (1,):
                file = sonarr.add_file(
                    show, f"Season 01/{episode}.mkv", [(1, episode)], monitored=episode != 2
                )
                if command == "dispatch":
                    make_link(sonarr.link_of(file), folder / f"{name} {episode}", episode != 2)
        servers[name] = sonarr
        sections.append(section(name.replace("_", " ", 1), sonarr))
    refresherr = Refresherr(folder)
    configure(refresherr, *sections, timeout=TIMEOUT)
    return Ward(command, stage, refresherr, servers)


def make_link(link: Path, goal: Path, exists: bool) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(goal)
    if exists:
        goal.write_bytes(b"video")


def all_at_once(wards: Sequence[Ward], *args: str) -> List[Result]:
    started = [ward.refresherr.start(*args) for ward in wards]
    return [finish(process) for process in started]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dict[Tuple[str, str], Report]]:
    folder = tmp_path_factory.mktemp("wards")
    with Hub() as hub:
        wards = [
            open_ward(folder / f"{command}-{stage}", hub, command, stage)
            for command, stages in STAGES.items()
            for stage in stages
        ]
        dispatching = [ward for ward in wards if ward.command == "dispatch"]
        for prepared in (
            all_at_once([ward for ward in wards if ward.command == "ingest"], "ingest"),
            all_at_once(dispatching, "scan"),
            all_at_once(dispatching, "ingest"),
            all_at_once(dispatching, "queue"),
        ):
            assert not any(result.code for result in prepared), prepared
        before = [state_of(ward) for ward in wards]
        for ward in wards:
            ward.infect()
        started = [ward.refresherr.start(ward.command, *ward.apply) for ward in wards]
        results = [finish(process) for process in started]
        seconds = [seconds_of(ward) for ward in wards]
        after = [state_of(ward) for ward in wards]
        healed = heal(dispatching)
        yield {
            (ward.command, ward.stage): Report(ward, *facts, healed.get(ward.stage))
            for ward, facts in zip(wards, zip(results, before, after, seconds))
        }


def heal(wards: Sequence[Ward]) -> Dict[str, Result]:
    """Have dispatch run again, now that the servers are well and all delays are over."""
    for ward in wards:
        for server in ward.servers.values():
            server.scripts.clear()
    all_at_once(wards, "actions", "retry", "--failed")
    for ward in wards:
        conn = sqlite3.connect(str(ward.refresherr.db_path))
        with conn:
            conn.execute("UPDATE actions SET next_attempt_utc = NULL")
        conn.close()
    healed = all_at_once(wards, "dispatch", *wards[0].apply)
    return {ward.stage: result for ward, result in zip(wards, healed)}


def state_of(ward: Ward) -> Dict[str, List[Any]]:
    """Return for each instance its rows, and its action without what a try may change."""
    state: Dict[str, List[Any]] = {name: [] for name in ward.servers}
    if ward.command == "doctor":
        return state
    for rows in mirror(ward.refresherr).values():
        for row in rows:
            state[row[1]].append(row)
    for url, path in ward.refresherr.query("SELECT url, related_path FROM actions ORDER BY id"):
        state[urllib.parse.urlsplit(url).netloc].append((url, path))
    return state


def seconds_of(ward: Ward) -> Dict[str, float]:
    """Return how long each instance took; they are asked one after the other."""
    starts = sorted((server.requests[0].at, name) for name, server in ward.servers.items())
    ends = [at for at, _ in starts[1:]]
    return {name: end - at for (at, name), end in zip(starts, ends)}


@pytest.mark.parametrize(("command", "stage", "sickness"), CASES)
def test_a_sick_server_is_one_clear_line_and_loses_nothing(
    reports: Dict[Tuple[str, str], Report], command: str, stage: str, sickness: str
) -> None:
    report = reports[command, stage]
    name = instance_of(sickness)
    said = report.result.out if command == "doctor" else report.result.err
    lines = [line for line in said.splitlines() if re.search(rf"\b{name}\b", line)]
    if command == "doctor" and stage == "list":
        lines = [line for line in lines if not line.startswith("ok")]
    lies = stage == "change" and sickness in ("empty", "null")  # it says that all is well
    gone = stage == "change" and sickness == "404"
    if not lies and not gone:
        assert lines
    if command == "doctor":  # the advice is on a line of its own
        lines = [line for line in lines if f"{name}: " in line]
    assert len(lines) <= 1 + (command == "doctor"), lines
    if stage == "status":
        assert WORDS.get(sickness, "") in lines[0]
    assert report.before[name] == report.after[name]
    assert report.seconds.get(name, 0) / TIMEOUT < 4.5
    for request in report.ward.servers[name].requests:
        assert API_KEY not in request.target


@pytest.mark.parametrize(("command", "stage"), [(c, s) for c in STAGES for s in STAGES[c]])
def test_the_run_among_sick_servers(
    reports: Dict[Tuple[str, str], Report], command: str, stage: str
) -> None:
    report = reports[command, stage]
    result = report.result
    assert result.code in ((1, 3) if command == "doctor" else (3,))
    assert "Traceback" not in result.out + result.err
    assert "internal error" not in result.out + result.err
    assert_clean(result.out + result.err, API_KEY)
    assert_not_on_disk(report.ward.refresherr, API_KEY)
    healthy = report.ward.servers["sonarr_healthy"]
    assert healthy.requests
    assert "sonarr_healthy" not in result.err


@pytest.mark.parametrize(("stage", "sickness"), [(s, n) for c, s, n in CASES if c == "dispatch"])
def test_a_repair_is_finished_when_the_server_is_well(
    reports: Dict[Tuple[str, str], Report], stage: str, sickness: str
) -> None:
    report = reports["dispatch", stage]
    name = instance_of(sickness)
    sonarr = report.ward.servers[name]
    assert report.healed is not None
    assert_clean(report.healed.out + report.healed.err, API_KEY)
    assert sonarr.deleted_files == [502], report.healed.err
    assert sorted(sonarr.files) == [501, 503]
    assert all(sonarr.link_of(number).exists() for number in sonarr.files)
    assert not os.path.lexists(str(sonarr.link_of(502)))
    assert sonarr.monitored() == {7001: True, 7002: False, 7003: True}
    searches = [s for s in sonarr.searches if s["name"] == "EpisodeSearch"]
    assert searches == sonarr.searches
    assert [s["episodeIds"] for s in searches] in ([[7002]], [[7002]] * 2)
    rows = report.ward.refresherr.query(
        "SELECT status FROM actions WHERE url LIKE ?", f"arr://{name}/%"
    )
    assert rows == [("sent",)]


# Bounded memory

# The launcher is small: what a process had before exec counts as its own, and pytest has much.
LAUNCHER = """
import os, sys
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(str(usage.ru_maxrss))
sys.exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 99)
"""


def peak_of(refresherr: Refresherr, *args: str) -> Tuple[Result, float]:
    """Run the program; return its result and its peak memory in MB."""
    file = Path(refresherr.env["HOME"]) / "peak"
    command = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(file), *refresherr.command(*args)]
    process = subprocess.Popen(
        command,
        env=refresherr.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    result = finish(process)
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return result, int(file.read_text(encoding="ascii")) / unit


def test_a_body_of_200_mb_takes_no_memory(refresherr: Refresherr, tmp_path: Path) -> None:
    """Wherever it comes, whatever stands in it: one title, many elements, or an error."""
    with contextlib.ExitStack() as stack:
        sections = []
        small = {"size": 20 << 20}
        for name, path, how in (
            ("status", "/system/status", {}),
            ("error", "/system/status", {"status": 500, **small}),
            ("list", "/series$", {}),
            ("files", "/episodefile", {"size": 40 << 20}),  # four of them
            ("emoji", "/series$", {"body": "\U0001f600".encode(), **small}),
            ("elements", "/series$", {"body": b'{"id":1,"title":"%s"},' % (b"x" * 5000), **small}),
            ("nested", "/series$", {"body": b'{"a":[', **small}),
        ):
            sonarr = stack.enter_context(FakeSonarr(tmp_path / name))
            for number in range(4):
                sonarr.add_file(sonarr.add_series(f"Show {number}"), "x.mkv", [(1, 1)])
            sonarr.script(path_regex=path, kind="endless", times=None, **how)
            sections.append(section(f"sonarr {name}", sonarr))
        configure(refresherr, *sections)
        result, peak = peak_of(refresherr, "ingest")
    assert result.code == 1
    assert len(result.err.splitlines()) == len(sections)
    assert peak < 150


def test_memory_does_not_grow_with_the_library(refresherr: Refresherr, tmp_path: Path) -> None:
    peaks = []
    for movies in (100, 4000):
        with FakeRadarr(tmp_path / "movies") as radarr:
            fake_servers.populate_movies(radarr, movies)
            configure(refresherr, section("radarr m", radarr))
            result, peak = peak_of(refresherr, "ingest", "--json")
        assert result.json["instances"][0]["files"] == movies
        peaks.append(peak)
    assert peaks[1] / peaks[0] < 1.5
    assert peaks[1] < 150
