"""The one exception for bad input: what a user can mend, as against a defect of ours."""


class InputError(ValueError):
    """Bad input (a file, a flag, a checkpoint, data). The message is one line that says what is wrong and what to do.

    Commands print it as `error: <message>` and exit with code 2; anything else that escapes is a defect and keeps its traceback.
    """
