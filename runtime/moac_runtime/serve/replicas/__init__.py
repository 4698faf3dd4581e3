"""A server of several processes, each with a copy of the model (`moac serve --replicas`)."""
