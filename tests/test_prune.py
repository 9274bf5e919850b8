"""Removing what nobody can repair, and what undo takes back: real links, real kills."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any, List

import pytest
from cinesync_library import Part
from test_cinesync import MOVIE, SHOW, Stage, fill_season, in_a_process, stage

import refresherr as program

__all__ = ["stage"]
WAIT = program.Wait(0.0, "waiting", "")


def configure(stage: Stage, more: str = "") -> None:
    roots = "".join(f"\n    {root}" for root in stage.roots())
    stage.config = f"[scan]\nroots ={roots}\n[repair]\nmin_age = 0\npatience = 0\n{more}"


def write(stage: Stage, sql: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(str(stage.data / "symlinks.db"))) as conn, conn:
        conn.execute(sql, values)


def age(stage: Stage, days: int) -> None:
    """Let what is broken have been broken for so long."""
    since = program.format_time(time.time() - days * program.DAY)
    write(stage, "UPDATE symlinks SET broken_since_utc = ? WHERE status = 'broken'", since)


def note_ingest(stage: Stage, name: str) -> None:
    """Note that a server was read."""
    summary = f'{{"instances": [{{"name": "{name}", "error": null}}]}}'
    write(
        stage,
        "INSERT INTO runs (command, started_utc, summary) VALUES ('ingest', ?, ?)",
        program.utc_now(),
        summary,
    )


def prune(stage: Stage, *args: object) -> Any:
    return stage.run("prune", "--apply", *args)


def tree(stage: Stage) -> List[str]:
    return sorted(str(path) for path in stage.library.media.rglob("*"))


def test_prune_and_undo(stage: Stage) -> None:
    paths = fill_season(stage, 3)
    good = stage.library.library_link(MOVIE, 1080, broken=False)
    configure(stage)
    folder = Path(paths[0]).parent
    if os.geteuid() == 0:
        os.chown(stage.library.media / "tv", 12345, 12345)
    os.chmod(stage.library.media / "tv", 0o2770)
    stage.scan()
    before, texts = tree(stage), stage.texts()
    young = prune(stage)
    assert (young["kept"], young["items"], young["exit_code"]) == ({"too_recent": 3}, [], 0)
    age(stage, 31)
    preview = stage.run("prune")
    assert (preview["applied"], preview["run_id"], preview["removed"]) == (False, None, 0)
    assert {item["result"] for item in preview["items"]} == {"would remove"}
    assert tree(stage) == before

    first = prune(stage, "--limit", 1)
    assert (first["removed"], first["exit_code"], folder.is_dir()) == (1, 0, True)
    result = prune(stage)
    assert (result["removed"], result["skipped"], result["exit_code"]) == (2, 0, 0)
    item = result["items"][0]
    assert (item["from"], item["to"], item["result"]) == (texts[item["path"]], "", "removed")
    assert "nobody owns it" in item["reason"]
    assert stage.texts() == {good: texts[good]}
    assert not (stage.library.media / "tv").exists()
    assert stage.library.media.is_dir()
    assert stage.query("SELECT count(*) FROM symlinks WHERE status = 'missing'") == [(3,)]
    again = stage.run("scan")
    assert (again["exit_code"], again.get("message", "")) == (0, "")

    runs = stage.run("undo", "--list")["runs"]
    assert [(run["run_id"], run["command"], run["links"]) for run in runs] == [
        (result["run_id"], "prune", 2),
        (first["run_id"], "prune", 1),
    ]
    assert stage.run("undo", "--apply")["restored"] == 2
    assert stage.run("undo", first["run_id"], "--apply")["restored"] == 1
    assert (tree(stage), stage.texts()) == (before, texts)
    assert stage.run("undo", "--list")["runs"] == []
    assert stage.query("SELECT count(*) FROM symlinks WHERE status = 'broken'") == [(3,)]
    assert stage.run("prune")["items"], "the links are as old as they were"


def test_the_directories_come_back_as_the_ones_above_them(stage: Stage) -> None:
    (path,) = fill_season(stage, 1)
    configure(stage)
    stage.scan()
    age(stage, 31)
    os.chmod(stage.library.media, 0o2775)
    if os.geteuid() == 0:
        os.chown(stage.library.media, 12345, 12346)
    assert prune(stage)["removed"] == 1
    assert tree(stage) == []
    stage.run("undo", "--apply")
    above = os.stat(stage.library.media)
    for place in (Path(path).parent, Path(path).parent.parent):
        status = os.stat(place)
        assert (status.st_mode, status.st_uid, status.st_gid) == (
            above.st_mode, above.st_uid, above.st_gid)  # fmt: skip
    assert (os.lstat(path).st_uid, os.lstat(path).st_gid) == (above.st_uid, above.st_gid)


def test_what_somebody_else_needs_stays(stage: Stage) -> None:
    """A directory with a file in it, and what has come in a link's place."""
    paths = fill_season(stage, 2)
    configure(stage)
    Path(paths[0]).with_name("show.nfo").touch()
    stage.scan()
    age(stage, 31)
    assert prune(stage)["removed"] == 2
    assert Path(paths[0]).with_name("show.nfo").exists()
    Path(paths[0]).write_bytes(b"a file")
    os.symlink("/other", paths[1])
    for args in ([], ["--apply"]):
        result = stage.run("undo", *args)
        assert (result["restored"], result["skipped"], result["exit_code"]) == (0, 2, 3)
    assert Path(paths[0]).read_bytes() == b"a file"
    assert os.readlink(paths[1]) == "/other"


