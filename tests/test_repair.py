"""Repair through Sonarr, Radarr and the relay: exact, resumable, never too much.

Every test ends with the same examination, see `World.examine`: nothing healthy was harmed, no
request was sent that has no business there, and no secret stands where it does not belong.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

import pytest
from conftest import Refresherr, Result, compiled_program, target_of
from fake_servers import (
    SONARR_3,
    SONARR_4,
    FakeArr,
    FakeRadarr,
    FakeRelay,
    FakeServer,
    FakeSonarr,
    Record,
    Request,
)
from fuse_fs import tmpfs

TOKEN = "relay-token-1b2c3d"
FAST = ("--apply", "--no-wait")


class Watchful(FakeArr):
    """Notes when it is told to delete what is not broken at that moment."""

    def remove_file(self, record: Record, folder: Optional[str] = None) -> None:
        link = self.link_of(record["id"])
        if os.path.exists(str(link)):
            self.__dict__.setdefault("harmed", []).append(str(link))
        super().remove_file(record, folder)


class Sonarr(Watchful, FakeSonarr):
    pass


class Radarr(Watchful, FakeRadarr):
    pass


class World:
    """A library, its servers, the config that ties them to the program, and what must hold."""

    is_within = False  # whether the program runs in this process: a start takes its time

    def __init__(
        self, folder: Path, refresherr: Refresherr, write_config: Callable[[str], Path]
    ) -> None:
        self.folder = folder
        self.refresherr = refresherr
        self.refresherr.program = compiled_program()
        self.write_config = write_config
        self.media = folder / "media"
        self.cloud = folder / "cloud"
        self.media.mkdir()
        self.cloud.mkdir()
        self.stack = contextlib.ExitStack()
        self.servers: Dict[str, FakeArr] = {}
        self.relay: Optional[FakeRelay] = None
        self.sections: Dict[str, Dict[str, str]] = {
            # What guard and patience do has tests of its own, and there always is a witness.
            "scan": {"roots": str(self.media), "max_new_broken": "100%"},
            "repair": {"min_age": "0", "patience": "0", "timeout": "5s", "cooldown": "6h"},
        }
        self.healthy: Dict[Path, Path] = {}  # link: target
        self.broken: Set[Path] = set()
        self.witnesses: Set[Path] = set()  # directories of targets of which one is good
        self.releases = 0
        self.outputs: List[str] = []
        self.secrets: List[str] = []

    # The library and its servers

    def sonarr(self, name: str = "tv", **options: Any) -> FakeSonarr:
        server = Sonarr(self.media / name, api_key=f"{name}-sonarr-key-0123456789", **options)
        self.add_server(f"sonarr {name}", server)
        return server

    def radarr(self, name: str = "movies", **options: Any) -> FakeRadarr:
        server = Radarr(self.media / name, api_key=f"{name}-radarr-key-0123456789", **options)
        self.add_server(f"radarr {name}", server)
        return server

    def add_server(self, section: str, server: FakeArr) -> None:
        self.stack.enter_context(server)
        self.servers[section.replace(" ", "_")] = server
        self.secrets.append(server.api_key)
        settings = {"url": server.url, "api_key": server.api_key, "roots": str(server.root)}
        if server.server_root != str(server.root):
            settings["path_map"] = f"{server.root} => {server.server_root}"
        self.sections[section] = settings
        (server.root / "Another Title").mkdir()  # an empty root folder is a 409
        server.downloads = self.cloud / f"downloads of {section}"
        server.downloads.mkdir()
        (server.downloads / "neighbour").touch()

    def add_relay(self, routes: str, **options: Any) -> FakeRelay:
        self.relay = self.stack.enter_context(FakeRelay(TOKEN, **options))
        self.secrets.append(TOKEN)
        self.sections["relay"] = {"base": self.relay.url, "token": TOKEN, "routes": routes}
        return self.relay

    def link(self, path: Path, broken: bool = False) -> Path:
        """Make a link whose target has a neighbour, so that its directory is never empty."""
        self.releases += 1
        release = self.cloud / f"release {self.releases}"
        release.mkdir()
        (release / "release.nfo").touch()
        target = release / path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
        if broken:
            self.broken.add(path)
            if self.cloud not in self.witnesses:
                self.witnesses.add(self.cloud)
                self.link(self.media / "seen" / f"Witness {self.releases} (1999)" / "file.mkv")
        else:
            target.write_bytes(b"video")
            self.healthy[path] = target
        return path

    def put(self, server: FakeArr, file_id: int, broken: bool = False) -> Path:
        """Make the link of a file that a server has on record."""
        return self.link(server.link_of(file_id), broken)

    def movie(self, radarr: FakeRadarr, title: str, broken: bool = True, **options: Any) -> int:
        """Add a movie with its file and link; return its id."""
        name = f"{title} (2021).mkv"
        number = radarr.add_movie(title, 2021, file_name=name, **options)
        self.put(radarr, radarr.movies[number]["movieFileId"], broken)
        return number

    def episode(
        self,
        sonarr: FakeSonarr,
        series: int,
        *numbers: Tuple[int, int],
        broken: bool = False,
        **options: Any,
    ) -> int:
        """Add a file of one or more (season, number) with its link; return the file's id."""
        season = numbers[0][0]
        marks = "".join(f"E{number:02d}" for _, number in numbers)
        title = sonarr.series[series]["title"].replace("/", "-")
        folder = f"Season {season:02d}" if season else "Specials"
        name = f"{folder}/{title} - S{season:02d}{marks}.mkv"
        file = sonarr.add_file(series, name, numbers, **options)
        self.put(sonarr, file, broken)
        return file

    def season(
        self, sonarr: FakeSonarr, series: int, season: int, count: int, broken: Sequence[int] = ()
    ) -> List[int]:
        """Add a season of `count` files; return those of the broken episodes."""
        files = {
            number: self.episode(sonarr, series, (season, number), broken=number in broken)
            for number in range(1, count + 1)
        }
        return [files[number] for number in broken]

    def bystanders(self, count: int) -> None:
        """Add good links that are nobody's: with few links, a few broken ones are a mass."""
        for number in range(count):
            self.link(self.media / "other" / f"Bystander {number:02d} (1999)" / "file.mkv")

    def heal(self, link: Path) -> None:
        target_of(link).write_bytes(b"video")
        self.broken.discard(link)
        self.healthy[link] = target_of(link)

    def spoil(self, link: Path) -> None:
        target_of(link).unlink()
        self.healthy.pop(link, None)
        self.broken.add(link)

    # The program

    def configure(self) -> None:
        lines = []
        for title, settings in self.sections.items():
            lines.append(f"[{title}]")
            lines += [f"{key} = {value}" for key, value in settings.items()]
        self.write_config("\n".join(lines) + "\n")

    def call(self, *args: object, **env: str) -> Result:
        """Run the program, the config written anew."""
        self.configure()
        run = self.refresherr.within if self.is_within else self.refresherr
        result = run(*args, env=env)
        self.outputs += [result.out, result.err]
        assert "internal error" not in result.err, result.err
        return result

    def do(self, *args: object, **env: str) -> Record:
        """Run it with --json and return the object."""
        result = self.call(*args, "--json", **env)
        assert result.out, result.err
        assert result.json["exit_code"] == result.code
        return result.json

    def scan_and_queue(self) -> List[Record]:
        """Scan and queue; return what was queued."""
        self.do("scan")
        queued: List[Record] = self.do("queue")["queued"]
        return queued

    def alter(self, sql: str, *values: object) -> None:
        """Change the database, past the program."""
        conn = sqlite3.connect(str(self.refresherr.db_path))
        with conn:
            conn.execute(sql, values)
        conn.close()

    def make_due(self) -> None:
        self.alter("UPDATE actions SET next_attempt_utc = NULL")

    def pass_hours(self, hours: int) -> None:
        """Let it all have happened so many hours earlier."""
        moved = "strftime('%Y-%m-%dT%H:%M:%S+00:00', {0}, '-" + str(hours) + " hours')"
        for table, columns in (
            ("actions", ("created_utc", "fired_utc", "next_attempt_utc")),
            ("symlinks", ("first_seen_utc", "last_seen_utc", "broken_since_utc")),
        ):
            changes = ", ".join(f"{column} = {moved.format(column)}" for column in columns)
            self.alter(f"UPDATE {table} SET {changes}")

    def statuses(self) -> Dict[str, int]:
        return dict(self.refresherr.query("SELECT status, count(*) FROM actions GROUP BY status"))

    def status_of(self, link: Path) -> str:
        """Return the status of a link's last action."""
        rows = self.refresherr.query(
            "SELECT status FROM actions WHERE related_path = ? ORDER BY id", str(link)
        )
        return str(rows[-1][0]) if rows else ""

    # What was sent, and what must hold

    def changes(self) -> List[Tuple[str, str]]:
        """Return what was sent that changes a server, and what was asked of the relay."""
        sent = [(r.method, r.target) for s in self.servers.values() for r in s.changes()]
        return sent + [("GET", request.target) for request in self.relay_requests()]

    def relay_requests(self) -> List[Any]:
        """Return what the relay was asked, but for whether it is there."""
        return [request for request in self.relay.requests if request.query] if self.relay else []

    def forget_requests(self) -> None:
        for server in self.servers.values():
            server.clear_requests()
        if self.relay:
            self.relay.clear_requests()

    def examine(self) -> None:
        """Nothing healthy was harmed, nothing unbidden sent, no secret told."""
        for link, target in self.healthy.items():
            assert link.is_symlink() and target_of(link) == target, f"{link} was harmed"
            assert target.exists()
        for name, server in self.servers.items():
            records = {server.link_of(file_id): file_id for file_id in server.files}
            for link in self.healthy:
                if server.root in link.parents and link.parent.name != "not on record":
                    assert link in records, f"{name} has lost the record of {link}"
            assert not server.__dict__.get("harmed"), f"{name} was told to delete what is healthy"
            assert len(set(server.deleted_files)) == len(server.deleted_files)
            assert not server.whole_library
            assert server.peak <= 1, f"{name} was asked {server.peak} things at once"
            keys = {other.api_key for other in self.servers.values()} - {server.api_key}
            for request in server.requests:
                assert request.headers.get("x-api-key") == server.api_key
                told = f"{request.target} {request.headers} {request.raw!r}"
                assert not any(key in told for key in keys) and TOKEN not in told
                assert server.api_key not in request.target
            for request in server.changes():
                path = request.path[len(server.url_base) :]
                kind = server.unit
                numbered = "file/" in path or "failed/" in path
                sent = (request.method, path.rpartition("/")[0] if numbered else path)
                monitor = "/episode/monitor" if kind == "episode" else "/movie/editor"
                assert sent in (
                    ("DELETE", f"/api/v3/{kind}file"),
                    ("PUT", "/api/v3" + monitor),
                    ("POST", "/api/v3/command"),
                    ("POST", "/api/v3/history/failed"),
                ), sent
                if request.method == "POST" and path.endswith("command"):
                    names = {
                        "episode": ["EpisodeSearch", "SeasonSearch"],
                        "movie": ["MoviesSearch"],
                    }
                    assert request.body["name"] in names[kind]
        if self.relay:
            for request in self.relay.requests:
                assert request.method == "GET"
                assert request.query == {} or request.query["token"] == [TOKEN]
                assert "x-api-key" not in request.headers
        places = {"output": "\n".join(self.outputs).encode()}
        for file in self.refresherr.data_dir.glob("*"):
            places[file.name] = file.read_bytes()
        for place, content in places.items():
            for secret in self.secrets:
                at = content.find(secret.encode())
                assert at < 0, f"{place}: {content[max(0, at - 100) : at + 50]!r}"


