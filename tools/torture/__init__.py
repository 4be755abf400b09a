"""Tools that hurt a cluster of real processes, and judge what its clients saw."""
