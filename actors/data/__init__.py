"""Tasks: problems, demonstrations, and which problems to ask. No torch."""
