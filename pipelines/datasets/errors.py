"""What is wrong with a labelled dataset."""

from pipelines.messages import InputError


class DatasetError(InputError):
    """The dataset cannot be used: what is wrong, and what to do."""
