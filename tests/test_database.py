"""The schema to the letter, every old database migrated unharmed, and no write ever lost."""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from conftest import PROJECT, Library, Refresherr, Result
from fuse_fs import tmpfs

import refresherr as program

# The schema document: table: column type, ...; indexes likewise.
SEED_TABLES = """
schema_version: id INTEGER PRIMARY KEY, version INTEGER, applied_utc TEXT
symlinks: path TEXT PRIMARY KEY, last_target TEXT, status TEXT, last_status TEXT,
    first_seen_utc TEXT, last_seen_utc TEXT
actions: id INTEGER PRIMARY KEY, url TEXT, status TEXT, reason TEXT, related_path TEXT,
    created_utc TEXT, fired_utc TEXT, last_error TEXT
movies: id INTEGER PRIMARY KEY, instance TEXT, radarr_id INTEGER, title TEXT, year INTEGER,
    imdb_id TEXT, tmdb_id INTEGER, monitored INTEGER, added_utc TEXT, poster_url TEXT,
    fanart_url TEXT
movie_files: id INTEGER PRIMARY KEY, instance TEXT, radarr_movie_id INTEGER,
    radarr_file_id INTEGER, quality TEXT, resolution INTEGER, video_codec TEXT, audio_codec TEXT,
    size_bytes INTEGER, original_path TEXT, symlink_path TEXT
series: id INTEGER PRIMARY KEY, instance TEXT, sonarr_id INTEGER, title TEXT, imdb_id TEXT,
    tvdb_id INTEGER, tmdb_id INTEGER, monitored INTEGER, poster_url TEXT, fanart_url TEXT
episode_files: id INTEGER PRIMARY KEY, instance TEXT, sonarr_series_id INTEGER,
    sonarr_file_id INTEGER, season_number INTEGER, quality TEXT, resolution INTEGER,
    release_group TEXT, size_bytes INTEGER, original_path TEXT, symlink_path TEXT
events: id INTEGER PRIMARY KEY, ts INTEGER, path TEXT, target TEXT, kind TEXT, name TEXT,
    action TEXT, status TEXT
cinesync_items: id INTEGER PRIMARY KEY, tmdb_id INTEGER, show_title TEXT, show_norm TEXT,
    year INTEGER, season INTEGER, episode INTEGER, path TEXT UNIQUE, target_ok INTEGER,
    resolution_rank INTEGER, first_seen_utc INTEGER, last_seen_utc INTEGER
cinesync_runs: run_id INTEGER PRIMARY KEY, started_utc INTEGER, finished_utc INTEGER,
    dry_run INTEGER, repair_roots TEXT, cinesync_base TEXT, allowed_prefixes TEXT,
    indexed_count INTEGER, checked_broken INTEGER, candidate_found INTEGER,
    resolved_target_ok INTEGER, replaced INTEGER, skipped INTEGER, errors INTEGER
"""
SEED_INDEXES = {
    "idx_actions_status": ("actions", 0, ["status"]),
    "idx_actions_related_path": ("actions", 0, ["related_path"]),
    "ix_movies_instance": ("movies", 0, ["instance"]),
    "uq_movies_instance_radarr": ("movies", 1, ["instance", "radarr_id"]),
    "ix_movie_files_inst_mid": ("movie_files", 0, ["instance", "radarr_movie_id"]),
    "ix_series_instance": ("series", 0, ["instance"]),
    "uq_series_instance_sid": ("series", 1, ["instance", "sonarr_id"]),
    "ix_episode_files_inst_sid": ("episode_files", 0, ["instance", "sonarr_series_id"]),
}
OUR_COLUMNS = {
    "symlinks": {
        "broken_since_utc",
        "error",
        "read_utc",
        "read_error",
        "unreadable_since_utc",
        "read_failures",
    },
    "actions": {"attempts", "next_attempt_utc", "progress"},
    "series": {"year", "tags"},
    "movies": {"tags"},
}
V3_TABLES = {"runs", "mounts", "link_changes"}
V4_TABLES = {"directories", "doubts", "lots", "branches", "losses", "notes"}
OUR_TABLES = V3_TABLES | V4_TABLES
SECRET = "S3CRET-relay-token-0123456789"

Column = Tuple[str, str, bool, bool]  # name, type, primary key, unique
Indexes = Dict[str, Tuple[str, int, List[str]]]


def seed_tables() -> Dict[str, str]:
    entries = re.findall(r"(?m)^(\w+): (.*(?:\n {4}.*)*)", SEED_TABLES)
    return {table: " ".join(columns.split()) for table, columns in entries}


def seed_columns(table: str) -> List[Column]:
    words = [column.split() for column in seed_tables()[table].split(", ")]
    return [(w[0], w[1], w[2:] == ["PRIMARY", "KEY"], w[2:] == ["UNIQUE"]) for w in words]


def tables_of(conn: sqlite3.Connection) -> List[str]:
    return [r[0] for r in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]


def columns_of(conn: sqlite3.Connection, table: str) -> List[Column]:
    unique = set()
    for _, index, is_unique, origin, *_ in conn.execute(f"PRAGMA index_list({table})"):
        if is_unique and origin == "u":
            unique |= {row[2] for row in conn.execute(f"PRAGMA index_info({index})")}
    rows = conn.execute(f"PRAGMA table_info({table})").fetchall()
    assert not [row for row in rows if row[3] or row[4] is not None] or table in OUR_COLUMNS
    return [(row[1], row[2], bool(row[5]), row[1] in unique) for row in rows]


def indexes_of(conn: sqlite3.Connection) -> Indexes:
    """Return the indexes that somebody made with CREATE INDEX."""
    found = {}
    for table in tables_of(conn):
        for row in conn.execute(f"PRAGMA index_list({table})").fetchall():
            if row[3] == "c":
                columns = conn.execute(f"PRAGMA index_info({row[1]})").fetchall()
                found[row[1]] = (table, row[2], [column[2] for column in columns])
    return found


def versions_of(conn: sqlite3.Connection) -> List[int]:
    return [row[0] for row in conn.execute("SELECT version FROM schema_version ORDER BY id")]


def everything_in(conn: sqlite3.Connection) -> Dict[str, List[Dict[str, Any]]]:
    """Return every row of every table as a dict, with the storage class of each value."""
    content = {}
    for table in sorted(tables_of(conn)):
        cursor = conn.execute(f"SELECT * FROM {table} ORDER BY 1")
        names = [item[0] for item in cursor.description]
        content[table] = [dict(zip(names, row)) for row in cursor.fetchall()]
    return content


