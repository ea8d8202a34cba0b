"""What all services share, torch-free: config, errors, server, channel, interceptors, telemetry."""
