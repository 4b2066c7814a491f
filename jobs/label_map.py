"""Load a labelled dataset for a command; labels that are not understood are written to a file to correct."""

from typing import TYPE_CHECKING

from pipelines.messages import InputError
from pipelines.storage.uris import join

if TYPE_CHECKING:
    from pipelines.datasets.dataset import LabelledData
    from pipelines.datasets.settings import DataSettings

FILE = "label_map.csv"


def load_dataset(settings: "DataSettings", output: str, *, otherwise: str = "") -> "LabelledData":
    """The dataset.

    Args:
        otherwise: what else the user may do about labels that are not understood.

    Raises:
        InputError: it cannot be used; of unknown labels, a label map with guesses is left in `output`.
    """
    from pipelines.datasets import dataset
    from pipelines.storage.storage import open_storage

    try:
        return dataset.load(settings)
    except dataset.UnknownLabels as error:
        open_storage(output).put(FILE, error.label_map())
        file = join(output, FILE)
        add = "add its lines to your label map" if settings.label_map else f"give --label-map {file}"
        raise InputError(
            f"{error}\n{file} has each of them with the best guess: correct it and {add}{otherwise}"
        ) from error
