"""Configuration files: YAML, decoded strictly into msgspec structs. An unknown key is an error that names its path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from podwire.errors import PodwireError

T = TypeVar("T")


class ConfigError(PodwireError):
    """A configuration that cannot be used: the message names the file, the field, the value and what would be right."""


def load(path: Path, kind: type[T], dec_hook: Callable[[Any, Any], Any] | None = None) -> T:
    """Reads the YAML file at `path` into `kind`. An empty file is all defaults.

    Raises ConfigError when the file cannot be read, is not YAML, or does not fit.
    """
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        return msgspec.convert({} if plain is None else plain, kind, dec_hook=dec_hook)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error
