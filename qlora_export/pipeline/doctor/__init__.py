"""What keeps a release from working on this machine, looked at before it is tried: each check with its remedy."""
