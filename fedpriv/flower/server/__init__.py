"""What strategies need beside a method."""
