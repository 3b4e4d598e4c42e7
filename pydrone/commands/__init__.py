"""The commands of ``pydrone``, a module each, with ``main(argv)`` that returns the exit status."""
