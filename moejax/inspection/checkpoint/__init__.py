"""What a checkpoint does with text, whether it is a run's or a released model's."""
