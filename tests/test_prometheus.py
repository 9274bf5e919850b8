"""What `stats` tells Prometheus, and the README's alert rules: judged by promtool itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Dict

import pytest
from conftest import PROJECT, Library, Refresherr

HOSTILE = [
    'quo"te',
    "back\\slash",
    "new\nline",
    "tab\t{x}",
    "\u202ebidi \U0001f3ac",
    "\udcff\udcfe",
]
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool")


def promtool(*words: object, text: str = "") -> str:
    """Run promtool, which must find nothing to complain of; return what it says."""
    done = subprocess.run(
        ["promtool", *map(str, words)],
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(autouse=True)
def database(refresherr: Refresherr) -> None:
    refresherr.make_database()


def metrics_of(refresherr: Refresherr) -> str:
    result = refresherr("stats", "--format", "prometheus")
    assert result.code == 0, result.err
    return result.out


def read_rules() -> str:
    """Return the alert rules that the README shows."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    (rules,) = re.findall(r"^```yaml\n(groups:.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(rules)


def make_history(refresherr: Refresherr, library: Library) -> None:
    """Make everything that there are metrics for, in directories with hostile names."""
    for name in HOSTILE:
        library.link(f"{name}/film.mkv", f"{HOSTILE.index(name)}/film.mkv")
        library.link(f"{name}/gone.mkv", f"{HOSTILE.index(name)}/gone.mkv", exists=False)
    refresherr.scan(library.root)
    refresherr("queue")


@needs_promtool
def test_promtool_finds_nothing_to_complain_of(refresherr: Refresherr, library: Library) -> None:
    assert promtool("check", "metrics", text=metrics_of(refresherr)) == ""
    make_history(refresherr, library)
    text = metrics_of(refresherr)
    assert promtool("check", "metrics", text=text) == ""
    assert len(re.findall(r"^refresherr_broken_in_directory\{", text, re.MULTILINE)) == len(HOSTILE)


def test_when_a_scan_last_did_its_work(refresherr: Refresherr, library: Library) -> None:
    def values(label: str = 'command="scan"') -> Dict[str, int]:
        found = re.findall(r"^refresherr_last_(\w+)\{" + label + r"\} (\d+)$", text, re.MULTILINE)
        return {name: int(value) for name, value in found}

    text = metrics_of(refresherr)
    assert values(".*") == {}
    library.season("Show", 2)
    began = int(time.time())
    refresherr.scan(library.root)
    text = metrics_of(refresherr)
    good = values()
    assert good.pop("run_exit_code") == 0
    assert set(good) == {"run_timestamp_seconds", "success_timestamp_seconds"}
    assert all(began <= ended <= time.time() for ended in good.values())
    time.sleep(1.1 - time.time() % 1)  # the next second
    assert refresherr("scan", library.root / "absent").code == 1
    text = metrics_of(refresherr)
    bad = values()
    assert bad["run_exit_code"] == 1
    assert bad["run_timestamp_seconds"] > good["run_timestamp_seconds"]
    assert bad["success_timestamp_seconds"] == good["success_timestamp_seconds"]
    runs = json.loads(refresherr("stats", "--json").out)["runs"]
    assert runs["scan"]["exit_code"] == 1
    assert runs["scan"]["succeeded"] < runs["scan"]["finished"]


def test_the_rules_ask_for_what_there_is(refresherr: Refresherr, library: Library) -> None:
    make_history(refresherr, library)
    text = metrics_of(refresherr)
    asked = set(re.findall(r"refresherr_\w+", read_rules()))
    assert asked
    assert asked <= set(re.findall(r"^refresherr_\w+", text, re.MULTILINE))
    for label in re.findall(r'\{(\w+="\w+")', read_rules()):
        assert f"{{{label}}}" in text


@needs_promtool
def test_the_rules_of_the_readme(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yml"
    rules.write_text(read_rules(), encoding="utf-8")
    assert "SUCCESS" in promtool("check", "rules", rules)
    # Every rule fires when it should; nothing does where all is well.
    bad = {
        "refresherr_last_run_exit_code{command='scan'}": "4x3000",
        "refresherr_last_run_exit_code{command='ingest'}": "1x3000",
        "refresherr_last_success_timestamp_seconds{command='scan'}": "0x3000",
        "refresherr_repairs{state='needs_attention'}": "3x3000",
        "refresherr_symlinks{status='broken'}": "40x3000",
        "node_textfile_mtime_seconds{file='/x/refresherr.prom'}": "0x3000",
    }
    good = dict.fromkeys(bad, "0x3000")
    good["refresherr_last_success_timestamp_seconds{command='scan'}"] = "0+60x3000"
    good["node_textfile_mtime_seconds{file='/x/refresherr.prom'}"] = "0+60x3000"
    names = re.findall(r"alert: (\w+)", read_rules())
    assert len(names) == 6
    for series, firing in ((bad, True), (good, False)):
        lines = [f'rule_files: ["{rules}"]', "evaluation_interval: 1m", "tests:", "- interval: 1m"]
        lines.append("  input_series:")
        lines += [f'  - {{series: "{name}", values: "{text}"}}' for name, text in series.items()]
        lines.append("  promql_expr_test:")
        for name in names:
            lines.append(f"  - expr: count(ALERTS{{alertname='{name}',alertstate='firing'}})")
            lines.append("    eval_time: 49h")
            lines.append(f"    exp_samples: [{'{labels: , value: 1}' if firing else ''}]")
        file = tmp_path / "test.yml"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        promtool("test", "rules", file)
