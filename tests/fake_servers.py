"""Fake Sonarr, Radarr and relay: stateful, on real links, and as odd as the real ones.

    with FakeSonarr(tmp_path / "media" / "tv", version="3.0.9.1549") as sonarr:
        show = sonarr.add_series("Show", 2020)
        file = sonarr.add_file(show, "Season 01/Show - S01E01.mkv", [(1, 1)])
        sonarr.script(method="DELETE", status=503, headers={"Retry-After": "7"})

Whatever the state holds is in plain dictionaries that a test may read and change; take
`server.lock` where requests run at the same time. A mistake of the fake itself is answered with
599, kept in `errors`, and fails the test when the `with` block ends.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import re
import select
import shutil
import socket
import socketserver
import ssl
import struct
import tempfile
import threading
import time
import traceback
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Pattern, Sequence, Set, Tuple, TypeVar, cast

Record = Dict[str, Any]
Self = TypeVar("Self", bound="FakeServer")

SONARR_3 = "3.0.9.1549"
SONARR_4 = "4.0.19.2979"
SONARR_5 = "5.0.0.109"
RADARR_3 = "3.2.2.5080"
RADARR_4 = "4.7.5.7809"
RADARR_5 = "5.28.0.10274"
RADARR_6 = "6.0.3.10276"
API_KEY = "0123456789abcdef0123456789abcdef"
HTML = b"<!doctype html>\n<html><head><title>Sign in</title></head><body></body></html>\n"
FINAL = ("completed", "failed", "aborted", "cancelled", "orphaned")


# --- HTTP -------------------------------------------------------------------------------------


@dataclass
class Request:
    """A request as it came in."""

    method: str
    target: str  # as sent: still quoted, with the query
    path: str  # unquoted, without the query
    query: Dict[str, List[str]]
    headers: Dict[str, str]  # names in lower case
    raw: bytes
    body: Any  # the JSON that was sent, or None
    at: float  # time.monotonic()
    status: int = 0  # what was answered; 0 for nothing, or something scripted that is no answer


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: Dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """Raised anywhere while answering: this is the answer."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.status)
        self.reply = reply


@dataclass
class Script:
    """How to treat matching requests, instead of, or after, doing what they ask."""

    kind: str
    method: Optional[str]
    path: Pattern[str]
    where: Optional[Callable[[Request], bool]]
    status: Optional[int]
    headers: Dict[str, str]
    body: Optional[bytes]
    times: Optional[int]  # None for ever
    skip: int
    before_effect: bool
    delay: float
    size: int
    used: int = 0

    def wants(self, request: Request) -> bool:
        return (
            self.times != 0
            and self.method in (None, request.method)
            and bool(self.path.search(request.path))
            and (self.where is None or self.where(request))
        )


# What `sick` knows, each a set of arguments for `script`.
SICKNESSES: Dict[str, Dict[str, Any]] = {
    "html": {"status": 200, "headers": {"Content-Type": "text/html"}, "body": HTML},
    "bad json": {"status": 200, "body": b'[{"id": 1, "title": "Ha'},
    "not utf-8": {"status": 200, "body": b'[{"id": 1, "title": "\xff\xfe"}]'},
    "empty": {"status": 200, "body": b""},
    "null": {"status": 200, "body": b"null"},
    "truncated": {"kind": "truncated"},
    "endless": {"kind": "endless"},
    "drip": {"kind": "drip"},
    "slow headers": {"kind": "slow headers"},
    "reset": {"kind": "reset"},
    "hang": {"kind": "hang"},
    "close": {"kind": "close"},
    "garbage": {"kind": "raw", "body": b"SSH-2.0-OpenSSH_9.6\r\n"},
    "long header": {"kind": "raw", "body": b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 70000},
    "redirect": {"status": 307, "headers": {"Location": "http://127.0.0.1:9/elsewhere"}},
    "401": {"status": 401, "headers": {"Content-Type": ""}, "body": b""},
    "404": {"status": 404, "headers": {"Content-Type": ""}, "body": b""},
    "429": {"status": 429, "headers": {"Retry-After": "7"}, "body": b"slow down"},
    "500": {"status": 500, "body": b'{"message":"database is locked","description":"at ..."}'},
    "502": {"status": 502, "headers": {"Content-Type": "text/html"}, "body": HTML},
    "503": {"status": 503, "headers": {"Retry-After": "7"}, "body": b""},
}


class _Http(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    fake: FakeServer

    def server_bind(self) -> None:
        """Bind, without the name look-up of HTTPServer."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep what is a mistake of ours; a client that went away is none."""
        text = traceback.format_exc()
        last = text.strip().rsplit("\n", 1)[-1]
        gone = r"(ConnectionResetError|BrokenPipeError|ConnectionAbortedError|ssl\.SSL)"
        if not re.match(gone, last):
            self.fake.errors.append(text)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    def setup(self) -> None:
        super().setup()
        with self.server.fake.lock:
            self.server.fake.connections.add(self.connection)

    def finish(self) -> None:
        with self.server.fake.lock:
            self.server.fake.connections.discard(self.connection)
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length) if length else b""
        if len(raw) < length:  # the client died while sending: nothing happens
            self.close_connection = True
            return
        target = urllib.parse.urlsplit(self.path)
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            body = None
        request = Request(
            method=self.command,
            target=self.path,
            path=urllib.parse.unquote(target.path),
            query=urllib.parse.parse_qs(target.query, keep_blank_values=True),
            headers={name.lower(): value for name, value in self.headers.items()},
            raw=raw,
            body=body,
            at=time.monotonic(),
        )
        try:
            self.server.fake.serve(request, self)
        except (OSError, ValueError):  # the client is gone, or the connection was cut by script
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = do_OPTIONS = serve

    def send(self, reply: Reply, *, sent: Optional[int] = None) -> None:
        """Send a reply in one piece; of its body only the first `sent` bytes."""
        headers = {"Content-Type": "application/json; charset=utf-8", **reply.headers}
        headers.setdefault("Content-Length", str(len(reply.body)))
        if not reply.body and "Content-Type" not in reply.headers:
            headers["Content-Type"] = ""
        body = b"" if self.command == "HEAD" else reply.body[:sent]
        self.wfile.write(self.head(reply.status, headers) + body)

    def head(self, status: int, headers: Dict[str, str]) -> bytes:
        """Return a status line and header lines; a header with an empty value is left out."""
        reason = self.responses.get(status, ("Whatever", ""))[0]
        lines = [f"HTTP/1.1 {status} {reason}", f"Date: {self.date_time_string()}"]
        lines += [f"{name}: {value}" for name, value in headers.items() if value]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def reset(self) -> None:
        """Cut the connection with RST."""
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        os.close(self.connection.detach())


