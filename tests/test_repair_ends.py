"""Repair that finishes: whole seasons, servers that are away, failures that heal, dead releases.

Every search is counted: never one too many, killed or not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest
from fake_servers import FakeArr, FakeRadarr, FakeSonarr, Record
from fuse_fs import tmpfs
from test_repair import FAST, TOKEN, World, searched
from test_repair import world as world_of_repair

world = world_of_repair

KEEP = {"timeout": "5s", "min_age": "0"}


def names_of(server: FakeArr) -> List[str]:
    return [search["name"] for search in server.searches]


def big_season(world: World, count: int = 26, **options: Any) -> FakeSonarr:
    """A season all of whose episodes are broken, among good links that are nobody's."""
    sonarr = world.sonarr(**options)
    series = sonarr.add_series("Show")
    world.season(sonarr, series, 1, count, broken=range(1, count + 1))
    world.season(sonarr, series, 2, 2)
    world.sections["scan"]["max_new_broken"] = "100%"
    world.do("scan")
    world.do("ingest")
    world.forget_requests()
    return sonarr


# 1. Seasons stay together


@pytest.mark.parametrize("is_read", [True, False])
def test_a_season_that_is_larger_than_the_limits(world: World, is_read: bool) -> None:
    sonarr = big_season(world, auto_unmonitor=True)
    if not is_read:
        world.alter("DELETE FROM episode_files")
    assert len(world.do("queue")["queued"]) == 26
    result = world.do("dispatch", *FAST)
    assert (result["sent"], result["exit_code"]) == (26, 0)
    assert names_of(sonarr) == ["SeasonSearch"]
    sonarr.tick()
    assert world.do("dispatch", *FAST)["repaired"] == 26
    assert names_of(sonarr) == ["SeasonSearch"]


def test_one_episode_that_is_younger_holds_its_season(world: World) -> None:
    sonarr = big_season(world, 4)
    world.sections["repair"]["min_age"] = "1h"
    world.pass_hours(2)
    youngest = sonarr.link_of(sonarr.units_of(504)[0]["episodeFileId"])
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    world.alter("UPDATE symlinks SET broken_since_utc = ? WHERE path = ?", now, str(youngest))
    result = world.do("queue")
    assert result["queued"] == [] and result["skipped"]["too_recent"] == 4
    world.pass_hours(2)
    assert len(world.do("queue")["queued"]) == 4
    world.do("dispatch", *FAST)
    assert names_of(sonarr) == ["SeasonSearch"]


def test_limits_between_seasons(world: World) -> None:
    """What does not fit waits, whole; what is older goes first."""
    sonarr = world.sonarr()
    for title in ("One", "Two", "Three"):
        world.season(sonarr, sonarr.add_series(title), 1, 3, broken=[1, 2, 3])
    world.sections["scan"]["max_new_broken"] = "100%"
    world.bystanders(3)
    world.do("scan")
    world.do("ingest")
    queued = world.do("queue", "--limit", 7)
    assert len(queued["queued"]) == 6 and queued["skipped"]["over_limit"] == 3
    assert world.do("dispatch", *FAST, "--max", 5)["sent"] == 3
    assert len(world.do("queue", "--limit", 2)["queued"]) == 3
    assert world.do("dispatch", *FAST, "--max", 1)["sent"] == 3
    assert world.do("dispatch", *FAST)["sent"] == 3
    assert names_of(sonarr) == ["SeasonSearch"] * 3


def test_a_season_with_a_healthy_file_is_not_searched_as_a_whole(world: World) -> None:
    sonarr = world.sonarr()
    world.season(sonarr, sonarr.add_series("Show"), 1, 5, broken=[1, 2, 3, 4])
    world.scan_and_queue()
    world.do("dispatch", *FAST)
    assert names_of(sonarr) == ["EpisodeSearch"] and len(searched(sonarr)) == 4


def test_what_was_missing_before_does_not_hinder_a_season_search(world: World) -> None:
    sonarr = world.sonarr()
    series = sonarr.add_series("Show")
    world.season(sonarr, series, 1, 3, broken=[1, 2, 3])
    sonarr.add_episode(series, 1, 4)
    world.bystanders(9)
    world.scan_and_queue()
    world.do("dispatch", *FAST)
    assert names_of(sonarr) == ["SeasonSearch"]


