"""Scripts that run in a peer's own virtual environment: nothing of Manifold is there.

Arguments: tasks, round trips, workers, tasks of the batched run (0: none), tasks in a batch.
Each prints one line of JSON: `boot_s`, `tasks_per_s` (all tasks in flight), `round_trip_p50_ms`
(one in flight), `batched_per_s` (as the framework's users batch), `version`.
"""