def test_undo_makes_no_root(stage: Stage) -> None:
    fill_season(stage, 1)
    configure(stage)
    stage.scan()
    age(stage, 31)
    assert prune(stage)["removed"] == 1
    shutil.rmtree(str(stage.library.media))
    result = stage.run("undo", "--apply")
    assert (result["restored"], result["skipped"]) == (0, 1)
    assert "is not there" in result["items"][0]["reason"]
    assert not stage.library.media.exists()


def test_an_undo_of_an_undo_removes_no_link(stage: Stage) -> None:
    (path,) = fill_season(stage, 1)
    configure(stage)
    stage.scan()
    age(stage, 31)
    prune(stage)
    stage.run("undo", "--apply")
    Path(os.readlink(path)).write_bytes(b"video")
    (number,) = stage.query("SELECT max(run_id) FROM runs WHERE command = 'undo'")[0]
    result = stage.run("undo", number, "--apply")
    assert (result["restored"], os.path.islink(path)) == (0, True)


@pytest.mark.parametrize(
    ("is_owned", "is_tagged", "repair", "until", "reason"),
    [(0, 0, "", 0, ""), (0, 0, "", 9, "waiting"), (1, 0, "", 0, "owned"),
     (1, 0, "exhausted", 0, ""),
     (1, 1, "exhausted", 0, "tagged"), (1, 0, "already_queued", 0, "already_queued"),
     (0, 0, "already_queued", 0, "already_queued"), (1, 0, "exhausted", 9, "waiting"),
     (0, 0, "exhausted", 0, "")],
)  # fmt: skip
def test_what_is_kept(is_owned: int, is_tagged: int, repair: str, until: int, reason: str) -> None:
    wait = WAIT._replace(until=float(until))
    assert program.why_kept(bool(is_owned), bool(is_tagged), repair, wait, 5.0) == reason


def test_what_has_an_owner_stays_until_its_repair_has_failed(stage: Stage) -> None:
    show, movie, relay = stage.broken(), stage.broken(MOVIE), stage.broken(Part("Iron River", 2004))
    subtitle = stage.broken(SHOW, 1080, "Harbour Lights (2001)/Season 01/S01E01.en.srt")
    tv, movies = stage.library.media / "tv", stage.library.media / "movies"
    sonarr = f"[sonarr tv]\nurl = http://127.0.0.1:9\napi_key = {'a' * 32}\nroots = {tv}\n"
    radarr = f"[radarr hd]\nurl = http://127.0.0.1:9\napi_key = {'b' * 32}\n"
    route = f"[relay]\nroutes = {os.path.dirname(relay)} => radarr_hd\n"
    configure(stage, sonarr + radarr + route)
    stage.scan()
    age(stage, 31)
    refused = prune(stage)
    assert (refused["exit_code"], len(stage.texts())) == (4, 4)
    assert all(name in refused["message"] for name in ("radarr_hd", "sonarr_tv"))
    note_ingest(stage, "sonarr_tv")
    note_ingest(stage, "radarr_hd")
    write(stage, "INSERT INTO movie_files (instance, original_path) VALUES ('radarr_hd', ?)", movie)
    assert prune(stage)["kept"] == {"owned": 4}

    url = "arr://sonarr_tv/repair?path=x"
    insert = """INSERT INTO actions (url, status, related_path, fired_utc, progress)
        VALUES (?, 'failed', ?, ?, '{"searches": 3}')"""
    write(stage, insert, url, show, program.format_time(time.time() - program.DAY))
    assert len(stage.run("broken")["links"]) == 4
    result = prune(stage)
    assert ([item["path"] for item in result["items"]], result["removed"]) == ([show], 1)
    assert "failed for good" in result["items"][0]["reason"]
    assert set(stage.texts()) == {movie, relay, subtitle}
    assert Path(subtitle).parent.is_dir()
    assert movies.is_dir()
    assert len(stage.run("broken")["links"]) == 3, "what was removed asks for nobody's attention"


