"""Exceptions that the command line prints as a single line, with exit status 2."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Invalid input from the user: a file, a value or a name.

    The message is one line that names the file or value and the remedy.
    """


class NotFiniteError(InputError):
    """NaN or infinite values in a model's images: its weights are damaged, or overflow in their dtype."""


@contextlib.contextmanager
def prefix_errors(prefix: str, remedy: str = "") -> Iterator[None]:
    """Put ``prefix`` before, and ``remedy`` after, the message of an :class:`InputError` of the block.

    The error keeps its class, such as :class:`NotFiniteError`.
    """
    try:
        yield
    except InputError as error:
        raise type(error)(f"{prefix}{error}{remedy}") from error
