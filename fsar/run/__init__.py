"""Parts of a run: configuration, recipes, weights, device, processes, folder."""