@contextlib.contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the database past the program."""
    conn = sqlite3.connect(str(path), isolation_level=None)
    try:
        yield conn
    finally:
        conn.close()


def files_beside(path: Path) -> List[Path]:
    """Return what lies beside the database, its journals and lock aside."""
    own = {path.name + suffix for suffix in ("", "-wal", "-shm", "-journal", ".lock")}
    return [file for file in path.parent.iterdir() if file.name not in own]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def is_one_line(result: Result) -> bool:
    return len(result.err.splitlines()) == 1 and "Traceback" not in result.err


@pytest.fixture
def api_db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The API's default database, in a directory that does not exist yet."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "api"))
    return tmp_path / "api" / "symlinks.db"


# --- The schema ------------------------------------------------------------------------------


def test_version_1_is_the_schema_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "SCHEMA_VERSION", 1)
    with contextlib.closing(program.get_connection(str(tmp_path / "v1.db"))) as conn:
        program.initialize_schema(conn)
        assert set(tables_of(conn)) == set(seed_tables())
        assert {t: columns_of(conn, t) for t in seed_tables()} == {
            t: seed_columns(t) for t in seed_tables()
        }
        assert indexes_of(conn) == SEED_INDEXES
        assert versions_of(conn) == [1]


def test_our_versions_add_what_the_specification_says_and_no_more(tmp_path: Path) -> None:
    with contextlib.closing(program.get_connection(str(tmp_path / "v4.db"))) as conn:
        program.initialize_schema(conn)
        assert set(tables_of(conn)) == set(seed_tables()) | OUR_TABLES
        for table in seed_tables():
            seed, now = seed_columns(table), columns_of(conn, table)
            assert now[: len(seed)] == seed
            assert {column[0] for column in now[len(seed) :]} == OUR_COLUMNS.get(table, set())
        assert SEED_INDEXES.items() <= indexes_of(conn).items()
        assert versions_of(conn) == [1, 2, 3, 4]
        for (applied,) in conn.execute("SELECT applied_utc FROM schema_version"):
            assert datetime.datetime.fromisoformat(applied).utcoffset() == datetime.timedelta(0)


def test_versions_are_applied_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(program.get_connection(str(tmp_path / "chain.db"))) as conn:
        for version in (1, 2, 3, 3, 4):
            monkeypatch.setattr(program, "SCHEMA_VERSION", version)
            program.initialize_schema(conn)
            assert versions_of(conn) == list(range(1, version + 1))
            assert ("runs" in tables_of(conn)) == (version >= 3)
            assert ("losses" in tables_of(conn)) == (version >= 4)


# --- Databases of the container edition ------------------------------------------------------

RELAY = "http://relay:5050/find?"
URLS = [
    f"{RELAY}type=sonarr_tv&scope=auto&term=Show+S01E02&token={SECRET}",
    f"{RELAY}type=sonarr_tv&token={SECRET}&scope=season&term=Show+S01",
    f"{RELAY}token={SECRET}&type=radarr_4k&scope=movie&term=Token+%26+Key+%282010%29",
    f"{RELAY}type=radarr_4k&scope=movie&term=Movie",
]
CREATED = ["2024-05-06T07:08:09.123456", 1714979289, "1714979289", "1714979289.25", None, ""]


def without_token(url: str) -> str:
    return url.replace(f"&token={SECRET}", "").replace(f"token={SECRET}&", "")


def make_container_database(path: Path, version: int, journal: str = "delete") -> None:
    """Write what the container edition left behind at schema version 1 or 2."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with opened(path) as conn:
        conn.execute("PRAGMA secure_delete=OFF")  # what it deleted is still in free pages
        conn.execute(f"PRAGMA journal_mode={journal}")
        conn.execute("BEGIN")
        for table, columns in seed_tables().items():
            if not table.startswith("cinesync_"):
                # At version 2 the column had no type, so that Unix times stayed integers.
                columns = (
                    columns.replace("created_utc TEXT", "created_utc") if version == 2 else columns
                )
                conn.execute(f"CREATE TABLE {table} ({columns})")
        for name, (table, unique, columns_) in SEED_INDEXES.items():
            kind = "UNIQUE INDEX" if unique else "INDEX"
            conn.execute(f"CREATE {kind} {name} ON {table}({', '.join(columns_)})")
        conn.execute("ALTER TABLE symlinks ADD COLUMN repair_count INTEGER NOT NULL DEFAULT 0")
        conn.execute('ALTER TABLE symlinks ADD COLUMN "media type" TEXT')
        for number in range(1, version + 1):
            conn.execute(
                "INSERT INTO schema_version (version, applied_utc) VALUES (?, ?)",
                (number, "2024-01-02T03:04:05.678901"),
            )
        seen = "2024-05-06T07:08:09.123456"
        for number, status in enumerate(["ok", "broken", "repairing", "broken", None, "weird"]):
            last = "broken" if status == "repairing" else status
            row = (
                f"/tv/Show/{number}.mkv",
                f"/mnt/{number}",
                status,
                last,
                seen,
                seen,
                number,
                "tv",
            )
            conn.execute("INSERT INTO symlinks VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        for url in URLS:
            for status in ("pending", "pending", "sent", "failed"):
                for created in CREATED:
                    conn.execute(
                        "INSERT INTO actions (url, status, reason, related_path, created_utc, "
                        "last_error) VALUES (?, ?, 'auto-search', '/tv/Show/1.mkv', ?, ?)",
                        (url, status, created, f"GET {url} timed out" if created == "" else None),
                    )
        conn.execute("INSERT INTO actions (url, status) VALUES (NULL, 'pending'), ('', NULL)")
        conn.execute(f"INSERT INTO actions (url) VALUES ('{'x' * 9000}{SECRET}')")
        conn.execute("DELETE FROM actions WHERE url LIKE 'xxx%'")
        conn.execute("INSERT INTO events VALUES (7, 1714979289, '/a', '/b', 'tv', 'A', 'x', 'y')")
        conn.execute("INSERT INTO movies (instance, radarr_id, title) VALUES ('r', 1, 'Ünï')")
        conn.execute("INSERT INTO episode_files (instance, symlink_path) VALUES ('s', '/tv/1')")
        if version == 2:
            conn.execute("CREATE TABLE repair_runs (id INTEGER PRIMARY KEY, note TEXT)")
            conn.execute("CREATE TABLE repair_stats (run INTEGER, found INTEGER, fixed REAL)")
            conn.execute("CREATE TABLE orchestrator_state (key TEXT PRIMARY KEY, value BLOB)")
            conn.execute("INSERT INTO repair_runs VALUES (1, 'a'), (2, NULL)")
            conn.execute("INSERT INTO repair_stats VALUES (1, 2, 0.5)")
            conn.execute("INSERT INTO orchestrator_state VALUES ('auto', x'00ff')")
        conn.execute("COMMIT")


@pytest.mark.parametrize("journal", ["delete", "wal"])
@pytest.mark.parametrize("version", [1, 2])
def test_container_databases_migrate_without_a_loss(
    refresherr: Refresherr, version: int, journal: str
) -> None:
    make_container_database(refresherr.db_path, version, journal)
    with opened(refresherr.db_path) as conn:
        before = everything_in(conn)
    assert refresherr("db", "check").code == 0
    with opened(refresherr.db_path) as conn:
        assert versions_of(conn) == [1, 2, 3, 4]
        assert {"cinesync_items", "cinesync_runs"} | OUR_TABLES <= set(tables_of(conn))
        after = everything_in(conn)
    for table, rows in before.items():
        if table == "actions":
            for row in rows:
                row["url"] = row["url"] and without_token(row["url"])
        kept = (
            [{key: row[key] for key in rows[0]} for row in after[table][: len(rows)]]
            if rows
            else []
        )
        if table == "actions":  # an old error may be redacted rather than cut
            assert all(SECRET not in str(row.pop("last_error")) for row in kept)
            for row in rows:
                row.pop("last_error")
        assert kept == rows, table
        assert len(after[table]) == len(rows) + (4 - version if table == "schema_version" else 0)


@pytest.mark.parametrize("version", [1, 2])
def test_the_token_is_nowhere_in_the_migrated_file(refresherr: Refresherr, version: int) -> None:
    make_container_database(refresherr.db_path, version)
    assert SECRET.encode() in refresherr.db_path.read_bytes()
    result = refresherr("stats")
    assert result.code == 0
    assert SECRET not in result.out + result.err
    for file in refresherr.data_dir.glob("symlinks.db*"):
        if file not in files_beside(refresherr.db_path):
            assert SECRET.encode() not in file.read_bytes(), file.name


def test_a_migrated_database_works(refresherr: Refresherr, library: Library) -> None:
    make_container_database(refresherr.db_path, 2)
    library.season("Show", 2)
    stats = refresherr("stats", "--json")
    assert stats.code == 0, stats.err
    assert stats.json["symlinks"]["total"] == 6
    assert stats.json["symlinks"]["broken"] == 2
    assert stats.json["database"]["schema_version"] == 4
    broken = refresherr("broken", "--json").json
    assert [link["path"] for link in broken["links"]] == ["/tv/Show/1.mkv", "/tv/Show/3.mkv"]
    assert all(link["since"] for link in broken["links"])
    assert refresherr.scan(library.root)["totals"]["ok"] == 2


def test_duplicates_stay_and_are_not_added_to(api_db: Path) -> None:
    make_container_database(api_db, 1)
    pending = program.get_pending_actions(limit=1000)
    assert len(pending) == len(URLS) * 2 * len(CREATED) + 1
    program.enqueue_action(URLS[0])
    assert len(program.get_pending_actions(limit=1000)) == len(pending)


@pytest.mark.parametrize("version", [1, 2])
def test_a_backup_is_made_before_a_migration(refresherr: Refresherr, version: int) -> None:
    make_container_database(refresherr.db_path, version, "wal")
    refresherr.db_path.chmod(0o644)
    with opened(refresherr.db_path) as conn:
        before = everything_in(conn)
    assert refresherr("stats").code == 0
    (backup,) = files_beside(refresherr.db_path)
    assert mode_of(backup) == 0o600
    with opened(backup) as conn:
        assert conn.execute("PRAGMA quick_check").fetchall() == [("ok",)]
        assert everything_in(conn) == before
    assert refresherr("stats").code == 0
    assert files_beside(refresherr.db_path) == [backup]  # only a migration makes one


def test_no_backup_without_data(refresherr: Refresherr) -> None:
    refresherr.data_dir.mkdir()
    with opened(refresherr.db_path) as conn:
        conn.execute(f"CREATE TABLE schema_version ({seed_tables()['schema_version']})")
        conn.execute(f"CREATE TABLE symlinks ({seed_tables()['symlinks']})")
        conn.execute("INSERT INTO schema_version VALUES (1, 1, '2024-01-02T03:04:05')")
    assert refresherr("stats").code == 0
    with opened(refresherr.db_path) as conn:
        assert versions_of(conn) == [1, 2, 3, 4]
    assert files_beside(refresherr.db_path) == []


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, sqlite3.OperationalError])
def test_a_failing_migration_rolls_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[str], BaseException],
    step: int,
) -> None:
    path = tmp_path / "symlinks.db"
    make_container_database(path, 2)
    with opened(path) as conn:
        before = everything_in(conn)
    whole = program._apply

    def half(conn: sqlite3.Connection, script: str) -> None:
        whole(conn, script)
        if script == program.MIGRATIONS[step]:
            assert ("losses" if step == 4 else "runs") in tables_of(conn)
            raise error("no further")

    monkeypatch.setattr(program, "_apply", half)
    with contextlib.closing(program.get_connection(str(path))) as conn:
        with pytest.raises((error, program.DatabaseError)):  # type: ignore[arg-type]
            program.initialize_schema(conn)
        assert not conn.in_transaction
    with opened(path) as conn:
        assert everything_in(conn) == before
    monkeypatch.setattr(program, "_apply", whole)
    with contextlib.closing(program.get_connection(str(path))) as conn:
        program.initialize_schema(conn)
        assert versions_of(conn) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "words",
    [["stats"], ["broken"], ["db", "check"], ["scan"], ["scan", "-n"], ["doctor"]],
    ids=" ".join,
)
def test_a_newer_schema_is_refused_untouched(
    refresherr: Refresherr, library: Library, words: List[str]
) -> None:
    refresherr.make_database()
    with opened(refresherr.db_path) as conn:
        conn.execute("PRAGMA journal_mode=DELETE")
        conn.execute("INSERT INTO schema_version (version) VALUES (5)")
    before = refresherr.db_path.read_bytes()
    result = refresherr(*words, *([library.root] if "scan" in words else []))
    assert result.code == 1
    assert "version 5" in result.out + result.err
    assert words == ["doctor"] or (is_one_line(result) and not result.out)
    assert refresherr.db_path.read_bytes() == before
    assert files_beside(refresherr.db_path) == []


