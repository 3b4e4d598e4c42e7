"""Each backend's self-test runs in its own process; a crash there is a line of the report."""

from __future__ import annotations

import pytest

from pydrone.doctor import runner


def child(tmp_path, monkeypatch, body: str) -> None:
    """Makes the self-test's process run ``body`` instead."""
    package = tmp_path / "pydrone" / "doctor"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "selftest.py").write_text("import os, signal, sys, time\ndef main(*_):\n    " + body)
    monkeypatch.syspath_prepend(str(tmp_path))


PASSED = 'print(\'{"kernel": "gae", "cases": 3, "error": null}\', flush=True); '


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (PASSED + "os.kill(os.getpid(), signal.SIGILL)", "killed by SIGILL"),
        (PASSED + "print('out of it', file=sys.stderr); sys.exit(3)", "ended with status 3: out of it"),
        (PASSED + "time.sleep(60)", "not done after 1.5 s"),
    ],
)
def test_a_crash_is_a_line_of_the_report(body, message, tmp_path, monkeypatch):
    child(tmp_path, monkeypatch, body)
    tests, speeds = runner.run("cpu", "cpu", [], limit=1.5)
    where = {"backend": "cpu", "device": "cpu"}
    assert tests == [
        where | {"kernel": "gae", "cases": 3, "error": None},
        where | {"kernel": "append", "cases": 0, "error": message},
        where | {"kernel": "gather", "cases": 0, "error": "not run: append failed before"},
    ]
    assert speeds == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {("reference", "cpu"), ("reference", "cuda"), ("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")}),
        ({"gpus": [], "backends": {"reference": None, "cpu": "x", "triton": "x", "cuda": "x"}}, {("reference", "cpu")}),
        (
            {
                "gpus": [],
                "backends": {"reference": None, "cpu": "x", "triton": None, "cuda": "x"},
                "variables": {"TRITON_INTERPRET": "1"},
            },
            {("reference", "cpu"), ("triton", "cpu")},
        ),
    ],
)
def test_every_usable_backend_is_tested_where_it_runs(changes, expected, healthy):
    assert set(runner.usable(healthy | changes)) == expected
