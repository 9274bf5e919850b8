"""A rescan that reads only what has changed sees what a scan that reads everything sees.

Directories of links and directories of targets are changed in every way there is between two
scans; then an ordinary scan and one with --full, each with its own copy of the database, must
leave the same rows, and those must be true.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Set, Tuple

import pytest
from conftest import PROJECT, Refresherr
from mounted_library import MountedLibrary, strings

NAMES = 6  # links of a folder, and files of the folder that they lead to
AT_FDCWD, RENAME_EXCHANGE = -100, 2
MS_BIND = 4096
SEED = int(os.environ.get("REFRESHERR_TEST_SEED", "0"))

_libc = ctypes.CDLL(None, use_errno=True)


def exchange(one: Path, two: Path) -> None:
    """Swap two names in one step; skips the way where the file system cannot."""
    names = os.fsencode(str(one)), os.fsencode(str(two))
    if _libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def bind(source: Path, point: Path) -> None:
    """Show one directory in the place of another."""
    if _libc.mount(os.fsencode(str(source)), os.fsencode(str(point)), b"none", MS_BIND, None):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def times_put_back(folder: Path) -> Iterator[None]:
    """What rsync -a, cp -a and touch -d do in the end: times of access and change as before."""
    info = folder.stat()
    yield
    os.utime(str(folder), ns=(info.st_atime_ns, info.st_mtime_ns))


def make(file: Path) -> None:
    file.write_bytes(b"video")


def twin(folder: Path, without: int = 1) -> Path:
    """Make a directory beside `folder` with the same names in it but some, and the same times."""
    other = folder.parent / f"twin of {folder.name}"
    other.mkdir()
    for name in sorted(os.listdir(str(folder)))[without:]:
        if (folder / name).is_symlink():
            (other / name).symlink_to(os.readlink(str(folder / name)))
        else:
            make(other / name)
    shutil.copystat(str(folder), str(other))
    return other


def swap_in(folder: Path, other: Path) -> None:
    folder.rename(folder.parent / f"was {folder.name}")
    other.rename(folder)


def again(link: Path, target: object) -> None:
    link.unlink()
    link.symlink_to(str(target))


def replace(link: Path, target: object) -> None:
    """As Refresherr, Sonarr and ln -sfn do it: a new link renamed over the old one."""
    new = link.parent / f".{link.name}.new"
    new.symlink_to(str(target))
    new.replace(link)


def seen(links: Path) -> Path:
    """Return the folder of files as links spell it, which is another one on a FUSE mount."""
    return Path(os.readlink(str(links / "to a folder")))


Change = Callable[[Path, Path], None]  # (folder of the links l0..l5, folder of the files f0..f5)


def _rename_over(links: Path, files: Path) -> None:
    (files / "f1").replace(files / "f0")


def _exchange_directories(links: Path, files: Path) -> None:
    exchange(files, twin(files, 2))


def _exchange_files(links: Path, files: Path) -> None:
    make(files.parent / "outsider")
    exchange(files / "f0", files.parent / "outsider")


def _exchange_with_a_dangling_link(links: Path, files: Path) -> None:
    dangling = files.parent / "a dangling link"
    dangling.symlink_to("nowhere")
    exchange(files / "f0", dangling)


def _times_put_back(links: Path, files: Path) -> None:
    with times_put_back(files):
        (files / "f0").unlink()


def _one_for_another_with_times_put_back(links: Path, files: Path) -> None:
    with times_put_back(files):
        (files / "f0").unlink()
        make(files / "f9")


def _touched_far_back(links: Path, files: Path) -> None:
    (files / "f0").unlink()
    os.utime(str(files), (1, 1))


def _touched_only(links: Path, files: Path) -> None:
    os.utime(str(files), (10**9, 10**9))


def _twin_directory(links: Path, files: Path) -> None:
    swap_in(files, twin(files))


def _link_in_the_place_of_the_directory(links: Path, files: Path) -> None:
    other = twin(files)
    files.rename(files.parent / f"was {files.name}")
    files.symlink_to(other)


def _link_to_the_directory_itself(links: Path, files: Path) -> None:
    moved = files.parent / f"moved {files.name}"
    files.rename(moved)
    files.symlink_to(moved)


def _file_in_the_place_of_the_directory(links: Path, files: Path) -> None:
    files.rename(files.parent / f"was {files.name}")
    make(files)


def _removed_and_made_again(links: Path, files: Path) -> None:
    shutil.rmtree(str(files))
    files.mkdir()
    for number in range(1, NAMES):
        make(files / f"f{number}")


def _hard_link(links: Path, files: Path) -> None:
    os.link(str(files / "f0"), str(files / "other name"))
    (files / "f0").unlink()


def _rsync(links: Path, files: Path) -> None:
    other = twin(files)
    if not shutil.which("rsync"):  # what it does, step by step
        with times_put_back(other), times_put_back(files):
            (files / "f0").unlink()
        return
    subprocess.check_call(["rsync", "-a", "--delete", f"{other}/", f"{files}/"])


def _cp(links: Path, files: Path) -> None:
    other = twin(files)
    shutil.rmtree(str(files))
    subprocess.check_call(["cp", "-a", str(other), str(files)])


def _file_becomes_a_dangling_link(links: Path, files: Path) -> None:
    replace(files / "f0", "nowhere")


def _file_becomes_a_good_link(links: Path, files: Path) -> None:
    replace(files / "f0", "f1")


def _file_becomes_a_loop(links: Path, files: Path) -> None:
    replace(files / "f0", "f0")


def _parent_replaced(links: Path, files: Path) -> None:
    """The directory is the same, with its own times; the one above it is another."""
    above = files.parent
    swap = above.parent / f"new {above.name}"
    swap.mkdir()
    (above / files.name).rename(swap / f"elsewhere {files.name}")
    swap_in(above, swap)


TARGETS: Dict[str, Change] = {
    "unlinked": lambda links, files: (files / "f0").unlink(),
    "created": lambda links, files: make(files / "f9"),
    "the missing one created": lambda links, files: make(files / f"f{NAMES}"),
    "renamed within": lambda links, files: (files / "f0").replace(files / "renamed"),
    "renamed in case only": lambda links, files: (files / "f0").replace(files / "F0"),
    "renamed over": _rename_over,
    "moved out": lambda links, files: (files / "f0").replace(files.parent / "moved out"),
    "directories exchanged": _exchange_directories,
    "files exchanged": _exchange_files,
    "exchanged with a dangling link": _exchange_with_a_dangling_link,
    "unlinked, times put back": _times_put_back,
    "one for another, times put back": _one_for_another_with_times_put_back,
    "unlinked, touched far back": _touched_far_back,
    "touched only": _touched_only,
    "mode changed": lambda links, files: files.chmod(0o711),
    "another directory of the same names": _twin_directory,
    "a link in the place of the directory": _link_in_the_place_of_the_directory,
    "a link to the directory itself": _link_to_the_directory_itself,
    "a file in the place of the directory": _file_in_the_place_of_the_directory,
    "removed": lambda links, files: shutil.rmtree(str(files)),
    "renamed": lambda links, files: files.rename(files.parent / f"moved {files.name}") and None,
    "removed and made again": _removed_and_made_again,
    "hard link": _hard_link,
    "rsync -a": _rsync,
    "cp -a": _cp,
    "a file becomes a dangling link": _file_becomes_a_dangling_link,
    "a file becomes a good link": _file_becomes_a_good_link,
    "a file becomes a loop": _file_becomes_a_loop,
    "a file becomes a directory": lambda links, files: (
        (files / "f0").unlink() or (files / "f0").mkdir()
    ),
    "the directory above is another": _parent_replaced,
    "truncated": lambda links, files: os.truncate(str(files / "f0"), 0),
}


def _swapped(links: Path, files: Path) -> None:
    exchange(links / "l0", links / f"l{NAMES}")  # a good one with the broken one


def _same_names_other_texts(links: Path, files: Path) -> None:
    other = twin(links, 0)
    again(other / "l0", seen(links) / "nowhere")
    shutil.copystat(str(links), str(other))
    swap_in(links, other)


def _library_folder_becomes_a_link(links: Path, files: Path) -> None:
    aside = links.parent.parent / "aside"
    aside.mkdir(exist_ok=True)
    links.rename(aside / links.name)
    links.symlink_to(aside / links.name)


def _replaced_with_times_put_back(links: Path, files: Path) -> None:
    with times_put_back(links):
        again(links / "l0", seen(links) / "nowhere")


def _new_folder(links: Path, files: Path) -> None:
    (links / "new" / "deeper").mkdir(parents=True)
    (links / "new" / "deeper" / "a").symlink_to(seen(links) / "f0")
    (links / "new" / "deeper" / "b").symlink_to(seen(links) / "nowhere")


def _link_becomes_a_folder(links: Path, files: Path) -> None:
    (links / "l0").unlink()
    (links / "l0").mkdir()
    (links / "l0" / "inner").symlink_to(seen(links) / "nowhere")


def _link_becomes_a_file(links: Path, files: Path) -> None:
    (links / "l0").unlink()
    make(links / "l0")


def _folder_moved_within(links: Path, files: Path) -> None:
    links.rename(links.parent / f"moved {links.name}")


def _change_below(links: Path, files: Path) -> None:
    again(links / "below" / "deeper" / "l0", seen(links) / "nowhere")


LIBRARY: Dict[str, Change] = {
    "new link": lambda links, files: (links / "new").symlink_to(seen(links) / "f0"),
    "new broken link": lambda links, files: (links / "new").symlink_to(seen(links) / "nowhere"),
    "removed link": lambda links, files: (links / "l0").unlink(),
    "renamed link": lambda links, files: (links / "l0").replace(links / "renamed"),
    "renamed link over": lambda links, files: (links / "l6").replace(links / "l0"),
    "links exchanged": _swapped,
    "again, with another text": lambda links, files: again(links / "l0", seen(links) / "nowhere"),
    "again, with the same text": lambda links, files: again(links / "l0", seen(links) / "f0"),
    "replaced": lambda links, files: replace(links / "l0", seen(links) / "nowhere"),
    "replaced, the broken one": lambda links, files: replace(links / "l6", seen(links) / "f1"),
    "replaced, times put back": _replaced_with_times_put_back,
    "same names, other texts": _same_names_other_texts,
    "a folder becomes a link": _library_folder_becomes_a_link,
    "new folder": _new_folder,
    "link becomes a folder": _link_becomes_a_folder,
    "link becomes a file": _link_becomes_a_file,
    "folder moved": _folder_moved_within,
    "folder removed": lambda links, files: shutil.rmtree(str(links)),
    "change two levels below": _change_below,
}


@pytest.fixture
def library(tmp_path: Path, refresherr: Refresherr) -> Iterator[MountedLibrary]:
    made = MountedLibrary(tmp_path, refresherr)
    (tmp_path / "refresherr.ini").write_text("[scan]\nmax_new_broken = 100%\n")
    (tmp_path / "refresherr.ini").chmod(0o600)
    refresherr.env["REFRESHERR_CONFIG"] = str(tmp_path / "refresherr.ini")
    with made.stack:
        yield made


Places = Dict[str, Tuple[Path, Path]]  # the folders of links and of files for each way


def build(library: MountedLibrary, kind: str, ways: List[str]) -> Places:
    """Make for each way a folder of links and the folder of files that they lead to.

    Of the links l0 to l6 the last is broken; one more leads by way of a link, one to a folder.
    """
    files_at, made_at = library.folder / "files", library.folder / "files"
    if kind != "disk":
        cloud = library.add_cloud(kind)
        files_at, made_at = cloud.point / "files", cloud.backend / "files"
    if kind == "tmpfs":
        library.media = cloud.point / "media"
        library.media.mkdir()
    made_at.mkdir()
    make(made_at / "witness")
    places = {}
    for way in ways:
        links = library.media / way.replace(",", "") / "links"
        folder, spelt = made_at / way / "files", files_at / way / "files"
        folder.mkdir(parents=True)
        make(folder.parent / "neighbour")
        (links / "below" / "deeper").mkdir(parents=True)
        for number in range(NAMES + 1):
            (links / f"l{number}").symlink_to(spelt / f"f{number}")
            if number < NAMES:
                make(folder / f"f{number}")
        (links / "below" / "deeper" / "l0").symlink_to(spelt / "f1")
        (links / "hop").symlink_to(links / "l0")
        (links / "to a folder").symlink_to(spelt)
        places[way] = links, folder
    (library.media / "witness").symlink_to(files_at / "witness")
    return places


def rows(refresherr: Refresherr) -> Set[Tuple[str, str, str]]:
    found = refresherr.query("SELECT path, last_target, status FROM symlinks")
    return {(os.fsdecode(path), os.fsdecode(target), status) for path, target, status in found}


def truth(root: Path) -> Dict[str, str]:
    """Return {path: status} of every link below `root`, as the kernel sees it now."""
    found = {}
    for folder, names, files in os.walk(str(root)):
        for name in names + files:
            path = os.path.join(folder, name)
            if os.path.islink(path):
                found[path] = "ok" if os.path.exists(path) else "broken"
    return found


def has_witness(link: str, true: Dict[str, str]) -> bool:
    """Tell whether a good link leads beneath the nearest directory above a lost file."""
    near = Path(os.path.realpath(link)).parent
    while not near.is_dir():
        near = near.parent
    good = (Path(os.path.realpath(path)) for path, status in true.items() if status == "ok")
    return any(near in target.parents for target in good)


def compare(library: MountedLibrary) -> None:
    """Scan as usual and, from a copy of the database, in full: the same rows, and true ones."""
    full = Refresherr(library.folder / "full")
    full.env.update(library.refresherr.env)
    shutil.rmtree(str(full.data_dir), ignore_errors=True)
    if library.refresherr.data_dir.exists():
        shutil.copytree(str(library.refresherr.data_dir), str(full.data_dir))
    known = set(library.refresherr.statuses() if full.data_dir.exists() else ())
    quick_scan = library.refresherr.scan(library.media)
    quick, true = library.refresherr.statuses(), truth(library.media)
    true.update(dict.fromkeys(known - set(true), "missing"))
    for path, status in quick.items():
        if (status, true.get(path)) == ("unreachable", "broken") and not has_witness(path, true):
            true[path] = "unreachable"
    wrong = {path: (quick.get(path), is_) for path, is_ in true.items() if quick.get(path) != is_}
    assert not wrong, wrong
    full_scan = full.scan("--full", library.media)
    assert rows(full) == rows(library.refresherr)
    for key in ("totals", "changes", "exit_code"):
        assert quick_scan[key] == full_scan[key]


@pytest.mark.parametrize("kind", ["disk", "tmpfs", "fuse"])
def test_every_way_of_changing_a_directory_is_seen(library: MountedLibrary, kind: str) -> None:
    ways = {**TARGETS, **LIBRARY}
    places = build(library, kind, list(ways))
    library.settle()
    compare(library)
    if kind != "fuse":  # where no directory vouches for anything
        compare(library)
    for way, change in ways.items():
        change(*places[way])
    compare(library)
    if kind != "fuse":
        compare(library)  # at once, while what has changed is young
    library.settle()
    compare(library)


@pytest.mark.parametrize("kind", ["disk", "tmpfs"])
def test_what_is_mounted_over_a_directory_is_seen(library: MountedLibrary, kind: str) -> None:
    """Directories with fewer names, in the place of a folder of files and of one of links."""
    places = build(library, kind, ["files", "links", "both"])
    library.settle()
    for _ in range(2):
        compare(library)
    covered = [places["files"][1], places["links"][0], *places["both"]]
    for folder in covered:
        (folder.parent.parent.parent / "covers").mkdir(exist_ok=True)
        other = twin(folder, 2)
        moved = folder.parent.parent.parent / "covers" / str(covered.index(folder))
        if library.media in moved.parents:
            moved = library.media.parent / f"cover {covered.index(folder)}"
        other.rename(moved)
        bind(moved, folder)
        library.stack.callback(
            subprocess.call, ["umount", "--lazy", str(folder)], stderr=subprocess.DEVNULL
        )
    shutil.rmtree(str(library.media / "covers"), ignore_errors=True)
    for _ in range(2):
        compare(library)
    for folder in covered:
        subprocess.check_call(["umount", str(folder)])
        # A mount that is remembered and absent is an outage until the user says otherwise.
        library.refresherr.scan("--forget-mount", folder, library.media)
    for _ in range(2):
        compare(library)


@pytest.mark.parametrize("kind", ["disk", "tmpfs"])
def test_changes_right_after_a_scan_and_within_a_tick_of_the_clock(
    library: MountedLibrary, kind: str
) -> None:
    """The kernel's clock lags: a directory that was changed a moment ago proves nothing."""
    places = build(library, kind, [f"way {number}" for number in range(30)])
    for turn in range(4):
        library.refresherr.scan(library.media)
        for links, files in places.values():
            (files / f"f{turn}").unlink()
            again(links / f"l{(turn + 1) % NAMES}", files / f"f{turn}")
        compare(library)


