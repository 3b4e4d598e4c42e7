"""The documents: links have targets, and the README's code runs unchanged but for smaller sizes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import pydrone
import pydrone.envs
from pydrone.ops import native

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (document.parent / target).exists(), target


class Policy:
    """Stands in for the reader's policy: a network with gradients."""

    def __init__(self) -> None:
        self.critic = torch.nn.Linear(17, 1)

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        return self.critic(obs).squeeze(-1)

    def act(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.randn(len(obs), 4), torch.randn(len(obs)), self.value(obs)


class InPlace:
    """Stands in for an environment that overwrites its observations; they count its steps."""

    def __init__(self, num_envs: int) -> None:
        self.obs = torch.zeros(num_envs, 17)

    def reset(self) -> torch.Tensor:
        return self.obs

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.obs += 1
        dones = self.obs[:, 0] % 60 == 0
        return self.obs, torch.ones(len(actions)), dones, dones, self.obs.clone()


def test_the_korean_readme_says_the_same():
    """The same code and the same links, except the one to the other language."""
    english, korean = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ko.md"))
    python = r"```python\n.*?```"
    assert re.findall(python, english, flags=re.DOTALL) == re.findall(python, korean, flags=re.DOTALL)
    links = [set(re.findall(r"\]\((docs/[^)]*|http[^)]*)\)", text)) for text in (english, korean)]
    assert links[0] == links[1]
    assert english.count("\n## ") == korean.count("\n## ")


def test_the_readmes_code_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    # ppo/test_export.py runs the blocks that use an exported policy.
    loop, estimator = (block for block in blocks if '"policy.' not in block)
    loop = loop.replace("8192", "6").replace('device="cuda"', 'device="cpu"')
    seen = []
    names = {"env": InPlace(6), "policy": Policy(), "ppo_loss": lambda *tensors: seen.append([len(x) for x in tensors])}
    stop = loop.index("buf.clear()")
    exec(loop[:stop], names)
    assert len(seen) == 20 and seen[0] == [150] * 6
    assert torch.equal(names["buf"].obs[:, :, 0], torch.arange(100.0).expand(6, 100))
    exec(loop[stop:], names)
    assert len(names["buf"]) == 0
    own = dict.fromkeys(("rewards", "values", "dones"), torch.ones(3, 5)) | {"last_values": torch.ones(3)}
    exec(estimator, own | {"pydrone": pydrone})


def test_the_learners_code_runs():
    text = (ROOT / "docs/learner.md").read_text(encoding="utf-8")
    code, fused = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    if native.CPU_MISSING is None:
        actor, critic = torch.nn.Linear(3, 2), torch.nn.Linear(3, 1)
        log_std = torch.zeros(2, requires_grad=True)
        parameters = [*actor.parameters(), *critic.parameters(), log_std]
        names = {"torch": torch, "optimizer": torch.optim.Adam(parameters), "parameters": parameters}
        names |= {"actor": actor, "critic": critic, "log_std": log_std, "obs": torch.randn(8, 3)}
        names |= dict.fromkeys(("log_probs", "advantages", "returns", "values"), torch.randn(8))
        names |= {"actions": torch.randn(8, 2), "old_mean": torch.zeros(8, 2), "old_std": torch.ones(8, 2)}
        exec(fused, names)
        assert names["kl"] > 0 and log_std.detach().abs().min() > 0
    pytest.importorskip("gymnasium")
    names = {}
    exec(code.replace("iterations=60", "iterations=1"), names)
    assert names["env"].num_discrete_actions == 2


def test_the_learners_options_are_all_there():
    from pydrone.ppo.config import PPOConfig

    table = (ROOT / "docs/learner.md").read_text(encoding="utf-8").split("\n\n")[2]
    options = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[2])]
    assert len(options) == 19 and all(hasattr(PPOConfig(), name) for name in options), options


def test_the_environment_in_the_documents_learns(tmp_path, monkeypatch, capsys):
    from pydrone.ppo.config import PPOConfig, TrainConfig
    from pydrone.ppo.trainer import Trainer

    text = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
    environment, training, again = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(environment, names)
    code = [line for line in environment.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(code) <= 20
    assert isinstance(names["Points"](3), pydrone.envs.Env)
    monkeypatch.chdir(tmp_path)
    for code, iterations, smaller in ((training, 20, 1), (again, 40, 2)):
        code = code.replace(f"iterations={iterations}", f"iterations={smaller}, tensorboard=False")
        exec(code.replace("256", "8").replace("model_20", "model_1"), names)
    assert "'episode_length': 50.0" in capsys.readouterr().out and (tmp_path / "run" / "model_2.pt").exists()
    assert names["runs"].load("run").environment.actions.limits == ((-1.0,), (1.0,))
    config = TrainConfig(num_steps=50, ppo=PPOConfig(learning_rate=1e-3, hidden_dims=(32,)))
    trainer = Trainer(names["Points"](64, seed=1), config, echo=lambda line: None)
    returns = [trainer.iterate()["episode_return"] for _ in range(15)]
    # standing still gives -50 * 0.77 on average; 0.77 is the mean distance from the centre of the square
    assert returns[1] < -35
    assert returns[-1] > -20


def test_the_documented_ranges_are_all_there_are():
    text = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(pydrone.envs.Randomization):
        assert re.search(rf"^\| `.*\b{field.name}`.* \| `{field.default[0]:g} {field.default[1]:g}` \|$", text, re.M), (
            field.name
        )
    for name in pydrone.envs.ENVIRONMENTS:
        assert f"`{name}`" in text
