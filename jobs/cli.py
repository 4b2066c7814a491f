"""The command line: `iab-vision COMMAND …`, one subcommand per job.

Only the chosen command's settings are imported before it runs, and no heavy library with them, so `--help`
answers at once. Exit codes: 0 done, 1 failed, 2 wrong input, 3 refused by a quality gate.
"""

import contextlib
import importlib
import logging
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, NoReturn

from jobs.cluster import quieten
from jobs.logs import start_logging
from jobs.signals import stoppable
from pipelines.messages import CommandError, InputError, JobFailed, Refused, Stopped, redact

if TYPE_CHECKING:
    from jobs.settings import JobConfig

EXIT_CODES: dict[type[CommandError], int] = {JobFailed: 1, InputError: 2, Refused: 3}


@dataclass(frozen=True)
class Command:
    module: str
    config: str
    """Class of its settings, in that module or, as `module:Class`, in one that is imported more quickly."""
    summary: str

    def settings(self) -> "type[JobConfig]":
        """The class of its settings."""
        name = self.config if ":" in self.config else f"{self.module}:{self.config}"
        cls: type[JobConfig] = pkgutil.resolve_name(f"jobs.{name}")
        return cls


COMMANDS = {
    "demo": Command("run_demo", "DemoConfig", "the whole story on pictures drawn here"),
    "inspect": Command("inspect_dataset", "InspectConfig", "look at labelled images before training on them"),
    "train": Command("train_vit", "config:TrainConfig", "fine-tune a Vision Transformer on labelled images"),
    "calibrate": Command(
        "calibrate_run", "CalibrateConfig", "refit a run's temperature and thresholds without training"
    ),
    "tune": Command("tune_vit", "config:TuneConfig", "search for a better training recipe"),
    "export": Command("export_onnx", "ExportConfig", "turn a checkpoint into a certified ONNX bundle"),
    "certify": Command("certify_bundle", "CertifyConfig", "add this machine's certificate to a bundle"),
    "classify": Command(
        "classify_images", "config:ClassifyConfig", "label an inventory into a Parquet table"
    ),
    "nightly": Command("run_nightly", "config:NightlyConfig", "publish a date, at the cost of what changed"),
    "prune": Command("prune_table", "config:PruneConfig", "remove the oldest dates of a table"),
    "evaluate": Command("evaluate_model", "EvaluateConfig", "measure a run or a bundle on labelled images"),
    "compare": Command(
        "compare_tables", "config:CompareConfig", "which labels differ between two nights or bundles"
    ),
    "predict": Command("predict_images", "PredictConfig", "label a few images on the terminal"),
    "submit": Command("submit_job", "SubmitConfig", "run a command on a Ray cluster, and end as it ends"),
    "taxonomy": Command("show_taxonomy", "TaxonomyConfig", "list or search the categories"),
    "verify": Command("verify_output", "VerifyConfig", "prove that predictions or a bundle are whole"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: iab-vision COMMAND [settings]",
            "",
            "Categorise images into the IAB Content Taxonomy.",
            "",
            "commands:",
            *lines,
            "",
            "`iab-vision COMMAND --help` lists a command's settings. Each can also be set in the YAML file",
            "named by --config, or in the environment as IAB_VISION_<SETTING>.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "--version"):
        print(f"iab-vision {metadata.version('iab-vision')}" if arguments == ["--version"] else usage())
        return 0 if arguments else 2
    name, *rest = arguments
    debug = "--debug" in rest
    try:
        settings = parse(name, rest)
        debug = settings.debug
        return run(name, settings)
    except CommandError as error:
        if debug:
            traceback.print_exc()
        print(f"iab-vision {name}: {redact(str(error))}", file=sys.stderr)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except KeyboardInterrupt:
        print(f"iab-vision {name}: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the last border before the user: any bug becomes one paragraph
        if debug:
            raise
        print(
            f"iab-vision {name}: {type(error).__name__}: {redact(str(error))} "
            "(the same command with --debug shows where)",
            file=sys.stderr,
        )
        return 1


def parse(name: str, argv: Sequence[str]) -> "JobConfig":
    """The settings of a command. Raises InputError."""
    if name not in COMMANDS:
        from pipelines.messages import suggestion

        hint = suggestion(name, list(COMMANDS))
        raise InputError(f"there is no such command{hint}; the commands are {', '.join(COMMANDS)}")
    return COMMANDS[name].settings().parse(argv, command=name)


def run(name: str, settings: "JobConfig") -> int:
    start_logging(settings.log_format, name)
    quieten()
    module = importlib.import_module(f"jobs.{COMMANDS[name].module}")
    try:
        with stoppable():
            code: int = module.run(settings)
    except Stopped as stop:
        raise JobFailed(f"stopped by {stop}; run the same command again") from None
    except SystemExit:  # Ray's own answer to SIGTERM while it starts
        raise JobFailed("stopped; run the same command again") from None
    return code


def entry() -> NoReturn:
    """The console script: run the command and end the process at once, whatever threads a failure left."""
    try:
        code = main()
    except SystemExit as ended:  # argparse, after --help
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    entry()
