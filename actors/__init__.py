"""What a reasoning-RL system is made of: each role a folder, the algorithm in controller.py. Loads nothing."""
