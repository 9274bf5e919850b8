"""Measure the scan against find, and ingest against itself with one request after another:
python3 tests/benchmark.py [--help]

Ratios, not seconds: each pair of commands runs alternately in this very run (A B A B ...), and the
median of the pairs' ratios is told, of the time on the wall and of the CPU time of all processes:
the latter is the steadier one on a machine that others use, too.  The program runs as a whole
process, its database included, with the Python that runs this file.  Needs GNU find, and strace
for one row; TMPDIR says where the libraries are made.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Set, Tuple

from cinesync_library import CineSyncLibrary, Part
from fake_servers import FakeArr, FakeRadarr, FakeSonarr, populate, populate_movies
from fuse_fs import FuseMount, fuse_available

PROJECT = Path(__file__).resolve().parent.parent
STALL_LIMIT = 3.0
YOUNG = 3.0  # seconds: what has changed later than that proves nothing to a rescan
QUIET = subprocess.DEVNULL

# 8 links a season, 2 seasons a show: 5.3 links a directory, the show's own included.
LINKS_PER_SEASON, SEASONS, SHOWS_PER_ROOT_FOLDER = 8, 2, 500
LINKS_PER_TARGET_FOLDER = 11
BROKEN_EVERY = 50  # 2 %


def make_library(
    links: int, root: Path, files: Path, seen_at: Path, broken_every: int = BROKEN_EVERY
) -> None:
    """Make links below `root` that point into `seen_at`, and their targets in `files`."""
    for number in range(links):
        show, episode = divmod(number, LINKS_PER_SEASON * SEASONS)
        season, episode = divmod(episode, LINKS_PER_SEASON)
        folder = root / f"shows {show // SHOWS_PER_ROOT_FOLDER}" / f"Show {show} (2001)"
        folder /= f"Season {season + 1:02d}"
        if episode == 0:
            folder.mkdir(parents=True)
        release, file = divmod(number, LINKS_PER_TARGET_FOLDER)
        target = f"Release.{release}.1080p.WEB/Episode.{file:02d}.mkv"
        if file == 0:
            (files / target).parent.mkdir(parents=True)
        if number % broken_every:
            os.close(os.open(files / target, os.O_CREAT | os.O_WRONLY))
        name = f"Show {show} - S{season + 1:02d}E{episode + 1:02d}.mkv"
        os.symlink(seen_at / target, folder / name)


def seconds(*command: object, status: int = 0) -> float:
    """Run a command to its end and return the wall time."""
    words = [str(word) for word in command]
    began = time.perf_counter()
    code = subprocess.call(words, stdin=QUIET, stdout=QUIET)
    took = time.perf_counter() - began
    if code != status:
        sys.exit(f"exit status {code}: {' '.join(words)}")
    return took


class Cost(NamedTuple):
    """What a command took, in seconds."""

    wall: float
    cpu: float  # of all its processes that were waited for


def cost(*command: object, status: int = 0) -> Cost:
    """Run a command to its end and return what it took."""
    words = [str(word) for word in command]
    began = time.perf_counter()
    process = subprocess.Popen(words, stdin=QUIET, stdout=QUIET)
    _, code, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = code
    if os.WEXITSTATUS(code) != status or os.WIFSIGNALED(code):
        sys.exit(f"wait status {code}: {' '.join(words)}")
    return Cost(wall, usage.ru_utime + usage.ru_stime)


Measure = Callable[[], Cost]


class Pairs(NamedTuple):
    """Medians of so many pairs of runs."""

    wall: float  # ratios
    cpu: float
    base: Cost  # seconds
    ours: Cost


def paired(runs: int, base: Measure, ours: Measure) -> Pairs:
    """Take both in turn, `runs` times; return the medians of the ratios ours / base."""
    rounds = [(base(), ours()) for _ in range(runs)]

    def median(value: Callable[[Cost, Cost], float]) -> float:
        return statistics.median(value(*pair) for pair in rounds)

    return Pairs(
        median(lambda a, b: b.wall / a.wall),
        median(lambda a, b: b.cpu / max(a.cpu, 0.001)),
        Cost(median(lambda a, _: a.wall), median(lambda a, _: a.cpu)),
        Cost(median(lambda _, b: b.wall), median(lambda _, b: b.cpu)),
    )


def alternate(runs: int, *measures: Callable[[], float]) -> List[float]:
    """Take each measure in turn, `runs` times; return the median of each."""
    rounds = [[measure() for measure in measures] for _ in range(runs)]
    return [statistics.median(results) for results in zip(*rounds)]


class Table:
    """Prints the results, row by row as they come."""

    def row(self, what: str, result: str, reach: str = "", stretch: str = "") -> None:
        print(f"{what:<58} {result:>12} {reach:>9} {stretch:>9}", flush=True)

    def pairs(self, what: str, found: Pairs, reach: str, stretch: str) -> None:
        self.row(what, f"{found.wall:.2f}", reach, stretch)
        self.row("    the same in CPU time of all processes", f"{found.cpu:.2f}")
        base, ours = found.base, found.ours
        self.note(
            f"{base.wall:.2f} s against {ours.wall:.2f} s; CPU {base.cpu:.2f}, {ours.cpu:.2f}"
        )

    def note(self, text: str) -> None:
        print(f"    {text}", flush=True)


def scan_command(data_dir: Path, root: Path, *options: object) -> List[object]:
    program = [sys.executable, PROJECT / "refresherr.py", "--data-dir", data_dir]
    return [*program, "scan", "-q", *options, root]


def measure_scan(table: Table, scratch: Path, links: int, runs: int) -> None:
    """First scan, unchanged rescan and rescan with some changes, each against find."""
    root, files = scratch / "media", scratch / "files"
    make_library(links, root, files, files)
    find = ["find", root, "-xtype", "l"]
    fresh = (scratch / f"data-{number}" for number in itertools.count())
    kept = next(fresh)
    time.sleep(YOUNG)
    for command in (find, scan_command(kept, root), scan_command(kept, root)):
        cost(*command)  # warms the cache
    found = paired(runs, lambda: cost(*find), lambda: cost(*scan_command(next(fresh), root)))
    table.pairs(f"first scan of {links:,} links / find", found, "2.0", "1.7")
    found = paired(runs, lambda: cost(*find), lambda: cost(*scan_command(kept, root)))
    table.pairs("unchanged rescan / find", found, "1.0", "0.6")
    measure_calls(table, find, scan_command(kept, root))
    changes = Changes(root, files)

    def changed() -> Cost:
        changes.make()
        return cost(*scan_command(kept, root))

    found = paired(runs, lambda: cost(*find), changed)
    table.pairs("rescan with 1 % of the directories changed / find", found, "1.2", "0.8")


class Changes:
    """Changes 1 % of the directories of links and of targets, each time other ones."""

    def __init__(self, root: Path, files: Path) -> None:
        self.folders = sorted(root.glob("*/*/Season *")), sorted(files.iterdir())
        self.turn = 0

    def make(self) -> None:
        self.turn += 1
        seasons, releases = (folders[self.turn :: 100] for folders in self.folders)
        for season in seasons:
            link = min(season.iterdir())
            text = os.readlink(link)
            link.unlink()
            link.symlink_to(text)
        for release in releases:
            file = release / "subtitle.srt"
            file.unlink() if file.exists() else file.touch()


def measure_calls(table: Table, find: List[object], rescan: List[object]) -> None:
    """How often the kernel is asked about a link by its name: what a cold cache has to read."""
    if not shutil.which("strace"):
        table.note("system calls not counted: no strace here")
        return
    base, ours = (calls_that_name_a_link(command) for command in (find, rescan))
    label = "unchanged rescan / find, system calls that name a link"
    table.row(label, f"{ours / base:.3f}", "0.1", "0.05")
    table.note(f"find {base:,}, rescan {ours:,}")


def calls_that_name_a_link(command: List[object]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        words = ["strace", "-f", "-qq", "-e", "trace=%file", "-o", str(log)]
        if subprocess.call([*words, *map(str, command)], stdin=QUIET, stdout=QUIET):
            sys.exit(f"strace failed: {command}")
        name = re.compile(r'"[^"]*Show \d+ - S\d+E\d+\.mkv"')
        with open(log, encoding="utf-8", errors="replace") as lines:
            return sum(1 for line in lines if name.search(line))


def measure_cold(table: Table, scratch: Path, links: int) -> None:
    """Read requests of the disk with a cold cache; all that runs on this machine counts."""
    root, files = scratch / "media", scratch / "files"
    make_library(links, root, files, files)
    data_dir = scratch / "data"
    time.sleep(YOUNG)
    for _ in range(2):
        cost(*scan_command(data_dir, root))
    device = os.stat(root).st_dev
    counter = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")

    def reads(command: List[object]) -> int:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        cost(sys.executable, "-c", "import sqlite3, json, argparse, subprocess, ssl")
        before = int(counter.read_text().split()[0])
        cost(*command)
        return int(counter.read_text().split()[0]) - before

    try:
        base, ours = reads(["find", root, "-xtype", "l"]), reads(scan_command(data_dir, root))
    except OSError as error:
        table.note(f"cold cache skipped, it needs root and a disk of its own: {error}")
        return
    label = f"cold rescan of {links:,} links / find, reads of the disk"
    table.row(label, f"{ours / max(1, base):.3f}", "0.1", "0.05")
    table.note(f"find {base:,}, rescan {ours:,}")


def measure_run(table: Table, scratch: Path, links: int, runs: int) -> None:
    """What cron does all day: a whole run on a healthy library, against the scan alone."""
    root, files, base = scratch / "media", scratch / "files", scratch / "CineSync"
    make_library(links, root, files, files, broken_every=links + 1)
    (files / "Release.0.1080p.WEB" / "Episode.00.mkv").touch()
    base.mkdir()
    config = scratch / "refresherr.ini"
    config.write_text(
        f"[scan]\nroots = {root}\n[cinesync]\nbase = {base}\nroots = {root}\n"
        f"allowed_targets = {files}\n[relay]\nbase = http://127.0.0.1:9/find\n"
    )
    config.chmod(0o600)
    data_dirs = scratch / "data-scan", scratch / "data-run"
    scan, run = (
        [sys.executable, PROJECT / "refresherr.py", "-q", "--config", config, "--data-dir", folder]
        for folder in data_dirs
    )
    scan.append("scan")
    run += ["run", "--apply"]
    seconds(*scan)
    seconds(*run)
    alone, whole = alternate(runs, lambda: seconds(*scan), lambda: seconds(*run))
    table.row(f"run on {links:,} healthy links / scan", f"{whole / alone:.2f}", "1.10")
    table.note(f"scan {alone:.2f} s, run {whole:.2f} s")


def peaks(command: List[object]) -> Tuple[float, float, float]:
    """Run the program; return the peak memory in MB of itself, its worker, and after wait4.

    The first two are the kernel's VmHWM of the process and of its child, polled.  The worker is a
    fork, so that pages the two still share count in both.  The third is what wait4 says at the
    end: the larger of the two, where the worker was waited for.
    """
    process = subprocess.Popen([str(word) for word in command], stdin=QUIET, stdout=QUIET)
    high: Dict[str, int] = {}
    done = threading.Event()

    def poll() -> None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not done.wait(0.02):
            with contextlib.suppress(OSError):
                for pid in (str(process.pid), *children.read_text().split()):
                    status = Path(f"/proc/{pid}/status").read_text()
                    if "VmHWM:" in status:
                        high[pid] = int(status.split("VmHWM:")[1].split()[0])

    poller = threading.Thread(target=poll)
    poller.start()
    _, status, usage = os.wait4(process.pid, 0)
    done.set()
    poller.join()
    process.returncode = status
    if status:
        sys.exit(f"wait status {status}: {command}")
    own = high.pop(str(process.pid), 0)
    return own / 1024, max(high.values(), default=0) / 1024, usage.ru_maxrss / 1024


def descendants(pid: int) -> Set[int]:
    """Return the process and all that it has started, as far as they live."""
    found, pending = set(), [pid]
    while pending:
        pid = pending.pop()
        found.add(pid)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                pending += [int(word) for word in children.read_text().split()]
    return found


def proportional_mb(pid: int) -> float:
    """Return a process's memory in MB, of shared pages its share (Pss)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def peak_of_all(command: List[object]) -> float:
    """Run the program; return the peak in MB of what all its processes use together."""
    process = subprocess.Popen([str(word) for word in command], stdin=QUIET, stdout=QUIET)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(proportional_mb(pid) for pid in descendants(process.pid)))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"exit status {process.returncode}: {command}")
    return peak


