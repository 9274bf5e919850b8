"""Outages of a part of a mount, and losses beside them: what is away is never called broken,
and what is lost is found, at once or when the outage is over, without a word from the user.

Every scan of `MountedLibrary.scan` asserts that no healthy link is called broken.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from conftest import Refresherr
from fuse_fs import tmpfs
from mounted_library import Cloud, MountedLibrary, mergerfs, mergerfs_available, states, strings

IMPATIENT = "[scan]\nstat_timeout = {}s\n"
WriteConfig = Callable[[str], Path]


@pytest.fixture
def library(tmp_path: Path, refresherr: Refresherr) -> Iterator[MountedLibrary]:
    made = MountedLibrary(tmp_path, refresherr)
    with made.stack:
        yield made


def name_below(cloud: Cloud, link: Path) -> str:
    """Return the torrent folder of a link's target, relative to the mount."""
    return str(Path(os.readlink(str(link))).parent.relative_to(cloud.point))


# A part of the mount is away

Outage = Callable[[Cloud, List[str]], None]
PARTIAL: Dict[str, Outage] = {
    "listed less": lambda cloud, names: cloud.hide(names),
    "ENOENT though listed": lambda cloud, names: cloud.fuse.fail_paths(
        dict.fromkeys(names, errno.ENOENT)
    ),
    "404 for directories": lambda cloud, names: cloud.fuse.fail_beneath(
        dict.fromkeys(names, errno.ENOENT)
    ),
    "401 for directories": lambda cloud, names: cloud.fuse.fail_beneath(
        dict.fromkeys(names, errno.EIO)
    ),
}
KINDS = [("tmpfs", "listed less"), *(("fuse", how) for how in PARTIAL)]


def end(cloud: Cloud) -> None:
    cloud.show()
    if cloud.backend != cloud.point:
        cloud.fuse.heal()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("kind", "how"), KINDS)
def test_fifteen_percent_of_the_directories_are_away(
    library: MountedLibrary, kind: str, how: str, first: bool
) -> None:
    """36 of 240 links, evenly over films and shows; three true losses beside them."""
    cloud = library.add_cloud(kind)
    films = library.films(cloud.point / "movies", 60)
    shows = library.shows(cloud.point / "shows", 60, 3)
    local, _ = library.local("lost on the disk", "good on the disk")
    library.lose([films[30]])
    if not first:
        library.settle()
        library.assert_over()
    away = films[:9] + shows[:27]
    PARTIAL[how](cloud, sorted({name_below(cloud, link) for link in away}))
    library.lose([local, films[31], shows[90]])
    for _ in range(2):
        scan = library.scan()
        # Those truly lost meanwhile cannot be told from those that are away.
        unreachable = library.having("unreachable")
        assert strings(away) <= unreachable <= strings(away) | library.lost - {str(local)}
        assert str(local) in library.having("broken")
        assert scan["exit_code"] in ((4,) if how == "listed less" else (3, 4))
    end(cloud)
    library.assert_over()


