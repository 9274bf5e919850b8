"""The fake servers do what facts/arr-api.md says that the real ones do."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import pytest
from fake_servers import (
    RADARR_3,
    RADARR_4,
    RADARR_5,
    RADARR_6,
    SICKNESSES,
    SONARR_3,
    SONARR_4,
    SONARR_5,
    FakeArr,
    FakeRadarr,
    FakeRelay,
    FakeServer,
    FakeSonarr,
    populate,
    populate_movies,
)

SONARRS = [SONARR_3, SONARR_4, SONARR_5]
RADARRS = [RADARR_3, RADARR_4, RADARR_5, RADARR_6]
OLD_SONARR = "4.0.10.2544"  # the last that takes the size of the link itself
OLD_RADARR = "5.14.0.9383"


class Answer(NamedTuple):
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    server: FakeServer,
    path: str,
    method: str = "GET",
    body: Any = None,
    *,
    key: Optional[str] = None,
    base: Optional[str] = None,
    timeout: float = 5,
    **headers: str,
) -> Answer:
    """Send one request; `path` is below /api/v3 unless it begins with a slash."""
    if path[:1] != "/":
        path = "/api/v3/" + path
    if base is None:
        base = getattr(server, "url_base", "")
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is None:
        key = getattr(server, "api_key", "")
    if key:
        names["X-Api-Key"] = key
    if body is not None:
        names.setdefault("Content-Type", "application/json")
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    conn = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    try:
        conn.request(method, base + path, data, names)
        response = conn.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        conn.close()


@contextlib.contextmanager
def sonarr_with_show(folder: Path, **options: Any) -> Iterator[Tuple[FakeSonarr, int, int, Path]]:
    """A Sonarr with one dangling S01E01 and one good S01E02: (it, series, file, link)."""
    with FakeSonarr(folder / "tv", **options) as sonarr:
        series = sonarr.add_series("Show", 2019)
        file = sonarr.add_file(series, "Season 01/Show - S01E01.mkv", [(1, 1)])
        good = sonarr.add_file(series, "Season 01/Show - S01E02.mkv", [(1, 2)])
        dangle(sonarr.link_of(file))
        target = folder / "good.mkv"
        target.write_bytes(b"good")
        sonarr.link_of(good).symlink_to(target)
        yield sonarr, series, file, sonarr.link_of(file)


@contextlib.contextmanager
def radarr_with_movie(folder: Path, **options: Any) -> Iterator[Tuple[FakeRadarr, int, int, Path]]:
    """A Radarr with one dangling movie: (it, movie, file, link)."""
    with FakeRadarr(folder / "movies", **options) as radarr:
        movie = radarr.add_movie("Film", 2021, file_name="Film (2021).mkv")
        file = radarr.movies[movie]["movieFileId"]
        dangle(radarr.link_of(file))
        yield radarr, movie, file, radarr.link_of(file)


def dangle(link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to("/nowhere/gone.mkv")


def run(server: FakeArr, name: str, **body: Any) -> Dict[str, Any]:
    """Post a command and poll it to its end."""
    answer = ask(server, "command", "POST", {"name": name, **body})
    assert answer.status == 201
    for _ in range(10):
        command: Dict[str, Any] = ask(server, f"command/{answer.json['id']}").json
        if command["status"] not in ("queued", "started"):
            return command
    raise AssertionError("the command does not end")


# --- HTTP, keys, URL bases


@pytest.mark.parametrize("version", SONARRS)
def test_sonarr_keys(tmp_path: Path, version: str) -> None:
    with FakeSonarr(tmp_path / "tv", version=version) as sonarr:
        status = ask(sonarr, "system/status")
        assert status.json["appName"] == "Sonarr"
        assert status.json["version"] == version == status.headers["X-Application-Version"]
        for key in ("", "wrong"):
            refused = ask(sonarr, "system/status", key=key)
            assert refused.status == 401
            assert "X-Application-Version" not in refused.headers
            if version == SONARR_3:
                assert refused.json == {"error": "Unauthorized"}
            else:
                assert refused.body == b""
                assert "Content-Type" not in refused.headers
        in_query = f"system/status?apikey={sonarr.api_key}"
        assert ask(sonarr, in_query, key="").status == 200
        wrong_beats_right = 200 if version == SONARR_3 else 401
        assert ask(sonarr, "system/status?apikey=wrong").status == wrong_beats_right
        bearer = f"Bearer {sonarr.api_key}"
        assert ask(sonarr, "system/status", key="", Authorization=bearer).status == 200
        assert ask(sonarr, "/ping", key="").json == {"status": "OK"}
        assert ask(sonarr, "nonsense").status == 404
        assert ask(sonarr, "nonsense").body == b""


@pytest.mark.parametrize("version", RADARRS)
def test_radarr_keys(tmp_path: Path, version: str) -> None:
    with FakeRadarr(tmp_path / "movies", version=version) as radarr:
        assert ask(radarr, "system/status").json["appName"] == "Radarr"
        refused = ask(radarr, "movie", key="wrong")
        assert refused.status == 401
        assert refused.body == (b'{"error":"Unauthorized"}' if version == RADARR_3 else b"")


@pytest.mark.parametrize(
    ("kind", "version", "status"),
    [
        (FakeSonarr, SONARR_3, 303),
        (FakeSonarr, "4.0.8.1874", 302),
        (FakeSonarr, "4.0.9.2513", 307),
        (FakeRadarr, RADARR_4, 302),
        (FakeRadarr, "5.12.2.9335", 307),
    ],
)
def test_url_base(tmp_path: Path, kind: Any, version: str, status: int) -> None:
    with kind(tmp_path / "tv", version=version, url_base="base") as server:
        assert server.url == f"http://127.0.0.1:{server.port}/base"
        assert ask(server, "system/status").json["urlBase"] == "/base"
        moved = ask(server, "command?a=1", "POST", {"name": "RssSync"}, base="")
        assert moved.status == status
        assert moved.headers["Location"] == "/base/api/v3/command?a=1"
        assert not server.commands
        assert ask(server, "command", base="", key="wrong").status == 401
        assert ask(server, "/ping").status == 200


def test_outside_the_api(tmp_path: Path) -> None:
    with FakeSonarr(tmp_path / "tv") as sonarr:
        page = ask(sonarr, "/sonarr/api/v3/system/status")
        assert (page.status, page.headers["Content-Type"]) == (200, "text/html")
        sonarr.login_page = True
        assert ask(sonarr, "/sonarr/api/v3/series").status == 302
        sonarr.starting_up = True
        starting = ask(sonarr, "series")
        assert starting.status == 503
        assert "starting up" in starting.json["errorMessage"]


def test_requests_are_recorded(tmp_path: Path) -> None:
    with FakeSonarr(tmp_path / "tv") as sonarr:
        conn = http.client.HTTPConnection("127.0.0.1", sonarr.port, timeout=5)
        for _ in range(3):  # over one connection
            conn.request("GET", "/api/v3/tag%20x?a=1&a=2", headers={"X-Api-Key": sonarr.api_key})
            conn.getresponse().read()
        assert len(sonarr.connections) == 1
        conn.close()
        request = sonarr.requests[0]
        assert (request.method, request.path) == ("GET", "/api/v3/tag x")
        assert (request.query, request.status) == ({"a": ["1", "2"]}, 404)
        assert request.headers["x-api-key"] == sonarr.api_key
        assert not sonarr.changes()
        ask(sonarr, "command", "POST", {"name": "RssSync"})
        assert [request.body for request in sonarr.changes()] == [{"name": "RssSync"}]
        sonarr.clear_requests()
        assert not sonarr.requests


def test_bodies_and_types(tmp_path: Path) -> None:
    with FakeSonarr(tmp_path / "tv") as sonarr:
        form = "application/x-www-form-urlencoded"
        assert ask(sonarr, "command", "POST", {"name": "x"}, Content_Type=form).status == 415
        assert ask(sonarr, "command", "POST", b"{").status == 400
        assert ask(sonarr, "series", Accept="text/html").status == 406
        assert ask(sonarr, "command", "PUT", {"name": "x"}).status == 405
        assert ask(sonarr, "series/abc").status == 404


# --- Sonarr's lists


@pytest.mark.parametrize("version", SONARRS)
def test_series_and_files(tmp_path: Path, version: str) -> None:
    with sonarr_with_show(tmp_path, version=version, server_root="/data/tv") as made:
        sonarr, show, file, link = made
        series = ask(sonarr, "series").json
        assert [row["id"] for row in series] == [show]
        assert series[0]["path"] == "/data/tv/Show (2019)"
        assert series[0]["statistics"]["episodeFileCount"] == 2
        assert ("tmdbId" in series[0]) == (version != SONARR_3)
        assert ask(sonarr, f"series/{show}").json == series[0]
        assert ask(sonarr, "series/999").status == 404
        files = ask(sonarr, f"episodefile?seriesId={show}").json
        assert files[0]["path"] == "/data/tv/Show (2019)/Season 01/Show - S01E01.mkv"
        assert link == tmp_path / "tv/Show (2019)/Season 01/Show - S01E01.mkv"
        assert ("language" in files[0], "languages" in files[0]) == (
            version == SONARR_3,
            version != SONARR_3,
        )
        assert ask(sonarr, f"episodefile/{file}").json == files[0]
        assert ask(sonarr, "episodefile/999").status == 404
        assert ask(sonarr, "episodefile?seriesId=999").json["message"].startswith("Series with ID")
        neither = ask(sonarr, "episodefile")
        assert (neither.status, neither.json["content"][:8]) == (400, "seriesId")
        sonarr.roots["/data/tv 2"] = tmp_path / "more"
        roots = [(row["path"], row["accessible"]) for row in ask(sonarr, "rootfolder").json]
        assert roots == [("/data/tv", True), ("/data/tv 2", False)]
        assert sonarr.disk_path("/data/tv 2/Show") == tmp_path / "more/Show"


@pytest.mark.parametrize("version", SONARRS)
def test_lists_of_ids(tmp_path: Path, version: str) -> None:
    with sonarr_with_show(tmp_path, version=version) as (sonarr, _, file, _):
        other = file + 1

        def ids(query: str) -> Union[int, List[int]]:
            answer = ask(sonarr, query)
            return [row["id"] for row in answer.json] if answer.status == 200 else answer.status

        key = "episodefile?episodeFileIds"
        assert ids(f"{key}={file}&episodeFileIds={other}") == [file, other]
        assert ids(f"{key}={file},{other}") == ([file, other] if version == SONARR_3 else 400)
        assert ids(f"{key}={file}&episodeFileIds={file}") == 500
        assert ids(f"{key}={file}&episodeFileIds=999") == 500
        assert ids("episodefile?seriesId=abc") == 400


def test_episodes(tmp_path: Path) -> None:
    with FakeSonarr(tmp_path / "tv") as sonarr:
        show = sonarr.add_series("Show")
        file = sonarr.add_file(show, "Season 01/Show - S01E01-E02.mkv", [(1, 1), (1, 2)])
        other = sonarr.add_file(show, "Specials/Show - S00E01.mkv", [(0, 1)])
        lone = sonarr.add_episode(show, 2, 1, monitored=False)

        def ids(query: str) -> List[int]:
            return [row["id"] for row in ask(sonarr, "episode?" + query).json]

        assert ids(f"episodeFileId={file}") == [7001, 7002]
        assert ids(f"seriesId={show}&seasonNumber=0&episodeFileId={file}") == [7003]
        assert ids(f"episodeIds={lone}&episodeFileId={file}") == [lone]
        assert ask(sonarr, "episode").status == 400
        bare = ask(sonarr, f"episode?episodeIds={lone}").json[0]
        assert (bare["hasFile"], bare["episodeFileId"], bare["monitored"]) == (False, 0, False)
        assert "airDate" not in bare
        assert "episodeFile" not in bare
        full = ask(sonarr, "episode/7003").json
        assert (full["episodeFile"]["id"], full["series"]["id"]) == (other, show)
        query = f"episode?episodeFileId={file}&includeEpisodeFile=true"
        assert ask(sonarr, query).json[0]["episodeFile"]["id"] == file
        sonarr.version = "4.0.8.1874"
        assert "episodeFile" not in ask(sonarr, query).json[0]
        changed = ask(
            sonarr, "episode/monitor", "PUT", {"episodeIds": [7001, lone], "monitored": True}
        )
        assert (changed.status, [row["id"] for row in changed.json]) == (202, [7001, lone])
        assert sonarr.episodes[lone]["monitored"]


def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    with FakeSonarr(tmp_path / "tv") as sonarr:
        show = sonarr.add_series('Émoji 🎬: "quoted"')
        name = os.fsdecode(b"Season 01/\xff.mkv")
        file = sonarr.add_file(show, name, [(1, 1)])
        dangle(sonarr.link_of(file))
        assert "\ufffd" in ask(sonarr, f"episodefile/{file}").json["path"]
        assert ask(sonarr, f"episodefile/{file}", "DELETE").status == 200
        assert not os.path.lexists(str(sonarr.link_of(file)))


# --- Radarr's lists


@pytest.mark.parametrize("version", RADARRS)
def test_movies(tmp_path: Path, version: str) -> None:
    with radarr_with_movie(tmp_path, version=version) as (radarr, movie, file, link):
        radarr.add_movie("Nothing", 2020)
        listed = ask(radarr, "movie").json
        assert listed[0]["movieFile"]["path"] == str(link)
        assert "customFormats" not in listed[0]["movieFile"]
        assert "movieFile" not in listed[1]
        assert (listed[1]["hasFile"], listed[1]["movieFileId"]) == (False, 0)
        radarr.omit_has_file = True
        assert ("hasFile" in ask(radarr, "movie").json[0]) == (version in (RADARR_3, RADARR_4))
        assert ask(radarr, f"movie/{movie}").json["movieFileId"] == file
        assert ask(radarr, "movie/999").status == 404
        assert ask(radarr, "moviefile").status == 400
        assert ask(radarr, f"moviefile/{file}").json["movieId"] == movie
        second = radarr.add_movie("Second", file_name="Second.mkv")
        found = ask(radarr, f"moviefile?movieId={movie}&movieId={second}").json
        assert len(found) == (2 if version in (RADARR_5, RADARR_6) else 1)
        edited = ask(radarr, "movie/editor", "PUT", {"movieIds": [movie], "monitored": False})
        assert edited.status == 202
        assert not radarr.movies[movie]["monitored"]


# --- deleting


@pytest.mark.parametrize("version", [*SONARRS, OLD_SONARR])
@pytest.mark.parametrize("recycle_bin", [False, True])
def test_delete_episode_file(tmp_path: Path, version: str, recycle_bin: bool) -> None:
    options = {"version": version, "recycle_bin": recycle_bin}
    with sonarr_with_show(tmp_path, **options) as (sonarr, _, file, link):
        settings = ask(sonarr, "config/mediamanagement").json
        assert bool(settings["recycleBin"]) == recycle_bin
        answer = ask(sonarr, f"episodefile/{file}", "DELETE")
        if recycle_bin and version in (SONARR_4, SONARR_5):
            assert answer.status == 500
            assert answer.json == {"message": "Unable to delete episode file"}
            assert link.is_symlink()
            assert file in sonarr.files
            link.unlink()  # nothing is there any more: the disk is left alone
            answer = ask(sonarr, f"episodefile/{file}", "DELETE")
        assert answer.status == 200
        assert answer.body == (b"{}" if version == SONARR_3 else b"")
        assert not os.path.lexists(str(link))
        assert file not in sonarr.files
        assert sonarr.deleted_files == [file]
        assert sonarr.episodes[7001]["episodeFileId"] == 0
        assert sonarr.episodes[7001]["monitored"]
        assert sonarr.episodes[7002]["episodeFileId"] == file + 1
        again = ask(sonarr, f"episodefile/{file}", "DELETE")
        assert again.status == 404
        assert set(again.json) == {"message", "description"}
        assert sonarr.deleted_files == [file]
        events = ask(sonarr, "history?eventType=5").json["records"]
        assert [event["eventType"] for event in events] == ["episodeFileDeleted"]


def test_recycle_bin_takes_good_files(tmp_path: Path) -> None:
    with sonarr_with_show(tmp_path, recycle_bin=True) as (sonarr, _, file, _):
        assert ask(sonarr, f"episodefile/{file + 1}", "DELETE").status == 200
        assert len(list(sonarr.bin_folder.iterdir())) == 1
        own = sonarr.own_folder
    assert not own.exists()


@pytest.mark.parametrize("version", [*RADARRS, OLD_RADARR])
def test_delete_movie_file(tmp_path: Path, version: str) -> None:
    options = {"version": version, "recycle_bin": True, "auto_unmonitor": True}
    with radarr_with_movie(tmp_path, **options) as (radarr, movie, file, link):
        answer = ask(radarr, f"moviefile/{file}", "DELETE")
        if version in (RADARR_5, RADARR_6):
            assert answer.json == {"message": "Unable to delete movie file"}
            assert link.is_symlink()
            assert radarr.movies[movie]["monitored"]
            radarr.recycle_bin = False
            answer = ask(radarr, f"moviefile/{file}", "DELETE")
        assert answer.status == 200
        assert not link.is_symlink()
        assert radarr.movies[movie]["movieFileId"] == 0
        assert not radarr.movies[movie]["monitored"]
        key = "autoUnmonitorPreviouslyDownloadedMovies"
        assert ask(radarr, "config/mediamanagement").json[key] is True


def test_delete_without_a_root_folder(tmp_path: Path) -> None:
    with sonarr_with_show(tmp_path) as (sonarr, _, file, _):
        show = sonarr.root / "Show (2019)"
        show.rename(tmp_path / "elsewhere")  # the root is empty
        answers = [ask(sonarr, f"episodefile/{file}", "DELETE")]
        sonarr.root.rmdir()  # the root is gone
        answers.append(ask(sonarr, f"episodefile/{file}", "DELETE"))
        assert [answer.status for answer in answers] == [409, 409]
        assert "empty" in answers[0].json["message"]
        assert "doesn't exist" in answers[1].json["message"]
        assert file in sonarr.files
        assert ask(sonarr, "rootfolder").json[0]["accessible"] is False
        assert "freeSpace" not in ask(sonarr, "rootfolder").json[0]


def test_delete_unmonitors_and_empties(tmp_path: Path) -> None:
    with sonarr_with_show(tmp_path, auto_unmonitor=True) as (sonarr, _, file, link):
        sonarr.delete_empty_folders = True
        for number in (file, file + 1):
            assert ask(sonarr, f"episodefile/{number}", "DELETE").status == (200)
            (sonarr.root / "Other").mkdir(exist_ok=True)
        assert not sonarr.episodes[7001]["monitored"]
        assert not link.parent.parent.exists()


def test_bulk_delete(tmp_path: Path) -> None:
    with sonarr_with_show(tmp_path) as (sonarr, _, file, link):
        stale = ask(sonarr, "episodefile/bulk", "DELETE", {"episodeFileIds": [file, 999]})
        assert stale.status == 500
        other = sonarr.add_series("Other")
        strange = sonarr.add_file(other, "Season 01/Other - S01E01.mkv", [(1, 1)])
        dangle(sonarr.link_of(strange))
        both = ask(sonarr, "episodefile/bulk", "DELETE", {"episodeFileIds": [file, strange]})
        assert (both.status, both.body) == (200, b"{}")
        assert not link.is_symlink()
        assert sonarr.link_of(strange).is_symlink()  # sought in the first one's folder
        assert sonarr.deleted_files == [file, strange]


# --- commands


@pytest.mark.parametrize("version", SONARRS)
def test_command(tmp_path: Path, version: str) -> None:
    with sonarr_with_show(tmp_path, version=version, url_base="/s") as (sonarr, _, _, _):
        body = {"NAME": "episodesearch", "EpisodeIds": [7001]}
        posted = ask(sonarr, "command", "POST", body)
        number = posted.json["id"]
        assert posted.status == 201
        assert posted.headers["Location"] == f"{sonarr.url}/api/v3/command/{number}"
        assert (posted.json["name"], posted.json["status"]) == ("EpisodeSearch", "queued")
        assert ("result" in posted.json) == (version != SONARR_3)
        assert "ended" not in posted.json
        assert ask(sonarr, "command", "POST", body).json["id"] == number
        other = ask(sonarr, "command", "POST", {"name": "EpisodeSearch", "episodeIds": [7002]})
        assert other.json["id"] != number
        states = [ask(sonarr, f"command/{number}").json["status"] for _ in range(3)]
        assert states == ["started", "completed", "completed"]
        assert ask(sonarr, "command", "POST", body).json["id"] != number
        assert ask(sonarr, "command/99").status == 404
        assert [search["name"] for search in sonarr.searches] == ["EpisodeSearch"] * 4
        assert {row["status"] for row in ask(sonarr, "command").json} == {"started", "completed"}


def test_commands_that_go_wrong(tmp_path: Path) -> None:
    with sonarr_with_show(tmp_path) as (sonarr, show, _, _):
        unknown = ask(sonarr, "command", "POST", {"name": "Nonsense"})
        assert (unknown.status, unknown.json["message"]) == (
            500,
            "Sequence contains no matching element",
        )
        blank = ask(sonarr, "command", "POST", {"name": ""})
        assert (blank.status, blank.json[0]["propertyName"]) == (400, "Name")
        assert (
            ask(sonarr, "command", "POST", {"name": "SeriesSearch", "seriesId": "x"}).status == 400
        )
        assert run(sonarr, "EpisodeSearch")["status"] == "failed"
        assert run(sonarr, "SeriesSearch")["status"] == "failed"
        assert run(sonarr, "EpisodeSearch", episodeIds=[999])["status"] == "failed"
        sonarr.series[show]["seriesType"] = "daily"
        assert run(sonarr, "EpisodeSearch", episodeIds=[7001])["status"] == "failed"
        sonarr.commands_fail = True
        failed = run(sonarr, "RssSync")
        assert (failed["status"], failed["result"]) == ("failed", "unsuccessful")
        assert failed["exception"]
        sonarr.commands_fail, sonarr.commands_hang = False, True
        number = ask(sonarr, "command", "POST", {"name": "RssSync"}).json["id"]
        assert {ask(sonarr, f"command/{number}").json["status"] for _ in range(9)} == {"started"}
        assert ask(sonarr, f"command/{number}", "DELETE").status == 409


def test_commands_take_their_time(tmp_path: Path) -> None:
    with FakeSonarr(tmp_path / "tv") as sonarr:
        sonarr.command_polls, sonarr.command_seconds = 100, 60
        number = ask(sonarr, "command", "POST", {"name": "RssSync"}).json["id"]
        assert ask(sonarr, f"command/{number}").json["status"] == "queued"
        sonarr.command_seconds = 0.0
        assert ask(sonarr, f"command/{number}").json["status"] == "completed"


@pytest.mark.parametrize("version", [SONARR_3, OLD_SONARR, SONARR_4, SONARR_5])
def test_rescan_series(tmp_path: Path, version: str) -> None:
    with sonarr_with_show(tmp_path, version=version) as (sonarr, show, file, link):
        new = version in (SONARR_4, SONARR_5)
        sonarr.auto_unmonitor = True
        sonarr.link_of(file + 1).unlink()  # what is not even listed is removed
        state = run(sonarr, "RescanSeries", seriesId=show)["status"]
        assert state == ("failed" if new else "completed")
        assert list(sonarr.files) == [file]
        size = ask(sonarr, f"episodefile/{file}").json["size"]
        assert size == (2147483648 if new else len(os.readlink(str(link))))
        assert sonarr.episodes[7002]["monitored"] is new  # put off, and lost with the failure
        assert run(sonarr, "RefreshSeries", seriesId=show)["status"] == "completed"
        assert not sonarr.whole_library
        run(sonarr, "RefreshSeries", seriesIds=[show])
        assert sonarr.whole_library == (["RefreshSeries"] if version == SONARR_3 else [])


def test_rescan_of_missing_folders(tmp_path: Path) -> None:
    with sonarr_with_show(tmp_path) as (sonarr, show, _, _):
        (sonarr.root / "Show (2019)").rename(tmp_path / "away")
        run(sonarr, "RescanSeries", seriesId=show)
        assert len(sonarr.files) == 2  # the root is empty
        (sonarr.root / "Other").mkdir()
        (sonarr.root / "Show (2019)").symlink_to("/nowhere")
        run(sonarr, "RescanSeries", seriesId=show)
        assert not sonarr.files


def test_rescan_movie(tmp_path: Path) -> None:
    with radarr_with_movie(tmp_path) as (radarr, movie, file, link):
        assert run(radarr, "RescanMovie", movieId=movie)["status"] == "failed"
        link.unlink()
        assert run(radarr, "RescanMovie", movieId=movie)["status"] == "completed"
        assert not radarr.files
        link.symlink_to(tmp_path / "movies")
        assert run(radarr, "RescanMovie", movieId=movie)["status"] == "completed"
        assert radarr.movies[movie]["movieFileId"] == file + 1  # found where it was


# --- searching


def test_search_and_import(tmp_path: Path) -> None:
    with sonarr_with_show(tmp_path) as (sonarr, show, file, link):
        sonarr.downloads = tmp_path / "downloads"
        assert run(sonarr, "EpisodeSearch", episodeIds=[7001])["status"] == "completed"
        assert sonarr.tick() == []  # there is a record: nothing is grabbed
        ask(sonarr, f"episodefile/{file}", "DELETE")
        sonarr.episodes[7001]["monitored"] = False  # searched all the same
        run(sonarr, "EpisodeSearch", episodeIds=[7001])
        grabbed = ask(sonarr, "history?eventType=1&episodeId=7001").json["records"]
        assert [event["eventType"] for event in grabbed] == ["grabbed"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", grabbed[0]["date"])
        queue = ask(sonarr, f"queue/details?seriesId={show}").json
        assert [item["episodeId"] for item in queue] == [7001]
        assert ask(sonarr, "history?eventType=grabbed").status == 400
        (new,) = sonarr.tick()
        assert new > file
        assert link.read_bytes() == b"a new video"
        assert Path(os.readlink(str(link))).parent == tmp_path / "downloads"
        episode = ask(sonarr, "episode/7001").json
        assert (episode["hasFile"], episode["episodeFileId"]) == (True, new)
        assert ask(sonarr, "queue/details").json == []
        events = ask(sonarr, f"history/series?seriesId={show}").json
        assert [event["eventType"] for event in events] == [
            "downloadFolderImported",
            "grabbed",
            "episodeFileDeleted",
        ]
        assert len(ask(sonarr, f"history/series?seriesId={show}&eventType=3").json) == 1
        assert len(ask(sonarr, f"history/series?seriesId={show}&eventType=grabbed").json) == 1


def test_import_onto_a_leftover_link(tmp_path: Path) -> None:
    with sonarr_with_show(tmp_path) as (sonarr, _, file, link):
        link.unlink()
        ask(sonarr, f"episodefile/{file}", "DELETE")
        dangle(link)
        run(sonarr, "EpisodeSearch", episodeIds=[7001])
        assert sonarr.tick() == []
        (failed,) = sonarr.failed_imports
        assert "Destination already exists" in failed["reason"]
        assert [command["name"] for command in sonarr.commands.values()][-1] == "RescanSeries"
        assert 7001 not in sonarr.files
        run(sonarr, "EpisodeSearch", episodeIds=[7001])
        sonarr.renamed = True
        (new,) = sonarr.tick()
        assert sonarr.link_of(new) != link


def test_search_that_finds_nothing(tmp_path: Path) -> None:
    with sonarr_with_show(tmp_path) as (sonarr, _, file, link):
        ask(sonarr, f"episodefile/{file}", "DELETE")
        sonarr.finds_nothing = True
        assert run(sonarr, "EpisodeSearch", episodeIds=[7001])["status"] == "completed"
        assert sonarr.tick() == []
        sonarr.finds_nothing, sonarr.not_found = False, {7001}
        run(sonarr, "EpisodeSearch", episodeIds=[7001])
        assert sonarr.tick() == []
        sonarr.not_found, sonarr.downloads_fail = set(), True
        run(sonarr, "EpisodeSearch", episodeIds=[7001])
        assert sonarr.tick() == []
        assert sonarr.history[-1]["eventType"] == "downloadFailed"
        sonarr.downloads_fail = False
        ask(sonarr, "command", "POST", {"name": "EpisodeSearch", "episodeIds": [7001]})
        sonarr.tick("Show S{season:02d}E{episode:02d} PROPER.mkv")  # nobody polls
        assert (link.parent / "Show S01E01 PROPER.mkv").exists()


@pytest.mark.parametrize("twice", [False, True])
def test_double_episode(tmp_path: Path, twice: bool) -> None:
    with FakeSonarr(tmp_path / "tv") as sonarr:
        show = sonarr.add_series("Show")
        file = sonarr.add_file(show, "Season 01/Show - S01E01-E02.mkv", [(1, 1), (1, 2)])
        dangle(sonarr.link_of(file))
        ask(sonarr, f"episodefile/{file}", "DELETE")
        sonarr.double_grab = twice
        run(sonarr, "EpisodeSearch", episodeIds=[7001, 7002])
        assert len(sonarr.queue) == 1 + twice
        (new,) = sonarr.tick()
        assert [episode["episodeFileId"] for episode in sonarr.episodes.values()] == [new, new]
        assert len(sonarr.failed_imports) == twice


def test_season_search(tmp_path: Path) -> None:
    with sonarr_with_show(tmp_path) as (sonarr, show, file, _):
        ask(sonarr, f"episodefile/{file}", "DELETE")
        run(sonarr, "SeasonSearch", seriesId=show, seasonNumber=1)
        assert sonarr.tick() == []  # a healthy neighbour
        ask(sonarr, f"episodefile/{file + 1}", "DELETE")
        sonarr.episodes[7001]["monitored"] = False
        run(sonarr, "SeasonSearch", seriesId=show, seasonNumber=1)
        assert sonarr.tick() == []  # an unmonitored one
        sonarr.episodes[7001]["monitored"] = True
        sonarr.series[show]["monitored"] = False
        run(sonarr, "SeasonSearch", seriesId=show, seasonNumber=1)
        assert sonarr.tick() == []
        sonarr.series[show]["monitored"] = True
        run(sonarr, "SeriesSearch", seriesId=show)
        assert len(sonarr.queue) == 1
        assert len(sonarr.tick()) == 2
        assert run(sonarr, "SeasonSearch", seriesId=999)["status"] == "failed"


@pytest.mark.parametrize("version", RADARRS)
def test_movies_search(tmp_path: Path, version: str) -> None:
    with radarr_with_movie(tmp_path, version=version) as (radarr, movie, file, link):
        run(radarr, "MoviesSearch", movieIds=[movie])
        assert radarr.tick() == []
        ask(radarr, f"moviefile/{file}", "DELETE")
        radarr.movies[movie]["monitored"] = False
        command = run(radarr, "MoviesSearch", movieIds=[movie])
        assert ("result" in command) == (version != RADARR_3)
        if version == RADARR_3:
            assert not radarr.queue
            radarr.movies[movie]["monitored"] = True
            run(radarr, "MoviesSearch", movieIds=[movie])
        assert len(ask(radarr, f"queue/details?movieId={movie}").json) == 1
        (new,) = radarr.tick()
        assert radarr.movies[movie]["movieFileId"] == new
        assert link.exists()
        assert [
            event["eventType"] for event in ask(radarr, f"history/movie?movieId={movie}").json
        ] == ["downloadFolderImported", "grabbed", "movieFileDeleted"]
        assert run(radarr, "MoviesSearch")["status"] == "failed"


# --- sick servers


def get_raw(server: FakeServer, path: str = "/x", timeout: float = 2) -> bytes:
    """Send a GET and return all bytes that come back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as conn:
        conn.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: conn.recv(65536), b""))


