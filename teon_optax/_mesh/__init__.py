"""What devices of a mesh send each other so that each group is orthogonalized once."""
