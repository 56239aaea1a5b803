"""The one exception that is the user's to mend."""


class InputError(Exception):
    """Bad input or configuration; its message says what is wrong, where, and what to do next.

    Stages print the message without a traceback and exit with code 2.
    """
