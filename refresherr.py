#!/usr/bin/env python3
"""Refresherr finds the dead symlinks of a media library, remembers them, and has them repaired.

The promise, above speed and features: it never harms a healthy link.  An outage of the mount is
never read as breakage, nothing outside its own database changes without ``--apply``, and every
change to a link is journalled first.

The sections, bottom-up; each uses only those above it:

    Constants and errors    exit codes, states, the one exception family
    Text and time           escaping, redaction, durations, timestamps, path prefixes
    Terminal                messages, progress, colour
    Configuration           one table of settings -> one frozen Config
    Mounts                  what is mounted where
    Names                   what a path says about the show or movie behind it
    Database                connection, migrations, the public functions of the schema document
    Look-ups                worker processes that look at what may hang, and can be killed
    Scan: the verdict       a loss or an outage: all facts in, the decision out
    Scan: the record        the walk, what is found and judged -> states, rows, events
    Patience                until when a broken link waits before anything is done about it
    Verify                  a little of the files behind good links is read
    CineSync                broken links -> the files behind CineSync's links; and undo
    HTTP                    one careful client on urllib
    Sonarr and Radarr       what their API has in common, and what not
    Ingest                  the servers' titles and files -> rows, linked to the symlinks
    Queue                   broken links -> actions
    Prune                   broken links that nobody can repair are removed, undoably
    Dispatch                actions -> servers, step by step, resumable
    Notify                  who is told about a run, and the heartbeats
    Media servers           Plex, Jellyfin and Emby are told which directories changed
    Statistics              what the database knows, for people and for Prometheus
    Report                  the same as one HTML page with charts
    Doctor                  is this installation fit for work?
    Run                     what the steps of a whole run come to
    Command line            one table of commands, main()

As a library: the functions of the Database section keep the promises of the schema document.
"""

from __future__ import annotations

import argparse
import binascii
import codecs
import configparser
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import gc
import io
import itertools
import json
import logging
import marshal
import math
import mmap
import operator
import os
import queue
import re
import select
import shutil
import signal
import sqlite3
import stat
import struct
import sys
import threading
import time
import traceback
import unicodedata
import warnings
from collections import Counter, defaultdict, deque
from shlex import quote as shell_quote

# isort: off
# fmt: off
from typing import (
    Any, Callable, Collection, ContextManager, Deque, Dict, Iterable, Iterator, List, Mapping,
    NamedTuple, Optional, Sequence, Set, TextIO, Tuple, Type, Union)
from urllib.parse import (
    parse_qs, quote, quote_plus, unquote, unquote_to_bytes, urlencode, urlsplit)
# fmt: on
# isort: on

# ---------------------------------------------------------------------------------------------
# Constants and errors
# ---------------------------------------------------------------------------------------------

__version__ = "1.0.0"
SCHEMA_VERSION = 4

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_PARTIAL, EXIT_REFUSED, EXIT_LOCKED = range(6)
EXIT_BROKEN, EXIT_INTERRUPTED = 10, 130
EXIT_WORDS = dict(enumerate(("ok", "error", "error", "partial", "refused", "locked")))
EXIT_WORDS.update({EXIT_BROKEN: "ok", EXIT_INTERRUPTED: "interrupted"})

OK, BROKEN, UNREACHABLE, MISSING = STATUSES = ("ok", "broken", "unreachable", "missing")

JsonObject = Dict[str, Any]


class RefresherrError(Exception):
    """Something the person at the NAS must know: one line, and the exit status it leads to."""

    exit_code = EXIT_FAILED

    def __init__(self, text: str, exit_code: int = EXIT_OK) -> None:
        super().__init__(text)
        self.exit_code = exit_code or self.exit_code


class UsageError(RefresherrError):
    """The command line, or the configuration, asks for something that cannot be."""

    exit_code = EXIT_USAGE


class DatabaseError(RefresherrError):
    """The database cannot be opened, read or written; the cause is the error of SQLite."""


class RefusedError(RefresherrError):
    """A safety guard refused; what it guards was not touched."""

    exit_code = EXIT_REFUSED


# ---------------------------------------------------------------------------------------------
# Text and time
# ---------------------------------------------------------------------------------------------

_SECRET_QUERY = re.compile(r"(?i)([?&;](?:[a-z_-]*token|api_?key|access_key)=)[^&#\s'\"]*")
_USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s]+@")
_TOKEN_PARAMETER = re.compile(r"(?i)([?&])(?:token|api_?key)=[^&#]*(&?)")


def escape(text: str) -> str:
    """Return `text` fit for a terminal: no control, surrogate, bidirectional or newline character.

    A byte that is not UTF-8 (a lone surrogate, PEP 383) shows as \\xNN, as it stands on the disk.
    """

    def escaped(char: str) -> str:
        if "\udc80" <= char <= "\udcff":
            return f"\\x{ord(char) - 0xDC00:02x}"
        return char if char.isprintable() else char.encode("unicode_escape").decode()

    return text if text.isprintable() else "".join(map(escaped, text))


def redact(text: str) -> str:
    """Return `text` with the tokens, keys and passwords of any URL in it replaced by ***."""
    return _USERINFO.sub(r"\1***@", _SECRET_QUERY.sub(r"\1***", text))


def escape_message(text: str) -> str:
    """Return a message fit for the terminal and the log: one line, escaped, no secret in it."""
    return escape(redact(text))


def strip_secrets(url: str) -> str:
    """Return `url` without its token or key parameter and without user and password."""
    bare = _USERINFO.sub(r"\1", url)
    while _TOKEN_PARAMETER.search(bare):
        bare = _TOKEN_PARAMETER.sub(lambda match: match[1] if match[2] else "", bare)
    return bare


def plural(count: int, noun: str) -> str:
    """Return '1 link', '12,345 links'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """Return the two largest units: '3d 4h', '2m 5s', '0.4s'."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = {"d": hours // 24, "h": hours % 24, "m": minutes, "s": secs}
    return " ".join([f"{count}{unit}" for unit, count in parts.items() if count][:2])


def utc_now() -> str:
    """Return now as ISO 8601 in UTC, whole seconds: '2026-11-22T13:29:00+00:00'."""
    return format_time(time.time())


def format_time(epoch: float) -> str:
    """Return a Unix time as ISO 8601 in UTC."""
    return datetime.datetime.fromtimestamp(int(epoch), datetime.timezone.utc).isoformat()


def parse_time(value: Union[str, int, float, None]) -> Optional[float]:
    """Return the Unix time of ISO 8601 (UTC without a zone) or of a number, None of aught else."""
    text = str(value).strip()
    with contextlib.suppress(ValueError):
        return float(text) if math.isfinite(float(text)) else None
    with contextlib.suppress(ValueError):
        text = re.sub(r"(\.\d{6})\d+", r"\1", text.replace("Z", "+00:00"))  # .NET's ticks
        moment = datetime.datetime.fromisoformat(text)
        return moment.replace(tzinfo=moment.tzinfo or datetime.timezone.utc).timestamp()
    return None


def is_under(path: str, prefix: str) -> bool:
    """Tell whether `path` is `prefix` or lies beneath it; whole components only."""
    prefix = prefix.rstrip("/")
    return path == prefix or path.startswith(prefix + "/")


def ancestors(path: str) -> Iterator[str]:
    """Yield an absolute path, then its parent, up to '/'."""
    while path and path != "/":
        yield path
        path = path.rpartition("/")[0]
    yield "/"


def find_ancestor(path: str, collection: Iterable[str]) -> Optional[str]:
    """Return the longest member of a set or dict of paths that `path` is or lies beneath."""
    return next((parent for parent in ancestors(path) if parent in collection), None)


# ---------------------------------------------------------------------------------------------
# Terminal
# ---------------------------------------------------------------------------------------------

log = logging.getLogger("refresherr")


def mask_numbers(text: str) -> str:
    """Return what a message has in common with the same one of another day."""
    return re.sub(r"\d+", "#", text)


class Terminal:
    """Data goes to stdout, messages to stderr; colour and progress only where it is a terminal."""

    _CODES = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}

    def __init__(self, out: TextIO, err: TextIO, colour: bool, progress: bool) -> None:
        self.out, self.err = out, err
        self.colour = colour and out.isatty()
        self._progress = progress and err.isatty()
        self._drawn, self._next_draw = 0, 0.0

    def paint(self, text: str, *styles: str) -> str:
        """Return `text` in colour where colour is wanted."""
        codes = ";".join(self._CODES[style] for style in styles)
        return f"\x1b[{codes}m{text}\x1b[0m" if self.colour and styles else text

    def line(self, text: str = "") -> None:
        """Print a line of data.  The caller has escaped what is foreign in it."""
        self.clear()
        print(text, file=self.out)

    def hint(self, text: str) -> None:
        """Say to a person who sits there what to do next."""
        if self._progress:
            self.clear()
            print(self.paint(f"-> {text}", "dim"), file=self.err)

    def progress(self, text: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Draw a line that replaces itself, ten times a second at the most."""
        if self._progress and clock() >= self._next_draw:
            self._next_draw = clock() + 0.1
            self._draw(escape(text)[: max(20, shutil.get_terminal_size().columns - 1)])

    def clear(self) -> None:
        """Wipe the progress line."""
        if self._drawn:
            self._draw("", "\r")

    def _draw(self, text: str, end: str = "") -> None:
        print("\r" + text.ljust(self._drawn), end=end, file=self.err, flush=True)
        self._drawn = len(text)


class TerminalHandler(logging.Handler):
    """Shows log records on stderr, escaped and redacted, one line each."""

    def __init__(self, terminal: Terminal, tracebacks: bool) -> None:
        super().__init__()
        self._terminal, self._tracebacks = terminal, tracebacks
        self.file: Optional[TextIO] = None  # of --log-file
        self.said: List[str] = []  # warnings and errors
        self.told: Set[str] = set()  # those that need not be said again, see `mask_numbers`

    def emit(self, record: logging.LogRecord) -> None:
        self._terminal.clear()
        text = escape_message(record.getMessage())
        labelled = f"{record.levelname.lower()}: {text}"
        with contextlib.suppress(OSError, ValueError):
            print(utc_now(), labelled, file=self.file or io.StringIO())
        if record.levelno >= logging.WARNING:
            known = text in self.said or mask_numbers(text) in self.told
            self.said.append(text)
            if known:
                return
            text = labelled
        with contextlib.suppress(OSError, ValueError):  # stderr is gone: nobody is left to be told
            print(f"refresherr: {text}", file=self._terminal.err)
            if record.exc_info and self._tracebacks:
                trace = logging.Formatter().formatException(record.exc_info)
                print("\n".join(map(escape_message, trace.splitlines())), file=self._terminal.err)


# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------
# One dataclass a section; each field carries its parser, its help and its sample.  From these
# tables come the defaults, the checks, the environment names and `config sample`.


def parser_of(pattern: str, advice: str, convert: Callable[..., Any] = str) -> Callable[[str], Any]:
    """Return a parser of settings: what matches becomes `convert(*groups)`, else a ValueError."""

    def parse(text: str) -> Any:
        match = re.fullmatch(pattern, text.strip(), re.IGNORECASE | re.ASCII)
        if not match:
            raise ValueError(f"write {advice}")
        return convert(*match.groups())

    return parse


def _to_seconds(number: str, unit: str) -> float:
    units = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    return float(number) * units[unit.lower()]


_DURATION = r"(\d{1,9}(?:\.\d+)?)\s*([smhdw]?)"
parse_duration = parser_of(_DURATION, "a duration such as 90, 30s, 15m, 6h or 2d", _to_seconds)
parse_interval = parser_of("(?=.*[1-9])" + _DURATION, "more than 0, such as 30s, 15m", _to_seconds)
parse_size = parser_of(
    r"(?=.*[1-9])(\d{1,12})\s*([kmg]?)(?:i?b)?", "a size such as 65536, 512K or 1M",
    lambda number, unit: int(number) << 10 * "bkmg".find(unit.lower()),
)  # fmt: skip
_PERCENT = r"(100|\d{1,2}|\d{1,2}\.\d+(?=\s*%))\s*%?"
parse_percent = parser_of(_PERCENT, "a percentage from 0% to 100%", lambda n: float(n) / 100)
parse_bool = parser_of("(yes|true|on|1)|no|false|off|0", "yes or no", bool)
parse_count = parser_of(r"(\d+)", "a whole number", int)
_WORKERS = r"auto|([1-9]\d?|1\d\d|2[0-4]\d|25[0-6])"  # 0 stands for auto
parse_workers = parser_of(_WORKERS, "auto or a number from 1 to 256", lambda n: int(n or 0))
parse_key = parser_of(r"([!-~]+)", "one line of plain characters without spaces")
_URL = r"(https?://(?![^/\s]*:0+(?:/|$))[^/\s](?:\S*[^/\s])?)/*"
parse_url = parser_of(_URL, "a URL that begins with http:// or https://")


def parse_choice(*choices: str) -> Callable[[str], str]:
    """Return a parser that accepts one of `choices`."""
    advice = f"{', '.join(choices[:-1])} or {choices[-1]}"
    return parser_of(f"({'|'.join(choices)})", advice, str.lower)


def parse_headers(text: str) -> Tuple[Tuple[str, str], ...]:
    """Return (name, value) pairs from lines of 'Name: value'."""
    advice = "lines of plain characters: 'Name: value'"
    parse = parser_of(r"([\w-]+): *([ -~]*[!-~])", advice, lambda *pair: pair)
    return tuple(parse(line) for line in text.splitlines() if line.strip())


def parse_list(text: str) -> Tuple[str, ...]:
    """Return the items of a list, one a line or comma-separated."""
    parts = text.splitlines() if "\n" in text.strip() else text.split(",")
    return tuple(part.strip() for part in parts if part.strip())


def parse_path(text: str) -> str:
    """Return an absolute path, ~ expanded, not resolved."""
    if not text.strip():
        raise ValueError("must not be empty")
    # POSIX lets // stand at the beginning.
    return "/" + os.path.abspath(os.path.expanduser(text.strip())).lstrip("/")


def _split_paths(text: str) -> List[str]:
    # A comma separates only where another path begins: folders are called 'Movies, HD'.
    parts = [part.strip(" ,") for part in re.split(r"\n|,\s*(?=[/~])", text)]
    return [part for part in parts if part.strip()]


def parse_own_path(text: str) -> str:
    """Do as `parse_path` does, but refuse what a person writes into a file by mistake."""
    if text.strip()[:1] in ('"', "'"):
        raise ValueError("write it without quotes")
    if text.strip()[:1] not in ("/", "~"):
        raise ValueError("write the whole path, from / on")
    if re.search(r"\s[;#]", text) and not os.path.lexists(text.strip()):
        what = "the comment is taken for a part of the path"
        raise ValueError(f"{what}; give it a line of its own")
    return parse_path(text)


def parse_paths(text: str) -> Tuple[str, ...]:
    """Return absolute paths, one a line or comma-separated."""
    return tuple(map(parse_own_path, _split_paths(text)))


def parse_map(text: str) -> Tuple[Tuple[str, str], ...]:
    """Return (path prefix, value) pairs from lines of 'prefix => value'; older: '='."""
    pairs = []
    for part in _split_paths(text):
        left, _, right = part.partition("=>" if "=>" in part else "=")
        if not left.strip() or not right.strip():
            raise ValueError(f"write 'prefix => value', not {part!r}")
        pairs.append((parse_own_path(left), right.strip().rstrip("/") or "/"))
    return tuple(pairs)


def setting(
    parse: Callable[[str], Any], doc: str, text: str, env: str = "", sample: str = "",
    has_default: bool = True, secret: bool = False,
) -> Any:  # fmt: skip
    """Describe one setting: `text` is its default, or else a sample; `env` an older name of it."""
    default = text if has_default else ""
    is_list = parse in (parse_list, parse_paths, parse_map, parse_headers)
    metadata = {"parse": parse, "doc": doc, "default": default, "env": env, "secret": secret}
    value = parse(default) if default or is_list else ""
    return dataclasses.field(default=value, metadata={**metadata, "sample": sample or text})


optional = functools.partial(setting, has_default=False)
secret = functools.partial(optional, secret=True)
Paths = Tuple[str, ...]
PathMap = Tuple[Tuple[str, str], ...]
_MAP_DOC = "A path here => the same path as the server sees it."


# fmt: off
@dataclasses.dataclass(frozen=True)
class MainSettings:
    """Where Refresherr keeps its own things, and whether it may change others'."""
    data_dir: str = setting(parse_own_path, "Where the database lives.", "/data", "DATA_DIR")
    apply: bool = setting(parse_bool, "Change links and servers without --apply.", "no")
    log_level: str = setting(parse_choice("debug", "info", "warning", "error"),
        "How much is said on stderr.", "info", "LOG_LEVEL")

@dataclasses.dataclass(frozen=True)
class ScanSettings:
    """What is walked, and what protects it from an outage."""
    roots: Paths = optional(parse_paths, "The library directories, one a line.",
        "\n/opt/media/tv\n/opt/media/movies", "SCAN_ROOTS")
    mount_checks: Paths = optional(parse_paths, "Mount points that must be mounted and not empty, "
        "or files that must be readable.", "\n/mnt/remote/realdebrid")
    ignore: Paths = optional(parse_list, "Skip paths that contain this; with *, ? or [ it is a "
        "glob on the name.", "\ncinesync\n*.partial", "IGNORE_SUBSTR")
    ignore_defaults: bool = setting(parse_bool, "Skip what a NAS keeps, such as @eaDir.", "yes")
    workers: int = setting(parse_workers, "Look-ups at once on a slow mount.", "auto")
    stat_timeout: float = setting(parse_interval, "What answers later is unreachable.", "30s")
    max_new_broken: float = setting(parse_percent,
        "More of a mount's good links than this gone at once is taken for an outage.", "20%")

@dataclasses.dataclass(frozen=True)
class InstanceSettings:
    """One Sonarr or Radarr."""
    url: str = optional(parse_url, "With the URL base, if one is set.", "http://{kind}:{port}")
    api_key: str = secret(parse_key, "Settings > General > API key.", "0123456789abcdef")
    roots: Paths = optional(parse_paths, "Where the links are that it owns.", "/opt/media/{folder}")
    path_map: PathMap = optional(parse_map, _MAP_DOC, "/opt/media/{folder} => /{folder}")
    skip_tags: Paths = optional(parse_list, "Leave alone what carries such a tag.", "keep, archive")
    ca_file: str = optional(parse_own_path, "A certificate authority of its own.", "/etc/my-ca.pem")
    headers: PathMap = secret(parse_headers, "For a proxy before it.", "CF-Access-Client-Id: ...")

@dataclasses.dataclass(frozen=True)
class RelaySettings:
    """The relay URL of the container edition."""
    base: str = optional(parse_url, "Its address.", "http://research-relay:5050", "RELAY_BASE")
    token: str = secret(parse_key, "Its token.", "...", "RELAY_TOKEN")
    routes: PathMap = optional(parse_map, "A path prefix => the relay's name for the instance.",
        "\n/opt/media/doc => radarr_doc", "ROUTE_MAP")

@dataclasses.dataclass(frozen=True)
class RepairSettings:
    """When a broken link is repaired, and how often."""
    min_age: float = setting(parse_duration, "Broken for at least this long.", "1h")
    patience: float = setting(parse_duration, "Wait at most so long where many are lost.", "48h")
    cooldown: float = setting(parse_duration, "Between two attempts.", "6h")
    max_attempts: int = setting(parse_count, "Then the link needs attention.", "3")
    season_threshold: int = setting(parse_count, "So many broken episodes of a season become one "
        "season search (relay).", "2", "SEASON_SEARCH_THRESHOLD")
    limit: int = setting(parse_count, "Actions queued in one run.", "25", "QUEUE_LIMIT")
    max: int = setting(parse_count, "Actions sent in one run.", "25", "ACTIONS_MAX")
    timeout: float = setting(parse_duration, "For one request.", "20s", "ACTIONS_TIMEOUT")
    list_timeout: float = setting(parse_interval, "For the first byte of a long list.", "2m")
    per_day: int = setting(parse_count, "Searches sent to one server a day; 0: no limit.", "200")
    blocklist: bool = setting(parse_bool, "Mark the dead release as failed there, first.", "no")
    unmonitored: bool = setting(parse_bool, "Repair the unmonitored, too.", "yes")

@dataclasses.dataclass(frozen=True)
class CinesyncSettings:
    """Relinking to CineSync's copies."""
    base: str = optional(parse_own_path, "CineSync's own tree of links.",
        "/opt/media/cinesync/CineSync", "CINESYNC_BASE")
    roots: Paths = optional(parse_paths, "Where broken links may be replaced.",
        "/opt/media/tv, /opt/media/movies", "CINESYNC_REPAIR_ROOTS")
    allowed_targets: Paths = optional(parse_paths, "A new target must lie below one of these.",
        "/mnt/remote", "CINESYNC_ALLOWED_TARGET_PREFIXES")
    limit: int = setting(parse_count, "Links tried in one run.", "200", "CINESYNC_LIMIT")

@dataclasses.dataclass(frozen=True)
class VerifySettings:
    """Reading a little of the files behind good links."""
    files: int = setting(parse_count, "So many files in each run; 0: none.", "0", sample="200")
    repair: bool = setting(parse_bool,
        "Have links repaired that failed to be read in 3 passes over a day.", "no")

@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What `run` does of itself."""
    ingest_every: float = setting(parse_duration, "Read the servers when it was longer ago.", "1d")
    report: str = optional(parse_own_path, "Every run writes it anew.", "/volume1/web/report.html")
    time_limit: float = setting(parse_duration,
        "A run begins nothing more after this long; 0 is no limit.", "0", sample="2h")

@dataclasses.dataclass(frozen=True)
class NotifySettings:
    """Who is told about a run."""
    discord: str = secret(parse_url, "Webhook.", "https://...", "DISCORD_WEBHOOK")
    ntfy: str = secret(parse_url, "Topic.", "https://ntfy.sh/topic")
    ntfy_token: str = secret(parse_key, "Access token, where the topic needs one.", "...")
    apprise: str = secret(parse_url, "With its key.", "http://apprise:8000/notify/KEY")
    webhook: str = secret(parse_url, "Gets the run's result as JSON.", "https://...")
    healthchecks: str = secret(parse_url, "Of applied runs.", "https://hc-ping.com/UUID")
    uptime_kuma: str = secret(parse_url, "Likewise.", "https://kuma.example/api/push/TOKEN")
    when: str = setting(parse_choice("changes", "failures", "always"),
        "changes: if a run changed something, failed or was refused; failures; always.", "changes")

@dataclasses.dataclass(frozen=True)
class PlexSettings:
    """Plex is told about the directories that changed."""
    url: str = optional(parse_url, "Its address.", "http://plex:32400")
    token: str = secret(parse_key, "X-Plex-Token, from 'View XML' of any item.", "...")
    path_map: PathMap = optional(parse_map, _MAP_DOC, "/opt/media => /data")

@dataclasses.dataclass(frozen=True)
class JellyfinSettings:
    """Jellyfin or Emby, likewise."""
    url: str = optional(parse_url, "With the base URL, if one is set.", "http://{kind}:8096")
    api_key: str = secret(parse_key, "Dashboard > API Keys.", "...")
    path_map: PathMap = optional(parse_map, _MAP_DOC, "/opt/media => /data")
# fmt: on


class Instance(NamedTuple):
    """A configured Sonarr or Radarr; `name` is 'sonarr_tv' for the section [sonarr tv]."""

    kind: str
    name: str
    settings: InstanceSettings


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that is configured: built once, from file, environment and flags."""

    refresherr: MainSettings = MainSettings()
    scan: ScanSettings = ScanSettings()
    relay: RelaySettings = RelaySettings()
    repair: RepairSettings = RepairSettings()
    cinesync: CinesyncSettings = CinesyncSettings()
    verify: VerifySettings = VerifySettings()
    run: RunSettings = RunSettings()
    notify: NotifySettings = NotifySettings()
    plex: PlexSettings = PlexSettings()
    jellyfin: JellyfinSettings = JellyfinSettings()
    emby: JellyfinSettings = JellyfinSettings()
    instances: Tuple[Instance, ...] = ()
    file: str = ""
    warnings: Tuple[str, ...] = ()
    all_roots: Tuple[str, ...] = ()  # as configured; `scan.roots` may be some of them only


SECTIONS: Dict[str, Type[Any]] = {
    field.name: type(field.default)
    for field in dataclasses.fields(Config)
    if dataclasses.is_dataclass(field.default)
}
INSTANCE_KINDS = ("sonarr", "radarr")
Values = Dict[str, Dict[str, str]]  # {section: {key: text}}


def find_config_file(flag: Optional[str], environ: Mapping[str, str], script: str) -> Optional[str]:
    """Return the config file to read, None without one; one that is named need not exist."""
    named = flag or environ.get("REFRESHERR_CONFIG")
    if named:
        return os.path.abspath(os.path.expanduser(named))
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/"), ".config")
    folders = (os.path.dirname(os.path.abspath(script)), f"{home}/refresherr", "/etc")
    places = [environ.get("CONFIG_FILE") or "", *(f"{f}/refresherr.ini" for f in folders)]
    return next(filter(os.path.isfile, places), None)


def load_config(
    file: Optional[str], environ: Mapping[str, str], flags: Mapping[Tuple[str, str], Any]
) -> Config:
    """Build the Config: flags, {(section, key): value}, over environment, file and defaults."""
    values, warnings = _read_config_file(file) if file else ({}, [])
    warnings += _merge_environment(values, environ)
    parsed = {section: _parse_section(section, texts) for section, texts in sorted(values.items())}
    instances = tuple(
        Instance(section.split()[0], section.replace(" ", "_"), parsed.pop(section))
        for section in [*parsed]
        if section not in SECTIONS
    )
    all_roots = parsed.get("scan", ScanSettings()).roots
    for (section, key), value in flags.items():
        current = parsed.get(section, SECTIONS[section]())
        parsed[section] = dataclasses.replace(current, **{key: value})
    config = Config(instances=instances, file=file or "", warnings=tuple(warnings),
        all_roots=all_roots, **parsed)  # fmt: skip
    _check_config(config)
    return config


def _read_config_file(file: str) -> Tuple[Values, List[str]]:
    # Comments are taken out by us: here, an item of a list may begin as one does.
    parser = configparser.RawConfigParser(default_section="\0", comment_prefixes=())
    try:
        parser.read_file(_without_comments(_read_text("the config file", file).split("\n")), file)
    except configparser.Error as exc:
        # Not its own words: they quote the line, and that may be a key.
        what = "is no 'key = value' below a [section]"
        if isinstance(exc, (configparser.DuplicateSectionError, configparser.DuplicateOptionError)):
            name = " ".join([f"[{exc.section}]", *getattr(exc, "option", "").split()])
            what = f"has {name} a second time"
        errors = getattr(exc, "errors", None) or [(getattr(exc, "lineno", "?"), "")]
        raise UsageError(f"{file}: line {errors[0][0]} {what}") from None
    values: Values = {}
    for title in parser.sections():
        section = _section_name(title, file)
        if section in values:
            raise UsageError(f"{file} has [{section}] a second time")
        values[section] = dict(parser[title])
        for key in values[section]:
            _check_key(section, key, file)
    is_open = os.stat(file).st_mode & 0o077
    fields = ((texts, field) for section, texts in values.items() for field in _fields(section))
    exposed = any(field.metadata["secret"] and texts.get(field.name) for texts, field in fields)
    advice = f"others can read the secrets in {file}; run: chmod 600 {file}"
    return values, [advice] if exposed and is_open else []


def _read_text(what: str, file: str) -> str:
    try:
        with open(file, encoding="utf-8-sig") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", "it is not UTF-8 text; save it as UTF-8")
        raise UsageError(f"cannot read {what} {file}: {reason}") from exc


def _without_comments(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a config file, comments as empty ones.  What begins like a comment, but
    is indented more than the setting above it, belongs to that setting's value.
    """
    level = math.inf  # the indentation of the setting whose value may go on
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if text.startswith(("#", ";")) and indent <= level:
            yield "\n"
            continue
        if text and indent <= level:
            level = math.inf if text.startswith("[") else indent
        yield f"{line}\n"


def _section_name(title: str, where: str) -> str:
    kind, *names = title.lower().split() or [""]
    if (kind in SECTIONS and not names) or (kind in INSTANCE_KINDS and len(names) == 1):
        return " ".join([kind, *names])
    if kind in INSTANCE_KINDS:
        raise UsageError(f"{where}: give the server a one-word name, such as [{kind} main]")
    hint = _nearest(kind, [*SECTIONS, *INSTANCE_KINDS])
    raise UsageError(f"{where}: unknown section [{title}]{hint}")


def _check_key(section: str, key: str, where: str) -> None:
    fields = _fields(section)
    known = [f.name for f in fields] + [f"{f.name}_file" for f in fields if f.metadata["secret"]]
    if key not in known:
        raise UsageError(f"{where}: [{section}] has no setting {key!r}{_nearest(key, known)}")


def _fields(section: str) -> Tuple[Any, ...]:
    return dataclasses.fields(SECTIONS.get(section, InstanceSettings))


def _nearest(word: str, known: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _merge_environment(values: Values, environ: Mapping[str, str]) -> List[str]:
    """Lay the environment over the file's values; return a warning for each odd name of ours."""
    known = ["REFRESHERR_CONFIG"]
    for section in SECTIONS:
        for field in _fields(section):
            known.append(f"refresherr_{section}_{field.name}".replace("_refresherr", "").upper())
            text = environ.get(known[-1]) or environ.get(field.metadata["env"])
            if text:
                is_path = field.metadata["parse"] is parse_own_path  # may be a relative one here
                values.setdefault(section, {})[field.name] = parse_path(text) if is_path else text
                values[section].pop(f"{field.name}_file", None)
    if environ.get("DRYRUN"):
        try:
            dry_run = parse_bool(environ["DRYRUN"])
        except ValueError as exc:
            raise UsageError(f"environment: DRYRUN: {exc}") from exc
        # A dry run that anybody asked for outranks an apply that anybody asked for.
        if dry_run or not environ.get("REFRESHERR_APPLY"):
            values.setdefault("refresherr", {})["apply"] = "no" if dry_run else "yes"
    for name, text in sorted(environ.items()):
        match = re.fullmatch(r"((?:SONARR|RADARR)_.+)_(URL|API)", name)
        if match and text:
            server = values.setdefault(match[1].lower().replace("_", " ", 1), {})
            server["url" if match[2] == "URL" else "api_key"] = text
    odd = sorted(n for n in environ if n.startswith("REFRESHERR_") and n not in known)
    return [
        f"environment: {n} is no setting{_nearest(n, known).partition('; known')[0]}" for n in odd
    ]


def _parse_section(section: str, texts: Mapping[str, str]) -> Any:
    parsed = {}
    for field in _fields(section):
        text, file = texts.get(field.name, ""), texts.get(f"{field.name}_file")
        if file and not text:
            what = f"[{section}] {field.name}_file"
            text = _read_text(what, os.path.expanduser(file.strip())).strip()
        parse = field.metadata["parse"]
        try:
            if re.search(r"\n[#;]" + r"(?!\S)" * (parse is parse_list), text):
                raise ValueError("a comment must begin in the first column of its line")
            if text.strip():
                parsed[field.name] = parse(text)
        except ValueError as exc:
            shown = "" if field.metadata["secret"] else f" ({redact(text.strip())!r})"
            raise UsageError(f"config: [{section}] {field.name}{shown}: {exc}") from exc
    return SECTIONS.get(section, InstanceSettings)(**parsed)


def _check_config(config: Config) -> None:
    for instance in config.instances:
        if not instance.settings.url:
            raise UsageError(f"config: {instance.name} has no url")
    for section, key in (("plex", "token"), ("jellyfin", "api_key"), ("emby", "api_key")):
        server = getattr(config, section)
        if bool(server.url) != bool(getattr(server, key)):
            raise UsageError(f"config: [{section}] needs both url and {key}, or neither")
    if config.notify.ntfy_token and not config.notify.ntfy:
        raise UsageError("config: [notify] has an ntfy_token but no ntfy")
    for root in config.cinesync.roots if config.cinesync.base else ():
        refuse_base(config.cinesync.base, root)


def find_keyless(config: Config) -> List[str]:
    """Return what is to be said of servers without a key."""
    names = (i.name.replace("_", " ", 1) for i in config.instances if not i.settings.api_key)
    return [f"[{name}] has no api_key: the server will refuse every request" for name in names]


def refuse_base(base: str, root: str) -> None:
    """Raise UsageError if CineSync's base lies inside a repair root."""
    if is_under(base, root):
        what = f"config: [cinesync] base {base} lies inside the repair root {root}"
        raise UsageError(f"{what}; Refresherr would repair CineSync's own links")


def config_to_json(config: Config) -> JsonObject:
    """Return the effective settings; every secret shows as '***'."""

    def shown(field: Any, value: Any) -> Any:
        if field.metadata["secret"]:
            return value and "***"
        if field.metadata["parse"] is parse_map:
            return dict(value)
        if field.metadata["parse"] is parse_workers:
            return value or "auto"
        return redact(value) if isinstance(value, str) else value

    tables = {section: getattr(config, section) for section in SECTIONS}
    tables.update({instance.name: instance.settings for instance in config.instances})
    settings = {
        name: {f.name: shown(f, getattr(table, f.name)) for f in dataclasses.fields(table)}
        for name, table in tables.items()
    }
    return {"file": config.file or None, "settings": settings}


def format_setting(parse: Callable[[str], Any], value: Any) -> str:
    """Return a value of `config_to_json` as its parser reads it."""
    if parse is parse_percent:
        return f"{value * 100:g}%"
    if parse in (parse_duration, parse_interval):
        units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
        unit = next((unit for unit in units if value and value % units[unit] == 0), "s")
        return f"{value / units[unit]:g}{unit}"
    if isinstance(value, dict):
        value = [f"{left} => {right}" for left, right in value.items()]
    if isinstance(value, (tuple, list)):
        return ", ".join(value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


_SAMPLE_HEAD = """\
; Refresherr's settings.  Take the # away from what you want to change.
; Durations: 90, 30s, 15m, 6h, 2d.  Lists: one item a line, or with commas.
; In place of a secret, KEY_file names a file that holds it (api_key_file, token_file).
"""


def format_sample_config() -> str:
    """Return a config file with every setting in it, commented out, made from the tables."""
    lines = [_SAMPLE_HEAD]
    titles = list(SECTIONS)
    titles[2:2] = ["sonarr tv", "radarr movies"]
    for title in titles:
        kind, _, folder = title.partition(" ")
        words = {"kind": kind, "folder": folder, "port": 8989 if kind == "sonarr" else 7878}
        lines += [f"; {SECTIONS.get(title, InstanceSettings).__doc__}", f"#[{title}]"]
        for field in _fields(title):
            sample = field.metadata["sample"].format(**words).replace("\n", "\n#    ")
            lines.append(f"; {field.metadata['doc']}")
            lines.append(f"#{field.name} = {sample}".replace("= \n", "=\n"))
        lines.append("")
    return "\n".join(lines)


_NOT_LIBRARY = (
    r"@eaDir|#recycle|#snapshot|\.snapshots|\.zfs|@Recycle|@Recently-Snapshot|\.Trash-.*|"
    r"lost\+found|\.stfolder|\.stversions"
)


class Ignore:
    """What a scan skips: substrings of the path, globs on the name, with `defaults` a NAS's own."""

    def __init__(self, patterns: Sequence[str], defaults: bool) -> None:
        import fnmatch

        globs = [p for p in patterns if re.search(r"[*?[]", p)]
        self._long = [p for p in patterns if p not in globs and "/" in p]
        short = [re.escape(p) for p in patterns if p not in globs and "/" not in p]
        whole = [fnmatch.translate(glob) for glob in globs] + [_NOT_LIBRARY] * defaults
        self._substring = re.compile("|".join(short)).search if short else None
        self._glob = re.compile("|".join(whole), re.DOTALL).fullmatch if whole else None
        self.active = bool(patterns) or defaults

    def matcher(self, directory: str) -> Optional[Callable[[str], Any]]:
        """Return what tells whether a name in a directory is to be skipped, None if none is."""
        if self._long or self._substring:
            return functools.partial(self.matches, directory)
        return self._glob

    def matches(self, directory: str, name: str) -> bool:
        """Tell whether an entry of a directory that is not ignored itself is to be skipped."""
        if (self._substring and self._substring(name)) or (self._glob and self._glob(name)):
            return True
        path = f"{directory}/{name}/"
        return any(path.find(p, max(0, len(directory) + 2 - len(p))) >= 0 for p in self._long)

    def matches_beneath(self, root: str, path: str) -> bool:
        """Tell whether `path`, or any directory between it and `root`, is to be skipped."""
        top = root.rstrip("/") or "/"
        steps = itertools.takewhile(lambda step: step != top, ancestors(path))
        return any(self.matches(*step.rpartition("/")[::2]) for step in steps)


# ---------------------------------------------------------------------------------------------
# Mounts
# ---------------------------------------------------------------------------------------------

# WAL needs shared memory between all processes of one host (sqlite.org/wal.html); these are, or
# may be, shared with another host, and trying WAL does not tell.
_NETWORK_TYPES = r"nfs\d*|cifs|smb\w*|9p|fuse\..*|afs|ceph|lustre|gfs2?|ocfs2|davfs|glusterfs"


def is_network_type(fs_type: str) -> bool:
    """Tell whether a file system type is remote: slow to ask, unsafe for WAL."""
    return re.fullmatch(_NETWORK_TYPES, fs_type) is not None


def parse_mountinfo(text: str, identity: bool = False) -> Dict[str, str]:
    """Return {mount point: file system type} from /proc/self/mountinfo (proc(5), 3.5).

    Of several on one point the last is the visible one.  With `identity` the values are mount and
    device numbers, which differ after a remount.
    """
    mounts = {}
    for line in re.finditer(r"(?m)^(\S+) \S+ (\S+) \S+ (\S+) .*? - (\S+) ", text):
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line[3])
        mounts[point] = f"{line[1]} {line[2]}" if identity else line[4]
    return mounts


def _read_mountinfo() -> str:
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as stream:
        return os.fsdecode(stream.read())
    return ""


def read_mounts(identity: bool = False) -> Dict[str, str]:
    """Return `parse_mountinfo` of this process; {'/': 'unknown'} without procfs."""
    # A chroot whose root is no mount point has no line for it.
    return {"/": "unknown", **parse_mountinfo(_read_mountinfo(), identity)}


def read_overlay_branches(point: str) -> List[str]:
    """Return the directories that an overlay is made of, as far as mountinfo names them."""
    lines = [x for x in _read_mountinfo().splitlines() if parse_mountinfo(x) == {point: "overlay"}]
    found = ":".join(re.findall(r"(?:lowerdir|upperdir)=([^,]*)", lines[-1] if lines else ""))
    return [path for path in found.split(":") if path.startswith("/")]


_CURES = {  # what a reason says: what to do about it
    "Permission denied|not permitted": "let this user in (chmod, chown); a FUSE mount that another "
        "user made needs the option allow_other",
    "not connected|caused connection abort": "what serves that mount has died: start it again; in "
        "a container, map the directory above it with rslave and restart the container",
    "Stale": "mount it again",
    "Input/output error": "its backend fails: look at the log of what serves it, such as rclone",
    "answer": "what serves it hangs or is slow: restart it",
    "not exist|empty|is mounted there|not mounted|absent|No such file|no longer": "mount it; in a "
        "container, map the directory above it with rslave and restart the container",
}  # fmt: skip


def how_to_mend(reason: str) -> str:
    """Return what to do about a mount or directory that cannot be read for this reason."""
    found = (cure for words, cure in _CURES.items() if re.search(words, reason))
    return next(found, "look at that place; the next scan judges again")


def watch_mounts() -> Callable[[], bool]:
    """Return what tells whether anything was mounted or unmounted from now on, by proc(5)."""
    poll = select.poll()
    with contextlib.suppress(OSError):
        descriptor = os.open("/proc/self/mounts", os.O_RDONLY | os.O_CLOEXEC)
        poll.register(descriptor, select.POLLERR | select.POLLPRI)
    return lambda: bool(poll.poll(0))


# ---------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------

# Repetitions here are bounded or anchored: the worst of names takes linear time.
# fmt: off
VIDEO_EXTENSIONS = frozenset((
    ".3gp", ".asf", ".avi", ".divx", ".flv", ".m2ts", ".m4v", ".mk3d", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".mts", ".ogm", ".ogv", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".wtv"))
_EXTENSION = re.compile(r"\.[A-Za-z]\w{1,3}$")
_SEASON_EPISODE = re.compile(  # S01E01, Season 1 Episode 1; and then E02, -E03, -03, .S01E02
    r"(?i)(?<![a-z0-9])s(?:(?:eason|eries)[ ._-]{1,3})?(\d{1,4})[ ._,-]{0,3}"
    r"e(?:p(?:isode)?[ ._-]{0,3})?(\d{1,4})"
    r"((?:[-+&~]?(?:s\d{1,4})?ep?\d{1,4}|[ ._]{1,3}[-+&]?[ ._]{0,3}(?:s\d{1,4}[ ._]?)?ep?\d{2,4}"
    r"|[-+&~]\d{1,3}(?![\da-z]|\.\d(?!\d)))*)(?!\d)")
_CROSS_EPISODE = re.compile(  # 1x01, 1x01-1x03; but neither DDP5.1x264 nor the film 10x10 (2018)
    r"(?i)(?<![a-z0-9])(\d{1,2})x(?!26[45])(\d{2,3})(?![ ._(]{1,2}(?:19|20)\d\d(?!\d))"
    r"((?:[ ._]{0,3}-?[ ._]{0,3}\1x\d{2,3}|-?x\d{2,3}|[-_]\d{2,3}(?![\da-z]))*)(?![\da-uw-z]|v\D)")
_LONE_EPISODE = re.compile(  # E01, Ep. 1, Episode 1
    r"(?i)(?<![a-z0-9])()e(?:p(?:isode)?[ ._-]{0,3})?(\d{1,4})((?:-?e\d{1,4})*)(?![\da-z])")
_MORE_EPISODES = re.compile(
    r"(?i)([-~]?)[ ._]*[-+&]?[ ._]*(?:(?:s?(\d{1,4}))?[ ._]?[ex]p?)?(\d{1,4})")
_BEHIND_NUMBER = re.compile(  # what belongs to it: E01b, E11.5 (not 1.23.45), E1.E2, E01 and 2
    r"(?i)(?!v\d)[^\W\d_]|[\xbc-\xbe]|[.,]\d(?!\d|(?:\.\d\d){2}(?!\d))|(?:\.\.|[,;\u2010-\u2015])e?\d|"
    r"[ ._]{0,4}[+&~/][ ._]{0,4}\d|"
    r"[ ._,]*-?[ ._]{0,4}(?:s\d{1,4}[ ._-]?)?ep?[ ._]?\d|-\d{1,3}(?![\da-z]|\.\d)|"
    r"[ ._]{1,4}(?:and|et|und|to|till|bis|à|au|al|[aey-])[ ._]{1,4}(?:s\d{1,4})?ep?[ ._]?\d|"
    r"[ ._]{1,4}(?:and|et|und|to|till|bis|à|au|al|och|og|tot|plus)[ ._]{1,4}(?:episode[ ._]?)?\d|"
    r"[ ._]{1,4}[aey][ ._]{1,4}0\d(?!\d)")
_BEFORE_NUMBER = re.compile(  # E00 and S14E01, 2x9-2x10
    r"(?i)(?<![^\W_])(?:(?:s\d{1,4})?ep?[ ._]?|\d{1,2}x)\d{1,4}[ ._]{0,4}"
    r"(?:[-+&~,/]|and|et|und|to|bis|à|au?)?[ ._]{0,4}$")
_LIKE_NUMBER = re.compile(  # 1x1, 1x01b, 01-02, S01E, SE01, 1of6, SP1
    r"(?i)(?<![^\W_])(?:(?:\d{1,2}x\d{1,3}[a-d]?|\d\d[-~+&]\d\d)(?![\da-z])|s\d{1,4}[ ._-]?e|se\d|"
    r"e(?:p(?:isode)?[ ._-]?)?\d|(?:sp|ova|oad)[ ._]?\d{0,2}(?![^\W_])|\d{1,2}[ ._]?of[ ._]?\d)")
_ABSOLUTE = re.compile(  # Show - 012, or all of a name up to a dash or bracket: 012 - Title
    r"(?i)(?:[ _]-[ _]#?|^(?=\d+(?:[ _]-[ _]| ?[(\[]|$)))(\d{1,4})(?:v\d)?(?![\da-z])")
_BARE_NUMBER = re.compile(r"(?<=[^\W\d_])[ _.]#?(\d{1,4})(?:v\d)?(?=[ _.]*(?:$|[\[(]))")  # Show 12
_NUMBERED = re.compile(r" - (\d{3,4})(?= - |$)")  # and behind S01E12, as Sonarr writes it
_DATE = re.compile(  # 2024-01-31, 31.01.2024; but not 05.01.2024, which may be in May
    r"(?<!\d)(?:((?:19|20)\d\d)([ ._-])(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])|"
    r"(1[3-9]|2\d|3[01])([._-])(0[1-9]|1[0-2])\6((?:19|20)\d\d))(?!\d)")
_SEASON_FOLDER = re.compile(
    r"(?i)(?:season|series|staffel|saison|temporada|stagione|seizoen|sezon|sesong|säsong|sæson|"
    r"kausi|сезон|s)[ ._-]*(\d{1,4})(?: *[(\[{].*| - [^()]+)?|第 ?(\d{1,4}) ?季|specials?|spéciaux")
_PACK = re.compile(r"(?i)[ ._(\[-]{1,3}(?:s|season[ ._-]?)(\d{1,4})(?![a-z0-9])")
_EXTRA = re.compile(  # by its folder, if that is no show of this name, or its end
    r"(?i)/(behind the scenes|bonus[^/]*|deleted scenes|extras|featurettes|interviews|samples?|"
    r"scenes|shorts|special features|trailers)/(?!\1)[^/]*$|"
    r"-(?:behindthescenes|deleted|featurette|interview|trailer)$")
_BESIDE = re.compile(  # half of it; extras, some of which are names of episodes, too
    r"(?i)(?<![^\W_])(?:(?P<half>samples?|(?:cd|dis[ck]|dvd(?=[ ._-]?[1-4]))[ ._-]?\d{1,2}"
    r"(?:[ ._]?of[ ._]?\d+)?|\d{1,2}[ ._]?of[ ._]?\d{1,2})|(?P<name>(?<![+&] )extras?|bonus|"
    r"interviews?|trailers?|teasers?|promos?|previews?|supplements?|menu|clips?|scenes?|x\d\d)|"
    r"making[ ._-]?of|behind[ ._-]?the[ ._-]?scenes|deleted[ ._-]?scenes?|featurettes?|bloopers?|"
    r"(?:gag|b)[ ._-]?(?:reel|roll)|outtakes?|special[ ._-]features?|screen[ ._-]?tests?|"
    r"(?:nc|creditless[ ._-]?)(?:op|ed)\d*)(?![^\W_])")
_PART = re.compile(  # Part 2, pt2, (2)
    r"(?i)(?<![^\W_])(?:part[ei]?e?|pt|teil|(?P<title>vol(?:ume)?|chapter))(?P<gap>[ ._-]*)"
    r"(\d{1,2}|[ivx]{1,4}|one|two|three|four|five|six)(?![^\W_])|[ ._]\((\d)\)")
_BEHIND_YEAR = re.compile(
    r"(?i)(?:19|20)\d\d[)\]]?[ ._-]{1,4}#?(\d{1,3})(?:v\d)?(?![\da-z]|[.,]\d)")
_SECOND_CROSS = re.compile(r"(?i)(?<![^\W_])\d{1,2}x\d{1,3}(?![\da-z])")
_PART_NUMBERS = {word: number
    for words in ("i ii iii iv v vi vii viii ix x", "one two three four five six")
    for number, word in enumerate(words.split(), 1)}
_ID = re.compile(r"(?i)\b(?:(tmdb|tvdb)(?:id)?[-=:]([1-9]\d*)|(?:imdb(?:id)?[-=:])?(tt\d{5,}))\b")
_PIXELS = re.compile(
    r"(?i)(?<!\d)(2160|1080|720|576|480)[pi](?![a-z])|\b(3840|1920|1280)x\d|\dx(1080|720|576|480)\b")
_UHD = re.compile(r"(?i)(?<![a-z0-9])(4k|uhd|ultrahd)(?:remux|movies|shows)*(?![a-z0-9])")
_HEIGHTS = {"4k": 2160, "uhd": 2160, "ultrahd": 2160, "3840": 2160, "1920": 1080, "1280": 720,
    "480": 480, "576": 576, "720": 720}
_TAGS = re.compile(  # [REC] is a film
    r"(?i)\{[^{}]*\}|\[(?!rec\]|(?:19|20)\d\d\])[^\[\]]*\]|^www\.[^ -]+(?: *- *| +)")
_BRACKETED_YEAR = re.compile(r"[(\[]((?:18|19|20)\d\d)(?: ?[-\u2013] ?(?:\d{4})?)?[)\]]")
_BARE_YEAR = re.compile(r"\b(?<!\d\d[ ._-]\d\d[ ._-])((?:189|19\d|20[0-3])\d)\b")  # not 2049
_RELEASE = re.compile(  # where a release's name goes on after the title
    r"(?i)(?<=[ ([-])(?:\d{3,4}(?:[pi]|x\d{3,4})|4k|uhd|blu-?ray|remux|(?:b[dr]|hd|web|dvd)-?rip|"
    r"web-?dl|[hps]dtv|dvd(?:scr|r|\d)|[xh][ .]?26[45]|hevc|xvid|extended|remastered|unrated)"
    r"(?![a-z0-9])")
_ARTICLE = re.compile(r"^(.+), (the|an?)$")
_LETTERS = str.maketrans({
    "ø": "o", "ł": "l", "đ": "d", "ð": "d", "æ": "ae", "œ": "oe", "þ": "th", "\u0131": "i",
    "²": " 2", "³": " 3", "½": " 1 2", "&": " and ", "*": "x"})
_MARKS = re.compile("(?<=[a-z\u03b1-\u03c9\u0435])[\u0300-\u036f]+")  # not й, が or विराम
_DROPPED = re.compile("['`\u2018\u2019\u02bc\xb4]|(?<!!)!(?!!)")
_SEPARATORS = re.compile(
    r"(?!^\+)[\s_.,:;?/\\|()\[\]{}<>\"\xa1\xab\xb7\xbb\xbf~=^+\u2010-\u2027\u3001-\u303f\u30fb-]+")
_INITIALS = re.compile(r"\b[^\W\d_](?: [^\W\d_]\b){2,}")  # S.W.A.T.; but I.T. is not It
# fmt: on


class Work(NamedTuple):
    """What a path says of its content."""

    kind: str  # 'episode', 'movie' or 'other'
    title: str  # as written, without year and tags
    year: Optional[int]
    ids: Mapping[str, str]  # 'tmdb', 'tvdb', 'imdb'; of the title's folder and what is below it
    season: Optional[int]
    episodes: Tuple[int, ...]  # none where the path tells an absolute number or the date
    date: str  # of a daily episode: '2024-01-31', otherwise ''
    resolution: int  # the height; 0 if not told
    number: Tuple[str, int] = ("", 0)  # an absolute number, behind the title in front of it
    part: Tuple[int, bool] = (0, False)  # of an episode, and whether it is less than the episode
    path: str = ""  # of an item of CineSync's


class Media(NamedTuple):
    """What people are told of it."""

    kind: str
    name: str  # 'Title (Year)', or 'Title' without a year
    season: Optional[int]
    episodes: Tuple[int, ...]


def is_video(name: str) -> bool:
    """Tell by its extension whether a file is a video."""
    return os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS


def parse_media(path: str) -> Media:
    """Return what the folders and the name of a link say, in short."""
    work = parse_work(path)
    name = f"{work.title} ({work.year})" if work.year else work.title
    return Media(work.kind, name, work.season, work.episodes)


def parse_work(path: str) -> Work:
    """Return what the folders and the name of a link say about its content."""
    names = ["", "", "", *path.split("/")]
    stem = _EXTENSION.sub("", names[-1])
    season, pack = parse_season_folder(names[-2]), _PACK.search(names[-2])
    level = 1 if season is not None else 0 if parse_season_folder(names[-3]) is None else 2
    if pack and _parse_title(names[-2][: pack.start()])[0] == _parse_title(names[-3])[0]:
        level, season = 1, int(pack[1])  # Show (2019)/Show - Season 01
    folder, tail = names[-2 - level], "/".join(names[-2 - level :])
    ids = {m[1].lower() if m[1] else "imdb": m[2] or m[3].lower() for m in _ID.finditer(tail)}

    number = _SEASON_EPISODE.search(stem) or _CROSS_EPISODE.search(stem)
    lone = None if number else _LONE_EPISODE.search(stem)
    number = number if season is None else number or lone
    daily = None if number else _DATE.search(stem)
    told = number or daily
    title, year, certain = _parse_title(folder)
    if not (level or certain or _ID.search(folder)):
        own = _parse_title(stem[: told.start()] if told else stem)
        if own[0] and (told or own[1] or not year):
            title, year, _ = own

    heights = (_PIXELS.search(name) or _UHD.search(name) for name in reversed(names))
    height = next((match[match.lastindex or 0].lower() for match in heights if match), "0")
    resolution, sports = _HEIGHTS.get(height) or int(height), "/sports/" in path.lower()
    extra = _EXTRA.search(f"/{names[-2]}/{stem}") or (
        told and _is_extra(stem, title, told, int(number[1] or 1) if number else None)
    )
    if extra or not (told or (season is not None and not sports)):
        alone = lone or _ABSOLUTE.search(stem)  # an episode's number, unless a year follows
        absolute = alone and alone[1] != title and not _BARE_YEAR.search(stem, alone.start())
        is_movie = (year or ids.keys() & {"tmdb", "imdb"}) and not (extra or level or sports)
        is_movie = is_movie and not absolute and not is_no_film(path, title, year)
        return Work("movie" if is_movie else "other", title, year, ids, None, (), "", resolution)
    season = int(number[1]) if number and number[1] else season
    episodes: Tuple[int, ...] = ()
    date, part = "", (0, False)
    if told and _is_clear(stem, told) and not (lone and season != 1):
        if not _has_other_year(stem[: told.start()], title, year):
            episodes = _read_episodes(season, number[2], number[3]) if number else ()
            date = "" if number else "-".join(told.group(*((1, 3, 4) if told[1] else (8, 7, 5))))
        part = _read_part(stem[told.end() :], *episodes[:1])
    numbers = _read_absolute(stem, told), part
    return Work("episode", title, year, ids, season, episodes, date, resolution, *numbers)


def _is_extra(stem: str, title: str, told: Any, season: Optional[int]) -> bool:
    """Tell whether the name of an episode says sample, half of it, or extra."""
    words = set(normalise_title(title).split())
    for match in _BESIDE.finditer(stem):
        behind = not told or not stem[told.end() : match.start()].strip(" ._-([")
        is_meant = match["half"] or (season != 0 and (behind or not match["name"]))
        if is_meant and not words.issuperset(normalise_title(match[0]).split()):
            return True
    return False


def is_no_film(path: str, title: str, year: Optional[int]) -> bool:
    """Tell whether the name of a file, or its folder's, denies that it is all of this film."""
    folder, name = ("/" + path).rsplit("/", 2)[-2:]
    stem, words = _EXTENSION.sub("", name), set(normalise_title(title).split())
    parts = {_part_number(match) for match in _PART.finditer(title)}
    for text in (stem, folder):
        beside = (normalise_title(match[0]).split() for match in _BESIDE.finditer(text))
        others = {_part_number(match) for match in _PART.finditer(text)} - parts
        if others or not all(map(words.issuperset, beside)):
            return True
    numbers = [n for n in normalise_title(_parse_title(stem)[0]).split()[-1:] if n.isdecimal()]
    numbers += [match[1] for match in _BEHIND_YEAR.finditer(stem) if match[1] not in _HEIGHTS]
    dated = stem if _BARE_YEAR.search(stem.replace("_", " ")) else folder
    return not words.issuperset(numbers) or _has_other_year(dated, title, year)


def _has_other_year(text: str, title: str, year: Optional[int]) -> bool:
    words = normalise_title(title).split()
    years = {y for y in _BARE_YEAR.findall(text.replace("_", " ")) if y not in words}
    return bool(year and years) and str(year) not in years


def _is_clear(stem: str, told: Any) -> bool:
    """Tell whether nothing beside the number of an episode, or its date, belongs to it."""
    rest = f"{stem[: told.start()]} {stem[told.end() :]}"
    if _BEHIND_NUMBER.match(stem, told.end()) or _BEFORE_NUMBER.search(stem[: told.start()]):
        return False
    return not (_SEASON_EPISODE.search(rest) or _SECOND_CROSS.search(rest))


def _read_part(tail: str, episode: int = 0) -> Tuple[int, bool]:
    """Return the part that is told behind an episode's number, and whether it is but a part."""
    match = _PART.search(tail)
    if not match or match["title"]:
        return 0, False
    near, number = not tail[: match.start()].strip(" ._-(["), _part_number(match)
    return number, near and (not match["gap"] or number != episode)


def _part_number(match: Any) -> int:
    digits = (match[3] or match[4]).lower()
    return _PART_NUMBERS.get(digits) or (int(digits) if digits.isdecimal() else 0)


def _read_absolute(stem: str, told: Any) -> Tuple[str, int]:
    """Return an absolute number, 'Show - 012' or 'Show 12', and the title in front of it."""
    match = _NUMBERED.match(stem, told.end()) if told else _ABSOLUTE.search(stem)
    match = match or (None if told else _BARE_NUMBER.search(stem))
    if not match or _BEHIND_NUMBER.match(stem, match.end()):
        return "", 0
    before = stem[: (told or match).start()]
    return normalise_title(_parse_title(before)[0]), int(match[1])


def parse_season_folder(name: str) -> Optional[int]:
    """Return the season that a folder's name stands for, None if it is no season folder."""
    match = _SEASON_FOLDER.fullmatch(name)
    return int(match[1] or match[2] or 0) if match else None


def title_folder(path: str) -> str:
    """Return the show's or movie's folder that a link lies in: its own, less a season folder."""
    folder, _, name = path.rpartition("/")[0].rpartition("/")
    return folder if parse_season_folder(name) is not None else f"{folder}/{name}"


@functools.lru_cache(maxsize=4096)
def normalise_title(title: str) -> str:
    """Return what stays of a title when CineSync, Sonarr or the scene write it into a name."""
    text = _ARTICLE.sub(r"\2 \1", title.casefold().translate(_LETTERS))
    text = _MARKS.sub("", unicodedata.normalize("NFKD", text))
    text = _DROPPED.sub("", unicodedata.normalize("NFC", text))
    text = _SEPARATORS.sub(" ", text).strip()
    return _INITIALS.sub(lambda match: match[0].replace(" ", ""), text) or title.casefold()


@functools.lru_cache(maxsize=1024)  # neighbours share their folders
def _parse_title(name: str) -> Tuple[str, Optional[int], bool]:
    """Return a folder's or release's title, its year, and whether it is in brackets."""
    bare = _TAGS.sub(" ", name).strip()
    bare = bare.replace("_", " ") if " " in bare else bare.replace("_", " ").replace(".", " ")
    bare = " ".join(bare.split()).lstrip("- ") or name
    bracketed = list(_BRACKETED_YEAR.finditer(bare, 1))
    # A bracketed year ends the title, whatever words stand before it.
    cut = _RELEASE.search(bare, bracketed[0].end() if bracketed else 1)
    end = cut.start() if cut else len(bare)
    years = bracketed or list(_BARE_YEAR.finditer(bare, 2))
    years = [match for match in years if match.start() < end] or years[:1]  # last: 2012 (2009)
    text = bare[: min(end, years[-1].start()) if years else end]
    inner = _RELEASE.search(text, 1)
    if inner and text[inner.start() - 1] in "([":
        text = text[: inner.start() - 1]
    if text.count("(") > text.count(")"):
        text = text[: text.rindex("(")]
    certain = bool(bracketed) and len(bracketed[-1][0]) == 6  # a range may be a collection's
    return text.rstrip(" -([") or bare, int(years[-1][1]) if years else None, certain


def _read_episodes(season: Optional[int], first: str, more: str) -> Tuple[int, ...]:
    """Return the episodes of 'E01', 'E01E02' (both) and 'E01-E03' (all three)."""
    numbers = [int(first)]
    for dash, other, digits in _MORE_EPISODES.findall(more):
        if int(digits) <= numbers[-1] or (other and int(other) != season):
            return ()  # it falls, or goes on in another season
        start = numbers[-1] + 1 if dash and int(digits) - numbers[-1] <= 200 else int(digits)
        numbers += range(start, int(digits) + 1)
    return tuple(numbers)


# ---------------------------------------------------------------------------------------------
# Database
# ---------------------------------------------------------------------------------------------

BUSY_TIMEOUT = 60.0  # seconds a writer waits for another before "database is locked"
_LOOKUP = 500  # paths in one SELECT; SQLite before 3.32 binds 999 parameters at the most

_START_ANEW = "restore a backup, or start anew with `db nuke --yes`"
_write_lock, _create_lock = threading.Lock(), threading.Lock()

_V1_TABLES = """
CREATE TABLE schema_version (id INTEGER PRIMARY KEY, version INTEGER, applied_utc TEXT);
CREATE TABLE symlinks (path TEXT PRIMARY KEY, last_target TEXT, status TEXT, last_status TEXT,
    first_seen_utc TEXT, last_seen_utc TEXT);
CREATE TABLE actions (id INTEGER PRIMARY KEY, url TEXT, status TEXT, reason TEXT,
    related_path TEXT, created_utc TEXT, fired_utc TEXT, last_error TEXT);
CREATE INDEX idx_actions_status ON actions(status);
CREATE INDEX idx_actions_related_path ON actions(related_path);
CREATE TABLE movies (id INTEGER PRIMARY KEY, instance TEXT, radarr_id INTEGER, title TEXT,
    year INTEGER, imdb_id TEXT, tmdb_id INTEGER, monitored INTEGER, added_utc TEXT,
    poster_url TEXT, fanart_url TEXT);
CREATE INDEX ix_movies_instance ON movies(instance);
CREATE UNIQUE INDEX uq_movies_instance_radarr ON movies(instance, radarr_id);
CREATE TABLE movie_files (id INTEGER PRIMARY KEY, instance TEXT, radarr_movie_id INTEGER,
    radarr_file_id INTEGER, quality TEXT, resolution INTEGER, video_codec TEXT, audio_codec TEXT,
    size_bytes INTEGER, original_path TEXT, symlink_path TEXT);
CREATE INDEX ix_movie_files_inst_mid ON movie_files(instance, radarr_movie_id);
CREATE TABLE series (id INTEGER PRIMARY KEY, instance TEXT, sonarr_id INTEGER, title TEXT,
    imdb_id TEXT, tvdb_id INTEGER, tmdb_id INTEGER, monitored INTEGER, poster_url TEXT,
    fanart_url TEXT);
CREATE INDEX ix_series_instance ON series(instance);
CREATE UNIQUE INDEX uq_series_instance_sid ON series(instance, sonarr_id);
CREATE TABLE episode_files (id INTEGER PRIMARY KEY, instance TEXT, sonarr_series_id INTEGER,
    sonarr_file_id INTEGER, season_number INTEGER, quality TEXT, resolution INTEGER,
    release_group TEXT, size_bytes INTEGER, original_path TEXT, symlink_path TEXT);
CREATE INDEX ix_episode_files_inst_sid ON episode_files(instance, sonarr_series_id);
CREATE TABLE events (id INTEGER PRIMARY KEY, ts INTEGER, path TEXT, target TEXT, kind TEXT,
    name TEXT, action TEXT, status TEXT);
CREATE TABLE cinesync_items (id INTEGER PRIMARY KEY, tmdb_id INTEGER, show_title TEXT,
    show_norm TEXT, year INTEGER, season INTEGER, episode INTEGER, path TEXT UNIQUE,
    target_ok INTEGER, resolution_rank INTEGER, first_seen_utc INTEGER, last_seen_utc INTEGER);
CREATE TABLE cinesync_runs (run_id INTEGER PRIMARY KEY, started_utc INTEGER, finished_utc INTEGER,
    dry_run INTEGER, repair_roots TEXT, cinesync_base TEXT, allowed_prefixes TEXT,
    indexed_count INTEGER, checked_broken INTEGER, candidate_found INTEGER,
    resolved_target_ok INTEGER, replaced INTEGER, skipped INTEGER, errors INTEGER)
"""

# runs.summary is the JSON of the command's result; finished_utc and exit_code stay NULL while it
# runs, and for ever if it was killed.  link_changes is the journal: a row stands there, 'planned',
# before a link is touched; then 'done', 'removed' or 'failed', later perhaps 'undone'.
_V3_CHANGES = """
ALTER TABLE symlinks ADD COLUMN broken_since_utc TEXT;
ALTER TABLE symlinks ADD COLUMN error TEXT;
ALTER TABLE actions ADD COLUMN attempts INTEGER DEFAULT 0;
ALTER TABLE actions ADD COLUMN next_attempt_utc TEXT;
ALTER TABLE actions ADD COLUMN progress TEXT;
CREATE TABLE runs (run_id INTEGER PRIMARY KEY, command TEXT NOT NULL, started_utc TEXT NOT NULL,
    finished_utc TEXT, exit_code INTEGER, summary TEXT);
CREATE TABLE mounts (mount_point TEXT PRIMARY KEY, fs_type TEXT NOT NULL,
    good_targets INTEGER NOT NULL, first_seen_utc TEXT NOT NULL, last_seen_utc TEXT NOT NULL);
CREATE TABLE link_changes (change_id INTEGER PRIMARY KEY, run_id INTEGER NOT NULL,
    path TEXT NOT NULL, old_target TEXT NOT NULL, new_target TEXT NOT NULL, state TEXT NOT NULL,
    changed_utc TEXT NOT NULL, reason TEXT);
CREATE INDEX ix_link_changes_run ON link_changes(run_id);
CREATE INDEX ix_symlinks_not_ok ON symlinks(status, path) WHERE status <> 'ok';
CREATE INDEX ix_events_ts ON events(ts);
UPDATE symlinks SET broken_since_utc = coalesce(last_seen_utc, first_seen_utc, now())
    WHERE coalesce(status, last_status) IN ('broken', 'repairing');
UPDATE actions SET url = strip_secrets(url) WHERE url <> '';
UPDATE actions SET reason = redact(reason) WHERE reason <> '';
UPDATE actions SET last_error = redact(last_error) WHERE last_error <> ''
"""

# directories: what a scan knows of each library directory; it need not be read where `mark` fits.
# doubts: lost links that a defence holds.  `goal` is where the file should be, `missing` the first
#   name on the way that does not exist.  What the loss guard holds belongs to one of the lots.
# branches: the parts of a union (mergerfs, overlay), which hides it when one of them fails.
# losses: every link that was judged broken, and when it came back, for `patience`;
#   `gone_since_utc` starts anew when a scan could not tell.
# notes: single facts that outlive a run, by name.
# What the guard of version 3 held remains held: each of its directories becomes a lot, with rather
#   too many titles than too few, which would be let go.
_V4_LATE = """ALTER TABLE symlinks ADD COLUMN unreadable_since_utc TEXT;
ALTER TABLE symlinks ADD COLUMN read_failures INTEGER"""  # early databases of version 4 lack them
_V4_CHANGES = f"""{_V4_LATE};
ALTER TABLE symlinks ADD COLUMN read_utc TEXT;
ALTER TABLE symlinks ADD COLUMN read_error TEXT;
ALTER TABLE series ADD COLUMN year INTEGER;
ALTER TABLE series ADD COLUMN tags TEXT;
ALTER TABLE movies ADD COLUMN tags TEXT;
CREATE TABLE directories (path TEXT PRIMARY KEY, mark TEXT, links INTEGER NOT NULL, targets BLOB);
CREATE TABLE doubts (path TEXT PRIMARY KEY, defence TEXT NOT NULL, title TEXT NOT NULL,
    goal TEXT NOT NULL, missing TEXT NOT NULL, mount_point TEXT NOT NULL, lot_id INTEGER,
    since_utc TEXT NOT NULL);
CREATE TABLE lots (lot_id INTEGER PRIMARY KEY, directory TEXT NOT NULL, links INTEGER NOT NULL,
    titles INTEGER NOT NULL, since_utc TEXT NOT NULL);
CREATE TABLE branches (union_point TEXT NOT NULL, path TEXT NOT NULL, mount_point TEXT NOT NULL,
    fs_type TEXT NOT NULL, PRIMARY KEY (union_point, path));
CREATE TABLE losses (loss_id INTEGER PRIMARY KEY, path TEXT NOT NULL, target TEXT NOT NULL,
    title TEXT NOT NULL, mount_point TEXT NOT NULL, lost_utc TEXT NOT NULL, gone_since_utc TEXT,
    back_utc TEXT, came_back_by_itself INTEGER NOT NULL DEFAULT 0);
CREATE INDEX ix_losses_path ON losses(path);
CREATE INDEX ix_losses_mount ON losses(mount_point, lost_utc);
CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT);
CREATE INDEX ix_movie_files_path ON movie_files(original_path, instance);
CREATE INDEX ix_episode_files_path ON episode_files(original_path, instance);
INSERT INTO lots (directory, links, titles, since_utc)
    SELECT substr(error, 39), count(*), count(*), now() FROM symlinks WHERE status = 'unreachable'
    AND error LIKE 'held back by the mass-breakage guard: %' GROUP BY error;
INSERT INTO doubts SELECT path, 'guard', path, coalesce(last_target, ''),
    coalesce(last_target, ''), '/', lot_id, now() FROM symlinks JOIN lots
    ON error = 'held back by the mass-breakage guard: ' || directory WHERE status = 'unreachable'
"""
MIGRATIONS = {
    1: _V1_TABLES,
    2: "",  # the container edition's: its own tables are none of our business
    3: f"{_V1_TABLES};\n{_V3_CHANGES}",  # the container edition makes some tables when needed
    4: _V4_CHANGES,
}


def default_db_path() -> str:
    """Return the schema document's location: $DATA_DIR/symlinks.db, /data without it."""
    return os.path.join(os.environ.get("DATA_DIR") or "/data", "symlinks.db")


def to_db(text: str) -> Union[str, bytes]:
    """Return `text` as SQLite can hold it: a name that is not UTF-8 goes in as its bytes."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        # Lone surrogates: of a file name they stand for bytes, of a server's JSON for nothing.
        with contextlib.suppress(UnicodeEncodeError):
            return os.fsencode(text)
        return text.encode("utf-8", "surrogatepass")


def from_db(value: Union[str, bytes, None]) -> str:
    """Return the text that `to_db` was given; '' for NULL."""
    return os.fsdecode(value) if isinstance(value, bytes) else value or ""


def _advise_access(path: str) -> str:
    """Return how this user gets at the files of the database; those of the WAL come and go."""
    folder = os.path.dirname(os.path.abspath(path))
    for name in (folder, path, f"{path}-wal", f"{path}-shm", f"{path}.lock"):
        wanted = os.R_OK | os.W_OK | (os.X_OK if name == folder else 0)
        with contextlib.suppress(OSError):
            if os.access(name, wanted):
                continue
            status = os.stat(name)  # it is there
            if os.statvfs(name).f_flag & os.ST_RDONLY:
                return "its file system is read-only; name another place with --data-dir DIR"
            if status.st_uid == os.geteuid():
                return f"run: chmod u+rwX {shell_quote(name)}"
            if name != folder or status.st_mode & 0o077 == 0:
                what = f"-R {shell_quote(folder)}" if name == folder else f"{shell_quote(path)}*"
                cure = f"run this as that one, or: sudo chown $(id -un) {what}"
                return f"{name} belongs to another user; {cure}"
    return "name a writable place with --data-dir DIR"


@contextlib.contextmanager
def explained_errors(path: str) -> Iterator[None]:
    """Turn an error of SQLite into one line that says what is wrong and what to do."""
    advice = {
        "unable to open|readonly": "",
        "disk is full": "free some space there and run the command again; nothing is lost",
        "disk I/O": "check the disk; `db check` tells whether the database is whole",
        "locked": "another program keeps it busy; try again later",
        "malformed": _START_ANEW,
        "not a database": "it is no SQLite file; move it away, or name another with --db",
    }
    try:
        yield
    except sqlite3.Error as exc:
        text = str(exc)
        what = next((advice[key] for key in advice if re.search(key, text)), "run `db check`")
        raise DatabaseError(f"database {path}: {text}; {what or _advise_access(path)}") from exc


def get_connection(db_path: Optional[str] = None) -> sqlite3.Connection:
    """Open the database, creating file and directory (0600, 0700); the schema is not touched.

    Rows read as `row["url"]`; every statement commits by itself unless a transaction is begun.
    """
    return open_database(db_path, upgrade=False)


def open_database(db_path: Optional[str] = None, upgrade: bool = True) -> sqlite3.Connection:
    """Do as `get_connection` does, and bring the schema up to date."""
    path = db_path or default_db_path()
    if sqlite3.sqlite_version_info < (3, 24):
        what = f"SQLite {sqlite3.sqlite_version} of {sys.executable} is too old; 3.24 is needed"
        raise DatabaseError(f"{what}: use a newer Python, each brings or needs a newer SQLite")
    _make_database_file(path)
    with explained_errors(path), contextlib.ExitStack() as on_failure:
        conn = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None)
        on_failure.callback(conn.close)
        conn.row_factory = sqlite3.Row
        schema_version(conn)  # before the journal mode: a newer one stays untouched
        _set_journal_mode(conn, path)
        if upgrade:
            initialize_schema(conn)
        on_failure.pop_all()
    return conn


@contextlib.contextmanager
def _writable_place(what: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        reason = f"{exc.strerror}; {_advise_access(path)}"
        raise DatabaseError(f"cannot open the {what}: {reason}") from exc


def _make_database_file(path: str) -> None:
    """Make the file with its mode before SQLite does, with the umask's."""
    # Never open a database that is in use: closing any descriptor of a file drops all POSIX locks
    # that this process holds on it, those of SQLite's connections in other threads included.
    exists = contextlib.suppress(FileExistsError)
    with _create_lock, _writable_place(f"database {path}", path), exists:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(errno.EISDIR, "it is a directory or a device")
        os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _set_journal_mode(conn: sqlite3.Connection, path: str) -> None:
    mounts = read_mounts()
    fs_type = mounts[find_ancestor(os.path.realpath(path), mounts) or "/"]
    mode, synchronous = ("delete", "FULL") if is_network_type(fs_type) else ("wal", "NORMAL")
    if mode == "delete":
        log.debug("no WAL: %s is on a network file system (%s)", path, fs_type)
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            conn.execute(f"PRAGMA journal_mode={mode}")
            conn.execute(f"PRAGMA synchronous={synchronous}")
            return
        except sqlite3.OperationalError as exc:
            # Two that switch a fresh file to WAL at once: SQLite refuses one without waiting.
            if "locked" not in str(exc) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def transaction(conn: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Commit on success, roll back on anything else, Ctrl-C too; joins a transaction under way.

    It begins as a writer: a reader that turns writer can be refused at once, time-out or not.
    """
    if conn.in_transaction:
        yield conn
        return
    with _write_lock:
        conn.execute("BEGIN IMMEDIATE")
        try:
            yield conn
            conn.execute("COMMIT")
        except BaseException:
            if conn.in_transaction:
                conn.execute("ROLLBACK")
            raise


@contextlib.contextmanager
def _writing() -> Iterator[sqlite3.Connection]:
    with contextlib.closing(open_database()) as conn, transaction(conn):
        yield conn


def _own(conn: Optional[sqlite3.Connection]) -> ContextManager[sqlite3.Connection]:
    """Return a block with `conn`, or with a connection of its own to the default database."""
    return contextlib.nullcontext(conn) if conn else contextlib.closing(get_connection())


def database_path(conn: sqlite3.Connection) -> str:
    """Return the file behind a connection."""
    return str(conn.execute("PRAGMA database_list").fetchone()[2])


def schema_version(conn: sqlite3.Connection) -> int:
    """Return the version of a database, 0 of an empty one.  DatabaseError if newer than ours."""
    if not conn.execute("SELECT 1 FROM sqlite_master WHERE name = 'schema_version'").fetchone():
        return 0
    version = conn.execute("SELECT max(version) FROM schema_version").fetchone()[0] or 0
    if version > SCHEMA_VERSION:
        what = f"database {database_path(conn)} has schema version {version}"
        advice = f"this program knows {SCHEMA_VERSION}; use a newer Refresherr"
        raise DatabaseError(f"{what}, {advice}")
    return int(version)


def _apply(conn: sqlite3.Connection, script: str) -> None:
    """Make the tables, indexes and columns of a script, as far as they do not exist."""
    # Not executescript: that commits the transaction under way first.
    for statement in script.split(";\n"):
        try:
            conn.execute(statement)
        except sqlite3.OperationalError as exc:
            if not re.search("already exists|duplicate column", str(exc)):
                raise


def load_note(conn: sqlite3.Connection, name: str) -> Any:
    """Return the fact that was kept under a name, None without one."""
    row = conn.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
    return json.loads(row[0]) if row else None


def save_note(conn: sqlite3.Connection, name: str, value: Any) -> None:
    """Keep a fact, which JSON can hold, for later runs."""
    conn.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(value)))


def initialize_schema(conn: Optional[sqlite3.Connection] = None) -> None:
    """Create or upgrade the tables in one transaction, after a check and a backup of any data."""
    with _own(conn) as conn, explained_errors(database_path(conn)):
        if schema_version(conn) == SCHEMA_VERSION:
            columns = conn.execute("PRAGMA table_info(symlinks)")
            if "read_failures" not in {row[1] for row in columns}:
                _apply(conn, _V4_LATE)
            return
        conn.create_function("strip_secrets", 1, strip_secrets)
        conn.create_function("redact", 1, redact)
        conn.create_function("now", 0, utc_now)
        # What is overwritten may be a token: leave no copy of it in a freed page.
        conn.execute("PRAGMA secure_delete=ON")
        insert = "INSERT INTO schema_version (version, applied_utc) VALUES (?, now())"
        with transaction(conn):  # alone: another thread or process may have been at it, too
            version = schema_version(conn)
            was_used = version < SCHEMA_VERSION and _back_up_before_migration(conn, version)
            for step in range(version + 1, SCHEMA_VERSION + 1):
                _apply(conn, MIGRATIONS[step])
                conn.execute(insert, (step,))
        try:
            if was_used:
                conn.execute("VACUUM")
                conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as exc:
            log.warning("old tokens may linger in free pages of the database: %s", exc)


def _quoted_tables(conn: sqlite3.Connection) -> List[str]:
    rows = conn.execute("""SELECT '"' || replace(name, '"', '""') || '"' FROM sqlite_master
        WHERE type = 'table' AND substr(name, 1, 7) <> 'sqlite_'""")
    return [row[0] for row in rows]


def _back_up_before_migration(conn: sqlite3.Connection, version: int) -> bool:
    """Copy the database beside itself; False if there is nothing in it."""
    tables = set(_quoted_tables(conn)) - {'"schema_version"'}
    if not any(conn.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in tables):
        return False
    path = database_path(conn)
    finding = conn.execute("PRAGMA quick_check(1)").fetchone()[0]
    if finding != "ok":
        what = f"database {path} is damaged ({finding})"
        raise DatabaseError(f"{what}; it was not upgraded: {_START_ANEW}")
    backup = f"{path}.v{version}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.bak"
    # By a connection of its own: SQLite copies nothing from one that is about to write.
    with contextlib.closing(sqlite3.connect(path)) as reader:
        backup_database(reader, backup)
    log.info("upgrading the database from version %d; the old one is kept as %s", version, backup)
    return True


def refuse_output(file: str, fresh: bool = False) -> None:
    """Raise RefresherrError where what is no regular file, or with `fresh` anything, stands."""
    with contextlib.suppress(OSError):
        is_regular = stat.S_ISREG(os.lstat(file).st_mode)
        if fresh or not is_regular:
            what = "exists already" if is_regular else "is no regular file"
            raise RefresherrError(f"{file} {what}, and stays as it is; name a new file")


@contextlib.contextmanager
def replacement(file: str, mode: int = 0o600, fresh: bool = False) -> Iterator[str]:
    """Yield a temporary file that becomes `file` at the end, or nothing does."""
    refuse_output(file, fresh)
    temporary = f"{file}.tmp{os.getpid()}"
    try:
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        yield temporary
        os.chmod(temporary, mode)
        os.replace(temporary, file)
    except OSError as exc:
        advice = "; make the directory first" if exc.errno == errno.ENOENT else ""
        raise RefresherrError(f"cannot write {file}: {exc.strerror}{advice}") from exc
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write_file(file: str, text: str, mode: int = 0o600) -> None:
    """Write a text file whole or not at all."""
    with replacement(file, mode) as name, open(name, "w", encoding="utf-8") as stream:
        stream.write(text)


def backup_database(conn: sqlite3.Connection, file: str, fresh: bool = False) -> None:
    """Write a consistent copy of the database to `file` (0600), whole or not at all."""
    with replacement(file, fresh=fresh) as name, contextlib.closing(sqlite3.connect(name)) as copy:
        conn.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")


def nuke_database(conn: Optional[sqlite3.Connection] = None, confirm: bool = False) -> None:
    """Drop every table and build the schema anew.  ValueError without `confirm=True`."""
    if not confirm:
        raise ValueError("nuke_database deletes everything; call it with confirm=True")
    with _own(conn) as conn, explained_errors(database_path(conn)):
        with transaction(conn):
            for table in _quoted_tables(conn):
                conn.execute(f"DROP TABLE {table}")
            initialize_schema(conn)
        conn.execute("VACUUM")


class KnownLink(NamedTuple):
    """What the database holds of a link."""

    rowid: int
    target: Union[str, bytes, None]
    status: Optional[str]
    broken_since: Optional[str]
    error: str


_WRITE_LINK = """
INSERT INTO symlinks (path, last_target, status, last_status, first_seen_utc, last_seen_utc,
                      broken_since_utc, error)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT(path) DO UPDATE SET
    last_target = excluded.last_target, status = excluded.status,
    last_status = excluded.last_status, last_seen_utc = excluded.last_seen_utc,
    broken_since_utc = excluded.broken_since_utc, error = excluded.error,
    read_utc = CASE WHEN symlinks.last_target = excluded.last_target THEN read_utc END,
    read_error = CASE WHEN symlinks.last_target = excluded.last_target THEN read_error END
"""


def classify_change(known: Optional[KnownLink], status: str) -> str:
    """Return the event that a judgement makes, '' for none; an outage in between does not count."""
    was_broken = known is not None and known.broken_since is not None
    if status == BROKEN and not was_broken:
        return "newly_broken"
    if status == OK and was_broken:
        return "recovered"
    if known is None:
        return "" if status == OK else status
    return "" if known.status == status else "vanished" if status == MISSING else "changed"


def link_row(
    path: str, target: str, status: str, reason: str, now: str, known: Optional[KnownLink]
) -> Tuple[Any, ...]:
    """Return the parameters of `_WRITE_LINK` for a judgement."""
    since = known.broken_since if known and status != OK else None
    if status == BROKEN:
        since = since or now
    # A reason may name a directory that is not UTF-8.
    return (to_db(path), to_db(target), status, status, now, now, since, escape(reason) or None)


def find_links(conn: sqlite3.Connection, paths: Sequence[str]) -> Dict[str, KnownLink]:
    """Return what is known of the links at `paths`."""
    found = {}
    for start in range(0, len(paths), _LOOKUP):
        keys = [to_db(path) for path in paths[start : start + _LOOKUP]]
        marks = ",".join("?" * len(keys))
        query = f"""SELECT path, rowid, last_target, status,
            broken_since_utc, coalesce(error, '') FROM symlinks WHERE path IN ({marks})"""
        for path, *known in conn.execute(query, keys):
            found[from_db(path)] = KnownLink(*known)
    return found


def find_link(conn: sqlite3.Connection, path: str) -> Optional[KnownLink]:
    """Return what is known of the link at `path`."""
    return next(iter(find_links(conn, [path]).values()), None)


IS_LOST = "status <> 'ok' AND status IN ('broken', 'unreachable')"
IS_BROKEN = "status <> 'ok' AND status = 'broken'"  # so says the index ix_symlinks_not_ok


def record_symlink(path: str, target: str, status: str) -> None:
    """Record that the link at `path` points to `target` and is `status`, one of `STATUSES`."""
    if status not in STATUSES:
        raise ValueError(f"unknown status {status!r}; known: {', '.join(STATUSES)}")
    with _writing() as conn:
        _write_events(conn, write_link(conn, find_link(conn, path), path, target, status))


def enqueue_action(url: str, reason: str = "", related_path: Optional[str] = None) -> int:
    """Queue an action, no secret in its URL; return its id, or that of the pending same one."""
    with _writing() as conn:
        return insert_action(conn, strip_secrets(url), reason, related_path)[0]


def insert_action(
    conn: sqlite3.Connection, url: str, reason: str, path: Optional[str], progress: str = "{}"
) -> Tuple[int, bool]:
    """Queue an action for a URL without secrets; return its id, and whether it is new."""
    with transaction(conn):
        same = "SELECT id FROM actions WHERE status = 'pending' AND url = ?"
        row = conn.execute(same, (url,)).fetchone()
        if row:
            return int(row["id"]), False
        insert = """INSERT INTO actions (url, reason, related_path, created_utc, progress, status)
            VALUES (?, ?, ?, ?, ?, 'pending')"""
        values = (url, to_db(redact(reason)), to_db(path) if path else None, utc_now(), progress)
        return int(conn.execute(insert, values).lastrowid or 0), True


def update_action(conn: sqlite3.Connection, number: int, **columns: Any) -> None:
    """Write some columns of an action."""
    changes = ", ".join(f"{name} = ?" for name in columns)
    conn.execute(f"UPDATE actions SET {changes} WHERE id = ?", (*columns.values(), number))


def get_pending_actions(limit: int = 25) -> List[sqlite3.Row]:
    """Return the oldest pending actions; rows readable as `row["url"]`."""
    query = "SELECT * FROM actions WHERE status = 'pending' ORDER BY id LIMIT ?"
    with contextlib.closing(open_database()) as conn:
        return conn.execute(query, (limit,)).fetchall()


def mark_action_sent(action_id: int, ok: bool = True) -> None:
    """Mark an action as sent, or as failed."""
    with _writing() as conn:
        update_action(conn, action_id, status="sent" if ok else "failed", fired_utc=utc_now())


Event = Tuple[int, Union[str, bytes, None], Union[str, bytes, None], str, str, str, str]


def link_event(path: str, target: str, action: str, status: str) -> Event:
    """Return the event row for something that happened to a link now."""
    media = parse_media(path)
    name = media.name.encode("utf-8", "replace").decode()
    return (int(time.time()), to_db(path), to_db(target), media.kind, name, action, status)


def write_link(
    conn: sqlite3.Connection, known: Optional[KnownLink], path: str, target: str, status: str,
    reason: str = "",
) -> List[Event]:  # fmt: skip
    """Record outside of a scan what a link is now, and return the events of that, none or one.

    The next scan reads its directory again; doubts about what it was before are over, and if it
    is good, so is its loss, which has not come back by itself.
    """
    now = utc_now()
    conn.execute(_WRITE_LINK, link_row(path, target, status, reason, now, known))
    update = "UPDATE directories SET mark = NULL WHERE path = ?"
    conn.execute(update, (to_db(os.path.dirname(path)),))
    if known and (from_db(known.target), known.status) != (target, status):
        conn.execute("DELETE FROM doubts WHERE path = ?", (to_db(path),))
    if status == OK:
        update = "UPDATE losses SET back_utc = ? WHERE path = ? AND back_utc IS NULL"
        conn.execute(update, (now, to_db(path)))
    change = classify_change(known, status)
    return [link_event(path, target, change, status)] if change else []


def add_events(rows: Iterable[Sequence[Any]]) -> None:
    """Append tuples (ts, path, target, kind, name, action, status) to the event log."""
    encoded = [[to_db(v) if isinstance(v, str) else v for v in row] for row in rows]
    with _writing() as conn:
        _write_events(conn, encoded)


def _write_events(conn: sqlite3.Connection, rows: Iterable[Sequence[Any]]) -> None:
    columns = "ts, path, target, kind, name, action, status"
    conn.executemany(f"INSERT INTO events ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def beneath(root: str, column: str = "path") -> Tuple[str, List[Any]]:
    """Return an indexable SQL condition, with its parameters, for all paths beneath `root`.

    Names that are not UTF-8 are stored as BLOBs, which sort apart from text: hence two ranges.
    """
    bounds = [root.rstrip("/") + end for end in "/0"]  # 0 is the character after /
    within = f"{column} >= ? AND {column} < ?"
    return f"({within} OR {within})", [*map(to_db, bounds), *map(os.fsencode, bounds)]


def beneath_any(roots: Sequence[str]) -> Tuple[str, List[Any]]:
    """Return an SQL condition, with its parameters, for paths beneath roots; all without any."""
    parts = [beneath(root, "+path") for root in roots]  # by no index: few rows are asked
    condition = " OR ".join(part for part, _ in parts) or "1"
    return f"({condition})", [value for _, values in parts for value in values]


def find_broken(
    conn: sqlite3.Connection, roots: Sequence[str] = ()
) -> Iterator[Tuple[str, str, Optional[str]]]:
    """Yield (path, target, broken since) of the broken links beneath the roots, oldest first."""
    within, values = beneath_any(roots)
    query = f"""SELECT path, last_target, broken_since_utc FROM symlinks
        WHERE {IS_BROKEN} AND {within} ORDER BY broken_since_utc, path"""
    for path, target, since in conn.execute(query, values):
        yield from_db(path), from_db(target), since


def find_strays(conn: sqlite3.Connection, roots: Sequence[str]) -> Dict[str, int]:
    """Return {directory: links in it and beneath} of the links that lie beneath no root."""
    within, values = beneath_any(roots)
    places: Dict[str, List[str]] = {}  # by the top directory
    for (name,) in conn.execute(f"SELECT path FROM symlinks WHERE NOT {within}", values):
        folder = os.path.dirname(from_db(name))
        places.setdefault("/".join(folder.split("/")[:2]), []).append(folder)
    return {os.path.commonpath(folders): len(folders) for folders in places.values()}


def forget_strays(conn: sqlite3.Connection, roots: Sequence[str]) -> None:
    """Delete what is known of links and directories that lie beneath no root."""
    within, values = beneath_any(roots)
    with transaction(conn):
        for table in ("symlinks", "doubts", "losses"):
            conn.execute(f"DELETE FROM {table} WHERE NOT {within}", values)
        own = f"path IN ({', '.join('?' * len(roots))})"
        delete = f"DELETE FROM directories WHERE NOT ({within} OR {own})"
        conn.execute(delete, [*values, *map(to_db, roots)])


@contextlib.contextmanager
def process_lock(db_path: str, wait: float, command: str = "refresherr") -> Iterator[None]:
    """Hold the lock beside the database, which the kernel drops with the process."""
    file = db_path + ".lock"
    with _writable_place(f"lock file {file}", db_path):
        os.makedirs(os.path.dirname(file), mode=0o700, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with open(descriptor, "r+", encoding="utf-8", errors="replace") as stream:
        _wait_for_lock(stream, file, time.monotonic() + wait)
        since = utc_now()[:16].replace("T", " ")
        stream.truncate(0)
        stream.write(f"`{command}` (process {os.getpid()}, since {since} UTC)\n")
        stream.flush()
        yield


def _wait_for_lock(stream: TextIO, file: str, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                who = stream.read(200).strip() or "it has not said its name"
                advice = "wait for it to end, or use --lock-wait SECONDS"
                text = f"another run holds the lock {file}: {who}; {advice}"
                raise RefresherrError(text, EXIT_LOCKED) from None
            time.sleep(0.1)
        except OSError as exc:
            return log.warning("no lock on this file system (%s): %s", exc.strerror, file)


@contextlib.contextmanager
def scratch_database(db_path: str) -> Iterator[sqlite3.Connection]:
    """Yield a throw-away copy of the database: what a dry run writes to."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="refresherr-") as folder:
        copy = os.path.join(folder, "symlinks.db")
        if os.path.exists(db_path):
            # Without a journal nobody is writing; 'immutable' then leaves no file of ours behind.
            flag = "mode=ro" if os.path.exists(db_path + "-wal") else "immutable=1"
            with explained_errors(db_path):
                source = sqlite3.connect(f"file:{quote(db_path)}?{flag}", uri=True)
                with contextlib.closing(source):
                    backup_database(source, copy)
        with contextlib.closing(open_database(copy)) as conn:
            yield conn


@contextlib.contextmanager
def recorded_run(conn: sqlite3.Connection, command: str) -> Iterator[JsonObject]:
    """Keep an honest row in `runs`: yields the summary to fill; its 'exit_code' is the result."""
    # One numbering with cinesync_runs, where the container edition has counted by itself.
    insert = """INSERT INTO runs (run_id, command, started_utc) VALUES (1 + max(
        (SELECT coalesce(max(run_id), 0) FROM runs),
        (SELECT coalesce(max(run_id), 0) FROM cinesync_runs)), ?, ?)"""
    with transaction(conn):
        run_id = conn.execute(insert, (command, utc_now())).lastrowid
    update = "UPDATE runs SET finished_utc = ?, exit_code = ?, summary = ? WHERE run_id = ?"
    summary: JsonObject = {"run_id": run_id}
    code = EXIT_FAILED
    try:
        yield summary
        code = summary.get("exit_code", EXIT_OK)
    except (RefresherrError, KeyboardInterrupt) as exc:
        code = getattr(exc, "exit_code", EXIT_INTERRUPTED)
        if isinstance(exc, RefresherrError):
            summary.setdefault("message", redact(str(exc)))
        raise
    finally:
        with contextlib.suppress(sqlite3.Error), transaction(conn):
            conn.execute(update, (utc_now(), code, json.dumps(summary), run_id))


# ---------------------------------------------------------------------------------------------
# Look-ups
# ---------------------------------------------------------------------------------------------
# What may hang is asked by worker processes: one that is killed lets go of everything, while a
# thread in the kernel's D state cannot be ended (measured: any other way lingers).  This process
# sends requests and keeps the database.  The path that a worker is about to touch stands in memory
# shared with it, so it knows what hangs without a message: it kills that worker, seals off the
# mount, and asks the rest anew.  Two workers serve local disks; what lies on a slow mount goes to
# another one with many threads.

# File systems on which a directory's time of change tells whether anything in it has changed.
TRUSTED_TYPES = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "bcachefs", "tmpfs"}
UNION_TYPES = {"fuse.mergerfs", "mergerfs", "overlay", "aufs", "unionfs", "fuse", "autofs"}
SENTINEL = "sentinel"  # in place of a file system's type
F_SETPIPE_SZ = 1031  # Linux, missing from `fcntl` before 3.10
GONE_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
NO_LISTING_ERRNOS = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
AUTO_WORKERS = 24  # a libfuse daemon has some ten threads; what waits for them costs nothing
LOCAL, THREADED = (0, 1), 2  # two workers for local disks, and one with many threads
AT_ONCE = 100  # requests in one message to a worker for local disks, and links between two beats
IN_FLIGHT = 3  # such messages that it has not answered yet
CACHE_SIZE = 4000  # directories that a worker remembers
YOUNG_NS = 2 * 10**9  # a directory changed so lately may change again within the same time stamp
WORTH_LISTING = 3  # so many names in a directory: one listing costs less than asking for each
EVERYTHING = 1 << 40  # names that are wanted of a directory, where all are
NO_MARK = "-"  # in the database, of a directory that nothing vouches for
UNVOUCHED = 100  # links of a directory that are looked at by themselves in each scan
SLOW_SECONDS = 0.002  # a look-up that takes longer does not come from a local disk's cache
SLOW_STREAK = 8  # so many in a row: the whole mount is slow, and listings are cheaper
STUCK_LIMIT = 3  # paths that hang on a mount that answers, before it counts as unresponsive
SLOW_DENIAL = 0.5  # seconds: an ENOENT that takes longer is a failure of the mount, too
_SLOT = struct.Struct("=d4096s")  # since when a thread waits, and for which path

HEALTHY, ABSENT, EMPTY, UNRESPONSIVE, ERROR = "healthy", "absent", "empty", "unresponsive", "error"

# What is found of a link; its detail is: the real directory of the file that ends a chain of
# links; (first missing name, goal, mount point) of one that is gone; the reason; the point that is
# sealed off.
FOUND, FOUND_BY_CHAIN, GONE, UNKNOWN, BLOCKED, NO_LINK = range(6)
Request = Tuple[Any, ...]  # the kind, then plain values
Answer = Any
Sealed = Mapping[str, Tuple[str, str]]  # {point: (state, reason)}: nothing beneath it is touched


class ElsewhereError(Exception):
    """A path leads to a slow mount: the worker with many threads is to ask for it."""


class Location(NamedTuple):
    """Where a path leads as the kernel walks it; names that do not exist stay in `real`.

    `mark` tells whether a directory has changed: None where nothing can do that, '' where it has
    changed so lately that a further change might not show.  `missing` is the first component that
    cannot be looked up, with its `errno`; `sealed` the point at which the walk ended; `hops` how
    many links were followed.
    """

    real: str
    mount: str
    mark: Optional[str] = None
    hops: int = 0
    missing: str = ""
    errno: int = 0
    sealed: str = ""


class Visit(NamedTuple):
    """What was found in a library directory: it is the 'same', it was 'read', is 'gone' or
    'unread'.

    `odd` are (name, text, finding, detail) of the links that are not simply found, `heads` says
    into how many directories the links lead.  `packed` is what the next scan compares with, as the
    table `directories` keeps it.
    """

    kind: str
    folders: Sequence[str] = ()
    links: int = 0
    odd: Sequence[Tuple[str, str, int, Any]] = ()
    heads: int = 0
    mark: str = ""
    packed: bytes = b""
    names: Sequence[str] = ()
    texts: Sequence[str] = ()
    ignored: int = 0
    reason: str = ""


class Look(NamedTuple):
    """What a look at a single link found.

    `blocked` is why its mount is not to be trusted, `file` the real file that could be read, if
    that was asked.  Of one whose target is gone: the first name that is `missing`, whether the
    directory above it is empty, or lists the name all the same, and the `mount` it is on.
    """

    path: str
    finding: int
    detail: str = ""
    blocked: str = ""
    empty: str = ""
    file: str = ""
    target: str = ""  # the text of the link
    goal: str = ""  # where the file should be
    missing: str = ""
    mount: str = ""
    is_listed: bool = False
    is_loop: bool = False  # too many links on the way: nothing is missing


def why_closed(directory: str) -> str:
    """Return why we could not replace links in a directory, '' if we could."""
    info, user = os.stat(directory), os.geteuid()
    if os.statvfs(directory).f_flag & os.ST_RDONLY:
        return "the file system is read-only"
    sticky = info.st_mode & stat.S_ISVTX and user not in (0, info.st_uid)
    if os.access(directory, os.W_OK | os.X_OK) and not sticky:
        return ""
    return f"it belongs to user {info.st_uid}, this is user {user}"


def is_empty(directory: str) -> bool:
    """Tell whether a directory holds nothing.  OSError if it cannot be read."""
    with os.scandir(directory) as entries:
        return next(entries, None) is None


def read_link(path: str) -> str:
    """Return what a link points to; '' if there is no link."""
    try:
        return os.readlink(path)
    except OSError as exc:
        if exc.errno in (*GONE_ERRNOS, errno.EINVAL):
            return ""
        raise


class Slots:
    """Memory shared between the processes: what each thread of a worker waits for."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._memory = mmap.mmap(-1, count * _SLOT.size)
        self._own = threading.local()

    def claim(self, number: int) -> None:
        """Make slot `number` that of the thread that calls."""
        self._own.start = number * _SLOT.size

    def touch(self, path: Optional[str]) -> float:
        """Note what the thread is about to wait for: '' nothing, None the same as before.

        Returns the time.
        """
        now = time.monotonic()
        if path is None:
            struct.pack_into("=d", self._memory, self._own.start, now)
        else:
            name = os.fsencode(path)
            _SLOT.pack_into(self._memory, self._own.start, now if path else 0.0, name)
        return now

    def waiting(self) -> List[Tuple[str, float]]:
        """Return (path, since when) of all threads that wait for something."""
        slots = [_SLOT.unpack(self._memory[start : start + _SLOT.size])
            for start in range(0, self.count * _SLOT.size, _SLOT.size)]  # fmt: skip
        return [(os.fsdecode(name.rstrip(b"\0")), since) for since, name in slots if since]


class Looker:
    """Looks at directories and links; lives in a worker process, asked by all its threads."""

    def __init__(self, pool: WorkerPool, slots: Slots) -> None:
        self.slots, self.is_threaded = slots, slots.count > 1
        self.mounts, self.ignore, self.limit = pool.mounts, pool.ignore, pool.stat_timeout
        self.sealed = dict(pool.sealed)
        self.newly_sealed: Dict[str, Tuple[str, str]] = {}  # not yet told
        self.good: Counter[str] = Counter()  # targets found, by mount point; nor these
        # Seconds of look-ups that failed, by mount point.
        self.cost: Dict[str, float] = defaultdict(float)
        self.streaks: Counter[str] = Counter()  # of slow answers, by mount point
        kinds = self.mounts.items()
        self.slow = {p for p, k in kinds if is_network_type(k) or k in ("autofs", "fuse")}
        self.trusted = {point for point, kind in kinds if kind in TRUSTED_TYPES}
        # What is mounted in a directory changes without it.
        self.crossings = {os.path.dirname(point) for point in self.mounts}
        self.locks = [threading.RLock() for _ in range(64)]
        self.touched = ""  # the mount that the slot of a single thread names
        self.forget()

    def forget(self) -> None:
        """Empty the caches: something is no longer what it was."""
        self.locate = functools.lru_cache(CACHE_SIZE)(self.look_up)
        self.list_once = functools.lru_cache(512 if self.is_threaded else 8)(self.list_directory)

    def seal(self, point: str, state: str, reason: str) -> None:
        """Touch nothing at a path or beneath it any more."""
        self.sealed[point] = state, reason
        self.forget()

    def ask(self, call: Callable[[str], Any], path: str, mount: str) -> Any:
        """Return call(path); of many threads each notes its path for the parent to see."""
        if not self.is_threaded:
            return call(path)
        began, error = self.slots.touch(path), None
        try:
            return call(path)
        except OSError as exc:
            error = exc
            raise
        finally:
            self.book(mount, time.monotonic() - began, error)

    def book(self, mount: str, took: float, error: Optional[OSError]) -> None:
        """Note how long a look-up took.

        After many slow ones in a row a mount is slow for good; one whose failing look-ups have cost
        a `stat_timeout` together is asked no further.
        """
        if self.streaks[mount] < SLOW_STREAK:
            self.streaks[mount] = self.streaks[mount] + 1 if took > SLOW_SECONDS else 0
        if error is None or (error.errno in GONE_ERRNOS and took < SLOW_DENIAL):
            return
        self.cost[mount] += took
        if self.cost[mount] > self.limit and mount not in self.sealed:
            why = f"{mount}: look-ups that failed ({error.strerror}) took more than "
            self.newly_sealed[mount] = UNRESPONSIVE, why + format_duration(self.limit)
            self.seal(mount, *self.newly_sealed[mount])

    def look_up(self, path: str, hops: int = 0) -> Location:
        """Return where a path leads.  This is `locate` without its cache."""
        head, _, name = path.rpartition("/")
        parent = self.locate(head, hops) if head else Location("/", "/", None, hops)
        if name in ("", "."):
            return parent
        if name == "..":
            return self.locate(os.path.dirname(parent.real), parent.hops)
        real = f"{parent.real}/{name}" if parent.real != "/" else f"/{name}"
        if parent.errno or parent.sealed:
            return parent._replace(real=real)
        mount = real if real in self.mounts else parent.mount
        if real in self.sealed:
            return Location(real, mount, None, parent.hops, sealed=real)
        if not self.is_threaded and mount != self.touched:
            if mount in self.slow:
                raise ElsewhereError
            self.touched = mount  # that says enough of what a single thread waits for
            self.slots.touch(real)
        try:
            status = self.ask(os.lstat, real, mount)
            if not stat.S_ISLNK(status.st_mode):
                mark = None
                if mount in self.trusted and real not in self.crossings:
                    changed, mark = status.st_ctime_ns, ""
                    if time.time_ns() - changed > YOUNG_NS:
                        mark = f"{status.st_dev}.{status.st_ino}.{changed}"
                return Location(real, mount, mark, parent.hops)
            if parent.hops >= 40:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            text = self.ask(os.readlink, real, mount)
        except OSError as exc:
            return Location(real, mount, None, parent.hops, real, exc.errno or errno.EIO)
        return self.locate(os.path.join(parent.real, text), parent.hops + 1)

    # Directories

    def list_directory(self, path: str, mount: str, at_most: int) -> Tuple[Dict[str, bool], bool]:
        """Return {name: whether it is a link} of a directory, and whether that is all of it."""

        def read(directory: str) -> Tuple[Dict[str, bool], bool]:
            with os.scandir(directory) as entries:
                some = itertools.islice(entries, at_most)
                return {e.name: e.is_symlink() for e in some}, next(entries, None) is None

        found: Tuple[Dict[str, bool], bool] = self.ask(read, path, mount)
        return found

    def list_for(self, path: str, mount: str, wanted: int) -> Tuple[Dict[str, bool], bool]:
        """List a directory of which so many names are wanted: only the beginning of one with many
        more entries, for asking costs less again.
        """
        with self.locks[hash(path) % len(self.locks)]:
            return self.list_once(path, mount, 1024 << (wanted // 16).bit_length())

    def visit(self, path: str, mark: str, packed: bytes) -> Answer:
        """Look at a library directory, and at what its links lead to; returns a Visit's values."""
        self.slots.touch(None)
        try:
            place = self.locate(path)
            if place.sealed:
                return tuple(Visit("unread", reason=self.sealed[place.sealed][1]))
            if place.errno:
                raise OSError(place.errno, os.strerror(place.errno))
            same = mark and place.mark == mark and self.compare(path, packed)
            return tuple(same or self.read(path, place))
        except OSError as exc:
            kind = "gone" if exc.errno in GONE_ERRNOS else "unread"
            return tuple(Visit(kind, reason=exc.strerror or str(exc)))

    def compare(self, path: str, packed: bytes) -> Optional[Visit]:
        """Return what is found in a directory with the same links; None if the directories they
        lead into are not what they were, or a link is good that was not, or the other way round.
        """
        folders, links, targets, unvouched = marshal.loads(packed)
        for head, mark, _, _ in targets:
            if mark and self.locate(head).mark != mark:
                return None
        rows, heads = [], {head for head, *_ in targets if head}
        if unvouched:
            prefix = path.rstrip("/") + "/"
            odd = self.judge(prefix, [text for _, text, _ in unvouched])[0]
            for number, (name, text, was_good) in enumerate(unvouched):
                finding = odd.get(number, (FOUND, ""))
                if (finding[0] in (FOUND, FOUND_BY_CHAIN)) != was_good:
                    return None
                if finding[0] != FOUND:
                    rows.append((name, text, *finding))
                    heads.add(os.path.join(prefix, text).rpartition("/")[0])
        for head, mark, _, count in targets:
            if mark:
                self.good[self.locate(head).mount] += count
        return Visit("same", folders, links, rows, len(heads))

    def read(self, path: str, place: Location) -> Visit:
        """Return what is found in a directory that is read in full."""
        mark = NO_MARK if place.mark is None else place.mark
        folders, names, ignored = self.ask(self.list_library, path, place.mount)
        prefix = path.rstrip("/") + "/"
        texts: List[str] = []
        try:
            for start in range(0, len(names), AT_ONCE):
                self.slots.touch(None)
                texts += self.read_links(prefix, names[start : start + AT_ONCE], place.mount)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.EINVAL):
                raise
            # One has gone, or is no link any more, since the directory was listed.
            names = [name for name in names if os.path.islink(prefix + name)]
            texts, mark = self.read_links(prefix, names, place.mount), ""
        odd, targets, loose = self.judge(prefix, texts)
        unvouched = [(names[n], texts[n], n not in odd or odd[n][0] == FOUND_BY_CHAIN)
            for n in sorted(loose.union(odd))]  # fmt: skip
        if len(unvouched) > UNVOUCHED:
            mark, unvouched = NO_MARK, []
        packed = marshal.dumps((folders, len(names), targets, unvouched), 2)
        rows = [(names[n], texts[n], *finding) for n, finding in odd.items()]
        # What a title is depends on them, where something is lost.
        heads = {os.path.join(prefix, text).rpartition("/")[0] for text in texts} if rows else ()
        facts = len(names), rows, len(heads), mark, packed, names, texts, ignored
        return Visit("read", folders, *facts)

    def read_links(self, prefix: str, names: Iterable[str], mount: str) -> List[str]:
        if self.is_threaded:
            return [self.ask(os.readlink, prefix + name, mount) for name in names]
        return [os.readlink(prefix + name) for name in names]

    def list_library(self, path: str) -> Tuple[List[str], List[str], int]:
        """Return the directories and the links in a library directory, and how many are ignored."""
        with os.scandir(path + "/") as entries:
            found = list(entries)
        names = [entry.name for entry in found if entry.is_symlink()]
        folders = []
        if len(names) < len(found):
            folders = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
        is_ignored = self.ignore.matcher(path.rstrip("/"))
        if is_ignored is None:
            return sorted(folders), sorted(names), 0
        kept = [[name for name in some if not is_ignored(name)] for some in (folders, names)]
        ignored = len(folders) + len(names) - sum(map(len, kept))
        return sorted(kept[0]), sorted(kept[1]), ignored

    # Links

    def judge(
        self, prefix: str, texts: Sequence[str]
    ) -> Tuple[Dict[int, Tuple[int, Any]], List[Tuple[str, str, str, int]], Set[int]]:
        """Judge links by their texts, each directory of targets at once.

        Returns ({number of the link: (finding, detail)} of all but those simply found, [(directory
        of targets, its mark, where it really is, good links)], the numbers of those whose directory
        cannot vouch for them); the mark of one that cannot is ''.
        """
        groups: Dict[str, List[Tuple[int, str]]] = defaultdict(list)
        for number, text in enumerate(texts):
            head, _, name = text.rpartition("/")
            if text[:1] != "/":
                head = (prefix + head).rstrip("/")
            groups[head].append((number, name))
        odd: Dict[int, Tuple[int, Any]] = {}
        targets: List[Tuple[str, str, str, int]] = []
        loose: Set[int] = set()
        for head, links in groups.items():
            place = self.locate(head or "/")
            suspects = self.find_suspects(place, links)
            odd.update((number, self.follow(f"{head}/{name}")) for number, name in suspects)
            good = len(links) - len(suspects)
            if good:
                self.good[place.mount] += good
                targets.append((head, place.mark or "", place.real, good))
                if not place.mark:
                    loose.update(number for number, _ in links)
        for finding, detail in odd.values():
            if finding == FOUND_BY_CHAIN:
                self.good[self.locate(detail).mount] += 1
                targets.append(("", "", detail, 1))
        return odd, targets, loose

    def find_suspects(
        self, place: Location, links: Sequence[Tuple[int, str]]
    ) -> Sequence[Tuple[int, str]]:
        """Return those of (number, name) in a directory that are not simply there."""
        if place.errno or place.sealed or place.hops >= 30 or place.real in self.crossings:
            return links
        names: Dict[str, bool] = {}
        is_whole = False
        is_quick = place.mark is None and self.streaks[place.mount] < SLOW_STREAK
        if len(links) >= WORTH_LISTING and not is_quick:
            with contextlib.suppress(OSError):
                names, is_whole = self.list_for(place.real, place.mount, len(links))
        for point in self.sealed:
            if os.path.dirname(point) == place.real:
                names.pop(os.path.basename(point), None)  # a listing says nothing of what hangs
        suspects = [link for link in links if names.get(link[1]) is not False]
        if is_whole or not suspects:
            return suspects
        return [link for link in suspects if not self.is_plain_file(place, link[1])]

    def is_plain_file(self, place: Location, name: str) -> bool:
        """Tell whether a name in a directory is there, and no link itself."""
        path = f"{place.real}/{name}"
        if name in ("", ".", "..") or path in self.sealed:
            return False
        try:
            return not stat.S_ISLNK(self.ask(os.lstat, path, place.mount).st_mode)
        except OSError:
            return False  # `follow` finds out

    def follow(self, target: str) -> Tuple[int, Any]:
        """Judge one target by walking all the way: (finding, detail)."""
        end = self.locate(target)
        if end.sealed:
            return BLOCKED, end.sealed
        if end.errno in GONE_ERRNOS or (not end.errno and end.hops >= 40):
            return GONE, (end.missing or end.real, end.real, end.mount)
        try:
            if end.errno:
                raise OSError(end.errno, os.strerror(end.errno))
            self.ask(os.stat, target, end.mount)  # the last word on "file/" is the kernel's
        except OSError as exc:
            if exc.errno in GONE_ERRNOS:
                return GONE, (end.real, end.real, end.mount)
            return UNKNOWN, exc.strerror or str(exc)
        return FOUND_BY_CHAIN, os.path.dirname(end.real)


def look_at(looker: Looker, path: str, wants_file: bool) -> Answer:
    """Look at a single link, all facts anew; what is no link stands for itself."""
    text, target = "", path
    try:
        place = looker.locate(os.path.dirname(path))
        if place.sealed:
            return tuple(Look(path, BLOCKED, blocked=looker.sealed[place.sealed][1]))
        text = looker.ask(os.readlink, path, place.mount)
        target = os.path.join(os.path.dirname(path), text)
    except OSError as exc:
        if exc.errno in GONE_ERRNOS:
            return tuple(Look(path, NO_LINK, goal=looker.locate(path).real))
    end = looker.locate(target)
    look = Look(path, FOUND, target=text, goal=end.real, mount=end.mount)
    if end.sealed:
        return tuple(look._replace(finding=BLOCKED, blocked=looker.sealed[end.sealed][1]))
    try:
        if end.errno not in (0, *GONE_ERRNOS):
            raise OSError(end.errno, os.strerror(end.errno))
        looker.ask(os.stat, path, end.mount)
        file = looker.ask(read_file, path, end.mount) if wants_file else ""
        return tuple(look._replace(file=file))
    except OSError as exc:
        if exc.errno not in GONE_ERRNOS:
            return tuple(look._replace(finding=UNKNOWN, detail=exc.strerror or str(exc)))
        look = look._replace(finding=GONE, missing=end.missing or end.real)
        return tuple(look_around(looker, look, exc.errno))


def look_around(looker: Looker, look: Look, failure: int) -> Look:
    """Return what the directory above the first missing name tells of it."""
    if failure == errno.ELOOP:
        return look._replace(is_loop=True)
    near, name = os.path.split(look.missing)
    try:
        names = looker.list_for(near, look.mount, EVERYTHING)[0]
    except OSError as exc:
        if exc.errno == errno.ENOTDIR:  # a file stands there: that is the missing directory
            return look._replace(missing=near)
        if exc.errno in (*GONE_ERRNOS, *NO_LISTING_ERRNOS):
            return look
        return look._replace(finding=UNKNOWN, detail=f"{near}: {exc.strerror}")
    is_listed = failure == errno.ENOENT and name in names
    return look._replace(empty="" if names else near, is_listed=is_listed)


def read_file(path: str) -> str:
    """Return which file a path leads to in the end.  OSError if it is none to be read."""
    real = os.path.realpath(path)
    if not stat.S_ISREG(os.stat(real).st_mode):  # opening a pipe would wait for ever
        raise OSError(errno.EINVAL, f"{real} is not a file")
    with open(real, "rb", buffering=0) as stream:
        stream.read(1)
    return real


def examine_root(looker: Looker, root: str, tries_to_write: bool) -> Tuple[str, str, str]:
    """Return (state, reason, real path) of a root: 'scanned', 'missing', 'error', 'refused'."""
    place = looker.locate(root)
    if place.sealed:
        return "refused", looker.sealed[place.sealed][1], place.real
    try:
        if not stat.S_ISDIR(looker.ask(os.stat, root, place.mount).st_mode):
            return ERROR, "is not a directory", place.real
        return "scanned", why_closed(root) if tries_to_write else "", place.real
    except FileNotFoundError:
        return "missing", "does not exist", place.real
    except OSError as exc:
        return ERROR, exc.strerror or "cannot be read", place.real


def examine_mount(
    looker: Looker, probe: str, role: str, fs_type: str, point: str
) -> Tuple[str, str, str, str, str]:
    """Return the values of a WatchedMount; a sentinel speaks for its directory, the `point` of one
    that cannot be looked at.
    """
    sealed = find_ancestor(probe, looker.sealed)
    if sealed is not None:
        return (*looker.sealed[sealed], point if sealed == probe else sealed, fs_type, role)
    try:
        status = looker.ask(os.stat, probe, probe)
        point = os.path.realpath(probe)
        if stat.S_ISREG(status.st_mode) and role == "check":
            with open(probe, "rb") as stream:
                stream.read(1)
            return HEALTHY, "", os.path.dirname(point), SENTINEL, role
        empty = False
        try:
            empty = looker.ask(is_empty, probe, probe)
        except OSError as exc:
            if exc.errno not in NO_LISTING_ERRNOS:  # alive, but not to be listed
                raise
    except FileNotFoundError:
        return ABSENT, f"{probe} does not exist", point, fs_type, role
    except OSError as exc:
        return ERROR, f"{probe}: {exc.strerror}", point, fs_type, role
    mounts = read_mounts()  # after the look-up: that mounts what autofs only promises
    found = mounts.get(point)
    if found is None and len(mounts) == 1 and os.path.ismount(point):
        found = fs_type or "unknown"  # no procfs here
    if found is None:
        return ABSENT, f"{probe} is not a mount point; nothing is mounted there", point, "", role
    if role == "remembered" and found != fs_type:
        hint = f"if that is meant, run scan --forget-mount {point}"
        return ABSENT, f"{point} is {found} now and was {fs_type}; {hint}", point, found, role
    if empty:
        return EMPTY, f"{probe} is mounted but empty", point, found, role
    return HEALTHY, "", point, found, role


def list_branches(
    looker: Looker, union: str, fs_type: str, known: Sequence[str]
) -> List[Tuple[str, str, str, str]]:
    """Return (path, mount point, its type, problem) of each part of a union."""
    names: List[str] = read_overlay_branches(union) if fs_type == "overlay" else []
    with contextlib.suppress(OSError):
        if "mergerfs" in fs_type:
            call = functools.partial(os.getxattr, attribute="user.mergerfs.branches")
            text = os.fsdecode(looker.ask(call, f"{union}/.mergerfs", union))
            names = [branch.rpartition("=")[0] or branch for branch in text.split(":")]
    with contextlib.suppress(OSError):
        if "mergerfs" in fs_type and not names:  # a directory of it, mounted by itself
            call = functools.partial(os.getxattr, attribute="user.mergerfs.allpaths")
            text = os.fsdecode(looker.ask(call, union, union))
            names = [*dict.fromkeys([*filter(None, text.split("\0")), *known])]
    return [(name, *examine_branch(looker, name)) for name in names]


def examine_branch(looker: Looker, path: str) -> Tuple[str, str, str]:
    """Return (mount point, its type, problem) of a part of a union; '!' before a problem that
    counts even where the part was never seen well.
    """
    sealed = find_ancestor(path, looker.sealed)
    if sealed is not None:
        return "", "", f"!{looker.sealed[sealed][1]}"
    try:
        status = looker.ask(os.stat, path, path)
        mounts = read_mounts()
        point = find_ancestor(os.path.realpath(path), mounts) or "/"
        empty = stat.S_ISDIR(status.st_mode) and looker.ask(is_empty, path, path)
        return point, mounts[point], f"{path} is empty" if empty else ""
    except OSError as exc:
        # One that is not there may be out of our sight, in another container's.
        return "", "", f"{'!' * (exc.errno not in GONE_ERRNOS)}{path}: {exc.strerror}"


def is_alive(looker: Looker, mount: str) -> bool:
    """Tell that a mount answers, be it with an error."""
    with contextlib.suppress(OSError):
        is_empty(mount)
    return True


Answerer = Callable[..., Answer]
ANSWERERS: Dict[str, Answerer] = {
    "visit": Looker.visit, "look": look_at, "root": examine_root, "mount": examine_mount,
    "branches": list_branches, "alive": is_alive,
}  # fmt: skip


def to_frame(message: Any) -> bytes:
    """Return a message of plain values with its length before it."""
    data = marshal.dumps(message)
    return len(data).to_bytes(4, "big") + data


def read_frames(reader: int, buffer: bytearray) -> Iterator[Any]:
    """Wait for data, and yield all messages that are complete; EOFError at the pipe's end.

    What is not complete stays in the buffer.
    """
    data = os.read(reader, 1 << 20)
    if not data:
        raise EOFError
    buffer += data
    start = 0
    while start + 4 <= len(buffer):
        end = start + 4 + int.from_bytes(buffer[start : start + 4], "big")
        if end > len(buffer):
            break
        yield marshal.loads(memoryview(buffer)[start + 4 : end])
        start = end
    del buffer[:start]


class WorkerProcess:
    """The parent's end of a worker: sends batches of requests without ever waiting, and reads."""

    def __init__(self, pool: WorkerPool, threads: int) -> None:
        self.threads, self.slots = threads, Slots(threads)
        self.batches: Dict[int, List[Request]] = {}  # sent, not yet answered
        self.buffer = bytearray()
        self._number = 0
        self._unsent = bytearray()
        requests, self._writer = os.pipe()
        self.reader, answers = os.pipe()
        for descriptor in (self._writer, answers):
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, F_SETPIPE_SZ, 1 << 20)  # let both run ahead
        self.pid = fork_quietly()
        if self.pid == 0:
            _run_worker(pool, self.slots, requests, answers)
        os.close(requests)
        os.close(answers)
        os.set_blocking(self._writer, False)

    def send(self, requests: List[Request], sealed: Sealed) -> None:
        """Ask requests, as far as the pipe takes them; `sealed` is news."""
        self._number += 1
        if requests:
            self.batches[self._number] = requests
        self._unsent += to_frame((self._number, requests, dict(sealed)))
        self.push()

    def push(self) -> bool:
        """Write what is left to be sent; False if some is left."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                del self._unsent[: os.write(self._writer, self._unsent)]
        return not self._unsent

    def close(self) -> None:
        """Kill the worker; never wait for one that the kernel holds."""
        os.close(self._writer)
        os.close(self.reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            for _ in range(20):
                if os.waitpid(self.pid, os.WNOHANG)[0]:
                    return
                time.sleep(0.005)


class WorkerPool:
    """Has requests answered by workers, and what hangs sealed off.

    `mounts` maps mount points to file system types; `answerers` the kind of a request to what
    answers it: a function that takes the Looker and the rest of the request.  None as an answer to
    anything has it asked again where threads are.
    """

    def __init__(
        self, mounts: Mapping[str, str], settings: ScanSettings, sealed: Sealed,
        answerers: Optional[Mapping[str, Answerer]] = None,
    ) -> None:  # fmt: skip
        self.mounts, self.sealed = dict(mounts), dict(sealed)
        self.stat_timeout, self.threads = settings.stat_timeout, settings.workers or AUTO_WORKERS
        self.ignore = Ignore(settings.ignore, settings.ignore_defaults)
        self.good: Counter[str] = Counter()  # targets found, by mount point
        self.answerers = {**ANSWERERS, **(answerers or {})}
        self._processes: Dict[int, WorkerProcess] = {}  # LOCAL, THREADED
        self._again: Dict[bool, Deque[Request]] = {False: deque(), True: deque()}
        self._suspects: Set[Tuple[str, float]] = set()
        self._alive: Dict[str, float] = {}  # when a mount last answered, by mount point
        self._stuck: Counter[str] = Counter()

    def close(self) -> None:
        """End all workers; the next request starts new ones, which remember nothing."""
        for process in self._processes.values():
            process.close()
        self._processes = {}

    def ask_all(self, requests: Iterable[Request], at_once: bool = True) -> List[Answer]:
        """Return the answers in the order of the requests; None for one that hangs."""
        asked = list(requests)
        found = dict(self.run(functools.partial(next, iter(asked), None), at_once))
        return [found.get(request) for request in asked]

    def run(
        self, source: Callable[[], Optional[Request]], at_once: bool = False
    ) -> Iterator[Tuple[Request, Answer]]:
        """Yield (request, answer) as they come, until all is answered.

        `source` returns the next request, None if there is none for now: an answer may bring more.
        With `at_once` many threads ask side by side, whatever the requests lead to.
        """
        while True:
            self._send(source, at_once)
            batches = (b for process in self._processes.values() for b in process.batches.values())
            if all(batch[0][0] == "alive" for batch in batches):
                return  # nobody waits for what only tells whether a mount answers
            yield from self._receive()
            self._check_hangs()

    def _send(self, source: Callable[[], Optional[Request]], at_once: bool) -> None:
        """Keep the workers busy, but not with more than they will soon get to."""
        local, threaded = self._again[False], self._again[True]
        if at_once:
            wanted = max(0, 4 * self.threads - len(threaded))
            threaded.extend(itertools.islice(iter(source, None), wanted))
        while not at_once and len(threaded) <= 4 * self.threads:
            free = (p for p in map(self._process, LOCAL) if len(p.batches) < IN_FLIGHT)
            process = next(free, None)
            if process is None:
                break
            local.extend(itertools.islice(iter(source, None), max(0, AT_ONCE - len(local))))
            if not local:
                break
            batch = [local.popleft() for _ in range(min(AT_ONCE, len(local)))]
            process.send(batch, {})
        while threaded and len(self._process(THREADED).batches) < 2 * self.threads:
            self._process(THREADED).send([threaded.popleft()], {})

    def _process(self, which: int) -> WorkerProcess:
        if which not in self._processes:
            threads = self.threads if which == THREADED else 1
            self._processes[which] = WorkerProcess(self, threads)
        return self._processes[which]

    def _receive(self) -> Iterator[Tuple[Request, Answer]]:
        """Yield the answers that have come, or nothing after a while."""
        readers = {process.reader: process for process in self._processes.values()}
        pause = min(0.25, self.stat_timeout / 16)
        for process in readers.values():
            pause = pause if process.push() else min(pause, 0.01)
        for reader in select.select(list(readers), [], [], pause)[0]:
            process = readers[reader]
            try:
                for number, answers, sealed, good in read_frames(reader, process.buffer):
                    if number < 0:
                        raise RefresherrError(answers) if sealed else RuntimeError(answers)
                    self.good.update(good)
                    for point, (state, reason) in sealed.items():
                        self.seal(point, state, reason, process)
                    for request, answer in zip(process.batches.pop(number), answers):
                        if request[0] == "alive":
                            self._alive[request[1]] = time.monotonic()
                        elif answer is None and process.threads == 1:
                            self._again[True].append(request)
                        else:
                            yield request, answer
            except EOFError:
                raise RefresherrError("a worker ended unexpectedly; run it again") from None

    def seal(
        self, point: str, state: str, reason: str, teller: Optional[WorkerProcess] = None
    ) -> None:
        """Have no worker touch a path, or what lies beneath it, any more."""
        self.sealed[point] = state, reason
        for process in self._processes.values():
            if process is not teller:
                process.send([], {point: (state, reason)})

    def _check_hangs(self) -> None:
        """Look at what each thread waits for; kill a worker that waits too long."""
        limit, now = self.stat_timeout, time.monotonic()
        for which, process in list(self._processes.items()):
            waiting = process.slots.waiting()
            for path, since in waiting:
                # Does the mount still answer, or is it only this path that hangs?
                if now - since > limit / 4 and (path, since) not in self._suspects:
                    self._suspects.add((path, since))
                    self._process(THREADED).send([("alive", self._mount_of(path))], {})
            if any(now - since >= limit for _, since in waiting):
                del self._processes[which]
                process.close()
                requests = [r for batch in process.batches.values() for r in batch]
                self._again[process.threads > 1].extendleft(r for r in requests if r[0] != "alive")
                for path, since in waiting:
                    if now - since > limit * 0.75:
                        self._give_up(path, since)

    def _give_up(self, path: str, since: float) -> None:
        """Seal off a path that hangs: by itself where its mount still answers."""
        mount = self._mount_of(path)
        self._stuck[mount] += 1
        is_mount = self._alive.get(mount, 0.0) < since or self._stuck[mount] > STUCK_LIMIT
        point = mount if is_mount else path
        if find_ancestor(point, self.sealed) is None:
            reason = f"{point} did not answer within {format_duration(self.stat_timeout)}"
            self.seal(point, UNRESPONSIVE, reason)

    def _mount_of(self, path: str) -> str:
        return find_ancestor(path, self.mounts) or "/"


def fork_quietly() -> int:
    """Fork.  Python 3.12 warns of threads in the parent; our children take none of their locks.

    But one that is just ending, an HTTP request's, may hold the interpreter's own: seen on 3.8,
    where the child then crashed.
    """
    with contextlib.suppress(OSError):
        for _ in range(50):
            if len(os.listdir("/proc/self/task")) <= threading.active_count():
                break
            time.sleep(0.002)
    # A signal's exception is lost where Python is busy with what it does after a fork.
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return os.fork()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)


def _run_worker(pool: WorkerPool, slots: Slots, requests: int, answers: int) -> None:
    """Be the worker process; never returns."""
    try:
        gc.disable()
        sys.setrecursionlimit(10000)  # paths of many directories
        os.setsid()  # Ctrl-C is the parent's business
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        requests = fcntl.fcntl(requests, fcntl.F_DUPFD, 100)  # above all others
        answers = fcntl.fcntl(answers, fcntl.F_DUPFD, requests + 1)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)  # a stuck worker must not keep anybody's pipe open
        os.closerange(3, requests)  # nor the database, nor the lock
        os.closerange(requests + 1, answers)
        _serve(Looker(pool, slots), pool.answerers, requests, answers)
    except BaseException:
        pass
    finally:
        os._exit(0)


def _serve(looker: Looker, answerers: Mapping[str, Answerer], requests: int, answers: int) -> None:
    """Answer batches of requests until the pipe ends."""
    todo: queue.Queue[Tuple[int, List[Request]]] = queue.Queue()
    lock = threading.Lock()

    def tell(number: int, found: Any, is_expected: bool = False) -> None:
        with lock:
            sealed, good = dict(looker.newly_sealed), dict(looker.good)
            looker.newly_sealed.clear()
            looker.good.clear()
            data = to_frame((number, found, is_expected if number < 0 else sealed, good))
            while data:
                data = data[os.write(answers, data) :]

    def answer(request: Request) -> Answer:
        try:
            return answerers[request[0]](looker, *request[1:])
        except ElsewhereError:
            return None

    def work(slot: int) -> None:
        looker.slots.claim(slot)
        try:
            while True:
                number, batch = todo.get()
                found = [answer(request) for request in batch]
                looker.slots.touch("")
                looker.touched = ""
                tell(number, found)
        except RefresherrError as exc:
            tell(-1, str(exc), True)
        except BrokenPipeError:
            os._exit(0)
        except BaseException as exc:
            tell(-1, f"{type(exc).__name__}: {exc}\n{traceback.format_exc()}")

    for slot in range(looker.slots.count):
        threading.Thread(target=work, args=(slot,), daemon=True).start()
    buffer = bytearray()
    while True:
        for number, batch, sealed in read_frames(requests, buffer):
            for point, (state, reason) in sealed.items():
                looker.seal(point, state, reason)
            if batch:
                todo.put((number, batch))


# ---------------------------------------------------------------------------------------------
# Scan: the verdict
# ---------------------------------------------------------------------------------------------
# A target that cannot be found is a loss only if no defence stops it: a check or a remembered mount
# that fails, an empty directory, no witness, the loss guard.  The facts of all losses come in, the
# verdicts go out; nothing here asks the disk or the database.

GUARD_TITLES = 3  # titles lost together before the guard looks at shares
MANY_TITLES = 10  # so many, and a quarter of the share is enough
FEW_OF_PLACE = 0.05  # less than this of a place's titles is no provider's folder
FRESH_SHARE = 0.5  # the guard's share while most links were never judged before
DEEP = 3  # a directory missing so many levels above the file needs to have been seen once
SAMPLES, WITNESSES = 3, 4  # library directories, and good links of each, that speak for a place
CONTRADICTION, UNWELL, BARE, NO_WITNESS, GUARD, VANISHED, ACCEPTED = (
    "contradiction", "mount", "empty", "witness", "guard", "vanished", "accepted")  # fmt: skip


class Loss(NamedTuple):
    """A link that was not known broken and whose target cannot be found.

    `goal` is where its file should be, `missing` the first name on the way that does not exist;
    `doubt` is the defence that held it in an earlier scan, `lot` the guard's lot it belongs to.
    """

    path: str
    title: str
    goal: str
    missing: str
    mount: str
    is_local: bool = True
    is_empty: bool = False  # the directory in which the name is missing
    is_listed: bool = False  # by that directory, all the same
    is_loop: bool = False  # nothing is missing: there are too many links on the way
    was_good: bool = False  # once
    is_fresh: bool = False  # no scan before this one has met the link
    doubt: str = ""
    lot: Optional[int] = None

    @property
    def near(self) -> str:
        """The nearest directory that exists."""
        return os.path.dirname(self.missing)

    @property
    def levels(self) -> int:
        """How many levels above the file the first missing name is; 0 for the file itself."""
        return self.goal[len(self.missing) :].count("/")


class Doubt(NamedTuple):
    """Why a loss is not believed: the defence, the words for it, the directory to accept."""

    defence: str
    reason: str
    directory: str


@dataclasses.dataclass
class Ground:
    """What is known of the directories around the losses, from the whole database.

    Counts of a directory are of good links into it and all beneath it on the same mount.
    """

    good: Counter[str] = dataclasses.field(default_factory=Counter)
    fresh: Counter[str] = dataclasses.field(
        default_factory=Counter
    )  # judged now for the first time
    titles: Dict[str, Set[str]] = dataclasses.field(default_factory=dict)
    more_titles: Counter[str] = dataclasses.field(default_factory=Counter)  # of flat libraries
    unwell: Mapping[str, str] = dataclasses.field(default_factory=dict)  # {point: reason}
    unions: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the same, by its branches
    failing: str = ""  # why no loss on a file system made of others is believed
    sentinels: Sequence[str] = ()  # directories for which a file has spoken
    once_good: Set[str] = dataclasses.field(default_factory=set)  # missing names beneath which
    # {missing name: a library folder with links beneath it that nobody has looked at since}
    unseen: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lost_titles: Dict[str, Set[str]] = dataclasses.field(default_factory=dict)
    # Some library directories with good links into each directory, and how these links put it.
    samples: Dict[str, List[Tuple[str, str]]] = dataclasses.field(default_factory=dict)

    def add(self, directory: str, place: str, places: Ground) -> None:
        """Count for a directory what is known of a place beneath it."""
        for mine, its in ((self.good, places.good), (self.fresh, places.fresh),
            (self.more_titles, places.more_titles)):  # fmt: skip
            if place in its:
                mine[directory] += its[place]
        self.titles.setdefault(directory, set()).update(places.titles.get(place, ()))
        samples = self.samples.setdefault(directory, [])
        samples += places.samples[place][: SAMPLES - len(samples)]

    def is_wide(self, directory: str) -> bool:
        """Tell whether links of two titles lead into a directory, good or lost."""
        good, lost = self.titles.get(directory, set()), self.lost_titles.get(directory, set())
        more = self.more_titles[directory]
        # The first two spare the union of large sets.
        return len(good) > 1 or len(lost) > 1 or len(good | lost) + more > 1


class Lot(NamedTuple):
    """What the guard held at once: it lets go when little of it is still gone."""

    number: int
    directory: str
    links: int
    titles: int


class HeldUnit(NamedTuple):
    """A directory with losses that the guard holds."""

    directory: str
    losses: List[Loss]


def directories_above(loss: Loss) -> Iterator[str]:
    """Yield the directories that still stand, from the nearest up to the mount point."""
    for directory in ancestors(loss.near):
        yield directory
        if directory == loss.mount:
            return


def find_place(loss: Loss, ground: Ground) -> str:
    """Return the directory whose good targets speak for a loss: the nearest one that exists, or the
    first above it where links of two titles lead, on the same mount.

    On the root file system, where what is not mounted leads: no further than the nearest one, or
    than the one above a file that alone is missing; unless the link was good there once.
    """
    steps = [step for step in directories_above(loss) if step != "/"]
    if loss.mount == "/" and not loss.was_good:
        steps = steps[: 2 if loss.levels == 0 else 1]
    return next(filter(ground.is_wide, steps), loss.near)


def explain_loss(loss: Loss, ground: Ground) -> Optional[Doubt]:
    """Return what the first three defences say against a loss, None if they let it pass."""
    missing, near = loss.missing, loss.near
    point = find_ancestor(loss.goal, ground.unwell)
    if point is not None:
        return Doubt(UNWELL, ground.unwell[point], point)
    if loss.mount in ground.unions:
        return Doubt(UNWELL, f"{loss.mount}: {ground.unions[loss.mount]}", loss.mount)
    if ground.failing and not loss.is_local:
        what = f"no loss on {loss.mount} is believed meanwhile"
        return Doubt(UNWELL, f"{ground.failing}; {what}", loss.mount)
    if loss.is_listed:
        why = f"{near} lists {os.path.basename(missing)}, but it cannot be looked up"
        return Doubt(CONTRADICTION, why, near)
    if loss.is_loop:
        return None
    if loss.levels and missing in ground.unseen:
        folder = ground.unseen[missing]
        why = f"{missing} is gone, and links in {folder} lead there, too: run `scan` of all roots"
        return Doubt(NO_WITNESS, why, missing)
    parent = os.path.dirname(near)
    perhaps = "perhaps nothing is mounted there"
    if loss.levels:
        perhaps = f"{missing} does not exist here: is the volume mapped into this container?"
    is_bare = loss.is_local and (parent == "/" or not ground.good[parent])
    if loss.is_empty and (is_bare or near == loss.mount):
        return Doubt(BARE, f"{near} is empty: {perhaps}", near)
    place = find_place(loss, ground)
    was_seen = loss.levels < DEEP or missing in ground.once_good
    if was_seen and (ground.good[place] or any(is_under(s, place) for s in ground.sentinels)):
        return None
    if loss.levels:
        return Doubt(NO_WITNESS, perhaps, missing)
    why = f"nothing beneath {place} can be found, of all that links lead to"
    return Doubt(NO_WITNESS, why, place)


def count_titles(losses: Iterable[Loss]) -> int:
    """Return how many titles some losses are of."""
    return len({loss.title for loss in losses})


def is_too_much(gone: int, of_links: int, titles: int, share: float) -> bool:
    """Tell whether more is gone at once than is lost by itself."""
    return (titles >= GUARD_TITLES and gone > share * of_links) or (
        titles >= MANY_TITLES and gone > share / 4 * of_links
    )


def is_lot_over(lot: Lot, still: Sequence[Loss], share: float) -> bool:
    """Tell whether so little of a lot is still gone, in its directory and all beneath it, that the
    guard lets go of it.
    """
    gone = [loss for loss in still if loss.lot == lot.number or is_under(loss.goal, lot.directory)]
    return share >= 1.0 or count_titles(gone) < GUARD_TITLES or len(gone) <= share * lot.links


def find_suspicious(losses: Sequence[Loss], ground: Ground, share: float) -> Set[str]:
    """Return the directories of which too much is gone at once: missing ones that took many
    titles along, and standing ones that lost too large a share.
    """
    found = set()
    by_missing: Dict[str, List[Loss]] = defaultdict(list)
    beneath: Dict[str, List[Loss]] = defaultdict(list)
    for loss in losses:
        by_missing[loss.missing].append(loss)
        for directory in directories_above(loss):
            beneath[directory].append(loss)
    for missing, group in by_missing.items():
        titles = count_titles(group)
        folders = len({os.path.dirname(loss.goal) for loss in group})
        if titles < GUARD_TITLES or folders < GUARD_TITLES:
            continue
        place = find_place(group[0], ground)
        good = ground.titles.get(place, set())
        others = {loss.title for loss in beneath[place]} - good
        of_place = len(good) + len(others) + ground.more_titles[place]
        if titles >= MANY_TITLES or titles >= FEW_OF_PLACE * of_place:
            found.add(missing)
    for directory, group in beneath.items():
        known = [loss for loss in group if not loss.is_fresh]
        of_links, of_known = (n + ground.good[directory] for n in (len(group), len(known)))
        of_known -= ground.fresh[directory]
        limit = share if of_known * 2 >= of_links else max(share, FRESH_SHARE)
        # New links dilute nothing: those that are known are weighed by themselves, too.
        if is_too_much(len(group), of_links, count_titles(group), limit) or is_too_much(
            len(known), of_known, count_titles(known), share
        ):
            found.add(directory)
    return found


def hold_losses(
    losses: Sequence[Loss], held: Sequence[Loss], ground: Ground, share: float
) -> List[HeldUnit]:
    """Return the units of losses that the guard holds; `held` are those that it holds already."""
    if share >= 1.0:
        return []
    suspicious = find_suspicious([*losses, *held], ground, share)
    groups: Dict[str, List[Loss]] = defaultdict(list)
    stands: Dict[str, Set[str]] = defaultdict(set)
    for is_new, loss in [(True, loss) for loss in losses] + [(False, loss) for loss in held]:
        above = [directory for directory in directories_above(loss) if directory in suspicious]
        if loss.missing in suspicious:
            above = [loss.missing]
        if above:
            stands[above[-1]].add(loss.missing if loss.levels else loss.near)
            groups[above[-1]] += [loss] * is_new
    units: Dict[str, List[Loss]] = defaultdict(list)
    for directory, group in groups.items():
        if group:  # named by the smallest directory that holds it all: what may be accepted
            units[os.path.commonpath(stands[directory])] += group
    return [HeldUnit(directory, group) for directory, group in units.items()]


def survey_losses(losses: Iterable[Loss], ground: Ground) -> None:
    """Note for the ground which titles are lost where, and what was good once."""
    for loss in losses:
        for directory in directories_above(loss):
            ground.lost_titles.setdefault(directory, set()).add(loss.title)
        if loss.was_good:
            ground.once_good.add(loss.missing)


class Verdicts(NamedTuple):
    """What is decided: the doubts about losses by path, what the guard holds anew, and what it
    lets go.  A loss without a doubt is believed.
    """

    doubts: Dict[str, Doubt]
    units: List[HeldUnit]
    released: Set[int]


def judge_losses(
    losses: Sequence[Loss], elsewhere: Sequence[Loss], removed: Sequence[Loss], ground: Ground,
    lots: Sequence[Lot], share: float, accepted: Sequence[str] = (), seen: Optional[Ground] = None,
) -> Verdicts:  # fmt: skip
    """Decide about all losses of a scan.

    `seen` is the ground of what this scan has looked at, where it was one of some roots: the rest
    may be gone as well, so too much of that is believed by a scan of all roots alone.

    `elsewhere` are losses that the guard holds already and that this scan has not met, `removed`
    those whose links are gone themselves: they make a lot no smaller.  `accepted` are directories
    whose loss the user confirms: of what an earlier scan has seen and held.
    """
    survey_losses([*losses, *elsewhere], ground)
    still = [loss for loss in (*losses, *elsewhere, *removed) if loss.lot is not None]
    released = {lot.number for lot in lots if is_lot_over(lot, still, share)}
    standing = {lot.number: lot.directory for lot in lots if lot.number not in released}
    doubts: Dict[str, Doubt] = {}
    open_losses, held = [], []
    for loss in losses:
        doubt = explain_loss(loss, ground)
        is_accepted = loss.doubt == ACCEPTED or any(is_under(loss.goal, d) for d in accepted)
        if loss.doubt and is_accepted and not (doubt and doubt.defence in (UNWELL, CONTRADICTION)):
            continue
        if doubt:
            doubts[loss.path] = doubt
        elif loss.lot in standing:
            held.append(loss)
            doubts[loss.path] = guard_doubt(standing[loss.lot])
        elif not loss.is_loop:  # no outage makes loops
            open_losses.append(loss)
    units = hold_losses(open_losses, [*held, *elsewhere], ground, share)
    for unit in units:
        doubts.update((loss.path, guard_doubt(unit.directory)) for loss in unit.losses)
    if seen is not None:
        # What the guard has let go of was weighed by a scan before.
        fresh = [x for x in open_losses if x.path not in doubts and x.lot is None]
        for unit in hold_losses(fresh, (), seen, share):
            why = f"too much of what this scan has looked at is gone from {unit.directory}: "
            why += "run `scan` of all roots"
            doubt = Doubt(NO_WITNESS, why, unit.directory)
            doubts.update((loss.path, doubt) for loss in unit.losses)
    return Verdicts(doubts, units, released)


GUARD_WORDS = "held by the loss guard: "


def guard_doubt(directory: str) -> Doubt:
    """Return the doubt about a loss that the guard holds."""
    return Doubt(GUARD, f"{GUARD_WORDS}too much is gone at once from {directory}", directory)


# ---------------------------------------------------------------------------------------------
# Scan: the record
# ---------------------------------------------------------------------------------------------
# The walk goes from directory to directory, from each root down.  One that is as the last scan left
# it costs its row and nothing more; of the others every link is compared with its row.  What is
# found is recorded at once; what cannot be found waits for the verdict.

BATCH = 8000  # rows in one transaction
TOLD = 20  # directories; after so many the progress is told
ROWS_AT_ONCE = 100  # in one statement
LOOKS = 4  # at what was gone, as long as mounts come and go
FULL_READING = 64  # scans in which every directory is read in full once
NEVER_JUDGED = "never judged: "  # `symlinks.error` begins so where no scan has seen the link good
_TALLIED = ("examined", OK, BROKEN, UNREACHABLE)


@dataclasses.dataclass(frozen=True)
class ScanJob:
    """What a scan is to do.

    `all_roots` are the configured ones besides; `accept` are directories whose losses, seen and
    held by an earlier scan, are confirmed; with `full` every directory is read.
    """

    settings: ScanSettings
    roots: Sequence[str]
    all_roots: Sequence[str] = ()
    accept: Sequence[str] = ()
    full: bool = False


def never_judged(known: Optional[KnownLink]) -> bool:
    """Tell whether no scan has ever seen whether the link is good."""
    return known is None or known.error.startswith(NEVER_JUDGED)


class WatchedMount(NamedTuple):
    """A mount whose health decides about what lies beneath: a 'check', or 'remembered'."""

    state: str
    reason: str
    point: str
    fs_type: str
    role: str


class Watch:
    """The pool of workers, and the mounts that are watched: asked before a scan and after it."""

    def __init__(
        self, conn: sqlite3.Connection, settings: ScanSettings,
        answerers: Optional[Mapping[str, Answerer]] = None,
    ) -> None:  # fmt: skip
        self.conn, self.settings, self.answerers = conn, settings, answerers
        self.types = read_mounts()
        rows = conn.execute("SELECT mount_point, fs_type FROM mounts")
        self.remembered = {from_db(point): fs_type for point, fs_type in rows}
        self.mounts: List[WatchedMount] = []
        self.library: List[str] = []  # where the roots really are
        self.pool = self.open_pool({})

    def close(self) -> None:
        """End the workers."""
        self.pool.close()

    def open_pool(self, sealed: Sealed) -> WorkerPool:
        points = {**self.remembered, **self.types}
        return WorkerPool(points, self.settings, sealed, self.answerers)

    def probe(self) -> None:
        """Ask all watched mounts at once how they are, and seal off what cannot be walked."""
        asked = [("mount", p, "remembered", kind, p) for p, kind in self.remembered.items()]
        known = {**self.types, **self.remembered}
        for check in self.settings.mount_checks:
            # While it cannot be looked at, only its name and place tell a sentinel from a mount.
            folder, name = os.path.split(check)
            is_file = check not in known and ("." in name or find_ancestor(folder, known) != "/")
            asked.append(("mount", check, "check", "", folder if is_file else check))
        answers = self.pool.ask_all(asked)
        self.mounts = [WatchedMount(*answer) for answer in answers]
        for state, reason, point, _, role in self.mounts:
            if state in (ABSENT, UNRESPONSIVE) or (role == "check" and state != HEALTHY):
                self.pool.seal(point, state, reason)
        self.types = read_mounts()  # autofs mounts what is asked for

    def restart(self) -> None:
        """Have everything looked at anew: the workers forget what they know."""
        self.pool.close()
        stuck = {p: why for p, why in self.pool.sealed.items() if why[0] == UNRESPONSIVE}
        self.pool = self.open_pool(stuck)
        self.probe()

    def unwell(self) -> Dict[str, str]:
        """Return {point: reason} of all that is not healthy."""
        found = {point: reason for point, (_, reason) in self.pool.sealed.items()}
        found.update({m.point: m.reason for m in self.mounts if m.state != HEALTHY})
        return found

    def failing(self) -> str:
        """Return why no loss on a file system made of others may be believed, '' if it may."""
        reasons = (mount.reason for mount in self.mounts if mount.state != HEALTHY
            and (mount.role == "check" or self.is_used(mount.point)))  # fmt: skip
        return next(reasons, "")

    def is_used(self, point: str) -> bool:
        """Tell whether some known link leads beneath a mount point, or lies on it."""
        if any(is_under(point, real) or is_under(real, point) for real in self.library):
            return True
        condition, values = beneath(point, "last_target")
        select = f"""SELECT 1 FROM symlinks WHERE status <> 'missing' AND {condition}
            UNION ALL SELECT 1 FROM mounts WHERE mount_point = ? AND good_targets LIMIT 1"""
        return self.conn.execute(select, (*values, to_db(point))).fetchone() is not None

    def look(self, paths: Iterable[str], read: bool = False) -> Dict[str, Look]:
        """Look at links, and with `read` whether the files they lead to can be read."""
        requests = (("look", path, read) for path in paths)
        source = functools.partial(next, requests, None)
        return {request[1]: Look(*look) for request, look in self.pool.run(source)}

    def make_loss(self, look: Look, title: str, old: Optional[KnownLink], **known: Any) -> Loss:
        """Return what a look at a link that leads nowhere has found."""
        was_good = bool(old and not never_judged(old) and from_db(old.target) == look.target)
        kind = self.types.get(look.mount, "unknown")
        is_local = not (is_network_type(kind) or kind in UNION_TYPES)
        return Loss(
            look.path, title, look.goal, look.missing, look.mount, is_local, bool(look.empty),
            look.is_listed, look.is_loop, was_good, old is None, **known,
        )  # fmt: skip

    def make_ground(self, mounts: Iterable[str]) -> Ground:
        """Return what the mounts say about losses on some of them."""
        unions = self.examine_unions(mounts)
        ground = Ground(unwell=self.unwell(), unions=unions, failing=self.failing())
        ground.sentinels = [mount.point for mount in self.mounts if mount.fs_type == SENTINEL]
        return ground

    def examine_unions(self, points: Iterable[str]) -> Dict[str, str]:
        """Return {union: problem} of those that have lost a branch; remember the branches."""
        problems: Dict[str, str] = {}
        known: Dict[str, Dict[str, Tuple[str, str]]] = defaultdict(dict)
        select = "SELECT union_point, path, mount_point, fs_type FROM branches"
        for union, path, point, kind in self.conn.execute(select):
            known[from_db(union)][from_db(path)] = from_db(point), kind
        unions = [p for p in points if self.types.get(p, "") in UNION_TYPES]
        asked = [("branches", p, self.types[p], tuple(known[p])) for p in unions]
        for union, branches in zip(unions, self.pool.ask_all(asked) if asked else ()):
            old = known[union]
            if old and not branches:
                problems[union] = "it does not tell its branches any more; "
                problems[union] += f"if that is meant, run scan --forget-mount {union}"
                continue
            for path, point, kind, problem in branches or ():
                if path in old and not problem and old[path] != (point, kind):
                    problem = f"{path} was on {old[path][0]} ({old[path][1]}), not on {point}"
                if problem and (path in old or problem.startswith("!")):
                    problems.setdefault(union, "its branch " + problem.lstrip("!"))
                elif not problem:
                    old[path] = point, kind
                    if kind in UNION_TYPES and point != union and point not in points:
                        within = self.examine_unions([*points, point])
                        problems.update({union: within[point]} if point in within else {})
            rows = [(to_db(union), to_db(path), to_db(old[path][0]), old[path][1])
                for path, *_ in branches or () if path in old]  # fmt: skip
            with transaction(self.conn):
                self.conn.execute("DELETE FROM branches WHERE union_point = ?", (to_db(union),))
                self.conn.executemany("INSERT INTO branches VALUES (?, ?, ?, ?)", rows)
        return problems


_NEW_GOOD = """INSERT OR IGNORE INTO symlinks
    (path, last_target, status, last_status, first_seen_utc, last_seen_utc)
    SELECT column1, column2, 'ok', 'ok', now, now FROM (SELECT ? AS now), (VALUES (?, ?)"""
_WRITE_DIRECTORY = """INSERT INTO directories (path, mark, links, targets) VALUES (?, ?, ?, ?)
    ON CONFLICT(path) DO UPDATE SET mark = excluded.mark, links = excluded.links,
    targets = excluded.targets"""
_CLEAR_DOUBT = "DELETE FROM doubts WHERE path = ?"
_WRITE_DOUBT = "INSERT OR REPLACE INTO doubts VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_WRITE_LOSS = """INSERT INTO losses (path, target, title, mount_point, lost_utc, gone_since_utc)
    VALUES (?, ?, ?, ?, ?, ?)"""


class LinkWriter:
    """Collects rows of links, events and directories, and writes them in short transactions.

    A scan that is interrupted leaves true rows.
    """

    def __init__(self, conn: sqlite3.Connection, now: str) -> None:
        self.conn, self.now = conn, now
        self.changes: Counter[str] = Counter()
        self.new_good: List[Union[str, bytes]] = []  # paths and targets in turn
        self.events: List[Event] = []
        # In this order: a directory's row after its links, for a scan may be killed in between.
        order = (_WRITE_LINK, _WRITE_DIRECTORY, _CLEAR_DOUBT, _WRITE_DOUBT, _WRITE_LOSS)
        self.rows: Dict[str, List[Tuple[Any, ...]]] = {statement: [] for statement in order}

    def write(self, statement: str, *values: Any) -> None:
        """Have a statement executed with some values, names among them as text."""
        row = tuple(to_db(value) if isinstance(value, str) else value for value in values)
        self.rows[statement].append(row)

    def record(
        self, path: str, target: str, status: str, reason: str, old: Optional[KnownLink]
    ) -> None:
        """Note a judgement: its row, and its event if there is one."""
        if status == UNREACHABLE and never_judged(old) and not reason.startswith(NEVER_JUDGED):
            reason = NEVER_JUDGED + reason
        change = classify_change(old, status)
        self.changes["new"] += old is None
        if change:
            self.changes[change] += 1
            self.events.append(link_event(path, target, change, status))
        self.rows[_WRITE_LINK].append(link_row(path, target, status, reason, self.now, old))

    def flush(self, at_least: int = 0) -> None:
        """Write what has been collected, if that is so many rows."""
        if len(self.new_good) // 2 + len(self.rows[_WRITE_LINK]) < at_least:
            return
        with transaction(self.conn):
            for start in range(0, len(self.new_good), 2 * ROWS_AT_ONCE):
                some = self.new_good[start : start + 2 * ROWS_AT_ONCE]
                insert = f"{_NEW_GOOD}{', (?, ?)' * (len(some) // 2 - 1)})"
                self.conn.execute(insert, [self.now, *some])
            _write_events(self.conn, self.events)
            for statement, rows_of in self.rows.items():
                self.conn.executemany(statement, rows_of)
                rows_of.clear()
        self.new_good, self.events = [], []


class Folder(NamedTuple):
    """A library directory that is to be visited, and what the last scan noted of it."""

    path: str
    root: int
    rowid: int
    mark: str  # '' where it is to be read in full
    packed: bytes
    is_noted: bool  # with a mark, whether that is to be trusted this time or not


class LostLink(NamedTuple):
    """A link that was not found, as the walk has put it aside."""

    path: str
    text: str
    where: Tuple[str, str, str]  # the first missing name, the goal, the mount point
    old: Optional[KnownLink]
    root: int
    is_flat: bool

    @property
    def title(self) -> str:
        """The show's or movie's folder in the library, or what stands for it."""
        return self.path if self.is_flat else title_of(self.path)


class Walk:
    """Visits the directories of the roots, and records what their links lead to."""

    def __init__(self, conn: sqlite3.Connection, job: ScanJob, watch: Watch) -> None:
        self.conn, self.job, self.watch = conn, job, watch
        # No two scans share it.
        self.now = datetime.datetime.now(datetime.timezone.utc).isoformat()
        self.writer = LinkWriter(conn, self.now)
        tally = {"state": "scanned", "reason": "", **dict.fromkeys(_TALLIED, 0)}
        self.roots: List[JsonObject] = [{"path": root, **tally} for root in job.roots]
        self.real: Dict[int, str] = {}  # where the roots that are walked really are
        self.root_paths = {root.rstrip("/") or "/" for root in (*job.roots, *job.all_roots)}
        self.covered: Dict[str, int] = {}  # other roots within them, as the walk meets them
        self.ignored = 0
        self.unread: Dict[str, str] = {}
        self.vanished: List[Tuple[int, str, str]] = []  # (rowid, path, target)
        self.lost: List[LostLink] = []
        self.new_targets: Set[str] = set()  # of links not known before
        self.refusals: Counter[str] = Counter()  # links not judged, by the reason
        self.cleared: Set[str] = set()  # links whose doubts have ended
        self.blocked: Set[str] = set()  # sealed points that links lead to
        rows = conn.execute("SELECT path, defence, lot_id FROM doubts")
        self.doubts = {from_db(path): (defence, lot) for path, defence, lot in rows}
        newest = "SELECT coalesce(max(rowid), 0) FROM "
        self.last_link = int(conn.execute(newest + "symlinks").fetchone()[0])
        self.last_folder = int(conn.execute(newest + "directories").fetchone()[0])
        self.visited = bytearray(self.last_folder // 8 + 1)
        self.seen = 0  # rows that stood there before this scan and were met
        self.turn = self._next_turn()
        self.todo: List[Tuple[str, int]] = []
        self.ready: Deque[Folder] = deque()
        self.asked: Dict[str, Folder] = {}
        self.odd: List[Tuple[Any, ...]] = []  # links that wait for `take_odd`
        conn.execute("PRAGMA wal_autocheckpoint=8000")  # 32 MB: fewer pages are written twice

    def _next_turn(self) -> int:
        """Count the scans; -1 where every directory is to be read."""
        settings = self.job.settings
        rules = repr((settings.ignore, settings.ignore_defaults, os.geteuid()))
        notes = dict(self.conn.execute("SELECT name, value FROM notes WHERE name LIKE 'scan %'"))
        turn = int(notes.get("scan turn") or 0) + 1
        with transaction(self.conn):
            rows = [("scan turn", str(turn)), ("scan rules", rules)]
            self.conn.executemany("INSERT OR REPLACE INTO notes VALUES (?, ?)", rows)
        is_same = notes.get("scan rules") == rules and not self.job.full
        return turn % FULL_READING if is_same else -1

    def open_roots(self) -> None:
        """Look at every root, and put the good ones on the pile; what overlaps is walked once."""
        answers = self.watch.pool.ask_all([("root", root, False) for root in self.job.roots])
        self.watch.library += [real for _, _, real in answers if real]
        for number, (state, reason, real) in enumerate(answers):
            if state == "scanned":
                self.real[number] = real.rstrip("/")
                continue
            self.roots[number].update(state=ERROR if state == "refused" else state, reason=reason)
            root = self.job.roots[number]
            log.error("root %s: %s; its known links stay as they were", root, reason)
            if state == "refused":
                self.refusals[reason] += 0
        real_paths = dict(self.real)
        for number, path in real_paths.items():
            holding = [o for o, above in real_paths.items() if is_under(path or "/", above or "/")]
            outer = [o for o in holding if real_paths[o] != path or o < number]
            if not outer:
                self.todo.append((self.job.roots[number].rstrip("/") or "/", number))
            for other in outer:
                seen_as = self.job.roots[other].rstrip("/") + path[len(real_paths[other]) :]
                self.covered[seen_as] = number
                self.real.pop(number, None)

    def run(self, progress: Callable[[str], None]) -> None:
        """Visit all that is to be visited; one that is interrupted keeps what it has seen."""
        try:
            answers = self.watch.pool.run(self.next_request)
            for number, (request, answer) in enumerate(answers, 1):
                self.take(self.asked.pop(request[1]), Visit(*answer))
                if number % TOLD == 1:
                    progress(f"{sum(root['examined'] for root in self.roots):,} links examined")
                    self.writer.flush(BATCH)
            self.take_odd()
        finally:
            self.writer.flush()

    def next_request(self) -> Optional[Request]:
        """Return what is to be visited next, None if that is nothing for now."""
        if not self.ready:
            self.fetch()
        if not self.ready:
            return None
        folder = self.ready.popleft()
        self.asked[folder.path] = folder
        return "visit", folder.path, folder.mark, folder.packed

    def fetch(self) -> None:
        """Load what is noted of the next directories."""
        chosen = self.todo[-_LOOKUP:][::-1]
        del self.todo[-_LOOKUP:]
        known: Dict[str, Tuple[Any, ...]] = {}
        if self.last_folder and chosen:
            keys = [to_db(path) for path, _ in chosen]
            marks = ",".join("?" * len(keys))
            select = f"""SELECT path, rowid, mark, targets FROM directories
                WHERE path IN ({marks}) AND rowid <= ?"""
            rows = self.conn.execute(select, [*keys, self.last_folder])
            known = {from_db(path): row for path, *row in rows}
        for path, root in chosen:
            rowid, mark, packed = known.get(path, (0, None, None))
            is_due = self.turn < 0 or rowid % FULL_READING == self.turn
            trusted = "" if is_due or not mark else mark
            self.ready.append(Folder(path, root, rowid, trusted, packed or b"", bool(mark)))

    def take(self, folder: Folder, visit: Visit) -> None:
        """Record what a visit found."""
        if visit.kind == "unread":
            self.unread[folder.path] = visit.reason
            told = "cannot read %s: %s; its links stay as they were"
            log.warning(told, folder.path, visit.reason)
        if visit.kind in ("unread", "gone"):
            return  # the rows of one that is gone are found at the end, like all unmet ones
        if folder.rowid:
            self.visited[folder.rowid // 8] |= 1 << folder.rowid % 8
        prefix = folder.path.rstrip("/") + "/"
        if visit.kind == "same":
            self.seen += visit.links
        else:
            self.ignored += visit.ignored
            vanished = len(self.vanished)
            self.compare(folder, prefix, visit)
            # It is read again, until what has vanished from it is recorded.
            mark = visit.mark if visit.mark and len(self.vanished) == vanished else None
            self.writer.write(_WRITE_DIRECTORY, folder.path, mark, visit.links, visit.packed)
        self.roots[folder.root]["examined"] += visit.links
        self.roots[folder.root][OK] += visit.links - len(visit.odd)
        for name in reversed(visit.folders):
            path = prefix + name
            self.todo.append((path, self.covered.get(path, folder.root)))
        if visit.odd:
            is_flat = is_flat_folder(folder.path, visit.heads, self.root_paths)
            self.odd += [
                (prefix + name, folder.root, is_flat, *found) for name, *found in visit.odd
            ]
            if len(self.odd) >= _LOOKUP:
                self.take_odd()

    def compare(self, folder: Folder, prefix: str, visit: Visit) -> None:
        """Compare the links of a directory that was read with their rows; write the differences."""
        paths = [prefix + name for name in visit.names]
        odd = {prefix + name for name, *_ in visit.odd}
        known = find_links(self.conn, paths) if self.last_link and paths else {}
        met = [row for row in known.values() if row.status != MISSING]
        self.seen += sum(row.rowid <= self.last_link for row in met)
        good = list(zip(paths, visit.texts))
        if odd:
            good = [link for link in good if link[0] not in odd]
        if self.last_link:
            new = [link for link in zip(paths, visit.texts) if link[0] not in known]
            self.new_targets.update(text for _, text in new)
            for path, text in good:
                old = known.get(path)
                if old and (old.status != OK or old.target != text or old.broken_since):
                    self.writer.record(path, text, OK, "", old)
                    self.clear_doubt(path)
            good = [link for link in good if link[0] not in known]
        names = itertools.chain.from_iterable(good)
        self.writer.new_good += names if is_plain(prefix, visit) else map(to_db, names)
        self.writer.changes["new"] += len(good)
        if folder.rowid:
            links = marshal.loads(folder.packed)[1] if folder.packed else 0
            if links > len(met) or not folder.is_noted:  # somebody else may have written rows
                self.find_vanished(prefix, set(paths))

    def find_vanished(self, prefix: str, present: Set[str]) -> None:
        """Find the rows of links that their directory does not hold any more."""
        condition, values = beneath(prefix)
        select = f"""SELECT rowid, path, last_target FROM symlinks WHERE {condition}
            AND status <> 'missing' AND rowid <= ?"""
        for rowid, name, target in self.conn.execute(select, (*values, self.last_link)):
            path = from_db(name)
            if "/" not in path[len(prefix) :] and path not in present:
                self.vanished.append((rowid, path, from_db(target)))

    def take_odd(self) -> None:
        """Record the links that are not simply found; those that are gone wait for the verdict."""
        known = find_links(self.conn, [link[0] for link in self.odd])
        for path, root, is_flat, text, finding, detail in self.odd:
            old = known.get(path)
            if old and from_db(old.target) != text and path in self.doubts:
                self.clear_doubt(path)  # what was doubted or accepted is another loss
                del self.doubts[path]
            if finding == FOUND_BY_CHAIN:
                self.roots[root][OK] += 1
                if not (old and old.status == OK and old.target == text):
                    self.writer.record(path, text, OK, "", old)
                self.clear_doubt(path)
            elif finding == GONE:
                self.lost.append(LostLink(path, text, tuple(detail), old, root, is_flat))
            else:
                self.roots[root][UNREACHABLE] += 1
                reason = self.explain_block(detail) if finding == BLOCKED else detail
                self.writer.record(path, text, UNREACHABLE, reason, old)
        self.odd = []

    def explain_block(self, point: str) -> str:
        """Return why a link beneath a sealed point cannot be judged; a whole mount is a refusal."""
        self.blocked.add(point)
        reason = self.watch.pool.sealed[point][1]
        if point in self.watch.pool.mounts or any(m.point == point for m in self.watch.mounts):
            self.refusals[reason] += 1
        return reason

    def clear_doubt(self, path: str) -> None:
        """Note that a link is good: no defence holds it any more."""
        if path in self.doubts:
            self.cleared.add(path)
            self.writer.write(_CLEAR_DOUBT, path)

    def walked_roots(self) -> List[str]:
        return [self.job.roots[number] for number in self.real]

    def count_rows(self, roots: Sequence[str], is_missing: bool = False) -> int:
        """Count the links beneath roots that stood there before this scan, or that are missing."""
        total = 0
        for place, values in map(beneath, roots):
            query = f"SELECT count(*) FROM symlinks WHERE {place} AND rowid <= ?"
            missing = f"{query} AND status <> 'ok' AND status = 'missing'"  # so says the index
            values.append(self.last_link)
            count = self.conn.execute(missing, values).fetchone()[0]
            if not is_missing:
                count = self.conn.execute(query, values).fetchone()[0] - count
            total += count
        return total


def is_plain(prefix: str, visit: Visit) -> bool:
    """Tell whether SQLite holds all the names of a directory as they are."""
    try:
        "".join((prefix, *visit.names, *visit.texts)).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_flat_folder(path: str, heads: int, roots: Collection[str]) -> bool:
    """Tell whether each link of a library directory is a title by itself: in a root, or where they
    lead into many directories; not in a season.
    """
    if parse_season_folder(path.rpartition("/")[2]) is not None:
        return False
    return heads >= GUARD_TITLES or path in roots


def title_of(path: str) -> str:
    """Return the title of a lost link: its show's or movie's folder, unless the link is a folder of
    its own or its name tells another work, as where many works lie side by side.
    """
    folder, _, name = path.rpartition("/")
    if title_folder(path) != folder or parse_season_folder(name) is not None:
        return title_folder(path)
    if not _EXTENSION.search(name):
        return path
    own, its = parse_work(f"/{name}"), _parse_title(folder.rpartition("/")[2])[0]
    is_told = is_video(name) and own.title and (own.year or own.kind == "episode")
    if not is_told or normalise_title(own.title) == normalise_title(its):
        return folder
    return f"{folder}/{normalise_title(own.title)} ({own.year})"


class Judgement:
    """The end of a scan: what is gone is looked at again and judged, then what has vanished."""

    def __init__(self, walk: Walk, share: float) -> None:
        self.walk, self.share, self.now = walk, share, walk.now
        self.conn, self.watch, self.writer = walk.conn, walk.watch, walk.writer
        self.mounted = read_mounts(identity=True)
        self.good: Counter[str] = Counter()  # by mount point
        self.unwell: Dict[str, str] = {}
        self.loss_mounts: Set[str] = set()
        self.losses: List[Loss] = []
        self.seen: Optional[Ground] = None  # what this scan has looked at, where that is not all
        self.elsewhere: List[Loss] = []  # what the guard holds and this scan has not met
        self.removed: List[Loss] = []  # the same, and the links are gone themselves
        self.units: List[JsonObject] = []
        self.told: Dict[str, str] = {}  # what is said of losses without a witness, by directory
        accept = self.walk.job.accept
        real = self.watch.pool.ask_all([("root", path, False) for path in accept])
        self.accepted = [path for path in (*accept, *(answer[2] for answer in real)) if path]

    def run(self) -> None:
        """Judge all that the walk has put aside, and record what has been seen or has vanished."""
        self.good.update(self.watch.pool.good)
        pending, known_broken = {}, []
        for link in self.walk.lost:
            if link.old and link.old.broken_since and from_db(link.old.target) == link.text:
                known_broken.append(link)
            else:
                pending[link.path] = link
        looks = self.look_again(pending)
        if not pending and any(root[UNREACHABLE] for root in self.walk.roots):
            self.watch.probe()  # is it a whole mount?
        self.unwell = {**self.watch.unwell(), **self.find_remounted()}
        self.loss_mounts = {look.mount for look in looks.values() if look.mount}
        ground = self.survey(pending, looks)
        for link in known_broken:
            point = find_ancestor(link.where[1], self.unwell)
            if point:
                self.walk.refusals[self.unwell[point]] += 1
            status, reason = (UNREACHABLE, self.unwell[point]) if point else (BROKEN, "")
            self.settle(link, status, reason, link.where[2])
        self.judge(pending, looks, ground)
        self.writer.flush()
        present = PresentLinks(self)
        present.record_vanished()
        present.record_seen()

    def look_again(self, pending: Mapping[str, LostLink]) -> Dict[str, Look]:
        """Look once more, all anew: a mount may have been away for a moment.

        And again as long as anything is mounted or unmounted meanwhile.
        """
        looks: Dict[str, Look] = {}
        for _ in range(LOOKS if pending else 0):
            has_changed = watch_mounts()
            self.watch.restart()
            looks = self.watch.look(pending)
            self.watch.probe()  # a mount may have gone while its targets were looked for
            if not has_changed():
                break
        return looks

    def find_remounted(self) -> Dict[str, str]:
        """Return {point: reason} of what was mounted or unmounted in the middle of the scan."""
        now = read_mounts(identity=True)
        points = {p for p in {*now, *self.mounted} if now.get(p) != self.mounted.get(p)}
        return {point: f"{point} was mounted or unmounted during the scan" for point in points}

    def survey(self, pending: Mapping[str, LostLink], looks: Mapping[str, Look]) -> Ground:
        """Gather what the verdict must know; only around the losses, if there are any."""
        ground = self.watch.make_ground({*self.good, *self.loss_mounts})
        ground.unwell = self.unwell
        for path, look in looks.items():
            if look.finding == GONE:
                defence, lot = self.walk.doubts.get(path, ("", None))
                link = pending[path]
                loss = self.watch.make_loss(look, link.title, link.old, doubt=defence, lot=lot)
                self.losses.append(loss)
        met = {loss.path for loss in self.losses} | self.walk.cleared
        rows = """SELECT path, title, goal, missing, mount_point, lot_id, s.status FROM doubts
            LEFT JOIN symlinks s USING (path) WHERE lot_id IS NOT NULL"""
        for *texts, lot, status in self.conn.execute(rows):
            path, title, goal, missing, mount = map(from_db, texts)
            loss = Loss(path, title, goal, missing, mount, doubt=GUARD, lot=lot)
            if path not in met:
                (self.elsewhere if status == UNREACHABLE else self.removed).append(loss)
        if self.losses:
            wanted = {d for x in (*self.losses, *self.elsewhere) for d in directories_above(x)}
            wanted |= {os.path.dirname(directory) for directory in wanted}
            wanted |= {loss.missing for loss in self.losses}
            is_first = self.walk.last_folder == 0 < self.walk.last_link  # of this edition's
            newest = sys.maxsize if is_first else self.walk.last_folder
            unsettled = sum(bool(x.old and x.old.status == OK) for x in pending.values())
            roots = self.walk.root_paths
            count = functools.partial(
                count_good, self.conn, wanted=wanted, mounts=self.watch.types, roots=roots,
                newest=newest, unsettled=unsettled,
            )  # fmt: skip
            count(ground)
            walked = {root.rstrip("/") or "/" for root in self.walk.walked_roots()}
            within, values = beneath_any(sorted(walked))
            select = f"SELECT path FROM directories WHERE targets IS NOT NULL AND NOT {within}"
            if any(from_db(row[0]) not in walked for row in self.conn.execute(select, values)):
                self.seen = dataclasses.replace(
                    ground, good=Counter(), fresh=Counter(), titles={}, more_titles=Counter(),
                    samples={},
                )  # fmt: skip
                count(self.seen, within=walked)
            # Where no roots are configured, all that was ever scanned is the library.
            known = roots if self.walk.job.all_roots else None
            ground.unseen = find_unseen(self.losses, ground, known)
        return ground

    def judge(
        self, pending: Mapping[str, LostLink], looks: Mapping[str, Look], ground: Ground
    ) -> None:
        """Judge what was looked at again, and record the verdicts."""
        rows = self.conn.execute("SELECT lot_id, directory, links, titles FROM lots")
        lots = [Lot(number, from_db(d), links, titles) for number, d, links, titles in rows]
        verdicts = judge_losses(
            self.losses, self.elsewhere, self.removed, ground, lots, self.share, self.accepted,
            self.seen,
        )  # fmt: skip
        by_path = {loss.path: loss for loss in self.losses}
        numbers = self.write_lots(verdicts, lots)
        for path, look in looks.items():
            link, loss = pending[path], by_path.get(path)
            doubt = verdicts.doubts.get(path)
            if look.finding == FOUND:
                self.settle(link, OK, "", look.mount)
            elif look.finding == NO_LINK:
                self.walk.roots[link.root]["examined"] -= 1
            elif loss is None:
                reason = look.blocked or look.detail
                self.settle(link, UNREACHABLE, reason, look.mount)
                if look.blocked and find_ancestor(look.goal, self.unwell):
                    self.walk.refusals[reason] += 1
            elif doubt:
                self.settle(link, UNREACHABLE, doubt.reason, look.mount)
                self.hold(loss, doubt, numbers.get(path, loss.lot))
            else:
                self.settle(link, BROKEN, "", look.mount, loss.title)
                if loss.doubt == ACCEPTED or (loss.doubt and self.is_accepted(loss)):
                    self.hold(loss, Doubt(ACCEPTED, "", ""), loss.lot)
        self.tell_units(verdicts, ground, lots)

    def is_accepted(self, loss: Loss) -> bool:
        """Tell whether the user has confirmed the loss of a directory that it lies beneath."""
        return any(is_under(loss.goal, d) or is_under(loss.missing, d) for d in self.accepted)

    def settle(self, link: LostLink, status: str, reason: str, mount: str, title: str = "") -> None:
        """Record a verdict on a link that was not found at first; a new loss has a title."""
        self.walk.roots[link.root][status] += 1
        old = link.old
        if status == BROKEN and not (old and old.broken_since):
            values = link.path, link.text, title, mount, self.now, self.now
            self.writer.write(_WRITE_LOSS, *values)
        elif old and status == BROKEN == old.status and from_db(old.target) == link.text:
            return  # it is as it was
        if status == OK:
            self.walk.clear_doubt(link.path)
        self.writer.record(link.path, link.text, status, reason, old)

    def hold(self, loss: Loss, doubt: Doubt, lot: Optional[int]) -> None:
        """Remember that a loss is in doubt, or that the doubt was ended by the user."""
        if doubt.defence == CONTRADICTION:
            return
        if doubt.defence == UNWELL:
            self.walk.refusals[doubt.reason] += 1
            return
        if doubt.defence in (BARE, NO_WITNESS):
            advice = f". If it is gone for good: `scan --accept {shell_quote(doubt.directory)}`"
            reason = doubt.reason + (advice[1:] if doubt.reason.endswith("?") else advice)
            self.walk.refusals[self.told.setdefault(doubt.directory, reason)] += 1
        if doubt.defence not in (GUARD, ACCEPTED):  # what is accepted has not come back
            lot = None
        values = loss.path, doubt.defence, loss.title, loss.goal, loss.missing, loss.mount
        self.writer.write(_WRITE_DOUBT, *values, lot, self.now)

    def write_lots(self, verdicts: Verdicts, lots: Sequence[Lot]) -> Dict[str, int]:
        """Write what is held anew; return the number of its lot for each loss."""
        known = {lot.directory: lot for lot in lots if lot.number not in verdicts.released}
        held = [loss for loss in (*self.losses, *self.elsewhere) if loss.lot is not None]
        numbers: Dict[str, int] = {}
        with transaction(self.conn):
            for unit in verdicts.units:
                gone = unit.losses + [x for x in held if is_under(x.goal, unit.directory)]
                lot = known.get(unit.directory) or Lot(0, unit.directory, 0, 0)
                size = max(lot.links, len(gone)), max(lot.titles, count_titles(gone))
                write = """INSERT INTO lots VALUES (?, ?, ?, ?, ?) ON CONFLICT(lot_id) DO UPDATE SET
                    links = excluded.links, titles = excluded.titles"""
                row = (lot.number or None, to_db(unit.directory), *size, self.now)
                added = self.conn.execute(write, row).lastrowid
                number = lot.number or int(added or 0)
                numbers.update((loss.path, number) for loss in unit.losses)
        return numbers

    def tell_units(self, verdicts: Verdicts, ground: Ground, lots: Sequence[Lot]) -> None:
        """Say what the guard holds of what this scan has met, each directory for itself."""
        sizes = {lot.directory: lot.links for lot in lots}
        groups: Dict[str, List[Loss]] = defaultdict(list)
        for loss in self.losses:
            doubt = verdicts.doubts.get(loss.path)
            if doubt and doubt.defence == GUARD:
                groups[doubt.directory].append(loss)
        for directory, losses in sorted(groups.items()):
            of_links = len(losses) + ground.good[directory]
            lot = max(len(losses), sizes.get(directory, 0))
            self.add_unit(directory, len(losses), count_titles(losses), of_links, lot)

    def add_unit(self, directory: str, links: int, titles: int, of_links: int, lot: int) -> None:
        accept = f"scan --accept {shell_quote(directory)}"
        self.units.append({
            "directory": directory, "links": links, "titles": titles, "of_links": of_links,
            "lot": lot, "accept": accept,
        })  # fmt: skip

    def list_mounts(self) -> List[JsonObject]:
        """Return how the mounts are that matter to this scan."""
        used = {*self.good, *self.loss_mounts, *self.walk.blocked}
        found: Dict[str, Tuple[str, str, str]] = {}

        def add(point: str, fs_type: str, state: str, reason: str) -> None:
            if found.get(point, ("", HEALTHY))[1] == HEALTHY:
                found[point] = fs_type, state, reason

        for state, reason, point, fs_type, role in self.watch.mounts:
            is_shown = role == "check" or point in used
            if is_shown or (state != HEALTHY and self.watch.is_used(point)):
                add(point, fs_type, state, reason)
        for point, (state, reason) in self.watch.pool.sealed.items():
            if point in self.watch.types:
                add(point, self.watch.types[point], state, reason)
        for point in used & set(self.watch.types):
            found.setdefault(point, (self.watch.types[point], HEALTHY, ""))
        names = ("mount_point", "fs_type", "state", "reason")
        return [dict(zip(names, (point, *found[point]))) for point in sorted(found)]

    def to_json(self) -> JsonObject:
        """Return the scan's result as the commands show it, with its exit code."""
        walk, mounts = self.walk, self.list_mounts()
        for mount in mounts:
            if mount["state"] != HEALTHY:
                walk.refusals[mount["reason"]] += 0
        totals = {name: sum(root[name] for root in walk.roots) for name in _TALLIED}
        failed = [root for root in walk.roots if root["state"] != "scanned"]
        apart = [*walk.walked_roots(), *(root["path"] for root in failed)]
        code = EXIT_PARTIAL if failed or totals[UNREACHABLE] or walk.unread else EXIT_OK
        if failed == walk.roots:
            code = EXIT_FAILED
        if walk.refusals or self.units:
            code = EXIT_REFUSED
        for reason, count in walk.refusals.items():
            what = f"{plural(count, 'link')} not judged"
            log.warning("%s; %s", reason, what if count else "nothing beneath it is judged")
        changes = ("new", "newly_broken", "recovered", "vanished")
        missing = walk.count_rows(apart, is_missing=True)
        return {
            "roots": walk.roots,
            "totals": {**totals, "missing": missing, "ignored": walk.ignored},
            "changes": {name: self.writer.changes[name] for name in changes},
            "mounts": mounts,
            "guard": {
                "tripped": bool(self.units),
                "held_back": sum(unit["links"] for unit in self.units),
                "reason": "; ".join(map(describe_unit, self.units)),
                "units": self.units,
            },
            "refusals": list(walk.refusals),
            "exit_code": code,
        }


class PresentLinks:
    """What was met of the links that are known, and what has vanished."""

    def __init__(self, judgement: Judgement) -> None:
        self.judgement, self.walk, self.unwell = judgement, judgement.walk, judgement.unwell
        self.share, self.accepted = judgement.share, judgement.accepted
        self.conn, self.writer, self.now = self.walk.conn, self.walk.writer, self.walk.now
        self.unmet: List[Tuple[int]] = []  # rows of links that were not met and stay as they are

    def record_vanished(self) -> None:
        """Mark as missing the links that a complete walk of their directories did not meet."""
        walk, ignore = self.walk, self.walk.watch.pool.ignore
        walked = walk.walked_roots()
        if walk.count_rows(walked) != walk.seen + len(walk.vanished):
            walk.vanished += self.find_unmet(walked)
        roots = {walk.job.roots[number].rstrip("/") or "/": number for number in walk.real}
        gone: Dict[str, List[Tuple[int, str, str]]] = defaultdict(list)
        ignored = []
        for rowid, path, target in walk.vanished:
            root = find_ancestor(path, roots) or "/"
            real = walk.real[roots[root]] + path[len(root.rstrip("/")) :]
            point = find_ancestor(real, self.unwell)
            if find_ancestor(path, walk.unread) or point:
                self.unmet.append((rowid,))
                if point:
                    walk.refusals[self.unwell[point]] += 1
            elif ignore.active and ignore.matches_beneath(root, path):
                ignored.append((rowid,))
            else:
                gone[root].append((rowid, path, target))
        with transaction(self.conn):
            self.conn.executemany("DELETE FROM symlinks WHERE rowid = ?", ignored)
        expected = load_removed(self.conn) if gone else set()
        for root, rows in gone.items():
            self.judge_vanished(root, rows, expected)
        self.writer.flush()

    def judge_vanished(
        self, root: str, rows: List[Tuple[int, str, str]], expected: Set[str]
    ) -> None:
        """Record the links that have vanished from a root, unless they are too many at once."""
        targets = self.walk.new_targets

        def is_accepted(path: str) -> bool:
            is_held = self.walk.doubts.get(path, ("",))[0] == VANISHED
            return is_held and any(is_under(path, directory) for directory in self.accepted)

        moved = {path for _, path, target in rows if target in targets}
        by_itself = [path for _, path, _ in rows
            if path not in moved and path not in expected and not is_accepted(path)]  # fmt: skip
        titles = len({path if os.path.dirname(path) == root else title_folder(path)
            for path in by_itself})  # fmt: skip
        present = self.walk.count_rows([root])
        for path in moved:  # their doubts go on under their new names
            self.writer.write(_CLEAR_DOUBT, path)
        if titles >= GUARD_TITLES and len(by_itself) > self.share * present and self.share < 1.0:
            self.unmet += [(row[0],) for row in rows]
            self.judgement.add_unit(root, len(by_itself), titles, present, len(by_itself))
            self.judgement.units[-1]["vanished"] = True
            for path in by_itself:
                self.writer.write(_WRITE_DOUBT, path, VANISHED, "", "", "", "", None, self.now)
            return
        self.writer.changes["vanished"] += len(rows)
        # Not _WRITE_LINK: what is missing was not seen now.
        update = "UPDATE symlinks SET status = 'missing', last_status = 'missing' WHERE rowid = ?"
        with transaction(self.conn):
            _write_events(self.conn, (link_event(p, t, "vanished", MISSING) for _, p, t in rows))
            self.conn.executemany(update, [(row[0],) for row in rows])

    def find_unmet(self, roots: Iterable[str]) -> List[Tuple[int, str, str]]:
        """Return (rowid, path, target) of the links of directories that were not visited."""
        walk, found = self.walk, []
        known = {path for _, path, _ in walk.vanished}

        def folder_of(name: Union[str, bytes]) -> Union[str, bytes]:
            return to_db(os.path.dirname(from_db(name)))

        self.conn.create_function("folder_of", 1, folder_of)
        for place, values in (beneath(root, "s.path") for root in roots):
            select = f"""SELECT s.rowid, s.path, s.last_target, coalesce(d.rowid, 0) FROM symlinks s
                LEFT JOIN directories d ON d.path = folder_of(s.path)
                WHERE {place} AND s.status IS NOT 'missing' AND s.rowid <= ?"""
            for rowid, name, target, folder in self.conn.execute(select, [*values, walk.last_link]):
                path, is_new = from_db(name), folder > walk.last_folder
                is_met = is_new or walk.visited[folder // 8] >> folder % 8 & 1
                if not is_met and path not in known:
                    found.append((rowid, path, from_db(target)))
        # Should they come back, their directories are to be read; nor do the good links of one that
        # has gone speak for any place.
        update = "UPDATE directories SET mark = NULL, targets = NULL WHERE path = ?"
        folders = {folder_of(to_db(path)) for _, path, _ in found}
        with transaction(self.conn):
            self.conn.executemany(update, [(folder,) for folder in folders])
        return found

    def record_seen(self) -> None:
        """Move on what tells of the links and mounts when they were last seen, and of the losses
        whether they are still gone.
        """
        with transaction(self.conn):
            self.conn.execute("CREATE TEMP TABLE IF NOT EXISTS unmet (id INTEGER PRIMARY KEY)")
            self.conn.execute("DELETE FROM temp.unmet")
            self.conn.executemany("INSERT OR IGNORE INTO temp.unmet VALUES (?)", self.unmet)
            if self.walk.real:
                within, values = beneath_any(self.walk.walked_roots())
                update = f"""UPDATE symlinks SET last_seen_utc = ? WHERE rowid <= ? AND {within}
                    AND status IS NOT 'missing'"""
                if self.unmet:
                    update += " AND rowid NOT IN (SELECT id FROM temp.unmet)"
                self.conn.execute(update, [self.now, self.walk.last_link, *values])
            self.remember_mounts()
            for statement in _SETTLE_LOSSES:
                self.conn.execute(statement, {"now": self.now})

    def remember_mounts(self) -> None:
        """Remember the mounts on which good targets, or the library itself, live."""
        types = read_mounts()
        points = {point for point in self.judgement.good if point in types}
        for real in self.walk.real.values():
            # Its links vanish with what the library itself lives on.
            points |= {p for p in types if is_under(p, real) or is_under(real, p)}
        points = {p for p in points - {"/", *self.unwell} if types[p] != "autofs"}
        good = self.judgement.good
        rows = [(to_db(p), types[p], good[p], self.now, self.now) for p in points]
        insert = """INSERT INTO mounts VALUES (?, ?, ?, ?, ?) ON CONFLICT(mount_point) DO UPDATE
            SET last_seen_utc = excluded.last_seen_utc,
            good_targets = coalesce(nullif(excluded.good_targets, 0), good_targets)"""
        self.conn.executemany(insert, rows)


def describe_unit(unit: JsonObject) -> str:
    """Return what the guard holds in one directory, and how its loss is confirmed."""
    what = "have vanished from" if unit.get("vanished") else "cannot be found in"
    lost = f"{plural(unit['links'], 'link')} of {plural(unit['titles'], 'title')}"
    share = f"of {unit['of_links']:,} there"
    if unit["lot"] > unit["links"]:
        share += f", and {unit['lot']:,} were gone at once"
    where = f"{what} {unit['directory']} ({share})"
    return f"{lost} {where}. If they are gone for good: `{unit['accept']}`"


# Of the losses that are still open: those that came back, by themselves or not; those that this
# scan could not tell; those that are gone still.
_SETTLE_LOSSES = (
    """UPDATE losses SET back_utc = :now, came_back_by_itself = target = (SELECT last_target FROM
        symlinks s WHERE s.path = losses.path) AND NOT EXISTS (SELECT 1 FROM actions a WHERE
        a.related_path = losses.path AND a.fired_utc >= lost_utc)
    WHERE back_utc IS NULL
        AND EXISTS (SELECT 1 FROM symlinks s WHERE s.path = losses.path AND status = 'ok')""",
    """UPDATE losses SET gone_since_utc = NULL WHERE back_utc IS NULL AND EXISTS
        (SELECT 1 FROM symlinks s WHERE s.path = losses.path AND status = 'unreachable')""",
    """UPDATE losses SET gone_since_utc = :now WHERE back_utc IS NULL AND gone_since_utc IS NULL
        AND EXISTS (SELECT 1 FROM symlinks s WHERE s.path = losses.path AND status = 'broken')""",
    """DELETE FROM losses WHERE coalesce(back_utc, lost_utc) < datetime(:now, '-31 days')
        AND NOT EXISTS
        (SELECT 1 FROM symlinks s WHERE s.path = losses.path AND status = 'broken')""",
    """DELETE FROM doubts WHERE NOT EXISTS (SELECT 1 FROM symlinks s WHERE s.path = doubts.path
        AND (status IN ('unreachable', 'missing') OR defence IN ('accepted', 'vanished')))""",
    """DELETE FROM lots WHERE NOT EXISTS (SELECT 1 FROM doubts JOIN symlinks USING (path)
        WHERE doubts.lot_id = lots.lot_id AND status = 'unreachable')""",
    """DELETE FROM doubts WHERE defence = 'guard' AND lot_id NOT IN (SELECT lot_id FROM lots)""",
    """UPDATE doubts SET lot_id = NULL WHERE lot_id NOT IN (SELECT lot_id FROM lots)""",
    "INSERT OR REPLACE INTO notes VALUES ('scan', :now)",
)


def load_removed(conn: sqlite3.Connection) -> Set[str]:
    """Return the links that a repair has removed, or had a server remove: they are expected to be
    gone.
    """
    select = "SELECT path FROM link_changes WHERE state = 'removed'"
    removed = {from_db(row[0]) for row in conn.execute(select)}
    select = "SELECT related_path, progress FROM actions WHERE progress LIKE '%\"step\"%'"
    for path, progress in conn.execute(select):
        noted = json.loads(progress)
        if noted.get("step") not in (None, "", "found"):
            removed |= {from_db(path), *noted.get("paths", ())}
    return removed


def count_good(
    conn: sqlite3.Connection, ground: Ground, wanted: Optional[Set[str]],
    mounts: Mapping[str, str], roots: Collection[str], newest: int, unsettled: int = 0,
    within: Optional[Collection[str]] = None,
) -> None:  # fmt: skip
    """Count for the ground what is good beneath the wanted directories, None for all of them, from
    the whole database.

    Library directories with a rowid above `newest` were met for the first time; of the rows that
    say ok, `unsettled` wait for their verdict.  Only folders `within` some roots count, if given.
    """
    places = Ground()  # by the very directory that holds the files

    def count(folder: str, head: str, real: str, links: int, is_flat: bool, is_fresh: bool) -> None:
        if within is not None and find_ancestor(folder, within) is None:
            return
        places.good[real] += links
        if is_fresh:
            places.fresh[real] += links
        if is_flat:
            places.more_titles[real] += links
        else:
            places.titles.setdefault(real, set()).add(title_folder(folder + "/"))
        samples = places.samples.setdefault(real, [])
        if len(samples) < SAMPLES:
            samples.append((folder, head))

    covered = 0
    for rowid, name, packed in conn.execute("SELECT rowid, path, targets FROM directories"):
        targets = marshal.loads(packed)[2] if packed else ()
        folder = from_db(name)
        is_flat = bool(targets) and is_flat_folder(folder, len({t[0] for t in targets}), roots)
        for head, _, real, links in targets:
            covered += links
            count(folder, head, real, links, is_flat, rowid > newest)
    # Rows that no scan of this edition has met: the container's, another root's before an upgrade.
    total = conn.execute("SELECT count(*) FROM symlinks WHERE status = 'ok'").fetchone()[0]
    if covered + unsettled < total:
        folders = {row[0] for row in conn.execute("SELECT path FROM directories")}
        rows = conn.execute("SELECT path, last_target FROM symlinks WHERE status = 'ok'")
        for name, text in rows:
            folder = os.path.dirname(from_db(name))
            if to_db(folder) not in folders:
                real = os.path.dirname(os.path.normpath(os.path.join(folder, from_db(text))))
                count(folder, real, real, 1, False, False)
    for real in places.good:
        for directory in ancestors(real):
            if wanted is None or directory in wanted:
                ground.add(directory, real, places)
            if directory in mounts:
                break


def find_unseen(
    losses: Iterable[Loss], ground: Ground, roots: Optional[Collection[str]] = None
) -> Dict[str, str]:
    """Return {missing name: folder} where links of a folder beneath the roots are said to be good
    beneath the missing name: more is lost than has been looked at.
    """
    found = {}
    for missing in {loss.missing for loss in losses}:
        for folder, _ in ground.samples.get(missing, ()):
            if roots is None or find_ancestor(folder, roots) is not None:
                found[missing] = folder
    return found


def scan_library(
    conn: sqlite3.Connection, job: ScanJob, progress: Callable[[str], None]
) -> JsonObject:
    """Walk the job's roots, record every link, and return the result as `scan --json` shows it.

    Raises RefresherrError when a worker fails; what was recorded by then stays, and is true.
    """
    started = time.monotonic()
    collecting = gc.isenabled()
    gc.disable()  # nothing here is cyclic; measured: it costs a tenth of a scan
    try:
        with contextlib.closing(Watch(conn, job.settings)) as watch:
            watch.probe()
            walk = Walk(conn, job, watch)
            walk.open_roots()
            judgement = Judgement(walk, job.settings.max_new_broken)
            walk.run(progress)
            judgement.run()
            result = judgement.to_json()
    finally:
        if collecting:
            gc.enable()
    return {**result, "duration_seconds": round(time.monotonic() - started, 3)}


def forget_mount(conn: sqlite3.Connection, point: str) -> bool:
    """Forget a remembered mount point, or the branch of a union; False if it is not remembered."""
    with transaction(conn):
        found = conn.execute("DELETE FROM mounts WHERE mount_point = ?", (to_db(point),)).rowcount
        delete = "DELETE FROM branches WHERE path = ? OR union_point = ?"
        return bool(found + conn.execute(delete, (to_db(point), to_db(point))).rowcount)


def recheck_links(
    conn: sqlite3.Connection, settings: ScanSettings, paths: Sequence[str]
) -> Dict[str, Tuple[str, str]]:
    """Look at links again, this very moment, and record nothing.

    Returns {path: (status, reason)}: broken only where no defence but the loss guard speaks against
    it, and a good link into the same place is good now.  What is no link is not in it, unless its
    mount is not well.
    """
    if not paths:
        return {}
    select = "SELECT path FROM doubts WHERE defence = 'accepted'"
    accepted = {from_db(row[0]) for row in conn.execute(select)}
    verdicts: Dict[str, Tuple[str, str]] = {}
    with contextlib.closing(Watch(conn, settings)) as watch:
        watch.probe()
        losses, looks, unwell = [], watch.look(paths), watch.unwell()
        for path, look in looks.items():
            if look.finding == GONE:
                loss = watch.make_loss(look, title_folder(path), find_link(conn, path))
                losses.append(loss._replace(was_good=True))
            elif look.finding != NO_LINK:
                is_good = look.finding == FOUND
                verdicts[path] = (OK, "") if is_good else (UNREACHABLE, look.blocked or look.detail)
            else:  # where a mount is not well, nothing tells that there is none
                point = find_ancestor(look.goal, unwell)
                if point is not None:
                    verdicts[path] = UNREACHABLE, unwell[point]
        ground = find_witnesses(conn, watch, losses)
    crowd = functools.lru_cache(1)(lambda: find_lost_titles(conn, losses))  # rarely needed
    for loss in losses:
        # The scan that lost it may have met other losses along with it, or none.
        for titles in (dict, crowd):
            ground.lost_titles = titles()
            survey_losses([loss], ground)
            doubt = explain_loss(loss, ground)
            if doubt and loss.path in accepted and doubt.defence in (BARE, NO_WITNESS):
                doubt = None
            verdicts[loss.path] = (UNREACHABLE, doubt.reason) if doubt else (BROKEN, "")
            if not doubt:
                break
    return verdicts


def find_lost_titles(conn: sqlite3.Connection, losses: Sequence[Loss]) -> Dict[str, Set[str]]:
    """Return {directory: titles} of what is lost, for the directories around some losses."""
    wanted = {directory for loss in losses for directory in directories_above(loss)}
    found: Dict[str, Set[str]] = {}
    rows = """SELECT path, last_target, title FROM symlinks LEFT JOIN losses USING (path)
        WHERE status = 'broken' AND back_utc IS NULL"""
    for name, target, title in conn.execute(rows) if wanted else ():
        path = from_db(name)
        goal = os.path.normpath(os.path.join(os.path.dirname(path), from_db(target)))
        for directory in wanted.intersection(ancestors(os.path.dirname(goal))):
            found.setdefault(directory, set()).add(from_db(title) or title_folder(path))
    return found


def find_witnesses(conn: sqlite3.Connection, watch: Watch, losses: Sequence[Loss]) -> Ground:
    """Return the ground around some losses, with links that are good at this very moment."""
    ground = watch.make_ground({loss.mount for loss in losses})
    row = conn.execute("SELECT value FROM notes WHERE name = 'scan'").fetchone()
    known = load_ground(conn, row and row[0]) if losses else Ground()
    ground.titles, ground.more_titles = known.titles, known.more_titles
    roots = {root.rstrip("/") or "/" for root in watch.settings.roots}
    ground.unseen = find_unseen(losses, known, roots or None)
    ground.once_good = {loss.missing for loss in losses if loss.was_good}
    places = {d for loss in losses
        for d in (*directories_above(loss), os.path.dirname(loss.near))}  # fmt: skip
    samples = {sample for place in places for sample in known.samples.get(place, ())}
    links = {path for folder, head in samples for path in good_links_in(conn, folder, head)}
    for look in watch.look(links).values():
        if look.finding == FOUND:
            for directory in ancestors(os.path.dirname(look.goal)):
                ground.good[directory] += 1
                if directory == look.mount:
                    break
    return ground


def good_links_in(conn: sqlite3.Connection, folder: str, head: str) -> List[str]:
    """Return some good links of a library directory: those first that lead into `head`."""
    condition, values = beneath(folder)
    within, texts = beneath(head, "last_target")
    select = f"SELECT path FROM symlinks WHERE status = 'ok' AND {condition}"
    found = conn.execute(f"{select} AND {within} LIMIT ?", (*values, *texts, WITNESSES)).fetchall()
    found = found or conn.execute(f"{select} LIMIT ?", (*values, WITNESSES)).fetchall()  # relative
    return [from_db(row[0]) for row in found]


@functools.lru_cache(1)
def load_ground(conn: sqlite3.Connection, scan: Optional[str]) -> Ground:
    """Return what the whole database says about all directories, as of the last scan."""
    ground = Ground()
    count_good(conn, ground, None, read_mounts(), (), 0)
    return ground


def _look_at(
    conn: sqlite3.Connection, settings: ScanSettings, paths: Sequence[str], read: bool = False
) -> List[Look]:
    """Look at links, and with `read` whether the files they lead to can be read."""
    if not paths:
        return []
    with contextlib.closing(Watch(conn, settings)) as watch:
        watch.probe()
        looks = watch.look(dict.fromkeys(paths), read)
        unwell = watch.unwell()
    found = [look for look in looks.values() if look.finding != NO_LINK]
    points = [find_ancestor(look.goal or look.path, unwell) for look in found]
    blocked = [unwell[point] if point else look.blocked for look, point in zip(found, points)]
    return [look._replace(blocked=why) for look, why in zip(found, blocked)]


def look_at_places(
    conn: sqlite3.Connection, settings: ScanSettings, directories: Iterable[str]
) -> Tuple[Dict[str, Tuple[str, str, str]], List[WatchedMount]]:
    """Return {directory: (state, reason, real path)}, as a scan sees its roots, and the mounts.

    The reason of one that is 'scanned' is why we could not replace links in it.
    """
    with contextlib.closing(Watch(conn, settings)) as watch:
        watch.probe()
        paths = list(dict.fromkeys(directories))
        answers = watch.pool.ask_all([("root", path, True) for path in paths])
    return dict(zip(paths, answers)), watch.mounts


# ---------------------------------------------------------------------------------------------
# Patience
# ---------------------------------------------------------------------------------------------
# The more is lost at once, the longer it must stay lost before anything is done about it.

DAY = 86400.0  # seconds
FEW_TITLES = 2  # so many are lost on a mount within a day without any outage
TITLE_WAIT = 1800.0  # seconds for each title, where there are more


class OpenLoss(NamedTuple):
    """Of a link that is lost: since when every scan has found it gone, None if the last could not
    tell; the titles lost on its mount within a day before or after; how many seconds after their
    loss, at the most, links of that mount have lately come back by themselves.
    """

    mount: str
    gone_since: Optional[float]
    titles: int
    slowest_return: float


class Wait(NamedTuple):
    """Until when, as a Unix time, nothing is done about a broken link; infinity where a scan has
    to end it.  The reason is the queue's: 'too_recent' for `min_age` alone, else 'waiting'.
    """

    until: float
    reason: str
    why: str

    def __str__(self) -> str:
        end = "a scan finds it gone again"
        if self.until < math.inf:
            end = format_time(self.until)[:16].replace("T", " ") + " UTC"
        return f"waits until {end}: {self.why}"


def plan_wait(min_age: float, patience: float, since: float, loss: Optional[OpenLoss]) -> Wait:
    """Return until when a link that broke at `since` waits, all in seconds.

    Without a `loss`, which only a scan of ours records, `min_age` is all there is to it.
    """
    young = Wait(since + min_age, "too_recent", f"broken for less than {format_duration(min_age)}")
    if loss is None or not patience:
        return young
    unsure = f"a scan could not tell meanwhile what is on {loss.mount}"
    if loss.gone_since is None:
        return Wait(math.inf, "waiting", unsure)
    titles = loss.titles if loss.titles > FEW_TITLES else 0
    wait = min(patience, max(TITLE_WAIT * titles, 2 * loss.slowest_return))
    after = format_duration(loss.slowest_return)
    why = f"links into {loss.mount} have come back by themselves after {after}"
    if TITLE_WAIT * titles >= 2 * loss.slowest_return:
        why = f"{titles:,} titles were lost on {loss.mount} within a day"
    long = Wait(loss.gone_since + max(wait, min_age), "waiting", why if wait > min_age else unsure)
    return long if long.until > young.until else young


def load_losses(conn: sqlite3.Connection) -> Dict[str, OpenLoss]:
    """Return {path: its loss} of the links that scans have lost and not found again."""
    lost: Dict[Any, Dict[float, Set[Any]]] = defaultdict(lambda: defaultdict(set))
    slowest: Dict[Any, float] = defaultdict(float)
    gone: Dict[Any, Tuple[Any, float, Optional[float]]] = {}
    times = (f"strftime('%s', {name}_utc) + 0.0" for name in ("lost", "back", "gone_since"))
    select = f"SELECT path, title, mount_point, came_back_by_itself, {', '.join(times)} FROM losses"
    for path, title, mount, by_itself, when, back, since in conn.execute(select):
        lost[mount][when].add(title)
        if back is None:
            gone[path] = mount, when, since
        elif by_itself and back > time.time() - 30 * DAY:
            slowest[mount] = max(slowest[mount], back - when)

    @functools.lru_cache(maxsize=None)
    def count_titles(mount: Any, when: float) -> int:
        days = (titles for time, titles in lost[mount].items() if abs(time - when) <= DAY)
        return len(set().union(*days))

    return {from_db(path): OpenLoss(escape(from_db(mount)), since, count_titles(mount, when),
        slowest[mount]) for path, (mount, when, since) in gone.items()}  # fmt: skip


def summarise_waits(waits: Iterable[Wait]) -> List[str]:
    """Return a line for each reason for which links wait."""
    groups: Dict[str, List[Wait]] = {}
    for wait in waits:
        groups.setdefault(wait.why, []).append(wait)
    return [f"{plural(len(group), 'link')}: {max(group)}" for group in groups.values()]


# ---------------------------------------------------------------------------------------------
# Verify
# ---------------------------------------------------------------------------------------------
# A cloud mount lists files that cannot be played any more.  Whether they can, only reading tells:
# of a few files at a time, those first that have waited longest.  What is found is told, and judges
# no link; where most of a mount cannot be read, it tells of the mount and of no file.

PAGE = 4096  # bytes; less than that the kernel does not ask of a mount
PIECE = 1 << 17  # bytes read in one go: a file that comes slowly does not hang
UNREADABLE = "unreadable"  # an event, and what `broken --status` calls it; no state of a link
UNPLAYABLE_PASSES = 3  # that failed over a day at least, before `[verify] repair` lets one go
# Errors that tell of this process or of a delay, and of no file, let none go.
_DENIED = errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT
INCONCLUSIVE = re.compile("|".join([".* did not answer within ", *map(os.strerror, _DENIED)]))
Try = Tuple[str, str, int]  # the mount, '' without a file on it; what went wrong, or ''; bytes read


def places_to_read(size: int, max_bytes: int, chance: float) -> List[Tuple[int, int]]:
    """Return (offset, length) of a file's head and of the place that `chance`, below 1, chooses."""
    half = max_bytes // 2 // PAGE * PAGE
    if size <= max_bytes or not half:
        return [(0, min(size, max_bytes))]
    choices = (size - half) // PAGE - half // PAGE + 1
    return [(0, half), (half + PAGE * int(chance * choices), half)]


def read_some(looker: Looker, path: str, max_bytes: int) -> Try:
    """Read a little of the file behind a link; answers in a worker process."""
    place = looker.locate(path)
    if place.sealed:
        state, why = looker.sealed[place.sealed]  # what is absent is to blame, not what is above it
        return place.mount if state == UNRESPONSIVE else place.sealed, why, 0
    if place.hops == looker.locate(os.path.dirname(path)).hops:
        return "", "", 0  # it is no link any more
    try:
        if place.errno:
            raise OSError(place.errno, os.strerror(place.errno))
        looker.slots.touch(place.real)  # not `ask`: a slow failure says nothing of its mount
        if not stat.S_ISREG(os.stat(place.real).st_mode):
            return "", "", 0
        return place.mount, "", read_places(place.real, max_bytes, looker.slots)
    except OSError as exc:
        return place.mount, exc.strerror or str(exc), 0


def read_places(path: str, max_bytes: int, slots: Slots) -> int:
    """Read a little of a file and return how many bytes that were.  OSError if it cannot be."""
    import random

    count = 0
    with open(path, "rb", buffering=0) as stream:
        # Nothing that the kernel still holds, and nothing beyond what is asked for.
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        size = os.fstat(stream.fileno()).st_size
        for offset, length in places_to_read(size, max_bytes, random.random()):
            end = offset + length
            while offset < end:
                slots.touch(None)
                data = os.pread(stream.fileno(), min(PIECE, end - offset), offset)
                if not data:
                    raise OSError(errno.EIO, f"it ends at {offset:,} of {size:,} bytes")
                offset, count = offset + len(data), count + len(data)
    return count


def read_links(
    conn: sqlite3.Connection, settings: ScanSettings, paths: Iterable[str], max_bytes: int,
    deadline: float = math.inf, tell: Callable[[str], object] = str,
) -> Tuple[Dict[str, Try], Dict[str, str]]:  # fmt: skip
    """Read of files, begin none after `deadline` (monotonic); return the tries, mounts to blame."""
    tries: Dict[str, Try] = {}
    todo = itertools.takewhile(lambda _: time.monotonic() < deadline, paths)
    asked = (("read", path, max_bytes) for path in todo)
    with contextlib.closing(Watch(conn, settings, {"read": read_some})) as watch:
        watch.probe()
        for (_, path, _), answer in watch.pool.run(functools.partial(next, asked, None), True):
            tries[path] = answer
            tell(f"verify: {plural(len(tries), 'file')}")
    return tries, blame_mounts(tries.values(), watch.pool.sealed)


def blame_mounts(tries: Collection[Try], sealed: Mapping[str, Tuple[str, str]]) -> Dict[str, str]:
    """Return {mount: why} of those that are to blame: sealed off, or most of their files failed."""
    tried = Counter(mount for mount, _, _ in tries if mount)
    failed = Counter(mount for mount, error, _ in tries if mount and error)
    errors = {mount: error for mount, error, _ in tries if error}
    blamed = {mount: sealed[mount][1] for mount in tried if mount in sealed}
    for mount, count in failed.items():
        if count * 2 > tried[mount] and mount not in blamed:
            what = f"{count:,} of {plural(tried[mount], 'file')} could not be read"
            blamed[mount] = f"{mount}: {what}: {errors[mount]}"
    return blamed


def verify_links(
    conn: sqlite3.Connection, settings: ScanSettings, limit: int, max_bytes: int, deadline: float,
    tell: Callable[[str], None],
) -> JsonObject:  # fmt: skip
    """Read of `limit` files, those first that have waited longest; return `verify --json`."""
    within, values = beneath_any(settings.roots)
    select = f"""SELECT path, last_target, read_error, unreadable_since_utc, read_failures
        FROM symlinks WHERE status = 'ok' AND {within}
        ORDER BY read_utc, path LIMIT ?"""  # never: NULL, first
    rows = {from_db(row[0]): row for row in conn.execute(select, (*values, limit))}
    tries, blamed = read_links(conn, settings, rows, max_bytes, deadline, tell)
    with transaction(conn):
        # Each try is a turn; on a mount that is to blame, or of no file, it tells nothing else.
        turns = [(utc_now(), to_db(path)) for path in tries]
        conn.executemany("UPDATE symlinks SET read_utc = ? WHERE path = ?", turns)
        told = [(path, why) for path, (mount, why, _) in sorted(tries.items())
            if mount and mount not in blamed]  # fmt: skip
        items = [item for path, why in told for item in record_try(conn, rows[path], why)]
    found = [count for mount, _, count in tries.values() if mount]
    code = EXIT_REFUSED if blamed else EXIT_PARTIAL if items else EXIT_OK
    words = [*blamed.values()] + [f"{plural(len(items), 'file')} could not be read"] * bool(items)
    result = {"read": len(found), "unreadable": len(items), "bytes": sum(found), "items": items,
        "exit_code": code, "refusals": [*blamed.values()]}  # fmt: skip
    return {**result, "message": "; ".join(words)} if words else result


def record_try(conn: sqlite3.Connection, row: Sequence[Any], error: str) -> List[JsonObject]:
    """Record the try of a row, and return it if its file could not be read."""
    path, target, known, since, failures = from_db(row[0]), from_db(row[1]), *row[2:]
    since, failures = (since, failures + 1) if known and since else (utc_now(), 1)
    if INCONCLUSIVE.match(error):
        failures = 0
    elif time.time() - (parse_time(since) or 0.0) < DAY:
        failures = min(failures, UNPLAYABLE_PASSES - 1)
    update = """UPDATE symlinks SET read_error = ?, unreadable_since_utc = ?, read_failures = ?
        WHERE path = ?"""
    conn.execute(update, (error or None, since, failures, row[0]))
    if bool(error) != bool(known):
        action = UNREADABLE if error else "readable"
        _write_events(conn, [link_event(path, target, action, OK)])
    return [{"path": path, "target": target, "error": error, "since": since}] if error else []


def find_unplayable(conn: sqlite3.Connection, config: Config) -> Iterator[Tuple[str, str, str]]:
    """Yield, as `find_broken` does, the good links that `[verify] repair` takes for broken."""
    within, values = beneath_any(config.scan.roots)
    select = f"""SELECT path, last_target, unreadable_since_utc FROM symlinks
        WHERE status = 'ok' AND read_error <> '' AND read_failures >= {UNPLAYABLE_PASSES}
        AND {within} ORDER BY unreadable_since_utc, path"""
    for path, target, since in conn.execute(select, values) if config.verify.repair else ():
        yield from_db(path), from_db(target), since


def recheck_broken(
    conn: sqlite3.Connection, config: Config, paths: Sequence[str]
) -> Dict[str, Tuple[str, str]]:
    """Look at links again as `recheck_links` does, and read those again that count as broken."""
    verdicts = recheck_links(conn, config.scan, paths)
    doubtful = {path: goal for path, goal, _ in find_unplayable(conn, config)
        if verdicts.get(path) == (OK, "") and read_link(path) == goal}  # fmt: skip
    # Those that could be read of late, of each mount and of all, tell whether it is the mount.
    mounts, good = read_mounts() if doubtful else {}, set(doubtful)
    points = {find_ancestor(goal, mounts) or "/" for goal in doubtful.values()}
    for within, values in [beneath_any(()), *(beneath(p, "last_target") for p in points)]:
        select = f"""SELECT path FROM symlinks WHERE status = 'ok' AND read_utc <> ''
            AND read_error IS NULL AND {within} ORDER BY read_utc DESC LIMIT ?"""
        rows = conn.execute(select, (*values, 20 + 2 * len(doubtful))) if doubtful else ()
        good.update(from_db(row[0]) for row in rows)
    tries, blamed = read_links(conn, config.scan, good, PIECE) if doubtful else ({}, {})
    for path, (mount, error, _) in tries.items():
        if error and path in doubtful:
            why = blamed.get(mount) or (error if INCONCLUSIVE.match(error) else "")
            verdicts[path] = (UNREACHABLE, why) if why else (BROKEN, f"unreadable: {error}")
    return verdicts


# ---------------------------------------------------------------------------------------------
# CineSync
# ---------------------------------------------------------------------------------------------
# CineSync keeps a tree of its own links to what lies on the mount.  A broken link of the library is
# pointed at the file behind CineSync's link to the same episode or movie.  What may hang is asked
# by worker processes; this one touches nothing but the links themselves, and each change stands in
# `link_changes` before it is made.

DONE, NOT_DONE, UNDONE, REMOVED = "done", "failed", "undone", "removed"  # link_changes.state
# What undo may take back: not the removals of a dispatch, which go with the server's file record.
_UNDOABLE = """(state IN ('done', 'undone') OR state = 'removed'
    AND run_id IN (SELECT run_id FROM runs WHERE command = 'prune'))"""
NOT_CHANGED, READY, IN_ERROR = "skipped", "ready", "error"  # and DONE: LinkChange.result
WOULD_REPLACE = "would replace"
CHANGES_AT_ONCE = 250  # links that are looked at, changed and verified together
COPIES_TRIED = 8  # copies of one episode or movie that are looked at
FILES_TRIED, LEVELS_TRIED, PLACES_TRIED = 5, 4, 100  # where files may have moved to
HD, FULL_HD, UHD = 720, 1080, 2160
# Folders that hold no episode and no movie, though a name in them may look like one.
NO_CONTENT = re.compile(
    r"(?i)sports|behind the scenes|deleted scenes|extras?|featurettes?|interviews|samples?|scenes|"
    r"shorts|trailers?"
)
_WRITE_ITEM = """INSERT INTO cinesync_items (path, show_title, show_norm, year, season, episode,
    tmdb_id, resolution_rank, first_seen_utc, last_seen_utc) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT(path) DO UPDATE SET last_seen_utc = excluded.last_seen_utc, target_ok = NULL"""
_FOLDERS_TABLE = """CREATE TABLE IF NOT EXISTS cinesync_folders (
    path TEXT PRIMARY KEY, mtime_ns INTEGER NOT NULL, items INTEGER NOT NULL)"""


# The index: CineSync's tree -> cinesync_items


def visit_copies(looker: Looker, base: str, folder: str, known: int) -> Answer:
    """Return (mtime, directories, items), the last two None where the mtime is the known one; ()
    where nothing is, or why it cannot be read.  Answers in a worker process.
    """
    place, folders, items = looker.locate(folder), [], []
    if place.sealed:
        return looker.sealed[place.sealed][1]
    try:
        now, mtime = time.time_ns(), os.stat(folder).st_mtime_ns
        if known == mtime:
            return mtime, None, None
        for entry in looker.ask(lambda path: list(os.scandir(path)), folder, place.mount):
            if entry.is_dir(follow_symlinks=False):
                folders += [] if NO_CONTENT.fullmatch(entry.name) else [entry.path]
            elif is_video(entry.name):
                work = parse_work(entry.path[len(base) :])
                texts = map(to_db, (entry.path, work.title, normalise_title(work.title)))
                part = work.year, work.season, next(iter(work.episodes), None), work.ids.get("tmdb")
                item = (*texts, *part, work.resolution, now // 10**9, now // 10**9)
                items += [item] if work.kind != "other" else []
    except OSError as exc:
        return () if exc.errno in GONE_ERRNOS else exc.strerror
    return mtime if mtime < now - YOUNG_NS else 0, folders, items


def index_copies(
    conn: sqlite3.Connection, settings: ScanSettings, base: str, accept_shrink: bool
) -> int:
    """Bring the index up to date, return its size; RefusedError, and it stays, where it shrank."""
    conn.execute(_FOLDERS_TABLE)
    select = "SELECT path, mtime_ns FROM cinesync_folders"
    known = {from_db(path): mtime for path, mtime in conn.execute(select)}
    known = known if base in known else {}  # the first time, or another base
    found = list(_walk_copies(conn, settings, base, known))
    same = {folder for folder, _, items in found if items is None}
    fresh = {item[0]: item for _, _, items in found for item in items or ()}
    last = """SELECT max(run_id), indexed_count FROM cinesync_runs JOIN runs USING (run_id)
        WHERE cinesync_base = ? AND command = 'cinesync' AND indexed_count > 0"""
    with transaction(conn):
        paths = [row[0] for row in conn.execute("SELECT path FROM cinesync_items")]
        gone = [p for p in paths if p not in fresh and os.path.dirname(from_db(p)) not in same]
        conn.executemany("DELETE FROM cinesync_items WHERE path = ?", zip(gone if known else paths))
        conn.executemany(_WRITE_ITEM, fresh.values())
        conn.execute("DELETE FROM cinesync_folders")
        mtimes = [(to_db(folder), mtime) for folder, mtime, _ in found]
        conn.executemany("INSERT INTO cinesync_folders VALUES (?, ?, 0)", mtimes)
        count = int(conn.execute("SELECT count(*) FROM cinesync_items").fetchone()[0])
        before = conn.execute(last, (to_db(base),)).fetchone()[1] or 0
        if count == 0:
            what = "holds no movie and no episode: is CineSync's library there?"
            raise RefusedError(f"{base} {what}")
        if count * 2 < before and not accept_shrink:
            raise RefusedError(
                f"CineSync's library has shrunk from {before:,} to {count:,} items: taken for an "
                "outage; if that is meant, use --accept-shrink"
            )
    return count


def _walk_copies(
    conn: sqlite3.Connection, settings: ScanSettings, base: str, known: Mapping[str, int]
) -> Iterator[Tuple[str, int, Optional[List[Any]]]]:
    """Yield (directory, mtime, items) of CineSync's tree; no items where nothing has changed."""
    below: Dict[str, List[str]] = defaultdict(list)
    for path in known:
        below[os.path.dirname(path)].append(path)
    todo = [base]

    def next_request() -> Optional[Request]:
        folder = todo.pop() if todo else None
        return ("copies", base, folder, known.get(folder, 0)) if folder else None

    with contextlib.closing(Watch(conn, settings, {"copies": visit_copies})) as watch:
        for (_, _, folder, _), answer in watch.pool.run(next_request):
            if isinstance(answer, str):  # what lies below is not forgotten
                log.warning("cannot read %s: %s; its items stay", folder, answer)
                yield from ((path, known[path], None) for path in known if is_under(path, folder))
            elif answer:
                mtime, folders, items = answer
                todo += below[folder] if folders is None else folders
                yield folder, mtime, items


# The match, which asks nobody


def match_work(
    wanted: Work, copies: Sequence[Work], shared: Collection[str] = ()
) -> Tuple[List[Work], str]:
    """Return the copies that may be what is wanted, or [] and why not: by an equal id, by title and
    year, or by title and a folder of CineSync's that has a file in common with it: `shared`.
    """
    title = normalise_title(wanted.title)
    kin = [copy for copy in copies if _may_be_same_work(copy, wanted)]
    same = [copy for copy in kin if set(copy.ids.items()) & set(wanted.ids.items())]
    if not same:
        kin = [copy for copy in kin if normalise_title(copy.title) == title]
        same = [copy for copy in kin if wanted.year and copy.year == wanted.year]
    if not same and not wanted.year:
        same = [copy for copy in kin if title_folder(copy.path) in shared]
    for name in ("tmdb", "tvdb", "imdb"):
        rivals = {copy.ids[name]: copy.path for copy in same if name in copy.ids}
        if len(rivals) > 1:
            examples = " or ".join(sorted(rivals.values())[:2])
            return [], f"cannot tell which is meant: {examples}"
    parts = [copy for copy in same if is_same_part(wanted, copy, is_copy=True)]
    what = "the series, not this episode" if same else "no copy of it"
    return parts, "" if parts else f"CineSync has {what}"


def _may_be_same_work(one: Work, other: Work) -> bool:
    ids_differ = any(other.ids.get(name, value) != value for name, value in one.ids.items())
    years_differ = one.year and other.year and abs(one.year - other.year) > 1
    return one.kind == other.kind and not ids_differ and not years_differ


def is_same_part(wanted: Work, found: Work, is_copy: bool = False) -> bool:
    """Tell whether one work's episodes are the other's; a copy's name may keep but the first."""
    is_less = wanted.part[1] or found.part[1] or (wanted.part[0] and found.part[0])
    if wanted.kind == "movie":
        return True
    if wanted.part[0] != found.part[0] and is_less:
        return False
    if wanted.episodes and found.episodes:
        episodes = (wanted.episodes, wanted.episodes[: 1 if is_copy else None])
        return wanted.season == found.season and found.episodes in episodes
    if wanted.number[1]:
        return (wanted.season, wanted.number) == (found.season, found.number)
    return wanted.date != "" and wanted.date == found.date


def is_denied(wanted: Work, path: str) -> bool:
    """Tell whether the name of a real file denies what CineSync's folder claims of it."""
    found, stem = parse_work(path), _EXTENSION.sub("", os.path.basename(path))
    if any(wanted.ids.get(name, value) != value for name, value in found.ids.items()):
        return True
    if wanted.kind == "movie":
        is_extra = _EXTRA.search(_EXTENSION.sub("", path)) or found.kind == "episode"
        return bool(is_extra) or is_no_film(path, wanted.title, wanted.year)
    told = _SEASON_EPISODE.search(stem) or _CROSS_EPISODE.search(stem) or _DATE.search(stem)
    if _has_other_year(stem[: told.start()] if told else stem, wanted.title, wanted.year):
        return True
    years = (None, found.year)
    if found.year and wanted.year not in years and str(found.year) not in found.title.split():
        return True
    if found.episodes or found.date:
        return False
    first, (_, number) = (wanted.episodes or (0,))[0], _read_absolute(stem, None)
    is_other = number and first and not (number == first or (wanted.season != 1 and number > first))
    part = _read_part(stem)[0]
    named = told or _LIKE_NUMBER.search(stem) or _is_extra(stem, wanted.title, None, wanted.season)
    return bool(is_other or named or (part and part not in (first, wanted.part[0])))


def is_fit(own: int, found: int) -> bool:
    """Tell whether a height (0: unknown) may stand in: no SD for HD, no 2160p for less."""
    return not (own >= HD > found > 0) and not (found >= UHD > own)


# The change: journal, link, verdict


@dataclasses.dataclass
class LinkChange:
    """A link, what it is to point to ('': nothing, it goes), and what became of that."""

    path: str
    old: str
    new: str = ""
    via: str = ""  # where that was found, or why it goes
    file: str = ""  # the real file that it must lead to then
    work: Work = parse_work("")
    copies: Sequence[Work] = ()  # what might replace its file
    result: str = NOT_CHANGED
    reason: str = ""
    stands: bool = False  # whether the link is the new one, whatever the result
    number: int = 0  # link_changes.change_id
    verdict: Tuple[str, str] = (UNREACHABLE, "")  # what was seen after the change

    @property
    def temporary(self) -> str:
        """Where the new link is made: a short name, however long the link's own is."""
        return os.path.join(os.path.dirname(self.path), f".refresherr-{self.number}.tmp")


def swap_link(change: LinkChange, old: str, new: str) -> None:
    """Point a link elsewhere in one step; OSError, and it stays, if it is not `old`; '' is none."""
    folder = os.path.dirname(change.path)
    if not old:
        make_folder(folder)
        os.symlink(new, change.path)
        _give(change.path, os.stat(folder))
        return
    try:
        if new:
            before = os.lstat(change.path)
            os.symlink(new, change.temporary)
            _give(change.temporary, before)
        if read_link(change.path) != old:
            raise OSError(errno.EEXIST, "somebody else has changed it meanwhile")
        if new:
            os.replace(change.temporary, change.path)
        else:
            os.unlink(change.path)
    finally:
        with contextlib.suppress(OSError):  # it is there still where something went wrong
            os.unlink(change.temporary)


def make_folder(path: str) -> None:
    """Make a directory, and those above it, as the directory is in which they stand."""
    if not os.path.isdir(path):
        make_folder(os.path.dirname(path))
        above = os.stat(os.path.dirname(path))
        os.mkdir(path)
        _give(path, above)
        with contextlib.suppress(OSError):
            os.chmod(path, stat.S_IMODE(above.st_mode))


def _give(path: str, like: os.stat_result) -> None:
    """Give what was just made an owner, where permitted."""
    with contextlib.suppress(OSError):
        os.lchown(path, like.st_uid, like.st_gid)


class Journal(NamedTuple):
    """Has links changed, each noted in `link_changes` first; without a `run_id` as a preview."""

    conn: sqlite3.Connection
    settings: ScanSettings
    run_id: Optional[int]

    def carry_out(
        self, changes: Sequence[LinkChange],
        choose: Callable[[List[LinkChange]], List[LinkChange]] = list,
        wanted: Collection[str] = (BROKEN,), limit: Optional[int] = None,
        deadline: float = math.inf,
    ) -> Set[str]:  # fmt: skip
        """Look again at links, change what `choose` returns; return why some cannot be judged."""
        refused: Set[str] = set()
        ready, left = changes, len(changes) if limit is None else limit
        size = CHANGES_AT_ONCE if self.run_id or limit is not None else max(1, len(changes))
        for start in range(0, len(changes), size):
            if not left or (refused and not ready) or time.monotonic() > deadline:
                break  # in an outage, what hangs would cost its time with each part
            part = changes[start : start + size]
            verdicts = recheck_links(self.conn, self.settings, [change.path for change in part])
            for change in part:
                status, why = verdicts.get(change.path, (MISSING, ""))
                if status not in wanted:
                    change.reason = why or {OK: "it works again"}.get(status, "it is gone")
                    refused.update([why] if status == UNREACHABLE else ())
                elif read_link(change.path) != change.old:
                    change.reason = "it points elsewhere since the last scan"
            ready = [change for change in part if not change.reason]
            ready = choose(ready)[:left] if ready else []
            left -= len(ready)
            for change in ready:
                change.result = READY
            if ready and self.run_id is not None:
                self.change(ready)
                refused.update(c.verdict[1] for c in ready if c.result == IN_ERROR and c.verdict[1])
        for change in changes:
            if change.result == NOT_CHANGED:
                change.reason = change.reason or "left for the next run"
        return refused

    def change(self, changes: Sequence[LinkChange], must_work: bool = True) -> None:
        """Make changes; with `must_work` a link that does not lead to its file then is put back."""
        insert = """INSERT INTO link_changes (run_id, path, old_target, new_target, state,
            changed_utc) VALUES (?, ?, ?, ?, 'planned', ?)"""
        # On the disk before a link is changed: in WAL mode a commit is not, by default.
        self.conn.execute("PRAGMA synchronous=FULL")
        with transaction(self.conn):
            for change in changes:
                row = (self.run_id, *map(to_db, (change.path, change.old, change.new)), utc_now())
                change.number = int(self.conn.execute(insert, row).lastrowid or 0)
        for change in changes:
            try:
                swap_link(change, change.old, change.new)
                change.result, change.stands = DONE, True
            except OSError as exc:
                change.result, change.reason = IN_ERROR, exc.strerror or str(exc)
        done = [change for change in changes if change.stands]
        self.look_at(done)
        for change in (c for c in done if must_work and c.new and c.verdict[0] != OK):
            status, why = change.verdict
            change.result, change.reason = IN_ERROR, f"put back, for it is {status}: {why}"
            try:
                swap_link(change, change.new, change.old)
                change.stands = False
            except OSError as exc:
                change.reason = f"it is {status}, and cannot be put back: {exc.strerror}"
        self.record(changes)

    def look_at(self, changes: Iterable[LinkChange]) -> None:
        """Find the verdicts on links that have been changed."""
        done = {change.path: change for change in changes}
        for look in _look_at(self.conn, self.settings, list(done), read=True):
            # The kernel may remember what nobody can read now.
            is_right = look.file and look.file == (done[look.path].file or look.file)
            why = look.blocked or ("" if is_right else look.detail or "its file cannot be read")
            done[look.path].verdict = (UNREACHABLE, why) if why else (OK, "")
        doubtful = [path for path, change in done.items() if change.verdict[1]]
        for path, verdict in recheck_links(self.conn, self.settings, doubtful).items():
            done[path].verdict = verdict if verdict[0] != OK else done[path].verdict

    def record(self, changes: Iterable[LinkChange]) -> None:
        """Write what became of changes: the journal, and of those that were made the link."""
        conn = self.conn
        update = "UPDATE link_changes SET state=?, reason=?, changed_utc=? WHERE change_id=?"
        with transaction(conn):
            for change in changes:
                action, state = ("relinked", DONE) if change.new else (REMOVED, REMOVED)
                values = state if change.stands else NOT_DONE, escape(change.reason or change.via)
                conn.execute(update, (*values, utc_now(), change.number))
                if not change.stands:
                    continue
                known, target = find_link(conn, change.path), change.new or change.old
                status, why = change.verdict if change.new else (MISSING, "")
                if known and status != OK:  # undone: it was broken before, and is no new loss
                    known = known._replace(broken_since=known.broken_since or utc_now())
                events = write_link(conn, known, change.path, target, status, why)
                _write_events(conn, [link_event(change.path, target, action, status), *events])

    def settle(self) -> None:
        """Find out how far a killed run came, and clear away what it left beside the links."""
        select = """SELECT change_id, path, old_target, new_target FROM link_changes
            WHERE state = 'planned'"""
        rows = self.conn.execute(select).fetchall() if self.run_id is not None else []
        changes = [LinkChange(from_db(p), from_db(o), from_db(n), number=i) for i, p, o, n in rows]
        changes = self.within_reach(changes)
        for change in changes:
            left = read_link(change.temporary)
            if left and left in (change.new, change.old):  # made, or put back
                try:
                    os.unlink(change.temporary)
                except OSError as exc:
                    what = f"cannot remove {change.temporary}, which a killed run has left"
                    advice = "make its directory writable"
                    raise RefresherrError(f"{what}: {exc.strerror}; {advice}") from exc
            stands = read_link(change.path)
            change.stands = stands == change.new
            if not change.stands:
                is_old = stands == change.old
                change.reason = "the run was killed" if is_old else "somebody else has changed it"
        self.look_at(change for change in changes if change.stands)
        self.record(changes)

    def within_reach(self, changes: Iterable[LinkChange]) -> List[LinkChange]:
        """Return the changes whose directories answer, or are not there; the others say why not."""
        folders = {change.path: os.path.dirname(change.path) for change in changes}
        places = look_at_places(self.conn, self.settings, folders.values())[0] if folders else {}
        for change in changes:
            state, reason, _ = places[folders[change.path]]
            change.reason = "" if state in ("scanned", "missing") else reason
        return [change for change in changes if not change.reason]

    def report(
        self, changes: Collection[LinkChange], verb: str, refused: Collection[str] = ()
    ) -> JsonObject:
        """Return what became of changes, as `undo --json` shows it, with the exit code."""
        words = {READY: f"would {verb}", DONE: f"{verb}d"}
        items = [{"path": c.path, "from": c.old, "to": c.new, "reason": c.reason,
            "result": words.get(c.result, c.result)} for c in changes]  # fmt: skip
        count = Counter(change.result for change in changes)
        skipped = count[NOT_CHANGED] + count[IN_ERROR]
        code = EXIT_REFUSED if refused else EXIT_PARTIAL if skipped else EXIT_OK
        result = {"applied": self.run_id is not None, "run_id": self.run_id, "items": items,
            "restored": count[DONE], "skipped": skipped, "exit_code": code}  # fmt: skip
        return {**result, "message": "; ".join(sorted(refused))} if refused else result


# The repair


def spell_target(
    file: str, prefixes: Mapping[str, str], path: str, old: str, goal: str = ""
) -> str:
    """Return a real file as the user writes it: below {prefix as written: as resolved} or the old
    target's own (`goal` is that resolved), most like the old one; relative where that was relative.
    """
    folder = os.path.dirname(path)
    written = os.path.normpath(os.path.join(folder, old))
    one, other = written.split("/"), (goal or written).split("/")
    while one and other and one[-1] == other[-1]:
        del one[-1], other[-1]
    own = {"/".join(one): "/".join(other)}
    spelled = [
        prefix.rstrip("/") + file[len(real.rstrip("/")) :]
        for prefix, real in {**prefixes, **own}.items()
        if is_under(file, real)
    ]
    best = max(spelled, key=lambda text: len(os.path.commonpath((text, written))), default=file)
    return best if os.path.isabs(old) else os.path.relpath(best, folder)


class Relinker:
    """One run of the repair; without a `run_id` a preview that changes no link."""

    def __init__(self, conn: sqlite3.Connection, config: Config, run_id: Optional[int]) -> None:
        self.conn, self.journal = conn, Journal(conn, config.scan, run_id)
        self.scan, self.settings, self.repair = config.scan, config.cinesync, config.repair
        self.any_resolution = False
        self.deadline = math.inf  # of time.monotonic()
        self.indexed = 0
        self.allowed: Dict[str, str] = {}  # as written: as the kernel resolves it
        self.items: List[LinkChange] = []
        self.waits: List[Wait] = []
        self.refused: Set[str] = set()
        self.problems: List[str] = []

    def run(self, accept_shrink: bool) -> JsonObject:
        """Index, match and replace; return what `cinesync --json` shows."""
        started = int(time.time())
        try:
            roots = self.open_places()
            self.journal.settle()
            base = self.settings.base
            self.indexed = index_copies(self.conn, self.scan, base, accept_shrink)
            links, limit = self.match(self.load_broken(roots)), self.settings.limit
            why = self.journal.carry_out(links, self.choose, limit=limit, deadline=self.deadline)
            self.refused.update(why)
        except RefusedError as exc:
            self.refused.add(str(exc))
        result = self.result()
        if result["applied"]:
            self.record(started, result)
        return result

    def open_places(self) -> Dict[str, str]:
        """Look at base, roots and allowed targets; return the roots that answer: {path: real}."""
        settings = self.settings
        base, roots, allowed = settings.base, settings.roots, settings.allowed_targets
        places, _ = look_at_places(self.conn, self.scan, (base, *roots, *allowed))
        state, reason, real_base = places[base]
        for real in filter(None, (places[root][2] for root in roots if real_base)):
            refuse_base(real_base, real)
            refuse_base(real, real_base)  # no better the other way round
        if state != "scanned":
            raise RefusedError(f"CineSync's base {base}: {reason}")
        for path, (state, reason, _) in places.items():
            if state == "refused":
                self.refused.add(reason)
            elif state != "scanned":
                self.problems.append(f"{path}: {reason}")
        good = {path: real for path, (state, _, real) in places.items() if state == "scanned"}
        self.allowed = {path: good[path] for path in allowed if path in good}
        return {path: good[path] for path in roots if path in good}

    def load_broken(self, roots: Mapping[str, str]) -> List[LinkChange]:
        """Return the links below some roots that have been broken long enough, oldest first."""
        server_ids, losses = load_server_ids(self.conn), load_losses(self.conn)
        taken_back, settings, now = load_taken_back(self.conn), self.repair, time.time()
        for path, target, since in find_broken(self.conn):
            root = find_ancestor(path, roots)
            if root is None:
                continue
            work = describe_link(path[len(root.rstrip("/")) :], target, server_ids.get(path, {}))
            link = LinkChange(path, target, work=work)
            self.items.append(link)
            began = parse_time(since) or 0.0
            wait = plan_wait(settings.min_age, settings.patience, began, losses.get(path))
            if path in taken_back:
                link.reason = "undo has put it back; left alone until it or its target changes"
            elif now < wait.until:
                link.reason = str(wait)
                self.waits += [wait] if wait.reason == "waiting" else []
        return [link for link in self.items if not link.reason]

    def match(self, links: List[LinkChange]) -> List[LinkChange]:
        """Return the links that CineSync may have copies of, with these, the best ones first."""
        copies = load_copies(self.conn, self.settings.base, [link.work for link in links])
        shared = self.find_shared({title_folder(x.path) for x in links if not x.work.year})
        for link in links:
            found = {copy.path: copy for key in _keys(link.work) for copy in copies[key]}
            near = shared.get(title_folder(link.path), ())
            link.copies, link.reason = match_work(link.work, list(found.values()), near)
            link.copies = sorted(link.copies, key=functools.partial(_distance, link.work))
        return [link for link in links if link.copies]

    def find_shared(self, folders: Iterable[str]) -> Dict[str, Set[str]]:
        """Return, of the library's folders, those of CineSync's that share a file with it."""
        goods: Dict[str, str] = {}
        found: Dict[str, Set[str]] = defaultdict(set)
        for folder in folders:
            condition, values = beneath(folder)
            select = f"SELECT path FROM symlinks WHERE status = 'ok' AND {condition} LIMIT 8"
            goods.update({from_db(row[0]): folder for row in self.conn.execute(select, values)})
        copies = load_copies(self.conn, self.settings.base, map(parse_work, goods))
        near = {copy.path for found in copies.values() for copy in found}
        looks = _look_at(self.conn, self.scan, [*goods, *near] if near else [], read=True)
        real = {look.path: look.file for look in looks if look.file}
        for good, folder in goods.items():
            same = (path for path in near if real.get(path, path) == real.get(good))
            found[folder].update(map(title_folder, same))
        return found

    def choose(self, links: List[LinkChange]) -> List[LinkChange]:
        """Look at the copies this very moment; return the links that can be replaced."""
        paths = {copy.path for link in links for copy in link.copies[:COPIES_TRIED]}
        paths.update(link.path for link in links)
        looks = {look.path: look for look in _look_at(self.conn, self.scan, list(paths), read=True)}
        self.refused.update(look.blocked for look in looks.values() if look.blocked)
        with transaction(self.conn):
            update = "UPDATE cinesync_items SET target_ok = ? WHERE path = ?"
            seen = [(bool(look.file), to_db(path)) for path, look in looks.items()]
            self.conn.executemany(update, seen)
        for link in links:
            own = looks.get(link.path, Look(link.path, NO_LINK))
            for copy in link.copies[:COPIES_TRIED]:
                look = looks.get(copy.path, Look(copy.path, NO_LINK, "it is gone"))
                link.reason = self.why_not(link, copy, look)
                if not link.reason:
                    link.via, link.file = copy.path, look.file
                    link.new = spell_target(look.file, self.allowed, link.path, link.old, own.goal)
                    break
        return [link for link in links if link.new]

    def why_not(self, link: LinkChange, copy: Work, look: Look) -> str:
        """Return what keeps a copy's file from replacing a link's, '' for nothing."""
        file, problem = look.file, look.blocked or look.detail
        behind = parse_work(file)
        has_name = (behind.episodes and behind.season is not None) or behind.date
        told = behind if has_name and behind.kind == "episode" else copy
        if problem or not file:
            return f"{copy.path} leads to no file that can be read: {problem or 'it is gone'}"
        if not any(is_under(file, prefix) for prefix in self.allowed.values()):
            return f"{file} lies outside of the allowed targets"
        if not (is_video(file) and is_video(link.path)):
            return f"{file} or the link is no video"
        if is_denied(link.work, file):
            return f"{file} is named like something else"
        if not is_same_part(link.work, told):
            return f"{file} holds other episodes"
        for height in (copy.resolution, behind.resolution):
            if not self.any_resolution and not is_fit(link.work.resolution, height):
                return f"CineSync has it in {height}p; --any-resolution takes that"
        return ""

    def result(self) -> JsonObject:
        """Return what `cinesync --json` shows."""
        result = self.journal.report(self.items, "replace", self.refused)
        for item, link in zip(result["items"], self.items):
            item.update(old_target=item.pop("from"), new_target=item.pop("to"), via=link.via)
        count = Counter(link.result for link in self.items)
        result.update(
            indexed=self.indexed, checked_broken=len(self.items),
            candidate_found=sum(bool(link.copies) for link in self.items),
            resolved_target_ok=len(self.items) - count[NOT_CHANGED],
            replaced=result.pop("restored"), skipped=count[NOT_CHANGED], errors=count[IN_ERROR],
            waits=summarise_waits(self.waits),
        )  # fmt: skip
        if not self.refused:
            result["exit_code"] = EXIT_PARTIAL if count[IN_ERROR] or self.problems else EXIT_OK
        if self.refused or self.problems:
            result["message"] = "; ".join([*sorted(self.refused), *self.problems])
            log.warning("%s", result["message"])
        return result

    def record(self, started: int, result: JsonObject) -> None:
        """Write the run's row; without an index, which is what a refused one lacks, no number."""
        insert = """INSERT INTO cinesync_runs (run_id, started_utc, finished_utc, dry_run,
            repair_roots, cinesync_base, allowed_prefixes, indexed_count, checked_broken,
            candidate_found, resolved_target_ok, replaced, skipped, errors) VALUES (:run_id,
            :started, :finished, 0, :roots, :base, :allowed, nullif(:indexed, 0), :checked_broken,
            :candidate_found, :resolved_target_ok, :replaced, :skipped, :errors)"""
        roots, allowed = ",".join(self.settings.roots), ",".join(self.settings.allowed_targets)
        places = zip(("roots", "base", "allowed"), map(to_db, (roots, self.settings.base, allowed)))
        times = {"started": started, "finished": int(time.time())}
        self.conn.execute(insert, {**result, **dict(places), **times})


def _distance(wanted: Work, copy: Work) -> Tuple[int, str]:
    """Order copies: the wanted resolution, then the nearest, at last the unknown ones."""
    own, found = wanted.resolution or FULL_HD, copy.resolution
    return abs(found - own) if found else UHD, copy.path


def describe_link(path: str, target: str, told: Mapping[str, str]) -> Work:
    """Return the work behind a broken link by its path, its lost file, what a server has told."""
    work, lost, ids = parse_work(path), parse_work(target), dict(told)
    is_same = normalise_title(lost.title) == normalise_title(work.title)
    year = work.year or int(ids.pop("year", 0)) or (lost.year if is_same else None)
    return work._replace(
        ids={**ids, **work.ids}, year=year, resolution=work.resolution or lost.resolution,
        number=work.number if work.number[1] else lost.number,
    )  # fmt: skip


def load_server_ids(conn: sqlite3.Connection) -> Dict[str, Dict[str, str]]:
    """Return {broken link: ids, and the 'year'} of the servers' series and movies."""
    select = f"""SELECT * FROM (
        SELECT symlink_path, tmdb_id, tvdb_id, imdb_id, year FROM episode_files f
            JOIN series t ON t.instance = f.instance AND sonarr_id = sonarr_series_id UNION ALL
        SELECT symlink_path, tmdb_id, NULL, imdb_id, year FROM movie_files f
            JOIN movies t ON t.instance = f.instance AND radarr_id = radarr_movie_id)
        WHERE symlink_path IN (SELECT path FROM symlinks WHERE {IS_BROKEN})"""
    ids: Dict[str, Dict[str, str]] = {}
    for path, *values in conn.execute(select):
        pairs = zip(("tmdb", "tvdb", "imdb", "year"), values)
        ids[from_db(path)] = {name: str(value) for name, value in pairs if value}
    return ids


def load_copies(
    conn: sqlite3.Connection, base: str, wanted: Iterable[Work]
) -> Dict[Tuple[str, str], List[Work]]:
    """Return {title or id: items} for works; of each folder one at least, to tell its rivals."""
    works = list(wanted)
    keys = {key for work in works for key in _keys(work)}
    ids = {number for name, number in keys if name}
    parts = {(work.season, number) for work in works for number in work.episodes}
    found: Dict[Tuple[str, str], List[Work]] = defaultdict(list)
    folders: Set[str] = set()
    select = "SELECT path, show_norm, season, episode FROM cinesync_items"
    for name, title, *part in conn.execute(select) if works else ():
        path, folder = from_db(name), os.path.dirname(from_db(name))
        if folder in folders and part[1] is not None and tuple(part) not in parts:
            continue
        is_named = ("", from_db(title)) in keys
        if is_named or any(not ids.isdisjoint(tag) for tag in _ID.findall(path)):
            folders.add(folder)
            copy = parse_work(path[len(base) :])._replace(path=path)
            for key in _keys(copy):
                found[key].append(copy)
    return found


def _keys(work: Work) -> List[Tuple[str, str]]:
    """Return what a work is looked up by: ('', its title), (name, id)."""
    return [("", normalise_title(work.title)), *work.ids.items()]


def load_taken_back(conn: sqlite3.Connection) -> Set[str]:
    """Return the broken links that undo has put back, and that are since then what they were."""
    select = """SELECT s.path FROM (SELECT path, run_id, new_target, changed_utc, max(change_id)
            FROM link_changes WHERE state IN ('done', 'undone', 'removed') GROUP BY path) last
        JOIN runs USING (run_id) JOIN symlinks s ON s.path = last.path AND last_target = new_target
        WHERE command = 'undo' AND coalesce(broken_since_utc, '') <= changed_utc"""
    return {from_db(row[0]) for row in conn.execute(select)}


def list_changing_runs(conn: sqlite3.Connection) -> List[JsonObject]:
    """Return the runs that undo can take back, newest first, with the links that they changed."""
    select = f"""SELECT run_id, command, started_utc, count(*) AS links
        FROM link_changes JOIN runs USING (run_id)
        WHERE state <> 'undone' AND command <> 'undo' AND {_UNDOABLE}
        GROUP BY run_id ORDER BY run_id DESC"""
    return list(map(dict, conn.execute(select)))


def find_changing_run(conn: sqlite3.Connection, wanted: Optional[int]) -> Optional[int]:
    """Return the number under which a run's changes are journalled, by default the last one's."""
    if wanted is None:
        query = f"""SELECT max(run_id) FROM link_changes JOIN runs USING (run_id)
            WHERE {_UNDOABLE} AND command <> 'undo'"""
        number: Optional[int] = conn.execute(query).fetchone()[0]
        return number
    row = conn.execute("SELECT command, summary FROM runs WHERE run_id = ?", (wanted,)).fetchone()
    if row is None:
        raise UsageError(f"there is no run {wanted}; without a number undo takes the last one")
    summary = json.loads(row["summary"] or "{}") if row["command"] == "run" else {}
    return int(summary.get("cinesync", {}).get("run_id") or wanted)  # a run changes links as that


def undo_changes(journal: Journal, wanted: Optional[int], paths: Sequence[str]) -> JsonObject:
    """Put back the links of a run, by default the last one; return what `undo --json` shows."""
    journal.settle()
    conn, wanted = journal.conn, find_changing_run(journal.conn, wanted)
    select = f"""SELECT change_id, path, new_target, old_target, state FROM link_changes
        WHERE run_id = ? AND {_UNDOABLE} ORDER BY change_id DESC"""
    rows = [row for row in conn.execute(select, (wanted,)) if not paths or from_db(row[1]) in paths]
    todo = [row for row in rows if row["state"] != UNDONE]
    changes = [LinkChange(from_db(p), from_db(new), from_db(old)) for _, p, new, old, _ in todo]
    for change in journal.within_reach(changes):
        plan_undo(change, journal.settings.roots)
    if journal.run_id is not None:
        journal.change([change for change in changes if change.result == READY], must_work=False)
        undone = [row[:1] for row, change in zip(todo, changes) if change.result == DONE]
        with transaction(conn):
            update = "UPDATE link_changes SET state = 'undone' WHERE change_id = ?"
            conn.executemany(update, undone)
    result = {**journal.report(changes, "restore"), "run_id": wanted}
    if not changes:
        done = "is undone already" if rows else "has changed no link"
        result["message"] = f"run {wanted} {done}" if wanted else "no run has changed a link"
    return result


def plan_undo(change: LinkChange, roots: Collection[str]) -> None:
    """Find out whether a change can be taken back, or why not."""
    stands, folder = read_link(change.path), os.path.dirname(change.path)
    folder = find_ancestor(folder, roots) or folder
    is_other = not stands and os.path.lexists(change.path)  # no link
    if not change.new:
        change.reason = "undo removes no link; prune does"
    elif not (change.old or os.path.isdir(folder)):
        change.reason = f"{folder} is not there"
    elif stands == change.old and not is_other:
        change.result = READY
    elif stands == change.new:
        change.result, change.reason = DONE, "it was put back already"
    else:
        change.reason = "somebody else has changed it since"


def retarget_links(journal: Journal, old: str, new: str, limit: Optional[int]) -> JsonObject:
    """Point lost links beneath `old` to the same place beneath `new`; return `retarget --json`."""
    journal.settle()
    conn, settings = journal.conn, journal.settings
    blocked: Set[str] = set()
    places, mounts = look_at_places(conn, settings, [new])
    state, reason, real = places[new]
    unwell = {mount.point: mount.reason for mount in mounts if mount.state != HEALTHY}
    point = find_ancestor(real, unwell)
    if state != "scanned" or point:
        raise RefusedError(f"{new}: {unwell[point] if point else reason}")
    sizes: Dict[str, int] = {}  # as the servers know them; a page is less than a video, not a link
    for table in ("movie_files", "episode_files"):
        select = f"SELECT symlink_path, size_bytes FROM {table} WHERE size_bytes > {PAGE}"
        sizes.update((from_db(path), size) for path, size in conn.execute(select) if path)
    select = f"SELECT path, last_target FROM symlinks WHERE {IS_LOST} ORDER BY path"
    changes: List[LinkChange] = []
    for path, target in ((from_db(p), from_db(t)) for p, t in conn.execute(select)):
        goal = os.path.normpath(os.path.join(os.path.dirname(path), target))
        if is_under(goal, old) and goal != old:
            place = os.path.join(new, os.path.relpath(goal, old))
            changes.append(LinkChange(path, target, spell_target(place, {}, path, target), place))
    changes = changes[:limit]

    def find_files(links: List[LinkChange]) -> List[LinkChange]:
        with contextlib.closing(Watch(conn, settings, {"file": examine_file})) as watch:
            watch.probe()
            answers = watch.pool.ask_all([("file", link.via) for link in links])
        for link, (size, why) in zip(links, answers):
            wanted = sizes.get(link.path, size)
            blocked.update([why] if size is None else ())
            if why:
                link.reason = f"no file to be read there: {link.via}: {why}"
            elif size != wanted:
                link.reason = f"another file: {link.via} has {size:,} bytes, not {wanted:,}"
        return [link for link in links if not link.reason]

    journal.carry_out(changes, find_files, wanted=(BROKEN, UNREACHABLE))
    return journal.report(changes, "replace", blocked)


def examine_file(looker: Looker, path: str) -> Tuple[Optional[int], str]:
    """Return the size of a file; -1 and why it cannot be read; None if its mount is not asked."""
    place = looker.locate(path)
    if place.sealed:
        return None, looker.sealed[place.sealed][1]
    try:
        return os.path.getsize(looker.ask(read_file, path, place.mount)), ""
    except OSError as exc:
        return -1, exc.strerror or str(exc)


def list_some(looker: Looker, path: str) -> List[str]:
    """Return the paths of some names in a directory; answers in a worker process."""
    place = looker.locate(path)
    with contextlib.suppress(OSError):
        if not place.sealed:
            names = looker.list_for(path, place.mount, EVERYTHING)[0]
            return [os.path.join(path, name) for name in sorted(names)[:PLACES_TRIED]]
    return []


def propose_retarget(pool: WorkerPool, goals: Sequence[str]) -> Optional[Tuple[str, str]]:
    """Return (old, new), close by, where most of some lost files lie beneath `new` now."""
    goals = goals[:: len(goals) // FILES_TRIED + 1]
    top = os.path.commonpath([os.path.dirname(goal) for goal in goals])
    for old in itertools.islice(ancestors(top), LEVELS_TRIED):
        above = os.path.dirname(old)
        listed = itertools.chain.from_iterable(pool.ask_all([("list", old), ("list", above)]))
        wanted = [(new, goal) for new in (above, *listed) if new != old for goal in goals]
        asked = [("file", os.path.join(new, os.path.relpath(goal, old))) for new, goal in wanted]
        found = zip(wanted, pool.ask_all(asked))
        count = Counter(new for (new, _), (_, why) in found if not why)
        for new, number in count.most_common(1):
            if number * 2 > len(goals):
                return old, new
    return None


def describe_moves(conn: sqlite3.Connection, settings: ScanSettings) -> List[str]:
    """Return which `retarget` would bring back what is held as an outage, mount by mount."""
    held: Dict[str, Set[str]] = defaultdict(set)
    select = "SELECT mount_point, goal FROM doubts WHERE defence IN ('empty', 'witness', 'guard')"
    for mount, goal in conn.execute(select):
        held[from_db(mount)].add(from_db(goal))
    if not held:
        return []
    answerers = {"file": examine_file, "list": list_some}
    with contextlib.closing(Watch(conn, settings, answerers)) as watch:
        moves = [propose_retarget(watch.pool, sorted(goals)) for goals in held.values()]
    told = []
    for old, new in filter(None, moves):
        command = f"`retarget {shell_quote(old)} {shell_quote(new)}` points the links there"
        told.append(f"what is missing beneath {old} is found beneath {new}: {command}")
    return told


# ---------------------------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------------------------

MAX_BODY = 8 << 20  # bytes of an answer
MAX_LIST = 4 << 30  # bytes of the list of all that a server has
MAX_ELEMENT = 1 << 20  # bytes of one series or movie in it
MAX_ERROR = 300  # characters of a server's own words
KEPT_ALIVE = 10.0  # seconds for which an unused connection is good for another request
RETRY_STATUSES = (408, 425, 429)
DENIED = (401, 403)  # by the server, or by a proxy before it


class HttpError(RefresherrError):
    """A request that failed; `status` is 0 without an answer, `after` are the seconds to wait."""

    def __init__(self, text: str, status: int = 0, retry: bool = False, after: float = 0) -> None:
        super().__init__(text)
        self.status, self.retry, self.after = status, retry, after


class Call(NamedTuple):
    """A request; a body of bytes is sent as text, any other as JSON."""

    method: str
    path: str = ""
    query: Mapping[str, Any] = {}
    body: Any = None
    headers: Mapping[str, str] = {}


HttpAnswer = Tuple[int, str, Any]  # status, content type, the whole body as a file
_FAULTS = (  # classes or words of an exception, what to say of it, may another try go better?
    ("timeout|Timeout", "no whole answer within {waited}; [repair] {limit} allows for more", True),
    ("CERTIFICATE", "its certificate is not trusted ({words}); name its ca_file", False),
    ("WRONG_VERSION_NUMBER", "speaks no https there; write http:// in its url", False),
    ("RemoteDisconnected", "closed the connection without an answer", True),
    ("IncompleteRead", "broke off in the middle of its answer", True),
    ("ValueError|InvalidURL", "cannot be asked; correct its url", False),  # its words: maybe a key
    ("HTTPException", "speaks no HTTP there ({kind})", True),
    ("Errno 28", "no room for its answer; free some space in TMPDIR", True),
    ("OSError", "{words}; is it running, and its url right?", True),
)


class Client:
    """Talks to one configured address and no other: no redirects, no proxies.

    `timeout` is for every wait and for a whole answer; the first byte of a list may take
    `list_timeout`, the whole of it three times as long.  `headers` carry the key.  With `hidden`
    all of the URL but its host is a secret, and its query is sent along.
    """

    def __init__(
        self, name: str, url: str, timeout: float, headers: Mapping[str, str], token: str = "",
        hidden: bool = False, ca_file: str = "", list_timeout: float = 120.0,
    ) -> None:  # fmt: skip
        self.name, self.timeout, self.list_timeout = name, timeout, list_timeout
        self.url = self._address = strip_secrets(url)  # the first is for messages
        self._query, self._ca_file, self._tls = "", ca_file, None  # type: str, str, Any
        self._idle: queue.SimpleQueue[Tuple[float, Any]] = queue.SimpleQueue()
        secrets = [token]
        for value in headers.values():
            secrets += [value, *(part for part in re.split(r"[\s;=,]+", value) if len(part) > 7)]
        if hidden:
            bare = _USERINFO.sub(r"\1", url)
            self._address, _, self._query = bare.partition("?")
            scheme, _, host, *parts = re.split(r"[/?&=#]", bare)
            self.url = f"{scheme}//{host}/***"
            secrets += parts
        self._headers = {"User-Agent": f"Refresherr/{__version__}", "Accept": "application/json"}
        userinfo = re.match(r"(?i)https?://([^/]*)@", url)
        if userinfo:
            login = binascii.b2a_base64(unquote(userinfo[1]).encode(), newline=False).decode()
            self._headers["Authorization"] = f"Basic {login}"
            secrets += [login, userinfo[1].partition(":")[2]]
        self._headers.update(headers)
        forms = {form(text) for text in secrets for form in (str, unquote, quote, quote_plus)}
        longest_first = sorted(filter(None, forms), key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.IGNORECASE)

    def ask(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """Send a request and return the JSON of its answer, which only PUT and DELETE may lack."""
        status, kind, stream = self.start(Call(method, path, query, body))()
        content = stream.read().strip()
        with self._expect_json(path, kind if content or method in ("GET", "POST") else "json"):
            result = json.loads(content) if content else None
        if method == "POST" and status != 201:
            raise HttpError(f"{self.name}: {path} answered {status} and not 201, created", status)
        return result

    def start_list(self, path: str, **query: Any) -> Callable[[], Iterator[Any]]:
        """Ask for a list; return a function that waits for it and yields one element at a time."""
        wait = self.start(Call("GET", path, query), is_list=True)

        def elements(kind: str, stream: Any) -> Iterator[Any]:
            with self._expect_json(path, kind):
                yield from iterate_json(stream)

        return lambda: elements(*wait()[1:])

    def send(self, call: Call) -> Tuple[int, Any]:
        """Send what any 2xx fulfils; return (status, the JSON of the answer, or else its text)."""
        status, _, stream = self.start(call)()
        content = stream.read()
        with contextlib.suppress(ValueError, RecursionError):
            return status, json.loads(content)
        return status, content.decode("utf-8", "replace")

    @contextlib.contextmanager
    def _expect_json(self, path: str, kind: str) -> Iterator[None]:
        if "json" not in kind:
            said = self.quote(kind.partition(";")[0]) or "nothing"
            text = f"{self.name}: {self.url}{path} answered with {said}, not with JSON"
            advice = "is its url right, with the URL base if one is set?"
            raise HttpError(f"{text}; {advice}", retry=True)
        try:
            yield
        except (ValueError, RecursionError):
            raise HttpError(f"{self.name}: the JSON of {path} is damaged", retry=True) from None

    def start(self, call: Call, is_list: bool = False) -> Callable[[], HttpAnswer]:
        """Send a request; return a function that waits for the answer, and raises HttpError."""
        wait = self.list_timeout if is_list else self.timeout
        end = time.monotonic() + wait * (3 if is_list else 1)
        box: queue.SimpleQueue[Union[HttpAnswer, BaseException]] = queue.SimpleQueue()

        def work() -> None:
            try:
                box.put(self._send(call, MAX_LIST if is_list else MAX_BODY, wait, end))
            except BaseException as exc:
                box.put(self._explain(exc, is_list))

        def answer() -> HttpAnswer:
            try:
                result = box.get(timeout=max(0.0, end - time.monotonic()) + 0.1)
            except queue.Empty:
                result = self._explain(TimeoutError(), is_list)
            if isinstance(result, BaseException):
                raise result
            return result

        # Without a thread the look-up of a name, or a byte a second, would have no end.
        threading.Thread(target=work, daemon=True).start()
        return answer

    def _send(self, call: Call, *limits: float) -> HttpAnswer:
        """Send a request, by a new connection if it changes something: a kept one may be closed."""
        # A name that is not UTF-8 goes into a query as its bytes; JSON can only hold a ? for it.
        query = urlencode(call.query, doseq=True, errors="surrogateescape", quote_via=quote)
        query = "&".join(filter(None, [self._query, query]))
        parts = urlsplit(self._address + call.path)
        target = (parts.path or "/") + (query and f"?{query}")
        headers, data = {**self._headers, **call.headers}, call.body
        if isinstance(data, bytes):
            headers["Content-Type"] = "text/plain; charset=utf-8"
        elif data is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(data, ensure_ascii=False).encode("utf-8", "replace")
        request = (call.method, target, data, headers)
        with contextlib.suppress(queue.Empty, ConnectionError):
            since, connection = self._idle.get_nowait()
            is_safe = call.method == "GET" and "term" not in call.query  # the relay searches for it
            if is_safe and time.monotonic() - since < KEPT_ALIVE:
                return self._receive(connection, call.path, request, *limits)
            connection.close()
        return self._receive(self._connect(parts), call.path, request, *limits)

    def _connect(self, parts: Any) -> Any:
        import http.client

        if parts.scheme == "http":
            return http.client.HTTPConnection(parts.hostname, parts.port)
        if parts.scheme != "https" or not hasattr(http.client, "HTTPSConnection"):
            raise ValueError("only http, and https where this Python has ssl")
        import ssl

        if self._tls is None:
            tls = ssl.create_default_context()
            if self._ca_file:
                # Authorities made at home rarely have all that Python 3.13 began to demand.
                tls.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
                try:
                    tls.load_verify_locations(self._ca_file)
                except OSError as exc:
                    text = f"cannot use its ca_file {self._ca_file}"
                    words = exc.strerror or "no certificate in it"
                    raise HttpError(f"{self.name}: {text}: {words}") from exc
            self._tls = tls
        return http.client.HTTPSConnection(parts.hostname, parts.port, context=self._tls)

    def _receive(
        self, connection: Any, path: str, request: Any, limit: float, wait: float, end: float
    ) -> HttpAnswer:
        try:
            connection.timeout = wait
            if connection.sock:
                connection.sock.settimeout(wait)
            connection.request(*request)
            with connection.getresponse() as answer:
                status, kind = answer.status, (answer.headers.get("Content-Type") or "").lower()
                if not 200 <= status < 300:
                    content = b""
                    with contextlib.suppress(Exception):
                        content = self._read(answer, 1 << 16, end).read()
                    raise self._refusal(status, answer.headers, content, path)
                stream = self._read(answer, limit, end)
        except BaseException:
            connection.close()
            raise
        self._idle.put((time.monotonic(), connection))
        return status, kind, stream

    def _read(self, answer: Any, limit: float, end: float) -> Any:
        import http.client
        import tempfile

        stream = tempfile.SpooledTemporaryFile(max_size=1 << 20)  # noqa: SIM115
        for chunk in iter(lambda: answer.read1(1 << 16), b""):
            stream.write(chunk)
            if time.monotonic() > end:
                raise TimeoutError
            if stream.tell() > limit:
                text = f"{self.name}: the answer is longer than {int(limit) >> 20} MiB"
                raise HttpError(text, retry=True)
        if answer.length:  # read1 does not tell
            raise http.client.IncompleteRead(b"", answer.length)
        stream.seek(0)
        return stream

    def _refusal(self, status: int, headers: Any, content: bytes, path: str) -> HttpError:
        words = self.quote(read_error(content))
        said = f": {words}" if words else ""
        if 300 <= status < 400:
            where = headers.get("Location") or "nowhere"
            said = f", a redirect to {self.quote(where)}; redirects are not followed"
            here = urlsplit(self.url)
            base, found, _ = where.partition(here.path + path)
            if found and base.startswith("/"):
                said += f"; set its url to {here.scheme}://{here.netloc}{self.quote(base)}"
        elif status in DENIED and headers.get("WWW-Authenticate"):
            said = ": something before it asks for a login; write user:password@ into its url, "
            said += "or name a headers_file"
        elif status == 401 or not words:
            said = {
                401: ": the key or token is refused; correct it in the config",
                403: ": the key is refused, or something before it asks for a headers_file",
                404: f": {self.url}{path} is unknown there; is its url right, with the URL base?",
            }.get(status, "")
        retry = status >= 500 or status in RETRY_STATUSES
        exact = re.search(rb'"retry_after": *([\d.]+)', content)  # Discord's, with a fraction
        asked = exact[1].decode() if exact else headers.get("Retry-After") or ""
        after = parse_retry_after(asked, time.time())
        return HttpError(f"{self.name}: answered {status}{said}", status, retry, after)

    def _explain(self, reason: BaseException, is_list: bool) -> BaseException:
        """Return the HttpError for whatever socket, ssl or http.client raised."""
        classes = " ".join(kind.__name__ for kind in type(reason).__mro__)
        fault = next((x for x in _FAULTS if re.search(x[0], f"{classes}: {reason}")), None)
        if isinstance(reason, HttpError) or not fault:
            return reason
        limit = "list_timeout" if is_list else "timeout"
        words = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        names = {"limit": limit, "waited": format_duration(getattr(self, limit))}
        text = fault[1].format(words=self.quote(words).lower(), kind=type(reason).__name__, **names)
        return HttpError(f"{self.name}: {self.url}: {text}", retry=fault[2])

    def quote(self, words: Any) -> str:
        """Return a server's words as one short line without the secrets that it was sent."""
        text = self._secrets.sub("***", " ".join(str(words).split()))
        return redact(text)[:MAX_ERROR]


# What may stand before an element of a JSON array, or end it; an element has to follow.
_ARRAY_BEGIN = re.compile(r"\s*\[\s*(?:(\])|(?=[^\s\]]))")
_ARRAY_NEXT = re.compile(r"\s*(?:(\])|,\s*(?=\S))")
_HALF_NUMBER = re.compile(r"[-+.eE\d]*\Z")


def iterate_json(stream: Any) -> Iterator[Any]:
    """Yield the elements of a JSON array from a binary file.  ValueError if it is damaged."""
    decode = json.JSONDecoder().raw_decode
    utf8 = codecs.getincrementaldecoder("utf-8")()
    text, data, before, ended = "", b"?", _ARRAY_BEGIN, False
    while data and len(text) <= MAX_ELEMENT:
        data = stream.read(max(1 << 16, len(text)))  # doubling: none is parsed often
        text += utf8.decode(data, not data)
        at = 0
        while not ended:
            gap = before.match(text, at)
            if not gap:
                break
            if gap[1]:
                ended, at = True, gap.end()
                break
            try:
                element, end = decode(text, gap.end())
            except json.JSONDecodeError:
                break  # it goes on in the next piece
            if data and _HALF_NUMBER.match(text, end):
                break  # so may a number
            before, at = _ARRAY_NEXT, end
            yield element
        text = text[at:]
        if ended and text.strip():
            raise ValueError("more than an array")
    if not ended:
        raise ValueError("the array does not end")


def read_error(content: bytes) -> str:
    """Return what a server's error says, in one line; never the description, a stack trace."""
    try:
        error = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    names = ("message", "errorMessage", "error", "detail", "msg", "title")
    parts = []
    for item in error if isinstance(error, list) else [error]:
        if isinstance(item, dict):
            said = next((str(item[name]) for name in names if item.get(name)), "")
            prefix = f"{item['propertyName']}: " if item.get("propertyName") else ""
            parts.append(prefix + said)
            if isinstance(item.get("errors"), dict):
                parts += [f"{field}: {text}" for field, text in item["errors"].items()]
    return "; ".join(parts)


def parse_retry_after(text: str, now: float) -> float:
    """Return the seconds that a Retry-After header asks for: a number, or a date.  0 if neither."""
    import email.utils

    seconds = 0.0
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if re.fullmatch(r"\s*[\d.]+\s*", text, re.ASCII):
            seconds = float(text)
        else:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - now
    return min(86400.0, max(0.0, seconds))


# ---------------------------------------------------------------------------------------------
# Sonarr and Radarr
# ---------------------------------------------------------------------------------------------
# Version 3 of their API, which Sonarr 3 to 5 and Radarr 3 to 6 have in common.  JSON leaves out
# what is null, hence all the .get().

READERS = 4  # requests at once while reading; what changes a server is sent one by one


class Kind(NamedTuple):
    """What differs between Sonarr and Radarr: names in their API, and where rows come from.

    The fields map our columns to places in their JSON.
    """

    app: str
    title: str  # a series or movie
    item: str  # what is searched for and monitored: an episode or a movie
    monitor: str
    search: str
    file: str
    titles: str
    title_fields: Mapping[str, str]
    files: str
    file_fields: Mapping[str, str]

    def tables(self) -> Sequence[Tuple[str, Mapping[str, str]]]:
        """Return (table, fields) of the titles and of their files."""
        return (self.titles, self.title_fields), (self.files, self.file_fields)


# fmt: off
KINDS = {
    "sonarr": Kind("Sonarr", "series", "episode", "/episode/monitor", "EpisodeSearch",
        "/episodefile", "series",
        {"sonarr_id": "id", "title": "title", "imdb_id": "imdbId", "tvdb_id": "tvdbId",
         "tmdb_id": "tmdbId", "monitored": "monitored", "poster_url": "images.poster",
         "fanart_url": "images.fanart", "year": "year", "tags": "labels"},
        "episode_files",
        {"sonarr_file_id": "id", "sonarr_series_id": "seriesId", "season_number": "seasonNumber",
         "quality": "quality.quality.name", "resolution": "quality.quality.resolution",
         "release_group": "releaseGroup", "size_bytes": "size", "original_path": "path"}),
    "radarr": Kind("Radarr", "movie", "movie", "/movie/editor", "MoviesSearch",
        "/moviefile", "movies",
        {"radarr_id": "id", "title": "title", "year": "year", "imdb_id": "imdbId",
         "tmdb_id": "tmdbId", "monitored": "monitored", "added_utc": "added",
         "poster_url": "images.poster", "fanart_url": "images.fanart", "tags": "labels"},
        "movie_files",
        {"radarr_file_id": "id", "radarr_movie_id": "movieId",
         "quality": "quality.quality.name", "resolution": "quality.quality.resolution",
         "video_codec": "mediaInfo.videoCodec", "audio_codec": "mediaInfo.audioCodec",
         "size_bytes": "size", "original_path": "path"}),
}
# fmt: on


class Server:
    """A configured Sonarr or Radarr."""

    def __init__(self, instance: Instance, timeout: float, list_timeout: float = 120.0) -> None:
        settings = instance.settings
        self.name = instance.name
        self.kind = KINDS[instance.kind]
        self.path_map = settings.path_map
        headers = {**dict(settings.headers), "X-Api-Key": settings.api_key}
        self.client = Client(
            instance.name, settings.url, timeout, headers,
            ca_file=settings.ca_file, list_timeout=list_timeout,
        )  # fmt: skip
        self._tags: Optional[Dict[int, str]] = None

    def connect(self) -> str:
        """Return the server's version.  HttpError if it is not what the config says."""
        status = self.client.ask("GET", "/api/v3/system/status")
        app = dig(status, "appName") or "something else"
        if app != self.kind.app:
            text = f"{self.client.url} is {self.client.quote(app)}, not {self.kind.app}"
            raise HttpError(f"{self.name}: {text}")
        return self.client.quote(dig(status, "version") or "")

    def get_list(self, path: str, **query: Any) -> Iterator[JsonObject]:
        """Yield the objects of a GET's list.  HttpError if any is none, or has no id: a proxy, or
        something else that is not the server, must not empty its mirror.
        """
        return self.start_list(path, **query)()

    def start_list(self, path: str, **query: Any) -> Callable[[], Iterator[JsonObject]]:
        """Do as `get_list` does, but only send the request; what is returned waits for it."""
        wait = self.client.start_list("/api/v3" + path, **query)
        return lambda: (self.with_id(element, path) for element in wait())

    def with_id(self, element: Any, path: str) -> JsonObject:
        """Return some JSON, which must be an object with an id."""
        found: JsonObject = element if isinstance(element, dict) else {}
        number = found.get("id")
        if type(number) is int and abs(number) < 1 << 63:
            return found
        text = f"{self.name}: the JSON of {path} is not what it should be, objects with ids"
        raise HttpError(text, retry=True)

    def change(self, method: str, path: str, body: Any = None) -> Any:
        """Send what changes the server."""
        return self.client.ask(method, "/api/v3" + path, body)

    def find(self, path: str) -> Optional[JsonObject]:
        """Return one thing, None where the server does not have it."""
        try:
            return self.with_id(self.client.ask("GET", "/api/v3" + path), path)
        except HttpError as exc:
            if exc.status != 404:
                raise
            self.connect()  # or something between us and the server has said so
            return None

    def get_title(self, title_id: int) -> Tuple[JsonObject, List[JsonObject]]:
        """Return a series and its episodes, or a movie as both; nothing if it is gone there.

        Not /episode?episodeIds: a single id that is unknown makes that a 500.
        """
        title = self.find(f"/{self.kind.title}/{title_id}")
        if title is None or self.kind.item == "movie":
            return title or {}, [title] if title else []
        return title, list(self.get_list("/episode", seriesId=title_id))

    def get_history(self, title_id: int, season: Any = None) -> List[JsonObject]:
        """Return what the server has done for a season or a movie, the oldest first."""
        query = {} if season is None or self.kind.item == "movie" else {"seasonNumber": season}
        path, query[f"{self.kind.title}Id"] = f"/history/{self.kind.title}", title_id
        return sorted(self.get_list(path, **query), key=operator.itemgetter("id"))

    def labels(self, title: JsonObject) -> str:
        """Return the labels of a title's tags, comma-separated."""
        if not isinstance(title.get("tags"), list) or not title["tags"]:
            return ""
        if self._tags is None:
            tags = self.get_list("/tag")
            self._tags = {tag["id"]: str(dig(tag, "label")).lower() for tag in tags}
        return ",".join(sorted(label for n, label in self._tags.items() if n in title["tags"]))

    def file_of(self, item: JsonObject) -> int:
        """Return the id of the file that an episode or movie has, 0 without one."""
        return int(dig(item, f"{self.kind.item}FileId") or dig(item, "movieFile.id") or 0)


def dig(value: Any, place: str) -> Union[str, int, float, None]:
    """Return what stands at 'quality.quality.name' in some JSON, if it fits into a column."""
    for key in place.split("."):
        if isinstance(value, list):  # of images: the address of the one of that type
            images = [image for image in value if isinstance(image, dict)]
            value = next((image for image in images if image.get("coverType") == key), {})
            key = "remoteUrl" if value.get("remoteUrl") else "url"
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, int) and abs(value) < 1 << 63:
        return int(value)  # True is 1 in the database
    return value if isinstance(value, (str, float)) else None


_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|[A-Za-z]:$|\\\\")


def slashed(path: str) -> str:
    """Return a path of Windows with slashes; elsewhere a backslash is part of a name."""
    return path.replace("\\", "/") if _WINDOWS.match(path) else path


def map_path(path: str, pairs: PathMap) -> str:
    """Return a path as the server sees it.

    The longest prefix wins; without one the path is the same on both sides.
    """
    fitting = [pair for pair in pairs if is_under(path, pair[0])]
    if not fitting:
        return path
    here, there = max(fitting, key=lambda pair: len(pair[0]))
    rest = path[len(here.rstrip("/")) :]
    if _WINDOWS.match(there):
        return there.replace("/", "\\").rstrip("\\") + rest.replace("/", "\\")
    return (there.rstrip("/") + rest).rstrip("/") or "/"


def map_back(path: str, pairs: PathMap) -> List[str]:
    """Return where a server's path may be here: several places, where several left sides have the
    longest right side that fits.  Windows does not mind the case.
    """
    path, fitting = slashed(path), []
    for here, there in pairs:
        prefix, whole = slashed(there).rstrip("/"), path
        if _WINDOWS.match(there):
            prefix, whole = prefix.lower(), path.lower()
        if is_under(whole, prefix):
            fitting.append((len(prefix), here.rstrip("/") + path[len(prefix) :]))
    longest = max(fitting, default=(0, ""))[0]
    return [here.rstrip("/") or "/" for length, here in fitting if length == longest] or [path]


# ---------------------------------------------------------------------------------------------
# Ingest
# ---------------------------------------------------------------------------------------------


def ingest_instances(
    conn: sqlite3.Connection, instances: Sequence[Instance], repair: RepairSettings,
    progress: Callable[[str], None],
) -> List[JsonObject]:  # fmt: skip
    """Mirror servers' titles and files in the database; return the lines of `ingest --json`.

    A thread a server reads; this one alone writes, to temporary tables first: a server that fails
    halfway changes nothing.
    """
    blank = {"version": "", **dict.fromkeys(("titles", "files", "linked", "removed"), 0)}
    lines: List[JsonObject] = [
        {"name": one.name, "kind": one.kind, **blank, "error": None} for one in instances
    ]
    kinds = [KINDS[instance.kind] for instance in instances]
    pieces: queue.Queue[Tuple[int, Any]] = queue.Queue(2 * len(instances))
    _collect_goals(conn)
    for number, instance in enumerate(instances):
        for table, fields in kinds[number].tables():
            conn.execute(f"DROP TABLE IF EXISTS temp.{table}_{number}")
            conn.execute(f"CREATE TEMP TABLE {table}_{number} (here, {', '.join(fields)})")
        arguments = (Server(instance, repair.timeout, repair.list_timeout), number, pieces)
        threading.Thread(target=_read_server, args=arguments, daemon=True).start()
    reading = len(instances)
    while reading:
        number, piece = pieces.get()
        line = lines[number]
        if isinstance(piece, list):
            for (table, fields), rows in zip(kinds[number].tables(), piece):
                _keep(conn, f"{table}_{number}", len(fields), rows)
            line["titles"] += len(piece[0])
            line["files"] += len(piece[1])
            progress(f"{sum(line['files'] for line in lines):,} files")
        elif isinstance(piece, str):
            line["version"] = piece
        elif isinstance(piece, HttpError):
            log.error("%s", piece)
            line["error"] = str(piece)
        elif piece:
            raise piece
        else:
            line.update(_replace_rows(conn, line["name"], kinds[number], number))
        if not isinstance(piece, (list, str)):
            reading -= 1
    return lines


def _read_server(server: Server, number: int, pieces: queue.Queue[Tuple[int, Any]]) -> None:
    """Put (number, piece) into a queue: the version, lists of rows, at the end None or an error."""
    rows: List[List[List[Any]]] = [[], []]
    try:
        pieces.put((number, server.connect()))
        for found in _read_all(server):
            for kept, items, (_, fields) in zip(rows, found, server.kind.tables()):
                kept.extend(_make_row(server, item, fields.values()) for item in items)
            if len(rows[0]) + len(rows[1]) >= ROWS_AT_ONCE:
                pieces.put((number, rows))
                rows = [[], []]
        pieces.put((number, rows))
        pieces.put((number, None))
    except BaseException as exc:
        pieces.put((number, exc))


def _make_row(server: Server, item: JsonObject, places: Iterable[str]) -> List[Any]:
    """Return the columns of a title or file, the first of them the places where it may be here."""
    here = map_back(str(dig(item, "path") or ""), server.path_map)
    values = (dig(item, place) for place in places)
    return [here, *(to_db(value) if isinstance(value, str) else value for value in values)]


def _read_all(server: Server) -> Iterator[Tuple[List[JsonObject], List[JsonObject]]]:
    """Yield titles and files, as they come: all movies at once, series a few at a time."""
    if server.kind.item == "movie":
        for movie in server.get_list("/movie"):
            movie["labels"] = server.labels(movie)
            file = movie.get("movieFile")
            found = [] if file is None else [server.with_id(file, "/movie")]
            yield [movie], [{**file, "movieId": movie["id"]} for file in found]
        return
    waiting: Deque[Tuple[int, Callable[[], Iterator[JsonObject]]]] = deque()

    def next_files(room: int) -> Iterator[JsonObject]:
        if len(waiting) <= room:
            return iter(())
        number, wait = waiting.popleft()
        try:
            return wait()
        except HttpError as exc:
            if exc.status == 404 and server.find(f"/series/{number}") is None:
                return iter(())  # deleted since the list was made
            raise

    for series in server.get_list("/series"):
        series["labels"] = server.labels(series)
        files = next_files(READERS - 1)
        if dig(series, "statistics.episodeFileCount"):
            start = server.start_list(server.kind.file, seriesId=series["id"])
            waiting.append((series["id"], start))
        yield [series], list(files)  # while the others are under way
    while waiting:
        yield [], list(next_files(0))


def _collect_goals(conn: sqlite3.Connection) -> None:
    """Write down for all servers where the links lead, by their own words."""

    def goal(path: Any, target: Any) -> Union[str, bytes]:
        folder = os.path.dirname(from_db(path))
        return to_db(os.path.normpath(os.path.join(folder, from_db(target))))

    conn.create_function("goal", 2, goal)
    conn.execute("DROP TABLE IF EXISTS temp.goals")
    conn.execute("CREATE TEMP TABLE goals (goal PRIMARY KEY, path)")
    conn.execute(
        "INSERT OR IGNORE INTO temp.goals SELECT goal(path, last_target), path FROM symlinks "
        "WHERE status <> 'missing' ORDER BY path"
    )


def _keep(conn: sqlite3.Connection, table: str, width: int, rows: List[List[Any]]) -> None:
    """Move what was read into a temporary table."""
    is_link = "SELECT 1 FROM symlinks WHERE path = ? AND status <> 'missing'"
    is_goal = "SELECT 1 FROM temp.goals WHERE goal = ?"
    conn.execute("BEGIN")  # or each row would be a transaction; only temporary tables are locked
    with conn:
        for row in rows:
            places = [to_db(place) for place in row[0]]
            tests = [(q, p) for q in (is_link, is_goal) for p in places] if len(places) > 1 else []
            known = (place for test, place in tests if conn.execute(test, (place,)).fetchone())
            row[0] = next(known, places[0])
        marks = ", ".join("?" * (width + 1))
        conn.executemany(f"INSERT INTO temp.{table} VALUES ({marks})", rows)


def _replace_rows(
    conn: sqlite3.Connection, instance: str, kind: Kind, number: int
) -> Dict[str, int]:
    """Put what was read in the place of the instance's rows, each file linked to its symlink."""
    file_id, columns = next(iter(kind.file_fields)), ", ".join(kind.file_fields)
    (titles, files), names = (kind.titles, kind.files), ", ".join(kind.title_fields)
    statements = (
        f"""SELECT count(*) FROM {files} WHERE instance = ? AND {file_id} NOT IN
            (SELECT {file_id} FROM temp.{files}_{number})""",
        f"DELETE FROM {titles} WHERE instance = ?",
        f"DELETE FROM {files} WHERE instance = ?",
        f"""INSERT OR REPLACE INTO {titles} (instance, {names})
            SELECT ?, {names} FROM temp.{titles}_{number}""",
        f"""INSERT INTO {files} (instance, {columns}, symlink_path)
            SELECT ?, {columns}, coalesce(link.path, near.path, far.path)
            FROM temp.{files}_{number}
            LEFT JOIN symlinks link ON link.path = here AND link.status <> 'missing'
            LEFT JOIN temp.goals near ON near.goal = here
            LEFT JOIN temp.goals far ON far.goal = original_path""",
        f"SELECT count(symlink_path) FROM {files} WHERE instance = ?",
    )
    with transaction(conn):
        counts = [conn.execute(statement, (instance,)).fetchone() for statement in statements]
    return {"linked": counts[-1][0], "removed": counts[0][0]}


# ---------------------------------------------------------------------------------------------
# Queue
# ---------------------------------------------------------------------------------------------

PENDING, SENT, FAILED, CANCELLED, REPAIRED = "pending", "sent", "failed", "cancelled", "repaired"
RETRY, WOULD_SEND = "retry", "would send"  # what else a dispatch says of an action
SKIPPED = (
    "already_queued", "too_recent", "cooldown", "exhausted", "no_route", "recovered", "unreachable",
    "waiting", "unmonitored", "tagged", "over_limit", "taken_back",
)  # fmt: skip
YOUNG = ("too_recent", "waiting")  # what time alone will end


class Owner(NamedTuple):
    """Who can replace a file: an instance, under the name that the server gives the file.

    All but the first two are known from the last ingest, if the server told of the file.
    """

    instance: str
    server_path: str
    file_id: Optional[int] = None
    monitored: Optional[int] = None
    tags: str = ""
    title_id: Optional[int] = None
    season: Optional[int] = None


def find_owner(
    conn: sqlite3.Connection, instances: Sequence[Instance], path: str, target: str
) -> Optional[Owner]:
    """Return who owns a link: the server to which exactly this path, or else exactly its target,
    is a file, or a folder of files; else, for a video, the instance with the longest root above it.
    """
    goal = os.path.normpath(os.path.join(os.path.dirname(path), target))
    above = {one.name: find_ancestor(path, one.settings.roots) or "" for one in instances}
    nearest = sorted(instances, key=lambda instance: -len(above[instance.name]))
    for name, instance in itertools.product((path, goal), nearest):
        kind = KINDS[instance.kind]
        title_id, (file_id, parent_id, *_) = next(iter(kind.title_fields)), kind.file_fields
        server_path = map_path(name, instance.settings.path_map)
        asked: List[Tuple[str, List[Any]]] = [("f.original_path = ?", [to_db(server_path)])]
        if not is_video(path):  # a link to a folder stands for the files beneath it
            asked.append(beneath(server_path, "f.original_path"))
        for condition, values in asked:
            row = conn.execute(
                f"SELECT f.{file_id}, t.monitored, coalesce(t.tags, ''), f.{parent_id}, "
                f"{'f.season_number' if kind.item == 'episode' else 'NULL'} FROM {kind.files} f "
                f"LEFT JOIN {kind.titles} t ON t.instance = f.instance "
                f"AND t.{title_id} = f.{parent_id} "
                f"WHERE {condition} AND +f.instance = ?",  # by the paths' index
                (*values, instance.name),
            ).fetchone()
            if row:
                return Owner(instance.name, server_path, *row)
    if nearest and above[nearest[0].name] and is_video(path):
        return Owner(nearest[0].name, map_path(path, nearest[0].settings.path_map))
    return None


class RelayTerm(NamedTuple):
    """What the relay is asked for: a movie by its folder's name, or an episode of a show."""

    kind: str
    name: str
    season: Optional[int] = None
    episode: int = 0

    def to_url(self, relay: RelaySettings, whole_season: bool = False) -> str:
        """Return the action's URL, without the token."""
        term = self.name
        if self.season is not None:
            term += f" S{self.season:02d}" + ("" if whole_season else f"E{self.episode:02d}")
        scope = "season" if whole_season else "auto"
        query = urlencode({"type": self.kind, "scope": scope, "term": term}, errors="replace")
        return f"{strip_secrets(relay_find_url(relay))}?{query}"


def relay_find_url(relay: RelaySettings) -> str:
    """Return the relay's address with its /find, which may be configured or not."""
    return relay.base if relay.base.endswith("/find") else f"{relay.base}/find"


def plan_relay(relay: RelaySettings, path: str) -> List[RelayTerm]:
    """Return what to ask the relay for, an entry an episode; [] where no route leads there.

    Shows and movies are named as their folders are: so the relay has always been asked.
    """
    routes, media = dict(relay.routes), parse_media(path)
    above = find_ancestor(path, routes)
    if above is None or not relay.base or not is_video(path):
        return []
    kind = routes[above]
    folders = path[len(above.rstrip("/")) + 1 :].split("/")[:-1]
    if kind.startswith("radarr"):
        return [RelayTerm(kind, folders[-1] if folders else media.name)]
    if folders and parse_season_folder(folders[-1]) is not None:
        folders.pop()
    name = folders[-1] if folders else media.name
    return [RelayTerm(kind, name, media.season, number) for number in media.episodes]


class Attempt(NamedTuple):
    """An action in the history of a link: when it was sent, and how often it was searched for."""

    url: str
    status: str
    is_open: bool
    fired: float
    times: int
    error: str
    patience: float = math.inf  # with which it was queued


def load_history(conn: sqlite3.Connection) -> Dict[str, List[Attempt]]:
    """Return the actions there were for each link, oldest first."""
    history: Dict[str, List[Attempt]] = {}
    select = """SELECT coalesce(url, ''), status, related_path, fired_utc, progress, last_error
        FROM actions WHERE related_path IS NOT NULL ORDER BY id"""
    for url, status, path, fired, progress, error in conn.execute(select):
        noted = json.loads(progress or "{}")
        is_open = status == PENDING or (status == SENT and url.startswith("arr:"))
        times = max(1, noted.get("searches", 1)) if status in (SENT, FAILED, REPAIRED) else 0
        patience, fired = noted.get("patience", math.inf), parse_time(fired) or 0.0
        attempt = Attempt(url, status, is_open, fired, times, error or "", patience)
        for name in {from_db(path), *noted.get("paths", ())}:
            history.setdefault(name, []).append(attempt)
    return history


def why_not(
    settings: RepairSettings, since: float, attempts: Sequence[Attempt], now: float,
    wait: Optional[Wait] = None,
) -> str:  # fmt: skip
    """Return which of `SKIPPED` keeps a link, broken since then, from a repair; '' for none."""
    if any(attempt.is_open for attempt in attempts):
        return "already_queued"
    if wait and now < wait.until:
        return wait.reason
    if sum(a.times for a in attempts if a.fired >= since) >= settings.max_attempts:
        return "exhausted"
    last = max((attempt.fired for attempt in attempts), default=0.0)
    return "cooldown" if now - last < settings.cooldown else ""


def is_replaced(conn: sqlite3.Connection, path: str, since: float) -> bool:
    """Tell whether a good link beside `path`, newer than that, is the same episode or movie."""
    work, folder = parse_work(path), os.path.dirname(path)
    if not is_video(path) or not (work.kind == "movie" or work.episodes or work.date):
        return False  # its name does not say enough
    condition, values = beneath(folder)
    select = f"""SELECT path FROM symlinks WHERE substr(first_seen_utc, 1, 19) > ?
        AND status = 'ok' AND {condition}"""
    rows = conn.execute(select, (format_time(since)[:19], *values))
    parts = operator.attrgetter("kind", "title", "year", "season", "episodes", "date")
    newer = [name for name in (from_db(row[0]) for row in rows) if os.path.dirname(name) == folder]
    return any(is_video(name) and parts(parse_work(name)) == parts(work) for name in newer)


def group_by(items: Iterable[Any], key: Callable[[Any], Any]) -> Dict[Any, List[Any]]:
    """Return {key: the items that have it}, in their order."""
    groups: Dict[Any, List[Any]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def fill_batch(groups: Iterable[Sequence[Any]], room: int) -> List[Any]:
    """Return the members of the first groups that have room together.  No group is cut in two, and
    one that is larger than all the room goes alone.
    """
    batch: List[Any] = []
    for group in groups:
        if len(batch) >= room or (batch and len(batch) + len(group) > room):
            break
        batch += group
    return batch


def name_season(config: Config, path: str, owner: Optional[Owner]) -> str:
    """Return a name for what a link is to be repaired together with: its season, or itself."""
    if owner is None:
        terms = plan_relay(config.relay, path)
        return "/".join(map(str, terms[0][:3])) if terms and terms[0].season is not None else path
    if owner.season is not None:
        return f"{owner.instance}/{owner.title_id}/{owner.season}"
    return os.path.dirname(path) if owner.instance.startswith("sonarr") else path


def queue_repairs(conn: sqlite3.Connection, config: Config) -> JsonObject:
    """Turn confirmed broken links into actions, and return what `queue --json` shows."""
    skipped = Counter(dict.fromkeys(SKIPPED, 0))
    settings, history, now = config.repair, load_history(conn), time.time()
    spared = {one.name: set(map(str.lower, one.settings.skip_tags)) for one in config.instances}
    losses, waits, taken_back = load_losses(conn), [], load_taken_back(conn)
    owners: Dict[str, Optional[Owner]] = {}
    seasons: Dict[str, str] = {}
    young: Dict[str, str] = {}  # seasons of which a link is still to grow older: why
    found = find_broken(conn, config.scan.roots)
    for path, target, since_utc in itertools.chain(found, find_unplayable(conn, config)):
        since = parse_time(since_utc) or 0.0
        owner = owners[path] = find_owner(conn, config.instances, path, target)
        seasons[path] = name_season(config, path, owner)
        wait = plan_wait(settings.min_age, settings.patience, since, losses.get(path))
        reason = why_not(settings, since, history.get(path, ()), now, wait)
        if not reason and is_replaced(conn, path, since):
            reason = "recovered"
        elif not reason and path in taken_back:
            reason = "taken_back"
        elif not reason and not owner and not plan_relay(config.relay, path):
            reason = "no_route"
        elif not reason and owner and owner.monitored == 0 and not settings.unmonitored:
            reason = "unmonitored"
        elif not reason and owner and spared[owner.instance].intersection(owner.tags.split(",")):
            reason = "tagged"
        if reason:
            skipped[reason] += 1
            waits += [wait] if reason == "waiting" else []
            young.update({seasons[path]: reason} if reason in YOUNG else {})
            del owners[path]
    for path in [path for path in owners if seasons[path] in young]:
        skipped[young[seasons[path]]] += 1  # its season waits for the youngest
        del owners[path]
    verdicts = recheck_broken(conn, config, list(owners))
    for path in list(owners):
        status, why = verdicts.get(path, (MISSING, ""))
        if status != BROKEN:
            skipped["unreachable" if status == UNREACHABLE else "recovered"] += 1
            log.debug("%s is not queued: %s", path, why or status)
            del owners[path]
    plan = plan_actions(config, owners)
    groups = group_by(plan.items(), lambda entry: seasons[entry[1][0]])
    batch = fill_batch(groups.values(), settings.limit)
    skipped["over_limit"] = sum(map(len, plan.values())) - sum(len(paths) for _, paths in batch)
    queued: List[JsonObject] = []
    for url, paths in batch:
        reason = "broken link" if len(paths) == 1 else f"{len(paths)} broken links of a season"
        noted = {"paths": paths, "season": seasons[paths[0]], "min_age": settings.min_age}
        noted["patience"] = settings.patience
        number, is_new = insert_action(conn, url, reason, paths[0], json.dumps(noted))
        if is_new:
            _write_events(conn, [link_event(path, "", "queued", PENDING) for path in paths])
            queued.append({"id": number, "url": url, "related_path": paths[0], "reason": reason})
        else:
            skipped["already_queued"] += len(paths)
    return {
        "queued": queued, "skipped": dict(skipped), "waits": summarise_waits(waits),
        "exit_code": EXIT_REFUSED if skipped["unreachable"] else EXIT_OK,
    }  # fmt: skip


def list_actions(
    conn: sqlite3.Connection, status: Optional[str], ids: Sequence[int] = ()
) -> List[JsonObject]:
    """Return the rows of `actions list --json`, of a status or with certain ids."""
    select = """SELECT id, url, status, reason, related_path, created_utc, fired_utc, attempts,
        next_attempt_utc, last_error FROM actions ORDER BY id"""
    return [
        {**row, "related_path": from_db(row["related_path"]), "reason": from_db(row["reason"])}
        for row in map(dict, conn.execute(select))
        if (status is None or row["status"] == status) and (not ids or row["id"] in ids)
    ]


def retry_actions(conn: sqlite3.Connection, ids: Sequence[int]) -> List[int]:
    """Make failed and cancelled actions pending again, by default all that failed.

    One that had begun goes on from where its file record was found.  Returns the ids.
    """
    changed = []
    same = "SELECT 1 FROM actions WHERE status = 'pending' AND url = ?"
    select = """SELECT id, status, url, progress FROM actions
        WHERE status IN ('failed', 'cancelled') ORDER BY id"""
    with transaction(conn):
        for number, status, url, noted in conn.execute(select).fetchall():
            is_chosen = number in ids if ids else status == FAILED
            if is_chosen and not conn.execute(same, (url,)).fetchone():
                progress = {**json.loads(noted or "{}"), "searches": 0, "sending": False}
                progress.update({"step": "found"} if progress.get("step") else {})
                anew = {"attempts": 0, "next_attempt_utc": None, "last_error": None}
                update_action(conn, number, status=PENDING, progress=json.dumps(progress), **anew)
                changed.append(number)
    return changed or [-1]


def cancel_actions(conn: sqlite3.Connection, ids: Sequence[int]) -> List[int]:
    """Cancel actions that are pending or on their way, by default all that are pending."""
    open_now = conn.execute("SELECT id, status FROM actions WHERE status IN ('pending', 'sent')")
    chosen = [i for i, status in open_now if (i in ids if ids else status == PENDING)]
    with transaction(conn):
        for number in chosen:
            update_action(conn, number, status=CANCELLED, next_attempt_utc=None)
    return chosen or [-1]


def plan_actions(config: Config, owners: Mapping[str, Optional[Owner]]) -> Dict[str, List[str]]:
    """Return {URL: links} of the actions for some broken links, in their order.

    Broken episodes of one season become one search of the relay from `season_threshold` on.
    """
    actions: Dict[str, List[str]] = defaultdict(list)
    terms = {path: plan_relay(config.relay, path) for path, owner in owners.items() if not owner}
    lost = {term for some in terms.values() for term in some}
    seasons = Counter(term[:3] for term in lost)
    for path, owner in owners.items():
        if owner:
            quoted = quote(os.fsencode(owner.server_path))
            actions[f"arr://{owner.instance}/repair?path={quoted}"].append(path)
        urls = set()
        for term in terms.get(path, ()):
            enough = 0 < config.repair.season_threshold <= seasons[term[:3]]
            urls.add(term.to_url(config.relay, enough and term.season is not None))
        for url in sorted(urls):
            actions[url].append(path)
    return dict(actions)


# ---------------------------------------------------------------------------------------------
# Prune
# ---------------------------------------------------------------------------------------------
# Broken links that nobody can repair are removed, through the journal of all changes to links.

PRUNE_AGE = 30 * DAY


def why_kept(is_owned: bool, is_tagged: bool, repair: str, wait: Wait, now: float) -> str:
    """Return why a broken link stays, '' for nothing; `repair` is `why_not`'s last word on it."""
    if repair == "already_queued" or (is_owned and repair != "exhausted"):
        return repair or "owned"
    if is_tagged:
        return "tagged"
    return wait.reason if now < wait.until else ""


def find_unread(
    conn: sqlite3.Connection, instances: Iterable[Instance], after: str = ""
) -> List[str]:
    """Return the servers of which no ingest, after a time, has read what they own."""
    read: Set[str] = set()
    query = """SELECT summary FROM runs
        WHERE command = 'ingest' AND started_utc > ? AND started_utc <= ?"""
    for (summary,) in conn.execute(query, (after, utc_now())):
        lines = json.loads(summary or "{}").get("instances", ())
        read.update(line["name"] for line in lines if not line["error"])
    return [instance.name for instance in instances if instance.name not in read]


def find_prunable(
    conn: sqlite3.Connection, config: Config, min_age: float
) -> Iterator[Tuple[LinkChange, str]]:
    """Yield the removals of the broken links, the oldest first, and why they stay, if they do."""
    repair, history, losses = config.repair, load_history(conn), load_losses(conn)
    spared = {one.name: set(map(str.lower, one.settings.skip_tags)) for one in config.instances}
    claimed = claimed_folders(config)
    now = time.time()
    for path, target, since_utc in find_broken(conn, config.scan.roots):
        since = parse_time(since_utc) or now
        owner = find_owner(conn, config.instances, path, target)
        is_tagged = owner and not spared[owner.instance].isdisjoint(owner.tags.split(","))
        wait = max(  # an outage meanwhile asks for patience again, not for another 30 days
            plan_wait(min_age, 0, since, None),
            plan_wait(repair.min_age, repair.patience, since, losses.get(path)),
        )
        ended = why_not(repair, since, history.get(path, ()), math.inf)
        is_owned = owner is not None or find_ancestor(path, claimed) is not None
        why = "its repair has failed for good" if ended else "nobody owns it"
        why = f"broken since {format_time(since)[:10]}, and {why}"
        kept = why_kept(is_owned, bool(is_tagged), ended, wait, now)
        yield LinkChange(path, target, via=why), kept


def claimed_folders(config: Config) -> Set[str]:
    """Return the directories whose links some server or the relay repairs."""
    roots = {root for one in config.instances for root in one.settings.roots}
    return {*roots, *(above for above, _ in config.relay.routes)}


def prune_links(
    journal: Journal, config: Config, min_age: float, limit: Optional[int]
) -> JsonObject:
    """Remove the broken links that nobody can repair; return what `prune --json` shows."""
    journal.settle()
    unread = find_unread(journal.conn, config.instances)
    if unread:
        what = f"what {', '.join(unread)} owns is not known"
        raise RefusedError(f"{what}, so nothing is removed: `ingest` reads it")
    found = list(find_prunable(journal.conn, config, min_age))
    changes = [change for change, kept in found if not kept][:limit]
    refused = journal.carry_out(changes)
    if journal.run_id is not None:
        remove_empty_folders(journal.conn, config)
    for change in changes:
        change.reason = change.reason or change.via
    result = journal.report(changes, "remove", refused)
    result["removed"] = result.pop("restored")
    return {**result, "kept": dict(Counter(kept for _, kept in found if kept))}


def remove_empty_folders(conn: sqlite3.Connection, config: Config) -> None:
    """Remove the directories that this run, or one that was killed, has emptied; never a root."""
    stops = {*config.scan.roots, *config.cinesync.roots, *claimed_folders(config)}
    select = """SELECT path FROM link_changes JOIN runs USING (run_id)
        WHERE command = 'prune' AND finished_utc IS NULL AND state = 'removed'"""
    for path in [from_db(row[0]) for row in conn.execute(select)]:
        folder = os.path.dirname(path)
        while folder not in stops and find_ancestor(folder, config.scan.roots):
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                pass  # with another link's
            except OSError:
                break
            folder = os.path.dirname(folder)


# ---------------------------------------------------------------------------------------------
# Dispatch
# ---------------------------------------------------------------------------------------------
# A direct repair goes from step to step, see `REPAIR_STEPS`.  Each is written into
# `actions.progress` before the next is taken, so that a run that was killed is finished by the next
# one.  When its search is sent the action is 'sent', until the server has a file again that
# resolves on disk.

MAX_TRIES = 5
FIRST_DELAY = 60.0  # seconds before the second try; doubled with each
POLL_LIMIT = 120.0  # seconds for which the commands of a server are followed
OWN_SEARCH = 5.0  # seconds for which a server's own search for a failed release is waited for
FORGOTTEN = 240.0  # seconds after which a server's list may have lost a command that has ended
FINAL_STATES = ("completed", "failed", "aborted", "cancelled", "orphaned")
_JOURNAL_REMOVAL = """
INSERT INTO link_changes (run_id, path, old_target, new_target, state, changed_utc, reason)
VALUES ((SELECT coalesce(max(run_id), 0) FROM runs), ?, ?, '', 'removed', ?,
        'the server could not delete its broken link')
"""


class Settled(Exception):
    """An action goes no further now: (outcome, why).  'unreachable' leaves it as it is, like ''."""


class AwayError(RefresherrError):
    """Not what a server was asked for is at fault, but the server, or the way to it."""


@dataclasses.dataclass
class Action:
    """A row of `actions`, and what became of it in this run."""

    id: int
    url: str
    path: str
    status: str
    attempts: int
    progress: JsonObject
    fired: float
    is_due: bool
    outcome: str = ""
    error: str = ""
    commands: List[JsonObject] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        paths = self.progress.get("paths") or [self.path]
        self.paths = [path for path in paths if path.startswith("/")]  # or else it is a label
        parts = urlsplit(self.url if self.url.startswith("arr:") else "")
        self.server = parts.netloc  # '' stands for the relay
        self.server_path = os.fsdecode(unquote_to_bytes(parts.query.partition("=")[2]))
        folder = os.path.dirname(slashed(self.server_path))
        self.season = str(self.progress.get("season") or folder or self.id)

    @property
    def step(self) -> str:
        return str(self.progress.get("step", ""))

    @property
    def items(self) -> Set[int]:
        """The ids of the episodes, or the movie, that its file held."""
        return set(map(int, self.progress.get("items", ())))


def load_actions(conn: sqlite3.Connection, condition: str) -> List[Action]:
    """Return the actions that an SQL condition names, oldest first."""
    query = f"""SELECT id, coalesce(url, ''), related_path, status, coalesce(attempts, 0),
        coalesce(progress, '{{}}'), fired_utc, coalesce(next_attempt_utc, '') <= ?
        FROM actions WHERE {condition} ORDER BY id"""
    return [
        Action(
            number, url, from_db(path), status, tries, json.loads(noted), parse_time(at) or 0, due
        )
        for number, url, path, status, tries, noted, at, due in conn.execute(query, (utc_now(),))
    ]


def note_progress(
    conn: sqlite3.Connection, actions: Iterable[Action], event: str = "", **progress: Any
) -> None:
    """Write down how far actions have come."""
    with transaction(conn):
        for action in actions:
            action.progress.update(progress)
            update_action(conn, action.id, progress=json.dumps(action.progress))
            if event:
                _write_events(conn, [link_event(action.path, "", event, action.status)])


def end_action(
    conn: sqlite3.Connection, action: Action, status: str, why: str = "", counts: bool = True
) -> None:
    """Give an action its new status; with `counts` it is an attempt, and its cooldown begins."""
    action.status = action.outcome = status
    action.error = escape_message(why)  # a name in it may not be UTF-8
    columns: JsonObject = {"last_error": action.error or None, "next_attempt_utc": None}
    columns.update({"fired_utc": utc_now()} if counts else {})
    columns.update({"attempts": 0} if status == SENT else {})
    with transaction(conn):
        update_action(conn, action.id, status=status, **columns)
        events = [link_event(p, "", status, status) for p in action.paths or [action.path]]
        _write_events(conn, events)


def settle_repairs(conn: sqlite3.Connection) -> List[Action]:
    """Call repaired what was sent and is good again, or well replaced, by the last scan; and what
    has failed, where another link has come in the place of one that is gone.
    """
    settled, actions = [], load_actions(conn, "status IN ('sent', 'failed')")
    select = "SELECT path FROM symlinks WHERE status = 'ok' AND read_error <> ''"
    unread = {from_db(row[0]) for row in conn.execute(select)} if actions else set()
    for action in actions:
        states = {path: link.status for path, link in find_links(conn, action.paths).items()}
        if unread & set(states) or (action.status == FAILED and set(states.values()) - {MISSING}):
            continue
        if action.paths and all(
            states.get(path) == OK or is_replaced(conn, path, action.fired) for path in action.paths
        ):
            end_action(conn, action, REPAIRED, counts=False)
            settled.append(action)
    return settled


def find_gone(conn: sqlite3.Connection) -> List[Action]:
    """Return the repairs that have failed after they had begun, and whose link is gone since."""
    last = "SELECT max(id) FROM actions GROUP BY related_path"
    failed = load_actions(conn, f"status = 'failed' AND url LIKE 'arr://%' AND id IN ({last})")
    links = find_links(conn, [path for action in failed for path in action.paths])
    there = {path for path, link in links.items() if link.status != MISSING}
    return [action for action in failed if action.items and there.isdisjoint(action.paths)]


class Dispatcher:
    """Carries out actions: one server after the other, one request at a time; if not `applied`, it
    only says what it would send.  With `wait` the servers' commands are followed to their end.
    """

    def __init__(self, conn: sqlite3.Connection, config: Config, applied: bool, wait: bool) -> None:
        self.conn, self.config, self.applied, self.wait = conn, config, applied, wait
        self.left = self.limit = config.repair.max  # so many may still be tried in this run
        self.deadline = math.inf  # of time.monotonic()
        self.losses = load_losses(conn)
        self.hung = ""  # what hangs, once something does
        self.refused = False
        self.problems: List[str] = []

    def run(self, limit: int) -> JsonObject:
        """Send at most `limit` pending actions, ask after those on their way; `dispatch --json`."""
        # On the disk before a server or a link is changed: in WAL mode a commit is not, by default.
        self.conn.execute("PRAGMA synchronous=FULL")
        self.left = self.limit = limit
        settled = settle_repairs(self.conn)
        is_open = "status = 'pending' OR status = 'sent' AND url LIKE 'arr://%'"
        owing = "url LIKE 'arr://%' AND progress LIKE '%\"owed\": [\"%'"
        actions = load_actions(self.conn, f"{is_open} OR {owing}")
        first: Dict[str, int] = {}
        for action in actions:
            if action.status != PENDING:
                continue
            if not re.match("(arr|https?)://", action.url):
                self.fail(action, HttpError("cannot be sent: its URL is not http or https"))
            elif first.setdefault(action.url, action.id) != action.id:  # of the container edition
                self.settle(action, CANCELLED, f"the same as action {first[action.url]}")
        day = time.time() - DAY
        failed = [a for a in find_gone(self.conn) if a.progress.get("asked", 0.0) < day]
        self.visit([action for action in actions if not action.outcome], failed)
        return self.result(settled + actions + failed)

    def ask_failed(self, names: Iterable[str]) -> None:
        """Ask servers after failed repairs whose link is gone."""
        chosen = set(names)
        self.visit((), [action for action in find_gone(self.conn) if action.server in chosen])

    def visit(self, actions: Sequence[Action], failed: Sequence[Action]) -> None:
        instances = {instance.name: instance for instance in self.config.instances}
        for name in sorted({action.server for action in (*actions, *failed)}):
            mine = [action for action in actions if action.server == name]
            try:
                if not name:
                    Relay(self).run(mine)
                elif name in instances:
                    Repair(self, instances[name]).run(mine, [a for a in failed if a.server == name])
                elif mine:
                    self.complain(f"{name} is not in the config any more; its actions wait")
            except (HttpError, AwayError) as exc:
                if mine:
                    self.complain(str(exc))
                waiting = [a for a in mine if a.status == PENDING and a.is_due and not a.outcome]
                for action in waiting if self.has_room() else ():
                    self.settle(action, PENDING, str(exc))

    def complain(self, problem: str) -> None:
        log.error("%s", problem)
        self.problems.append(problem)

    def result(self, actions: Iterable[Action]) -> JsonObject:
        touched = [action for action in actions if action.outcome]
        count = Counter(action.outcome for action in touched)
        good = sum(count[status] for status in (SENT, CANCELLED, REPAIRED, WOULD_SEND))
        code = EXIT_OK
        if self.problems or count[FAILED] or count[RETRY]:
            code = EXIT_PARTIAL if good else EXIT_FAILED
        names = (SENT, FAILED, RETRY, CANCELLED, REPAIRED)
        return {
            "applied": self.applied, "exit_code": EXIT_REFUSED if self.refused else code,
            **{name: count[name] for name in names},
            "actions": [
                {"id": a.id, "url": a.url, "related_path": a.path, "status": a.outcome,
                 "error": a.error or None, "commands": a.commands} for a in touched
            ],
            **({"message": "; ".join(dict.fromkeys(self.problems))} if self.problems else {}),
        }  # fmt: skip

    def has_room(self, count: int = 1) -> bool:
        """Tell whether so many actions that belong together may still be tried in this run."""
        fits = 0 < count <= self.left or self.left == self.limit > 0
        return fits and time.monotonic() < self.deadline

    def settle(self, action: Action, outcome: str, why: str = "") -> None:
        """Give an action its outcome, see `Settled`."""
        if outcome == UNREACHABLE:
            outcome, why, self.refused = PENDING, f"not judged now: {why}", True
            log.warning("%s: %s", action.path, why)
        if outcome in (SENT, FAILED, CANCELLED, REPAIRED):
            end_action(self.conn, action, outcome, why, counts=outcome in (SENT, FAILED))
        elif outcome:
            action.outcome, action.error = outcome, escape_message(why)

    def fail(self, action: Action, exc: HttpError) -> None:
        """Have an action tried again later, if that makes sense, or let it fail."""
        log.error("%s: %s", action.path or action.url, exc)
        if action.status != PENDING:  # its work is done; only asking after it has failed
            self.problems.append(str(exc))
        elif not exc.retry or action.attempts + 1 >= MAX_TRIES:
            self.settle(action, FAILED, str(exc))
        else:
            self.settle(action, RETRY, str(exc))
            when = time.time() + max(exc.after, FIRST_DELAY * 2**action.attempts)
            columns = {"attempts": action.attempts + 1, "last_error": action.error}
            update_action(self.conn, action.id, next_attempt_utc=format_time(when), **columns)

    def look(self, paths: Sequence[str]) -> Dict[str, Tuple[str, str]]:
        """Look at links this very moment; once something hangs, at no more: each costs its time."""
        if self.hung:
            return dict.fromkeys(paths, (UNREACHABLE, self.hung))
        started = time.monotonic()
        verdicts = recheck_broken(self.conn, self.config, paths)
        if time.monotonic() - started >= self.config.scan.stat_timeout:
            self.hung = dict(verdicts.values()).get(UNREACHABLE, "")
        return verdicts

    def is_broken(self, action: Action) -> bool:
        """Look at an action's links this very moment: False if all are gone since it has begun."""
        if not action.paths:  # somebody's own; no link tells of its mount
            last = "SELECT exit_code FROM runs WHERE command = 'scan' ORDER BY run_id DESC LIMIT 1"
            if tuple(self.conn.execute(last).fetchone() or ()) == (EXIT_REFUSED,):
                raise Settled(UNREACHABLE, "the last scan was refused")
            return True
        verdicts, waits = self.look(action.paths), []
        # As it was queued; what an older edition or a script has queued was never to be young.
        patience = min(self.config.repair.patience, action.progress.get("patience", math.inf))
        for path, known in find_links(self.conn, list(verdicts)).items():
            if known.status == UNREACHABLE and verdicts[path][0] == BROKEN:
                verdicts[path] = UNREACHABLE, known.error or "the last scan could not judge it"
            since, loss = parse_time(known.broken_since) or 0.0, self.losses.get(path)
            if verdicts[path][0] == BROKEN:
                waits.append(plan_wait(action.progress.get("min_age", 0.0), patience, since, loss))
        if waits and time.time() < max(waits).until:  # more was lost since it was queued
            raise Settled(PENDING, str(max(waits)))
        states = dict(verdicts.values())  # {status: why}
        if UNREACHABLE in states and BROKEN not in states:
            raise Settled(UNREACHABLE, states[UNREACHABLE])
        if BROKEN not in states and (OK in states or not action.step):
            words = "the link works again" if OK in states else "there is no such link"
            raise Settled(CANCELLED, words)
        return BROKEN in states

    def check_mounts(self, actions: Iterable[Action]) -> None:
        """See that what links that are gone pointed to can be judged: an outage is no moment to
        search for anything.
        """
        links = find_links(self.conn, [path for action in actions for path in action.paths])
        # As they stand: what `..` means behind a symlink, the worker finds out.
        goals = [os.path.join(os.path.dirname(p), from_db(k.target)) for p, k in links.items()]
        for status, why in self.look(goals).values():
            if status == UNREACHABLE:
                raise Settled(UNREACHABLE, why)


class Conversation:
    """What is said to a server, or to the relay, in one run of a dispatch."""

    fatal = -1  # the status after which nothing more is begun there

    def __init__(self, dispatcher: Dispatcher, name: str, probe: Callable[[], Any]) -> None:
        self.dispatcher, self.conn, self.name = dispatcher, dispatcher.conn, name
        self.probe = probe  # raises HttpError where it is away, or not what it should be
        self.settings = dispatcher.config.repair
        self.note = functools.partial(note_progress, dispatcher.conn)
        self.used_up = f"waits: [repair] per_day = {self.settings.per_day} is used up"
        self.stopped: Optional[HttpError] = None

    def blame(self, exc: HttpError) -> None:
        """Raise AwayError where not the request was at fault, but the server or the way to it."""
        try:
            if exc.status in DENIED:
                raise exc
            self.probe()
        except HttpError as away:
            raise AwayError(str(away)) from None

    def attempt(self, work: Callable[..., Any], *actions: Action) -> bool:
        """Tell whether some work was done for actions; what hinders it settles them here alone."""
        try:
            work(*actions)
            return True
        except Settled as settled:
            for action in actions:
                self.dispatcher.settle(action, *settled.args)
        except HttpError as exc:
            self.blame(exc)
            if exc.status == self.fatal:
                self.stopped = self.stopped or exc
            for action in actions if exc.status != self.fatal else ():
                if not action.outcome:
                    self.dispatcher.fail(action, exc)
        return False

    def budget(self, count: int = 0) -> float:
        """Return how many more searches may be sent there today, after `count` more of them."""
        key, now = f"searches: {self.name}", time.time()
        row = self.conn.execute("SELECT value FROM notes WHERE name = ?", (key,)).fetchone()
        sent = [entry for entry in json.loads(row[0] if row else "[]") if entry[0] > now - DAY]
        if count:
            sent.append([now, count])
            update = "INSERT OR REPLACE INTO notes VALUES (?, ?)"
            self.conn.execute(update, (key, json.dumps(sent)))
        return float((self.settings.per_day or math.inf) - sum(number for _, number in sent))


class Relay(Conversation):
    """The conversation with the relay; its token is added here and nowhere else."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__(dispatcher, "relay", self.knock)
        relay = dispatcher.config.relay
        self.address = strip_secrets(relay_find_url(relay)) if relay.base else ""
        base, _, _ = relay_find_url(relay).rpartition("/find")
        self.client = Client("relay", base, self.settings.timeout, {}, relay.token)

    def knock(self) -> None:
        """Raise HttpError where the relay is away."""
        try:
            self.client.send(Call("GET"))  # without token and term it searches nothing
        except HttpError as exc:
            if not exc.status or exc.status >= 500:
                raise

    def run(self, actions: Iterable[Action]) -> None:
        """Send those actions that are due."""
        places = group_by(actions, lambda action: action.url.partition("?")[0])
        ours = places.pop(self.address, [])
        for place in sorted(places):
            advice = "set base in [relay], or cancel its actions"
            self.dispatcher.complain(f"no relay is configured at {place}; {advice}")
        for action in ours:
            if action.progress.get("sending"):  # a run was killed then: the cooldown decides
                end_action(self.conn, action, SENT)
        if ours:
            self.probe()
        due = [action for action in ours if action.is_due and not action.outcome]
        for group in group_by(due, operator.attrgetter("season")).values():
            if not self.dispatcher.has_room(len(group)):
                break
            for action in group:
                self.attempt(self.send, action)

    def send(self, action: Action) -> None:
        """Send one action."""
        self.dispatcher.is_broken(action)
        if self.budget() < 1:
            raise Settled(PENDING, self.used_up)
        self.dispatcher.left -= 1
        if not self.dispatcher.applied:
            raise Settled(WOULD_SEND)
        token = self.dispatcher.config.relay.token
        query = {**parse_qs(action.url.partition("?")[2]), "token": token}
        self.note([action], sending=True)
        try:
            _, answer = self.client.send(Call("GET", "/find", query))
            if isinstance(answer, dict) and answer.get("ok") is False:  # with status 200
                status = int(dig(answer, "code") or 400)
                said = self.client.quote(read_error(json.dumps(answer).encode()) or "no reason")
                retry = status >= 500 or status in RETRY_STATUSES
                raise HttpError(f"relay: {said}", status, retry)
        except HttpError:
            self.note([action], sending=False)
            raise
        with transaction(self.conn):
            self.budget(1)
            end_action(self.conn, action, SENT)


class Repair(Conversation):
    """The conversation with one Sonarr or Radarr."""

    fatal = 409  # a root folder is missing: no moment to delete anything

    def __init__(self, dispatcher: Dispatcher, instance: Instance) -> None:
        repair = dispatcher.config.repair
        self.server = Server(instance, repair.timeout, repair.list_timeout)
        super().__init__(dispatcher, instance.name, self.server.connect)
        self.kind = self.server.kind
        self.item_key = f"{self.kind.item}Id"  # in the server's history
        self.skip_tags = {tag.lower() for tag in instance.settings.skip_tags}
        self.is_sonarr = self.kind.item == "episode"
        self.titles: Dict[str, JsonObject] = {}  # by the folder of a series, the file of a movie
        self.roots: Dict[str, Any] = {}  # root folders: whether the server can reach them
        self.due: Set[str] = set()  # the files that this run is about
        self.reserved = 0  # searches that are still to be sent in this run

    def run(self, actions: Sequence[Action], failed: Sequence[Action]) -> None:
        """Remove the broken records, search for what they held, ask after earlier searches."""
        self.probe()
        for root in self.server.get_list("/rootfolder"):
            self.roots[slashed(str(dig(root, "path"))).rstrip("/") or "/"] = root.get("accessible")
        place = "path" if self.is_sonarr else "movieFile.path"
        for title in self.server.get_list(f"/{self.kind.title}"):
            path = slashed(str(dig(title, place) or "")).rstrip("/")
            self.titles[path] = {"id": title["id"], "tags": title.get("tags")}
        self.titles.pop("", None)
        due = [action for action in actions if action.status == PENDING and action.is_due]
        self.due = {action.server_path for action in due}
        ready: List[Action] = []
        for group in group_by(due, lambda a: a.season if self.is_sonarr else a.url).values():
            if self.stopped or not self.dispatcher.has_room(len(group)):
                break
            ready += self.prepare(group)
        for action in (*actions, *failed):
            if action.status != PENDING and time.monotonic() < self.dispatcher.deadline:
                ready += [action] if self.attempt(self.follow_up, action) else []
        self.note(failed, asked=time.time())
        keys = {action.id: action.progress["title_id"] for action in ready}
        keys.update({a.id: str(a.progress["search"]) for a in ready if a.step == "searching"})
        for group in group_by(ready, lambda action: keys[action.id]).values():
            self.attempt(functools.partial(self.take, REPAIR_STEPS[-1:]), *group)
        if self.dispatcher.wait:
            self.attempt(self.follow, *(action for action in ready if action.commands))
        if self.stopped:
            raise self.stopped

    def prepare(self, group: Sequence[Action]) -> List[Action]:
        """Take actions that belong together to where only their search is missing.  Nothing is
        deleted before all of them are found: only then it is known what they cost.
        """
        found = [action for action in group if self.attempt(self.begin, action)]
        fresh = [action for action in found if action.step == "found"]
        waits = (a.error for a in group if a.outcome == PENDING and a.error.startswith("waits un"))
        why = next(waits, "")  # the season waits for its youngest
        is_whole = all(action.progress.get("whole") for action in fresh)
        cost = 1 if is_whole else sum(len(action.items) for action in fresh)
        left = self.budget() - self.reserved
        if fresh and not why and left < min(cost, self.settings.per_day or cost):
            why = self.used_up
        for action in fresh if why else ():
            self.dispatcher.settle(action, PENDING, why)
        found = [action for action in found if not action.outcome]
        self.reserved += cost if found else 0
        self.dispatcher.left -= len(found)
        if self.dispatcher.applied:
            advance = functools.partial(self.take, REPAIR_STEPS[1:-1])
            return [action for action in found if self.attempt(advance, action)]
        for action in found:
            self.dispatcher.settle(action, WOULD_SEND)
        return []

    def begin(self, action: Action) -> None:
        if action.step:
            self.dispatcher.check_mounts([action])
        self.take(REPAIR_STEPS[:1], action)

    def take(self, steps: Sequence[Step], *actions: Action) -> None:
        """Take those of some steps that come next for actions, and write each down."""
        for step in steps:
            if actions[0].step in step.needs:
                event = "deleted" if step.name == "deleted" else ""
                self.note(actions, event, **{"step": step.name, **self.do(step, *actions)})

    def do(self, step: Step, *actions: Action) -> JsonObject:
        """Do what a step does; return what is to be written down of it."""
        if step.refusal == ENDS:
            return step.does(self, *actions)
        owed = [name for name in actions[0].progress.get("owed", ()) if name != step.name]
        try:
            return {"owed": owed, **step.does(self, *actions)}
        except HttpError as exc:
            if actions[0].step == "found":
                raise
            self.blame(exc)
            self.report(actions[0], exc)
            return {"owed": [*owed, step.name]}

    def report(self, action: Action, exc: HttpError) -> None:
        log.warning("%s: %s; tried again later", action.path, exc)
        self.dispatcher.problems.append(f"{exc}; tried again later")

    def look(self, path: str) -> str:
        """Return the state of one link, file or directory at this very moment, hang-safe."""
        return self.dispatcher.look([path]).get(path, (MISSING, ""))[0]

    def places(self, server_path: Any) -> List[str]:
        """Return where a path of the server may be here."""
        return map_back(str(server_path), self.server.path_map)

    def follow_up(self, action: Action) -> None:
        """Ask what has come of a search; Settled, unless it is to be sent again."""
        for step in REPAIR_STEPS if self.dispatcher.applied else ():
            if step.name in action.progress.get("owed", ()):
                self.note([action], **self.do(step, action))
        if action.status not in (SENT, FAILED):
            raise Settled("")
        server, searches = self.server, action.progress.get("searches", 1)
        _, items = server.get_title(action.progress.get("title_id", 0))
        files = {server.file_of(item) for item in items if item["id"] in action.items}
        states = set()
        for record in filter(None, (server.find(f"{self.kind.file}/{n}") for n in files - {0})):
            found = set(map(self.look, self.places(dig(record, "path"))))
            states.add(OK if OK in found else UNREACHABLE if UNREACHABLE in found else MISSING)
        if 0 not in files and states == {OK}:
            raise Settled(REPAIRED)
        if action.status != SENT or UNREACHABLE in states:
            raise Settled("")
        if not files or states - {OK}:
            gone = f"{self.name} does not have it any more"
            raise Settled(FAILED, "its new file is broken as well" if files else gone)
        is_begun = action.step == "searching"  # by a run that was killed
        if not is_begun and time.time() - action.fired < self.settings.cooldown:
            raise Settled("")  # it may come yet
        self.dispatcher.check_mounts([action])
        if not is_begun and searches >= self.settings.max_attempts:
            count = f"{searches} search{'es' if searches > 1 else ''}"
            raise Settled(FAILED, f"{count}, and nothing came of it; {self.explain(action)}")
        if not self.dispatcher.applied:
            raise Settled(WOULD_SEND)
        if not is_begun:
            self.note([action], step="cleared")

    def searches_itself(self) -> bool:
        """Tell whether the server searches anew for what is marked as failed."""
        try:
            config = self.server.client.ask("GET", "/api/v3/config/downloadclient")
            return not isinstance(config, dict) or config.get("autoRedownloadFailed") is not False
        except HttpError as exc:
            self.blame(exc)
            return True

    def explain(self, action: Action) -> str:
        """Return what the server did after its searches, as far as it tells."""
        noted, said = action.progress, ""
        try:
            history = self.server.get_history(noted.get("title_id", 0), noted.get("season_number"))
            mine = [r for r in history if r.get(self.item_key) in action.items]
            last = noted.get("last_history", math.inf)
            said = describe_history([record for record in mine if record["id"] > last])
            command = self.server.find(f"/command/{noted.get('command', 0)}") or {}
            if command.get("status") in FINAL_STATES[1:]:
                said += f"; its last search {command['status']}: {dig(command, 'message') or ''}"
        except HttpError as exc:
            said = said or f"what {self.name} did cannot be told ({exc})"
        return self.server.client.quote(said)

    def follow(self, *actions: Action) -> None:
        """Follow commands to their end, for a while; that they end well repairs nothing yet."""
        deadline = min(time.monotonic() + POLL_LIMIT, self.dispatcher.deadline)
        for action in actions:
            sent, delay = action.commands[0], 0.5  # others may have the same
            while sent["status"] not in FINAL_STATES and time.monotonic() < deadline:
                time.sleep(delay)
                delay = min(5.0, delay * 1.5)
                command = self.server.find(f"/command/{sent['id']}") or {"status": "completed"}
                sent.update(status=str(dig(command, "status")), message=dig(command, "message"))
            if sent["status"] in FINAL_STATES[1:]:
                said = self.server.client.quote(sent["message"])
                action.error = f"{self.name}: search {sent['status']}: {said}"


# The steps of a repair.  Each returns what is to be written down beside its name.


def find_records(repair: Repair, action: Action) -> JsonObject:
    """Find the file records by their exact path, look at the link again, note what there is."""
    server, path = repair.server, slashed(action.server_path)
    for root, accessible in repair.roots.items():
        if accessible is False and is_under(path, root):
            raise HttpError(f"{server.name}: its root folder {root} is not there", repair.fatal)
    names = [find_ancestor(path, repair.titles)]
    if not names[0] and path:  # a folder of files, if they are of one title
        names = [name for name in repair.titles if is_under(name, path)]
    title = repair.titles.get(names[0] or "") if len(names) == 1 else None
    query = {f"{repair.kind.title}Id": title["id"]} if title else {}
    records = list(server.get_list(repair.kind.file, **query)) if title else []
    mine = [record for record in records if is_under(slashed(str(dig(record, "path"))), path)]
    check_gone(repair, action, bool(mine))
    numbers = [record["id"] for record in mine]
    if action.step and set(numbers) <= set(action.progress.get("files", ())):
        return {} if mine else {"step": "deleted"}  # the flags noted first are the true ones
    items: List[JsonObject] = []
    for number in numbers if repair.is_sonarr else ():
        items += server.get_list("/episode", episodeFileId=number)
    if mine and title and not repair.is_sonarr:
        _, items = server.get_title(title["id"])
    if not items or not title:
        text = f"knows no file {action.server_path}; correct path_map, or remove the link"
        raise HttpError(f"{server.name}: {text}", 404)
    tags = repair.skip_tags and repair.skip_tags.intersection(server.labels(title).split(","))
    if tags or not (repair.settings.unmonitored or any(item.get("monitored") for item in items)):
        why = f"it carries the tag {', '.join(sorted(tags))}" if tags else "it is unmonitored"
        end_action(repair.conn, action, CANCELLED, why)  # until the cooldown is over
        raise Settled("")
    seasons = {record.get("seasonNumber") for record in mine}
    season = seasons.pop() if len(seasons) == 1 else None
    files = [str(r.get("path")) for r in records if season and r.get("seasonNumber") == season]
    noted = {
        "files": numbers, "title_id": title["id"], "season_number": season,
        "items": {str(item["id"]): bool(item.get("monitored")) for item in items},
        "whole": bool(files) and are_broken(repair, files),
        "grab": None, "last_history": 0,
    }  # fmt: skip
    with contextlib.suppress(HttpError):  # then it is not known which release is dead
        history = server.get_history(title["id"], season)
        wanted = {item["id"] for item in items}
        mine = [record for record in history if record.get(repair.item_key) in wanted]
        last = history[-1]["id"] if history else 0
        noted.update(grab=find_grab(history, mine), last_history=last)
    return noted


def check_gone(repair: Repair, action: Action, is_known: bool) -> None:
    """See that the server's file is the broken link itself, or what that points to, and is gone:
    the text of a link may name a healthy file and lead elsewhere (`..` behind a symlink, a slash).
    """
    folder, goal = os.path.dirname(action.path), ""
    is_ours = repair.dispatcher.is_broken(action) or not is_known or "removed" in action.progress
    if not is_ours and repair.look(folder) != OK:
        # The library is away for us; the server may see it, and a healthy link in it.
        raise Settled(UNREACHABLE, f"{folder} is not there")
    places = repair.places(action.server_path)
    states = {repair.look(place): place for place in places}
    with contextlib.suppress(OSError):
        goal = os.path.normpath(os.path.join(folder, os.readlink(action.path)))
    is_other = not action.step and {action.path, goal}.isdisjoint(places)
    # Where the link itself is the file, several links may wait for it.
    doubts = (
        (is_other, 404, f"{action.server_path} is, by its path_map, neither link nor target"),
        (UNREACHABLE in states, 503, f"{states.get(UNREACHABLE)} cannot be judged now"),
        (OK in states and action.path in places, 503, f"{states.get(OK)} is not broken now"),
        (OK in states, 404, f"its file {states.get(OK)} is not gone; the link's text is at fault"),
    )
    for is_so, status, text in doubts:
        if is_so:
            cure = "; correct that, and queue it anew" if status == 404 else ""
            raise HttpError(f"{repair.name}: {text}{cure}", status, retry=status == 503)
    for place in places:
        if place != action.path and not is_at_home(repair, action, place):
            raise Settled(UNREACHABLE, f"the root folder of {place} is not there")


def is_at_home(repair: Repair, action: Action, place: str) -> bool:
    """Tell whether the library around a file is there for us: or else it may be there, too."""
    if repair.look(os.path.dirname(place)) == OK:
        return True
    root = find_ancestor(slashed(action.server_path), repair.roots)
    mine = [here for here in repair.places(root) if is_under(place, here)] if root else []
    with contextlib.suppress(OSError):
        return any(repair.look(here) == OK and os.listdir(here) for here in mine)
    return False


def are_broken(repair: Repair, paths: Iterable[str]) -> bool:
    """Tell, before anything of a season is deleted, whether all its files are broken links."""
    places = {path: repair.places(path) for path in paths if path not in repair.due}
    links = find_links(repair.conn, [place for some in places.values() for place in some])
    broken = {path for path, link in links.items() if link.status == BROKEN}
    return not any(broken.isdisjoint(some) for some in places.values())


def delete_records(repair: Repair, action: Action) -> JsonObject:
    """Delete the records, and on the server's disk the link.  It may be done although no answer
    says so; and a dangling link cannot be moved to a recycle bin: then the answer is 500.
    """
    repair.dispatcher.is_broken(action)  # its season was read meanwhile, and it may be back
    for number in action.progress["files"]:
        path = f"{repair.kind.file}/{number}"
        try:
            repair.server.change("DELETE", path)
        except HttpError as exc:
            if exc.status == 500 and remove_link(repair, action):
                repair.server.change("DELETE", path)
            elif not (exc.retry or exc.status == 404) or repair.server.find(path) is not None:
                raise
    return {}


def restore_flags(repair: Repair, action: Action) -> JsonObject:
    """Put the monitored flags back that the deletion changed."""
    kind, flags = repair.kind, action.progress["items"]
    _, items = repair.server.get_title(action.progress["title_id"])
    items = [item for item in items if item["id"] in action.items]
    if any(repair.server.file_of(item) in action.progress.get("files", ()) for item in items):
        repair.note([action], step="found")  # it said 'deleted' and did not
        raise HttpError(f"{repair.name}: has the file record still", 503, retry=True)
    for flag in (True, False):
        turned = [item["id"] for item in items if bool(item.get("monitored")) is not flag]
        changed = [number for number in turned if flags.get(str(number)) is flag]
        if changed:
            body = {f"{kind.item}Ids": changed, "monitored": flag}
            repair.server.change("PUT", kind.monitor, body)
    return {}


def remove_link(repair: Repair, action: Action) -> JsonObject:
    """Remove the server's link from the disk, if it is broken this very moment, or else an import
    would find its place taken; the journal has it first.
    """
    noted: JsonObject = {}
    for here in repair.places(action.server_path):
        try:
            text = read_link(here)
            state = repair.look(here) if text else MISSING
            if state == UNREACHABLE:
                repair.dispatcher.check_mounts([action])  # it may be more than this link
                raise HttpError(f"{repair.name}: {here} cannot be judged now", 503, retry=True)
            if state != BROKEN:
                continue
            row = (to_db(here), to_db(text), utc_now())
            number = repair.conn.execute(_JOURNAL_REMOVAL, row).lastrowid
            # The server may have put a new link there since: what goes is what was seen.
            if repair.look(here) == BROKEN and read_link(here) == text:
                os.unlink(here)
                noted = {"removed": here}
                repair.note([action], "removed", **noted)
            else:
                repair.conn.execute("DELETE FROM link_changes WHERE change_id = ?", (number,))
        except OSError as exc:
            text = f"cannot delete its file, and Refresherr cannot remove {here}: {exc.strerror}"
            raise HttpError(f"{repair.name}: {text}; make its directory writable", 500) from exc
    return noted


def search(repair: Repair, *actions: Action) -> JsonObject:
    """Search for what the files of one series, or one movie, held."""
    repair.dispatcher.check_mounts(actions)  # one may have gone meanwhile
    server, kind, number = repair.server, repair.kind, actions[0].progress["title_id"]
    title, items = {}, []  # type: JsonObject, List[JsonObject]
    missing = {item for action in actions for item in action.items}
    try:
        title, items = server.get_title(number)
        missing = {item["id"] for item in items if not server.file_of(item)}
    except HttpError as exc:  # nothing but the search decides now
        repair.blame(exc)
    for action in actions:
        action.progress["missing"] = sorted(missing & action.items)
        if not action.progress["missing"]:  # it has come back already
            repair.dispatcher.settle(action, SENT)
    rest = [action for action in actions if action.progress["missing"]]
    if rest and rest[0].step == "searching":
        send_search(repair, rest[0].progress["search"], rest)
        return {}
    others: List[Action] = []
    seasons = group_by(rest, lambda a: a.progress.get("whole") and a.progress["season_number"])
    for season, group in seasons.items():
        # A season search refuses where any episode has a file, or is unmonitored.
        episodes = [episode for episode in items if episode.get("seasonNumber") == season]
        is_empty = len(_missing(group)) > 1 and not any(map(server.file_of, episodes))
        if season and is_empty and all(each.get("monitored") for each in [title, *episodes]):
            body = {"name": "SeasonSearch", "seriesId": number, "seasonNumber": season}
            send_search(repair, body, group)
        else:
            others += group
    # A server that searches by itself does so for each dead release alone.
    is_apart = repair.settings.blocklist and repair.searches_itself()
    for part in group_by(others, lambda a: is_apart and _download_of(a)).values():
        send_search(repair, {"name": kind.search, f"{kind.item}Ids": _missing(part)}, part)
    return {}


def send_search(repair: Repair, body: JsonObject, actions: Sequence[Action]) -> None:
    """Send a search, once: what a killed run sent, or the server by itself, is looked for first."""
    server, noted = repair.server, actions[0].progress
    is_resumed = actions[0].step == "searching"
    if not is_resumed:
        cost = len(body.get(f"{repair.kind.item}Ids", "1"))
        is_repeat = all(action.status == SENT for action in actions)
        if is_repeat and repair.budget() < min(cost, repair.settings.per_day):
            return  # another day; what is new has found its place in `prepare`
        last = max([0, *(command["id"] for command in server.get_list("/command"))])
        with transaction(repair.conn):  # or a killed run would split the group
            repair.budget(cost)
            for action in actions:
                searches = action.progress.get("searches", 0) + 1
                begun = {"search": body, "last_command": last, "begun": time.time()}
                repair.note([action], step="searching", searches=searches, **begun)
    is_own = repair.settings.blocklist and _mark_failed(repair, actions, is_resumed)
    deadline = time.monotonic() + OWN_SEARCH
    command = _find_search(repair, actions, is_resumed) if is_resumed else None
    while is_own and not command and time.monotonic() < deadline:
        time.sleep(0.5)
        command = _find_search(repair, actions, is_resumed)
    if not (command or noted["last_command"]) and time.time() - noted.get("begun", 0) > FORGOTTEN:
        command = {"name": body["name"]}  # who can tell?  The cooldown decides
    command = command or server.change("POST", "/command", body)
    sent = {"id": dig(command, "id"), "name": dig(command, "name"), "status": "queued"}
    with transaction(repair.conn):
        repair.note(actions, step="sent", command=sent["id"])
        for action in actions:
            action.commands = [sent]
            end_action(repair.conn, action, SENT)


def _find_search(
    repair: Repair, actions: Sequence[Action], is_resumed: bool
) -> Optional[JsonObject]:
    """Return the command that searches for what is missing since.  The list forgets commands soon,
    but for a day they can be asked for by their numbers, and what a killed run has sent came next.
    """
    last = actions[0].progress["last_command"]
    found = {command["id"]: command for command in repair.server.get_list("/command")}
    for number in range(last + 1, last + 6) if last and is_resumed else ():
        found[number] = found.get(number) or repair.server.find(f"/command/{number}") or {}
    newer = (command for number, command in found.items() if number > last)
    return next((command for command in newer if is_search_for(command, actions)), None)


def _mark_failed(repair: Repair, actions: Sequence[Action], is_resumed: bool) -> bool:
    """Have dead releases taken for failed ones, once; tell whether the server may search itself."""
    server, is_own, is_marked = repair.server, repair.searches_itself(), False
    grabs = {_download_of(a): a.progress["grab"] for a in actions if _download_of(a)}
    try:
        history = server.get_history(actions[0].progress["title_id"]) if grabs else []
        for download, grab in grabs.items():
            mine = [record for record in history if record.get("downloadId") == download]
            ids = {r.get(repair.item_key) for r in mine if r.get("eventType") == "grabbed"}
            if any(r.get("eventType") == "downloadFailed" and r["id"] > grab["id"] for r in mine):
                is_marked = is_marked or is_resumed
            elif is_own and (len(grabs) > 1 or not ids.issubset(_missing(actions))):
                title = server.client.quote(grab["title"])
                text = "the server would search by itself, and not for exactly what is missing"
                advice = "switch off its 'Redownload Failed'"
                log.warning("%s: %s is not blocklisted: %s; %s", repair.name, title, text, advice)
            else:
                is_marked = True
                path = f"/api/v3/history/failed/{grab['id']}"
                server.client.send(Call("POST", path, {"skipRedownload": "true"}))
    except HttpError as exc:  # it may have been heard, and nothing but the search decides now
        repair.blame(exc)
        repair.report(actions[0], exc)
    return is_marked and is_own


ENDS, OWED = "ends the action, or has it tried again", "is reported and owed; the search goes out"


class Step(NamedTuple):
    """A step of a direct repair."""

    name: str
    needs: Tuple[str, ...]  # the steps that it may follow
    does: Callable[..., JsonObject]
    refusal: str  # what it means if the server refuses it


REPAIR_STEPS = (
    Step("found", ("", "found"), find_records, ENDS),  # the records, their episodes or movie
    Step("deleted", ("found",), delete_records, ENDS),  # the records are gone from the server
    Step("restored", ("deleted",), restore_flags, OWED),  # the monitored flags are as they were
    Step("cleared", ("restored",), remove_link, OWED),  # nothing of the old file is in the way
    # For all actions of a series or movie together; meanwhile they are 'searching'.
    Step("sent", ("cleared", "searching"), search, ENDS),
)


def is_search_for(command: JsonObject, actions: Iterable[Action]) -> bool:
    """Tell whether a command searches for all that is missing of one series or movie."""
    body, noted = command.get("body"), [action.progress for action in actions]
    if not isinstance(body, dict):
        return False
    if command.get("name") == "SeasonSearch":
        season = body.get("seriesId"), body.get("seasonNumber")
        return {season} == {(one["title_id"], one["season_number"]) for one in noted}
    ids = body.get("episodeIds") or body.get("movieIds") or ()
    is_search = command.get("name") in ("EpisodeSearch", "MoviesSearch")
    return is_search and set(_missing(actions)) <= set(ids)


def find_grab(history: Iterable[JsonObject], mine: Iterable[JsonObject]) -> Optional[JsonObject]:
    """Return which grab of a history, oldest first, brought the last import that is `mine`."""
    imports = [r.get("downloadId") for r in mine if r.get("eventType") == "downloadFolderImported"]
    for record in history if imports and imports[-1] else ():
        if record.get("eventType") == "grabbed" and record.get("downloadId") == imports[-1]:
            title = str(record.get("sourceTitle"))
            return {"id": record["id"], "title": title, "download": imports[-1]}
    return None


def describe_history(events: Sequence[JsonObject]) -> str:
    """Return in words what a server grabbed."""
    grabs = Counter(str(r.get("sourceTitle")) for r in events if r.get("eventType") == "grabbed")
    titles = (f"{title} {plural(count, 'time')}" for title, count in grabs.most_common(3))
    failed = sum(record.get("eventType") == "downloadFailed" for record in events)
    said = f"{', '.join(titles)}; {plural(failed, 'download')} failed" if grabs else "nothing"
    return f"the server grabbed {said}"


def _missing(actions: Iterable[Action]) -> List[int]:
    return sorted({number for action in actions for number in action.progress["missing"]})


def _download_of(action: Action) -> str:
    return str((action.progress.get("grab") or {}).get("download", ""))


# ---------------------------------------------------------------------------------------------
# Notify
# ---------------------------------------------------------------------------------------------
# The address of a notifier is its secret: messages show the host and no more of it.

LONGEST_WAIT = 10.0  # seconds; who asks for more is left alone until the next run
LEVELS = {  # of a note: its priority and tag at ntfy
    "info": ("3", "information_source"), "success": ("3", "white_check_mark"),
    "warning": ("4", "warning"), "failure": ("5", "rotating_light"),
}  # fmt: skip
NOTIFIERS = ("discord", "ntfy", "apprise", "webhook")
HEARTBEATS = ("healthchecks", "uptime_kuma")
Sleep = Callable[[float], None]


class Note(NamedTuple):
    """What is told of a run: a title of ASCII, escaped lines, a level, JSON; no secret."""

    title: str
    text: str
    level: str
    result: JsonObject


def note_calls(note: Note, ntfy_token: str) -> Dict[str, Call]:
    """Return what tells each notifier of a run."""
    title, text, level, result = note
    # In a code block nothing is markdown or a link.  Of 2,000 characters an emoji may be two.
    block = cut(text.replace("`", "'"), 2 * (1980 - len(title)), "utf-16-le")
    message = {"content": f"**{title}**\n```\n{block}\n```", "allowed_mentions": {"parse": []}}
    headers = {"Title": title, "Priority": LEVELS[level][0], "Tags": LEVELS[level][1]}
    if ntfy_token:
        headers["Authorization"] = f"Bearer {ntfy_token}"
    return {
        "discord": Call("POST", body=message),
        "ntfy": Call("POST", body=cut(text, 4096).encode(), headers=headers),
        "apprise": Call("POST", body={"title": title, "body": text, "type": level}),
        "webhook": Call("POST", body={"title": title, "text": text, "level": level, **result}),
    }


def start_calls(run_id: str) -> Dict[str, Call]:
    """Return what tells healthchecks that a run begins; `run_id` is a UUID."""
    return {"healthchecks": Call("POST", "/start", {"rid": run_id})}


def end_calls(run_id: str, exit_code: int, text: str, seconds: float) -> Dict[str, Call]:
    """Return what tells healthchecks and Uptime Kuma how a run ended."""
    path, body = f"/{exit_code}" if exit_code else "", cut(text, 10000).encode()
    state, line = "down" if exit_code else "up", cut(" ".join(text.split()), 250)
    push = {"status": state, "msg": line, "ping": round(1000 * seconds)}
    beat = Call("POST", path, {"rid": run_id}, body)
    return {"healthchecks": beat, "uptime_kuma": Call("GET", "", push)}


def trial_calls(ntfy_token: str) -> Dict[str, Call]:
    """Return a test message for every notifier and heartbeat."""
    note = Note("Refresherr: a test", "doctor --notify has sent this.", "info", {})
    beat = Call("POST", "/log", body=note.text.encode())
    push = Call("GET", "", {"status": "up", "msg": note.text})
    return {**note_calls(note, ntfy_token), "healthchecks": beat, "uptime_kuma": push}


def tell(
    settings: NotifySettings, calls: Mapping[str, Call], timeout: float, sleep: Sleep = time.sleep
) -> List[JsonObject]:
    """Send what is for those that are configured: [{"name", "error": None or one line}]."""
    told = []
    for name, call in calls.items():
        url = getattr(settings, name)
        if name == "uptime_kuma":
            url = url.partition("?")[0]  # it is copied with an example of the query behind it
        if url:
            client = Client(name, url, timeout, {}, settings.ntfy_token, hidden=True)
            told.append({"name": name, "error": _send_twice(client, call, sleep)})
    return told


def note_told(conn: sqlite3.Connection, lines: Iterable[JsonObject]) -> None:
    """Remember who took a message, and warn, once each, of those that did not."""
    told = {line["name"]: line["error"] for line in sorted(lines, key=lambda x: x["error"] or "")}
    for name, error in told.items():
        last, _ = load_note(conn, f"told {name}") or (None, None)
        save_note(conn, f"told {name}", (last if error else utc_now(), error))
        if error:
            log.warning("%s (`doctor --notify` tries it again)", error)


def cut(text: str, limit: int, encoding: str = "utf-8") -> str:
    """Return as much of `text` as fits into `limit` bytes; '...' shows that there was more."""
    data = text.encode(encoding, "backslashreplace")
    if len(data) > limit:
        data = data[: limit - len("...".encode(encoding))]
        return data.decode(encoding, "ignore") + "..."
    return data.decode(encoding)


def _send_twice(client: Client, call: Call, sleep: Sleep) -> Optional[str]:
    """Send a call, and again where a server that is up asks for it; return what went wrong."""
    for is_last in (False, True):
        try:
            status, answer = client.send(call)
            break
        except HttpError as exc:
            if is_last or (exc.status != 429 and exc.status < 500) or exc.after > LONGEST_WAIT:
                return escape_message(str(exc))
            sleep(exc.after or 1.0)
    words = ""
    if (client.name, status) == ("apprise", 204):
        words = "it has no configuration of this name"
    elif isinstance(answer, dict) and answer.get("ok") is False:
        words = client.quote(read_error(json.dumps(answer).encode())) or "no reason given"
    elif isinstance(answer, str) and answer.startswith("OK ("):  # healthchecks: '(not found)'
        words = client.quote(answer)
    return escape_message(f"{client.name}: answered {status}: {words}") if words else None


# ---------------------------------------------------------------------------------------------
# Media servers
# ---------------------------------------------------------------------------------------------
MEDIA_LIMIT = 60.0  # seconds for one server
UPDATES = 100  # directories in one request to Jellyfin or Emby
MediaSettings = Union[PlexSettings, JellyfinSettings]
Plan = List[Tuple[Call, List[str]]]  # requests, and the paths that each tells of


def media_client(name: str, settings: MediaSettings, timeout: float) -> Client:
    """Return a client that shows 'plex', 'jellyfin' or 'emby' our key."""
    key = settings.token if isinstance(settings, PlexSettings) else settings.api_key
    headers = {"X-Plex-Token" if name == "plex" else "X-Emby-Token": key}
    if name == "jellyfin" and "@" not in urlsplit(settings.url).netloc:  # else that one is taken
        headers = {"Authorization": f'MediaBrowser Token="{key}"'}
    return Client(name, settings.url, timeout, headers, key)


def refresh_media(
    name: str, settings: MediaSettings, directories: Sequence[str], timeout: float
) -> JsonObject:
    """Tell 'plex', 'jellyfin' or 'emby' which directories or links changed.

    Returns {"server", "directories": those told, "left": for the next time, "error"}.
    """
    client = media_client(name, settings, timeout)
    wanted = {directory: map_path(directory, settings.path_map) for directory in directories}
    paths = list(dict.fromkeys(wanted.values()))
    told, lost, errors = set(), set(), []  # type: Set[str], Set[str], List[str]
    end = time.monotonic() + MEDIA_LIMIT - timeout  # the last request has its time, too
    try:
        libraries = client.ask("GET", "/library/sections") if name == "plex" else None
        plan = plan_plex(libraries, paths) if name == "plex" else plan_jellyfin(paths)
        lost.update(set(paths).difference(*(group for _, group in plan)))
        for call, group in plan:
            _, answer = client.send(call)
            if answer and call.body:
                raise HttpError(f"{name}: {client.url} answers with a page; is its url right?")
            told.update(group)
            if time.monotonic() > end:
                break
    except HttpError as exc:
        errors.append(str(exc))
    left = [directory for directory, path in wanted.items() if path not in told | lost]
    if left and not errors:
        errors.append(f"{name}: it is slow; {len(left):,} of {len(wanted):,} directories wait")
    if lost:
        more = f" and {len(lost) - 1:,} more" if len(lost) > 1 else ""
        errors.append(f"plex: no library holds {min(lost)}{more}; correct path_map in [plex]")
    reached = [directory for directory, path in wanted.items() if path in told]
    error = escape_message("; ".join(errors)) or None
    return {"server": name, "directories": reached, "left": left, "error": error}


def plan_plex(answer: Any, paths: Iterable[str]) -> Plan:
    """Return a call for each path that a library of Plex holds; the deepest one has it."""
    keys: Dict[str, str] = {}
    try:
        for library in answer["MediaContainer"].get("Directory", ()):
            for place in library.get("Location", ()):
                keys[place["path"].rstrip("/") or "/"] = quote(library["key"], safe="")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise HttpError("plex: the JSON of /library/sections is not what it should be") from None
    homes = ((path, keys.get(find_ancestor(path, keys) or "")) for path in paths)
    call = "/library/sections/{}/refresh"
    return [(Call("GET", call.format(k), {"path": path}), [path]) for path, k in homes if k]


def plan_jellyfin(paths: Sequence[str]) -> Plan:
    """Return calls that tell Jellyfin or Emby of paths; JSON holds none that are not UTF-8."""
    calls = []
    for start in range(0, len(paths), UPDATES):
        chunk = list(paths[start : start + UPDATES])
        names = (os.fsencode(path).decode("utf-8", "replace") for path in chunk)
        body = {"Updates": [{"Path": name, "UpdateType": "Modified"} for name in names]}
        calls.append((Call("POST", "/Library/Media/Updated", body=body), chunk))
    return calls


# ---------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------
ATTENTION = "attention"  # with UNREADABLE, of `broken --status`, no state of a link
REPAIR_STATES = ("sent", "repaired", "waiting", "needs_attention")
_LAST_RUNS = """SELECT command, finished_utc AS finished, exit_code, (
        SELECT max(finished_utc) FROM runs AS good
        WHERE good.command = runs.command AND good.exit_code IN (0, 3, 10)) AS succeeded
    FROM runs WHERE run_id IN (SELECT max(run_id) FROM runs
        WHERE finished_utc NOT NULL AND exit_code NOT NULL GROUP BY command)
    ORDER BY command"""


def collect_stats(conn: sqlite3.Connection, config: Config, top: int = 10) -> JsonObject:
    """Return what `stats --json` shows."""
    links = count_statuses(conn, "symlinks", config.scan.roots)
    worst = Counter(os.path.dirname(path) for path, _, _ in find_broken(conn, config.scan.roots))
    ranking = sorted(worst.items(), key=lambda item: (-item[1], item[0]))
    path = database_path(conn)
    files = [name for name in (path, f"{path}-wal") if os.path.exists(name)]
    return {
        "symlinks": {**{s: links[s] for s in STATUSES}, "total": sum(links.values())},
        "top_broken": [{"directory": name, "count": count} for name, count in ranking[:top]],
        "actions": dict(count_statuses(conn, "actions")),
        "media": {table: conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("movies", "movie_files", "series", "episode_files")},
        "repairs": count_repairs(conn, config),
        "last_scan": _last_run(conn, "scan", "totals", "changes", "guard"),
        "last_cinesync": _last_run(conn, "cinesync", "replaced", "skipped", "errors"),
        "runs": {row["command"]: dict(row) for row in conn.execute(_LAST_RUNS)},
        "database": {
            "path": path, "size_bytes": sum(map(os.path.getsize, files)),
            "schema_version": schema_version(conn),
            "journal_mode": conn.execute("PRAGMA journal_mode").fetchone()[0],
        },
    }  # fmt: skip


def count_statuses(conn: sqlite3.Connection, table: str, roots: Sequence[str] = ()) -> Counter[str]:
    """Return how many rows of a table, all or those beneath some roots, have each status."""
    within, values = beneath_any(roots)
    name = "coalesce(nullif(status, ''), 'unknown')"
    select = f"SELECT {name}, count(*) FROM {table} WHERE {within} GROUP BY 1"
    return Counter(dict(conn.execute(select, values).fetchall()))


def _last_run(conn: sqlite3.Connection, command: str, *parts: str) -> JsonObject:
    query = "SELECT * FROM runs WHERE command = ? ORDER BY run_id DESC LIMIT 1"
    row = conn.execute(query, (command,)).fetchone()
    if row is None:
        return {}
    summary = json.loads(row["summary"] or "{}")
    return {
        "started": row["started_utc"], "finished": row["finished_utc"],
        "exit_code": row["exit_code"], "status": EXIT_WORDS.get(row["exit_code"], "unfinished"),
        "duration_seconds": summary.get("duration_seconds"),
        **{part: summary.get(part, {}) for part in parts},
    }  # fmt: skip


def count_repairs(conn: sqlite3.Connection, config: Config) -> JsonObject:
    """Return how the repairs stand, in all and per server."""
    servers: Dict[str, Dict[str, int]] = defaultdict(lambda: dict.fromkeys(REPAIR_STATES, 0))
    for status, url in conn.execute("SELECT status, url FROM actions"):
        count = servers[_server_of(url or "")]
        count["sent"] += status in (SENT, REPAIRED)
        count["repaired"] += status == REPAIRED
        count["waiting"] += status in (PENDING, SENT)
    for attempts, link in load_repaired(conn, config.scan.roots).values():
        if needs_attention(config.repair, link, attempts):
            servers[_server_of(attempts[-1].url)]["needs_attention"] += 1
    total = {name: sum(count[name] for count in servers.values()) for name in REPAIR_STATES}
    return {**total, "instances": dict(servers)}


def _server_of(url: str) -> str:
    if url.startswith("arr:"):
        return urlsplit(url).netloc
    return parse_qs(url.partition("?")[2]).get("type", ["?"])[0]


def load_repaired(
    conn: sqlite3.Connection, roots: Sequence[str]
) -> Dict[str, Tuple[List[Attempt], KnownLink]]:
    """Return what was tried for links beneath the roots, all without any, and how they are now."""
    history = load_history(conn)
    known = find_links(conn, [p for p in history if not roots or find_ancestor(p, roots)])
    select = """SELECT path, max(changed_utc) FROM link_changes JOIN runs USING (run_id)
        WHERE command = 'prune' AND state = 'removed' GROUP BY path"""
    pruned = {from_db(path): parse_time(when) or 0.0 for path, when in conn.execute(select)}
    return {
        path: (history[path], link)
        for path, link in known.items()
        if link.status != MISSING or pruned.get(path, 0.0) <= history[path][-1].fired
    }


def needs_attention(settings: RepairSettings, link: KnownLink, attempts: Sequence[Attempt]) -> bool:
    """Tell whether the repairs of a link have come to an end without success."""
    if link.status == MISSING:  # with its file record, by a repair
        return attempts[-1].status == FAILED
    since = parse_time(link.broken_since) or 0.0
    return link.status == BROKEN and why_not(settings, since, attempts, math.inf) == "exhausted"


def list_links(
    conn: sqlite3.Connection, config: Config, status: str, limit: Optional[int]
) -> Tuple[List[JsonObject], int]:
    """Return what `broken --json` shows: the links of a status, and how many there are.

    'attention' adds to the broken ones those that a repair has removed and not brought back.
    """
    within, values = beneath_any(config.scan.roots)
    condition, wanted = "status <> 'ok' AND status = ?", BROKEN if status == ATTENTION else status
    if status == UNREADABLE:
        condition, wanted = "status = ? AND read_error <> ''", OK
    query = f"SELECT path, read_error FROM symlinks WHERE {condition} AND {within} ORDER BY path"
    errors = {from_db(path): error for path, error in conn.execute(query, (wanted, *values))}
    paths = list(errors)
    if status == ATTENTION:
        paths += sorted(
            path
            for path, (attempts, link) in load_repaired(conn, config.scan.roots).items()
            if link.status == MISSING
            and (attempts[-1].is_open or needs_attention(config.repair, link, attempts))
        )
    links = describe_links(conn, config, paths[:limit])
    spent = {path for path, _, _ in find_unplayable(conn, config)}
    for link in links if status == UNREADABLE else ():
        link.update(status=UNREADABLE, error=errors[link["path"]])
        link.update({} if link["path"] in spent else {"next": "verify reads it again"})
    return links, len(paths)


def describe_unreachable(conn: sqlite3.Connection, roots: Sequence[str]) -> Dict[str, str]:
    """Return {reason: a line: how many links, where, and what to do}, the most frequent first."""
    within, values = beneath_any(roots)
    select = f"""SELECT path, last_target, error FROM symlinks
        WHERE status <> 'ok' AND status = 'unreachable' AND {within}"""
    goals: Dict[str, List[str]] = defaultdict(list)
    for path, target, error in conn.execute(select, values):
        goal = os.path.join(os.path.dirname(from_db(path)), from_db(target))
        goals[(error or "").replace(NEVER_JUDGED, "", 1)].append(os.path.normpath(goal))
    lines = {}
    for reason, places in sorted(goals.items(), key=lambda entry: -len(entry[1])):
        where = f"{os.path.commonpath(places)}: {reason or 'for no known reason'}"
        is_cured = "scan --accept" in reason or GUARD_WORDS in reason
        cure = "" if is_cured else f"; {how_to_mend(reason)}"
        lines[reason] = f"{plural(len(places), 'link')} cannot be judged: {where}{cure}"
    return lines


def describe_links(
    conn: sqlite3.Connection, config: Config, paths: Sequence[str]
) -> List[JsonObject]:
    """Return links as `broken --json` shows them."""
    known, history, losses = find_links(conn, paths), load_history(conn), load_losses(conn)
    unread = " or ".join(find_unread(conn, config.instances))
    reasons = _last_run(conn, "cinesync", "reasons").get("reasons") or {}
    links = []
    for path in paths:
        link, attempts = known[path], history.get(path, ())
        target, is_broken = from_db(link.target), link.status == BROKEN
        owner = find_owner(conn, config.instances, path, target)
        step = next_step(config, path, link, attempts, owner.instance if owner else "", unread)
        if is_broken and config.cinesync.base and find_ancestor(path, config.cinesync.roots):
            looks = "cinesync looks for a copy of it; else"
            step = f"{f'cinesync: {reasons[path]};' if path in reasons else looks} {step}"
        patience = min([config.repair.patience, *(a.patience for a in attempts if a.is_open)])
        since = parse_time(link.broken_since) or 0.0
        wait = plan_wait(config.repair.min_age, patience, since, losses.get(path))
        waits = is_broken and time.time() < wait.until
        if waits and step.startswith(("cinesync", "queue")):
            step = f"{wait}; then {step}"
        links.append({
            "path": path, "target": target, "status": link.status, "since": link.broken_since,
            **parse_media(path)._asdict(),
            "instance": owner.instance if owner else None,
            "file_id": owner.file_id if owner else None, "error": link.error,
            "waits_until": format_time(wait.until) if waits and wait.until < math.inf else None,
            "next": step,
        })  # fmt: skip
    return links


def next_step(
    config: Config, path: str, link: KnownLink, attempts: Sequence[Attempt], owner: str, unread: str
) -> str:
    """Return what happens to a link next, or what the user is to do."""
    if attempts and needs_attention(config.repair, link, attempts):
        return f"needs attention: {attempts[-1].error or 'its repairs have come to nothing'}"
    if any(attempt.is_open for attempt in attempts):
        sent = attempts[-1].status == SENT
        return "the server is searching for it" if sent else "queued; dispatch --apply sends it"
    if link.status == UNREACHABLE and GUARD_WORDS in link.error:
        return "if its file is really gone, `scan --accept DIR`"
    if link.status == UNREACHABLE:
        return how_to_mend(link.error)
    if link.status == MISSING:
        return "nothing to do: the link itself is gone"
    name = owner or ("the relay" if plan_relay(config.relay, path) else "")
    if not name and not (config.instances or config.relay.base):
        words = "[sonarr NAME], [radarr NAME] in the config"
        return f"replace the file, or have a server do it: {words}"
    if not name and unread:
        return f"perhaps it is {unread} that owns it: not read yet; run ingest"
    if not name:
        return "no server owns it; replace the file, or remove the link"
    since = parse_time(link.broken_since) or 0.0
    if why_not(config.repair, since, attempts, time.time()) == "cooldown":
        failed = attempts[-1].status == FAILED
        state = f"failed: {attempts[-1].error}" if failed else f"sent to {name}"
        return f"{state}; if the link stays broken, once more after the cooldown"
    return f"queue has {name} replace the file"


_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})  # in a label of Prometheus


def format_prometheus(stats: JsonObject) -> str:
    """Return the statistics in the text format of Prometheus' textfile collector."""
    runs, guard = stats["runs"].values(), stats["last_scan"].get("guard")
    held = {} if guard is None else {"": int(guard.get("tripped", False))}
    links, repairs, size = stats["symlinks"], stats["repairs"], stats["database"]["size_bytes"]
    worst = {entry["directory"]: entry["count"] for entry in stats["top_broken"]}
    codes, ends, goods = ({run["command"]: run[key] for run in runs if run[key] is not None}
        for key in ("exit_code", "finished", "succeeded"))  # fmt: skip
    scanned, scan_code = ({"": of["scan"]} if "scan" in of else {} for of in (ends, codes))
    lines: List[str] = []
    for name, help_text, label, samples in (
        ("symlinks", "Symlinks by state.", "status", {s: links[s] for s in STATUSES}),
        ("actions", "Repair actions by status.", "status", stats["actions"]),
        ("repairs", "Repairs by state.", "state", {s: repairs[s] for s in REPAIR_STATES[1:]}),
        ("media", "Rows mirrored from Sonarr and Radarr.", "kind", stats["media"]),
        ("broken_in_directory", "Broken symlinks in the worst directories.", "directory", worst),
        ("database_bytes", "Size of the database.", "", {"": size}),
        ("last_run_exit_code", "Exit status of each last run.", "command", codes),
        ("last_run_timestamp_seconds", "When each last run ended.", "command", ends),
        ("last_success_timestamp_seconds", "When each last worked (0, 3, 10).", "command", goods),
        ("last_scan_timestamp_seconds", "When the last scan ended.", "", scanned),
        ("last_scan_exit_code", "Exit status of the last scan.", "", scan_code),
        ("guard_tripped", "Whether the guard held links back.", "", held),
    ):  # fmt: skip
        head = f"# HELP refresherr_{name} {help_text}\n# TYPE refresherr_{name} gauge"
        lines += [head] if samples else []
        for text, value in samples.items():
            text = text.encode("utf-8", "backslashreplace").decode().translate(_ESCAPES)
            shown = f'{{{label}="{text}"}}' if label else ""
            value = int(parse_time(value) or 0)  # of a time its seconds, of a number itself
            lines.append(f"refresherr_{name}{shown} {value}")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------
# What is foreign passes through `_text` on its way into the page, and the page's own policy allows
# no script and no style but these two, by their hash.

REPORT_ROWS, REPORT_POINTS, REPORT_DAYS = 5000, 200, 60
_HEALED = {"recovered": "came back by themselves", "relinked": "relinked", "repaired": "repaired"}
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src '$script_hash';
 style-src '$style_hash'; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>Refresherr report</title>
<style>$style</style>
<body>$body<script>$script</script>
"""
_STYLE = """
:root{color-scheme:light dark;--page:#f5f6f8;--card:#fff;--ink:#1b2028;--dim:#5a6372;--line:#dfe3e9;
--accent:#3450b8;--ok:#1a7440;--broken:#b3261e;--unreachable:#855300}
@media screen and (prefers-color-scheme:dark){:root{--page:#12151a;--card:#1b1f26;--ink:#e7eaf0;
--dim:#a0a9b8;--line:#323944;--accent:#9db2ff;--ok:#56c88e;--broken:#ff8a80;--unreachable:#e8b04a}}
*{box-sizing:border-box}[hidden]{display:none!important}
body{margin:0 auto;padding:1.5rem 1rem;max-width:72rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI",Roboto,"Noto Sans",sans-serif;overflow-wrap:anywhere}
h1,h2{margin:0 0 .5rem;font-size:1.1rem}h1{font-size:1.6rem}p,figure{margin:.5rem 0}
small{display:block;color:var(--dim);font-size:.85em;font-weight:400}
section,dl div{margin-top:1rem;padding:1rem 1.2rem;background:var(--card);border-radius:10px}
.row,dl{display:grid;gap:0 1rem;margin:0;
grid-template-columns:repeat(auto-fit,minmax(min(22rem,100%),1fr))}
dl{grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr))}dt,dd,th{overflow-wrap:normal}
dd{margin:0;font-size:1.75rem;font-weight:650}dd small{font-size:.5em}.state{font-weight:600}
.ok,.repaired{color:var(--ok);fill:var(--ok)}.broken,.failed{color:var(--broken);fill:var(--broken)}
.unreachable,.partial,.refused{color:var(--unreachable);fill:var(--unreachable)}
.missing{color:var(--dim);fill:var(--dim)}.missing::before{content:"\\2013\\a0"}
.ok::before{content:"\\2713\\a0"}.broken::before{content:"\\d7\\a0"}
.unreachable::before{content:"?\\a0"}.alert{border-left:4px solid;padding-left:1rem}
svg{display:block;width:100%;height:150px;margin:.3rem 0}.bar{height:14px}
path{fill:none;stroke:var(--broken);stroke-width:2;vector-effect:non-scaling-stroke}
.area{fill:var(--broken);fill-opacity:.12;stroke:none}
.dashed{stroke:var(--unreachable);stroke-dasharray:5 4}
.ends{display:flex;justify-content:space-between}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .6rem .45rem 0;text-align:left;vertical-align:top}
th{color:var(--dim);font-size:.85em;font-weight:400}tr{border-top:1px solid var(--line)}
.numbers :not(:first-child){text-align:right}.numbers td:first-child{min-width:6em}
#links,#links :is(thead,tbody){display:block}
#links tr{display:grid;grid-template-columns:14% 38% 14% 14% 1fr}
#links tbody{content-visibility:auto;contain-intrinsic-size:auto 9rem}
#links tbody::before{content:attr(title);display:block;padding-top:.7rem;font-weight:600}
a{color:var(--accent)}input,select{padding:.5rem;max-width:100%;font:inherit;color:inherit;
background:var(--page);border:1px solid var(--dim);border-radius:8px}input{width:100%}
@media screen and (max-width:760px){#links thead,#links td:empty{display:none}
#links tr,#links td{display:block;padding:.2rem 0}
#links td::before{content:attr(data-head) ": ";color:var(--dim)}}
@media print{#search{display:none}tr,figure{break-inside:avoid}svg{print-color-adjust:exact}}
"""
_SCRIPT = """
"use strict";
for (const time of document.querySelectorAll("time")) {
  const moment = new Date(time.dateTime), hours = Math.max(0, (Date.now() - moment) / 36e5);
  const [count, unit] = hours < 1 ? [hours * 60, "minute"] : hours < 48 ? [hours, "hour"]
    : [hours / 24, "day"];
  const ago = new Intl.RelativeTimeFormat("en").format(-Math.floor(count), unit);
  const style = {dateStyle: "medium", timeStyle: time.className == "day" ? undefined : "short"};
  time.title = time.textContent;
  time.textContent = moment.toLocaleString([], style) + (time.className == "age" ? ", " + ago : "");
}
const find = what => Array.from(document.querySelectorAll(what));
const [box, state] = find("#q, #state"), rows = find("#links tbody tr");
let texts;
function show() {
  texts = texts || rows.map(row => (row.parentNode.title + " " + row.textContent).toLowerCase());
  const words = box.value.toLowerCase().split(/\\s+/);
  rows.forEach((row, i) => { row.hidden = !(words.every(word => texts[i].includes(word))
    && (!state.value || row.querySelector("." + state.value))); });
  for (const group of find("#links tbody"))
    group.hidden = !group.querySelector("tr:not([hidden])");
  find("#told")[0].textContent = rows.filter(row => !row.hidden).length + " of " + rows.length;
}
function read() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  [box.value, state.value] = ["q", "state"].map(name => wanted.get(name) || "");
  show();
}
if (box) {
  box.parentNode.hidden = false;
  box.parentNode.addEventListener("input", () => {
    history.replaceState(null, "", "#" + new URLSearchParams({q: box.value, state: state.value}));
    show();
  });
  addEventListener("hashchange", read);
  if (location.hash) read();
}
"""


def collect_report(conn: sqlite3.Connection, config: Config, now: float) -> JsonObject:
    """Return what the report shows: the statistics, and what has become of links over time."""
    scan = _last_run(conn, "scan", "message", "roots")
    roots = config.scan.roots or tuple(root["path"] for root in scan.get("roots") or ())
    shows = Counter(parse_media(path).name for path, _, _ in find_broken(conn, config.scan.roots))
    links, count = list_links(conn, config, ATTENTION, REPORT_ROWS)
    unreachable, more = list_links(conn, config, UNREACHABLE, REPORT_ROWS - len(links))
    return {
        **collect_stats(conn, config), "now": now, "message": scan.get("message") or "",
        "roots": {root: count_statuses(conn, "symlinks", [root]) for root in roots},
        "scans": trace_scans(conn, roots),
        "healed": count_changes(conn, now - REPORT_DAYS * 86400),
        "shows": shows.most_common(10), "links": links + unreachable, "count": count + more,
    }  # fmt: skip


def trace_scans(conn: sqlite3.Connection, roots: Sequence[str]) -> List[Tuple[float, int, int]]:
    """Return (Unix time, broken, unreachable) of some `REPORT_POINTS` scans: the worst of each
    stretch, and the last of all.  A root that a scan left out stands as it was found before.
    """
    known: Dict[str, Tuple[int, int]] = {}
    points = []
    query = """SELECT started_utc, summary FROM runs
        WHERE command = 'scan' AND summary <> '' ORDER BY started_utc"""
    for started, summary in conn.execute(query):
        for root in json.loads(summary).get("roots", ()):
            if root["state"] == "scanned" and root["path"] in roots:
                known[root["path"]] = root[BROKEN], root[UNREACHABLE]
        if known:
            broken, unreachable = map(sum, zip(*known.values()))
            points.append((parse_time(started) or 0.0, broken, unreachable))
    step = len(points) // REPORT_POINTS + 1
    parts = [points[start : start + step] for start in range(0, len(points), step)]
    return [max(part, key=lambda point: point[1] + point[2]) for part in parts] + points[-1:]


def count_changes(conn: sqlite3.Connection, since: float) -> Counter[str]:
    """Return how many links broke and healed, each once a day, since a Unix time."""
    # A relinked link has recovered, too: it counts once, as what comes last in the alphabet.
    query = """SELECT what, count(*) FROM (SELECT max(action) AS what FROM events WHERE ts >= ?
        AND action IN ('newly_broken', 'recovered', 'relinked', 'repaired')
        GROUP BY ts / 86400, path, action = 'newly_broken') GROUP BY what"""
    return Counter(dict(conn.execute(query, (since,)).fetchall()))


def format_report(report: JsonObject) -> str:
    """Return the report as one self-contained page."""
    import base64
    import hashlib
    from string import Template

    def fingerprint(text: str) -> str:
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    rows = ((_format_head,), (_format_roots, _chart_scans), (_format_shows, _format_servers),
        (_format_links,))  # fmt: skip
    parts = ("".join(format_part(report) for format_part in row) for row in rows)
    body = "\n".join(f'<div class="row">{part}</div>' for part in parts if part)
    hashes = {"script_hash": fingerprint(_SCRIPT), "style_hash": fingerprint(_STYLE)}
    return Template(_PAGE).substitute(hashes, style=_STYLE, script=_SCRIPT, body=body)


def _text(value: Union[str, bytes, None]) -> str:
    """Return foreign text for HTML, between tags or quotes: escaped, no secret in it."""
    import html

    return html.escape(escape_message(from_db(value)))


def _moment(value: Any, kind: str = "") -> str:
    """Return a time as HTML, which the reader's browser shows in its own zone; `kind` is 'age', to
    be shown behind it, 'day', which is all, or none.
    """
    moment = parse_time(value)
    if moment is None or not 0 <= moment < 2.5e11:  # as far as a datetime goes
        return "" if moment is None else _text(str(value))
    full = format_time(moment)
    shown = full[:10] if kind == "day" else f"{full[:16].replace('T', ' ')} UTC"
    return f"<time datetime={full[:16]}Z{f' class={kind}' if kind else ''}>{shown}</time>"


def _state(word: Optional[str]) -> str:
    return f'<span class="state {_text(word)}">{_text(word)}</span>'


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>"


def _table(attributes: str, heads: Sequence[str], groups: Mapping[str, Iterable[Any]]) -> str:
    """Return a table of {title of some rows: rows}; all of it is HTML already."""
    html = f"<table {attributes}><thead><tr><th>{'</th><th>'.join(heads)}</th></tr></thead>"
    for title, rows in groups.items():
        html += f'<tbody title="{title}">\n'
        for row in rows:
            cells = (f'<td data-head="{head}">{cell}</td>' for head, cell in zip(heads, row))
            html += f"<tr>{''.join(cells)}</tr>\n"
        html += "</tbody>"
    return f"{html}</table>"


def _format_head(report: JsonObject) -> str:
    links, scan, database = report["symlinks"], report["last_scan"], report["database"]
    bad = " and ".join(f"{links[s]:,} {s}" for s in (BROKEN, UNREACHABLE) if links[s])
    told = "Nothing has been scanned yet."
    if scan:
        told = f"Last scan {_moment(scan['started'], 'age')}: {_state(scan['status'])}."
    if report["message"]:
        told += f'<p class="alert">{_text(report["message"])}</p>'
    cards = "".join(
        f"<div><dt>{_state(status)}</dt><dd>{links[status]:,}"
        f"<small>{links[status] / (links['total'] or 1):.1%}</small></dd></div>"
        for status in STATUSES
    )
    place = f"{_text(database['path'])}, {database['size_bytes'] / 1048576:.1f} MiB"
    made = f"Made {_moment(report['now'])} by Refresherr {__version__} from {place}."
    title = f"{bad or 'None broken'} of {plural(links['total'], 'link')}"
    return f"<header><h1>{title}</h1><p>{told}</p><small>{made}</small><dl>{cards}</dl></header>"


def _format_roots(report: JsonObject) -> str:
    """Return a stacked bar for each root; what is not 0 has one percent beside its share."""
    bars = ""
    for root, numbers in report["roots"].items():
        words = ", ".join(f"{numbers[status]:,} {status}" for status in STATUSES)
        bars += f'<p>{_text(root)}<svg class="bar" role="img" aria-label="{words}" '
        bars += 'viewBox="0 0 100 1" preserveAspectRatio="none">'
        present = {status: numbers[status] for status in STATUSES if numbers[status]}
        whole = sum(present.values())
        widths = [1 + (100 - len(present)) * number / whole for number in present.values()]
        for status, left, width in zip(present, itertools.accumulate([0, *widths]), widths):
            bars += f'<rect class="{status}" x="{left:.2f}" width="{width - 0.3:.2f}" height="1"/>'
        bars += f"</svg><small>{words}</small></p>\n"
    return _section("Health of each root", bars) if bars else ""


def _chart_scans(report: JsonObject) -> str:
    points, title, healed = report["scans"], "Broken links over time", report["healed"]
    if not points:
        return _section(title, "<p>There has been no scan.</p>")
    start, end = points[0][0], points[-1][0]
    # An outage must not flatten what it is not about: the scale is that of the broken links.
    worst, most = (max(points, key=operator.itemgetter(column)) for column in (1, 2))
    top, span = max(1, worst[1]), max(1.0, end - start)

    def trace(column: int) -> str:
        heights = [top - min(top, point[column]) for point in points]
        steps = (f"H{point[0] - start:.0f}V{height}" for point, height in zip(points, heights))
        return f"M0 {heights[0]}{''.join(steps)}H{span:.0f}"

    shapes = f'<path class="area" d="{trace(1)}V{top}H0Z"/><path d="{trace(1)}"/>'
    said = f"Now {points[-1][1]:,} broken; at most {worst[1]:,}, on {format_time(worst[0])[:10]}."
    if most[2]:
        shapes += f'<path class="dashed" d="{trace(2)}"/>'
        said += f" The dashed line: links that could not be reached, at most {most[2]:,}."
    ways = ", ".join(f"{healed[name]:,} {words}" for name, words in _HEALED.items())
    said += f" In the last {REPORT_DAYS} days {healed['newly_broken']:,} broke, {ways}."
    svg = f'<svg role="img" viewBox="0 0 {span:.0f} {top}" preserveAspectRatio="none">'
    dates = "".join(f"<span>{_moment(moment, 'day')}</span>" for moment in (start, end))
    plot = f"<small>{top:,}</small>{svg}<title>{title}</title><desc>{said}</desc>{shapes}</svg>"
    below = f'<small class="ends">{dates}</small><figcaption><small>{said}</small></figcaption>'
    return _section(title, f"<figure>{plot}{below}</figure>")


def _format_shows(report: JsonObject) -> str:
    rows = []
    for name, count in report["shows"]:
        place = _text(urlencode({"q": name}, errors="replace"))
        rows.append((f'<a href="#{place}">{_text(name)}</a>', f"{count:,}"))
    table = _table('class="numbers"', ("Title", "Broken"), {"": rows})
    return _section("Most broken", table) if rows else ""


def _format_servers(report: JsonObject) -> str:
    servers = report["repairs"]["instances"].items()
    rows = [[_text(server), *(f"{n[name]:,}" for name in REPAIR_STATES)] for server, n in servers]
    words = (f"{n:,} {_state(status)}" for status, n in sorted(report["actions"].items()))
    heads = ["Server", *(name.replace("_", " ").capitalize() for name in REPAIR_STATES)]
    table = _table('class="numbers"', heads, {"": rows})
    return _section("Repairs", f"<p>Actions: {', '.join(words)}.</p>{table}") if rows else ""


def _format_links(report: JsonObject) -> str:
    links, title = report["links"], "Links that need attention"
    if not links:
        return _section(title, "<p>None.</p>")
    groups: Dict[str, List[Sequence[str]]] = defaultdict(list)
    for link in links:
        season = "" if link["season"] is None else f", season {link['season']}"
        groups[_text(link["name"]) + season].append((
            _state(link["status"]),
            f"{_text(link['path'])}<small>{_text(link['target'])}</small>",
            _moment(link["since"], "age"),
            _text(link["instance"]),
            _text("; ".join(filter(None, (link["error"], link["next"])))),
        ))  # fmt: skip
    hidden = report["count"] - len(links)
    more = f"<p>{hidden:,} more are not shown; <code>refresherr broken</code> lists them.</p>"
    states = "".join(f"<option>{status}</option>" for status in STATUSES[1:])
    search = f"""<div id="search" hidden>
<label for="q">Search by path, target, owner or next step</label><input id="q" type="search">
<label for="state">State</label> <select id="state"><option value="">every</option>{states}</select>
<p id="told" role="status">{len(links)} of {len(links)}</p></div>
<noscript><p>The search needs JavaScript.</p></noscript>"""
    heads = ("State", "Link and its target", "Broken since", "Owner", "Next step")
    titles = {f"{name}: {plural(len(rows), 'link')}": rows for name, rows in groups.items()}
    table = _table('id="links"', heads, titles)
    return _section(title, more * bool(hidden) + search + table)


# ---------------------------------------------------------------------------------------------
# Doctor
# ---------------------------------------------------------------------------------------------
SAMPLE = 20  # files of a server, and directories of links, that are tried
ODD_TARGETS = 200  # links that may lead to a folder, likewise


class Finding(NamedTuple):
    """What the doctor says of one thing."""

    name: str
    state: str  # 'ok', 'warning' or 'failed'
    detail: str
    advice: str = ""
    line: str = ""  # that the advice says to write somewhere


def examine_runtime() -> Iterator[Finding]:
    """Look at the interpreter and its SQLite."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok", f"{python} at {sys.executable}")
    yield Finding("sqlite", "ok", sqlite3.sqlite_version)
    try:
        import ssl
    except ImportError:
        yield Finding("https", "warning", "this Python has no ssl", "only http:// URLs will work")
    else:
        yield Finding("https", "ok", ssl.OPENSSL_VERSION)


def examine_database(conn: sqlite3.Connection) -> Iterator[Finding]:
    """Look at the database's health, its journal and the space it has to grow."""
    path = database_path(conn)
    damage = conn.execute("PRAGMA quick_check(1)").fetchone()[0]
    mode = conn.execute("PRAGMA journal_mode").fetchone()[0]
    detail = f"{path}, schema version {schema_version(conn)}, journal {mode}"
    damaged = Finding("database", "failed", f"{path}: {damage}", _START_ANEW)
    yield Finding("database", "ok", detail) if damage == "ok" else damaged
    free = shutil.disk_usage(os.path.dirname(path)).free >> 20
    wanted = max(100, os.path.getsize(path) >> 19)
    if free < wanted:
        advice = f"free {wanted} MiB, or move data_dir to another disk"
        yield Finding("space", "warning", f"{free} MiB are free beside it", advice)


def examine_config(config: Config, error: str) -> Iterator[Finding]:
    """Look at where the settings come from."""
    source = Finding("config", "ok", config.file or "no config file; defaults and environment")
    yield Finding("config", "failed", error, "correct the file") if error else source
    for text in (*config.warnings, *find_keyless(config)):
        yield Finding("config", "warning", text)


def examine_time(conn: sqlite3.Connection, now: float, cron_line: str) -> Iterator[Finding]:
    """Look at the clock, whether anything starts a scan every day, and how the last one ended."""
    select = """SELECT max(CASE WHEN command IN ('scan', 'run') THEN started_utc END),
        max(CASE WHEN command = 'run' THEN started_utc END),
        max(started_utc), max(finished_utc), (SELECT max(ts) FROM events) FROM runs"""
    last, ran, *times = (parse_time(value) or 0.0 for value in conn.execute(select).fetchone())
    newest, shown = min(max(times), 2.5e11), format_time(now)  # as far as a datetime goes
    clock = Finding("clock", "ok", shown)
    if shown < "2024" or newest > now + 60:
        detail = f"{shown}, but the database knows of {format_time(newest)}"
        advice = "set it; until then ages and cooldowns are wrong"
        clock = Finding("clock", "warning", detail, advice)
    yield clock
    ago = f"the last scan began {format_duration(max(0.0, now - last))} ago" if last else "no scan"
    advice = "have cron do it; the line for `crontab -e`:" if cron_line else "set roots in [scan]"
    if ran > now - 86400:
        advice = cron_line = ""
    state = "ok" if last > now - 86400 else "warning"
    yield Finding("schedule", state, ago, advice, cron_line)
    scan = _last_run(conn, "scan", "message")
    if scan and scan["exit_code"] not in (EXIT_OK, EXIT_BROKEN):
        state = "warning" if scan["exit_code"] == EXIT_PARTIAL else "failed"
        detail = f"{scan['status']}: {scan['message'] or 'it came to no end'}"
        advice = "once that is mended, `scan` again; `broken --status unreachable` names the links"
        yield Finding("last scan", state, detail, advice)


def examine_library(config: Config, conn: sqlite3.Connection) -> Iterator[Finding]:
    """Look at directories, permissions and mounts, by the scan's own hang-safe means."""
    copies, roots = config.cinesync, config.scan.roots
    roles = dict.fromkeys(roots, "root")
    if copies.base:
        places = (copies.base, *copies.roots, *copies.allowed_targets)
        roles = {**dict.fromkeys(places, "cinesync"), **roles}
    if not roots:
        yield Finding("roots", "warning", "none configured", "set roots in [scan]")
    if not roles:
        return
    # Where nothing ever changes a link, permissions do not matter.
    folders = sample_folders(conn, roles) if copies.base or config.instances else []
    doubted = sample_odd_targets(conn, roots)
    looks, mounts = look_at_places(conn, config.scan, [*roles, *folders, *doubted])
    for path, role in roles.items():
        state, reason, _ = looks[path]
        good = Finding(f"{role} {path}", "ok", "can be read")
        bad = good._replace(detail=reason, advice=f"{how_to_mend(reason)}; or correct the config")
        yield good if state == "scanned" else bad._replace(state="failed")
    yield from map(_examined_mount, mounts)
    there = {folder: looks[folder][1] for folder in folders if looks[folder][0] != "missing"}
    closed = [f"{folder}: {reason}" for folder, reason in there.items() if reason]
    if closed:
        detail = f"links cannot be replaced in {len(closed)} of {len(there)} places: {closed[0]}"
        advice = "run it as the user they belong to, or let this one write there"
        yield Finding("permissions", "warning", detail, advice)
    elif there:
        yield Finding("permissions", "ok", f"links can be replaced ({len(there)} places tried)")
    for path in (path for path in doubted if looks[path][0] == "scanned"):
        advice = "point it to the file in there"
        yield Finding(f"link {path}", "warning", "leads to a folder", advice)
    for place, count in find_strays(conn, roots).items():
        detail = f"{plural(count, 'link')} beneath it, which lies below no root any more"
        advice = "`db prune` forgets them; or add it to roots in [scan]"
        yield Finding(f"directory {place}", "warning", detail, advice)


def sample_odd_targets(conn: sqlite3.Connection, roots: Sequence[str]) -> List[str]:
    """Return some good links that are named like a video, while their targets are not."""
    within, values = beneath_any(roots)
    query = f"""SELECT path, last_target FROM symlinks WHERE status = 'ok' AND {within}
        AND substr(path, -4) <> substr(last_target, -4)"""
    pairs = (tuple(map(from_db, row)) for row in conn.execute(query, values))
    odd = (path for path, target in pairs if is_video(path) and not is_video(target))
    return list(itertools.islice(odd, ODD_TARGETS))


def sample_folders(conn: sqlite3.Connection, roots: Iterable[str]) -> List[str]:
    """Return some directories below `roots` that hold links, those of broken ones first."""
    rows = conn.execute(
        "SELECT path FROM symlinks WHERE status = 'broken' OR status <> 'missing' AND rowid % "
        "(1 + (SELECT count(*) FROM symlinks) / 500) = 0 ORDER BY status <> 'broken', path"
    )
    paths = (path for path in (from_db(row[0]) for row in rows) if find_ancestor(path, roots))
    return list(dict.fromkeys(map(os.path.dirname, paths)))[:SAMPLE]


def _examined_mount(mount: WatchedMount) -> Finding:
    name = f"mount {mount.point}"
    if mount.state == HEALTHY:
        return Finding(name, "ok", f"{mount.fs_type}, healthy ({mount.role})")
    advice = f"{how_to_mend(mount.reason)}; until then its links are unreachable"
    if mount.role == "remembered":
        advice += f", or, if it moved for good, `scan --forget-mount {mount.point}`"
    return Finding(name, "failed", mount.reason, advice)


def examine_servers(config: Config, conn: sqlite3.Connection) -> Iterator[Finding]:
    """Ask every Sonarr and Radarr for version, root folders and some files, with our key."""
    for instance in config.instances:
        server = Server(instance, config.repair.timeout, config.repair.list_timeout)
        try:
            detail = f"{server.kind.app} {server.connect()} at {redact(instance.settings.url)}"
            yield Finding(instance.name, "ok", detail)
            folders = []
            for folder in server.get_list("/rootfolder"):
                folders.append(str(dig(folder, "path")).rstrip("/") or "/")
                if folder.get("accessible") is False:
                    detail = f"{instance.name} cannot reach its root folder {dig(folder, 'path')}"
                    advice = "mount it there; until then nothing of it is repaired"
                    yield Finding("root folder", "failed", detail, advice)
            yield examine_files(conn, server, folders)
        except HttpError as exc:
            yield _no_answer(instance.name, exc)


def _no_answer(name: str, exc: HttpError) -> Finding:
    detail = str(exc).partition(": ")[2]  # without the name
    section = f"[{name.replace('_', ' ', 1)}]"
    advice = f"correct {section}" if exc.status else f"start the server, or correct {section}"
    return Finding(name, "failed", detail, advice)


def examine_files(conn: sqlite3.Connection, server: Server, folders: Sequence[str]) -> Finding:
    """Look whether some files of a server are links of ours; if none is, propose a path_map."""
    name = f"paths of {server.name}"
    if not conn.execute("SELECT count(*) FROM symlinks WHERE status <> 'missing'").fetchone()[0]:
        return Finding(name, "warning", "no links are known yet", "`scan`, then look again")
    places = find_namesakes(conn, sample_files(server))
    known = [p for p, here in places.items() if p in (map_path(h, server.path_map) for h in here)]
    if known or not places:
        detail = f"{len(known)} of {plural(len(places), 'file')} tried are known links"
        return Finding(name, "ok", detail)
    detail = f"no file is a known link; one is {next(iter(places))}"
    section, fitting = f"[{server.name.replace('_', ' ', 1)}]", fit_map(places, folders)
    line = "path_map = " + ", ".join(f"{here} => {there}" for here, there in fitting)
    with contextlib.suppress(ValueError):
        if fitting and line.isprintable() and parse_map(line[11:]) == fitting:
            return Finding(name, "failed", detail, f"write into {section}:", line)
    advice = f"scan its library; if it calls that something else, set path_map in {section}"
    return Finding(name, "warning", detail, advice)


def sample_files(server: Server) -> List[str]:
    """Return the paths of some files from all over a server's library, with 8 requests at most."""

    def spread(items: Iterable[JsonObject], place: str, count: int) -> List[Any]:
        found = list(filter(None, (dig(item, place) for item in items)))
        return found[:: -(-len(found) // count) or 1]

    if server.kind.item == "movie":
        return list(map(str, spread(server.get_list("/movie"), "movieFile.path", SAMPLE)))
    series = (s for s in server.get_list("/series") if dig(s, "statistics.episodeFileCount"))
    lists = (server.get_list(server.kind.file, seriesId=s) for s in spread(series, "id", 7))
    return [str(path) for files in lists for path in spread(files, "path", 3)]


def find_namesakes(conn: sqlite3.Connection, paths: Sequence[str]) -> Dict[str, List[str]]:
    """Return {path: links of ours, and what they point to, whose name is that of the file}."""
    names = set(map(os.path.basename, paths))
    places: Dict[str, List[str]] = defaultdict(list)
    rows = conn.execute("SELECT path, last_target FROM symlinks WHERE status <> 'missing'")
    for link, target in (map(from_db, row) for row in rows):
        for place in (link, target):
            name = os.path.basename(place)
            if name in names:
                places[name].append(os.path.normpath(os.path.join(os.path.dirname(link), place)))
    return {path: places[os.path.basename(path)] for path in paths}


def fit_map(namesakes: Mapping[str, Sequence[str]], folders: Sequence[str]) -> PathMap:
    """Return the path_map of a server's root folders by which the most files are links of ours."""
    votes: Counter[Tuple[str, str]] = Counter()
    for path, places in namesakes.items():
        folder = find_ancestor(path, folders) or path
        tail = path[len(folder.rstrip("/")) :]
        heads = [place[: -len(tail)] or "/" for place in places if tail and place.endswith(tail)]
        votes.update((folder, head) for head in dict.fromkeys(heads))
    best: Dict[str, str] = {}
    for (folder, here), _ in votes.most_common():  # of two equals links come before targets
        if here not in best.values():
            best.setdefault(folder, here)
    return tuple((here, folder) for folder, here in best.items())


def examine_notifiers(config: Config, conn: sqlite3.Connection) -> Iterator[Finding]:
    """Say of each notifier and heartbeat when it last took a message."""
    for name in filter(lambda name: getattr(config.notify, name), (*NOTIFIERS, *HEARTBEATS)):
        last, error = load_note(conn, f"told {name}") or (None, None)
        when = f"last took a message at {last}" if last else "has taken no message yet"
        state, advice = ("ok", "") if last else ("warning", "`doctor --notify` sends it a test")
        if error:
            state, when = "failed", f"{when}: {error.split(': ', 1)[1]}"
            advice = f"correct {name} in [notify]; `doctor --notify` tries it"
        yield Finding(name, state, when, advice)


def examine_relay(config: Config) -> Iterator[Finding]:
    """Look whether the relay is there; without /find, term and token that starts no search."""
    if config.relay.base:
        base = re.sub("/find$", "", config.relay.base)
        client = Client("relay", base, config.repair.timeout, {}, config.relay.token)
        found = Finding("relay", "ok", f"answers at {client.url}; its token was not tried")
        try:
            client.send(Call("GET"))
        except HttpError as exc:
            if not exc.status or exc.status >= 500:
                found = _no_answer("relay", exc)
        yield found


def examine_media_servers(config: Config) -> Iterator[Finding]:
    """Ask Plex, Jellyfin and Emby for their versions, with our keys, and Plex for its folders."""
    for name in ("plex", "jellyfin", "emby"):
        settings, is_plex = getattr(config, name), name == "plex"
        if not settings.url:
            continue
        client = media_client(name, settings, config.repair.timeout)
        try:
            answer = client.ask("GET", "/identity" if is_plex else "/System/Info")
            version = dig(answer, "MediaContainer.version" if is_plex else "Version")
            if not version:
                raise HttpError(f"{name}: {client.url} is something else")
            if is_plex:  # which tells its version without a key
                plan_plex(client.ask("GET", "/library/sections"), ())
            detail = f"{name.capitalize()} {client.quote(version)} at {client.url}"
            yield Finding(name, "ok", detail)
        except HttpError as exc:
            yield _no_answer(name, exc)


# ---------------------------------------------------------------------------------------------
# Run
# ---------------------------------------------------------------------------------------------
# What the steps of a whole run come to.  What the next run must know of an applied one stands in
# its row of `runs` as 'state': {"told": problems, "last_event": id, "left": {server: directories}}.

HIGHLIGHTS = 10  # links named in a message
SKIP = "skipped"
TELL_TIMEOUT = 10.0  # seconds for which a notifier may hold up a run
_GOOD_NEWS = ("relinked", REPAIRED, SENT)


def combine_exit_codes(codes: Sequence[int]) -> int:
    """Return one exit status for all steps: refused, if one was; failed, if all were."""
    bad = [code for code in codes if code != EXIT_OK]
    if EXIT_REFUSED in bad or not bad:
        return EXIT_REFUSED if bad else EXIT_OK
    return EXIT_FAILED if len(bad) == len(codes) and EXIT_PARTIAL not in bad else EXIT_PARTIAL


def find_stale(conn: sqlite3.Connection, config: Config, now: float) -> List[str]:
    """Return the servers that were not read, or not without an error, since `ingest_every`."""
    return find_unread(conn, config.instances, format_time(now - config.run.ingest_every))


def find_repairable(conn: sqlite3.Connection, roots: Sequence[str]) -> bool:
    """Tell whether cinesync has anything to do: a broken link, or a journal to settle."""
    planned = "SELECT 1 FROM link_changes WHERE state = 'planned' LIMIT 1"
    return any(find_broken(conn, roots)) or conn.execute(planned).fetchone() is not None


def load_state(conn: sqlite3.Connection) -> JsonObject:
    """Return the 'state' that the last applied run has left, {} without one."""
    query = "SELECT summary FROM runs WHERE command = 'run' ORDER BY run_id DESC"
    summaries = (json.loads(summary or "{}") for (summary,) in conn.execute(query))
    return next((summary["state"] for summary in summaries if summary.get("state")), {})


def last_event(conn: sqlite3.Connection) -> int:
    """Return the id of the newest event."""
    return conn.execute("SELECT max(id) FROM events").fetchone()[0] or 0


def changed_links(conn: sqlite3.Connection, after: int) -> List[str]:
    """Return the links that were changed, or came back, after an event."""
    query = """SELECT DISTINCT path FROM events
        WHERE id > ? AND action IN ('relinked', 'recovered', 'repaired')"""
    return sorted(from_db(path) for (path,) in conn.execute(query, (after,)))


def name_problems(steps: Mapping[str, JsonObject]) -> Dict[str, str]:
    """Return {'ingest partial': its message, 'scan refused: /mnt/remote': reason ...} of the steps
    that did not end well: each mount, each directory of the guard is news for itself.
    """
    problems: Dict[str, str] = {}
    for name, step in steps.items():
        if step["exit_code"] == EXIT_OK:
            continue
        whole, refused = f"{name} {step['status']}", {}
        if step["exit_code"] == EXIT_REFUSED:
            refused = {m["mount_point"]: m["reason"] for m in step.get("mounts", ()) if m["reason"]}
            others = set(step.get("refusals", ())).difference(refused.values())
            units = step.get("guard", {}).get("units", ())
            refused.update((unit["directory"], describe_unit(unit)) for unit in units)
            refused.update(dict.fromkeys(others, ""))
            problems.update((f"{whole}: {what}", reason) for what, reason in refused.items())
        if not refused or any(root["state"] != "scanned" for root in step.get("roots", ())):
            problems[whole] = step.get("message", "")
    return problems


def still_open(steps: Mapping[str, JsonObject], told: Sequence[str]) -> List[str]:
    """Return the problems there are now, with those told of steps that had nothing to do."""
    idle = [
        name
        for name, step in steps.items()
        if step["status"] == SKIP or (step["exit_code"] == EXIT_OK and step.get("actions") == [])
    ]
    return sorted({*name_problems(steps), *(old for old in told if old.split()[0] in idle)})


def plan_note(
    conn: sqlite3.Connection, after: int, steps: Mapping[str, JsonObject], told: Sequence[str],
    when: str,
) -> Tuple[Note, bool]:  # fmt: skip
    """Return what there is to tell of a run, and whether it is worth it: a problem once, and once
    more when it is over; `told` are those of the last run.
    """
    query = "SELECT action, count(*) FROM events WHERE id > ? GROUP BY action"
    counts = Counter(dict(conn.execute(query, (after,)).fetchall()))
    problems = name_problems(steps)
    new, over = set(problems) - set(told), set(told) - set(still_open(steps, told))
    is_failure, is_good = bool(counts[FAILED] or new or over), any(counts[n] for n in _GOOD_NEWS)
    words = [f"{counts[name]:,} {name}" for name in (*_GOOD_NEWS, FAILED) if counts[name]]
    words += [*sorted(problems), *(f"no longer: {problem}" for problem in sorted(over))]
    lines = [f"{problem}: {text}".rstrip(": ") for problem, text in sorted(problems.items())]
    totals = steps["scan"].get("totals") or {}
    if totals:
        shown = ", ".join(f"{totals[status]:,} {status}" for status in STATUSES)
        lines.append(f"{plural(totals['examined'], 'link')}: {shown}")
    lines += steps["queue"].get("waits") or steps["cinesync"].get("waits", ())
    query = """SELECT action, path FROM events WHERE id > ?
        AND action IN ('relinked', 'repaired', 'sent', 'failed') ORDER BY id LIMIT ?"""
    rows = conn.execute(query, (after, HIGHLIGHTS)).fetchall()
    lines += [f"{action}: {os.path.basename(from_db(path))}" for action, path in rows]
    rest = sum(counts[name] for name in (*_GOOD_NEWS, FAILED)) - len(rows)
    lines += [f"and {rest:,} more"] if rest else []
    level = "warning" if problems or counts[FAILED] else "success" if is_good else "info"
    level = "failure" if any(step["exit_code"] == EXIT_FAILED for step in steps.values()) else level
    summary = {n: {key: step[key] for key in ("status", "exit_code")} for n, step in steps.items()}
    title = escape_message("Refresherr: " + (", ".join(words) or "nothing has changed"))
    title = cut(title.encode("ascii", "backslashreplace").decode(), 250)
    result = {"steps": summary, "counts": dict(counts), "totals": totals}
    note = Note(title, "\n".join(map(escape_message, lines)), level, result)
    return note, {"always": True, "failures": is_failure}.get(when, is_failure or is_good)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------
# `_run_X` does what a command does and returns what `X --json` shows; `_show_X` prints that.


def started_as() -> str:
    """Return the words by which this program was started, to be typed again."""
    program = sys.argv[0]
    if not os.path.isfile(program):
        return "refresherr"
    is_typed = "/" in program and os.access(program, os.X_OK)
    return shell_quote(program) if is_typed else f"python3 {shell_quote(program)}"


@dataclasses.dataclass(frozen=True)
class Context:
    """What a command works with."""

    args: argparse.Namespace
    config: Config
    terminal: Terminal
    config_error: str = ""
    conn: Optional[sqlite3.Connection] = None  # of the run that this command is a step of
    deadline: float = math.inf  # of time.monotonic()

    @property
    def db_path(self) -> str:
        path = self.args.db or os.path.join(self.config.refresherr.data_dir, "symlinks.db")
        return os.path.abspath(path)

    def require_database(self) -> None:
        """Raise DatabaseError where there is none and the command does not fill one: a directory
        that was mistyped is no empty library.
        """
        try:
            os.stat(self.db_path)
        except (FileNotFoundError, NotADirectoryError):
            if self.args.command not in ("scan", "run", "ingest"):
                what = f"there is no database {self.db_path}: `{started_as()} scan DIR` makes one"
                advice = "if it is elsewhere, name its directory with --data-dir"
                raise DatabaseError(f"{what}; {advice}") from None
        except OSError:
            pass  # it may be there: opening it says what is wrong

    def database(self) -> contextlib.closing[sqlite3.Connection]:
        """Open the database for reading or writing; closes with the block."""
        self.require_database()
        return contextlib.closing(open_database(self.db_path))

    @property
    def applied(self) -> bool:
        """Whether anything outside of the database may be changed."""
        return bool(not self.args.dry_run and (self.args.apply or self.config.refresherr.apply))

    @contextlib.contextmanager
    def recorded(
        self, command: str, preview: bool = False
    ) -> Iterator[Tuple[sqlite3.Connection, JsonObject]]:
        """Hold the lock and record the run; a preview works on a copy and records nothing."""
        with contextlib.ExitStack() as stack:
            conn = self.conn
            if conn is None:
                self.require_database()
            if preview or self.args.dry_run:
                yield conn or stack.enter_context(scratch_database(self.db_path)), {}
                return
            if conn is None:
                stack.enter_context(process_lock(self.db_path, self.args.lock_wait, command))
                conn = stack.enter_context(self.database())
            yield conn, stack.enter_context(recorded_run(conn, command))

    def record(self, command: str, work: Callable[..., JsonObject]) -> JsonObject:
        """Return what some work on links did; the record of it leaves the single items out."""
        with self.recorded(command, command != "verify" and not self.applied) as (conn, summary):
            result = work(conn, summary.get("run_id"))
            summary.update((k, v) for k, v in result.items() if k not in ("items", "run_id"))
            if command == "cinesync":
                told = {item["path"]: item["reason"] for item in result["items"] if item["reason"]}
                summary["reasons"] = {k: v for k, v in told.items() if v[:5] != "waits"}
        return result

    def require_roots(self) -> None:
        """Raise UsageError if there is nothing to scan, before a database is made for that."""
        if not self.config.scan.roots:
            way = f"`{started_as()} {self.args.command} DIR`"
            raise UsageError(f"no roots to scan: {way}, or set [scan] roots in the config")

    def progress(self, text: str) -> None:
        """Show how far a step has come.  RefresherrError if it may go no further."""
        if time.monotonic() > self.deadline:
            raise RefresherrError("the time of this run is up; the next one goes on", EXIT_PARTIAL)
        self.terminal.progress(text)


def note_dry_run(result: JsonObject, context: Context) -> JsonObject:
    """Note in a result that -n has overruled --apply."""
    if context.args.dry_run and (context.args.apply or context.config.refresherr.apply):
        result["dry_run"] = True
    return result


def how_to_apply(result: JsonObject) -> str:
    """Return why a preview was one, or how to do what it shows."""
    return "-n asks for that" if result.get("dry_run") else "--apply does it"


def _minute(time_utc: str) -> str:
    return time_utc[:16].replace("T", " ") + " UTC"


def _count_words(counts: Mapping[str, int], words: Mapping[str, str]) -> str:
    """Return '3 that nobody owns, 2 ignored' of {'no_owner': 3, 'ignored': 2}."""
    known = {key: words.get(key, key.replace("_", " ")) for key in counts}
    return ", ".join(f"{count:,} {known[key]}" for key, count in counts.items() if count)


def _run_scan(context: Context) -> JsonObject:
    args, settings = context.args, context.config.scan
    context.require_roots()
    with context.recorded("scan") as (conn, summary):
        for point in args.forget_mount:
            if not forget_mount(conn, point):
                raise UsageError(f"{point} is not a remembered mount point")
        accept = ["/"] if args.accept_breakage else args.accept
        roots = tuple(dict.fromkeys(settings.roots))
        job = ScanJob(settings, roots, context.config.all_roots, accept, args.full)
        result = scan_library(conn, job, context.progress)
        if args.exit_code and result["exit_code"] == EXIT_OK and result["totals"]["broken"]:
            result["exit_code"] = EXIT_BROKEN
        result["problems"] = name_scan_problems(conn, result)
        if all(mount["state"] == HEALTHY for mount in result["mounts"]) and result["problems"]:
            result["problems"] += describe_moves(conn, settings)
        if result["problems"]:
            head = "no root could be scanned: " * (result["exit_code"] == EXIT_FAILED)
            result["message"] = head + "; ".join(result["problems"])
        summary.update(result)
        settle_repairs(conn)
    return result


def name_scan_problems(conn: sqlite3.Connection, result: JsonObject) -> List[str]:
    """Return what made a scan's exit status other than 0, each with path and reason."""
    if result["exit_code"] in (EXIT_OK, EXIT_BROKEN):
        return []
    failed = [f"{r['path']}: {r['reason']}" for r in result["roots"] if r["state"] != "scanned"]
    if result["exit_code"] == EXIT_FAILED:
        return failed
    guard, parts = result["guard"], list(result["refusals"])
    if guard["tripped"]:
        what = "taken for an outage, nothing of it is marked broken or missing"
        parts.append(f"{what}: {guard['reason']}")
    told = "; ".join(parts)
    lines = describe_unreachable(conn, [root["path"] for root in result["roots"]])
    parts += failed
    parts += [line for why, line in lines.items()
        if not (why and why in told) and not (guard["tripped"] and GUARD_WORDS in why)
    ]  # fmt: skip
    return list(dict.fromkeys(parts)) or ["some directories could not be read"]


def _show_scan(terminal: Terminal, result: JsonObject) -> None:
    for root in result["roots"]:
        found = "not scanned"
        if root["state"] == "scanned":
            broken = f"{root['broken']:,} broken"
            broken = terminal.paint(broken, "red") if root["broken"] else broken
            found = f"{plural(root['examined'], 'link')}: {root['ok']:,} ok, {broken}, "
            found += f"{root['unreachable']:,} unreachable"
        terminal.line(f"{escape(root['path'])}: {found}")
    if result["exit_code"] == EXIT_FAILED:
        return
    changes, totals = result["changes"], result["totals"]
    terminal.line(
        f"{changes['new']:,} new, {changes['newly_broken']:,} newly broken, "
        f"{changes['recovered']:,} recovered, {changes['vanished']:,} vanished; "
        f"{totals['missing']:,} missing, {totals['ignored']:,} ignored; "
        f"{format_duration(result['duration_seconds'])}"
    )
    if totals["broken"]:
        terminal.hint("`broken` lists them, and what can be done")


def _run_broken(context: Context) -> JsonObject:
    args, config = context.args, context.config
    is_cut = args.owner or args.root or args.path
    with context.database() as conn:
        links, count = list_links(conn, config, args.status, None if is_cut else args.limit)
        _, unreachable = list_links(conn, config, UNREACHABLE, 0)
    if is_cut:
        links = [link for link in links
            if args.owner in (None, link["instance"] or "none")
            and is_under(link["path"], args.root or "/") and (args.path or "") in link["path"]
        ]  # fmt: skip
        count = len(links)
    links = links[: args.limit]
    return {"links": links, "count": count, "unreachable": unreachable, "by_title": not args.links}


def _show_broken(terminal: Terminal, result: JsonObject) -> None:
    """Print what is to be done, and beneath it the titles, or the links, that it is for."""
    groups: Dict[str, Dict[str, List[JsonObject]]] = {}
    for link in result["links"]:
        owner = f"{link['instance']}: " if link["instance"] else ""
        step = owner + "; ".join(filter(None, (link["error"], link["next"])))
        season = "" if link["season"] is None else f" S{link['season']:02d}"
        titles = groups.setdefault(f"{link['status']}; {step}", {})
        titles.setdefault(f"{link['name']}{season}", []).append(link)
    for step, titles in groups.items():
        terminal.line(terminal.paint(escape(step), "bold"))
        for title, links in titles.items():
            since = min(link["since"] or "" for link in links)
            what = links[0]["path"]
            if len(links) > 1:
                folder = os.path.commonpath([os.path.dirname(link["path"]) for link in links])
                what = f"{title}: {plural(len(links), 'link')} in {folder}"
            terminal.line(f"    {escape(what)}{since and f', since {_minute(since)}'}")
            for link in () if result["by_title"] else links:
                goal = terminal.paint(f"-> {escape(link['target'])}", "dim")
                terminal.line(f"        {escape(link['path'])} {goal}")
    hidden = result["count"] - len(result["links"])
    more = f" ({hidden:,} not shown)" if hidden else ""
    if result["unreachable"] and not any(link["status"] == UNREACHABLE for link in result["links"]):
        more += f"; {result['unreachable']:,} cannot be judged: broken --status unreachable"
    terminal.line(f"{plural(result['count'], 'link')}{more}")


def _run_ingest(context: Context) -> JsonObject:
    known = {instance.name: instance for instance in context.config.instances}
    if not known:
        raise UsageError("no server is configured; add a section such as [sonarr tv] to the config")
    for name in context.args.instances:
        if name not in known:
            raise UsageError(f"no instance {name!r}; known: {', '.join(known)}")
    chosen = [known[name] for name in dict.fromkeys(context.args.instances or known)]
    with context.recorded("ingest") as (conn, summary):
        lines = ingest_instances(conn, chosen, context.config.repair, context.progress)
        asked = Dispatcher(conn, context.config, applied=False, wait=False)
        asked.ask_failed(line["name"] for line in lines if not line["error"])
        errors = [line["error"] for line in lines if line["error"]]
        code = EXIT_PARTIAL if len(errors) < len(lines) else EXIT_FAILED
        summary.update(instances=lines, exit_code=code if errors else EXIT_OK)
        if errors:
            summary["message"] = "; ".join(errors)
    return summary


def _show_ingest(terminal: Terminal, result: JsonObject) -> None:
    for line in result["instances"]:
        noun = "series" if line["kind"] == "sonarr" else "movies"
        found = f"{line['titles']:,} {noun}, {plural(line['files'], 'file')}, {line['linked']:,} "
        found += f"of them scanned links; {line['removed']:,} gone since the last time"
        if line["files"] and not line["linked"]:
            found += "; is path_map right, and have the roots been scanned?"
        terminal.line(escape(f"{line['name']}: {'failed' if line['error'] else found}"))


def _run_queue(context: Context) -> JsonObject:
    with context.recorded("queue") as (conn, summary):
        summary.update(queue_repairs(conn, context.config), preview=context.args.dry_run)
        if summary["exit_code"] == EXIT_REFUSED:
            count = plural(summary["skipped"]["unreachable"], "broken link")
            summary["message"] = f"{count} not queued, for nobody can judge them now"
    return summary


def _show_queue(terminal: Terminal, result: JsonObject) -> None:
    would = "would be " if result.get("preview") else ""
    for action in result["queued"]:
        what = "would queue" if would else f"queued {action['id']}"
        terminal.line(escape(f"{what} for {_server_of(action['url'])}: {action['related_path']}"))
    words = {
        "no_route": "that no server is known to own",
        "too_recent": "broken for less than min_age",
    }
    skipped = _count_words(result["skipped"], words)
    rest = f"; skipped: {skipped}" if skipped else ""
    terminal.line(f"{plural(len(result['queued']), 'action')} {would}queued{rest}")
    for line in result["waits"]:
        terminal.line(line)


def _run_dispatch(context: Context) -> JsonObject:
    with context.recorded("dispatch", not context.applied) as (conn, summary):
        dispatcher = Dispatcher(conn, context.config, context.applied, not context.args.no_wait)
        dispatcher.deadline = context.deadline
        summary.update(dispatcher.run(context.config.repair.max))
        errors = [action["error"] for action in summary["actions"] if action["error"]]
        if summary["exit_code"] != EXIT_OK and errors:
            summary.setdefault("message", "; ".join(dict.fromkeys(errors)))
    return summary


def _show_dispatch(terminal: Terminal, result: JsonObject) -> None:
    for action in result["actions"]:
        is_told = action["status"] in (FAILED, RETRY)  # on stderr
        said = f": {action['error']}" if action["error"] and not is_told else ""
        line = f"{action['status']:<11}{action['id']} {_server_of(action['url'])}: "
        terminal.line(escape(f"{line}{action['related_path']}{said}"))
    names = (SENT, REPAIRED, FAILED, RETRY, CANCELLED)
    summary = _count_words({name: result[name] for name in names}, {})
    if any(action["status"] == WOULD_SEND for action in result["actions"]):
        summary = f"nothing was sent; {how_to_apply(result)}"
    terminal.line(summary or "nothing is due")


def _run_cinesync(context: Context) -> JsonObject:
    for key, flag in (("base", "base"), ("roots", "root"), ("allowed_targets", "allow-target")):
        if not getattr(context.config.cinesync, key):
            raise UsageError(f"set {key} in [cinesync] of the config, or use --{flag}")

    def relink(conn: sqlite3.Connection, run_id: Optional[int]) -> JsonObject:
        relinker = Relinker(conn, context.config, run_id)
        relinker.any_resolution, relinker.deadline = context.args.any_resolution, context.deadline
        return relinker.run(context.args.accept_shrink)

    return context.record("cinesync", relink)


def _run_verify(context: Context) -> JsonObject:
    """Go by the options or, in a run, the settings."""
    args, config, limit = context.args, context.config, context.config.verify.files
    max_bytes, deadline, tell = 1 << 20, context.deadline, context.terminal.progress
    if args.command == "verify":
        limit, max_bytes = args.max, args.max_bytes
        deadline = time.monotonic() + (args.time_limit or math.inf)
    return context.record(
        "verify", lambda conn, _: verify_links(conn, config.scan, limit, max_bytes, deadline, tell)
    )


def _show_verify(terminal: Terminal, result: JsonObject) -> None:
    for item in result["items"]:
        terminal.line(escape(f"unreadable: {item['path']}"))
        why = f"{item['error']}, since {_minute(item['since'])}"
        terminal.line(escape(f"    -> {item['target']}: {why}"))
    size = f"{result['bytes'] / 1048576:,.1f} MiB"
    tried = f"{plural(result['read'], 'file')} tried, {size} read"
    terminal.line(f"{tried}; {result['unreadable']:,} unreadable")


def _run_undo(context: Context) -> JsonObject:
    args, scan = context.args, context.config.scan
    if args.list:
        with context.database() as conn:
            return {"runs": list_changing_runs(conn)}

    def undo(conn: sqlite3.Connection, run_id: Optional[int]) -> JsonObject:
        return undo_changes(Journal(conn, scan, run_id), args.run, args.path)

    return context.record("undo", undo)


def _show_undo(terminal: Terminal, result: JsonObject) -> None:
    if "runs" not in result:
        _show_relinked(terminal, result)
        return
    for run in result["runs"]:
        what = f"{run['command']}, {plural(run['links'], 'link')}"
        terminal.line(f"{run['run_id']:>6}  {_minute(run['started_utc'])}  {what}")
    if not result["runs"]:
        terminal.line("no run has changed a link")


def _run_retarget(context: Context) -> JsonObject:
    args, scan = context.args, context.config.scan
    if args.allow_target and not any(is_under(args.new, prefix) for prefix in args.allow_target):
        raise UsageError(f"{args.new} lies below no --allow-target")

    def retarget(conn: sqlite3.Connection, run_id: Optional[int]) -> JsonObject:
        return retarget_links(Journal(conn, scan, run_id), args.old, args.new, args.limit)

    return context.record("retarget", retarget)


def _run_prune(context: Context) -> JsonObject:
    args = context.args

    def prune(conn: sqlite3.Connection, run_id: Optional[int]) -> JsonObject:
        journal = Journal(conn, context.config.scan, run_id)
        return prune_links(journal, context.config, args.min_age, args.limit)

    return context.record("prune", prune)


def _show_relinked(terminal: Terminal, result: JsonObject) -> None:
    """Print what became of each link of a cinesync, a retarget, a prune or an undo."""
    counts = Counter(item["result"] for item in result["items"])
    for item in result["items"]:
        terminal.line(escape(f"{item['result']}: {item['path']}"))
        text = item["reason"] or f"-> {item.get('to') or item.get('new_target')}"
        terminal.line(terminal.paint(f"    {escape(text)}", "dim"))
    if "message" in result:
        terminal.line(escape_message(result["message"]))
    done = ", ".join(f"{n:,} {name}" for name, n in sorted(counts.items()))
    if done or "message" not in result:
        terminal.line(done or "no link is broken")
    if any(name.startswith("would") for name in counts):
        terminal.line(f"nothing was changed; {how_to_apply(result)}")
    if result.get("kept"):  # by prune
        words = {"owned": "that a server or the relay can repair", "too_recent": "not old enough"}
        terminal.line(f"kept: {_count_words(dict(sorted(result['kept'].items())), words)}")


def _run_run(context: Context) -> JsonObject:
    """Take every step once, or again and again until somebody ends it."""
    context.require_roots()
    every, count = context.args.every, 0
    if every is None:
        return run_once(context)
    while True:
        started = time.monotonic()
        if count:  # a loss was confirmed once; the next one may be an outage
            context.args.accept_breakage = context.args.accept_shrink = False
            context.args.accept = []
        try:
            with explained_errors(context.db_path):
                result = run_once(context)
        except UsageError:
            raise
        except RefresherrError as exc:  # a lock, a database: the next time it may be free
            log.error("%s", exc)
            result = {"exit_code": exc.exit_code, "message": redact(str(exc))}
        count += 1
        if not context.args.json:
            if log.isEnabledFor(logging.INFO):
                context.terminal.line(f"{utc_now()[:19].replace('T', ' ')} UTC, run {count}")
            _show_run(context.terminal, result)
            context.terminal.out.flush()
        try:
            time.sleep(max(0.0, started + every - time.monotonic()))
        except KeyboardInterrupt:
            return {"runs": count, "last": result, "news": False}


def run_once(context: Context) -> JsonObject:
    """Take every step, and tell who wants to be told; heartbeats before and behind."""
    import uuid

    config, applied, started = context.config, context.applied, time.monotonic()
    timeout, name = min(TELL_TIMEOUT, config.repair.timeout), str(uuid.uuid4())
    if config.run.time_limit:
        context = dataclasses.replace(context, deadline=started + config.run.time_limit)
    handlers = [handler for handler in log.handlers if isinstance(handler, TerminalHandler)]
    for handler in handlers:
        handler.said.clear()
    with context.recorded("run") as (conn, summary):
        for handler in handlers:
            handler.told = set(load_note(conn, "said") or ()) if context.args.quiet else set()
        beats = tell(config.notify, start_calls(name), timeout) if applied else []
        result: JsonObject = {"exit_code": EXIT_FAILED, "text": "it came to no end"}
        try:
            result = take_and_tell(dataclasses.replace(context, conn=conn), summary, timeout)
        except KeyboardInterrupt:
            result, timeout = {"exit_code": EXIT_INTERRUPTED, "text": "interrupted"}, 2.0
            raise
        except RefresherrError as exc:
            result = {"exit_code": exc.exit_code, "text": escape_message(str(exc))}
            raise
        finally:
            seconds, code = time.monotonic() - started, result["exit_code"]
            if applied:
                calls = end_calls(name, code, result["text"], seconds)
                beats += tell(config.notify, calls, timeout)
                note_told(conn, [*beats, *result.get("notified", ())])
            said = {mask_numbers(text) for handler in handlers for text in handler.said}
            with contextlib.suppress(sqlite3.Error):
                save_note(conn, "said", sorted(said))
    return {**result, "heartbeats": beats, "duration_seconds": round(seconds, 3)}


def take_and_tell(context: Context, summary: JsonObject, timeout: float) -> JsonObject:
    """Take every step; tell the media servers what changed, and people what is new."""
    config, applied, conn = context.config, context.applied, context.conn
    assert conn
    before = last_event(conn)
    state: JsonObject = {"last_event": before, "told": [], "left": {}, **load_state(conn)}
    if applied:  # the next run is to know it, should this one be killed
        text = json.dumps({**summary, "state": state})
        conn.execute("UPDATE runs SET summary = ? WHERE run_id = ?", (text, summary["run_id"]))
    steps = take_steps(context)
    changed = changed_links(conn, state["last_event"])
    steps["refresh"] = refresh_all(config, changed, state["left"], steps, applied)
    if config.run.report and not context.args.dry_run:
        steps["report"] = renew_report(conn, config)
    told = state["told"] if applied else load_note(conn, "told in a preview") or []
    shown = {"shown": told, **state}["shown"] if applied else told  # on stdout
    code = combine_exit_codes([s["exit_code"] for s in steps.values() if s["status"] != SKIP])
    note, news = plan_note(conn, before, steps, told, config.notify.when)
    now_open, state["shown"] = still_open(steps, told), still_open(steps, shown)
    calls = note_calls(note, config.notify.ntfy_token) if applied and news else {}
    sent = tell(config.notify, calls, timeout)
    if applied:
        if not sent or not all(line["error"] for line in sent):  # else nobody was reached
            state["told"] = now_open
        left = {line["server"]: line["left"] for line in steps["refresh"].get("servers", ())}
        summary["state"] = {**state, "last_event": last_event(conn), "left": left}
    else:
        save_note(conn, "told in a preview", now_open)
    problems = [f"{what}: {why}".rstrip(": ") for what, why in name_problems(steps).items()]
    message = {"message": "; ".join(problems)} if problems else {}
    end = {"applied": applied, "exit_code": code, **message}
    kept = ("exit_code", "status", "message", "run_id")
    brief = {name: {k: step[k] for k in kept if k in step} for name, step in steps.items()}
    summary.update(brief, **end)
    return {
        "over": sorted({*shown} - {*state["shown"]}), "run_id": summary.get("run_id"),
        "notified": sent, "news": plan_note(conn, before, steps, shown, config.notify.when)[1],
        **steps, **end, "text": f"{note.title}\n{note.text}",
    }  # fmt: skip


def take_steps(context: Context) -> Dict[str, JsonObject]:
    """Take one step after the other and return their results; one that fails stops no other."""
    steps: Dict[str, JsonObject] = {}
    with contextlib.ExitStack() as stack:
        for name in STEPS:
            if name == "cinesync" and not (context.applied or context.args.dry_run):
                # A preview from here on: what it queues is not to be sent by a later dispatch.
                scratch = stack.enter_context(scratch_database(context.db_path))
                args = argparse.Namespace(**{**vars(context.args), "dry_run": True})
                context = dataclasses.replace(context, conn=scratch, args=args)
            started = time.monotonic()
            steps[name] = take_step(name, context, steps)
            steps[name].setdefault("status", EXIT_WORDS[steps[name]["exit_code"]])
            steps[name].setdefault("duration_seconds", round(time.monotonic() - started, 3))
    return steps


def take_step(name: str, context: Context, before: Mapping[str, JsonObject]) -> JsonObject:
    """Take one step, if there is reason to."""
    assert context.conn
    stale = find_stale(context.conn, context.config, time.time()) if name == "ingest" else []
    reason = why_skip(name, context, stale, before)
    if reason:
        return {"exit_code": EXIT_OK, "status": SKIP, "message": reason}
    defaults = {"instances": stale, "exit_code": False, "forget_mount": []}
    args = argparse.Namespace(**{**vars(context.args), **defaults})
    try:
        if time.monotonic() > context.deadline:
            raise RefresherrError("no time is left for it", EXIT_PARTIAL)
        step = {"exit_code": EXIT_OK, **COMMANDS[name].run(dataclasses.replace(context, args=args))}
        say_why(step)
        return note_dry_run(step, context)
    except RefresherrError as exc:
        if name == "scan" and isinstance(exc, UsageError):
            raise
        log.error("%s: %s", name, exc)
        return {"exit_code": exc.exit_code, "message": redact(str(exc))}


def why_skip(
    name: str, context: Context, stale: Sequence[str], before: Mapping[str, JsonObject]
) -> str:
    """Return why a step of a run is not taken, '' if it is."""
    config, roots = context.config, context.config.cinesync.roots
    assert context.conn
    set_up = {"verify": config.verify.files, "cinesync": config.cinesync.base}
    servers = config.instances or (name != "ingest" and config.relay.base)
    if getattr(context.args, f"no_{name}", False):
        return "as asked"
    if not set_up.get(name, True):
        return "not configured"
    if name in ("ingest", "queue", "dispatch") and not servers:
        return "no server is configured"
    if name == "ingest":
        return "" if stale else "all servers were read lately"
    if name != "scan" and before["scan"]["exit_code"] == EXIT_FAILED:
        return "the scan failed"
    if name == "cinesync" and roots and not find_repairable(context.conn, roots):
        return "nothing is broken"
    return ""


def renew_report(conn: sqlite3.Connection, config: Config) -> JsonObject:
    """Write the report that [run] asks for."""
    result: JsonObject = {"exit_code": EXIT_OK}
    try:
        result.update(write_report(conn, config, config.run.report))
    except RefresherrError as exc:
        result.update(exit_code=EXIT_PARTIAL, message=str(exc))
        say_why(result)
    return {**result, "status": EXIT_WORDS[result["exit_code"]]}


def refresh_all(
    config: Config, changed: Sequence[str], left: JsonObject, steps: Mapping[str, JsonObject],
    applied: bool,
) -> JsonObject:  # fmt: skip
    """Tell every media server what changed, or was left the last time: Jellyfin and Emby the links
    themselves, since the folder of a film is no item there, Plex their directories.
    """
    servers = []
    plans = [i["path"] for i in steps["cinesync"].get("items", ()) if i["result"] == WOULD_REPLACE]
    links = [*changed, *plans]
    for name in ("plex", "jellyfin", "emby"):
        settings = getattr(config, name)
        news = map(os.path.dirname, links) if name == "plex" else links
        directories = sorted({*news, *left.get(name, ())})
        if settings.url and directories:
            told = {"server": name, "directories": directories, "left": [], "error": None}
            timeout = min(config.repair.timeout, MEDIA_LIMIT / 2)
            servers.append(refresh_media(name, settings, directories, timeout) if applied else told)
    if not servers:
        return {"exit_code": EXIT_OK, "status": SKIP, "message": "nothing to tell"}
    errors = [str(line["error"]) for line in servers if line["error"]]
    for error in errors:
        log.error("%s", error)
    code = EXIT_PARTIAL if errors else EXIT_OK
    told = {"status": EXIT_WORDS[code], "servers": servers, "message": "; ".join(errors)}
    return {"exit_code": code, **told}


def _show_run(terminal: Terminal, result: JsonObject) -> None:
    """Print what came of each step; with -q only of a run that has something to tell."""
    if "runs" in result:
        terminal.line(f"ended after {plural(result['runs'], 'run')}")
        return
    if not (result.get("news", True) or log.isEnabledFor(logging.INFO)):
        return
    for name in STEPS:
        step = result.get(name, {})
        if set(step) - {"exit_code", "status", "message", "duration_seconds"}:  # what it did
            terminal.line(terminal.paint(name, "bold"))
            COMMANDS[name].show(terminal, step)
        elif step:
            said = escape(f"{step['status']}: {step['message']}")
            terminal.line(f"{terminal.paint(name, 'bold')}: {said}")
    for line in result.get("refresh", {}).get("servers", ()):
        count = len(line["directories"])
        words = "told" if result["applied"] else "would be told"
        noun = "links" if line["server"] != "plex" else "directories"
        later = f"; {len(line['left']):,} wait for the next run" if line["left"] else ""
        terminal.line(f"{line['server']}: {words} about {count:,} {noun}{later}")
    told = [line["name"] for line in result.get("notified", ()) if not line["error"]]
    if told:
        terminal.line(f"notified: {', '.join(told)}")
    for problem in result.get("over", ()):
        terminal.line(escape(f"no longer: {problem}"))
    if not result.get("applied", True):
        terminal.line(f"a preview: no link and no server was changed; {how_to_apply(result)}")


STEPS = ("scan", "verify", "ingest", "cinesync", "queue", "dispatch")


def _run_actions(context: Context) -> JsonObject:
    args = context.args
    if args.action == "list":
        with context.database() as conn:
            rows = list_actions(conn, args.status, args.ids)
        return {"action": args.action, "actions": rows, "count": len(rows)}
    every = args.failed if args.action == "retry" else args.all
    if bool(args.ids) == every:
        option = "--failed" if args.action == "retry" else "--all"
        raise UsageError(f"actions {args.action} takes the numbers of actions, or {option}")
    with context.recorded(f"actions {args.action}") as (conn, summary):
        change = retry_actions if args.action == "retry" else cancel_actions
        rows = list_actions(conn, None, change(conn, args.ids))
        summary.update(action=args.action, actions=rows, count=len(rows))
        if len(rows) < len(args.ids):
            summary["exit_code"] = EXIT_PARTIAL
            summary["message"] = "not all of these can be changed: see `actions list`"
    return summary


def _show_actions(terminal: Terminal, result: JsonObject) -> None:
    for row in result["actions"]:
        line = f"{row['id']:>6} {row['status']:<10}{_server_of(row['url'] or '')}: "
        terminal.line(escape(line + (row["related_path"] or row["url"] or "")))
        if row["last_error"]:
            terminal.line(f"       {escape_message(row['last_error'])}")
    terminal.line(plural(result["count"], "action"))


def _show_text(terminal: Terminal, result: JsonObject) -> None:
    terminal.out.write(result.get("text", ""))


def _run_stats(context: Context) -> JsonObject:
    args = context.args
    with context.database() as conn:
        result = collect_stats(conn, context.config, args.top)
    style = "json" if args.json else args.format
    if style == "json":
        text = json.dumps(result, indent=2) + "\n"
    elif style == "prometheus":
        text = format_prometheus(result)
    else:
        text = "\n".join(format_stats(result, context.terminal)) + "\n"
    if args.output not in (None, "-"):
        write_file(args.output, text, 0o644 if style == "prometheus" else 0o600)
        log.info("wrote %s", args.output)
    elif not args.json:
        result["text"] = text
    return result


def _run_report(context: Context) -> JsonObject:
    file = context.args.output or os.path.join(os.path.dirname(context.db_path), "report.html")
    if file == "-" and context.args.json:
        raise UsageError("--json and `--output -` cannot both have stdout")
    with context.database() as conn:
        return write_report(conn, context.config, file)


def write_report(conn: sqlite3.Connection, config: Config, file: str) -> JsonObject:
    """Write the report to a file, '-' for none; return what `report --json` shows, and its text."""
    report = collect_report(conn, config, time.time())
    text = format_report(report)
    counts = {"links": report["count"], "shown": len(report["links"])}
    if file == "-":
        return {"text": text, **counts}
    write_file(file, text)
    return {"file": os.path.abspath(file), "size_bytes": os.path.getsize(file), **counts}


def _show_report(terminal: Terminal, result: JsonObject) -> None:
    if "text" in result:
        terminal.out.write(result["text"])
    else:
        terminal.line(f"{escape(result['file'])}: {result['size_bytes'] / 1024:,.0f} KiB")


def format_stats(stats: JsonObject, terminal: Terminal) -> List[str]:
    """Return the statistics as lines, with small bars; what has nothing to show is left out."""
    links, last, relinked = stats["symlinks"], stats["last_scan"], stats["last_cinesync"]
    media, database, lines = stats["media"], stats["database"], []

    def bar(value: int, whole: int, width: int, style: str) -> str:
        hashes = "#" * max(1, round(width * value / whole)) if value else ""  # never invisible
        return terminal.paint(hashes, style)

    def show(title: str, rows: Iterable[str]) -> None:
        found = [f"  {row}" for row in rows]
        lines.extend(["", terminal.paint(title, "bold"), *found] if found else [])

    styles = {OK: "green", BROKEN: "red", UNREACHABLE: "yellow", MISSING: "dim"}
    bars = {status: bar(links[status], links["total"], 30, styles[status]) for status in STATUSES}
    counts = [f"{status:<12}{links[status]:>10,}  {bars[status]}".rstrip() for status in STATUSES]
    show("Links", [*counts, f"{'total':<12}{links['total']:>10,}"])
    most = max((entry["count"] for entry in stats["top_broken"]), default=0)
    show("Most broken", (
        f"{e['count']:>6,}  {bar(e['count'], most, 10, 'red')}  {escape(e['directory'])}"
        for e in stats["top_broken"]))  # fmt: skip
    actions = [f"{escape(s):<12}{n:>10,}" for s, n in sorted(stats["actions"].items())]
    show("Actions", actions + [
        f"{escape(name)}: {', '.join(f'{n:,} {key}'.replace('_', ' ') for key, n in row.items())}"
        for name, row in stats["repairs"]["instances"].items()])  # fmt: skip
    rows = [f"{name.replace('_', ' '):<14}{n:>8,}" for name, n in media.items()]
    show("Media", rows if any(media.values()) else [])
    rows = [f"{_minute(last['started'])}, {last['status']}"] if last else []
    if last and last["guard"].get("tripped"):
        rows.append(f"guard: {escape(last['guard']['reason'])}")
    show("Last scan", rows or ["never; `scan DIR` makes one"])
    if relinked:
        numbers = [f"{relinked[name] or 0:,} {name}" for name in ("replaced", "skipped", "errors")]
        when = _minute(relinked["started"])
        show("Last CineSync run", [f"{when}, {relinked['status']}: {', '.join(numbers)}"])
    size = f"{database['size_bytes'] / 1048576:.1f} MiB"
    show("Database", [f"{escape(database['path'])}, {size}, {database['journal_mode']}"])
    return lines[1:]


def _is_placed(context: Context) -> bool:
    """Tell whether the command line says where the database is."""
    return bool(context.args.db or getattr(context.args, "refresherr.data_dir"))


def _run_doctor(context: Context) -> JsonObject:
    config, serious = context.config, bool(context.config_error)
    findings = [*examine_runtime(), *examine_config(config, context.config_error)]
    if context.config_error and not _is_placed(context):  # where the database is, nobody knows
        return {"findings": [f._asdict() for f in findings], "exit_code": EXIT_FAILED}
    is_there = os.path.exists(context.db_path)
    try:
        with context.database() if is_there else scratch_database(context.db_path) as conn:
            cure = f"`{started_as()} scan DIR` makes it; or name its directory with --data-dir"
            absent = Finding("database", "failed", f"there is none at {context.db_path}", cure)
            database = [*examine_database(conn)] if is_there else [absent]
            serious = serious or any(finding.state == "failed" for finding in database)
            findings += database
            findings += examine_time(conn, time.time(), format_cron_line(context))
            findings += examine_library(config, conn)
            findings += examine_servers(config, conn)
            if context.args.notify:
                calls, timeout = trial_calls(config.notify.ntfy_token), config.repair.timeout
                note_told(conn, tell(config.notify, calls, min(TELL_TIMEOUT, timeout)))
            findings += examine_notifiers(config, conn)
    except RefresherrError as exc:  # the other one is that of a worker which came to grief
        name = "database" if isinstance(exc, DatabaseError) else "library"
        serious = serious or name == "database"
        findings.append(Finding(name, "failed", str(exc)))
    findings += examine_relay(config)
    findings += examine_media_servers(config)
    failed = any(finding.state == "failed" for finding in findings)
    code = EXIT_FAILED if serious else EXIT_PARTIAL if failed else EXIT_OK
    return {"findings": [finding._asdict() for finding in findings], "exit_code": code}


def format_cron_line(context: Context) -> str:
    """Return a crontab's line for `run --apply`; there, % is a newline unless escaped."""
    file = context.config.file
    if not context.config.scan.roots:
        return ""  # it would have nothing to do
    words = [sys.executable, os.path.abspath(sys.argv[0]), "-q"]
    words += ["--config", os.path.abspath(file)] if file else []
    words += ["--db", context.db_path] if _is_placed(context) or not file else []
    return "*/30 * * * * " + " ".join(map(shell_quote, [*words, "run", "--apply"])).replace(
        "%", "\\%"
    )


def _show_doctor(terminal: Terminal, result: JsonObject) -> None:
    styles = {"ok": "green", "warning": "yellow", "failed": "red"}
    for finding in result["findings"]:
        state = terminal.paint(f"{finding['state']:<8}", styles[finding["state"]])
        terminal.line(state + escape_message(f"{finding['name']}: {finding['detail']}"))
        if finding["advice"]:
            terminal.line(f"        -> {escape_message(finding['advice'])}")
        if finding["line"]:
            terminal.line(f"        {escape_message(finding['line'])}")
    count = Counter(finding["state"] for finding in result["findings"])
    terminal.line(", ".join(f"{count[state]} {state}" for state in styles))


def _run_db(context: Context) -> JsonObject:
    args, path, roots = context.args, context.db_path, context.config.scan.roots
    if (args.file is not None) != (args.action == "backup"):
        raise UsageError("db backup takes the FILE to write; the other db commands take none")
    if args.dry_run and args.action != "prune":
        raise UsageError("only db prune knows --dry-run")
    if args.action == "nuke" and not args.yes:
        raise UsageError(f"db nuke deletes all history in {path}; confirm it with --yes")
    if args.action == "prune" and not roots:
        raise UsageError("db prune needs roots in [scan]: they say what belongs to the library")
    result: JsonObject = {"action": args.action, "path": path}
    if args.action == "path":
        return result
    with contextlib.ExitStack() as stack:
        context.require_database()
        if args.action in ("nuke", "prune"):
            stack.enter_context(process_lock(path, args.lock_wait, f"db {args.action}"))
        if args.action == "nuke":
            _nuke(path)
            return result
        conn = stack.enter_context(context.database())
        if args.action == "backup":
            result["file"] = os.path.abspath(args.file)
            backup_database(conn, result["file"], fresh=True)
        elif args.action == "prune":
            result["directories"] = find_strays(conn, roots)
            if not args.dry_run:
                forget_strays(conn, roots)
            result.update(removed=sum(result["directories"].values()), applied=not args.dry_run)
        else:
            findings = [row[0] for row in conn.execute("PRAGMA integrity_check(20)")]
            healthy = findings == ["ok"]
            result.update(ok=healthy, findings=[] if healthy else findings)
            result["exit_code"] = EXIT_OK if healthy else EXIT_FAILED
    return result


def _nuke(path: str) -> None:
    """Start the database anew; what cannot be opened any more is moved aside, not deleted."""
    try:
        with contextlib.closing(get_connection(path)) as conn:
            nuke_database(conn, confirm=True)
    except DatabaseError as exc:
        if type(exc.__cause__) is not sqlite3.DatabaseError:  # it is not damaged
            raise
        aside = f"{path}.damaged-{int(time.time())}"
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(path + suffix, aside + suffix)
        log.warning("the damaged database was moved to %s", aside)
        open_database(path).close()


def _show_db(terminal: Terminal, result: JsonObject) -> None:
    forgotten = "forgotten" if result.get("applied") else "would be forgotten"
    done = {
        "path": "",
        "nuke": ": empty again",
        "backup": f" copied to {escape(result.get('file', ''))}",
        "check": ": ok" if result.get("ok") else ": damaged",
        "prune": f": {plural(result.get('removed', 0), 'link')} {forgotten}",
    }
    terminal.line(escape(result["path"]) + done[result["action"]])
    places = [f"{count:,} beneath {d}" for d, count in result.get("directories", {}).items()]
    for finding in result.get("findings", places):
        terminal.line(f"    {escape(finding)}")


def _run_config(context: Context) -> JsonObject:
    action, config = context.args.action, context.config
    if action == "sample":
        return {"action": action, "sample": format_sample_config()}
    if action == "show":
        return {"action": action, **config_to_json(config)}
    faults = find_keyless(config)
    absent = [f"{root} does not exist" for root in config.scan.roots if not os.path.lexists(root)]
    for text in absent:
        log.warning("[scan] roots: %s", text)
    return {
        "action": action, "file": config.file or None, "faults": faults,
        "exit_code": EXIT_USAGE if faults else EXIT_OK, "warnings": [*config.warnings, *absent],
        "message": "; ".join(faults),
    }  # fmt: skip


def _show_config(terminal: Terminal, result: JsonObject) -> None:
    """Print settings in the form of the file."""
    if result["action"] == "sample":
        terminal.out.write(result["sample"])
    elif result["action"] == "check":
        state = "see above" if result["faults"] else "ok"
        terminal.line(f"{escape(result['file'] or 'no config file; the defaults')}: {state}")
    else:
        terminal.line(f"; {escape(result['file'] or 'no config file')}")
        for section, settings in result["settings"].items():
            is_server = section not in SECTIONS
            terminal.line(f"[{section.replace('_', ' ', 1) if is_server else section}]")
            parsers = {field.name: field.metadata["parse"] for field in _fields(section)}
            for key, value in settings.items():
                terminal.line(f"{key} = {escape(format_setting(parsers[key], value))}".rstrip())


def _run_help(context: Context) -> JsonObject:
    if context.args.command == "version":
        return {"text": f"refresherr {__version__}\n"}
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        build_parser().parse_args([*context.args.topic, "--help"])
    return {"text": out.getvalue()}


def _run_completion(context: Context) -> JsonObject:
    """Print what makes a shell complete commands, and the options of the one that was typed."""

    def words(options: Iterable[Option]) -> str:
        found = ((*filter(re.compile("-").match, n), *m.get("choices", ())) for n, m in options)
        return " ".join(itertools.chain(*found))

    first, programs = " ".join(COMMANDS), "refresherr refresherr.pyz refresherr.py"
    cases = {c.names: words((*c.options, *GLOBAL_OPTIONS)) for c in TABLE}
    if context.args.shell == "fish":
        seen = ((f"seen_subcommand_from {n}", w) for n, w in cases.items())
        rows = [("use_subcommand", f"{first} {words(GLOBAL_OPTIONS)}"), *seen]
        line = "complete -c {} -n '__fish_{}' -a '{}'\n"
        return {"text": "".join(line.format(p, *row) for p in programs.split() for row in rows)}
    rules = "\n".join(f"{n.replace(' ', '|')}) words='{w}'; break;;" for n, w in cases.items())
    zsh = "autoload -U compinit bashcompinit && compinit && bashcompinit\n"
    return {"text": zsh * (context.args.shell == "zsh") + f"""_refresherr() {{
local word words='{first} {words(GLOBAL_OPTIONS)}'
for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do case $word in\n{rules}\nesac; done
COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _refresherr {programs}
"""}  # fmt: skip


Option = Tuple[Tuple[str, ...], Dict[str, Any]]


def option(spec: str, text: str = "", kind: Any = None, **details: Any) -> Option:
    """Return one argument of a command, as argparse takes it.

    '-n --dry-run' is a switch, '--max N' takes a value, '--root DIR...' many, 'run [RUN]' stands
    by itself.  `kind` parses a value, or names the settings that it stands for: 'section.key'.
    """
    *names, value = spec.split()
    if value.startswith("-"):
        return (*names, value), {"action": "store_true", "help": text, **details}
    if isinstance(kind, str):
        details["dest"], (section, key) = kind, kind.split()[0].split(".")
        field = next(field for field in _fields(section) if field.name == key)
        kind = field.metadata["parse"]
        kind = parse_path if kind is parse_own_path else kind  # relative ones as well, in a shell
        text += f"; default: {format_setting(kind, field.default)}" if field.default else ""
        kind = parse_path if value == "DIR" else kind  # it may begin where one stands
    if value.endswith("...") and spec.startswith("-"):
        details.update(action="append", default=[])
    elif value[-1] in ".]":
        details["nargs"] = "*" if value.endswith("...") else "?"
    if "choices" not in details:
        details["metavar"] = value.strip("[.]")

    def parse(word: str) -> Any:
        try:
            return kind(word)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"{word!r}: {exc}") from exc

    return tuple(names), {"type": parse if kind else None, "help": text, **details}


class Command(NamedTuple):
    """One row of the table of commands."""

    names: str  # and the alias
    help: str
    run: Callable[[Context], JsonObject]
    show: Callable[[Terminal, JsonObject], None]
    options: Sequence[Option]

    @property
    def name(self) -> str:
        return self.names.split()[0]


# fmt: off
DRY_RUN = option("-n --dry-run", "change nothing at all")
APPLY = option("--apply", "do it; without it, say what would be done")
SCAN = (
    option("scan.roots ROOT...", "in place of those configured", parse_path),
    option("--workers N", "look-ups at once on a slow mount; default: auto", "scan.workers"),
    option("--accept DIR...",
        "confirm that what an earlier scan held beneath DIR is really gone", parse_path),
    option("--accept-breakage", "confirm all that was held"),
    option("--full", "read every directory, changed or not"))
WAITS = (
    option("--min-age DURATION", "broken for at least so long", "repair.min_age"),
    option("--patience DURATION", "after a loss of many titles, wait at most so long; 0 does not "
        "wait for that", "repair.patience"))
DISPATCH = (
    option("--max N", "send no more than N", "repair.max"),
    option("--timeout SECONDS", "for one request", "repair.timeout"),
    option("--no-wait", "do not follow the servers' searches"))
CINESYNC = (
    option("--any-resolution", "SD for HD, or 2160p, will do"),
    option("--accept-shrink", "CineSync's library may have shrunk"),
    option("--base DIR", "CineSync's own tree of links", "cinesync.base"),
    option("--root DIR...", "where broken links may be replaced", parse_path,
        dest="cinesync.roots"),
    option("--allow-target PREFIX...", "where new targets may lie", parse_path,
        dest="cinesync.allowed_targets"))
TABLE = (
    Command("scan", "walk the roots, judge every symlink, record it", _run_scan, _show_scan, (
        *SCAN,
        option("--exit-code", "exit with 10 if links are broken"),
        option("--forget-mount DIR...", "a mount point that moved, or changed its type, for good",
            parse_path),
        DRY_RUN)),
    Command("broken", "list links that need attention", _run_broken, _show_broken, (
        option("--limit N", "show no more than N", parse_count),
        option("--links", "name every link and its target"),
        option("--owner INSTANCE", "only those of this server, or 'none'"),
        option("--root DIR", "only those beneath this directory", parse_path),
        option("--path TEXT", "only paths that contain this"),
        option("--status STATUS", "default: attention, all that needs a person or waits for a "
            "repair", choices=(ATTENTION, *STATUSES[1:], UNREADABLE), default=ATTENTION))),
    Command("ingest", "read movies, series and files from Sonarr and Radarr",
        _run_ingest, _show_ingest, (
        option("instances INSTANCE...", "in place of all"), DRY_RUN)),
    Command("queue queue-repairs", "turn confirmed broken links into actions",
        _run_queue, _show_queue, (
        option("--limit N", "queue no more than N", "repair.limit"), *WAITS, DRY_RUN)),
    Command("dispatch process-actions", "carry out pending actions",
        _run_dispatch, _show_dispatch, (*DISPATCH, APPLY, DRY_RUN)),
    Command("actions", "look at and mend the queue", _run_actions, _show_actions, (
        option("action [ACTION]", choices=("list", "retry", "cancel"), default="list"),
        option("ids ID...", "the numbers of actions", parse_count),
        option("--status STATUS", "list: only those"),
        option("--failed", "retry: all that failed"),
        option("--all", "cancel: all that are pending"), DRY_RUN)),
    Command("cinesync cinesync-repair", "relink broken links to CineSync's copies",
        _run_cinesync, _show_relinked, (
        option("--limit N", "try no more than N links", "cinesync.limit"),
        *WAITS, *CINESYNC, APPLY, DRY_RUN)),
    Command("retarget", "point links to the place where their files have moved",
        _run_retarget, _show_relinked, (
        option("old OLD", "where their targets lay", parse_path),
        option("new NEW", "where the same files lie now", parse_path),
        option("--limit N", "change no more than N links", parse_count),
        option("--allow-target PREFIX...", "refuse a NEW that does not lie below it", parse_path),
        APPLY, DRY_RUN)),
    Command("prune", "remove broken links that nobody can repair", _run_prune, _show_relinked, (
        option("--min-age DURATION", "broken for at least so long; default: 30d", parse_duration,
            default=PRUNE_AGE),
        option("--limit N", "remove no more than N links", parse_count), APPLY, DRY_RUN)),
    Command("verify", "read a little of the files behind good links: are they really there?",
        _run_verify, _show_verify, (
        option("scan.roots ROOT...", "only beneath these", parse_path),
        option("--max N", "so many files; default: 200", parse_count, default=200),
        option("--max-bytes SIZE", "no more than that of a file; default: 1M", parse_size,
            default=1 << 20),
        option("--time-limit DURATION", "begin no file after this long", parse_duration),
        DRY_RUN)),
    Command("undo", "put links back as they were before a run", _run_undo, _show_undo, (
        option("run [RUN]", "default: the last", parse_count),
        option("--list", "the runs that can be put back"),
        option("--path LINK...", "only this link", parse_path), APPLY, DRY_RUN)),
    Command("run", "all: scan, verify, ingest, cinesync, queue, dispatch, refresh, notify",
        _run_run, _show_run, (
        *SCAN, *WAITS, *CINESYNC, *DISPATCH,
        option("--limit N", "relink no more than N links, queue no more than N actions",
            parse_count, dest="cinesync.limit repair.limit"),
        option("--no-ingest", "do not read the servers"),
        option("--no-cinesync", "do not relink"),
        option("--time-limit DURATION", "begin nothing more after this long", "run.time_limit"),
        option("--every DURATION", "stay, and run so often", parse_interval), APPLY, DRY_RUN)),
    Command("stats db-stats", "counts, worst directories, queue, media, database",
        _run_stats, _show_text, (
        option("--top N", "so many directories", parse_count, default=10),
        option("--format FORMAT", choices=("text", "json", "prometheus"), default="text"),
        option("--output FILE", "write there, whole or not at all"))),
    Command("report", "one self-contained HTML page with charts", _run_report, _show_report, (
        option("--output FILE", "default: report.html beside the database"),)),
    Command("doctor", "check all that a scan and a repair depend on", _run_doctor, _show_doctor, (
        option("--notify", "send a test to every notifier"),)),
    Command("db", "look after the database", _run_db, _show_db, (
        option("action ACTION", "prune: forget what lies below no configured root",
            choices=("path", "check", "backup", "prune", "nuke")),
        option("file [FILE]", "for backup"),
        option("--yes", "nuke: yes, delete everything"), DRY_RUN)),
    Command("help", "explain a command", _run_help, _show_text, (
        option("topic COMMAND..."),)),
    Command("version", "print the version", _run_help, _show_text, ()),
    Command("completion", "print the completion of commands for a shell",
        _run_completion, _show_text, (
        option("shell SHELL", choices=("bash", "zsh", "fish")),)),
    Command("config", "effective settings, redacted; a commented sample",
        _run_config, _show_config, (
        option("action ACTION", choices=("show", "check", "sample")),)),
)
COMMANDS = {command.name: command for command in TABLE}
GLOBAL_OPTIONS = (
    option("--config FILE", "the config file"),
    option("--db FILE", "the database file"),
    option("--data-dir DIR", "where the database lives", "refresherr.data_dir"),
    option("--json", "one JSON object on stdout"),
    option("-v --verbose", "say more; -vv with tracebacks"),
    option("-q --quiet", "say less; run tells what lasts once, and its end once"),
    option("--no-color", "no colours"),
    option("--log-file FILE", "append all messages there, too"),
    option("--lock-wait SECONDS", "wait that long for another run to end", parse_duration),
)
OPTIONS = [*GLOBAL_OPTIONS, *(row for command in TABLE for row in command.options)]
# fmt: on


class Parser(argparse.ArgumentParser):
    """An argument parser that raises in place of exiting."""

    def error(self, message: str) -> Any:
        unknown = re.match(r"argument COMMAND: .*?'(.*?)'", message)
        if unknown:
            message = f"no command {unknown[1]!r}{_nearest(unknown[1], COMMANDS)}"
        elif message.startswith("unrecognized arguments: --"):
            message += "; this command has no such option"
        raise UsageError(f"{message}; see: {self.prog} --help")


def build_parser() -> Parser:
    """Return the parser for the table of commands; global options stand before or behind them."""
    shared = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for names, details in GLOBAL_OPTIONS:
        shared.add_argument(*names, **details)
    shared.add_argument("--version", action="version", version=f"refresherr {__version__}")
    parser = Parser(
        prog=started_as(),
        description="Finds dead media symlinks and has them repaired; never harms a healthy one.",
        epilog="`help COMMAND` tells more. Without --apply nothing but the database is changed.",
        allow_abbrev=False,
        parents=[shared],
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in TABLE:
        text = f"{command.help[0].upper()}{command.help[1:]}."
        sub = commands.add_parser(
            command.name, aliases=command.names.split()[1:], help=command.help, description=text,
            allow_abbrev=False, parents=[shared],
        )  # fmt: skip
        for names, details in command.options:
            sub.add_argument(*names, **details)
        sub.set_defaults(command=command.name)
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments.  UsageError; SystemExit after --help and --version."""
    known = sorted({name for names, _ in OPTIONS for name in names if name[:2] == "--"})
    for word in argv[: argv.index("--") if "--" in argv else None]:
        name = word.partition("=")[0]
        if name[:2] == "--" and name not in (*known, "--help", "--version"):
            near = _nearest(name, known)
            hint = near if "mean" in near else f"; see: {started_as()} --help"
            raise UsageError(f"no option {name}{hint}")
    unset: JsonObject = {"dry_run": False, "apply": False, "lock_wait": 0.0}
    for names, details in GLOBAL_OPTIONS:  # a default of their own would undo what stands before
        unset.setdefault(details.get("dest", names[-1][2:].replace("-", "_")))
    args = build_parser().parse_args(argv, argparse.Namespace(**unset))
    if args.command is None:
        raise UsageError(f"no command given; begin with: {started_as()} scan DIR; see also: --help")
    return args


def open_log_file(file: str) -> TextIO:
    """Open a file to append to, 0600.  RefresherrError where that must not or cannot be."""
    refuse_output(file)
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(file, flags, 0o600)
        return open(descriptor, "a", 1, encoding="utf-8", errors="backslashreplace")
    except OSError as exc:
        raise RefresherrError(f"cannot write the log file {file}: {exc.strerror}") from exc


def load_context(
    args: argparse.Namespace, terminal: Terminal, environ: Mapping[str, str]
) -> Context:
    """Read the configuration and return what the command works with."""
    flags: Dict[Tuple[str, str], Any] = {}
    for dest, value in vars(args).items():
        for section, _, key in (name.partition(".") for name in dest.split()):
            if key and value not in (None, []):
                flags[section, key] = tuple(value) if isinstance(value, list) else value
    error = ""
    try:
        file = find_config_file(args.config, environ, sys.argv[0] or ".")
        config = load_config(file, environ, flags)
    except UsageError as exc:
        by_itself = args.command in ("doctor", "help", "version", "completion")
        if not by_itself and getattr(args, "action", "") != "sample":
            raise
        error, config = str(exc), load_config(None, {}, flags)
    if args.log_file:
        for handler in log.handlers:
            if isinstance(handler, TerminalHandler):
                handler.file = open_log_file(args.log_file)
    level = getattr(logging, config.refresherr.log_level.upper())
    log.setLevel(logging.DEBUG if args.verbose else logging.WARNING if args.quiet else level)
    for warning in config.warnings if args.command != "doctor" else ():
        log.warning("%s", warning)
    return Context(args, config, terminal, error)


def attempt_command(
    argv: Sequence[str], terminal: Terminal
) -> Tuple[JsonObject, Callable[[], None]]:
    """Run one command, and return its result and what shows it.

    The one place that turns what stops a command into a result.
    """
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):  # --help and --version print by themselves
            args = parse_arguments(argv)
        context = load_context(args, terminal, os.environ)
        with explained_errors(context.db_path):
            result: JsonObject = {"exit_code": EXIT_OK, **COMMANDS[args.command].run(context)}
        note_dry_run(result, context)
        if args.command != "run":  # whose steps have said it
            say_why(result)
        return result, lambda: COMMANDS[args.command].show(terminal, result)
    except SystemExit as exc:
        result = {"exit_code": exc.code, "text": text.getvalue()}
        return result, lambda: _show_text(terminal, result)
    except BrokenPipeError:
        raise  # nobody reads what --every prints
    except (Exception, KeyboardInterrupt) as exc:
        code = EXIT_FAILED
        message = f"internal error: {type(exc).__name__}: {exc}; run it with -vv and report it"
        if isinstance(exc, KeyboardInterrupt):
            code, message = EXIT_INTERRUPTED, "interrupted; what was recorded stays"
        elif isinstance(exc, RefresherrError):
            code, message = exc.exit_code, str(exc)
        log.error("%s", message, exc_info=code not in (EXIT_USAGE, EXIT_LOCKED))
        return {"exit_code": code, "message": redact(message)}, lambda: None


def restart_in_utf8() -> None:
    """Start anew where Python does not read file names as UTF-8: they are bytes, and a link must
    not go by a second name because cron has another locale than the shell.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name != "utf-8" and os.path.isfile(sys.argv[0]):
        words = getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *words])


def say_why(result: JsonObject) -> None:
    """Say what made the exit status of a command other than 0, as far as it was not said yet."""
    if result["exit_code"] not in (EXIT_OK, EXIT_BROKEN):
        said = [text for handler in log.handlers for text in getattr(handler, "said", ())]
        parts = map(escape_message, result.get("problems", result.get("message", "").split("; ")))
        for part in dict.fromkeys(filter(None, parts)):
            if not any(part in text for text in said):
                log.warning("%s", part)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the program and return its exit status."""
    if argv is None:
        restart_in_utf8()
    argv = list(sys.argv[1:] if argv is None else argv)
    out, err = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    for stream in (out, err):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    dumb = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    plain = bool(dumb or "--no-color" in argv)
    quiet = plain or not {"--json", "-q", "--quiet"}.isdisjoint(argv)
    terminal = Terminal(out, err, colour=not plain, progress=not quiet)
    tracebacks = any(re.fullmatch("-v{2,}", word) for word in argv) or argv.count("-v") > 1
    log.handlers[:] = [TerminalHandler(terminal, tracebacks)]  # on stderr and nowhere else
    log.propagate = False
    log.setLevel(logging.INFO)
    previous = None
    if threading.current_thread() is threading.main_thread():
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result, show = attempt_command(argv, terminal)
        terminal.clear()
        if "--json" in argv:
            out.write(format_envelope(argv, result))
        else:
            show()
        out.flush()
        return int(result["exit_code"])
    except BrokenPipeError:
        _discard(out)  # whoever read our output has had enough
        return EXIT_OK
    except OSError as exc:
        log.error("cannot write the output: %s", exc.strerror)
        _discard(out)
        return EXIT_FAILED
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def format_envelope(argv: Sequence[str], result: JsonObject) -> str:
    """Return the one JSON object of --json."""
    names = {name: command.name for command in TABLE for name in command.names.split()}
    code = result["exit_code"]
    command = next((names[word] for word in argv if word in names), "")
    head = {"command": command, "version": __version__, "exit_code": code}
    return json.dumps({**head, "status": EXIT_WORDS[code], **result}, indent=2) + "\n"


def _discard(stream: TextIO) -> None:
    """Have what is still buffered go nowhere, so that the exit does not fail on it again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
