"""The diagnosis of ``pydrone doctor``: facts about the machine, self-tests of the kernels, advice."""
