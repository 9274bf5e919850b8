"""`run --apply` while a part of the mount is away: no healthy record or link is harmed.

Patience is switched off here, so that nothing but the verdict protects the library; and for each
film CineSync has a copy that a wrong verdict would take.
"""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from conftest import Refresherr, target_of
from fake_servers import FakeRadarr, FakeSonarr
from fuse_fs import FuseMount, fuse_available
from mounted_library import mergerfs, mergerfs_available
from test_repair import World, searched

FILMS, SHOWS, EPISODES = 40, 8, 3


class Cloudy(World):
    """A world whose releases lie on a FUSE mount or on a mergerfs of a disk and such a mount."""

    section = "library"  # the directory of the mount in which new releases are put

    def __init__(
        self, folder: Path, refresherr: Refresherr, write_config: Callable[[str], Path]
    ) -> None:
        super().__init__(folder, refresherr, write_config)
        self.base = folder / "CineSync"
        (self.base / "Movies").mkdir(parents=True)
        self.sections["scan"]["max_new_broken"] = "20%"
        self.sections["repair"].update(patience="0", limit="200")
        self.sections["cinesync"] = {
            "base": str(self.base),
            "roots": str(self.media),
            "allowed_targets": str(self.cloud),
        }
        self.backend = self.cloud
        self.films: List[Path] = []
        self.episodes: List[Path] = []

    def link(self, path: Path, broken: bool = False) -> Path:
        whole, self.cloud = self.cloud, self.cloud / self.section
        self.cloud.mkdir(exist_ok=True)
        try:
            return super().link(path, broken)
        finally:
            self.cloud = whole

    def fill(self, films: int = FILMS, shows: int = SHOWS) -> None:
        """Make films with a copy each in CineSync's tree, and shows without."""
        self.movies: FakeRadarr = self.radarr()
        self.tv: FakeSonarr = self.sonarr()
        for number in range(films):
            self.add_film(f"Film {number:03d}")
        for number in range(shows):
            self.add_show(f"Show {number:03d}")

    def add_film(self, title: str, copy: bool = True) -> Path:
        movie = self.movie(self.movies, title, broken=False)
        self.films.append(self.movies.link_of(self.movies.movies[movie]["movieFileId"]))
        if copy:
            file = self.cloud / "copies" / f"{title.replace(' ', '.')}.2021.1080p" / "film.mkv"
            file.parent.mkdir(parents=True)
            file.write_bytes(b"copy")
            folder = self.base / "Movies" / f"{title} (2021)"
            folder.mkdir()
            (folder / f"{title} (2021) 1080p.mkv").symlink_to(file)
        return self.films[-1]

    def add_show(self, title: str) -> None:
        series = self.tv.add_series(title)
        for number in range(1, EPISODES + 1):
            file = self.episode(self.tv, series, (1, number))
            self.episodes.append(self.tv.link_of(file))

    # Its mounts

    def mount(self) -> FuseMount:
        """Have the same files be seen through FUSE from now on."""
        reason = fuse_available()
        if reason:
            pytest.skip(reason)
        self.backend = self.folder / "backend"
        self.backend.mkdir()
        subprocess.check_call(["mount", "--bind", str(self.cloud), str(self.backend)])
        self.stack.callback(subprocess.call, ["umount", "--lazy", str(self.backend)])
        return self.stack.enter_context(FuseMount(self.cloud, self.backend, timeout=0))

    def mount_union(self, moved: List[str]) -> FuseMount:
        """Have some of the releases lie on a mount that is one of two branches."""
        reason = mergerfs_available()
        if reason:
            pytest.skip(reason)
        self.backend = self.folder / "disk branch"
        self.cloud.rename(self.backend)
        source, branch = self.folder / "source", self.folder / "branches" / "remote"
        source.mkdir()
        branch.mkdir(parents=True)
        for name in moved:
            (self.backend / name).rename(source / name)
        fuse = self.stack.enter_context(FuseMount(branch, source, timeout=0))
        self.stack.enter_context(mergerfs(self.cloud, [self.backend, branch]))
        return fuse

    def release_of(self, link: Path) -> str:
        return str(target_of(link).parent.relative_to(self.cloud))

    def spoil(self, link: Path) -> None:
        (self.backend / target_of(link).relative_to(self.cloud)).unlink()
        self.healthy.pop(link, None)
        self.broken.add(link)

    # What must hold

    def run(self) -> Dict[str, Any]:
        result = self.do("run", "--no-wait", "--apply")
        self.assert_unharmed()
        return result

    def assert_unharmed(self) -> None:
        records = {
            server.link_of(number) for server in self.servers.values() for number in server.files
        }
        for link, target in self.healthy.items():
            assert link.is_symlink() and target_of(link) == target, f"{link} was replaced"
            assert link in records, f"the record of {link} was deleted"

    def assert_repaired(self, with_copy: Path, without: Path) -> None:
        """One was relinked to CineSync's copy; of the other the server searches a new file."""
        assert with_copy.exists() and "copies" in str(target_of(with_copy))
        assert not os.path.lexists(str(without)) and len(searched(self.movies)) >= 1


@pytest.fixture
def world(
    tmp_path: Path, refresherr: Refresherr, write_config: Callable[[str], Path]
) -> Iterator[Cloudy]:
    world = Cloudy(tmp_path, refresherr, write_config)
    with world.stack:
        yield world
        world.forget_requests()  # of ingest, which asks several things at once
        world.examine()


