"""How `--help` looks: what must be given in the first line, then one setting after the other."""

import argparse
import re
from collections.abc import Iterable
from typing import Any

EMPTY_DEFAULT = re.compile(r" \(default(?: factory)?: (?:None|list|dict|\[\]|\(\)|\{\}|)\)$")
REQUIRED = "(required)"
LIST = re.compile(r"(?:list|tuple)\[(.*?)(?:,\.\.\.)?\]$")
MAPPING = re.compile(r"dict\[str,(\w+)\]$")


class HelpText(argparse.HelpFormatter):
    """Leaves out of the usage what is optional, and of a setting's text a default that says nothing."""

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        """What is required comes first."""
        super().add_arguments(sorted(actions, key=lambda action: REQUIRED not in (action.help or "")))

    def _format_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None,
    ) -> str:
        needed = [each for each in actions if not each.option_strings or REQUIRED in (each.help or "")]
        flags = [self._invocation(each) for each in needed if each.option_strings]
        last = [self._invocation(each) for each in needed if not each.option_strings]
        return super()._format_usage(" ".join([self._prog, *flags, "[settings]", *last]), [], [], prefix)

    def _invocation(self, action: argparse.Action) -> str:
        value = str(action.metavar or action.dest).upper()
        if not action.option_strings:
            return f"{value} …" if action.nargs in ("+", "*") else value
        return f"{action.option_strings[0]} …"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = EMPTY_DEFAULT.sub("", action.help or "")
        return re.sub(r"\d+\.\d{5,}", lambda number: f"{float(number[0]):.4g}", text)

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        name = str(action.metavar or "")
        if several := LIST.fullmatch(name):
            action.metavar = f"{several[1]}[,…]"
        elif mapping := MAPPING.fullmatch(name):
            action.metavar = f"name={mapping[1]}[,…]"
        return super()._metavar_formatter(action, default_metavar)
