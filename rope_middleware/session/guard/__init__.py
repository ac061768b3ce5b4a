"""The commit before a response's start has its sessions for itself (C10; see `scope.settling`).

- sessions: sessions whose calls and commits wait for each other; blocks: so do ends of `begin()`.
- busy: whether somebody is in the middle of something. turns: waiting for that commit.
- by_error: whether an error has closed an AsyncSession.
"""