@pytest.fixture
def world(
    tmp_path: Path, refresherr: Refresherr, write_config: Callable[[str], Path]
) -> Iterator[World]:
    world = World(tmp_path, refresherr, write_config)
    world.is_within = True
    with world.stack:
        yield world
        world.examine()


def searched(server: FakeArr) -> List[int]:
    """Return the ids of the episodes or movies that were searched for, each as often as it was."""
    found: List[int] = []
    for body in server.searches:
        if body["name"] == "SeasonSearch":
            assert isinstance(server, FakeSonarr)
            episodes = server.episodes_of(body["seriesId"], body["seasonNumber"])
            found += [episode["id"] for episode in episodes]
        else:
            found += body["episodeIds" if server.unit == "episode" else "movieIds"]
    return sorted(found)


def units_of(server: FakeArr, files: Iterable[int]) -> List[int]:
    return sorted(unit["id"] for file in files for unit in server.units_of(file))


def outcomes(result: Record) -> Dict[str, List[str]]:
    """Return {file name of the link: [status, error]} of a dispatch."""
    return {
        os.path.basename(item["related_path"]): [item["status"], item["error"]]
        for item in result["actions"]
    }


# What recovers meanwhile is left alone


def test_what_is_no_longer_broken_is_left_alone(world: World) -> None:
    radarr = world.radarr()
    for title in ("Healed", "Regular", "Removed", "Repointed", "Broken"):
        world.movie(radarr, title)
    links = {link.parent.name.split()[0]: link for link in world.broken}
    assert len(world.scan_and_queue()) == 5
    world.heal(links["Healed"])
    links["Regular"].unlink()
    links["Regular"].write_bytes(b"put here by hand")
    links["Removed"].unlink()
    links["Repointed"].unlink()
    links["Repointed"].symlink_to(next(iter(world.healthy)))
    world.broken = {links["Broken"]}

    result = world.do("dispatch", *FAST)
    assert (result["sent"], result["cancelled"], result["exit_code"]) == (1, 4, 0)
    assert [radarr.path_of(file) for file in radarr.deleted_files] == [str(links["Broken"])]
    assert links["Regular"].read_bytes() == b"put here by hand"


def test_a_link_that_comes_back_while_the_others_are_looked_up(world: World) -> None:
    """Between its look and its DELETE lie all the requests for the rest of the season."""
    sonarr = world.sonarr()
    series = sonarr.add_series("Show")
    world.season(sonarr, series, 1, 6, broken=[1, 2, 3])
    world.bystanders(9)
    world.scan_and_queue()
    links = sorted(world.broken)
    asked: List[str] = []

    def heal_the_first(request: Request) -> bool:
        asked.append(request.path)
        if len(asked) == 3:  # all of them were looked at
            world.heal(links[0])
        return False

    sonarr.script(method="GET", path_regex="/history", where=heal_the_first)
    result = world.do("dispatch", *FAST)
    assert len(asked) >= 3 and os.path.exists(links[0])
    assert (result["sent"], result["cancelled"]) == (2, 1)
    deleted = {sonarr.path_of(file) for file in sonarr.deleted_files}
    assert deleted == {str(link) for link in links[1:]}


def test_links_that_recover_after_a_failed_deletion(world: World) -> None:
    radarr = world.radarr()
    for title in ("Healed", "Regular", "Gone"):
        world.movie(radarr, title)
    links = {link.parent.name.split()[0]: link for link in world.broken}
    world.scan_and_queue()
    radarr.script(method="DELETE", status=503, times=3)
    assert world.do("dispatch", *FAST)["retry"] == 3
    assert radarr.deleted_files == []

    world.heal(links["Healed"])
    for name in ("Regular", "Gone"):
        links[name].unlink()
    links["Regular"].write_bytes(b"put here by hand")
    world.make_due()
    result = world.do("dispatch", *FAST)
    assert links["Regular"].read_bytes() == b"put here by hand"
    assert set(radarr.deleted_files) <= {603}  # that of the link that someone has removed
    assert result["cancelled"] >= 2
    assert [world.status_of(links[n]) for n in ("Healed", "Regular")] == ["cancelled"] * 2


