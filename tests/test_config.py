"""Settings: where they come from, which one wins, what is refused, and that no secret is shown."""

from __future__ import annotations

import configparser
import io
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional
from unittest import mock

import pytest
from conftest import PROGRAM, Library, Refresherr, Result

import refresherr as program

SECRET = "S3CRET"
WriteConfig = Callable[[str], Path]

EXAMPLE = """\
[refresherr]
data_dir = /data
apply = no

[scan]
roots =
    /opt/media/tv
    /opt/media/movies
mount_checks =
    /mnt/remote/realdebrid
ignore =
    cinesync
    *.partial
ignore_defaults = yes
workers = auto
stat_timeout = 30s
max_new_broken = 20%

[sonarr tv]
url = http://sonarr:8989
api_key = ...
roots = /opt/media/tv
path_map = /opt/media/tv => /tv

[radarr 4k]
url = http://radarr-4k:7878
api_key_file = {key_file}
roots = /opt/media/4k

[relay]
base = http://research-relay:5050
token = ...
routes =
    /opt/media/doc => radarr_doc

[repair]
min_age = 1h
patience = 48h
cooldown = 6h
max_attempts = 3
season_threshold = 2
limit = 25
unmonitored = yes

[cinesync]
base = /opt/media/cinesync/CineSync
roots = /opt/media/tv, /opt/media/movies
allowed_targets = /mnt/remote
limit = 200

[notify]
discord = https://...
ntfy = https://ntfy.sh/topic
ntfy_token = ...
apprise = http://apprise:8000/notify/KEY
webhook = https://...
healthchecks = https://hc-ping.com/UUID
uptime_kuma = https://kuma.example/api/push/TOKEN
when = changes

[plex]
url = http://plex:32400
token = ...
path_map = /opt/media => /data

[jellyfin]
url = http://jellyfin:8096
api_key = ...

[emby]
url = http://emby:8096
api_key = ...
"""

REPAIR: Dict[str, Any] = {
    "min_age": 3600, "patience": 172800, "cooldown": 21600, "max_attempts": 3,
    "season_threshold": 2, "limit": 25, "unmonitored": True,
}  # fmt: skip


def run(*words: object, env: Optional[Dict[str, str]] = None) -> Result:
    """Run main() in this process, with this environment and nothing else in it."""
    out, err = io.StringIO(), io.StringIO()
    environ = mock.patch.dict(os.environ, env or {}, clear=True)
    with environ, redirect_stdout(out), redirect_stderr(err):
        code = program.main([str(word) for word in words])
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Result]:
    """Return a function that runs `config ACTION` with a file of this text (None: no file)."""

    def call(action: str, text: Optional[str], *words: str, **env: str) -> Result:
        flags: List[str] = []
        if text is not None:
            file = tmp_path / "refresherr.ini"
            file.write_text(text, encoding="utf-8")
            file.chmod(0o600)
            flags = ["--config", str(file)]
        return run(*flags, "config", action, *words, env={"HOME": str(tmp_path), **env})

    return call


Config = Callable[..., Result]


def settings(result: Result) -> Dict[str, Any]:
    assert result.code == 0, result.err
    shown: Dict[str, Any] = result.json["settings"]
    return shown


def refusal(result: Result) -> str:
    """Return the one line of a configuration error."""
    assert result.code == 2, result
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert "Traceback" not in line
    return line


# --- Precedence and places -------------------------------------------------------------------


def test_flags_beat_the_environment_the_file_and_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "x.ini"
    file.write_text("[refresherr]\ndata_dir = /from/file\n")
    words, env = ["db", "path"], {"HOME": str(tmp_path)}
    assert run(*words, env=env).out == "/data/symlinks.db\n"
    words = ["--config", str(file), *words]
    assert run(*words, env=env).out == "/from/file/symlinks.db\n"
    env["DATA_DIR"] = "/from/env"
    assert run(*words, env=env).out == "/from/env/symlinks.db\n"
    assert run(*words, "--data-dir", "/from/flag", env=env).out == "/from/flag/symlinks.db\n"
    assert run(*words, "--db", "/from/db.sqlite", env=env).out == "/from/db.sqlite\n"


