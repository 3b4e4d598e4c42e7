"""Settings in TOML: read from a user's file, checked against the dataclasses, and written into a run's folder."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydrone.ops.packages import needed
from pydrone.ppo.config import TrainConfig

CONFIG_TOML = "config.toml"

# Specific to one run: written as comments, so that a second run does not write into the first one's folder.
OF_THE_RUN = ("run_dir", "resume")

_KINDS = {bool: "true or false", int: "an int", float: "a number", str: "a string"}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a TOML file, nested as the dataclasses are, with their types; those it leaves out are left out.

    Keys are the fields' names or further names, as on the command line, with underscores or hyphens.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not TOML; a key is unknown; a value is not of its field's type.
        ImportError: before Python 3.11, without tomli.
    """
    try:
        import tomllib
    except ModuleNotFoundError:
        with needed("tomli", "a configuration file", "tomli"):
            import tomli as tomllib

    with open(path, "rb") as file:
        try:
            table = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{os.fspath(path)}: expected TOML: {error}") from None
    try:
        return checked(TrainConfig, table)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def checked(cls: type, table: Mapping[str, Any], where: str = "", known_only: bool = False) -> dict[str, Any]:
    """The settings of ``table`` for the dataclass ``cls``, by field, with their types.

    ``known_only`` skips unknown keys, such as another version's in a checkpoint; otherwise they raise ValueError.
    """
    hints, names, values = get_type_hints(cls), dict(_names(cls)), {}
    for key, value in table.items():
        name = names.get(key.replace("-", "_"))
        if name is None:
            if known_only:
                continue
            raise ValueError(_unknown(cls, key, where))
        if name in values:
            raise ValueError(f"{where}{name}: given twice, the second time as {key}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}{name}: expected a table, got {value!r}")
            values[name] = checked(hints[name], value, f"{where}{name}.", known_only)
        else:
            values[name] = _fitted(hints[name], value, f"{where}{name}")
    return values


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two trees of settings; the second takes precedence."""
    both = {**first, **second}
    for name in first.keys() & second.keys():
        if isinstance(first[name], Mapping) and isinstance(second[name], Mapping):
            both[name] = merged(first[name], second[name])
    return both


def write(run_dir: str | os.PathLike[str], config: TrainConfig) -> Path:
    """Writes the resolved settings into a run's folder, for ``pydrone train --config``."""
    path = Path(run_dir) / CONFIG_TOML
    path.write_text(dumps(config), encoding="utf-8")
    return path


def dumps(config: TrainConfig) -> str:
    """The settings as TOML, each below its help text. None, which TOML lacks, becomes a comment."""
    head = "# The settings of this run. `pydrone train --config FILE` takes them; the command line wins."
    return "\n".join([head, *_lines(config, ""), ""])


def _lines(config: Any, table: str) -> Iterator[str]:
    """Values first, then tables, as TOML requires."""
    nested = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            nested.append((f"{table}{field.name}", field, value))
            continue
        yield ""
        yield from (f"# {line}" for line in field.metadata.get("help", "").splitlines())
        if value is None:
            yield f"# {field.name} is not set"
        else:
            yield f"{'# ' if field.name in OF_THE_RUN and not table else ''}{field.name} = {_toml(value)}"
    for name, field, value in nested:
        yield ""
        yield from (f"# {line}" for line in field.metadata.get("help", "").splitlines())
        yield f"[{name}]"
        yield from _lines(value, f"{name}.")


def _toml(x: Any) -> str:
    if isinstance(x, str):
        # JSON strings are TOML strings, except that TOML escapes DEL.
        return json.dumps(x, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(x, bool):
        return str(x).lower()
    if isinstance(x, (int, float)):
        return repr(x)
    if isinstance(x, (tuple, list)):
        return f"[{', '.join(map(_toml, x))}]"
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{_toml(str(name))} = {_toml(value)}" for name, value in x.items()) + "}"
    raise TypeError(f"expected a value that TOML knows, got {x!r}")


def _names(cls: type) -> Iterator[tuple[str, str]]:
    """(name in a file, field) of a dataclass, further names included."""
    for field in dataclasses.fields(cls):
        for name in (field.name, *field.metadata.get("aliases", ())):
            yield name.removeprefix("--").replace("-", "_"), field.name


def _unknown(cls: type, key: str, where: str) -> str:
    """The message for an unknown key: the nearest valid one, and its table."""
    tables = {"": TrainConfig}
    tables |= {name: hint for name, hint in get_type_hints(TrainConfig).items() if dataclasses.is_dataclass(hint)}
    valid = [(name, table) for table, part in tables.items() for name, _ in _names(part)]
    # Ties go to the table that the key is in.
    valid.sort(key=lambda entry: tables[entry[1]] is not cls)
    near = difflib.get_close_matches(key.replace("-", "_"), [name for name, _ in valid], n=1, cutoff=0)[0]
    table = next(table for name, table in valid if name == near)
    place = "" if tables[table] is cls else f" in [{table}]" if table else " at the top, before any table"
    return f"{where}{key}: no such setting; the nearest is {near}{place}"


def _fitted(hint: Any, x: Any, name: str) -> Any:
    """``x`` as the type ``hint``; ValueError where it does not fit."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if x in (None, "None") and types.NoneType in args:
            return None
        for arg in args:
            try:
                return _fitted(arg, x, name)
            except ValueError:
                continue
    elif origin is Literal:
        if any(x == arg and type(x) is type(arg) for arg in args):
            return x
    elif origin is tuple and isinstance(x, (tuple, list)):
        kinds = [args[0]] * len(x) if args[-1:] == (Ellipsis,) else args
        if len(kinds) == len(x):
            return tuple(_fitted(kind, part, f"{name}[{i}]") for i, (kind, part) in enumerate(zip(kinds, x)))
    elif hint is float and isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    elif hint in _KINDS:
        if type(x) is hint:
            return x
    elif origin is not tuple and (hint is Any or isinstance(x, origin or hint)):
        return x
    raise ValueError(f"{name}: expected {_kind(hint)}, got {x!r}")


def _kind(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join('"None"' if arg is types.NoneType else _kind(arg) for arg in args)
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is tuple:
        return "a list" if args[-1:] == (Ellipsis,) else f"a list of {len(args)}"
    return _KINDS.get(hint) or getattr(hint, "__name__", str(hint))
