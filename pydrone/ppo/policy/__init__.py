"""Networks that act: :mod:`actor_critic` and its variations, and what normalises their inputs."""
