"""Makes what is generated of the Helm chart: the flags in its schema, and its README."""
