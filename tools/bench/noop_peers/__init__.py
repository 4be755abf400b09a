"""Scripts that run in a peer's own virtual environment: nothing of Manifold is there.

Each prints one line of JSON: `boot_s`, `tasks_per_s` (all tasks in flight), `round_trip_p50_ms`
(one in flight), `version`.
"""