def test_a_failed_repair_that_is_retried_after_the_server_mended_it(world: World) -> None:
    radarr = world.radarr()
    movie = world.movie(radarr, "Film")
    link = next(iter(world.broken))
    world.scan_and_queue()
    radarr.script(method="POST", path_regex="command", status=400)
    assert world.do("dispatch", *FAST)["failed"] == 1
    assert len(radarr.deleted_files) == 1
    radarr.make_file(movie, link.name, [radarr.movies[movie]])
    link.symlink_to(world.cloud / "fresh.mkv")
    world.heal(link)

    assert world.do("actions", "retry", "--failed")["count"] == 1
    world.do("dispatch", *FAST)
    assert len(radarr.deleted_files) == 1 and radarr.movies[movie]["movieFileId"]


def test_broken_links_whose_words_name_healthy_files(world: World) -> None:
    """Where a target lies is the kernel's word: the same text, tidied up, may be another file."""
    radarr = world.radarr()
    shapes = ("slash", "parent", "linked", "repointed")
    movies = {shape: world.movie(radarr, shape, broken=False) for shape in shapes}
    files = {shape: radarr.link_of(radarr.movies[n]["movieFileId"]) for shape, n in movies.items()}
    folder = world.media / "mine"
    elsewhere = world.folder / "a" / "b" / "c"
    for path in (folder, elsewhere):
        path.mkdir(parents=True)
    (elsewhere.parent / "neighbour").touch()
    (folder / "door").symlink_to(elsewhere)
    words = {
        "slash": f"{files['slash']}/",
        "parent": f"{files['parent'].parent}/nowhere/../{files['parent'].name}",
        "linked": f"door/../../movies/linked (2021)/{files['linked'].name}",
        "repointed": str(files["repointed"]),
    }
    world.spoil(files["repointed"])
    mine = {shape: folder / f"{shape}.mkv" for shape in words}
    for shape, link in mine.items():
        link.symlink_to(words[shape])
        assert os.path.normpath(os.path.join(folder, words[shape])) == str(files[shape])
        assert not link.exists()
    del world.sections["radarr movies"]["roots"]
    world.do("scan")
    world.do("ingest")
    world.do("queue")
    world.heal(files["repointed"])  # after it was queued for that file
    mine["repointed"].unlink()
    mine["repointed"].symlink_to(world.cloud / "release 1" / "nothing.mkv")
    world.do("dispatch", *FAST)
    assert radarr.changes() == [] and all(link.is_symlink() for link in mine.values())


def test_a_broken_link_where_the_servers_own_path_is_something_else_here(world: World) -> None:
    """The server's /tv is our media/tv, and our /tv is something else."""
    here = world.folder / "tv"
    sonarr = world.sonarr(server_root=str(here))
    show = sonarr.add_series("Show")
    file = world.episode(sonarr, show, (1, 1))
    other = here / Path(sonarr.link_of(file)).relative_to(sonarr.root)
    world.link(other, broken=True)
    world.broken.clear()
    world.sections["scan"]["roots"] += f", {here}"
    world.do("scan")
    world.do("ingest")
    world.do("queue")
    world.do("dispatch", *FAST)
    assert sonarr.changes() == [] and other.is_symlink()


def test_a_library_that_is_away_for_us_alone(world: World) -> None:
    """The server sees it all the while: its file may be healed although we see no link."""
    radarr = world.radarr(server_root="/movies")
    world.movie(radarr, "Film")
    link = next(iter(world.broken))
    door = world.folder / "door"
    door.symlink_to(radarr.root)
    world.sections["scan"]["roots"] = f"{door}, {world.media / 'seen'}"
    world.sections["radarr movies"].update(roots=str(door), path_map=f"{door} => /movies")
    world.bystanders(1)
    world.scan_and_queue()
    radarr.script(method="DELETE", status=503)
    assert world.do("dispatch", *FAST)["retry"] == 1
    world.heal(link)
    door.unlink()
    world.make_due()
    world.do("dispatch", *FAST)
    assert radarr.deleted_files == []
    door.symlink_to(radarr.root)
    world.make_due()
    assert world.do("dispatch", *FAST)["cancelled"] == 1


def test_links_into_a_library_that_is_away_for_us_alone(world: World) -> None:
    """That the folder of the server's file is gone here says nothing of the file there."""
    radarr = world.radarr(server_root="/movies")
    world.movie(radarr, "Film", broken=False)
    door = world.folder / "door"
    door.symlink_to(radarr.root)
    mine = world.media / "mine" / "Film (2021)" / "link.mkv"
    mine.parent.mkdir(parents=True)
    mine.symlink_to(door / "Film (2021)" / "Film (2021).mkv")
    world.sections["scan"]["roots"] = str(mine.parent.parent)
    world.sections["radarr movies"].update(roots="", path_map=f"{door} => /movies")
    world.do("scan")
    world.do("ingest")
    door.unlink()
    world.scan_and_queue()
    world.do("dispatch", *FAST)
    assert radarr.changes() == [] and mine.is_symlink()


@pytest.mark.parametrize("outage", ["unmounted", "emptied"])
def test_the_mount_of_the_targets_goes(world: World, tmpfs_mount: tmpfs, outage: str) -> None:
    """Between queue and dispatch, in the middle of a repair, and before queue."""
    mount = Path(tmpfs_mount.mount_point)
    sonarr, late, other = world.sonarr(), world.radarr("late"), world.radarr("videos")
    world.cloud = mount / "torrents"
    world.cloud.mkdir()
    world.season(sonarr, sonarr.add_series("Show"), 1, 4, broken=[1, 2])
    world.movie(late, "Late")
    world.cloud = world.folder / "disk"
    world.cloud.mkdir()
    world.movie(other, "Local")  # what is not concerned is repaired all the same
    assert len(world.scan_and_queue()) == 4
    late.close()
    for server in (sonarr, other):  # found, and no more
        server.script(method="DELETE", status=503, times=2)
    assert world.do("dispatch", *FAST)["retry"] == 3
    world.make_due()
    world.forget_requests()
    late.open()
    other.scripts.clear()
    world.healthy.clear()  # their links stay: `before`
    before = {link: target_of(link) for link in sonarr.root.rglob("*.mkv")}
    if outage == "unmounted":
        tmpfs_mount.unmount()
    else:
        for entry in list(mount.iterdir()):
            shutil.rmtree(str(entry))
    result = world.do("dispatch", *FAST)
    assert result["exit_code"] == 4 and result["status"] == "refused"
    assert sonarr.changes() == late.changes() == [] and len(other.deleted_files) == 1
    assert world.statuses() == {"pending": 3, "sent": 1}

    world.alter("DELETE FROM actions")
    result = world.do("queue")
    assert result["exit_code"] == 4 and result["queued"] == []
    assert result["skipped"]["unreachable"] == 3
    assert {link: target_of(link) for link in sonarr.root.rglob("*.mkv")} == before


def test_a_path_that_the_server_does_not_know(world: World) -> None:
    """Similar is not the same; the wrong path map hits nothing."""
    world.sections["repair"]["max_attempts"] = "2"
    sonarr, radarr = world.sonarr(), world.radarr()
    show = sonarr.add_series("Show", path=f"{sonarr.root}/Show")
    for folder in ("Show", "Show 2"):
        if folder == "Show 2":
            show = sonarr.add_series("Show 2", path=f"{sonarr.root}/Show 2")
        world.put(sonarr, sonarr.add_file(show, "Season 01/Show - S01E01.mkv", [(1, 1)]))
    for name in (
        "Show/Season 01/Show - S01E01",
        "Show/Season 01/Show - S01E01.mkv.part",
        "Show/Season 01/show - s01e01.mkv",
        "Show/Season 01/Show - S01E02.mkv",
        "Show/Season 1/Show - S01E01.mkv",
        "Show/Show - S01E01.mkv",
    ):
        world.link(sonarr.root / name, broken=True)
    world.movie(radarr, "Film", broken=False)
    world.link(radarr.root / "Film (2021)" / "Film (2021) - cd2.mkv", broken=True)
    world.movie(radarr, "Other")  # known, and not where the path map says
    world.sections["radarr movies"]["path_map"] = f"{radarr.root} => /elsewhere"
    world.bystanders(12)
    assert len(world.scan_and_queue()) == 6
    result = world.do("dispatch", *FAST)
    assert (result["failed"], result["exit_code"]) == (6, 1)
    assert all("path_map" in item["error"] for item in result["actions"])
    assert world.changes() == []

    # It was an attempt: no other before the cooldown is over, and two in all.
    assert world.do("queue")["skipped"]["cooldown"] == 6
    world.pass_hours(7)
    assert len(world.do("queue")["queued"]) == 6
    world.do("dispatch", *FAST)
    world.pass_hours(7)
    assert world.do("queue")["skipped"]["exhausted"] == 6
    assert world.do("stats")["repairs"]["needs_attention"] == 6
    steps = [link["next"] for link in world.do("broken")["links"]]
    assert sum("needs attention" in step for step in steps) == 6
    assert sum("owns it" in step for step in steps) == 2  # they are no videos
    assert world.changes() == []


