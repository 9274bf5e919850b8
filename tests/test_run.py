"""`run`: all steps under one lock, one summary, one message; and nothing at all in an outage."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from conftest import Refresherr, target_of
from fake_servers import FakeRadarr, FakeServer, Record, Reply, Request
from fuse_fs import FuseMount, fuse_available, tmpfs_available
from test_repair import FAST, World

import refresherr as program

MS_BIND, MNT_DETACH = 4096, 2


class Listener(FakeServer):
    """Plex, Jellyfin, a webhook and a monitor behind one port."""

    sections: List[Record] = []

    def answer(self, request: Request) -> Reply:
        if request.path == "/library/sections":
            found = [{"key": "7", "Location": [{"path": path}]} for path in self.sections]
            text = json.dumps({"MediaContainer": {"Directory": found}})
            return Reply(200, text.encode(), {"Content-Type": "application/json"})
        if request.path == "/Library/Media/Updated":
            return Reply(204)
        return Reply(200, b'{"ok": true}', {"Content-Type": "application/json"})

    def posts(self, path: str) -> List[Any]:
        return [request.body for request in self.requests if request.path == path]

    def paths(self) -> List[str]:
        return [request.path for request in self.requests]


class Stage(World):
    """A library with CineSync, a Radarr, a Plex, and everybody who wants to be told."""

    def __init__(
        self, folder: Path, refresherr: Refresherr, write_config: Callable[[str], Path]
    ) -> None:
        super().__init__(folder, refresherr, write_config)
        self.ears = self.stack.enter_context(Listener())
        self.ears.sections = [str(self.media)]
        self.base = folder / "CineSync"
        (self.base / "Movies").mkdir(parents=True)
        self.copy("Nobody Asked")
        self.movies = self.radarr()
        url = self.ears.url
        self.sections["scan"]["max_new_broken"] = "100%"
        self.sections["cinesync"] = {
            "base": str(self.base),
            "roots": str(self.media),
            "allowed_targets": str(self.cloud),
        }
        self.sections["notify"] = {
            "webhook": f"{url}/hook",
            "healthchecks": f"{url}/beat-0123456789",
        }
        self.sections["plex"] = {"url": url, "token": "plex-token-0123456789"}
        self.sections["jellyfin"] = {"url": url, "api_key": "jellyfin-key-0123456789"}
        self.secrets += ["plex-token-0123456789", "jellyfin-key-0123456789", "beat-0123456789"]

    def copy(self, title: str) -> Path:
        """Have CineSync know a copy of a movie; return the file behind it."""
        file = self.cloud / f"{title.replace(' ', '.')}.2021.1080p-NEW" / f"{title}.1080p.mkv"
        file.parent.mkdir()
        file.write_bytes(b"copy")
        folder = self.base / "Movies" / f"{title} (2021)"
        folder.mkdir()
        (folder / f"{title} (2021) 1080p.mkv").symlink_to(file)
        return file

    def run(self, *args: object, **env: str) -> Record:
        return self.do("run", "--no-wait", "--apply", *args, **env)

    def told(self) -> List[Any]:
        """Return what the webhook got since the last call."""
        found = self.ears.posts("/hook")
        self.ears.clear_requests()
        return found

    def link_of(self, movie: int) -> Path:
        return self.movies.link_of(self.movies.movies[movie]["movieFileId"])


@pytest.fixture
def stage(
    tmp_path: Path, refresherr: Refresherr, write_config: Callable[[str], Path]
) -> Iterator[Stage]:
    stage = Stage(tmp_path, refresherr, write_config)
    with stage.stack:
        stage.bystanders(3)
        yield stage
        stage.examine()


def codes(result: Record) -> List[int]:
    return [result[name]["exit_code"] for name in program.STEPS]


def test_one_run_does_all_of_it(stage: Stage) -> None:
    healthy = stage.link_of(stage.movie(stage.movies, "Paper Comet", broken=False))
    relinked = stage.link_of(stage.movie(stage.movies, "Amber River"))
    lost = stage.movie(stage.movies, "Iron Garden")
    removed = stage.link_of(lost)
    copy = stage.copy("Amber River")

    result = stage.run()
    assert result["exit_code"] == 0 and codes(result) == [0] * 6
    assert result["scan"]["totals"]["broken"] == 2
    assert result["ingest"]["instances"][0]["files"] == 3
    assert result["cinesync"]["replaced"] == 1 and target_of(relinked) == copy
    assert len(result["queue"]["queued"]) == 1 and result["dispatch"]["sent"] == 1
    assert [body["movieIds"] for body in stage.movies.searches] == [[lost]]
    assert not removed.is_symlink() and healthy.exists()
    # Plex hears of exactly the directory that changed, Jellyfin of the link, once.
    asked = [r.query["path"] for r in stage.ears.requests if r.path.endswith("/refresh")]
    assert asked == [[str(relinked.parent)]]
    (update,) = stage.ears.posts("/Library/Media/Updated")
    assert [entry["Path"] for entry in update["Updates"]] == [str(relinked)]
    beats = [path for path in stage.ears.paths() if path.startswith("/beat")]
    assert beats == ["/beat-0123456789/start", "/beat-0123456789"]
    (note,) = stage.told()
    assert note["counts"]["relinked"] == 1 and note["counts"]["sent"] == 1
    assert relinked.name in note["text"] and removed.name in note["text"]

    stage.movies.tick()  # the download is there
    result = stage.run()
    assert result["exit_code"] == 0 and result["news"] and stage.status_of(removed) == "repaired"
    (note,) = stage.told()
    assert note["counts"]["repaired"] == 1

    result = stage.run()  # and now nothing is to be told
    assert result["exit_code"] == 0 and not result["news"]
    assert result["ingest"]["status"] == result["cinesync"]["status"] == "skipped"
    assert stage.ears.paths() == ["/beat-0123456789/start", "/beat-0123456789"]


def test_a_preview_is_complete_and_changes_nothing(stage: Stage) -> None:
    link = stage.link_of(stage.movie(stage.movies, "Amber River"))
    stage.movie(stage.movies, "Iron Garden")
    stage.copy("Amber River")
    stage.sections["notify"]["when"] = "always"
    before = target_of(link)
    for _ in range(2):
        result = stage.do("run")
        assert result["exit_code"] == 0 and not result["applied"]
        assert result["cinesync"]["items"][0]["result"] == "would replace"
        # The preview cannot know what CineSync will have repaired by then.
        assert {a["status"] for a in result["dispatch"]["actions"]} == {"would send"}
        assert result["refresh"]["servers"][0]["directories"] == [str(link.parent)]
        assert stage.statuses() == {}  # nothing is queued for a later dispatch
    assert target_of(link) == before and not stage.changes() and not stage.ears.requests
    assert stage.refresherr.statuses()[str(link)] == "broken"  # the scan itself is recorded
    result = stage.call("run")
    assert result.code == 0 and "a preview" in result.out and "would replace" in result.out
    dry = stage.run("-n")
    assert not dry["applied"] and target_of(link) == before and not stage.changes()
    assert not stage.ears.requests


def test_a_dry_run_leaves_no_database_behind(stage: Stage) -> None:
    stage.movie(stage.movies, "Iron Garden")
    result = stage.run("-n", REFRESHERR_APPLY="1")
    assert result["dispatch"]["actions"][0]["status"] == "would send"
    assert not stage.refresherr.data_dir.exists() and not stage.changes()


def test_a_step_that_fails_stops_no_other_and_is_told_once(stage: Stage) -> None:
    stage.movie(stage.movies, "Iron Garden")
    relinked = stage.link_of(stage.movie(stage.movies, "Amber River"))
    copy = stage.copy("Amber River")
    stage.movies.close()
    result = stage.run()
    assert result["exit_code"] == 3 and result["status"] == "partial"
    assert result["ingest"]["exit_code"] == 1 and target_of(relinked) == copy
    assert "ingest error" in result["message"] and "radarr_movies" in result["message"]
    (note,) = stage.told()
    assert "ingest error" in note["title"] and note["level"] in ("warning", "failure")
    assert stage.run()["exit_code"] == 3
    assert stage.told() == []
    stage.movies.open()
    stage.make_due()
    result = stage.run()  # a server that failed is read again, the day not over
    assert result["exit_code"] == 0 and result["ingest"]["status"] == "ok"
    (note,) = stage.told()
    assert "no longer: ingest error" in note["title"]


def test_a_step_with_nothing_to_do_ends_no_problem(stage: Stage) -> None:
    shutil.rmtree(stage.base / "Movies")
    stage.movie(stage.movies, "Iron Garden")
    result = stage.run("--max", 0)
    assert result["cinesync"]["exit_code"] == 4
    assert [note["title"] for note in stage.told()] == ["Refresherr: cinesync refused"]
    assert stage.run()["dispatch"]["sent"] == 1
    assert [note["title"] for note in stage.told()] == ["Refresherr: 1 sent, cinesync refused"]
    result = stage.run()
    assert result["cinesync"]["status"] == "skipped" and stage.told() == []
    stage.movie(stage.movies, "Hollow Station")
    stage.sections["repair"]["min_age"] = "1h"
    assert stage.run()["cinesync"]["exit_code"] == 4 and stage.told() == []


class Bind:
    """A directory of the disk, mounted: it can go and come back with all it holds."""

    def __init__(self, source: Path, point: Path) -> None:
        self.source, self.point = source, point
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.mount()

    def mount(self) -> None:
        args = (os.fsencode(self.source), os.fsencode(self.point), b"", MS_BIND, None)
        assert self.libc.mount(*args) == 0, os.strerror(ctypes.get_errno())

    def unmount(self) -> bool:
        return bool(self.libc.umount2(os.fsencode(self.point), MNT_DETACH) == 0)


@pytest.fixture
def mount(stage: Stage, tmp_path: Path) -> Iterator[Bind]:
    """The cloud as a mount of its own."""
    problem = tmpfs_available()
    if problem:
        pytest.skip(f"no mounts here: {problem}")
    backing = tmp_path / "backing"
    stage.cloud.rename(backing)
    stage.cloud.mkdir()
    bind = Bind(backing, stage.cloud)
    try:
        yield bind
    finally:
        while bind.unmount():
            pass
        stage.cloud.rmdir()
        backing.rename(stage.cloud)  # for the examination


def lose_movies(stage: Stage) -> List[Path]:
    ids = [stage.movie(stage.movies, f"Hollow Station {n}") for n in range(5)]
    return [stage.link_of(number) for number in ids]


def start_repairs(stage: Stage) -> None:
    """Leave behind a repair in each of its steps, and links that only wait."""
    stage.sections["repair"]["limit"] = "4"
    stage.do("scan")
    stage.do("ingest")
    stage.do("queue")
    assert stage.do("dispatch", "--apply", "--no-wait", "--max", 3)["sent"] == 3
    steps = stage.refresherr.query("SELECT id, progress FROM actions ORDER BY id")
    for (number, progress), step in zip(steps, ("deleted", "restored")):
        changed = json.dumps({**json.loads(progress), "step": step})
        stage.alter(
            "UPDATE actions SET status = 'pending', progress = ? WHERE id = ?", changed, number
        )
    stage.pass_hours(7)  # the cooldown of the third is over
    stage.forget_requests()


@pytest.mark.parametrize("how", ["unmounted", "emptied", "a sentinel"])
def test_an_outage_changes_nothing_and_is_told_once(stage: Stage, mount: Bind, how: str) -> None:
    waiting = stage.link_of(stage.movie(stage.movies, "Winter Choir"))
    stage.copy("Winter Choir")
    links = lose_movies(stage)
    start_repairs(stage)
    stage.sections["repair"]["limit"] = "25"
    if how == "a sentinel":
        (stage.cloud / ".online").write_text("yes")
        stage.sections["scan"]["mount_checks"] = str(stage.cloud / ".online")
    stage.told()
    before = {path: os.readlink(path) for path in stage.media.rglob("*") if path.is_symlink()}
    statuses = stage.statuses()

    mount.unmount()
    empty = stage.folder / "empty"
    if how == "emptied":
        empty.mkdir()
        over = Bind(empty, stage.cloud)
    for _ in range(3):
        result = stage.run()
        assert result["exit_code"] == 4 and result["status"] == "refused"
        assert not stage.changes()
    notes = stage.ears.posts("/hook")
    assert len(notes) == 1 and "refused" in notes[0]["title"]
    beats = [path for path in stage.ears.paths() if path.startswith("/beat")]
    assert beats == ["/beat-0123456789/start", "/beat-0123456789/4"] * 3
    assert not any("refresh" in path or "Updated" in path for path in stage.ears.paths())
    after = {path: os.readlink(path) for path in stage.media.rglob("*") if path.is_symlink()}
    assert after == before and stage.statuses() == statuses

    if how == "emptied":
        over.unmount()
    mount.mount()
    stage.told()
    result = stage.run()  # nobody has to do anything
    assert result["exit_code"] == 0, result
    assert result["cinesync"]["replaced"] == 1 and os.path.exists(waiting), result["cinesync"]
    assert sorted(stage.movies.searches[-1]["movieIds"]) and stage.statuses() == {"sent": 5}
    assert not any(link.is_symlink() for link in links)
    (note,) = stage.told()
    assert "no longer: scan refused" in note["title"]


def test_what_the_guard_holds_is_told_once(stage: Stage) -> None:
    del stage.sections["scan"]["max_new_broken"]
    movies = [stage.movie(stage.movies, f"Title {n}", broken=False) for n in range(20)]
    links = list(map(stage.link_of, movies))
    assert stage.run()["exit_code"] == 0
    stage.told()
    for link in links[:15]:
        stage.spoil(link)
    for count in (1, 0):
        result = stage.run()
        assert result["exit_code"] == 4 and result["scan"]["guard"]["held_back"] == 15
        assert len(stage.told()) == count
    assert not stage.changes() and all(link.is_symlink() for link in links)
    for link in links[:15]:
        stage.heal(link)
    assert stage.run()["exit_code"] == 0
    over = f"Refresherr: no longer: scan refused: {stage.cloud}"
    assert [note["title"] for note in stage.told()] == [over]
    for link in links[:15]:
        stage.spoil(link)
    assert stage.run()["exit_code"] == 4
    result = stage.run("--accept-breakage", "--max", 2)
    assert result["exit_code"] == 0 and result["dispatch"]["sent"] == 2


def test_a_scan_that_fails_as_a_whole_stops_the_repair(stage: Stage) -> None:
    link = stage.link_of(stage.movie(stage.movies, "Iron Garden"))
    stage.do("scan")
    stage.do("queue")
    stage.media.rename(stage.folder / "away")
    result = stage.run()
    assert result["exit_code"] == 3 and result["scan"]["exit_code"] == 1
    assert result["dispatch"]["message"] == "the scan failed"
    assert not stage.changes() and stage.statuses() == {"pending": 1}
    (stage.folder / "away").rename(stage.media)
    assert stage.run()["dispatch"]["sent"] == 1 and not link.is_symlink()


def test_servers_are_read_once_a_day(stage: Stage) -> None:
    assert stage.run()["ingest"]["status"] == "ok"
    assert stage.run()["ingest"]["message"] == "all servers were read lately"
    new = stage.sonarr()
    result = stage.run()["ingest"]
    assert [line["name"] for line in result["instances"]] == ["sonarr_tv"]
    assert new.requests
    stage.alter("UPDATE runs SET started_utc = '2024-01-31T00:00:00+00:00'")
    assert len(stage.run()["ingest"]["instances"]) == 2
    stage.alter("UPDATE runs SET started_utc = '2099-01-31T00:00:00+00:00'")  # the clock was wrong
    assert len(stage.run()["ingest"]["instances"]) == 2
    stage.sections["run"] = {"ingest_every": "0"}
    assert len(stage.run()["ingest"]["instances"]) == 2
    assert stage.run("--no-ingest")["ingest"]["message"] == "as asked"


def test_one_lock_for_all_of_it(stage: Stage) -> None:
    stage.movies.script(path_regex="/system/status", delay=3.0, times=1)
    stage.configure()
    process = stage.refresherr.start("run", "--apply", "--json")
    while not stage.movies.requests:
        assert process.poll() is None
        time.sleep(0.02)
    assert stage.refresherr("scan").code == 5
    assert stage.refresherr("run").code == 5
    out, _ = process.communicate(timeout=60)
    assert json.loads(out)["exit_code"] == 0


def test_a_run_is_undone_by_its_own_number(stage: Stage) -> None:
    link = stage.link_of(stage.movie(stage.movies, "Amber River"))
    before = target_of(link)
    stage.copy("Amber River")
    run_id = stage.run()["run_id"]
    stage.told()
    assert target_of(link) != before
    assert stage.do("undo", run_id, "--apply")["restored"] == 1
    assert target_of(link) == before
    stage.run("--no-cinesync", "--max", 0)  # the media servers hear of that, too
    (update,) = stage.ears.posts("/Library/Media/Updated")
    assert [entry["Path"] for entry in update["Updates"]] == [str(link)]


def test_who_does_not_answer_changes_no_result(stage: Stage) -> None:
    stage.sections["repair"]["timeout"] = "1s"
    stage.ears.script(path_regex="/hook|/beat", kind="hang", times=9)
    stage.movie(stage.movies, "Iron Garden")
    result = stage.run()
    assert result["exit_code"] == 0 and result["dispatch"]["sent"] == 1
    assert result["notified"][0]["error"] and all(beat["error"] for beat in result["heartbeats"])


def test_what_nobody_heard_is_told_again(stage: Stage) -> None:
    stage.ears.script(path_regex="/hook", status=404, times=1)
    stage.movies.close()
    assert stage.run()["notified"][0]["error"]
    assert not stage.run()["notified"][0]["error"]
    assert stage.run()["notified"] == []


def test_a_media_server_that_is_down_is_told_the_next_time(stage: Stage) -> None:
    link = stage.link_of(stage.movie(stage.movies, "Amber River"))
    stage.copy("Amber River")
    stage.ears.script(path_regex="/Library/Media/Updated", status=503, times=9)
    result = stage.run()
    assert result["exit_code"] == 3 and result["refresh"]["exit_code"] == 3
    assert "jellyfin" in result["message"] and os.path.exists(link)
    stage.ears.scripts.clear()
    stage.told()
    assert stage.run()["exit_code"] == 0
    (update,) = stage.ears.posts("/Library/Media/Updated")
    assert [entry["Path"] for entry in update["Updates"]] == [str(link)]
    assert not any(path.endswith("/refresh") for path in stage.ears.paths())  # Plex has heard
    stage.told()
    stage.run()
    assert not stage.ears.posts("/Library/Media/Updated")


def test_a_link_that_comes_back_is_told(stage: Stage) -> None:
    link = stage.link_of(stage.movie(stage.movies, "Paper Comet"))
    stage.run("--max", 0)
    stage.told()
    stage.heal(link)
    assert stage.do("scan")["changes"]["recovered"] == 1  # by another command, in between
    stage.run()
    (update,) = stage.ears.posts("/Library/Media/Updated")
    assert [entry["Path"] for entry in update["Updates"]] == [str(link)]


@pytest.mark.parametrize(
    "when, uneventful, repair, failure",
    [("changes", 0, 1, 1), ("failures", 0, 0, 1), ("always", 1, 1, 1)],
)
def test_when(stage: Stage, when: str, uneventful: int, repair: int, failure: int) -> None:
    stage.sections["notify"]["when"] = when
    stage.run()
    assert len(stage.told()) == uneventful
    stage.movie(stage.movies, "Iron Garden")
    assert stage.run()["dispatch"]["sent"] == 1
    assert len(stage.told()) == repair
    stage.media.rename(stage.folder / "away")
    stage.run()
    assert len(stage.told()) == failure
    (stage.folder / "away").rename(stage.media)


def test_quiet_speaks_of_what_is_new_only(stage: Stage) -> None:
    assert stage.call("run", "-q", "--apply").out == ""
    stage.movie(stage.movies, "Iron Garden")
    out = stage.call("run", "-q", "--apply", "--no-wait").out
    assert "1 sent" in out and "Iron Garden" in out
    result = stage.call("run", "-q", "--apply")
    assert result.out == result.err == ""


def test_a_run_has_its_time(stage: Stage) -> None:
    stage.movie(stage.movies, "Iron Garden")
    result = stage.run("--time-limit", "0.000001s")
    assert result["exit_code"] == 3 and codes(result) == [3, 0, 3, 0, 3, 3]
    assert not stage.changes()
    stage.movies.script(path_regex="/system/status", delay=1.0, times=1)  # while it ingests
    result = stage.run("--time-limit", "1s")
    assert result["exit_code"] == 3 and result["scan"]["exit_code"] == 0
    assert result["ingest"]["exit_code"] == 3  # in the middle of it
    assert result["dispatch"]["exit_code"] == 3 and not stage.changes()
    assert stage.run()["dispatch"]["sent"] == 1


def wait_for(process: subprocess.Popen[str], condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("as_json", [False, True])
def test_every_stays_and_ends_when_asked(stage: Stage, as_json: bool) -> None:
    stage.configure()
    flags = ["--json"] if as_json else []
    process = stage.refresherr.start("run", "--apply", "--every", "1s", *flags)
    wait_for(process, lambda: stage.ears.paths().count("/beat-0123456789") >= 2)
    time.sleep(0.3)  # asleep again
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    if as_json:
        assert json.loads(out)["runs"] >= 2 and json.loads(out)["last"]["exit_code"] == 0
    else:
        assert out.count("scan\n") >= 2 and "ended after" in out


def test_every_survives_a_lock_and_not_a_typo(stage: Stage) -> None:
    stage.configure()
    with program.process_lock(str(stage.refresherr.db_path), 0):
        process = stage.refresherr.start("run", "--apply", "--every", "0.2s")
        assert "another run" in (process.stderr.readline() if process.stderr else "")
    wait_for(process, lambda: "/beat-0123456789" in stage.ears.paths())
    process.terminate()
    process.communicate(timeout=30)
    stage.sections["scan"]["roots"] = ""
    assert stage.call("run", "--every", "1s").code == 2
    assert stage.call("run", "--every", "0").code == 2


def test_a_run_that_is_interrupted_says_so(stage: Stage) -> None:
    stage.movie(stage.movies, "Iron Garden")
    stage.movies.script(path_regex="/movie$", delay=5.0, times=1)
    stage.configure()
    process = stage.refresherr.start("run", "--apply", "--json")
    wait_for(process, lambda: any(r.path.endswith("/movie") for r in stage.movies.requests))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and json.loads(out)["status"] == "interrupted", err
    assert stage.ears.paths()[-1] == "/beat-0123456789/130"
    rows = stage.refresherr.query("SELECT command, exit_code FROM runs ORDER BY run_id")
    assert rows[0] == ("run", 130) and not stage.changes()
    assert stage.run()["dispatch"]["sent"] == 1


def test_combine_exit_codes() -> None:
    combine = program.combine_exit_codes
    assert combine([0, 0]) == 0 and combine([]) == 0
    assert combine([0, 4, 1, 3]) == 4
    assert combine([1, 0]) == combine([3]) == combine([1, 3]) == combine([2, 0]) == 3
    assert combine([1, 1]) == combine([1, 2]) == 1


def test_a_radarr_alone_needs_no_media_server(stage: Stage) -> None:
    for section in ("plex", "jellyfin", "notify"):
        del stage.sections[section]
    assert isinstance(stage.movies, FakeRadarr)
    stage.movie(stage.movies, "Iron Garden")
    result = stage.run()
    assert result["refresh"]["status"] == "skipped" and result["notified"] == []
    assert result["heartbeats"] == [] and not stage.ears.requests


def test_an_empty_directory_whose_name_is_not_utf8(stage: Stage) -> None:
    empty = stage.folder / "shows \udcff" / "release"
    empty.mkdir(parents=True)
    link = stage.media / "movies" / "Odd Name (2021)" / "Odd Name (2021).mkv"
    link.parent.mkdir()
    link.symlink_to(empty / "file.mkv")
    for _ in range(2):
        assert stage.run()["scan"]["exit_code"] == 4
    assert stage.refresherr.statuses()[str(link)] == "unreachable"
    assert "shows \\xff" in stage.call("broken", "--status", "unreachable").out


def test_a_failure_of_a_name_that_is_not_utf8_stops_nothing(stage: Stage) -> None:
    name = "Odd \udcff Name (2021)"
    stage.link(stage.media / "movies" / name / f"{name}.mkv", broken=True)  # nobody knows it
    stage.movie(stage.movies, "Iron Garden")
    result = stage.run()
    assert result["dispatch"]["failed"] == 1 and result["dispatch"]["sent"] == 1
    assert "Odd \\xff Name" in stage.call("actions").out
    assert "failed: Odd \\xff Name (2021).mkv" in stage.told()[0]["text"]


@pytest.mark.parametrize("step", ["restored", "sent"])
def test_an_outage_behind_relative_links_of_a_root_that_is_a_link(
    stage: Stage, mount: Bind, step: str
) -> None:
    real = stage.folder / "deeply" / "hidden" / "media"
    real.parent.mkdir(parents=True)
    stage.media.rename(real)
    stage.media.symlink_to(real)
    link = stage.link_of(stage.movie(stage.movies, "Iron Garden"))
    target = os.path.relpath(target_of(link), os.path.realpath(link.parent))
    link.unlink()
    link.symlink_to(target)
    assert stage.run()["dispatch"]["sent"] == 1
    if step == "restored":
        pending = "UPDATE actions SET status = 'pending', progress = replace(progress, ?, ?)"
        stage.alter(pending, '"step": "sent"', '"step": "restored"')
    stage.pass_hours(7)
    stage.forget_requests()
    mount.unmount()
    assert stage.run()["dispatch"]["exit_code"] == 4 and not stage.changes()
    mount.mount()
    assert stage.run()["dispatch"]["sent"] == 1


def test_a_mount_that_goes_while_files_are_deleted(
    stage: Stage, mount: Bind, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = [stage.movie(stage.movies, f"Iron Garden {n}") for n in range(3)]
    answer = stage.movies.answer

    def unmount_first(request: Request) -> Reply:
        if request.method == "DELETE":
            mount.unmount()
        return answer(request)

    monkeypatch.setattr(stage.movies, "answer", unmount_first)
    result = stage.run()
    assert result["dispatch"]["exit_code"] == 4 and result["dispatch"]["sent"] == 0
    assert [method for method, _ in stage.changes()] == ["DELETE"]
    monkeypatch.undo()
    mount.mount()
    assert stage.run()["exit_code"] == 0
    assert sorted(number for body in stage.movies.searches for number in body["movieIds"]) == lost


@pytest.mark.parametrize("step", ["restored", "searching"])
def test_what_came_back_after_a_kill_is_not_searched_for(stage: Stage, step: str) -> None:
    link = stage.link_of(stage.movie(stage.movies, "Iron Garden"))
    assert stage.run()["dispatch"]["sent"] == 1
    stage.movies.tick()
    stage.movies.commands.clear()
    pending = "UPDATE actions SET status = 'pending', progress = replace(progress, ?, ?)"
    stage.alter(pending, '"step": "sent"', f'"step": "{step}"')
    stage.forget_requests()
    for _ in range(2):
        assert stage.run()["exit_code"] == 0
    assert not stage.changes() and stage.status_of(link) == "repaired"


def test_every_confirms_a_loss_once(stage: Stage) -> None:
    del stage.sections["scan"]["max_new_broken"]
    links = [
        stage.link_of(stage.movie(stage.movies, f"Title {n}", broken=False)) for n in range(40)
    ]
    stage.run()
    for link in links[:15]:
        stage.spoil(link)
    assert stage.run()["exit_code"] == 4  # what no scan has held yet is not accepted
    stage.told()
    flags = ("--apply", "--max", 0, "--accept-breakage")
    process = stage.refresherr.start("run", "--every", "0.3s", *flags)
    wait_for(process, lambda: "/beat-0123456789" in stage.ears.paths())
    for link in links[15:]:
        stage.spoil(link)
    seen = len(stage.ears.requests)
    wait_for(process, lambda: len(stage.ears.requests) >= seen + 6)  # the next run is in it
    process.terminate()
    process.communicate(timeout=30)
    statuses = list(stage.refresherr.statuses().values())
    assert statuses.count("broken") < 40 and statuses.count("unreachable") > 0


def test_every_survives_a_database_that_refuses(stage: Stage) -> None:
    stage.run()
    stage.told()
    stage.alter("CREATE TRIGGER full BEFORE INSERT ON runs BEGIN SELECT RAISE(ABORT, 'no'); END")
    process = stage.refresherr.start("run", "--apply", "--every", "0.2s")
    for _ in range(2):
        assert "symlinks.db: no" in (process.stderr.readline() if process.stderr else "")
    stage.alter("DROP TRIGGER full")
    wait_for(process, lambda: "/beat-0123456789" in stage.ears.paths())
    process.terminate()
    assert process.wait(timeout=30) in (0, 130)


def test_every_ends_when_nobody_reads_it(stage: Stage) -> None:
    stage.configure()
    process = stage.refresherr.start("run", "--every", "0.1s")
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.wait(timeout=30) == 0 and "internal" not in process.stderr.read()


def test_media_servers_hear_of_the_first_run_though_it_was_killed(stage: Stage) -> None:
    link = stage.link_of(stage.movie(stage.movies, "Amber River"))
    stage.copy("Amber River")
    stage.movie(stage.movies, "Iron Garden")
    stage.movies.script(path_regex="/rootfolder", delay=5.0, times=1)
    stage.configure()
    process = stage.refresherr.start("run", "--apply")
    wait_for(process, lambda: any("rootfolder" in r.path for r in stage.movies.requests))
    process.kill()
    process.communicate()
    stage.movies.scripts.clear()
    assert link.exists() and stage.run()["exit_code"] == 0
    (update,) = stage.ears.posts("/Library/Media/Updated")
    assert [entry["Path"] for entry in update["Updates"]] == [str(link)]


def test_a_long_timeout_leaves_no_directory_behind(stage: Stage) -> None:
    for title in ("Amber River", "Paper Comet"):
        stage.movie(stage.movies, title)
        stage.copy(title)
    stage.sections["repair"]["timeout"] = "5m"
    assert stage.run()["exit_code"] == 0


def test_a_run_in_time_asks_after_no_more_searches(stage: Stage) -> None:
    for number in range(8):
        stage.movie(stage.movies, f"Iron Garden {number}")
    assert stage.run()["dispatch"]["sent"] == 8
    stage.pass_hours(7)
    stage.forget_requests()
    stage.movies.script(path_regex="/movie/", delay=0.5, times=99)
    stage.run("--time-limit", "1.5s")
    assert 0 < len([r for r in stage.movies.requests if "/movie/" in r.path]) < 8


def test_a_mount_that_hangs_costs_its_time_once(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = fuse_available()
    if problem:
        pytest.skip(problem)
    lose_movies(stage)
    backing = stage.folder / "backing"
    stage.cloud.rename(backing)
    stage.cloud.mkdir()
    with FuseMount(stage.cloud, backing) as mount:
        start_repairs(stage)
        stage.sections["scan"]["stat_timeout"] = "1s"
        looks: List[List[str]] = []
        recheck = program.recheck_links

        def count(conn: Any, settings: Any, paths: List[str]) -> Any:
            looks.append(paths)
            return recheck(conn, settings, paths)

        monkeypatch.setattr(program, "recheck_links", count)
        mount.hang()
        stage.configure()
        for key, value in stage.refresherr.env.items():
            monkeypatch.setenv(key, value)
        argv = ["--data-dir", str(stage.refresherr.data_dir), "dispatch", *FAST]
        assert program.main(argv) == 4
        mount.heal()
        assert len(looks) == 1 and not stage.changes()
        monkeypatch.undo()
        assert stage.do("dispatch", *FAST)["sent"] == 4
    stage.cloud.rmdir()
    backing.rename(stage.cloud)


def test_an_action_without_a_link_waits_for_the_mount(stage: Stage, mount: Bind) -> None:
    relay = stage.add_relay(f"{stage.media}/doc => radarr_doc")
    stage.run()
    url = f"{relay.url}/find?type=radarr_doc&scope=auto&term=Paper+Comet"
    stage.alter("INSERT INTO actions (url, status) VALUES (?, 'pending')", url)
    mount.unmount()
    result = stage.run()
    assert result["exit_code"] == 4 and result["dispatch"]["exit_code"] == 4
    asked = [request for request in relay.requests if request.query]
    assert not asked and stage.statuses() == {"pending": 1}
    mount.mount()
    assert stage.run()["dispatch"]["sent"] == 1
    assert len([request for request in relay.requests if request.query]) == 1


def test_every_mount_that_goes_is_told() -> None:
    def steps(*points: str, tripped: bool = False) -> Record:
        mounts = [{"mount_point": p, "state": "absent", "reason": f"{p} is gone"} for p in points]
        code, status = (4, "refused") if points or tripped else (0, "ok")
        scan = {"exit_code": code, "status": status, "message": "held", "mounts": mounts}
        unit = {"directory": "/mnt/c/x", "links": 9, "titles": 9, "of_links": 9, "lot": 9}
        units = [{**unit, "accept": "scan --accept /mnt/c/x"}] if tripped else []
        return {"scan": {**scan, "guard": {"tripped": tripped, "units": units}}}

    one = program.name_problems(steps("/mnt/a"))
    assert one == {"scan refused: /mnt/a": "/mnt/a is gone"}
    assert set(program.name_problems(steps("/mnt/a", "/mnt/b"))) - set(one) == {
        "scan refused: /mnt/b"
    }
    assert list(program.name_problems(steps(tripped=True))) == ["scan refused: /mnt/c/x"]
    assert len(program.name_problems(steps("/mnt/a", tripped=True))) == 2
    assert program.name_problems(steps()) == {}


def test_a_loss_is_confirmed_for_one_run_even_if_that_fails(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    confirmed: List[bool] = []

    def fail(context: program.Context) -> Record:
        confirmed.append(context.args.accept_breakage)
        if len(confirmed) == 3:
            raise KeyError("enough")
        raise program.DatabaseError("the disk is full")

    monkeypatch.setattr(program, "run_once", fail)
    stage.configure()
    for key, value in stage.refresherr.env.items():
        monkeypatch.setenv(key, value)
    assert program.main(["run", "--every", "0.01s", "--accept-breakage"]) == 1
    assert confirmed == [True, False, False]


def test_who_was_never_read_may_own_a_link(stage: Stage) -> None:
    del stage.sections["radarr movies"]["roots"]
    link = stage.link_of(stage.movie(stage.movies, "Iron Garden"))
    stage.movies.close()
    stage.run("--no-cinesync")
    (broken,) = stage.do("broken")["links"]
    assert "radarr_movies" in broken["next"] and "remove" not in broken["next"]
    stage.movies.open()
    stage.do("ingest")
    (broken,) = stage.do("broken")["links"]
    assert broken["instance"] == "radarr_movies" and broken["path"] == str(link)


def test_what_is_held_back_says_how_to_go_on(stage: Stage) -> None:
    del stage.sections["scan"]["max_new_broken"]
    for number in range(20):
        stage.link(stage.media / "other" / f"Lost {number}" / "file.mkv", broken=True)
    assert stage.run()["exit_code"] == 4
    out = stage.call("broken").out
    assert "0 links; 20 cannot be judged" in out
    out = stage.call("broken", "--status", "unreachable").out
    assert (
        out.count("`scan --accept DIR`") == 1 and "file: 20 links in" in out
    )  # one advice for all


def test_a_root_that_is_gone_is_told_beside_a_mount() -> None:
    mounts = [{"mount_point": "/mnt/a", "state": "absent", "reason": "gone"}]
    roots = [{"path": "/tv", "state": "missing", "reason": "does not exist"}]
    scan = {"exit_code": 4, "status": "refused", "message": "both", "mounts": mounts}
    step = {**scan, "roots": roots, "guard": {"tripped": False}}
    assert list(program.name_problems({"scan": step})) == ["scan refused: /mnt/a", "scan refused"]


def test_a_link_that_the_server_has_just_replaced_stays(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.movies.recycle_bin = True  # it cannot move a dead link there, and answers 500
    link = stage.link_of(stage.movie(stage.movies, "Iron Garden"))
    new = stage.cloud / "imported.mkv"
    stage.do("scan")
    stage.do("ingest")
    stage.do("queue")
    look = program.Repair.look

    def look_and_import(self: program.Repair, path: str) -> str:
        state = look(self, path)
        is_deleted = any(r.method == "DELETE" for r in stage.movies.requests)
        if is_deleted and path == str(link) and not new.exists():
            new.write_bytes(b"video")
            link.unlink()
            link.symlink_to(new)
        return state

    monkeypatch.setattr(program.Repair, "look", look_and_import)
    for key, value in stage.refresherr.env.items():
        monkeypatch.setenv(key, value)
    program.main(["--data-dir", str(stage.refresherr.data_dir), "dispatch", *FAST])
    assert new.exists() and link.is_symlink() and target_of(link) == new
    assert stage.refresherr.query("SELECT * FROM link_changes") == []
    assert "removed" not in stage.refresherr.query("SELECT progress FROM actions")[0][0]
