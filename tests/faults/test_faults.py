"""If any call that changes files fails: one ERROR line, never a wrong file, and the command can be resumed."""

import errno
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import pytest

from tests.faults.cases import CONSTANTS, EVERY, NAMES, case_named
from tests.faults.injection import CommandServer, Fault, command_server, skip_reason
from tests.faults.trials import Trials

pytestmark = pytest.mark.skipif(bool(skip_reason()), reason=skip_reason())

KINDS = {
    f"{errno.errorcode[error]} {'for good' if for_good else 'once'}": functools.partial(
        Fault, error=error, for_good=for_good
    )
    for error in (errno.ENOSPC, errno.EIO)
    for for_good in (False, True)
}
"""A full or a broken disk, for one call or from that call on."""

TrialsOf = Callable[[str], Trials]
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    with command_server(tmp_path_factory.mktemp("server"), CONSTANTS) as running:
        yield running


@pytest.fixture(scope="module")
def trials_of(server: CommandServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrialsOf]:
    """Create the trials of each command on first use."""
    with ExitStack() as stack:

        @functools.cache
        def create(name: str) -> Trials:
            folder = tmp_path_factory.mktemp("case")
            return Trials(server, stack.enter_context(case_named(name, folder)), folder / "out")

        yield create


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_call_may_fail(name: str, kind: str, trials_of: TrialsOf, record_property: Record) -> None:
    """`FAULTS_EVERY=n`: only every n-th call fails, with a different offset for each kind."""
    trials = trials_of(name)
    every = int(os.environ.get("FAULTS_EVERY", EVERY.get(name, 1)))
    first = 1 + every * list(KINDS).index(kind) // len(KINDS)
    faults = [KINDS[kind](call) for call in range(first, len(trials.calls) + 1, every)]
    assert_withstood(trials, faults, f"{name}, {kind}", record_property)


@pytest.mark.parametrize("name", ["cell", pytest.param("pooled cge", marks=pytest.mark.slow)])
def test_a_sample_of_calls_may_fail(name: str, trials_of: TrialsOf, record_property: Record) -> None:
    trials, kinds = trials_of(name), list(KINDS.values())
    calls = range(1, len(trials.calls) + 1, 17)
    faults = [kinds[i % len(kinds)](call) for i, call in enumerate(calls)]
    assert_withstood(trials, faults, f"{name}, a sample", record_property)


def assert_withstood(trials: Trials, faults: Sequence[Fault], what: str, record_property: Record) -> None:
    """Try every fault, record the outcomes for the summary, and fail with a list of problems."""
    outcomes, problems = Counter[str](), []
    for fault in faults:
        try:
            outcomes.update(trials.run(fault))
        except AssertionError as wrong:
            outcomes[str(wrong).partition("\n")[0]] += 1
            problems.append(f"{fault} ({trials.calls[fault.call - 1]}): {wrong}")
    counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items()))
    record_property("faults", f"{what}: {len(faults)} faults of {len(trials.calls)} calls: {counts}")
    if problems:
        pytest.fail(f"{len(problems)} of {len(faults)} faults\n\n" + "\n\n".join(problems), pytrace=False)
