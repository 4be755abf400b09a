"""The console in a browser: a page on loopback, behind a token, that shows a Textual console."""
