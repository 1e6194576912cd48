"""What models reach, not what they cost."""
