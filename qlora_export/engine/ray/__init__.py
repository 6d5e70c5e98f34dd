"""Building over several machines: batches of tensors that actors of Ray work on, and who answers for them."""
