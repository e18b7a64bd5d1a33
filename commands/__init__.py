"""What the commands at the root are made of; none of it travels with a checkpoint."""