HELD = "held back by the mass-breakage guard: "
V3_LINKS = [  # path, target, status, error
    (b"/tv/A/Season 01/1.mkv", "/mnt/a/1.mkv", "unreachable", HELD + "/mnt"),
    (b"/tv/A/Season 01/2.mkv", "/mnt/a/2.mkv", "unreachable", HELD + "/mnt"),
    (b"/tv/B/1.mkv", "/mnt/b/1.mkv", "unreachable", HELD + "/mnt"),
    (b"/tv/flat 1.mkv", "../m\udcff/x/1.mkv", "unreachable", HELD + "/m\\xff"),
    (b"/tv/flat \xfe.mkv", "/m\udcff/y/2.mkv", "unreachable", HELD + "/m\\xff"),
    (b"/tv/C/ok.mkv", "/mnt/c/ok.mkv", "ok", None),
    (b"/tv/C/held once.mkv", "/mnt/c/2.mkv", "ok", HELD + "/mnt"),
    (b"/tv/C/eio.mkv", "/mnt/c/3.mkv", "unreachable", "Input/output error"),
    (b"/tv/C/bare.mkv", "/mnt/c/4.mkv", "unreachable", None),
    (b"/tv/D/broken.mkv", "/mnt/d/1.mkv", "broken", None),
]


