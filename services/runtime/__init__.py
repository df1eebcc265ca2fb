"""What every process has: settings, errors, server start and drain, telemetry."""
