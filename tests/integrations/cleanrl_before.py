"""PPO in a single file, in the manner of CleanRL. docs/integrations.md shows it before and after pydrone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical


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

    def forward(self, obs, action=None):
        policy = Categorical(logits=self.actor(obs))
        action = policy.sample() if action is None else action
        return action, policy.log_prob(action), policy.entropy(), self.value(obs)


def train(args: Args, envs: gym.vector.VectorEnv, log: Callable[[str, torch.Tensor], None]) -> None:
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    obs_shape, batch_size = envs.single_observation_space.shape, args.num_envs * args.num_steps
    agent = Agent(int(np.prod(obs_shape)), int(envs.single_action_space.n)).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)

    obs = torch.zeros((args.num_steps, args.num_envs, *obs_shape), device=device)
    actions = torch.zeros((args.num_steps, args.num_envs), dtype=torch.int64, device=device)
    log_probs = torch.zeros((args.num_steps, args.num_envs), device=device)
    rewards = torch.zeros((args.num_steps, args.num_envs), device=device)
    dones = torch.zeros((args.num_steps, args.num_envs), device=device)
    values = torch.zeros((args.num_steps, args.num_envs), device=device)

    next_obs = torch.as_tensor(envs.reset(seed=args.seed)[0], device=device)
    next_done = torch.zeros(args.num_envs, device=device)
    for _ in range(args.num_iterations):
        for step in range(args.num_steps):
            obs[step] = next_obs
            dones[step] = next_done
            with torch.no_grad():
                action, log_prob, _, value = agent(next_obs)
            actions[step] = action
            log_probs[step] = log_prob
            values[step] = value
            next_obs, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
            rewards[step] = torch.as_tensor(reward, device=device)
            next_obs = torch.as_tensor(next_obs, device=device)
            next_done = torch.as_tensor(terminated | truncated, dtype=torch.float32, device=device)

        with torch.no_grad():
            next_value = agent.value(next_obs)
        advantages = torch.zeros_like(rewards)
        last_advantage = torch.zeros(args.num_envs, device=device)
        for t in reversed(range(args.num_steps)):
            if t == args.num_steps - 1:
                next_nonterminal, following = 1.0 - next_done, next_value
            else:
                next_nonterminal, following = 1.0 - dones[t + 1], values[t + 1]
            delta = rewards[t] + args.gamma * following * next_nonterminal - values[t]
            last_advantage = delta + args.gamma * args.gae_lambda * next_nonterminal * last_advantage
            advantages[t] = last_advantage
        returns = advantages + values
        log("advantages", advantages.T)
        log("returns", returns.T)
        log("mean_reward", rewards.mean())

        b_obs = obs.reshape(batch_size, *obs_shape)
        b_actions, b_log_probs = actions.reshape(batch_size), log_probs.reshape(batch_size)
        b_advantages, b_returns = advantages.reshape(batch_size), returns.reshape(batch_size)
        b_values = values.reshape(batch_size)
        minibatch_size = batch_size // args.num_minibatches
        for _ in range(args.update_epochs):
            order = torch.randperm(batch_size, device=device)
            for start in range(0, batch_size, minibatch_size):
                mb = order[start : start + minibatch_size]
                _, log_prob, entropy, value = agent(b_obs[mb], b_actions[mb])
                ratio = (log_prob - b_log_probs[mb]).exp()
                advantage = b_advantages[mb]
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = -torch.min(advantage * ratio, advantage * clipped).mean()
                near = b_values[mb] + (value - b_values[mb]).clamp(-args.clip_coef, args.clip_coef)
                value_loss = torch.max((value - b_returns[mb]) ** 2, (near - b_returns[mb]) ** 2).mean() / 2
                loss = policy_loss - args.ent_coef * entropy.mean() + args.vf_coef * value_loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                log("loss", loss.detach())


if __name__ == "__main__":
    settings = Args()
    train(
        settings,
        gym.make_vec(settings.env_id, settings.num_envs, vectorization_mode="sync"),
        lambda name, value: print(f"{name} {value.item():.4f}") if value.dim() == 0 else None,
    )
