"""Aliases, the ring and its epoch: who belongs to the cluster, agreed in Nexus registers.

`protocol.Registry` is the machine, `messages` what it keeps and tells; the rest are its parts.
"""
