"""A finished model on the Hugging Face hub, in a private repository."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from pipelines.messages import InputError, JobFailed
from pipelines.storage import storage, uris
from pipelines.training import runs


def check_name(repository: str) -> None:
    """Raise InputError when the hub would refuse this name."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repository}: {error}") from error


def push(output: str, repository: str) -> None:
    """Upload best/ to the Hugging Face hub, with the token of its own environment.

    Raises:
        JobFailed: the hub refused, or could not be reached.
    """

    folder = storage.open_storage(uris.join(output, runs.BEST))
    with tempfile.TemporaryDirectory() as local:
        for entry in folder.list():
            Path(local, entry.path).write_bytes(folder.read(entry.path))
        hub = HfApi()
        try:
            hub.create_repo(repository, private=True, exist_ok=True)
            hub.upload_folder(folder_path=local, repo_id=repository)
        except (HTTPError, OSError) as error:
            raise JobFailed(
                f"the model is in {folder.uri}, but its upload to {repository} failed: "
                f"{' '.join(str(error).split())}. See HF_TOKEN and the network; the same command uploads it "
                "without training again"
            ) from error
