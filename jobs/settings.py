"""How a command's settings are read: command line > `IAB_VISION_*` environment > `--config FILE` > defaults.

Whatever is wrong becomes one paragraph that names the value, where it came from, and what it must be.
Nothing here imports a heavy library.
"""

import argparse
import copy
import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import pydantic
import yaml
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from jobs.help_text import HelpText
from jobs.logs import LogFormat
from pipelines.messages import InputError, suggestion
from pipelines.specs import wrong_setting
from pipelines.storage.uris import is_local, local_path

ENVIRONMENT = "IAB_VISION_"
EXAMPLES = {
    "dict_type": "{photo_url: uri} in YAML or photo_url=uri in a flag",
    "mapping_type": "{photo_url: uri} in YAML or photo_url=uri in a flag",
    "list_type": "[a, b] in YAML or a,b in a flag",
    "tuple_type": "[a, b] in YAML or a,b in a flag",
}
"""pydantic's name of a wrong form -> what the right form looks like."""
Spec = TypeVar("Spec")


def locate(uri: str) -> str:
    """A local path made absolute, for Ray's workers have a working directory of their own; else the URI."""
    return str(local_path(uri)) if is_local(uri) else uri


Location = Annotated[str, pydantic.AfterValidator(locate)]


def refuse_file(uri: str) -> str:
    """A folder to write to, before anything costly: raises ValueError for a file that is there."""
    if is_local(uri) and local_path(uri).is_file():
        raise ValueError(f"{uri} is a file; name a folder")
    return uri


Folder = Annotated[str, pydantic.AfterValidator(refuse_file)]