def test_scripts_are_used_up() -> None:
    with FakeServer() as server:
        server.script(path_regex=r"^/a", status=503, headers={"Retry-After": "7"}, times=2, skip=1)
        server.script(method="POST", where=lambda r: r.body == {"n": 1}, status=500, times=None)
        answers = [ask(server, "/a") for _ in range(4)]
        assert [answer.status for answer in answers] == [200, 503, 503, 200]
        assert answers[1].headers["Retry-After"] == "7"
        assert ask(server, "/b").status == 200
        assert [ask(server, "/b", "POST", {"n": n}).status for n in (1, 2, 1)] == [500, 200, 500]
        started = time.monotonic()
        server.script(delay=0.05)
        assert ask(server, "/a").body == b"{}"
        assert time.monotonic() - started >= 0.05


@pytest.mark.parametrize(
    "sickness",
    ["401", "404", "429", "500", "502", "503", "html", "bad json", "not utf-8", "empty", "null"],
)
def test_sick_answers(sickness: str) -> None:
    with FakeServer() as server:
        server.sick(sickness)
        answer = ask(server, "/x")
        assert answer.status == SICKNESSES[sickness]["status"]
        assert answer.body == SICKNESSES[sickness]["body"]
        assert ("Content-Type" in answer.headers) == (bool(answer.body))


