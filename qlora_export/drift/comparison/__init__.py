"""What a comparison of formats is made of: which to compare, what each costs, how fast it runs, and which to take."""
