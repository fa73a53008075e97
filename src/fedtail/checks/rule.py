"""What a rule is: a test, the reason for it, and what to do if it is broken."""

from collections.abc import Callable
from typing import NamedTuple

from fedtail.checks.problems import Subject
from fedtail.checks.source import Cause

IMPURE = (
    "Return what must be remembered: client state for what a client keeps, server state for the server, local.extra within "
    "a round."
)
GUARD = "Guard divisions and logarithms (clamp_min): a client may lack a class, and hold a single example."


class Broken(Exception):  # noqa: N818 (it is an answer, not an error)
    """A rule does not hold: what was seen, and a remedy where it is another than the rule's own."""

    def __init__(self, seen: str, remedy: str = ""):
        super().__init__(seen)
        self.seen, self.remedy = seen, remedy


class Rule(NamedTuple):
    """What is tested and why."""

    name: str
    test: Callable[[Subject], None]  # raises Broken
    why: str
    remedy: str
    cause: Cause  # which lines of the user's file to point at
    gate: bool  # without it the later rules say nothing
    after: str  # the rule without which this one says nothing


def rule(
    name: str, why: str, remedy: str, cause: Cause = "none", gate: bool = False, after: str = ""
) -> Callable[[Callable[[Subject], None]], Rule]:
    """Makes a rule of a test."""
    return lambda test: Rule(name, test, why, remedy, cause, gate, after)
