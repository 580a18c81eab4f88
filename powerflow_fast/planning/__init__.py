"""Memory of a run before anything is rented."""
