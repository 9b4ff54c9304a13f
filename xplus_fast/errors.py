"""The one exception for what a user can put right."""


class UserError(ValueError):
    """Bad input. The message is one clear line, or each argument is one; the command line prints
    them and exits with 2."""

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))