def test_redirect() -> None:
    with FakeServer() as server, FakeServer() as foreign:
        server.sick("redirect", headers={"Location": foreign.url + "/x"})
        answer = ask(server, "/x")
        assert (answer.status, answer.headers["Location"]) == (307, foreign.url + "/x")


def test_cut_answers(tmp_path: Path) -> None:
    with sonarr_with_show(tmp_path) as (sonarr, show, _, _):
        sonarr.sick("truncated")
        with pytest.raises(http.client.IncompleteRead) as cut:
            ask(sonarr, f"episodefile?seriesId={show}")
        assert cut.value.partial.startswith(b'[{"')
        sonarr.sick("reset")
        with pytest.raises(ConnectionResetError):
            ask(sonarr, f"episodefile?seriesId={show}")
        sonarr.sick("close")
        with pytest.raises(http.client.RemoteDisconnected):
            ask(sonarr, "series")
        for sickness in ("garbage", "long header"):
            sonarr.sick(sickness)
            with pytest.raises(http.client.HTTPException):
                ask(sonarr, "series")
        assert ask(sonarr, "series").status == 200


@pytest.mark.parametrize("sickness", ["hang", "drip", "slow headers"])
def test_slow_answers(sickness: str) -> None:
    with FakeServer() as server:
        server.drip_interval = 0.05
        server.sick(sickness)
        started = time.monotonic()
        with pytest.raises(socket.timeout):
            ask(server, "/x", timeout=0.04)
        while server.busy:  # it sees that the client has gone
            assert time.monotonic() - started < 2
            time.sleep(0.005)
        server.drip_interval = 0.001
        if sickness != "hang":
            server.sick(sickness)
            assert ask(server, "/x").body == b"{}"


