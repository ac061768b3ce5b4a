"""``make mariadb`` names this module; the server is in `tests.servers.mariadb`."""

from __future__ import annotations

from tests.servers.mariadb import main

if __name__ == "__main__":
    main()
