"""What the process from which workers fork imports once for all of them; no other process should import it.

webdataset brings PyTorch for its readers, which takes two seconds; where there is none it goes without. Its writer is
all that a worker needs, and a flow estimator that wants PyTorch imports it later.
"""

from __future__ import annotations

import sys

import preprocess.workers.pool  # noqa: F401

sys.modules["torch"] = None  # type: ignore[assignment]  # as where it is not installed
try:
    import webdataset  # noqa: F401
finally:
    del sys.modules["torch"]
