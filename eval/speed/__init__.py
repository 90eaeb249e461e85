"""How long every stage takes, plain and with merging."""
