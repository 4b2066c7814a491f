"""`iab-vision submit COMMAND …`: run a command as a job of a Ray cluster, and end as it ends.

    iab-vision submit --address http://127.0.0.1:8265 classify --inventory s3://b/in.parquet --bundle …
    iab-vision submit status|logs|stop ID

The settings are checked here, before the cluster is asked. The submission id follows from the command and its
settings, so the same line given twice at once, by a person or a scheduler, runs one job: the second attaches.
After its end the line starts another attempt, which does what is left or repeats the verdict.
Exit codes are the command's own; 130 for a job that was stopped.
"""

import datetime
import hashlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs import ray_jobs
from jobs.logs import RUN
from jobs.ray_jobs import RayJobs, Submission
from jobs.settings import ENVIRONMENT, JobConfig, given_settings, split_config
from pipelines.messages import InputError, JobFailed, Stopped
from pipelines.specs import validated

PREFIX = "iab-vision"
ACTIONS = ("status", "logs", "stop")
NOT_IDENTITY = {"debug", "config", "log_format", "ray_address", "num_cpus"}
"""Settings that do not decide what a command makes."""

DONE_ONCE = {"export"}
"""Commands that refuse to repeat what they have made: their success is the answer to the same line."""

log = logging.getLogger(__name__)


@validated
class Entrypoint:
    """What a job's driver needs of the node that it runs on; its workers ask for their own."""

    num_cpus: float = Field(default=0, ge=0)
    """CPUs; 0 also runs on a head that takes no work."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs."""
    memory_bytes: int = Field(default=0, ge=0)
    """Memory."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom resources of a node."""

    def keywords(self) -> dict[str, Any]:
        """The arguments of Ray's client."""
        return {
            "entrypoint_num_cpus": self.num_cpus or None,
            "entrypoint_num_gpus": self.num_gpus or None,
            "entrypoint_memory": self.memory_bytes or None,
            "entrypoint_resources": self.resources or None,
        }


class SubmitConfig(JobConfig):
    """Run a command as a job of a Ray cluster: `submit [settings] COMMAND …`; or status, logs, stop."""

    config_variable: ClassVar[str | None] = None  # the file that it names is the command's

    job: CliPositionalArg[list[str]]
    """The command and its settings; or `status`, `logs`, `stop` and a submission id."""
    address: str | None = None
    """Job server, as http://HOST:8265; unset: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine's."""
    working_dir: str | None = None
    """Folder sent along with the job (or a zip's URI); unset: what is installed on the cluster runs."""
    requirements: str | None = None
    """File of requirements that pip installs for the job, in addition to what the cluster has."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of the job and its workers."""
    entrypoint: Entrypoint = Entrypoint()
    """What the job's driver needs."""
    detach: bool = False
    """Return once the job is submitted."""
    again: bool = False
    """Start `export` also when it succeeded before; other commands are started anyway."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Headers of every request, for a proxy in front of the cluster."""
    ca_file: str | None = None
    """Certificates to check the server's TLS certificate with; unset: the system's."""
    insecure: bool = False
    """Do not check the server's TLS certificate."""
    reconnect_s: float = Field(default=300, ge=0)
    """How long a job server that does not answer, or is not up yet, is asked again, seconds."""

    @classmethod
    def parse(cls, argv: Sequence[str], *, command: str) -> Self:
        """Settings before the submitted command are submit's own, all after it the command's."""
        own = leading_flags(argv)
        return super().parse([*argv[:own], *(["--", *argv[own:]] if argv[own:] else [])], command=command)


def run(config: SubmitConfig) -> int:
    """Submit, attach to, show or stop a job; its exit code."""
    word, *rest = config.job
    if word in ACTIONS:
        if not rest and word != "status":
            raise InputError(f"{word} takes a submission id, or the command and settings that were submitted")
        jobs = connect(config)
        if not rest:
            return show(jobs.list(PREFIX))
        name = named_job(jobs, rest)
        if word == "status":
            return show([jobs.details(name)])
        return stop(jobs, name) if word == "stop" else watch(jobs, name)
    try:
        job = submission(config, word, rest)
    except SystemExit:  # argparse, after the command's --help
        return 0
    return follow_up(connect(config), job, config, again=config.again or word not in DONE_ONCE)


def follow_up(jobs: RayJobs, job: Submission, config: SubmitConfig, *, again: bool) -> int:
    """Submit or attach, and watch. Where a night with other settings runs, ours follows it."""
    while True:
        name, is_ours = jobs.submit(job, again=again)
        if config.detach and not is_ours:
            raise JobFailed(f"{name} runs with other settings; give the line again after its end")
        code = 0 if config.detach else watch(jobs, name)
        if is_ours or code == ray_jobs.STOPPED:
            return code
        log.info("%s had other settings; starting the job with these", name)


