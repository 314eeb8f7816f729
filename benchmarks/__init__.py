"""Speed, side by side with transformers and TextAttack."""