def refuse_other_dates(given: object) -> object:
    """Text must be `YYYY-MM-DD`: raises ValueError for the seconds and times that pydantic takes too."""
    is_date = isinstance(given, datetime.date) and not isinstance(given, datetime.datetime)
    if is_date or (isinstance(given, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", given, re.ASCII)):
        return given
    raise ValueError(f"{given} is no date; write it as YYYY-MM-DD, such as 2026-11-21")


Date = Annotated[datetime.date, pydantic.BeforeValidator(refuse_other_dates)]


def field_of(spec: type, name: str) -> Any:
    """A field of validated settings, to be a setting of a command under its own name."""
    fields: dict[str, FieldInfo] = spec.__pydantic_fields__  # type: ignore[attr-defined]
    return copy.copy(fields[name])


def flags_of(spec: type, *names: str) -> Any:
    """A base class with the fields of validated settings, all or these, as settings of a command."""
    fields: dict[str, FieldInfo] = spec.__pydantic_fields__  # type: ignore[attr-defined]
    given: dict[str, Any] = {
        name: (fields[name].annotation, field_of(spec, name)) for name in names or fields
    }
    return pydantic.create_model(spec.__name__, __base__=JobConfig, **given)


def part_of(config: "JobConfig", spec: type[Spec], **given: Any) -> Spec:
    """The settings of a room: those given here, else a command's of the same name, else the defaults."""
    fields: dict[str, FieldInfo] = spec.__pydantic_fields__  # type: ignore[attr-defined]
    names = fields.keys() & type(config).model_fields.keys()
    return spec(**{name: getattr(config, name) for name in names} | given)


class JobConfig(BaseSettings):
    """Settings every command has."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=ENVIRONMENT,
        env_nested_delimiter="__",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
    )

    config_variable: ClassVar[str | None] = f"{ENVIRONMENT}CONFIG"
    """Variable that names the YAML file where no flag does."""
    config: str | None = None
    """YAML file with any of these settings."""
    debug: bool = False
    """Show the traceback of a failure."""
    log_format: LogFormat = "text"
    """`json` writes one JSON object for each line of the log."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is given in code: `parse` adds the environment, the YAML file and the flags."""
        return (init_settings,)

    @classmethod
    def parse(cls, argv: Sequence[str], *, command: str) -> Self:
        """Settings from a command line.

        Raises:
            InputError: an unknown flag or key, a value of the wrong type or out of its limits.
        """
        refuse_unknown_variables()
        try:
            below = given_settings(cls, argv)
            flags: CliSettingsSource[Any] = CliSettingsSource(
                cls,
                f"iab-vision {command}",
                cli_parse_args=list(argv),
                formatter_class=HelpText,
            )
            return cls(_cli_settings_source=flags, **below)  # type: ignore[call-arg]
        except pydantic.ValidationError as error:
            told = (explain(dict(detail), cls, argv) for detail in error.errors())
            raise InputError("; ".join(told)) from error
        except SettingsError as error:
            raise InputError(explain_flags(str(error), cls, command)) from error


def given_settings(cls: type[JobConfig], argv: Sequence[str]) -> dict[str, Any]:
    """What the YAML file and the environment say for a command: everything below its flags."""
    return merge(read_yaml(config_file(cls, argv)), Environment(cls)())


class Environment(EnvSettingsSource):
    """Variables `IAB_VISION_<SETTING>`, in which lists and mappings may be written as on the command line."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """JSON, or `a,b` for a list, or `a=1,b=2` for a mapping."""
        try:
            return json.loads(value)
        except ValueError:
            items = [item.strip() for item in str(value).split(",")]
            if all("=" in item for item in items) and "dict" in str(field.annotation):
                return dict(item.split("=", 1) for item in items)
            return items


def refuse_unknown_variables() -> None:
    """Refuse a variable `IAB_VISION_*` that is a setting of no command; another command's may be set."""
    given = {name.upper() for name in os.environ if name.upper().startswith(ENVIRONMENT)}
    if not given:
        return
    from jobs.cli import COMMANDS

    known = {
        ENVIRONMENT + name.replace(".", "__").upper()
        for command in COMMANDS.values()
        for setting in settings_of(command.settings())
        for name in (setting, setting.partition(".")[0])
    }
    if unknown := sorted(name for name in given - known if not name.startswith(f"{ENVIRONMENT}TEST_")):
        raise InputError(f"{unknown[0]} is not a setting{suggestion(unknown[0], sorted(known))}")


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both have a value, `above` has its way."""
    both = dict(below)
    for key, value in above.items():
        inner = both.get(key)
        both[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both


def split_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file named by `--config`, if any, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        known, others = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error
    return known.config, others


def config_file(cls: type[BaseSettings], argv: Sequence[str]) -> str | None:
    """The file named by `--config` or else by the command's variable, if any."""
    path, _ = split_config(argv)
    variable = getattr(cls, "config_variable", None)
    return path or (os.environ.get(variable) if variable else None)


def read_yaml(path: str | None) -> dict[str, Any]:
    """The settings of the YAML file, if one is named. Raises InputError, in one line, if it is none."""
    if path is None:
        return {}
    try:
        content = yaml.safe_load(read_file(path)) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or an unknown scheme
        raise InputError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"--config {path} holds a {type(content).__name__}; it must be a mapping of settings"
        )
    if wrong := [key for key in content if not isinstance(key, str)]:
        raise InputError(f"--config {path}: {wrong[0]!r} is not a setting; keys are names of settings")
    return {**content, "config": path}


def read_file(path: str) -> str:
    if is_local(path):
        return Path(path).read_text(encoding="utf-8")
    from pipelines.storage.storage import read_uri  # heavy, and needed here alone

    return read_uri(path).decode()


def settings_of(cls: type[BaseSettings]) -> dict[str, bool]:
    """Every setting by its name in a YAML file, nested ones with their section; whether it has a flag."""
    names: dict[str, bool] = {}
    for name, field in cls.model_fields.items():
        nested = getattr(field.annotation, "__pydantic_fields__", None)
        positional = any("CliPositionalArg" in str(mark) for mark in field.metadata)
        names |= dict.fromkeys([f"{name}.{inner}" for inner in nested] if nested else [name], not positional)
    return names


def explain(detail: Mapping[str, Any], cls: type[BaseSettings], argv: Sequence[str]) -> str:
    """One wrong value: where it was set, what it is, what it must be."""
    loc = [part for part in detail["loc"] if isinstance(part, str)]  # without the places in lists
    written = ".".join(loc)
    if detail["type"] == "missing":
        flagged = settings_of(cls).get(written, True)
        return f"{flag(written)} is required" if flagged else f"{written} is required"
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{written} is not a setting{suggestion(written, list(settings_of(cls)))}"
    told = wrong_setting(detail, origin(cls, loc, argv))
    if detail["type"] == "string_type" and isinstance(detail["input"], int | float):
        told += f"; quote it: '{detail['input']}'"
    if detail["type"] in EXAMPLES:
        told += f", such as {EXAMPLES[detail['type']]}"
    return told


def origin(cls: type[BaseSettings], loc: Sequence[str], argv: Sequence[str]) -> str:
    """The flag, the variable or the key of the YAML file that a setting's value came from."""
    name = flag(".".join(loc))
    if any(argument.split("=", 1)[0] == name for argument in argv):
        return name
    variables = ("__".join(loc[:depth]).upper() for depth in range(len(loc), 0, -1))
    if found := next((v for v in variables if f"{ENVIRONMENT}{v}" in os.environ), None):
        return f"{ENVIRONMENT}{found}"
    path = config_file(cls, argv)
    return f"{'.'.join(loc)} in {path}" if path else name


def flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def explain_flags(message: str, cls: type[BaseSettings], command: str) -> str:
    """What is wrong with the command line as a whole, with the nearest known flag."""
    text = message.removeprefix("error parsing CLI: ")
    if pairs := re.search(r"Parsing error encountered for (\w+): not enough values", text):
        text = f"{flag(pairs[1])} takes name=value, separated by commas"
    hint = ""
    if unknown := re.search(r"unrecognized arguments: (\S+)", text):
        given, settings = unknown[1].split("=", 1)[0], settings_of(cls)
        if settings.get(given.removeprefix("--").replace("-", "_")) is False:
            hint = f" (give it without {given})"
        else:
            hint = suggestion(given, [flag(name) for name, flagged in settings.items() if flagged])
    return f"{text}{hint}; `iab-vision {command} --help` lists the settings"
