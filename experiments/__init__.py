"""The paper's tables, each by one command."""

import runtime.start  # noqa: F401 # isort: skip
