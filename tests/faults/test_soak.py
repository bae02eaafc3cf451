"""What running jobs hold does not grow: two minutes of what `soak.py` does for half an hour."""

from __future__ import annotations

import pytest

from tests.faults.soak import soak

pytestmark = [pytest.mark.long, pytest.mark.timeout(400), pytest.mark.together]


def test_memory_descriptors_threads_and_mappings_stay() -> None:
    for name, samples in soak(2.0, 8).items():
        first, last = samples[2], samples[-1]  # after the first evaluations and checkpoints
        assert last.mib <= 1.02 * first.mib + 2, (name, samples)
        assert last.descriptors <= first.descriptors + 2 and last.threads <= first.threads, (name, samples)
        assert last.mappings <= 1.02 * first.mappings + 4, (name, samples)
        assert last.files <= first.files + 2, (name, samples)