def make_version_3(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a database of this program's own version 3, with rows in every table."""
    with monkeypatch.context() as patch:
        patch.setattr(program, "SCHEMA_VERSION", 3)
        program.open_database(str(path)).close()
    now = "2026-01-02T03:04:05+00:00"
    with opened(path) as conn:
        for name, target, status, error in V3_LINKS:
            keys = [program.to_db(os.fsdecode(name)), program.to_db(target)]
            row = (*keys, status, status, now, now, now if status == "broken" else None, error)
            conn.execute("INSERT INTO symlinks VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        for table in sorted(set(tables_of(conn)) - {"symlinks", "schema_version"}):
            rows = conn.execute(f"PRAGMA table_info({table})").fetchall()
            marks = ", ".join("?" * len(rows))
            values = [7 if "INTEGER" in row[2] else f"{table} {row[1]}" for row in rows]
            conn.execute(f"INSERT INTO {table} VALUES ({marks})", values)


def test_version_3_keeps_every_row_and_what_its_guard_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "symlinks.db"
    make_version_3(path, monkeypatch)
    with opened(path) as conn:
        before = everything_in(conn)
    program.open_database(str(path)).close()
    with opened(path) as conn:
        assert versions_of(conn) == [1, 2, 3, 4]
        after = everything_in(conn)
        lots = {
            os.fsencode(directory): (links, titles)
            for directory, links, titles in conn.execute(
                "SELECT directory, links, titles FROM lots"
            )
        }
        held = {
            os.fsencode(name): os.fsencode(directory)
            for name, directory in conn.execute(
                "SELECT path, directory FROM doubts JOIN lots USING (lot_id) WHERE defence='guard'"
            )
        }
    for table, rows in before.items():
        kept = [{key: row[key] for key in rows[0]} for row in after[table][: len(rows)]]
        assert kept == rows, table
    assert lots == {b"/mnt": (3, 3), b"/m\\xff": (2, 2)}
    assert held == {
        **dict.fromkeys([link[0] for link in V3_LINKS[:3]], b"/mnt"),
        **dict.fromkeys([link[0] for link in V3_LINKS[3:5]], b"/m\\xff"),
    }
    assert len(after["doubts"]) == 5
    assert all(row["since_utc"] for row in after["doubts"] + after["lots"])
    assert not after["losses"] and not after["directories"]
    program.open_database(str(path)).close()
    assert len(files_beside(path)) == 1  # the backup, made once
    with opened(path) as conn:
        assert everything_in(conn) == after


# --- The Python API --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("get_connection", [("db_path", None)]),
        ("initialize_schema", [("conn", None)]),
        ("nuke_database", [("conn", None), ("confirm", False)]),
        ("record_symlink", ["path", "target", "status"]),
        ("enqueue_action", ["url", ("reason", ""), ("related_path", None)]),
        ("get_pending_actions", [("limit", 25)]),
        ("mark_action_sent", ["action_id", ("ok", True)]),
        ("add_events", ["rows"]),
    ],
)
def test_signatures(name: str, parameters: List[Any]) -> None:
    found = inspect.signature(getattr(program, name)).parameters.values()
    assert [p.name if p.default is p.empty else (p.name, p.default) for p in found] == parameters
    assert {p.kind for p in found} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_the_schema_documents_examples(api_db: Path) -> None:
    conn = program.get_connection()
    program.initialize_schema(conn)
    assert versions_of(conn)[-1] == program.SCHEMA_VERSION == 4
    conn.close()
    program.record_symlink("/path/to/symlink", "/path/to/target", "ok")
    program.enqueue_action(
        "http://relay/find?...", reason="auto-search", related_path="/path/to/symlink"
    )
    program.enqueue_action("http://relay/find?second")
    actions = program.get_pending_actions(limit=25)
    assert [action["url"] for action in actions] == [
        "http://relay/find?...",
        "http://relay/find?second",
    ]
    assert [(a["reason"], a["related_path"]) for a in actions] == [
        ("auto-search", "/path/to/symlink"),
        ("", None),
    ]
    assert [a["url"] for a in program.get_pending_actions(limit=1)] == ["http://relay/find?..."]
    program.mark_action_sent(actions[0]["id"], ok=True)
    program.mark_action_sent(actions[1]["id"], ok=False)
    program.add_events([(1, "/p", "/t", "movie", "M (2010)", "relink", "ok"), (2, *"abcdef")])
    assert program.get_pending_actions() == []
    with contextlib.closing(program.get_connection()) as conn:
        rows = conn.execute("SELECT * FROM actions ORDER BY id").fetchall()
        assert [row["status"] for row in rows] == ["sent", "failed"]
        assert all(row["created_utc"] and row["fired_utc"] for row in rows)
        row = conn.execute("SELECT * FROM symlinks").fetchone()
        assert (row["path"], row["last_target"]) == ("/path/to/symlink", "/path/to/target")
        assert row["status"] == row["last_status"] == "ok"
        assert row["first_seen_utc"] and row["last_seen_utc"]
        events = conn.execute("SELECT * FROM events ORDER BY ts").fetchall()
        assert tuple(events[0])[1:] == (1, "/p", "/t", "movie", "M (2010)", "relink", "ok")
        assert tuple(events[1])[1:] == (2, *"abcdef")
    program.initialize_schema()
    program.nuke_database(confirm=True)
    with contextlib.closing(program.get_connection()) as conn:
        content = everything_in(conn)
        assert [len(rows) for table, rows in content.items() if table != "schema_version"] == [
            0
        ] * (len(content) - 1)
        assert versions_of(conn) == [1, 2, 3, 4]


