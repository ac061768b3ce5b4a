"""Outside of scopes: a session hangs by a rope on the frame of the function that uses it."""