@pytest.mark.parametrize("kind", ["disk", "tmpfs"])
def test_changes_while_a_scan_is_running(library: MountedLibrary, kind: str) -> None:
    """What it sees of them is chance; the next scan sees all of them."""
    places = build(library, kind, [f"way {number}" for number in range(60)])
    library.settle()
    library.refresherr.scan(library.media)
    for turn in range(3):
        process = library.refresherr.start("scan", "-q", library.media)
        for links, files in places.values():
            (files / f"f{turn}").unlink()
            again(links / f"l{turn + 1}", files / f"f{turn}")
        assert process.wait(60) in (0, 3, 4)
        assert process.stdout and process.stderr
        process.stdout.close(), process.stderr.close()
        compare(library)


@pytest.mark.parametrize("kind", ["disk", "tmpfs", "fuse"])
def test_random_changes(library: MountedLibrary, kind: str) -> None:
    """Many scans, some a moment and some a while after the changes before them."""
    print(f"REFRESHERR_TEST_SEED={SEED}")
    dice = random.Random(f"{kind} {SEED}")
    build(library, kind, [f"way {number}" for number in range(20)])
    folders = sorted(path for path in library.media.glob("*/links"))
    for turn in range(4):
        if turn % 2:
            library.settle()
        compare(library)
        for links in dice.sample(folders, 6):
            files = library.file_of(Path(os.readlink(str(links / "to a folder"))))
            ways = [way for way in RANDOM_WAYS if dice.random() < 0.3]
            for way in ways:
                with contextlib.suppress(OSError):  # a change before it has made it impossible
                    {**TARGETS, **LIBRARY}[way](links, files)
            for number in range(NAMES):
                if dice.random() < 0.3 and files.is_dir():
                    with contextlib.suppress(OSError):
                        make(files / f"f{number}")
    compare(library)


