"""Errors of databases and of sessions: what they mean, and what is added to them.

- listening: hears of a database's errors, and imports what knows them. codes: where each driver has
  the code of an error.
- refusal: the database asks to try again. lost: a connection is gone. aborted: a transaction is.
- trial, doubt, unanswered: the answer to a COMMIT was lost. What became of it (C9)?
- locks: who holds the lock (H5). sharing, shared_at: two tasks use one session (Y3). loading: an
  attribute was read too late.
"""
