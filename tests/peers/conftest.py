"""torch's compiler sets variables at its import, so it is there before a test looks at what it leaves behind.

Not in the test modules: processes that ranks spawn import those anew.
"""

from __future__ import annotations

import torch._dynamo  # noqa: F401
