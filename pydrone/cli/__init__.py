"""The command line: one module for each ``pydrone COMMAND``."""
