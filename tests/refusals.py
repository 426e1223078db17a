"""A check of errors that leaves their wording free."""

import contextlib
from collections.abc import Iterator

import pytest

from far.errors import InputError


@contextlib.contextmanager
def refused(*named: object, error: type[Exception] = InputError) -> Iterator[None]:
    """Expect an ``error`` of one line that names every file, key or value of ``named``."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for name in named:
        assert str(name) in message, f"{name} is not named in: {message}"