def test_endless_answer() -> None:
    with FakeServer() as server:
        server.sick("endless", size=1 << 20)
        assert len(ask(server, "/x").body) >= 1 << 20
        server.sick("endless", size=1 << 18, body=b'{"id":1},')
        assert get_raw(server).count(b'{"id":1},') > 20000
        server.sick("endless")
        conn = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        conn.request("GET", "/x")
        conn.getresponse().read(100000)
        conn.close()
        assert ask(server, "/x").body == b"{}"


@pytest.mark.parametrize("before", [True, False])
def test_lost_answers(tmp_path: Path, before: bool) -> None:
    with sonarr_with_show(tmp_path) as (sonarr, _, file, link):
        sonarr.script(method="DELETE", kind="close", before_effect=before)
        with pytest.raises(http.client.RemoteDisconnected):
            ask(sonarr, f"episodefile/{file}", "DELETE")
        assert link.is_symlink() == before
        assert (file in sonarr.files) == before
        sonarr.script(method="POST", before_effect=before, status=500, body=b"")
        answer = ask(sonarr, "command", "POST", {"name": "EpisodeSearch", "episodeIds": [7001]})
        assert answer.status == 500
        assert len(sonarr.searches) == (not before)


def test_dead_clients(tmp_path: Path) -> None:
    with sonarr_with_show(tmp_path) as (sonarr, _, _, link):
        sonarr.latency = 0.02
        for text in (
            b"",
            b"GET /api",
            b"GET /api/v3/series HTTP/1.1\r\nHost: x\r\n\r\n",
            b'POST /api/v3/command HTTP/1.1\r\nContent-Length: 99\r\n\r\n{"name":',
        ):
            with socket.create_connection(("127.0.0.1", sonarr.port), timeout=5) as conn:
                conn.sendall(text)
        assert ask(sonarr, "series").status == 200
        assert not sonarr.commands
        assert link.is_symlink()