def five_lost_films(world: World) -> FakeRadarr:
    """Have five films lost, of which a day has searches for three."""
    world.sections["repair"]["per_day"] = "3"
    radarr = world.radarr()
    for number in range(5):
        world.movie(radarr, f"Film {number}")
    world.bystanders(9)
    return radarr


def test_a_day_has_so_many_searches(world: World) -> None:
    radarr = five_lost_films(world)
    world.scan_and_queue()
    result = world.do("dispatch", *FAST)
    assert (result["sent"], result["exit_code"]) == (3, 0) and len(radarr.deleted_files) == 3
    assert "per_day" in next(item["error"] for item in result["actions"] if item["error"])
    assert world.do("dispatch", *FAST)["sent"] == 0 and len(radarr.searches) == 3
    let_a_day_pass(world)
    world.sections["repair"]["cooldown"] = "9d"
    assert world.do("dispatch", *FAST)["sent"] == 2


def let_a_day_pass(world: World) -> None:
    world.pass_hours(25)
    notes = world.refresherr.query("SELECT name, value FROM notes WHERE name LIKE 'searches:%'")
    for name, value in notes:
        entries = [[at - 90000, count] for at, count in json.loads(value)]
        world.alter("UPDATE notes SET value = ? WHERE name = ?", json.dumps(entries), name)


def test_repeated_searches_count_for_the_day_as_well(world: World) -> None:
    radarr = five_lost_films(world)
    radarr.finds_nothing = True
    world.scan_and_queue()
    sent = []
    for _ in range(7):
        world.do("dispatch", *FAST)
        sent.append(len(radarr.searches))
        let_a_day_pass(world)
    assert max(new - old for old, new in zip([0, *sent], sent)) == 3
    assert sent[-1] == 15 and world.statuses() == {"failed": 5}


# 2. Servers that are away or refuse the key


@pytest.mark.parametrize("trouble", ["down", "401", "403", "hang", "html", "502"])
def test_a_server_that_is_away_costs_its_actions_nothing(world: World, trouble: str) -> None:
    world.sections["repair"].update(timeout="0.3s", list_timeout="0.3s")
    radarr, other = world.radarr("away"), world.radarr("here")
    for number in range(3):
        world.movie(radarr, f"Film {number}")
    world.movie(other, "Film")
    world.bystanders(9)
    world.scan_and_queue()
    if trouble == "down":
        radarr.close()
    elif trouble == "403":
        radarr.doors = {"cf-access-client-id": "x"}
    else:
        radarr.sick(trouble, times=None)
    codes = []
    for _ in range(7):
        world.forget_requests()
        codes.append(world.do("dispatch", *FAST)["exit_code"])
        assert len(radarr.requests) <= 1
    assert codes == [3] + [1] * 6
    rows = world.refresherr.query("SELECT DISTINCT attempts, status FROM actions ORDER BY 2")
    assert rows == [(0, "pending"), (0, "sent")]
    if trouble == "down":
        radarr.open()
    radarr.doors, radarr.scripts = {}, []
    assert world.do("dispatch", *FAST)["sent"] == 3 and len(radarr.searches) == 3


def test_a_server_that_goes_away_in_the_middle(world: World) -> None:
    """The first DELETE is the last that it hears: nothing is booked to the film."""
    radarr = world.radarr()
    for number in range(3):
        world.movie(radarr, f"Film {number}")
    world.bystanders(9)
    world.scan_and_queue()
    radarr.sick("502", method="DELETE")
    radarr.sick("502", path_regex="system/status", skip=1)
    assert world.do("dispatch", *FAST)["exit_code"] == 1
    assert world.refresherr.query("SELECT DISTINCT attempts FROM actions") == [(0,)]
    assert world.do("dispatch", *FAST)["sent"] == 3 and len(radarr.searches) == 3


