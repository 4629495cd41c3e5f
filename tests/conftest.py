"""MuJoCo decides when it is imported how it draws: what it draws with here is settled before any test imports it."""

from ctrlrl.envs.make import render_headless

render_headless()
