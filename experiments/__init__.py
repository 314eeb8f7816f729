"""The paper's tables and figures, each by one command. The other tables and figure2 have the options of table1."""

import runtime.start  # noqa: F401 # isort: skip
