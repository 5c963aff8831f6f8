"""Options, environment variables and the configuration file."""