def test_roots_from_the_command_line_the_environment_and_the_file(
    refresherr: Refresherr, library: Library, write_config: WriteConfig, tmp_path: Path
) -> None:
    roots = [str(tmp_path / name) for name in ("file", "env, too", "flag")]
    for root in roots:
        os.mkdir(root)
    write_config(f"[scan]\nroots = {roots[0]}\n")

    def scanned(*words: str) -> List[str]:
        return [root["path"] for root in refresherr.scan(*words)["roots"]]

    assert scanned() == roots[:1]
    refresherr.env["SCAN_ROOTS"] = roots[1]
    assert scanned() == roots[1:2]
    assert scanned(roots[2]) == roots[2:]


def test_the_first_config_file_found_is_read(tmp_path: Path) -> None:
    home, etc, app = tmp_path / "home", tmp_path / "etc", tmp_path / "app"
    copy = app / "refresherr.py"
    places = [
        tmp_path / "flag.ini",
        tmp_path / "own.ini",
        tmp_path / "container.ini",
        app / "refresherr.ini",
        home / ".config" / "refresherr" / "refresherr.ini",
        etc / "refresherr.ini",
    ]
    for number, place in enumerate(places):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"[refresherr]\ndata_dir = /place/{number}\n")
    shutil.copy(str(PROGRAM), str(copy))
    # A mount namespace of its own, so that /etc is ours.
    script = 'mount --bind "$0" /etc && exec "$@"'
    prefix = ["unshare", "-m", "sh", "-c", script, str(etc)]
    if subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("no mount namespaces here")
    env = {"PATH": os.environ["PATH"], "HOME": str(home)}
    env.update(REFRESHERR_CONFIG=str(places[1]), CONFIG_FILE=str(places[2]))
    for number in range(len(places) + 1):
        words = [sys.executable, str(copy), "db", "path"]
        if number == 0:
            words += ["--config", str(places[0])]
        done = subprocess.run([*prefix, *words], env=env, stdout=subprocess.PIPE, check=True)
        expected = f"/place/{number}" if number < len(places) else "/data"
        assert done.stdout.decode() == f"{expected}/symlinks.db\n"
        if number < len(places):
            places[number].unlink()
        if number in (1, 2):
            del env["REFRESHERR_CONFIG" if number == 1 else "CONFIG_FILE"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "absent.ini"),
        (b"[scan]\nroots = /\xff\n", "UTF-8"),
        (b"[scan]\nworkers = 1\n[scan]\nworkers = 2\n", "line 3 has [scan] a second time"),
        (b"[scan]\nworkers = 1\nworkers = 2\n", "line 3 has [scan] workers a second time"),
        (b"[scan\nworkers = 1\n", "line 1 is no 'key = value'"),
        (b"[scan]\n\nworkers\n", "line 3 is no 'key = value'"),
        (b"workers = 1\n", "line 1 is no 'key = value' below a [section]"),
        (b"[DEFAULT]\nworkers = 1\n", "DEFAULT"),
    ],
)
def test_a_file_that_is_no_config_file(
    tmp_path: Path, content: Optional[bytes], words: str
) -> None:
    file = tmp_path / "absent.ini"
    if content is not None:
        file.write_bytes(content)
    assert words in refusal(run("--config", file, "broken"))
    assert "config" in refusal(run("--config", tmp_path, "broken"))  # a directory


def test_windows_line_ends_and_a_byte_order_mark(config: Config) -> None:
    shown = settings(config("show", "\ufeff[repair]\r\nlimit = 7\r\n", "--json"))
    assert shown["repair"]["limit"] == 7


# --- What is accepted ------------------------------------------------------------------------