def test_nuke_wants_a_confirmation(api_db: Path) -> None:
    program.enqueue_action("http://relay/find?x")
    with pytest.raises(ValueError, match="confirm"):
        program.nuke_database()
    with pytest.raises(ValueError, match="confirm"):
        program.nuke_database(confirm=False)
    assert len(program.get_pending_actions()) == 1


def test_nuke_drops_every_table(api_db: Path) -> None:
    make_container_database(api_db, 2)
    with contextlib.closing(program.get_connection()) as conn:
        program.nuke_database(conn, confirm=True)
        assert set(tables_of(conn)) == set(seed_tables()) | OUR_TABLES
    assert SECRET.encode() not in api_db.read_bytes()


def test_broken_since_outlives_an_outage(api_db: Path) -> None:
    def since() -> Optional[str]:
        with contextlib.closing(program.get_connection()) as conn:
            value: Optional[str] = conn.execute("SELECT broken_since_utc FROM symlinks").fetchone()[
                0
            ]
            return value

    seen = []
    for status in ("ok", "unreachable", "broken", "unreachable", "broken", "ok"):
        program.record_symlink("/a", "/b", status)
        seen.append(since())
    assert seen[0] is seen[1] is seen[5] is None
    assert seen[2] and seen[2] == seen[3] == seen[4]


@pytest.mark.parametrize(
    ("target", "status", "doubted", "is_back"),
    [
        ("/m/1", "unreachable", True, False),
        ("/m/1", "broken", False, False),
        ("/m/2", "unreachable", False, False),
        ("/m/1", "ok", False, True),
    ],
)
def test_what_is_recorded_is_looked_at_by_the_next_scan(
    api_db: Path, target: str, status: str, doubted: bool, is_back: bool
) -> None:
    paths = ["/tv/A\udcff/1.mkv", "/tv/B/1.mkv"]
    for path in paths:
        program.record_symlink(path, "/m/1", "unreachable")
    with contextlib.closing(program.get_connection()) as conn:
        for path in map(program.to_db, paths):
            folder = path.rpartition(b"/" if isinstance(path, bytes) else "/")[0]  # type: ignore
            conn.execute("INSERT INTO directories VALUES (?, 'mark', 1, NULL)", (folder,))
            insert = """INSERT INTO doubts (path, defence, title, goal, missing, mount_point,
                lot_id, since_utc) VALUES (?, 'guard', '', '', '', '/', 1, '2026')"""
            conn.execute(insert, (path,))
            insert = """INSERT INTO losses (path, target, title, mount_point, lost_utc)
                VALUES (?, '/m/1', '/tv/A', '/m', '2026')"""
            conn.execute(insert, (path,))
    program.record_symlink(paths[0], target, status)
    with contextlib.closing(program.get_connection()) as conn:
        marks = conn.execute("SELECT mark FROM directories ORDER BY rowid").fetchall()
        assert [mark for (mark,) in marks] == [None, "mark"]
        doubts = [program.from_db(path) for (path,) in conn.execute("SELECT path FROM doubts")]
        assert sorted(doubts) == sorted(paths if doubted else paths[1:])
        losses = "SELECT back_utc IS NOT NULL, came_back_by_itself FROM losses ORDER BY loss_id"
        assert [tuple(row) for row in conn.execute(losses)] == [(is_back, 0), (False, 0)]


HOSTILE = [
    b"/m/\xff\xfe not utf-8",
    b"/m/\xed\xa0\xbd surrogate in utf-8",
    b"/m/new\nline\ttab\r\x1b[31m",
    "/m/\U0001f600 \u202egnp.exe".encode(),
    "/m/Am\u00e9lie NFC".encode(),
    "/m/Ame\u0301lie NFC".encode(),
    b"/m/'); DROP TABLE symlinks; -- %s ? \"",
]


def test_any_file_name_goes_in_and_comes_out(api_db: Path) -> None:
    names = [os.fsdecode(name) for name in HOSTILE]
    for name in names * 2:
        program.record_symlink(name, name + ".target", "broken")
        program.enqueue_action("arr://x/repair?path=1", f"dead: {name}", related_path=name)
        program.mark_action_sent(program.get_pending_actions()[0]["id"])
    program.add_events([(1, name, name, "other", name, "a", "b") for name in names])
    with contextlib.closing(program.get_connection()) as conn:

        def column(sql: str) -> List[bytes]:
            return [os.fsencode(row[0]) for row in conn.execute(sql)]

        assert sorted(column("SELECT path FROM symlinks")) == sorted(HOSTILE)
        assert sorted(column("SELECT last_target FROM symlinks")) == sorted(
            name + b".target" for name in HOSTILE
        )
        assert column("SELECT related_path FROM actions ORDER BY id") == HOSTILE * 2
        mine = "FROM events WHERE action = 'a' ORDER BY id"
        assert column(f"SELECT path {mine}") == column(f"SELECT target {mine}") == HOSTILE
        assert column(f"SELECT name {mine}") == HOSTILE


def test_a_lone_surrogate_from_a_servers_json_does_no_harm(api_db: Path) -> None:
    program.add_events([(1, "/a", None, "movie", "bad \ud83d title", "ingest", "ok")])
    with contextlib.closing(program.get_connection()) as conn:
        assert conn.execute("SELECT count(*) FROM events").fetchone()[0] == 1


def test_the_same_action_is_queued_once(api_db: Path) -> None:
    url = f"{RELAY}type=sonarr_tv&scope=auto&term=Show+S01E02"
    program.enqueue_action(url, "first")
    program.enqueue_action(url, "second", "/tv/x")
    program.enqueue_action(f"{url}&token={SECRET}", f"see {url}&token={SECRET}")
    program.enqueue_action(url.replace("http://", f"http://user:{SECRET}@"))
    (row,) = program.get_pending_actions()
    assert (row["url"], row["reason"]) == (url, "first")
    program.mark_action_sent(row["id"])
    program.enqueue_action(f"{url}&token={SECRET}", f"see {url}&token={SECRET}")
    (again,) = program.get_pending_actions()
    assert again["id"] != row["id"]
    assert again["url"] == url
    assert SECRET.encode() not in b"".join(f.read_bytes() for f in api_db.parent.iterdir())


# --- Files, journals, many writers -----------------------------------------------------------


