"""The one exception that a user of sprue is meant to read."""


class SprueError(Exception):
    """Bad input or a missing service: the message names the culprit and says what to do.

    Entry points print the message alone and exit with status 1; any other exception is a defect of
    the platform and keeps its traceback.
    """
