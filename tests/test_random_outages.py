"""Random libraries, outages and losses: no healthy link is ever broken, no loss is missed.

REFRESHERR_TEST_SEED=N repeats the case of that seed; REFRESHERR_TEST_ROUNDS=N draws so many.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Set

import pytest
from conftest import Refresherr
from mounted_library import Cloud, MountedLibrary, strings

ROUNDS = int(os.environ.get("REFRESHERR_TEST_ROUNDS", "6"))
SEED = os.environ.get("REFRESHERR_TEST_SEED")
SEEDS = [int(SEED)] if SEED else list(range(1, ROUNDS + 1))

# Beyond these shares the loss guard holds what is away: (first scan ever, later), spec section 4.
SHARE_OF_ANY, SHARE_OF_TEN = (0.55, 0.25), (0.15, 0.07)


class Film(NamedTuple):
    """One link, and what it belongs to; a show has one for each episode."""

    link: Path
    title: str
    release: str  # the torrent's folder, relative to the mount
    category: str
    nested: bool


class Drawn:
    """A library drawn from a seed, with its mounts, and what happens to it."""

    def __init__(self, library: MountedLibrary, seed: int) -> None:
        self.dice = random.Random(seed)
        self.library = library
        self.films: Dict[str, List[Film]] = {}  # by mount, "" being the local disk
        self.clouds: Dict[str, Cloud] = {}
        self.scanned = False
        self.pending: Dict[str, Set[str]] = {}  # titles lost that no scan has found yet
        self.steps: List[str] = []
        self.roots = [library.media / f"root {n}" for n in range(self.dice.randint(1, 3))]
        for root in self.roots:
            root.mkdir()
        self.draw()

    def note(self, text: str) -> None:
        print(text)

    # Drawing the library

    def draw(self) -> None:
        for number in range(self.dice.randint(1, 3)):
            kind = self.dice.choice(["tmpfs", "fuse", "fuse"])
            name = f"cloud{number}"
            self.clouds[name] = self.library.add_cloud(kind, name, f"mnt{number}")
            self.note(f"{name} is a {kind}")
            for category in self.dice.sample(["", "shows", "__all__", "a/b", "kids"], 2):
                self.draw_category(name, category)
        self.draw_category("", "disk")

    def draw_category(self, mount: str, category: str) -> None:
        where = self.library.folder / "local" if not mount else self.clouds[mount].point
        where = where / category if category else where
        for number in range(self.dice.randint(8, 20)):
            title = f"{mount or 'disk'} {category.replace('/', '-')} {number:02d}"
            self.draw_title(mount, category, where, title)

    def draw_title(self, mount: str, category: str, where: Path, title: str) -> None:
        dice, root = self.dice, self.dice.choice(self.roots)
        nested = dice.random() < 0.2
        release = where / title.replace(" ", ".") / ("Season 1/Disc 1" if nested else "")
        episodes = dice.choice([1, 1, 1, 2, 4])
        chained, flat = dice.random() < 0.15, dice.random() < 0.2
        for number in range(episodes):
            name = f"{title} - S01E{number + 1:02d}.mkv"
            folder = "flat" if flat and episodes == 1 else f"{title}/Season 01"
            inside = os.path.relpath(str(root / folder / name), str(self.library.media))
            target = release / name
            if chained:
                self.library.file_of(target).parent.mkdir(parents=True, exist_ok=True)
                self.library.file_of(target).write_bytes(b"video")
                hop = self.library.folder / "hops" / name
                hop.parent.mkdir(exist_ok=True)
                hop.symlink_to(target)
                link = self.library.put(inside, hop, False)
                self.library.files[hop] = self.library.file_of(target)
            else:
                link = self.library.put(inside, target)
            top = f"{category}/{title.replace(' ', '.')}".lstrip("/")
            label = str(link) if flat and episodes == 1 else title
            self.films.setdefault(mount, []).append(Film(link, label, top, category, nested))

    # What is so at this moment

    def good(self, mount: str) -> List[Film]:
        return [film for film in self.films[mount] if str(film.link) not in self.library.lost]

    def is_mass(self, mount: str, away: Sequence[Film], root: Optional[Path] = None) -> bool:
        """Tell whether a scan (of one root) must hold these, by a margin."""
        seen = [film for film in away if root is None or root in film.link.parents]
        if not self.scanned:  # what is deep and was never good is no loss, so it is not counted
            seen = [film for film in seen if not film.nested]
        titles = len({film.title for film in seen})
        share = len(seen) / max(1, len(self.good(mount)))
        any_, ten = SHARE_OF_ANY[self.scanned], SHARE_OF_TEN[self.scanned]
        return (titles >= 3 and share > any_) or (titles >= 10 and share > ten)

    # What happens

    def lose_something(self) -> None:
        """Have one or two titles of each place be lost at most until a scan finds them."""
        for mount in self.films:
            pending = self.pending.setdefault(mount, set())
            while len(pending) < 2 and self.dice.random() < 0.5:
                choice = [film for film in self.good(mount) if self.may_be_lost(mount, film)]
                if not choice:
                    break
                self.lose(mount, self.dice.choice(choice))

    def may_be_lost(self, mount: str, film: Film) -> bool:
        """Keep good targets in each category; what was never good cannot be told if it is deep."""
        left = {other.title for other in self.good(mount) if other.category == film.category}
        return len(left) > 5 and (self.scanned or not film.nested)

    def lose(self, mount: str, film: Film) -> None:
        mates = [other for other in self.good(mount) if other.release == film.release]
        if len(mates) > 1 and self.dice.random() < 0.5:
            mates = [film]
            self.library.lose([film.link])
        else:
            self.library.lose([mate.link for mate in mates])
            base = self.clouds[mount].backend if mount else self.library.folder / "local"
            shutil.rmtree(str(base / film.release))
        self.pending[mount].add(film.title)
        self.note(f"lost: {len(mates)} links of {film.title} on {mount or 'the disk'}")

    def begin_outage(self, mount: str) -> Optional[List[Film]]:
        """Begin one; return what is away, None where nothing of the mount is to be seen."""
        cloud, dice = self.clouds[mount], self.dice
        fuse = cloud.point != cloud.backend
        kinds = ["partial", "partial", "category", "whole"]
        if fuse:
            kinds += ["listed", "error", "whole", "partial 404"]
        kind = dice.choice(kinds)
        self.note(f"outage of {mount}: {kind}")
        if kind == "whole":
            self.whole_outage(cloud)
            return None
        releases = sorted({film.release for film in self.good(mount)})
        if kind == "category":
            return self.hide_category(mount) or self.hide_part(mount, releases, cloud.hide)
        if kind == "partial":
            return self.hide_part(mount, releases, cloud.hide)
        if kind == "partial 404":
            return self.hide_part(
                mount,
                releases,
                lambda names: cloud.fuse.fail_beneath(dict.fromkeys(names, errno.ENOENT)),
            )
        some = dice.sample(releases, dice.randint(1, len(releases)))
        code = errno.ENOENT if kind == "listed" else dice.choice([errno.EIO, errno.EACCES])
        cloud.fuse.fail_paths(dict.fromkeys(some, code))
        self.note(f"  {len(some)} folders answer {errno.errorcode[code]}")
        return []

    def whole_outage(self, cloud: Cloud) -> None:
        if cloud.point == cloud.backend:
            cloud.close()
            return
        ways: List[Callable[[], None]] = [
            cloud.close,
            cloud.fuse.kill,
            cloud.fuse.empty,
            lambda: cloud.fuse.fail(errno.EIO, include_root=True),
            lambda: cloud.fuse.fail(errno.EIO),
        ]
        self.dice.choice(ways)()

    def hide_category(self, mount: str) -> Optional[List[Film]]:
        """Hide a whole directory of torrents, where it is one that cannot be a torrent itself."""
        names = sorted({film.category for film in self.films[mount]} - {""})
        if not names:
            return None
        name = self.dice.choice(names)
        away = [film for film in self.good(mount) if film.category == name]
        if len({film.title for film in away}) < 5 or not self.is_mass(mount, away):
            return None
        self.clouds[mount].hide([name])
        return away

    def hide_part(
        self, mount: str, releases: List[str], hide: Callable[[List[str]], None]
    ) -> List[Film]:
        count = len(releases) // 5
        while True:
            some = set(self.dice.sample(releases, count))
            away = [film for film in self.good(mount) if film.release in some]
            if self.is_mass(mount, away) or count == len(releases):
                break
            count += 1
        hide(sorted(some))
        self.note(f"  {len(away)} of {len(self.good(mount))} links away")
        return away

    def end_outage(self, mount: str) -> None:
        cloud = self.clouds[mount]
        if cloud.point == cloud.backend:
            cloud.show()
            cloud.fs.mount()  # does nothing where it is mounted still
            self.library.bring_back(film.link for film in self.good(mount))
            return
        cloud.close()
        cloud.hidden = []
        cloud.fs.mount()

    # Scans

    def outage(self, mount: str) -> None:
        """Scan once or more in an outage; `MountedLibrary.scan` asserts what must hold."""
        away = self.begin_outage(mount)
        for turn in range(self.dice.randint(1, 2)):
            self.lose_something_elsewhere(mount)
            roots = self.roots
            single = [root for root in roots if away is None or self.is_mass(mount, away, root)]
            if turn and single and self.dice.random() < 0.5:
                roots = [self.dice.choice(single)]
            scan = self.library.scan(roots=roots)
            self.note(f"  scan of {len(roots)} roots: {scan['exit_code']} {scan['totals']}")
            self.scanned = self.scanned or roots == self.roots
            if away:
                assert scan["exit_code"] == 4
                assert strings(film.link for film in away) <= self.library.having("unreachable")
        self.end_outage(mount)
        if self.dice.random() < 0.3:
            self.library.scan(roots=[self.dice.choice(self.roots)])

    def lose_something_elsewhere(self, mount: str) -> None:
        """The same, on mounts whose files can be removed at this moment."""
        kept = self.films
        self.films = {name: films for name, films in kept.items() if name != mount}
        self.lose_something()
        self.films = kept

    def quiet(self) -> None:
        """All is whole: everything lost is found, whatever was before."""
        scan = self.library.scan(roots=self.roots)
        self.note(f"quiet: {scan['exit_code']} {scan['totals']} {scan['guard']}")
        self.scanned = True
        assert self.library.having("broken") == self.library.lost
        assert self.library.having("unreachable") == set() and scan["exit_code"] == 0
        self.pending.clear()

    def mass_loss(self) -> None:
        """What is truly gone in mass is held until the user accepts it, and no longer."""
        mount = self.dice.choice(list(self.clouds))
        releases = sorted({film.release for film in self.good(mount)})
        gone: List[str] = []
        lost = self.hide_part(mount, releases, gone.extend)
        for name in gone:
            shutil.rmtree(str(self.clouds[mount].backend / name))
        self.library.lost |= strings(film.link for film in lost)
        for _ in range(2):
            scan = self.library.scan(roots=self.roots)
            assert scan["exit_code"] == 4
            assert self.library.having("unreachable") == strings(film.link for film in lost)
        self.library.scan("--accept", self.clouds[mount].point, roots=self.roots)
        self.quiet()


@pytest.mark.parametrize("seed", SEEDS)
def test_random_outages(tmp_path: Path, refresherr: Refresherr, seed: int) -> None:
    print(f"repeat with REFRESHERR_TEST_SEED={seed}")
    library = MountedLibrary(tmp_path, refresherr)
    with library.stack:
        drawn = Drawn(library, seed)
        if drawn.dice.random() < 0.5:
            library.settle()
        for _ in range(drawn.dice.randint(3, 4)):
            if drawn.dice.random() < 0.7:
                drawn.outage(drawn.dice.choice(list(drawn.clouds)))
            drawn.lose_something()
            drawn.quiet()
        if drawn.dice.random() < 0.5:
            drawn.mass_loss()
