"""A whole deployment on this machine: which processes, in which order, and how they end."""
