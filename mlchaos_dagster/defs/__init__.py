"""The dg component folder: one thin component over the library."""
