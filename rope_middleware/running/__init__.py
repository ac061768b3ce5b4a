"""Running work to its end from async code: past cancellation, and off the event loop."""
