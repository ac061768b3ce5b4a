"""What other ways to have a session per request do where ours makes a promise: `make peers`."""
