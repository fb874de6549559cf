"""What training_speed.py compares: the plain way to fine-tune a CLIP (plain.py), and the compute floor (floor.py)."""
