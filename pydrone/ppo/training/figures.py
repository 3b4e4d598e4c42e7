"""The figures of an iteration: summed up on the device, gathered from all ranks, read by the host in one go."""

from __future__ import annotations

import itertools
import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from pydrone.buffer import RolloutBuffer
from pydrone.envs.base import LogMeter
from pydrone.ops.schema import TRUNCATED
from pydrone.ppo.distributed import Ranks
from pydrone.ppo.policy.actor_critic import ActorCritic
from pydrone.ppo.training.meters import EpisodeMeter

# Largest difference between the ranks' parameters, relative to their norm.
DRIFT = 1e-3

# `target_episode_length` is compared with the mean over this many iterations.
WINDOW = 10


class Computed(NamedTuple):
    """What an iteration leaves on the device, for :meth:`Figures.read`."""

    metrics: tuple[str, ...]  # names of the learner's
    scalars: list[Tensor]  # the learner's metrics, then sums and flags
    row: Tensor | None  # float64: ``scalars``, the environment's log and the buffer's flags; None with several ranks
    log: LogMeter  # the environment's


class Reading(NamedTuple):
    """What the host has read."""

    figures: dict[str, float]
    culprit: str | None  # what is not finite, in words
    stop: bool  # whether any rank was asked to stop
    final_obs: int  # final observations of this rank's rollout, those that found no room included


