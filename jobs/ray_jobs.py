"""Jobs on a Ray cluster's job server: submitted once, followed to their end, stopped.

The server may be not up yet, or be restarted: what is asked here is asked again until it is answered, for as
long as `patience_s`.
"""

import logging
import os
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from jobs.cluster import use_token
from pipelines.messages import InputError, JobFailed, first_line, redact, root_cause

STOPPED = 130
"""Exit code for a job that was stopped, as shells count an interrupted command."""
POLL_S, LONGEST_POLL_S = 1.0, 10.0
"""Time between two looks at a job, seconds."""
STOP_WAIT_S = 60
"""Time from a job's SIGTERM to its SIGKILL, seconds; Ray's own 3 s are too short for a ledger entry."""
SETTINGS = "iab_vision_settings"
"""Key of a job's metadata."""
ANSWER_S, UPLOAD_S = 60, 900
"""Longest time for an answer of the server, seconds, and for one to `--working-dir` (at most 500 MiB)."""
Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submission:
    """What the cluster is to run."""

    base_id: str
    entrypoint: str
    runtime_env: Mapping[str, Any]
    resources: Mapping[str, Any]
    """Keywords `entrypoint_*` of Ray's client."""
    settings: str = ""
    """Digest of all settings that decide what is made; one `base_id` may have several."""


