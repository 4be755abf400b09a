"""Clusters for other people's test suites: the pytest plugin, and what it is made of."""