def test_the_example_of_the_specification(config: Config, tmp_path: Path) -> None:
    key_file = tmp_path / "radarr_4k"
    key_file.write_text("key\n")
    text = EXAMPLE.format(key_file=key_file)
    assert config("check", text).code == 0
    shown = settings(config("show", text, "--json"))
    assert shown["refresherr"]["data_dir"] == "/data"
    assert shown["refresherr"]["apply"] is False
    scan = dict(shown["scan"])
    assert scan.pop("workers") in (0, "auto")
    assert scan == {
        "roots": ["/opt/media/tv", "/opt/media/movies"],
        "mount_checks": ["/mnt/remote/realdebrid"],
        "ignore": ["cinesync", "*.partial"],
        "ignore_defaults": True,
        "stat_timeout": 30,
        "max_new_broken": 0.2,
    }
    assert shown["sonarr_tv"] == {
        "url": "http://sonarr:8989",
        "api_key": "***",
        "roots": ["/opt/media/tv"],
        "path_map": {"/opt/media/tv": "/tv"},
        "skip_tags": [],
        "ca_file": "",
        "headers": [],
    }
    assert shown["radarr_4k"]["roots"] == ["/opt/media/4k"]
    assert shown["radarr_4k"]["api_key"] == "***"
    assert shown["relay"] == {
        "base": "http://research-relay:5050",
        "token": "***",
        "routes": {"/opt/media/doc": "radarr_doc"},
    }
    assert REPAIR.items() <= shown["repair"].items()
    assert shown["cinesync"] == {
        "base": "/opt/media/cinesync/CineSync",
        "roots": ["/opt/media/tv", "/opt/media/movies"],
        "allowed_targets": ["/mnt/remote"],
        "limit": 200,
    }
    assert shown["notify"]["when"] == "changes"
    assert shown["plex"]["path_map"] == {"/opt/media": "/data"}
    assert shown["jellyfin"]["url"] == "http://jellyfin:8096"
    assert shown["emby"]["url"] == "http://emby:8096"


def test_the_defaults_are_those_of_the_example(config: Config) -> None:
    shown = settings(config("show", None, "--json"))
    assert (shown["scan"]["stat_timeout"], shown["scan"]["max_new_broken"]) == (30, 0.2)
    assert REPAIR.items() <= shown["repair"].items()
    assert shown["refresherr"]["apply"] is False
    assert shown["cinesync"]["limit"] == 200
    assert shown["notify"]["when"] == "changes"


@pytest.mark.parametrize(
    ("section", "key", "text", "value"),
    [
        ("repair", "min_age", "90", 90),
        ("repair", "min_age", "15m", 900),
        ("repair", "min_age", "6h", 21600),
        ("repair", "min_age", "2d", 172800),
        ("scan", "stat_timeout", "30s", 30),
        ("scan", "roots", "/a, /b,/c", ["/a", "/b", "/c"]),
        ("scan", "roots", "\n  /a\n  /b/\n", ["/a", "/b"]),
        ("scan", "roots", "/opt/Movies, HD", ["/opt/Movies, HD"]),
        ("scan", "roots", "\n  /opt/Movies, HD\n  /opt/tv", ["/opt/Movies, HD", "/opt/tv"]),
        ("scan", "roots", "/opt/Movies, HD, /opt/tv", ["/opt/Movies, HD", "/opt/tv"]),
        ("scan", "roots", "/opt/100%", ["/opt/100%"]),
        ("scan", "roots", "/opt/%(x)s", ["/opt/%(x)s"]),
        ("scan", "ignore", "cinesync, @eaDir", ["cinesync", "@eaDir"]),
        ("scan", "ignore", "\n  a, b\n  *.tmp", ["a, b", "*.tmp"]),
        ("scan", "max_new_broken", "12.5%", 0.125),
        ("scan", "max_new_broken", "100%", 1),
        ("scan", "max_new_broken", "0%", 0),
        ("scan", "workers", "8", 8),
        ("scan", "workers", "256", 256),
        ("plex", "path_map", "/opt/media => /data", {"/opt/media": "/data"}),
        ("plex", "path_map", "\n  /a => /x\n  /b, c => /y/", {"/a": "/x", "/b, c": "/y"}),
        ("relay", "routes", "/a => one, /a/b=two", {"/a": "one", "/a/b": "two"}),
        ("notify", "when", "Always", "always"),
        ("relay", "base", "http://relay:5050/", "http://relay:5050"),
    ]
    + [("refresherr", "apply", word, True) for word in ("yes", "true", "on", "1", "YES")]
    + [("repair", "unmonitored", word, False) for word in ("no", "false", "off", "0", "No")],
)
def test_values(config: Config, section: str, key: str, text: str, value: Any) -> None:
    assert (
        settings(config("show", f"[{section}]\n{key} = {text}\n", "--json"))[section][key] == value
    )


