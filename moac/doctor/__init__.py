"""What this machine has and lacks for compiling and running packages; it needs no extra itself."""