class RayJobs:
    """A connection to a job server."""

    def __init__(
        self, address: str | None, *, headers: Mapping[str, str], verify: bool | str, patience_s: float
    ) -> None:
        """Connect; the first answer is waited for as long as any other.

        Args:
            verify: whether TLS certificates are checked, or the authority's file that they are checked with.

        Raises:
            InputError: the address or the TLS files are wrong, or the token was refused.
            JobFailed: nothing has answered for `patience_s`.
        """
        use_token()
        if address:  # Ray takes this variable before the address that it is given
            os.environ["RAY_API_SERVER_ADDRESS"] = address
        named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
        self._server = redact(named or "this machine")
        self._patience_s = patience_s
        self._client = self._ask(lambda: connect(named, headers=headers, verify=verify))

    def submit(self, job: Submission, *, again: bool) -> tuple[str, bool]:
        """Start a job, or find the attempt of it that runs.

        Returns:
            The submission id, and whether that attempt has our settings.

        Args:
            again: start another attempt of a job that succeeded; else that one is found.
        """
        attempt = 1
        while True:
            name = attempt_id(job.base_id, attempt)
            known = self.find(name)
            if known is None and self._start(name, job):
                log.info("submitted as %s", name)
                return name, True
            known = known or self.details(name)
            if known.status in ("PENDING", "RUNNING"):
                is_ours = (known.metadata or {}).get(SETTINGS) == job.settings
                log.info(
                    "%s runs already%s: attached to it", name, "" if is_ours else ", with other settings"
                )
                return name, is_ours
            if known.status == "SUCCEEDED" and not again:
                log.info("%s is done already (--again starts it once more)", name)
                return name, True
            attempt += 1

    def _start(self, name: str, job: Submission) -> bool:
        """Whether the job was started; False where another submission of it was first."""

        def start() -> bool:
            try:
                self._client.submit_job(
                    entrypoint=job.entrypoint,
                    submission_id=name,
                    runtime_env=dict(job.runtime_env),
                    metadata={SETTINGS: job.settings},
                    **job.resources,
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                if "No available agent" in str(error):  # a head that has only just started
                    raise
                raise JobFailed(f"the cluster did not take the job: {root_cause(str(error))}") from error
            except ValueError as error:
                raise InputError(f"the job's environment is wrong: {first_line(error)}") from error
            return True

        return self._ask(start)

    def find(self, name: str) -> Any:
        """What the server knows of a job, None if nothing."""
        try:
            return self._ask(lambda: self._client.get_job_info(name))
        except RuntimeError as error:
            if "status code 404" in str(error):
                return None
            raise

    def details(self, name: str) -> Any:
        """What the server knows of a job. Raises JobFailed when it knows nothing."""
        found = self.find(name)
        if found is None:
            raise JobFailed(
                f"the cluster knows no job {name}; after a restart of its head the same command starts it"
            )
        return found

    def latest(self, base_id: str) -> str:
        """The last attempt of a job."""
        attempt = 1
        while self.find(attempt_id(base_id, attempt + 1)):
            attempt += 1
        return attempt_id(base_id, attempt)

    def list(self, prefix: str) -> list[Any]:
        """The jobs whose id starts so, oldest first."""
        jobs = self._ask(self._client.list_jobs)
        ours = [job for job in jobs if (job.submission_id or "").startswith(prefix)]
        return sorted(ours, key=lambda job: job.start_time or 0)

    def stop(self, name: str) -> Any:
        """Ask a job to stop and wait for its end, at most `STOP_WAIT_S` later; its details."""
        if not self.details(name).status.is_terminal():
            self._ask(lambda: self._client.stop_job(name))
        deadline = time.monotonic() + STOP_WAIT_S + 30
        while not (details := self.details(name)).status.is_terminal():
            if time.monotonic() > deadline:
                raise JobFailed(f"{name} has not stopped; `iab-vision submit logs` shows why")
            time.sleep(POLL_S)
        return details

    def follow(self, name: str) -> Any:
        """Print a job's log as it grows, each character once, until the job ends; its details.

        The log is read again and again, in whole: Ray's stream of it may end early (ray#60665). It comes from
        the job's own node, so a log that is not answered is no outage of the server.
        """
        shown, told, is_missing = 0, "", False
        while True:
            started = time.monotonic()
            details = self.details(name)
            if details.status == "PENDING":
                if details.message and details.message != told:
                    log.info("waiting: %s", told := details.message)
            else:
                text = self._read_log(name, is_known_missing=is_missing)
                print((text or "")[shown:], end="", flush=True)
                shown = max(shown, len(text or ""))
                if details.status.is_terminal() and (text is not None or is_missing):
                    return details
                is_missing = text is None
            took_s = time.monotonic() - started
            time.sleep(min(max(POLL_S, 10 * took_s), LONGEST_POLL_S))  # a long log is read less often

    def _read_log(self, name: str, *, is_known_missing: bool) -> str | None:
        """A job's log in whole; None, with a warning the first time, where it cannot be read now."""
        import requests

        try:
            log_text: str = self._client.get_job_logs(name)
        except (requests.RequestException, RuntimeError) as error:
            if not is_known_missing:
                reason = redact(root_cause(str(root_error(error))))
                log.warning("the log of %s cannot be read now: %s", name, reason)
            return None
        return log_text

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """The server's answer, once it can be reached. Raises JobFailed after `patience_s`."""
        deadline, told = time.monotonic() + self._patience_s, False
        while True:
            try:
                return question()
            except Exception as error:  # `is_outage` names those that are mapped
                if not is_outage(error):
                    raise
                reason = redact(first_line(root_error(error)))
                if time.monotonic() > deadline:
                    raise JobFailed(
                        f"no Ray job server answers at {self._server}, asked for {self._patience_s:.0f} s "
                        f"(--reconnect-s): {reason}; check --address (http://HOST:8265) and the head. A job "
                        "that was submitted may still run, and the same command attaches to it"
                    ) from error
                if not told:
                    log.warning(
                        "no Ray job server answers at %s (%s); asking again for %.0f s (--reconnect-s)",
                        self._server, reason, self._patience_s,
                    )  # fmt: skip
                told = True
                time.sleep(POLL_S)


def connect(address: str | None, *, headers: Mapping[str, str], verify: bool | str) -> Any:
    """Ray's client of the job server. Raises InputError for what asking again does not mend."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class TimedClient(JobSubmissionClient):  # type: ignore[misc]  # Any, for mypy
        """Ray's own client waits without end for a server that is silent (Ray 2.60)."""

        def _do_request(self, method: str, endpoint: str, **content: Any) -> Any:
            limit_s = UPLOAD_S if method == "PUT" else ANSWER_S
            return super()._do_request(method, endpoint, timeout=limit_s, **content)

    # not earlier: Ray sets its levels at import
    logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.ERROR)
    try:
        refuse_malformed(address)
        return TimedClient(address, headers=dict(headers), verify=verify)
    except AuthenticationError as error:
        raise InputError(
            "the cluster asks for a token and refused ours; put the cluster's token into RAY_AUTH_TOKEN "
            "or into the file ~/.ray/auth_token (`ray get-auth-token` on the head shows it)"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        root = root_error(error)
        if isinstance(root, ssl.SSLCertVerificationError):
            raise InputError(
                f"the certificate of {redact(str(address))} is not trusted: {root.verify_message}; give its "
                "authority's file as --ca-file, or --insecure"
            ) from error
        if is_outage(error) and (address or "any running Ray" not in str(error)):
            raise
        raise InputError(
            f"no Ray job server answers: {first_line(error)}; give its address as --address http://HOST:8265"
        ) from error


def refuse_malformed(address: str | None) -> None:
    """Raise ValueError for an http address without a host, or with a port that is no number."""
    parts = urlsplit(address or "")
    if parts.scheme in ("http", "https") and not (parts.hostname and parts.port != 0):
        raise ValueError(f"{address} names no host")


def is_outage(error: Exception) -> bool:
    """Whether a server is not reached for now, rather than has refused what was asked."""
    import requests
    from ray.exceptions import RpcError

    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code >= 500
    if isinstance(error, requests.RequestException):
        return not isinstance(error, ValueError)  # a malformed address, or an answer that is not JSON
    if isinstance(error, RuntimeError):
        return "status code 5" in str(error)
    return isinstance(error, (ConnectionError, RpcError))


def root_error(error: BaseException) -> Any:
    """What an error began with, such as `[Errno 111] Connection refused`."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return error


def exit_code(details: Any) -> int:
    """The command's own exit code, 0 to 3 (1 also for a driver that was killed); `STOPPED` if stopped."""
    if details.status == "STOPPED":
        return STOPPED
    code = details.driver_exit_code
    if details.status == "SUCCEEDED":
        return 0
    return code if code in (1, 2, 3) else 1


def attempt_id(base_id: str, attempt: int) -> str:
    """The submission id of a job's n-th attempt: the server takes each id once."""
    return base_id if attempt == 1 else f"{base_id}-a{attempt}"
