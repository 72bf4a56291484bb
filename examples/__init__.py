"""Programs that use teon_optax; run them from the repository's root with `python -m`."""