class Figures:
    """Makes the figures of each iteration, and keeps what they need of the iterations before.

    Args:
        buffer, policy: of the training.
        ranks: the processes that train together; all of them call the same methods.
    """

    def __init__(self, buffer: RolloutBuffer, policy: ActorCritic, ranks: Ranks) -> None:
        self.buffer, self.policy, self.ranks = buffer, policy, ranks
        self.running_episodes = EpisodeMeter(buffer.num_envs, buffer.num_steps, buffer.device)
        #: of the episodes that ended last; an iteration in which none ends shows them again
        self.last_episodes = dict.fromkeys(("episode_length", "episode_return", "success_rate"), math.nan)
        #: mean episode lengths of the last iterations
        self.episode_lengths: deque[float] = deque(maxlen=WINDOW)
        self._log_keys: list[str] = []

    @torch.no_grad()
    def sum_up(self, learnt: dict[str, Tensor], log: LogMeter, rewards: Tensor) -> Computed:
        """Launches the sums and flags that the figures are made of.

        learnt: what the learner's update returned. rewards: [N, T], the environment's, not scaled.
        """
        buffer, codes = self.buffer, self.buffer.dones
        episodes = self.running_episodes.update(rewards, codes)
        valid = torch.ones_like(codes, dtype=torch.bool) if buffer.valid is None else buffer.valid
        finite = [(x.isfinite() | ~valid).all() for x in (rewards, buffer.values, buffer.advantages)]
        paid = torch.where(valid, rewards, 0).sum(dtype=torch.float64), valid.sum()
        flags = buffer.flags()
        finite.append(flags[3] == 0)  # observations, as append's launches have seen them
        timeouts = (codes == TRUNCATED).sum()
        scalars = [*learnt.values(), self.policy.std.mean(), *paid, *episodes.unbind(), timeouts, *finite]
        row = None
        if not self.ranks.several:
            sums = [x.to(buffer.device).double() for x in log.totals()]
            row = torch.cat((torch.stack(scalars + sums).double(), flags))
        return Computed(tuple(learnt), scalars, row, log)

    @torch.no_grad()
    def read(self, computed: Computed, stop: bool = False) -> Reading:
        """Waits for the device and returns the figures. ``stop``: whether this rank is asked to stop.

        Raises what the flags of any rank's buffer say.
        """
        # A captured iteration hands out the same log again.
        rows, log, stop, final_obs = self._gather(computed, computed.log.copy(), stop)
        # Losses and standard deviation are equal on all ranks.
        own = len(computed.metrics) + 1
        *losses, std = rows[0][:own]
        *sums, good_rewards, good_values, good_advantages, good_obs = zip(*(row[own:] for row in rows))
        paid, steps, count, length, total, timeouts = map(sum, sums)
        figures = dict(zip(computed.metrics, losses))
        if count:
            means = {"episode_length": length, "episode_return": total, "success_rate": timeouts}
            self.last_episodes = {name: value / count for name, value in means.items()}
        if "episode/success" in log:
            # The environment's own rate; otherwise an episode that reaches its time limit is a success.
            self.last_episodes["success_rate"] = log["episode/success"]
        reward = paid / steps if steps else math.nan
        figures |= {"action_std": std, "reward": reward, "episodes": count, **self.last_episodes}
        figures |= {f"env/{name}": value for name, value in log.items()}
        self.episode_lengths.append(figures["episode_length"])
        culprit, details = None, ""
        finite_loss = math.isfinite(figures["surrogate_loss"] + figures["value_loss"])
        if not (finite_loss and all(itertools.chain(good_obs, good_rewards, good_values, good_advantages))):
            culprit, details = self.find_culprit()
        if culprit is not None:
            pass
        elif not all(good_advantages):
            culprit = "the advantages are not finite"
        elif not finite_loss:
            culprit = "what was collected is; the update diverged"
        if self.ranks.several:
            finite = zip(good_obs, good_rewards, good_values, good_advantages)
            bad = [str(rank) for rank, good in enumerate(finite) if not all(good)]
            culprit = culprit and culprit + (f" (rank {', '.join(bad)})" if bad else "")
        return Reading(figures, culprit and culprit + details, stop, final_obs)

    def find_culprit(self) -> tuple[str | None, str]:
        """The first thing that was not finite on any rank, and a list of all; None where only advantages are not."""
        ranks = self.ranks.gather_objects([x for x in self.buffer.non_finite() if x.name != "advantages"])
        found = [(x.step, rank, i, x) for rank, each in enumerate(ranks) for i, x in enumerate(each)]
        if not found:
            return None, ""
        name = min(found, key=lambda x: x[:3])[-1].name
        whose = {"actions": "actions of the policy", "values": "values of the critic"}
        culprit = whose.get(name, f"{'rewards' if name == 'rewards' else 'observations'} of the environment")
        several = self.ranks.several
        details = "; ".join((f"rank {rank}, " if several else "") + str(x) for _, rank, _, x in found)
        return f"the {culprit} are not finite", f": {details}"

    def _gather(
        self, computed: Computed, log: LogMeter, stop: bool
    ) -> tuple[list[list[float]], dict[str, float], bool, int]:
        """The scalars of each rank, the means of all environments' logs, whether any rank stops, and this rank's number
        of final observations, in one message.

        Two messages where a log has new keys.
        """
        ranks, scalars = self.ranks, computed.scalars
        if computed.row is not None:
            row, own = computed.row.tolist(), len(scalars) + len(log.totals())
            self.buffer.check(_but_finite(row[own:]))
            return [row[: len(scalars)]], log.means(row[len(scalars) : own]), stop, int(row[own + 1])
        flags = self.buffer.flags()
        norm = torch.stack(torch._foreach_norm(list(self.policy.parameters()))).sum()
        while True:
            new = not log.keys() <= set(self._log_keys)
            if not new:
                log.align(self._log_keys)
            known = len(self._log_keys)
            sums = [norm.new_zeros(())] * known if new else [x.to(norm.device) for x in log.totals()]
            host = norm.new_tensor([new, stop, *([0] * known if new else log.steps())], dtype=torch.float64)
            own = torch.stack([x.double() for x in [*scalars, *sums, norm]])
            rows = ranks.gather(torch.cat((own, host, flags))).tolist()
            parts = [_split(row, len(scalars), known, 1, 1, 1, known, len(flags)) for row in rows]
            figures, sums, norms, news, stops, steps, flags_ = zip(*parts)
            if not any(x for (x,) in news):
                break
            self._log_keys = sorted({*self._log_keys, *itertools.chain(*ranks.gather_objects(log.keys()))})
        for row in flags_:
            self.buffer.check(_but_finite(row))
        norms = [x for (x,) in norms]
        # Processors round differently, but a larger difference means that the ranks train different policies.
        if max(norms) - min(norms) > DRIFT * max(norms):
            raise RuntimeError(f"the ranks' policies have drifted apart: norms of their parameters {norms}")
        means = log.means([sum(x) for x in zip(*sums)], steps=[sum(x) for x in zip(*steps)])
        return list(figures), means, any(x for (x,) in stops), int(flags_[ranks.rank][1])


def _but_finite(flags: list[float]) -> list[float]:
    """A buffer's flags without those of non-finite values, which the trainer reports with the iteration's figures."""
    return [*flags[:3], 0.0, 0.0]


def _split(row: list[float], *sizes: int) -> list[list[float]]:
    numbers = iter(row)
    return [list(itertools.islice(numbers, size)) for size in sizes]
