"""A chat in the browser that shows the merged tokens: `session` is its state and logic, `app` its layout."""