class FakeServer:
    """A server that records what it is asked and answers {} unless told otherwise."""

    drip_interval = 1.0

    def __init__(self, *, latency: float = 0.0) -> None:
        self.latency = latency
        self.lock = threading.RLock()
        self.requests: List[Request] = []
        self.scripts: List[Script] = []
        self.errors: List[str] = []  # mistakes of the fake itself
        self.connections: Set[socket.socket] = set()
        self.busy = 0
        self.active = 0  # of these, requests that no script spoils
        self.peak = 0  # the most that were active at the same time
        self.port = 0
        self.tls: Optional[ssl.SSLContext] = None  # to be set before it listens
        self.login = ""  # "user:password" that a proxy before it demands
        self.doors: Dict[str, str] = {}  # headers that a proxy before it demands, names small
        self.closing = threading.Event()
        self._http: Optional[_Http] = None
        self._thread: Optional[threading.Thread] = None

    def __enter__(self: Self) -> Self:
        self.open()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close()
        self.clean_up()
        if kind is None and self.errors:
            raise AssertionError("the fake server failed:\n" + "\n".join(self.errors))

    def open(self) -> None:
        """Listen; after a `close`, again at the same port and with the same state."""
        self.closing.clear()
        self.active = 0
        self._http = _Http(("127.0.0.1", self.port), _Handler)
        self._http.fake = self
        if self.tls:
            self._http.socket = self.tls.wrap_socket(self._http.socket, server_side=True)
        self.port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.005,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Refuse connections and cut those that are open."""
        if self._http is None or self._thread is None:
            return
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        end = time.monotonic() + 2
        while self.busy and time.monotonic() < end:
            time.sleep(0.005)
        self._http = self._thread = None

    def clean_up(self) -> None:
        """Remove what the fake has put on the disk for itself."""

    @property
    def url(self) -> str:
        return f"http{'s' * bool(self.tls)}://127.0.0.1:{self.port}"

    def changes(self) -> List[Request]:
        """Return all requests that are not GET."""
        with self.lock:
            return [request for request in self.requests if request.method not in ("GET", "HEAD")]

    def clear_requests(self) -> None:
        with self.lock:
            self.requests.clear()
            self.peak = 0

    def script(
        self,
        *,
        method: Optional[str] = None,
        path_regex: str = "",
        where: Optional[Callable[[Request], bool]] = None,
        kind: Optional[str] = None,
        status: Optional[int] = None,
        headers: Optional[Dict[str, str]] = None,
        body: Optional[bytes] = None,
        times: Optional[int] = 1,
        skip: int = 0,
        before_effect: bool = True,
        delay: float = 0.0,
        size: int = 200 * 1024 * 1024,
    ) -> Script:
        """Treat the next `times` requests that match so, after letting `skip` pass.

        With before_effect=False what they ask is done first; then, without a status or a kind,
        the connection is closed without an answer. Kinds: answer (status, headers, body),
        truncated, endless (`size` bytes in chunks), drip, slow headers, reset, hang, close, raw
        (`body` is all that is sent). With nothing but a delay the true answer comes late.
        """
        if kind is None:
            lost = not before_effect and status is None and body is None
            kind = "close" if lost else "answer"
        script = Script(
            kind=kind,
            method=method,
            path=re.compile(path_regex),
            where=where,
            status=status,
            headers=headers or {},
            body=body,
            times=times,
            skip=skip,
            before_effect=before_effect,
            delay=delay,
            size=size,
        )
        with self.lock:
            self.scripts.append(script)
        return script

    def sick(self, sickness: str, **how: Any) -> Script:
        """Add one of SICKNESSES; the arguments of `script` say when, and override it."""
        return self.script(**{**SICKNESSES[sickness], **how})

    def serve(self, request: Request, handler: _Handler) -> None:
        with self.lock:
            self.requests.append(request)
            self.busy += 1
            script = self.pick(request)
            self.active += script is None
            self.peak = max(self.peak, self.active)
        try:
            if self.closing.wait(self.latency / 2):  # closed before anything was done
                handler.close_connection = True
            elif script is None:
                reply = self.reply(request)
                self.closing.wait(self.latency / 2)
                request.status = reply.status
                with self.lock:  # before the client can send its next one
                    self.active -= 1
                handler.send(reply)
            else:
                self.play(script, request, handler)
        finally:
            with self.lock:
                self.busy -= 1

    def pick(self, request: Request) -> Optional[Script]:
        for script in self.scripts:
            if script.wants(request):
                if script.skip:
                    script.skip -= 1
                    continue
                script.used += 1
                if script.times is not None:
                    script.times -= 1
                return script
        return None

    def reply(self, request: Request) -> Reply:
        """Do what is asked and return the answer."""
        basic = "Basic " + base64.b64encode(self.login.encode()).decode()
        if self.login and request.headers.get("authorization") != basic:
            return Reply(401, HTML, {"WWW-Authenticate": 'Basic realm="proxy"'})
        if any(request.headers.get(name) != value for name, value in self.doors.items()):
            return Reply(403, b"", {"Content-Type": "text/html"})
        with self.lock:
            try:
                return self.answer(request)
            except Refusal as refusal:
                return refusal.reply
            except Exception:
                self.errors.append(traceback.format_exc())
                return Reply(599, b"the fake server failed")

    def answer(self, request: Request) -> Reply:
        return Reply(body=b"{}")

    def play(self, script: Script, request: Request, handler: _Handler) -> None:
        reply = Reply(body=b'{"message":"' + b"x" * 200 + b'"}')
        untouched = script.kind == "answer" and script.status is None and script.body is None
        if not script.before_effect or untouched or request.method == "GET":
            reply = self.reply(request)
        if script.status is not None or script.body is not None:
            reply = Reply(script.status or 200, script.body or b"")
        reply.headers.update(script.headers)
        self.closing.wait(script.delay)
        half = len(reply.body) // 2
        if script.kind == "answer":
            request.status = reply.status
            handler.send(reply)
        elif script.kind == "truncated":
            handler.close_connection = True
            handler.send(reply, sent=half)
        elif script.kind == "reset":
            handler.send(reply, sent=half)
            self.closing.wait(0.05)
            handler.reset()
        elif script.kind == "raw":
            handler.close_connection = True
            handler.wfile.write(script.body or b"")
        elif script.kind == "close":
            handler.close_connection = True
        elif script.kind == "hang":
            handler.close_connection = True
            while not self.closing.wait(0.02) and not hung_up(handler.connection):
                pass
        elif script.kind == "endless":
            handler.close_connection = True
            self.flood(script, handler)
        elif script.kind in ("drip", "slow headers"):
            handler.close_connection = True
            reply.headers.setdefault("Content-Length", str(len(reply.body)))
            head = handler.head(reply.status, {"Content-Type": "application/json", **reply.headers})
            if script.kind == "drip":
                handler.wfile.write(head)
                head = b""
            for byte in head + reply.body:
                handler.wfile.write(bytes([byte]))
                if self.closing.wait(self.drip_interval) or hung_up(handler.connection):
                    break
        else:
            raise AssertionError(f"there is no kind {script.kind!r}")

    def flood(self, script: Script, handler: _Handler) -> None:
        """Send a body that is longer than anyone wants to read."""
        headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        handler.wfile.write(handler.head(script.status or 200, {**headers, **script.headers}))
        first, block = b'[{"title":"', b"x" * 65536
        if script.body:
            first, block = b"[", script.body * max(1, 65536 // len(script.body))
        sent = 0
        while sent < script.size and not self.closing.is_set():
            piece = block if sent else first
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            sent += len(piece)
        handler.wfile.write(b"0\r\n\r\n")


def hung_up(connection: socket.socket) -> bool:
    """Tell whether the client has closed its end."""
    try:
        ready = select.select([connection], [], [], 0)[0]
        return bool(ready) and not connection.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError):
        return True


def as_json(value: Any, status: int = 200, **headers: str) -> Reply:
    """Return a JSON reply as the servers write it: properties that are null are left out."""
    text = json.dumps(without_nulls(value), ensure_ascii=False, separators=(",", ":"))
    return Reply(status, as_utf8(text), {name.replace("_", "-"): v for name, v in headers.items()})


def as_utf8(text: str) -> bytes:
    """Encode; what of a file name is no UTF-8 becomes U+FFFD, as with .NET."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode()


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: without_nulls(item)
            for key, item in value.items()
            if item is not None and not (key == "id" and item == 0)
        }
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def problem(status: int, title: str, errors: Optional[Dict[str, List[str]]] = None) -> Refusal:
    """Return an error in the shape of ASP.NET."""
    body = {
        "type": f"https://tools.ietf.org/html/rfc9110#section-15.5.{status - 399}",
        "title": title,
        "status": status,
        "errors": errors,
        "traceId": "00-7c0a3d0f1c2b4e5f8a9b0c1d2e3f4a5b-1122334455667788-00",
    }
    return Refusal(as_json(body, status, Content_Type="application/problem+json; charset=utf-8"))


def api_error(status: int, kind: str, text: str) -> Refusal:
    """Return an error in the shape of the servers' own ApiException."""
    return Refusal(as_json({"message": f"{kind}: {text}", "content": text}, status))


def failure(status: int, message: str, *, stack: bool = True) -> Refusal:
    """Return an error in the shape that all their other exceptions take."""
    stack_text = f"NzbDrone.Core.Exception: {message}\n   at NzbDrone.Core.Something()"
    return Refusal(
        as_json({"message": message, "description": stack_text if stack else None}, status)
    )


# --- what Sonarr and Radarr have in common ----------------------------------------------------


class CommandFailed(Exception):
    """Raised by a command that ends as failed."""


def numbers(version: str) -> Tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


QUALITIES = {
    "SDTV": (1, "television", 480),
    "HDTV-720p": (4, "television", 720),
    "HDTV-1080p": (9, "television", 1080),
    "WEBDL-720p": (5, "web", 720),
    "WEBDL-1080p": (3, "web", 1080),
    "WEBDL-2160p": (18, "web", 2160),
    "Bluray-720p": (6, "bluray", 720),
    "Bluray-1080p": (7, "bluray", 1080),
    "Bluray-2160p": (19, "bluray", 2160),
}
ENGLISH = {"id": 1, "name": "English"}
MEDIA_INFO = {
    "audioBitrate": 384000,
    "audioChannels": 5.1,
    "audioCodec": "EAC3",
    "audioLanguages": "eng",
    "audioStreamCount": 1,
    "videoBitDepth": 10,
    "videoBitrate": 0,
    "videoCodec": "x265",
    "videoFps": 23.976,
    "videoDynamicRange": "",
    "videoDynamicRangeType": "",
    "resolution": "1920x1080",
    "runTime": "47:12",
    "scanType": "Progressive",
    "subtitles": "eng",
}


def quality_of(name: str) -> Record:
    number, source, resolution = QUALITIES[name]
    return {
        "quality": {"id": number, "name": name, "source": source, "resolution": resolution},
        "revision": {"version": 1, "real": 0, "isRepack": False},
    }


