"""Sessions of read-only scopes, and the replicas that they read from (R1 to R3).

- sessions: the classes of such sessions. autocommit, switches: an engine that reads without a
  transaction, and how the drivers do that.
- replicas, failover: which replica is read, and what happens where it is lost. positions: how far a
  replica must have come.
"""
