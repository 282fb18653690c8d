"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# A slow or busy machine is no failure; a seed is printed for each failure instead.
settings.register_profile(
    "default",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# CI explores new ground at each run.
settings.register_profile("ci", settings.get_profile("default"), derandomize=False)
settings.load_profile("ci" if os.environ.get("CI") else "default")
