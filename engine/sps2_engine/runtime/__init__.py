"""The engine process: its link to the supervisor, its device, its group, its main loop."""
