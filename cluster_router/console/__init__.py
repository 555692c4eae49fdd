"""The console: a page over the live service, and the board that its figures come from."""
