"""A chat in the browser that shows the merged tokens."""