def test_open_actions_of_a_server_that_is_away_are_told_though_none_is_due(world: World) -> None:
    radarr = world.radarr()
    world.movie(radarr, "Film")
    world.scan_and_queue()
    radarr.script(method="DELETE", status=503)
    assert world.do("dispatch", *FAST)["retry"] == 1
    assert world.do("dispatch", *FAST)["exit_code"] == 0
    radarr.close()
    assert world.do("dispatch", *FAST)["exit_code"] == 1
    radarr.open()


@pytest.mark.parametrize("trouble", ["down", "401", "hang"])
def test_a_relay_that_is_away(world: World, trouble: str) -> None:
    world.sections["repair"].update(timeout="0.3s")
    relay = world.add_relay(f"{world.media}/doc => radarr_doc")
    for title in ("One (2001)", "Two (2002)"):
        world.link(world.media / "doc" / title / "file.mkv", broken=True)
    world.scan_and_queue()
    if trouble == "down":
        relay.close()
    elif trouble == "401":
        relay.token = "another"
    else:
        relay.sick(trouble, times=None)
    for _ in range(6):
        assert world.do("dispatch", *FAST)["exit_code"] == 1
        assert relay.finds == []
    assert world.refresherr.query("SELECT DISTINCT attempts, status FROM actions") == [
        (0, "pending")
    ]
    if trouble == "down":
        relay.open()
    relay.scripts, relay.token = [], TOKEN
    assert world.do("dispatch", *FAST)["sent"] == 2 and len(relay.finds) == 2


def test_a_relay_that_hangs_over_one_term(world: World) -> None:
    """Of that one it has heard, and may search: five times at the most.  The others go on."""
    world.sections["repair"].update(timeout="0.3s")
    relay = world.add_relay(f"{world.media}/doc => radarr_doc")
    for title in ("One (2001)", "Two (2002)"):
        world.link(world.media / "doc" / title / "file.mkv", broken=True)
    world.scan_and_queue()
    relay.sick("hang", where=lambda request: "One" in str(request.query), times=None)
    for _ in range(7):
        world.do("dispatch", *FAST)
        world.make_due()
    assert world.statuses() == {"failed": 1, "sent": 1}
    assert [find["term"] for find in relay.finds].count("Two (2002)") == 1
    assert len(relay.finds) == 6


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_relay_that_hangs_up_has_heard_it(world: World, how: str) -> None:
    """Over a connection that was kept, too: the same try never asks twice."""
    relay = world.add_relay(f"{world.media}/doc => radarr_doc")
    for title in ("One (2001)", "Two (2002)", "Three (2003)"):
        world.link(world.media / "doc" / title / "file.mkv", broken=True)
    world.scan_and_queue()
    relay.sick(how, where=lambda request: "Two" in str(request.query))
    assert (world.do("dispatch", *FAST)["sent"], len(relay.finds)) == (2, 3)


# 3. Failures that heal


@pytest.mark.parametrize("by", ["ingest", "dispatch"])
def test_a_failed_repair_is_asked_after(world: World, by: str) -> None:
    world.sections["repair"]["max_attempts"] = "1"
    radarr = world.radarr()
    movie = world.movie(radarr, "Film")
    world.scan_and_queue()
    radarr.finds_nothing = True
    world.do("dispatch", *FAST)
    radarr.tick()
    world.pass_hours(7)
    result = world.do("dispatch", *FAST)
    assert result["failed"] == 1
    assert "the server grabbed nothing" in result["actions"][0]["error"]
    world.do("scan")
    assert world.do("stats")["repairs"]["needs_attention"] == 1
    if by == "dispatch":
        for is_asked in (True, False):  # once a day
            radarr.clear_requests()
            world.do("dispatch", *FAST)
            assert bool(radarr.requests) is is_asked
        asked = """'"asked": ', '"asked": 1, "last": '"""
        world.alter(f"UPDATE actions SET progress = replace(progress, {asked})")
    other = radarr.root / "Film (2021)" / "Film by RSS.mkv"
    world.link(other)
    radarr.make_file(movie, other.name, [radarr.movies[movie]])
    if by == "dispatch":
        assert world.do("dispatch", *FAST)["repaired"] == 1
        radarr.clear_requests()
        world.do("dispatch", *FAST)
        assert radarr.requests == []
    else:
        world.do("ingest")
    assert world.statuses() == {"repaired": 1}
    assert world.do("stats")["repairs"]["needs_attention"] == 0
    assert len(radarr.searches) == 1


