"""The rules of an algorithm as a test that everyone can run on a method of their own: `fedtail check FILE.py:Name`.

A rule is broken on small made-up problems (see `problems`) or it is not; a broken one says what was seen, why the rule
exists and what to do.
"""

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Literal

from fedtail import config
from fedtail.algorithm import Algorithm
from fedtail.checks import agree, copes, pure, returns
from fedtail.checks.problems import ROUNDS, Subject
from fedtail.checks.rule import Broken, Rule
from fedtail.checks.source import Cause, place, said, suspects
from fedtail.errors import ConfigError

# In the order in which faults explain one another.
RULES: tuple[Rule, ...] = (
    returns.configuration, returns.runs, returns.summable, returns.finite,
    pure.no_global_randomness, pure.state_in_values, pure.inputs_unmodified, pure.deterministic, pure.cohort_order,
    agree.three_rounds, agree.same_seed, agree.other_seed, agree.parallel, agree.donated, agree.vmap, agree.chunk,
    agree.stable, agree.resume,
    copes.moves, copes.schedule, copes.batchnorm, copes.dropout, copes.one_client, copes.one_example,
    copes.predict, copes.each_alone,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Test an algorithm by the rules that every method must keep; exit code 1 if one is broken."""

    json: bool = False
    """Print JSON."""
    frozen: tuple[str, ...] = ()
    """Beginnings of the names of parameters that are not to be trained."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a rule."""

    rule: str
    status: Literal["passed", "failed", "skipped"]
    seen: str = ""
    """What was seen: client, tensor, size of the difference; or the error with the line of the user's file."""
    why: str = ""
    """Why the rule exists."""
    remedy: str = ""
    """What to do."""


# What torch says -> (what to do, which lines to point at). The first that fits.
ERRORS: tuple[tuple[str, str, Cause], ...] = (
    ("random", "Random numbers are declared (`draws`) and handed in as batch.draws; never draw them yourself.", "random"),
    (".item()", "local_* reads a value off a tensor (.item(), float(), int()): keep tensors; branch with torch.where.", "read"),
    ("data-dependent", "local_* branches on a tensor's value, or its shapes depend on values: keep tensors; branch with "
     "torch.where; multiply by a mask in the place of x[mask]; fedtail.losses.one_hot in the place of F.one_hot.", "read"),
    ("dynamic shape", "Shapes must not depend on values: multiply by a mask in the place of x[mask].", "none"),
    ("in-place", "Make new tensors: `a + b` in the place of `a.add_(b)` or `a += b`.", "in place"),
    ("inplace", "Make new tensors: `a + b` in the place of `a.add_(b)` or `a += b`.", "in place"),
    ("expected Tensor", "Return torch scalars as metrics and weight, and trees of tensors as states.", "none"),
)  # fmt: skip


def check(algorithm: str | Algorithm, frozen: Sequence[str] = ()) -> list[Result]:
    """Tests an algorithm by every rule, on small problems in float64; takes some seconds.

    Args:
        algorithm: a name (fedtail list algorithms), "file.py:Name", or an algorithm with its options.
        frozen: beginnings of the names of parameters that are not to be trained ("head.").

    Returns:
        A result for each rule. A rule is skipped where an earlier one makes it say nothing.

    Raises:
        ConfigError: there is no such algorithm, or it is one that trains nothing.
    """
    return list(examine(algorithm, frozen))


def examine(algorithm: str | Algorithm, frozen: Sequence[str] = (), rules: Sequence[Rule] = RULES) -> Iterator[Result]:
    """Yields the results of `check` as they come."""
    found: Algorithm = (
        config.from_dict(Algorithm, {"name": algorithm}, "algorithm") if isinstance(algorithm, str) else algorithm
    )
    if found.needs_start(ROUNDS):
        raise ConfigError(f"{type(found).__name__} trains no backbone in the {ROUNDS} rounds of the check; the rules "
                          "are for methods that train.")  # fmt: skip
    subject, gates = Subject(found, frozen), {rule.name for rule in RULES if rule.gate}
    for rule in rules:
        if needed := subject.broken & {*gates, rule.after}:
            yield Result(rule.name, "skipped", f"not tested, since {needed.pop()!r} does not hold")
            continue
        result = _test(rule, subject)
        if result.status == "failed":
            subject.broken.add(rule.name)
        yield result


def _test(rule: Rule, subject: Subject) -> Result:
    cls = type(subject.algorithm)
    try:
        rule.test(subject)
        return Result(rule.name, "passed", why=rule.why)
    except Broken as broken:
        seen, remedy, cause = broken.seen, broken.remedy or rule.remedy, rule.cause
    except Exception as error:  # whatever a user's code raises is what was seen
        seen, (remedy, cause) = place(cls, error), _known(rule, said(error))
    lines = suspects(cls, cause)
    return Result(rule.name, "failed", seen, rule.why, f"{remedy} Look at {lines}" if lines else remedy)


def _known(rule: Rule, text: str) -> tuple[str, Cause]:
    """Returns what to do about an error, and what kind of line may be its cause."""
    for words, remedy, cause in ERRORS:
        if words in text:
            return remedy, cause
    return rule.remedy, rule.cause


def main(name: str, algorithm: Algorithm, frozen: Sequence[str], as_json: bool) -> int:
    """Prints each result as it comes, or all as JSON.

    Returns:
        The exit code: 1 if a rule is broken.
    """
    results: list[Result] = []
    for result in examine(algorithm, frozen):
        results.append(result)
        if not as_json and result.status != "skipped":
            print(to_text(result), flush=True)
    found = [result.status for result in results]
    if as_json:
        rules = [dataclasses.asdict(result) for result in results]
        print(json.dumps({"algorithm": name, "passed": "failed" not in found, "rules": rules}, indent=1))
    else:
        skipped = f"; {found.count('skipped')} could not be tested" if "skipped" in found else ""
        print(f"{name}: {found.count('passed')} of {len(found)} rules hold{skipped}")
    return int("failed" in found)


def to_text(result: Result) -> str:
    """Returns a result as lines for a terminal."""
    if result.status != "failed":
        return f"ok    {result.rule}" if result.status == "passed" else f"-     {result.rule} ({result.seen})"
    lines = [f"FAIL  {result.rule}"]
    for word, text in (("seen", result.seen), ("why", result.why), ("mend", result.remedy)):
        lines += textwrap.wrap(
            text, 110, initial_indent=f"      {word:6}", subsequent_indent=" " * 12, break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)
