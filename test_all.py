"""Run the tests: identities and closed forms, on tiny networks and small images.

    python test_all.py                       # the quick ones
    python test_all.py --slow                # all: also killed runs, ranks, compilation
    python test_all.py tests/test_sample.py  # one file; other arguments go to pytest, too

At the end it prints the time of each file and the ten slowest tests. With pytest-xdist, two
processes share the work (-n 0 for one).
"""

import collections
import importlib.util
import os
import re
import sys

import pytest

from fid import cpu_cores

HERE = os.path.dirname(os.path.abspath(__file__))


class Times:
    """A pytest plugin that prints the time of each file and the ten slowest tests."""

    def __init__(self):
        self.seconds = collections.Counter()  # of each test, setup and teardown included
        self.outcomes = collections.defaultdict(collections.Counter)  # of each file

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        # The call counts as the test. A skip or an error can happen in the setup instead.
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid.partition("::")[0]][report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        for file, outcomes in sorted(self.outcomes.items()):
            seconds = sum(s for test, s in self.seconds.items() if test.startswith(f"{file}::"))
            counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items()))
            write(f"{seconds:7.1f} s  {file}: {counts}")
        write("The slowest tests:")
        for test, seconds in self.seconds.most_common(10):
            write(f"{seconds:7.1f} s  {test}")


def pytest_arguments(given):
    """The arguments for pytest: those given, and defaults for what was not."""
    options = ["-q"]
    # pytest keeps no files, unless the user asks for the tests that failed before.
    if not any(re.match(r"--lf|--ff|--last-failed|--failed-first", argument) for argument in given):
        options += ["-p", "no:cacheprovider"]
    if "--slow" in given:
        given = [argument for argument in given if argument != "--slow"]
    elif not any(argument.startswith("-m") or "::" in argument for argument in given):
        options += ["-m", "not slow"]

    # Two processes, unless the user chooses. Only a single one can print (-s) or start a debugger.
    chosen = any(re.match(r"-n|-s|--numprocesses|--capture|--pdb", argument) for argument in given)
    if not chosen and cpu_cores() >= 2 and importlib.util.find_spec("xdist"):
        options += ["-n", "2"]

    # With several processes, pytest does not name a file that does not exist.
    for argument in given:
        file = argument.partition("::")[0]
        if file.endswith(".py") and not file.startswith("-") and not os.path.exists(file):
            sys.exit(f"test_all.py: {file}: no such file")

    # All tests, unless the user names some.
    named = any(os.path.exists(argument.partition("::")[0]) for argument in given)
    files = [] if named else [f"{HERE}/tests", f"{HERE}/related"]
    return [*options, *given, *files]


if __name__ == "__main__":
    sys.exit(pytest.main(pytest_arguments(sys.argv[1:]), plugins=[Times()]))
