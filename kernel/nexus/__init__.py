"""Agreement: CASPaxos registers over an explicit set of voters. See docs/nexus.md."""