Begin = Callable[[FuseMount, List[str]], None]
BEGIN: Dict[str, Begin] = {
    "listed less": lambda fuse, names: fuse.hide(names),
    "ENOENT though listed": lambda fuse, names: fuse.fail_paths(dict.fromkeys(names, errno.ENOENT)),
    "404 for directories": lambda fuse, names: fuse.fail_beneath(
        dict.fromkeys(names, errno.ENOENT)
    ),
    "401 for directories": lambda fuse, names: fuse.fail_beneath(dict.fromkeys(names, errno.EIO)),
}


@pytest.mark.parametrize(
    ("how", "first", "part"),
    [
        ("listed less", False, 6),
        ("listed less", True, 6),
        ("listed less", True, 2),
        ("ENOENT though listed", False, 6),
        ("404 for directories", False, 6),
        ("404 for directories", True, 6),
        ("401 for directories", False, 6),
    ],
)
def test_a_part_of_the_directories_is_away(world: Cloudy, how: str, first: bool, part: int) -> None:
    """Every sixth or second of films and of shows; two true losses beside them."""
    world.fill(shows=24)
    lost, alone = world.films[1], world.add_film("Film Without A Copy", copy=False)
    fuse = world.mount()
    if not first:
        assert world.run()["exit_code"] == 0
    shows = [link for n, link in enumerate(world.episodes) if n // EPISODES % part == 0]
    away = world.films[part::part] + shows
    BEGIN[how](fuse, sorted({world.release_of(link) for link in away}))
    world.spoil(lost)
    world.spoil(alone)
    for _ in range(2):
        assert world.run()["exit_code"] in (3, 4)
    fuse.heal()
    world.run()
    world.assert_repaired(lost, alone)
    assert world.do("scan")["exit_code"] == 0


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("what", ["level", "provider"])
def test_a_directory_of_torrents_is_away(world: Cloudy, what: str, first: bool) -> None:
    """The mount loses a level of its layout: 9 of 9; or one of its two providers: 15 of 75."""
    if what == "level":
        world.fill(films=0, shows=3)
    else:
        world.fill(shows=5)
        world.section = "another"
        for number in range(20):
            world.add_film(f"Another {number:03d}")
    fuse = world.mount()
    if not first:
        assert world.run()["exit_code"] == 0
    if what == "level":
        for folder in list((world.backend / "library").iterdir()):
            folder.rename(world.backend / folder.name)
        (world.backend / "library").rmdir()
    else:
        fuse.hide(["library"])
    for _ in range(2):
        assert world.run()["exit_code"] == 4
    if what == "level":
        (world.backend / "library").mkdir()
        for folder in world.backend.glob("release *"):
            folder.rename(world.backend / "library" / folder.name)
    fuse.heal()
    assert world.run()["exit_code"] == 0
    assert world.do("scan")["totals"]["ok"] == len(world.healthy)


def test_a_volume_that_is_not_mapped_into_the_container(world: Cloudy) -> None:
    """8 links, the first run ever: the server owns them all and would delete them all."""
    world.fill(films=5, shows=1)
    world.cloud.rename(world.folder / "elsewhere")
    for _ in range(2):
        assert world.run()["exit_code"] == 4
    (world.folder / "elsewhere").rename(world.cloud)
    assert world.run()["exit_code"] == 0
    assert world.do("scan")["totals"]["ok"] == 8


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("check", [False, True])
def test_a_branch_is_killed_beneath_a_union(world: Cloudy, check: bool, first: bool) -> None:
    """15 of 106 links, of three titles only: nothing but the branch itself tells."""
    world.fill(films=90, shows=0)
    world.section = "remote"
    for title in ("Remote 1", "Remote 2"):
        series = world.tv.add_series(title)
        for number in range(1, 8):
            world.episode(world.tv, series, (1, number))
    lost, alone = world.films[1], world.add_film("Film Without A Copy", copy=False)
    world.section = "library"
    fuse = world.mount_union(["remote"])
    if check:
        world.sections["scan"]["mount_checks"] = fuse.mount_point
    if not first:
        assert world.run()["exit_code"] == 0
    fuse.kill()
    world.spoil(lost)
    for _ in range(2):
        assert world.run()["exit_code"] == 4
    fuse.close()
    fuse.mount()
    (world.folder / "source" / target_of(alone).relative_to(world.cloud)).unlink()
    world.healthy.pop(alone)
    world.broken.add(alone)
    world.run()
    world.assert_repaired(lost, alone)
    assert world.do("scan")["exit_code"] == 0


def test_what_a_repair_has_removed_is_expected_to_be_gone(world: Cloudy) -> None:
    """11 of 50 films are deleted by their server and not found again: no mass of vanished links."""
    world.fill(films=0, shows=0)
    for number in range(50):
        world.add_film(f"Film {number:03d}", copy=False)
    assert world.do("scan")["exit_code"] == 0
    for part in (world.films[:5], world.films[5:11]):  # neither is a mass
        for link in part:
            world.spoil(link)
        assert world.do("scan")["exit_code"] == 0
    world.do("ingest")
    assert len(world.do("queue")["queued"]) == 11
    assert world.do("dispatch", "--apply", "--no-wait")["sent"] == 11
    assert not any(os.path.lexists(str(link)) for link in world.films[:11])
    for _ in range(2):
        scan = world.do("scan")
        assert scan["exit_code"] == 0 and not scan["guard"]["tripped"]
    assert scan["totals"]["missing"] == 11 and scan["totals"]["ok"] == 39
    # What vanishes besides is weighed as ever.
    for link in world.films[11:35]:
        link.rename(world.folder / link.name)
    assert world.do("scan")["exit_code"] == 4
    for link in world.films[11:35]:
        (world.folder / link.name).rename(link)
    assert world.do("scan")["exit_code"] == 0
