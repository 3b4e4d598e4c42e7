"""``pydrone doctor``: its report and exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import torch

import pydrone
from pydrone.cli import doctor
from pydrone.doctor import machine, runner
from pydrone.doctor.text import text


def test_the_report(tmp_path):
    """The command in its own folder and process prints JSON; the same report is rendered as text."""
    code = "from pydrone.cli.main import main; import sys; sys.exit(main(['doctor', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] and report["backends"] == pydrone.backends()
    assert report["packages"]["torch"] == torch.__version__
    tested = {(test["backend"], test["device"], test["kernel"]) for test in report["self_tests"]}
    assert {("reference", "cpu", kernel) for kernel in ("gae", "append", "gather")} <= tested
    assert all((name in {x[0] for x in tested}) == (reason is None) for name, reason in report["backends"].items())
    if report["backends"]["cpu"] is None:
        assert [check["threads"] for check in report["speed"]] == sorted({1, report["cpu"]["threads"]})
    shown = text(report)
    for part in ("Versions", "Devices", "Backends", "Self-test", "Advice", torch.__version__, "passed, 25 cases"):
        assert part in shown, part


def test_a_failed_self_test_is_a_status_of_one(healthy, monkeypatch, capsys):
    failed = {"backend": "cpu", "device": "cpu", "kernel": "gae", "cases": 0, "error": "advantages: off by 1"}
    monkeypatch.setattr(doctor, "facts", lambda: healthy)
    monkeypatch.setattr(runner, "run", lambda *_: ([failed], []))
    assert doctor.main(["--no-speed"]) == 1
    assert re.search(r"cpu +cpu +gae +FAILED: advantages: off by 1", capsys.readouterr().out)


def test_nothing_to_change_is_said(healthy):
    report = healthy | {"self_tests": [], "speed": []}
    assert machine.advice(report) == []
    assert "none: nothing to change" in text(report | {"advice": []})
