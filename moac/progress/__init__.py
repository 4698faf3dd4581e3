"""Long work shows itself, with the time left."""
