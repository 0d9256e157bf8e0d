"""Where the two planes meet: the scheduler thread, and what carries its tokens to the readers."""
