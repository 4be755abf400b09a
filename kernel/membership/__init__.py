"""Who is there: SWIM with Lifeguard as one pure state machine.

`protocol.Membership` is the machine, `messages` its vocabulary; the rest are its parts.
"""