def test_many_clients(tmp_path: Path) -> None:
    with FakeSonarr(tmp_path / "tv", latency=0.05) as sonarr:
        populate(sonarr, 4, 20)
        counts: List[int] = []

        def read(series_id: int) -> None:
            counts.append(len(ask(sonarr, f"episodefile?seriesId={series_id}").json))

        threads = [threading.Thread(target=read, args=(number,)) for number in sonarr.series]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        assert time.monotonic() - started >= 0.05
        assert counts == [20] * 4
        assert 2 <= sonarr.peak <= 4


def test_down_and_up_again(tmp_path: Path) -> None:
    with FakeRadarr(tmp_path / "movies") as radarr:
        populate_movies(radarr, 50)
        idle = socket.create_connection(("127.0.0.1", radarr.port), timeout=2)
        ask(radarr, "movie")
        radarr.close()
        assert idle.recv(1) == b""
        idle.close()
        with pytest.raises(ConnectionRefusedError):
            ask(radarr, "movie")
        radarr.open()
        assert len(ask(radarr, "movie").json) == 50


def test_mistakes_of_the_fake_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="KeyError"), FakeSonarr(tmp_path / "tv") as sonarr:
        sonarr.series[1] = {"id": 1}
        assert ask(sonarr, "series").status == 599


