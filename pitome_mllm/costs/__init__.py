"""What a model with merging costs: FLOPs, memory, time; and the shapes of published models."""
