"""The parts of :mod:`pydrone.buffer`: the ring of packed rows, its memory layout, what writes and reads it."""
