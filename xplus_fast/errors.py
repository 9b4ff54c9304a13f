"""The one exception for what a user can put right."""


class UserError(ValueError):
    """Bad input. The message is one clear line; the command line prints it and exits with 2."""