@pytest.mark.parametrize(
    ("section", "key", "texts"),
    [
        ("repair", "min_age", ["soon", "-5", "1y", "5 m m", "m", "1e9"]),
        ("scan", "stat_timeout", ["0", "never"]),
        ("scan", "max_new_broken", ["101%", "-1%", "many", "%", "0.5", "100.5%"]),
        ("scan", "workers", ["many", "-1", "1.5", "0", "257"]),
        ("repair", "limit", ["ten", "-1", "2.5"]),
        ("refresherr", "apply", ["maybe", "y e s", "2"]),
        ("plex", "path_map", ["/opt/media", "=> /data", "/opt/media =>"]),
        (
            "plex",
            "url",
            ["plex:32400", "ftp://plex", "file:///etc/passwd", "http://", "http://h:0"],
        ),
        ("notify", "when", ["sometimes"]),
        ("refresherr", "log_level", ["loud"]),
    ],
)
def test_values_that_are_refused(config: Config, section: str, key: str, texts: List[str]) -> None:
    for text in texts:
        line = refusal(config("check", f"[{section}]\n{key} = {text}\n"))
        assert key in line
        assert section in line


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [
        ("[scann]\n", "scann", "scan"),
        ("[cinesnyc]\n", "cinesnyc", "cinesync"),
        ("[sonar tv]\nurl = http://x\n", "sonar tv", "sonarr"),
        ("[raddarr 4k]\nurl = http://x\n", "raddarr 4k", "radarr"),
        ("[sonarr]\nurl = http://x\n", "sonarr", "[sonarr "),
        ("[scan]\nroot = /a\n", "root", "roots"),
        ("[scan]\nmountchecks = /a\n", "mountchecks", "mount_checks"),
        ("[sonarr tv]\napikey = x\n", "apikey", "api_key"),
        ("[radarr 4k]\napi_key_fil = x\n", "api_key_fil", "api_key_file"),
        ("[relay]\ntokens = x\n", "tokens", "token"),
    ],
)
def test_unknown_names_meet_the_nearest_known_one(
    config: Config, text: str, wrong: str, nearest: str
) -> None:
    for command in ("check", "show"):
        line = refusal(config(command, text))
        assert wrong in line
        assert nearest in line.replace(f"[{wrong}]", "").replace(f"'{wrong}'", "")


