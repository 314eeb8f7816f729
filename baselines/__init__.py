"""The baselines of Table 1 that have a concept of their own: InfoBERT and RobustT."""

import runtime.start  # noqa: F401 # isort: skip
