"""Configuration files: RunConfig's keys in YAML or in pyproject.toml; found, read with their lines, changed.

The search order is: the file that was named; `nbaccel.yaml` or the table [tool.nbaccel] of pyproject.toml
in this folder or one above it, as far as the project goes; the user's own file. One file is in force.

YAML is read with version 1.2's idea of plain values, so that `mixed_precision: no` is the text "no" and
1e-3 is a number.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from nbaccel.config import RunConfig, combine
from nbaccel.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "ConfigFile",
    "assignment",
    "change",
    "dump",
    "find_file",
    "load_config",
    "override",
    "read_file",
    "user_file",
    "working_folder",
    "write",
]

PROJECT_FILE = "nbaccel.yaml"
_TOML = "pyproject.toml"


class _Loader(yaml.SafeLoader):
    """Safe, and with YAML 1.2's core schema for plain values."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in (
    ("null", r"~|null|Null|NULL|"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?[0-9]+"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """What stands in a configuration file."""

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[str, int]
    """The line of each key, from 1."""

    def place(self, key: str) -> str:
        """The file and line of a key, for messages: "nbaccel.yaml:3"."""
        line = self.lines.get(key)
        return _shown(self.path) + (f":{line}" if line else "")

    def config(self) -> RunConfig:
        """The configuration it asks for.

        Raises:
            ConfigError: lists everything that is wrong in it, each with its line.
        """
        found, problems = [], []
        for key, value in self.values.items():
            try:
                found.append(_asked(key, value, self.place(key)))
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))
        return combine(*found)


def _asked(key: str, value: Any, place: str) -> RunConfig:
    """One key as a configuration. `sources` is RunConfig's own note of who asked, for nobody to set."""
    return RunConfig.from_mapping({"sources." if key == "sources" else key: value}, place=place)


def load_config(asked: str | Path) -> RunConfig:
    """The configuration in the file `asked`, or with "auto" in the one the search finds, if any.

    Raises:
        ConfigError: there is no such file, or something in it is wrong.
    """
    path = find_file() if asked == "auto" else find_file(asked)
    return RunConfig() if path is None else read_file(path).config()


def find_file(asked: str | Path | None = None) -> Path | None:
    """The file in force: `asked`, else the project's, else the user's; None when there is none.

    Raises:
        ConfigError: `asked` is not there; the project has two; or the folder to search from has been deleted.
    """
    if asked is not None:
        path = Path(asked).expanduser()
        if not path.is_file():
            raise ConfigError(f"there is no configuration file {asked}")
        return path
    here = working_folder()
    for folder in (here, *here.parents):
        both = [path for path in (folder / PROJECT_FILE, folder / _TOML) if _holds(path)]
        if len(both) > 1:
            raise ConfigError(f"{_shown(both[0])} and [tool.nbaccel] in {_shown(both[1])}: keep one of them")
        if both:
            return both[0]
        if (folder / ".git").exists():
            break  # the project ends here
    own = user_file()
    return own if own.is_file() else None


def working_folder() -> Path:
    """The folder this process is in.

    Raises:
        ConfigError: it has been deleted.
    """
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise ConfigError(
            "the folder this process is in has been deleted: change to one that is there (`cd`), and start again"
        ) from error


def user_file(environ: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """The user's own configuration file, by the platform's custom; it need not exist."""
    if platform == "win32":
        base = Path(environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    elif platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        asked = Path(environ.get("XDG_CONFIG_HOME", ""))
        base = asked if asked.is_absolute() else Path.home() / ".config"
    return base / "nbaccel" / "config.yaml"


def _holds(path: Path) -> bool:
    """Whether a file of the project is one of ours."""
    if path.name != _TOML:
        return path.is_file()
    return path.is_file() and re.search(r"^\s*\[tool\.nbaccel[].]", _read(path), re.MULTILINE) is not None


def read_file(path: Path) -> ConfigFile:
    """What stands in the file; whether its keys make sense is for `ConfigFile.config` to say.

    Raises:
        ConfigError: it is no YAML or TOML, a key stands twice, or it does not hold keys at all.
    """
    text = _read(path)
    if path.suffix == ".toml":
        return _read_toml(path, text)
    nodes = _nodes(path, text)
    loader = _Loader("")
    try:
        values = {key: loader.construct_object(node, deep=True) for key, (_, node) in nodes.items()}
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(path, error)) from error
    lines = {key: at.start_mark.line + 1 for key, (at, _) in nodes.items()}
    return ConfigFile(path=path, values=values, lines=lines)


def _nodes(path: Path, text: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Key and value nodes by key."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(path, error)) from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{_shown(path)} holds no keys; write lines like `num_processes: 4`")
    found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            raise ConfigError(
                f"{_shown(path)}:{line} has a key that is no word; write lines like `num_processes: 4`"
            )
        if key.value in found:
            first = found[key.value][0].start_mark.line + 1
            here = key.start_mark.line + 1
            raise ConfigError(f"{_shown(path)}: {key.value} stands twice, in line {first} and in line {here}")
        found[str(key.value)] = (key, value)
    return found


def _yaml_problem(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f":{mark.line + 1}" if mark is not None else ""
    return f"{_shown(path)}{where} is not YAML: {getattr(error, 'problem', None) or error}"


def _read_toml(path: Path, text: str) -> ConfigFile:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{_shown(path)} is not TOML: {error}") from error
    values = document.get("tool", {}).get("nbaccel", {})
    lines: dict[str, int] = {}
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[tool\.nbaccel(?:\.([\w-]+))?\]", line):
            inside = header[1] is None
            if header[1]:
                lines.setdefault(header[1], number)
        elif line.lstrip().startswith("["):
            inside = False
        elif inside and (key := re.match(r"\s*[\"']?([\w-]+)[\"']?\s*[=.]", line)):
            lines.setdefault(key[1], number)
    return ConfigFile(path=path, values=values, lines=lines)


def assignment(text: str) -> tuple[str, Any]:
    """Key and value of `key=value`; the value is read as YAML, and `null` takes the key out.

    Raises:
        ConfigError: it is not written so.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r}: write key=value")
    try:
        return key.strip(), yaml.load(value, Loader=_Loader)  # a SafeLoader of our own
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r}: {getattr(error, 'problem', error)}") from error


def override(config: RunConfig, assignments: Iterable[str], *, place: str = "--set") -> RunConfig:
    """`config` with these `key=value` in force whatever it said; `ddp.bucket_cap_mb=50` sets one option.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    for text in assignments:
        key, value = assignment(text)
        key, dot, part = key.partition(".")
        if dot:
            before = getattr(config, key, None) or {}
            if not isinstance(before, Mapping):
                raise ConfigError(f"{text!r} ({place}): {key} is {before!r} and has no options of its own")
            value = {**before, part: value}
        new = _asked(key, value, place)
        kept = {f.name: getattr(config, f.name) for f in fields(RunConfig) if f.name not in ("sources", key)}
        sources = {name: where for name, where in config.sources.items() if name != key}
        config = combine(RunConfig(**kept, sources=sources), new)
    return config


def dump(values: Mapping[str, Any]) -> str:
    """The text of a YAML file with these keys."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True) if plain else ""


def change(path: Path, values: Mapping[str, Any]) -> str:
    """The YAML file's text with these keys changed, added, or (None) taken out; all else, comments
    too, stays as it is.

    Raises:
        ConfigError: the file cannot be read.
    """
    text = _read(path)
    nodes = _nodes(path, text)
    edits = []
    for key, value in values.items():
        written = "" if value is None else dump({key: value})
        if key in nodes:
            at, node = nodes[key]
            start, end = at.start_mark.index, node.end_mark.index
            if value is None:  # the whole of its lines
                end = text.find("\n", max(start, end - 1)) + 1 or len(text)
            elif text[max(0, end - 1) : end] != "\n":
                written = written.rstrip("\n")  # a comment may follow in the line
            edits.append((start, end, written))
        elif value is not None:
            gap = "" if not text or text.endswith("\n") else "\n"
            edits.append((len(text), len(text), gap + written))
    # from the end, so that positions hold; of those added at the end the last first
    for _, (start, end, written) in sorted(enumerate(edits), key=lambda e: (e[1][0], e[0]), reverse=True):
        text = text[:start] + written + text[end:]
    return text


def write(path: Path, text: str) -> None:
    """Make this the file's text, in a folder that is made if need be.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{_shown(path)} cannot be written: {error.strerror}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_shown(path)} cannot be read: {error}") from error


def _shown(path: Path) -> str:
    """The path as a person would name it."""
    if not path.is_absolute():
        return str(path)
    for base, sign in ((working_folder(), ""), (Path.home(), "~/")):
        if path.is_relative_to(base):
            return f"{sign}{path.relative_to(base).as_posix()}"
    return str(path)
