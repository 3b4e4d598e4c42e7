"""What :mod:`pydrone.buffer` stands on: the ring of rows, how they lie in memory, what is taken out of them."""