# Changes of one place only, which leave a folder of links and one of files behind.
RANDOM_WAYS = sorted(
    {*TARGETS, *LIBRARY}
    - {"removed", "renamed", "a file in the place of the directory", "folder moved"}
    - {"folder removed", "a folder becomes a link", "the directory above is another"}
)


def test_a_row_that_another_program_wrote_is_looked_at_again(library: MountedLibrary) -> None:
    """The documented Python API writes what it is told; the next scan puts it right."""
    places = build(library, "disk", ["one", "two"])
    library.settle()
    for _ in range(2):
        compare(library)
    links, files = places["one"]
    script = f"import sys; sys.path.insert(0, {str(PROJECT)!r})\nimport refresherr\n" + "".join(
        f"refresherr.record_symlink({str(links / name)!r}, {str(files / target)!r}, {status!r})\n"
        for name, target, status in [
            ("l0", "f0", "broken"),
            ("l1", "nowhere", "broken"),
            ("l2", "f3", "ok"),
            (f"l{NAMES}", f"f{NAMES}", "ok"),
            ("no such link", "f0", "ok"),
        ]
    )
    env = {**library.refresherr.env, "DATA_DIR": str(library.refresherr.data_dir)}
    subprocess.check_call([sys.executable, "-c", script], env=env)
    assert library.refresherr.statuses()[str(links / "l0")] == "broken"
    compare(library)