# 4. What decides after the DELETE


@pytest.mark.parametrize("trouble", ["flag", "items", "link", "season"])
def test_nothing_but_the_search_decides_after_the_delete(world: World, trouble: str) -> None:
    sonarr = world.sonarr(auto_unmonitor=True, recycle_bin=False)
    series = sonarr.add_series("Show")
    file = world.episode(sonarr, series, (1, 1), broken=True)
    world.episode(sonarr, series, (1, 2))
    flags = sonarr.monitored()
    world.bystanders(5)
    world.scan_and_queue()
    if trouble == "flag":
        sonarr.script(method="PUT", status=500)
    if trouble == "items":
        sonarr.script(path_regex=r"/series/\d+$", status=500, times=2)
    if trouble == "season":
        sonarr.script(path_regex="history", status=500, times=None)
    link = sonarr.link_of(file)
    if trouble == "link":
        # The server deletes the record and leaves the link; its directory is not writable for us.
        saved = os.readlink(link)
        original = sonarr.remove_file

        def keep_link(record: Record, folder: Any = None) -> None:
            original(record, folder)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(saved)
            subprocess.run(["chattr", "+i", str(link.parent)], check=False)

        sonarr.remove_file = keep_link  # type: ignore[method-assign]
    result = world.do("dispatch", *FAST)
    subprocess.run(["chattr", "-i", str(link.parent)], check=False, stderr=subprocess.DEVNULL)
    assert result["sent"] == 1 and len(sonarr.searches) == 1
    assert sonarr.deleted_files == [file]
    sonarr.scripts = []
    again = world.do("dispatch", *FAST)
    assert again["exit_code"] == 0
    assert sonarr.monitored() == flags and not os.path.lexists(link)
    assert len(sonarr.searches) == 1
    owed = world.refresherr.query("SELECT progress FROM actions")[0][0]
    assert not json.loads(owed).get("owed")
    if trouble in ("flag", "items"):
        assert result["exit_code"] == 3  # it is told


def test_a_link_that_cannot_be_judged_is_not_called_cleared(
    world: World, tmpfs_mount: tmpfs
) -> None:
    """The mount of the targets goes with the DELETE, and the server leaves the link behind."""
    mount = Path(tmpfs_mount.mount_point)
    radarr = world.radarr()
    world.cloud = mount / "torrents"
    world.cloud.mkdir()
    movie = world.movie(radarr, "Film")
    link = radarr.link_of(radarr.movies[movie]["movieFileId"])
    saved, original = os.readlink(link), radarr.remove_file
    world.scan_and_queue()

    def keep_link(record: Record, folder: Any = None) -> None:
        original(record, folder)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(saved)
        subprocess.run(["mount", "--move", str(mount), str(aside)], check=True)

    aside = world.folder / "aside"
    aside.mkdir()
    subprocess.run(["mount", "--make-private", str(mount)], check=False)
    radarr.remove_file = keep_link  # type: ignore[method-assign]
    assert world.do("dispatch", *FAST)["exit_code"] == 4
    assert radarr.searches == [] and link.is_symlink()
    subprocess.run(["mount", "--move", str(aside), str(mount)], check=True)
    radarr.script(method="POST", status=503)
    assert world.do("dispatch", *FAST)["retry"] == 1
    assert not os.path.lexists(link)  # before the search, or an import would find it in its place
    world.make_due()
    assert world.do("dispatch", *FAST)["sent"] == 1 and len(radarr.searches) == 1
    world.healthy.clear()  # the mount goes first


# 5. A file whose folder went along with it