# --- The environment -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "section", "key", "value"),
    [
        ("DATA_DIR", "/d", "refresherr", "data_dir", "/d"),
        ("DATA_DIR", "d", "refresherr", "data_dir", os.path.abspath("d")),
        ("LOG_LEVEL", "WARNING", "refresherr", "log_level", "warning"),
        ("REFRESHERR_APPLY", "1", "refresherr", "apply", True),
        ("DRYRUN", "false", "refresherr", "apply", True),
        ("DRYRUN", "true", "refresherr", "apply", False),
        ("SCAN_ROOTS", "/a,/b", "scan", "roots", ["/a", "/b"]),
        ("IGNORE_SUBSTR", "x,y z", "scan", "ignore", ["x", "y z"]),
        ("SONARR_TV_URL", "http://s:1", "sonarr_tv", "url", "http://s:1"),
        ("SONARR_ANIME_4K_URL", "http://s:2", "sonarr_anime_4k", "url", "http://s:2"),
        ("RADARR_4K_URL", "http://r:1/radarr/", "radarr_4k", "url", "http://r:1/radarr"),
        ("RELAY_BASE", "http://relay:5050", "relay", "base", "http://relay:5050"),
        ("RELAY_TOKEN", SECRET, "relay", "token", "***"),
        (
            "ROUTE_MAP",
            "/a=sonarr_tv,/b=radarr",
            "relay",
            "routes",
            {"/a": "sonarr_tv", "/b": "radarr"},
        ),
        ("SEASON_SEARCH_THRESHOLD", "5", "repair", "season_threshold", 5),
        ("QUEUE_LIMIT", "6", "repair", "limit", 6),
        ("ACTIONS_MAX", "7", "repair", "max", 7),
        ("ACTIONS_TIMEOUT", "8", "repair", "timeout", 8),
        ("CINESYNC_BASE", "/c", "cinesync", "base", "/c"),
        ("CINESYNC_REPAIR_ROOTS", "/tv,/m", "cinesync", "roots", ["/tv", "/m"]),
        ("CINESYNC_ALLOWED_TARGET_PREFIXES", "/mnt", "cinesync", "allowed_targets", ["/mnt"]),
        ("CINESYNC_LIMIT", "9", "cinesync", "limit", 9),
        ("DISCORD_WEBHOOK", f"https://d/{SECRET}", "notify", "discord", "***"),
    ],
)
def test_the_names_of_the_container_edition(
    config: Config, name: str, text: str, section: str, key: str, value: Any
) -> None:
    # The file says something else, so that the environment has to win.
    file = EXAMPLE.replace("api_key_file = {key_file}", "api_key = x").replace("apply = no", "")
    file = file.replace("apply =", "apply = yes") if value is False else file
    shown = settings(config("show", file, "--json", **{name: text}))
    assert shown[section][key] == value


def test_dryrun_beats_apply_in_the_file(config: Config) -> None:
    file = "[refresherr]\napply = yes\n"
    assert settings(config("show", file, "--json"))["refresherr"]["apply"] is True
    assert settings(config("show", file, "--json", DRYRUN="1"))["refresherr"]["apply"] is False
    assert "DRYRUN" in refusal(config("show", file, DRYRUN="perhaps"))


def test_an_instance_from_the_environment_alone_and_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.ini"
    file.write_text("[Sonarr TV]\nurl = http://file:1\napi_key_file = /absent\nroots = /tv\n")
    environ = {"SONARR_TV_API": SECRET, "RADARR_UHD_URL": "http://u:1", "RADARR_UHD_API": "key"}
    config = program.load_config(str(file), environ, {})
    found = {i.name: (i.kind, i.settings.url, i.settings.api_key) for i in config.instances}
    assert found == {
        "sonarr_tv": ("sonarr", "http://file:1", SECRET),
        "radarr_uhd": ("radarr", "http://u:1", "key"),
    }


def test_an_instance_without_a_url_is_refused(config: Config) -> None:
    assert "sonarr_tv" in refusal(config("check", None, SONARR_TV_API="key"))


@pytest.mark.parametrize(
    ("section", "key", "other"),
    [
        ("plex", "url = http://x", "token"),
        ("plex", "token = secret", "url"),
        ("jellyfin", "url = http://x", "api_key"),
        ("jellyfin", "api_key = secret", "url"),
        ("emby", "url = http://x", "api_key"),
        ("emby", "api_key = secret", "url"),
        ("notify", "ntfy_token = secret", "ntfy"),
    ],
)
def test_half_a_server_is_refused(config: Config, section: str, key: str, other: str) -> None:
    line = refusal(config("check", f"[{section}]\n{key}\n"))
    assert f"[{section}]" in line
    assert other in line
    assert "secret" not in line
    value = "http://x" if other in ("url", "ntfy") else "secret"
    assert config("check", f"[{section}]\n{key}\n{other} = {value}\n").code == 0


