"""The one seeded simulator: whole clusters of unchanged protocols in one process, no asyncio.

`world` carries out effects and breaks things, `faults` says what is broken how often, `run` is
the entry that the `sim` verb calls, and one module per protocol (`membership`) boots and checks.
"""
