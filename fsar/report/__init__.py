"""Results of runs, and the pages that show them."""
