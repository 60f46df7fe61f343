"""The user's mistakes: what every command turns into one line and exit code 2."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what came, what was needed and what to do."""
