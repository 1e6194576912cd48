"""How things are timed, and the bounds beside them."""
