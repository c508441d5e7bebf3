"""What runs inside target pods. Standard library only, nothing of ours is imported: a target's image holds none of it."""
