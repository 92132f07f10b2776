"""What the user asked the bridge for: flags, and the environment that carries them.

The flags are added to SGLang's own parser. They travel to the processes that SGLang spawns
as ``SHMROUTE_*`` environment variables, which also work alone (an engine made from Python,
a launcher that cannot pass flags). No arena named: nothing is asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from shmroute.arena import DEFAULT_RETENTION, DEFAULT_SLOTS, parse_size
from shmroute.segments import check_arena_name

_PREFIX = "SHMROUTE_"


def _flag(value: str) -> bool:
    if value.lower() in ("1", "true", "yes", "on"):
        return True
    if value.lower() in ("", "0", "false", "no", "off"):
        return False
    raise ValueError(f"{value!r} is neither true nor false")


def _count(value: str) -> int:
    if int(value) < 1:
        raise ValueError(f"{value} is less than 1")
    return int(value)


def _seconds(value: str) -> float:
    if not float(value) >= 0:
        raise ValueError(f"{value} is no number of seconds from 0 on")
    return float(value)


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
        return value

    return parse


def _option(parse: Callable[[str], Any], default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"parse": parse, "help": help})


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """An engine's settings; each field is a flag ``--shmroute-*`` and a ``SHMROUTE_*`` variable."""

    arena: str = _option(
        check_arena_name, "", "Name of the shared-memory arena; turns shmroute on."
    )
    capacity: int = _option(
        parse_size, 8 << 30, "Bytes of each data-parallel rank's arena, e.g. 8GiB (default)."
    )
    slots: int = _option(_count, DEFAULT_SLOTS, "Records that an arena holds at once.")
    table: str = _option(
        _choice("auto", "gpu", "host"), "auto", "Where the route table lives: auto, gpu or host."
    )
    on_full: str = _option(
        _choice("inline", "error"),
        "inline",
        "When the arena is full: send the rows inline, or an error ticket.",
    )
    retention: float = _option(
        _seconds,
        DEFAULT_RETENTION,
        "Seconds after which an unreleased record may be evicted, if space is needed.",
    )
    keep_versions: int | None = _option(
        _count, None, "Weight versions after which it may be evicted (default: no such limit)."
    )
    checksum: bool = _option(_flag, False, "Store a CRC-32 of each record's rows.")
    shadow: bool = _option(
        _flag, False, "Keep SGLang's own host cache and compare every record with it."
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read ``SHMROUTE_*``; raises ValueError naming the variable that cannot be."""
        values = {}
        for field in dataclasses.fields(cls):
            variable = _PREFIX + field.name.upper()
            text = environment.get(variable, "")
            if text:
                values[field.name] = parse_value(field, text, variable)
        return cls(**values)

    def to_environment(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Write what differs from the defaults, for the processes that are spawned."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            variable = _PREFIX + field.name.upper()
            if value == field.default:
                environment.pop(variable, None)
            else:
                environment[variable] = str(int(value) if isinstance(value, bool) else value)


def parse_value(field: dataclasses.Field[Any], text: str, name: str) -> Any:
    """Parse one setting's text; the ValueError names the flag, variable or argument."""
    try:
        return field.metadata["parse"](text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _argument(field: dataclasses.Field[Any]) -> str:
    return "--shmroute-" + field.name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to SGLang's parser. Absent flags leave the environment's value alone."""
    group = parser.add_argument_group("shmroute")
    for field in dataclasses.fields(Settings):
        parse, text = field.metadata["parse"], field.metadata["help"]
        name = _argument(field)
        if parse is _flag:
            group.add_argument(name, action="store_true", default=None, help=text)
        else:
            group.add_argument(name, default=None, help=text)


def from_arguments(arguments: argparse.Namespace) -> Settings:
    """The environment's settings, overridden by the flags that were given."""
    settings = Settings.from_environment()
    given = {}
    for field in dataclasses.fields(Settings):
        value = getattr(arguments, "shmroute_" + field.name, None)
        if value is not None:
            text = value if isinstance(value, str) else str(value)
            given[field.name] = parse_value(field, text, _argument(field))
    if given and not (given.get("arena") or settings.arena):
        raise ValueError(f"{_argument_of(next(iter(given)))} needs --shmroute-arena NAME")
    return dataclasses.replace(settings, **given)


def _argument_of(name: str) -> str:
    return next(_argument(field) for field in dataclasses.fields(Settings) if field.name == name)


def flags_wanted(argv: list[str] | None = None) -> bool:
    """Whether this command line could hold our flags, so that the parser must know them."""
    words = sys.argv[1:] if argv is None else argv
    return any(
        word.startswith(("--shmroute-", "--config")) or word in ("-h", "--help") for word in words
    )
