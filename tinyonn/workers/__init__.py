"""Ray and Dask. Ray and CUDA read their environment when they start, so what every part needs is set here."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")  # whoever joins a cluster needs its token
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault(
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0"
)  # else `uv run` ships the current folder to every worker
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault(
    "RAY_prestart_worker_first_driver", "0"
)  # else a process for each CPU waits for work that never comes
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products of the same bits on every call
