"""What :mod:`pydrone.ppo.export` stands on: the layers of a policy, and a file for each kind of format."""


class ExportError(RuntimeError):
    """The policy could not be exported; nothing was written."""