def measure_million(table: Table, scratch: Path, links: int, runs: int) -> None:
    """The rescan of a very large library, and what memory it and the first scan take."""
    root, files = scratch / "media", scratch / "files"
    make_library(links, root, files, files)
    command = scan_command(scratch / "data", root)
    time.sleep(YOUNG)
    for what in ("first scan", "rescan", "rescan"):
        label = f"peak MB of all processes (Pss), {what} of {links:,} links"
        table.row(label, f"{peak_of_all(command):.0f}", "120", "70")
    find = ["find", root, "-xtype", "l"]
    cost(*find)
    found = paired(runs, lambda: cost(*find), lambda: cost(*command))
    table.pairs(f"unchanged rescan of {links:,} links / find", found, "0.5", "0.3")


@contextlib.contextmanager
def slow_library(scratch: Path, links: int) -> Iterator[Tuple[Path, Callable[[], FuseMount]]]:
    """A local library of links into a mount that takes 5 ms a request: (root, make the mount)."""
    root, files, mount = scratch / "media", scratch / "files", scratch / "mount"
    mount.mkdir()
    make_library(links, root, files, mount)
    yield root, lambda: FuseMount(mount, files, latency=0.005)


def measure_slow_mount(table: Table, scratch: Path, links: int, runs: int) -> None:
    """First scan against find, where each request takes 5 ms."""
    with slow_library(scratch, links) as (root, make_mount):
        fresh = (scratch / f"data-{number}" for number in itertools.count())

        def mounted(make_command: Callable[[], List[object]]) -> Cost:
            with make_mount():  # a new one each time, for the kernel keeps what it was told
                return cost(*make_command())

        found = paired(
            runs,
            lambda: mounted(lambda: scan_command(next(fresh), root)),
            lambda: mounted(lambda: ["find", root, "-xtype", "l"]),
        )
    label = f"first scan, 5 ms mount, {links:,} links: find / scan"
    table.row(label, f"{found.wall:.0f}", "25", "60")
    table.note(f"find {found.ours.wall:.1f} s, scan {found.base.wall:.2f} s")


