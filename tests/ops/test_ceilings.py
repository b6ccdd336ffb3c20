import math

import pytest

from ops import ceilings


@pytest.mark.parametrize("ceiling", [ceilings.read_bandwidth, ceilings.fma_peak])
def test_a_ceiling_is_plausible_cached_and_repeatable(ceiling):
    assert ceiling() is ceiling()
    # On a busy machine one measurement may be far off; two of three agree.
    low, middle, high = sorted((ceiling(), ceiling.__wrapped__(), ceiling.__wrapped__()))
    assert math.isfinite(high) and low > 1e8
    assert min(middle / low, high / middle) < 2
