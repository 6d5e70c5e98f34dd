"""The publisher `hub:OWNER/NAME`: one commit, guarded by its parent, read back, and named only when it is proven."""
