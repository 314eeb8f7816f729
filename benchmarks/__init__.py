"""Speed, side by side with transformers and TextAttack."""

import runtime.start  # noqa: F401 # isort: skip
