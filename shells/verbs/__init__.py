"""The verbs, each defined once, for the command line and every later shell."""