class FakeArr(FakeServer):
    """What Sonarr and Radarr have in common.

    `root` is the library on the disk and `server_root` the name that the server has for it; more
    such pairs may be put into `roots`. Paths below none of them are the same on the disk.
    """

    app = ""
    unit = ""  # "episode" or "movie": what a search is for
    title_key = ""  # "seriesId" or "movieId"
    commands_known: Dict[str, Tuple[str, ...]] = {}  # with the properties of their own
    events: Dict[str, int] = {}
    auto_unmonitor_key = ""
    follows_since = ""  # since this version the size is that of a link's target
    redirects = ("", 0)

    def __init__(
        self,
        root: Path,
        *,
        version: str,
        api_key: str = API_KEY,
        url_base: str = "",
        recycle_bin: bool = False,
        auto_unmonitor: bool = False,
        latency: float = 0.0,
        server_root: str = "",
        downloads: Optional[Path] = None,
    ) -> None:
        super().__init__(latency=latency)
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.version = version
        self.api_key = api_key
        self.url_base = "/" + url_base.strip("/") if url_base.strip("/") else ""
        self.recycle_bin = recycle_bin
        self.auto_unmonitor = auto_unmonitor
        self.server_root = (server_root or str(root)).rstrip("/")
        self.roots: Dict[str, Path] = {self.server_root: self.root}
        self._own: Optional[Path] = None
        self._downloads = downloads

        self.files: Dict[int, Record] = {}
        self.commands: Dict[int, Record] = {}
        self.history: List[Record] = []
        self.queue: Dict[int, Record] = {}  # what was grabbed and waits for `tick`
        self.health: List[Record] = []
        self.gone: Dict[int, Record] = {}  # records of files that were removed
        self.deleted_files: List[int] = []
        self.searches: List[Record] = []
        self.failed_imports: List[Record] = []
        self.whole_library: List[str] = []  # commands that ran on all titles for want of an id
        self.tags: Dict[int, str] = {}
        self.blocklist: List[str] = []  # titles of releases that are not grabbed again
        self.auto_redownload = False  # a grab that is marked as failed is searched for anew
        self.knows_skip = False  # and ?skipRedownload=true switches that off
        self.release = ""  # the title of all releases, until it is blocklisted
        self.forgets_commands = False  # the list has none that ended; by its id each is there still

        self.command_polls = 2  # a command ends at this poll
        self.command_seconds: Optional[float] = None  # or after that many seconds
        self.commands_fail = False
        self.commands_hang = False
        self.finds_nothing = False
        self.not_found: Set[int] = set()  # episodes or movies that no search finds
        self.double_grab = False  # a double episode may be grabbed twice
        self.renamed = False  # imports get a new file name
        self.downloads_fail = False
        self.undeletable = False
        self.delete_empty_folders = False
        self.root_accessible: Optional[bool] = None  # None: as it is on the disk
        self.starting_up = False
        self.login_page = False  # outside /api: to the login page instead of HTML
        self.clock_offset = 0.0  # how far the server's clock is ahead, in seconds
        self._last_ids: Dict[str, int] = {}
        self._last_file: Dict[int, Record] = {}  # what an episode or movie had before

    # -- to be said by Sonarr and by Radarr

    def routes(self) -> List[Tuple[str, str, Callable[..., Reply]]]:
        raise NotImplementedError

    def titles(self) -> Dict[int, Record]:
        raise NotImplementedError

    def units(self) -> Dict[int, Record]:
        raise NotImplementedError

    def units_of(self, file_id: int) -> List[Record]:
        """Return the episodes or the movie that a file holds."""
        raise NotImplementedError

    def file_id_of(self, unit: Record) -> int:
        raise NotImplementedError

    def set_file(self, unit: Record, file_id: int) -> None:
        raise NotImplementedError

    def search(self, name: str, body: Record) -> None:
        raise NotImplementedError

    def new_name(self, units: List[Record]) -> str:
        raise NotImplementedError

    def make_file(self, title_id: int, relative_path: str, units: List[Record]) -> int:
        raise NotImplementedError

    def history_ids(self, unit: Record) -> Record:
        raise NotImplementedError

    # -- versions, paths, numbers

    @property
    def major(self) -> int:
        return numbers(self.version)[0]

    def since(self, version: str) -> bool:
        return numbers(self.version) >= numbers(version)

    @property
    def follows_links(self) -> bool:
        return self.since(self.follows_since)

    @property
    def url(self) -> str:
        return super().url + self.url_base

    def disk_path(self, server_path: str) -> Path:
        """Return where on the disk the thing is that the server calls so."""
        for root in sorted(self.roots, key=len, reverse=True):
            if server_path == root or server_path.startswith(root + "/"):
                return Path(str(self.roots[root]) + server_path[len(root) :])
        return Path(server_path)

    def path_of(self, file_id: int) -> str:
        """Return the server's path of a file, of one that is gone too."""
        record = self.files.get(file_id) or self.gone[file_id]
        return f"{self.titles()[record[self.title_key]]['path']}/{record['relativePath']}"

    def link_of(self, file_id: int) -> Path:
        """Return the path of a file on the disk."""
        return self.disk_path(self.path_of(file_id))

    def monitored(self) -> Dict[int, bool]:
        """Return which episodes or movies are monitored."""
        with self.lock:
            return {number: unit["monitored"] for number, unit in self.units().items()}

    def new_id(self, kind: str, first: int) -> int:
        self._last_ids[kind] = self._last_ids.get(kind, first - 1) + 1
        return self._last_ids[kind]

    def now(self) -> str:
        moment = time.time() + self.clock_offset
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))
        return f"{text}.{int(moment % 1 * 10000000):07d}Z" if self.major < 4 else text + "Z"

    @property
    def own_folder(self) -> Path:
        """The fake's own directory, gone when it closes."""
        if self._own is None:
            self._own = Path(tempfile.mkdtemp(prefix="fake-arr-"))
        return self._own

    @property
    def downloads(self) -> Path:
        """Where the files are that imported links point to."""
        return self._downloads or self.own_folder / "downloads"

    @downloads.setter
    def downloads(self, folder: Path) -> None:
        self._downloads = folder

    @property
    def bin_folder(self) -> Path:
        return self.own_folder / "bin"

    def clean_up(self) -> None:
        if self._own is not None:
            shutil.rmtree(str(self._own), ignore_errors=True)
            self._own = None

    # -- from a request to its answer

    def answer(self, request: Request) -> Reply:
        if self.starting_up:
            text = f"{self.app} is starting up, please try again later"
            return as_json({"errorMessage": text}, 503)
        base = self.url_base
        inside = not base or request.path == base or request.path.startswith(base + "/")
        path = request.path[len(base) :] if inside else request.path
        api = bool(re.match(r"/api(/|$)", path, re.I))
        if api and not self.authorised(request):
            return as_json({"error": "Unauthorized"}, 401) if self.major < 4 else Reply(401)
        if not inside:
            version, before = self.redirects
            status = 303 if self.major < 4 else 307 if self.since(version) else before
            return Reply(status, b"", {"Location": base + request.target})
        if path.lower() == "/ping":
            return as_json({"status": "OK"})
        if not api:
            if request.method not in ("GET", "HEAD"):
                return Reply(405, b"", {"Allow": "GET"})
            if self.login_page and path.lower() != "/login":
                return Reply(302, b"", {"Location": f"{base}/login?returnUrl={path}"})
            return Reply(200, HTML, {"Content-Type": "text/html"})
        reply = self.api(request, path)
        reply.headers["X-Application-Version"] = self.version
        return reply

    def authorised(self, request: Request) -> bool:
        in_query = request.query.get("apikey", [""])[0]
        in_header = request.headers.get("x-api-key", "")
        bearer = request.headers.get("authorization", "")
        bearer = bearer[7:] if bearer.lower().startswith("bearer ") else ""
        if self.major < 4:
            return (in_header or in_query or bearer) == self.api_key
        return (in_query or in_header or bearer) == self.api_key

    def api(self, request: Request, path: str) -> Reply:
        try:
            accept = request.headers.get("accept", "*/*")
            if self.major >= 4 and not re.search(r"\*/\*|application/\*|json", accept):
                return Reply(406)
            allowed: List[str] = []
            for method, pattern, function in [*self.common_routes(), *self.routes()]:
                match = re.fullmatch("/api/v3/" + pattern + "/?", path, re.I)
                if match and method == request.method:
                    if method != "GET" and request.raw:
                        self.check_body(request)
                    return function(request, *(int(group) for group in match.groups()))
                if match:
                    allowed.append(method)
            return Reply(405, b"", {"Allow": ", ".join(allowed)}) if allowed else Reply(404)
        except Refusal as refusal:
            return refusal.reply

    def check_body(self, request: Request) -> None:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if self.major >= 4 and kind not in ("application/json", "text/json"):
            raise problem(415, "Unsupported Media Type")
        if not isinstance(request.body, dict):
            raise problem(
                400,
                "One or more validation errors occurred.",
                {"$": ["The JSON value could not be converted. Path: $ | LineNumber: 0"]},
            )

    def common_routes(self) -> List[Tuple[str, str, Callable[..., Reply]]]:
        return [
            ("GET", "system/status", self.get_status),
            ("GET", "rootfolder", self.get_root_folders),
            ("GET", "config/mediamanagement", self.get_media_management),
            ("GET", "health", self.get_health),
            ("POST", "command", self.post_command),
            ("GET", "command", self.get_commands),
            ("GET", r"command/(\d+)", self.get_command),
            ("DELETE", r"command/(\d+)", self.delete_command),
            ("GET", "history", self.get_history),
            ("GET", "history/since", self.get_history_since),
            ("POST", r"history/failed/(\d+)", self.post_failed),
            ("GET", "config/downloadclient", self.get_download_client),
            ("GET", "tag", self.get_tags),
        ]

    def values(self, request: Request, name: str) -> List[str]:
        """Return a parameter's values; its name in any case, as the servers take it."""
        found: List[str] = []
        for key, values in request.query.items():
            if key.lower() == name.lower():
                found += values
        return found

    def ints(self, request: Request, name: str) -> List[int]:
        """Return the numbers of a list; only v3 takes 1,2,3."""
        values = self.values(request, name)
        if self.major < 4:
            values = [part for value in values for part in value.split(",") if part]
        result = []
        for value in values:
            if not re.fullmatch(r"\s*-?\d+\s*", value):
                text = f"The value '{value}' is not valid."
                raise problem(400, "One or more validation errors occurred.", {name: [text]})
            result.append(int(value))
        return result

    def number(self, request: Request, name: str) -> Optional[int]:
        """Return a number that is given once; of several the first."""
        values = self.values(request, name)
        if not values or values == [""]:
            return None
        if not re.fullmatch(r"\s*-?\d+\s*", values[0]):
            text = f"The value '{values[0]}' is not valid."
            raise problem(400, "One or more validation errors occurred.", {name: [text]})
        return int(values[0])

    def flag(self, request: Request, name: str) -> bool:
        return (self.values(request, name) or [""])[0].lower() == "true"

    def by_ids(self, table: Dict[int, Record], ids: Sequence[int]) -> List[Record]:
        """Return rows by their ids: an unknown one, or one named twice, is an error."""
        rows = [table[number] for number in dict.fromkeys(ids) if number in table]
        if len(rows) != len(ids):
            raise failure(500, f"Expected query to return {len(ids)} rows but returned {len(rows)}")
        return rows

    def missing(self) -> Refusal:
        """Return what a GET of something unknown is answered."""
        if self.major < 4:
            return Refusal(as_json({"message": "NotFound"}, 404))
        return problem(404, "Not Found")

    # -- the server itself

    def get_status(self, request: Request) -> Reply:
        return as_json(
            {
                "appName": self.app,
                "instanceName": self.app if self.major > 3 else None,
                "version": self.version,
                "buildTime": "2026-10-01T00:00:00Z",
                "isProduction": True,
                "isLinux": True,
                "isDocker": True,
                "osName": "alpine",
                "authentication": "forms",
                "urlBase": self.url_base,
                "runtimeName": "netcore" if self.major > 3 else "mono",
                "runtimeVersion": "6.0.36",
                "migrationVersion": 217,
                "databaseType": "sqLite" if self.major > 3 else None,
                "startTime": "2026-11-01T06:00:00Z",
            }
        )

    def get_root_folders(self, request: Request) -> Reply:
        known = {title["path"] for title in self.titles().values()}
        rows = []
        for number, (path, folder) in enumerate(self.roots.items(), 1):
            there = folder.is_dir()
            accessible = there if self.root_accessible is None else self.root_accessible
            names = sorted(os.listdir(str(folder))) if there else []
            rows.append(
                {
                    "path": path,
                    "accessible": accessible,
                    "freeSpace": 1 << 40 if accessible else None,
                    "unmappedFolders": [
                        {"name": name, "path": f"{path}/{name}", "relativePath": name}
                        for name in names
                        if f"{path}/{name}" not in known and (folder / name).is_dir()
                    ],
                    "id": number,
                }
            )
        return as_json(rows)

    def get_media_management(self, request: Request) -> Reply:
        return as_json(
            {
                self.auto_unmonitor_key: self.auto_unmonitor,
                "recycleBin": "/config/bin" if self.recycle_bin else "",
                "recycleBinCleanupDays": 7,
                "downloadPropersAndRepacks": "preferAndUpgrade",
                "deleteEmptyFolders": self.delete_empty_folders,
                "rescanAfterRefresh": "always",
                "setPermissionsLinux": False,
                "copyUsingHardlinks": True,
                "id": 1,
            }
        )

    def get_health(self, request: Request) -> Reply:
        return as_json(self.health)

    # -- files

    def file_resource(self, record: Record) -> Record:
        resource = {
            **record,
            "path": self.path_of(record["id"]),
            "quality": quality_of(record["quality"]),
            "mediaInfo": MEDIA_INFO,
            "qualityCutoffNotMet": False,
        }
        resource["language" if self.major < 4 and self.unit == "episode" else "languages"] = (
            ENGLISH if self.major < 4 and self.unit == "episode" else [ENGLISH]
        )
        return resource

    def get_file(self, request: Request, file_id: int) -> Reply:
        if file_id not in self.files:
            raise self.missing()
        return as_json(self.file_resource(self.files[file_id]))

    def delete_file(self, request: Request, file_id: int) -> Reply:
        if file_id not in self.files:
            raise failure(404, f"{self.unit.title()}File with ID {file_id} does not exist")
        self.remove_file(self.files[file_id])
        return as_json({}) if self.major < 4 else Reply()

    def delete_files(self, request: Request) -> Reply:
        """Bulk: all paths are made with the first file's folder, as the servers do."""
        records = self.by_ids(self.files, self.body_ids(request, f"{self.unit}FileIds"))
        for record in records:
            self.remove_file(record, self.titles()[records[0][self.title_key]]["path"])
        return as_json({})

    def body_ids(self, request: Request, name: str) -> List[int]:
        body = request.body if isinstance(request.body, dict) else {}
        found = next((value for key, value in body.items() if key.lower() == name.lower()), None)
        if found is None:
            found = []
        if not isinstance(found, list) or not all(type(number) is int for number in found):
            text = f"The JSON value could not be converted. Path: $.{name}"
            raise problem(400, "One or more validation errors occurred.", {f"$.{name}": [text]})
        return found

    def remove_file(self, record: Record, folder: Optional[str] = None) -> None:
        """Delete a file as the API does: disk first, then the record."""
        if folder is None:
            folder = self.titles()[record[self.title_key]]["path"]
        kind = "Series" if self.unit == "episode" else "Movie"
        parent = self.disk_path(os.path.dirname(folder))
        try:
            subfolders = [entry for entry in os.scandir(str(parent)) if entry.is_dir()]
        except OSError:
            raise failure(409, f"{kind}' root folder ({parent}) doesn't exist.") from None
        if not subfolders:
            raise failure(409, f"{kind}' root folder ({parent}) is empty.")
        path = self.disk_path(f"{folder}/{record['relativePath']}")
        unable = failure(500, f"Unable to delete {self.unit} file", stack=False)
        if os.path.lexists(str(path)):
            if self.undeletable:
                raise unable
            if self.recycle_bin and self.follows_links and not path.exists():
                raise unable  # its size is asked for before it is moved
            try:
                if self.recycle_bin:
                    self.bin_folder.mkdir(parents=True, exist_ok=True)
                    shutil.move(str(path), str(self.bin_folder / f"{record['id']}-{path.name}"))
                else:
                    os.unlink(str(path))
            except OSError:
                raise unable from None
            if self.delete_empty_folders:
                top = self.disk_path(folder)
                for directory in [path.parent, top] if path.parent != top else [top]:
                    with contextlib.suppress(OSError):
                        directory.rmdir()
        self.deleted_files.append(record["id"])
        self.forget_file(record, "Manual", unmonitor=True)

    def forget_file(self, record: Record, reason: str, *, unmonitor: bool) -> None:
        """Remove a file's record and take it off its episodes or movie."""
        units = self.units_of(record["id"])
        self.gone[record["id"]] = self.files.pop(record["id"])
        for unit in units:
            self._last_file[unit["id"]] = {**record, "units": [other["id"] for other in units]}
            self.set_file(unit, 0)
            if self.auto_unmonitor and unmonitor:
                unit["monitored"] = False
            name = os.path.basename(record["relativePath"])
            self.add_history(f"{self.unit}FileDeleted", unit, name, data={"reason": reason})

    # -- commands

    def post_command(self, request: Request) -> Reply:
        if not isinstance(request.body, dict):  # no body at all
            raise problem(
                400, "One or more validation errors occurred.", {"": ["A body is needed"]}
            )
        given = {key.lower(): value for key, value in request.body.items()}
        asked = given.get("name")
        if not isinstance(asked, str) or not asked.strip():
            text = "'Name' must not be empty."
            error = {"propertyName": "Name", "errorMessage": text, "severity": "error"}
            return as_json([{**error, "isWarning": False, "attemptedValue": ""}], 400)
        name = next((name for name in self.commands_known if name.lower() == asked.lower()), None)
        if name is None:
            raise failure(500, "Sequence contains no matching element")
        own = {key: given.get(key.lower()) for key in self.commands_known[name]}
        for key, value in own.items():
            values = value if key.endswith("Ids") else [value]
            good = isinstance(values, list) and all(type(number) is int for number in values)
            if value is not None and key != "monitored" and not good:
                text = f"The JSON value could not be converted. Path: $.{key}"
                raise problem(400, "One or more validation errors occurred.", {f"$.{key}": [text]})
        if name.endswith("Search"):
            self.searches.append({**request.body, "name": name})
        command = self.push(name, own)
        location = f"{self.url}/api/v3/command/{command['id']}"
        return as_json(self.command_resource(command), 201, Location=location)

    def push(self, name: str, own: Record) -> Record:
        """Queue a command, or return an equal one that has not ended."""

        def comparable(body: Record) -> Record:
            return {k: set(v) if isinstance(v, list) else v for k, v in body.items()}

        for command in self.commands.values():
            self.expire(command)
            if (
                command["name"] == name
                and command["status"] in ("queued", "started")
                and comparable(command["own"]) == comparable(own)
            ):
                return command
        command = {
            "id": self.new_id("command", 4242),
            "name": name,
            "own": own,
            "status": "queued",
            "queued": self.now(),
            "pushed": time.monotonic(),
            "polls": 0,
        }
        self.commands[command["id"]] = command
        return command

    def command_resource(self, command: Record) -> Record:
        results = {"completed": "successful", "failed": "unsuccessful"}
        status = command["status"]
        shared = {"sendUpdatesToClient": True, "updateScheduledTask": True}
        return {
            "name": command["name"],
            "commandName": re.sub(r"(?<=[a-z])(?=[A-Z])", " ", command["name"]),
            "message": "Completed" if status == "completed" else command.get("message"),
            "body": {
                **command["own"],
                **shared,
                "requiresDiskAccess": False,
                "isExclusive": False,
                "isLongRunning": False,
                "name": command["name"],
                "trigger": "manual",
                "suppressMessages": False,
            },
            "priority": "normal",
            "status": status,
            "result": results.get(status, "unknown") if self.major > 3 else None,
            "queued": command["queued"],
            "started": command.get("started"),
            "ended": command.get("ended"),
            "exception": command.get("exception"),
            "trigger": "manual",
            "stateChangeTime": command.get("ended") or command.get("started") or command["queued"],
            **shared,
            "id": command["id"],
        }

    def get_commands(self, request: Request) -> Reply:
        for command in list(self.commands.values()):
            self.poll(command)
        if self.forgets_commands:  # but for what it does by itself every minute
            beat = self.push("RefreshMonitoredDownloads", {})
            beat["status"] = "completed"
        shown = [
            command
            for command in self.commands.values()
            if not self.forgets_commands or command["status"] not in FINAL or command is beat
        ]
        return as_json([self.command_resource(command) for command in shown])

    def get_command(self, request: Request, command_id: int) -> Reply:
        if command_id not in self.commands:
            raise self.missing()
        self.poll(self.commands[command_id])
        return as_json(self.command_resource(self.commands[command_id]))

    def delete_command(self, request: Request, command_id: int) -> Reply:
        command = self.commands.get(command_id)
        if command is None:
            raise self.missing()
        if command["status"] == "started":
            raise failure(409, "Unable to cancel task")
        if command["status"] == "queued":
            command.update(status="cancelled", ended=self.now())
        return as_json({}) if self.major < 4 else Reply()

    def poll(self, command: Record) -> None:
        """Take a command one step further."""
        if command["status"] in FINAL:
            return
        command["polls"] += 1
        if self.commands_hang:
            command.update(status="started", started=self.now())
        elif command["polls"] >= self.command_polls:
            self.finish(command)
        elif command["polls"] == self.command_polls - 1:
            command.update(status="started", started=self.now())
        self.expire(command)

    def expire(self, command: Record) -> None:
        """End a command whose time is over, where commands take a time."""
        age = time.monotonic() - command["pushed"]
        if self.command_seconds is not None and age >= self.command_seconds:
            self.finish(command)

    def finish(self, command: Record) -> None:
        """Run a command to its end."""
        if command["status"] in FINAL or self.commands_hang:
            return
        command.setdefault("started", self.now())
        try:
            if self.commands_fail:
                raise CommandFailed("The command was told to fail")
            self.search(command["name"], command["own"])
            command["status"] = "completed"
        except CommandFailed as exc:
            command.update(status="failed", message="Failed", exception=f"System.Exception: {exc}")
        command["ended"] = self.now()

    # -- searching, grabbing, importing

    def titles_for(self, name: str, ids: Sequence[Optional[int]]) -> List[Record]:
        """Return the titles that a command is for; without ids it is for all."""
        wanted = [number for number in ids if number]
        if not wanted:
            self.whole_library.append(name)
            return list(self.titles().values())
        unknown = [number for number in wanted if number not in self.titles()]
        if unknown:
            raise CommandFailed(f"{self.title_key} {unknown[0]} does not exist")
        return [self.titles()[number] for number in wanted]

    def rescan(self, title: Record) -> None:
        """Compare the records with the folder's listing, which holds dangling links too."""
        folder = self.disk_path(title["path"])
        records = [r for r in self.files.values() if r[self.title_key] == title["id"]]
        dangling = None
        if not folder.is_dir():
            parent = folder.parent
            if not parent.is_dir() or not os.listdir(str(parent)):
                return
            lost = records
        else:
            lost = [r for r in records if not os.path.lexists(str(self.link_of(r["id"])))]
            for record in records:
                path = self.link_of(record["id"])
                if path.is_symlink() and not path.exists():
                    if self.follows_links:
                        dangling = dangling or path
                    else:
                        record["size"] = len(os.readlink(str(path)))
        deferred = self.app == "Sonarr" and self.since("4.0.2.1262") and dangling is not None
        for record in lost:
            self.forget_file(record, "MissingFromDisk", unmonitor=not deferred)
        if dangling is not None:
            raise CommandFailed(f"Could not find file '{dangling}'.")
        self.adopt(title)

    def adopt(self, title: Record) -> None:
        """Import files that lie where a record once had them."""
        for unit_id, old in list(self._last_file.items()):
            if old[self.title_key] != title["id"]:
                continue
            units = [unit for unit in map(self.units().get, old["units"]) if unit is not None]
            path = self.disk_path(f"{title['path']}/{old['relativePath']}")
            there = path.exists() if self.follows_links else os.path.lexists(str(path))
            unit = self.units().get(unit_id)
            if there and unit is not None and not any(self.file_id_of(u) for u in units):
                self.make_file(title["id"], old["relativePath"], units)

    def release_for(self, unit: Record) -> List[int]:
        """Return what the release holds that a search finds: the file that was there before."""
        old = self._last_file.get(unit["id"])
        return list(old["units"]) if old else [unit["id"]]

    def grab(self, groups: Sequence[Sequence[int]]) -> bool:
        """Grab one release, with a file for each group, unless a rule is against it."""
        ids = [unit_id for group in groups for unit_id in group]
        units = [unit for unit in map(self.units().get, ids) if unit is not None]
        if self.finds_nothing or not units or self.not_found & set(ids):
            return False
        if any(self.file_id_of(unit) for unit in units):
            return False  # "Existing file meets cutoff"
        queued = {
            number for item in self.queue.values() for group in item["groups"] for number in group
        }
        if queued & set(ids) and not self.double_grab:
            return False
        number = self.new_id("queue", 1300)
        title = f"{os.path.splitext(os.path.basename(self.new_name(units)))[0]}-NEW{number}"
        if self.release and self.release not in self.blocklist:
            title = self.release
        item: Record = {
            "id": number,
            "groups": [list(group) for group in groups],
            "title": title,
            "downloadId": f"{number:040X}",
        }
        self.queue[number] = item
        for unit in units:
            self.add_history("grabbed", unit, item["title"], item["downloadId"], {"indexer": "idx"})
        return True

    def tick(self, name: Optional[str] = None) -> List[int]:
        """End all commands, then import what was grabbed; return the new files' ids.

        The files get the names they had before; another one with `renamed`; or `name`, in which
        {season}, {episode}, {title} and {year} may stand, below the season's or movie's folder.
        """
        with self.lock:
            for command in list(self.commands.values()):
                self.finish(command)
            items = list(self.queue.values())
            self.queue.clear()
            return [
                file_id
                for item in items
                for group in item["groups"]
                for file_id in self.import_group(item, group, name)
            ]

    def import_group(self, item: Record, group: List[int], name: Optional[str]) -> List[int]:
        units = [unit for unit in map(self.units().get, group) if unit is not None]
        if not units:
            return []
        title = self.titles()[units[0].get(self.title_key) or units[0]["id"]]
        old = self._last_file.get(units[0]["id"])
        relative = old["relativePath"] if old else self.new_name(units)
        if name is not None:
            fields = {"title": title["title"], "year": title["year"]}
            season, episode = units[0].get("seasonNumber", 0), units[0].get("episodeNumber", 0)
            text = name.format(season=season, episode=episode, **fields)
            relative = os.path.join(os.path.dirname(relative), text)
        elif self.renamed:
            stem, suffix = os.path.splitext(relative)
            relative = f"{stem} [new {item['id']}]{suffix}"
        path = self.disk_path(f"{title['path']}/{relative}")
        problem_text = ""
        if self.downloads_fail:
            problem_text = "Download failed"
        elif any(self.file_id_of(unit) for unit in units):
            problem_text = "Not an upgrade for existing file"
        elif os.path.lexists(str(path)):
            problem_text = f"Failed to import {self.unit}, Destination already exists."
        if problem_text:
            failed = {"ids": group, "path": str(path), "reason": problem_text}
            self.failed_imports.append({**failed, "downloadId": item["downloadId"]})
            if self.downloads_fail:
                for unit in units:
                    self.add_history("downloadFailed", unit, item["title"], item["downloadId"])
            elif "already exists" in problem_text:
                rescan = "RescanSeries" if self.unit == "episode" else "RescanMovie"
                self.push(rescan, {self.title_key: title["id"]})
            return []
        self.downloads.mkdir(parents=True, exist_ok=True)
        target = self.downloads / f"{item['id']}-{units[0]['id']}{os.path.splitext(relative)[1]}"
        target.write_bytes(b"a new video")
        path.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(str(target), str(path))
        file_id = self.make_file(title["id"], relative, units)
        for unit in units:
            data = {"importedPath": self.path_of(file_id)}
            event = "downloadFolderImported"
            self.add_history(event, unit, item["title"], item["downloadId"], data)
        return [file_id]

    # -- history and queue

    def add_history(
        self,
        event: str,
        unit: Record,
        source_title: str,
        download_id: Optional[str] = None,
        data: Optional[Record] = None,
    ) -> None:
        self.history.append(
            {
                **self.history_ids(unit),
                "sourceTitle": source_title,
                "date": self.now(),
                "downloadId": download_id,
                "eventType": event,
                "data": data or {},
                "id": self.new_id("history", 9900),
            }
        )

    def history_resource(self, record: Record) -> Record:
        return {
            "languages": [ENGLISH],
            "quality": quality_of("WEBDL-1080p"),
            "qualityCutoffNotMet": False,
            **record,
        }

    def history_filter(self, request: Request, record: Record) -> bool:
        raise NotImplementedError

    def get_history(self, request: Request) -> Reply:
        types = self.ints(request, "eventType")
        records = [
            record
            for record in reversed(self.history)
            if (not types or self.events.get(record["eventType"]) in types)
            and self.history_filter(request, record)
        ]
        direction = (self.values(request, "sortDirection") or ["descending"])[0]
        if direction.lower().startswith("asc"):
            records.reverse()
        page = max(1, self.number(request, "page") or 1)
        size = max(1, self.number(request, "pageSize") or 10)
        return as_json(
            {
                "page": page,
                "pageSize": size,
                "sortKey": (self.values(request, "sortKey") or ["date"])[0],
                "sortDirection": "ascending" if direction.lower()[:3] == "asc" else "descending",
                "totalRecords": len(records),
                "records": [self.history_resource(r) for r in records[(page - 1) * size :][:size]],
            }
        )

    def get_history_of_title(self, request: Request) -> Reply:
        title = self.number(request, self.title_key)
        season = self.number(request, "seasonNumber")
        event = (self.values(request, "eventType") or [""])[0]
        names = {str(number): name for name, number in self.events.items()}
        return as_json(
            [
                self.history_resource(record)
                for record in reversed(self.history)
                if record[self.title_key] == title
                and event.lower() in ("", record["eventType"].lower(), self.event_number(record))
                and names.get(event, record["eventType"]) == record["eventType"]
                and (season is None or self.season_of(record) == season)
            ]
        )

    def event_number(self, record: Record) -> str:
        return str(self.events.get(record["eventType"], ""))

    def season_of(self, record: Record) -> Optional[int]:
        return None

    def get_history_since(self, request: Request) -> Reply:
        date = (self.values(request, "date") or [""])[0][:19]
        records = [record for record in reversed(self.history) if record["date"][:19] >= date]
        return as_json([self.history_resource(record) for record in records])

    def add_grab(self, file_ids: Sequence[int], title: str) -> str:
        """Let some files have come by one grab; return the id of the download."""
        number = self.new_id("queue", 1300)
        download = f"{number:040X}"
        units = [unit for file_id in file_ids for unit in self.units_of(file_id)]
        for unit in units:
            self.add_history("grabbed", unit, title, download, {"indexer": "idx"})
        for unit in units:
            data = {"importedPath": self.path_of(self.file_id_of(unit))}
            self.add_history("downloadFolderImported", unit, title, download, data)
        return download

    def post_failed(self, request: Request, history_id: int) -> Reply:
        """Mark a grab as failed: all of its download is blocklisted, and perhaps searched for."""
        found = next((r for r in self.history if r["id"] == history_id), None)
        if found is None:
            raise self.missing()
        key = f"{self.unit}Id"
        same = [
            record
            for record in self.history
            if record["eventType"] == "grabbed" and record["downloadId"] == found["downloadId"]
        ]
        units = [self.units()[number] for number in dict.fromkeys(r[key] for r in same)]
        for unit in units:
            self.add_history("downloadFailed", unit, found["sourceTitle"], found["downloadId"])
        self.blocklist.append(found["sourceTitle"])
        if self.auto_redownload and not (self.knows_skip and self.flag(request, "skipRedownload")):
            name, ids = "MoviesSearch", "movieIds"
            if self.unit == "episode":
                name, ids = "EpisodeSearch", "episodeIds"
            own = {ids: [unit["id"] for unit in units]}
            self.searches.append({**own, "name": name})
            self.push(name, own)
        return as_json({})

    def get_download_client(self, request: Request) -> Reply:
        body = {"enableCompletedDownloadHandling": True, "id": 1}
        return as_json({**body, "autoRedownloadFailed": self.auto_redownload})

    def get_tags(self, request: Request) -> Reply:
        return as_json([{"label": label, "id": number} for number, label in self.tags.items()])

    def queue_resources(self) -> List[Record]:
        return [
            {
                **self.history_ids(unit),
                "quality": quality_of("WEBDL-1080p"),
                "size": 2147483648,
                "title": item["title"],
                "sizeleft": 1073741824,
                "status": "downloading",
                "trackedDownloadStatus": "ok",
                "trackedDownloadState": "downloading",
                "statusMessages": [],
                "downloadId": item["downloadId"],
                "protocol": "torrent",
                "indexer": "idx",
                "id": item["id"] * 100 + position,
            }
            for item in self.queue.values()
            for position, unit_id in enumerate(n for group in item["groups"] for n in group)
            for unit in [self.units().get(unit_id)]
            if unit is not None
        ]


