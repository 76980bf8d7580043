"""Set up a verification, run it, merge its shards."""
