"""What runs in the environments of the peers: a module for each library, on top of `ladder`."""