# --- the relay


@pytest.mark.parametrize("mode", FakeRelay.answers)
def test_relay(mode: str) -> None:
    with FakeRelay("secret", prefix="/relay") as relay:
        relay.mode = mode
        query = {"type": "sonarr_tv", "scope": "auto", "term": "Show Name S01E02"}
        target = "/relay/find?" + urllib.parse.urlencode(query)
        refused = ask(relay, target)
        assert (refused.status, refused.json) == (401, {"error": "unauthorized"})
        assert ask(relay, target + "&token=wrong").status == 401
        answer = ask(relay, target + "&token=secret")
        assert (answer.status, answer.body) == relay.answers[mode]
        assert relay.finds == [query]
        assert relay.find_url == f"http://127.0.0.1:{relay.port}/relay/find"
        assert ask(relay, "/find?token=secret").status == 404
        assert ask(relay, "/relay/find?token=secret").status == 400


def test_relay_by_term_and_password() -> None:
    with FakeRelay("", userinfo="user:pass") as relay:
        relay.modes["Bad"] = "409"
        right = "Basic dXNlcjpwYXNz"
        assert ask(relay, "/find?type=a&term=Good").status == 401
        assert ask(relay, "/find?type=a&term=Good", Authorization=right).status == 200
        assert ask(relay, "/find?type=a&term=Bad", Authorization=right).status == 409