def test_what_was_ignored_for_a_while_is_judged_again(library: MountedLibrary) -> None:
    places = build(library, "disk", ["one", "two"])
    config = library.folder / "refresherr.ini"
    before = config.read_text()
    library.settle()
    for _ in range(2):
        compare(library)
    config.write_text(before + "ignore = *l0\n")
    library.refresherr.scan(library.media)
    links, files = places["one"]
    (files / "f0").unlink()
    library.refresherr.scan(library.media)
    config.write_text(before)
    compare(library)
    assert str(links / "l0") in {
        path for path, status in library.refresherr.statuses().items() if status == "broken"
    }


def test_roots_in_turn(library: MountedLibrary) -> None:
    """A target folder that two roots lead into vouches for each of them."""
    files = library.folder / "files"
    files.mkdir()
    roots = [library.media / name for name in ("one", "two")]
    for root in roots:
        root.mkdir()
        for number in range(10):
            (root / f"{number}").symlink_to(files / f"{number}")
            make(files / f"{number}")
    library.settle()
    library.refresherr.scan(*roots)
    library.refresherr.scan(*roots)
    for number in (3, 4):
        (files / f"{number}").unlink()
    library.refresherr.scan(roots[0])
    library.refresherr.scan(roots[1])
    gone = strings(root / f"{number}" for root in roots for number in (3, 4))
    assert library.having("broken") == gone
    library.settle()
    library.refresherr.scan(roots[1])
    make(files / "3")
    library.refresherr.scan(roots[0])
    library.refresherr.scan(roots[1])
    assert {
        path for path, status in library.refresherr.statuses().items() if status == "broken"
    } == {path for path in gone if path.endswith("4")}