# --- Sonarr -----------------------------------------------------------------------------------


class FakeSonarr(FakeArr):
    """Sonarr: by default a v4; version="3.0.9.1549" or "5.0.0.109" for the others."""

    app = "Sonarr"
    unit = "episode"
    title_key = "seriesId"
    commands_known = {
        "RefreshSeries": ("seriesId", "seriesIds"),
        "RescanSeries": ("seriesId",),
        "SeriesSearch": ("seriesId",),
        "SeasonSearch": ("seriesId", "seasonNumber"),
        "EpisodeSearch": ("episodeIds",),
        "MissingEpisodeSearch": ("seriesId", "monitored"),
        "RefreshMonitoredDownloads": (),
        "RssSync": (),
    }
    events = {
        "grabbed": 1,
        "downloadFolderImported": 3,
        "downloadFailed": 4,
        "episodeFileDeleted": 5,
    }
    auto_unmonitor_key = "autoUnmonitorPreviouslyDownloadedEpisodes"
    follows_since = "4.0.10.2656"
    redirects = ("4.0.9.2513", 302)

    def __init__(self, root: Path, *, version: str = SONARR_4, **options: Any) -> None:
        super().__init__(root, version=version, **options)
        self.series: Dict[int, Record] = {}
        self.episodes: Dict[int, Record] = {}
        self.canned: Dict[Optional[int], bytes] = {}  # answers that are ready, by series
        self._episode_ids: Dict[Tuple[int, int, int], int] = {}

    # -- building

    def add_series(
        self,
        title: str,
        year: int = 2020,
        *,
        path: Optional[str] = None,
        monitored: bool = True,
        series_type: str = "standard",
        tvdb_id: Optional[int] = None,
    ) -> int:
        """Add a series; `path` is the server's, and else made of the title and the year."""
        with self.lock:
            number = self.new_id("series", 11)
            folder = f"{title} ({year})".replace("/", "-")
            self.series[number] = {
                "title": title,
                "year": year,
                "path": path or f"{self.server_root}/{folder}",
                "monitored": monitored,
                "seriesType": series_type,
                "tvdbId": tvdb_id or 900000 + number,
                "id": number,
            }
            return number

    def add_episode(
        self,
        series_id: int,
        season: int,
        number: int,
        *,
        monitored: bool = True,
        air_date: Optional[str] = None,
        file_id: int = 0,
    ) -> int:
        """Add an episode; a daily one without `air_date` cannot be searched."""
        with self.lock:
            episode_id = self.new_id("episode", 7001)
            self.episodes[episode_id] = {
                "seriesId": series_id,
                "tvdbId": 9100000 + episode_id,
                "episodeFileId": file_id,
                "seasonNumber": season,
                "episodeNumber": number,
                "title": f"Part {number}",
                "airDate": air_date,
                "monitored": monitored,
                "id": episode_id,
            }
            self._episode_ids[series_id, season, number] = episode_id
            return episode_id

    def episode_id(self, series_id: int, season: int, number: int) -> int:
        """Return an episode's id, 0 if there is none."""
        episode_id = self._episode_ids.get((series_id, season, number), 0)
        return episode_id if episode_id in self.episodes else 0

    def add_file(
        self,
        series_id: int,
        relative_path: str,
        episodes: Sequence[Tuple[int, int]],
        *,
        quality: str = "WEBDL-1080p",
        size: int = 2147483648,
        monitored: bool = True,
        air_date: Optional[str] = None,
    ) -> int:
        """Add a file's record, and those of its (season, number) that are not there yet."""
        with self.lock:
            units = [
                self.episodes[
                    self.episode_id(series_id, season, number)
                    or self.add_episode(
                        series_id, season, number, monitored=monitored, air_date=air_date
                    )
                ]
                for season, number in episodes
            ]
            return self.make_file(series_id, relative_path, units, quality=quality, size=size)

    def make_file(
        self,
        title_id: int,
        relative_path: str,
        units: List[Record],
        *,
        quality: str = "WEBDL-1080p",
        size: int = 2147483648,
    ) -> int:
        number = self.new_id("file", 501)
        self.files[number] = {
            "seriesId": title_id,
            "seasonNumber": units[0]["seasonNumber"] if units else 0,
            "relativePath": relative_path,
            "size": size,
            "dateAdded": self.now(),
            "releaseGroup": "GRP",
            "quality": quality,
            "id": number,
        }
        for unit in units:
            unit["episodeFileId"] = number
        return number

    # -- what FakeArr wants to know

    def titles(self) -> Dict[int, Record]:
        return self.series

    def units_of(self, file_id: int) -> List[Record]:
        return [e for e in self.episodes.values() if e["episodeFileId"] == file_id]

    def units(self) -> Dict[int, Record]:
        return self.episodes

    def file_id_of(self, unit: Record) -> int:
        return cast(int, unit["episodeFileId"])

    def set_file(self, unit: Record, file_id: int) -> None:
        unit["episodeFileId"] = file_id

    def history_ids(self, unit: Record) -> Record:
        return {"episodeId": unit["id"], "seriesId": unit["seriesId"]}

    def season_of(self, record: Record) -> Optional[int]:
        return self.episodes.get(record["episodeId"], {}).get("seasonNumber")

    def new_name(self, units: List[Record]) -> str:
        first = units[0]
        title = self.series[first["seriesId"]]["title"].replace("/", "-")
        season = first["seasonNumber"]
        folder = f"Season {season:02d}" if season else "Specials"
        return f"{folder}/{title} - S{season:02d}E{first['episodeNumber']:02d}.mkv"

    # -- commands

    def search(self, name: str, body: Record) -> None:
        if name == "RescanSeries":
            for title in self.titles_for(name, [body["seriesId"]]):
                self.rescan(title)
        elif name == "RefreshSeries":
            more = body["seriesIds"] or [] if self.major > 3 else []
            ids = [body["seriesId"], *more]
            for title in self.titles_for(name, ids):
                with contextlib.suppress(CommandFailed):  # only logged
                    self.rescan(title)
        elif name == "EpisodeSearch":
            if not body["episodeIds"]:
                raise CommandFailed("Object reference not set to an instance of an object.")
            self.search_episodes(body["episodeIds"])
        elif name == "SeasonSearch":
            self.search_season(body["seriesId"], body["seasonNumber"] or 0)
        elif name == "SeriesSearch":
            if body["seriesId"] not in self.series:
                raise CommandFailed(f"Series with ID {body['seriesId']} does not exist")
            for season in self.seasons_of(body["seriesId"]):
                self.search_season(body["seriesId"], season)
        elif name == "MissingEpisodeSearch":
            for title in self.titles_for(name, [body["seriesId"]]):
                for episode in self.episodes_of(title["id"]):
                    if episode["monitored"] and title["monitored"] and not episode["episodeFileId"]:
                        self.grab([self.release_for(episode)])

    def search_episodes(self, ids: Sequence[int]) -> None:
        """Search each episode by itself, monitored or not."""
        unknown = [number for number in ids if number not in self.episodes]
        if unknown or len(set(ids)) < len(ids):
            raise CommandFailed(f"Expected query to return {len(ids)} rows")
        for number in ids:
            episode = self.episodes[number]
            series = self.series[episode["seriesId"]]
            if series["seriesType"] == "daily" and not episode["airDate"]:
                raise CommandFailed("Daily episode is missing an air date")
            self.grab([self.release_for(episode)])

    def search_season(self, series_id: Optional[int], season: int) -> None:
        """Search a pack: everything in it must be monitored, and have no file."""
        series = self.series.get(series_id or 0)
        if series is None:
            raise CommandFailed(f"Series with ID {series_id} does not exist")
        episodes = self.episodes_of(series["id"], season)
        if not series["monitored"] or not all(episode["monitored"] for episode in episodes):
            return
        groups: List[List[int]] = []
        for episode in episodes:
            if not any(episode["id"] in group for group in groups):
                groups.append(self.release_for(episode))
        if groups:
            self.grab(groups)

    # -- reading

    def routes(self) -> List[Tuple[str, str, Callable[..., Reply]]]:
        return [
            ("GET", "series", self.get_all_series),
            ("GET", r"series/(\d+)", self.get_series),
            ("GET", "episodefile", self.get_files),
            ("GET", r"episodefile/(\d+)", self.get_file),
            ("DELETE", r"episodefile/(\d+)", self.delete_file),
            ("DELETE", "episodefile/bulk", self.delete_files),
            ("GET", "episode", self.get_episodes),
            ("GET", r"episode/(\d+)", self.get_episode),
            ("PUT", r"episode/(\d+)", self.put_episode),
            ("PUT", "episode/monitor", self.put_monitor),
            ("GET", "history/series", self.get_history_of_title),
            ("GET", "queue/details", self.get_queue),
        ]

    def episodes_of(self, series_id: int, season: Optional[int] = None) -> List[Record]:
        return [
            episode
            for episode in self.episodes.values()
            if episode["seriesId"] == series_id and season in (None, episode["seasonNumber"])
        ]

    def seasons_of(self, series_id: Optional[int]) -> List[int]:
        return sorted(
            {e["seasonNumber"] for e in self.episodes.values() if e["seriesId"] == series_id}
        )

    def series_resource(
        self, series: Record, episodes: List[Record], files: List[Record]
    ) -> Record:
        title = series["title"]
        slug = re.sub(r"\W+", "-", title.lower()).strip("-")

        def statistics(season: Optional[int]) -> Record:
            some = [e for e in episodes if season in (None, e["seasonNumber"])]
            held = [f for f in files if season in (None, f["seasonNumber"])]
            with_file = sum(1 for episode in some if episode["episodeFileId"])
            return {
                "seasonCount": len(seasons) if season is None else None,
                "episodeFileCount": with_file,
                "episodeCount": len(some),
                "totalEpisodeCount": len(some),
                "sizeOnDisk": sum(file["size"] for file in held),
                "releaseGroups": ["GRP"],
                "percentOfEpisodes": 100.0 * with_file / len(some) if some else 0.0,
            }

        seasons = sorted({episode["seasonNumber"] for episode in episodes})
        return {
            **series,
            "sortTitle": title.lower(),
            "status": "ended",
            "ended": True,
            "overview": f"All about {title}.",
            "images": [
                {
                    "coverType": "poster",
                    "url": f"/MediaCover/{series['id']}/poster.jpg?lastWrite=638000000000000000",
                    "remoteUrl": f"https://artworks.example/{series['id']}/poster.jpg",
                }
            ],
            "originalLanguage": ENGLISH if self.major > 3 else None,
            "seasons": [
                {"seasonNumber": season, "monitored": season > 0, "statistics": statistics(season)}
                for season in seasons
            ],
            "qualityProfileId": 4,
            "languageProfileId": 1 if self.major < 5 else None,
            "seasonFolder": True,
            "useSceneNumbering": False,
            "runtime": 47,
            "tvRageId": 0,
            "tvMazeId": 0,
            "tmdbId": 800000 + series["id"] if self.since("4.0.5.1760") else None,
            "imdbId": f"tt{9000000 + series['id']}" if series["id"] % 2 else None,
            "cleanTitle": re.sub(r"\W+", "", title.lower()),
            "titleSlug": slug,
            "rootFolderPath": os.path.dirname(series["path"]) + "/",
            "genres": ["Drama"],
            "tags": series.get("tags", []),
            "added": "2024-02-03T10:11:12Z",
            "ratings": {"votes": 10, "value": 7.4},
            "statistics": statistics(None),
        }

    def series_resources(self, wanted: Sequence[Record]) -> List[Record]:
        episodes: Dict[int, List[Record]] = {}
        files: Dict[int, List[Record]] = {}
        for episode in self.episodes.values():
            episodes.setdefault(episode["seriesId"], []).append(episode)
        for record in self.files.values():
            files.setdefault(record["seriesId"], []).append(record)
        return [
            self.series_resource(
                series, episodes.get(series["id"], []), files.get(series["id"], [])
            )
            for series in wanted
        ]

    def get_all_series(self, request: Request) -> Reply:
        tvdb_id = self.number(request, "tvdbId")
        wanted = [s for s in self.series.values() if tvdb_id in (None, s["tvdbId"])]
        return as_json(self.series_resources(wanted))

    def get_series(self, request: Request, series_id: int) -> Reply:
        if series_id not in self.series:
            raise self.missing()
        return as_json(self.series_resources([self.series[series_id]])[0])

    def file_resource(self, record: Record) -> Record:
        resource = super().file_resource(record)
        if self.major > 3:
            resource.update(customFormats=[], customFormatScore=0, indexerFlags=0)
            resource["releaseType"] = "singleEpisode"
        return resource

    def get_files(self, request: Request) -> Reply:
        series_id = self.number(request, "seriesId")
        ids = self.ints(request, "episodeFileIds")
        if series_id is not None:
            if series_id not in self.series:
                raise failure(404, f"Series with ID {series_id} does not exist")
            found = [f for f in self.files.values() if f["seriesId"] == series_id]
        elif ids:
            found = self.by_ids(self.files, ids)
        else:
            raise api_error(400, "BadRequest", "seriesId or episodeFileIds must be provided")
        if series_id in self.canned:
            return Reply(200, self.canned[series_id])
        text = json.dumps([self.file_resource(record) for record in found], ensure_ascii=False)
        return Reply(200, as_utf8(text))  # nothing in it is null, and there is much of it

    def can_files(self) -> None:
        """Write down the files of all series as they are now: measured is not this fake's speed."""
        for series_id in self.series:
            request = Request("GET", "", "", {"seriesId": [str(series_id)]}, {}, b"", None, 0.0)
            self.canned[series_id] = self.get_files(request).body

    def episode_resource(self, episode: Record, *, with_file: bool = False) -> Record:
        air_date = episode["airDate"]
        record = self.files.get(episode["episodeFileId"])
        return {
            **episode,
            "airDateUtc": f"{air_date}T01:00:00Z" if air_date else None,
            "runtime": 47 if self.major > 3 else None,
            "hasFile": episode["episodeFileId"] > 0,
            "unverifiedSceneNumbering": False,
            "episodeFile": self.file_resource(record) if with_file and record else None,
        }

    def get_episodes(self, request: Request) -> Reply:
        series_id = self.number(request, "seriesId")
        season = self.number(request, "seasonNumber")
        ids = self.ints(request, "episodeIds")
        file_id = self.number(request, "episodeFileId")
        if series_id is not None:
            found = self.episodes_of(series_id, season)
        elif ids:
            found = self.by_ids(self.episodes, ids)
        elif file_id is not None:
            found = self.units_of(file_id) if file_id else []
        else:
            raise api_error(400, "BadRequest", "seriesId or episodeIds must be provided")
        with_file = self.flag(request, "includeEpisodeFile") and self.since("4.0.9.2421")
        return as_json([self.episode_resource(episode, with_file=with_file) for episode in found])

    def get_episode(self, request: Request, episode_id: int) -> Reply:
        if episode_id not in self.episodes:
            raise self.missing()
        episode = self.episodes[episode_id]
        return as_json(
            {
                **self.episode_resource(episode, with_file=True),
                "series": self.series_resources([self.series[episode["seriesId"]]])[0],
                "images": [],
            }
        )

    def get_queue(self, request: Request) -> Reply:
        series_id = self.number(request, "seriesId")
        ids = self.ints(request, "episodeIds")
        return as_json(
            [
                item
                for item in self.queue_resources()
                if series_id in (None, item["seriesId"])
                and (series_id is not None or not ids or item["episodeId"] in ids)
            ]
        )

    def history_filter(self, request: Request, record: Record) -> bool:
        episode_id = self.number(request, "episodeId")
        series = self.ints(request, "seriesIds") if self.major > 3 else []
        return episode_id in (None, record["episodeId"]) and (
            not series or record["seriesId"] in series
        )

    # -- changing

    def put_monitor(self, request: Request) -> Reply:
        found = self.by_ids(self.episodes, self.body_ids(request, "episodeIds"))
        monitored = bool({k.lower(): v for k, v in request.body.items()}.get("monitored", False))
        for episode in found:
            episode["monitored"] = monitored
        return as_json([self.episode_resource(episode) for episode in found], 202)

    def put_episode(self, request: Request, episode_id: int) -> Reply:
        if episode_id not in self.episodes:
            raise self.missing()
        self.episodes[episode_id]["monitored"] = bool((request.body or {}).get("monitored", False))
        return as_json(self.episode_resource(self.episodes[episode_id]), 202)