def measure_hung_mount(table: Table, scratch: Path, links: int) -> None:
    """How long after the stall limit the program ends."""
    config = scratch / "refresherr.ini"
    config.write_text(f"[scan]\nstat_timeout = {STALL_LIMIT:.0f}s\n")
    config.chmod(0o600)
    with slow_library(scratch, links) as (root, make_mount):
        for what, delay in (("from the start", 0.0), ("in the middle of the scan", 0.3)):
            command = scan_command(scratch / f"data {what}", root, "--config", config)
            with make_mount() as mount:
                if not delay:
                    mount.hang()
                process = subprocess.Popen(
                    [str(word) for word in command], stdin=QUIET, stdout=QUIET, stderr=QUIET
                )
                if delay:
                    time.sleep(delay)
                    mount.hang()
                began = time.perf_counter()
                code = process.wait(timeout=120)
                late = time.perf_counter() - began - STALL_LIMIT
            label = f"hung {what}: seconds from limit to end"
            table.row(label, f"{late:+.2f}", "+2", "+0.5")
            table.note(f"stat_timeout {STALL_LIMIT:.0f} s, exit status {code}")


def measure_retarget(table: Table, scratch: Path, links: int) -> None:
    """Pointing links to where their files have moved, against a relink of as many."""
    library, new = CineSyncLibrary(scratch), scratch / "new"
    for number in range(links):
        part = Part(f"Show {number // 20}", 1990, 1, (number % 20 + 1,))
        library.copy(part, 1080)
        gone = os.readlink(library.library_link(part, 1080, broken=number % 20 > 0))
        moved = new / os.path.relpath(gone, library.mount)
        moved.parent.mkdir(parents=True, exist_ok=True)
        moved.write_bytes(b"video")
    places: List[object] = ["--base", library.base, "--root", library.media]
    places += ["--allow-target", library.mount, "--limit", links, "--min-age", 0, "--patience", 0]
    scan = scan_command(scratch / "data", library.media)
    program = scan[: scan.index("scan")]
    subprocess.call(list(map(str, scan)), stdin=QUIET, stdout=QUIET)  # an outage, says the guard
    seconds(*scan, "--accept-breakage")
    relinked = seconds(*program, "cinesync", "-q", "--apply", *places)
    seconds(*program, "undo", "-q", "--apply")
    preview = seconds(*program, "retarget", "-q", library.mount, new)
    moved_all = seconds(*program, "retarget", "-q", "--apply", library.mount, new)
    table.row(f"retarget of {links:,} links / cinesync", f"{moved_all / relinked:.2f}", "1.5", "1")
    broken = sum(not os.path.exists(path) for path in library.truth)
    table.row("    links that it left", str(broken), "0")
    table.note(f"cinesync {relinked:.2f} s, retarget {moved_all:.2f} s, preview {preview:.2f} s")


