"""Errors that a user can act on. Each is one line: what, where, what to do. `exit_code` is what `lsg` ends with."""


class LsgError(Exception):
    """Base of all errors that are reported in one line, without a traceback."""

    exit_code = 1


class ConfigError(LsgError):
    """A configuration field is unknown, missing, of another type, or impossible."""

    exit_code = 65


class InputError(LsgError):
    """A file or array given by the user is missing, broken or does not fit."""

    exit_code = 65


class CheckpointError(LsgError):
    """A stored checkpoint is damaged, incomplete or belongs to something else."""

    exit_code = 65


class BusyError(LsgError):
    """The output folder is in use by another run."""

    exit_code = 1


class NonFiniteError(LsgError):
    """Training was aborted on non-finite values."""

    exit_code = 70


class Preempted(LsgError):
    """The run was asked to stop, saved its state and can be started again."""

    exit_code = 75
