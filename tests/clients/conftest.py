"""The matrix at the end: which family gave the right answers in which cell."""

import collections

import pytest

_matrix = collections.defaultdict(lambda: collections.defaultdict(list))


@pytest.fixture
def count_in_matrix(request):
    """A function of the row and the column where the result of this test is counted."""
    return lambda *place: request.node.user_properties.append(("matrix", place))


def pytest_runtest_logreport(report):
    place = dict(report.user_properties).get("matrix")
    if place and (report.when == "call" or report.failed):
        row, column = place
        _matrix[row][column].append(report.passed)


def pytest_terminal_summary(terminalreporter):
    if not _matrix:
        return
    columns = list(dict.fromkeys(column for row in _matrix.values() for column in row))
    terminalreporter.section("transformers: cells passed / run")
    rows = [("family", *columns)]
    for name, cells in _matrix.items():
        counts = (f"{sum(cells[c])}/{len(cells[c])}" if cells[c] else "-" for c in columns)
        rows.append((name, *counts))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
        terminalreporter.write_line(line.rstrip())
