"""Settings of the whole suite: one compute thread in every process, and how long Hypothesis searches."""

import os

import hypothesis

# On two cores, several processes that each compute with two threads take longer than with one thread each.
# torch reads the variable when it is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# "default" is short and fails in the same way each time. `make soak` takes "soak", which looks for new failures.
hypothesis.settings.register_profile("default", max_examples=25, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("soak", max_examples=1000, deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("default")
