"""Who holds a connection, and who waits for one (H1 to H5).

- begun, ended: the transactions that are open, and those that have just ended.
- holders: `holders()`. held: what is held without being used.
- door, waits: who is between a pool and a connection of it. pools: how many it gives.
- giving_way, stuck: somebody is about to wait. An outer scope gives its connection back, a deadlock
  is refused, a time-out names the holders.
"""
