"""Makes a library, and CineSync's tree beside it, in all the layouts that CineSync knows.

Every file on the mount is told apart by its content; `truth` says what each link must show.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Set, Tuple

HEIGHTS = (1080, 1080, 1080, 720, 2160, 480)
TOPS = ("Shows", "AnimeShows", "KidsShows", "4KShows")
MOVIE_TOPS = ("Movies", "AnimeMovies", "KidsMovies", "4KMovies")
LEVELS = ("", "", "UltraHD", "FullHD", "SDClassics", "4KRemux")
WORDS = (
    "Harbour", "Amber", "Silent", "Iron", "Paper", "Winter", "Broken", "Golden", "Second", "Hidden",
    "Distant", "Copper", "Velvet", "Northern", "Hollow", "Crimson", "Endless", "Quiet", "Burning",
    "Crystal",
)  # fmt: skip
THINGS = (
    "Lights", "Comet", "River", "Garden", "Letters", "Throne", "Station", "Mirror", "Orchard",
    "Signal", "Empire", "Shadows", "Voyage", "Archive", "Kingdom", "Harvest", "Machine", "Island",
    "Choir", "Frontier",
)  # fmt: skip


class Part(NamedTuple):
    """One thing to watch: a movie, or some episodes of a series."""

    title: str
    year: int
    season: int = -1
    episodes: Tuple[int, ...] = ()
    date: str = ""

    @property
    def code(self) -> str:
        if self.date:
            return self.date
        return f"S{self.season:02d}" + "".join(f"E{number:02d}" for number in self.episodes)


class CineSyncLibrary:
    """`media` is the library, `base` CineSync's tree, `mount` what both point into."""

    def __init__(
        self, folder: Path, seed: int = 1, top: str = "CineSync", mount: str = "mount"
    ) -> None:
        self.media, self.mount = folder / "media", folder / mount
        self.dest = folder / "dest"
        self.base = self.dest / top if top else self.dest
        self.random = random.Random(seed)
        self.truth: Dict[str, Tuple[Part, int]] = {}  # a link of the library: what it shows
        self.files: Dict[str, Tuple[Part, int]] = {}  # a file on the mount: what it is
        self.repairable: Set[str] = set()
        self.copied: Set[Part] = set()
        self.made: Set[str] = set()
        self.items = 0
        for path in (self.media, self.mount, self.base):
            path.mkdir(parents=True, exist_ok=True)

    def file(self, name: str, part: Part, height: int, exists: bool = True) -> Path:
        path = self.mount / name
        self._make_folder(path)
        if exists:
            path.write_bytes(name.encode())
        self.files[str(path)] = (part, height)
        return path

    def _make_folder(self, path: Path) -> None:
        folder = os.path.dirname(path)
        if folder not in self.made:
            os.makedirs(folder, exist_ok=True)
            self.made.add(folder)

    def release(self, part: Part, height: int, group: str = "GRP") -> str:
        """Return the name under which a release lies on the mount."""
        dots = part.title.replace(" ", ".").replace(":", "")
        if part.season < 0:
            name = f"{dots}.{part.year}.{height}p.BluRay.x264-{group}"
            return f"movies/{name}/{name}.mkv"
        code = part.date.replace("-", ".") or part.code
        pack = f"{dots}.{part.year}.S{max(0, part.season):02d}.{height}p.WEB-{group}"
        return f"shows/{pack}/{dots}.{part.year}.{code}.{height}p.WEB-{group}.mkv"

    def link(self, path: str, target: object) -> str:
        full = self.media / path
        self._make_folder(full)
        os.symlink(str(target), full)
        return str(full)

    def library_link(self, part: Part, height: int, broken: bool, name: str = "") -> str:
        """Make the library's link to a part, as Sonarr and Radarr do."""
        file = self.file(self.release(part, height, "OLD"), part, height, exists=not broken)
        title = f"{part.title} ({part.year})"
        shown = f"{title}/{title} Bluray-{height}p.mkv"
        if part.season >= 0:
            folder = f"Season {part.season:02d}" if part.season else "Specials"
            code = part.date or part.code
            shown = f"{title}/{folder}/{part.title} - {code} - Name WEBDL-{height}p.mkv"
        shown = ("movies/" if part.season < 0 else "tv/") + (name or shown)
        path = self.link(shown, file)
        self.truth[path] = (part, height)
        return path

    def copy(
        self, part: Part, height: int, tag: str = "", level: str = "", raw: bool = True,
        exists: bool = True, folder: str = "",
    ) -> Path:  # fmt: skip
        """Make CineSync's link to a part, and the file on the mount that it leads to."""
        name = self.release(part, height)
        file = self.file(name, part, height, exists)
        title = f"{part.title} ({part.year}){tag}"
        index = len(part.title) % 4
        if part.season < 0:
            below = Path(folder or MOVIE_TOPS[index], level, title)
            shown = f"{part.title} ({part.year}) {height}p.mkv"
        else:
            below = Path(folder or TOPS[index], level, title, f"Season {part.season}")
            code = part.date or f"S{part.season:02d}E{part.episodes[0]:02d}"  # the first one only
            shown = f"{part.title} - {code} - Name[{height}p]-GRP.mkv"
        return self.item(below / (os.path.basename(name) if raw else shown), file)

    def item(self, name: Path, target: Path) -> Path:
        path = self.base / name
        self._make_folder(path)
        os.symlink(target, path)
        self.items += 1
        return path

    def fill(self, links: int, broken_every: int = 20, items: Optional[int] = None) -> None:
        """Make so many links, each `broken_every`th broken, with copies and with traps."""
        count, number = 0, 0
        while count < links:
            title = f"{WORDS[number % 20]} {THINGS[number // 20 % 20]}"
            title += f" {number // 400 + 1}" if number >= 400 else ""
            count += self._fill_title(title, number, count, broken_every)
            number += 1
        for extra in range(max(0, (items or 0) - self.items)):
            show = Part(f"Filler {extra // 40}", 1990, 1, (extra % 40 + 1,))
            self.copy(show, 720)

    def _fill_title(self, title: str, number: int, count: int, every: int) -> int:
        choose = self.random.choice
        year = 1950 + number % 70
        tag = choose(("", "", f" {{tmdb-{number + 10}}}", f" {{imdb-tt{number + 1000000}}}",
            f" [tmdbid-{number + 10}]", f" {{tvdb-{number + 5}}}"))  # fmt: skip
        if number % 3 == 0:
            parts = [Part(title, year)]
            remake = Part(title, year + 20)
            self.copy(remake, 1080, level=choose(LEVELS))  # same title, another year
        else:
            parts = [Part(title, year, 1, (n,)) for n in range(1, 9)]
            parts += [Part(title, year, 1, (9, 10)), Part(title, year, 0, (1,))]
            parts += [Part(title, year, 2, date=f"2024-01-{n:02d}") for n in (5, 6)]
            remakes = [Part(title, year + 20, 1, (n,)) for n in (1, 2)]
            for remake in remakes:
                self.copy(remake, 1080, level=choose(LEVELS))
        level, raw = choose(LEVELS), choose((True, False))
        folder = ""
        if number % 15 == 0:
            folder = f"Movie Collections/{title} Collection {{tmdb-{number + 10}}}"
            tag = tag and f" {{tmdb-{number + 10}}}"
            level = ""
        self._traps(title, year, number)
        for offset, part in enumerate(parts):
            height = choose(HEIGHTS)
            broken = (count + offset) % every == 0
            path = self.library_link(part, height, broken)
            if self.random.random() < 0.15:
                continue  # CineSync has no copy of this one
            heights = [height] if self.random.random() < 0.7 else [choose(HEIGHTS)]
            for copy_height in heights:
                self.copy(part, copy_height, tag, level, raw, folder=folder)
            if broken and any(self.fits(height, other) for other in heights):
                self.repairable.add(path)
        return len(parts)

    @staticmethod
    def fits(own: int, other: int) -> bool:
        return not (own >= 720 > other) and not (other >= 2160 > own)

    def _traps(self, title: str, year: int, number: int) -> None:
        if number % 7 == 0:
            sport = Part("Sport", 2024)
            goal = self.file(f"sports/{number}.mkv", sport, 1080)
            event = f"{title} - S01E01 - 1080p.mkv"
            self.item(Path("Sports", title, "Season 2024", f"Event {number}", event), goal)
            self.item(Path("Sports", f"{title} ({year})", "Season 1", event), goal)
        if number % 5 == 0:
            extra = Part("Extra", 2024)
            goal = self.file(f"extras/{number}.mkv", extra, 1080)
            show, movie = f"Shows/{title} ({year})", f"Movies/{title} ({year})"
            self.item(Path(show, "Extras", f"{title} - S01E02 - Making of.mkv"), goal)
            self.item(Path(movie, "Extras", f"{title} ({year}) 1080p.mkv"), goal)
            self.item(Path(movie, f"{title} ({year})-trailer.mkv"), goal)
        if number % 4 == 0:
            text = self.file(f"subs/{number}.srt", Part("Subtitle", 1), 0)
            for name in (f"{title} - S01E01 - Name[1080p].en.srt", f"{title} - S01E02.srt"):
                self.item(Path("Shows", f"{title} ({year})", "Season 1", name), text)
            self.item(Path("Movies", f"{title} ({year})", f"{title} ({year}).srt"), text)

    def wrong(self) -> List[str]:
        """Return the links that lead to something else than they must show."""
        found = []
        for path, (part, _) in self.truth.items():
            target = os.readlink(path)
            if self.files[target][0] != part:
                found.append(f"{path} -> {target}")
        return found