def measure_cinesync(table: Table, scratch: Path, links: int, items: int) -> None:
    """A run of cinesync against find in CineSync's tree and the scan; its second index."""
    library = CineSyncLibrary(scratch)
    library.fill(links, items=items)
    before = {path: os.readlink(path) for path in library.truth}
    places: List[object] = ["--base", library.base, "--root", library.media]
    places += ["--allow-target", library.mount, "--limit", links, "--min-age", 0, "--patience", 0]
    scan = scan_command(scratch / "data", library.media)
    program = scan[: scan.index("scan")]
    find = ["find", library.base, "-xtype", "l"]
    seconds(*find)  # warms the cache
    find_links, scanned = seconds(*find), seconds(*scan)
    whole = seconds(*program, "cinesync", "-q", "--apply", *places)
    ratio = whole / (find_links + scanned)
    table.row(f"cinesync, {items:,} items / (find + scan)", f"{ratio:.2f}", "3", "2")
    done = {path for path, text in before.items() if os.readlink(path) != text}
    table.row("    wrong matches", str(len(library.wrong())), "0")
    table.row("    repairable links that it left", str(len(library.repairable - done)), "0")
    table.note(f"find {find_links:.2f} s, scan {scanned:.2f} s, cinesync {whole:.2f} s")
    table.note(f"{len(done):,} links of {links:,} replaced")
    sys.path.insert(0, str(PROJECT))
    import refresherr

    def index() -> float:
        with contextlib.closing(refresherr.open_database(database)) as conn:
            began = time.perf_counter()
            refresherr.index_copies(conn, refresherr.ScanSettings(), str(library.base), False)
            return time.perf_counter() - began

    database = str(scratch / "data" / "symlinks.db")
    time.sleep(3)  # a directory as young as this would be listed again
    index()
    find_folders, again = alternate(5, lambda: seconds("find", library.base, "-type", "d"), index)
    label = "    its unchanged index / find -type d"
    table.row(label, f"{again / find_folders:.2f}", "1.3", "1")