# --- Secrets ---------------------------------------------------------------------------------

SECRETIVE = f"""\
[sonarr tv]
url = http://user:{SECRET}@sonarr:8989
api_key = {SECRET}
[relay]
base = http://user:{SECRET}@relay
token = {SECRET}
[notify]
discord = https://discord.com/api/webhooks/1/{SECRET}
ntfy = https://ntfy.sh/{SECRET}
ntfy_token = {SECRET}
apprise = http://apprise:8000/notify/{SECRET}
webhook = https://hook.example/{SECRET}
healthchecks = https://hc-ping.com/{SECRET}
uptime_kuma = https://kuma.example/api/push/{SECRET}
[plex]
url = http://plex/?X-Plex-Token={SECRET}
token = {SECRET}
[jellyfin]
url = http://user:{SECRET}@jellyfin
api_key = {SECRET}
[emby]
url = http://emby/?api_key={SECRET}
api_key = {SECRET}
"""


def test_no_secret_is_shown(config: Config) -> None:
    for words in ([], ["--json"], ["-vv"]):
        for action in ("show", "check"):
            result = config(action, SECRETIVE, *words)
            assert result.code == 0, result.err
            assert SECRET not in result.out + result.err
    shown = settings(config("show", SECRETIVE, "--json"))
    assert shown["sonarr_tv"]["url"] == "http://***@sonarr:8989"
    assert shown["relay"]["token"] == shown["notify"]["ntfy"] == "***"


@pytest.mark.parametrize(
    "text",
    [
        f"[sonarr tv]\nurl = http://x\napi_key {SECRET}\n",
        f"api_key = {SECRET}\n",
        f"[relay]\ntokn = {SECRET}\n",
        f"[relay]\nbase = ftp://user:{SECRET}@relay\n",
        f"[relay]\nbase = http://user:{SECRET}@relay 2\n",
        f"[relay]\nbase = relay:5050/find?token={SECRET}\n",
        f"[notify]\ndiscord = discord.com/{SECRET}\n",
        f"[notify]\nntfy = {SECRET}\n",
        f"[relay]\ntoken = {SECRET}\ntoken = {SECRET}\n",
        f"[relay]\ntoken = {SECRET}\n[relay]\n",
        f"[relay]\n  token = {SECRET}\n [broken\n",
    ],
)
def test_no_secret_in_an_error(config: Config, text: str) -> None:
    for words in ([], ["--json"], ["-vv"]):
        result = config("check", text, *words)
        assert result.code == 2
        assert SECRET not in result.out + result.err


def test_no_secret_in_an_error_about_the_environment(config: Config) -> None:
    for name in ("RELAY_BASE", "SONARR_TV_URL", "DISCORD_WEBHOOK"):
        result = config("show", None, "--json", **{name: f"ftp://user:{SECRET}@host/{SECRET}"})
        assert result.code == 2
        if name == "DISCORD_WEBHOOK":
            assert SECRET not in result.out + result.err
        assert f"user:{SECRET}" not in result.out + result.err


@pytest.mark.parametrize(
    ("section", "key"),
    [("sonarr tv", "api_key"), ("relay", "token"), ("plex", "token"), ("jellyfin", "api_key")],
)
def test_secrets_from_files(tmp_path: Path, section: str, key: str) -> None:
    secret, file = tmp_path / "secret", tmp_path / "x.ini"
    secret.write_text(f"{SECRET}\n")
    url = "url" if section != "relay" else "base"
    file.write_text(f"[{section}]\n{url} = http://x\n{key}_file = {secret}\n")
    config = program.load_config(str(file), {}, {})
    found = config.instances[0].settings if "sonarr" in section else getattr(config, section)
    assert getattr(found, key) == SECRET
    secret.unlink()
    line = refusal(run("--config", file, "config", "check"))
    assert f"{key}_file" in line
    assert str(secret) in line


