"""The engine: the scheduler thread, and the streams that deliver its tokens to readers."""
