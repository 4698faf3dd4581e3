"""What a package is: its files, manifest, spec and plan."""