def test_only_the_owner_can_read(refresherr: Refresherr, library: Library) -> None:
    library.season("Show", 1)
    backup = refresherr.data_dir / "copy.db"
    for words in (["scan", library.root], ["db", "backup", backup]):
        done = subprocess.run(
            refresherr.command(*words),
            env=refresherr.env,
            preexec_fn=lambda: os.umask(0),
            check=False,
        )
        assert done.returncode == 0
    with opened(refresherr.db_path) as conn:  # while it is open, so that -wal and -shm exist
        conn.execute("SELECT * FROM symlinks").fetchall()
        modes = {file.name: mode_of(file) for file in refresherr.data_dir.iterdir()}
    assert {"symlinks.db", "symlinks.db-wal", "copy.db"} <= modes.keys()
    assert set(modes.values()) == {0o600}
    assert mode_of(refresherr.data_dir) == 0o700


@pytest.mark.parametrize(
    ("fs_type", "journal"),
    [
        ("ext4", "wal"),
        ("zfs", "wal"),
        ("fuse.rclone", "delete"),
        ("nfs4", "delete"),
        ("cifs", "delete"),
    ],
)
def test_wal_only_on_a_local_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fs_type: str, journal: str
) -> None:
    folder = tmp_path / "share"
    folder.mkdir()
    path = str(folder / "symlinks.db")
    with contextlib.closing(program.get_connection(path)) as conn:
        program.initialize_schema(conn)
        conn.execute("PRAGMA journal_mode=WAL")  # it stood elsewhere before
    mounts = {"/": "ext4", os.path.realpath(folder): fs_type}
    monkeypatch.setattr(program, "read_mounts", lambda: mounts)
    with contextlib.closing(program.get_connection(path)) as conn:
        assert conn.execute("PRAGMA journal_mode").fetchone()[0] == journal


def test_a_local_disk_uses_wal(refresherr: Refresherr) -> None:
    refresherr.make_database()
    assert refresherr("stats", "--json").json["database"]["journal_mode"] == "wal"


@pytest.mark.parametrize(
    ("fs_types", "network"),
    [
        (["nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.rclone", "fuse.sshfs"], True),
        (["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuseblk", "f2fs"], False),
    ],
)
def test_is_network_type(fs_types: List[str], network: bool) -> None:
    assert [name for name in fs_types if program.is_network_type(name) is not network] == []


def test_parse_mountinfo() -> None:
    text = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:33 / /mnt/zurg rw - autofs systemd-1 rw,fd=5
41 40 0:34 / /mnt/zurg rw,nosuid shared:7 master:2 - fuse.rclone zurg: rw,user_id=0
42 22 0:35 / /mnt/a\\040b\\011c\\012d\\134e rw - nfs4 nas:/x - rw
43 22 0:36 /sub /mnt/\u00fc rw - cifs //nas/x rw
a line that makes no sense
"""
    assert program.parse_mountinfo(text) == {
        "/": "ext4",
        "/mnt/zurg": "fuse.rclone",
        "/mnt/a b\tc\nd\\e": "nfs4",
        "/mnt/\u00fc": "cifs",
    }


WRITER = """
import sys, threading
import refresherr
def write(worker):
    for number in range(ROUNDS):
        refresherr.record_symlink(f"/l/{worker}/{number}", "/t", "ok")
        refresherr.enqueue_action(f"arr://x/repair?path={worker}-{number}")
        refresherr.enqueue_action("arr://x/repair?path=shared")
        refresherr.add_events([(number, "/l", "/t", "other", worker, "a", "b")] * 3)
failed = []
def work(worker):
    try:
        write(worker)
    except BaseException as exc:
        failed.append(repr(exc))
ROUNDS, names = int(sys.argv[1]), sys.argv[2:]
print("ready", flush=True)
sys.stdin.readline()  # all begin at once
threads = [threading.Thread(target=work, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.exit("\\n".join(failed) or 0)
"""


@pytest.mark.parametrize(("processes", "threads"), [(8, 1), (1, 8), (8, 8)])
def test_many_writers_from_the_very_first_moment(
    api_db: Path, processes: int, threads: int
) -> None:
    rounds = 80 // (processes * threads) or 3
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(rounds)] + [f"{p}.{t}" for t in range(threads)],
            cwd=PROJECT,
            env={**os.environ, "DATA_DIR": str(api_db.parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for p in range(processes)
    ]
    for process in running:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
    assert not api_db.exists()
    for process in running:
        assert process.stdin
        process.stdin.write(b"go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert errors == [b""] * processes
    assert [process.returncode for process in running] == [0] * processes
    total = processes * threads * rounds
    with opened(api_db) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert versions_of(conn) == [1, 2, 3, 4]
        counts = [
            conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("symlinks", "actions", "events")
        ]
        assert counts == [total, total + 1, 3 * total]


def test_threads_may_share_nothing_but_the_module(api_db: Path) -> None:
    failures: List[BaseException] = []
    gate = threading.Barrier(8)

    def work(worker: int) -> None:
        try:
            gate.wait()
            for number in range(10):
                program.record_symlink(f"/l/{worker}/{number}", "/t", "broken")
                program.get_pending_actions()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with opened(api_db) as conn:
        assert conn.execute("SELECT count(*) FROM symlinks").fetchone() == (80,)
    assert not list(api_db.parent.glob("*.bak"))


def test_the_files_of_the_wal_may_go_while_the_database_is_opened(api_db: Path) -> None:
    """Another process closes its last connection, and they are gone between two looks at them."""
    program.open_database(str(api_db)).close()
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            for name in ("-wal", "-shm"):
                Path(f"{api_db}{name}").touch()
                os.unlink(f"{api_db}{name}")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(3000):
            with program.explained_errors(str(api_db)):
                pass
            program._advise_access(str(api_db))
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("version", [1, 2])
def test_many_may_upgrade_a_database_at_once(api_db: Path, version: int) -> None:
    api_db.parent.mkdir(parents=True, exist_ok=True)
    make_container_database(api_db, version)
    with opened(api_db) as conn:
        before = conn.execute("SELECT count(*) FROM symlinks").fetchone()
    failures: List[BaseException] = []
    gate = threading.Barrier(8)

    def upgrade() -> None:
        try:
            gate.wait()
            program.get_pending_actions()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=upgrade) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(list(api_db.parent.glob("*.bak"))) == 1
    with opened(api_db) as conn:
        assert versions_of(conn)[-1] == 4
        assert conn.execute("SELECT count(*) FROM symlinks").fetchone() == before


# --- When the disk or the file is no good ----------------------------------------------------


@pytest.fixture
def small_disk(refresherr: Refresherr, tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MB that holds the data directory."""
    point = tmp_path / "disk"
    point.mkdir()
    try:
        with tmpfs(str(point), size="1m"):
            refresherr.data_dir = point / "data"
            yield point
    except OSError as error:
        pytest.skip(f"no tmpfs here: {error}")


def fill(disk: Path, leave: int) -> Path:
    """Fill the disk up but for so many bytes."""
    space = shutil.disk_usage(str(disk)).free - leave
    filler = disk / "filler"
    filler.write_bytes(bytes(space))
    return filler


@pytest.mark.parametrize("leave", [0, 100 << 10])
def test_a_full_disk(
    refresherr: Refresherr, library: Library, small_disk: Path, leave: int
) -> None:
    good = library.season("Show", 3)
    assert refresherr.scan(library.root)["exit_code"] == 0
    for number in range(2000):
        (library.root / f"{number} with a long name {'x' * 100}").symlink_to("/etc/hostname")
    filler = fill(small_disk, leave)
    result = refresherr("scan", library.root)
    assert result.code == 1, result
    assert is_one_line(result), result.err
    assert re.search(r"full|space", result.err)
    filler.unlink()
    assert {str(link) for link in good} <= refresherr.statuses().keys()
    assert refresherr("db", "check").code == 0
    for link in library.root.glob("* with a long name *"):
        link.unlink()  # the disk has no room for them all
    assert refresherr.scan(library.root)["totals"]["ok"] == 3


def test_a_disk_too_full_for_the_backup_stops_the_migration(
    refresherr: Refresherr, small_disk: Path
) -> None:
    make_container_database(refresherr.db_path, 2)
    before = refresherr.db_path.read_bytes()
    fill(small_disk, 60 << 10)
    result = refresherr("stats")
    assert result.code == 1
    assert is_one_line(result), result.err
    assert files_beside(refresherr.db_path) == []  # half a backup is none
    with opened(refresherr.db_path) as conn:
        assert versions_of(conn) == [1, 2]
    assert len(refresherr.db_path.read_bytes()) == len(before)


def test_a_directory_in_place_of_the_database(refresherr: Refresherr) -> None:
    refresherr.db_path.mkdir(parents=True)
    for words in (["stats"], ["db", "nuke", "--yes"]):
        result = refresherr(*words)
        assert result.code == 1
        assert is_one_line(result), result.err
        assert "--data-dir" in result.err
        assert refresherr.db_path.is_dir()


def test_a_file_in_place_of_the_directory(refresherr: Refresherr) -> None:
    refresherr.data_dir.write_text("in the way")
    result = refresherr("stats")
    assert result.code == 1
    assert is_one_line(result)
    assert "--data-dir" in result.err


def no_database(path: Path) -> None:
    path.write_bytes(b"this is no SQLite file; " * 200)


def torn_database(path: Path) -> None:
    with opened(path) as conn:
        conn.execute("PRAGMA journal_mode=DELETE")
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))


