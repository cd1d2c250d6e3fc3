"""What a platform engineer does: back up, restore, move, and see what is wrong."""
