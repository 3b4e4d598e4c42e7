"""The command line: ``pydrone COMMAND``, a module each."""