def leading_flags(argv: Sequence[str]) -> int:
    """How many arguments come before the first that is neither a flag of submit nor a flag's value."""
    fields = SubmitConfig.model_fields.items()
    switches = {"-h", "--help", *(f"--{name}" for name, field in fields if field.annotation is bool)}
    at = 0
    while at < len(argv) and argv[at].startswith("-") and argv[at] != "--":
        at += 1 if "=" in argv[at] or argv[at].replace("--no-", "--") in switches else 2
    return min(at, len(argv))


def connect(config: SubmitConfig) -> RayJobs:
    """The cluster's job server."""
    return RayJobs(
        config.address,
        headers=config.headers,
        verify=config.ca_file or not config.insecure,
        patience_s=config.reconnect_s,
    )


def submission(config: SubmitConfig, command: str, argv: Sequence[str]) -> Submission:
    """The job that runs a command on the cluster with the settings that it would have here.

    What a YAML file or the environment says here travels as variables of the job: neither exists there.
    """
    settings = parse_command(command, argv)
    variables = {
        ENVIRONMENT + name.upper(): as_variable(value)
        for name, value in given_settings(type(settings), argv).items()
        if name != "config" and value is not None
    }
    name = base_id(command, settings)
    job = {"RAY_JOB_STOP_WAIT_TIME_S": str(ray_jobs.STOP_WAIT_S), RUN: name}
    runtime_env: dict[str, Any] = {"env_vars": job | variables | config.env}
    if config.working_dir:
        runtime_env |= {"working_dir": config.working_dir, "excludes": [".git", ".venv"]}
    if config.requirements:
        runtime_env["pip"] = config.requirements
    return Submission(
        base_id=name,
        entrypoint=shlex.join(["exec", "python", "-m", "jobs", command, *split_config(argv)[1]]),
        runtime_env=runtime_env,
        resources=config.entrypoint.keywords(),
        settings=digest(identity(settings)),
    )


def as_variable(value: Any) -> str:
    """A setting as a variable of the environment; YAML makes a date of `2026-01-01`."""
    return str(value) if isinstance(value, str | datetime.date) else json.dumps(value, default=str)


def parse_command(command: str, argv: Sequence[str]) -> JobConfig:
    """The settings of a command, checked. Raises InputError."""
    from jobs.cli import parse

    if command == "submit":
        raise InputError("submit cannot submit itself")
    return parse(command, argv)


def base_id(command: str, settings: JobConfig) -> str:
    """The same id for the same command and settings; for a night, for the same table and date.

    Two jobs of one id never run at once, and a date has one ledger.
    """
    content = identity(settings)
    date = str(content.get("date", ""))
    if command == "nightly":
        content = {"table": content["table"].rstrip("/"), "date": date}
    return "-".join(part for part in (PREFIX, command, date, digest(content)) if part)


def identity(settings: JobConfig) -> dict[str, Any]:
    """The settings that decide what a command makes."""
    return settings.model_dump(mode="json", exclude=NOT_IDENTITY)


def digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def named_job(jobs: RayJobs, words: Sequence[str]) -> str:
    """The submission id that is given, or that of the last attempt of the command that is given."""
    from jobs.cli import COMMANDS

    if words[0] in COMMANDS:
        return jobs.latest(base_id(words[0], parse_command(words[0], words[1:])))
    return words[0]


def watch(jobs: RayJobs, name: str) -> int:
    """Show a job's log until it ends; its exit code. Interrupted on a terminal, ask whether to stop it."""
    try:
        details = jobs.follow(name)
    except Stopped as stopped:
        if str(stopped) == "SIGINT" and wants_stop(name):
            return report_end(stopped_job(jobs, name))  # it may have ended by itself meanwhile
        raise JobFailed(
            f"{name} runs on; the same command attaches to it, `iab-vision submit stop {name}` stops it"
        ) from None
    return report_end(details)


def wants_stop(name: str) -> bool:
    """Whether the person at the terminal wants the job stopped; no, where there is no terminal."""
    if not sys.stdin.isatty():
        return False
    try:
        return input(f"\nStop {name} on the cluster, too? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        return False


def report_end(details: Any) -> int:
    """Say how a job ended; its exit code."""
    code = ray_jobs.exit_code(details)
    if details.status == "STOPPED":
        log.warning("%s was stopped", details.submission_id)
    elif code and details.driver_exit_code not in (1, 2, 3):
        log.error("%s: %s", details.submission_id, details.message)
    return code


def stop(jobs: RayJobs, name: str) -> int:
    """Stop a job and wait until it has recorded its work and ended."""
    stopped_job(jobs, name)
    return 0


def stopped_job(jobs: RayJobs, name: str) -> Any:
    """A job's details after its end, which is asked for and printed."""
    details = jobs.stop(name)
    print(f"{name}: {details.status}")
    return details


def show(jobs: Sequence[Any]) -> int:
    """Print jobs, one a line: id, status, exit code, seconds."""
    for job in jobs:
        code = ray_jobs.exit_code(job) if job.status.is_terminal() else "-"
        seconds = ((job.end_time or time.time() * 1000) - job.start_time) / 1000 if job.start_time else 0
        print(f"{job.submission_id}  {job.status}  exit code {code}  {seconds:,.0f} s")
    return 0
