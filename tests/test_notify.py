"""Who is told about a run: notifiers, heartbeats, media servers; and what they may answer."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import time
import urllib.parse
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from fake_servers import SICKNESSES, FakeServer, Refusal, Reply, Request

import refresherr as program

RUN = "0c3bcf5e-3a4d-4a5e-9f6b-1d2e3f405162"
TOKEN = "tk_n0tForAnyEyes123"
KEY = "mediaKey+0123456789abcdef"
# The secret part of each address, as it stands in it.
SECRETS = {
    "discord": "wEbh00k-T0ken_xyz123",
    "ntfy": "t%C3%B6pic%2Fs3cret99",
    "apprise": "apprise%20Key%2077",
    "webhook": "h00k%2Bs3cret/sub-p4th",
    "healthchecks": "7a9f7f6e-11aa-4b6c-8f00-c0ffee123456",
    "uptime_kuma": "pUsht0ken4711",
}
PLACES = {
    "discord": "/api/webhooks/42/",
    "ntfy": "/",
    "apprise": "/notify/",
    "webhook": "/in/",
    "healthchecks": "/ping/",
    "uptime_kuma": "/api/push/",
}
TEXT = "3 links were repaired\n1 failed: /tv/Show \u00e9/x.mkv"
NOTE = program.Note("Refresherr: 3 repaired", TEXT, "warning", {"repaired": 3, "items": ["a"]})


def expect(condition: bool, request: Request) -> None:
    if not condition:
        raise AssertionError(f"{request.method} {request.target} {request.headers} {request.raw!r}")


class Receivers(FakeServer):
    """All notifiers at one address, strict about what they are sent."""

    def answer(self, request: Request) -> Reply:
        expect(request.headers["user-agent"].startswith("Refresherr/"), request)
        path = request.target.partition("?")[0]
        for name, place in PLACES.items():
            base = place + SECRETS[name]
            if path == base or path.startswith(base + "/"):
                return getattr(self, name)(request, path[len(base) :])  # type: ignore[no-any-return]
        raise Refusal(Reply(404, b'{"message": "404: Not Found"}'))

    def json(self, request: Request, *keys: str) -> Any:
        expect(request.method == "POST", request)
        expect(request.headers["content-type"] == "application/json", request)
        expect("authorization" not in request.headers, request)
        expect(set(keys) <= set(request.body), request)
        return request.body

    def discord(self, request: Request, rest: str) -> Reply:
        body = self.json(request, "content", "allowed_mentions")
        expect((rest, set(body)) == ("", {"content", "allowed_mentions"}), request)
        expect(body["allowed_mentions"] == {"parse": []}, request)
        expect(0 < len(body["content"].encode("utf-16-le")) <= 4000, request)
        return Reply(204)

    def ntfy(self, request: Request, rest: str) -> Reply:
        expect((request.method, rest) == ("POST", ""), request)
        expect(request.headers["content-type"] == "text/plain; charset=utf-8", request)
        expect(request.headers["authorization"] == f"Bearer {TOKEN}", request)
        expect(request.headers["title"].isascii(), request)
        expect(request.headers["priority"] in "12345", request)
        expect(bool(re.fullmatch("[a-z_]+", request.headers["tags"])), request)
        expect(0 < len(request.raw) <= 4096 and bool(request.raw.decode()), request)
        return Reply(200, b'{"id": "x", "event": "message"}')

    def apprise(self, request: Request, rest: str) -> Reply:
        body = self.json(request)
        expect((rest, set(body)) == ("", {"title", "body", "type"}), request)
        expect(body["type"] in ("info", "success", "warning", "failure"), request)
        return Reply(200, b"Notifications sent", {"Content-Type": "text/plain"})

    def webhook(self, request: Request, rest: str) -> Reply:
        self.json(request, "title", "text", "level", "repaired")
        expect(rest == "", request)
        return Reply(202, b"thanks", {"Content-Type": "text/html"})

    def healthchecks(self, request: Request, rest: str) -> Reply:
        expect(request.method == "POST", request)
        expect(bool(re.fullmatch(r"(/start|/[1-9]\d*)?", rest)), request)
        expect(request.query["rid"] == [RUN], request)
        expect(bool(request.raw) is (rest != "/start"), request)
        return Reply(200, b"OK", {"Content-Type": "text/plain"})

    def uptime_kuma(self, request: Request, rest: str) -> Reply:
        expect((request.method, rest, request.raw) == ("GET", "", b""), request)
        expect(set(request.query) == {"status", "msg", "ping"}, request)
        expect(request.query["status"][0] in ("up", "down"), request)
        expect(request.query["ping"][0].isdigit(), request)
        return Reply(200, b'{"ok": true}')


@pytest.fixture
def server() -> Iterator[Receivers]:
    with Receivers() as receivers:
        yield receivers


def settings_for(server: FakeServer, *names: str, **more: str) -> program.NotifySettings:
    urls = {name: server.url + PLACES[name] + SECRETS[name] for name in names}
    token = {"ntfy_token": TOKEN} if "ntfy" in names else {}
    return program.NotifySettings(**{**urls, **token, **more})


def tell(
    settings: program.NotifySettings,
    how: str,
    sleep: Callable[[float], None] = time.sleep,
    timeout: float = 20.0,
    note: program.Note = NOTE,
    code: int = 0,
) -> List[Dict[str, Any]]:
    if how == "start":
        calls = program.start_calls(RUN)
    elif how == "end":
        calls = program.end_calls(RUN, code, note.text, 1.5)
    else:
        calls = program.note_calls(note, settings.ntfy_token)
    return program.tell(settings, calls, timeout, sleep)


WAYS = [
    *(("note", name) for name in ("discord", "ntfy", "apprise", "webhook")),
    ("start", "healthchecks"),
    ("end", "healthchecks"),
    ("end", "uptime_kuma"),
]
each_way = pytest.mark.parametrize(("how", "name"), WAYS)


def assert_hidden(text: str, *secrets: str) -> None:
    """Check a line that is shown: no piece of a secret in any of its forms."""
    assert text.isprintable(), text
    for secret in secrets:
        for form in (secret, urllib.parse.unquote(secret), urllib.parse.quote(secret, safe="")):
            for start in range(max(1, len(form) - 7)):
                assert form[start : start + 8].lower() not in text.lower(), (text, form)


# --- What they are sent


def test_a_note_reaches_everybody(server: Receivers) -> None:
    names = ["discord", "ntfy", "apprise", "webhook"]
    everything = settings_for(server, *PLACES)
    assert tell(everything, "note") == [{"name": name, "error": None} for name in names]
    discord, ntfy, apprise, webhook = server.requests
    assert discord.body["content"] == f"**{NOTE.title}**\n```\n{TEXT}\n```"
    assert ntfy.raw.decode() == TEXT
    assert (ntfy.headers["title"], ntfy.headers["priority"]) == (NOTE.title, "4")
    assert apprise.body == {"title": NOTE.title, "body": TEXT, "type": "warning"}
    told = {"title": NOTE.title, "text": TEXT, "level": "warning"}
    assert webhook.body == {**told, **NOTE.result}


def test_without_a_notifier_nobody_is_told(server: Receivers) -> None:
    for how in ("note", "start", "end"):
        assert tell(program.NotifySettings(), how) == []
    assert server.requests == []


@pytest.mark.parametrize("level", program.LEVELS)
def test_every_level_is_known_to_all(server: Receivers, level: str) -> None:
    results = tell(settings_for(server, *PLACES), "note", note=NOTE._replace(level=level))
    assert {result["error"] for result in results} == {None}


def test_the_heartbeat_of_a_run(server: Receivers) -> None:
    monitors = settings_for(server, *PLACES)
    alive = [{"name": name, "error": None} for name in ("healthchecks", "uptime_kuma")]
    assert tell(monitors, "start") == alive[:1]
    assert tell(monitors, "end") == alive
    assert tell(monitors, "end", code=3) == alive
    start, good, up, bad, down = server.requests
    paths = [request.path.rpartition(SECRETS["healthchecks"])[2] for request in (start, good, bad)]
    assert paths == ["/start", "", "/3"]
    assert good.raw.decode() == TEXT
    assert [request.query["status"] for request in (up, down)] == [["up"], ["down"]]
    assert up.query["ping"] == ["1500"]
    assert up.query["msg"] == [TEXT.replace("\n", " ")]


def test_what_is_pasted_behind_an_address(server: Receivers) -> None:
    pasted = {"discord": "thread_id=77", "webhook": "sig=a%2Fb%2B", "healthchecks": "create=1"}
    kuma = {"uptime_kuma": "status=up&msg=OK&ping=&x=1"}
    urls = {
        name: f"{getattr(settings_for(server, name), name)}?{query}"
        for name, query in {**pasted, **kuma}.items()
    }
    settings = program.NotifySettings(**urls)
    results = [*tell(settings, "note"), *tell(settings, "start"), *tell(settings, "end", code=1)]
    assert {result["error"] for result in results} == {None}
    targets = [request.target.partition("?")[2] for request in server.requests]
    assert targets[:2] == ["thread_id=77", "sig=a%2Fb%2B"]
    assert targets[2:4] == [f"create=1&rid={RUN}"] * 2
    assert server.requests[-1].query["status"] == ["down"]


def test_a_user_and_a_password_in_the_address(server: Receivers) -> None:
    url = f"http://me:p%40ssw0rd123@127.0.0.1:{server.port}/t0pic-secret"
    settings = program.NotifySettings(ntfy=url, ntfy_token="")
    ((result),) = tell(settings, "note")
    assert (
        server.requests[0].headers["authorization"]
        == "Basic " + base64.b64encode(b"me:p@ssw0rd123").decode()
    )
    assert "404" in result["error"]
    assert_hidden(result["error"], "p%40ssw0rd123", "t0pic-secret")


# --- Hostile text

HOSTILE = {
    "markdown": "**bold** [x](http://evil.invalid) ```\n@everyone <@&1> `~~|| > # \\",
    "surrogates": "bad \udc80\udcff \ud800 name",
    "emoji": "\U0001f4a5" * 5000,
    "emoji, shifted": "x" + "\U0001f4a5" * 5000,
    "accents": "xx" + "\u00e9" * 5000,
    "long": "line of text\n" * 1000,
    "fences": "`" * 10000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_text_is_told_and_does_no_harm(server: Receivers, text: str) -> None:
    note = NOTE._replace(text=text, result={"repaired": 1, "path": text})
    settings = settings_for(server, *PLACES)
    results = [*tell(settings, "note", note=note), *tell(settings, "end", note=note, code=4)]
    assert {result["error"] for result in results} == {None}
    discord, ntfy, apprise, _, health, kuma = server.requests
    content = discord.body["content"]
    assert re.fullmatch(r"\*\*[^*]+\*\*\n```\n[^`]*\n```", content)
    assert len(content.encode("utf-16-le")) > 3900 or not content.endswith("...\n```")
    for whole, sent in (
        (text, ntfy.raw.decode()),
        (text.replace("`", "'"), content.partition("```\n")[2].rpartition("\n```")[0]),
        (" ".join(text.split()), kuma.query["msg"][0]),
    ):
        whole = whole.encode("utf-8", "backslashreplace").decode()
        assert sent == whole or (sent.endswith("...") and whole.startswith(sent[:-3]))
        assert len(sent) > 60 or sent == whole
    assert len(health.raw) <= 10000
    assert len(apprise.body["body"]) == len(text)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
def test_a_cut_is_at_a_border(encoding: str) -> None:
    text = "a\u00e9\u20ac\U0001f4a5" * 4
    whole = len(text.encode(encoding))
    assert program.cut(text, whole, encoding) == text
    for limit in range(8, whole):
        short = program.cut(text, limit, encoding)
        assert short.endswith("...")
        assert text.startswith(short[:-3])
        assert limit - 4 < len(short.encode(encoding)) <= limit


# --- What may go wrong


def echo(name: str) -> bytes:
    """Return an error in which a server says all that it was sent, in every form."""
    secret = SECRETS.get(name, KEY)
    forms = [secret, urllib.parse.unquote(secret), urllib.parse.quote(secret, safe="")]
    forms += [form.lower() for form in forms] + [PLACES.get(name, "/") + secret]
    forms += [TOKEN] if name == "ntfy" else []
    return json.dumps({"message": "no: " + " ".join(forms), "msg": "x"}).encode()


# How a server is ill: a script for all its answers, what the error says, the waits it leads to.
Illness = Tuple[Dict[str, Any], str, List[float]]
ILLNESSES: Dict[str, Illness] = {
    "401": ({"status": 401}, "answered 401", []),
    "404": ({"status": 404}, "answered 404", []),
    "424": ({"status": 424}, "answered 424", []),
    "429": ({"status": 429}, "answered 429", [1.0]),
    "429, header": ({"status": 429, "headers": {"Retry-After": "2"}}, "answered 429", [2.0]),
    "429, fraction": ({"status": 429, "headers": {"Retry-After": "0.25"}}, "429", [0.25]),
    "429, too long": ({"status": 429, "headers": {"Retry-After": "11"}}, "answered 429", []),
    "429, Discord": (
        {"status": 429, "headers": {"Retry-After": "9"}, "body": b'{"retry_after": 0.37}'},
        "answered 429",
        [0.37],
    ),
    "429, Discord, too long": (
        {"status": 429, "body": b'{"message": "slow down", "retry_after": 3600.5}'},
        "slow down",
        [],
    ),
    "500": ({"status": 500}, "answered 500", [1.0]),
    "503": ({"status": 503, "headers": {"Retry-After": "3"}}, "answered 503", [3.0]),
    "not ok": ({"status": 200, "body": b'{"ok": false, "msg": "Monitor gone"}'}, "gone", []),
    "hang": ({"kind": "hang"}, "no whole answer within", []),
    "reset": ({"kind": "reset"}, "", []),
    "close": ({"kind": "close"}, "closed the connection", []),
    "garbage": (SICKNESSES["garbage"], "speaks no HTTP", []),
    "redirect": (
        {"status": 307, "headers": {"Location": "http://127.0.0.1:1/x"}},
        "redirects are not followed",
        [],
    ),
}


@pytest.mark.parametrize("illness", ILLNESSES)
@each_way
def test_a_sick_notifier_is_one_line(
    server: Receivers, how: str, name: str, illness: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    how_ill, words, waits = ILLNESSES[illness]
    body = {} if "body" in how_ill or "kind" in how_ill else {"body": echo(name)}
    server.script(**{"times": None, **how_ill, **body})
    slept: List[float] = []
    timeout = 0.1 if illness == "hang" else 20.0
    ((result),) = tell(settings_for(server, name), how, slept.append, timeout)
    assert result["name"] == name
    assert words in result["error"]
    assert result["error"].startswith(f"{name}: ")
    assert slept == waits
    assert len(server.requests) == 1 + len(waits)
    secrets = [SECRETS[name], PLACES[name] + SECRETS[name], TOKEN][: 3 if name == "ntfy" else 2]
    assert_hidden(result["error"] + caplog.text, *secrets)


@each_way
def test_a_notifier_that_is_not_there(how: str, name: str) -> None:
    with Receivers() as server:
        settings = settings_for(server, name)
    slept: List[float] = []
    ((result),) = tell(settings, how, slept.append)
    assert f"http://127.0.0.1:{server.port}/***" in result["error"]
    assert_hidden(result["error"], SECRETS[name])
    assert slept == []


@each_way
def test_the_second_try_may_succeed(server: Receivers, how: str, name: str) -> None:
    server.script(status=503)
    slept: List[float] = []
    assert tell(settings_for(server, name), how, slept.append) == [{"name": name, "error": None}]
    assert slept == [1.0]
    first, second = server.requests
    assert (first.target, first.raw) == (second.target, second.raw)


def test_a_dead_notifier_does_not_silence_the_others(server: Receivers) -> None:
    names = ["discord", "ntfy", "apprise", "webhook"]
    server.script(times=None, status=404, path_regex="^/api/webhooks")
    server.script(times=None, kind="close", path_regex="^/notify")
    results = tell(settings_for(server, *names), "note")
    assert [result["name"] for result in results] == names
    assert [bool(result["error"]) for result in results] == [True, False, True, False]


def test_apprise_without_a_configuration(server: Receivers) -> None:
    server.script(status=204)
    ((result),) = tell(settings_for(server, "apprise"), "note")
    assert "204" in result["error"]
    assert "configuration" in result["error"]


@pytest.mark.parametrize("how", ["start", "end"])
@pytest.mark.parametrize("words", ["OK (not found)", "OK (rate limited)"])
def test_healthchecks_says_ok_and_means_no(server: Receivers, how: str, words: str) -> None:
    server.script(status=200, body=words.encode(), headers={"Content-Type": "text/plain"})
    ((result),) = tell(settings_for(server, "healthchecks"), how)
    assert words in result["error"]


@each_way
def test_a_redirect_is_told_without_where_it_leads(server: Receivers, how: str, name: str) -> None:
    secret = PLACES[name] + SECRETS[name]
    for where in (f"/moved{secret}", f"http://127.0.0.1:{server.port}/new{secret}/start?{secret}"):
        server.clear_requests()
        server.script(status=301, headers={"Location": where})
        ((result),) = tell(settings_for(server, name), how)
        assert "redirect" in result["error"]
        assert_hidden(result["error"], SECRETS[name])
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("address", "secret"),
    [
        ("http://127.0.0.1:{port}/t\u00f6pic-s3cret", "t\u00f6pic-s3cret"),
        ("http://127.0.0.1:{port}/%zz-s3cret-123", "%zz-s3cret-123"),
        ("http://127.0.0.1:{port}/a?q=s3cret-key-123#frag-s3cret", "s3cret-key-123"),
        ("http://127.0.0.1:{port}?s3cret-key-123", "s3cret-key-123"),
        ("http://127.0.0.1:99999/s3cret-key-123", "s3cret-key-123"),
        ("https://127.0.0.1:{port}/s3cret-key-123", "s3cret-key-123"),
        ("http://user:p@ss?w0rd-123@127.0.0.1:{port}/s3cret-key-123", "p@ss?w0rd-123"),
    ],
)
def test_an_odd_address_stays_a_secret(server: Receivers, address: str, secret: str) -> None:
    server.script(status=400, body=json.dumps({"error": address + secret}).encode())
    settings = program.NotifySettings(webhook=address.format(port=server.port))
    ((result),) = tell(settings, "note")
    assert result["error"]
    assert_hidden(result["error"], secret)


# --- Media servers


class Media(FakeServer):
    """Plex, Jellyfin and Emby at one address, strict about what they are asked."""

    LIBRARIES = {"1": ["/data/tv"], "2": ["/data/movies", "/data/tv/Anime/"], "7": ["/data/tv 2"]}

    def __init__(self) -> None:
        super().__init__()
        self.told: List[Tuple[str, str]] = []

    def answer(self, request: Request) -> Reply:
        headers = request.headers
        expect(KEY not in request.target, request)
        if request.path.startswith("/library/sections"):
            expect(request.method == "GET", request)
            if headers.get("x-plex-token") != KEY:
                raise Refusal(Reply(401, b"<html>", {"Content-Type": "text/html"}))
            return self.plex(request)
        expect((request.method, request.query) == ("POST", {}), request)
        expect(headers["content-type"] == "application/json", request)
        if request.path == "/Library/Media/Updated":
            expect(headers["authorization"] == f'MediaBrowser Token="{KEY}"', request)
            expect("x-emby-token" not in headers, request)
        else:
            expect(request.path == "/emby/Library/Media/Updated", request)
            expect(headers["x-emby-token"] == KEY and "authorization" not in headers, request)
        expect(set(request.body) == {"Updates"} and bool(request.body["Updates"]), request)
        for update in request.body["Updates"]:
            expect(set(update) == {"Path", "UpdateType"}, request)
            expect(update["UpdateType"] == "Modified", request)
            update["Path"].encode()
            self.told.append(("", update["Path"]))
        return Reply(204)

    def plex(self, request: Request) -> Reply:
        if request.target == "/library/sections":
            expect(request.headers["accept"] == "application/json", request)
            folders = [
                {"key": key, "Location": [{"id": 1, "path": path} for path in paths]}
                for key, paths in self.LIBRARIES.items()
            ]
            return Reply(200, json.dumps({"MediaContainer": {"Directory": folders}}).encode())
        match = re.fullmatch(r"/library/sections/(\d+)/refresh\?path=([\w.~%-]+)", request.target)
        expect(match is not None, request)
        assert match
        path = os.fsdecode(urllib.parse.unquote_to_bytes(match.group(2)))
        self.told.append((match.group(1), path))
        return Reply(200, b"", {"Content-Type": "text/xml"})


MEDIA = ("plex", "jellyfin", "emby")


@pytest.fixture
def media() -> Iterator[Media]:
    with Media() as server:
        yield server


def refresh(
    server: FakeServer,
    name: str,
    *directories: str,
    timeout: float = 20.0,
    path_map: Tuple[Tuple[str, str], ...] = (("/opt/media", "/data"),),
    key: str = KEY,
) -> Dict[str, Any]:
    settings: Any = program.JellyfinSettings(server.url, key, path_map)
    if name == "plex":
        settings = program.PlexSettings(server.url, key, path_map)
    elif name == "emby":
        settings = program.JellyfinSettings(f"{server.url}/emby", key, path_map)
    result = program.refresh_media(name, settings, directories, timeout)
    assert set(result) == {"server", "directories", "left", "error"}
    assert result["server"] == name
    return result


NAMES = ["/opt/media/tv/Show (2020)/Season 01", "/opt/media/movies/A & B + C #1?", "/opt/media/tv"]


@pytest.mark.parametrize("name", MEDIA)
def test_each_directory_is_told_once(media: Media, name: str) -> None:
    result = refresh(media, name, *NAMES, *NAMES)
    assert (result["directories"], result["left"], result["error"]) == (NAMES, [], None)
    there = [path.replace("/opt/media", "/data") for path in NAMES]
    assert media.told == list(zip(["1", "2", "1"] if name == "plex" else [""] * 3, there))


@pytest.mark.parametrize("name", MEDIA)
def test_two_paths_that_are_one_over_there(media: Media, name: str) -> None:
    pairs = (("/opt/media", "/data"), ("/mnt/media", "/data"))
    result = refresh(media, name, "/opt/media/tv/x", "/mnt/media/tv/x", path_map=pairs)
    assert result["directories"] == ["/opt/media/tv/x", "/mnt/media/tv/x"]
    assert [path for _, path in media.told] == ["/data/tv/x"]


@pytest.mark.parametrize("name", MEDIA)
def test_nothing_changed(media: Media, name: str) -> None:
    assert refresh(media, name)["error"] is None
    assert media.told == []


def test_the_deepest_library_of_plex_has_it(media: Media) -> None:
    paths = ["tv/x", "tv 2/x", "tv/Anime/x", "tv/Anime", "tv/Animes", "movies/x"]
    refresh(media, "plex", *(f"/opt/media/{path}" for path in paths))
    assert [key for key, _ in media.told] == ["1", "7", "2", "2", "1", "2"]


def test_what_no_library_of_plex_holds(media: Media) -> None:
    lost = ["/srv/b\x1b[31m", "/opt/media/tvshows", "/opt/media/music/x"]
    result = refresh(media, "plex", lost[0], *NAMES, *lost[1:])
    assert (result["directories"], result["left"]) == (NAMES, [])
    assert "path_map" in result["error"]
    assert "/data/music/x and 2 more" in result["error"]
    assert result["error"].isprintable()
    alone = refresh(media, "plex", lost[0])
    assert r"/srv/b\x1b[31m;" in alone["error"]
    assert (alone["directories"], alone["left"]) == ([], [])


def test_names_that_are_not_text(media: Media) -> None:
    odd = os.fsdecode(b"/opt/media/tv/caf\xe9 \xf0\x9f\x92\xa5\n\xff\xfe/x")
    for name in MEDIA:
        result = refresh(media, name, odd)
        assert (result["directories"], result["error"]) == ([odd], None)
    there = odd.replace("/opt/media", "/data")
    shown = "/data/tv/caf\ufffd \U0001f4a5\n\ufffd\ufffd/x"
    assert media.told == [("1", there), ("", shown), ("", shown)]


@pytest.mark.parametrize("name", ["jellyfin", "emby"])
def test_many_directories_go_in_chunks(media: Media, name: str) -> None:
    many = [f"/opt/media/tv/{number}" for number in range(250)]
    assert refresh(media, name, *many)["directories"] == many
    assert [len(request.body["Updates"]) for request in media.requests] == [100, 100, 50]
    media.clear_requests()
    media.script(skip=1, times=None, status=500)
    result = refresh(media, name, *many)
    assert (result["directories"], result["left"]) == (many[:100], many[100:])
    assert "answered 500" in result["error"]
    assert len(media.requests) == 2


SICK_MEDIA = ["401", "404", "429", "500", "503", "hang", "reset", "close", "garbage", "redirect"]


@pytest.mark.parametrize("illness", SICK_MEDIA)
@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("name", MEDIA)
def test_a_sick_media_server_is_told_the_next_time(
    media: Media, name: str, skip: int, illness: str, caplog: pytest.LogCaptureFixture
) -> None:
    if skip and (name != "plex" or illness == "reset"):  # an empty answer cannot be cut short
        return
    caplog.set_level(logging.DEBUG)
    body = {} if "kind" in SICKNESSES[illness] else {"body": echo(name)}
    media.sick(illness, times=None, skip=skip, **body)
    result = refresh(media, name, *NAMES, timeout=0.1 if illness == "hang" else 20.0)
    done = max(0, skip - 1)
    assert (result["directories"], result["left"]) == (NAMES[:done], NAMES[done:])
    assert result["error"].startswith(f"{name}: ")
    assert_hidden(result["error"] + caplog.text, KEY)
    # A kept connection that closes is opened once more.
    assert len(media.requests) - skip in ((1, 2) if skip and illness == "close" else (1,))


@pytest.mark.parametrize("name", MEDIA)
def test_a_media_server_that_is_not_there(name: str) -> None:
    with Media() as media:
        pass
    result = refresh(media, name, *NAMES)
    assert (result["directories"], result["left"]) == ([], NAMES)
    assert "refused" in result["error"]


def test_a_wrong_key_is_not_shown(media: Media) -> None:
    result = refresh(media, "plex", *NAMES, key="wr0ng-k3y-123456")
    assert result["left"] == NAMES
    assert "correct it in the config" in result["error"]
    assert_hidden(result["error"], "wr0ng-k3y-123456")


@pytest.mark.parametrize("name", MEDIA)
def test_something_else_answers(media: Media, name: str) -> None:
    media.sick("html", times=None)
    result = refresh(media, name, *NAMES)
    assert (result["directories"], result["left"]) == ([], NAMES)
    assert "is its url right" in result["error"]


@pytest.mark.parametrize(
    "body",
    [
        "null",
        "[]",
        "7",
        '"x"',
        '{"MediaContainer": null}',
        '{"MediaContainer": []}',
        '{"MediaContainer": {"Directory": null}}',
        '{"MediaContainer": {"Directory": 7}}',
        '{"MediaContainer": {"Directory": ["x"]}}',
        '{"MediaContainer": {"Directory": [{"Location": 7}]}}',
        '{"MediaContainer": {"Directory": [{"Location": [{"path": "/data"}]}]}}',
        '{"MediaContainer": {"Directory": [{"key": "1", "Location": [{"path": 7}]}]}}',
        '{"MediaContainer": {"Directory": [{"key": 1, "Location": [{"path": "/"}]}]}}',
        '{"MediaContainer": {"Directory": [{"key": "\\ud800", "Location": [{"path": "/"}]}]}}',
    ],
)
def test_a_list_of_libraries_that_is_none(media: Media, body: str) -> None:
    media.script(status=200, body=body.encode())
    result = refresh(media, "plex", *NAMES)
    assert (result["directories"], result["left"]) == ([], NAMES)
    assert "/library/sections is not what it should be" in result["error"]


@pytest.mark.parametrize("body", ['{"MediaContainer": {"size": 0}}', '{"MediaContainer": {}}'])
def test_plex_without_libraries(media: Media, body: str) -> None:
    media.script(status=200, body=body.encode())
    result = refresh(media, "plex", *NAMES)
    assert (result["directories"], result["left"]) == ([], [])
    assert "no library holds" in result["error"]


def test_a_key_of_a_library_leads_nowhere_else(media: Media) -> None:
    library = {"key": "1/emptyTrash?x=", "Location": [{"path": "/data"}]}
    body = json.dumps({"MediaContainer": {"Directory": [library]}}).encode()
    media.script(status=200, body=body)
    media.answer = lambda request: Reply(404)  # type: ignore[method-assign]
    refresh(media, "plex", *NAMES)
    assert media.requests[1].target.startswith("/library/sections/1%2FemptyTrash%3Fx%3D/refresh?")


@pytest.mark.parametrize("name", MEDIA)
@pytest.mark.parametrize("left_over", [0.0, 30.0])
def test_a_slow_server_has_its_time(
    media: Media, name: str, left_over: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "MEDIA_LIMIT", 20.0 + left_over)
    monkeypatch.setattr(program, "UPDATES", 1)
    result = refresh(media, name, *NAMES, timeout=20.0)
    count = 3 if left_over else 1
    assert (result["directories"], result["left"]) == (NAMES[:count], NAMES[count:])
    error: Optional[str] = result["error"]
    assert error is None if left_over else error and "2 of 3 directories wait" in error