@pytest.mark.parametrize("kind", ["tmpfs", "fuse"])
def test_half_of_the_list_is_missing_in_the_first_scan_ever(
    library: MountedLibrary, kind: str
) -> None:
    cloud = library.add_cloud(kind)
    films = library.films(cloud.point / "movies", 40)
    shows = library.shows(cloud.point / "shows", 40, 3)
    away = films[::2] + [link for n, link in enumerate(shows) if n // 3 % 2]
    cloud.hide(sorted({name_below(cloud, link) for link in away}))
    local, _ = library.local("lost on the disk", "good on the disk")
    library.lose([local, films[1], shows[0]])
    for _ in range(2):
        scan = library.scan()
        library.assert_held_and(scan, [*away, films[1], shows[0]], broken=[local])
        assert scan["guard"]["tripped"]
    cloud.show()
    library.assert_over()


@pytest.mark.parametrize("neighbour", [False, True])
def test_a_volume_that_is_not_mapped(library: MountedLibrary, neighbour: bool) -> None:
    """8 links, the first scan ever; a good target beside the volume speaks for nothing in it."""
    volumes = library.folder / "volumes"
    volumes.mkdir()
    if neighbour:
        library.put("other/other.mkv", volumes / "local" / "other.mkv")
    titles = [f"Film {number}" for number in range(8)]
    links = [
        library.put(f"{title}/{title}.mkv", volumes / "remote/movies" / title / "f.mkv", False)
        for title in titles
    ]
    result = library.refresherr("scan", library.media)
    assert result.code == 4
    assert f"{volumes / 'remote'} does not exist here" in result.err
    assert "is the volume mapped into this container?" in result.err
    for _ in range(2):
        library.assert_held(library.scan(), links)
    library.add_cloud("tmpfs", "remote", "volumes")
    library.files.clear()
    library.bring_back(links[1:])
    library.lost.add(str(links[0]))
    library.assert_over()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shows", [1, 3])
@pytest.mark.parametrize("kind", ["tmpfs", "fuse"])
def test_a_mount_that_lost_a_level_of_its_layout(
    library: MountedLibrary, kind: str, shows: int, first: bool
) -> None:
    """9 of 9 links: nothing beneath the mount speaks for them, whatever they are counted as."""
    cloud = library.add_cloud(kind)
    links = library.shows(cloud.point / "shows", shows, 9 // shows)
    if not first:
        library.settle()
        library.assert_over()
    for folder in list((cloud.backend / "shows").iterdir()):
        folder.rename(cloud.backend / folder.name)
    (cloud.backend / "shows").rmdir()
    for _ in range(2):
        library.assert_held(library.scan(), links)
    (cloud.backend / "shows").mkdir()
    for folder in [path for path in cloud.backend.iterdir() if path.name != "shows"]:
        folder.rename(cloud.backend / "shows" / folder.name)
    library.assert_over()


@pytest.mark.parametrize("kind", ["tmpfs", "fuse"])
def test_the_folder_of_one_provider_is_away(library: MountedLibrary, kind: str) -> None:
    """45 links of 5 shows in one missing directory, on a mount of 345: too few for a share."""
    cloud = library.add_cloud(kind)
    away = library.shows(cloud.point / "one provider", 5, 9, name="Away")
    others = library.shows(cloud.point / "another", 50, 6)
    library.settle()
    library.assert_over()
    cloud.hide(["one provider"])
    library.lose(others[:1])
    for _ in range(2):
        scan = library.scan()
        assert strings(away) <= library.having("unreachable") and scan["exit_code"] == 4
        assert library.having("unreachable") <= strings(away) | library.lost
    cloud.show()
    library.assert_over()


@pytest.mark.parametrize(
    ("titles", "others", "held"),
    [(2, 50, False), (3, 50, True), (3, 70, False), (9, 200, False), (10, 210, True)],
)
def test_how_many_titles_make_a_missing_directory_a_provider_s(
    library: MountedLibrary, titles: int, others: int, held: bool
) -> None:
    """3 titles and 5 % of those of the place, or 10: a hole; fewer are torrents."""
    cloud = library.add_cloud("tmpfs")
    links = library.films(cloud.point / "one provider", titles, name="Away")
    library.films(cloud.point / "another", others)
    library.assert_over()
    library.lose(links)
    shutil.rmtree(str(cloud.backend / "one provider"))
    scan = library.scan()
    assert library.having("unreachable" if held else "broken") == strings(links)
    assert (scan["exit_code"], scan["guard"]["tripped"]) == (4 if held else 0, held)


# Unions


def start_union(library: MountedLibrary, kind: str, on_branch: int) -> Tuple[Cloud, List[Path]]:
    """A mergerfs of a directory and a mount: (the mount, the links that lead to the mount).

    14 links of `on_branch` shows are on the mount, 90 of 30 films and shows on the directory.
    """
    reason = mergerfs_available()
    if reason:
        pytest.skip(reason)
    branch = library.folder / "directory"
    branch.mkdir()
    cloud = library.add_cloud(kind, "branch", "branches")
    union = library.folder / "union" / "all"
    library.stack.enter_context(mergerfs(union, [branch, cloud.point]))
    library.places.insert(0, (union, cloud.backend))
    links = library.shows(union / "shows", on_branch, 14 // on_branch, name="Remote")
    library.places.append((union, branch))
    library.shows(union / "shows", 30, 3)
    return cloud, links


def break_branch(cloud: Cloud, how: str) -> None:
    cloud.fuse.kill() if how == "killed" else cloud.close()


UNION_CASES = [
    # With few titles away nothing but the branch itself tells; the guard knows 14 of 104 films.
    ("fuse", "killed", False, True, 2),
    ("fuse", "killed", True, True, 2),
    ("fuse", "killed", False, False, 2),
    ("fuse", "killed", True, False, 2),
    ("fuse", "unmounted", False, True, 2),
    ("tmpfs", "unmounted", False, True, 2),
    ("tmpfs", "unmounted", True, True, 2),
    ("tmpfs", "unmounted", True, False, 2),
    ("tmpfs", "unmounted", False, False, 14),
]


@pytest.mark.parametrize(("kind", "how", "check", "history", "titles"), UNION_CASES)
def test_a_branch_goes_beneath_a_living_union(
    library: MountedLibrary,
    write_config: WriteConfig,
    kind: str,
    how: str,
    check: bool,
    history: bool,
    titles: int,
) -> None:
    cloud, away = start_union(library, kind, titles)
    if check:
        write_config(f"[scan]\nmount_checks = {cloud.point}\n")
    local, _ = library.local("lost on the disk", "good on the disk")
    others = sorted(path for path in library.media.glob("tv/Show*/*/*.mkv"))
    if history:
        library.lose(others[:1])
        library.settle()
        library.assert_over()
    break_branch(cloud, how)
    library.lose([local, others[3]])
    for _ in range(2):
        scan = library.scan()
        assert strings(away) <= library.having("unreachable")
        assert library.having("unreachable") <= strings(away) | library.lost
        assert str(local) in library.having("broken")
        assert scan["exit_code"] == 4
    if kind == "tmpfs":
        cloud.fs.mount() if isinstance(cloud.fs, tmpfs) else None
        library.bring_back(away)
    else:
        cloud.close()
        cloud.fuse.mount()
    library.assert_over()


def test_a_layer_of_an_overlay_that_is_not_mounted(library: MountedLibrary) -> None:
    """As after a restart: the overlay is there, one of its two layers is an empty directory."""
    one, two = (library.add_cloud("tmpfs", name, "layers") for name in ("one", "two"))
    union = library.folder / "union" / "all"
    union.mkdir(parents=True)

    def mount() -> None:
        options = f"lowerdir={one.point}:{two.point}"
        command = ["mount", "-t", "overlay", "overlay", "-o", options, str(union)]
        done = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", check=False)
        if done.returncode:
            pytest.skip(f"no overlay here: {done.stderr.strip()}")

    def unmount() -> None:
        subprocess.call(["umount", "--lazy", str(union)], stderr=subprocess.DEVNULL)

    library.stack.callback(unmount)
    library.places.append((union, one.backend))
    away = library.shows(union / "shows", 2, 7, name="Remote")
    library.places[-1] = (union, two.backend)
    others = library.shows(union / "shows", 30, 3)
    mount()
    library.assert_over()
    unmount()
    one.close()
    library.lose(others[:1])
    mount()
    for _ in range(2):
        scan = library.scan()
        assert strings(away) <= library.having("unreachable") and scan["exit_code"] == 4
        assert library.having("unreachable") <= strings(away) | library.lost
    unmount()
    one.fs.mount() if isinstance(one.fs, tmpfs) else None
    library.bring_back(away)
    mount()
    library.assert_over()


# What is held is let go


@pytest.mark.parametrize("kind", ["tmpfs", "fuse"])
def test_what_came_back_lets_go_of_the_rest(library: MountedLibrary, kind: str) -> None:
    """80 of 200 gone, 77 back: the 3 that stay lost are broken, and nobody had to say so."""
    cloud = library.add_cloud(kind)
    links = library.films(cloud.point / "movies", 200)
    library.settle()
    library.assert_over()
    library.lose(links[:80])
    for _ in range(2):
        scan = library.scan()
        library.assert_held(scan, links[:80])
        assert scan["guard"]["held_back"] == 80
    library.bring_back(links[3:80])
    library.assert_over()
    library.assert_over()


@pytest.mark.parametrize(("back", "held"), [(19, True), (20, False)])
def test_the_share_of_a_lot_that_lets_it_go(library: MountedLibrary, back: int, held: bool) -> None:
    """A lot of 25: it is let go when no more than 5 of it are gone."""
    cloud = library.add_cloud("tmpfs")
    links = library.films(cloud.point / "movies", 100)
    library.assert_over()
    library.lose(links[:25])
    library.assert_held(library.scan(), links[:25])
    library.bring_back(links[25 - back : 25])
    if held:
        library.assert_held(library.scan(), links[: 25 - back])
    else:
        library.assert_over()


def test_fewer_than_three_titles_of_a_lot_are_let_go(library: MountedLibrary) -> None:
    """Of 4 shows with 12 episodes each, 2 stay away: half of the lot, but only two titles."""
    cloud = library.add_cloud("tmpfs")
    links = library.shows(cloud.point / "shows", 8, 12)
    library.assert_over()
    library.lose(links[:48])
    library.assert_held(library.scan(), links[:48])
    library.bring_back(links[36:48])
    library.assert_held(library.scan(), links[:36])
    library.bring_back(links[24:36])
    library.assert_over()


@pytest.mark.parametrize("meanwhile", ["new links", "removed links", "outage", "renamed links"])
def test_what_dilutes_no_lot(library: MountedLibrary, meanwhile: str) -> None:
    cloud = library.add_cloud("fuse")
    links = library.films(cloud.point / "movies", 60)
    library.assert_over()
    library.lose(links[:24])
    library.assert_held(library.scan(), links[:24])
    if meanwhile == "new links":
        library.films(cloud.point / "movies", 200, name="New")
    elif meanwhile == "removed links":
        for link in links[50:]:
            link.unlink()
    elif meanwhile == "renamed links":
        (library.media / "movies").rename(library.media / "films")
        links = [library.media / "films" / link.parent.name / link.name for link in links]
        library.lost = strings(links[:24])
    else:
        cloud.fuse.empty()
        assert library.scan()["exit_code"] == 4
        assert library.having("ok") | library.having("broken") == set()
        cloud.fuse.heal()
    for _ in range(2):
        scan = library.scan()
        assert (library.having("unreachable"), scan["exit_code"]) == (strings(links[:24]), 4)
    library.bring_back(links[2:24])
    scan = library.scan()
    assert (library.having("broken"), scan["exit_code"]) == (strings(links[:2]), 0)


def test_a_lot_is_counted_over_all_roots(library: MountedLibrary) -> None:
    """Scans of one root only come to the verdict that a scan of both would come to."""
    cloud = library.add_cloud("tmpfs")
    small = library.films(cloud.point / "movies", 10, name="Small", root="one")
    large = library.films(cloud.point / "movies", 50, name="Large", root="two")
    one, two = library.media / "one", library.media / "two"
    library.scan(roots=[one, two])
    held = [*small[:3], *large[:17]]
    library.lose(held)
    # In its own 3 of 10 links the first root would see nothing that is held ...
    library.assert_held(library.scan(roots=[one, two]), held)
    # ... and that 17 others are still away is known from the last time.
    library.assert_held(library.scan(roots=[one]), held)
    library.bring_back(large[:17])
    library.assert_held(library.scan(roots=[one]), held)
    assert library.scan(roots=[two])["changes"]["newly_broken"] in (0, 3)
    assert library.having("unreachable") <= strings(small[:3])
    scan = library.scan(roots=[one])
    assert (library.having("broken"), scan["exit_code"]) == (strings(small[:3]), 0)


def test_a_scan_of_one_root_holds_what_one_of_both_would_hold(library: MountedLibrary) -> None:
    """30 of 100 films of the directory are gone; the root that is scanned has all of them."""
    cloud = library.add_cloud("tmpfs")
    small = library.films(cloud.point / "movies", 12, name="Small", root="one")
    large = library.films(cloud.point / "movies", 88, name="Large", root="two")
    one, two = library.media / "one", library.media / "two"
    library.scan(roots=[one, two])
    library.lose(small[:2])
    # 2 of 12 here, 2 of 100 there: no share is too large, and each is found.
    scan = library.scan(roots=[one])
    assert (library.having("broken"), scan["exit_code"]) == (strings(small[:2]), 0)
    library.lose(large[:30])
    library.assert_held(library.scan(roots=[two]), large[:30])
    library.assert_held(library.scan(roots=[one, two]), large[:30])


# True losses are found at once


@pytest.mark.parametrize("first", [False, True])
def test_dead_ids_in_the_empty_folders_of_a_sharded_mount(
    library: MountedLibrary, first: bool
) -> None:
    """Every shard folder always exists there: an empty one is the sign of a deletion."""
    cloud = library.add_cloud("fuse")
    links = [
        library.put(
            f"movies/Film {n:02d}/Film {n:02d}.mkv",
            cloud.point / ".ids" / f"{n % 8:x}" / f"{n // 8:x}" / f"id-{n:04d}",
        )
        for n in range(40)
    ]
    if not first:
        library.assert_over()
    library.lose(links[:5])
    for link in links[:5]:
        assert list(library.file_of(library.target(link)).parent.iterdir()) == []
    library.assert_over()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ["tmpfs", "fuse"])
@pytest.mark.parametrize("what", ["pack", "film", "collection"])
def test_a_lost_torrent_is_broken_in_the_first_scan(
    library: MountedLibrary, kind: str, what: str, first: bool
) -> None:
    """A pack of 60 episodes, a lone film, 8 films in one folder; directly in the mount."""
    cloud = library.add_cloud(kind)
    library.films(cloud.point, 50)
    if what == "pack":
        lost = library.show(cloud.point, "Long", 60)
    elif what == "film":
        lost = library.films(cloud.point, 1, name="Lone")
    else:
        lost = [
            library.put(f"movies/Part {n}/Part {n}.mkv", cloud.point / "Collection" / f"{n}.mkv")
            for n in range(1, 9)
        ]
    if not first:
        library.settle()
        library.assert_over()
    library.lose(lost, folder=True)
    library.assert_over()


def test_a_flat_library_whose_links_are_titles(library: MountedLibrary) -> None:
    """Links side by side in one folder lead into many torrents: 30 of 100 are 30 titles."""
    cloud = library.add_cloud("tmpfs")
    links = [
        library.put(f"all/Film {n:03d}.mkv", cloud.point / "movies" / f"t{n:03d}" / "film.mkv")
        for n in range(100)
    ]
    library.assert_over()
    library.lose(links[:2], folder=True)
    library.assert_over()
    library.lose(links[2:32], folder=True)
    library.assert_held(library.scan(), links[2:32])


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(("gone", "held"), [(2, False), (3, True)])
def test_two_titles_are_never_a_mass(
    library: MountedLibrary, gone: int, held: bool, folder: bool
) -> None:
    """Whole shows of 20 episodes each, of 6 on the mount."""
    cloud = library.add_cloud("tmpfs")
    links = library.shows(cloud.point / "shows", 6, 20)
    library.assert_over()
    library.lose(links[: gone * 20], folder)
    if held:
        library.assert_held(library.scan(), links[: gone * 20])
    else:
        library.assert_over()


@pytest.mark.parametrize("folder", [False, True])
def test_ten_titles_need_a_quarter_of_the_share_only(library: MountedLibrary, folder: bool) -> None:
    cloud = library.add_cloud("tmpfs")
    links = library.films(cloud.point / "movies", 180)
    library.assert_over()
    library.lose(links[:9], folder)  # exactly 5 %, and nine titles
    library.assert_over()
    library.lose(links[9:19], folder)  # 10 of 171
    library.assert_held(library.scan(), links[9:19])


# What others explain counts for nobody


@pytest.mark.parametrize("history", [True, False])
def test_an_empty_mount_point_does_not_trip_the_guard_around_it(
    library: MountedLibrary, history: bool
) -> None:
    disk = library.folder / "disk"
    films = library.films(disk / "films", 20)
    cloud = library.add_cloud("tmpfs", "usb", "disk/mounts")
    stick = library.films(cloud.point / "movies", 30, name="Stick")
    if history:
        library.assert_over()
    cloud.close()
    library.lose(films[:1])
    for _ in range(2):
        scan = library.scan()
        assert (library.having("unreachable"), scan["exit_code"]) == (strings(stick), 4)
        assert library.having("broken") == library.lost
        assert not scan["guard"]["tripped"] and not scan["guard"]["units"]
    cloud.fs.mount() if isinstance(cloud.fs, tmpfs) else None
    library.bring_back(stick)
    library.assert_over()


def test_links_that_moved_within_the_roots_are_no_mass(library: MountedLibrary) -> None:
    """The server renames 40 of 50 folders: their links vanish here and stand there."""
    cloud = library.add_cloud("tmpfs")
    links = library.films(cloud.point / "movies", 50)
    library.assert_over()
    for number, link in enumerate(links[:40]):
        folder = library.media / ("films" if number % 2 else "movies") / f"Renamed {number}"
        folder.parent.mkdir(exist_ok=True)
        link.parent.rename(folder)
    scan = library.scan()
    assert (scan["exit_code"], scan["totals"]["missing"]) == (0, 40)
    assert scan["changes"] == {"new": 40, "newly_broken": 0, "recovered": 0, "vanished": 40}
    assert library.having("missing") == strings(links[:40])
    assert library.having("ok") == library.all_links()


def test_links_that_vanish_in_mass_are_held(library: MountedLibrary) -> None:
    """The directory stays, as an absent mount does; it has been no more than renamed away."""
    cloud = library.add_cloud("tmpfs")
    links = library.films(cloud.point / "movies", 50)
    library.assert_over()
    aside = library.folder / "aside"
    (library.media / "movies").rename(aside)
    (library.media / "movies").mkdir()
    (library.media / "other").mkdir()
    library.put("other/other.mkv", cloud.point / "movies" / "other" / "other.mkv")
    for _ in range(2):
        scan = library.scan()
        assert scan["exit_code"] == 4
        assert library.having("missing") == set() and strings(links) <= library.having("ok")
    (library.media / "movies").rmdir()
    aside.rename(library.media / "movies")
    library.assert_over()


# Mounts that hang, and mounts that answer slowly


def timed(library: MountedLibrary, limit: float) -> Tuple[Dict[str, Any], float]:
    began = time.monotonic()
    scan = library.scan(limit=limit)
    return scan, time.monotonic() - began


def time_of_a_first_scan(library: MountedLibrary) -> float:
    """Return what it takes while all is well, with a database of its own."""
    other = Refresherr(library.folder / "other")
    other.env.update(library.refresherr.env)
    began = time.monotonic()
    assert other("scan", library.media).code == 0
    return time.monotonic() - began


@pytest.mark.parametrize("history", [True, False])
def test_a_hang_by_way_of_links_on_the_local_disk(
    library: MountedLibrary, write_config: WriteConfig, history: bool
) -> None:
    """Library -> links on the disk -> mount: the mount is at fault, and the disk is judged."""
    stat_timeout = 4
    write_config(IMPATIENT.format(stat_timeout))
    cloud = library.add_cloud("fuse")
    links = []
    for n in range(40):
        hop = library.folder / "disk" / "hops" / f"{n % 10}" / f"hop {n:02d}.mkv"
        hop.parent.mkdir(parents=True, exist_ok=True)
        links.append(library.put(f"movies/Film {n:02d}/Film {n:02d}.mkv", hop))
        hop.unlink()
        hop.symlink_to(cloud.point / "movies" / f"{n:02d}" / "film.mkv")
        file = cloud.backend / "movies" / f"{n:02d}" / "film.mkv"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"video")
    lost, good = library.local("lost on the disk", "good on the disk")
    healthy = time_of_a_first_scan(library)
    if history:
        library.assert_over()
    cloud.fuse.hang()
    library.lose([lost])
    for _ in range(2):
        scan, took = timed(library, healthy + 60)
        assert (library.having("unreachable"), scan["exit_code"]) == (strings(links), 4)
        assert library.having("broken") == {str(lost)} and str(good) in library.having("ok")
        assert states(scan).get(str(cloud.point)) == "unresponsive"
        assert [point for point, state in states(scan).items() if state != "healthy"] == [
            str(cloud.point)
        ]
        assert took < healthy + 2 * stat_timeout
    cloud.fuse.heal()
    library.assert_over()


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_mount_that_answers_slowly_with_errors(
    library: MountedLibrary, write_config: WriteConfig, all_of_it: bool, history: bool
) -> None:
    """No look-up hangs, but each fails after 0.1 s; 400 of them one by one would cost 40 s."""
    stat_timeout = 3
    write_config(IMPATIENT.format(stat_timeout))
    cloud = library.add_cloud("fuse")
    links = library.films(cloud.point / "movies", 400)
    lost, good = library.local("lost on the disk", "good on the disk")
    healthy = time_of_a_first_scan(library)
    if history:
        library.assert_over()
    cloud.close()
    cloud.fuse._numbers["threads"] = 1  # one after the other
    cloud.fs.mount()
    if all_of_it:
        cloud.fuse.fail(errno.EIO, delay=0.1)
    else:
        names = {name_below(cloud, link) for link in links}
        cloud.fuse.fail_beneath(dict.fromkeys(names, errno.EIO), delay=0.1)
    library.lose([lost])
    for _ in range(2):
        scan, took = timed(library, healthy + 10 * stat_timeout)
        assert library.having("unreachable") == strings(links)
        assert scan["exit_code"] in (3, 4)
        assert library.having("broken") == {str(lost)} and str(good) in library.having("ok")
        assert took < healthy + 4 * stat_timeout
    cloud.fuse.heal()
    library.assert_over()


# What the user accepts


def two_units(
    library: MountedLibrary, folder: bool = False
) -> Tuple[Cloud, List[Path], List[Path]]:
    """24 of 60 gone in each of two directories, 8 titles in all, on a mount of 320."""
    cloud = library.add_cloud("tmpfs")
    shows = library.shows(cloud.point / "shows", 10, 6)
    kids = library.shows(cloud.point / "kids", 10, 6, name="Kid")
    library.films(cloud.point / "movies", 200)
    library.assert_over()
    library.lose(shows[:24] + kids[:24], folder)
    return cloud, shows[:24], kids[:24]


@pytest.mark.parametrize("folder", [False, True])
def test_each_unit_is_told_for_itself(library: MountedLibrary, folder: bool) -> None:
    cloud, shows, kids = two_units(library, folder)
    result = library.refresherr("scan", library.media)
    assert result.code == 4
    for folder in ("shows", "kids"):
        assert f"scan --accept {cloud.point / folder}" in result.err
    scan = library.scan()
    library.assert_held(scan, shows + kids)
    guard = scan["guard"]
    assert (guard["tripped"], guard["held_back"]) == (True, 48) and guard["reason"]
    units = {unit["directory"]: unit for unit in guard["units"]}
    assert set(units) == {str(cloud.point / "shows"), str(cloud.point / "kids")}
    for directory, unit in units.items():
        assert (unit["links"], unit["titles"], unit["of_links"]) == (24, 4, 60)
        assert isinstance(unit["lot"], int)
        assert unit["accept"].endswith(f"scan --accept {directory}")


def test_accepting_a_directory_accepts_nothing_else(library: MountedLibrary) -> None:
    cloud, shows, kids = two_units(library)
    library.assert_held(library.scan(), shows + kids)
    scan = library.scan("--accept", cloud.point / "shows")
    assert (library.having("broken"), scan["exit_code"]) == (strings(shows), 4)
    assert library.having("unreachable") == strings(kids)
    assert scan["changes"]["newly_broken"] == 24
    scan = library.scan()
    assert (library.having("broken"), library.having("unreachable")) == (
        strings(shows),
        strings(kids),
    )
    assert [unit["directory"] for unit in scan["guard"]["units"]] == [str(cloud.point / "kids")]
    library.bring_back(kids)
    library.assert_over()


@pytest.mark.parametrize("option", ["--accept", "--accept-breakage"])
@pytest.mark.parametrize("kind", ["tmpfs", "fuse"])
def test_what_a_scan_is_the_first_to_miss_is_not_accepted(
    library: MountedLibrary, kind: str, option: str
) -> None:
    """A second outage begins between the loss and the user's word."""
    cloud = library.add_cloud(kind)
    links = library.films(cloud.point / "movies", 100)
    library.settle()
    library.assert_over()
    library.lose(links[:30])
    library.assert_held(library.scan(), links[:30])
    away = links[40:70]
    cloud.hide([name_below(cloud, link) for link in away])
    word = [option, cloud.point / "movies"][: 2 if option == "--accept" else 1]
    scan = library.scan(*word)
    assert (library.having("broken"), scan["exit_code"]) == (library.lost, 4)
    assert library.having("unreachable") == strings(away)
    for _ in range(2):
        scan = library.scan()
        assert (library.having("unreachable"), scan["exit_code"]) == (strings(away), 4)
    cloud.show()
    library.assert_over()


def test_nothing_is_accepted_that_no_scan_has_held_before(library: MountedLibrary) -> None:
    cloud = library.add_cloud("tmpfs")
    links = library.films(cloud.point / "movies", 100)
    library.assert_over()
    cloud.hide([name_below(cloud, link) for link in links[:30]])
    for word in (["--accept-breakage"], ["--accept", cloud.point]):
        scan = library.scan(*word, "--dry-run")  # leaves the database, so is always the first
        assert scan["exit_code"] == 4
    library.assert_held(library.scan("--accept-breakage"), links[:30])
    cloud.show()
    library.assert_over()


def test_a_loss_without_a_witness_can_be_accepted(library: MountedLibrary) -> None:
    """ "Accepting a directory ends every doubt about losses beneath it, those of 2, 3 and 4"."""
    cloud = library.add_cloud("tmpfs")
    links = library.films(cloud.point / "movies", 9)
    (cloud.backend / "stays").touch()
    library.assert_over()
    library.lose(links, folder=True)
    library.assert_held(library.scan(), links)
    scan = library.scan("--accept", cloud.point)
    assert (library.having("broken"), scan["exit_code"]) == (strings(links), 0)
    library.assert_over()
    library.bring_back(links)
    library.assert_over()


def test_a_limit_of_all_switches_off_the_guard_only(
    library: MountedLibrary, write_config: WriteConfig
) -> None:
    write_config("[scan]\nmax_new_broken = 100%\n")
    cloud, other = (library.add_cloud("tmpfs", name, f"mnt {name}") for name in ("one", "two"))
    provider = library.films(cloud.point / "provider", 20, name="Provider")
    films = library.films(cloud.point / "movies", 60)
    alone = library.films(other.point / "movies", 9, name="Alone")
    (other.backend / "stays").touch()
    library.assert_over()
    library.lose(films[:50] + provider)
    shutil.rmtree(str(cloud.backend / "provider"))
    library.assert_over()  # neither a share nor a missing directory holds anything
    aside = other.backend / "aside"
    (other.backend / "movies").rename(aside)
    library.assert_held(library.scan(), alone)  # but no good target speaks for these
    aside.rename(other.backend / "movies")
    library.assert_over()


# Checks


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_a_sentinel_is_a_witness_of_its_own_directory_only(
    library: MountedLibrary, write_config: WriteConfig, inside: bool, history: bool
) -> None:
    """`version.txt` at the root is there when `__all__` is not; one in `__all__` is not."""
    cloud = library.add_cloud("fuse")
    links = library.films(cloud.point / "__all__", 2)
    films = library.films(cloud.point / "movies", 5, name="Other")
    sentinel = "__all__/online" if inside else "version.txt"
    (cloud.backend / sentinel).touch()
    write_config(f"[scan]\nmount_checks = {cloud.point / sentinel}\n")
    if history:
        library.assert_over()
    if inside:
        library.lose(links, folder=True)
        library.assert_over()
    else:
        away = [name_below(cloud, link) for link in links]
        cloud.hide(away)
        for _ in range(2):
            library.assert_held(library.scan(), links)
        cloud.show()
        library.lose(films[:1])
        library.assert_over()


def test_a_failing_check_ends_belief_in_what_may_be_made_of_it(
    library: MountedLibrary, write_config: WriteConfig
) -> None:
    """One mount is absent: no new loss on another that may be a union of it; disks are judged."""
    cloud, other = library.add_cloud("fuse"), library.add_cloud("tmpfs", "other", "elsewhere")
    write_config(f"[scan]\nmount_checks = {other.point}\n")
    (other.backend / "stays").touch()
    films = library.films(cloud.point / "movies", 20)
    local, _ = library.local("lost on the disk", "good on the disk")
    library.lose(films[:1])
    library.assert_over()
    other.close()
    library.lose([films[1], local])
    for _ in range(2):
        scan = library.scan()
        assert scan["exit_code"] == 4
        assert library.having("unreachable") == {str(films[1])}
        assert library.having("broken") == strings([films[0], local])
    other.fs.mount()
    (other.backend / "stays").touch()
    library.assert_over()


def test_a_root_that_cannot_be_listed_condemns_nothing(library: MountedLibrary) -> None:
    """As davfs2 does: EINVAL for the listing of the root, although every file can be had."""
    cloud = library.add_cloud("fuse")
    films = library.films(cloud.point / "movies", 20)
    direct = library.films(cloud.point, 10, name="Direct")
    cloud.fuse.fail_listings({"": errno.EINVAL})
    library.assert_over()
    library.lose([films[0]])
    library.assert_over()
    cloud.fuse.heal()
    assert strings(direct) <= library.having("ok")
    library.assert_over()


# The state of a link, and the exit status


def test_an_outage_in_between_changes_no_count(library: MountedLibrary) -> None:
    """Only broken -> ok is recovered, only good -> broken newly broken."""
    cloud = library.add_cloud("fuse")
    links = library.films(cloud.point / "movies", 20)
    library.lose(links[:2])
    library.assert_over()
    select = "SELECT path, broken_since_utc FROM symlinks WHERE broken_since_utc IS NOT NULL"
    since = dict(library.refresherr.query(select))
    assert set(since) == strings(links[:2])
    cloud.fuse.fail(errno.EIO, include_root=True)
    scan = library.scan()
    assert library.having("unreachable") == strings(links)
    assert not any(scan["changes"].values())
    assert dict(library.refresherr.query(select)) == since
    cloud.fuse.heal()
    library.bring_back(links[:1])
    library.lose(links[2:3])
    scan = library.assert_over()  # 1 recovered, 1 newly broken
    assert (scan["changes"]["recovered"], scan["changes"]["newly_broken"]) == (1, 1)
    after = dict(library.refresherr.query(select))
    assert set(after) == strings(links[1:3])
    assert after[str(links[1])] == since[str(links[1])]


def test_the_exit_statuses_outrank_each_other(library: MountedLibrary) -> None:
    cloud, other = library.add_cloud("fuse"), library.add_cloud("tmpfs", "other", "elsewhere")
    films = library.films(cloud.point / "movies", 20)
    second = library.films(other.point / "movies", 5, name="Other")
    library.lose(films[:1])
    library.assert_over()
    scan = library.scan("--exit-code")
    assert (scan["exit_code"], scan["status"]) == (10, "ok")
    cloud.fuse.fail_paths({name_below(cloud, films[5]): errno.EACCES})
    scan = library.scan("--exit-code")
    assert (library.having("unreachable"), scan["exit_code"]) == ({str(films[5])}, 3)
    other.close()
    scan = library.scan("--exit-code")
    assert (scan["exit_code"], scan["status"]) == (4, "refused")
    assert library.having("unreachable") == strings([films[5], *second])
    assert library.having("broken") == {str(films[0])}
    cloud.fuse.heal()
    other.fs.mount()
    library.bring_back(second)
    library.assert_over()


SKIPPED = (
    "@eaDir", "#recycle", "#snapshot", ".snapshots", ".zfs", "@Recycle", "@Recently-Snapshot",
    ".Trash-1000", "lost+found", ".stfolder", ".stversions",
)  # fmt: skip


def test_directories_that_are_no_part_of_the_library(
    library: MountedLibrary, write_config: WriteConfig
) -> None:
    good = library.local("good")
    media, ghosts = library.media, []
    for name in SKIPPED:
        for folder in (name, f"movies/{name}/deeper"):
            ghosts.append(library.put(f"{folder}/ghost.mkv", library.disk / "gone.mkv", False))
    ordinary = library.put("movies/eaDir lost+found/a.mkv", library.disk / "good.mkv")
    scan = library.scan()
    assert set(library.refresherr.statuses()) == library.all_links() - strings(ghosts)
    assert scan["totals"]["examined"] == 3 and scan["totals"]["ignored"] >= len(ghosts)
    library.lost = strings(ghosts)
    # A root itself is what the user says that it is.
    assert library.scan(roots=[media / "@eaDir"])["totals"]["examined"] == 1
    write_config("[scan]\nignore_defaults = no\nmax_new_broken = 100%\n")
    scan = library.scan()
    assert library.having("broken") == strings(ghosts)
    assert strings([*good, ordinary]) <= library.having("ok")


def test_a_list_item_that_begins_with_a_hash(
    library: MountedLibrary, write_config: WriteConfig
) -> None:
    """Kept or refused, never dropped in silence."""
    library.local("good")
    library.put("#keep out/ghost.mkv", library.disk / "gone.mkv", False)
    write_config("[scan]\nignore =\n    nothing\n    #keep out\n")
    result = library.refresherr("scan", library.media)
    if result.code == 2:
        assert "#keep out" in result.err
    else:
        assert len(library.refresherr.statuses()) == 2


@pytest.mark.parametrize("kind", ["tmpfs", "fuse"])
def test_a_full_scan_comes_to_the_same_verdicts(library: MountedLibrary, kind: str) -> None:
    cloud = library.add_cloud(kind)
    links = library.films(cloud.point / "movies", 100)
    library.settle()
    library.assert_over()
    library.lose(links[:2])
    library.assert_over("--full")
    library.lose(links[2:32])
    library.assert_held(library.scan("--full"), links[2:32])
    library.assert_held(library.scan(), links[2:32])
    library.bring_back(links[4:32])
    library.assert_over("--full")
    library.assert_over()
