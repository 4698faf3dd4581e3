"""What runs a package's model, one folder a backend."""