def test_a_link_to_a_file_that_a_server_knows(world: World) -> None:
    """The file is the server's and goes; the link is the user's and stays."""
    library = world.radarr("movies", server_root="/data/movies")
    other = world.radarr("other")
    world.movie(library, "Film")
    world.movie(other, "Film", broken=False)  # the same numbers, another server
    file = next(iter(world.broken))
    mine = [world.media / "mine" / name for name in ("Film (2021).mkv", "again.mkv")]
    mine[0].parent.mkdir()
    mine[0].symlink_to(file)
    mine[1].symlink_to(os.path.relpath(file, mine[1].parent))
    (mine[0].parent / "witness.mkv").symlink_to(target_of(file).with_name("release.nfo"))
    world.sections["scan"]["roots"] = str(mine[0].parent)
    for section in ("radarr movies", "radarr other"):
        del world.sections[section]["roots"]
    world.do("scan")
    ingested = world.do("ingest")["instances"]
    assert {line["name"]: line["linked"] for line in ingested} == {
        "radarr_movies": 1,
        "radarr_other": 0,
    }
    queued = world.do("queue")["queued"]
    assert [action["url"] for action in queued] == [
        "arr://radarr_movies/repair?path=/data/movies/Film%20%282021%29/Film%20%282021%29.mkv"
    ]
    assert world.do("dispatch", *FAST)["sent"] == 1
    assert library.deleted_files == [601] and other.changes() == []
    assert not os.path.lexists(str(file)) and all(link.is_symlink() for link in mine)
    library.tick()
    assert world.do("dispatch", *FAST)["repaired"] == 1
    assert all(link.exists() for link in mine)


# The mixed library


class Mixed(World):
    """A library of every case, with what is to come of it."""

    def build(self, sonarr: FakeSonarr, hd: FakeRadarr, four_k: FakeRadarr) -> None:
        self.tv, self.hd, self.four_k = sonarr, hd, four_k
        root = sonarr.server_root
        files: List[int] = []
        hd_files: List[int] = []
        four_k_files: List[int] = []
        one = sonarr.add_series("Harbour: Lights")
        files += self.season(sonarr, one, 1, 4, broken=[2])
        three = sonarr.add_series('Who\'s "That"?')
        files += self.season(sonarr, three, 1, 6, broken=[1, 3, 6])
        gone = sonarr.add_series("Ghost \U0001f47b Town")
        files += self.season(sonarr, gone, 1, 3, broken=[1, 2, 3])
        self.season(sonarr, gone, 2, 2)
        self.gone = {"name": "SeasonSearch", "seriesId": gone, "seasonNumber": 1}
        double = sonarr.add_series("Double")
        files.append(self.episode(sonarr, double, (1, 1), (1, 2), broken=True))
        self.episode(sonarr, double, (1, 3), (1, 4))
        special = sonarr.add_series("Special")
        files.append(self.episode(sonarr, special, (0, 1), broken=True))
        self.episode(sonarr, special, (1, 1))
        daily = sonarr.add_series("Daily", series_type="daily")
        for day in (1, 2):
            name = f"Season 2020/Daily - 2020-03-0{day}.mkv"
            date = f"2020-03-0{day}"
            file = sonarr.add_file(daily, name, [(2020, day)], air_date=date)
            self.put(sonarr, file, broken=day == 1)
            files += [file] if day == 1 else []
        for title, lost in (("Show", 1), ("Show 2", 2)):
            show = sonarr.add_series(title, path=f"{root}/{title}")
            for number in (1, 2):
                name = f"Season 01/Show - S01E0{number}.mkv"
                file = sonarr.add_file(show, name, [(1, number)])
                self.put(sonarr, file, broken=number == lost)
                files += [file] if number == lost else []
        # Of a whole season one is unmonitored: a season search would refuse.
        partly = sonarr.add_series("Partly")
        files.append(self.episode(sonarr, partly, (1, 1), broken=True))
        sonarr.add_file(partly, "Season 01/unmonitored.mkv", [(1, 2)], monitored=False)
        unmonitored_file = sonarr.episodes[sonarr.episode_id(partly, 1, 2)]["episodeFileId"]
        self.put(sonarr, unmonitored_file, broken=True)
        self.episode(sonarr, partly, (2, 1), monitored=False)
        for title, broken in (("Alpha", "hd"), ("Beta: 2", "4k"), ('\xc9t\xe9 \'n "x"', "both")):
            for radarr, name, wanted in ((hd, "hd", hd_files), (four_k, "4k", four_k_files)):
                movie = self.movie(radarr, title, broken=broken in (name, "both"))
                wanted += [radarr.movies[movie]["movieFileId"]] if broken in (name, "both") else []
        silent = hd.movies[self.movie(hd, "Silent", monitored=False)]["movieFileId"]
        self.files: Dict[FakeArr, List[int]] = {sonarr: files, hd: hd_files, four_k: four_k_files}
        if self.sections["repair"].get("unmonitored") != "no":
            files.append(unmonitored_file)
            hd_files.append(silent)
        else:
            self.broken -= {sonarr.link_of(unmonitored_file), hd.link_of(silent)}
        self.wanted = {server: units_of(server, found) for server, found in self.files.items()}
        self.bystanders(25)


@pytest.fixture
def mixed(
    tmp_path: Path, refresherr: Refresherr, write_config: Callable[[str], Path]
) -> Iterator[Mixed]:
    world = Mixed(tmp_path, refresherr, write_config)
    world.is_within = True
    with world.stack:
        yield world
        world.examine()


DECORATED = {"recycle_bin": True, "auto_unmonitor": True}


@pytest.mark.parametrize("setup", ["v4", "v3", "decorated"])
def test_a_mixed_library(mixed: Mixed, setup: str) -> None:
    """Exactly what is broken is deleted and searched for; then nothing is left to do."""
    world = mixed
    plain: Dict[str, Any] = {"version": SONARR_3 if setup == "v3" else SONARR_4}
    movies: Dict[str, Any] = {}
    if setup == "v3":
        plain["auto_unmonitor"] = True
    if setup == "decorated":
        plain.update(DECORATED, url_base="/sonarr", server_root="/tv")
        movies.update(DECORATED, url_base="/radarr", server_root="/movies")
    world.sections["repair"]["unmonitored"] = "no" if setup == "v4" else "yes"
    world.build(world.sonarr(**plain), world.radarr("hd", **movies), world.radarr("4k", **movies))
    flags = {server: server.monitored() for server in world.servers.values()}
    world.do("scan")
    assert world.do("ingest")["exit_code"] == 0
    world.forget_requests()
    world.do("queue")
    assert world.changes() == []
    result = world.do("dispatch", *FAST)
    assert result["failed"] == result["retry"] == 0 and result["exit_code"] == 0

    for server, files in world.files.items():
        assert sorted(server.deleted_files) == sorted(files)
        assert searched(server) == world.wanted[server]
        assert server.monitored() == flags[server]
        posts = [r.body for r in server.changes() if r.method == "POST"]
        seasons = [body for body in posts if body["name"] == "SeasonSearch"]
        assert seasons == ([world.gone] if server is world.tv else [])
    # One command a series, with the season's own beside it; movies are series of one.
    series = {world.tv.episodes[unit]["seriesId"] for unit in world.wanted[world.tv]}
    assert len(world.tv.searches) == len(series)

    if setup != "v3":
        world.forget_requests()
        assert world.do("queue")["queued"] == []
        again = world.do("dispatch", *FAST)
        assert world.changes() == [] and again["sent"] == 0

    if setup == "v4":
        return
    for server in world.servers.values():
        server.tick()
        assert server.failed_imports == []
    assert all(link.exists() for link in world.broken)
    world.do("scan")
    assert world.statuses() == {"repaired": sum(map(len, world.files.values()))}


