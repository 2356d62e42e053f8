"""Options and the closing summary of the Python tests."""

import collections
import statistics

import pytest
from harness import compare, fuzz

import mamba_ssm  # noqa: F401  registers the operations

_fuzzed = collections.Counter()
_left_out = collections.Counter()
_cells = collections.defaultdict(dict)  # {(row, device): {column: content}}


def pytest_addoption(parser):
    group = parser.getgroup("mamba_ssm")
    group.addoption("--full", action="store_true", help="also run the large tests")
    group.addoption("--fuzz-cases", type=int, default=2000, help="random cases over all operations")
    group.addoption("--fuzz-seed", type=int, default=0, help="what the random cases are made from")
    group.addoption("--fuzz-only", type=int, help="run this one random case")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: large or slow, run with --full")


def pytest_generate_tests(metafunc):
    if "fuzz_number" in metafunc.fixturenames:
        only = metafunc.config.getoption("--fuzz-only")
        numbers = range(metafunc.config.getoption("--fuzz-cases")) if only is None else [only]
        metafunc.parametrize("fuzz_number", numbers)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    for item in left_out:
        _left_out[item.location[0].rsplit("/", 1)[-1]] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture
def fuzz_seed(request):
    return request.config.getoption("--fuzz-seed")


@pytest.fixture
def count_fuzzed():
    return _fuzzed.update


@pytest.fixture
def record_cell():
    """record_cell(row, column, device, content): a cell of the table of compilers."""

    def record(row, column, device, content):
        _cells[row, device][column] = content

    return record


def pytest_terminal_summary(terminalreporter, config):
    write = terminalreporter.write_line
    if _fuzzed:
        terminalreporter.section(f"fuzz, seed {config.getoption('--fuzz-seed')}")
        for group in ("op", "type", "layout"):
            counts = {k: n for k, n in _fuzzed.items() if k.startswith(group + " ")}
            write(", ".join(f"{k.split(' ', 1)[1]} {n}" for k, n in sorted(counts.items())))
        rest = [k for k in fuzz.QUOTAS if k.split(" ")[0] not in ("op", "type", "layout")]
        write(", ".join(f"{k} {_fuzzed[k]}" for k in rest))
    if compare.ratios:
        terminalreporter.section("errors over those of the plain version: median, largest")
        groups = collections.defaultdict(list)
        for ratio in compare.ratios:
            groups[ratio.op, ratio.dtype].append(max(ratio.largest, ratio.rms))
        for (op, dtype), values in sorted(groups.items()):
            median = statistics.median(values)
            write(f"{op} {dtype}: {median:.2f}, {max(values):.2f} of {len(values)}")
    if _cells:
        terminalreporter.section("compilers")
        for (row, device), cells in _cells.items():
            write(f"{row}, {device}: " + ", ".join(f"{c} {found}" for c, found in cells.items()))
    if _left_out:
        terminalreporter.section("left out without --full")
        write(", ".join(f"{name} {n}" for name, n in sorted(_left_out.items())))
