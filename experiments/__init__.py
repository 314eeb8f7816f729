"""The paper's tables and figures, each by one command. All tables and figure2 take the options of table1."""

import runtime.start  # noqa: F401 # isort: skip
