"""Common parts of the integrations: supported versions, patches that can be removed, and deferred imports."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

from pydrone.integrations.peer import Change, Patches, require

PEERS = ("rsl_rl", "skrl", "stable_baselines3", "torchrl", "tensordict", "rl_games", "gymnasium")


def installed(monkeypatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)


@pytest.mark.parametrize("version", ["2.1", "2.1.0", "2.1.1.post1", "2.9", "2.1.0rc1+cpu"])
def test_a_supported_version_is_returned(version, monkeypatch):
    installed(monkeypatch, version)
    assert require("peer", (2, 1), (3,)) == version


@pytest.mark.parametrize("version", ["2.0.9", "1.99", "3", "3.0.0", "10.0", "unknown"])
def test_another_version_says_which_are_supported(version, monkeypatch):
    installed(monkeypatch, version)
    with pytest.raises(ImportError) as error:
        require("peer", (2, 1), (3,))
    assert str(error.value) == f"peer {version} is installed; pydrone supports peer from 2.1 to before 3"


def test_a_missing_package_says_which_versions_are_supported():
    with pytest.raises(ImportError) as error:
        require("no-such-peer", (2, 1), (3,))
    assert str(error.value) == "no-such-peer is not installed; pydrone supports no-such-peer from 2.1 to before 3"


class Agent:
    def act(self) -> str:
        return "theirs"

    @staticmethod
    def make() -> str:
        return "theirs"


class Heir(Agent):
    pass


@pytest.fixture
def made():
    """(the owner of the attributes, the patches); afterwards they are removed, and the class must be as before."""
    module, patches = SimpleNamespace(function="theirs", other="theirs"), Patches()
    yield module, patches
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patches.remove()
    assert Agent().act() == Agent.make() == "theirs"


def test_a_patch_is_installed_once_and_taken_back_once(made):
    module, patches = made
    changes = [Change(module, "function", "ours"), Change(module, "other", "ours")]
    patches.remove()  # nothing to remove
    assert not patches.installed
    for _ in range(2):
        patches.install(changes)
        assert patches.installed and (module.function, module.other) == ("ours", "ours")
    for _ in range(2):
        patches.remove()
        assert not patches.installed and (module.function, module.other) == ("theirs", "theirs")
    patches.install(changes)
    assert module.function == "ours"


def test_methods_and_static_methods_come_back_as_what_they_were(made):
    _, patches = made
    before = dict(vars(Agent))
    patches.install([Change(Agent, "act", lambda self: "ours"), Change(Agent, "make", staticmethod(lambda: "ours"))])
    assert Heir().act() == Heir.make() == Agent().make() == "ours"
    patches.remove()
    assert Heir().act() == Heir.make() == Agent().make() == "theirs"
    assert vars(Agent)["make"] is before["make"] and vars(Agent)["act"] is before["act"]


def test_a_missing_attribute_is_seen_before_anything_is_replaced(made):
    module, patches = made
    with pytest.raises(AttributeError, match="absent"):
        patches.install([Change(module, "function", "ours"), Change(module, "absent", "ours")])
    assert module.function == "theirs" and not patches.installed


def test_what_somebody_else_patched_on_top_is_left_to_them(made):
    module, patches = made
    patches.install([Change(module, "function", "ours"), Change(module, "other", "ours")])
    module.function = "a third one's"
    with pytest.warns(RuntimeWarning, match="function was replaced again"):
        patches.remove()
    assert (module.function, module.other) == ("a third one's", "theirs")
    assert not patches.installed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patches.remove()  # warned only once


WITHOUT_PEERS = """
import importlib, importlib.metadata, pkgutil, sys
import torch, pydrone, pydrone.integrations, pydrone.integrations.peer

def version(name):
    if VERSION is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return VERSION

importlib.metadata.version = version
for module in pkgutil.iter_modules(pydrone.integrations.__path__, "pydrone.integrations."):
    if not module.name.endswith(".peer"):
        try:
            importlib.import_module(module.name)
            print(module.name, "was imported")
        except ImportError as error:
            print(error)
print([name for name in PEERS if name in sys.modules])
"""


@pytest.mark.parametrize("version", [None, "0.0.1"])
def test_without_its_peer_an_integration_says_what_it_needs_and_nothing_imports_a_peer_before(version):
    code = f"PEERS, VERSION = {PEERS!r}, {version!r}\n{WITHOUT_PEERS}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    *sentences, imported = ran.stdout.splitlines()
    assert imported == "[]", ran.stderr
    assert len(sentences) >= 2
    found = "is not installed" if version is None else f"{version} is installed"
    for sentence in sentences:
        assert re.fullmatch(rf"(\S+) {re.escape(found)}; pydrone supports \1 from [\d.]+ to before [\d.]+", sentence)
