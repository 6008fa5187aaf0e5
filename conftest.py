"""What a run of the tests is told and tells: --slow, what one worker runs, what was not run."""
from __future__ import annotations

import collections
import inspect

import pytest

# Fixtures that many tests look at, and that take long to make; the slowest first.
SHARED = ("trials", "started", "runs", "escaped", "leftovers", "room", "hoards",
          "again", "counted", "outputs", "built", "invoked")
# Reason to the tests that were skipped for it, in the order in which they were.
NOT_RUN: dict[str, list[str]] = collections.defaultdict(list)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true",
                     help="also run the tests that take long or much of the machine")


def pytest_collection_modifyitems(config, items):
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and not config.getoption("slow"):
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    if hasattr(config, "workerinput"):
        # One of several workers: what takes long goes first, lest one be alone with it at the end.
        # Shared fixtures do, then the file from its end, for its first parts are the quick ones.
        items.reverse()
        items.sort(key=lambda item: [*SHARED, ""].index(shared_by(item)))


def name_of(nodeid: str) -> str:
    """The name of the test function."""
    return nodeid.partition("[")[0].rpartition("::")[2]


def shared_by(item) -> str:
    """The shared fixture that a test looks at, "" for none."""
    return next((name for name in SHARED if name in item.fixturenames), "")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One worker runs all tests of a shared fixture, so that it is made once.

    xdist's own groups do the same, but not under pytest 9.2, where they are passed over in silence.
    """
    from xdist.scheduler import LoadScopeScheduling

    import test_nanogrid

    class BySharedFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            test = getattr(test_nanogrid, name_of(nodeid))
            arguments = inspect.signature(test).parameters
            return next((name for name in SHARED if name in arguments), nodeid)

    config.option.loadscopereorder = False
    return BySharedFixture(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """Under xdist, too, the process that writes the summary sees every report."""
    if report.skipped and isinstance(report.longrepr, tuple):
        test = name_of(report.nodeid)
        reason = report.longrepr[2].replace("Skipped: ", "")
        NOT_RUN[reason].append(test.replace("test_", "", 1).replace("_", " "))


def pytest_terminal_summary(terminalreporter):
    for reason, tests in NOT_RUN.items():
        first, *more = dict.fromkeys(tests)
        also = f", and {len(more)} more" if more else ""
        terminalreporter.write_line(f"Not run here: {reason} (would have tested: {first}{also})")
