"""Which videos and frames an episode is made of."""