@pytest.mark.parametrize("damage", [no_database, torn_database])
def test_a_damaged_database(refresherr: Refresherr, damage: Callable[[Path], None]) -> None:
    refresherr.make_database()
    damage(refresherr.db_path)
    before = refresherr.db_path.read_bytes()
    for words in (["stats"], ["broken"]):
        result = refresherr(*words)
        assert result.code == 1
        assert is_one_line(result), result.err
        assert str(refresherr.db_path) in result.err
        assert "nuke" in result.err or "backup" in result.err or "move it away" in result.err
        assert result.out == ""
    assert refresherr("db", "check").code == 1
    assert refresherr.db_path.read_bytes() == before
    assert refresherr("db", "nuke").code == 2
    assert refresherr.db_path.read_bytes() == before
    assert refresherr("db", "nuke", "--yes").code == 0
    assert before in [file.read_bytes() for file in files_beside(refresherr.db_path)]
    assert refresherr("stats", "--json").json["symlinks"]["total"] == 0
    assert refresherr("db", "check").code == 0


def test_nuke_does_not_move_a_database_away_that_is_only_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "symlinks.db"
    program.open_database(str(path)).close()
    monkeypatch.setattr(program, "BUSY_TIMEOUT", 0.1)
    with opened(path) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO events (ts) VALUES (42)")
        assert program.main(["--db", str(path), "db", "nuke", "--yes"]) == 1
        other.execute("COMMIT")
    with opened(path) as conn:
        assert conn.execute("SELECT ts FROM events").fetchall() == [(42,)]
    assert files_beside(path) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_read_only_disk(refresherr: Refresherr, small_disk: Path, exists: bool) -> None:
    if exists:
        refresherr.make_database()
        before = refresherr.db_path.read_bytes()
    if subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=False).returncode:
        pytest.skip("cannot remount")
    for words in (["stats"], ["scan", small_disk]):
        result = refresherr(*words)
        assert result.code == 1
        assert is_one_line(result), result.err
        assert "--data-dir" in result.err
    assert refresherr.db_path.exists() == exists
    assert not exists or refresherr.db_path.read_bytes() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("exists", [False, True])
def test_somebody_elses_data_directory(tmp_path: Path, exists: bool) -> None:
    # The interpreter may lie where only root can go: become somebody else after the imports.
    code = (
        "import os, sys, refresherr\n"
        "refresherr.main(['--data-dir', sys.argv[2] + '/../warm', *sys.argv[3:]])\n"
        "print('now as nobody', file=sys.stderr)\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(refresherr.main(sys.argv[1:]))"
    )
    folder = tmp_path / "data"
    folder.mkdir(mode=0o755)
    parents = [parent for parent in folder.parents if str(parent).startswith("/tmp/")]
    modes = {parent: mode_of(parent) for parent in parents}
    try:
        for parent in parents:
            parent.chmod(modes[parent] | 0o011)
        if exists:
            program.open_database(str(folder / "symlinks.db")).close()
            (folder / "symlinks.db").chmod(0o644)
        for words in (["stats"], ["scan", str(folder)]):
            done = subprocess.run(
                [sys.executable, "-c", code, "--data-dir", str(folder), *words],
                cwd=PROJECT,
                capture_output=True,
                encoding="utf-8",
                check=False,
            )
            spoken = done.stderr.partition("now as nobody\n")[2]
            result = Result(done.returncode, done.stdout, spoken)
            assert result.code == 1
            assert is_one_line(result), result.err
            assert "--data-dir" in result.err or "chown" in result.err
        assert sorted(f.name for f in folder.iterdir()) == (["symlinks.db"] if exists else [])
    finally:
        for parent in parents:
            parent.chmod(modes[parent])


