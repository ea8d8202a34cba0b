"""A rank is a supervisor and its engine; a group is its ranks, led by rank 0. Shared by both workers; torch-free."""
