"""PPO on the rollout buffer: a policy, a loss, a learner, a trainer. Import the modules; for other codebases there is
:func:`fused_update`."""

__all__ = ["fused_update"]


def __getattr__(name: str) -> object:
    # On demand: the settings are read without importing torch.
    if name == "fused_update":
        from pydrone.ppo.fused import fused_update

        return fused_update
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