@pytest.mark.parametrize(
    ("mode", "text", "warned"),
    [
        (0o600, f"[relay]\ntoken = {SECRET}\n", False),
        (0o644, f"[relay]\ntoken = {SECRET}\n", True),
        (0o604, f"[notify]\ndiscord = https://d/{SECRET}\n", True),
        (0o644, "[relay]\nbase = http://relay\n", False),
        (0o644, "[relay]\ntoken_file = {secret}\n", False),
    ],
)
def test_a_warning_when_others_can_read_the_secrets(
    tmp_path: Path, mode: int, text: str, warned: bool
) -> None:
    secret, file = tmp_path / "secret", tmp_path / "x.ini"
    secret.write_text(SECRET)
    file.write_text(text.replace("{secret}", str(secret)))
    file.chmod(mode)
    for words in ([], ["-q"], ["--json"]):
        result = run("--config", file, "--data-dir", tmp_path, "config", "check", *words)
        assert result.code == 0
        assert (str(file) in result.err) is warned
        assert warned or result.err == ""
        assert SECRET not in result.err + result.out


# --- The sample ------------------------------------------------------------------------------


def uncommented(sample: str) -> str:
    return "".join(line[1:] if line[0] == "#" else line for line in sample.splitlines(True))


def test_the_sample_is_accepted_with_and_without_its_comment_signs(config: Config) -> None:
    sample = config("sample", None).out
    assert config("check", sample).code == 0
    assert config("show", sample).out.splitlines()[1:] == config("show", None).out.splitlines()[1:]
    assert config("check", uncommented(sample)).code == 0


def test_the_sample_holds_every_setting(config: Config) -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(uncommented(config("sample", None).out))
    shown = settings(config("show", EXAMPLE.replace("api_key_file = {key_file}", ""), "--json"))
    for section, keys in shown.items():
        (title,) = [
            title for title in parser.sections() if title.split()[0] == section.split("_")[0]
        ]
        assert set(keys) == set(parser[title]), section
        assert all(parser[title].values()), section
    example = configparser.ConfigParser(interpolation=None)
    example.read_string(EXAMPLE)
    for title in example.sections():
        (same,) = [t for t in parser.sections() if t.split()[0] == title.split()[0]]
        assert {key.replace("_file", "") for key in example[title]} <= set(parser[same])


def test_a_sample_is_given_even_where_the_config_is_wrong(config: Config) -> None:
    assert config("sample", "[nonsense]\n").out == config("sample", None).out


# --- Paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "roots", "code"),
    [
        ("/opt/tv/CineSync", "/opt/tv", 2),
        ("/opt/tv", "/opt/tv", 2),
        ("/opt/tv/../tv/x/CineSync/", "/opt/movies, /opt/tv/", 2),
        ("/opt/tv", "/", 2),
        ("/opt/tv 2", "/opt/tv", 0),
        ("/opt/CineSync", "/opt/CineSync/Shows", 0),
    ],
)
def test_cinesyncs_base_inside_a_repair_root(
    config: Config, base: str, roots: str, code: int
) -> None:
    assert config("check", f"[cinesync]\nbase = {base}\nroots = {roots}\n").code == code
    env = {"CINESYNC_BASE": base, "CINESYNC_REPAIR_ROOTS": roots}
    assert config("check", None, **env).code == code


@pytest.mark.parametrize(
    ("path", "prefix", "inside"),
    [
        ("/tv/Show", "/tv", True),
        ("/tv", "/tv", True),
        ("/tv", "/tv/", True),
        ("/tv/Show/x", "/tv/Show/", True),
        ("/tv/Show 2", "/tv/Show", False),
        ("/tv/Show 2/x", "/tv/Show", False),
        ("/tv", "/tv/Show", False),
        ("/", "/", True),
        ("/tv", "/", True),
        ("/TV/x", "/tv", False),
    ],
)
def test_is_under(path: str, prefix: str, inside: bool) -> None:
    assert program.is_under(path, prefix) is inside


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/tv/Show/S01/x.mkv", "/tv/Show"),
        ("/tv/Show", "/tv/Show"),
        ("/tv/Show 2/x.mkv", "/tv"),
        ("/tvshows/x.mkv", None),
        ("/tv", "/tv"),
    ],
)
def test_the_longest_prefix_wins(path: str, expected: Optional[str]) -> None:
    assert program.find_ancestor(path, {"/tv": 1, "/tv/Show": 2}) == expected


