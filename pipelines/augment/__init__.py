"""Make normalised clips of decoded frames."""
