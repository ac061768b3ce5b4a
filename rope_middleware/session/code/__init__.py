"""The application's code: where it is, and what is said of it.

- lines: the application's line in a stack. stacks: the frames of all threads. where: the line at
  which the work on a transaction is now.
- bodies: whether a generator that runs here is a response's body.
- telling: a WARNING, once for each line of code.
"""