def test_what_is_shown_can_be_read_again(
    refresherr: Refresherr, write_config: Callable[[str], Path]
) -> None:
    write_config(
        "[scan]\nroots = /a, /b\nstat_timeout = 90s\nmax_new_broken = 12.5%\n"
        "[sonarr tv]\nurl = http://tv:8989\npath_map = /a => /x\n[run]\ntime_limit = 36h\n"
    )
    shown = refresherr("config", "show").out
    assert "stat_timeout = 90s" in shown and "time_limit = 36h" in shown
    write_config(shown)
    assert refresherr("config", "show").out == shown


# --- What begins like a comment --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("ignore =\n    #recycle\n    ;x\n    cinesync\n", ["#recycle", ";x", "cinesync"]),
        ("ignore =\n    a\n# comment\n;comment\n#    b\n\n    c\n", ["a", "c"]),
        ("\tignore =\n\t\t#recycle\n\t# comment\n\tworkers = 2\n", ["#recycle"]),
        ("  # comment\n  ignore = a\n  ; comment = no\n  workers = 2\n", ["a"]),
        ("ignore = #recycle, ;x\n", ["#recycle", ";x"]),
        ("ignore = a\n    #recycle\n", ["a", "#recycle"]),
        ("ignore = a b # c\n", ["a b # c"]),
    ],
)
def test_an_item_of_a_list_may_begin_as_a_comment_does(
    config: Config, text: str, items: List[str]
) -> None:
    assert (
        settings(config("show", f"  ; head\n[scan]\n{text}", "--json"))["scan"]["ignore"] == items
    )


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[scan]\nignore =\n    a\n    # words\n", "ignore"),
        ("[scan]\nignore =\n    a\n    #\n", "ignore"),
        ("[scan]\nroots =\n    /a\n    #/b\n    /c\n", "roots"),
        ("[scan]\nroots =\n    /a\n    ; words\n    /c\n", "roots"),
        ("[cinesync]\nroots =\n    #tv\n", "roots"),
        ("[relay]\nroutes =\n    /a => b\n    #/c => d\n", "routes"),
        ("[repair]\nmin_age = 1h\n    # not so long\n", "min_age"),
    ],
)
def test_or_it_is_refused_but_never_dropped(config: Config, text: str, key: str) -> None:
    result = config("check", text)
    assert result.code == 2
    assert f"] {key} " in result.err
    assert "a comment must begin in the first column of its line" in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        *((name, True) for name in (
            "@eaDir", "#recycle", "#snapshot", ".snapshots", ".zfs", "@Recycle",
            "@Recently-Snapshot", ".Trash-1000", ".Trash-", "lost+found", ".stfolder",
            ".stversions",
        )),
        *((name, False) for name in (
            "x@eaDir", "@eaDir2", "#recycle bin", "The #snapshot", "zfs", "azfs", ".Trash",
            "lost+found.mkv", "losttfound", "@recycle", "stfolder", "lost+found\n",
        )),
    ],
)  # fmt: skip
def test_what_a_nas_keeps_for_itself_is_skipped_by_its_whole_name(name: str, skipped: bool) -> None:
    ignore = program.Ignore([], True)
    assert ignore.active
    assert ignore.matches("/tv", name) is skipped
    assert ignore.matches_beneath("/tv", f"/tv/{name}/Show/x.mkv") is skipped
    assert not ignore.matches_beneath(f"/tv/{name}", f"/tv/{name}/Show/x.mkv")
    assert program.Ignore(["show"], True).matches("/tv", name) is skipped
    assert not program.Ignore([], False).active
    assert not program.Ignore(["nothing", "*.x"], False).matches("/tv", name)
