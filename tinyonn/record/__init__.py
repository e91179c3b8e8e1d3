"""The recorder: what every weight did on every sample."""

import tinyonn.workers  # noqa: F401  (what Ray and CUDA read when they start)
