"""Other libraries' names over this one, for code that was written for them."""