# --- db path, check, backup, prune, nuke -----------------------------------------------------


def test_db_prune_forgets_all_that_lies_below_no_root(
    refresherr: Refresherr, library: Library, write_config: Callable[[str], Path]
) -> None:
    kept = [f"{library.root}/tv/a\udcff/1.mkv", f"{library.root}/tv/2.mkv"]
    strays = [f"{library.root}/tv, old/a\udcff/1.mkv", f"{library.root}/tv2/b/2.mkv", "/else/3.mkv"]
    with contextlib.closing(program.open_database(str(refresherr.db_path))) as conn:
        for path in kept + strays:
            name, folder = program.to_db(path), program.to_db(os.path.dirname(path))
            conn.execute("INSERT INTO symlinks (path, status) VALUES (?, 'ok')", (name,))
            insert = """INSERT INTO doubts (path, defence, title, goal, missing, mount_point,
                since_utc) VALUES (?, 'guard', '', '', '', '/', '')"""
            conn.execute(insert, (name,))
            insert = """INSERT INTO losses (path, target, title, mount_point, lost_utc)
                VALUES (?, '', '', '', '')"""
            conn.execute(insert, (name,))
            conn.execute("INSERT INTO directories VALUES (?, NULL, 1, NULL)", (folder,))
        conn.execute("INSERT INTO events (path) VALUES ('/else/3.mkv')")

    def rows() -> Dict[str, List[str]]:
        tables = ("symlinks", "doubts", "losses", "directories")
        return {
            table: sorted(
                os.fsdecode(row[0]) for row in refresherr.query(f"SELECT path FROM {table}")
            )
            for table in tables
        }

    before = rows()
    write_config("")
    result = refresherr("db", "prune")
    assert (result.code, rows()) == (2, before) and "roots" in result.err
    write_config(f"[scan]\nroots = {library.root}/tv\n")
    preview = refresherr("db", "prune", "-n", "--json").json
    assert (preview["removed"], preview["applied"], rows()) == (3, False, before)
    assert preview["directories"] == {"/else": 1, str(library.root): 2}
    assert refresherr("db", "nuke", "--yes", "-n").code == 2 and rows() == before
    with program.process_lock(str(refresherr.db_path), 0):
        assert refresherr("db", "prune").code == 5 and rows() == before
    result = refresherr("db", "prune")
    assert result.code == 0 and "3 links forgotten\n    1 beneath /else\n" in result.out
    names = dict.fromkeys(("symlinks", "doubts", "losses"), sorted(kept))
    assert rows() == {**names, "directories": sorted(map(os.path.dirname, kept))}
    assert refresherr.query("SELECT path FROM events") == [("/else/3.mkv",)]  # history stays
    assert refresherr("db", "prune", "--json").json["removed"] == 0


def test_db_path_makes_nothing(refresherr: Refresherr) -> None:
    result = refresherr("db", "path")
    assert (result.code, result.out, result.err) == (0, f"{refresherr.db_path}\n", "")
    assert refresherr("db", "path", "--json").json["path"] == str(refresherr.db_path)
    assert not refresherr.data_dir.exists()


def test_db_check(refresherr: Refresherr) -> None:
    refresherr.make_database()
    result = refresherr("db", "check")
    assert (result.code, result.err) == (0, "")
    assert "ok" in result.out


def test_db_backup(refresherr: Refresherr, library: Library, tmp_path: Path) -> None:
    library.season("Show", 3)
    refresherr.scan(library.root)
    copy = tmp_path / "copy.db"
    assert refresherr("db", "backup", copy).code == 0
    assert mode_of(copy) == 0o600
    with opened(copy) as conn, opened(refresherr.db_path) as original:
        assert conn.execute("PRAGMA quick_check").fetchall() == [("ok",)]
        assert everything_in(conn) == everything_in(original)
    assert sorted(f.name for f in tmp_path.glob("copy*")) == ["copy.db"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["db", "backup"], 2),
        (["db", "backup", "{tmp}/absent/copy.db"], 1),
        (["db", "backup", "{tmp}"], 1),
        (["db", "nuke"], 2),
        (["db", "nuke", "--json"], 2),
        (["db", "repair"], 2),
        (["db"], 2),
        (["db", "backup", "{db}"], None),
    ],
)
def test_what_db_refuses_leaves_the_data_alone(
    refresherr: Refresherr, library: Library, tmp_path: Path, words: List[str], code: Optional[int]
) -> None:
    library.season("Show", 2)
    refresherr.scan(library.root)
    before = refresherr.statuses()
    result = refresherr(*(word.format(tmp=tmp_path, db=refresherr.db_path) for word in words))
    assert code is None or result.code == code
    assert is_one_line(result) or result.code == 0
    assert refresherr.statuses() == before
    assert refresherr("db", "check").code == 0
    assert not list(tmp_path.rglob("*.tmp*"))


def test_db_nuke(refresherr: Refresherr, library: Library) -> None:
    library.season("Show", 2)
    refresherr.scan(library.root)
    with program.process_lock(str(refresherr.db_path), 0):
        assert refresherr("db", "nuke", "--yes").code == 5
    assert len(refresherr.statuses()) == 2
    assert refresherr("db", "nuke", "--yes").code == 0
    assert refresherr.statuses() == {}
    with opened(refresherr.db_path) as conn:
        assert versions_of(conn) == [1, 2, 3, 4]
    assert mode_of(refresherr.db_path) == 0o600


def test_an_early_database_of_version_4_gets_what_it_lacks(tmp_path: Path) -> None:
    late = ("unreadable_since_utc", "read_failures")
    path = str(tmp_path / "symlinks.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as conn:
        for version, script in program.MIGRATIONS.items():
            for statement in filter(None, script.split(";\n")):
                is_known = "now()" in statement or any(name in statement for name in late)
                with contextlib.suppress(sqlite3.OperationalError):  # functions of ours, doubles
                    conn.execute("SELECT 1" if is_known else statement)
            conn.execute("INSERT INTO schema_version (version) VALUES (?)", (version,))
        conn.execute("INSERT INTO symlinks (path, status) VALUES ('/a', 'ok')")
        columns = {row[1] for row in conn.execute("PRAGMA table_info(symlinks)")}
        assert "read_error" in columns and columns.isdisjoint(late)
    with contextlib.closing(program.open_database(path)) as conn:
        query = f"SELECT path, {', '.join(late)} FROM symlinks"
        assert [tuple(row) for row in conn.execute(query)] == [("/a", None, None)]