def test_a_file_whose_folder_went_with_it(world: World) -> None:
    """Radarr's library lies on the mount, real files in folders; the user's links lead there."""
    radarr = world.radarr(server_root="/data/movies")
    mine = world.media / "mine"
    mine.mkdir()
    for title in ("Film", "Other"):
        movie = world.movie(radarr, title, broken=False)
        file = radarr.link_of(radarr.movies[movie]["movieFileId"])
        file.unlink()
        file.write_bytes(b"video")
        (mine / file.name).symlink_to(file)
    world.healthy.clear()
    world.sections["scan"]["roots"] = str(mine)
    del world.sections["radarr movies"]["roots"]
    world.do("scan")
    world.do("ingest")
    shutil.rmtree(str(radarr.link_of(601).parent))
    world.do("scan")
    assert len(world.do("queue")["queued"]) == 1
    moved = radarr.root.with_name("away")
    radarr.root.rename(moved)  # the library itself is away for us: wait
    radarr.root_accessible = True
    result = world.do("dispatch", *FAST)
    assert result["exit_code"] == 4 and world.statuses() == {"pending": 1}
    radarr.root.mkdir()  # or nothing is mounted there
    assert world.do("dispatch", *FAST)["exit_code"] == 4 and radarr.deleted_files == []
    radarr.root.rmdir()
    moved.rename(radarr.root)
    assert world.do("dispatch", *FAST)["sent"] == 1
    assert radarr.deleted_files == [601] and len(radarr.searches) == 1
    assert (mine / "Film (2021).mkv").is_symlink()


# 8. The dead release


@pytest.mark.parametrize("setup", ["plain", "auto", "skip"])
def test_a_dead_release_is_blocklisted_and_searched_for_once(world: World, setup: str) -> None:
    world.sections["repair"]["blocklist"] = "yes"
    radarr = world.radarr()
    movie = world.movie(radarr, "Film")
    radarr.add_grab([radarr.movies[movie]["movieFileId"]], "Film.2021.DEAD")
    radarr.release = "Film.2021.DEAD"
    radarr.auto_redownload, radarr.knows_skip = setup != "plain", setup == "skip"
    world.scan_and_queue()
    result = world.do("dispatch", *FAST)
    assert result["sent"] == 1 and radarr.blocklist == ["Film.2021.DEAD"]
    assert names_of(radarr) == ["MoviesSearch"]
    radarr.tick()
    titles = [r["sourceTitle"] for r in radarr.history if r["eventType"] == "grabbed"]
    assert len(titles) == 2 and titles[1] != "Film.2021.DEAD"
    assert world.do("dispatch", *FAST)["repaired"] == 1


def test_a_pack_of_which_one_episode_is_gone(world: World) -> None:
    """The server would search for the healthy ones, too: then the pack is not marked."""
    world.sections["repair"]["blocklist"] = "yes"
    sonarr = world.sonarr()
    series = sonarr.add_series("Show")
    world.season(sonarr, series, 1, 4, broken=[2])
    sonarr.add_grab([501, 502, 503, 504], "Show.S01.PACK")
    sonarr.auto_redownload = True
    world.scan_and_queue()
    result = world.call("dispatch", *FAST)
    assert sonarr.blocklist == [] and searched(sonarr) == [sonarr.episode_id(series, 1, 2)]
    assert "Redownload Failed" in result.err


def test_a_whole_pack_is_marked_once(world: World) -> None:
    world.sections["repair"]["blocklist"] = "yes"
    sonarr = big_season(world, 5)
    sonarr.add_grab([501, 502, 503, 504, 505], "Show.S01.PACK")
    world.do("queue")
    assert world.do("dispatch", *FAST)["sent"] == 5
    assert sonarr.blocklist == ["Show.S01.PACK"] and names_of(sonarr) == ["SeasonSearch"]


def test_without_blocklist_the_reason_says_what_the_server_did(world: World) -> None:
    world.sections["repair"]["max_attempts"] = "2"
    radarr = world.radarr()
    movie = world.movie(radarr, "Film")
    radarr.add_grab([radarr.movies[movie]["movieFileId"]], "Film.2021.DEAD")
    radarr.release, radarr.downloads_fail = "Film.2021.DEAD", True
    world.scan_and_queue()
    for _ in range(2):
        assert world.do("dispatch", *FAST)["sent"] == 1
        radarr.tick()
        world.pass_hours(7)
    result = world.do("dispatch", *FAST)
    error = result["actions"][0]["error"]
    assert result["failed"] == 1 and len(radarr.searches) == 2
    assert "Film.2021.DEAD 2 times" in error and "2 downloads failed" in error
    assert radarr.blocklist == []


