"""What the test run is told and tells: --slow, and the tools that were missing."""
from __future__ import annotations

import collections
import re

import pytest

# Tool to the tests that were skipped for want of it, in the order in which they were.
MISSING: dict[str, list[str]] = collections.defaultdict(list)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true",
                     help="also run the tests that take long or much of the machine")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long or much of the machine; needs --slow")


def pytest_collection_modifyitems(config, items):
    slow = [] if config.getoption("slow") else [one for one in items if one.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [one for one in items if one not in slow]


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """Under xdist, too, the process that writes the summary sees every report."""
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    if tool := re.search(r"(\S+) is not installed", reason):
        name = re.sub(r"\[.*", "", report.nodeid.rpartition("::test_")[2]).replace("_", " ")
        MISSING[tool[1]].append(name)


def pytest_terminal_summary(terminalreporter):
    if MISSING:
        said = []
        for tool, tests in MISSING.items():
            first, *more = dict.fromkeys(tests)
            also = f", and {len(more)} more" if more else ""
            said.append(f"{tool} (would have tested: {first}{also})")
        terminalreporter.write_line("Missing here: " + "; ".join(said))
