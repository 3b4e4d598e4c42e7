"""Triton kernels and launchers of the operations in :mod:`pydrone.ops.schema`; installed as ``pydrone._triton``."""
