"""PPO in a single file, in the manner of CleanRL. docs/integrations.md shows it before and after pydrone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from pydrone.buffer import RolloutBuffer
from pydrone.ppo import FusedAct, FusedUpdate, clipped_step


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    seed: int = 1
    device: str = "cpu"
    num_envs: int = 8
    num_steps: int = 128
    num_iterations: int = 60
    num_minibatches: int = 4
    update_epochs: int = 4
    learning_rate: float = 2.5e-3
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_coef: float = 0.2
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5


class Agent(nn.Module):
    def __init__(self, num_obs: int, num_actions: int) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(num_obs, 64), nn.Tanh(), nn.Linear(64, num_actions))
        self.critic = nn.Sequential(nn.Linear(num_obs, 64), nn.Tanh(), nn.Linear(64, 1))

    def value(self, obs):
        return self.critic(obs).squeeze(-1)


def train(args: Args, envs: gym.vector.VectorEnv, log: Callable[[str, torch.Tensor], None]) -> None:
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    obs_shape = envs.single_observation_space.shape
    agent = Agent(int(np.prod(obs_shape)), int(envs.single_action_space.n)).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)

    networks = {"actor": agent.actor, "critic": agent.critic, "categories": [int(envs.single_action_space.n)]}
    weights = {"value_loss_coef": args.vf_coef / 2, "entropy_coef": args.ent_coef}
    act = FusedAct(**networks)
    update = FusedUpdate(**networks, **weights, clip=args.clip_coef, value_clip=args.clip_coef, reuse=True)
    buffer = RolloutBuffer(args.num_envs, args.num_steps, obs_shape, 1, device=device, seed=args.seed)

    next_obs = torch.as_tensor(envs.reset(seed=args.seed)[0], device=device)
    for _ in range(args.num_iterations):
        for _ in range(args.num_steps):
            action, log_prob, value, _ = act(None, next_obs)
            buffer.begin(obs=next_obs, actions=action, values=value, log_probs=log_prob)
            next_obs, reward, terminated, truncated, _ = envs.step(action[:, 0].long().cpu().numpy())
            dones = torch.as_tensor(terminated | truncated, device=device)
            buffer.end(rewards=torch.as_tensor(reward, device=device), dones=dones)
            next_obs = torch.as_tensor(next_obs, device=device)

        with torch.no_grad():
            buffer.compute_gae(agent.value(next_obs), args.gamma, args.gae_lambda)
        log("advantages", buffer.advantages)
        log("returns", buffer.returns)
        log("mean_reward", buffer.rewards.mean())

        for mb in buffer.minibatches(args.num_minibatches, args.update_epochs, normalize_advantages="minibatch"):
            samples = {"obs": mb.obs, "actions": mb.actions, "log_probs": mb.log_probs, "values": mb.values}
            policy_loss, value_loss, entropy, *_ = update(None, **samples, advantages=mb.advantages, returns=mb.returns)
            clipped_step(optimizer, [list(agent.parameters())], args.max_grad_norm)
            log("loss", policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss / 2)
        buffer.clear()


if __name__ == "__main__":
    settings = Args()
    train(
        settings,
        gym.make_vec(settings.env_id, settings.num_envs, vectorization_mode="sync"),
        lambda name, value: print(f"{name} {value.item():.4f}") if value.dim() == 0 else None,
    )
