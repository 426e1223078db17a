"""The one exception that the command line turns into a single line and exit status 2."""


class InputError(ValueError):
    """Something the user gave (a file, a value, a name) cannot be used.

    The message is one line that names the file or value and says what to do about it.
    """


class NotFiniteError(InputError):
    """A model's images hold NaN or infinite values: its weights are damaged, or overflow in their dtype."""
