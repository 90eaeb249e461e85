"""How the embedded model is made: its data, its training, its export."""
