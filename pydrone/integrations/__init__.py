"""pydrone under other trainers: rsl_rl, skrl, Stable-Baselines3, TorchRL and rl_games, each in a module of its own.

Importing this package imports none of them; importing ``pydrone.integrations.<name>`` imports that one. What each
does, and in which versions it is supported: docs/integrations.md.
"""
