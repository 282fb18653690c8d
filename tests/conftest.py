"""What all tests share."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A slow or busy machine is no failure. Loaded in CI too, where Hypothesis would choose
# a profile that repeats the same examples: each run explores new ground, and prints
# what repeats a failure.
settings.register_profile(
    "neo",
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("neo")
