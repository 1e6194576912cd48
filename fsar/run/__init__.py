"""What a run is made of: configuration, recipes, device, processes, folder."""
