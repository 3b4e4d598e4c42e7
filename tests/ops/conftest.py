"""Where Triton's kernels are interpreted: less of the interpreter's own work, and none of its results."""

from __future__ import annotations

import functools
import inspect
import os
import types

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    # It replaces triton.language's functions at each call of a device function, and looks through all names for those
    # that are not replaced yet: a third of the time. Here, the names are looked for once.

    @functools.cache
    def _replaceable(package: object) -> list[tuple[str, object]]:
        return [(name, member) for name, member in inspect.getmembers(package) if is_builtin(member)]

    def _members(package: object) -> list[tuple[str, object]]:
        return [(name, member) for name, member in _replaceable(package) if getattr(package, name) is member]

    interpreter.inspect = types.SimpleNamespace(**vars(inspect) | {"getmembers": _members})
