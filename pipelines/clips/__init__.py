"""Which frames a clip for pre-training or probes is made of."""
