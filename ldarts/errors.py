"""What the scripts print as one line."""


class InputError(ValueError):
    """Input that the user can put right; the scripts print it as one line and exit with status 2."""


class NotFinite(ArithmeticError):
    """A quantity of the run became NaN or infinite; the scripts print it as one line and exit with status 3."""
