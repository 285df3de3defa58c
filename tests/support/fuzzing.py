"""Settings that the fuzzers of files share."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings


def fuzz_settings(examples: int) -> settings:
    """The same examples in every run, unless RANDOM_EXAMPLES is set; a failure is not shrunk, which would
    take minutes. FUZZ_FACTOR: times so many examples.
    """
    return settings(
        max_examples=examples * int(os.environ.get("FUZZ_FACTOR", "1")),
        deadline=None,
        database=None,
        derandomize="RANDOM_EXAMPLES" not in os.environ,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
