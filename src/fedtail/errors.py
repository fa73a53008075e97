"""The errors that a user can cause, and therefore can mend.

    FedtailError
    |- ConfigError       an option, a name or a combination of them
    |- DataError         a data set or a file of one
    |- PartitionError    a split that cannot be made
    |- CheckpointError   a run folder or a checkpoint
    `- TrainingError     a loss, a gradient or a client during a run

Every message says what is wrong, where, what was got and what to do; the command line prints it without a traceback.
"""

import difflib
from collections.abc import Iterable


class FedtailError(Exception):
    """Base of every error that fedtail raises on purpose."""


class ConfigError(FedtailError, ValueError):
    """An option has an impossible value, is unknown, or does not fit another one."""


class DataError(FedtailError):
    """A data set is missing, truncated, altered or of the wrong form."""


class PartitionError(FedtailError, ValueError):
    """A long-tail cut or a partition cannot be made from these data."""


class CheckpointError(FedtailError):
    """A run folder or checkpoint is missing, damaged or belongs to another experiment."""


class TrainingError(FedtailError, RuntimeError):
    """Training failed: a non-finite loss, an exception on a client."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message that names the nearest known word.

    Args:
        word: What was asked for.
        known: The words that exist.

    Returns:
        "; did you mean 'lenet'?", or "." if nothing is near.

    >>> did_you_mean("lennet", ["mlp", "lenet"])
    "; did you mean 'lenet'?"
    """
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean '{by_lower[near[0]]}'?" if near else "."
