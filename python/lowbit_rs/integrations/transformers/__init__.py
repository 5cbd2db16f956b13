"""transformers: ``from_pretrained(..., quantization_config=LowbitConfig(...))`` and the loading of what it saved.

Importing this module registers the method ``lowbit``. ``import lowbit_rs`` sees to that (``lowbit_rs._post_import``).
"""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

_OLDEST = "5.17"

if Version(version("transformers")) < Version(_OLDEST):
    raise ImportError(f"transformers: got version {version('transformers')}, expected {_OLDEST} or newer")

from lowbit_rs.integrations.transformers.config import LowbitConfig  # noqa: E402  # after the check
from lowbit_rs.integrations.transformers.quantizer import LowbitQuantizer  # noqa: E402

__all__ = ["LowbitConfig", "LowbitQuantizer"]
