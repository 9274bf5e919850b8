"""Patience: the more is lost at once, the longer it must stay lost before anything is done."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sqlite3
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Tuple

import pytest
from cinesync_library import CineSyncLibrary, Part
from conftest import Library, Refresherr, target_of
from fake_servers import FakeRelay, FakeServer

import refresherr as program

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
TOKEN = "patience-token-0123456789"

# --- The decision, as a table ----------------------------------------------------------------

GONE = object()  # in place of `gone_since`: since the link broke


@pytest.mark.parametrize(
    ("min_age", "patience", "titles", "gone", "slowest", "waits", "reason"),
    [
        # A few titles: a torrent or two, no outage.
        (HOUR, 48 * HOUR, 1, GONE, 0, HOUR, "too_recent"),
        (HOUR, 48 * HOUR, 2, GONE, 0, HOUR, "too_recent"),
        (0, 48 * HOUR, 2, GONE, 0, 0, "too_recent"),
        # More of them: half an hour for each, whatever --min-age says.
        (HOUR, 48 * HOUR, 3, GONE, 0, 1.5 * HOUR, "waiting"),
        (0, 48 * HOUR, 3, GONE, 0, 1.5 * HOUR, "waiting"),
        (0, 48 * HOUR, 20, GONE, 0, 10 * HOUR, "waiting"),
        (2 * HOUR, 48 * HOUR, 3, GONE, 0, 2 * HOUR, "too_recent"),
        # Never longer than `patience`; without it, min_age still holds.
        (HOUR, 48 * HOUR, 500, GONE, 0, 48 * HOUR, "waiting"),
        (HOUR, 4 * HOUR, 500, GONE, 0, 4 * HOUR, "waiting"),
        (HOUR, 0, 500, GONE, 30 * HOUR, HOUR, "too_recent"),
        (0, 0, 500, None, 30 * HOUR, 0, "too_recent"),
        # Twice as long as this mount has taken before, of few titles and of many.
        (HOUR, 48 * HOUR, 1, GONE, 5 * HOUR, 10 * HOUR, "waiting"),
        (HOUR, 48 * HOUR, 10, GONE, 5 * HOUR, 10 * HOUR, "waiting"),
        (HOUR, 48 * HOUR, 30, GONE, 5 * HOUR, 15 * HOUR, "waiting"),
        (HOUR, 48 * HOUR, 1, GONE, 500 * HOUR, 48 * HOUR, "waiting"),
        (HOUR, 48 * HOUR, 1, GONE, 20 * MINUTE, HOUR, "too_recent"),
        # A scan in between could not tell: it begins anew.
        (HOUR, 48 * HOUR, 1, 7 * HOUR, 0, 8 * HOUR, "waiting"),
        (HOUR, 48 * HOUR, 4, 7 * HOUR, 0, 9 * HOUR, "waiting"),
        (HOUR, 48 * HOUR, 1, None, 0, math.inf, "waiting"),
    ],
)
def test_how_long_a_link_waits(
    min_age: float,
    patience: float,
    titles: int,
    gone: Any,
    slowest: float,
    waits: float,
    reason: str,
) -> None:
    since = 1e9
    gone_since = since if gone is GONE else None if gone is None else since + gone
    loss = program.OpenLoss("/mnt", gone_since, titles, slowest)
    wait = program.plan_wait(min_age, patience, since, loss)
    assert (wait.until, wait.reason) == (since + waits, reason)
    assert "waits until " in str(wait)
    assert ("/mnt" in str(wait)) is (reason == "waiting")


def test_a_link_that_no_scan_of_ours_has_lost_has_only_its_min_age() -> None:
    assert program.plan_wait(HOUR, 48 * HOUR, 1000.0, None)[:2] == (1000.0 + HOUR, "too_recent")


def test_what_it_says() -> None:
    def say(titles: int, gone: Optional[float], slowest: float) -> str:
        loss = program.OpenLoss("/mnt/a", gone, titles, slowest)
        return str(program.plan_wait(HOUR, 48 * HOUR, 0.0, loss))

    lost = "waits until 1970-01-01 06:00 UTC: 12 titles were lost on /mnt/a within a day"
    assert say(12, 0.0, 0.0) == lost
    assert say(1, 0.0, 4 * HOUR) == (
        "waits until 1970-01-01 08:00 UTC: links into /mnt/a have come back by themselves after 4h"
    )
    unsure = "a scan could not tell meanwhile what is on /mnt/a"
    assert say(9, None, 0.0) == f"waits until a scan finds it gone again: {unsure}"
    assert say(1, HOUR, 0.0) == f"waits until 1970-01-01 02:00 UTC: {unsure}"


def test_links_that_wait_together_are_told_together() -> None:
    waits = [program.Wait(60.0 * n, "waiting", why) for n, why in enumerate(["a", "a", "b"])]
    assert program.summarise_waits(waits) == [
        "2 links: waits until 1970-01-01 00:01 UTC: a",
        "1 link: waits until 1970-01-01 00:02 UTC: b",
    ]
    assert program.summarise_waits([]) == []


# --- What the database tells -----------------------------------------------------------------


class Losses:
    """Writes `losses` as a scan does; times are seconds before now."""

    def __init__(self, db_path: Path) -> None:
        self.db_path = db_path
        self.now = time.time()

    def stamp(self, ago: Optional[float]) -> Optional[str]:
        """Return a time as scans write it, with fractions of a second."""
        return None if ago is None else program.format_time(self.now - ago)[:19] + ".250000+00:00"

    def add(
        self,
        path: object,
        title: str,
        lost: float,
        gone: Optional[float] = -1,
        mount: str = "/mnt",
        back: Optional[float] = None,
        by_itself: bool = False,
    ) -> None:
        gone = lost if gone == -1 else gone
        row = (program.to_db(str(path)), title, program.to_db(mount))
        times = map(self.stamp, (lost, gone, back))
        with contextlib.closing(sqlite3.connect(str(self.db_path))) as conn, conn:
            conn.execute(
                "INSERT INTO losses (path, target, title, mount_point, lost_utc, gone_since_utc, "
                "back_utc, came_back_by_itself) VALUES (?, '/mnt/x', ?, ?, ?, ?, ?, ?)",
                (*row, *times, int(by_itself)),
            )

    def load(self) -> Any:
        with contextlib.closing(program.open_database(str(self.db_path))) as conn:
            return program.load_losses(conn)


@pytest.fixture
def losses(tmp_path: Path) -> Losses:
    program.open_database(str(tmp_path / "losses.db")).close()
    return Losses(tmp_path / "losses.db")


def test_titles_lost_within_a_day_on_the_same_mount_count(losses: Losses) -> None:
    losses.add("/tv/A/1", "/tv/A", 30 * HOUR)
    losses.add("/tv/A/2", "/tv/A", 30 * HOUR)  # the same title
    losses.add("/tv/B/1", "/tv/B", 50 * HOUR)  # 20 hours before
    losses.add("/tv/C/1", "/tv/C", 10 * HOUR)  # 20 hours after
    losses.add("/tv/D/1", "/tv/D", 31 * HOUR, back=29 * HOUR)  # came back meanwhile: counts
    losses.add("/tv/E/1", "/tv/E", 5 * HOUR)  # 25 hours after
    losses.add("/tv/F/1", "/tv/F", 30 * HOUR, mount="/mnt2")
    losses.add("/tv/G\udcff/1", "/tv/G", 30 * HOUR, mount="/mnt\udcff")
    found = losses.load()
    assert {path: loss.titles for path, loss in found.items()} == {
        "/tv/A/1": 4, "/tv/A/2": 4, "/tv/B/1": 3, "/tv/C/1": 4, "/tv/E/1": 2, "/tv/F/1": 1,
        "/tv/G\udcff/1": 1,
    }  # fmt: skip
    assert found["/tv/G\udcff/1"].mount == "/mnt\\xff"
    assert abs(found["/tv/A/1"].gone_since - (losses.now - 30 * HOUR)) < 2
    assert all(loss.slowest_return == 0 for loss in found.values())


def test_what_came_back_by_itself_in_the_last_month(losses: Losses) -> None:
    for mount in ("/mnt", "/other", "/third"):
        losses.add(f"/tv/now{mount}", "/tv/now", HOUR, mount=mount, gone=None)
    losses.add("/tv/1", "/tv/A", 20 * HOUR, back=18 * HOUR, by_itself=True)
    losses.add("/tv/2", "/tv/A", 20 * HOUR, back=14 * HOUR, by_itself=True)
    losses.add("/tv/3", "/tv/A", 20 * HOUR, back=2 * HOUR)  # by a repair
    losses.add("/tv/4", "/tv/A", 33 * DAY, back=31 * DAY, by_itself=True)  # long ago
    losses.add("/tv/5", "/tv/A", 33 * DAY, back=29 * DAY, by_itself=True, mount="/other")
    found = losses.load()
    slowest = {path: loss.slowest_return for path, loss in found.items()}
    assert slowest == {"/tv/now/mnt": 6 * HOUR, "/tv/now/other": 4 * DAY, "/tv/now/third": 0}
    assert {loss.gone_since for loss in found.values()} == {None}


def test_the_last_loss_of_a_link_is_the_one_that_counts(losses: Losses) -> None:
    losses.add("/tv/1", "/tv/A", 90 * HOUR)
    losses.add("/tv/1", "/tv/A", 3 * HOUR)
    assert losses.load()["/tv/1"].gone_since > losses.now - 4 * HOUR
    with contextlib.closing(program.open_database(str(losses.db_path))) as conn:
        conn.execute("UPDATE losses SET back_utc = '2026-01-01'")
        assert program.load_losses(conn) == {}


def test_many_losses_are_loaded_by_few_queries_and_fast(losses: Losses) -> None:
    rows = [
        (f"/tv/{n % 7000}/{n}", f"/tv/{n % 7000}", losses.stamp(HOUR * (n % 40)), n % 3)
        for n in range(60000)
    ]
    with contextlib.closing(program.open_database(str(losses.db_path))) as conn:
        with program.transaction(conn):
            conn.executemany(
                "INSERT INTO losses (path, target, title, mount_point, lost_utc, gone_since_utc, "
                "back_utc) VALUES (?1, '/x', ?2, '/mnt', ?3, ?3, "
                "CASE ?4 WHEN 0 THEN ?3 END)",
                rows,
            )
        asked: List[str] = []
        conn.set_trace_callback(asked.append)
        started = time.process_time()
        assert len(program.load_losses(conn)) == 40000
        assert time.process_time() - started < 5
        assert len(asked) == 1


# --- Where something would be done -----------------------------------------------------------


class Stage:
    """A library with broken links that a relay would replace."""

    def __init__(self, program_: Refresherr, library: Library, relay: FakeRelay, file: Any) -> None:
        self.refresherr, self.library, self.relay = program_, library, relay
        self.write_config = file
        self.losses = Losses(program_.db_path)
        self.extra = ""

    def do(self, *args: object) -> Any:
        self.write_config(
            f"[scan]\nroots = {self.library.root}\n[repair]\nmin_age = 1h\n[relay]\n"
            f"base = {self.relay.url}\ntoken = {TOKEN}\n"
            f"routes = {self.library.root} => sonarr_tv\n{self.extra}"
        )
        return self.refresherr(*args, "--json").json

    def lose(self, count: int, ago: float, gone: Optional[float] = -1, first: int = 0) -> List[str]:
        """Have a scan find an episode of each of some shows gone, and date that back."""
        names = [f"Show {n}/Season 01/Show {n} - S01E01.mkv" for n in range(first, first + count)]
        paths = [str(self.library.link(name, f"release of {name[:6]}/1.mkv")) for name in names]
        for number in range(0 if first else 50):  # what stays says that the mount is well
            name = f"Well {number}/Season 01/Well {number} - S01E01.mkv"
            self.library.link(name, f"Well {number}/1.mkv")
        self.do("scan")
        for path in map(Path, paths):
            target_of(path).with_name("neighbour").touch()
            target_of(path).unlink()
        assert self.do("scan")["changes"]["newly_broken"] == count
        with contextlib.closing(sqlite3.connect(str(self.losses.db_path))) as conn, conn:
            conn.execute("DELETE FROM losses WHERE lost_utc > ?", (self.losses.stamp(60),))
            conn.executemany(
                "UPDATE symlinks SET broken_since_utc = ? WHERE path = ?",
                [(self.losses.stamp(ago), path) for path in paths],
            )
        for path in paths:
            title = str(Path(path).parent.parent)
            self.losses.add(path, title, ago, gone, str(self.library.mount))
        return paths

    def skipped(self, *args: object) -> Tuple[int, int, int]:
        """Return how many links `queue` takes, how many are too young, how many wait."""
        answer = self.do("queue", "-n", "--limit", 100, *args)
        skipped = answer["skipped"]
        assert bool(answer["waits"]) is bool(skipped["waiting"])
        return len(answer["queued"]), skipped["too_recent"], skipped["waiting"]


@pytest.fixture
def stage(
    refresherr: Refresherr, library: Library, write_config: Callable[[str], Path]
) -> Iterator[Stage]:
    with FakeRelay(TOKEN) as relay:
        yield Stage(refresherr, library, relay, write_config)


def test_queue_waits_as_long_as_patience_asks(stage: Stage) -> None:
    stage.lose(6, 2 * HOUR)
    assert stage.skipped() == (0, 0, 6)  # six titles: three hours
    assert stage.skipped("--min-age", "0") == (0, 0, 6)
    assert stage.skipped("--patience", "90m") == (6, 0, 0)
    assert stage.skipped("--patience", "0") == (6, 0, 0)
    assert stage.skipped("--patience", "0", "--min-age", "3h") == (0, 6, 0)
    text = stage.refresherr("queue", "-n").out
    assert re.search(
        rf"6 waiting\n6 links: waits until \d{{4}}-\d\d-\d\d \d\d:\d\d UTC: "
        rf"6 titles were lost on {stage.library.mount} within a day\n$",
        text,
    ), text


def test_few_titles_wait_for_min_age_alone(stage: Stage) -> None:
    stage.lose(2, 30 * MINUTE)
    assert stage.skipped() == (0, 2, 0)
    assert stage.skipped("--min-age", "20m") == (2, 0, 0)


def test_a_scan_that_could_not_tell_begins_it_anew(stage: Stage) -> None:
    stage.lose(1, 9 * HOUR, gone=None)
    assert stage.skipped() == (0, 0, 1)
    assert stage.skipped("--min-age", "0") == (0, 0, 1)
    with contextlib.closing(sqlite3.connect(str(stage.losses.db_path))) as conn, conn:
        conn.execute("UPDATE losses SET gone_since_utc = ?", (stage.losses.stamp(30 * MINUTE),))
    assert stage.skipped() == (0, 0, 1)
    assert stage.skipped("--min-age", "20m") == (1, 0, 0)


def test_broken_and_report_say_until_when_and_why(stage: Stage) -> None:
    (path, *_) = stage.lose(6, 2 * HOUR)
    link = next(x for x in stage.do("broken")["links"] if x["path"] == path)
    until = program.parse_time(link["waits_until"])
    assert until and abs(until - (stage.losses.now + HOUR)) < 2
    words = f"6 titles were lost on {stage.library.mount} within a day; then queue has the relay"
    assert link["next"].startswith("waits until ") and words in link["next"]
    assert words in stage.refresherr("broken").out
    page = Path(stage.do("report")["file"]).read_text()
    assert "waits until " in page and "titles were lost on" in page
    stage.do("queue", "--patience", "0")
    (link,) = [x for x in stage.do("broken")["links"] if x["path"] == path]
    assert (link["waits_until"], link["next"][:6]) == (None, "queued")


def test_dispatch_holds_what_must_wait_again(stage: Stage) -> None:
    stage.lose(2, 2 * HOUR)
    assert len(stage.do("queue")["queued"]) == 2
    stage.lose(6, 10 * MINUTE, first=2)  # more was lost on its mount meanwhile
    for words in (["dispatch"], ["dispatch", "--apply"]):
        result = stage.do(*words)
        assert [action["status"] for action in result["actions"]] == ["pending"] * 2
        assert "8 titles were lost" in result["actions"][0]["error"]
        assert (result["exit_code"], result["sent"], stage.relay.finds) == (0, 0, [])
    (link, *_) = stage.do("broken")["links"]
    assert link["next"].startswith("waits until ") and "then queued" in link["next"]
    assert "waits until " in stage.refresherr("dispatch").out
    with contextlib.closing(sqlite3.connect(str(stage.losses.db_path))) as conn, conn:
        conn.execute("UPDATE losses SET gone_since_utc = ?", (stage.losses.stamp(5 * HOUR),))
    assert stage.do("dispatch", "--apply")["sent"] == 2
    assert len(stage.relay.finds) == 2


def test_dispatch_sends_what_was_queued_without_patience(stage: Stage) -> None:
    stage.lose(6, 2 * HOUR)
    assert len(stage.do("queue", "--patience", "0")["queued"]) == 6
    assert stage.do("dispatch", "--apply")["sent"] == 6


def test_a_run_says_what_waits(stage: Stage) -> None:
    with FakeServer() as hook:
        stage.extra = f"[notify]\nwebhook = {hook.url}\nwhen = always\n"
        stage.lose(6, 2 * HOUR)
        result = stage.do("run", "--apply")
        assert result["queue"]["skipped"]["waiting"] == 6
        (line,) = result["queue"]["waits"]
        assert line.startswith("6 links: waits until ")
        assert line in str(hook.requests[-1].body)
    assert "6 links: waits until " in stage.refresherr("run", "-n").out
    assert stage.do("run", "--apply", "--patience", "0")["dispatch"]["sent"] == 6


def test_cinesync_waits_likewise(
    tmp_path: Path, refresherr: Refresherr, write_config: Callable[[str], Path]
) -> None:
    copies = CineSyncLibrary(tmp_path)
    parts = [Part(f"Harbour Lights {word}", 2001, 1, (1,)) for word in ("One", "Two", "Three")]
    paths = [copies.library_link(part, 1080, broken=True) for part in parts]
    for part, path in zip(parts, paths):
        copies.copy(part, 1080)
        Path(os.readlink(path)).with_name("neighbour").touch()
    for number in range(20):  # what stays says that the mount is well
        copies.library_link(Part(f"Paper Comet {number}", 2001, 1, (1,)), 1080, broken=False)
    write_config(
        f"[scan]\nroots = {copies.media}\n[cinesync]\nbase = {copies.base}\n"
        f"roots = {copies.media}\nallowed_targets = {copies.mount}\n"
    )
    refresherr("scan")
    losses = Losses(refresherr.db_path)
    with contextlib.closing(sqlite3.connect(str(losses.db_path))) as conn, conn:
        conn.execute("UPDATE symlinks SET status = 'broken', last_status = 'broken' "
                     "WHERE status <> 'ok'")  # fmt: skip
        conn.execute("UPDATE symlinks SET broken_since_utc = ? WHERE status = 'broken'",
                     (losses.stamp(HOUR),))  # fmt: skip
        conn.execute("DELETE FROM losses")
    for path in paths:
        losses.add(path, str(Path(path).parent.parent), HOUR, mount=str(copies.mount))
    for words in (["--apply"], ["--apply", "--min-age", "0"]):
        result = refresherr("cinesync", "--json", *words).json
        assert (result["replaced"], result["skipped"]) == (0, 3)
        assert all(item["reason"].startswith("waits until ") for item in result["items"])
        (line,) = result["waits"]
        assert line.startswith("3 links: waits until ")
    (link, *_) = refresherr("broken", "--json").json["links"]
    assert link["next"].count("waits until") == 1 and "then cinesync looks" in link["next"]
    words = ["--apply", "--min-age", "0", "--patience", "0"]
    assert refresherr("cinesync", "--json", *words).json["replaced"] == 3
    # A relinked link has not come back by itself.
    rows = refresherr.query("SELECT back_utc IS NOT NULL, came_back_by_itself FROM losses")
    assert rows == [(1, 0)] * 3
