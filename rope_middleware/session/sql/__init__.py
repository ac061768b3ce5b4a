"""The statements of sessions: what they do, and which were executed.

- literals: what of a text is neither quoted nor a comment.
- statements: whether the text of a statement says that it writes. writes: whether it may write.
- notes: what was executed on a connection, and whether a result is still unread.
- taking: a connection is taken from who may still send statements over it.
"""
