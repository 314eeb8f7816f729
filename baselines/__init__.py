"""The baselines of Table 1 that need their own code: InfoBERT and RobustT."""

import runtime.start  # noqa: F401 # isort: skip