# --- Radarr -----------------------------------------------------------------------------------


class FakeRadarr(FakeArr):
    """Radarr: by default a v6; RADARR_3, RADARR_4 and RADARR_5 are others."""

    app = "Radarr"
    unit = "movie"
    title_key = "movieId"
    commands_known = {
        "RefreshMovie": ("movieIds",),
        "RescanMovie": ("movieId",),
        "MoviesSearch": ("movieIds",),
        "MissingMoviesSearch": (),
        "RefreshMonitoredDownloads": (),
        "RssSync": (),
    }
    events = {"grabbed": 1, "downloadFolderImported": 3, "downloadFailed": 4, "movieFileDeleted": 6}
    auto_unmonitor_key = "autoUnmonitorPreviouslyDownloadedMovies"
    follows_since = "5.15.1.9463"
    redirects = ("5.12.2.9335", 302)

    def __init__(self, root: Path, *, version: str = RADARR_6, **options: Any) -> None:
        super().__init__(root, version=version, **options)
        self.movies: Dict[int, Record] = {}
        self.omit_has_file = False  # leave hasFile out of the list of movies

    def add_movie(
        self,
        title: str,
        year: int = 2021,
        *,
        file_name: Optional[str] = None,
        path: Optional[str] = None,
        monitored: bool = True,
        tmdb_id: Optional[int] = None,
        original_title: Optional[str] = None,
        quality: str = "Bluray-1080p",
        size: int = 4294967296,
    ) -> int:
        """Add a movie, and the record of its file if that has a name."""
        with self.lock:
            number = self.new_id("movie", 31)
            folder = f"{title} ({year})".replace("/", "-")
            self.movies[number] = {
                "title": title,
                "originalTitle": original_title or title,
                "year": year,
                "path": path or f"{self.server_root}/{folder}",
                "movieFileId": 0,
                "monitored": monitored,
                "tmdbId": tmdb_id or 800000 + number,
                "id": number,
            }
            if file_name is not None:
                movie = self.movies[number]
                self.make_file(number, file_name, [movie], quality=quality, size=size)
            return number

    def make_file(
        self,
        title_id: int,
        relative_path: str,
        units: List[Record],
        *,
        quality: str = "Bluray-1080p",
        size: int = 4294967296,
    ) -> int:
        number = self.new_id("file", 601)
        self.files[number] = {
            "movieId": title_id,
            "relativePath": relative_path,
            "size": size,
            "dateAdded": self.now(),
            "edition": "",
            "quality": quality,
            "id": number,
        }
        self.movies[title_id]["movieFileId"] = number
        return number

    def titles(self) -> Dict[int, Record]:
        return self.movies

    def units_of(self, file_id: int) -> List[Record]:
        return [movie for movie in self.movies.values() if movie["movieFileId"] == file_id]

    def units(self) -> Dict[int, Record]:
        return self.movies

    def file_id_of(self, unit: Record) -> int:
        return cast(int, unit["movieFileId"])

    def set_file(self, unit: Record, file_id: int) -> None:
        unit["movieFileId"] = file_id

    def history_ids(self, unit: Record) -> Record:
        return {"movieId": unit["id"]}

    def new_name(self, units: List[Record]) -> str:
        return f"{units[0]['title']} ({units[0]['year']}).mkv".replace("/", "-")

    def search(self, name: str, body: Record) -> None:
        if name == "RescanMovie":
            for title in self.titles_for(name, [body["movieId"]]):
                self.rescan(title)
        elif name == "RefreshMovie":
            for title in self.titles_for(name, body["movieIds"] or []):
                with contextlib.suppress(CommandFailed):  # only logged
                    self.rescan(title)
        elif name == "MoviesSearch":
            if not body["movieIds"]:
                raise CommandFailed("Object reference not set to an instance of an object.")
            unknown = [number for number in body["movieIds"] if number not in self.movies]
            if unknown:
                raise CommandFailed(f"Movie with ID {unknown[0]} does not exist")
            for number in body["movieIds"]:
                if self.movies[number]["monitored"] or self.major > 3:
                    self.grab([[number]])
        elif name == "MissingMoviesSearch":
            for movie in list(self.movies.values()):
                if movie["monitored"] and not movie["movieFileId"]:
                    self.grab([[movie["id"]]])

    def routes(self) -> List[Tuple[str, str, Callable[..., Reply]]]:
        return [
            ("GET", "movie", self.get_movies),
            ("GET", r"movie/(\d+)", self.get_movie),
            ("PUT", "movie/editor", self.put_editor),
            ("GET", "moviefile", self.get_files),
            ("GET", r"moviefile/(\d+)", self.get_file),
            ("DELETE", r"moviefile/(\d+)", self.delete_file),
            ("DELETE", "moviefile/bulk", self.delete_files),
            ("GET", "history/movie", self.get_history_of_title),
            ("GET", "queue/details", self.get_queue),
        ]

    def movie_resource(self, movie: Record, *, listed: bool = False) -> Record:
        record = self.files.get(movie["movieFileId"])
        size = record["size"] if record else 0
        embedded = self.file_resource(record) if record else None
        if embedded:
            embedded.pop("customFormats", None)
        omit = self.omit_has_file and listed and self.major >= 5
        return {
            **movie,
            "originalLanguage": ENGLISH,
            "alternateTitles": [],
            "secondaryYearSourceId": 0,
            "sortTitle": movie["title"].lower(),
            "sizeOnDisk": size,
            "status": "released",
            "images": [
                {
                    "coverType": "poster",
                    "url": f"/MediaCover/{movie['id']}/poster.jpg",
                    "remoteUrl": f"https://img.example/{movie['id']}.jpg",
                }
            ],
            "website": "",
            "youTubeTrailerId": "",
            "studio": "",
            "qualityProfileId": 4,
            "hasFile": None if omit else record is not None,
            "minimumAvailability": "released",
            "isAvailable": True,
            "folderName": movie["path"],
            "runtime": 101,
            "cleanTitle": re.sub(r"\W+", "", movie["title"].lower()),
            "imdbId": f"tt{9000000 + movie['id']}" if movie["id"] % 2 else None,
            "titleSlug": str(movie["tmdbId"]),
            "rootFolderPath": os.path.dirname(movie["path"]) + "/",
            "genres": [],
            "tags": movie.get("tags", []),
            "added": "2024-05-01T09:00:00Z",
            "ratings": {"tmdb": {"votes": 5, "value": 6.1, "type": "user"}},
            "movieFile": embedded,
            "popularity": 3.5,
            "statistics": {"movieFileCount": int(record is not None), "sizeOnDisk": size}
            if self.major > 4
            else None,
        }

    def get_movies(self, request: Request) -> Reply:
        tmdb_id = self.number(request, "tmdbId")
        wanted = [m for m in self.movies.values() if tmdb_id in (None, m["tmdbId"])]
        return as_json([self.movie_resource(movie, listed=True) for movie in wanted])

    def get_movie(self, request: Request, movie_id: int) -> Reply:
        if movie_id not in self.movies:
            raise self.missing()
        return as_json(self.movie_resource(self.movies[movie_id]))

    def file_resource(self, record: Record) -> Record:
        resource = super().file_resource(record)
        resource["originalFilePath"] = f"Release.{record['id']}/video.mkv"
        resource["indexerFlags"] = 0
        resource["quality"]["quality"]["modifier"] = "none"
        if self.major > 3:
            resource["customFormats"] = []
        return resource

    def get_files(self, request: Request) -> Reply:
        movies = self.ints(request, "movieId")
        if not self.since("5.3.3.8535"):
            movies = movies[:1]
        ids = self.ints(request, "movieFileIds")
        if movies:
            unknown = [number for number in movies if number not in self.movies]
            if unknown:
                raise failure(404, f"Movie with ID {unknown[0]} does not exist")
            found = [f for f in self.files.values() if f["movieId"] in movies]
        elif ids:
            found = self.by_ids(self.files, ids)
        else:
            raise api_error(400, "BadRequest", "movieId or movieFileIds must be provided")
        text = json.dumps([self.file_resource(record) for record in found], ensure_ascii=False)
        return Reply(200, as_utf8(text))  # nothing in it is null, and there is much of it

    def put_editor(self, request: Request) -> Reply:
        found = self.by_ids(self.movies, self.body_ids(request, "movieIds"))
        monitored = {k.lower(): v for k, v in request.body.items()}.get("monitored")
        for movie in found:
            if monitored is not None:
                movie["monitored"] = bool(monitored)
        return as_json([self.movie_resource(movie) for movie in found], 202)

    def get_queue(self, request: Request) -> Reply:
        movie_id = self.number(request, "movieId")
        return as_json([i for i in self.queue_resources() if movie_id in (None, i["movieId"])])

    def history_filter(self, request: Request, record: Record) -> bool:
        movies = self.ints(request, "movieIds") if self.major > 3 else []
        return not movies or record["movieId"] in movies


