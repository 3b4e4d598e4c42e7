"""PPO on the rollout buffer: a policy, a loss, a learner, a trainer. Import the modules; for other codebases there are
:func:`fused_update` and :func:`clipped_step`."""

__all__ = ["clipped_step", "fused_update"]


def __getattr__(name: str) -> object:
    # On demand: the settings are read without importing torch.
    if name == "fused_update":
        from pydrone.ppo.learner.fused import fused_update

        return fused_update
    if name == "clipped_step":
        from pydrone.ppo.learner.adam import clipped_step

        return clipped_step
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
