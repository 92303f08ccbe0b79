"""Hypothesis profiles: `make test` tries the same examples every time, `make test-all` others each time."""

from hypothesis import settings

settings.register_profile("gate", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("gate")