# --- the relay --------------------------------------------------------------------------------


class FakeRelay(FakeServer):
    """The relay of the container edition; `modes[term]`, else `mode`, says how it answers."""

    answers: Dict[str, Tuple[int, bytes]] = {
        "ok": (200, b'{"ok": true, "action": "EpisodeSearch", "code": 201}'),
        "no matches": (200, b'{"ok": false, "code": 404, "detail": "no matches"}'),
        "plain": (200, b"OK"),
        "empty": (204, b""),
        "400": (400, b'{"ok": false, "error": "bad type"}'),
        "404": (404, b'{"ok": false, "error": "no matches"}'),
        "409": (409, b'{"ok": false, "error": "movie not in the library"}'),
        "502": (502, b'{"ok": false, "error": "cannot reach the server"}'),
    }

    def __init__(
        self,
        token: str = "relay-token-1b2c3d",
        *,
        prefix: str = "",
        userinfo: str = "",
        latency: float = 0.0,
    ) -> None:
        super().__init__(latency=latency)
        self.token = token
        self.prefix = "/" + prefix.strip("/") if prefix.strip("/") else ""
        self.userinfo = userinfo  # "user:password" that it wants besides the token
        self.mode = "ok"
        self.modes: Dict[str, str] = {}
        self.finds: List[Dict[str, str]] = []  # the authorised requests, without the token

    @property
    def url(self) -> str:
        """RELAY_BASE without /find; `find_url` is the one with it."""
        return super().url + self.prefix

    @property
    def find_url(self) -> str:
        return self.url + "/find"

    def answer(self, request: Request) -> Reply:
        if request.path != self.prefix + "/find":
            return as_json({"ok": False, "error": "not found"}, 404)
        if request.method != "GET":
            return as_json({"ok": False, "error": "method not allowed"}, 405)
        given = {name: values[0] for name, values in request.query.items()}
        basic = "Basic " + base64.b64encode(self.userinfo.encode()).decode()
        if (self.token and given.pop("token", "") != self.token) or (
            self.userinfo and request.headers.get("authorization") != basic
        ):
            return as_json({"error": "unauthorized"}, 401)
        if not given.get("type") or not given.get("term"):
            return as_json({"ok": False, "error": "type and term are needed"}, 400)
        self.finds.append(given)
        status, body = self.answers[self.modes.get(given["term"], self.mode)]
        kind = "application/json" if body[:1] == b"{" else "text/plain"
        return Reply(status, body, {"Content-Type": kind} if body else {})


# --- large libraries --------------------------------------------------------------------------


def populate(sonarr: FakeSonarr, series: int = 300, files_per_series: int = 40) -> None:
    """Add records of many series and files; nothing is made on the disk."""
    for index in range(series):
        title = f"Series {index:04d}"
        series_id = sonarr.add_series(title, 1990 + index % 35)
        for number in range(files_per_series):
            season, episode = number // 10 + 1, number % 10 + 1
            name = f"{title} - S{season:02d}E{episode:02d} - Part [WEBDL-1080p]-GRP.mkv"
            sonarr.add_file(series_id, f"Season {season:02d}/{name}", [(season, episode)])


def populate_movies(radarr: FakeRadarr, movies: int = 3000) -> None:
    """Add records of many movies with a file each; nothing is made on the disk."""
    for index in range(movies):
        year = 1950 + index % 75
        radarr.add_movie(f"Movie {index:05d}", year, file_name=f"Movie {index:05d} ({year}).mkv")
