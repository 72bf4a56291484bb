"""What the user can put right."""


class UserError(Exception):
    """A wrong flag, corpus or folder: one line for the user, without a traceback."""
