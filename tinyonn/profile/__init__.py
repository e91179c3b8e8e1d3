"""Profile: what every expert did on every sample.

Read these files first: `kernel` (what is summed), `measure` (one sample), `groups` (which weight is whose), `stage`
(the whole), `profile` (`open_profile`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tinyonn.workers  # noqa: F401  (what Ray reads when it is imported, which modules here do)

if TYPE_CHECKING:
    from tinyonn.profile.profile import Profile, open_profile

__all__ = ["Profile", "open_profile"]


def __getattr__(name: str) -> Any:
    """Import on first use: what is measured needs no tables."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tinyonn.profile import profile

    return getattr(profile, name)