def measure_start(table: Table, scratch: Path, runs: int) -> None:
    """refresherr.pyz --version against an interpreter that does nothing."""
    pyz = scratch / "refresherr.pyz"
    seconds(sys.executable, PROJECT / "build_zipapp.py", "-o", pyz)
    idle, version, sample = alternate(
        runs,
        lambda: seconds(sys.executable, "-c", "pass"),
        lambda: seconds(sys.executable, pyz, "--version"),
        lambda: seconds(sys.executable, pyz, "config", "sample"),
    )
    what = "refresherr.pyz --version / python3 -c pass"
    table.row(what, f"{version / idle:.2f}", "1.2", "1.0")
    table.note(
        f"pass {idle * 1000:.0f} ms, --version {version * 1000:.0f} ms, "
        f"a command that does nothing much (config sample) {sample * 1000:.0f} ms"
    )


# The program, but with one request after another, each over a connection of its own, and one
# server after the other: as it was before it kept connections and read servers side by side.
SERIAL = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import refresherr
refresherr.READERS = 1
refresherr.KEPT_ALIVE = -1
together = refresherr.ingest_instances
def one_by_one(conn, instances, *rest):
    return [line for one in instances for line in together(conn, [one], *rest)]
refresherr.ingest_instances = one_by_one
sys.exit(refresherr.main(sys.argv[1:]))
"""


def ingest_arguments(scratch: Path, name: str, *servers: Tuple[str, FakeArr]) -> List[object]:
    """Write a config for some servers; return the arguments that ingest them, last --data-dir."""
    config = scratch / f"{name}.ini"
    sections = [
        f"[{kind} n{number}]\nurl = {server.url}\napi_key = {server.api_key}\n"
        for number, (kind, server) in enumerate(servers)
    ]
    config.write_text("".join(sections))
    config.chmod(0o600)
    return ["--config", config, "ingest", "-q", "--data-dir"]


def measure_ingest(table: Table, scratch: Path, runs: int) -> None:
    """Sonarr at 20 ms a request, one server and six, against serial; memory, Radarr's too."""
    program: List[object] = [sys.executable, PROJECT / "refresherr.py"]
    serial: List[object] = [sys.executable, "-c", SERIAL, PROJECT]
    fresh = (scratch / f"data-{number}" for number in itertools.count())

    def fresh_seconds(command: List[object], arguments: List[object]) -> float:
        return seconds(*command, *arguments, next(fresh))

    with contextlib.ExitStack() as stack:
        servers = []
        for number in range(6):
            sonarr = stack.enter_context(FakeSonarr(scratch / f"tv{number}", latency=0.02))
            populate(sonarr)
            sonarr.can_files()
            servers.append(("sonarr", sonarr))
        for count, reach in ((1, "0.25"), (6, "0.12")):
            arguments = ingest_arguments(scratch, f"sonarr{count}", *servers[:count])
            one, several = alternate(
                runs if count == 1 else 1,
                functools.partial(fresh_seconds, serial, arguments),
                functools.partial(fresh_seconds, program, arguments),
            )
            what = f"ingest, {count} x 300 series, 12,000 files, 20 ms: ours / serial"
            table.row(what, f"{several / one:.3f}", reach)
            peak = max(server.peak for _, server in servers)
            table.note(f"serial {one:.1f} s, ours {several:.2f} s, {peak} at once to one server")
        own, _, _ = peaks([*program, *arguments, next(fresh)])
        table.row("peak MB, ingest of the six", f"{own:.0f}", "150", "60")
    with FakeRadarr(scratch / "movies") as radarr:
        populate_movies(radarr, 40_000)
        arguments = ingest_arguments(scratch, "radarr", ("radarr", radarr))
        own, _, _ = peaks([*program, *arguments, next(fresh)])
        table.row(f"peak MB, ingest of {len(radarr.movies):,} movies", f"{own:.0f}", "150", "60")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the scan and ingest.")
    parser.add_argument("--links", type=int, default=100_000)
    parser.add_argument(
        "--million", action="store_true", help="time and memory at 1,000,000 links, too"
    )
    parser.add_argument(
        "--cold", action="store_true", help="read requests with a cold cache, too; empties it"
    )
    parser.add_argument("--only-scan", action="store_true", help="nothing but the scan")
    parser.add_argument("--slow-links", type=int, default=5_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only-ingest", action="store_true", help="nothing but ingest")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # cleans up, as Ctrl-C does
    table = Table()
    table.row("what", "measured", "reach", "stretch")

    def scratch() -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="refresherr-benchmark-")

    if not args.only_scan:
        with scratch() as folder:
            measure_ingest(table, Path(folder), args.runs)
        if args.only_ingest:
            return
        with scratch() as folder:
            measure_start(table, Path(folder), max(args.runs, 20))
        with scratch() as folder:
            measure_cinesync(table, Path(folder), args.links // 5, args.links * 3 // 10)
        with scratch() as folder:
            measure_retarget(table, Path(folder), args.links // 5)
        with scratch() as folder:
            measure_run(table, Path(folder), args.links, max(args.runs, 5))
    with scratch() as folder:
        measure_scan(table, Path(folder), args.links, args.runs)
    reason = fuse_available()
    if reason:
        table.note(f"slow and hung mount skipped: {reason}")
    else:
        with scratch() as folder:
            measure_slow_mount(table, Path(folder), args.slow_links, args.runs)
        with scratch() as folder:
            measure_hung_mount(table, Path(folder), args.slow_links)
    if args.cold:
        with scratch() as folder:
            measure_cold(table, Path(folder), args.links // 5)
    if args.million:
        with scratch() as folder:
            measure_million(table, Path(folder), 1_000_000, args.runs)


if __name__ == "__main__":
    main()
