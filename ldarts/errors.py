"""The one exception that stands for bad input."""


class InputError(ValueError):
    """Input that the user can put right; the scripts print it as one line and exit with status 2."""