def test_a_season_of_single_grabs_is_left_to_one_search(world: World) -> None:
    """A server that searches by itself would do so for each episode alone."""
    world.sections["repair"]["blocklist"] = "yes"
    sonarr = big_season(world, 3)
    for file in (501, 502, 503):
        sonarr.add_grab([file], f"Show.{file}")
    sonarr.auto_redownload = True
    world.do("queue")
    assert world.do("dispatch", *FAST)["sent"] == 3
    assert sonarr.blocklist == [] and names_of(sonarr) == ["SeasonSearch"]


@pytest.mark.parametrize("is_own", [True, False])
@pytest.mark.parametrize("lost", ["answer", "request"])
def test_a_mark_whose_answer_is_lost(world: World, lost: str, is_own: bool) -> None:
    world.sections["repair"]["blocklist"] = "yes"
    radarr = world.radarr()
    radarr.auto_redownload = is_own
    movie = world.movie(radarr, "Film")
    radarr.add_grab([radarr.movies[movie]["movieFileId"]], "Film.2021.DEAD")
    world.scan_and_queue()
    radarr.script(path_regex="history/failed", method="POST", kind="close",
                  before_effect=lost == "request")  # fmt: skip
    assert world.do("dispatch", *FAST)["sent"] == 1  # nothing but the search decides
    assert len(radarr.searches) == 1 and len(radarr.blocklist) == (lost == "answer")


# 9. Odds and ends of a queue


def test_tags_are_spared(world: World) -> None:
    radarr, sonarr = world.radarr(), world.sonarr()
    radarr.tags, sonarr.tags = {3: "keep"}, {1: "other", 9: "archive"}
    movies = [world.movie(radarr, f"Film {number}") for number in range(3)]
    radarr.movies[movies[0]]["tags"] = [3]
    series = sonarr.add_series("Show")
    sonarr.series[series]["tags"] = [9, 1]
    world.episode(sonarr, series, (1, 1), broken=True)
    for section in ("radarr movies", "sonarr tv"):
        world.sections[section]["skip_tags"] = "Keep, archive"
    world.bystanders(9)
    world.do("scan")
    world.do("ingest")
    result = world.do("queue")
    assert result["skipped"]["tagged"] == 2 and len(result["queued"]) == 2
    radarr.movies[movies[1]]["tags"] = [3]  # since the last ingest
    result = world.do("dispatch", *FAST)
    assert (result["sent"], result["cancelled"]) == (1, 1) and searched(radarr) == [movies[2]]


def test_actions_that_nobody_can_send(world: World) -> None:
    relay = world.add_relay(f"{world.media}/doc => sonarr_doc")
    world.bystanders(1)
    world.do("scan")
    urls = ["file:///etc/passwd", "ftp://x/y", "gopher:x", "", "arr://radarr_gone/repair?path=/x"]
    for url in urls:
        world.alter("INSERT INTO actions (url, status) VALUES (?, 'pending')", url)
    world.alter(
        "INSERT INTO actions (url, status, related_path) VALUES (?, 'pending', 'Show::S02')",
        f"{relay.find_url}?type=sonarr_doc&scope=season&term=Show+S02",
    )
    result = world.do("dispatch", *FAST)
    assert (result["failed"], result["sent"]) == (4, 1)
    assert [find["term"] for find in relay.finds] == ["Show S02"]
    world.do("actions", "cancel", 5)
    assert world.do("dispatch", *FAST)["exit_code"] == 0


def test_a_broken_subtitle_asks_for_nothing(world: World) -> None:
    relay, radarr = world.add_relay(f"{world.media}/doc => sonarr_doc"), world.radarr()
    show = world.media / "doc" / "Show" / "Season 1"
    world.link(show / "Show S01E01.mkv")
    world.link(show / "Show S01E01.en.srt", broken=True)
    world.movie(radarr, "Film", broken=False)
    world.link(radarr.root / "Film (2021)" / "Film (2021).de.srt", broken=True)
    del world.servers["radarr_movies"]  # which has no record of the subtitle
    world.do("scan")
    result = world.do("queue")
    assert result["queued"] == [] and result["skipped"]["no_route"] == 2
    assert relay.finds == []


