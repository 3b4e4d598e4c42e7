"""The table of planted mistakes matches the sources. A slow test plants three of them; ``make faults`` plants all."""

from __future__ import annotations

from pathlib import Path

import faults
import plant
import pytest
from plant import ROOT, BadTable, Fault


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_every_fault_can_be_planted(fault):
    """If this fails, a change of the sources has made the table out of date: update the fault's text."""
    plant.planted((ROOT / fault.file).read_text(encoding="utf-8"), fault)
    for test in fault.tests.split():
        assert (ROOT / test.partition("::")[0]).exists(), test


def test_there_are_enough_of_each_kind():
    assert len(faults.CPP) >= 12 and len(faults.TRITON) >= 6 and len(faults.CUDA) >= 12 and len(faults.PYTHON) >= 12
    assert len({fault.name for fault in faults.FAULTS}) == len(faults.FAULTS)


@pytest.mark.parametrize("text, message", [("a", "found it 0 times"), ("b b", "found it 2 times")])
def test_a_text_that_does_not_occur_exactly_once_is_refused(text, message):
    with pytest.raises(BadTable, match=message):
        plant.planted(text, Fault("name", "file", "b", "c", ""))


def tree_of(path: Path, monkeypatch, test: str) -> None:
    """Replaces this tree by one with one module and one test."""
    for folder in plant.FOLDERS:
        (path / "root" / folder).mkdir(parents=True)
    (path / "root" / "tests" / "half.py").write_text("def half(x):\n    return x / 2\n")
    (path / "root" / "tests" / "test_half.py").write_text(f"from half import half\n\ndef test_half():\n    {test}\n")
    monkeypatch.setattr(plant, "ROOT", path / "root")
    monkeypatch.setattr(plant.Tree, "check", lambda self: None)


HALF = Fault("a third", "tests/half.py", "x / 2", "x / 3", "tests/test_half.py")


def test_the_script_says_what_is_caught_and_what_survives(tmp_path, monkeypatch, capsys):
    tree_of(tmp_path, monkeypatch, "assert half(2) == 1")
    monkeypatch.setattr(plant, "FAULTS", [HALF, HALF._replace(name="a product", new="x * 0.5")])
    assert plant.main([]) == 1
    said = capsys.readouterr().out
    assert "a third: caught by tests/test_half.py::test_half" in said
    assert said.endswith("1 of 2 faults caught\n  survived: a product\n")
    assert (tmp_path / "root" / "tests" / "half.py").read_text().endswith("x / 2\n")


def test_tests_that_fail_anyway_show_nothing(tmp_path, monkeypatch, capsys):
    tree_of(tmp_path, monkeypatch, "assert half(2) == 2")
    monkeypatch.setattr(plant, "FAULTS", [HALF])
    assert plant.main([]) == 2
    assert "expected the tests to pass without a fault" in capsys.readouterr().err


def test_what_counts_as_caught():
    assert plant.failure(HALF, 0, "3 passed") is None
    assert (
        plant.failure(HALF, 1, "FAILED tests/a.py::test_b[c d] - assert 1 - 2\n1 failed") == "tests/a.py::test_b[c d]"
    )
    assert plant.failure(HALF, 1, "FAILED tests/a.py::test_b\n1 failed") == "tests/a.py::test_b"
    assert plant.failure(HALF, -11, "") == "crashed by signal 11"
    assert plant.failure(HALF, 124, "") == "ran too long"
    with pytest.raises(BadTable, match="pytest ended with status 2"):  # e.g. a mistake that is not valid Python
        plant.failure(HALF, 2, "ERROR tests/a.py")


@pytest.mark.slow
def test_planted_faults_are_caught(capsys):
    assert plant.main(["--only", "in the reference", "--relevant"]) == 0
    assert "3 of 3 faults caught" in capsys.readouterr().out
