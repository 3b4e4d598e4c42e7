"""Optional packages: what an error says where one cannot be imported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needed(module: str, by: str, install: str) -> Iterator[None]:
    """For the import of an optional package: says whether it is missing, or which import of its own fails.

    Args:
        module: the package's import name.
        by: what needs it.
        install: what pip installs it by.

    Raises:
        ImportError: in place of the import's own, which stays its cause.
    """
    try:
        yield
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            raise ImportError(f"{by} needs {module}: `pip install {install}` installs it") from error
        raise ImportError(f"{by} needs {module}, which is installed, but cannot be imported: {error}") from error
