"""The paper's tables and figures, each by one command. All take the options of table1.py."""

import runtime.start  # noqa: F401 # isort: skip
