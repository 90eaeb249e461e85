"""What a server of merged models needs, whichever it is: uploads with limits, and a gate for requests."""
