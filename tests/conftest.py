"""MuJoCo decides when it is imported how it draws: what it draws with here is settled before any test imports it."""

import ctrlrl.envs  # noqa: F401