def test_two_left_sides_and_a_server_on_windows(world: World) -> None:
    """Two directories here are one there; their files are found in both, looked up both ways."""
    first, second = world.media / "tv", world.media / "tv2"
    windows = "D:\\Media\\TV"
    sonarr = world.sonarr("tv", server_root=windows)
    sonarr.roots = {windows: first}
    series = [sonarr.add_series(title, path=f"{windows}\\{title}") for title in ("One", "Two")]
    files = []
    for number, (show, root) in enumerate(zip(series, (first, second))):
        title = sonarr.series[show]["title"]
        file = sonarr.add_file(show, f"Season 01\\{title} - S01E01.mkv", [(1, 1)])
        sonarr.path_of = WindowsPaths(sonarr)  # type: ignore[method-assign]
        files.append(file)
        world.link(root / title / "Season 01" / f"{title} - S01E01.mkv", broken=True)
        world.link(root / title / "Season 01" / f"{number}.mkv")
    sonarr.disk_path = lambda path: _here(path, windows, first, second)  # type: ignore
    world.healthy.clear()
    world.sections["sonarr tv"]["path_map"] = f"{first} => {windows}, {second} => {windows}"
    world.sections["sonarr tv"]["roots"] = f"{first}, {second}"
    world.do("scan")
    assert world.do("ingest")["instances"][0]["linked"] == 2
    assert len(world.do("queue")["queued"]) == 2
    result = world.do("dispatch", *FAST)
    assert result["sent"] == 2, result
    assert sorted(sonarr.deleted_files) == files
    assert not any(os.path.lexists(link) for link in world.broken)


def test_the_other_left_side_is_away(world: World) -> None:
    """The server may see a healthy file there, under the very name of our broken link."""
    first, second = world.media / "tv", world.media / "tv2"
    sonarr = world.sonarr("tv", server_root="/tv")
    series = sonarr.add_series("Show")
    file = world.episode(sonarr, series, (1, 1), broken=True)
    world.episode(sonarr, series, (1, 2))
    world.sections["sonarr tv"]["path_map"] = f"{first} => /tv, {second} => /tv"
    world.bystanders(3)
    assert len(world.scan_and_queue()) == 1
    assert world.do("dispatch", *FAST)["exit_code"] == 4 and sonarr.changes() == []
    second.mkdir()
    assert world.do("dispatch", *FAST)["exit_code"] == 4 and sonarr.changes() == []
    (second / "Another Show").mkdir()
    assert world.do("dispatch", *FAST)["sent"] == 1 and sonarr.deleted_files == [file]


class WindowsPaths:
    """What a server on Windows calls its files."""

    def __init__(self, sonarr: FakeSonarr) -> None:
        self.sonarr = sonarr

    def __call__(self, file_id: int) -> str:
        record = self.sonarr.files.get(file_id) or self.sonarr.gone[file_id]
        return f"{self.sonarr.series[record['seriesId']]['path']}\\{record['relativePath']}"


def _here(path: str, windows: str, first: Path, second: Path) -> Path:
    tail = path[len(windows) :].replace("\\", "/").strip("/")
    root = second if tail.startswith("Two") else first
    return root / tail


# Killed at any step


