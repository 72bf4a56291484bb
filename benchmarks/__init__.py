"""Programs that measure teon_optax; run them from the repository's root with `python -m`."""