def test_nothing_is_sent_without_apply(world: World) -> None:
    sonarr, radarr = world.sonarr(auto_unmonitor=True), world.radarr(recycle_bin=True)
    relay = world.add_relay(f"{world.media}/doc => sonarr_doc")
    world.season(sonarr, sonarr.add_series("Show"), 1, 3, broken=[2])
    world.movie(radarr, "Film")
    world.link(world.media / "doc" / "Doc" / "Season 1" / "Doc S01E01.mkv", broken=True)
    world.do("scan")
    assert len(world.do("queue", "-n")["queued"]) == 3
    assert world.statuses() == {}
    assert len(world.do("queue")["queued"]) == 3
    before = world.refresherr.query("SELECT * FROM actions")
    ways: List[Tuple[Sequence[str], Dict[str, str]]] = [
        ((), {}),
        (("-n", "--apply"), {"REFRESHERR_APPLY": "1"}),
        ((), {"DRYRUN": "true"}),
    ]
    for number, (options, env) in enumerate(ways):
        world.sections["refresherr"] = {"apply": "yes" if number else "no"}
        result = world.do("dispatch", *options, **env)
        assert result["applied"] is False and result["exit_code"] == 0
        assert [item["status"] for item in result["actions"]] == ["would send"] * 3
    assert world.changes() == [] and relay.finds == []
    assert world.refresherr.query("SELECT * FROM actions") == before
    assert all(os.path.lexists(str(link)) for link in world.broken)
    assert world.do("dispatch", "--no-wait")["sent"] == 3  # apply = yes
    assert len(relay.finds) == 1 and len(radarr.deleted_files) == 1


# Interruptions


def test_answers_that_are_lost_and_servers_that_refuse(world: World) -> None:
    """Each server of many has a trouble of its own; the next runs finish what was begun."""
    names = ["delete", "put", "post", "nothing", "conflict", "bin", "busy", "down", "bad", "late"]
    servers = {name: world.radarr(name, auto_unmonitor=True) for name in names}
    movies = {
        name: [world.movie(server, f"{name.title()} {number}") for number in (1, 2)]
        for name, server in servers.items()
    }
    world.bystanders(25)
    assert len(world.scan_and_queue()) == 20
    for name, method in (("delete", "DELETE"), ("put", "PUT"), ("post", "POST")):
        servers[name].script(method=method, before_effect=False)
    servers["nothing"].script(method="POST", kind="close")
    servers["conflict"].script(method="DELETE", status=409, body=b'{"message":"root is empty"}')
    servers["bin"].recycle_bin = True
    servers["busy"].script(method="DELETE", status=429, headers={"Retry-After": "7200"})
    servers["bad"].script(method="DELETE", status=400, body=b'{"message":"no"}')
    servers["late"].script(method="DELETE", status=503, headers={"Retry-After": "5"})
    servers["down"].close()
    began = time.time()
    result = world.do("dispatch", *FAST)
    assert result["exit_code"] == 3

    found = {
        name: sorted(item["status"] for item in result["actions"] if f"_{name}/" in item["url"])
        for name in names
    }
    assert found == {
        "delete": ["sent", "sent"],
        "put": ["pending", "retry"],
        "post": ["pending", "retry"],
        "nothing": ["pending", "retry"],
        "conflict": ["pending", "pending"],
        "bin": ["sent", "sent"],
        "busy": ["retry", "sent"],
        "down": ["pending", "retry"],
        "bad": ["failed", "sent"],
        "late": ["retry", "sent"],
    } or found == {**found, "post": ["retry", "sent"], "nothing": ["retry", "sent"]}
    assert servers["conflict"].deleted_files == []  # no moment to delete anything more
    assert len([r for r in servers["conflict"].requests if r.method == "DELETE"]) == 1
    rows = world.refresherr.query(
        "SELECT url, attempts, next_attempt_utc FROM actions WHERE next_attempt_utc IS NOT NULL"
    )
    waits = {url.partition("?")[0][13:-7]: (n, seconds_after(began, t)) for url, n, t in rows}
    assert {name: tries for name, (tries, _) in waits.items()} == dict.fromkeys(waits, 1)
    assert 7198 < waits["busy"][1] < 7290 and 58 < waits["late"][1] < 150  # never below a minute
    searches = len(servers["post"].searches)

    servers["down"].open()
    result = world.do("dispatch", *FAST)  # what was to be tried later is not tried now
    assert servers["late"].files and servers["busy"].files
    world.make_due()
    assert world.do("dispatch", *FAST)["failed"] == 0
    assert world.statuses() == {"sent": 19, "failed": 1}
    for name, server in servers.items():
        assert len(server.deleted_files) == (1 if name == "bad" else 2)
        assert set(searched(server)) == set(movies[name]) - ({31} if name == "bad" else set())
        assert all(server.monitored().values()), name
    # What a lost answer hid is looked for, not sent again.
    assert len(servers["post"].searches) <= searches + 1
    assert sorted(searched(servers["post"])) == movies["post"]


def seconds_after(moment: float, text: str) -> float:
    return datetime.fromisoformat(text).timestamp() - moment


def test_five_tries_and_a_retry_by_hand(world: World) -> None:
    sonarr = world.sonarr(auto_unmonitor=True)
    series = sonarr.add_series("Show")
    file = world.episode(sonarr, series, (1, 1), broken=True)
    world.episode(sonarr, series, (1, 2))
    world.scan_and_queue()
    sonarr.script(method="DELETE", status=500, times=None)
    waits = []
    for tries in (1, 4, 5):
        world.alter("UPDATE actions SET attempts = ?, next_attempt_utc = NULL", tries - 1)
        began = time.time()
        result = world.do("dispatch", *FAST)
        row = world.refresherr.query("SELECT attempts, next_attempt_utc FROM actions")[0]
        if tries < 5:
            assert result["retry"] == 1 and row[0] == tries
            waits.append(round(seconds_after(began, row[1]) / 60))
    assert result["failed"] == 1 and world.statuses() == {"failed": 1}
    assert waits == [1, 8]
    assert sonarr.deleted_files == [] and sonarr.searches == []
    link = world.do("broken", "--status", "broken")["links"][0]
    assert "needs attention" in link["next"] or world.do("queue")["skipped"]["cooldown"] == 1

    sonarr.scripts.clear()
    assert [row["status"] for row in world.do("actions", "retry", 1)["actions"]] == ["pending"]
    sonarr.command_polls = 1
    result = world.do("dispatch", "--apply")  # and follow the command to its end
    assert [command["status"] for command in result["actions"][0]["commands"]] == ["completed"]
    assert world.statuses() == {"sent": 1}  # which is no repair yet
    assert sonarr.deleted_files == [file] and all(sonarr.monitored().values())
    assert searched(sonarr) == [sonarr.episode_id(series, 1, 1)]


def test_one_search_of_a_series_fails(world: World) -> None:
    """What the other search was for is sent, and stays so."""
    sonarr = world.sonarr()
    series = sonarr.add_series("Show")
    world.season(sonarr, series, 1, 2, broken=[1, 2])
    world.season(sonarr, series, 2, 2, broken=[1])
    world.scan_and_queue()
    sonarr.script(method="POST", status=400, skip=1)
    result = world.do("dispatch", *FAST)
    assert (result["sent"], result["failed"]) in ((2, 1), (1, 2))
    assert [len(sonarr.searches), len(sonarr.deleted_files)] == [1, 3]
    done = 2 if sonarr.searches[0]["name"] == "SeasonSearch" else 1
    assert world.statuses() == {"sent": done, "failed": 3 - done}