@pytest.mark.parametrize("setup", ["plain", "blocklist", "auto"])
def test_killed_at_every_step_and_never_one_search_too_many(world: World, setup: str) -> None:
    """Each request that changes something is the last of a run, as it comes or as it is done."""
    world.sections["repair"]["blocklist"] = "no" if setup == "plain" else "yes"
    sonarr = big_season(world, 3, auto_unmonitor=True)
    sonarr.add_grab([501, 502, 503], "Show.S01.PACK")
    sonarr.auto_redownload = setup == "auto"
    sonarr.forgets_commands, sonarr.command_polls = True, 1
    flags = sonarr.monitored()
    world.do("queue")
    world.configure()
    running: Dict[str, Any] = {}
    seen: List[str] = []
    answer = sonarr.answer

    def deadly(request: Any) -> Any:
        key = f"{request.method} {request.path} {len(sonarr.deleted_files)}"
        if request.method == "GET" or key in seen:
            return answer(request)
        seen.append(key)
        if len(seen) % 2:
            running["it"].send_signal(signal.SIGKILL)
            time.sleep(0.05)
            return answer(request)
        reply = answer(request)
        running["it"].send_signal(signal.SIGKILL)
        time.sleep(0.05)
        return reply

    sonarr.answer = deadly  # type: ignore[method-assign]
    for _ in range(20):
        running["it"] = world.refresherr.start("dispatch", *FAST)
        world.outputs += running["it"].communicate()
        world.make_due()
        if running["it"].returncode == 0:
            break
    else:
        raise AssertionError(world.outputs[-2:])
    sonarr.peak = 0
    assert world.statuses() == {"sent": 3}
    assert sorted(sonarr.deleted_files) == [501, 502, 503] and sonarr.monitored() == flags
    assert len(sonarr.searches) == 1, sonarr.searches
    assert len(sonarr.blocklist) == (setup != "plain")
    sonarr.answer = answer  # type: ignore[method-assign]
    sonarr.tick()
    assert world.do("dispatch", *FAST)["repaired"] == 3 and len(sonarr.searches) == 1


# TLS and proxies


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A certificate of its own for 127.0.0.1, with its key beside it."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    file = tmp_path / "ca.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=home", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(tmp_path / "key.pem"),
         "-out", str(file)],
        check=True, capture_output=True,
    )  # fmt: skip
    return file


def test_a_server_with_an_authority_of_its_own(world: World, authority: Path) -> None:
    radarr = world.radarr()
    world.movie(radarr, "Film")
    radarr.close()
    radarr.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    radarr.tls.load_cert_chain(str(authority), str(authority.with_name("key.pem")))
    radarr.open()
    world.sections["radarr movies"]["url"] = radarr.url
    result = world.call("ingest")
    assert result.code == 1 and "ca_file" in result.err and len(result.err.splitlines()) == 1
    world.sections["radarr movies"]["ca_file"] = str(authority.with_name("nothing.pem"))
    assert "ca_file" in world.call("ingest").err
    world.sections["radarr movies"]["ca_file"] = str(authority)
    assert world.do("ingest")["exit_code"] == 0
    world.scan_and_queue()
    assert world.do("dispatch", *FAST)["sent"] == 1


def test_a_proxy_that_wants_a_login_or_headers(world: World) -> None:
    radarr = world.radarr()
    world.movie(radarr, "Film")
    radarr.login = "me:s3cret-p4ssword"
    said = world.call("ingest").err
    assert "user:password@" in said and "key" not in said.replace("api_key", "")
    world.secrets += ["s3cret-p4ssword", "cf-secret-0123456789"]
    url = world.sections["radarr movies"]["url"]
    world.sections["radarr movies"]["url"] = url.replace("://", "://me:s3cret-p4ssword@")
    assert world.do("ingest")["exit_code"] == 0
    radarr.doors = {"cf-access-client-secret": "cf-secret-0123456789"}
    assert "headers_file" in world.call("ingest").err
    file = world.folder / "headers"
    file.write_text("CF-Access-Client-Secret: cf-secret-0123456789\nX-Other: y\n")
    file.chmod(0o600)
    world.sections["radarr movies"]["headers_file"] = str(file)
    assert world.do("ingest")["exit_code"] == 0
    assert "cf-secret" not in world.call("config", "show").out


def test_a_list_may_take_its_time_until_the_first_byte(world: World) -> None:
    world.sections["repair"]["timeout"] = "1s"
    radarr = world.radarr()
    world.movie(radarr, "Film")
    radarr.script(path_regex="/movie$", delay=2.0)
    assert world.do("ingest")["exit_code"] == 0
    world.sections["repair"]["list_timeout"] = "1s"
    radarr.script(path_regex="/movie$", delay=2.0)
    said = world.call("ingest").err
    assert "[repair] list_timeout" in said
    radarr.script(path_regex="status", delay=2.0)
    assert "[repair] timeout" in world.call("ingest").err
