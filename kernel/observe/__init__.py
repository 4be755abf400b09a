"""Looking at a node from outside: its metrics, a profile of it, spans of the work it does."""