def test_an_older_search_is_not_taken_for_ours(world: World) -> None:
    """It came before the deletion and could find nothing; ours was never received."""
    radarr = world.radarr()
    movie = world.movie(radarr, "Film")
    radarr.push("MoviesSearch", {"movieIds": [movie]})
    radarr.tick()
    assert radarr.queue == {}
    world.scan_and_queue()
    radarr.script(method="POST", kind="close")
    world.do("dispatch", *FAST)
    world.make_due()
    world.do("dispatch", *FAST)
    assert radarr.deleted_files and searched(radarr) == [movie]


def test_a_server_that_stumbles_while_it_is_asked_after_a_repair(world: World) -> None:
    """That is no failure of the repair, however often it happens."""
    radarr = world.radarr()
    world.movie(radarr, "Film")
    world.scan_and_queue()
    assert world.do("dispatch", *FAST)["sent"] == 1
    radarr.script(method="GET", path_regex=r"movie/\d+", status=500, times=None)
    for attempts in (0, 4):  # however many tries it took to send it
        world.alter("UPDATE actions SET attempts = ?, next_attempt_utc = NULL", attempts)
        world.do("dispatch", *FAST)
        assert world.statuses() == {"sent": 1}
    radarr.scripts.clear()
    radarr.tick()
    world.make_due()
    assert world.do("dispatch", *FAST)["repaired"] == 1


# What comes of a search


def test_what_comes_of_a_search(world: World) -> None:
    world.sections["repair"]["max_attempts"] = "2"
    names = ["renamed", "nothing", "again", "file", "spoilt"]
    servers = {name: world.radarr(name) for name in names}
    for name, server in servers.items():
        world.movie(server, name.title())
    links = {link.parent.parent.name: link for link in world.broken}
    tv = world.sonarr("tv")
    series = tv.add_series("Double")
    world.episode(tv, series, (1, 1), (1, 2), broken=True)
    world.bystanders(12)
    assert len(world.scan_and_queue()) == 6
    assert world.do("dispatch", *FAST)["sent"] == 6

    def statuses() -> Dict[str, str]:
        return {name: world.status_of(link) for name, link in links.items()}

    # Before anything came of it: nothing is repaired, and nothing sent again.
    world.do("dispatch", *FAST)
    assert set(statuses().values()) == {"sent"}
    servers["renamed"].renamed = True
    for name in ("nothing", "again"):
        servers[name].finds_nothing = True
    for radarr in servers.values():
        radarr.tick()
    tv.tick()
    links["file"].unlink()
    links["file"].write_bytes(b"not every server makes links")
    target_of(links["spoilt"]).unlink()
    world.do("dispatch", *FAST)
    assert statuses() == {
        "renamed": "repaired",
        "file": "repaired",
        "nothing": "sent",
        "again": "sent",
        "spoilt": "failed",
    }
    assert world.status_of(tv.link_of(501)) == "repaired"
    world.do("scan")
    assert world.do("queue")["queued"] == []  # the spoilt one has its cooldown

    # After the cooldown the search is sent again; the record that is gone is not deleted again.
    world.pass_hours(7)
    servers["again"].finds_nothing = False
    world.forget_requests()
    assert world.do("dispatch", *FAST)["sent"] == 2
    assert sorted(world.changes()) == [("POST", "/api/v3/command")] * 2
    servers["again"].tick()
    assert [action["url"] for action in world.do("queue")["queued"]] == [
        f"arr://radarr_spoilt/repair?path={servers['spoilt'].server_root}"
        "/Spoilt%20%282021%29/Spoilt%20%282021%29.mkv"
    ]
    world.pass_hours(7)
    result = world.do("dispatch", *FAST)
    assert (result["repaired"], result["failed"], result["sent"]) == (1, 1, 1)
    assert statuses() == {**dict.fromkeys(links, "repaired"), "nothing": "failed", "spoilt": "sent"}
    assert len(servers["nothing"].searches) == 2 and len(servers["spoilt"].deleted_files) == 2
    world.do("scan")
    missing = world.do("broken", "--status", "missing")["links"]
    attention = {link["path"] for link in missing if "needs attention" in link["next"]}
    assert attention == {str(links["nothing"])}
    repairs = world.do("stats")["repairs"]
    assert repairs["needs_attention"] == 1 and repairs["waiting"] == 1
    assert repairs["instances"]["radarr_nothing"]["needs_attention"] == 1
    assert repairs["repaired"] == 4
    failed = world.do("actions", "list", "--status", "failed")["actions"]
    assert {row["related_path"] for row in failed} == {str(links[n]) for n in ("nothing", "spoilt")}


def test_a_healed_link_starts_anew(world: World) -> None:
    world.sections["repair"]["max_attempts"] = "1"
    radarr = world.radarr()
    world.movie(radarr, "Film")
    link = next(iter(world.broken))
    assert len(world.scan_and_queue()) == 1
    assert world.do("dispatch", *FAST)["sent"] == 1
    radarr.tick()
    world.do("scan")
    assert world.status_of(link) == "repaired" and link.exists()
    world.spoil(link)
    world.pass_hours(7)
    assert len(world.scan_and_queue()) == 1


def test_another_new_file_beside_it_is_no_repair(world: World) -> None:
    """Names that tell no episode do not tell that two are the same one."""
    sonarr, radarr = world.sonarr(), world.radarr()
    world.movie(radarr, "Film")
    link = next(iter(world.broken))
    beside = {link: [link.with_name(f"Film (2021).{lang}.srt") for lang in ("en", "de")]}
    for title, names in (
        ("Daily", [f"Daily - 2020-03-0{day}.mkv" for day in (1, 2, 3)]),
        ("Absolute", [f"Absolute - 100{number}.mkv" for number in (1, 2, 3)]),
    ):
        file = sonarr.add_file(sonarr.add_series(title), f"Season 20/{names[0]}", [(20, 1)])
        link = world.put(sonarr, file, broken=True)
        beside[link] = [link.with_name(name) for name in names[1:]]
    world.do("scan")
    target = world.cloud / "new file"
    target.touch()
    for when in ("before it is queued", "after it was sent"):
        world.pass_hours(1)
        for link in beside:
            beside[link].pop().symlink_to(target)
        world.do("scan")
        if when == "before it is queued":
            queued = {action["related_path"] for action in world.do("queue")["queued"]}
            assert {link.name for link in beside if str(link) not in queued} == set()
            world.do("dispatch", *FAST)
    assert {link.name for link in beside if world.status_of(link) != "sent"} == set()


# Killed at any moment


