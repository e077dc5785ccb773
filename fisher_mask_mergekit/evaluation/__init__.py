"""What a merge is worth: its score on each task beside that of the model fine-tuned on it."""
