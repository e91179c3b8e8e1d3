"""Profile: what every expert did on every sample.

Read these files first: `kernel` (what is summed), `measure` (one sample), `groups` (which weight is whose), `stage`
(the whole), `reader` (`open_profile`).
"""

from tinyonn.profile.reader import Profile, open_profile

__all__ = ["Profile", "open_profile"]
