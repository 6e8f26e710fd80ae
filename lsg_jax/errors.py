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
    """Weights, gates or what is computed from them are not finite."""

    exit_code = 70


class Preempted(LsgError):
    """The command was asked to stop. What it had done is saved where it saves, and it can be run again."""

    exit_code = 75
