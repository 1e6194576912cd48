"""Class splits: lists of the field, those that ship, leaks between them."""