def test_killed_at_any_moment(world: World) -> None:
    """20 SIGKILLs in the middle of the conversation; one more run finishes all of it."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    options: Dict[str, Any] = {"auto_unmonitor": True, "latency": 0.006}
    sonarr, radarr = world.sonarr(**options), world.radarr(recycle_bin=True, **options)
    files: Dict[FakeArr, List[int]] = {sonarr: [], radarr: []}
    series = [sonarr.add_series(title) for title in ("Part", "Whole")]
    files[sonarr] += world.season(sonarr, series[0], 1, 5, broken=[1, 2, 4])
    files[sonarr].append(world.episode(sonarr, series[0], (2, 1), (2, 2), broken=True))
    files[sonarr] += world.season(sonarr, series[1], 1, 3, broken=[1, 2, 3])
    world.season(sonarr, series[1], 2, 2)
    for number in range(5):
        movie = world.movie(radarr, f"Film {number}", broken=number < 4, monitored=number != 1)
        files[radarr] += [radarr.movies[movie]["movieFileId"]] if number < 4 else []
    wanted = {server: units_of(server, found) for server, found in files.items()}
    flags = {server: server.monitored() for server in files}
    world.bystanders(12)
    assert len(world.scan_and_queue()) == 11
    world.configure()

    def count() -> int:
        return sum(len(server.changes()) for server in files)

    halfway = 0
    for _ in range(20):
        process = world.refresherr.start("dispatch", *FAST)
        end = count() + dice.randint(1, 2)
        while count() < end and process.poll() is None:
            time.sleep(0.003)
        time.sleep(dice.uniform(0, 0.05))
        halfway += process.poll() is None
        process.kill()
        world.outputs += process.communicate()
        world.make_due()
    done = sum(len(server.deleted_files) for server in files)
    print(f"{halfway} killed at work, {done} of 11 were deleted by then")
    assert world.do("dispatch", *FAST)["exit_code"] == 0

    assert world.statuses() == {"sent": 11}
    for server, found in files.items():
        assert sorted(server.deleted_files) == sorted(found)
        searches = searched(server)
        assert sorted(set(searches)) == wanted[server]
        assert max(map(searches.count, searches)) <= 2, searches
        assert server.monitored() == flags[server]
        server.peak = 0  # a killed run's request and the next run's may meet
    assert not any(os.path.lexists(str(link)) for link in world.broken)


# Queue


def test_what_is_queued_and_why_not(world: World) -> None:
    radarr = world.radarr("m\u0101ksla")
    del world.servers["radarr_m\u0101ksla"], world.sections["radarr m\u0101ksla"]
    radarr = world.radarr("films", server_root="/data/film s")
    world.add_relay(f"{world.media}/doc => sonarr_doc", userinfo="user:pass-w0rd")
    world.secrets.append("pass-w0rd")
    base = f"http://user:pass-w0rd@127.0.0.1:{world.relay.port}" if world.relay else ""
    world.sections["relay"]["base"] = base
    for title in ("One & 50%?", "Two # +", "T\xeate \U0001f600"):
        world.movie(radarr, title)
    world.movie(radarr, "Good", broken=False)
    for name in ("Fine/Season 1/Fine S01E01", "Thin/Season 1/Thin S01E01", "Thin/Season 2/S02E07"):
        world.link(world.media / "doc" / f"{name}.mkv", broken=True)
    for number in (3, 4):
        folder = world.media / "doc" / "Thick & Co (2019)" / "Season 02"
        world.link(folder / f"Thick S02E0{number}.mkv", broken=True)
    world.link(world.media / "doc" / "Pair" / "Pair S03E01-E02.mkv", broken=True)
    world.link(world.media / "doc" / "Daily" / "Daily 2020-01-02.mkv", broken=True)
    world.link(world.media / "nobody" / "Nobody (2000)" / "file.mkv", broken=True)
    world.bystanders(12)
    world.sections["repair"].update(season_threshold="3", min_age="1h")
    world.do("scan")
    assert world.do("queue", "-n")["skipped"]["too_recent"] > 5
    world.sections["repair"]["min_age"] = "0"
    world.sections["repair"]["season_threshold"] = "2"
    result = world.do("queue", "--limit", "4")
    assert len(result["queued"]) == 4 and result["skipped"]["no_route"] == 2
    result = world.do("queue")
    assert len(result["queued"]) + 4 == 8 and world.do("queue")["queued"] == []
    assert {"already_queued", "too_recent", "cooldown", "exhausted", "no_route", "recovered",
            "unreachable"} <= set(result["skipped"])  # fmt: skip
    assert result["skipped"]["already_queued"] == 5  # links, two of them of one season
    assert set(result["queued"][0]) >= {"id", "url", "related_path", "reason"}
    urls = [row[0] for row in world.refresherr.query("SELECT url FROM actions")]
    host = world.relay.url.replace("user:pass-w0rd@", "") if world.relay else ""
    assert sorted(urls) == sorted(
        [
            f"{host}/find?type=sonarr_doc&scope=auto&term=Fine+S01E01",
            f"{host}/find?type=sonarr_doc&scope=auto&term=Thin+S01E01",
            f"{host}/find?type=sonarr_doc&scope=auto&term=Thin+S02E07",
            f"{host}/find?type=sonarr_doc&scope=season&term=Thick+%26+Co+%282019%29+S02",
            f"{host}/find?type=sonarr_doc&scope=season&term=Pair+S03",
            *(
                f"arr://radarr_films/repair?path=/data/film%20s/{name}%20%282021%29/{name}"
                "%20%282021%29.mkv"
                for name in ("One%20%26%2050%25%3F", "Two%20%23%20%2B", "T%C3%AAte%20%F0%9F%98%80")
            ),
        ]
    )
    # Rows of before do not multiply.
    assert world.do("dispatch", *FAST)["sent"] == 8
    result = world.do("queue")
    assert result["queued"] == [] and result["exit_code"] == 0
    assert result["skipped"]["cooldown"] == 6 and result["skipped"]["already_queued"] == 3
    assert len(radarr.deleted_files) == 3


def test_what_recovers_before_it_is_queued(world: World) -> None:
    radarr = world.radarr()
    world.movie(radarr, "Film")
    world.movie(radarr, "Gone")
    links = sorted(world.broken)
    world.do("scan")
    world.heal(links[0])
    links[1].unlink()
    result = world.do("queue")
    assert result["queued"] == [] and result["skipped"]["recovered"] == 2
    assert world.statuses() == {} and world.changes() == []


def test_the_longest_root_owns_what_no_server_has_told_of(world: World) -> None:
    outer, inner = world.radarr("movies"), world.radarr("movies/inner")
    world.sections["radarr inner"] = world.sections.pop("radarr movies/inner")
    world.servers["radarr_inner"] = world.servers.pop("radarr_movies/inner")
    world.movie(outer, "Outer")
    world.movie(inner, "Inner")
    world.link(outer.root / "inner 2" / "Beside (2001)" / "file.mkv", broken=True)
    urls = [action["url"].split("/")[2] for action in world.scan_and_queue()]
    assert sorted(urls) == ["radarr_inner", "radarr_movies", "radarr_movies"]
    result = world.do("dispatch", *FAST)
    assert (result["sent"], result["failed"], result["exit_code"]) == (2, 1, 3)


def test_rows_of_the_container_edition(world: World) -> None:
    """Duplicates, integer times, no link, a token in the URL: kept, and sent once."""
    relay = world.add_relay(f"{world.media}/doc => sonarr_doc")
    show = world.media / "doc" / "Show" / "Season 1"
    links = [world.link(show / f"Show S01E0{number}.mkv", broken=True) for number in (1, 2)]
    mended = world.link(show / "Show S01E03.mkv")
    world.do("scan")
    old = f"{relay.find_url}?type=sonarr_doc&scope={{}}&term={{}}&token={TOKEN}"
    rows = [
        (old.format("auto", "Show+S01E01"), "pending", str(links[0]), "1700000000", None),
        (old.format("auto", "Show+S01E01"), "pending", str(links[0]), "1700000050", None),
        (old.format("season", "Show+S01"), "pending", "Show::S01", 1700000100, None),
        (old.format("auto", "Show+S01E03"), "pending", str(mended), 1700000200, None),
        (old.format("auto", "Show+S01E02"), "sent", str(links[1]), "1690000000", 1690000001),
        (old.format("auto", "Show+S01E02"), "failed", str(links[1]), 1680000000, "1680000001"),
        (old.format("auto", "By+hand+S09E09"), "pending", None, None, None),
    ]
    world.secrets.remove(TOKEN)  # it stands there until the program upgrades the file
    conn = sqlite3.connect(str(world.refresherr.db_path))
    with conn:
        for table, column in (
            ("actions", "attempts"), ("actions", "next_attempt_utc"), ("actions", "progress"),
        ):  # fmt: skip
            conn.execute(f"ALTER TABLE {table} DROP COLUMN {column}") if (
                sqlite3.sqlite_version_info >= (3, 35)
            ) else None
        conn.execute("DELETE FROM schema_version WHERE version >= 3")
        conn.executemany(
            "INSERT INTO actions (url, status, related_path, created_utc, fired_utc) "
            "VALUES (?, ?, ?, ?, ?)",
            rows,
        )
    conn.close()
    world.do("stats")
    for backup in world.refresherr.data_dir.glob("*.bak"):
        backup.unlink()
    world.secrets.append(TOKEN)
    assert world.do("actions")["count"] == 7
    assert [a["related_path"] for a in world.do("queue")["queued"]] == [str(links[1])]
    result = world.do("dispatch", *FAST)
    terms = [find["term"] for find in relay.finds]
    assert sorted(set(terms) - {"Show S01"}) == ["By hand S09E09", "Show S01E01", "Show S01E02"]
    assert len(set(terms)) == len(terms), "the relay was asked the same thing twice"
    assert world.status_of(mended) == "cancelled"
    assert result["failed"] == 0
    statuses = [row[0] for row in world.refresherr.query("SELECT status FROM actions ORDER BY id")]
    assert statuses[0] == "sent" and statuses[4:6] == ["sent", "failed"]
    assert "pending" not in statuses


# The relay


def test_what_the_relay_answers(world: World) -> None:
    relay = world.add_relay(f"{world.media}/doc => radarr_doc")
    answers = ["ok", "plain", "empty", "no matches", "400", "404", "409", "502", "echo", "429"]
    for answer in answers:
        title = f"{answer.title()} 'n\" \xe9 & (2021)"
        world.link(world.media / "doc" / title / "file.mkv", broken=True)
        relay.modes[title] = answer
    relay.modes = {title: mode for title, mode in relay.modes.items() if mode in relay.answers}

    def about(word: str) -> Callable[[Any], bool]:
        return lambda request: request.query.get("term", [""])[0].startswith(word)

    told = f'{{"ok": false, "detail": "cannot GET http://x/?token={TOKEN} with {TOKEN}"}}'
    relay.script(where=about("Echo"), status=200, body=told.encode(), times=None)
    relay.script(where=about("429"), status=429, headers={"Retry-After": "7200"}, times=None)
    world.bystanders(12)
    assert len(world.scan_and_queue()) == len(answers)
    began = time.time()
    result = world.do("dispatch", *FAST)
    assert result["exit_code"] == 3
    found = {item["related_path"].split("/")[-2].split()[0]: item for item in result["actions"]}
    assert {name: item["status"] for name, item in found.items()} == {
        **dict.fromkeys(("Ok", "Plain", "Empty"), "sent"),
        **dict.fromkeys(("No", "400", "404", "409", "Echo"), "failed"),
        **dict.fromkeys(("502", "429"), "retry"),
    }
    assert "no matches" in found["No"]["error"] and "not in the library" in found["409"]["error"]
    assert len(world.relay_requests()) == len(answers)
    waits = world.refresherr.query(
        "SELECT next_attempt_utc FROM actions WHERE next_attempt_utc IS NOT NULL ORDER BY 1"
    )
    assert seconds_after(began, waits[0][0]) < 150 and seconds_after(began, waits[1][0]) > 7190
    world.forget_requests()
    assert world.do("dispatch", *FAST)["actions"] == []
    assert all(request.query == {} for request in relay.requests)  # nothing but whether it is up
    assert TOKEN not in str(world.refresherr.query("SELECT url, last_error FROM actions"))


def test_a_relay_that_cannot_be_used(world: World) -> None:
    relay = world.add_relay(f"{world.media}/doc => radarr_doc", prefix="/base")
    world.sections["relay"]["base"] = relay.find_url  # as good as the one without /find
    stranger = world.stack.enter_context(FakeServer())
    for title in ("One (2001)", "Two (2002)"):
        world.link(world.media / "doc" / title / "file.mkv", broken=True)
    assert len(world.scan_and_queue()) == 2

    def fails() -> Dict[str, int]:
        world.alter("UPDATE actions SET status = 'pending', attempts = 0, next_attempt_utc = NULL")
        world.forget_requests()
        result = world.do("dispatch", *FAST)
        assert result["exit_code"] == 1 and result.get("sent") == 0, result
        return world.statuses()

    relay.close()
    assert fails() == {"pending": 2}
    assert [row[0] for row in world.refresherr.query("SELECT attempts FROM actions")] == [0, 0]
    relay.open()
    relay.token = "something else"
    assert fails() == {"pending": 2} and [r.query != {} for r in relay.requests] == [False, True]
    relay.token = TOKEN
    redirect = {"Location": f"{stranger.url}/find"}
    script = relay.script(status=307, headers=redirect, times=None)
    fails()
    relay.scripts.remove(script)
    # What was queued for one address is not sent, with the token, to another.
    world.sections["relay"]["base"] = stranger.url
    assert fails() == {"pending": 2} and stranger.requests == []
    world.sections["relay"]["base"] = relay.url
    relay.finds.clear()
    assert world.do("dispatch", *FAST)["sent"] == 2 and len(relay.finds) == 2


# actions


def test_actions_are_listed_cancelled_and_retried(world: World) -> None:
    radarr = world.radarr()
    movies = [world.movie(radarr, title) for title in ("One", "Two", "Three")]
    world.scan_and_queue()
    listed = world.do("actions", "list")
    assert listed["count"] == 3 and {row["status"] for row in listed["actions"]} == {"pending"}
    assert world.call("actions", "cancel").code == 2  # which ones?
    assert world.do("actions", "cancel", 1)["actions"][0]["status"] == "cancelled"
    radarr.script(method="DELETE", status=400)
    result = world.do("dispatch", *FAST)
    assert (result["sent"], result["failed"]) == (1, 1)
    assert len(radarr.deleted_files) == 1
    assert world.do("actions", "retry", "--failed", "-n")["count"] == 1
    assert world.statuses() == {"cancelled": 1, "failed": 1, "sent": 1}
    failed = world.do("actions", "list", "--status", "failed")["actions"][0]["id"]
    assert world.do("actions", "retry", 1, failed)["count"] == 2
    assert world.statuses() == {"pending": 2, "sent": 1}
    assert world.do("dispatch", *FAST)["sent"] == 2
    assert searched(radarr) == movies and len(radarr.deleted_files) == 3
    assert world.call("actions", "retry", 1, 2, 99).code == 3  # what is sent stays sent
    assert world.statuses() == {"sent": 3}
    assert "One (2021)" in world.call("actions").out


def test_a_broken_link_does_not_speak_for_a_healthy_one(
    refresherr: Refresherr, write_config: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two of our directories are one to the server, and both links wait for its one file."""
    first, second = tmp_path / "media" / "tv", tmp_path / "media" / "tv2"
    with FakeSonarr(first, server_root="/tv") as sonarr:
        file = sonarr.add_file(sonarr.add_series("Show", 2020), "S01/Show S01E01.mkv", [(1, 1)])
        healed = sonarr.link_of(file)
        links = [healed, second / healed.relative_to(first)]
        for number, link in enumerate(links):
            link.parent.mkdir(parents=True)
            (tmp_path / "files" / str(number)).mkdir(parents=True)
            (tmp_path / "files" / str(number) / "other").touch()
            link.symlink_to(tmp_path / "files" / str(number) / "video.mkv")
        (first / "witness.mkv").symlink_to(tmp_path / "files" / "0" / "other")
        write_config(
            f"[scan]\nroots = {first.parent}\n[repair]\nmin_age = 0\npatience = 0\n[sonarr tv]\n"
            f"url = {sonarr.url}\napi_key = {sonarr.api_key}\n"
            f"path_map =\n    {first} => /tv\n    {second} => /tv\n"
        )
        assert refresherr("scan").code == refresherr("ingest").code == refresherr("queue").code == 0
        (tmp_path / "files" / "0" / "video.mkv").touch()
        refresherr("dispatch", "--apply", "--no-wait")
        assert sonarr.changes() == []
        assert healed.exists()


def test_relative_links_are_looked_at_again_like_all_others(
    refresherr: Refresherr, write_config: Callable[[str], Path], tmp_path: Path
) -> None:
    """One emptied torrent folder among living ones is breakage at the second look as well."""
    for number in range(20):
        target = tmp_path / "mount" / f"torrent {number}" / "video.mkv"
        target.parent.mkdir(parents=True)
        target.touch()
        link = tmp_path / "media" / f"Film {number} (2001)" / "film.mkv"
        link.parent.mkdir(parents=True)
        link.symlink_to(os.path.relpath(target, link.parent))
    write_config(
        f"[scan]\nroots = {tmp_path / 'media'}\n[repair]\nmin_age = 0\npatience = 0\n"
        f"[relay]\nbase = http://127.0.0.1:1\nroutes = {tmp_path / 'media'} => radarr_x\n"
    )
    assert refresherr("scan").code == 0
    target.unlink()
    assert refresherr.scan()["totals"]["broken"] == 1
    queue = refresherr("queue", "--json")
    assert (queue.code, len(queue.json["queued"])) == (0, 1)
