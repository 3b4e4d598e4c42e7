"""pydrone inside other trainers: rsl_rl, skrl, Stable-Baselines3, TorchRL, rl_games and PufferLib, one module each.

Importing this package imports none of them; importing ``pydrone.integrations.<name>`` imports that one.
docs/integrations.md describes each integration and the supported versions.
"""
