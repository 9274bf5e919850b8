"""The verdict: which losses are believed, as tables over plain values; no disk, no database.

Each row is one sentence of the five lines of defence.  The library is /lib, its targets lie on the
mount /m (FUSE), on the local disk /d or on the root file system.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import pytest

import refresherr as program
from refresherr import Ground, Loss, Lot

MOUNTS = ("/m", "/d", "/u", "/")
SHARE = 0.2


class Good(NamedTuple):
    """Good links: so many titles of so many links each, in folders of their own in `folder`."""

    folder: str
    titles: int
    links: int = 1
    name: str = "good"
    is_fresh: bool = False
    is_flat: bool = False  # files in `folder` itself; each link is a title


def mount_of(path: str) -> str:
    return next(mount for mount in MOUNTS if program.is_under(path, mount))


def lost(goal: str, missing: str = "", title: str = "", **known: Any) -> Loss:
    """Return a loss; without more words the folder of the file is missing with it."""
    missing = missing or goal.rpartition("/")[0]
    title = title or f"/lib/{missing.rpartition('/')[2]}"
    mount = mount_of(missing)
    facts = {"is_local": mount not in ("/m", "/u"), "was_good": True, **known}
    return Loss(f"/lib{goal}", title, goal, missing, mount, **facts)


def lose(folder: str, titles: int, links: int = 1, name: str = "gone", **known: Any) -> List[Loss]:
    """Return the losses of whole torrent folders directly in a folder that stands."""
    return [
        lost(f"{folder}/{name}{t}/{n}.mkv", **known) for t in range(titles) for n in range(links)
    ]


def lose_folder(missing: str, titles: int, links: int = 1, **known: Any) -> List[Loss]:
    """Return the losses of titles that one missing directory took along."""
    return [
        lost(f"{missing}/{t}/{n}.mkv", missing, f"/lib/{missing[1:]}{t}", **known)
        for t in range(titles)
        for n in range(links)
    ]


def ground_of(goods: Sequence[Good], **facts: Any) -> Ground:
    ground = Ground(**facts)
    for folder, titles, links, name, is_fresh, is_flat in goods:
        mount = mount_of(folder)
        for title in range(titles):
            place = folder if is_flat else f"{folder}/{name}{title}"
            for directory in program.ancestors(place):
                ground.good[directory] += links
                ground.fresh[directory] += links * is_fresh
                if is_flat:
                    ground.more_titles[directory] += links
                else:
                    ground.titles.setdefault(directory, set()).add(f"/lib/{folder}{name}{title}")
                if directory == mount:
                    break
    return ground


def judge(
    losses: Sequence[Loss], goods: Sequence[Good] = (), elsewhere: Sequence[Loss] = (),
    removed: Sequence[Loss] = (), lots: Sequence[Lot] = (), share: float = SHARE,
    accepted: Sequence[str] = (), **facts: Any,
) -> program.Verdicts:  # fmt: skip
    ground = ground_of(goods, **facts)
    return program.judge_losses(losses, elsewhere, removed, ground, lots, share, accepted)


def in_lot(losses: Sequence[Loss], lot: int = 1) -> List[Loss]:
    """Return losses as an earlier scan has left them, held by the guard."""
    return [loss._replace(doubt=program.GUARD, lot=lot) for loss in losses]


# --- The first three defences: one loss, and what is around it ----------------------------------

LOST = lost("/m/shows/A/1.mkv")
DEEP = lost("/m/all/A/S01/1.mkv", "/m/all")
FILE = lost("/m/shows/A/1.mkv", "/m/shows/A/1.mkv", "/lib/A")
UNION = lost("/u/shows/A/1.mkv")
LOCAL = lost("/d/shows/A/1.mkv")
NEIGHBOURS = [Good("/m/shows", 3), Good("/d/shows", 3), Good("/u/shows", 3)]
ROOT = lost("/srv/films/A/1.mkv", "/srv/films/A/1.mkv", "/lib/A")
UNMAPPED = lost("/mnt/zurg/A/1.mkv", "/mnt/zurg", "/lib/A")
BESIDE = [Good("/mnt/disk", 5)]

ROWS_OF_ONE: List[Tuple[str, Loss, Sequence[Good], Dict[str, Any], Optional[str], str]] = [
    ("a lone torrent among good ones", LOST, NEIGHBOURS, {}, None, ""),
    # 1 and 2: checks and remembered mounts
    ("beneath a failing point", LOST, NEIGHBOURS, {"unwell": {"/m": "away"}}, "mount", "/m"),
    ("beside a failing point", LOST, NEIGHBOURS, {"unwell": {"/m/sho": "away"}}, None, ""),
    ("the remembered mount went with the directory it was in",
     lost("/m/a/b/A/1.mkv", "/m/a"), [Good("/m/c", 3)], {"unwell": {"/m/a/b": "away"}},
     "mount", "/m/a/b"),
    ("a union without a branch", UNION, NEIGHBOURS, {"unions": {"/u": "its branch"}},
     "mount", "/u"),
    ("another mount than the union", LOST, NEIGHBOURS, {"unions": {"/u": "its branch"}}, None, ""),
    ("made of others while a check fails", LOST, NEIGHBOURS, {"failing": "/x is away"},
     "mount", "/m"),
    ("a plain local disk while a check fails", LOCAL, NEIGHBOURS, {"failing": "/x"}, None, ""),
    ("a failing point outranks a contradiction", LOST._replace(is_listed=True), NEIGHBOURS,
     {"unwell": {"/m": "away"}}, "mount", "/m"),
    # 2: empty directories
    ("local, empty, nothing good beside", lost("/d/shows/x/A/1.mkv", is_empty=True),
     [Good("/d/films", 3)], {}, "empty", "/d/shows/x"),
    ("local, empty, a good one beside it", lost("/d/shows/A/1.mkv", "/d/shows/A/1.mkv",
     is_empty=True), NEIGHBOURS, {}, None, ""),
    ("the root of a local mount is empty", lost("/d/A/1.mkv", is_empty=True), BESIDE,
     {}, "empty", "/d"),
    ("inside a living mount it proves nothing", FILE._replace(is_empty=True), NEIGHBOURS,
     {}, None, ""),
    ("nor where nothing good lies beside it", lost("/m/a/b/A/1.mkv", "/m/a/b/A/1.mkv", "/lib/A",
     is_empty=True), [Good("/m/c", 3)], {}, None, ""),
    ("the root of a network mount is empty", lost("/m/A/1.mkv", is_empty=True), NEIGHBOURS,
     {}, "empty", "/m"),
    ("what lies beside it in / speaks for no mount point", lost("/data/A/1.mkv", is_empty=True),
     [Good("/srv", 3)], {}, "empty", "/data"),
    # 3: contradiction, loops
    ("listed, but not to be looked up", LOST._replace(is_listed=True), NEIGHBOURS,
     {}, "contradiction", "/m/shows"),
    ("a loop needs no witness", LOST._replace(is_loop=True), [], {}, None, ""),
    ("a loop beneath a failing point", LOST._replace(is_loop=True), NEIGHBOURS,
     {"unwell": {"/m": "away"}}, "mount", "/m"),
    # 3: a witness
    ("no good target at all", LOST, [], {}, "witness", "/m/shows/A"),
    ("the nearest directory has a good one", LOST, [Good("/m/shows", 1)], {}, None, ""),
    ("the first one above to which two titles lead", FILE, NEIGHBOURS, {}, None, ""),
    ("that one has a good one, but it is not the first", lost("/m/a/b/A/1.mkv"),
     [Good("/m/c", 3)], {}, None, ""),
    ("a good target on another mount is none", LOST, [Good("/d/shows", 9)], {},
     "witness", "/m/shows/A"),
    ("two lost titles alone make it wide, nothing good above counts",
     lost("/m/a/b/A/1.mkv", "/m/a/b/A/1.mkv", "/lib/A"), [Good("/m/c", 3)],
     {"lost_titles": {"/m/a/b": {"/lib/A", "/lib/B"}}}, "witness", "/m/a/b"),
    ("a sentinel for the place", LOST, [], {"sentinels": ["/m/shows"]}, None, ""),
    ("a sentinel beneath the place", LOST, [], {"sentinels": ["/m/shows/x"]}, None, ""),
    ("a sentinel above the place speaks for its own directory", LOST, [], {"sentinels": ["/m"]},
     "witness", "/m/shows/A"),
    ("three levels up, good once", DEEP, NEIGHBOURS, {}, None, ""),
    ("three levels up, never good", DEEP._replace(was_good=False), NEIGHBOURS, {},
     "witness", "/m/all"),
    ("three levels up, never good, and a sentinel", DEEP._replace(was_good=False), NEIGHBOURS,
     {"sentinels": ["/m"]}, "witness", "/m/all"),
    ("two levels up, never good", lost("/m/all/A/1.mkv", "/m/all", was_good=False), NEIGHBOURS,
     {}, None, ""),
    # 3: the root file system, where what is not mounted leads
    ("a file beside a good one", ROOT, [Good("/srv/films/A", 1)], {}, None, ""),
    ("good once, a good film beside it", ROOT, [Good("/srv/films", 3)], {}, None, ""),
    ("good once, but it is / alone that is wide", lost("/srv/A/1.mkv", "/srv/A/1.mkv", "/lib/A"),
     [Good("/var", 3)], {}, "witness", "/srv/A"),
    ("never good: a file alone is missing, a good one beside its directory",
     lost("/mnt/zurg/1.mkv", "/mnt/zurg/1.mkv", "/lib/A", was_good=False), BESIDE, {}, None, ""),
    ("never good: a torrent in a directory on which nothing is mounted",
     lost("/mnt/zurg/A/1.mkv", was_good=False), BESIDE, {}, "witness", "/mnt/zurg/A"),
    ("never good: the same, empty, beside a disk",
     lost("/mnt/zurg/1.mkv", "/mnt/zurg/1.mkv", "/lib/A", was_good=False, is_empty=True), BESIDE,
     {}, None, ""),
    ("never good: a volume that is not mapped, nothing good beside it",
     UNMAPPED._replace(was_good=False), [Good("/srv", 3)], {}, "witness", "/mnt/zurg"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "goods", "facts", "defence", "directory"),
    [row[1:] for row in ROWS_OF_ONE],
    ids=[row[0] for row in ROWS_OF_ONE],
)
def test_what_the_first_three_defences_say(
    loss: Loss, goods: Sequence[Good], facts: Dict[str, Any], defence: Optional[str], directory: str
) -> None:
    ground = ground_of(goods, **facts)
    program.survey_losses([loss], ground)
    doubt = program.explain_loss(loss, ground)
    assert (doubt and doubt.defence) == defence
    assert doubt is None or doubt.directory == directory


@pytest.mark.parametrize(
    ("loss", "goods", "words"),
    [
        (UNMAPPED, [], "/mnt/zurg does not exist here: is the volume mapped into this container?"),
        (FILE, [], "nothing beneath /m/shows/A can be found"),
        (LOST._replace(is_listed=True), NEIGHBOURS, "/m/shows lists A, but it cannot be looked up"),
        (FILE._replace(is_local=True, is_empty=True), [],
         "/m/shows/A is empty: perhaps nothing is mounted there"),
    ],
)  # fmt: skip
def test_the_words_name_the_first_missing_directory(
    loss: Loss, goods: Sequence[Good], words: str
) -> None:
    doubt = program.explain_loss(loss, ground_of(goods))
    assert doubt
    assert words in doubt.reason


def test_a_place_ends_at_the_mount_point() -> None:
    ground = ground_of([Good("/d/shows", 3)])
    ground.titles["/"] = {"/lib/A", "/lib/B"}
    ground.good["/"] = 9
    assert program.find_place(FILE, ground) == "/m/shows/A"


def test_the_mount_point_itself_may_be_the_place() -> None:
    assert program.find_place(lost("/m/a/b/A/1.mkv"), ground_of([Good("/m/c", 3)])) == "/m"


WIDE_ROWS: List[Tuple[str, Dict[str, Any], bool]] = [
    ("one good title", {"titles": {"/m": {"A"}}}, False),
    ("two good titles", {"titles": {"/m": {"A", "B"}}}, True),
    ("two lost titles", {"lost_titles": {"/m": {"A", "B"}}}, True),
    ("one good, another lost", {"titles": {"/m": {"A"}}, "lost_titles": {"/m": {"B"}}}, True),
    ("one, of which some is lost", {"titles": {"/m": {"A"}}, "lost_titles": {"/m": {"A"}}}, False),
]


@pytest.mark.parametrize(
    ("facts", "is_wide"), [row[1:] for row in WIDE_ROWS], ids=[row[0] for row in WIDE_ROWS]
)
def test_where_links_of_two_titles_lead(facts: Dict[str, Any], is_wide: bool) -> None:
    assert Ground(**facts).is_wide("/m") == is_wide
    assert program.find_place(lost("/m/A/1.mkv", "/m/A/1.mkv"), Ground(**facts)) == (
        "/m" if is_wide else "/m/A"
    )


def test_a_wide_directory_speaks_for_itself() -> None:
    """Two titles that share a directory are gone from it while it stands: its neighbours are no
    witness, for a provider's folder that lists nothing looks the same.
    """
    pack = [lost(f"/m/p/{title}.mkv", f"/m/p/{title}.mkv", f"/lib/{title}") for title in "AB"]
    doubts = judge(pack, [Good("/m/shows", 9)]).doubts
    assert {doubt.defence for doubt in doubts.values()} == {"witness"} and len(doubts) == 2
    gone = [loss._replace(missing="/m/p") for loss in pack]  # the directory went with them
    assert not judge(gone, [Good("/m/shows", 9)]).doubts


def test_what_another_root_has_lost_makes_a_directory_wide() -> None:
    one, other = (lost(f"/m/a/b/{t}/1.mkv", f"/m/a/b/{t}/1.mkv", f"/lib/{t}") for t in "AB")
    assert not judge([one], [Good("/m/c", 9)]).doubts
    assert judge([one], [Good("/m/c", 9)], in_lot([other])).doubts


def test_a_flat_library_makes_a_directory_wide() -> None:
    assert program.find_place(FILE, ground_of([Good("/m/shows", 2, is_flat=True)])) == "/m/shows"


def test_what_is_known_of_one_link_goes_for_all_beneath_the_same_missing_directory() -> None:
    new = lost("/m/all/B/S01/1.mkv", "/m/all", "/lib/B", was_good=False)
    assert not judge([DEEP, new], NEIGHBOURS).doubts
    assert judge([new], NEIGHBOURS).doubts


# --- The loss guard: what is held --------------------------------------------------------------

ROWS_OF_GUARD: List[Tuple[str, Sequence[Loss], Sequence[Good], Dict[str, Any], List[str]]] = [
    # A single missing directory.
    ("it took three titles", lose_folder("/m/p/gone", 3), [Good("/m/p", 30)], {}, ["/m/p/gone"]),
    ("it took two", lose_folder("/m/p/gone", 2), [Good("/m/p", 30)], {}, []),
    ("it took two titles out of four directories",
     [lost(f"/m/p/gone/{d}/{t}.mkv", "/m/p/gone", f"/lib/{t}")
      for d, t in ("aA", "bA", "cB", "dB")],
     [Good("/m/p", 30)], {}, []),
    ("titles of which some is good count once",
     [*lose_folder("/m/p/gone", 3),
      *(lost(f"/m/p/x{t}/1.mkv", title=f"/lib//m/pgood{t}") for t in range(7))],
     [Good("/m/p", 51, 5)], {}, ["/m/p/gone"]),
    ("three titles that lay in two directories",
     [lost(f"/m/p/gone/{d}/{t}.mkv", "/m/p/gone", f"/lib/{t}") for d, t in ("aA", "bB", "bC")],
     [Good("/m/p", 30)], {}, []),
    ("a pack of 60 episodes", lose("/m/p", 1, 60), [Good("/m/p", 3)], {}, []),
    ("three of 61 titles of the place", lose_folder("/m/p/gone", 3), [Good("/m/p", 58)], {}, []),
    ("three of 60", lose_folder("/m/p/gone", 3), [Good("/m/p", 57)], {}, ["/m/p/gone"]),
    ("ten of a thousand", lose_folder("/m/p/gone", 10), [Good("/m/p", 990)], {}, ["/m/p/gone"]),
    ("nine of a thousand", lose_folder("/m/p/gone", 9), [Good("/m/p", 991)], {}, []),
    ("a flat library counts its links as titles of the place",
     lose_folder("/m/p/gone", 3), [Good("/m/p", 58, is_flat=True)], {}, []),
    ("titles that a defence explains are none of the place",
     [*lose_folder("/m/p/gone", 3), *lose("/m/p", 60, name="listed", is_listed=True)],
     [Good("/m/p", 20)], {}, ["/m/p/gone"]),
    ("files alone have no missing directory in common",
     [lost(f"/m/p/{t}/1.mkv", f"/m/p/{t}/1.mkv", f"/lib/{t}") for t in range(9)],
     [Good("/m/p", 300)], {}, []),
    # A share of what still stands.
    ("a fifth", lose("/m/p", 3, 2), [Good("/m/p", 8, 3)], {}, []),
    ("more than a fifth", lose("/m/p", 3, 2), [Good("/m/p", 1, 23)], {}, ["/m/p"]),
    ("more than a fifth, of two titles", lose("/m/p", 2, 3), [Good("/m/p", 1, 23)], {}, []),
    ("ten titles, a quarter of the share", lose("/m/p", 10), [Good("/m/p", 190)], {}, []),
    ("ten titles, more than that", lose("/m/p", 10), [Good("/m/p", 189)], {}, ["/m/p"]),
    ("nine titles, more than that", lose("/m/p", 9), [Good("/m/p", 170)], {}, []),
    ("at the mount point alone, spread over its directories",
     [loss for p in "abcd" for loss in lose(f"/m/{p}", 1, 5, name=p)],
     [Good(f"/m/{p}", 3, 5) for p in "abcd"], {}, ["/m"]),
    ("in one directory, while the mount as a whole is well",
     lose("/m/a", 3), [Good("/m/a", 3), Good("/m/b", 300)], {}, ["/m/a"]),
    ("a directory gone and a share elsewhere are one outage",
     [*lose_folder("/m/a/gone", 3), *lose("/m/b", 9)], [Good("/m/a", 9), Good("/m/b", 15)], {},
     ["/m/a/gone", "/m/b"]),
    ("another mount's good links are no counterweight",
     lose("/m/p", 3), [Good("/m/p", 3), Good("/d/p", 300)], {}, ["/m/p"]),
    ("named by the smallest directory that holds it all",
     lose("/m/a/b", 4), [Good("/m/a/b", 2), Good("/m/a/c", 2)], {}, ["/m/a/b"]),
    ("what a defence explains counts for neither side",
     [*lose("/m/p", 2), *lose("/m/p", 9, name="listed", is_listed=True)], [Good("/m/p", 4)], {},
     []),
    ("a loop counts for neither side",
     [*lose("/m/p", 2), *lose("/m/p", 9, name="loop", is_loop=True)], [Good("/m/p", 4)], {}, []),
    ("whose share is 100 % has no guard", lose("/m/p", 30), [Good("/m/p", 1)], {"share": 1.0}, []),
    # Links that were never judged.
    ("a half, all of them new", lose("/m/p", 9, is_fresh=True),
     [Good("/m/p", 9, is_fresh=True)], {}, []),
    ("more than a half, all new", lose("/m/p", 9, is_fresh=True),
     [Good("/m/p", 8, is_fresh=True)], {}, ["/m/p"]),
    ("ten titles, an eighth of them, all new", lose("/m/p", 10, is_fresh=True),
     [Good("/m/p", 70, is_fresh=True)], {}, []),
    ("ten titles, more than an eighth", lose("/m/p", 10, is_fresh=True),
     [Good("/m/p", 69, is_fresh=True)], {}, ["/m/p"]),
    ("a third, half of the links new",
     [*lose("/m/p", 3, is_fresh=True), *lose("/m/p", 1, name="x")],
     [Good("/m/p", 1, 5), Good("/m/p", 3, 1, "new", is_fresh=True)], {}, ["/m/p"]),
    ("a third of the known ones, among twice as many new ones", lose("/m/p", 4),
     [Good("/m/p", 8), Good("/m/p", 24, 1, "new", is_fresh=True)], {}, ["/m/p"]),
    ("a share above a half is not lowered for new ones", lose("/m/p", 9, is_fresh=True),
     [Good("/m/p", 5, is_fresh=True)], {"share": 0.7}, []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "goods", "facts", "directories"),
    [row[1:] for row in ROWS_OF_GUARD],
    ids=[row[0] for row in ROWS_OF_GUARD],
)
def test_what_the_guard_holds(
    losses: Sequence[Loss], goods: Sequence[Good], facts: Dict[str, Any], directories: List[str]
) -> None:
    verdicts = judge(losses, goods, **facts)
    assert sorted(unit.directory for unit in verdicts.units) == directories
    held = {loss.path for unit in verdicts.units for loss in unit.losses}
    guarded = {p for p, doubt in verdicts.doubts.items() if doubt.defence == program.GUARD}
    assert held == guarded
    judged = {loss.path for loss in losses if not (loss.is_listed or loss.is_loop)}
    if directories == ["/m/p/gone"]:
        judged = {loss.path for loss in losses if loss.missing == "/m/p/gone"}
    assert held == (judged if directories else set())
    assert len(directories) == len({verdicts.doubts[path].directory for path in held})


# --- The loss guard: what it holds already, and letting go --------------------------------------

LOT = Lot(1, "/m/p", 20, 20)
HELD = in_lot(lose("/m/p", 20))
PLENTY = [Good("/m/p", 500)]

ROWS_OF_LOTS: List[Tuple[str, Dict[str, Any], int]] = [
    ("all of it is still gone", {"losses": HELD}, 20),
    ("a fifth of it is still gone", {"losses": HELD[:4]}, 0),
    ("more than a fifth", {"losses": HELD[:5]}, 5),
    ("many links, of two titles", {"losses": in_lot(lose("/m/p", 2, 9))}, 0),
    ("many links, of three titles", {"losses": in_lot(lose("/m/p", 3, 3))}, 9),
    ("new links dilute nothing", {"losses": HELD[:5], "goods": [Good("/m/p", 1, 90000)]}, 5),
    ("what else is lost there meanwhile is none of it",
     {"losses": [*HELD[:1], *lose("/m/p", 9, name="new")]}, 0),
    ("what another root's scan holds counts", {"losses": HELD[:1], "elsewhere": HELD[1:]}, 1),
    ("removed links make it no smaller", {"losses": HELD[:1], "removed": HELD[1:]}, 1),
    ("what this scan explains by a mount is still gone",
     {"losses": [HELD[0], *(loss._replace(is_listed=True) for loss in HELD[1:])]}, 1),
    ("a link of it that leads elsewhere now is one of it still",
     {"losses": in_lot(lose("/m/q", 20)), "goods": [Good("/m/q", 500)]}, 20),
    ("a lot in the lot counts for it", {"losses": HELD[:1],
     "elsewhere": in_lot(lose("/m/p/sub", 9), 2), "lots": [LOT, Lot(2, "/m/p/sub", 9, 9)]}, 1),
    ("a lot beside it does not", {"losses": HELD[:1],
     "elsewhere": in_lot(lose("/m/p2", 9), 2), "lots": [LOT, Lot(2, "/m/p2", 9, 9)]}, 0),
    ("what is let go is judged like any other link",
     {"losses": HELD[:4], "goods": [Good("/m/p", 2)]}, 4),
    ("a lot that is forgotten holds nothing", {"losses": HELD, "lots": []}, 0),
    ("a guard that is switched off holds nothing more", {"losses": HELD, "share": 1.0}, 0),
    ("nor a lot that has grown", {"losses": HELD, "lots": [Lot(1, "/m/p", 5, 5)], "share": 1.0}, 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "held"), [row[1:] for row in ROWS_OF_LOTS], ids=[row[0] for row in ROWS_OF_LOTS]
)
def test_what_the_guard_lets_go(facts: Dict[str, Any], held: int) -> None:
    given = {"goods": PLENTY, "lots": [LOT], **facts}
    verdicts = judge(**given)
    guarded = [doubt for doubt in verdicts.doubts.values() if doubt.defence == program.GUARD]
    assert len(guarded) == held
    assert {doubt.directory for doubt in guarded} <= {"/m/p"}


def test_a_lot_that_is_let_go_is_named() -> None:
    lots = [LOT, Lot(2, "/d/p", 9, 9)]
    assert judge([*HELD[:3], *in_lot(lose("/d/p", 9), 2)], PLENTY, lots=lots).released == {1}


def test_new_losses_count_together_with_what_is_held() -> None:
    held, new = in_lot(lose("/m/p", 3)), lose("/m/p", 1, name="new")
    lots, goods = [Lot(1, "/m/p", 3, 3)], [Good("/m/p", 15)]
    assert not judge(new, goods).doubts
    for where in ({"losses": [*held, *new]}, {"losses": new, "elsewhere": held}):
        verdicts = judge(goods=goods, lots=lots, **where)  # type: ignore[arg-type]
        assert new[0].path in verdicts.doubts
        # The lot that it joins, not one of its own, which would be let go at once.
        assert [unit.directory for unit in verdicts.units] == ["/m/p"]
        assert verdicts.units[0].losses == new


def test_new_losses_in_a_missing_directory_count_together_with_what_is_held_of_it() -> None:
    titles = lose_folder("/m/p/gone", 3)
    goods, lots = [Good("/m/p", 30)], [Lot(1, "/m/p/gone", 2, 2)]
    verdicts = judge(titles[:1], goods, in_lot(titles[1:]), lots=lots)
    assert [unit.directory for unit in verdicts.units] == ["/m/p/gone"]


# --- What the user accepts ---------------------------------------------------------------------

BARE = lost("/d/x/A/1.mkv", is_empty=True, doubt=program.BARE)
UNSEEN = lost("/m/all/A/S01/1.mkv", "/m/all", was_good=False, doubt=program.NO_WITNESS)

ROWS_OF_ACCEPT: List[Tuple[str, Dict[str, Any], int]] = [
    ("what the guard held", {"losses": HELD, "accepted": ["/m/p"]}, 0),
    ("everything", {"losses": HELD, "accepted": ["/"]}, 0),
    ("that directory alone", {"losses": HELD, "accepted": ["/m/p/gone1"]}, 19),
    ("whole components only", {"losses": HELD, "accepted": ["/m/p/gon"]}, 20),
    ("the doubt about an empty directory", {"losses": [BARE], "accepted": ["/d/x"]}, 0),
    ("the doubt for want of a witness", {"losses": [UNSEEN], "accepted": ["/m/all"]}, 0),
    ("a directory beneath the missing one", {"losses": [UNSEEN], "accepted": ["/m/all/A"]}, 0),
    ("what this scan is the first to miss is held as ever",
     {"losses": lose("/m/p", 20), "goods": [Good("/m/p", 9)], "accepted": ["/m/p"]}, 20),
    ("a second outage is not accepted along with the first loss",
     {"losses": [*HELD, *lose("/m/p", 9, name="new")], "goods": [Good("/m/p", 9)],
      "accepted": ["/m/p"]}, 9),
    ("an empty directory that no scan has held", {"losses": [BARE._replace(doubt="")],
     "accepted": ["/d/x"]}, 1),
    ("an absent mount is no loss to accept",
     {"losses": HELD, "accepted": ["/m/p"], "unwell": {"/m": "away"}}, 20),
    ("nor is a contradiction",
     {"losses": [loss._replace(is_listed=True) for loss in HELD], "accepted": ["/m/p"]}, 20),
    ("accepted by an earlier scan",
     {"losses": [loss._replace(doubt=program.ACCEPTED, lot=None) for loss in HELD],
      "goods": [Good("/m/p", 9)]}, 0),
    ("accepted by an earlier scan, and the mount is away now",
     {"losses": [loss._replace(doubt=program.ACCEPTED, lot=None) for loss in HELD],
      "unwell": {"/m": "away"}}, 20),
    ("what was accepted is still gone: the rest of the lot is held on",
     {"losses": HELD[:4], "removed": HELD[4:]}, 4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "doubts"), [row[1:] for row in ROWS_OF_ACCEPT], ids=[row[0] for row in ROWS_OF_ACCEPT]
)
def test_what_the_user_accepts(facts: Dict[str, Any], doubts: int) -> None:
    given = {"goods": PLENTY, "lots": [LOT], **facts}
    assert len(judge(**given).doubts) == doubts


def test_accepted_losses_do_not_make_others_suspicious() -> None:
    new = lose("/m/p", 1, name="new")
    verdicts = judge([*HELD, *new], [Good("/m/p", 50)], lots=[LOT], accepted=["/m/p"])
    assert not verdicts.doubts