def test_what_cannot_be_judged_now_stays(stage: Stage) -> None:
    """A link that works again, one of another target, and all of a mount that is gone."""
    paths = fill_season(stage, 3)
    configure(stage)
    stage.scan()
    age(stage, 31)
    Path(os.readlink(paths[0])).write_bytes(b"video")
    os.unlink(paths[1])
    os.symlink("/nowhere/else", paths[1])
    away = stage.library.mount.with_name("away")
    stage.library.mount.rename(away)
    result = prune(stage)
    assert (result["exit_code"], result["removed"], len(stage.texts())) == (4, 0, 3)
    away.rename(stage.library.mount)
    result = prune(stage)
    assert (result["removed"], result["skipped"]) == (1, 2)
    assert sorted(stage.texts()) == sorted(paths[:2])


def test_patience_holds(stage: Stage) -> None:
    fill_season(stage, 4)
    configure(stage)
    stage.config = stage.config.replace("patience = 0", "patience = 48h")
    stage.scan()
    age(stage, 31)
    loss = """INSERT INTO losses (path, target, title, mount_point, lost_utc, gone_since_utc)
        SELECT path, last_target, path, '/', ?, NULL FROM symlinks WHERE status = 'broken'"""
    write(stage, "DELETE FROM losses")
    write(stage, loss, program.utc_now())
    assert prune(stage)["kept"] == {"waiting": 4}
    assert len(stage.texts()) == 4


def test_a_killed_prune(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each link is there or not, what is not there is journalled, the next run does the rest."""
    monkeypatch.setattr(program, "CHANGES_AT_ONCE", 10)
    fill_season(stage, 60)
    configure(stage)
    before, stages, partly, stuck = tree(stage), stage.texts(), 0, 0
    first, last = min(stages), max(stages)
    stage.scan()
    age(stage, 31)
    argv = stage.argv("prune", "--apply")
    chance = random.Random(3)
    for _ in range(6):
        pid = in_a_process(argv)
        limit = time.monotonic() + 20
        while all(map(os.path.lexists, (first, last))):
            assert time.monotonic() < limit
            time.sleep(0.0005)
        time.sleep(chance.random() * 0.05)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        now = stage.texts()
        assert all(stages[path] == text for path, text in now.items())
        partly += 0 < len(now) < 60
        known = """SELECT count(DISTINCT path) FROM link_changes
            WHERE state IN ('planned', 'removed')"""
        assert stage.query(known)[0][0] >= 60 - len(now)
        stuck += bool(stage.query("SELECT 1 FROM link_changes WHERE state = 'planned'"))
        prune(stage)
        assert tree(stage) == []
        assert not stage.query("SELECT 1 FROM link_changes WHERE state = 'planned'")
        for run in stage.run("undo", "--list")["runs"]:
            stage.run("undo", run["run_id"], "--apply")
        assert (tree(stage), stage.texts()) == (before, stages)
    assert partly
    assert stuck


def test_what_was_taken_back_is_left_alone(stage: Stage) -> None:
    (path,) = fill_season(stage, 1)
    configure(stage, f"[sonarr tv]\nurl = http://127.0.0.1:9\napi_key = {'a' * 32}\n"
        f"roots = {stage.library.media}\n")  # fmt: skip
    stage.scan()
    old = stage.texts()
    assert stage.cinesync()["replaced"] == 1
    stage.run("undo", "--apply")
    for _ in range(2):
        result = stage.cinesync()
        assert (result["replaced"], result["exit_code"]) == (0, 0)
        assert "undo has put it back" in result["items"][0]["reason"]
        assert stage.run("queue", "-n")["skipped"]["taken_back"] == 1
        assert stage.texts() == old
        stage.scan()
    file = Path(os.readlink(path))
    file.write_bytes(b"video")  # its target changes
    stage.scan()
    file.unlink()
    stage.scan()
    assert stage.cinesync()["replaced"] == 1
    stage.run("undo", "--apply")
    assert stage.cinesync()["replaced"] == 0
    os.unlink(path)  # the link changes
    os.symlink(str(file.with_name("other 1080p.mkv")), path)
    stage.scan()
    assert stage.cinesync()["replaced"] == 1
    stage.run("undo", "--apply")
    os.unlink(path)  # to the same place, which is missing, in other words: it has changed, too
    os.symlink(str(file.parent) + "/./other 1080p.mkv", path)
    stage.scan()
    assert stage.cinesync()["replaced"] == 1
