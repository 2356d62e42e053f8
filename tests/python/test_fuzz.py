"""Random calls of every operation against the oracle; see harness/fuzz.py.

python -m pytest tests/python/test_fuzz.py --fuzz-cases 100000 --fuzz-seed 7
"""

import pytest
from harness import compare, fuzz


def test_fuzz(fuzz_number, fuzz_seed, device, count_fuzzed):
    case = fuzz.case(fuzz_seed, fuzz_number)
    try:
        compare.check_call(case.call(device))
    except Exception as error:
        pytest.fail(
            f"{type(error).__name__}: {error}\nreproduce: python -m pytest "
            f"tests/python/test_fuzz.py --fuzz-seed {fuzz_seed} --fuzz-only {fuzz_number}",
            pytrace=not isinstance(error, AssertionError),
        )
    count_fuzzed(fuzz.properties(case))


@pytest.mark.parametrize("start", [0, 1000, 50_000])
def test_quotas(fuzz_seed, start):
    """The cases reach everything that they claim to reach."""
    counts = fuzz.count(fuzz.case(fuzz_seed, number) for number in range(start, start + 1000))
    missed = {k: counts[k] for k, quota in fuzz.QUOTAS.items() if counts[k] < quota}
    assert not missed
