"""What measures: the embedded benchmark and its model's training, accuracy, speed, encoders alone, lmms-eval."""
