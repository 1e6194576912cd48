"""Import once, in the fork server, what every worker uses; no other process should import this.

webdataset imports PyTorch for its readers, which takes two seconds. Without PyTorch it works too,
and workers use its tar writer only. So PyTorch is hidden during the import, and shown again after:
a user's flow estimator may want to import it later.
"""

from __future__ import annotations

import sys

import preprocess.workers.pool  # noqa: F401

sys.modules["torch"] = None  # type: ignore[assignment]  # "import torch" fails as if not installed
try:
    import webdataset  # noqa: F401
finally:
    del sys.modules["torch"]
