"""What the fault suite counted, printed at its end, also where several processes ran it."""

import pytest


@pytest.fixture
def record(record_property):
    """record(text): a line of the summary."""
    return lambda text: record_property("fault", text)


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    lines = [
        value
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == "fault"
    ]
    if lines:
        terminalreporter.section("faults")
        for line in sorted(lines):
            terminalreporter.write_line(line)
