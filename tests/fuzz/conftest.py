"""The profile of `make fuzz`."""

from hypothesis import settings

settings.register_profile("fuzz", max_examples=100_000, print_blob=True)
