"""Bounds that more than one subsystem relies on, each with its arithmetic. What a user may change
is in `manifold.yaml`; what is here may only be changed together with the wire protocol.

Source: design page of the hyperbus (sockets, envelope, security), of membership and of the
scheduler. Bounds that one subsystem alone relies on stand in that subsystem.
"""

from __future__ import annotations

import re

KIB = 1 << 10
MIB = 1 << 20

# --- hyperbus: frames and envelopes ---------------------------------------------------------
FRAME_BYTES_MAX = 1 * MIB  # one frame of the bus; at 400 MB/s it holds a link for 2.6 ms
FRAME_ENVELOPES_MAX = 4096  # 1 MiB / 4096 = 256 bytes, the least a useful envelope takes
ENVELOPE_BYTES_MAX = FRAME_BYTES_MAX - 4 * KIB  # room for the frame's seal and its list header
DRAIN_FRAMES_MAX = 256  # frames read in one wake; then the loop serves others

# --- hyperbus: queues and sockets -----------------------------------------------------------
PEER_QUEUE_ENVELOPES_MAX = 1024  # a quarter of a frame's most: one flush empties the queue
PEER_QUEUE_BYTES_MAX = 8 * MIB  # eight full frames: 20 ms of a 400 MB/s link
DIALERS_MAX = 64  # about 1 ms and 2 descriptors each: 128 of the usual 1024 descriptors
PEERS_MAX = 4096  # nodes in one view: 4096 * 512 bytes of metadata = 2 MiB
REVERSE_CHANNELS_MAX = 16  # listeners for those who cannot be dialed: 32 descriptors
SOCKET_BUFFER_FRAMES = 16  # 16 frames of 1 MiB wait for one peer, 48 MiB for three

# --- hyperbus: sessions ---------------------------------------------------------------------
REPLAY_WINDOW_RECORDS = 1024  # as wide as a peer's queue: what is reordered is at most that
REKEY_RECORDS = 1 << 20  # far under the 2^64 nonces; 100 s at 10 000 records a second
REKEY_MS = 600_000
BAD_INPUTS_MAX = 10  # undecodable inputs of one pipe within BAD_INPUTS_MS close it
BAD_INPUTS_MS = 10_000

# --- membership -----------------------------------------------------------------------------
GOSSIP_BYTES_MAX = 1400  # one Ethernet frame of 1500 less headers, as memberlist
META_BYTES_MAX = 512  # a node's static description; memberlist's limit

# --- names ----------------------------------------------------------------------------------
NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\Z")  # safe in paths, sockets and variables
NAME_WORDS = "lower-case letters, digits and inner dashes"
CLUSTER_NAME_CHARS_MAX = 32
CLASS_NAME_CHARS_MAX = 24
NODES_MAX = 4096  # as PEERS_MAX: above it a full view no longer fits
ALIAS_CHARS_MAX = CLASS_NAME_CHARS_MAX + 5  # class, dash, up to four digits (NODES_MAX)

# --- sockets in the file system -------------------------------------------------------------
IPC_PATH_BYTES_MAX = 99  # sun_path holds 108 with its NUL; nng keeps some for its own prefix
SOCKET_NAME_BYTES_MAX = ALIAS_CHARS_MAX + 12  # alias and `.control`, `.reverse-NN`
RUNTIME_DIR_BYTES_MAX = IPC_PATH_BYTES_MAX - 1 - SOCKET_NAME_BYTES_MAX  # 57: `/`, then the name

# --- durable records ------------------------------------------------------------------------
RECORD_BYTES_MAX = 16 * MIB  # one record is read whole into memory; a ledger has 4 096 jobs * 4 KiB
