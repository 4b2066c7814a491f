"""A storage whose every operation passes through a hook: the seam at which tests crash and interleave."""

from collections.abc import Callable
from functools import partial
from typing import Any

from pipelines.storage import Storage

Hook = Callable[[str, tuple[Any, ...], Callable[[], Any]], Any]
"""hook(operation, its arguments, proceed) -> result."""


class HookedStorage:
    """Does what the storage beneath does, when the hook lets it."""

    def __init__(self, beneath: Storage, hook: Hook) -> None:
        self._beneath, self._hook = beneath, hook

    @property
    def uri(self) -> str:
        return self._beneath.uri

    @property
    def fenced(self) -> bool:
        return self._beneath.fenced

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._beneath, name)
        return lambda *args: self._hook(name, args, partial(method, *args))


class Unfenced(HookedStorage):
    """The same without the conditional put: the first thing to take away when a test must fail."""

    def __init__(self, beneath: Storage, hook: Hook) -> None:
        super().__init__(beneath, hook)

    def create(self, path: str, payload: bytes) -> None:
        self._hook("create", (path, payload), partial(self._beneath.put, path, payload))
