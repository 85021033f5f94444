"""The one exception for bad input: what a user can mend, as against a defect of ours."""

import pathlib


class InputError(ValueError):
    """Bad input (a file, a flag, a checkpoint, data). The message is one line that says what is wrong and what to do.

    Commands print it as `error: <message>` and exit with code 2; anything else that escapes is a defect and keeps its traceback.
    """


def damaged(path: pathlib.Path) -> InputError:
    """What to raise for a file of an interrupted run that is not as it was left."""
    return InputError(
        f"{path} of the unfinished run is damaged or gone: begin anew with --noresume"
    )
