"""PPO on the rollout buffer: a policy, a loss, a learner, a trainer. Import the modules; for other codebases there are
:class:`FusedUpdate`, :class:`FusedAct`, :func:`fused_update` and :func:`clipped_step`."""

__all__ = ["FusedAct", "FusedUpdate", "clipped_step", "fused_update"]


def __getattr__(name: str) -> object:
    # On demand: the settings are read without importing torch.
    if name in ("FusedAct", "FusedUpdate", "fused_update"):
        from pydrone.ppo.learner import prepared

        return getattr(prepared, name)
    if name == "clipped_step":
        from pydrone.ppo.learner.adam import clipped_step

        return clipped_step
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
