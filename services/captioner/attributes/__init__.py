"""What the `attributes` engine measures on a picture and how it says it."""
