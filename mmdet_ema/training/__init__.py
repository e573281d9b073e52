"""What happens to averages during a training; knows no framework."""
